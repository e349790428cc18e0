"""What uploads cost those who are there already: a real server, the embedded model.

pytest -m slow -s tests/api/test_busy.py           # prints the figures
pytest -m slow -s tests/api/test_busy.py -k pdf    # /health alone, while 100 MB of PDF are read
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import pytest

from tests.support.made_documents import pdf
from tests.support.waiting import patient, wait_for

ANSWER_TOKENS = 300
ANSWERS = 5
UPLOAD_BYTES = 4 << 20
SLOWDOWN = 1.20
HEALTH_P99_SECONDS = 0.050
PDF_BYTES = 100 << 20
PDFS = 10


@contextmanager
def server(store: Path) -> Iterator[str]:
    # The text has more tokens than the model's context; only their number matters here.
    options = ["--threads", "1", "--max-context", "2000000", "--force-context"]
    words = [sys.executable, "-m", "longctx", "serve", "--port", "0", "--store-dir", str(store)]
    with subprocess.Popen([*words, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("longctx ready ").strip()
        finally:
            process.terminate()
            process.wait(patient())


def seconds_per_token(client: httpx.Client, number: int) -> float:
    """Between the first and the last token of one streamed answer."""
    body = {
        "prompt": f"Answer number {number}",
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    times = []
    with client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (ANSWER_TOKENS - 1)


def health_seconds(url: str, stop: threading.Event, found: list[float]) -> None:
    with httpx.Client(base_url=url) as client:
        while not stop.wait(0.02):
            began = time.perf_counter()
            client.get("/health").raise_for_status()
            found.append(time.perf_counter() - began)


@contextmanager
def health_asked(url: str) -> Iterator[list[float]]:
    """The seconds that each answer of /health takes, until the block ends."""
    found: list[float] = []
    stop = threading.Event()
    probe = threading.Thread(target=health_seconds, args=(url, stop, found))
    probe.start()
    try:
        yield found
    finally:
        stop.set()
        probe.join()


def p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[98]


def state_of(client: httpx.Client, file_id: str) -> dict[str, Any]:
    state: dict[str, Any] = client.get(f"/v1/files/{file_id}").json()["longctx"]
    return state


def upload(client: httpx.Client, content: bytes, name: str = "large.txt") -> str:
    sent = client.post(
        "/v1/files",
        files={"file": (name, content)},
        data={"purpose": "user_data"},
    )
    file_id: str = sent.raise_for_status().json()["id"]
    return file_id


@pytest.mark.slow
def test_answers_and_health_hardly_notice_a_large_upload(tmp_path: Path) -> None:
    sentence = "The committee met on a grey morning and wrote down what each of them had seen. "
    text = (sentence * (UPLOAD_BYTES // len(sentence) + 1))[:UPLOAD_BYTES]
    with server(tmp_path) as url, httpx.Client(base_url=url, timeout=patient(600)) as client:
        seconds_per_token(client, -1)  # warms up
        quiet = [seconds_per_token(client, number) for number in range(ANSWERS)]
        busy: dict[str, list[float]] = {"parsing": [], "reading": []}
        prefilled = 0
        with health_asked(url) as health:
            # Parsing is over after an answer or two, so it takes several uploads to judge it.
            while min(map(len, busy.values())) < ANSWERS:
                file_id = upload(client, text.encode())
                enough = len(busy["reading"]) + 2
                while len(busy["reading"]) < enough:
                    phase = "parsing" if state_of(client, file_id)["tokens"] is None else "reading"
                    number = 1000 + sum(map(len, busy.values()))
                    busy[phase].append(seconds_per_token(client, number))
                prefilled += state_of(client, file_id)["prefilled_tokens"]
                client.delete(f"/v1/files/{file_id}").raise_for_status()
        quiet += [seconds_per_token(client, 2000 + number) for number in range(ANSWERS)]
    slowdowns = {phase: median(times) / median(quiet) for phase, times in busy.items()}
    print(
        f"\n{1000 * median(quiet):.2f} ms/token quiet, times "
        + ", ".join(f"{ratio:.2f} while {phase}" for phase, ratio in slowdowns.items())
        + f"; {prefilled:,} tokens read meanwhile; "
        f"/health p99 {1000 * p99(health):.1f} ms of {len(health)}"
    )
    assert prefilled > 0
    assert max(slowdowns.values()) < SLOWDOWN
    assert p99(health) < HEALTH_P99_SECONDS


@pytest.mark.slow
def test_health_hardly_notices_100_mb_of_pdf(tmp_path: Path) -> None:
    page = "\n".join(["The committee met and wrote down what each of them had seen."] * 40)
    # A page as scanners make them: text, and a picture of 100 KB that does not compress.
    made = [pdf(*[page] * 80, picture=190, seed=seed) for seed in range(PDFS)]
    total = sum(map(len, made))
    assert total > PDF_BYTES
    with server(tmp_path) as url, httpx.Client(base_url=url, timeout=patient(600)) as client:
        with health_asked(url) as quiet:
            wait_for(lambda: len(quiet) >= 300)
        began = time.perf_counter()
        with health_asked(url) as health:
            ids = [upload(client, file, f"{number}.pdf") for number, file in enumerate(made)]
            received = time.perf_counter() - began
            while_received = len(health)
            for file_id in ids:
                wait_for(lambda file_id=file_id: state_of(client, file_id)["tokens"], 600)
            read = time.perf_counter() - began
    print(
        f"\n{total / 1e6:.0f} MB of PDF received in {received:.1f} s, read in {read:.1f} s; "
        f"/health p99 {1000 * p99(health):.1f} ms of {len(health)} "
        f"({1000 * p99(health[:while_received]):.1f} ms while they came, longest "
        f"{1000 * max(health):.1f}), {1000 * p99(quiet):.1f} ms before"
    )
    assert p99(health) < HEALTH_P99_SECONDS
