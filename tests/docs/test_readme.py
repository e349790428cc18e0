"""What the README and the pages show a reader is run as it stands there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longctx.embedded import model_path
from tests.api.live_server import LiveServer

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"
HANDBOOK = "The north gate is closed at night. The access code of the north gate is 7421.\n"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def curl_commands(page: str) -> list[str]:
    """Each `$ curl ...`, with the lines that its quotes span."""
    shown = "\n".join(blocks(page, "console"))
    return re.findall(r"^\$ (curl (?:[^'\n]|'[^']*')+)$", shown, re.M)


@pytest.mark.parametrize(
    "page",
    sorted(
        str(file.relative_to(ROOT)) for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
    ),
)
def test_what_a_page_links_to_and_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    files = re.findall(r"`((?:longctx|api|offload|compress|prompt_cache|tests)/[\w/.-]+)`", text)
    absent = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    absent += [file for file in files if not (ROOT / file).exists()]
    assert not absent


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/prompt_cache.md", "examples/travel/README.md"]
)
def test_the_curl_commands_of_a_page_work_in_their_order(tmp_path: Path, page: str) -> None:
    commands = curl_commands(page)
    assert len(commands) >= 2
    (tmp_path / "handbook.txt").write_text(HANDBOOK, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "travel.xml").symlink_to(ROOT / "examples" / "travel" / "travel.xml")
    room = {"device_pool_gib": 1.5}  # for a million tokens: the longest answer, without max_tokens
    with LiveServer(model_path(), tmp_path / "store", served_name=None, cache=room) as server:

        def run(command: str) -> str:
            shell = subprocess.run(
                ["bash", "-c", f"{command.replace(ADDRESS, server.url)} --fail-with-body"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
            assert shell.returncode == 0, f"{command}\n{shell.stdout}{shell.stderr}"
            return shell.stdout

        file_id = json.loads(run(f"curl -s {ADDRESS}/v1/files -F file=@handbook.txt"))["id"]
        said = [run(command.replace("file-...", file_id)) for command in commands]
    if "handbook.txt" in "".join(commands):
        assert "7421" in "".join(re.findall(r'"content":\s*"([^"]*)"', said[1]))


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_python_of_a_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], page: str
) -> None:
    (tmp_path / "handbook.txt").write_text(HANDBOOK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        names: dict[str, object] = {}
        exec(compile(block, page, "exec"), names)
        if "with" not in block:
            names["llm"].close()  # type: ignore[attr-defined]
    assert "7421" in capsys.readouterr().out


def test_the_questions_of_a_terminal_are_answered(tmp_path: Path) -> None:
    shown = "\n".join(blocks("docs/library.md", "console"))
    commands = re.findall(r"^\$ (.*longctx ask .*)$", shown, re.M)
    assert len(commands) == 2
    (tmp_path / "handbook.txt").write_text(HANDBOOK, encoding="utf-8")
    program = f"{sys.executable} -m longctx"
    for command in commands:
        asked = subprocess.run(
            ["bash", "-c", command.replace("longctx", program, 1)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert asked.stdout.strip() == "7421", asked.stderr
