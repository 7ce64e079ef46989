"""One evaluation from start to end: data, one loaded model, replies into the store, a session file for the grading."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState

from evals import environment, models
from evals.data.build import fingerprint
from evals.generation.collect import Prompts, collect, fitted, prompts_of
from evals.generation.hf import Generator
from evals.generation.noise import SCHEME
from evals.generation.store import Store, digest, text_hash
from evals.result import Skipped, Subject
from evals.runs import Plan
from evals.session import Asked, Session
from evals.settings import Settings, SettingsError, sampling_for
from evals.task import DataError, Item, Sampling, Source, Task
from evals.tasks import TASKS
from evals.training_data import overlaps
from trl_ext.rewards import make_reward

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "math-verify", "jsonschema-rs", "trl_ext")
BASE = "base"
OPEN_THOUGHT = "<think>"
"""Some chat templates open the thought in the prompt: a reply that ends before it closes has no answer."""


def processes() -> PartialState:
    """The processes that share the work. accelerate counts several on a CPU only when it is told that there is no GPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


class Engine(Protocol):
    """A base in memory with its adapters (`models.Loaded`, or the same in vLLM)."""

    spec: models.BaseSpec
    identity: dict[str, str]

    @property
    def dtype(self) -> str: ...

    @property
    def ends(self) -> list[int]: ...

    def answering(
        self, adapter: models.Adapter | None, batch_size: int, constraint: Any = None
    ) -> contextlib.AbstractContextManager[Generator]: ...

    def activity(self, adapter: models.Adapter, prompts: Sequence[str]) -> models.Activity: ...


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """One CPU thread where wanted: the sandbox's model is too small to share, and several wait for each other."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Ready:
    """A task whose data is here: its items, of at most `limit` questions, and their fingerprint."""

    task: Task
    items: list[Item]
    source: Source
    fingerprint: str
    sampling: Sampling
    notes: list[str] = field(default_factory=list)


def check_settings(settings: Settings) -> None:
    """What would otherwise be found out after hours of generation. Raises SettingsError with all problems."""
    names = {task.name for task in settings.tasks}
    problems = [
        f"--targets {t} is not among the tasks {', '.join(sorted(names))}" for t in settings.targets if t not in names
    ]
    if settings.batch_size < 1:
        problems.append(f"--batch-size {settings.batch_size} must be at least 1")
    if settings.limit is not None and settings.limit < 2:
        problems.append(f"--limit {settings.limit}: an interval needs at least 2 questions")
    if settings.control and not any(task.schema for task in settings.tasks):
        problems.append("--control is for structured tasks, and none of these is one")
    if settings.control and settings.backend != "hf":
        problems.append("--control runs on transformers: --backend hf")
    if settings.judge is not None:
        try:
            make_reward(settings.judge)
        except ValueError as error:
            problems.append(f"--judge: {error}")
    if problems:
        raise SettingsError("\n".join(problems))


def ready_tasks(settings: Settings) -> tuple[list[Ready], list[Skipped]]:
    """The tasks with their items; those whose data cannot be had are skipped, replaced or refused as `missing` says.

    A stand-in is asked once, whoever needs it. Raises DataError when no task is left, with what to do for each, and
    SettingsError for settings that make no sense.
    """
    check_settings(settings)
    found: list[Ready] = []
    skipped: list[Skipped] = []
    for task in settings.tasks:
        try:
            found.append(_ready(task, settings))
        except DataError as error:
            if settings.missing == "fail":
                raise
            skipped.append(Skipped(task.name, str(error)))
            stand_in = TASKS.get(task.stand_in or "")
            asked = {*(one.task.name for one in found), *(one.name for one in settings.tasks)}
            if settings.missing == "stand-in" and stand_in is not None and stand_in.name not in asked:
                note = (
                    f"asked instead of {task.name}, whose data cannot be had; it says nothing about {task.name} itself"
                )
                found.append(_ready(stand_in, settings, [note]))
    if not found:
        raise DataError("no task can be run.\n" + "\n".join(f"  {s.name}: {s.reason}" for s in skipped))
    return found, skipped


def _ready(task: Task, settings: Settings, notes: Sequence[str] = ()) -> Ready:
    source = Source(settings.folder_for(task), settings.limit_for(task), settings.seed)
    items = task.load(source)
    if len({item.question for item in items}) < 2:
        raise DataError(f"{task.name} has fewer than 2 questions here, too few for an interval")
    return Ready(task, items, source, fingerprint(items), sampling_for(task, settings), list(notes))


@dataclass
class Evaluation:
    """One evaluation. `advance(replies, of)` draws the progress; `go` does everything up to the grading."""

    plan: Plan
    settings: Settings
    ready: list[Ready]
    skipped: list[Skipped]
    advance: Callable[[int, int], None]
    notes: list[str] = field(default_factory=list)
    abouts: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    controls: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    constraints: dict[str, Any] = field(default_factory=dict)

    def go(self) -> Session:
        """Asks every subject every task. Raises ModelError, DataError, StoreError or ValueError."""
        self.state = processes()
        self.tokenizer = models.load_tokenizer(self.plan.tokenizer, self.plan.base)
        self._note_templates()
        self.prompts = self._fitting_prompts()
        self._note_overlaps()
        self._prepare_control()
        with one_thread(self.plan.sandbox):
            subjects = self._ask_base_and_adapters()
            for name, spec in self.plan.others:
                gc.collect()
                torch.cuda.empty_cache()
                subjects.append(self._ask_whole(name, spec, subjects[0].dtype))
        tasks = tuple(
            Asked(
                task=r.task.name,
                source=r.source,
                fingerprint=r.fingerprint,
                sampling=r.sampling,
                prompts={item: text_hash(text) for item, text in self.prompts[r.task.name].texts.items()},
                thinking=any(t.rstrip().endswith(OPEN_THOUGHT) for t in self.prompts[r.task.name].texts.values()),
                abouts=tuple(self.abouts[r.task.name]),
                control=self.controls.get(r.task.name),
                controlled=tuple(self.constraints[r.task.name].texts) if r.task.name in self.constraints else (),
                notes=tuple(r.notes),
            )
            for r in self.ready
        )
        return Session(
            tuple(subjects),
            tasks,
            self.settings.store,
            self._environment(),
            tuple(self.skipped),
            self._targets(),
            self.settings.judge,
            self.plan.repeats,
            self.settings.looks,
            tuple(self.notes),
        )

    def _targets(self) -> tuple[str, ...]:
        """The targets, with what was asked in place of one whose data could not be had."""
        asked = {ready.task.name for ready in self.ready}
        chosen = [TASKS[name] for name in self.settings.targets]
        return tuple(t.stand_in if t.name not in asked and t.stand_in in asked else t.name for t in chosen)

    def _note_templates(self) -> None:
        """Base and candidates get the same prompts; an adapter that came with another template is pointed out."""
        for adapter in self.plan.adapters:
            template = models.own_template(adapter.folder)
            if template is not None and template != self.tokenizer.chat_template:
                self.notes.append(
                    f"{adapter.name} was saved with another chat template than the one used here for all subjects; "
                    "to use its own, name the adapter's folder with --tokenizer"
                )

    def _note_overlaps(self) -> None:
        """What the runs' own training data shares with the questions."""
        found = overlaps(self.plan.runs, {ready.task.name: ready.items for ready in self.ready})
        self.ready = [replace(ready, notes=[*ready.notes, *found[ready.task.name]]) for ready in self.ready]

    def _fitting_prompts(self) -> dict[str, Prompts]:
        """The prompts of the tasks that fit the model's context; the others are skipped."""
        from transformers import AutoConfig

        base = self.plan.base
        config = AutoConfig.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        found: dict[str, Prompts] = {}
        fitting: list[Ready] = []
        for ready in self.ready:
            try:
                prompts = prompts_of(ready.items, self.tokenizer, self.plan.template_settings)
                sampling, note = fitted(ready.task.name, ready.sampling, prompts.longest, context)
            except DataError as error:
                if self.settings.missing == "fail":
                    raise
                self.skipped.append(Skipped(ready.task.name, str(error)))
                continue
            found[ready.task.name] = prompts
            fitting.append(replace(ready, sampling=sampling, notes=ready.notes + ([note] if note else [])))
        if not fitting:
            raise DataError("no task can be asked.\n" + "\n".join(f"  {s.name}: {s.reason}" for s in self.skipped))
        self.ready = fitting
        return found

    def _ask_base_and_adapters(self) -> list[Subject]:
        """On one loaded model; what is loaded here is freed when this returns."""
        loaded = self._load(self.plan.base, self.plan.adapters)
        for adapter in self.plan.adapters:
            self._check_active(loaded, adapter)
        return [self._ask_all(BASE, loaded, None), *(self._ask_all(a.name, loaded, a) for a in self.plan.adapters)]

    def _ask_whole(self, name: str, spec: models.BaseSpec, dtype: str) -> Subject:
        """A whole model. Raises ModelError when it reads other tokens, or computes in another precision, than the base."""
        if models.load_tokenizer(spec.model, spec).get_vocab() != self.tokenizer.get_vocab():
            raise models.ModelError(
                f"{name} has another vocabulary than {self.plan.tokenizer}, so the two cannot get the same prompts here; "
                "evaluate each with --model, and compare the two reports"
            )
        loaded = self._load(spec, ())
        if loaded.dtype != dtype:
            raise models.ModelError(f"{name} computes in {loaded.dtype}, the base in {dtype}: name one with --dtype")
        return self._ask_all(name, loaded, None)

    def _load(self, spec: models.BaseSpec, adapters: Sequence[models.Adapter]) -> Engine:
        if self.settings.backend == "vllm":
            from evals.generation.vllm import load

            return load(spec, self.tokenizer, adapters)
        return models.load(spec, self.tokenizer, adapters, self.state.device)

    def _check_active(self, loaded: Engine, adapter: models.Adapter) -> None:
        """Refuses an adapter that changes no logit of the probes, before the first token is drawn."""
        texts = list(next(iter(self.prompts.values())).texts.values())
        found = loaded.activity(adapter, texts)
        if found.largest == 0 and not self.settings.allow_inactive:
            raise models.ModelError(
                f"the adapter {adapter.name} changes nothing: on {min(len(texts), models.PROBES)} prompts every logit is "
                "the base's. It was not trained, not saved, or does not fit this base; --allow-inactive evaluates it."
            )
        if found.largest == 0:
            self.notes.append(f"{adapter.name} changes nothing: every logit of the probes is the base's.")
            return
        self.notes.append(
            f"{adapter.name} is active: mean KL {found.kl:.3g} nats, largest logit change {found.largest:.3g}"
        )

    def _subject(self, name: str, loaded: Engine, adapter: models.Adapter | None) -> Subject:
        spec, identity = loaded.spec, loaded.identity
        quantization = None if spec.quantization is None else digest(spec.quantization)[:8]
        weights = identity["base"] if adapter is None else f"{identity['base']}+{identity[adapter.name]}"
        key = digest([weights, quantization, loaded.dtype, self._template()])
        bits = None if spec.quantization is None else ("4-bit" if spec.quantization.get("load_in_4bit") else "8-bit")
        folder = None if adapter is None else adapter.folder.name
        step = None if adapter is None else adapter.step
        return Subject(name, key, model_name(spec.model), folder, bits, loaded.dtype, step)

    @property
    def _scheme(self) -> str:
        return SCHEME if self.settings.backend == "hf" else f"{self.settings.backend}-seeds"

    def _template(self) -> str:
        return models.template_hash(self.tokenizer, self.plan.template_settings)

    def _ask_all(self, name: str, loaded: Engine, adapter: models.Adapter | None) -> Subject:
        subject = self._subject(name, loaded, adapter)
        for ready in self.ready:
            store = self._store(ready, loaded, adapter, None)
            self.abouts.setdefault(ready.task.name, []).append(store.about)
            with loaded.answering(adapter, self.settings.batch_size) as generator:
                self._ask(store, generator, ready)
            if name == BASE and ready.task.name in self.constraints:
                self._ask_control(ready, loaded)
        return subject

    def _prepare_control(self) -> None:
        """Grammars for the structured tasks, before a model is loaded; items whose schema has none are left out."""
        from evals.generation.control import Grammars

        for ready in self.ready if self.settings.control else ():
            if ready.task.schema is None:
                continue
            grammars = Grammars({item.id: ready.task.schema(item) for item in ready.items})
            if len(grammars.texts) < 2:
                ready.notes.append("No grammar control: llguidance cannot express these schemas.")
                continue
            if grammars.left_out:
                ready.notes.append(
                    f"The grammar control leaves out {len(grammars.left_out)} of {len(ready.items)} prompts, whose schemas "
                    f"llguidance cannot express, for instance {grammars.left_out[0]}."
                )
            self.constraints[ready.task.name] = grammars

    def _ask_control(self, ready: Ready, loaded: Any) -> None:
        from evals.generation.control import NAME, SchemaControl

        grammars = self.constraints[ready.task.name]
        width = loaded.model.get_output_embeddings().weight.shape[0]
        constraint = SchemaControl(self.tokenizer, width, loaded.ends, grammars)
        store = self._store(ready, loaded, None, NAME)
        self.controls[ready.task.name] = store.about
        with loaded.answering(None, self.settings.batch_size, constraint) as generator:
            self._ask(store, generator, ready, grammars.texts)

    def _store(self, ready: Ready, loaded: Engine, adapter: models.Adapter | None, control: str | None) -> Store:
        spec = loaded.spec
        sampling = {k: v for k, v in vars(ready.sampling).items() if k != "samples"}
        about = {
            "task": ready.task.name,
            "task_version": ready.task.version,
            "model": loaded.identity["base"],
            "adapter": None if adapter is None else loaded.identity[adapter.name],
            "quantization": spec.quantization,
            "dtype": loaded.dtype,
            "template_hash": self._template(),
            "tokenizer": models.tokenizer_hash(self.tokenizer),
            "ends": loaded.ends,
            "sampling": sampling,
            "seed_scheme": self._scheme,
            "control": control,
        }
        return Store(self.settings.store, about, self.state.process_index)

    def _ask(self, store: Store, generator: Generator, ready: Ready, only: Container[str] | None = None) -> None:
        texts = self.prompts[ready.task.name].texts
        prompts = texts if only is None else {item: text for item, text in texts.items() if item in only}
        processes = self.state if self.state.num_processes > 1 else None
        collect(store, generator, ready.task.name, prompts, ready.sampling, self._advance, processes)

    def _advance(self, count: int) -> None:
        subjects = 1 + len(self.plan.names)
        total = sum(len(r.items) * r.sampling.samples * subjects for r in self.ready)
        controls = {r.task.name: r.sampling.samples for r in self.ready}
        total += sum(len(g.texts) * controls[name] for name, g in self.constraints.items())
        self.advance(count, total)

    def _environment(self) -> dict[str, Any]:
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {
            "python": ".".join(map(str, sys.version_info[:3])),
            "packages": {name: environment.version_of(name) for name in PACKAGES},
            "git": environment.git_state(Path(__file__).resolve().parents[1]),
            "cpu": environment.cpu_name(),
            "gpus": gpus,
            "processes": self.state.num_processes,
            "backend": self.settings.backend,
            "batch_size": self.settings.batch_size,
            "seed": self.settings.seed,
            "seed_scheme": self._scheme,
            "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        }


def model_name(model: str) -> str:
    """A model's name without its place on this machine."""
    return Path(model).name if Path(model).is_dir() else model
