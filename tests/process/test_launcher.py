"""How the processes of an engine are started."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import longctx

REPOSITORY = Path(longctx.__file__).parents[1]
PACKAGES = ("longctx", "api", "prompt_cache", "offload", "compress")

# An editable install finds our packages before it looks at sys.path; a wheel has no such finder.
AS_A_WHEEL = """
import sys
for finder in list(sys.meta_path):
    if type(finder).__module__.startswith("_editable"):
        sys.meta_path.remove(finder)
"""
START = """
import asyncio, sys
from pathlib import Path
from longctx.config import CacheConfig, EngineConfig, ModelConfig, RingConfig
from longctx.process.client import EngineClient

async def main():
    client = EngineClient(
        EngineConfig(
            model=ModelConfig(model=Path(sys.argv[1]), threads=1),
            cache=CacheConfig(kv_codec="raw", device_pool_gib=0.03),
            ring=RingConfig(ranks=int(sys.argv[2])),
        )
    )
    try:
        print(await client.start())
    finally:
        await client.stop()

asyncio.run(main())
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_starts_where_a_folder_has_packages_called_as_ours(
    tmp_path: Path, llama: Path, ranks: int
) -> None:
    for package in PACKAGES[1:]:
        (tmp_path / "here" / package).mkdir(parents=True)
        (tmp_path / "here" / package / "__init__.py").touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AS_A_WHEEL)
    path = os.pathsep.join(map(str, (tmp_path / "site", REPOSITORY)))
    started = subprocess.run(
        [sys.executable, "-P", "-c", START, str(llama), str(ranks)],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stderr
    assert "EngineInfo" in started.stdout


def test_no_process_of_ours_looks_for_modules_in_the_current_folder() -> None:
    bare = re.compile(r'sys\.executable,\s*"-m"')
    assert not [
        file
        for package in PACKAGES
        for file in (REPOSITORY / package).rglob("*.py")
        if bare.search(file.read_text(encoding="utf-8"))
    ]
