"""Clients in a closed loop: each sends a request, waits for all of its answer, and sends the next.

`python -m tests.support.closed_loop` is a process that runs loops as lines of JSON on its standard
input tell it to, and prints what each took: over HTTP, or in an engine of its own without a server.
The clients know just enough HTTP to be cheap: what they cost is on the server's account.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from longctx.config import EngineConfig, ModelConfig
from longctx.llm import LLM
from longctx.request import Request, SamplingParams, Segment
from longctx.text.chat_template import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What one loop is: requests by so many clients, over HTTP where there is a `url`."""

    requests: int
    clients: int
    answer_tokens: int
    first: int = 0  # number of the first request, so that no prompt comes twice
    chat: bool = True
    stream: bool = True
    url: str = ""


class LoopProcess:
    """Runs loops in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Self]:
        words = [sys.executable, "-m", "tests.support.closed_loop"]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            yield cls(process)
            assert process.stdin is not None
            process.stdin.close()

    def seconds(self, loop: Loop) -> float:
        """Runs a loop; returns the seconds from one answer to the next."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(loop)), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline()) / loop.requests


def question(number: int) -> str:
    return f"Question {number}: who keeps the north gate, and since when?"


def main() -> None:
    engine: EngineLoop | None = None
    for line in sys.stdin:
        loop = Loop(**json.loads(line))
        if loop.url:
            print(asyncio.run(over_http(loop)), flush=True)
        else:
            engine = engine or EngineLoop()
            print(engine.run(loop), flush=True)


class EngineLoop:
    """The engine alone: prompts are tokens before the clock starts, and nobody reads the text."""

    def __init__(self) -> None:
        self.llm = LLM(config=EngineConfig(model=ModelConfig(threads=1)))

    def run(self, loop: Loop) -> float:
        engine, left = self.llm.engine, iter(list(self._requests(loop)))
        began = time.perf_counter()
        for _, request in zip(range(loop.clients), left, strict=False):
            engine.submit(request)
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error
                if output.finished and (request := next(left, None)) is not None:
                    engine.submit(request)
        return time.perf_counter() - began

    def _requests(self, loop: Loop) -> Iterator[Request]:
        sampling = SamplingParams(
            max_tokens=loop.answer_tokens, temperature=0.0, ignore_eos=True, seed=1
        )
        for number in range(loop.first, loop.first + loop.requests):
            if loop.chat:
                segments = self.llm._prompts.render([Message("user", (question(number),))])
            else:
                encode = self.llm.engine.tokenizer.encode_completion
                segments = (Segment(token_ids=tuple(encode(question(number)))),)
            yield Request(request_id=f"r{number}", segments=segments, sampling=sampling)


async def over_http(loop: Loop) -> float:
    """Returns the seconds of a loop over HTTP. AssertionError where an answer is not whole."""
    numbers = iter(range(loop.first, loop.first + loop.requests))
    streams = [await connected(loop.url) for _ in range(loop.clients)]
    began = time.perf_counter()
    await asyncio.gather(*(client(loop, numbers, *each) for each in streams))
    seconds = time.perf_counter() - began
    for _, writer in streams:
        writer.close()
    return seconds


async def connected(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def client(
    loop: Loop,
    numbers: Iterator[int],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    for number in numbers:
        writer.write(posted(loop, number))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        if loop.stream:
            body = await reader.readuntil(b"\r\n0\r\n\r\n")  # the last chunk
            assert b"data: [DONE]" in body[-40:], body[-500:]
        else:
            lower = head.lower()
            length = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
        assert b'"length"' in body[-2000:], body[-500:]


def posted(loop: Loop, number: int) -> bytes:
    body: dict[str, Any] = {
        "max_tokens": loop.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "seed": 1,
        "stream": loop.stream,
    }
    if loop.chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": question(number)}]
    else:
        path = "/v1/completions"
        body["prompt"] = question(number)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(loop.url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


if __name__ == "__main__":
    main()
