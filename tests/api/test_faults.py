"""A disk that lies, loses files or is full: the server still answers, and says what happened."""

import base64
import shutil
import subprocess
from collections.abc import Callable, Iterator
from os import geteuid
from pathlib import Path
from typing import Any

import pytest

from tests.api.files.test_files import ask, cached_tokens, upload, wait_until_done
from tests.api.live_server import MODEL, LiveServer
from tests.api.test_cache_routes import cache_of, clear, explained, ids

Damage = Callable[[Path], None]  # to one extent file
QUESTION = "Which boat came last?"


def story(seed: int) -> str:
    return "".join(f"Line {i}: {i * 7919 % (900 + seed)} boats came back.\n" for i in range(250))


@pytest.fixture(scope="module")
def kv_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def stored(
    model_folder: Path, kv_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    cache = {"kv_dir": kv_dir, "disk_cap_gib": 0.5, "disk_free_gib": 0.0}
    with LiveServer(model_folder, tmp_path_factory.mktemp("store"), cache=cache) as running:
        yield running


def faults(server: LiveServer) -> int:
    """How many were counted."""
    disk = cache_of(server)["tiers"]["disk"]
    return int(disk["checksum_failures"]) + sum(disk["incidents"].values())


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 0x10
    file.write_bytes(data)


def cut_short(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def state_another_version(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8] ^= 0x7F  # follows the magic
    file.write_bytes(data)


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, state_another_version, remove])
def test_damaged_blocks_are_computed_again_and_never_served(
    stored: LiveServer, kv_dir: Path, damage: Damage
) -> None:
    known = set(kv_dir.glob("*.kv"))
    seed = ["flip_a_bit", "cut_short", "state_another_version", "remove"].index(damage.__name__)
    file_id = upload(stored, story(seed))
    wait_until_done(stored, file_id)
    before = ask(stored, file_id, question=QUESTION)
    own = set(kv_dir.glob("*.kv")) - known
    assert own, "nothing of the document was stored"
    told = faults(stored)
    for file in own:
        damage(file)
    clear(stored)

    again = ask(stored, file_id, question=QUESTION)

    assert again["choices"] == before["choices"]
    assert again["longctx"]["computed_tokens"] > before["longctx"]["computed_tokens"]
    assert faults(stored) > told, "nobody was told"
    # What was computed again is stored again, and serves the next one.
    wait_until_done(stored, file_id)
    assert cached_tokens(ask(stored, file_id, question=QUESTION)) > cached_tokens(again)
    stored.http.delete(f"/v1/files/{file_id}").raise_for_status()


def test_a_folder_that_was_removed_costs_time_and_no_answer(
    model_folder: Path, tmp_path: Path
) -> None:
    kv_dir = tmp_path / "kv"
    cache = {"kv_dir": kv_dir, "disk_cap_gib": 0.5, "disk_free_gib": 0.0}
    with LiveServer(model_folder, tmp_path / "store", cache=cache) as server:
        file_id = upload(server, story(7))
        wait_until_done(server, file_id)
        before = ask(server, file_id, question=QUESTION)
        shutil.rmtree(kv_dir)
        clear(server)
        assert ask(server, file_id, question=QUESTION)["choices"] == before["choices"]
        other = upload(server, story(8))
        assert wait_until_done(server, other)["state"] == "ready"
        assert ask(server, other, question=QUESTION)["choices"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(mounted)]
    if geteuid() or not shutil.which("mount") or subprocess.run(command).returncode:
        pytest.skip("mounting a file system takes root")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_stops_writing_and_nothing_else(
    model_folder: Path, tmp_path: Path, small_disk: Path
) -> None:
    cache: dict[str, Any] = {"kv_dir": small_disk / "kv", "disk_cap_gib": 1, "disk_free_gib": 0.0}
    with LiveServer(model_folder, tmp_path / "store", cache=cache) as server:
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(700 << 10))  # somebody else's
        files = [upload(server, story(20 + i)) for i in range(3)]
        for file_id in files:
            assert wait_until_done(server, file_id)["state"] == "ready"
        before = [ask(server, file_id, question=QUESTION)["choices"] for file_id in files]
        disk = cache_of(server)["tiers"]["disk"]
        assert disk["writes_off"] or disk["incidents"] or disk["evictions"], disk
        clear(server)
        assert [ask(server, file, question=QUESTION)["choices"] for file in files] == before
        assert explained(server, ids(100, 3))["prompt_tokens"] == 100


def test_an_upload_that_does_not_fit_the_disk_is_refused_and_leaves_nothing(
    model_folder: Path, tmp_path: Path, small_disk: Path
) -> None:
    store = small_disk / "store"
    with LiveServer(model_folder, store, cache={"kv_dir": tmp_path / "kv"}) as server:
        before = {file.name for file in store.rglob("*") if file.is_file()}
        text = ("Nobody counted the boats.\n" * 60_000).encode()  # 1.5 MB for a disk of 1 MB
        files = {"file": ("boats.txt", text)}
        refused = server.http.post("/v1/files", data={"purpose": "user_data"}, files=files)
        assert refused.status_code == 507, refused.text
        error = refused.json()["error"]
        assert error["code"] == "insufficient_storage" and str(store) in error["message"]
        carried = {"file_data": base64.b64encode(text).decode(), "filename": "boats.txt"}
        content = [{"type": "file", "file": carried}, {"type": "text", "text": QUESTION}]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        assert server.http.post("/v1/chat/completions", json=body).status_code == 507
        assert {file.name for file in store.rglob("*") if file.is_file()} == before
        file_id = upload(server, story(40))
        assert wait_until_done(server, file_id)["state"] == "ready"
