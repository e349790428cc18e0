"""`longctx prompt-cache check`: the layout of a schema in a model's tokens, and what is wrong."""

from pathlib import Path

import pytest

from longctx.cli import main
from tests.prompt_cache.schemas import TRAVEL
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=1)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "travel.xml"
    path.write_text(TRAVEL)
    return path


def check(folder: Path, *argv: object) -> None:
    main(["prompt-cache", "check", "--model", str(folder), *map(str, argv)])


def test_the_layout_is_printed_as_a_tree(
    folder: Path, schema: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(folder, schema)
    out = capsys.readouterr().out
    names = [line[line.index(" - ") :].split() for line in out.splitlines() if " - " in line]
    assert [next(w for w in words if w[0].isalpha() or w[0] in "#<") for words in names] == [
        *("#1", "trip", "<duration>", "union", "harbour", "mountains", "scaffold", "hotel"),
        *("prices", "<price>"),
    ]
    assert "parameter, default 'three days'" in out and "parameter, no default" in out
    assert "of 2,048 positions" in out
    assert "the request's first message goes on where the schema ends" in out


def test_both_written_forms_have_the_same_layout(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    markup, text = tmp_path / "a.xml", tmp_path / "a.json"
    markup.write_text('<schema name="a"><module name="b">Hello</module></schema>')
    text.write_text('{"name": "a", "content": [{"module": "b", "content": "Hello\\n"}]}')
    check(folder, markup)
    out = capsys.readouterr().out
    check(folder, text)
    assert capsys.readouterr().out == out


FAULTS = {
    '<schema name="a">': "faulty: line 1, column 18: no element found",
    '{"name": "a", "content": [7]}': "faulty: content.0: it must be a text or an object",
    '<schema name="a"><parameter name="p" length="1" default="too long"/></schema>': (
        'faulty: line 1, parameter "p": its default has'
    ),
    f'<schema name="a">{"word " * 3000}</schema>': "the limit is 2,048 together with question",
}


@pytest.mark.parametrize("content", FAULTS)
def test_a_schema_with_a_fault_ends_in_one_line_and_status_1(
    folder: Path, tmp_path: Path, content: str
) -> None:
    faulty = tmp_path / "faulty"
    faulty.write_text(content)
    with pytest.raises(SystemExit) as ended:
        check(folder, faulty)
    assert FAULTS[content] in str(ended.value)  # as text, it goes to stderr with status 1
    assert "\n" not in str(ended.value)


def test_what_is_no_text_file_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in (("binary", "is not UTF-8"), ("none", "cannot read"), ("", "cannot read")):
        with pytest.raises(SystemExit, match=message):
            check(folder, tmp_path / name)
