"""Ranks on two machines, as far as one machine can be two: torchrun in two network namespaces.

The wire between them takes 1 ms and 1 Gbit/s. Needs root; skipped elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from longctx.ring.comm_cost import RowBytes, pass_kv_cost, pass_q_cost, prefers_pass_q
from longctx.ring.link import Link
from longctx.ring.processes.secret import make_secret
from tests.ring.processes import rank_at_the_end_of_a_wire
from tests.ring.processes.ring_server import RingServer, document
from tests.ring.processes.slow_wire import (
    FAR,
    FAR_DEVICE,
    NAMESPACE,
    NEAR,
    NEAR_DEVICE,
    slow_network,
)
from tests.support.waiting import patient

DELAY_SECONDS, BITS_PER_SECOND = 0.001, 1e9
INSIDE = ("ip", "netns", "exec", NAMESPACE)
HEAD, MEETING = f"{NEAR}:7731", f"{NEAR}:7732"

pytestmark = pytest.mark.slow


@pytest.fixture
def network() -> Iterator[None]:
    with slow_network(delay_seconds=DELAY_SECONDS, bits_per_second=BITS_PER_SECOND):
        yield


def measured(store: Path, *, far: bool) -> dict[str, float]:
    """Return what two ranks measure of their link: over the wire, or within this machine."""
    script = [sys.executable, rank_at_the_end_of_a_wire.__file__]
    devices = (NEAR_DEVICE, FAR_DEVICE) if far else ("lo", "lo")
    ranks = [
        subprocess.Popen(
            [*(INSIDE if far and rank else ()), *script, str(rank), str(store)],
            env={**os.environ, "GLOO_SOCKET_IFNAME": device},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, device in enumerate(devices)
    ]
    said = [rank.communicate(timeout=patient(120))[0] for rank in ranks]
    found: dict[str, float] = json.loads(said[0])
    return found


@contextmanager
def torchrun(secret: Path, log: Path, *, far: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Run one machine's launcher, as a user starts it."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node=1"]
    argv += ["--rdzv-backend", "c10d", "--rdzv-endpoint", MEETING, "--rdzv-id", "test"]
    argv += ["--rdzv-conf", f"is_host={int(not far)}"]
    argv += ["--local-addr", FAR if far else NEAR, "--max-restarts", "100"]
    argv += ["-m", "longctx.process.worker", "--head", HEAD, "--secret", str(secret)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*(INSIDE if far else ()), *argv],
            stderr=errors,
            stdout=errors,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(patient(30))


def worker_of(launcher: subprocess.Popen[bytes]) -> int:
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=False
    )
    (pid,) = map(int, found.stdout.split())
    return pid


def test_what_travels_is_hidden_behind_work(network: None, tmp_path: Path) -> None:
    wire = measured(tmp_path / "far", far=True)
    assert DELAY_SECONDS < wire["latency_seconds"] < 5 * DELAY_SECONDS
    assert 0.2 < wire["bytes_per_second"] * 8 / BITS_PER_SECOND < 1.1
    one_after_the_other = 2 * wire["transfer_seconds"]  # rank 0 worked as long as it takes
    assert wire["both_seconds"] < 0.75 * one_after_the_other, wire


def test_keys_that_share_the_work_are_passed_unless_the_wire_is_slow(
    network: None, tmp_path: Path
) -> None:
    """All past pages are on one rank: with pass-Q it works alone, with pass-KV it sends more."""
    rows, pages = (512, 512), (64, 0)
    queries = pass_q_cost(rows, pages, row_bytes=RowBytes.of(8, 64, query_bytes=4))
    keys = pass_kv_cost(rows, pages, page_bytes=96 << 10, tile_pages=32)
    pairs_per_second = max(queries.pairs) / 0.030  # so keys, shared, take 15 ms
    for far, chosen in ((False, "keys"), (True, "queries")):
        found = measured(tmp_path / str(far), far=far)
        link = Link(found["latency_seconds"], found["bytes_per_second"])
        passed = prefers_pass_q(keys, queries, link, pairs_per_second=pairs_per_second)
        assert ("queries" if passed else "keys") == chosen, link


def test_ranks_on_two_machines_answer_and_come_back(network: None, tmp_path: Path) -> None:
    with RingServer(tmp_path / "alone", ranks=1) as alone:
        file_id = alone.upload(document(250))
        expected, _ = alone.ask(file_id)
        alone.end()
    secret = tmp_path / "secret"
    make_secret(secret)
    options = ["--head", HEAD, "--head-secret", str(secret)]
    with ExitStack() as stack:
        launchers = [
            stack.enter_context(torchrun(secret, tmp_path / f"{far}.log", far=far))
            for far in (False, True)
        ]
        server = stack.enter_context(RingServer(tmp_path / "store", *options))
        file_id = server.upload(document(250))
        text, _ = server.ask(file_id)
        assert text == expected
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for launcher in launchers:
                os.kill(worker_of(launcher), number)
                began = time.monotonic()
                text, computed = server.ask_until_answered(file_id, 60)
                print(f"back after {time.monotonic() - began:.0f} s")
                assert text == expected and computed < 200
        server.end()
        assert [launcher.wait(patient(30)) for launcher in launchers] == [0, 0]
