"""The two trainers of PasoDoble: ours, each with its own methods and optimizer, on one base with one adapter each.

The seam. TRL trains on what `_generate_and_score_completions` returns, so a player is a GRPOTrainer that can be handed
that value: `rollout(rows)` samples and scores rows with TRL's code and trains on nothing; a batch put into `hand` is what
the next update trains on. The Solver's updates are the steps of its own `train()`, one for each round: log, checkpoints,
schedule and resume stay transformers'. The Proposer's update is one pass of transformers' `_run_epoch` over one rollout,
within the Solver's step. A player that sits out has no gradients, and an optimizer leaves such weights and their moments
as they are, bit for bit. A learning-rate schedule counts rounds for the Solver and updates for the Proposer.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trl_ext import kept_rows
from trl_ext.batch import loss_mask_of
from trl_ext.grpo import GRPOTrainer

SOLVER, PROPOSER = "default", "proposer"
"""Names of the adapters. PEFT saves `default` in the folder itself, where the trained model is looked for, and the other
one in a folder of its name."""
Row = dict[str, Any]


@contextlib.contextmanager
def playing(model: Any, adapter: str) -> Iterator[None]:
    """`model` computes with and trains this adapter inside the block, and the one before it afterwards."""
    before = model.active_adapter
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter(before)


class Player(GRPOTrainer):
    """A GRPOTrainer that samples rows on request and trains on the batch that it is handed."""

    hand: dict[str, Any] | None = None
    lr_scheduler: Any
    _found: Tensor | None = None

    def rollout(self, rows: Sequence[Row]) -> tuple[dict[str, Any], Tensor]:
        """TRL's scored batch for `rows` (whole groups), and the rewards (rows, F) as the functions gave them."""
        self.model.train()  # TRL samples for training or for evaluation by this
        batch = super()._generate_and_score_completions([dict(row) for row in rows])
        assert self._found is not None  # TRL always calls _calculate_rewards
        return batch, self._found

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        batch, self.hand = self.hand, None
        assert batch is not None, "a player trains on what it is handed"
        return batch

    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args)
        self._found = rewards if self._scored is None else self._scored.rewards
        return rewards


def kept(batch: dict[str, Any], keep: Sequence[bool], group: int) -> dict[str, Any]:
    """The groups of `batch` with `keep` (P,), in order; TRL's number of tokens counts them alone."""
    rows = torch.tensor(keep).repeat_interleave(group)
    found = kept_rows.without(batch, rows, int(rows.sum()))
    found["num_items_in_batch"] = loss_mask_of(found).sum()
    return found


class Proposer(Player):
    """Writes questions; `reward(texts)` judges the I texts of one round. What it would log goes to `tell(name, value)`."""

    def __init__(
        self,
        solver: GRPOTrainer,
        reward: Callable[[list[str]], list[float]],
        tell: Callable[[str, float], None],
        questions: int,
        length: int,
        methods: Mapping[str, Any],
    ) -> None:
        def proposer_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
            return reward([c if isinstance(c, str) else c[-1]["content"] for c in completions])

        self.tell = tell
        with playing(solver.model, PROPOSER):
            super().__init__(
                solver.model,
                proposer_reward,
                _proposer_args(solver.args, questions, length, methods),
                train_dataset=solver.train_dataset,
                processing_class=solver.processing_class,
            )
        for shown in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown)

    def start(self, rounds: int) -> None:
        """Optimizer and scheduler for up to `rounds` updates, as transformers makes them at the start of training."""
        with playing(self.model, PROPOSER):
            self._init_training_state(rounds + 1, rounds + 1, 1, None, None)  # one more: it is not told to stop
            self.optimizer = None  # of an earlier `train()`
            self._prepare_for_training(rounds, None, None)
        self._tr_loss = torch.zeros((), device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged, self._initial_global_step = 0.0, 0, 0

    def update(self, batch: dict[str, Any]) -> None:
        """One optimizer step on `batch`, as `rollout` returned it."""
        self.hand = batch
        shared = self.accelerator.gradient_state  # of all trainers in this process
        before, steps = shared.sync_gradients, self.args.gradient_accumulation_steps
        self._run_epoch(
            model=self.model_wrapped,
            epoch=0,
            train_dataloader=[[{}]] * steps,
            steps_in_epoch=steps,
            num_update_steps_per_epoch=1,
            trial=None,
            ignore_keys_for_eval=None,
            start_time=time.time(),
            resume_from_checkpoint=None,
            epochs_trained=0,
            steps_trained_in_current_epoch=0,
        )
        shared._set_sync_gradients(before)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's and the methods' numbers of one update, handed to `tell`."""
        super().log(logs, start_time)
        for name, value in self.state.log_history.pop().items():
            if name not in ("step", "epoch"):
                self.tell(name, float(value))

    def saved_state(self) -> dict[str, Any]:
        """What its updates depend on, apart from the adapter and the methods' own files."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "updates": self.state.global_step,
            "micro_batches": self._step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `saved_state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.state.global_step = self._globalstep_last_logged = state["updates"]
        self._step = state["micro_batches"]


def _proposer_args(args: Any, questions: int, length: int, methods: Mapping[str, Any]) -> Any:
    """The Solver's configuration with the Proposer's group, length and methods; it logs every update, saves nothing."""
    own = copy.copy(args)
    own.num_generations = own.generation_batch_size = questions
    own.per_device_train_batch_size = questions // args.steps_per_generation
    own.max_completion_length, own.methods = length, dict(methods)
    own.logging_strategy, own.logging_steps = IntervalStrategy.STEPS, 1
    own.save_strategy, own.report_to, own.push_to_hub = SaveStrategy.NO, [], False
    own.model_init_kwargs = None
    own.reward_seconds = None  # its reward is the Solver's answers; what judges those has its own bound
    return own
