"""Whose silence is noticed."""

import socket
import threading
import time

import pytest

from longctx.ipc.channel import Channel
from longctx.ipc.protocol import Heartbeat, encode
from longctx.ring.processes import heartbeat
from longctx.ring.processes.heartbeat import HeartbeatMonitor, send_heartbeats
from tests.support.waiting import patience, patient, wait_for


def test_a_silent_peer_is_lost_and_one_that_sends_heartbeats_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    lost: list[tuple[float, str]] = []
    silence_seconds = 0.5 * patience()
    silent, silent_end = socket.socketpair()
    beating, beating_end = socket.socketpair()
    receiver = Channel(beating)
    listening = threading.Thread(target=lambda: list(iter(receiver.receive, None)), daemon=True)
    listening.start()
    began = time.monotonic()
    monitor = HeartbeatMonitor(
        {"rank 1": Channel(silent), "rank 2": receiver},
        lambda reason: lost.append((time.monotonic() - began, reason)),
    )
    monitor.silence_seconds = silence_seconds
    send_heartbeats([Channel(beating_end)], encode(Heartbeat()))
    wait_for(lambda: lost)
    seconds, reason = lost[0]
    assert 0.8 * silence_seconds < seconds < silence_seconds + patient(4.5)
    assert reason.startswith("rank 1 has sent nothing for")
    assert not any("rank 2" in reason for _, reason in lost)
    for end in (silent, silent_end, beating, beating_end):
        end.close()
