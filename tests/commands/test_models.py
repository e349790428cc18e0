"""`longctx models` lists what can be named, and what installs it."""

from pathlib import Path

import pytest

from longctx.cli import main
from longctx.embedded import MODELS
from longctx.model import named
from longctx.model.named import PACKAGED, find_model, named_models
from longctx.model.named import PackagedModel as Packaged


def test_every_name_is_listed_with_what_one_chooses_by(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *MODELS, *PACKAGED]
    assert "98.4 MB" in lines[-1] and "8,192" in lines[-1] and "Apache-2.0" in lines[-1]


def test_an_absent_model_is_listed_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Packaged(
        what="a model",
        size_bytes=1_000_000,
        context_tokens=100,
        license="MIT",
        package="no_such_package",
        file="no.gguf",
        install="pip install [no] such-package",
    )
    monkeypatch.setitem(named.PACKAGED, "absent", absent)
    main(["models"])
    assert "a model; pip install [no] such-package" in capsys.readouterr().out


def test_what_is_listed_as_installed_is_found() -> None:
    for model in named_models():
        if model.install is None:
            assert find_model(Path(model.name)).exists()
