"""Decoding goes on, prompts take turns, memory goes to who came first, and nobody waits forever."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longctx.engine.cost_model import Coefficients, CostModel
from longctx.engine.scheduler import OLDEST_SHARE, SchedulerOutput
from longctx.engine.sequence import Sequence, SequenceState
from longctx.engine.time_shares import MOST_LONE_STEPS, TIME_SHARE, LoneSteps, TimeShares
from longctx.errors import Overloaded
from longctx.request import RequestClass
from longctx.text.tokenizer import Tokenizer
from tests.support.bare_cache import Bench, bare_cache, blocks, numbers

INTERACTIVE, BATCH, INGEST = RequestClass


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> Tokenizer:
    return Tokenizer(llama)


def tokens_in(output: SchedulerOutput, sequence: Sequence) -> int:
    return sum(chunk.num_tokens for chunk in output.chunks if chunk.sequence is sequence)


def test_decoding_comes_first_and_prompts_share_the_rest(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=100))
    answer = bench.add(numbers(10), max_tokens=50)
    bench.step()
    prompt = bench.add(numbers(500, 1000))
    output = bench.step()
    assert output.chunks[0].sequence is answer and tokens_in(output, answer) == 1
    assert 64 <= tokens_in(output, prompt) <= 127
    assert output.num_tokens <= bench.batch_tokens


def test_chunks_end_at_block_boundaries(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=100), batch_tokens=100)
    prompt = bench.add(numbers(300))
    for computed in (64, 128, 192, 256, 300):
        bench.step()
        assert prompt.blocks.computed == computed or prompt.state is SequenceState.FINISHED


def test_a_budget_below_a_block_still_progresses(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=20), batch_tokens=7, max_sequences=2)
    bench.add(numbers(150))
    bench.finish(steps=30)


def test_short_prompts_overtake_a_long_one_that_progresses_all_the_same(
    tokenizer: Tokenizer,
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=1000), seconds_of=lambda output: 0.1)
    long = bench.add(numbers(2000))
    short = bench.add(numbers(128, 5000))
    output = bench.step()
    assert tokens_in(output, short) == 128 and tokens_in(output, long) == 0
    for index in range(200):  # short ones keep coming, enough for every step
        bench.add(numbers(128, 10_000 + 200 * index))
        bench.step()
        if long.state is SequenceState.FINISHED:
            break
    assert long.state is SequenceState.FINISHED


@pytest.mark.parametrize(
    ("one", "other", "ratio"), [(INTERACTIVE, INGEST, 8), (INTERACTIVE, BATCH, 4)]
)
def test_competing_classes_get_their_share_of_the_tokens(
    tokenizer: Tokenizer, one: RequestClass, other: RequestClass, ratio: float
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=2000))
    served = {one: 0, other: 0}
    sequences = [
        bench.add(numbers(30_000, 100_000 * (1 + request_class)), request_class=request_class)
        for request_class in served
    ]
    for _ in range(180):
        output = bench.step()
        for sequence in sequences:
            served[sequence.request.request_class] += tokens_in(output, sequence)
    assert served[one] / served[other] == pytest.approx(ratio, rel=0.15)


def test_a_question_does_not_wait_behind_an_ingestion(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=2000))
    bench.add(numbers(50_000), request_class=INGEST)
    for _ in range(50):
        bench.step()
    question = bench.add(numbers(256, 100_000))
    for _ in range(4):
        bench.step()
    assert question.state is SequenceState.FINISHED


def test_an_ingestion_progresses_beside_constant_questions_and_decoding(
    tokenizer: Tokenizer,
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=2000), seconds_of=seconds_by_tokens)
    ingestion = bench.add(numbers(5_000), request_class=INGEST)
    bench.add(numbers(5, 90_000), max_tokens=20_000)
    for index in range(3000):
        if len(bench.scheduler.running) + len(bench.scheduler.waiting) < 5:
            bench.add(numbers(300, 100_000 + 400 * index))
        bench.step()
        if ingestion.state is SequenceState.FINISHED:
            return
    raise AssertionError(f"only {ingestion.blocks.computed} tokens were read")


def seconds_by_tokens(output: SchedulerOutput) -> float:
    return 0.01 + 0.001 * output.num_tokens


def test_who_computes_a_block_is_as_urgent_as_those_who_wait_for_it(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=200))
    document = numbers(1000)
    ingestion = bench.add(document, request_class=INGEST, max_tokens=0)
    bench.step()
    question = bench.add([*document, 5000, 5001])
    rival = bench.add(numbers(900, 20_000), request_class=BATCH)
    while question.state is not SequenceState.FINISHED:
        bench.step()
    assert ingestion.computed_tokens == 1000
    assert (
        rival.blocks.computed <= 256
    )  # a fifth, its share beside questions; of ingestion it is twice
    assert question.cached_tokens == 960 and question.computed_tokens == 1002 - 960


def test_more_sequences_than_allowed_wait(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=200), max_sequences=3)
    for index in range(9):
        bench.add(numbers(10, 100 * index), max_tokens=5)
    while bench.scheduler.running or bench.scheduler.waiting:
        assert len(bench.step().chunks) <= 3


def test_a_full_queue_refuses(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=200))
    with pytest.raises(Overloaded, match=r"1024 answers are waiting, .* --max-waiting 1024"):
        for _ in range(1025):
            bench.add([1])


def test_each_choice_of_a_request_counts_as_one_that_waits(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=200))
    for index in range(16):
        bench.add(numbers(10, 100 * index), n=64)
    with pytest.raises(Overloaded, match="1024 answers are waiting, and with 64 more"):
        bench.add(numbers(10, 5000), n=64)
    assert len(bench.scheduler.waiting) == 16


def test_a_request_by_itself_is_never_too_many(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=200), max_waiting=4)
    assert bench.add(numbers(10), n=8).state is SequenceState.WAITING


def test_a_question_on_what_is_computed_counts_as_short(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=2000))
    document = numbers(5000)
    bench.add(document, max_tokens=0)
    bench.finish()
    rival = bench.add(numbers(900, 20_000))
    bench.step()
    question = bench.add([*document, 6000, 6001])
    bench.step()  # may be the rival's, as the oldest
    bench.step()
    assert question.state is SequenceState.FINISHED
    assert rival.blocks.computed < 500


def test_one_that_is_preempted_counts_with_what_it_computes_again(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=2000))
    long = bench.add(numbers(3000))
    for _ in range(20):
        bench.step()
    bench.scheduler.preempt(long)
    rival = bench.add(numbers(600, 20_000))
    while long.state is not SequenceState.FINISHED:
        bench.step()
    assert rival.blocks.computed <= 128, "it has more than the oldest's share"


@settings(max_examples=25, deadline=None, phases=(Phase.reuse, Phase.generate))
@given(
    length=st.integers(500, 3000),
    own_class=st.sampled_from(list(RequestClass)),
    rivals=st.lists(
        st.tuples(st.integers(1, 300), st.sampled_from(list(RequestClass)), st.sampled_from("abc")),
        min_size=1,
        max_size=6,
    ),
)
def test_nobody_starves_however_many_shorter_prompts_keep_coming(
    tokenizer: Tokenizer,
    length: int,
    own_class: RequestClass,
    rivals: list[tuple[int, RequestClass, str]],
) -> None:
    """Of a step's 128 tokens a class has an eleventh at least, a tenant a third of that, and its
    oldest prompt an eighth of that again. No older one is there."""
    bench = Bench(
        tokenizer, bare_cache(blocks=4000), max_sequences=16, seconds_of=lambda output: 0.1
    )
    begins = itertools.count(100_000, 1000)
    long = bench.add(numbers(length), request_class=own_class, salt="a")
    most_steps = length / (bench.batch_tokens / 11 / 3 * OLDEST_SHARE)
    for step in itertools.count():
        for number in range(8 - len(bench.scheduler.waiting)):
            tokens, its_class, salt = rivals[(step + number) % len(rivals)]
            bench.add(numbers(tokens, next(begins)), request_class=its_class, salt=salt)
        bench.step()
        if long.state is SequenceState.FINISHED:
            return
        assert step < most_steps, f"{long.blocks.computed} of {length} tokens"


# -- memory -----------------------------------------------------------------------------------


def test_the_youngest_of_the_lowest_class_is_preempted_first(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=9), batch_tokens=512)
    assert bench.cache.memory.packed[0].capacity == 9  # the four need 12 at 192 tokens
    prompts = {
        "old batch": (BATCH, 0),
        "young batch": (BATCH, 1),
        "old question": (INTERACTIVE, 2),
        "young question": (INTERACTIVE, 3),
    }
    sequences = {
        name: bench.add(numbers(100, 1000 * begin), request_class=its_class, max_tokens=300)
        for name, (its_class, begin) in prompts.items()
    }
    preempted: list[str] = []
    for _ in range(2000):
        if not bench.scheduler.running and not bench.scheduler.waiting:
            break
        before = {name: sequence.preemptions for name, sequence in sequences.items()}
        bench.step()
        preempted += [n for n, sequence in sequences.items() if sequence.preemptions > before[n]]
    assert preempted[0] == "young batch"
    assert preempted.index("young batch") < preempted.index("old batch")
    assert "old question" not in preempted
    assert not bench.scheduler.running and not bench.scheduler.waiting


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 500), st.integers(0, 200), st.sampled_from(list(RequestClass))),
        min_size=1,
        max_size=8,
    ),
    pool_blocks=st.integers(11, 16),
)
def test_the_first_of_the_highest_class_is_never_preempted_and_all_end(
    tokenizer: Tokenizer, prompts: list[tuple[int, int, RequestClass]], pool_blocks: int
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=pool_blocks))
    sequences = [
        bench.add(numbers(length, 1000 * i), request_class=c, max_tokens=max_tokens)
        for i, (length, max_tokens, c) in enumerate(prompts)
    ]
    first = min(sequences, key=lambda sequence: sequence.blocks.preemption_key)
    bench.finish()
    assert first.preemptions == 0
    assert all(sequence.state is SequenceState.FINISHED for sequence in sequences)
    assert bench.cache.memory.packed[0].held == bench.cache.memory.raw.held == 0


def test_a_preempted_sequence_goes_on_from_its_blocks(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=6))
    old = bench.add(blocks(2)[:-1], max_tokens=140)
    young = bench.add(blocks(2, 1000)[:-1], max_tokens=140)
    bench.finish()
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert young.computed_tokens < 127 + 140 + 256


# -- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_class", list(RequestClass))
@pytest.mark.parametrize("chunk_seconds", [0.02, 0.5, 3.0])
def test_prompts_take_no_more_than_their_share_of_the_time(
    request_class: RequestClass, chunk_seconds: float
) -> None:
    shares = TimeShares()
    answer_seconds, total, taken = 0.01, 0.0, 0.0
    for _ in range(10_000):
        shares.begin(answer_seconds)
        seconds = chunk_seconds if shares.left(request_class) > 0 else 0.0
        shares.record({request_class: seconds})
        taken += seconds
        total += answer_seconds + seconds
    share = TIME_SHARE[request_class]
    assert taken - chunk_seconds < share * total  # the last chunk is not repaid yet
    # And it is used, but for what whole steps cost: a chunk, then as many steps as repay it.
    steps = math.ceil(chunk_seconds * (1 - share) / (answer_seconds * share))
    cycle_seconds = chunk_seconds + (1 + steps) * answer_seconds
    assert taken + chunk_seconds > 0.95 * total * chunk_seconds / cycle_seconds


def test_steps_without_answers_repay_what_is_owed_and_save_nothing_up() -> None:
    shares = TimeShares()
    shares.begin(0.01)
    shares.record({INGEST: 3.0})
    assert shares.left(INGEST) < -2.9
    shares.repay(10.0)
    assert shares.left(INGEST) == 0
    for _ in range(100):
        shares.begin(0.01)
    assert shares.left(INGEST) == pytest.approx(0.01 * 0.1 / 0.9)


def test_an_ingestion_slows_decoding_by_less_than_a_fifth(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=3000), seconds_of=seconds_by_tokens)
    answer = bench.add(numbers(5), max_tokens=100_000)
    for _ in range(50):
        bench.step()
    alone = rate_of(bench, answer)
    ingestion = bench.add(numbers(100_000, 100_000), request_class=INGEST)
    bench.step()
    began, computed = bench.now, ingestion.blocks.computed
    assert rate_of(bench, answer) > 0.8 * alone
    # And its share is used, a tenth of the time: a millisecond for each token.
    used = 0.001 * (ingestion.blocks.computed - computed)
    assert used > 0.08 * (bench.now - began)


def rate_of(bench: Bench, answer: Sequence) -> float:
    began, sampled = bench.now, answer.completion_tokens
    for _ in range(2000):
        bench.step()
    return (answer.completion_tokens - sampled) / (bench.now - began)


def test_while_nothing_decodes_nothing_is_held_back(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=3000), seconds_of=seconds_by_tokens)
    bench.add(numbers(20_000), request_class=INGEST)
    assert all(bench.step().num_tokens == 128 for _ in range(100))


def test_steps_without_answers_grow_while_nobody_comes() -> None:
    lone = LoneSteps(0.25, 100.0)
    seconds = [lone.seconds(100.0 + quiet, 0.02) for quiet in range(1000)]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0.25 and seconds[-1] == 0.25 * MOST_LONE_STEPS
    assert lone.seconds(1000.0, 0.0) == 0.25, "long steps save nothing there"
    lone.disturb(1100.0)
    assert lone.seconds(1100.5, 0.02) == 0.25


def test_a_chat_that_comes_shortens_the_steps_of_a_document_again(tokenizer: Tokenizer) -> None:
    cost = CostModel(Coefficients(step=0.02, token=0.001))
    bench = Bench(
        tokenizer,
        bare_cache(blocks=3000, step_blocks=80),
        batch_tokens=4096,
        cost=cost,
        seconds_of=lambda output: 0.02 + 0.001 * output.num_tokens,
    )
    bench.add(numbers(150_000), request_class=INGEST)
    early = bench.step().num_tokens
    while bench.now < 60.0:
        late = bench.step().num_tokens
    bench.add(numbers(1, 200_000))
    bench.step()
    after = bench.step().num_tokens
    assert 192 <= early <= 256 and 192 <= after <= 256
    assert late > 1500


def seconds_by_depth(output: SchedulerOutput) -> float:
    """A model whose prompt chunks cost more and more, and whose answers take 60 ms a step."""
    seconds = 0.06
    for chunk in output.chunks:
        past = chunk.sequence.blocks.computed
        seconds += 1e-3 * chunk.num_tokens + 1e-7 * chunk.num_tokens * (past + chunk.num_tokens / 2)
    return seconds


@pytest.mark.parametrize("request_class", [INTERACTIVE, INGEST])
def test_chunks_shrink_with_depth_so_that_answers_keep_their_pace(
    tokenizer: Tokenizer, request_class: RequestClass
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=3000), batch_tokens=512, seconds_of=seconds_by_depth)
    bench.add(numbers(5), max_tokens=100_000)
    for _ in range(20):
        bench.step()
    prompt = bench.add(numbers(60_000, 100_000), request_class=request_class)
    sizes: list[tuple[int, int]] = []
    while prompt.state is not SequenceState.FINISHED:
        past, before = prompt.blocks.computed, bench.now
        output = bench.step()
        # One block of 64 tokens fits into 250 ms up to a depth of about 20,000.
        if 2000 < past < 18_000:
            assert bench.now - before <= 1.05 * 0.25
        if tokens_in(output, prompt) > 1:
            sizes.append((past, tokens_in(output, prompt)))
    shallow = max(size for past, size in sizes if past < 6000)
    deep = max(size for past, size in sizes if past > 40_000)
    assert shallow > deep and (request_class is INGEST or shallow >= 128)
    assert deep < 64  # less than a block, where a block takes longer than the objective


def test_a_chunk_beside_answers_is_one_block_until_it_is_known_what_that_takes(
    tokenizer: Tokenizer,
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=3000), batch_tokens=512, seconds_of=seconds_by_depth)
    bench.add([1], max_tokens=100)
    bench.step()
    bench.scheduler.cost.coefficients = Coefficients(step=0.06)  # only decoding was measured
    prompt = bench.add(numbers(5000, 100_000))
    assert tokens_in(bench.step(), prompt) == 64


def test_a_prompt_that_is_taken_for_nothing_still_has_its_part_of_the_time(
    tokenizer: Tokenizer,
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=3000), seconds_of=seconds_by_depth)
    bench.add([1], max_tokens=100)
    bench.step()
    bench.scheduler.cost.coefficients = Coefficients(answer=0.06)
    prompt = bench.add(numbers(500, 100_000))
    bench.step()
    assert prompt.blocks.computed > 0


# -- tenants ----------------------------------------------------------------------------------


def test_a_tenant_with_many_prompts_does_not_delay_one_with_one(tokenizer: Tokenizer) -> None:
    bench = Bench(
        tokenizer, bare_cache(blocks=4000), max_sequences=64, seconds_of=seconds_by_tokens
    )
    for index in range(50):
        bench.add(numbers(1000, 10_000 * index), salt="many")
    for _ in range(20):
        bench.step()
    one = bench.add(numbers(1000, 900_000), salt="one")
    steps = 0
    while one.state is not SequenceState.FINISHED:
        bench.step()
        steps += 1
    assert steps <= 2 * 1000 / 128 + 2  # half of each step is its own


def test_a_tenant_who_comes_back_has_saved_nothing_up(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=8000), seconds_of=seconds_by_tokens)
    bench.add(numbers(128), salt="back")
    bench.step()
    other = bench.add(numbers(100_000, 10_000), salt="other")
    for _ in range(400):
        bench.step()
    back = bench.add(numbers(100_000, 200_000), salt="back")
    before = other.blocks.computed
    for _ in range(200):
        bench.step()
    assert back.blocks.computed == pytest.approx(other.blocks.computed - before, rel=0.1)


def test_a_tenant_whose_answers_take_all_places_makes_place_for_another(
    tokenizer: Tokenizer,
) -> None:
    bench = Bench(tokenizer, bare_cache(blocks=400), max_sequences=4)
    many = [bench.add(numbers(10, 100 * i), max_tokens=300, salt="many") for i in range(8)]
    bench.step()
    bench.step()
    one = bench.add(numbers(10, 9000), max_tokens=5, salt="one")
    for _ in range(8):
        bench.step()
    assert one.state is SequenceState.FINISHED
    bench.finish(steps=3000)
    assert all(sequence.completion_tokens == 300 for sequence in many)
    assert many[0].preemptions == 0
