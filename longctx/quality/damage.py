"""Sums up what a codec or level does to next-token distributions, with its uncertainty."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.engine_info import Damage

SPAN_ROWS = 16  # neighboring rows are alike, so that many count as one observation
# The columns of a row that was compared
COLUMNS = 6
KL, FLIPS, NATS, MORE_NATS, RAW_KL, RAW_FLIPS = range(COLUMNS)


@dataclass(slots=True)
class DamageMeter:
    """Collects the rows of many sequences with `add`; `damage` sums them up."""

    _spans: list[Tensor] = field(default_factory=list)  # each [rows, COLUMNS]

    def add(self, rows: Tensor) -> None:
        """Add consecutive rows of one sequence, [rows, COLUMNS], as `compare` returns them."""
        self._spans += torch.split(rows, SPAN_ROWS)

    def damage(self) -> Damage | None:
        """Return the means with their errors; None with fewer than two spans, too few for these."""
        if len(self._spans) < 2:
            return None
        rows = torch.cat(self._spans)
        means = rows.mean(0).tolist()
        errors = self._errors(rows.mean(0), len(rows))
        return Damage(
            rows=len(rows),
            kl=means[KL],
            kl_error=errors[KL],
            flips=means[FLIPS],
            flips_error=errors[FLIPS],
            nats=means[NATS],
            more_nats=means[MORE_NATS],
            more_nats_error=errors[MORE_NATS],
            raw_kl=means[RAW_KL],
            raw_flips=means[RAW_FLIPS],
        )

    def _errors(self, means: Tensor, rows: int) -> list[float]:
        """Return half the width of each mean's 95% interval; each span is one observation.

        The standard errors are cluster-robust, and Student's t of so many spans says how many of
        them make the interval: 3.2 for 4 spans, 2.4 for 8, 2 for 64.
        """
        count = len(self._spans)
        sums = torch.stack([(span - means).sum(0) for span in self._spans])
        variance = sums.square().sum(0) * count / (count - 1)
        errors: list[float] = (_student(count - 1) * variance.sqrt() / rows).tolist()
        return errors


def _student(freedom: int) -> float:
    """Return the 97.5% point of Student's distribution, to 1% from 3 degrees of freedom on.

    Source: the expansion by Fisher and Cornish, Abramowitz and Stegun 26.7.5.
    """
    z = 1.959964
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


def compare(
    served: Tensor, changed: Tensor, targets: Tensor, *, exact: Tensor | None = None
) -> Tensor:
    """Compare the logits [rows, vocab] of the same rows, without and with what is measured.

    `served` are those of raw KV (or of unchanged weights, or of the level `exact`) in the type that
    serves; `exact` those of a float32 pass, which `served` is itself where that is absent.

    Returns [rows, COLUMNS]: by how much KL(exact || changed) is more than KL(exact || served), and
    the same of 1 where the likeliest token is not that of `exact`; the nats that the target costs
    in `served`, and how many more in `changed`; then KL(exact || served), and its changed tokens.
    """
    served, changed = (each.float().log_softmax(-1) for each in (served, changed))
    nats = -served.gather(-1, targets[:, None])[:, 0]
    more = -changed.gather(-1, targets[:, None])[:, 0] - nats
    if exact is None:
        raw_kl = raw_flips = torch.zeros_like(nats)
        kl, flips = _distance(served, changed)
    else:
        exact = exact.float().log_softmax(-1)
        raw_kl, raw_flips = _distance(exact, served)
        kl, flips = _distance(exact, changed)
    columns = (kl - raw_kl, flips - raw_flips, nats, more, raw_kl, raw_flips)
    return torch.stack(columns, dim=-1).double().cpu()


def _distance(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL divergence of log-probabilities, and 1 where the likeliest differs: [rows]."""
    kl = F.kl_div(other, reference, log_target=True, reduction="none").sum(-1).clamp_min(0)
    return kl, (reference.argmax(-1) != other.argmax(-1)).float()
