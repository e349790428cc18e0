"""A model may be given by a name; a path that is there is meant first."""

from pathlib import Path

import pytest

from longctx.embedded import model_path
from longctx.errors import ModelRefused
from longctx.model import named
from longctx.model.named import PackagedModel, find_model, model_name


def test_without_a_model_it_is_needle() -> None:
    assert find_model(None) == model_path("needle")


def test_names_are_found_and_paths_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(Path("probe")) == model_path("probe")
    assert find_model(Path("unknown")) == Path("unknown")
    assert find_model(Path("models/probe")) == Path("models/probe")
    Path("probe").mkdir()
    assert find_model(Path("probe")) == Path("probe")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in a package that can be installed by making its folder."""
    model = PackagedModel(
        what="a model",
        size_bytes=4,
        context_tokens=1,
        license="MIT",
        package="some_model_package",
        file="Some.Q4_1.gguf",
        install="pip install some-model",
    )
    monkeypatch.setitem(named.PACKAGED, "some", model)
    monkeypatch.syspath_prepend(tmp_path)
    return model


def test_a_model_whose_package_is_absent_names_its_cure(packaged: PackagedModel) -> None:
    with pytest.raises(ModelRefused, match="the model some is not installed: pip install some"):
        find_model(Path("some"))


def test_a_packaged_model_is_found_and_served_under_its_name(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    folder = tmp_path / packaged.package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('a package is not run')")
    (folder / packaged.file).write_bytes(b"GGUF")
    found = find_model(Path("some"))
    assert found == folder / packaged.file
    assert model_name(found) == "some"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Some-Model.Q4_K_M.gguf", "Some-Model.Q4_K_M"),
        ("big-00002-of-00003.gguf", "big"),
        ("a-folder", "a-folder"),
    ],
)
def test_a_file_is_served_under_its_name_without_its_ending(path: str, name: str) -> None:
    assert model_name(Path(path)) == name
