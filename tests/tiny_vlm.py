"""A random two-layer Qwen2.5-VL with a byte tokenizer and a processor, and prompts with small images; all built here."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import tiny_tokenizer

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION = ("<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PATCH, MERGE = 4, 2
"""Pixels of a patch, and patches of a token, along a side: an image of 16 x 24 pixels becomes 2 x 3 tokens."""


@functools.cache
def tiny_vlm_path() -> str:
    """Folder of a saved model."""
    folder = tempfile.mkdtemp(prefix="tiny-vlm-")
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(_config(tokenizer)).save_pretrained(folder)
    return folder


class ImageProcessor(Qwen2_5_VLProcessor):
    """Without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, name: str, value: Any) -> type:
        """Transformers looks through its list of video processors too, which needs torchvision."""
        return type(value)


NO_VISION = {"suppress_tokens": list(range(259, 263))}
"""Keyword arguments of generation: a random model must not answer with the token of an image that is not there."""


def tiny_processor() -> ImageProcessor:
    """Images through PIL, left padding."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, min_pixels=64, max_pixels=4096
    )
    return ImageProcessor(image_processor, _tokenizer(), chat_template=TEMPLATE)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *VISION]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 1,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.5,
    }
    ids = {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def image_prompts(n: int = 16) -> Dataset:
    """Questions of different lengths with an image of different sizes; each image has one colour."""
    sizes = [(16, 16), (24, 16), (16, 24)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{'which ' * (i % 3)}colour?"}],
                "image": Image.new("RGB", sizes[i % 3], (i * 50 % 256, i * 90 % 256, i * 130 % 256)),
            }
            for i in range(n)
        ]
    )
