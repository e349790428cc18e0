"""The speed of a tier is what reads measure, and unknown where none has lately."""

import pytest

from offload.bandwidth import Bandwidth


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def read(bandwidth: Bandwidth, clock: Clock, *, size_bytes: int, seconds: float) -> None:
    with bandwidth.reading() as done:
        clock.now += seconds
        done(size_bytes)


def test_the_speed_is_unknown_until_something_was_read_and_again_after_a_while() -> None:
    clock = Clock()
    bandwidth = Bandwidth(clock)
    assert bandwidth.known_bytes_per_second is None
    read(bandwidth, clock, size_bytes=0, seconds=1.0)  # a miss measures nothing
    assert bandwidth.known_bytes_per_second is None
    for _ in range(20):
        read(bandwidth, clock, size_bytes=2_000_000_000, seconds=1.0)
    assert bandwidth.known_bytes_per_second == pytest.approx(2e9, rel=0.05)
    clock.now += 299
    assert bandwidth.known_bytes_per_second is not None
    clock.now += 2
    assert bandwidth.known_bytes_per_second is None
    assert bandwidth.bytes_per_second == pytest.approx(2e9, rel=0.05)
