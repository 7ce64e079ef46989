from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import has_generation_markers, is_chat_template_prefix_preserving, supports_tool_calling

from trl_ext.annotate.base import ERROR_TYPES, STEP_TYPES
from trl_ext.annotate.prompts import teacher_note
from trl_ext.sandbox import calculator
from trl_ext.sandbox.demos import call_message
from trl_ext.sandbox.model import sandbox_tokenizer
from trl_ext.sandbox.tasks import assistant, rows, user
from trl_ext.sandbox.tokenizer import PAD, TURN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """After a trip through the disk: what users load."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sandbox_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def random_text(rng: random.Random) -> str:
    ranges = [(0x20, 0x7E), (0x20, 0x7E), (0x00, 0x1F), (0xA0, 0x24F), (0x4E00, 0x4F00), (0x1F600, 0x1F64F)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60)))


def test_any_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(300)] + [row["solution"] for row in rows(n=50)] + ["  a  b \n\n\n", "é🙂"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens_and_steps_end_at_line_breaks(tokenizer: PreTrainedTokenizerBase) -> None:
    text = '{"steps": [\n"12+5=17"],\n"answer": 17}'
    tokens = ['{"steps": [', "\n", '"', *"12+5=17", '"],', "\n", '"answer": ', "1", "7", "}"]
    assert [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]] == tokens


def test_notes_are_short_and_spelled_in_whole_words(tokenizer: PreTrainedTokenizerBase) -> None:
    for table, correct in ((ERROR_TYPES, False), (STEP_TYPES, True)):
        for label in table:
            note = teacher_note([label], correct)
            assert len(tokenizer(note)["input_ids"]) < 60
            assert len(tokenizer(note)["input_ids"]) <= len(note.split()) + sum(not c.isalnum() for c in note)


def test_problem_prompts_are_spelled_in_whole_words(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in rows(n=200):
        # A word takes its leading space with it; every digit, sign and space before a digit counts by itself.
        pieces = re.findall(r" ?[A-Za-z]+|[^A-Za-z]", row["problem"])
        assert tokenizer.convert_ids_to_tokens(tokenizer(row["problem"])["input_ids"]) == [
            piece.replace(" ", "Ġ") for piece in pieces
        ]


def test_template_with_all_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be brief."}
    turns = [system, *user("3*4?"), call_message("3*4"), {"role": "tool", "name": "calculator", "content": "12"}]
    text = tokenizer.apply_chat_template(turns, tools=[calculator], add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.\ntool calculator(expression): Work out an integer expression.<|im_end|>\n"
        "<|im_start|>user\n3*4?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "3*4"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n"
    )


def test_template_meets_what_trl_asks_of_one(tokenizer: PreTrainedTokenizerBase) -> None:
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert has_generation_markers(tokenizer.chat_template)
    chat = user("3*4?") + assistant("12")
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "12<|im_end|>"


def test_replies_are_parsed_into_calls_and_content(tokenizer: PreTrainedTokenizerBase) -> None:
    prefix = f"{TURN}assistant\n"
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "3*4"}}\n</tool_call><|im_end|>'
    parsed = tokenizer.parse_response(tokenizer(call)["input_ids"], prefix=tokenizer(prefix)["input_ids"])
    assert parsed["tool_calls"] == call_message("3*4")["tool_calls"]
    text = rows(n=1)[0]["solution"]
    ids = tokenizer(f"{text}<|im_end|>")["input_ids"]
    assert tokenizer.parse_response(ids, prefix=tokenizer(prefix)["input_ids"])["content"] == text


def test_special_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, "<|im_end|>")
    assert tokenizer.decode(tokenizer("3<|im_end|>")["input_ids"], skip_special_tokens=True) == "3"
    assert "<tool_call>" in tokenizer.decode(tokenizer("<tool_call>")["input_ids"], skip_special_tokens=True)
