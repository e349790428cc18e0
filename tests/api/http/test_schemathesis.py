"""The server answers as `/openapi.json` says, whatever schemathesis sends it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.api.live_server import LiveServer

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is absent; it is in [dev]")

# A body may fit its schema and ask for what there is not: a model, a file, a token outside the
# vocabulary. So not all that fits can be accepted.
LEFT_OUT = ("positive_data_acceptance",)
EXAMPLES = {False: 3, True: 100}


@pytest.fixture(scope="module")
def small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that nobody else uses: it is told to delete what it has."""
    with LiveServer(model_folder, tmp_path_factory.mktemp("store"), max_sequences=4) as running:
        yield running


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_route_answers_as_it_is_described(small: LiveServer, many: bool) -> None:
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    left_out = [check for check in schemathesis.checks.CHECKS.get_all() if _name(check) in LEFT_OUT]
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    failures: list[Exception] = []
    for operation in operations:

        @seeded(7)
        @settings(
            max_examples=EXAMPLES[many],
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def answers(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=left_out, timeout=60)

        try:
            answers()
        except Exception as failure:
            failures.append(failure)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(operations)} operations", failures)


def _name(check: object) -> str:
    return getattr(check, "__name__", "")
