"""A model of who may have blocks in the tiers, beside the engine, over whatever may happen.

Documents that share beginnings and whole texts are opened, computed, asked, cancelled, evicted,
lost with the process and deleted, in any order. At rest every block in every tier, and in every
file, belongs to somebody who exists: to a prompt all of whose documents are still there.
"""

import contextlib
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from compress.shape import BLOCK_TOKENS
from longctx.errors import LongctxError
from longctx.request import Request, RequestClass, SamplingParams, Segment
from offload.disk import extent_file
from offload.disk.filesystem import FileSystem
from offload.disk.tier import DiskTier
from offload.host import HostTier
from offload.key import BlockKey, chain_keys
from tests.conftest import ModelFolders
from tests.support.recorded_engine import RecordedEngine, engine_config

VOCABULARY = 100
SYSTEMS = (5, 30, 90)  # tokens of what comes before a document: one is ingested after the first


def text(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist())


# Some are beginnings of others, two are the same, one fills no block
TEXTS = (
    text(1, 200),
    text(1, 700),
    text(1, 300) + text(2, 400),
    text(1, 700),
    text(3, 1100),
    text(4, 40),
)


@dataclass(frozen=True)
class Claim:
    """A prompt: its tokens, and where each document in it begins."""

    tokens: tuple[int, ...]
    begins: tuple[tuple[int, str], ...]


class Deletions(RuleBasedStateMachine):
    folder: Path  # of the model

    @initialize()
    def start(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.kv = self.place / "0"
        self.lives = 0
        self.documents: dict[str, tuple[int, ...]] = {}  # that exist
        self.deleted: dict[str, tuple[int, ...]] = {}  # written down until all of it is gone
        self.claims: list[Claim] = []
        self.running: dict[str, Claim] = {}
        self.count = 0
        self.engine = self.started()

    def started(self) -> RecordedEngine:
        config = engine_config(pool_gib=0.003, max_batch_tokens=256)
        cache = replace(
            config.cache, kv_dir=self.kv, host_pool_gib=0.001, disk_cap_gib=1, disk_free_gib=0
        )
        return RecordedEngine(replace(config, cache=cache), self.folder)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            try:
                self.rest()
            finally:
                self.engine.close()
                shutil.rmtree(self.place)

    # -- what happens -----------------------------------------------------------------------------

    @rule(number=st.integers(0, len(TEXTS) - 1), ingest=st.booleans())
    def upload(self, number: int, ingest: bool) -> None:
        self.count += 1
        name = f"file-{self.count}"
        self.documents[name] = TEXTS[number]
        self.open(name, TEXTS[number])  # from now on the blocks of its prompt are its own
        before = text(SYSTEMS[0], SYSTEMS[0])
        self.claims.append(Claim(before + TEXTS[number], ((len(before), name),)))
        if ingest:
            self.submit(self.keep(name), ((name, SYSTEMS[0]),))

    @precondition(lambda self: self.documents)
    @rule(
        data=st.data(),
        system=st.sampled_from(SYSTEMS),
        question=st.sampled_from((1, 70, 1100)),
        answer=st.sampled_from((1, 70)),
        choices=st.sampled_from((1, 2)),
    )
    def ask(
        self, data: st.DataObject, system: int, question: int, answer: int, choices: int
    ) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.documents)), max_size=2), "names")
        self.count += 1
        segments = [Segment(token_ids=text(system, system))]
        segments += [Segment(document_id=name) for name in names]
        segments.append(Segment(token_ids=text(question, question)))
        begins, begin = [], system
        for name in names:
            begins.append((name, begin))
            begin += len(self.documents[name])
        sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True, n=choices)
        request = Request(request_id=f"{self.count}", segments=tuple(segments), sampling=sampling)
        self.submit(request, tuple(begins))

    @precondition(lambda self: self.documents)
    @rule(data=st.data())
    def say_its_text(self, data: st.DataObject) -> None:
        """A prompt with the same text, which is nobody's document."""
        name = data.draw(st.sampled_from(sorted(self.documents)), "name")
        self.count += 1
        tokens = text(SYSTEMS[0], SYSTEMS[0]) + self.documents[name] + text(8, 20)
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        request = Request(
            request_id=f"{self.count}", segments=(Segment(token_ids=tokens),), sampling=sampling
        )
        self.submit(request, ())

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work or self.engine.has_transfers:
                self.engine.take_step()
        self.note_erased()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.running)), "request"))

    @rule(tier=st.sampled_from(("device", "host")))
    def evict(self, tier: str) -> None:
        self.engine.clear([tier])

    @precondition(lambda self: self.documents)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.documents)), "name")
        self.deleted[name] = self.documents.pop(name)
        for request_id in [r for r in self.running if r.startswith(f"ingest-{name}/")]:
            self.engine.abort(request_id)
        if not self.engine.close_document(name).waits:
            del self.deleted[name]

    @rule(how=st.sampled_from(("stopped", "killed")), flushed=st.booleans())
    def restart(self, how: str, flushed: bool) -> None:
        """`killed`: with the folder as it was, whatever the end of the process writes to it."""
        self.note_answers()
        self.lives += 1
        after = self.place / f"{self.lives}"
        if how == "killed":
            after.mkdir(0o700)
            for path in self.kv.glob("*.kv*"):
                with contextlib.suppress(FileNotFoundError):  # it is being renamed or removed
                    shutil.copy2(path, after)
        self.engine.close(flush_seconds=60.0 if flushed else 0.0)
        if how == "killed":
            self.kv = after
        self.running.clear()
        self.engine = self.started()
        for name, tokens in self.documents.items():
            self.open(name, tokens)
        for name, tokens in list(self.deleted.items()):
            self.open(name, tokens)
            if not self.engine.close_document(name).waits:
                del self.deleted[name]

    # -- what must hold ---------------------------------------------------------------------------

    @rule()
    def rest(self) -> None:
        """Let all that runs come to its end; then see whose the blocks are."""
        steps = 0
        while self.engine.has_work or self.engine.has_transfers:
            self.engine.take_step()
            steps += 1
            assert steps < 20_000
        self.note_erased()
        self.note_answers()
        self.running.clear()
        assert not self.deleted, "a deletion has not ended"
        self.engine.cache.offloader.store.flush(60.0)  # type: ignore[union-attr]
        allowed = self.allowed()
        for place, keys in self.held().items():
            assert keys <= allowed, f"{len(keys - allowed)} of {len(keys)} blocks: {place}"

    @invariant()
    def what_exists_is_counted(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.stats().documents_open == len(self.documents)

    def held(self) -> dict[str, set[BlockKey]]:
        offloader = self.engine.cache.offloader
        assert offloader is not None
        held = defaultdict(set)
        for pool in self.engine.memory.packed:
            held["device"] |= set(pool._by_key)
        for tier in offloader.store._stack._tiers:
            assert isinstance(tier, HostTier | DiskTier)
            held[tier.name] |= {key for stem in tier.stems() for key in stem.keys}
        for path in self.kv.rglob("*.kv*"):
            files = FileSystem()
            descriptor = files.open(path)
            try:
                held["files"] |= set(extent_file.read_header(files, descriptor).meta.run.keys)
            finally:
                files.close(descriptor)
        return held

    def allowed(self) -> set[BlockKey]:
        """Return the keys of all blocks that some prompt without deleted documents has."""
        root = self.engine._inputs.namespace("", self.engine.memory.codecs[0])
        allowed: set[BlockKey] = set()
        for claim in self.claims:
            ids = np.array(claim.tokens, dtype=np.int32)
            keys = chain_keys(root, ids, first_position=0, block_tokens=BLOCK_TOKENS)
            gone = [begin for begin, name in claim.begins if name not in self.documents]
            allowed.update(keys[: min(gone, default=len(ids)) // BLOCK_TOKENS])
        return allowed

    # -- how --------------------------------------------------------------------------------------

    def keep(self, name: str) -> Request:
        return Request(
            request_id=f"ingest-{name}/{self.count}",
            segments=(
                Segment(token_ids=text(SYSTEMS[0], SYSTEMS[0])),
                Segment(document_id=name),
            ),
            sampling=SamplingParams(max_tokens=0),
            request_class=RequestClass.INGEST,
        )

    def open(self, name: str, tokens: tuple[int, ...]) -> None:
        ids: NDArray[np.int32] = np.array(tokens, dtype=np.int32)
        self.engine.open_document(name, ids, keep=self.keep(name))

    def submit(self, request: Request, begins: tuple[tuple[str, int], ...]) -> None:
        try:
            self.engine.submit(request)
        except LongctxError:  # larger than the device
            return
        tokens: tuple[int, ...] = ()
        for segment in request.segments:
            tokens += segment.token_ids or self.documents.get(segment.document_id or "", ())
        claim = Claim(tokens, tuple((begin, name) for name, begin in begins))
        self.claims.append(claim)
        self.running[request.request_id] = claim

    def note_erased(self) -> None:
        for name, erasure in self.engine.take_erased().items():
            if not erasure.waits:
                self.deleted.pop(name, None)

    def note_answers(self) -> None:
        """Add to the claims what was said: answers fill blocks too."""
        for (request_id, index), _ in list(self.engine.runner.texts_of.items()):
            if request_id in self.running:
                claim = self.running[request_id]
                tokens = tuple(self.engine.tokens_of((request_id, index)))
                self.claims.append(replace(claim, tokens=tokens))


def test_at_rest_every_block_belongs_to_somebody_who_exists(model_folders: ModelFolders) -> None:
    class OnLlama(Deletions):
        folder = model_folders("llama")

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        OnLlama,
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
def test_with_windows_too_every_block_belongs_to_somebody_who_exists(
    model_folders: ModelFolders,
) -> None:
    class OnGemma(Deletions):
        folder = model_folders("gemma3_text")

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        OnGemma,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
