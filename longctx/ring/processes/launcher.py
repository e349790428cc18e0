"""Launches local ranks by torchrun: `python -m longctx.ring.processes.launcher`.

It starts the ranks, and starts all of them again when one ends. It ends with the server that
started it, and the ranks end with it, whatever the cause.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

MAX_RESTARTS = 1_000_000  # torchrun's default is none; the server gives up when a start fails
MONITOR_SECONDS = 0.1
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


def main(argv: Sequence[str]) -> None:
    """Run torchrun until all ranks have ended by themselves or standard input is closed."""
    parser = argparse.ArgumentParser(prog="longctx.ring.processes.launcher", description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="of each rank")
    parser.add_argument("--folder", type=Path, required=True, help="of sockets and stores; private")
    parser.add_argument("--head", required=True)
    parser.add_argument("--secret", required=True)
    arguments = parser.parse_args(argv)
    threading.Thread(target=_end_with_stdin, args=(arguments.folder,), daemon=True).start()
    # The server decides what a signal to all its processes means; ranks inherit this.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(
        PYTHONSAFEPATH="1",  # as -P: a folder `offload` where the server was started is not ours
        OMP_NUM_THREADS=str(arguments.threads),  # torchrun's default is 1
        GLOO_SOCKET_IFNAME=LOOPBACK,
        NCCL_SOCKET_IFNAME=LOOPBACK,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # it would listen to every machine
    )
    options = {
        "nnodes": 1,
        "nproc-per-node": arguments.ranks,
        "rdzv-backend": "c10d",
        "rdzv-conf": "store_type=file",
        "rdzv-endpoint": arguments.folder / "rendezvous",
        "rdzv-id": "longctx",
        "local-addr": "127.0.0.1",
        "max-restarts": MAX_RESTARTS,
        "monitor-interval": MONITOR_SECONDS,
        "signals-to-handle": "SIGHUP",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    rank = ["-m", "longctx.process", "--head", arguments.head, "--secret", arguments.secret]
    with contextlib.suppress(ChildFailedError):  # the server has logged it by then
        torchrun([*flags, *rank])


def _end_with_stdin(folder: Path) -> None:
    """Exit when standard input is closed, whose other end the server holds.

    The ranks are killed when this process is gone.
    """
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
