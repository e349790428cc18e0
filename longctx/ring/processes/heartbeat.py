"""Ranks that hang: a stopped process keeps its sockets open, so only its silence gives it away.

Everybody sends a beat twice a second. Who has sent nothing for a while counts as lost.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from longctx.errors import ConnectionLost
from longctx.ipc.channel import Channel

HEARTBEAT_SECONDS = 0.5
SILENCE_SECONDS = 6.0  # far longer than any thread waits for its turn on a machine that works
LOADING_SILENCE_SECONDS = 60.0  # while weights are loaded, which may keep all threads waiting


class HeartbeatMonitor:
    """Looks after the other ends of some channels."""

    def __init__(self, peers: Mapping[str, Channel], lost: Callable[[str], None]) -> None:
        """`lost` is called, from a thread, with the name of a silent one."""
        self._peers, self._lost = peers, lost
        self.silence_seconds = LOADING_SILENCE_SECONDS
        threading.Thread(target=self._look, name="longctx-watch", daemon=True).start()

    def _look(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            now = time.monotonic()
            if now - looked > 4 * HEARTBEAT_SECONDS:  # this process was stopped itself: ask again
                for channel in self._peers.values():
                    channel.received_at = now
            looked = now
            for name, channel in self._peers.items():
                silent_seconds = now - channel.received_at
                if silent_seconds > self.silence_seconds:
                    self._lost(f"{name} has not been heard of for {silent_seconds:.0f} s")


def send_heartbeats(channels: Sequence[Channel], body: bytes) -> None:
    """Send `body` to all of them again and again, from a thread."""

    def send() -> None:
        while True:
            for channel in channels:
                try:
                    channel.send(body)
                except ConnectionLost:
                    continue  # whoever receives from it notices
            time.sleep(HEARTBEAT_SECONDS)

    threading.Thread(target=send, name="longctx-heartbeat", daemon=True).start()
