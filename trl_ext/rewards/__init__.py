"""Reward functions: the table of names, and the check around each of them."""

from trl_ext.rewards.checked import RewardError, checked
from trl_ext.rewards.registry import REWARDS, make_reward, make_rewards

__all__ = ["REWARDS", "RewardError", "checked", "make_reward", "make_rewards"]
