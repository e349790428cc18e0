"""Pictures of figures that a scale has no place for."""

import warnings
from pathlib import Path

import pytest

from longctx.bench.picture import Series, draw_bars


@pytest.mark.parametrize("values", [(0.0, 2e-3, None), (0.0, 0.0, None), (-1e-9, 5.0, 0.0)])
def test_a_logarithmic_scale_bears_values_that_are_not_above_0(
    values: tuple[float | None, ...], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_bars(
            tmp_path / "bars.png",
            title="KL",
            subtitle="",
            groups=["raw", "int8", "int4"],
            series=[Series(label="text", values=values)],
            unit="nats",
            logarithmic=True,
        )
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
