"""Without an extra's packages the server serves, and a command that needs them says the cure."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from longctx.commands.extras import EXTRAS

ROOT = Path(__file__).parents[2]
# A module that is None cannot be imported: as if it were not installed.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.argv[1:] = {argv!r}; "
COMMAND_LINE = "from longctx.cli import main; main()"
DEMO = "from longctx.demo.__main__ import main; main()"


def run_without(
    absent: tuple[str, ...], script: str, *argv: str
) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(absent=absent, argv=list(argv)) + script
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("absent", "script", "argv", "line"),
    [
        (
            ("matplotlib",),
            COMMAND_LINE,
            ("bench", "eviction"),
            "longctx: longctx bench needs matplotlib: pip install 'longctx[bench]'",
        ),
        (
            ("matplotlib", "openai"),
            DEMO,
            (),
            "longctx: longctx.demo needs matplotlib and openai: pip install 'longctx[demo]'",
        ),
    ],
)
def test_a_command_without_its_extra_ends_in_one_line_with_the_cure(
    absent: tuple[str, ...], script: str, argv: tuple[str, ...], line: str
) -> None:
    ended = run_without(absent, script, *argv)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [line]


@pytest.mark.parametrize("module", ["api.http_server", "longctx.process.worker", "longctx.llm"])
def test_what_serves_loads_no_package_of_an_extra_and_no_tables(module: str) -> None:
    absent = sorted({name for names in EXTRAS.values() for name in names} | {"rich"})
    script = f"import sys, {module}; print([n for n in {absent!r} if n in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_the_packages_of_extras_are_no_dependencies_of_a_server() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {text.partition(">")[0] for text in project["dependencies"]}
    offered = set(project["optional-dependencies"])
    assert needed.isdisjoint(name for names in EXTRAS.values() for name in names)
    assert offered >= set(EXTRAS)
