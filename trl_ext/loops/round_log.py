"""The log of a loop in rounds: every round's trainer counts its steps from 0, the run counts on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_ext.loops.round_files import RoundFolder
from trl_ext.watch import Watch

_SHOWN = {
    "win_rate": "over the round before",
    "win_rate_over_start": "over the start",
    "held_out_score": "score",
    "pairs": "pairs",
    "labels": "labels",
    "length": "length",
}


class RoundLog:
    """Passes the logs of all rounds on to `callbacks`, and adds one entry at the end of each round."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.callbacks: list[TrainerCallback] = []
        self.state = TrainerState(is_local_process_zero=True, is_world_process_zero=True)
        self.reports: list[dict[str, Any]] = []
        self.before = 0
        """Steps of the rounds that are done."""

    def begin(self, folders: Sequence[RoundFolder]) -> None:
        """Starts the callbacks with what finished rounds have logged."""
        for folder in folders:
            if folder.done:
                for entry in folder.read("log"):
                    self._keep(entry)
                self._close_round(folder)
        self.state.max_steps = self.trainer.total_steps
        self._call("on_train_begin")

    def entry(self, entry: dict[str, Any]) -> None:
        """One entry of the round's trainer; its `step` counts from 0."""
        self._call("on_log", logs={k: v for k, v in self._keep(entry).items() if k != "step"})

    def replay(self, folder: RoundFolder) -> None:
        """What a round that was trained before had logged."""
        for entry in folder.read("log"):
            self.entry(entry)

    def step(self, step: int) -> None:
        """A step of the round's trainer."""
        self.state.global_step = self.before + step
        self._call("on_step_end")

    def round_done(self, folder: RoundFolder) -> None:
        """The entry of a round: its numbers as iterative/..., and Nesterov's."""
        self._call("on_log", logs={k: v for k, v in self._close_round(folder).items() if k != "step"})

    def say(self, message: str) -> None:
        """Puts a warning among those of the run."""
        for callback in self.callbacks:
            if isinstance(callback, Watch):
                callback.say(message)

    def end(self) -> None:
        """Ends the callbacks."""
        self._call("on_train_end")

    def words(self, kept: int) -> list[str]:
        """A line for each round, and what it warned of."""
        lines = []
        for report in self.reports:
            numbers = report["numbers"]
            shown = [f"{words} {numbers[key]:.3g}" for key, words in _SHOWN.items() if key in numbers]
            lines.append(f"round {report['round']}: win rate {', '.join(shown)}")
            lines += [f"  {warning}" for warning in report["warnings"]]
        return [*lines, f"saved: the policy of round {kept}"]

    def _keep(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.state.global_step = self.before + entry["step"]
        shifted = {**entry, "step": self.state.global_step}
        self.state.log_history.append(shifted)
        return shifted

    def _close_round(self, folder: RoundFolder) -> dict[str, Any]:
        report = folder.read("report")
        logged = folder.read("log")
        self.before += max(entry["step"] for entry in logged) if logged else 0
        self.reports.append(report)
        numbers = {f"iterative/{key}": value for key, value in {"round": report["round"], **report["numbers"]}.items()}
        numbers |= {f"nesterov/{key}": value for key, value in report["nesterov"].items()}
        for warning in report["warnings"]:
            self.say(f"round {report['round']}: {warning}")
        entry = {"step": self.before, **numbers}
        self.state.global_step = self.before
        self.state.log_history.append(entry)
        return entry

    def _call(self, event: str, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.trainer.args, self.state, TrainerControl(), **kwargs)


class Relay(TrainerCallback):
    """In each round's trainer: tells the run's log."""

    def __init__(self, log: RoundLog) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a checkpoint of this round had logged."""
        for entry in state.log_history:
            self.log.entry(entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One entry, counted on."""
        if logs is not None:
            self.log.entry({**logs, "step": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step, counted on."""
        self.log.step(state.global_step)
