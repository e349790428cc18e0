"""Writes a real Hugging Face tokenizer folder, small enough to be trained inside a test.

Byte-level BPE on a page of inline text: any Unicode string survives encode and decode. Training
is deterministic and takes milliseconds, so two tests that ask for the same folder get the same ids.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")

PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

DOCUMENTS_FIRST_TEMPLATE = """\
{{- bos_token }}
{%- for document in documents or [] %}
{{- document['text'] + '\\n\\n' }}
{%- endfor %}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

# This is Llama 2's: the system prompt is inside the first user turn, contents are trimmed, and
# turns must alternate.
INST_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set system = '' %}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{%- set opening = system if loop.first else '' %}
{{- bos_token + '[INST] ' + opening + message['content'] | trim + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

_CORPUS = """\
The harbour of the old town lies under a hill of white stone, and the road to it is steep.
Every morning the boats come back with fish, and every evening they leave for the open sea.
A reader asked what the secret number was, and the keeper answered: the number is 7481.
What is the name of the ship? The name of the ship is Meridian, and her captain is Ana Ruiz.
In 1932 the town had 4,512 people; in 2015 it had 61,907, most of them along the river.
def answer(question: str) -> str:
    return "yes" if question.endswith("?") else "no"  # nothing else is asked
- first item\n- second item\n\n## A heading\n\nSome text, some more text, and the end.
Größe, Übermut, façade, naïve, señor; das Wort für heute ist Straße. Привет, мир. 你好世界
"""


def write_tokenizer(
    folder: Path,
    *,
    vocab_size: int = 512,
    chat_template: str | None = PLAIN_TEMPLATE,
    more_special: tuple[str, ...] = (),
) -> None:
    """Write `tokenizer.json`, its configuration and the template; at least 261 tokens.

    Ids 0 to 4 are SPECIAL_TOKENS in their order, `more_special` come next; `<s>` is added by
    default in front of text.
    """
    special = [*SPECIAL_TOKENS, *more_special]
    smallest = len(special) + len(pre_tokenizers.ByteLevel.alphabet())
    assert vocab_size >= smallest, f"vocab_size={vocab_size}, the bytes alone need {smallest}"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_CORPUS] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
