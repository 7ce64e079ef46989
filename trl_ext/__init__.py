"""Lightweight extension of TRL: papers by name. `GRPOTrainer`, `GRPOConfig` are drop-ins for TRL's."""

from trl_ext.grpo import GRPOConfig, GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
