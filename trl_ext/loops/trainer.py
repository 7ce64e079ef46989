"""PasoDobleTrainer: the Solver's trainer, which owns the Proposer's and plays one round for each of its steps."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext import checkpoints
from trl_ext.batch import replaced
from trl_ext.last_step import STOPS, LastStep, put_back, remembered
from trl_ext.loops.diary import Diary
from trl_ext.loops.pasodoble import Batch, Game, State
from trl_ext.loops.players import PROPOSER, SOLVER, Player, Proposer, Row, kept, playing
from trl_ext.loops.rules import Proposal, TokenSet
from trl_ext.loops.settings import PasoDoble
from trl_ext.plan import PlanError, normalise
from trl_ext.rewards.checked import checked, unchecked

GAME_FILE = "pasodoble.pt"


class PasoDobleTrainer(Player):
    """`trl_ext.GRPOTrainer` for the Solver; `loop` holds PasoDoble's settings. `train_dataset`: the Proposer's prompts.

    A reward function gets the Proposer's answer as column `answer`; where it returns None, since it cannot read that
    answer, nothing matches it (0). The model needs a `peft_config`, whose shape the Proposer's adapter takes as well.
    What is saved is the Solver's adapter, with the Proposer's in the folder `proposer` beside it.

    Raises PlanError when the settings do not go together.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: Any, *rest: Any, loop: PasoDoble | None = None, **kwargs: Any
    ) -> None:
        self.loop = loop or PasoDoble()
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        names = [getattr(function, "__name__", str(function)) for function in functions]
        problems = self.loop.check(args, names, kwargs.get("peft_config") is not None, bool(kwargs.get("tools")))
        if problems:
            raise PlanError(problems, "PasoDoble cannot run as configured")
        super().__init__(model, [_unread_is_wrong(f) for f in functions], args, *rest, **kwargs)
        self.questions = args.per_device_train_batch_size * args.steps_per_generation // args.num_generations
        _add_proposer(self.model, self.loop.proposer_adapter)
        self.diary = Diary(args.output_dir)
        self.game = Game(self.loop, self, self._tell, self.diary.write)
        self.proposer = Proposer(
            self,
            self.game.judge,
            lambda name, value: self._metrics["train"][f"{PROPOSER}/{name}"].append(value),
            self.questions,
            self.loop.proposer_length or args.max_completion_length,
            normalise(self.loop.proposer_methods),
        )
        self._verifier = names.index(self.loop.verifier) if self.loop.verifier else 0

    # The players, as the game sees them

    def propose(self, row: Row) -> Batch:
        """The Proposer's texts about one knowledge text, scored."""
        with playing(self.model, PROPOSER):
            return self.proposer.rollout([row] * self.questions)[0]

    def answer(self, questions: Sequence[Proposal]) -> tuple[Batch, Tensor]:
        """J answers of the Solver to each question, and whether they are right (n, J)."""
        size = self.args.num_generations
        rows = [self._question(proposal) for proposal in questions for _ in range(size)]
        with playing(self.model, SOLVER):
            batch, rewards = self.rollout(rows)
        return batch, rewards[:, self._verifier].nan_to_num().view(-1, size)

    def _question(self, proposal: Proposal) -> Row:
        text = self.loop.solver_prompt.replace("{question}", proposal.question)
        return {"prompt": [{"role": "user", "content": text}], "answer": proposal.answer}

    def update_proposer(self, batch: Batch) -> None:
        """One update of the Proposer; its numbers are logged as proposer/..."""
        with playing(self.model, PROPOSER):
            self.proposer.update(batch)

    def kept(self, batch: Batch, keep: Sequence[bool]) -> Batch:
        """The groups of some questions."""
        return kept(batch, keep, self.args.num_generations)

    def token_ids(self, text: str) -> TokenSet:
        """The set of a text's token ids."""
        return frozenset(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tell(self, name: str, value: float) -> None:
        self._metrics["train"][f"{self.loop.name}/{name}"].append(float(value))

    # One round for each step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's step on what the round left for the Solver; without that nothing is computed and nothing changes."""
        if self._step % self.args.steps_per_generation == 0:
            self.model.train()
            self.hand = self._played(inputs[0])
            self._sits_out = self.hand is None
        if self._sits_out:
            self._step += 1
            return torch.zeros((), device=self.args.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def _played(self, row: Row) -> Batch | None:
        """One round. A reward that fails in it leaves a checkpoint of the round before: it judges before anyone learns."""
        try:
            return self.game.play(row)
        except STOPS as error:
            self._save_last_step(error)
            raise

    def get_train_dataloader(self) -> Any:
        """One knowledge text for each round: TRL's loader, for which a round is one group."""
        with replaced(self, num_generations=self.args.generation_batch_size):
            return super().get_train_dataloader()

    # State

    def _as_it_is(self) -> LastStep:
        states = {method.name: remembered(method.state) for method in self.proposer.plan.methods}
        return dataclasses.replace(super()._as_it_is(), more=(self.game.state.saved(), states))

    def _put_back(self, last: LastStep) -> None:
        game, states = last.more
        put_back(self.proposer.plan.methods, states)
        super()._put_back(last)
        self.game.state = State.loaded(game)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.proposer.start(max_steps)
        if resume_from_checkpoint is None:
            self.game.state = State()
            self.diary.rewind(0)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _save_method_files(self, folder: str) -> None:
        super()._save_method_files(folder)
        content = {"game": self.game.state.saved(), "proposer": self.proposer.saved_state()}
        checkpoints.save(os.path.join(folder, GAME_FILE), content)
        own = os.path.join(folder, f"{PROPOSER}_methods")
        os.makedirs(own, exist_ok=True)
        self.proposer._save_method_files(own)

    def _load_method_files(self, checkpoint: str) -> None:
        super()._load_method_files(checkpoint)
        content = checkpoints.load(os.path.join(checkpoint, GAME_FILE))
        self.game.state = State.loaded(content["game"])
        own = os.path.join(checkpoint, f"{PROPOSER}_methods")
        self.proposer._check_same_methods(own)
        with playing(self.model, PROPOSER):
            self.proposer.load_state(content["proposer"])
            self.proposer._load_method_files(own)
        self.diary.rewind(self.game.state.rounds)


def _unread_is_wrong(reward: Any) -> Any:
    """The reward function, 0 where it is None: an answer of the Proposer that cannot be read is matched by nothing.

    A reward model and an asynchronous function are left as they are; TRL reads their None as no reward.
    """
    if isinstance(reward, (str, torch.nn.Module)) or inspect.iscoroutinefunction(reward):
        return reward
    judge = unchecked(reward)  # the check belongs on the outside, where None is a verdict

    @functools.wraps(judge)
    def call(**kwargs: Any) -> list[float]:
        return [0.0 if value is None else value for value in judge(**kwargs)]

    return checked(call)


def _add_proposer(model: Any, adapter: str | None) -> None:
    """The Proposer's adapter: a new one of the Solver's shape, or the weights in a folder."""
    if adapter == "sandbox":
        from trl_ext.loops.sandbox import ensure_proposer

        adapter = ensure_proposer()
    if adapter is not None:
        model.load_adapter(adapter, PROPOSER, is_trainable=True)
    else:
        model.add_adapter(PROPOSER, model.peft_config[SOLVER])
    model.set_adapter(SOLVER)
