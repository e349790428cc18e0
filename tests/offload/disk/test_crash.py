"""200 processes killed at random moments while they store: nothing that was durable is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_what_was_reported_durable_survives_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.offload.disk.crash", str(tmp_path / "kv"), "200", "1"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kills"] == 200
    assert found["lost"] == found["wrong"] == found["temporary"] == found["quarantined"] == 0
    assert found["reported"] > 50 and found["interrupted"] > 20, "killed at dull moments"
