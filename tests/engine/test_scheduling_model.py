"""Whatever is asked, cancelled, preempted or lost: each request ends once, with the right answer.

Prompts that begin alike arrive at an engine with a tiny device, a small host tier and a disk that
fails now and then. At rest each choice of each request has one reason to have ended, every row of
logits that was sampled from is that of one float32 pass over the same tokens, and no page is held.
"""

import errno
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from longctx.engine.sequence import SequenceState
from longctx.errors import BlocksLost, ContextTooLong
from longctx.kv.cache_manager import NO_ROOM_BELOW
from longctx.request import FinishReason, Request, RequestClass
from offload.disk.tier import DiskTier
from tests.conftest import ModelFolders
from tests.offload.disk.faulty_files import FaultyFiles
from tests.support.recorded_engine import (
    Eager,
    RecordedEngine,
    ask,
    engine_config,
    gib_of_blocks,
    some_ids,
)

LAYERS = {"llama": 3, "gemma3_text": 4}
POOL_BLOCKS = 12
DOCUMENT_TOKENS = 330
TOLERANCE = 1e-4  # of logits, as in `assert_equals_eager`
MOST_STEPS = 6000  # to finish whatever was asked
FAULTS = {"read": errno.EIO, "write": errno.ENOSPC, "sync": errno.EIO, "open": errno.ENOENT}
INJECTED = "RuntimeError: injected"
LOST = "injected loss"


class Scheduling(RuleBasedStateMachine):
    folder: Path  # of the model
    eager: Eager
    architecture: str

    @initialize()
    def start(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.files = FaultyFiles()
        self.asked: dict[str, Request] = {}
        config = engine_config(
            max_batch_tokens=96,
            max_sequences=4,
            pool_gib=gib_of_blocks(POOL_BLOCKS, LAYERS[self.architecture]),
        )
        cache = replace(
            config.cache, kv_dir=self.place, host_pool_gib=0.001, disk_cap_gib=1, disk_free_gib=0
        )
        faulty = partial(DiskTier, files=self.files)
        with patch("longctx.kv.open_store.DiskTier", faulty):
            self.engine = RecordedEngine(replace(config, cache=cache), self.folder)
        document = np.array(some_ids(DOCUMENT_TOKENS, 0), dtype=np.int32)
        self.engine.open_document("d", document)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            try:
                self.rest()
            finally:
                self.engine.close()
                shutil.rmtree(self.place)

    # -- what happens -----------------------------------------------------------------------------

    @rule(
        seed=st.integers(0, 2),  # few, so that prompts begin alike
        length=st.sampled_from((1, 63, 64, 65, 130, 200, 400, 1100)),
        document=st.booleans(),
        max_tokens=st.sampled_from((0, 1, 20, 140)),
        choices=st.integers(1, 3),
        request_class=st.sampled_from(RequestClass),
        salt=st.sampled_from(("", "other")),
    )
    def submit(
        self,
        seed: int,
        length: int,
        document: bool,
        max_tokens: int,
        choices: int,
        request_class: RequestClass,
        salt: str,
    ) -> None:
        name = f"{len(self.asked)}"
        request = ask(
            name,
            *(["d"] if document else []),
            some_ids(length, seed),
            max_tokens=max_tokens,
            n=choices if max_tokens else 1,
            temperature=0.0 if choices == 1 else 1.0,
            seed=seed,
            request_class=request_class,
            salt=salt,
        )
        try:
            self.engine.submit(request)
        except ContextTooLong:
            return
        self.asked[name] = request

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work or self.engine.has_transfers:
                self.engine.take_step()

    # What is drawn must not depend on how far the store's threads are.

    @rule(number=st.integers(0, 20))
    def cancel(self, number: int) -> None:
        self.engine.abort(f"{number}")
        held = {s.request.request_id for s in self.engine.scheduler.running}
        assert f"{number}" not in held, "what was cancelled holds memory"

    @rule(number=st.integers(0, 3))
    def preempt(self, number: int) -> None:
        for sequence in self.engine.scheduler.running[number : number + 1]:
            self.engine.scheduler.preempt(sequence)

    @rule(tier=st.sampled_from(("device", "host")))
    def evict(self, tier: str) -> None:
        self.engine.clear([tier])

    @rule(faults=st.sets(st.sampled_from(sorted(FAULTS))))
    def disk_fails(self, faults: set[str]) -> None:
        self.files.errors = {call: FAULTS[call] for call in faults}

    @rule(loses_blocks=st.booleans())
    def step_fails(self, loses_blocks: bool) -> None:
        error = BlocksLost(LOST) if loses_blocks else RuntimeError("injected")
        self.engine.runner.failures = [error]

    # -- what must hold ---------------------------------------------------------------------------

    @property
    def open_requests(self) -> list[str]:
        return [name for name in self.asked if not self.engine.answered[name].finished]

    @invariant()
    def everybody_runs_or_waits_or_has_ended(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        assert all(s.state is SequenceState.RUNNING for s in scheduler.running)
        assert all(s.state is SequenceState.WAITING for s in scheduler.waiting)
        assert all(not s.blocks.own_pages for s in scheduler.waiting), "who waits holds pages"
        if not scheduler.running and not self.engine.has_transfers:
            assert self.engine.memory.raw.held == 0

    @rule()
    def rest(self) -> None:
        """Let all that was asked come to its end, then compare it with the model alone."""
        engine = self.engine
        steps = 0
        while engine.has_work or engine.has_transfers:
            engine.take_step()
            steps += 1
            assert steps < MOST_STEPS, f"{self.open_requests} do not come to an end"
        for name, request in self.asked.items():
            answered = engine.answered[name]
            assert answered.finished == 1
            by_source = answered.counts.tokens_by_source
            assert sum(by_source.values()) == answered.counts.prompt_tokens
            assert min(by_source.values()) >= 0, by_source
            assert sorted(answered.reasons) == list(range(request.sampling.n))
            assert all(len(reasons) == 1 for reasons in answered.reasons.values())
            for reason in answered.reasons.values():
                assert reason != [FinishReason.STOP]
            for error in answered.errors:
                assert error in (INJECTED, LOST, NO_ROOM_BELOW) or "lower tier" in error, error
        self.compare()
        engine.assert_idle()

    def compare(self) -> None:
        for name, sampled in self.engine.logits.items():
            tokens = self.engine.tokens_of(name)
            rows = self.eager.rows(tokens)
            greedy = self.asked[name[0]].sampling.temperature == 0
            for length, row in sampled.items():
                assert float((row - rows[length - 1]).abs().max()) < TOLERANCE, (name, length)
                if greedy and length < len(tokens):
                    best, chosen = rows[length - 1].max(), rows[length - 1][tokens[length]]
                    assert best - chosen <= 2 * TOLERANCE, (name, length)
        self.engine.logits.clear()


def run_on(folder: Path, name: str, *, examples: int, steps: int) -> None:
    class OnModel(Scheduling):
        pass

    OnModel.folder, OnModel.architecture, OnModel.eager = folder, name, Eager(folder)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        OnModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("architecture", sorted(LAYERS))
def test_every_request_ends_once_with_the_answer_of_the_model_alone(
    architecture: str, model_folders: ModelFolders
) -> None:
    run_on(model_folders(architecture), architecture, examples=20, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(LAYERS))
def test_and_so_it_is_in_the_long_run(architecture: str, model_folders: ModelFolders) -> None:
    run_on(model_folders(architecture), architecture, examples=60, steps=50)
