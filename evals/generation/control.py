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


class Grammars:
    """llguidance's grammars of JSON Schemas: `texts`, item id -> grammar, and `left_out`, the items whose schema has none.

    Raises ModelError when llguidance is not installed.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        made = {item: grammar_of(schema) for item, schema in schemas.items()}
        self.texts = {item: text for item, text in made.items() if text is not None}
        self.left_out = [item for item, text in made.items() if text is None]


def grammar_of(schema: Any) -> str | None:
    """The grammar, None when llguidance cannot express the schema (it knows no `not`, no `uniqueItems`, ...)."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ModelError("--control needs llguidance: pip install 'trl-ext[control]'") from None
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT)  # type: ignore[arg-type]
    except ValueError:
        return None
    return None if LLMatcher.validate_grammar(grammar) else str(grammar)


class SchemaControl:
    """Makes the processor of a batch; `vocabulary`: the width of the logits, `ends`: the tokens that end a reply."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int], grammars: Grammars) -> None:
        import llguidance.hf

        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(ends))
        self._ends = list(ends)
        self._grammars = grammars.texts

    def __call__(self, jobs: Sequence[Any], start: int) -> SchemaMask:
        from llguidance import LLMatcher

        return SchemaMask([LLMatcher(self._tokenizer, self._grammars[job.item]) for job in jobs], start, self._ends)


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
