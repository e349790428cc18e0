"""Heartbeats find ranks that hang: a stopped process keeps its sockets open and is merely silent.

Every rank sends a heartbeat twice a second. One that has sent nothing for a while counts as lost.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from longctx.errors import ConnectionLost
from longctx.ipc.channel import Channel

HEARTBEAT_SECONDS = 0.5
SILENCE_SECONDS = 6.0  # far longer than any thread waits for its turn on a working machine
LOADING_SILENCE_SECONDS = 60.0  # while weights are loaded, which may keep all threads waiting


class HeartbeatMonitor:
    """Watches the other ends of some channels from a thread of its own, until the process ends.

    Any thread may set `silence_seconds`; it starts with the time that loading weights may take.
    """

    def __init__(self, peers: Mapping[str, Channel], lost: Callable[[str], None]) -> None:
        """`peers`: channels by the name of their other end, which some thread receives from.

        `lost` is called, from the monitor's thread, with a sentence that names a silent peer.
        """
        self._peers, self._lost = peers, lost
        self.silence_seconds = LOADING_SILENCE_SECONDS
        threading.Thread(target=self._check, name="longctx-heartbeat-monitor", daemon=True).start()

    def _check(self) -> None:
        checked_at = time.monotonic()
        while True:
            time.sleep(HEARTBEAT_SECONDS)
            now = time.monotonic()
            if now - checked_at > 4 * HEARTBEAT_SECONDS:  # this process was stopped: wait anew
                for channel in self._peers.values():
                    channel.received_at = now
            checked_at = now
            for name, channel in self._peers.items():
                silent_seconds = now - channel.received_at
                if silent_seconds > self.silence_seconds:
                    self._lost(f"{name} has sent nothing for {silent_seconds:.0f} s")


def send_heartbeats(channels: Sequence[Channel], body: bytes) -> None:
    """Send `body`, an encoded heartbeat, to all channels twice a second, from a thread."""

    def send() -> None:
        while True:
            for channel in channels:
                try:
                    channel.send(body)
                except ConnectionLost:
                    continue  # the thread that receives from it notices
            time.sleep(HEARTBEAT_SECONDS)

    threading.Thread(target=send, name="longctx-heartbeat", daemon=True).start()
