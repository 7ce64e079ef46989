"""Lightweight extension of TRL: papers by name. The trainers and configurations are drop-ins for TRL's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.dpo import DPOConfig, DPOTrainer
    from trl_ext.grpo import GRPOConfig, GRPOTrainer
    from trl_ext.kto import KTOConfig, KTOTrainer
    from trl_ext.sft import SFTConfig, SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "SFTConfig",
    "SFTTrainer",
]


def __getattr__(name: str) -> Any:
    """The trainers, loaded on first use: `trl-ext --help` need not wait for torch."""
    if name in ("GRPOConfig", "GRPOTrainer"):
        from trl_ext import grpo as module
    elif name in ("DPOConfig", "DPOTrainer"):
        from trl_ext import dpo as module  # type: ignore[no-redef]
    elif name in ("KTOConfig", "KTOTrainer"):
        from trl_ext import kto as module  # type: ignore[no-redef]
    elif name in ("SFTConfig", "SFTTrainer"):
        from trl_ext import sft as module  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
