"""One evaluation from start to end: data, one loaded model, replies into the store, a session file for the grading."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState

from evals import environment, models
from evals.data.build import fingerprint
from evals.generation.collect import Prompts, collect, fitted, prompts_of
from evals.generation.hf import Generator, end_ids
from evals.generation.noise import SCHEME
from evals.generation.store import Store, digest, text_hash
from evals.result import Skipped, Subject
from evals.runs import Plan
from evals.session import Asked, Session
from evals.settings import Settings, sampling_for
from evals.task import DataError, Item, Sampling, Source, Task
from evals.tasks import TASKS
from evals.training_data import overlaps

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lm_eval", "math-verify", "jsonschema-rs", "trl_ext")


BASE = "base"


def processes() -> PartialState:
    """The processes that share the work. accelerate counts several on a CPU only when it is told that there is no GPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


class Engine(Protocol):
    """A base in memory with its adapters (`models.Loaded`, or the same in vLLM)."""

    spec: models.BaseSpec
    identity: dict[str, str]

    @property
    def dtype(self) -> str: ...

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
    """A task whose data is here: items of at most `limit` questions, and the fingerprint of all."""

    task: Task
    items: list[Item]
    source: Source
    fingerprint: str
    sampling: Sampling
    notes: list[str] = field(default_factory=list)


def ready_tasks(settings: Settings) -> tuple[list[Ready], list[Skipped]]:
    """The tasks with their items; those whose data cannot be had are skipped, replaced or refused as `missing` says.

    Raises DataError when no task is left, with what to do for each, and ValueError for sampling that makes no sense.
    """
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
            if settings.missing == "stand-in" and stand_in is not None:
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

    def go(self) -> Session:
        """Asks every subject every task. Raises ModelError, DataError, StoreError or ValueError."""
        self.state = processes()
        self.tokenizer = models.load_tokenizer(self.plan.tokenizer, self.plan.base)
        self._note_templates()
        self.prompts = self._fitting_prompts()
        self._note_overlaps()
        with one_thread(self.plan.sandbox):
            subjects = [self._ask_all(*asked) for asked in self._subjects()]
        tasks = tuple(
            Asked(
                r.task.name,
                r.source,
                r.fingerprint,
                r.sampling,
                {item: text_hash(text) for item, text in self.prompts[r.task.name].texts.items()},
                tuple(self.abouts[r.task.name]),
                self.controls.get(r.task.name),
                tuple(r.notes),
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
                    f"to use its own: --tokenizer {adapter.folder.name}"
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

    def _subjects(self) -> Iterator[tuple[Subject, Engine, models.Adapter | None]]:
        """The base and its adapters on one loaded model, then whole models, one in memory at a time."""
        plan = self.plan
        loaded = self._load(plan.base, plan.adapters)
        for adapter in plan.adapters:
            self._check_active(loaded, adapter)
        yield self._subject(BASE, loaded, None), loaded, None
        for adapter in plan.adapters:
            yield self._subject(adapter.name, loaded, adapter), loaded, adapter
        for name, spec in plan.others:
            del loaded
            gc.collect()
            loaded = self._load(spec, ())
            yield self._subject(name, loaded, None), loaded, None

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

    def _template(self) -> str:
        return models.template_hash(self.tokenizer, self.plan.template_settings)

    def _ask_all(self, subject: Subject, loaded: Engine, adapter: models.Adapter | None) -> Subject:
        for ready in self.ready:
            store = self._store(ready, loaded, adapter, None)
            self.abouts.setdefault(ready.task.name, []).append(store.about)
            with loaded.answering(adapter, self.settings.batch_size) as generator:
                self._ask(store, generator, ready)
            if self.settings.control and subject.name == BASE and ready.task.schema is not None:
                self._ask_control(ready, loaded)
        return subject

    def _ask_control(self, ready: Ready, loaded: Any) -> None:
        from evals.generation.control import NAME, SchemaControl

        width = loaded.model.get_output_embeddings().weight.shape[0]
        assert ready.task.schema is not None
        schemas = {item.id: ready.task.schema(item) for item in ready.items}
        constraint = SchemaControl(self.tokenizer, width, end_ids(loaded.model, self.tokenizer), schemas)
        store = self._store(ready, loaded, None, NAME)
        self.controls[ready.task.name] = store.about
        with loaded.answering(None, self.settings.batch_size, constraint) as generator:
            self._ask(store, generator, ready)

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
            "sampling": sampling,
            "seed_scheme": SCHEME if self.settings.backend == "hf" else f"{self.settings.backend}-seeds",
            "control": control,
        }
        return Store(self.settings.store, about, self.state.process_index)

    def _ask(self, store: Store, generator: Generator, ready: Ready) -> None:
        prompts = self.prompts[ready.task.name].texts
        processes = self.state if self.state.num_processes > 1 else None
        collect(store, generator, ready.task.name, prompts, ready.sampling, self._advance, processes)

    def _advance(self, count: int) -> None:
        subjects = 1 + len(self.plan.names)
        total = sum(
            len(r.items) * r.sampling.samples * (subjects + (self.settings.control and r.task.schema is not None))
            for r in self.ready
        )
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
            "seed_scheme": SCHEME,
            "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        }


def model_name(model: str) -> str:
    """A model's name without its place on this machine."""
    return Path(model).name if Path(model).is_dir() else model
