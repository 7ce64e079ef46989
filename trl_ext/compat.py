"""The seams of TRL that the trainers stand on, checked once at import."""

from __future__ import annotations

import inspect

import trl

SUPPORTED = "1.16"
_GRPO_SEAMS = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
}
_DPO_SEAMS = {
    "_compute_loss": ("self", "model", "inputs", "return_outputs"),
    "compute_ref_log_probs": ("self", "model", "inputs"),
}
_KTO_SEAMS = _DPO_SEAMS | {"_compute_kl_logps": ("self", "model", "batch")}
_FORWARD_HEAD = ("self", "model", "input_ids", "attention_mask", "logits_to_keep")
_FORWARD_KNOWN = (*_FORWARD_HEAD, "batch_size", "compute_entropy", "compute_aux_loss")
_SEAMS = ((trl.GRPOTrainer, _GRPO_SEAMS), (trl.DPOTrainer, _DPO_SEAMS), (trl.KTOTrainer, _KTO_SEAMS))


def check_trl() -> None:
    """Raises ImportError when the installed TRL has other seams than the ones that the tests cover."""
    wrong = [
        f"{cls.__name__}.{name}{inspect.signature(getattr(cls, name))}"
        for cls, seams in _SEAMS
        for name, expected in seams.items()
        if tuple(inspect.signature(getattr(cls, name)).parameters) != expected
    ]
    forward = tuple(inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    if forward[: len(_FORWARD_HEAD)] != _FORWARD_HEAD:
        wrong.append(f"GRPOTrainer._get_per_token_logps_and_entropies({', '.join(forward)})")
    if wrong:
        raise ImportError(
            f"trl {trl.__version__} differs where trl_ext attaches: {'; '.join(wrong)}. "
            f"Install the version that this release covers: pip install 'trl~={SUPPORTED}.0'. If another package "
            "rewrites TRL's trainers (Unsloth does), import trl_ext before it."
        )


def multimodal_names() -> tuple[str, ...]:
    """Keyword arguments of TRL's forward that carry images, so that a new one is passed on without a release of ours."""
    names = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    return tuple(name for name in names if name not in _FORWARD_KNOWN)
