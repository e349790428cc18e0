"""`longctx serve --ranks` as users start it, and its processes as the system shows them."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from tests.support.waiting import patient, wait_for

QUESTION = "What is the access code of the north gate?"
PARAGRAPH = "The ferry leaves at noon and the baker closes early on Fridays, as everybody knows. "
FACT = "\nThe access code of the north gate is 4711.\n"


def document(paragraphs: int) -> str:
    """Return paragraphs of about 18 tokens each, with a fact in the middle."""
    lines = [f"{number}. {PARAGRAPH}" for number in range(paragraphs)]
    return "\n".join([*lines[: paragraphs // 2], FACT, *lines[paragraphs // 2 :]])


class RingServer:
    """A server process with ranks, which is killed at the end of the `with` block."""

    def __init__(self, store: Path, *options: str, ranks: int = 2) -> None:
        """Start it and wait until it is ready; its log is beside the folder `store`."""
        argv = [sys.executable, "-m", "longctx", "serve", "--ranks", str(ranks), "--threads", "1"]
        shared = ["--port", "0", "--store-dir", str(store), "--kv-codec", "raw"]
        self.log = store.with_suffix(".log")
        with self.log.open("a") as errors:
            self.process = subprocess.Popen(
                [*argv, *shared, "--device-pool-gib", "0.1", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("longctx ready"), self.log.read_text()
        self.url = line.split()[-1]
        self.client = httpx.Client(base_url=self.url, timeout=patient(60))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave nothing of it, even after a failed test."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(patient(30))
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.client.close()

    # -- asking ---------------------------------------------------------------------------------

    def upload(self, text: str) -> str:
        """Upload a document and wait until it is computed; return its file id."""
        sent = self.client.post(
            "/v1/files", files={"file": ("a.txt", text.encode())}, data={"purpose": "user_data"}
        )
        file_id: str = sent.raise_for_status().json()["id"]
        wait_for(lambda: self.file(file_id)["state"] == "ready")
        return file_id

    def file(self, file_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/v1/files/{file_id}").json()["longctx"]
        assert found["state"] != "error", found
        return found

    def ask(self, file_id: str) -> tuple[str, int]:
        """Ask the question; return the answer, and how many tokens were computed for it."""
        answer = self.client.post("/v1/chat/completions", json=body(file_id)).raise_for_status()
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text, answer.json()["longctx"]["computed_tokens"]

    def ask_until_answered(self, file_id: str, seconds: float) -> tuple[str, int]:
        """As `ask`, again and again while the server answers 503; `seconds` on an idle machine."""

        def try_to_ask() -> tuple[str, int] | None:
            try:
                return self.ask(file_id)
            except httpx.HTTPStatusError as error:
                assert error.response.status_code == 503, error.response.text
                time.sleep(0.2)  # the ranks that start again need the cores
                return None

        answered = wait_for(try_to_ask, seconds)
        assert answered is not None
        return answered

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        (value,) = (line.split()[1] for line in lines if line.split()[0] == name)
        return float(value)

    # -- its processes --------------------------------------------------------------------------

    def processes(self) -> set[int]:
        """Return the pids of all its processes, the server's own too."""
        return {self.process.pid, *descendants(self.process.pid)}

    def rank(self, number: int) -> int:
        """Return the pid of a rank."""
        for pid in descendants(self.process.pid):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"RANK=%d" % number in variables:
                return pid
        raise AssertionError(f"no process is rank {number}")

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the server; check that no process is left, and no file of theirs."""
        pids = self.processes()
        folders = {path for pid in pids for path in socket_folders(pid)}
        self.process.send_signal(number)
        self.process.wait(patient(30))
        wait_for(lambda: not any(map(is_alive, pids)), 10)
        wait_for(lambda: not any(folder.exists() for folder in folders), 10)


def body(file_id: str, **options: Any) -> dict[str, Any]:
    """Return a request's body that asks the question about a file."""
    part = {"type": "file", "file": {"file_id": file_id}}
    content = [part, {"type": "text", "text": QUESTION}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
        **options,
    }


def descendants(pid: int) -> Iterator[int]:
    """Yield the pids of the children of a process, of theirs, and so on."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    for child in map(int, found):
        yield child
        yield from descendants(child)


def socket_folders(pid: int) -> set[Path]:
    """Return the folders of the Unix sockets in a process's command line."""
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return {Path(each[5:]).parent for each in argv if each.startswith("unix:")}


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie has ended: only its parent has not asked yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
