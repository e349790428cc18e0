"""A slow network between two machines that one machine imitates: a namespace and a wire into it.

The wire is a process that carries packets between two TUN devices, with a delay and at a limited
rate: what `tc netem` does, for kernels that lack it. Packets are large, so that Python keeps up
with 1 Gbit/s.
"""

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
MTU = 65_000
QUEUE_BYTES = 8 << 20

NAMESPACE = "longctx-far"
NEAR, FAR = "10.77.31.1", "10.77.31.2"
NEAR_DEVICE, FAR_DEVICE = "longctx-near", "longctx-far"


@contextmanager
def slow_network(*, delay_seconds: float, bits_per_second: float) -> Iterator[None]:
    """Connect this namespace (address NEAR) to another one (FAR); skip the test if we may not."""
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        pytest.skip("needs root and /dev/net/tun to make a namespace with a slow wire")
    _ip("netns", "del", NAMESPACE)  # of a run that was killed
    if _ip("netns", "add", NAMESPACE):
        pytest.skip("cannot make a network namespace here")
    try:
        argv = [sys.executable, __file__, str(delay_seconds), str(bits_per_second)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as wire:
            assert wire.stdout is not None
            try:
                assert wire.stdout.readline() == "ready\n"
                _must("link", "set", FAR_DEVICE, "netns", NAMESPACE)
                _up((), NEAR_DEVICE, NEAR, FAR)
                _up(("-n", NAMESPACE), FAR_DEVICE, FAR, NEAR)
                _must("-n", NAMESPACE, "link", "set", "lo", "up")
                yield
            finally:
                wire.kill()
    finally:
        _must("netns", "del", NAMESPACE)


def _up(prefix: tuple[str, ...], device: str, own: str, other: str) -> None:
    _must(*prefix, "addr", "add", own, "peer", other, "dev", device)
    _must(*prefix, "link", "set", device, "mtu", str(MTU), "up")


def _ip(*arguments: str) -> int:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode


def _must(*arguments: str) -> None:
    assert _ip(*arguments) == 0, arguments


class _Direction:
    def __init__(self, source: int, target: int, delay_seconds: float, bytes_per_second: float):
        self.source, self.target = source, target
        self._delay_seconds, self._bytes_per_second = delay_seconds, bytes_per_second
        self._queue: deque[tuple[float, bytes]] = deque()
        self._queued_bytes = 0
        self._free = 0.0  # when the wire has taken all that was sent

    def take(self) -> None:
        packet = os.read(self.source, MTU + 100)
        if self._queued_bytes > QUEUE_BYTES:
            return  # as a router does
        self._free = max(self._free, time.monotonic()) + len(packet) / self._bytes_per_second
        self._queue.append((self._free + self._delay_seconds, packet))
        self._queued_bytes += len(packet)

    def deliver(self) -> float:
        """Write the packets that are due; return the seconds until the next one is."""
        while self._queue:
            rest = self._queue[0][0] - time.monotonic()
            if rest > 0:
                return rest
            packet = self._queue.popleft()[1]
            self._queued_bytes -= len(packet)
            try:
                os.write(self.target, packet)
            except OSError:
                continue  # the device is not up yet
        return 1.0


def main(delay_seconds: float, bits_per_second: float) -> None:
    os.nice(-10)  # a wire does not wait for the ranks that use it
    near, far = _tun(NEAR_DEVICE), _tun(FAR_DEVICE)
    print("ready", flush=True)
    ways = [
        _Direction(a, b, delay_seconds, bits_per_second / 8) for a, b in ((near, far), (far, near))
    ]
    while True:
        rest = min(way.deliver() for way in ways)
        readable, _, _ = select.select([near, far], [], [], rest)
        for way in ways:
            if way.source in readable:
                way.take()


def _tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TUN_NO_PI))
    return descriptor


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
