"""Start an installed `longctx serve` where a user would, ask it one question, and stop it.

    python tools/serve_once.py BIN/longctx [--expect-backend cpu]

The working folder is a new one that has packages `api`, `offload` and `compress` of its own, as
many projects do: a server that imported them would end. The document states a fact, and the
embedded model must find it. Needs nothing but Python's standard library; ends with status 1, and
what the server said, when anything is not as it should be.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOREIGN_PACKAGES = ("api", "compress", "offload", "prompt_cache")
READY = "longctx ready "
STOP_SECONDS = 60.0
FACT = "The access code of the north gate is 7421."
QUESTION = "What is the access code of the north gate?"
ANSWER = "7421"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("longctx", type=Path, help="the installed command")
    parser.add_argument("--expect-backend", help="what longctx_info must name as its attention")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longctx-elsewhere-") as name:
        folder = Path(name)
        for package in FOREIGN_PACKAGES:
            (folder / package).mkdir()
            (folder / package / "__init__.py").write_text(
                f'raise ImportError("this {package} belongs to somebody else")\n'
            )
        with _server(arguments.longctx.absolute(), folder) as address:
            _look(address)
            answer = _ask(address)
            backend = _backend(address)
    if ANSWER not in answer:
        raise SystemExit(f"the answer is {answer!r}, not {ANSWER}")
    if arguments.expect_backend not in (None, backend):
        raise SystemExit(f"attention is {backend}, not {arguments.expect_backend}")
    print(f"{arguments.longctx}: answered {answer.strip()!r}, attention by {backend}")


@contextmanager
def _server(longctx: Path, folder: Path) -> Iterator[str]:
    """The address of a server that was started in `folder` and is stopped by SIGTERM."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("LONGCTX_")}
    own.pop("PYTHONPATH", None)
    command = [str(longctx), "serve", "--port", "0", "--store-dir", str(folder / "store")]
    with (
        (folder / "errors").open("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            [*command, "--threads", "1"],
            cwd=folder,
            env=own,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            ready = next((line for line in process.stdout if line.startswith(READY)), None)
            if ready is None:  # its output ended, so it has ended too
                errors.seek(0)
                raise SystemExit(f"the server did not start:\n{errors.read()}")
            yield ready.removeprefix(READY).strip()
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(STOP_SECONDS)
        if code:
            raise SystemExit(f"the server ended with status {code}")


def _look(address: str) -> None:
    """Ends with a message where the page that a browser would show is not there."""
    with urllib.request.urlopen(f"{address}/") as response:
        text: str = response.read().decode()
    if "page/main.js" not in text:
        raise SystemExit(f"the page at / is {text[:200]!r}")


def _ask(address: str) -> str:
    body = {
        "messages": [{"role": "user", "content": f"{FACT} {QUESTION}"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        reply: dict[str, Any] = json.load(response)
    content: str = reply["choices"][0]["message"]["content"]
    return content


def _backend(address: str) -> str:
    """The attention backend that the label of `longctx_info` names."""
    with urllib.request.urlopen(f"{address}/metrics") as response:
        text: str = response.read().decode()
    return text.partition('attention_backend="')[2].partition('"')[0]


if __name__ == "__main__":
    main()
