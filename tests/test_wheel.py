"""What is installed serves: a wheel, built and started outside of the tree.

The environment of the tests lends its packages, so nothing is downloaded; the public workflow
installs with the declared dependencies.
"""

import os
import platform
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "compress", "longctx", "offload", "prompt_cache")
WITHOUT_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
HAS_KERNELS = platform.machine() in ("x86_64", "AMD64")  # else CMakeLists.txt refuses


def build_wheel(folder: Path, **environment: str) -> Path:
    """Builds in an environment of its own, as pip does for anybody."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT],
        env={**os.environ, **environment},
        cwd=folder,
        check=True,
    )
    (wheel,) = folder.glob("longctx-*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The `longctx` command of a fresh virtual environment that has the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "longctx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "backend"),
    [
        pytest.param({}, "cpu" if HAS_KERNELS else "torch", id="compiled"),
        pytest.param(WITHOUT_COMPILER, "torch", id="plain"),
    ],
)
def test_an_installed_wheel_serves_from_a_folder_with_packages_of_the_same_names(
    tmp_path: Path, environment: dict[str, str], backend: str
) -> None:
    wheel = build_wheel(tmp_path, **environment)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= {f"{package}/py.typed" for package in PACKAGES}
    assert not any(name.endswith((".cpp", ".h")) for name in names)
    shown = {path.relative_to(ROOT).as_posix() for path in (ROOT / "api/page/static").iterdir()}
    assert names >= shown and "api/page/static/index.html" in shown
    compiled = [name for name in names if name.startswith("longctx/kernels/_kernels.")]
    assert any(name.endswith(".so") for name in compiled) == (backend == "cpu")
    command = install(wheel, tmp_path / "venv")
    asked = subprocess.run(
        [sys.executable, ROOT / "tools" / "serve_once.py", command, "--expect-backend", backend],
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    assert "answered '7421'" in asked.stdout
