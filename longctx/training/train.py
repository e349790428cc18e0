"""Train an embedded model: `python -m longctx.training.train needle|probe --work DIR`.

The work folder holds the corpus as tokens, the tokenizer and the newest checkpoint; the same
command again resumes. The learning rate is constant, then falls in a straight line over the last
`DECAY_SHARE` of `--steps`; a larger `--steps` prolongs a run from its checkpoint.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from longctx.needles import lexicon
from longctx.training import corpus
from longctx.training import tokenizer as tokenizers
from longctx.training.batches import Batches, Shape
from longctx.training.loop import Trainee, computes_in_half, save_checkpoint
from longctx.training.model import MAX_TOKENS, Batch, Scores, forward, new_needle
from longctx.training.probe import train_probe
from longctx.training.widen import widen

VOCABULARY = 2048
AVERAGE_DECAY = 0.998
DECAY_SHARE = 0.75  # of all steps: the rate falls in a straight line


def prepare(work: Path, seed: int, megabytes: int) -> tuple[Tokenizer, np.ndarray, tuple[str, ...]]:
    """Make the tokenizer, the filler as tokens, and further nouns; once per work folder."""
    ids_file, words_file, folder = work / "filler.npy", work / "words.txt", work / "tokenizer"
    if not words_file.exists():
        work.mkdir(parents=True, exist_ok=True)
        chunks: list[str] = []
        for source, text in corpus.training_text(seed, megabytes):
            print(f"{source}: {len(text) / 1e6:.1f} MB", flush=True)
            chunks += [text[i : i + 8192] for i in range(0, len(text), 8192)]
        random.Random(seed).shuffle(chunks)
        trained = tokenizers.train(chunks[:: max(1, len(chunks) // 2500)], VOCABULARY)
        tokenizers.save(trained, folder, template=tokenizers.NEEDLE_TEMPLATE, max_tokens=MAX_TOKENS)
        encoded = trained.encode_batch(chunks, add_special_tokens=False)
        np.save(ids_file, np.concatenate([np.array(e.ids, np.uint16) for e in encoded]))
        counts = Counter(re.findall(r"\b[a-z]{4,11}\b", " ".join(chunks)))
        words = [word for word, n in counts.most_common(14_000) if not lexicon.held_out(word)]
        words_file.write_text("\n".join(words))
    return (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        np.load(ids_file, mmap_mode="r"),
        tuple(words_file.read_text().split()),
    )


def prepare_probe(work: Path, tokenizer: Tokenizer, seed: int, megabytes: int) -> np.ndarray:
    """Make tokens of the code and documentation of installed packages; once per work folder."""
    file = work / "probe.npy"
    if not file.exists():
        texts = [
            text[i : i + 8192]
            for source, text in corpus.training_text(seed, megabytes)
            if source in ("packages", "readmes")
            for i in range(0, len(text), 8192)
        ]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        np.save(file, np.concatenate([np.array(e.ids, np.uint16) for e in encoded]))
    return cast(np.ndarray, np.load(file, mmap_mode="r"))


@dataclass(slots=True)
class Lessons:
    """The order of lessons: small memories until copying works, then whole batches and dilution.

    The next lesson begins when `PASSED` of the first tokens of the answers have been right for a
    while: the others are easy once the model can copy.
    """

    PASSED: ClassVar[float] = 0.65
    PLAN: ClassVar[tuple[Shape, ...]] = (Shape(groups=8, dilution=0.0), Shape())

    number: int = 0
    right: float = 0.0
    steps: int = 0

    @property
    def shape(self) -> Shape:
        """The shape of the present lesson's batches."""
        return self.PLAN[self.number]

    def learned(self, right: float) -> None:
        """Note the share of first tokens that were right in a step; may begin the next lesson."""
        self.right += (right - self.right) * 0.05
        self.steps += 1
        last = self.number == len(self.PLAN) - 1
        if not last and self.steps >= 60 and self.right > self.PASSED:
            self.number, self.steps = self.number + 1, 0


def rate_at(step: int, steps: int) -> float:
    """Compute the multiplier of the learning rate: warm-up, constant, then a straight decay."""
    return min(1.0, (step + 1) / 100, max(0.01, (steps - step) / (DECAY_SHARE * steps)))


def to_device(batch: Batch, device: str) -> Batch:
    """Move the batch's tensors to the device, in place."""
    for name in Batch.__dataclass_fields__:
        item = getattr(batch, name)
        if isinstance(item, torch.Tensor):
            setattr(batch, name, item.to(device))
    return batch


def train_needle(args: argparse.Namespace) -> None:
    """Train or resume needle; writes `needle.pt` into the work folder."""
    tokenizer, filler, words = prepare(args.work, args.seed, args.megabytes)
    batches = Batches(tokenizer, filler, words, args.seed)
    model = new_needle(args.seed).to(args.device)
    model.train()
    trainee = Trainee(model, adam_rate=3e-3, average_decay=AVERAGE_DECAY, rate=args.rate)
    checkpoint = args.work / "needle.pt"
    lessons, step = Lessons(), 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=False, map_location=args.device)
        trainee.load_state(state)
        batches.hard.spans, step = state["hard"], state["step"]
        lessons = Lessons(*state["lessons"])
    elif args.start:
        start = torch.load(args.start, weights_only=False, map_location=args.device)
        widen(model, start["average"])
        trainee.restart_average()
        batches.hard.spans, lessons.number = start["hard"], len(Lessons.PLAN) - 1
    progress = Progress()
    while step < args.steps:
        trainee.set_rates(rate_at(step, args.steps))
        batch = to_device(batches.make(step, lessons.shape), args.device)
        noise_steps = 15 if step % 4 == 3 else 0
        with torch.autocast(args.device, torch.bfloat16, enabled=computes_in_half(args.device)):
            scores = forward(model, batch, noise_steps=noise_steps)
        first = batch.questions[batch.answer_row, batch.answer_column] == batches.assistant
        loss = needle_loss(batches, batch, scores, first)
        trainee.descend(loss, step)
        right = (scores.logits.argmax(-1) == batch.answer_token).float()
        right_first = float(right[first].mean())
        progress.add(float(loss.detach()), float(right.mean()), right_first)
        lessons.learned(right_first)
        if lessons.shape.dilution >= 4:
            batches.mine(batch, scores.weights)
        step += 1
        if step % 50 == 0:
            progress.report(step, lessons, len(batches.hard.spans))
        if step % 100 == 0:
            progress = Progress()
        if step % args.save_every == 0 or step == args.steps:
            run = {
                "hard": batches.hard.spans,
                "step": step,
                "lessons": (lessons.number, lessons.right, lessons.steps),
            }
            save_checkpoint(trainee.state() | run, checkpoint)


def needle_loss(
    batches: Batches, batch: Batch, scores: Scores, first: torch.Tensor
) -> torch.Tensor:
    """Compute the weighted loss of a batch: wrong tokens, and attention on the wrong places.

    `first` [answers] marks the first token of each answer, which counts most.
    """
    before = batch.questions[batch.answer_row, (batch.answer_column - 1).clamp_min(0)]
    second, last = before == batches.assistant, batch.answer_token == batches.eos
    weight = 1.0 + 2.0 * first.float() + 1.5 * second.float() + last.float()
    weight = weight / weight.sum()
    wrong = F.cross_entropy(scores.logits.float(), batch.answer_token, reduction="none")
    # Where to look is known, and saying so teaches it long before the right tokens do. Half of the
    # heads look one token ahead: only there it can be seen that a value has ended.
    astray = -torch.log(scores.found + 1e-6) - 0.5 * torch.log(scores.ahead + 1e-6)
    astray = astray * (batch.answer_place >= 0)
    return (weight * (wrong + astray)).sum()


class Progress:
    """Losses and shares of right tokens since some step, for people to read."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._right: list[tuple[float, float]] = []  # of all tokens, and of first tokens
        self._begun = time.monotonic()

    def add(self, loss: float, right: float, right_first: float) -> None:
        """Note a step's loss, and its shares of right tokens and right first tokens."""
        self._losses.append(loss)
        self._right.append((right, right_first))

    def report(self, step: int, lessons: Lessons, hard_spans: int) -> None:
        """Print the means so far, and the seconds of a step."""
        print(
            f"step {step} loss {np.mean(self._losses):.4f} "
            f"tokens right {np.mean(self._right, axis=0).round(3)} "
            f"lesson {lessons.number} hard {hard_spans} "
            f"{(time.monotonic() - self._begun) / len(self._losses):.3f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("needle", "probe"))
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus and checkpoint")
    parser.add_argument("--start", type=Path, help="a narrower needle checkpoint to begin from")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=70, help="text to train on")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies every learning rate")
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model == "needle":
        train_needle(args)
    else:
        tokenizer = prepare(args.work, args.seed, args.megabytes)[0]
        train_probe(args, prepare_probe(args.work, tokenizer, args.seed, args.megabytes))


if __name__ == "__main__":
    main()
