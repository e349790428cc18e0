import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.background.store_dir import StoreDir
from api.config import ServerConfig
from api.listener import listen
from longctx.errors import LongctxError, ModelRefused
from longctx.process.launcher import Child
from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import wait_for

KEYS = ("alice", "bob")
STORY = "The boats come back with fish, and every evening they leave for the open sea. " * 60


def state_of(client: openai.OpenAI, file_id: str) -> str:
    described: Any = client.files.retrieve(file_id)
    return described.longctx["state"]  # type: ignore[no-any-return]


def wait_until_ready(client: openai.OpenAI, file_id: str) -> None:
    wait_for(lambda: state_of(client, file_id) == "ready")


def computed_tokens(client: openai.OpenAI, file_id: str) -> int:
    part: Any = {"type": "file", "file": {"file_id": file_id}}
    answer: Any = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [part]}],
        max_tokens=2,
        extra_body={"cache_explain": True},
    )
    print(answer.longctx)  # a failure shows why something was computed
    return answer.longctx["computed_tokens"]  # type: ignore[no-any-return]


def engine_process(server: LiveServer) -> int:
    processes = server.application.engine.processes
    assert isinstance(processes, Child) and processes.process is not None
    return processes.process.pid


def test_tenants_and_documents_survive_the_engine_and_the_server(
    model_folder: Path, tmp_path: Path
) -> None:
    with LiveServer(model_folder, tmp_path, api_key=KEYS) as server:
        alice, bob = (server.openai(key) for key in KEYS)
        with alice, bob:
            assert httpx.get(f"{server.url}/v1/files").status_code == 401
            file_id = alice.files.create(file=("a.txt", STORY.encode()), purpose="user_data").id
            wait_until_ready(alice, file_id)

            # another tenant neither sees nor reads it, nor shares what was computed for it
            with pytest.raises(openai.NotFoundError):
                bob.files.retrieve(file_id)
            with pytest.raises(openai.NotFoundError):
                computed_tokens(bob, file_id)
            assert bob.files.list().data == []
            assert [file.id for file in alice.files.list().data] == [file_id]
            assert computed_tokens(alice, file_id) <= 128

            # the engine dies during an answer: it ends with an error, and the next one is served
            stream = alice.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "a long tale"}],
                max_tokens=20_000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            with pytest.raises(openai.APIError, match="engine process ended"):
                for position, _ in enumerate(stream):
                    if position == 3:
                        os.kill(engine_process(server), signal.SIGKILL)
            health = httpx.get(f"{server.url}/health")
            assert (health.status_code, health.json()["engine"]) == (503, "restarting")
            with pytest.raises(openai.InternalServerError) as caught:
                computed_tokens(alice, file_id)
            assert caught.value.status_code == 503
            wait_until_ready(alice, file_id)
            assert computed_tokens(alice, file_id) <= 128

    with (
        LiveServer(model_folder, tmp_path, api_key=KEYS) as server,
        server.openai("alice") as alice,
    ):
        wait_until_ready(alice, file_id)
        assert computed_tokens(alice, file_id) <= 128
        assert alice.files.content(file_id).read() == STORY.encode()


@pytest.mark.slow
def test_a_model_that_is_refused_is_the_reason_given(model_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_folder, tmp_path / "model")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelRefused), LiveServer(broken, tmp_path / "store"):
        pass


@pytest.mark.slow
def test_a_codec_that_does_damage_needs_force_and_is_called_forced(
    model_folder: Path, tmp_path: Path
) -> None:
    codec: dict[str, Any] = {"kv_codec": "int4"}  # random weights this large do not bear it
    with (
        pytest.raises(ModelRefused, match=r"int4 does not pass .* the limit .*--force-codec"),
        LiveServer(model_folder, tmp_path, cache=codec),
    ):
        pass
    with LiveServer(model_folder, tmp_path, cache={**codec, "force_codec": True}) as server:
        (model,) = server.http.get("/v1/models").json()["data"]
    assert model["longctx"]["kv_codec"] == "int4" and model["longctx"]["kv_codec_forced"]
    assert "forced" in model["longctx"]["kv_codec_reason"]


@pytest.mark.slow
def test_without_a_choice_the_codec_is_measured_and_the_figures_are_told(
    model_folder: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # the second time they are remembered
        with LiveServer(model_folder, tmp_path, cache={"kv_codec": "auto"}) as server:
            (model,) = server.http.get("/v1/models").json()["data"]
        told = model["longctx"]
        assert told["kv_codec_reason"].startswith(told["kv_codec"])
        quality = told["kv_codec_quality"]
        assert (quality is None) == (told["kv_codec"] == "raw")
        if quality is not None:
            assert quality["own"]["kl"] <= 1e-3 and quality["own"]["tokens"] > 0


def test_a_store_serves_one_server_at_a_time(tmp_path: Path) -> None:
    first = StoreDir(tmp_path)
    with pytest.raises(LongctxError, match="in use by another server"):
        StoreDir(tmp_path)
    first.close()
    StoreDir(tmp_path).close()


def test_a_store_keeps_its_secret_private(tmp_path: Path) -> None:
    folder = StoreDir(tmp_path / "store")
    secret = folder.secret()
    assert len(secret) == 32 and folder.secret() == secret
    assert (tmp_path / "store" / "secret").stat().st_mode & 0o077 == 0
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
    folder.close()


def test_what_a_crash_left_behind_is_removed(tmp_path: Path) -> None:
    folder = StoreDir(tmp_path)
    for path in (
        folder.new_upload_path(),
        folder.text_path("known"),
        folder.tokens_path("stranger"),
    ):
        path.write_text("text")
    folder.remove_orphans(frozenset({"known"}))
    assert list((tmp_path / "documents").iterdir()) == [folder.text_path("known")]
    folder.close()


def test_a_port_in_use_is_one_line_with_the_cure() -> None:
    taken = listen(ServerConfig(port=0))
    port = taken.getsockname()[1]
    with pytest.raises(LongctxError, match=f"cannot listen on 127.0.0.1:{port}: .* --port"):
        listen(ServerConfig(port=port))
    taken.close()


def test_a_file_deleted_while_the_engine_is_away_leaves_nothing_on_disk(
    model_folder: Path, tmp_path: Path
) -> None:
    kv_dir = tmp_path / "kv"
    cache = {"kv_dir": kv_dir, "disk_cap_gib": 0.5, "disk_free_gib": 0.0}
    with (
        LiveServer(model_folder, tmp_path / "store", cache=cache) as server,
        server.openai() as client,
    ):
        file_id = client.files.create(file=("a.txt", STORY.encode()), purpose="user_data").id
        wait_until_ready(client, file_id)
        assert list(kv_dir.glob("*.kv"))
        os.kill(engine_process(server), signal.SIGKILL)
        wait_for(lambda: server.application.engine.state != "ready")
        assert client.files.delete(file_id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file_id)
        wait_for(lambda: not list(kv_dir.glob("*.kv")))
    assert not list((tmp_path / "store" / "documents").iterdir())
