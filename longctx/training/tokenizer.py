"""The tokenizers of both models: byte-level BPE, every digit a token of its own, `<s>` first.

Template markers are special tokens that no text can spell. A question and a document are tokenized
apart, so a document's tokens do not depend on what is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)

# Documents come first and nothing before their text depends on anything else: whatever the title,
# the system text or the question, a document is the same prefix, so its keys and values are shared.
# A message's content is a string, or a list of parts of which the text parts count.
NEEDLE_TEMPLATE = """{%- macro content(message) -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] or [] -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for document in documents or [] -%}{{- document['text'] -}}{{- '\\n' -}}{%- endfor -%}
{%- for message in messages -%}{%- if message['role'] in ['system', 'developer'] -%}
{{- '<|system|>' -}}{{- content(message) -}}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<|user|>' -}}{{- content(message) -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}{{- content(message) -}}{{- eos_token -}}
{%- elif message['role'] not in ['system', 'developer'] -%}
{{- raise_exception('roles are system, developer, user and assistant, not ' + message['role']) -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
PROBE_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- message['content'] -}}{{- '\\n' -}}"
    "{%- endfor -%}"
)


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer of exactly `vocabulary` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    # A word is copied from the text with its space; an answer does not start with one.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=16,
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == vocabulary, tokenizer.get_vocab_size()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, *, template: str, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as `AutoTokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
