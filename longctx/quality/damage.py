"""Sums up what a codec or level does to next-token distributions, with its uncertainty."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.engine_info import Damage

SPAN_ROWS = 16  # neighboring rows are alike, so that many count as one observation


@dataclass(slots=True)
class DamageMeter:
    """Collects the rows of many sequences with `add`; `damage` sums them up."""

    _spans: list[Tensor] = field(default_factory=list)  # each [rows, (kl, flip, nats, more nats)]

    def add(self, rows: Tensor) -> None:
        """Add consecutive rows of one sequence, [rows, 4], as `compare` returns them."""
        self._spans += torch.split(rows, SPAN_ROWS)

    def damage(self) -> Damage | None:
        """Return the means with their errors; None with fewer than two spans, too few for these."""
        if len(self._spans) < 2:
            return None
        rows = torch.cat(self._spans)
        means = rows.mean(0)
        errors = self._errors(means, len(rows))
        return Damage(
            rows=len(rows),
            kl=float(means[0]),
            kl_error=errors[0],
            flips=float(means[1]),
            flips_error=errors[1],
            nats=float(means[2]),
            more_nats=float(means[3]),
            more_nats_error=errors[3],
        )

    def _errors(self, means: Tensor, rows: int) -> list[float]:
        """Return 1.96 cluster-robust standard errors of each mean, where each span is a cluster."""
        count = len(self._spans)
        sums = torch.stack([(span - means).sum(0) for span in self._spans])
        variance = sums.square().sum(0) * count / (count - 1)
        errors: list[float] = (1.96 * variance.sqrt() / rows).tolist()
        return errors


def compare(reference: Tensor, changed: Tensor, targets: Tensor) -> Tensor:
    """Compare the logits [rows, vocab] of the same rows, without and with what is measured.

    Returns [rows, 4]: the KL divergence from `reference` to `changed`, 1 where the likeliest token
    changed, the nats that the target costs in `reference`, and how many more in `changed`.
    """
    reference, changed = (each.float().log_softmax(-1) for each in (reference, changed))
    kl = F.kl_div(changed, reference, log_target=True, reduction="none").sum(-1).clamp_min(0)
    flips = (reference.argmax(-1) != changed.argmax(-1)).float()
    nats = -reference.gather(-1, targets[:, None])[:, 0]
    more = -changed.gather(-1, targets[:, None])[:, 0] - nats
    return torch.stack((kl, flips, nats, more), dim=-1).double().cpu()
