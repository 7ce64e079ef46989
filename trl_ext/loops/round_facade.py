"""What `trl_ext.run` asks of a trainer, answered by a loop that has a trainer in each round and none in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from trl_ext.loops.iterative_settings import Iterative
from trl_ext.loops.policies import Policies
from trl_ext.loops.round_log import RoundLog
from trl_ext.schedule import schedule_of


class LooksLikeATrainer:
    """Base of the loop; `ref_model` and the like are nothing that it holds, and are there to be set to None."""

    args: Any
    loop: Iterative
    splits: Sequence[Sequence[int]]
    policies: Policies
    log: RoundLog
    ref_model: Any = None
    model_wrapped: Any = None
    optimizer: Any = None
    _teacher: Any = None
    _frozen: Any = None
    _is_vlm = False

    @property
    def model(self) -> Any:
        """The policy in memory; setting None drops it."""
        return self.policies.model

    @model.setter
    def model(self, model: None) -> None:
        assert model is None
        self.policies.drop()

    @property
    def state(self) -> Any:
        """Steps and log of all rounds, as transformers' state."""
        return self.log.state

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all rounds; without `max_steps` it is guessed from one pair (or label) for each prompt."""
        return self.loop.rounds * (schedule_of(self.args, len(self.splits[0])).steps or 0)

    def _engine(self) -> None:
        """All weights are whole here: the loop runs in one process."""

    def add_callback(self, callback: TrainerCallback) -> None:
        """For every round's trainer, with steps counted on from round to round."""
        self.log.callbacks.append(callback)

    def remove_callback(self, callback: Any) -> None:
        """Nothing is shown but by callbacks that were added."""

    def save_model(self, folder: str) -> None:
        """The kept policy and its tokenizer."""
        self.policies.write(folder)

    def end(self) -> None:
        """Nothing is open."""
