"""Help and mistakes take no second: a command loads what it runs when it is chosen."""

import os
import subprocess
import sys

import pytest

from longctx.cli import COMMANDS
from longctx.commands import cache, prompt_cache
from longctx.commands.arguments import CACHE_ACTIONS, PROMPT_CACHE_ACTIONS

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "fastapi", "uvicorn", "pydantic", "rich")
SCRIPT = """
import sys
from longctx.cli import main
try:
    main({argv!r})
except SystemExit as ended:
    print("ended with", ended.code, file=sys.stderr)
finally:
    print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def loaded_by(argv: list[str]) -> tuple[str, str]:
    """How the command ended, and which heavy packages it had loaded by then."""
    code = SCRIPT.format(argv=argv, heavy=HEAVY)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, how, loaded = ended.stderr.splitlines()
    return how, loaded


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_nothing_that_a_command_runs(command: str | None) -> None:
    argv = ["--help"] if command is None else [command, "--help"]
    assert loaded_by(argv) == ("ended with 0", "[]")


def test_a_mistake_in_the_arguments_is_said_before_anything_is_loaded() -> None:
    assert loaded_by(["serve", "--kv-codec", "zfs"]) == ("ended with 2", "[]")


def test_the_actions_that_the_command_line_offers_are_those_that_can_be_run() -> None:
    assert list(CACHE_ACTIONS) == list(cache.ACTIONS)
    assert list(PROMPT_CACHE_ACTIONS) == list(prompt_cache.ACTIONS)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--help"], 0, ""),
        (["serve", "--port", "0"], 1, "this user has no home folder for ~/.local/share/longctx"),
    ],
)
def test_a_user_without_a_home_gets_help_or_one_line(argv: list[str], code: int, says: str) -> None:
    """As in a container that runs under a number which no file knows."""
    nobody = (
        "import pwd\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        f"from longctx.cli import main\nmain({argv!r})"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    ended = subprocess.run(
        [sys.executable, "-c", nobody], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr and "Traceback" not in ended.stderr
