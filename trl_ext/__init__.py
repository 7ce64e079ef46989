"""Lightweight extension of TRL: papers by name. The trainers and configurations are drop-ins for TRL's."""

from trl_ext.dpo import DPOConfig, DPOTrainer
from trl_ext.grpo import GRPOConfig, GRPOTrainer

__all__ = ["DPOConfig", "DPOTrainer", "GRPOConfig", "GRPOTrainer"]
