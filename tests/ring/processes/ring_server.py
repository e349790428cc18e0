"""`longctx serve --ranks` as users start it, with a look at its processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx

START_SECONDS = 120.0
QUESTION = "What is the access code of the north gate?"
PARAGRAPH = "The ferry leaves at noon and the baker closes early on Fridays, as everybody knows. "
FACT = "\nThe access code of the north gate is 4711.\n"


def document(paragraphs: int) -> str:
    """About 18 tokens each, with a fact in the middle."""
    lines = [f"{number}. {PARAGRAPH}" for number in range(paragraphs)]
    return "\n".join([*lines[: paragraphs // 2], FACT, *lines[paragraphs // 2 :]])


class RingServer:
    def __init__(self, store: Path, *options: str, ranks: int = 2) -> None:
        words = [sys.executable, "-m", "longctx", "serve", "--ranks", str(ranks), "--threads", "1"]
        shared = ["--port", "0", "--store-dir", str(store), "--kv-codec", "raw"]
        self.log = store.with_suffix(".log")
        with self.log.open("a") as errors:
            self.process = subprocess.Popen(
                [*words, *shared, "--device-pool-gib", "0.1", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("longctx ready"), self.log.read_text()
        self.url = line.split()[-1]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """After a failed test: nothing of it is left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.client.close()

    # -- asking ---------------------------------------------------------------------------------

    def upload(self, text: str, *, wait: bool = True) -> str:
        sent = self.client.post(
            "/v1/files", files={"file": ("a.txt", text.encode())}, data={"purpose": "user_data"}
        )
        file_id: str = sent.raise_for_status().json()["id"]
        while wait and self.file(file_id)["state"] != "ready":
            time.sleep(0.1)
        return file_id

    def file(self, file_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/v1/files/{file_id}").json()["longctx"]
        assert found["state"] != "error", found
        return found

    def ask(self, file_id: str) -> tuple[str, int]:
        """The answer, and how many tokens were computed for it."""
        answer = self.client.post("/v1/chat/completions", json=body(file_id)).raise_for_status()
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text, answer.json()["longctx"]["computed_tokens"]

    def until_answered(self, file_id: str, seconds: float) -> tuple[str, int, float]:
        """As `ask`, again and again; and how long it took until that worked."""
        began = time.monotonic()
        while True:
            try:
                text, computed = self.ask(file_id)
                return text, computed, time.monotonic() - began
            except httpx.HTTPStatusError as error:
                assert error.response.status_code == 503, error.response.text
                assert time.monotonic() - began < seconds, error.response.text
                time.sleep(0.2)

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        (value,) = (line.split()[1] for line in lines if line.split()[0] == name)
        return float(value)

    # -- its processes --------------------------------------------------------------------------

    def processes(self) -> set[int]:
        """All, the server's own too."""
        return {self.process.pid, *descendants(self.process.pid)}

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid in descendants(self.process.pid):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"RANK=%d" % number in variables:
                return pid
        raise AssertionError(f"no process is rank {number}")

    def end(self, number: int = signal.SIGTERM) -> None:
        """Nothing of it is left, neither processes nor files of theirs."""
        everybody = self.processes()
        folders = {path for pid in everybody for path in sockets(pid)}
        self.process.send_signal(number)
        self.process.wait(30)
        until(lambda: not any(map(is_alive, everybody)), 10)
        until(lambda: not any(folder.exists() for folder in folders), 10)


def body(file_id: str, **options: Any) -> dict[str, Any]:
    part = {"type": "file", "file": {"file_id": file_id}}
    content = [part, {"type": "text", "text": QUESTION}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
        **options,
    }


def descendants(pid: int) -> Iterator[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    for child in map(int, found):
        yield child
        yield from descendants(child)


def sockets(pid: int) -> set[Path]:
    """Folders of the Unix sockets in a process's command line."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return {Path(word[5:]).parent for word in words if word.startswith("unix:")}


def is_alive(pid: int) -> bool:
    """A zombie has ended: only its parent has not asked yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
