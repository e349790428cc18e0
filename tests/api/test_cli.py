import http.server
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import openai
import pytest

from longctx.cli import main
from tests.support import made_documents
from tests.support.waiting import patient, wait_for

OPTIONS = ("--device-pool-gib", "0.1", "--threads", "1", "--device", "cpu", "--kv-codec", "raw")


def longctx(*argv: str | Path, **how: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "longctx", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        **how,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_serve_says_where_finishes_what_runs_and_leaves_nothing(
    model_folder: Path, tmp_path: Path
) -> None:
    server = longctx(
        *("serve", "--model", model_folder, "--store-dir", tmp_path, "--port", "0", *OPTIONS),
        *("--drain-seconds", "5"),
    )
    assert server.stdout is not None and server.stderr is not None
    ready = server.stdout.readline()
    found = re.fullmatch(r"longctx ready (http://127\.0\.0\.1:\d+)\n", ready)
    assert found is not None, ready + server.stderr.read()
    processes = children(server.pid)
    assert len(processes) == 2
    with openai.OpenAI(
        base_url=f"{found[1]}/v1", api_key="none", max_retries=0, timeout=patient()
    ) as client:
        stream = client.chat.completions.create(
            model=model_folder.name,
            messages=[{"role": "user", "content": "a tale"}],
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] == "length"
    output, errors = server.communicate(timeout=patient())
    assert (server.returncode, output) == (0, "")
    serves, stores = errors.splitlines()
    assert re.fullmatch(r"longctx serves .* tokens of raw KV fit the device, .*", serves)
    assert stores == "longctx stores KV as raw, as asked; it is exact"
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_ask_streams_an_answer_and_tells_the_cost(model_folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "tale.md"
    document.write_text("The name of the ship is Meridian. " * 100)
    asked = longctx("ask", document, "What is its name?", "--model", model_folder, *OPTIONS)
    output, errors = asked.communicate(timeout=patient())
    assert asked.returncode == 0, errors
    assert output.strip()
    cost = re.search(r"([\d,]+) of ([\d,]+) prompt tokens were cached; first token after", errors)
    assert cost is not None, errors
    cached, prompt = (int(count.replace(",", "")) for count in cost.groups())
    assert prompt - 128 <= cached < prompt


def test_ask_takes_several_documents_of_any_format_and_standard_input(tmp_path: Path) -> None:
    handbook = tmp_path / "handbook.pdf"
    handbook.write_bytes(made_documents.pdf("The access code of the north gate is 7421."))
    asked = longctx(
        *("ask", handbook, "-", "What is the gate number of the crane in Belgrade?", *OPTIONS),
        stdin=subprocess.PIPE,
    )
    output, errors = asked.communicate(
        "The gate number of the crane in Belgrade is 5964.", timeout=patient()
    )
    assert (asked.returncode, output) == (0, "5964\n"), errors
    assert "reading handbook.pdf, bytes" in errors and "reading standard input, bytes" in errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_ends_ask_quietly(model_folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "tale.md"
    document.write_text("The name of the ship is Meridian. " * 100)
    asked = longctx(
        *("ask", document, "What?", "--model", model_folder, *OPTIONS), start_new_session=True
    )
    processes = wait_for(lambda: len(found := children(asked.pid)) > 1 and found)
    os.killpg(asked.pid, signal.SIGINT)
    _, errors = asked.communicate(timeout=patient())
    assert asked.returncode == 130
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--model", "/nowhere"], "longctx: no tokenizer: /nowhere is not a folder"),
        (["serve", "--model", "/nowhere", "--api-key-file", "/none"], "cannot read the API keys"),
        (["ask", "/none", "What?", "--model", "MODEL"], "cannot read /none: No such file"),
        (["ask", "-", "-", "What?", "--model", "MODEL"], "standard input can be read once"),
        (["chat", "-", "--model", "MODEL"], "chat reads its questions from standard input"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, model_folder: Path, tmp_path: Path
) -> None:
    argv = [str(model_folder) if argument == "MODEL" else argument for argument in argv]
    if argv[0] == "serve":
        argv += ["--port", "0", "--store-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert isinstance(caught.value.code, str)
    assert message in caught.value.code and "\n" not in caught.value.code


def test_serve_logs_lines_of_json_and_sends_traces(model_folder: Path, tmp_path: Path) -> None:
    received: list[tuple[str, int]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, len(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        with mock.patch.dict(os.environ, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}):
            server = longctx(
                *("serve", "--model", model_folder, "--store-dir", tmp_path, "--port", "0"),
                *(*OPTIONS, "--log-format", "json"),
            )
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        assert httpx.get(f"{url}/health", timeout=patient()).status_code == 200
        server.send_signal(signal.SIGTERM)
        output, errors = server.communicate(timeout=patient())
        collector.shutdown()
        thread.join()
    assert (server.returncode, output) == (0, "")
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert [(line["route"], line["status"]) for line in lines] == [("/health", 200)]
    if importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is None:
        assert "longctx[otel]" in errors
    else:
        ((path, size),) = received
        assert path == "/v1/traces" and size > 50
