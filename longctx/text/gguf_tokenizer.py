"""The tokenizer of a GGUF file: its vocabulary, built as the model's own tokenizer.json has it.

A file says how its vocabulary was made (`tokenizer.ggml.model`) and, for byte-level ones, by which
rule text is split before (`tokenizer.ggml.pre`). A rule that is not known is refused: text would be
cut into other tokens than the model has learned. Read `gguf_tokenizer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from longctx.errors import ModelRefused
from longctx.model.gguf_file import GgufFile

SPACE = "\u2581"  # how SentencePiece writes one
CONTROL, USER_DEFINED = 3, 4  # types of tokens that text is searched for before it is split

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """How text is split for a byte-level vocabulary; GPT-2's own rule where there is no `split`."""

    split: str | None = None
    single_digits: bool = False
    composed: bool = False  # characters and their accents become one (NFC)
    whole_words_first: bool = False  # a word of the vocabulary is one token, whatever its merges


RULES = {
    "gpt-2": _Rule(),
    "smollm": _Rule(single_digits=True),
    "starcoder": _Rule(single_digits=True),
    "qwen2": _Rule(split=_QWEN2, composed=True),
    "deepseek-r1-qwen": _Rule(split=_QWEN2, composed=True),
    "tekken": _Rule(split=_TEKKEN, whole_words_first=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3"), _Rule(split=_LLAMA3, whole_words_first=True)
    ),
}
GEMMAS = ("gemma", "gemma2", "gemma3")


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """Build the tokenizer that `file` describes, with its chat template; raises ModelRefused."""
    words = _Words(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            backend = _byte_level(words)
        elif kind == "llama":
            backend = _sentence_piece(words)
        else:
            raise ModelRefused(
                f"{file.path}: a vocabulary of the kind {kind!r} cannot be served from GGUF, only "
                "gpt2 and llama; use the model's Hugging Face folder"
            )
        _add_tokens(backend, words)
        _frame(backend, words)
    except ModelRefused:
        raise
    except Exception as error:  # tokenizers raises nothing more precise
        raise ModelRefused(f"{file.path}: its vocabulary is not accepted: {error}") from error
    names = {
        name: words.tokens[token_id]
        for name in ("bos", "eos", "unknown", "padding")
        if (token_id := words.id_of(name)) is not None
    }
    special = {"unknown": "unk_token", "padding": "pad_token"}
    template = file.metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **{special.get(name, f"{name}_token"): token for name, token in names.items()},
    )


class _Words:
    """The keys of a vocabulary, checked to fit each other."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokens = self._strings("tokens")
        self.types = self._list("token_type") or [1] * len(self.tokens)
        self.scores = self._list("scores")
        self.merges = self._strings("merges") if "tokenizer.ggml.merges" in file.metadata else None
        if len(self.types) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise ModelRefused(
                f"{file.path}: its vocabulary has {len(self.tokens)} tokens, "
                f"{len(set(self.tokens))} of them different, and {len(self.types)} types; convert "
                "the model again"
            )

    def key(self, name: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{name}", default)

    def id_of(self, name: str) -> int | None:
        """The id of the token that the file calls so, where there is one."""
        found = self.key(f"{name}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    def _list(self, name: str) -> list[Any]:
        found = self.key(name, [])
        if not isinstance(found, list):
            raise ModelRefused(f"{self.file.path}: tokenizer.ggml.{name} is no list")
        return found

    def _strings(self, name: str) -> list[str]:
        found = self._list(name)
        if not found or not all(isinstance(each, str) for each in found):
            raise ModelRefused(f"{self.file.path} has no vocabulary: tokenizer.ggml.{name}")
        return found


def _byte_level(words: _Words) -> Tokenizer:
    name = words.key("pre")
    rule = RULES.get(name)
    if rule is None:
        raise ModelRefused(
            f"{words.file.path}: text is split by the rule {name!r} (tokenizer.ggml.pre), and "
            f"longctx knows {', '.join(RULES)}; use the model's Hugging Face folder"
        )
    if words.merges is None:
        raise ModelRefused(f"{words.file.path} has no tokenizer.ggml.merges")
    merges = [_pair(merge) for merge in words.merges]
    vocabulary = {token: number for number, token in enumerate(words.tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=rule.whole_words_first))
    steps: list[Any] = []
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule.composed:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentence_piece(words: _Words) -> Tokenizer:
    tokens = words.tokens
    gemma = words.file.architecture in GEMMAS
    if gemma:  # files have tokens of several spaces as spaces; text has them as `SPACE`
        tokens = [SPACE * len(each) if each and not each.strip(" ") else each for each in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if words.merges is not None:
        merges = [_pair(merge) for merge in words.merges]
    elif len(words.scores) == len(tokens) or gemma:
        # Gemma's merges go by their order in the file, all others by their scores.
        ranks = [-number for number in range(len(tokens))] if gemma else words.scores
        merges = _derived_merges(vocabulary, ranks)
    else:
        raise ModelRefused(f"{words.file.path} has neither tokenizer.ggml.scores nor merges")
    unknown = words.id_of("unknown")
    backend = Tokenizer(
        BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if words.key("add_space_prefix", not gemma):
        steps.insert(0, normalizers.Prepend(SPACE))
        ends.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(ends)
    return backend


def _derived_merges(vocabulary: dict[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Find the merges of a vocabulary without any: each token of two others, the best first."""
    found = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                order = (vocabulary[left], vocabulary[right])
                found.append((-ranks[number], number, order, (left, right)))
    found.sort(key=lambda each: each[:3])
    return [pair for _, _, _, pair in found]


def _add_tokens(backend: Tokenizer, words: _Words) -> None:
    """Let control tokens and others that are found whole in a text be found there."""
    named = {words.id_of(name) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    for number, (token, kind) in enumerate(zip(words.tokens, words.types, strict=True)):
        if kind == CONTROL or number in named:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])


def _frame(backend: Tokenizer, words: _Words) -> None:
    """Put the tokens at the ends of a text that the file asks for."""
    spm = words.key("model") == "llama"
    begin = words.id_of("bos") if words.key("add_bos_token", spm) else None
    end = words.id_of("eos") if words.key("add_eos_token", False) else None
    frame = {number: words.tokens[number] for number in (begin, end) if number is not None}
    if not frame:
        return
    single = " ".join(
        [*([frame[begin]] if begin is not None else []), "$A"]
        + ([frame[end]] if end is not None else [])
    )
    backend.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, number) for number, token in frame.items()]
    )
