"""SFTConfig and SFTTrainer: TRL's. No method changes them; a run gets our checkpoints, and its warnings, from here."""

from __future__ import annotations

from typing import Any

import trl

from trl_ext.base import MethodTrainer
from trl_ext.method import Setup

SFTConfig = trl.SFTConfig


class SFTTrainer(MethodTrainer, trl.SFTTrainer):  # type: ignore[misc]
    """Drop-in for `trl.SFTTrainer`: only whole checkpoints are resumed, and a loss that is not finite is reported."""

    _tag_names = [*trl.SFTTrainer._tag_names, "trl-ext"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_methods(Setup(self.args, engine=self._engine()))
