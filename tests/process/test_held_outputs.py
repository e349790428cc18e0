"""Outputs of whole answers: told rarely, and nothing of them lost."""

from hypothesis import given
from hypothesis import strategies as st

from longctx.process.held_outputs import HELD_SECONDS, HeldOutputs
from longctx.request import FinishReason, Progress, Request, RequestOutput, SamplingParams, Segment

PROMPT = (Segment(token_ids=(1, 2)),)
PROGRESS = Progress(total=8, cache=0, processed=4, time_ms=1.0)


class Clock:
    """A clock that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(name: str, *, streamed: bool, n: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=4, n=n)
    return Request(request_id=name, segments=PROMPT, sampling=sampling, streamed=streamed)


def token(name: str, number: int, *, index: int = 0, ends: bool = False) -> RequestOutput:
    return RequestOutput(
        request_id=name,
        index=index,
        token_ids=(number,),
        text=f"{number} ",
        finish_reason=FinishReason.LENGTH if ends else None,
        finished=ends,
    )


def test_a_whole_answer_is_told_at_its_first_token_now_and_then_and_at_its_end() -> None:
    clock = Clock()
    held = HeldOutputs(clock)
    held.begin(request("whole", streamed=False))
    held.begin(request("stream", streamed=True))
    told = []
    for number in range(30):
        clock.now = number * HELD_SECONDS / 8
        ends = number == 29
        outputs = [token(name, number, ends=ends) for name in ("whole", "stream")]
        passed = held.pass_on(outputs)
        assert outputs[1] in passed  # a stream is never held
        told += [output for output in passed if output.request_id == "whole"]
    assert [len(output.token_ids) for output in told] == [1, 8, 8, 8, 5]
    assert [each for output in told for each in output.token_ids] == list(range(30))
    assert told[-1].finished and "".join(output.text for output in told).split() == [
        str(number) for number in range(30)
    ]


def test_progress_is_told_at_once_and_what_is_aborted_is_forgotten() -> None:
    held = HeldOutputs(Clock())
    held.begin(request("a", streamed=False))
    progress = RequestOutput(request_id="a", progress=PROGRESS)
    assert held.pass_on([progress]) == [progress]
    assert [*held.pass_on([token("a", 1), token("a", 2)])] == [token("a", 1)]
    held.drop("a")
    assert held.pass_on([token("b", 3)]) == [token("b", 3)]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 2 * HELD_SECONDS)), max_size=40),
)
def test_choices_keep_all_their_tokens_in_order(steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    held = HeldOutputs(clock)
    held.begin(request("a", streamed=False, n=3))
    given_tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    told: dict[int, list[int]] = {0: [], 1: [], 2: []}
    outputs = []
    for number, (index, waited) in enumerate(steps):
        outputs.append((token("a", number, index=index), waited))
    outputs += [
        (
            RequestOutput(
                request_id="a",
                index=index,
                token_ids=(1000 + index,),
                finish_reason=FinishReason.STOP,
                finished=index == 2,
            ),
            0.0,
        )
        for index in range(3)
    ]
    for output, waited in outputs:
        clock.now += waited
        given_tokens[output.index] += output.token_ids
        for passed in held.pass_on([output]):
            told[passed.index] += passed.token_ids
    assert told == given_tokens
