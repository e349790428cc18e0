"""A server that is killed while it reads and answers, again and again, loses nothing it promised.

pytest -m slow -s tests/api/test_kill.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from longctx.bench.haystack import document
from longctx.embedded import model_path
from longctx.text.tokenizer import Tokenizer
from tests.support.waiting import patient

KILLS = 30
DOCUMENTS = 4
DOCUMENT_TOKENS = 6_000
START_SECONDS = 90.0  # on an idle machine
QUESTION = "What is the access code of the north gate?"


class Server:
    """`longctx serve` as a process of its own, which dies without a word."""

    def __init__(self, store: Path) -> None:
        words = [sys.executable, "-m", "longctx", "serve", "--port", "0", "--threads", "1"]
        options = ["--store-dir", str(store), "--kv-codec", "raw", "--device-pool-gib", "0.25"]
        log = store.with_suffix(".log")
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*words, *options], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("longctx ready"), log.read_text()
        self.client = httpx.Client(base_url=line.split()[-1], timeout=patient())

    def kill(self) -> None:
        engines = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        self.process.kill()
        for pid in engines:
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait(patient())
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.client.close()

    def files(self) -> dict[str, dict[str, Any]]:
        listed = self.client.get("/v1/files").raise_for_status().json()["data"]
        return {file["filename"]: file for file in listed}

    def upload(self, name: str, text: str) -> None:
        sent = self.client.post(
            "/v1/files", files={"file": (name, text.encode())}, data={"purpose": "user_data"}
        )
        sent.raise_for_status()

    def ask(self, file_id: str) -> tuple[str, int]:
        """The answer, and how many tokens were computed for it."""
        part = {"type": "file", "file": {"file_id": file_id}}
        body = {
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}],
            "max_tokens": 12,
            "temperature": 0,
        }
        answer = self.client.post("/v1/chat/completions", json=body).raise_for_status().json()
        text = answer["choices"][0]["message"]["content"]
        return text, answer["longctx"]["computed_tokens"]


def texts() -> dict[str, str]:
    tokenizer = Tokenizer(model_path())
    made = {}
    for number in range(DOCUMENTS):
        filler = document(
            DOCUMENT_TOKENS, seed=number, count_tokens=lambda text: len(tokenizer.encode(text))
        )
        half = len(filler) // 2
        fact = f"\nThe access code of the north gate is {4000 + 37 * number}.\n"
        made[f"{number}.txt"] = filler[:half] + fact + filler[half:]
    return made


@pytest.mark.slow
def test_thirty_kills_lose_nothing_that_was_durable(tmp_path: Path) -> None:
    documents = texts()
    chance = random.Random(1)
    server = Server(tmp_path / "calm")
    expected = {}
    for name, text in documents.items():
        server.upload(name, text)
        expected[name] = server.ask(server.files()[name]["id"])[0]
    server.kill()

    durable: dict[str, int] = {}
    store = tmp_path / "killed"
    asked = restored = 0
    for _ in range(KILLS):
        began = time.monotonic()
        server = Server(store)
        assert time.monotonic() - began < patient(START_SECONDS)
        assert not list(store.rglob("*.tmp")) and not list(store.rglob("*.partial"))
        end = time.monotonic() + chance.uniform(0.1, 4.0)
        try:
            files = server.files()
            while time.monotonic() < end:
                for name, file in files.items():
                    if file["longctx"]["state"] == "ready":
                        tokens = file["longctx"]["durable_tokens"]
                        assert tokens >= durable.get(name, 0), (name, tokens, durable)
                        durable[name] = tokens
                missing = [name for name in documents if name not in files]
                if missing and chance.random() < 0.5:
                    server.upload(missing[0], documents[missing[0]])
                elif files:
                    name = chance.choice(sorted(files))
                    text, computed = server.ask(files[name]["id"])
                    assert text == expected[name]
                    asked += 1
                    restored += computed < 200
                    if name in durable:
                        assert computed < 200, (name, computed)
                files = server.files()
        finally:
            server.kill()
    print(json.dumps({"kills": KILLS, "asked": asked, "restored": restored, "durable": durable}))
    assert durable and restored
