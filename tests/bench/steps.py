"""One training step of many variants on the same fixed rollout: loss, backward, clipping, optimizer.

The rollout costs the same for all, so it is made once: `_generate_single_turn` gives prepared completions, everything
around it (rewards, advantages, the methods' rollout hooks) is the trainer's own code. `step` then calls the trainer's
`training_step` on that batch again and again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, Qwen3Config, Qwen3ForCausalLM

import trl_ext
from tests.bench.flops import Extra, Passes, Shape, extra_share, floor_ratio
from trl_ext.annotate import Request, Span
from trl_ext.method import REFERENCE, TEACHER, LossInput, Method
from trl_ext.methods import METHODS
from trl_ext.methods.grpo.dgpo import Dgpo, hellinger
from trl_ext.methods.grpo.epo import Epo
from trl_ext.methods.grpo.trace import Trace, routed_kl
from trl_ext.plan import PlanError, make_plan
from trl_ext.sandbox.model import sandbox_tokenizer

GROUP = 2
LINES = 4  # of a completion: one of them is a quarter of its tokens, TRACE's coverage cap
INSIDE, AFTER = 1, 40  # optimizer steps inside and after TRACE's default window of 40
FLAGGED = "tests.bench.steps.annotate_flagged"
OWN: dict[str, Any] = {  # what a method needs to run on these prompts of digits, in a stock step without KL
    "pgpo": {"pattern": "[0-9]+"},
    "fg_expo": {"akl": False},
    "paced": {"use": "advantages"},
    "rods": {"capacity": 0},  # what a step costs between two epochs; synthesis is as dear as its synthesiser
    "riskpo": {"bundle_size": 2},
    "fgrpo": {"constraints": {"alternating": 0.9}, "accuracy": "alternating"},
}
UNSCALED = {"riskpo", "oblr_po"}  # they replace the advantages and ask for scale_rewards none; the work is the same


@dataclass(frozen=True)
class Variant:
    """A trainer to compare: `methods` of ours (None: stock TRL), the optimizer step, the share of rows with a span, and
    settings of TRL's own that differ from `settings`."""

    label: str
    methods: Mapping[str, Any] | None
    at: int = INSIDE
    share: float = 0.25
    own: Mapping[str, Any] = field(default_factory=dict)
    two_passes: bool = False
    """A later update on the rollout, with groups that do not fit a micro-batch: their forward without gradient counts."""


def annotate_flagged(requests: Sequence[Request]) -> list[list[Span]]:
    """The first line of every completion whose row is flagged; nothing for the others."""
    label = {True: "insight", False: "arithmetic_slip"}
    return [[Span((0,), label[r.correct])] if r.row["flagged"] else [] for r in requests]


@dataclass(frozen=True)
class NaiveTrace(Trace):
    """TRACE as it is written without the seams: (B, T, V) log-probs of policy and teacher, then a mask."""

    name = "naive_trace"

    def aux_loss(self, x: LossInput) -> Tensor | None:
        assert x.policy is not None
        kinds, (rows, length) = x.streams["kind"], x.logps.shape
        teacher = x.other(TEACHER, torch.arange(rows), x.streams["prompt_ids"], x.streams["prompt_mask"])
        every = torch.ones_like(kinds, dtype=torch.bool)
        log_p, log_q = x.policy.log_probs_at(every), teacher.log_probs_at(every)
        per_token = torch.zeros_like(x.logps)
        for kind in self.active:
            kl, _, _ = routed_kl(log_p, log_q, kind, None, self.clip, self.clip_mode)
            per_token = per_token + kl.view(rows, length) * (kinds == kind)
        return self._lambda(x.step) * x.aggregate(per_token)


@dataclass(frozen=True)
class NaiveDgpo(Dgpo):
    """DGPO that builds both (B, T, V) distributions at once, as a plain implementation would."""

    name = "naive_dgpo"

    def _distance(self, x: LossInput) -> Tensor:
        assert x.policy is not None
        every = torch.ones_like(x.mask, dtype=torch.bool)
        log_p, log_q = x.policy.log_probs_at(every).detach(), x.other(REFERENCE).log_probs_at(every)
        return hellinger(log_p, log_q).view(x.mask.shape) * x.mask


@contextlib.contextmanager
def known(*classes: type[Method]) -> Iterator[None]:
    """The bench's own methods are in the table inside the block."""
    METHODS.update({cls.name: cls for cls in classes})
    try:
        yield
    finally:
        for cls in classes:
            del METHODS[cls.name]


EXTRAS: Mapping[str, Extra] = {
    "naive_dgpo": Extra(forwards=1, heads=2),
    "dgpo": Extra(forwards=1, heads=2),  # the reference's forward; policy and reference are projected
    "pgpo": Extra(forwards=1, heads=1),  # the forward with the evidence hidden
    "dcpo": Extra(heads=0.5),  # one projection, of the completions with a positive reward: half of them here
    "capo": Extra(heads=1),  # the top logits
    "safe": Extra(forwards=1, heads=1),  # the reference's log-probs, as `beta` would cost
    "group_dpo": Extra(
        forwards=1, heads=1
    ),  # the reference's log-probs; real has no line: its groups fit, but for the row that says so
    "oblr_po": Extra(forwards=1, heads=1),  # the policy's distributions under the weights that sampled
}
"""What each method cannot do without. Those that are not here read what TRL's step computes anyway."""


NAIVE = (NaiveTrace.name, NaiveDgpo.name)


def variants(naive: bool = True) -> list[Variant]:
    """Stock TRL twice (the difference is noise), no method, each method, all that compose, and the naive TRACE.

    Stock TRL with its own entropy bonus is there for EPO: both send a gradient of the entropies back through TRL's head.
    """
    trace = {"trace": {"action": "both", "annotator": FLAGGED, "clip_mode": "none"}}
    found = [Variant("trl", None), Variant("trl again", None), Variant("no method", {})]
    twice = {"num_iterations": 2}
    found.append(Variant("trl, two updates per rollout", None, own=twice))
    found.append(Variant("real, two updates, two passes", {"real": {}}, own=twice, two_passes=True))
    found.append(Variant("trl, own entropy bonus", None, own={"entropy_coef": Epo().coefficient}))
    for name in (name for name, cls in METHODS.items() if cls.trainer == "grpo" and name not in NAIVE):
        if name != "trace":
            found.append(Variant(name, {name: OWN.get(name, {})}))
            continue
        found += [Variant(f"trace, {share:.0%} of rows", trace, share=share) for share in (0.0, 0.25, 1.0)]
        found.append(Variant("trace, after its window", trace, at=AFTER))
    found.append(Variant("all that compose, 25% of rows", composable(OWN | trace)))
    if naive:
        found.append(Variant("trace, 25% of rows, naive", {NaiveTrace.name: trace["trace"]}))
        found.append(Variant("dgpo, naive", {NaiveDgpo.name: {}}))
    return found


def composable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The GRPO methods in the table's order, each left out if it does not go with those before it."""
    chosen: dict[str, Any] = {}
    for name, cls in METHODS.items():
        wanted = chosen | {name: settings.get(name, {})}
        try:
            if cls.trainer == "grpo" and name not in NAIVE:
                make_plan(wanted)
                chosen = wanted
        except PlanError:  # this is the question that the plan is asked
            continue
    return chosen


def build_model(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random Qwen3 of this geometry, the same for every variant."""
    torch.manual_seed(0)
    words = tokenizer()
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2 * (shape.prompt + shape.completion),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.device(device):
        model: Any = Qwen3ForCausalLM(config)
    return model.to(dtype)


def prompt_rows(shape: Shape, share: float) -> list[dict[str, Any]]:
    """One row per prompt, the first `share` of them flagged; the text fills L tokens (a digit is a token)."""
    empty = tokenizer().apply_chat_template(_user(""), add_generation_prompt=True, tokenize=True, return_dict=False)
    width, prompts = max(1, shape.prompt - len(empty)), shape.rows // GROUP
    flagged = round(share * prompts)
    if share > 0 and flagged == 0:
        raise ValueError(
            f"{shape.rows} rows are {prompts} prompts, of which a share of {share} is none: take more rows"
        )
    return [{"prompt": _user(str(i % 10) * width), "flagged": i < flagged} for i in range(prompts)]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def completion_ids(shape: Shape) -> list[list[int]]:
    """T tokens for each row: LINES lines of digits, other ones in each row."""
    width = shape.completion // LINES
    texts = ["".join(str((i + k) % 10) * (width - 1) + "\n" for k in range(LINES)) for i in range(shape.rows)]
    return [tokenizer()(text.ljust(shape.completion, "0"))["input_ids"] for text in texts]


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The sandbox's: it knows the words of a private note, so the teacher's prompt has a realistic length."""
    return sandbox_tokenizer()


def alternating(completions: list, **kwargs: object) -> list[float]:
    """Right, wrong, right, wrong: every group has variance and both kinds of verdict."""
    return [float(i % 2) for i in range(len(completions))]


def settings(shape: Shape, folder: str, **kwargs: Any) -> dict[str, Any]:
    """Arguments for TRL's or our config: one micro-batch, learning rate so small that the work never changes."""
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": shape.rows,
        "num_generations": GROUP,
        "max_completion_length": shape.completion,
        "max_steps": 1,
        "learning_rate": 1e-7,
        "loss_type": "grpo",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return common | kwargs


class Bench:
    """A trainer of one variant, set up by its own `train`, with one rollout in hand."""

    def __init__(self, variant: Variant, shape: Shape, model: Any, folder: str, peft: Any = None, **kwargs: Any):
        """`model` is a model, or a folder with one; `kwargs` go to the config, `init` among them to the trainer."""
        self.variant, self.shape = variant, shape
        self._rows = rows = prompt_rows(shape, variant.share)
        init = kwargs.pop("init", {})
        args = settings(shape, folder, **variant.own, **kwargs)
        if UNSCALED & set(variant.methods or {}):
            args["scale_rewards"] = "none"
        stock = variant.methods is None
        config = trl.GRPOConfig(**args) if stock else trl_ext.GRPOConfig(**args, methods=dict(variant.methods or {}))
        cls: Any = trl.GRPOTrainer if stock else trl_ext.GRPOTrainer
        data = Dataset.from_list(rows)
        self.trainer: Any = cls(
            model, alternating, config, data, processing_class=tokenizer(), peft_config=peft, **init
        )
        self.trainer.remove_callback(PrinterCallback)
        prepared = completion_ids(shape)
        self.trainer._generate_single_turn = lambda *a, **k: (prepared, None)
        self.trainer.train()
        self.batch = self._roll_out(rows)
        self.trainer._prepare_inputs = lambda batch: self.batch

    def _roll_out(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch at the variant's optimizer step, as the trainer makes it."""
        self.trainer.state.global_step = self.variant.at
        self.trainer.model.train()
        return self.trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])

    def step(self) -> None:
        """One optimizer step on the fixed batch. The teacher's refresh, every tenth step, is not in it."""
        trainer = self.trainer
        trainer.training_step(trainer.model_wrapped, {}, None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def timed(self) -> float:
        """Seconds of scoring the fixed rollout and of one step on it, the device's queue emptied before and after.

        Scoring is what comes between generation and loss: rewards, advantages, and the forwards of a method there.
        """
        synchronize()
        started = time.perf_counter()
        rollout = self._roll_out(self._rows)
        if self.variant.two_passes:
            self.trainer.state.global_step += 1
            self.trainer._coupled_values([rollout])
        self.step()
        synchronize()
        return time.perf_counter() - started

    def held_bytes(self) -> int:
        """Memory that the methods keep between steps: copies of trained weights."""
        copies = [getattr(self.trainer, name, None) for name in ("_teacher", "_reference")]
        return sum(v.numel() * v.element_size() for c in copies if c is not None for v in c.values.values())

    def _kinds(self) -> Tensor:
        """(B, T): not zero on span tokens, whichever TRACE put them there."""
        found = [value for key, value in self.batch.items() if key.endswith("/kind")]
        return found[0] if found else torch.zeros_like(self.batch["completion_mask"])

    def span_tokens(self) -> int:
        """Tokens of the fixed rollout that lie in a span."""
        return int((self._kinds() > 0).sum())

    def floor(self, passes: Passes) -> float:
        """The arithmetic floor of the step's ratio to stock TRL, from what the rollout really routed."""
        extras = [EXTRAS[name] for name in self.variant.methods or () if name in EXTRAS]
        share = sum(extra_share(self.shape, passes, extra) for extra in extras)
        rows = int((self._kinds() > 0).any(1).sum())
        if rows == 0:
            return 1.0 + share
        width = next(value.size(1) for key, value in self.batch.items() if key.endswith("trace/prompt_ids"))
        shape = dataclasses.replace(self.shape, prompt=self.batch["prompt_ids"].size(1))
        return share + floor_ratio(shape, passes, rows, width, self.span_tokens())


def synchronize() -> None:
    """Waits for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most memory that `step` held at any moment above what was held before it.

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the running sum of every allocation and release of PyTorch's CPU
    allocator, as its profiler reports them; scratch memory of the math libraries is not in it.
    """
    gc.collect()
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
