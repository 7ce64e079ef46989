"""PasoDoble (arXiv 2511.11881): the loop of a Proposer and a Solver. One step of the Solver's `train()` is one round.

Online round: the Proposer writes I questions about one knowledge text, the Solver gives J answers to each; pass rates,
gates and diversity make the Proposer's reward (`trl_ext.loops.rules`); unless the round is skipped, the Proposer is
updated on its I texts and the Solver on its answers to the questions that pass the filter. Offline, rounds like this
train the Proposer alone and fill a buffer, in blocks that alternate with rounds in which the Solver answers questions of
the buffer anew. A round that is skipped counts as a step and changes no weight.

Where the card is silent (card: inferred): only questions with an answer are asked, others have p = 0; only questions that
are not empty enter the history; a skipped round adds nothing to the buffer (as in the official code); a Solver round none
of whose questions pass counts as one of its block, which the official code repeats, possibly for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from trl_ext.loops import rules
from trl_ext.loops.rules import Phase, Proposal, TokenSet
from trl_ext.loops.settings import PasoDoble

Batch = dict[str, Any]
Row = dict[str, Any]


class Players(Protocol):
    """What the rules of the game need from the trainers. `questions` is I."""

    questions: int

    def propose(self, row: Row) -> Batch:
        """The Proposer's scored batch of I texts; `Game.judge` is asked for their rewards on the way."""

    def answer(self, questions: Sequence[Proposal]) -> tuple[Batch, Tensor]:
        """The Solver's scored batch of J answers to each question, and the verdicts (n, J), 1 for right."""

    def update_proposer(self, batch: Batch) -> None:
        """One update on what `propose` returned."""

    def kept(self, batch: Batch, keep: Sequence[bool]) -> Batch:
        """The questions of an `answer` batch with `keep` (n,)."""

    def token_ids(self, text: str) -> TokenSet:
        """The set of a text's token ids."""


@dataclass
class Judged:
    """What one Proposer round found, by question (I); `batch` holds the answers to those that were `asked`."""

    proposals: list[Proposal]
    asked: list[int]
    batch: Batch | None
    verdicts: dict[int, list[float]]
    raw: list[float]
    checked: list[float]
    gates: list[list[str]]
    diversity: list[float]
    rewards: list[float]


@dataclass
class State:
    """All that must survive a restart beside weights and optimizers."""

    rounds: int = 0
    history: list[TokenSet] = field(default_factory=list)
    buffer: list[Proposal] = field(default_factory=list)
    next_question: int = 0
    phase: Phase = Phase()

    def saved(self) -> dict[str, Any]:
        """As lists, numbers and text."""
        return {
            "rounds": self.rounds,
            "history": [sorted(ids) for ids in self.history],
            "buffer": [(p.question, p.answer) for p in self.buffer],
            "next_question": self.next_question,
            "phase": asdict(self.phase),
        }

    @classmethod
    def loaded(cls, saved: dict[str, Any]) -> State:
        """What `saved` gave."""
        history = [frozenset(ids) for ids in saved["history"]]
        buffer = [Proposal(*pair) for pair in saved["buffer"]]
        return cls(saved["rounds"], history, buffer, saved["next_question"], Phase(**saved["phase"]))


class Game:
    """Plays rounds. `tell(name, value)` gets the numbers of a round, `write(entries)` its questions and verdicts."""

    def __init__(
        self,
        settings: PasoDoble,
        players: Players,
        tell: Callable[[str, float], None],
        write: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.settings, self.players, self.tell, self.write = settings, players, tell, write
        self.state = State()
        self._judged: Judged | None = None

    def play(self, row: Row) -> Batch | None:
        """One round on a knowledge text (a row with its "prompt"): what trains the Solver, or None if it sits out."""
        offline = self.settings.schedule == "offline"
        if offline and self.state.phase.player == "solver":
            batch, updated = self._solver_round(), False
        else:
            batch, updated = self._proposer_round(row, offline)
        if offline:
            own = self.settings
            self.state.phase = rules.next_phase(self.state.phase, updated, own.proposer_updates, own.solver_rounds)
        self.state.rounds += 1
        return batch

    def judge(self, texts: Sequence[str]) -> list[float]:
        """The Proposer's rewards (I) for its texts: the Solver answers, and the history grows."""
        own = self.settings
        proposals = [rules.PARSERS[own.proposal](text) for text in texts]
        asked = [i for i, proposal in enumerate(proposals) if proposal.complete]
        raw, batch, verdicts = [0.0] * len(texts), None, {}
        if asked:
            batch, found = self.players.answer([proposals[i] for i in asked])
            verdicts = dict(zip(asked, found.tolist(), strict=True))
            for i, row in verdicts.items():
                raw[i] = sum(row) / len(row)
        gates = [rules.failed_gates(proposal, own.answer_check) for proposal in proposals]
        checked = [0.0 if broken else p for p, broken in zip(raw, gates, strict=True)]
        diversity = self._diversity(proposals, remember=any(p > own.tau_low for p in checked))
        rewards = [
            rules.proposer_reward(p, d, own.tau_low, own.tau_div, own.diversity_weight)
            for p, d in zip(checked, diversity, strict=True)
        ]
        self._judged = Judged(proposals, asked, batch, verdicts, raw, checked, gates, diversity, rewards)
        return rewards

    def _diversity(self, proposals: Sequence[Proposal], remember: bool) -> list[float]:
        """Against the history as it was before this round: a question never competes with its own group."""
        own, history = self.settings, self.state.history
        sets = [self.players.token_ids(proposal.question) for proposal in proposals]
        if remember:
            self.state.history = rules.remembered(history, sets, own.history_size)
        return [rules.diversity(ids, history, own.jaccard) for ids in sets]

    def _proposer_round(self, row: Row, offline: bool) -> tuple[Batch | None, bool]:
        """The batch for the Solver, and whether the Proposer was updated."""
        own = self.settings
        proposed = self.players.propose(row)
        found, self._judged = self._judged, None
        assert found is not None  # TRL always asks for rewards
        reason = rules.skipped(found.checked, found.rewards, own.tau_low, own.p_high)
        passes = found.checked if own.filter == "checked" else found.raw
        keep = [reason is None and rules.trains_solver(p, own.tau_low, own.p_high) for p in passes]
        if reason is None and offline:
            self.state.buffer += [p for p, kept in zip(found.proposals, keep, strict=True) if kept]
        self._report(found, keep, reason)
        if reason is not None:
            return None, False
        self.players.update_proposer(proposed)
        if offline:
            return None, True
        assert found.batch is not None  # a round without answers is skipped
        return self.players.kept(found.batch, [keep[i] for i in found.asked]), True

    def _solver_round(self) -> Batch | None:
        own, state = self.settings, self.state
        questions, state.next_question = rules.circular(state.buffer, state.next_question, self.players.questions)
        batch, verdicts = self.players.answer(questions)
        passes = verdicts.double().mean(1).tolist()
        keep = [rules.trains_solver(p, own.tau_low, own.p_high) for p in passes]
        self.tell("buffer_pass_rate", sum(passes) / len(passes))
        self.tell("solver_questions", sum(keep))
        self.tell("skipped", not any(keep))
        self.write(
            [
                {"round": state.rounds, "player": "solver", **asdict(q), "verdicts": v, "pass_rate": p, "kept": k}
                for q, v, p, k in zip(questions, verdicts.tolist(), passes, keep, strict=True)
            ]
        )
        return self.players.kept(batch, keep) if any(keep) else None

    def _report(self, found: Judged, keep: Sequence[bool], reason: str | None) -> None:
        own, count = self.settings, len(found.proposals)
        numbers = {
            "pass_rate": sum(found.checked) / count,
            "pass_rate_raw": sum(found.raw) / count,
            "complete": len(found.asked) / count,
            "gated": sum(map(bool, found.gates)) / count,
            "invalid": sum(p <= own.tau_low for p in found.checked) / count,
            "too_easy": sum(p >= own.p_high for p in found.checked) / count,
            "valid": sum(r > 0 for r in found.rewards) / count,
            "diversity": sum(found.diversity) / count,
            "proposer_reward": sum(found.rewards) / count,
            "solver_questions": sum(keep),
            "skipped": float(reason is not None),
            "history": len(self.state.history),
        } | ({"buffer": len(self.state.buffer)} if own.schedule == "offline" else {})
        for name, value in numbers.items():
            self.tell(name, value)
        self.write(
            [
                {"round": self.state.rounds, "player": "proposer", **asdict(proposal)}
                | {"verdicts": found.verdicts.get(i, []), "pass_rate": found.raw[i], "checked": found.checked[i]}
                | {"gates": found.gates[i], "diversity": found.diversity[i], "reward": found.rewards[i]}
                | {"kept": keep[i], "skipped": reason}
                for i, proposal in enumerate(found.proposals)
            ]
        )
