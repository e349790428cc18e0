"""A damaged model folder is refused by file and tensor; a whole one has a fingerprint."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from longctx.config import ModelConfig
from longctx.errors import ModelRefused
from longctx.model import checkpoint
from longctx.model.checkpoint import SHARD
from longctx.model.loader import load_model
from tests.support.plain_attention import assert_equal_to_eager, edit_config, load
from tests.support.tiny_models import write_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and an index."""
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SECOND = "model-00002-of-00002.safetensors"


def test_shards_load_like_one_file(sharded: Path, tmp_path: Path) -> None:
    assert_equal_to_eager(sharded, load(sharded))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(ModelRefused, match=f"lacks {SECOND}"):
        load(sharded)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_into_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_the_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)


def store_a_web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Access denied</html>")


def make_lengths_lie(path: Path) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["model.norm.weight"]["shape"] = [1, 2, 3]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        cut_into_the_header,
        empty,
        overwrite_the_header,
        store_a_web_page,
        make_lengths_lie,
    ],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], None], sharded: Path) -> None:
    damage(sharded / SECOND)
    with pytest.raises(ModelRefused, match=SECOND):
        load(sharded)


def test_a_tensor_that_its_shard_lacks_is_named_with_the_file(sharded: Path) -> None:
    tensors = load_file(sharded / SECOND)
    name = sorted(tensors)[3]
    del tensors[name]
    save_file(tensors, sharded / SECOND)
    with pytest.raises(ModelRefused, match=f"{SECOND} lacks the tensor {name}"):
        load(sharded)


def test_a_tensor_that_no_file_has_is_named_and_never_invented(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ModelRefused, match=r"model\.safetensors: the tensor model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(folder)


def test_a_misshapen_tensor_is_named_with_its_file(sharded: Path) -> None:
    tensors = load_file(sharded / SECOND)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, sharded / SECOND)
    with pytest.raises(ModelRefused, match=f"{SECOND}: the tensor {name} has the shape"):
        load(sharded)


def test_an_index_that_points_out_of_the_folder_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelRefused, match="no safetensors file of this folder"):
        load(sharded)


def test_an_index_without_a_map_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelRefused, match="has no weight_map"):
        load(sharded)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match=r"only as pickle \(pytorch_model\.bin\)"):
        load(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match="has no weights"):
        load(folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=r"has no config\.json"):
        load(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="is not a folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelRefused, match=r"config\.json"):
        load(folder)


# Fingerprint


def test_the_fingerprint_follows_weights_and_config_but_not_the_place(tmp_path: Path) -> None:
    first = load(write_model(tmp_path / "a")).spec.fingerprint
    assert load(write_model(tmp_path / "b")).spec.fingerprint == first
    assert load(write_model(tmp_path / "c", seed=1)).spec.fingerprint != first
    assert load(edit_config(tmp_path / "b", rms_norm_eps=1e-5)).spec.fingerprint != first


def test_checksums_are_kept_and_follow_a_changed_file(tmp_path: Path) -> None:
    folder, cache = write_model(tmp_path / "model"), tmp_path / "cache"
    first = load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint
    kept = json.loads((cache / "fingerprints.json").read_text())
    assert len(kept) == 1
    assert load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint == first
    (cache / "fingerprints.json").write_text(json.dumps(dict.fromkeys(kept, "known")))
    assert load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint != first  # is read
    write_model(folder, seed=1)
    changed = load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint
    assert changed == load(folder).spec.fingerprint != first


def test_other_weights_of_the_same_size_and_time_are_other_weights(tmp_path: Path) -> None:
    folder, cache = write_model(tmp_path / "model"), tmp_path / "cache"
    before = (folder / "model.safetensors").stat()
    first = load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint
    write_model(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_size == before.st_size
    assert load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint != first
    assert len(json.loads((cache / "fingerprints.json").read_text())) == 1, "what it was is kept"


def test_other_weights_are_found_where_all_that_the_file_system_says_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = write_model(tmp_path / "model"), tmp_path / "cache"
    told = (folder / "model.safetensors").stat()
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **how: told if path.name == SHARD else stat(path, **how)
    )
    first = load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint
    write_model(folder, seed=1)
    assert load_model(ModelConfig(), folder, cache_dir=cache).spec.fingerprint != first


@given(st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_samples_see_the_ends_and_every_run_of_bytes_that_is_long_enough(
    tmp_path: Path, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 1 << 20), "size")
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    before = checkpoint._sample_sum(file, size)
    assert checkpoint._sample_sum(file, size) == before
    seen = size // (checkpoint.SAMPLES - 1) + 1  # a run as long as from one sample to the next
    length = data.draw(st.integers(min(size, seen), size), "length")
    begin = data.draw(st.sampled_from([0, size - length]) | st.integers(0, size - length), "begin")
    file.write_bytes(bytes(begin) + b"x" * length + bytes(size - begin - length))
    assert checkpoint._sample_sum(file, size) != before
    file.write_bytes(bytes(size - 1) + b"x")  # the last byte, as of a tensor that was added
    assert checkpoint._sample_sum(file, size) != before


def test_a_cache_that_cannot_be_used_is_done_without(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "fingerprints.json").write_text("{")
    for cache in (blocked, damaged):
        spec = load_model(ModelConfig(), folder, cache_dir=cache).spec
        assert spec.fingerprint == load(folder).spec.fingerprint
