"""The sandbox's tokenizer: whole words of its world, single digits, and bytes for everything else.

Any text can be encoded and decoded exactly. The chat template knows system, user, assistant and tool turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
OPEN_REPLY = f"{TURN}assistant\n"
# Punctuation of the answer and of a tool call that is one token. Line breaks stay apart: they separate the steps.
PIECES = (
    '{"steps": [',
    '"answer": ',
    '{"name": "',
    '", "arguments": {"expression": "',
    '"}}',
    '"],',
    '"]',
    '",',
    "\n\n",
)
_PATTERN = "|".join([*map(re.escape, PIECES), " ?[A-Za-z_]+", "[0-9]", r"[\s\S]"])

# A tool turn closes with the end token alone; the newline after it belongs to the next turn's opening, so that every
# rendered conversation is a prefix of its continuation (TRL's tool loop needs that).
CHAT_TEMPLATE = """\
{%- macro open(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro -%}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if tools or system %}
{{- open('system') + system }}
{%- for tool in tools or [] %}
{%- set f = tool.function if tool.function is defined else tool %}
{{- ('\\n' if system or not loop.first else '') + 'tool ' + f.name }}
{{- '(' + (f.parameters.properties | default({}) | list | join(', ')) + '): ' + f.description }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- open('assistant') }}
{%- generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set f = call.function if call.function is defined else call %}
{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{{- '\\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- open(message.role) + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ open('assistant') }}{% endif %}"""

# How transformers' `parse_response` reads a reply; TRL's tool loop uses it.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": OPEN_REPLY,
    "fields": {
        "tool_calls": {
            "open": CALL,
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of `texts`, each digit, each of `PIECES` and each byte."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    words |= {piece for text in PIECES for piece, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *sorted(words - set(alphabet))]
    # No merges: a piece of text is either one whole entry (ignore_merges) or falls apart into its bytes.
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, TURN, END])
    tokenizer.add_tokens([AddedToken(CALL, normalized=False), AddedToken(END_CALL, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        response_template=RESPONSE_TEMPLATE,
    )
