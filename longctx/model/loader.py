"""Loads a Hugging Face folder or a GGUF file into a model that computes packed rows.

We write no model code: transformers builds the model, and its attention is ours
(`hf_attention.py`). Whatever would not be computed exactly is refused here, with the reason.
Read `load_model`.
"""

import hashlib
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from longctx.config import DTYPES, Dtype, ModelConfig, Weights
from longctx.errors import ModelRefused
from longctx.model.checkpoint import ModelFiles, file_sums, fingerprint, read_model_folder
from longctx.model.gguf_config import gguf_settings
from longctx.model.gguf_file import GgufFile, find_gguf, read_gguf
from longctx.model.gguf_weights import load_gguf
from longctx.model.hf_attention import ATTENTION, register_attention, run_packed
from longctx.model.key_rotation import find_relocation
from longctx.model.layer_attention import LayerAttention, NothingLeft
from longctx.model.named import model_name
from longctx.model.probe import PROBE, probe_layers, register_probe
from longctx.model.rope import resolve_rope
from longctx.model.spec import ModelSpec

ROUNDING_VERSION = 2  # of `--weights`: raised when a weight is rounded to another number
ROWS_VERSION = 1  # of rows of 16 bits, likewise


class LoadedModel:
    """A model that computes packed rows through an attention that each call is given.

    One thread calls `forward` at a time. `spec` has all that others may know of the model.
    """

    def __init__(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        self.spec = spec
        self._model = model

    @property
    def transformer(self) -> PreTrainedModel:
        """The model as transformers made it, with our attention and kernels in it."""
        return self._model

    @property
    def linear_types(self) -> frozenset[type[nn.Module]]:
        """The classes of the model's linear layers: torch's own and packed ones."""
        types = {type(module) for module in self._model.modules()}
        return frozenset(each for each in types if each.__name__.endswith("Linear"))

    @property
    def rounds_rows(self) -> bool:
        """Whether linear layers round their rows to 16 bits, to multiply integers."""
        return _rounds_rows(self._model)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: LayerAttention, logits_rows: Tensor
    ) -> Tensor:
        """Compute logits [rows, vocab_size], float32, of the rows that `logits_rows` names.

        `token_ids`, `positions` [tokens] int64 are several sequences one after another;
        `logits_rows` [rows] int64 has indices into them, and may be empty.
        """
        try:
            return run_packed(self._model, token_ids, positions, attention, logits_rows).float()
        except NothingLeft:
            assert not len(logits_rows), "somebody wants what follows"
            return torch.empty(0, self.spec.vocab_size, device=self.spec.device)


def context_tokens(config: ModelConfig, folder: Path) -> int:
    """Return how many tokens prompt and answer may have together, without loading the weights.

    Raises ModelRefused.
    """
    return resolve_rope(
        _read_settings(_read_files(folder)),
        override=config.rope_override,
        max_context=config.max_context,
        force_context=config.force_context,
    ).max_context


def exact_dtypes(config: ModelConfig, folder: Path) -> tuple[Dtype, ...]:
    """Return the compute types that `auto` may choose among for this model on this device.

    All compute with the checkpoint's weights as they are, and the one that is likely to be fast
    comes first: its own, where the device has instructions for it. Raises ModelRefused.
    """
    files = _read_files(folder)
    return _exact_dtypes(_read_settings(files), files, device_of(config.device))


def load_model(config: ModelConfig, folder: Path, *, cache_dir: Path | None = None) -> LoadedModel:
    """Load `folder` for exact serving; raises ModelRefused with the reason and the cure.

    It may be a GGUF file too, or a folder with one, as `find_gguf` says. With `auto` it computes in
    the first of `exact_dtypes`; `longctx/quality/compute_type.py` finds the fastest.
    `cache_dir` keeps checksums of the shards between starts.
    """
    files = _read_files(folder)
    settings = _read_settings(files)
    model_class = _model_class(settings, files)
    rope = resolve_rope(
        settings,
        override=config.rope_override,
        max_context=config.max_context,
        force_context=config.force_context,
    )
    _check_temperature(settings, rope.max_context)
    device = device_of(config.device)
    name = config.dtype if config.dtype != "auto" else _exact_dtypes(settings, files, device)[0]
    dtype: torch.dtype = getattr(torch, name)
    register_attention()
    register_probe()
    kernels = _kernels_for(config.weights, dtype, device)
    model = _load_weights(model_class, settings, files, dtype, config, kernels)
    model.to(device).eval().requires_grad_(False)
    packed_bytes = 0
    if kernels is not None:
        kernels.norm.fuse_rms_norms(model)
        kernels.linear.pack_linears(model, config.weights, config.activations)
        packed_bytes = kernels.linear.packed_bytes(model)
    with torch.inference_mode():
        layers = probe_layers(
            model,
            layers=settings.num_hidden_layers,
            vocab_size=settings.vocab_size,
            max_context=rope.max_context,
        )
    model.set_attn_implementation(ATTENTION)
    assert model.config._attn_implementation == ATTENTION, "the probe would serve"
    with torch.inference_mode():
        relocation = find_relocation(
            model, vocab_size=settings.vocab_size, max_context=rope.max_context
        )
    fuse = _layer_fusing(kernels, device)
    if fuse is not None:
        fuse(model, vocab_size=settings.vocab_size, max_context=rope.max_context)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is free is shared out next
    tensors = {tensor.data_ptr(): tensor for tensor in model.parameters()}  # tied ones once
    spec = ModelSpec(
        name=model_name(folder),
        architecture=settings.model_type,
        layers=layers,
        relocation=relocation,
        vocab_size=settings.vocab_size,
        max_context=rope.max_context,
        dtype=dtype,
        device=device,
        fingerprint=_fingerprint(files, config.weights, _rounds_rows(model), cache_dir),
        rope_identity=rope.identity,
        weight_bytes=packed_bytes
        + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )
    return LoadedModel(model, spec)


def weights_identity(config: ModelConfig, folder: Path, cache_dir: Path | None) -> str:
    """Identify the weights and how they are multiplied, in whatever compute type.

    `cache_dir` as for `load_model`. Raises ModelRefused.
    """
    whole = _fingerprint(_read_files(folder), config.weights, False, cache_dir)
    return hashlib.sha256(f"{whole} {config.activations}".encode()).hexdigest()


def _read_files(path: Path) -> ModelFiles | GgufFile:
    found = find_gguf(path)
    return read_model_folder(path) if found is None else read_gguf(found)


def _read_settings(files: ModelFiles | GgufFile) -> Any:
    """Read the model's configuration, of a class that transformers itself has."""
    if isinstance(files, GgufFile):
        return gguf_settings(files)
    architecture = files.config.get("model_type")
    if architecture not in CONFIG_MAPPING:
        reason = (
            "needs code from its folder, which is never run"
            if "auto_map" in files.config
            else f"is unknown to transformers {transformers.__version__}"
        )
        raise ModelRefused(
            f"{files.folder}: the architecture {architecture!r} {reason}; use a model that "
            "transformers has built in"
        )
    try:
        return AutoConfig.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # validators of each architecture raise what they like
        raise ModelRefused(
            f"{files.folder / 'config.json'} is not accepted by transformers: {error}"
        ) from error


def _model_class(settings: Any, files: ModelFiles | GgufFile) -> Any:
    if settings.is_encoder_decoder:
        raise ModelRefused(f"{files.path} is an encoder-decoder; only decoders can be served")
    if settings.sub_configs and settings.get_text_config(decoder=True) is not settings:
        raise ModelRefused(
            f"{files.path} ({settings.model_type}) takes images or sound besides text; "
            "only text models can be served"
        )
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelRefused(
            f"{files.path} ({settings.model_type}) is no language model that transformers can "
            "generate text with"
        )
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    return model_class


def _check_temperature(settings: Any, max_context: int) -> None:
    # Llama 4 scales queries by their index in the row, not by their position; below `floor_scale`
    # the scale is 1.
    scale = getattr(settings, "floor_scale", None)
    if settings.model_type.startswith("llama4") and scale and max_context >= scale:
        raise ModelRefused(
            f"{settings.model_type} scales attention from {scale} tokens on in a way that a "
            f"packed batch cannot reproduce; start with --max-context {int(scale) - 1}"
        )


def device_of(name: str) -> torch.device:
    """Return the device of that name, `auto` too. Raises ModelRefused for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelRefused(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelRefused(
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def _exact_dtypes(
    settings: Any, files: ModelFiles | GgufFile, device: torch.device
) -> tuple[Dtype, ...]:
    stated = str(settings.dtype or files.dtype or "float32").removeprefix("torch.")
    if device.type == "cpu":
        if stated != "bfloat16":
            return ("float32",)
        return ("bfloat16", "float32") if computes_bfloat16() else ("float32", "bfloat16")
    for name in DTYPES:
        if name == stated:
            return (name,)
    raise ModelRefused(f"{files.path} states the dtype {stated!r}; start with --dtype")


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without, it may be 10 times slower there."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Kernels(NamedTuple):
    """The modules that have our kernels for linear layers, norms, and what is around them."""

    linear: Any
    norm: Any
    layers: Any


def _kernels_for(weights: Weights, dtype: torch.dtype, device: torch.device) -> _Kernels | None:
    """Import our kernels where they compute: in float32 or bfloat16 on a CPU, if installed.

    Raises ModelRefused where `weights` calls for them in vain.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        if weights != "auto":
            raise ModelRefused(
                f"--weights {weights} is for float32 and bfloat16 on a CPU, this is {dtype} on "
                f"{device}; leave it out, or start with --device cpu --dtype float32"
            )
        return None
    try:
        return _Kernels(
            importlib.import_module("longctx.model.packed_linear"),
            importlib.import_module("longctx.model.rms_norm"),
            importlib.import_module("longctx.model.cpu_layers"),
        )
    except ImportError as error:  # installed without a compiler
        if weights != "auto":
            raise ModelRefused(
                f"--weights {weights} needs longctx's compiled kernels, which are not installed "
                f"({error}); leave it out, or install longctx again where there is a C++ compiler"
            ) from error
        return None


def _layer_fusing(kernels: _Kernels | None, device: torch.device) -> Any:
    """Find what fuses a model's layers here; None where nothing does: on a GPU without Triton."""
    if kernels is not None:
        return kernels.layers.fuse_cpu_layers
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("longctx.model.gpu_layers").fuse_gpu_layers
    except ImportError:
        return None


def _rounds_rows(model: nn.Module) -> bool:
    return any(getattr(module, "integers", False) for module in model.modules())


def _fingerprint(
    files: ModelFiles | GgufFile, weights: Weights, rounds_rows: bool, cache_dir: Path | None
) -> str:
    """Identify the weights as computed with: what is rounded makes other keys, so it is another."""
    if isinstance(files, GgufFile):
        sums = file_sums(files.paths, cache_dir)
        whole = hashlib.sha256("\n".join(("GGUF", *sums.values())).encode()).hexdigest()
    else:
        whole = fingerprint(files, cache_dir)
    if weights != "auto":
        whole = hashlib.sha256(f"{whole} {weights} {ROUNDING_VERSION}".encode()).hexdigest()
    if rounds_rows:
        whole = hashlib.sha256(f"{whole} rows {ROWS_VERSION}".encode()).hexdigest()
    return whole


def _load_weights(
    model_class: Any,
    settings: Any,
    files: ModelFiles | GgufFile,
    dtype: torch.dtype,
    config: ModelConfig,
    kernels: _Kernels | None,
) -> Any:  # its methods are untyped
    if isinstance(files, GgufFile):
        keep = None
        if kernels is not None:
            keep = kernels.linear.Packer(config.weights, dtype, config.activations).keep
        return load_gguf(model_class, settings, files, dtype, attention=PROBE, keep=keep)
    try:
        model, report = model_class.from_pretrained(
            files.folder,
            config=settings,
            dtype=dtype,
            attn_implementation=PROBE,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with the file
            output_loading_info=True,
        )
    except Exception as error:  # a missing package, a quantization, an architecture's own check
        if isinstance(error, KeyError) and PROBE in error.args:
            raise ModelRefused(
                f"{files.folder} ({settings.model_type}) has only attentions of its own; it cannot "
                "be served exactly"
            ) from error
        raise ModelRefused(
            f"transformers cannot load {files.folder} ({type(error).__name__}): {error}"
        ) from error
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise ModelRefused(
            f"{files.folder / files.file_of(tensor)}: the tensor {tensor} has the shape "
            f"{list(found)}, config.json calls for {list(wanted)}"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelRefused(
            f"{files.folder / files.file_of(missing[0])}: the tensor {missing[0]} is missing "
            f"({len(missing)} in all); download the model again"
        )
    if report["error_msgs"]:
        raise ModelRefused(f"transformers cannot load {files.folder}: {report['error_msgs'][0]}")
    return model
