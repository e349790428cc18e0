"""What the training of both models shares: optimizers, averaged weights and the checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longctx.training.muon import Muon

MUON_RATE = 0.02
ADAM_BETAS = (0.9, 0.98)


class Trainee:
    """A model in training, with its optimizers and the average of its weights.

    Muon trains the matrices, AdamW the embeddings and norms. Each step calls `set_rates`, then
    `descend` with its loss. The average is an exponential moving one, and is exported by default.
    """

    def __init__(
        self, model: nn.Module, *, adam_rate: float, average_decay: float, rate: float
    ) -> None:
        """`rate` multiplies both learning rates."""
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
        others = [p for n, p in named if p.dim() != 2 or "embed" in n]
        self.model = model
        self._steppers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=MUON_RATE),
            torch.optim.AdamW(others, lr=adam_rate, betas=ADAM_BETAS, weight_decay=0.0),
        ]
        self._base_rates = [MUON_RATE * rate, adam_rate * rate]
        self._average_decay = average_decay
        self._average: dict[str, Tensor] = {}
        self.restart_average()

    def restart_average(self) -> None:
        """Let the average begin at the present weights."""
        self._average = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def set_rates(self, multiplier: float) -> None:
        """Set the learning rates to `multiplier` times their base."""
        for stepper, rate in zip(self._steppers, self._base_rates, strict=True):
            for group in stepper.param_groups:
                group["lr"] = rate * multiplier

    def descend(self, loss: Tensor, step: int) -> None:
        """Take one step down the gradient of `loss`, and update the average."""
        for stepper in self._steppers:
            stepper.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for stepper in self._steppers:
            stepper.step()
        decay = min(self._average_decay, step / (step + 20))  # few steps are averaged evenly
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                self._average[name].lerp_(weight, 1 - decay)

    def state(self) -> dict[str, Any]:
        """Return all that `load_state` needs, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "average": self._average,
            "steppers": [stepper.state_dict() for stepper in self._steppers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.model.load_state_dict(state["model"])
        for stepper, saved in zip(self._steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        self._average = state["average"]


def computes_in_half(device: str) -> bool:
    """Whether products are computed in bfloat16 on this device."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported()


def save_checkpoint(state: dict[str, Any], checkpoint: Path) -> None:
    """Write the checkpoint whole or not at all."""
    torch.save(state, checkpoint.with_suffix(".new"))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)
