"""The power fails: what was synced is there, anything else may be, and the tier opens anyway."""

import contextlib
import random
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.block_run import BlockRun
from tests.offload.disk.power import PowerLost, RecordingFiles
from tests.offload.extents import open_tier, run_of, served, store

CAP_BYTES = 30_000  # six extents

Runs = set[BlockRun]


def live(folder: Path, files: RecordingFiles, seed: int, durable: Runs, deleted: Runs) -> None:
    """Store, drop, evict and spoil until the power fails.

    `durable` becomes what must be there afterwards, `deleted` what must not.
    """
    choose = random.Random(seed)
    with closing(open_tier(folder, cap_bytes=CAP_BYTES, files=files)) as tier:
        for _ in range(40):
            run = run_of(choose.choice("abcd"), 4 * choose.randrange(3), 4)
            match choose.choice(("store", "store", "store", "drop", "spoil", "gc")):
                case "store":
                    deleted.discard(run)
                    try:
                        if store(tier, run):
                            durable.add(run)
                    finally:  # some may have left to make room
                        durable -= {old for old in durable if not tier.has(0, old.keys[-1])}
                case "drop":
                    durable.discard(run)
                    tier.drop(run.keys)
                    deleted.add(run)
                case "spoil" if run in durable:
                    durable.discard(run)
                    (path,) = folder.glob(f"{run.keys[-1].hex()}-*")
                    path.write_bytes(path.read_bytes()[:-1])
                    served(tier, run)  # quarantined
                case _:
                    tier.gc()


@settings(max_examples=60, deadline=None)
@example(seed=1750465, calls=94)  # what had left to make room came back beside what took it
@given(seed=st.integers(0, 2**32), calls=st.integers(1, 160))
def test_whatever_a_power_loss_leaves_is_served_right(seed: int, calls: int) -> None:
    durable: Runs = set()
    deleted: Runs = set()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "kv")
        files = RecordingFiles(calls)
        with contextlib.suppress(PowerLost):
            live(folder, files, seed, durable, deleted)
        for number in range(3):
            later = Path(temporary, f"later{number}")
            files.replay(folder, later, random.Random(seed + number))
            with closing(open_tier(later, cap_bytes=CAP_BYTES)) as tier:
                assert all(all(served(tier, run)) for run in durable)
                assert not any(any(served(tier, run)) for run in deleted)
                for chain in "abcd":
                    served(tier, run_of(chain, 0, 12))
                stats = tier.stats()
                assert stats.corrupt_files == 0
                assert stats.held_bytes <= CAP_BYTES
            assert not list(later.glob("*.tmp"))


def test_the_power_fails_in_the_midst_of_everything(tmp_path: Path) -> None:
    """The test above sees all kinds of calls; they are counted here, so that it cannot go blind."""
    files = RecordingFiles()
    durable: Runs = set()
    live(tmp_path / "kv", files, 1, durable, set())
    assert files.calls > 120
    assert 3 <= len(durable) <= 6
    assert len(list((tmp_path / "kv" / "quarantine").iterdir())) > 0
