"""What a terminal, a shell and a file system do to a command ends in one line, or in nothing."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from longctx import cli
from longctx.commands import streams
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.waiting import patient, wait_for

OPTIONS = ("--device-pool-gib", "0.1", "--threads", "1", "--device", "cpu", "--kv-codec", "raw")
# A torch that says it is being imported, and is for as long as anybody waits.
ENDLESS_TORCH = """
import os, pathlib, time
pathlib.Path(os.environ["IMPORTING"], str(os.getpid())).touch()
while True:  # a signal just before a system call would not end that
    time.sleep(0.1)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=2, max_position_embeddings=4096)
    write_tokenizer(folder)
    return folder


@contextlib.contextmanager
def longctx(*argv: Any, before: tuple[Path, ...] = (), **how: Any) -> Iterator[subprocess.Popen]:  # type: ignore[type-arg]
    path = os.pathsep.join([*map(str, before), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    command = [sys.executable, "-m", "longctx", *(os.fsencode(each) for each in map(_path, argv))]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def _path(argument: Any) -> Any:
    return argument if isinstance(argument, bytes) else str(argument)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["ask", "serve"])
def test_a_signal_while_modules_are_imported_is_one_line(
    command: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "fake" / "torch").mkdir(parents=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text(ENDLESS_TORCH)
    importing = tmp_path / "importing"
    importing.mkdir()
    argv = {
        "ask": ["ask", "/none", "What?"],
        "serve": ["serve", "--port", "0", "--store-dir", tmp_path / "store"],
    }[command]
    with longctx(
        *argv,
        before=(tmp_path / "fake",),
        env={"IMPORTING": str(importing)},
        start_new_session=True,
    ) as process:
        children = 1 if command == "serve" else 0
        wait_for(lambda: len(list(importing.iterdir())) == 1 + children)
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=patient())
        assert (process.returncode, said) == (128 + number, b"longctx: interrupted\n")
        for each in importing.iterdir():
            assert not Path("/proc", each.name).exists() or each.name == str(process.pid)


def test_results_without_a_place_to_go_are_refused_before_work(tmp_path: Path) -> None:
    with longctx("ask", "/none", "What?", preexec_fn=lambda: os.close(1)) as process:
        _, said = process.communicate(timeout=patient())
    assert process.returncode == 1
    assert said.startswith(b"longctx: standard output is closed") and said.count(b"\n") == 1


def test_closed_streams_are_open_on_nothing() -> None:
    program = (
        "import os, sys; from longctx.commands.streams import open_closed_streams\n"
        "closed = open_closed_streams(); print('lost'); print('lost', file=sys.stderr)\n"
        "sys.stdout.flush(); file = open(os.devnull)\n"
        "sys.exit(0 if closed == {0, 1, 2} and file.fileno() > 2 else 1)"
    )
    code = subprocess.call(
        [sys.executable, "-c", program],
        preexec_fn=lambda: [os.close(number) for number in range(3)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert code == 0


def test_a_reader_that_has_gone_ends_an_answer_quietly(model_folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "tale.md"
    document.write_text("The name of the ship is Meridian. " * 20)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        with longctx(
            "ask", document, "What?", "--model", model_folder, *OPTIONS, stdout=writing
        ) as process:
            _, said = process.communicate(timeout=patient())
    finally:
        os.close(writing)
    assert process.returncode == 128 + signal.SIGPIPE
    assert b"Traceback" not in said and b"longctx:" not in said and b"ignored" not in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "longctx: Broken pipe"),
        (OSError(errno.ENOSPC, "No space left on device"), "longctx: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "longctx: /x: Permission"),
    ],
)
def test_a_failure_of_the_system_is_one_line(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: Any, closed: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(streams.select, "poll", NobodyHasGone)
    with pytest.raises(SystemExit) as caught:
        cli.main(["cache", "ls"])
    assert str(caught.value.code).startswith(message) and "\n" not in str(caught.value.code)


class NobodyHasGone:
    def register(self, number: int, events: int) -> None: ...

    def poll(self, milliseconds: int) -> list[tuple[int, int]]:
        return []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "/none", b"W\xff"], b"the question is not UTF-8 text"),
        (["ask", "/none", "What?", "--model", b"/m\xff"], b"rename the folder, or make a link"),
        (["serve", "--served-name", b"m\xff"], b"served_name='m\\udcff' is not UTF-8 text"),
        (["cache", "ls", "--store-dir", b"/none\xff"], b"/none\xff/kv is no folder"),
    ],
)
def test_bytes_that_are_not_text_are_one_line(argv: list[Any], message: bytes) -> None:
    with longctx(*argv) as process:
        _, said = process.communicate(timeout=patient())
    assert process.returncode == 1
    assert message in said and said.count(b"\n") == 1, said


def test_a_store_may_have_any_path_and_its_server_no_standard_stream(
    model_folder: Path, tmp_path: Path
) -> None:
    store = os.fsencode(tmp_path) + b"/st\xffre"
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with longctx(
        *("serve", "--model", model_folder, "--store-dir", store, "--port", port, *OPTIONS),
        preexec_fn=lambda: [os.close(number) for number in (0, 1)],
    ) as server:
        assert wait_for(lambda: answers(url))
        text = "The ship is Meridian.\n" * 200
        form = {"data": {"purpose": "user_data"}, "files": {"file": ("a.txt", text)}}
        file_id = httpx.post(f"{url}/v1/files", timeout=patient(), **form).json()["id"]  # type: ignore[arg-type]
        told = wait_for(lambda: done(httpx.get(f"{url}/v1/files/{file_id}").json()["longctx"]))
        assert told["state"] == "ready", told
        server.send_signal(signal.SIGTERM)
        assert server.wait(patient()) == 0
    assert os.path.exists(store + b"/documents.sqlite")
    with longctx("cache", "ls", "--store-dir", store, stdout=subprocess.PIPE) as process:
        listed, said = process.communicate(timeout=patient())
    assert process.returncode == 0, said
    assert b"extents" in listed


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def done(told: dict[str, Any]) -> dict[str, Any] | None:
    return told if told["state"] in ("ready", "error") else None
