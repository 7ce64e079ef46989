"""Settings that are known to hurt and that nothing refuses: `trl-ext plan` lists them, a run says them once.

Each advice names the key, its value, why it hurts, what to set, and where that is known from: TRL 1.16's code or
documentation, an issue, a paper, or arithmetic. What TRL, transformers or the plan already refuse is not repeated here.
A threshold that is ours says so in its `source`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trl_ext.method import REF_LOGPS, REFERENCE, Method, overrides

LORA_RATE = 10
"""An adapter takes about ten times the learning rate of full training: "LoRA Without Regret", Thinking Machines, 2025;
TRL's page of that name."""
RATE_SPAN = 10
"""How far from the usual rate is said to be far, either way: ours."""
SCALE_RANGE = (0.25, 8.0)
"""What alpha / r, the factor of an adapter's update, is usually within: TRL's default is 2. The range is ours."""
HALF_SPACING = 2.0**-9
"""Half of the spacing of bfloat16's numbers relative to the number itself, at the least: 2^-9 just below a power of two,
2^-8 at one. A change by less is rounded away in every number."""
ORDINARY_WIDTH = 256
"""Hidden size from which a model is no toy. Ours."""
TYPICAL_WEIGHT = 0.02
"""Size of a weight: transformers' usual `initializer_range`."""


@dataclass(frozen=True)
class Advice:
    """`key: value` hurts because of `why`; `instead` is what to set; `source` is where that is known from."""

    key: str
    value: Any
    why: str
    instead: str
    source: str

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return f"{self.key}: {value}. {self.why}; {self.instead} ({self.source})"


def advise(recipe: Any, config: Any = None) -> list[Advice]:
    """All advice for a `recipe.Recipe`; `config` is its model's transformers config, None if that cannot be read."""
    return [advice for rule in RULES for advice in rule(recipe, config)]


def reference_words(recipe: Any) -> str | None:
    """What the run compares the policy with, and what that costs in memory; None if it compares with nothing."""
    args = recipe.training_args
    if recipe.trainer not in ("grpo", "dpo", "kto"):
        return None
    if recipe.trainer == "grpo" and args.beta == 0 and not {REFERENCE, REF_LOGPS} & recipe.plan.needs():
        return None
    if getattr(args, "precompute_ref_log_probs", False):
        return "the model as it is loaded, before training; its log-probs are computed once"
    if recipe.model_args.use_peft:
        return "the base model with the adapter off; no copy"
    return "the model as it is loaded; a second copy of all weights"


def generation_needs(method: Method) -> list[str]:
    """What a method asks of text generation beyond the trainer's own rollout; all of it goes through TRL's generation."""
    asks = {
        "extra completions in a rollout": overrides(method, "revise"),
        "greedy answers of the policy": getattr(method, "annotator", None) == "policy" and bool(method.needs()),
        "prompts of its own": overrides(method, "choose_prompts") or overrides(method, "edit_prompts"),
    }
    return [words for words, asked in asks.items() if asked]


def generation_words(recipe: Any) -> str | None:
    """Which engine writes the completions, and what the methods ask of it; None where nothing is sampled."""
    args = recipe.training_args
    if recipe.trainer != "grpo":
        return None
    engine = f"vLLM, {args.vllm_mode}" if args.use_vllm else "HuggingFace transformers"
    asked = [f"{m.name}: {', '.join(asks)}" for m in recipe.plan.methods if (asks := generation_needs(m))]
    return f"{engine}; {'; '.join(asked)}" if asked else engine


def _real(recipe: Any, config: Any) -> bool:
    """Whether the model is of ordinary size: the sandbox's, and what was trained from it, has other habits."""
    width = getattr(getattr(config, "text_config", config), "hidden_size", ORDINARY_WIDTH)
    return recipe.model_args.model_name_or_path != "sandbox" and width >= ORDINARY_WIDTH


def learning_rate(recipe: Any, config: Any) -> Iterator[Advice]:
    """More than `RATE_SPAN` times above or below TRL's default for this trainer, times `LORA_RATE` for an adapter."""
    args, adapter = recipe.training_args, recipe.model_args.use_peft
    if not _real(recipe, config) or "adam" not in str(getattr(args.optim, "value", args.optim)):
        return
    default = type(args).__dataclass_fields__["learning_rate"].default
    usual = default * (LORA_RATE if adapter else 1)
    if usual / RATE_SPAN <= args.learning_rate * (1 + 1e-9) and args.learning_rate <= usual * RATE_SPAN * (1 + 1e-9):
        return
    what = "an adapter" if adapter else "all weights"
    side = "below: little will change" if args.learning_rate < usual else "above: the model may collapse"
    words = f"TRL's default {default:g}" + (f", times {LORA_RATE} for LoRA" if adapter else "")
    yield Advice(
        "learning_rate",
        float(args.learning_rate),
        f"for {what} the {recipe.trainer} trainer usually takes about {usual:g}, and this is more than {RATE_SPAN} times {side}",
        f"set about {usual:g}",
        f"{words}; the span of {RATE_SPAN} is ours",
    )


def lost_updates(recipe: Any, config: Any) -> Iterator[Advice]:
    """Full training of bfloat16 weights: an update of about the learning rate is less than half a spacing."""
    args, model = recipe.training_args, recipe.model_args
    if not _real(recipe, config) or model.use_peft or model.dtype != "bfloat16":
        return
    largest = args.learning_rate / HALF_SPACING
    if largest < TYPICAL_WEIGHT:
        yield Advice(
            "dtype",
            "bfloat16",
            f"all weights are trained in bfloat16, which has 8 significant bits: an Adam step of about {args.learning_rate:g} "
            f"is rounded away in every weight above {largest:.2g}, so in most of them",
            "set dtype: float32 with bf16: true (computed in half precision, kept in full), or use_peft: true",
            "arithmetic; TRL's default dtype is float32",
        )


def wide_base(recipe: Any, config: Any) -> Iterator[Advice]:
    """A frozen base in float32 under half-precision compute."""
    args, model = recipe.training_args, recipe.model_args
    packed = model.load_in_4bit or model.load_in_8bit
    if (
        _real(recipe, config)
        and model.use_peft
        and not packed
        and model.dtype == "float32"
        and (args.bf16 or args.fp16)
    ):
        half = "bfloat16" if args.bf16 else "float16"
        yield Advice(
            "dtype",
            "float32",
            f"the base is frozen and computed in {half}, so float32 only doubles its memory",
            f"set dtype: {half}",
            "float32 is TRL's default for training all weights",
        )


def adapter_scale(recipe: Any, config: Any) -> Iterator[Advice]:
    """PEFT multiplies an adapter's output by alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    model = recipe.model_args
    if not model.use_peft:
        return
    root = getattr(model, "use_rslora", False)
    scale = model.lora_alpha / (math.sqrt(model.lora_r) if root else model.lora_r)
    low, high = SCALE_RANGE
    if not low <= scale <= high:
        divisor = "sqrt(lora_r)" if root else "lora_r"
        near = round((math.sqrt(model.lora_r) if root else model.lora_r) * 2)
        yield Advice(
            "lora_alpha",
            model.lora_alpha,
            f"with lora_r {model.lora_r} the adapter's output is multiplied by lora_alpha / {divisor} = {scale:g}, which acts as "
            "that factor on the learning rate",
            f"set lora_alpha: {near}, twice {divisor}, as TRL's defaults 32 and 16 are, and tune the rate instead",
            f"PEFT's LoraLayer; the range {low:g} to {high:g} is ours",
        )


def adapter_places(recipe: Any, config: Any) -> Iterator[Advice]:
    """PEFT's own choice of matrices is the attention's queries and values."""
    model = recipe.model_args
    if _real(recipe, config) and model.use_peft and not model.lora_target_modules:
        yield Advice(
            "lora_target_modules",
            "not set",
            "PEFT then adapts queries and values alone on most models, which learns less than an adapter on all matrices, "
            "even one of lower rank",
            "set lora_target_modules: all-linear",
            "LoRA Without Regret, and TRL's page of that name",
        )


def dropout(recipe: Any, config: Any) -> Iterator[Advice]:
    """GRPO compares log-probs of the same tokens from several passes; dropout makes each pass another model."""
    args, model = recipe.training_args, recipe.model_args
    if recipe.trainer == "grpo" and model.use_peft and model.lora_dropout > 0 and not args.disable_dropout:
        yield Advice(
            "lora_dropout",
            float(model.lora_dropout),
            "dropout is drawn anew in every pass, so old, new and reference log-probs of the same tokens differ without any "
            "update, and their ratio is noise",
            "set lora_dropout: 0.0, or disable_dropout: true",
            "TRL's help for disable_dropout, which GRPO leaves off",
        )


def context(recipe: Any, config: Any) -> Iterator[Advice]:
    """Prompt and completion must fit the positions that the model was trained on."""
    limit = context_length(config)
    args, prompt = recipe.training_args, recipe.extra.max_prompt_tokens or 0
    new = getattr(args, "max_completion_length", None)
    total = prompt + new if new else getattr(args, "max_length", None)
    if limit is None or total is None or total <= limit:
        return
    key, value = ("max_completion_length", new) if new else ("max_length", total)
    words = f"with prompts of up to {prompt} tokens that makes {total}; " if new and prompt else ""
    yield Advice(
        key,
        value,
        f"{words}the model's positions end at {limit}, and beyond them it was never trained",
        f"set {key}: {max(limit - prompt, 1) if new else limit} or less, or a model with a longer context",
        "max_position_embeddings and rope scaling of its config.json",
    )


def context_length(config: Any) -> int | None:
    """Positions of a transformers config: `max_position_embeddings`, or the original ones times the rope's factor."""
    if config is None:
        return None
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if limit is None or not factor or rope.get("rope_type") in (None, "default"):
        return limit
    return max(limit, int(original * factor)) if original else int(limit * factor)


def prompt_limit(recipe: Any, config: Any) -> Iterator[Advice]:
    """TRL 1.16 does not cut prompts, so the longest one of the data decides the memory."""
    images = hasattr(config, "vision_config")  # their rows are not counted by text tokens
    if _real(recipe, config) and recipe.trainer == "grpo" and recipe.extra.max_prompt_tokens is None and not images:
        yield Advice(
            "max_prompt_tokens",
            "not set",
            "TRL does not cut prompts, so the longest one of the data set decides how much memory a rollout takes",
            "set it to what the plan's memory holds; longer prompts are left out and counted",
            "GRPOConfig 1.16 has no max_prompt_length",
        )


def greedy(recipe: Any, config: Any) -> Iterator[Advice]:
    """GRPO divides logits by the temperature, and needs completions that differ."""
    args = recipe.training_args
    if recipe.trainer == "grpo" and args.temperature <= 0:
        yield Advice(
            "temperature",
            float(args.temperature),
            "log-probs are taken of logits / temperature, which divides by zero, and greedy completions of one prompt are "
            "all alike, so that no advantage remains",
            "set temperature: 1.0; evaluate greedily afterwards",
            "grpo_trainer.py",
        )


def cut_sampling(recipe: Any, config: Any) -> Iterator[Advice]:
    """vLLM's log-probs are of what top-p, top-k and min-p leave; the trainer's are of the whole vocabulary."""
    args = recipe.training_args
    if not (getattr(args, "use_vllm", False) and args.vllm_importance_sampling_correction):
        return
    cuts = {
        "top_p": (args.top_p, args.top_p < 1, 1.0),
        "top_k": (args.top_k, (args.top_k or 0) > 0, 0),
        "min_p": (args.min_p, bool(args.min_p), 0.0),
    }
    for key, (value, cuts_off, neutral) in cuts.items():
        if cuts_off:
            yield Advice(
                key,
                value,
                "vLLM gives log-probs of the tokens that it left over, TRL takes them over the whole vocabulary, so the "
                "importance ratio carries the kept probability as a factor and shrinks the gradient",
                f"set {key}: {neutral:g}",
                "huggingface/trl#6789",
            )


def pairs_of_two(recipe: Any, config: Any) -> Iterator[Advice]:
    """With G = 2, (r - mean) / std is +-1/sqrt(2) whatever the two rewards are, if they differ."""
    args = recipe.training_args
    if recipe.trainer == "grpo" and args.num_generations == 2 and args.scale_rewards in ("group", True):
        yield Advice(
            "num_generations",
            2,
            "divided by their own standard deviation two rewards always give advantages of +0.71 and -0.71, so a small "
            "difference counts as much as a large one",
            "set num_generations: 4 or more, or scale_rewards: none",
            "arithmetic: std of two values is their distance / sqrt(2)",
        )


def batch_dependent_loss(recipe: Any, config: Any) -> Iterator[Advice]:
    """`bnpo` divides by the tokens of the local micro-batch."""
    args = recipe.training_args
    several = args.gradient_accumulation_steps > 1 or args.world_size > 1
    if recipe.trainer == "grpo" and args.loss_type == "bnpo" and several:
        yield Advice(
            "loss_type",
            "bnpo",
            "each micro-batch of each process is divided by its own number of tokens, so the gradient depends on how the "
            "batch is cut, not only on what is in it",
            "set loss_type: dapo, which divides by the tokens of the whole batch",
            "GRPOConfig's help for loss_type; measured here: 3 % of the gradient's norm",
        )


def never_reached(recipe: Any, config: Any) -> Iterator[Advice]:
    """Warm-ups that `max_steps` ends before; checkpoints and evaluations that then come at the last step alone."""
    args = recipe.training_args
    steps = args.max_steps
    if steps <= 0:
        return
    for kind, what in (
        ("save", "the only checkpoint is written at the end, so a run that is cut off cannot be resumed"),
        ("eval", "the only evaluation comes at the end, so nothing shows on the way"),
    ):
        every = getattr(args, f"{kind}_steps") or 0
        if str(getattr(getattr(args, f"{kind}_strategy"), "value", "")) == "steps" and every > max(steps, 1):
            yield Advice(
                f"{kind}_steps",
                f"{every:g}",
                f"the run ends after max_steps {steps}: {what}",
                f"set {kind}_steps: {max(steps // 4, 1)}, or a larger max_steps",
                "transformers' DefaultFlowCallback, which saves and evaluates at the last step in any case",
            )
    warm = args.get_warmup_steps(steps)
    if warm >= steps and args.lr_scheduler_type != "constant":
        yield Advice(
            "warmup_steps",
            warm,
            f"the run ends after max_steps {steps}, before the learning rate is ever reached",
            f"set warmup_steps: {steps // 10}",
            "arithmetic",
        )


RULES: tuple[Callable[[Any, Any], Iterator[Advice]], ...] = (
    learning_rate,
    lost_updates,
    wide_base,
    adapter_scale,
    adapter_places,
    dropout,
    context,
    prompt_limit,
    greedy,
    cut_sampling,
    pairs_of_two,
    batch_dependent_loss,
    never_reached,
)
"""The rules in the order in which they are told."""
