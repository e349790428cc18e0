"""What a benchmark hands back: a table for people, one line of JSON for scripts, files for later.

Figures without their machine mean nothing, so the machine, the commit and the command are part
of every report. Read `publish`.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console, RenderableType

import longctx
from longctx.engine_info import EngineInfo
from offload.units import GIB

SIGNIFICANT = 5  # digits that a measurement deserves

Parameter = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One figure. Where it was compared, a `ratio` above 1 means that longctx is the better one.

    That holds for what should be small (times), and only such figures are given a baseline.
    """

    metric: str
    value: float
    unit: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    baseline: str | None = None
    baseline_value: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.baseline_value is None or not self.value:
            return None
        return self.baseline_value / self.value

    def flat(self) -> dict[str, Parameter]:
        row: dict[str, Parameter] = {
            "metric": self.metric,
            "value": _rounded(self.value),
            "unit": self.unit,
            **self.parameters,
        }
        if self.baseline is not None and self.baseline_value is not None:
            row |= {"baseline": self.baseline, "baseline_value": _rounded(self.baseline_value)}
            row["ratio"] = None if self.ratio is None else _rounded(self.ratio)
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a benchmark returns. `draw` writes the picture of the results into a PNG file.

    With `failures`, a line each, the command ends with 1 after all is printed.
    """

    results: tuple[Result, ...]
    tables: tuple[RenderableType, ...]
    draw: Callable[[Path], None]
    failures: tuple[str, ...] = ()


def publish(report: Report, *, bench: str, command: str, out: Path | None) -> None:
    """Prints the tables, writes `out`/BENCH.json and BENCH.png, and ends with the line of JSON."""
    record: dict[str, Any] = {
        "bench": bench,
        "version": longctx.__version__,
        "commit": commit(),
        "machine": machine(),
        "command": command,
        "results": [result.flat() for result in report.results],
    }
    console = Console()
    for table in report.tables:
        console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{bench}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        report.draw(out / f"{bench}.png")
        console.print(f"written: {out / bench}.json, {out / bench}.png", highlight=False)
    print(json.dumps(record, separators=(",", ":")), flush=True)


def model_parameters(info: EngineInfo) -> dict[str, str]:
    """Names what was measured: the parameters that each result of one model begins with."""
    return {
        "model": info.model_name,
        "dtype": info.dtype,
        "device": info.device,
        "kv_codec": info.kv_codec,
    }


def commit() -> str | None:
    """Returns the commit of the source tree, `+changes` if there are any; None without git."""
    assert longctx.__file__ is not None
    root = Path(longctx.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, check=True, text=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed somewhere below another project
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """Names processor, cores, memory, GPU, system and versions in one line."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    parts = [_processor(), f"{cores} cores", f"{memory_gib:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
    ]
    return ", ".join(parts)


def _processor() -> str:
    """Returns the processor's name and the widest vectors that torch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own word
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _rounded(value: float) -> float:
    if isinstance(value, int):
        return value
    return float(f"{value:.{SIGNIFICANT}g}")
