"""Other files in the folder of a model: nothing that the old ones computed is served."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.api.test_restart import engine_process
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.waiting import wait_for

STORY = "The name of the ship is Meridian, and her captain is Ana Ruiz. " * 60
SCHEMA = f'<schema name="trip"><module name="coast">{STORY}</module></schema>'
QUESTION = {"type": "text", "text": "What is the name of the ship?"}
SYSTEM = f"You are a keeper. {STORY}"


def replace_weights(folder: Path) -> None:
    """As `tar --mtime` and image layers do: size and time of modification are as before."""
    weights = folder / "model.safetensors"
    before = weights.stat()
    write_model(folder, num_hidden_layers=2, max_position_embeddings=32_768, seed=1)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replace_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, vocab_size=300)


def server_of(folder: Path, store: Path) -> LiveServer:
    return LiveServer(folder, store, cache={"kv_dir": store / "kv"})


def store_all(server: LiveServer) -> str:
    """Stores a file, a schema, a named prompt, and a prompt that is retained."""
    form = {"data": {"purpose": "user_data"}, "files": {"file": ("a.txt", STORY)}}
    file_id: str = server.http.post("/v1/files", **form).json()["id"]  # type: ignore[arg-type]
    server.http.post("/v1/prompt_cache/schemas", content=SCHEMA).raise_for_status()
    prompt = {"name": "keeper", "system": SYSTEM, "file_ids": [file_id]}
    server.http.post("/v1/prompt_cache/prompts", json=prompt).raise_for_status()
    wait_until_stored(server, file_id)
    return file_id


def wait_until_stored(server: LiveServer, file_id: str) -> None:
    for path in ("schemas/trip", "prompts/keeper"):
        url = f"/v1/prompt_cache/{path}"
        told = wait_for(
            lambda url=url: (  # type: ignore[misc]
                (found := server.http.get(url).json())["state"] in ("ready", "error") and found
            )
        )
        assert told["state"] == "ready", told
    found = wait_for(
        lambda: (
            (told := server.http.get(f"/v1/files/{file_id}").json())["longctx"]["state"]
            in ("ready", "error")
            and told
        )
    )
    assert found["longctx"]["state"] == "ready", found


def answers(server: LiveServer, file_id: str, *, retain: bool = True) -> list[str]:
    """What is said of the file, with the schema, with the named prompt, and a retained prompt."""
    of_file = [{"type": "file", "file": {"file_id": file_id}}, QUESTION]
    plain = [{"role": "user", "content": [QUESTION]}]
    retained: dict[str, Any] = {"prompt_cache_retention": "24h"} if retain else {}
    return [
        said(server, messages=[{"role": "user", "content": of_file}]),
        said(server, messages=plain, prompt_cache={"schema": "trip", "modules": ["coast"]}),
        said(server, messages=plain, prompt_cache={"prompt": "keeper"}),
        said(server, messages=[{"role": "system", "content": SYSTEM}, *plain], **retained),
    ]


def said(server: LiveServer, **fields: Any) -> str:
    body = {"model": MODEL, "temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("replace", [replace_weights, replace_tokenizer])
def test_what_is_stored_is_computed_anew_for_other_weights_and_another_tokenizer(
    replace: Any, model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    with server_of(folder, tmp_path / "store") as server:
        file_id = store_all(server)
        before = answers(server, file_id)
        tokens = server.http.get(f"/v1/files/{file_id}").json()["longctx"]["tokens"]
        fingerprint = server.application.engine.info.fingerprint
    replace(folder)
    with server_of(folder, tmp_path / "other") as server:
        right = answers(server, store_all(server))
        assert server.application.engine.info.fingerprint != fingerprint
    with server_of(folder, tmp_path / "store") as server:
        wait_until_stored(server, file_id)
        assert answers(server, file_id) == right
        told = server.http.get(f"/v1/files/{file_id}").json()["longctx"]
        assert (told["tokens"] == tokens) == (replace is replace_weights)
    assert before != right
    # Back again: what the first model has computed is served again.
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    with server_of(folder, tmp_path / "store") as server:
        wait_until_stored(server, file_id)
        assert answers(server, file_id, retain=False) == before
        server.http.delete(f"/v1/files/{file_id}").raise_for_status()


def test_an_engine_that_comes_back_as_another_model_is_not_asked(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    with server_of(folder, tmp_path / "store") as server:
        replace_tokenizer(folder)
        os.kill(engine_process(server), signal.SIGKILL)
        wait_for(lambda: server.http.get("/health").json()["engine"] == "stopped")
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
        refused = server.http.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert "restart the server" in refused.json()["error"]["message"]
