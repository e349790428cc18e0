"""The reference pages say what the code does, and the site builds without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.reference import FOLDER, PAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_reference_page_is_what_the_code_generates(page: str) -> None:
    assert (FOLDER / page).read_text(encoding="utf-8") == PAGES[page](), "run `make reference`"


def test_there_is_no_reference_page_that_nothing_generates() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(PAGES)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
