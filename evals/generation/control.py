"""What would a grammar give for free? Replies of the base model that can only follow the item's JSON Schema.

A structured task's gain is worth training for only where it beats this. Masks come from llguidance, which builds them
from the schema while the reply grows. The schema's own order of keys decides what is written first, so a schema that
begins with free `reasoning` leaves the model room to think (EVALS.md section 5.2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from evals.models import ModelError

NAME = "llguidance-json-schema-2"
"""Part of the key of constrained replies."""
LAYOUT = {"whitespace_flexible": True, "whitespace_pattern": r"[ \t]?\n?[ \t]{0,32}"}
"""Room for any usual layout, so that the model writes JSON as it is used to, but not white space without end."""


class SchemaControl:
    """Makes the processor of a batch; `schemas`: item id -> JSON Schema, `vocabulary`: the width of the logits.

    Raises ValueError that names the item when llguidance cannot express its schema.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int], schemas: Mapping[str, Any]) -> None:
        try:
            import llguidance.hf
        except ImportError:
            raise ModelError("--control needs llguidance: pip install 'trl-ext[control]'") from None

        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))
        self._ends = list(ends)
        self._grammars = {item: _grammar(item, schema) for item, schema in schemas.items()}

    def __call__(self, jobs: Sequence[Any], start: int) -> SchemaMask:
        from llguidance import LLMatcher

        return SchemaMask([LLMatcher(self._tokenizer, self._grammars[job.item]) for job in jobs], start, self._ends)


def _grammar(item: str, schema: Any) -> str:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT)  # type: ignore[arg-type]
    if error := LLMatcher.validate_grammar(grammar):
        raise ValueError(f"item {item}: no grammar can be made from its schema: {error}")
    return str(grammar)


class SchemaMask(LogitsProcessor):
    """Sets every token to -inf that would leave the grammar; one matcher for each row, `start` as in `SharedNoise`.

    Where the grammar has come to its end, only the `ends` are left.
    """

    def __init__(self, matchers: Sequence[Any], start: int, ends: Sequence[int]) -> None:
        self._matchers, self._start, self._ends = list(matchers), start, list(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V) -> (B, V)
        from llguidance import numpy as masks

        if input_ids.shape[1] > self._start:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        bits = masks.allocate_token_bitmask(len(self._matchers), scores.shape[1])
        for row, matcher in enumerate(self._matchers):
            if not matcher.is_stopped():
                masks.fill_next_token_bitmask(matcher, bits, row)
        words = torch.from_numpy(bits).to(scores.device)
        allowed = ((words[:, :, None] >> torch.arange(32, device=scores.device)) & 1).flatten(1)[:, : scores.shape[1]]
        for row, matcher in enumerate(self._matchers):
            if matcher.is_stopped():
                allowed[row] = 0
                allowed[row, self._ends] = 1
        return scores.masked_fill(allowed == 0, -torch.inf)
