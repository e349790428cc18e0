"""How processes become ranks: all connect to the head, and rank 0 gathers the others.

The head is the process that serves requests. A launcher (torchrun, here or on other machines)
starts the ranks and tells each its coordinates. Then

    rank 0     connects to the head, says at which address it listens, and stays connected
    follower   asks the head where rank 0 is, disconnects, and connects to rank 0
    rank 0     waits for all followers, then tells them where the process group has its store

A launcher that starts the ranks again need not agree with anyone about which attempt this is: the
head sends followers to whichever rank 0 connected last.
"""

import array
import contextlib
import fcntl
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from longctx.config import EngineConfig
from longctx.errors import AuthenticationFailed, ConnectionLost, LongctxError, PeerLost
from longctx.ipc.channel import Channel, connect, listen
from longctx.ipc.handshake import authenticate
from longctx.ipc.protocol import Heartbeat, LeaderAddress, RankJoined, decode_command, encode
from longctx.ring.process_group import ProcessGroupTransport
from longctx.ring.processes import messages
from longctx.ring.processes.heartbeat import send_heartbeats
from longctx.ring.processes.listener import Listener
from longctx.ring.processes.messages import FollowerJoined, JoinGroup, decode_to_leader
from offload.machine_limits import cores

GATHERING_SECONDS = 120.0  # until every rank is there: Python and torch load slowly from cold disks
CONNECT_SECONDS = 5.0
RETRY_SECONDS = 0.2
NOT_REACHED = (OSError, AuthenticationFailed, ConnectionLost, PeerLost)
SIOCGIFADDR = 0x8915  # Linux: an interface's address


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoordinates:
    """Which rank this process is, among all and among those of its machine."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Read them from the variables that torchrun sets. Raises LongctxError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            rank, ranks, local_rank, local_ranks = (int(environment[name]) for name in names)
        except KeyError as error:
            raise LongctxError(
                f"{error.args[0]} is not set; ranks are started by torchrun, see docs/ring.md"
            ) from error
        return cls(rank=rank, ranks=ranks, local_rank=local_rank, local_ranks=local_ranks)

    def rank_config(self, config: EngineConfig) -> EngineConfig:
        """Return the configuration with this rank's share of its machine: a device and threads.

        Rank 1 of 2 on a machine with 8 cores gets `cuda:1` if there are GPUs, and 4 threads.
        """
        device = config.model.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{self.local_rank}"
        threads = config.model.threads or max(1, cores() // self.local_ranks)
        return replace(config, model=replace(config.model, device=device, threads=threads))


class LeaderRendezvous:
    """Rank 0's connections: `channel` to the head, and `followers[r]` to each other rank.

    Constructing it gathers the followers, which may take minutes; from then on heartbeats are sent
    to the head. The main thread then calls `join_group`, once; `kill_local_followers` may be called
    from any thread.
    """

    def __init__(self, head: str, secret: bytes, coordinates: RankCoordinates) -> None:
        """Connect to the head and wait for all followers, each for `GATHERING_SECONDS` at most.

        Raises AuthenticationFailed or ConnectionLost where the head is not reached, PeerLost where
        a follower does not come.
        """
        connection = _connect_when_ready(head, secret)
        self.channel = Channel(connection)
        self._coordinates = coordinates
        self._pids: list[int] = []
        self.followers: dict[int, Channel] = {}
        self._arrival = threading.Condition()
        self._is_gathering = True
        if head.startswith("unix:"):
            self._host, address = "", f"{head}-{os.getpid()}"
        else:
            self._host = connection.getsockname()[0]
            _use_interface(self._host)
            address = f"{self._host}:0"
        with contextlib.closing(Listener(address, secret, self._add_follower)) as listener:
            self._address = listener.address
            joined = RankJoined(0, coordinates.ranks, os.getpid(), self._address)
            self.channel.send(encode(joined))
            # Followers may come later than the head waits without a sign of life.
            send_heartbeats([self.channel], encode(Heartbeat()))
            self._gather()

    def _gather(self) -> None:
        others = self._coordinates.ranks - 1
        with self._arrival:
            self._arrival.wait_for(lambda: len(self.followers) == others, GATHERING_SECONDS)
            self._is_gathering = False
        if len(self.followers) < others:
            missing = sorted(set(range(1, self._coordinates.ranks)) - self.followers.keys())
            raise PeerLost(f"ranks {missing} did not come")

    def _add_follower(self, connection: socket.socket, message: bytes) -> None:
        joined = decode_to_leader(message)
        assert isinstance(joined, FollowerJoined), joined
        with self._arrival:
            if not self._is_gathering:
                connection.close()
                return
            self.followers[joined.rank] = Channel(connection)
            self._pids.append(joined.pid)
            self._arrival.notify_all()

    def join_group(
        self, config: EngineConfig, model_folder: Path, cache_dir: Path
    ) -> ProcessGroupTransport:
        """Tell the followers where the process group has its store, and join it with them.

        `config`: the head's, of which each rank takes its share. Raises PeerLost.
        """
        store, name = self._open_store()
        group = messages.encode(JoinGroup(name, config, model_folder, cache_dir))
        for channel in self.followers.values():
            try:
                channel.send(group)
            except ConnectionLost as error:
                raise PeerLost(f"a rank ended while the ranks gathered: {error}") from error
        device = torch.device(self._coordinates.rank_config(config).model.device)
        return ProcessGroupTransport(store, 0, self._coordinates.ranks, device)

    def kill_local_followers(self) -> None:
        """Kill followers on this machine, which may hang: the launcher would wait 30 s for them.

        Does nothing where the ranks may be on several machines.
        """
        for pid in () if self._host else self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _open_store(self) -> tuple[Store, str]:
        if not self._host:
            path = self._address.removeprefix("unix:") + "-store"
            return FileStore(path, self._coordinates.ranks), f"file:{path}"
        # The store is given a socket: by itself it would listen at every address of the machine.
        listener = listen(f"{self._host}:0")
        port = listener.getsockname()[1]
        store = TCPStore(
            self._host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return store, f"{self._host}:{port}"


class FollowerRendezvous:
    """A follower's connection: `channel` to rank 0. For the follower's main thread."""

    def __init__(self, head: str, secret: bytes, coordinates: RankCoordinates) -> None:
        """Ask the head where rank 0 is and connect there, again and again until that works.

        Raises PeerLost after `GATHERING_SECONDS`, EngineDied where the head expects another number
        of ranks.
        """
        self._coordinates = coordinates
        deadline = time.monotonic() + GATHERING_SECONDS
        while True:
            try:
                self.channel = self._connect_to_leader(head, secret)
                return
            except NOT_REACHED as error:  # maybe this was a leader that has ended
                if time.monotonic() > deadline:
                    raise PeerLost(
                        f"rank {coordinates.rank} did not find the leader: {error}"
                    ) from error
                time.sleep(RETRY_SECONDS)

    def _connect_to_leader(self, head: str, secret: bytes) -> Channel:
        coordinates, asking = self._coordinates, Channel(_connect(head, secret))
        try:
            asking.send(encode(RankJoined(coordinates.rank, coordinates.ranks, os.getpid())))
            body = asking.receive()
        finally:
            asking.close()
        if body is None:
            raise ConnectionLost("the head knows no leader")
        leader = decode_command(body)
        assert isinstance(leader, LeaderAddress), leader
        if leader.fault is not None:
            raise leader.fault.error()
        connection = _connect(leader.address, secret)
        if connection.family == socket.AF_INET:
            _use_interface(connection.getsockname()[0])
        channel = Channel(connection)
        channel.send(messages.encode(FollowerJoined(coordinates.rank, os.getpid())))
        return channel

    def rank_config(self, config: EngineConfig) -> EngineConfig:
        """Return this rank's own configuration, as `RankCoordinates.rank_config` does."""
        return self._coordinates.rank_config(config)

    def join_group(self, group: JoinGroup, config: EngineConfig) -> ProcessGroupTransport:
        """Join the process group whose store `group` names; `config` is this rank's own.

        Raises PeerLost where another rank does not join.
        """
        device = torch.device(config.model.device)
        if group.store.startswith("file:"):
            store: Store = FileStore(group.store.removeprefix("file:"), self._coordinates.ranks)
        else:
            host, _, port = group.store.rpartition(":")
            store = TCPStore(host, int(port), is_master=False)
        return ProcessGroupTransport(store, self._coordinates.rank, self._coordinates.ranks, device)


def _connect(address: str, secret: bytes) -> socket.socket:
    connection = connect(address, CONNECT_SECONDS)
    try:
        authenticate(connection, secret)
    except AuthenticationFailed:
        connection.close()
        raise
    return connection


def _connect_when_ready(address: str, secret: bytes) -> socket.socket:
    """Connect as soon as the head listens: it may be started after its ranks, or again."""
    deadline = time.monotonic() + GATHERING_SECONDS
    while True:
        try:
            return _connect(address, secret)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionLost(f"nobody answers at {address}: {error}") from error
            time.sleep(RETRY_SECONDS)


def _use_interface(address: str) -> None:
    """Let gloo use the interface that has this address, unless the user has named one.

    By itself gloo takes the interface that the host's name resolves to, often the loopback.
    """
    for _, name in socket.if_nameindex():
        request = struct.pack("16s16x", name.encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = array.array("B", request + bytes(8))
                fcntl.ioctl(probe, SIOCGIFADDR, answer)
            except OSError:
                continue  # an interface without an address
        if socket.inet_ntoa(answer.tobytes()[20:24]) == address:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return
