"""Writes a checkpoint as a Hugging Face folder: `python -m longctx.training.export needle`.

Weights are in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from longctx.embedded import MODELS, model_path
from longctx.training.model import new_needle
from longctx.training.probe import MAX_TOKENS, new_probe
from longctx.training.tokenizer import BOS, EOS, PAD, PROBE_TEMPLATE, SPECIALS


def write(model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
    """Write weights, configurations and the tokenizer's files; the model card stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    generation = {
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": SPECIALS.index(EOS),
        "pad_token_id": SPECIALS.index(PAD),
        "do_sample": False,
        "max_new_tokens": 64,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--work", type=Path, required=True, help="the folder training wrote")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--weights", choices=("average", "model"), default="average")
    args = parser.parse_args()
    state = torch.load(args.work / f"{args.model}.pt", weights_only=False, map_location="cpu")
    model: PreTrainedModel = new_needle(0) if args.model == "needle" else new_probe(0)
    weights = state[args.weights]
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing  # tied to the embedding
    model.tie_weights()
    folder = args.out or model_path(args.model)
    write(model, args.work / "tokenizer", folder)
    if args.model == "probe":  # needle's tokenizer, but no documents and no roles
        settings = folder / "tokenizer_config.json"
        changed = {"chat_template": PROBE_TEMPLATE, "model_max_length": MAX_TOKENS}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | changed, indent=2) + "\n")
    print(f"step {state['step']} written to {args.out or model_path(args.model)}")


if __name__ == "__main__":
    main()
