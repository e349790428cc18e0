"""The ladder of imports: a module imports only from rungs below its own, always absolutely."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compress", "offload", "prompt_cache", "longctx", "api")  # lowest rung first

# The composition root and what stands on it: the only modules that may know every rung.
TOP = ("longctx.cli", "longctx.__main__", "longctx.commands", "longctx.demo", "longctx.bench")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def rung(module: str) -> int | None:
    """Height on the ladder; None for what is not ours."""
    if any(module == top or module.startswith(f"{top}.") for top in TOP):
        return len(PACKAGES)
    package = module.partition(".")[0]
    return PACKAGES.index(package) if package in PACKAGES else None


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, in functions too; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            for alias in node.names:  # `from longctx import cli` names a module too
                yield node.lineno, f"{module}.{alias.name}"


def test_a_module_imports_only_from_its_own_rung_or_below() -> None:
    faults = [
        f"{name}:{line} imports {module}"
        for name, tree in modules()
        for line, module in imports(tree)
        if (height := rung(module)) is not None and height > (rung(name) or 0)
    ]
    assert not faults, "\n".join(faults)


def test_no_import_is_relative() -> None:
    faults = [
        f"{name}:{line}"
        for name, tree in modules()
        for line, module in imports(tree)
        if module.startswith(".")
    ]
    assert not faults, faults


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("longctx", ("fastapi", "zstandard", "torch", "transformers")),
        ("longctx.llm", ("fastapi", "uvicorn", "api")),
        ("longctx.process.worker", ("fastapi", "uvicorn", "api")),
        ("offload.key", ("torch",)),
        ("offload.disk.tier", ("torch",)),
        ("offload.store", ("torch", "zstandard")),
        ("offload.disk.tier", ("torch",)),
    ],
)
def test_a_module_loads_no_more_than_it_needs(module: str, absent: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print([n for n in {absent!r} if n in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_files_of_the_core_stay_readable() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }
    too_long = {file: lines for file, lines in lengths.items() if lines > 500}
    assert not too_long, f"split these by idea: {too_long}"
