"""Rotary parameters: what the caller may change, and what keeps packed sequences independent.

Some rotary types look at the longest position of the whole row, so that a long sequence would
change the keys of a short one beside it. LongRoPE is pinned to one of its two factor sets; dynamic
NTK is refused. Everything here edits the configuration before the model is built; nothing is
patched. Read `resolve_rope`.
"""

import json
from dataclasses import dataclass
from typing import Any

from longctx.errors import ModelRefused

ORIGINAL = "original_max_position_embeddings"
NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")
NEEDS_FACTOR = ("linear", "yarn", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary choice that was written into a configuration.

    `identity` has the parameters that change keys, as JSON; `max_context` is in tokens.
    """

    identity: str
    max_context: int


def resolve_rope(
    config: Any, *, override: str | None, max_context: int | None, force_context: bool
) -> Rope:
    """Write the override and the LongRoPE pin into `config`, and check the context length.

    `config` is a transformers configuration of a decoder. Raises ModelRefused.
    """
    if override is not None:
        config.rope_parameters = _overridden(config, override)
    parameter_sets = _parameter_sets(config)
    trained = _trained_context(config, parameter_sets, overridden=override is not None)
    context = _checked_context(trained, max_context, force_context, bool(parameter_sets))
    for parameters in parameter_sets:
        kind = parameters.get("rope_type", "default")
        if "dynamic" in kind:
            raise ModelRefused(
                f"rope type {kind!r} makes keys depend on the longest sequence in the batch; "
                'start with --rope-override \'{"rope_type": "yarn", "factor": ...}\' instead'
            )
        if kind == "longrope":
            _pin_longrope(parameters, context)
    identity = json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str)
    return Rope(identity=identity, max_context=context)


def _parameter_sets(config: Any) -> list[dict[str, Any]]:
    """List one set for the whole model, or one per layer type; none without rotary positions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested if nested else [parameters] if parameters else []


def _overridden(config: Any, override: str) -> dict[str, Any]:
    try:
        wanted = json.loads(override)
    except ValueError as error:
        raise ModelRefused(f"rope_override is not valid JSON ({error}): {override}") from error
    if not isinstance(wanted, dict) or not wanted:
        raise ModelRefused(f"rope_override must be a JSON object with parameters: {override}")
    current = dict(getattr(config, "rope_parameters", None) or {})
    if not current:
        raise ModelRefused("rope_override is given, but this model has no rotary positions")
    layer_types = [name for name, value in current.items() if isinstance(value, dict)]
    if not layer_types:
        return _replaced(config, current, wanted)
    if not set(wanted) <= set(layer_types) or not all(isinstance(v, dict) for v in wanted.values()):
        raise ModelRefused(
            f"this model has rope parameters per layer type; give rope_override as an object of "
            f"{layer_types}"
        )
    changed = {name: _replaced(config, current[name], wanted[name]) for name in wanted}
    return current | changed


def _replaced(config: Any, old: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Complete `wanted` with the base frequency and the rotated part of the head from `old`."""
    kept = {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if name in old}
    new = kept | wanted
    new["rope_type"] = new.pop("type", new.get("rope_type", "default"))
    kind, factor = new["rope_type"], new.get("factor")
    if kind in NEEDS_FACTOR and (not isinstance(factor, int | float) or factor < 1):
        raise ModelRefused(f"rope_override of type {kind!r} needs a factor of 1 or more")
    if kind in NEEDS_ORIGINAL:
        new.setdefault(ORIGINAL, config.max_position_embeddings)
        if hasattr(config, ORIGINAL):  # transformers would let this one win
            setattr(config, ORIGINAL, new[ORIGINAL])
    return new


def _trained_context(config: Any, parameter_sets: list[dict[str, Any]], *, overridden: bool) -> int:
    own = getattr(config, "max_position_embeddings", None)
    if not isinstance(own, int) or own < 1:
        raise ModelRefused(
            "config.json has no max_position_embeddings: the model has no trained context, or "
            "is of a kind (ALiBi, Mamba, RWKV) that cannot be served exactly"
        )
    # A folder's own YaRN settings often leave max_position_embeddings at the original length, so
    # the product counts too: 32,768 and a factor of 4 are 131,072. Linear scaling does not say what
    # its factor multiplies, except in an override, where it is the model's length.
    stretched = [
        int(parameters["factor"] * original)
        for parameters in parameter_sets
        if (factor := parameters.get("factor"))
        and isinstance(factor, int | float)
        and (original := parameters.get(ORIGINAL, own if overridden else None))
    ]
    return max(own, *stretched) if stretched else own


def _checked_context(
    trained: int, max_context: int | None, force_context: bool, rotary: bool
) -> int:
    if max_context is None:
        return trained
    if max_context < 1:
        raise ModelRefused(f"max_context={max_context} must be at least 1 token")
    if max_context <= trained:
        return max_context
    if not rotary:
        raise ModelRefused(
            f"max_context={max_context} is beyond the model's {trained} learned positions; "
            f"use at most {trained}"
        )
    if not force_context:
        raise ModelRefused(
            f"max_context={max_context} is beyond the {trained} tokens that the model was trained "
            "for; lower it, extend the model with --rope-override, or insist with --force-context"
        )
    return max_context


def _pin_longrope(parameters: dict[str, Any], max_context: int) -> None:
    """Set both factor sets to the one that `max_context` calls for."""
    name = "long_factor" if max_context > parameters[ORIGINAL] else "short_factor"
    chosen = parameters.get(name)
    if not isinstance(chosen, list):
        raise ModelRefused(f"rope type 'longrope' needs {name}, a list with a number per frequency")
    parameters["short_factor"] = parameters["long_factor"] = list(chosen)
