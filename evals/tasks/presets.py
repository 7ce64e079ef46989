"""How replies are drawn for each benchmark. Source: EVALS.md section 2.2, unless a comment says otherwise.

`quick` and `full` are for real models; `offline` is for the generated tasks with the tiny model that needs no network.
`sampled` is the choice of several replies where the default is greedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from evals.task import Sampling

Presets = Mapping[str, Sampling]

# top_k 20: Qwen3's own setting (report, section 4.6). DeepSeek-R1 and open-r1 set none; what matters is that it is
# fixed and logged, since the back ends' defaults differ (transformers 50, vLLM off).
_REASONING = Sampling(1, 0.6, top_p=0.95, top_k=20, max_new_tokens=32_768)
AIME: Presets = {"quick": replace(_REASONING, samples=8), "full": replace(_REASONING, samples=32)}
# Per item, and every question is four items (the rotations): 4 and 8 replies per question.
CHOICE: Presets = {"quick": _REASONING, "full": replace(_REASONING, samples=2)}
# 2,048 tokens are enough for models that do not think aloud at length; the rate of truncated replies shows it.
WORD_PROBLEMS: Presets = {
    "quick": Sampling(1, 0.0, max_new_tokens=2048),
    "full": Sampling(1, 0.0, max_new_tokens=2048),
    "sampled": Sampling(4, 0.7, max_new_tokens=2048),
}
STRUCTURED: Presets = {
    "quick": Sampling(1, 0.0, max_new_tokens=1024),
    "full": Sampling(1, 0.0, max_new_tokens=2048),
    "sampled": Sampling(4, 0.7, max_new_tokens=2048),
}
# Temperature 1 and a short reply: ours, for the tiny offline model writes one character or so per token.
OFFLINE = Sampling(4, 1.0, max_new_tokens=96)
OFFLINE_CHOICE = Sampling(1, 1.0, max_new_tokens=96)
# 64 tokens as in training (recipes/sandbox_grpo.yaml).
SANDBOX: Presets = {name: Sampling(4, 1.0, max_new_tokens=64) for name in ("quick", "full", "offline")}
