"""Kills a process that stores extents, over and over, and looks at what it left behind.

    python -m tests.offload.disk.crash FOLDER KILLS SEED

A process of its own, without torch: forking it costs a millisecond. Ends in one JSON line.
"""

import json
import os
import random
import signal
import struct
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from tests.offload.extents import (
    blank,
    extent_files,
    filled,
    is_right,
    keys_of,
    open_tier,
    run_of,
)

PAGE_BYTES = (20_000, 5_000)
MAX_BLOCKS = 8
KEPT_RUNS = 12
LONGEST_LIFE_SECONDS = 0.06
REPORT = struct.Struct(
    "<cIII"
)  # what (W after a write, D before a drop), chain, first block, number of blocks

Run = tuple[int, int, int]


def live(folder: Path, report: int, seed: int) -> NoReturn:
    """Store runs of chain `seed` and drop some, until killed."""
    choose, first = random.Random(seed), 0
    mine: list[Run] = []
    tier = open_tier(folder)
    while True:
        named = (seed, first, choose.randint(1, MAX_BLOCKS))
        run = run_of(str(seed), first, named[2])
        durable = tier.write(run, filled(run, PAGE_BYTES), cost_seconds=1.0, retained=False)
        assert durable
        os.write(report, REPORT.pack(b"W", *named))
        mine.append(named)
        first += named[2]
        if choose.random() < 0.2:
            chain, begin, count = mine.pop(choose.randrange(len(mine)))
            os.write(report, REPORT.pack(b"D", chain, begin, count))
            tier.drop(keys_of(str(chain), begin, count))


def kill_one(folder: Path, seed: int, durable: set[Run]) -> None:
    """Start a process, kill it at some moment; `durable` becomes what it reported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            live(folder, writer, seed)
        finally:
            os._exit(1)  # only ever reached by a failure: kills run no code
    os.close(writer)
    time.sleep(random.Random(seed).uniform(0.0, LONGEST_LIFE_SECONDS))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the process ended by itself"
    with os.fdopen(reader, "rb") as pipe:
        for what, *named in REPORT.iter_unpack(pipe.read()):
            run = (named[0], named[1], named[2])
            durable.add(run) if what == b"W" else durable.discard(run)


def look(folder: Path, durable: set[Run]) -> tuple[int, int]:
    """Return (blocks reported durable but not served, wrong pages served), after a restart."""
    lost = wrong = 0
    with closing(open_tier(folder)) as tier:
        for chain, first, count in durable:
            keys = keys_of(str(chain), first, count)
            slots = blank(count, PAGE_BYTES)
            found = tier.read(0, keys, slots)
            right = is_right(0, keys, slots)
            lost += found.count(False)
            wrong += sum(here and not page for here, page in zip(found, right, strict=True))
        stats = tier.stats()
        wrong += stats.corrupt_files or 0
        for run in random.Random(len(durable)).sample(
            sorted(durable), max(len(durable) - KEPT_RUNS, 0)
        ):
            tier.drop(keys_of(str(run[0]), run[1], run[2]))
            durable.discard(run)
    return lost, wrong


def main(folder: Path, kills: int, seed: int) -> None:
    durable: set[Run] = set()
    totals = dict.fromkeys(("reported", "interrupted", "lost", "wrong", "temporary"), 0)
    for number in range(kills):
        before = set(durable)
        kill_one(folder, seed * 100_000 + number, durable)
        totals["reported"] += len(durable - before)
        totals["interrupted"] += bool(list(folder.glob("*.tmp")))
        lost, wrong = look(folder, durable)
        totals["lost"] += lost
        totals["wrong"] += wrong
        totals["temporary"] += len(list(folder.glob("*.tmp")))
    totals["quarantined"] = len(list((folder / "quarantine").iterdir()))
    print(json.dumps({"kills": kills, **totals, "files": len(extent_files(folder))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
