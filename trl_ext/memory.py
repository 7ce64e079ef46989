"""How much GPU memory a recipe will need, line by line, before anything is loaded.

Weights, adapter, gradients and optimizer state are counted exactly on the meta device (`geometry.py`); the rest is
arithmetic for a dense decoder with a gated MLP, written beside each line. Three phases share what is always there:

    total = always + max(rollout, annotation, loss) + 1 GiB for the CUDA context and fragments

Letters: B rows of a micro-batch, R rows generated at once, L prompt and T completion tokens, S = L + T, H hidden,
I inner size of the MLP, Q and K features of queries and keys over their heads, V vocabulary, a bytes of an activation.

Assumptions. Every prompt and completion is as long as allowed, so a run usually needs less. Things in one phase are
added up although some never live together. One process without sharding or offload. Attention is SDPA with a padding
mask (none is built with flash attention). Each micro-batch's head runs in TRL's tiles; (B, T, V) is never built.
HuggingFace generation produces all R rows of a rollout at once. Methods: TEACHER is one more copy of the trained weights
and one forward without gradient with `NOTE_TOKENS` more; REFERENCE and REF_LOGPS are nothing under LoRA, else a copy;
FROZEN is a second model, as large and packed as the base, unless its log-probs are computed before training;
GRADIENT_NOISE is a float32 copy of the gradient; HIDDEN keeps (B, T, H) and may build blocks of `forward.LOGITS_BUDGET`
entries, of which `BLOCK_COPIES` live at once. SAFE's critic is two heads in float32 with AdamW's moments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_ext.forward import LOGITS_BUDGET
from trl_ext.geometry import Shape, model_config, shape_of
from trl_ext.method import FROZEN, GRADIENT_NOISE, HIDDEN, REF_LOGPS, REFERENCE, TEACHER
from trl_ext.plan import Plan

GIB = 2**30
RESERVE = GIB
"""CUDA context, kernels and fragments: assumed."""
BLOCK_COPIES = 11
"""Float32 (n, V) tensors that live at the peak of `per_position` with TRACE's `routed_kl` over the whole vocabulary:
both log-probs, exp, difference, terms, and the temporaries of the gradient check. Measured: 11, with top_k 4."""
NOTE_TOKENS = 128
"""What a private note adds to a teacher's prompt: assumed."""
ANNOTATION_TOKENS = 512
"""Instructions and segment numbers that an annotation prompt adds to problem and completion: assumed."""
UNKNOWN_PROMPT = 512
"""Prompt tokens assumed when the recipe sets no `max_prompt_tokens`."""
SANDBOX_PROMPT = 64
"""Prompt tokens of the sandbox's problems: the longest of 300 has 57."""
_TILE_ROWS, _TILE_COLUMNS = 4096, 32768  # trl.kernels.chunked_logprob
_ALWAYS, _ROLLOUT, _ANNOTATION, _LOSS = "always", "rollout", "annotation", "loss"


@dataclass(frozen=True)
class Line:
    """One amount: `phase` in which it is held, bytes, and the arithmetic in short words."""

    phase: str
    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Prediction:
    """Lines, notes on what was assumed, and the same with one knob turned (computed when asked for)."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    vllm_share: float
    knobs: Callable[[], Iterator[tuple[str, Prediction]]]

    def of(self, phase: str) -> int:
        """Bytes of one phase."""
        return sum(line.bytes for line in self.lines if line.phase == phase)

    @property
    def total(self) -> int:
        """Bytes of the smallest GPU that holds the peak (vLLM's share of it included)."""
        peak = self.of(_ALWAYS) + max(self.of(p) for p in (_ROLLOUT, _ANNOTATION, _LOSS)) + RESERVE
        return math.ceil(peak / (1 - self.vllm_share))

    def table(self) -> str:
        """The lines in GiB by phase, and the total."""
        rows = []
        for phase in (_ALWAYS, _ROLLOUT, _ANNOTATION, _LOSS):
            lines = [line for line in self.lines if line.phase == phase and line.bytes]
            if lines:
                rows.append(f"{self.of(phase) / GIB:8.2f}  {phase}")
                rows += [f"{line.bytes / GIB:8.2f}    {line.name}: {line.how}" for line in lines]
        rows.append(f"{RESERVE / GIB:8.2f}  CUDA context and fragments (assumed)")
        if self.vllm_share:
            rows.append(f"{self.total * self.vllm_share / GIB:8.2f}  vLLM: {self.vllm_share:g} of the GPU")
        rows.append(f"{self.total / GIB:8.2f}  GiB at the peak: always + the largest phase + reserve")
        return "\n".join(["Predicted GPU memory (GiB, upper bound)", *rows, *(f"Note: {note}" for note in self.notes)])

    def fits(self, gib: float) -> list[str]:
        """Nothing when the peak is at most `gib` GiB; else the knobs that help, the most effective first."""
        if self.total <= gib * GIB:
            return []
        return [
            f"{words} saves {(self.total - other.total) / GIB:.2f} GiB, {other.total / GIB:.2f} remain"
            for words, other in self._helpful()
        ]

    def until_it_fits(self, gib: float) -> tuple[list[str], Prediction]:
        """(knobs, prediction with all of them turned): the most effective one again and again, until `gib` GiB hold it.

        Stops where no knob helps any more; the prediction then is still too large.
        """
        turned, found = [], self
        while found.total > gib * GIB and (best := found._helpful()):
            words, found = best[0]
            turned.append(words)
        return turned, found

    def _helpful(self) -> list[tuple[str, Prediction]]:
        """The knobs that save at least 0.01 GiB of the peak, the most effective first."""
        found = [(words, other) for words, other in self.knobs() if self.total - other.total > 0.01 * GIB]
        return sorted(found, key=lambda knob: knob[1].total)

    def advice(self, gib: float) -> str:
        """Whether `gib` GiB hold the peak; if not, what each knob saves, and knobs that suffice together."""
        if self.total <= gib * GIB:
            return f"Fits: {self.total / GIB:.2f} of {gib:.4g} GiB at the peak."
        lines = [f"Does not fit: {self.total / GIB:.2f} GiB at the peak, {gib:.4g} GiB there are. One knob at a time:"]
        lines += [f"  - {words}" for words in self.fits(gib)]
        turned, found = self.until_it_fits(gib)
        if found.total > gib * GIB:
            return "\n".join(
                [*lines, f"All together leave {found.total / GIB:.2f} GiB: take a smaller model or more GPUs."]
            )
        return "\n".join([*lines, f"Enough, {found.total / GIB:.2f} GiB:", *(f"  {words}" for words in turned)])


def predict(recipe: Any) -> Prediction:
    """The prediction for a `recipe.Recipe`. Raises OSError for a model whose config cannot be found."""
    sandbox, length = recipe.model_args.model_name_or_path == "sandbox", recipe.extra.max_prompt_tokens
    config, note = config_of(recipe)
    assumed = SANDBOX_PROMPT if sandbox else UNKNOWN_PROMPT
    guess = None if length else f"max_prompt_tokens is not set: prompts of {assumed} tokens assumed"
    vision = "activations of the vision tower are not counted" if hasattr(config, "vision_config") else None
    judges = [f"the reward model {name} is not counted" for name in recipe.rewards if isinstance(name, str)]
    notes = tuple(text for text in (note, guess, vision, *judges) if text)
    loop, sampled = recipe.loop, (0, 0)
    if loop is not None and loop.makes_data and loop.vllm_server_base_url is None:
        sampled = (loop.generation_batch_size, loop.max_completion_length)
    found = estimate(config, recipe.training_args, recipe.model_args, recipe.plan, length or assumed, notes, sampled)
    return _with_second_player(found) if loop is not None and not loop.makes_data else found


def config_of(recipe: Any) -> tuple[Any, str | None]:
    """(transformers config of the recipe's model, note on where it comes from). Raises OSError for an unknown one."""
    if recipe.model_args.model_name_or_path == "sandbox":
        from trl_ext.sandbox.model import WarmStart, sandbox_config, sandbox_tokenizer

        return sandbox_config(sandbox_tokenizer(), WarmStart()), None
    return model_config(recipe.model_args.model_name_or_path, recipe.model_args.model_revision)


def gpu_here() -> float | None:
    """GiB of this process's first GPU, or None without one."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None


def _with_second_player(one: Prediction) -> Prediction:
    """PasoDoble's second adapter and optimizer; the two are never updated at once, so gradients stay as they are."""
    own = sum(line.bytes for line in one.lines if line.name in ("adapter", "optimizer"))
    lines = (*one.lines, Line(_ALWAYS, "Proposer", own, "its adapter and its optimizer"))

    def knobs() -> Iterator[tuple[str, Prediction]]:
        yield from ((words, _with_second_player(turned)) for words, turned in one.knobs())

    return replace(one, lines=lines, knobs=knobs)


def estimate(
    config: Any,
    training: Any,
    model_args: Any,
    plan: Plan,
    prompt_length: int,
    notes: tuple[str, ...] = (),
    sampled: tuple[int, int] = (0, 0),
) -> Prediction:
    """The prediction from a transformers config, TRL's two configurations, the plan and L.

    `sampled`: rows and tokens that a loop around a trainer without rollouts samples at once.
    """
    run = _Run(shape_of(config, model_args), training, model_args, plan, prompt_length, sampled)
    return _added_up(run, config, notes)


def _added_up(run: _Run, config: Any, notes: tuple[str, ...] = ()) -> Prediction:
    lines = (*_always(run), *_rollout(run), *_annotation(run), *_loss(run))
    colocated = run.vllm and run.training.vllm_mode == "colocate"
    share = run.training.vllm_gpu_memory_utilization if colocated else 0.0

    def knobs() -> Iterator[tuple[str, Prediction]]:
        for words, training, model_args in _knobs(run.training, run.model_args):
            shape = run.shape if model_args is run.model_args else shape_of(config, model_args)
            turned = replace(run, shape=shape, training=training, model_args=model_args)
            yield words, _added_up(turned, config)

    return Prediction(lines, notes, share, knobs)


@dataclass(frozen=True)
class _Run:
    """The sizes of a run by the letters of this module."""

    shape: Shape
    training: Any
    model_args: Any
    plan: Plan
    L: int

    sampled: tuple[int, int] = (0, 0)

    @property
    def given(self) -> bool:
        """Whether the replies are in the data (pairs, labelled ones, demonstrations), so that the trainer samples none."""
        return not hasattr(self.training, "num_generations")

    @property
    def pairs(self) -> bool:
        """Whether a row is two replies; KTO's and SFT's is one."""
        return self.given and not any(hasattr(self.training, key) for key in ("desirable_weight", "packing"))

    @property
    def vllm(self) -> bool:
        return bool(getattr(self.training, "use_vllm", False))

    @property
    def B(self) -> int:
        return self.training.per_device_train_batch_size * (2 if self.pairs else 1)

    @property
    def R(self) -> int:
        return 0 if self.given or self.vllm else self.B * self.training.steps_per_generation

    @property
    def T(self) -> int:
        if self.given:  # max_length counts prompt and reply together
            return max((self.training.max_length or 2 * self.L) - self.L, 1)
        return self.training.max_completion_length or 256

    @property
    def S(self) -> int:
        return self.L + self.T

    @property
    def a(self) -> int:
        return 2 if self.training.bf16 or self.training.fp16 else self.shape.width

    @property
    def masked(self) -> bool:
        return not str(self.model_args.attn_implementation or "").startswith(("flash", "kernels"))

    def kv(self, rows: int, tokens: int) -> int:
        """Keys and values of all layers, and one layer's copy while it grows."""
        return rows * tokens * 2 * self.shape.keys * self.shape.width * (self.shape.layers + 1)

    def mask(self, rows: int, tokens: int, width: int) -> int:
        """(rows, 1, tokens, tokens) as bool and as the kernel's bias."""
        return rows * tokens**2 * (1 + width) if self.masked else 0

    def no_grad(self, rows: int, tokens: int, width: int) -> int:
        """One layer without gradient: residual, norm and four MLP tensors, or the attention's, whichever is more."""
        s = self.shape
        return rows * tokens * (width * max(2 * s.hidden + 4 * s.inner, 2 * s.hidden + 6 * s.queries) + 4 * s.hidden)


def _always(run: _Run) -> Iterator[Line]:
    s, model_args, optim = run.shape, run.model_args, _optim(run.training)
    numel = sum(n for n, _ in s.trained)
    kind = "4-bit" if model_args.load_in_4bit else "8-bit" if model_args.load_in_8bit else f"{8 * s.width}-bit"
    rest = f", embeddings and head {8 * s.width}-bit" if s.largest else ""
    yield Line(_ALWAYS, "base weights", s.base_bytes, f"{kind}{rest}")
    if s.adapter:
        yield Line(_ALWAYS, "adapter", s.trained_bytes, f"{numel / 1e6:.1f} M parameters")
    yield Line(_ALWAYS, "gradients", s.trained_bytes, f"{numel / 1e6:.1f} M trained, as wide as the weights")
    yield Line(_ALWAYS, "optimizer", *optimizer_bytes(optim, s.trained, s.trained_rows_cols))
    needs = run.plan.needs()
    if TEACHER in needs:
        yield Line(_ALWAYS, "teacher", s.trained_bytes, "a copy of the trained weights")
    if FROZEN in needs and not getattr(run.training, "precompute_ref_log_probs", False):
        yield Line(_ALWAYS, "frozen model", s.base_bytes, "as large as the base; one that a method names")
    if not s.adapter and (getattr(run.training, "beta", 0.0) != 0 or {REFERENCE, REF_LOGPS} & needs):
        yield Line(_ALWAYS, "reference", s.base_bytes, "a second copy of the model")
    if GRADIENT_NOISE in needs:
        yield Line(_ALWAYS, "gradient before", 4 * numel, "the accumulated gradient, a float32 copy")
    if any(getattr(method, "critic", False) for method in run.plan.methods):
        heads = critic_entries(s.hidden)
        yield Line(_ALWAYS, "critic", 12 * heads, f"two heads, {heads / 1e6:.1f} M x float32, and AdamW's two moments")
    if run.R:  # ids, masks, log-probs, streams: about 40 bytes
        yield Line(_ALWAYS, "token tensors", run.R * run.S * 40, f"R {run.R} x S {run.S} x 40 bytes")


def critic_entries(hidden: int) -> int:
    """Entries of `critic.new_heads`: a shared norm, two inner matrices (H/4, H) with biases, two outputs."""
    inner = max(1, hidden // 4)
    return 2 * hidden + 2 * (inner * hidden + inner) + 2 * (inner + 1)


def _rollout(run: _Run) -> Iterator[Line]:
    if run.given:
        return _generation(run, _ROLLOUT, run.L, run.sampled[1], run.sampled[0])
    return _generation(run, _ROLLOUT, run.L, run.T, run.R)


def _annotation(run: _Run) -> Iterator[Line]:
    """`annotator: policy` shows each completion to the model again, all rows at once."""
    asking: list[Any] = [m for m in run.plan.methods if getattr(m, "annotator", None) == "policy" and m.needs()]
    answers = [method.max_annotation_tokens for method in asking]
    return _generation(run, _ANNOTATION, run.S + ANNOTATION_TOKENS, max(answers), run.R) if answers else iter(())


def _generation(run: _Run, phase: str, prompt: int, new: int, R: int) -> Iterator[Line]:
    s = run.shape
    if R == 0:
        return
    size = 2 * s.keys * s.width * s.layers
    yield Line(phase, "KV cache", run.kv(R, prompt + new), f"R {R} x {prompt + new} tokens x {size} bytes")
    yield Line(phase, "reading prompts", run.no_grad(R, prompt, s.width), f"one layer for R {R} x {prompt} tokens")
    yield Line(phase, "padding mask", run.mask(R, prompt, s.width), f"R {R} x {prompt}^2")
    yield Line(phase, "logits", R * s.vocab * (s.width + 12), f"R {R} x V {s.vocab}, three float32 copies")


def _loss(run: _Run) -> Iterator[Line]:
    s, a, B, S, needs = run.shape, run.a, run.B, run.S, run.plan.needs()
    layer = B * S * saved_per_token(s, a) + run.mask(B, S, a)
    if run.training.gradient_checkpointing:
        yield Line(
            _LOSS, "checkpoints", s.layers * B * S * s.hidden * a, f"{s.layers} layers x B {B} x S {S} x H x {a}"
        )
        yield Line(_LOSS, "one layer again", layer, f"B {B} x S {S} x {saved_per_token(s, a)} bytes, and the mask")
    else:
        yield Line(
            _LOSS, "activations", s.layers * layer, f"{s.layers} layers x B {B} x S {S} x {saved_per_token(s, a)}"
        )
    yield Line(
        _LOSS, "backward", B * S * (a * (3 * s.inner + 2 * s.hidden) + 8 * s.hidden), "gradients inside one layer"
    )
    tile = min(B * run.T, _TILE_ROWS) * _TILE_COLUMNS * a  # as wide whatever the vocabulary
    ends = B * S * s.hidden * (4 + 2 * a) + B * run.T * s.hidden * (4 + 2 * a)
    yield Line(_LOSS, "fused head", tile + ends, "TRL's tile of 4096 x 32768, last norm, hidden states")
    if s.head_trained:
        yield Line(_LOSS, "head gradient", 4 * s.vocab * s.hidden, "V x H in float32")
    if s.largest:
        yield Line(_LOSS, "unpacked matrix", s.largest * a, "the largest one, one at a time")
    if run.a < 4 and (wide := sum(n for n, width in s.trained if width == 4)):
        yield Line(_LOSS, "autocast", wide * a, f"half-precision copies of {wide / 1e6:.1f} M float32 trained weights")
    if TEACHER in needs or REFERENCE in needs:
        words = f"one layer without gradient for B {B} x {S + NOTE_TOKENS} tokens"
        extra = run.no_grad(B, S + NOTE_TOKENS, a) + run.mask(B, S + NOTE_TOKENS, a) + B * S * s.hidden * a
        yield Line(_LOSS, "teacher forward", extra, words)
    if HIDDEN in needs:
        positions = min(B * run.T, max(1, LOGITS_BUDGET // s.vocab))
        block = positions * s.vocab * 4 * BLOCK_COPIES + B * run.T * s.hidden * a
        yield Line(
            _LOSS, "full distributions", block, f"{positions} positions x V x 4 x {BLOCK_COPIES} copies, and (B, T, H)"
        )


def saved_per_token(s: Shape, a: int) -> int:
    """Bytes that one layer keeps for its backward pass, per token.

    Norms in float32: 2 H + Q + K entries and a scale for each vector. Attention: queries, keys and values repeated to
    Q, output, log-sum-exp per head. MLP: gate, its activation, up. Inputs of the matrices: shared, but one copy for each
    adapted matrix if the adapter is float32 under autocast, and a copy with a one-byte mask with LoRA dropout. LoRA's
    inner states: r for each adapted matrix. Full training also keeps the normalised states before each norm's weight.
    Equal to what autograd keeps for a Qwen3 layer on the CPU, but for the width of the dropout mask there.
    """
    norms = 4 * (2 * s.hidden + s.queries + s.keys + 2 + s.heads + s.key_heads)
    attention = a * 4 * s.queries + 4 * s.heads
    mlp = a * 3 * s.inner
    if s.lora_dropout > 0:
        inputs = (a + 1) * s.lora_inputs // s.layers
    elif s.adapter and a < s.trained[0][1]:
        inputs = a * s.lora_inputs // s.layers
    else:
        inputs = a * (2 * s.hidden + s.inner)
    inner = a * s.lora_rank * s.lora_matrices // s.layers
    weights = 0 if s.adapter else a * (2 * s.hidden + s.queries + s.keys)
    return norms + attention + mlp + inputs + inner + weights


def _optim(training: Any) -> str:
    return str(getattr(training.optim, "value", training.optim))


def optimizer_bytes(optim: str, trained: tuple[tuple[int, int], ...], rows_cols: int) -> tuple[int, str]:
    """(bytes, words) of the state for `trained` tensors of (numel, bytes per entry).

    PyTorch's AdamW keeps two moments as wide as the weights; bitsandbytes' keeps them in float32, or, for tensors of at
    least 4096 entries, in one byte with a float32 per block of 256. Paged state may move to the host and counts 0.
    """
    if optim.startswith("paged_"):
        return 0, f"{optim}: pages move to the host when the GPU is full"
    moments = 1 if "lion" in optim else 2
    if "8bit" in optim:
        state = sum(moments * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n) for n, _ in trained)
        return state, f"{optim}: {moments} x 1 byte, a float32 per 256"
    if optim == "sgd":
        return 0, "sgd without momentum: none"
    if optim == "adafactor":
        return 4 * rows_cols, "adafactor: a row and a column per matrix"
    assumed = "" if "adam" in optim or "lion" in optim else " (assumed as for AdamW)"
    return sum(moments * n * width for n, width in trained), f"{optim}: {moments} x the width of the weights{assumed}"


def _knobs(training: Any, model_args: Any) -> Iterator[tuple[str, Any, Any]]:
    """(words, changed training, changed model arguments) for every knob that can still be turned."""

    def turned(target: Any, **values: Any) -> Any:
        other = copy.copy(target)
        for key, value in values.items():
            setattr(other, key, value)
        return other

    batch, spg = training.per_device_train_batch_size, getattr(training, "steps_per_generation", None)
    if spg and spg > 1 and (batch * spg // 2) % training.num_generations == 0 and spg % 2 == 0:
        yield f"steps_per_generation: {spg // 2}", turned(training, steps_per_generation=spg // 2), model_args
    if batch > 1 and batch % 2 == 0:
        steps, words = {}, ""
        if spg:
            steps, words = {"steps_per_generation": 2 * spg}, f", steps_per_generation: {2 * spg}"
        accumulation = 2 * training.gradient_accumulation_steps
        words = f"per_device_train_batch_size: {batch // 2}, gradient_accumulation_steps: {accumulation}{words}"
        yield words, turned(training, per_device_train_batch_size=batch // 2, **steps), model_args
    for key in ("max_completion_length", "max_length"):
        if getattr(training, key, None):
            value = getattr(training, key) // 2
            yield f"{key}: {value}", turned(training, **{key: value}), model_args
    if not training.gradient_checkpointing:
        yield "gradient_checkpointing: true", turned(training, gradient_checkpointing=True), model_args
    if "8bit" not in _optim(training):
        yield "optim: paged_adamw_8bit", turned(training, optim="paged_adamw_8bit"), model_args
    if not model_args.use_peft:
        yield "use_peft: true", training, turned(model_args, use_peft=True)
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        packed = turned(model_args, use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True)
        yield "load_in_4bit: true with use_peft: true", training, packed
    elif model_args.load_in_4bit and not model_args.use_bnb_nested_quant:
        yield "use_bnb_nested_quant: true", training, turned(model_args, use_bnb_nested_quant=True)
    if model_args.use_peft and model_args.lora_r > 1:
        yield f"lora_r: {model_args.lora_r // 2}", training, turned(model_args, lora_r=model_args.lora_r // 2)
    if getattr(training, "use_vllm", False) and training.vllm_mode == "colocate":
        share = training.vllm_gpu_memory_utilization / 2
        yield (
            f"vllm_gpu_memory_utilization: {share:g}",
            turned(training, vllm_gpu_memory_utilization=share),
            model_args,
        )
    if model_args.dtype == "float32":
        yield "dtype: bfloat16", training, turned(model_args, dtype="bfloat16")
