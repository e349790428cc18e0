"""The ladder of rooms: a module imports from its own room and from rungs below, always absolutely.

A room is a folder of one of the packages; what lies directly in `longctx/` or `api/` is a room of
its own, module by module. `docs/architecture.md` says in a line what each is for.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compress", "offload", "prompt_cache", "longctx", "api")
OPEN = ("longctx", "api")  # their own level is no room: each module there is one
MOST_FILES = {"longctx": 12}  # of one level; of all others 24

# The top first. Rooms on one rung do not know each other, so there can be no cycle of rooms.
LADDER = (
    ("longctx.__main__",),
    ("longctx.cli", "longctx.demo"),
    ("longctx.commands",),
    ("api.server",),
    ("api.http_server",),
    ("api.app",),
    ("api.routes",),
    ("api.anthropic", "api.gemini", "api.responses", "api.status"),
    ("api.cache_routes", "api.completions", "api.page", "api.services"),
    ("api.metrics", "api.stored_prompts", "api.stored_responses"),
    ("api.engine_metrics", "api.files", "longctx.bench.versus"),
    (
        "api.background",
        "longctx.bench.retrieval",
        "longctx.bench.ring",
        "longctx.bench.scheduling",
        "longctx.bench.served",
    ),
    ("api.acceptor", "api.http", "api.listener", "longctx.bench"),
    ("api.config", "longctx", "api", "longctx.bench.versus.workers"),
    ("longctx.llm", "longctx.process"),
    ("longctx.open_engine", "longctx.ring.processes", "longctx.training"),
    ("longctx.quality", "longctx.ring"),
    ("longctx.engine",),
    ("longctx.attention",),
    ("longctx.kv", "longctx.text", "longctx.ipc"),
    ("longctx.engine_stats",),
    (
        "longctx.documents",
        "longctx.model",
        "longctx.engine_info",
        "longctx.request",
        "prompt_cache",
        "offload.disk",
    ),
    (
        "longctx.config",
        "longctx.errors",
        "longctx.options",
        "longctx.version",
        "longctx.kernels",
        "longctx.embedded",
        "longctx.needles",
        "offload",
        "compress",
    ),
)
HEIGHTS = {room: -rung for rung, rooms in enumerate(LADDER) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the five packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def room_of(module: str) -> str:
    folder = ".".join(MODULES[module].parent.relative_to(ROOT).parts)
    return module if folder in OPEN else folder


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, in functions too; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            if not all(name in MODULES for name in submodules):
                yield node.lineno, module
            for name in submodules:  # `from longctx.embedded import model_path` names no module
                if name in MODULES:
                    yield node.lineno, name


def all_imports() -> Iterator[tuple[str, int, str]]:
    """(importer, line, module)."""
    for name, file in MODULES.items():
        for line, module in imports(ast.parse(file.read_text(encoding="utf-8"))):
            yield name, line, module


def test_every_room_has_a_rung() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms == set(HEIGHTS)


def test_a_module_imports_only_from_its_own_room_or_from_rungs_below() -> None:
    faults = [
        f"{name}:{line} imports {module}"
        for name, line, module in all_imports()
        if module in MODULES
        and room_of(module) != room_of(name)
        and HEIGHTS[room_of(module)] >= HEIGHTS[room_of(name)]
    ]
    assert not faults, "\n".join(faults)


def test_no_import_is_relative() -> None:
    faults = [f"{name}:{line}" for name, line, module in all_imports() if module.startswith(".")]
    assert not faults, faults


def test_no_level_has_more_files_than_a_reader_takes_in() -> None:
    files = [*MODULES.values(), *(ROOT / "longctx/kernels/csrc").rglob("*.*")]
    levels = Counter(file.parent.relative_to(ROOT).as_posix() for file in files)
    crowded = {level: n for level, n in levels.items() if n > MOST_FILES.get(level, 24)}
    assert not crowded, f"give these rooms of their own: {crowded}"


def test_the_architecture_page_shows_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = {room: room.replace(".", "/") for room in HEIGHTS if room not in OPEN}
    missing = [
        room
        for room, path in paths.items()
        if f"`{path}/`" not in page and f"`{path}.py`" not in page
    ]
    assert not missing, f"one line for each of {missing}"
    named = re.findall(r"`((?:\w+/)+\w*(?:\.py)?)`", page)
    gone = [path for path in named if not (ROOT / path).exists()]
    assert not gone, f"the page names files that there are not: {gone}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("longctx", ("fastapi", "zstandard", "torch", "transformers")),
        ("longctx.llm", ("fastapi", "uvicorn", "api")),
        ("longctx.process.worker", ("fastapi", "uvicorn", "api")),
        ("longctx.process.client", ("torch", "transformers")),
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
        for file in MODULES.values()
    }
    too_long = {file: lines for file, lines in lengths.items() if lines > 500}
    assert not too_long, f"split these by idea: {too_long}"
