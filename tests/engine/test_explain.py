"""The engine says why its caches had what they had of a prompt."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.config import CacheConfig, EngineConfig
from longctx.engine.explain import REASONS, Explainer, common_tokens
from longctx.errors import InvalidRequest
from longctx.request import CacheExplanation, Request
from tests.support.recorded_engine import RecordedEngine, ask, build_engine, engine_config, some_ids


def with_tiers(folder: Path, model: Path, **cache: object) -> RecordedEngine:
    settings: dict[str, object] = {
        "kv_codec": "raw",
        "device_pool_gib": 0.03,
        "host_pool_gib": 0.01,
        "kv_dir": folder,
        "disk_cap_gib": 0.2,
        "disk_free_gib": 0.0,
    }
    config: EngineConfig = replace(
        engine_config(),
        cache=CacheConfig(**{**settings, **cache}),  # type: ignore[arg-type]
    )
    return RecordedEngine(config, model)


@pytest.fixture
def engine(llama: Path) -> RecordedEngine:
    """With a device tier only."""
    return build_engine(llama)


@pytest.fixture
def tiered(llama: Path, tmp_path: Path) -> Iterator[RecordedEngine]:
    engine = with_tiers(tmp_path, llama)
    yield engine
    engine.close()


def why(engine: RecordedEngine, request: Request) -> CacheExplanation:
    (answered,) = engine.finish(replace(request, explain=True))
    explanation = answered.counts.explanation
    assert explanation is not None
    found = sum(explanation.found_tokens.values())
    assert found == answered.counts.cached_tokens
    assert explanation.prompt_tokens == answered.counts.prompt_tokens
    assert explanation.reason in REASONS and explanation.detail.startswith(
        f"found up to token {found}; "
    )
    return explanation


def wait_for_transfers(engine: RecordedEngine) -> None:
    while engine.has_transfers:
        engine.step()


def test_who_does_not_ask_is_not_told(engine: RecordedEngine) -> None:
    (answered,) = engine.finish(ask("a", some_ids(200, 1)))
    assert answered.counts.explanation is None


def test_a_new_text_was_never_seen_and_is_then_found_but_for_its_last_block(
    engine: RecordedEngine,
) -> None:
    ids = some_ids(64 * 5, 1)
    told = why(engine, ask("first", ids))
    assert (told.reason, told.found_tokens["device"], told.divergence) == ("never_seen", 0, None)
    told = why(engine, ask("second", ids))
    assert (told.reason, told.found_tokens["device"], told.waited_tokens) == ("below_block", 256, 0)


def test_the_first_different_token_is_found_inside_a_block(engine: RecordedEngine) -> None:
    ids = some_ids(400, 1)
    engine.finish(ask("first", ids))
    changed = (*ids[:200], ids[200] % 300 + 100, *ids[201:])
    told = why(engine, ask("second", changed))
    assert (told.reason, told.found_tokens["device"]) == ("never_seen", 192)
    assert told.divergence is not None
    assert (told.divergence.position, told.divergence.known) == (200, "prompt")


def test_other_tenants_are_not_compared_with(engine: RecordedEngine) -> None:
    ids = some_ids(400, 1)
    engine.finish(ask("first", ids, salt="alice"))
    told = why(engine, ask("second", (*ids[:200], *some_ids(200, 2)), salt="bob"))
    assert (told.found_tokens["device"], told.divergence) == (0, None)


def test_a_prompt_that_another_is_computing_is_waited_for(engine: RecordedEngine) -> None:
    ids = some_ids(64 * 20, 1)
    engine.submit(ask("first", ids))
    engine.take_step()
    told = why(engine, ask("second", (*ids, *some_ids(70, 2))))
    assert told.found_tokens["device"] >= 64 * 19
    assert 0 < told.waited_tokens <= told.found_tokens["device"]


def test_what_left_the_device_was_evicted(engine: RecordedEngine) -> None:
    ids = some_ids(640, 1)
    engine.finish(ask("first", ids))
    assert engine.clear(["device"])["device"].blocks >= 10
    told = why(engine, ask("second", ids))
    assert (told.reason, told.found_tokens["device"]) == ("evicted", 0)
    assert "device" in told.detail


def test_an_aborted_prompt_does_not_count_as_seen(engine: RecordedEngine) -> None:
    ids = some_ids(64 * 30, 1)
    engine.submit(ask("first", ids))
    engine.abort("first")
    told = why(engine, ask("second", ids))
    assert told.reason == "never_seen"


def test_each_tier_is_named_for_what_it_had(tiered: RecordedEngine) -> None:
    ids = some_ids(64 * 20, 1)
    tiered.finish(ask("first", ids))
    wait_for_transfers(tiered)
    assert why(tiered, ask("device", ids)).found_tokens["device"] == 64 * 19
    tiered.clear(["device"])
    assert why(tiered, ask("host", ids)).found_tokens["host"] == 64 * 19
    tiered.clear(["device", "host"])
    assert why(tiered, ask("disk", ids)).found_tokens["disk"] == 64 * 19


def test_a_document_under_another_prompt_is_known_by_its_id(tiered: RecordedEngine) -> None:
    tiered.open_document("report", np.array(some_ids(1000, 1), dtype=np.int32))
    tiered.finish(ask("ingest", some_ids(10, 2), "report", max_tokens=0))
    wait_for_transfers(tiered)
    told = why(tiered, ask("question", some_ids(70, 3), "report", some_ids(5, 4)))
    assert (told.reason, told.found_tokens["device"]) == ("other_prefix", 0)
    assert "report" in told.detail
    assert why(tiered, ask("again", some_ids(10, 2), "report", some_ids(5, 4))).reason in (
        "below_block",
        "never_seen",
    )


def test_a_damaged_file_is_the_reason(tiered: RecordedEngine, tmp_path: Path) -> None:
    ids = some_ids(64 * 25, 1)
    tiered.finish(ask("first", ids))
    wait_for_transfers(tiered)
    for file in tmp_path.rglob("*.kv"):
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(bytes(raw))
    tiered.clear(["device", "host"])
    told = why(tiered, ask("second", ids))
    assert told.reason in ("corrupt", "slow") and told.found_tokens["disk"] < 64 * 24


def test_text_stored_by_another_codec_is_said_to_be_so(llama: Path, tmp_path: Path) -> None:
    ids = some_ids(64 * 20, 1)
    first = with_tiers(tmp_path, llama)
    first.finish(ask("first", ids))
    first.close(flush_seconds=20)
    second = with_tiers(tmp_path, llama, kv_codec="int8", force_codec=True)
    told = why(second, ask("second", ids))
    second.close()
    assert told.reason == "other_codec" and "raw" in told.detail


def test_windows_are_kept_only_where_something_ends(gemma3: Path) -> None:
    engine = build_engine(gemma3)
    ids = some_ids(64 * 12, 1)
    engine.finish(ask("first", ids))
    windows = engine.memory.packed[1]
    windows.forget(range(1, windows.num_pages))
    told = why(engine, ask("second", (*ids[:500], *some_ids(200, 2))))
    assert (told.reason, told.found_tokens["device"]) == ("checkpoint", 0)


def test_a_deleted_document_is_forgotten(tiered: RecordedEngine) -> None:
    text = np.array(some_ids(1000, 1), dtype=np.int32)
    tiered.open_document("report", text)
    tiered.finish(ask("ingest", some_ids(10, 2), "report", max_tokens=0))
    wait_for_transfers(tiered)
    tiered.close_document("report")
    literal = [int(token) for token in text]
    told = why(tiered, ask("question", some_ids(10, 2), [*literal[:500], 7, *literal[501:]]))
    assert told.divergence is None and told.found_tokens["device"] == 0


def test_a_tier_that_there_is_not_cannot_be_cleared(engine: RecordedEngine) -> None:
    with pytest.raises(InvalidRequest, match="there is no host tier; --host-pool-gib"):
        engine.clear(["host"])


def test_only_so_much_is_remembered(
    engine: RecordedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longctx.engine.explain.RECENT_TOKENS", 500)
    explainer: Explainer = engine._explainer
    for number in range(8):
        engine.finish(ask(f"request-{number}", some_ids(150, number), max_tokens=1))
    assert explainer._recent_tokens <= 500
    assert sum(len(recent) for recent in explainer._recent.values()) == 3


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=5),
    st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=5),
)
def test_shared_tokens_do_not_depend_on_the_pieces(a: list[list[int]], b: list[list[int]]) -> None:
    flat_a, flat_b = (list(chain.from_iterable(text)) for text in (a, b))
    same = 0
    while same < min(len(flat_a), len(flat_b)) and flat_a[same] == flat_b[same]:
        same += 1
    pieces = [[np.array(piece, dtype=np.int32) for piece in text] for text in (a, b)]
    assert common_tokens(*pieces) == same
