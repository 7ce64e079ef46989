"""What both trainers share: the plan, services for methods, their metrics, and their state in checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_ext import checkpoints
from trl_ext.forward import Features, Snapshot, base_model, evaluating, head_of, weights_of
from trl_ext.gradients import GradientWatch
from trl_ext.hidden_prompt import attending
from trl_ext.method import (
    GRADIENT_NOISE,
    REF_LOGPS,
    REFERENCE,
    TEACHER,
    GradientNoise,
    Metrics,
    OptimizerStep,
    Setup,
)
from trl_ext.plan import Plan, make_plan
from trl_ext.quantized import keep_trainable

logger = get_logger(__name__)


class _Steps(TrainerCallback):
    """Around an optimizer step: the teacher before its first micro-batch, the learning rate for the update alone."""

    def __init__(self, trainer: MethodTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._sync_teacher(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._before_update()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_update()


class MethodTrainer:
    """Mixin in front of a TRL trainer. Class-level defaults keep `object.__new__` and plain TRL configs working."""

    plan: Plan = Plan()
    temperature: float = 1.0
    _method_metrics: Metrics | None = None
    _teacher: Snapshot | None = None
    _reference: Snapshot | None = None
    _continues_adapter: bool = False
    _loss_not_finite: Tensor | None = None
    _gradients: GradientWatch | None = None
    _scheduled_rates: list[float] | None = None

    # Set by TRL's trainer
    accelerator: Any
    args: Any
    control: Any
    model: Any
    optimizer: Any
    ref_model: Any
    state: Any
    _metrics: dict[str, Any]
    _run_shape: Any

    def _make_plan(self, trainer: str, args: Any, model: Any = None) -> None:
        """Before the model is loaded: a plan that cannot run fails here. `model` as the user passed it."""
        self._continues_adapter = isinstance(model, torch.nn.Module) and is_peft_model(model)
        self.plan = make_plan(getattr(args, "methods", None), trainer, Setup(args))

    def _start_methods(self, setup: Setup) -> None:
        """After TRL's constructor: checks what only the trainer knows, then sets up what the methods need."""
        self._method_metrics = Metrics()
        self.plan.check(setup)
        keep_trainable(self.model)
        wanted = {REFERENCE, REF_LOGPS} & self.plan.needs()
        if wanted and self.ref_model is None and self._starts_from_trained():
            self._reference = Snapshot(self._unwrapped())
        if GRADIENT_NOISE in self.plan.needs():
            self._gradients = GradientWatch(self.accelerator.num_processes)
        if TEACHER in self.plan.needs() or self.plan.using("observe_gradients", "learning_rate"):
            self.add_callback(_Steps(self))  # type: ignore[attr-defined]

    def _starts_from_trained(self) -> bool:
        """Whether the starting model is in the trained weights alone: in full, or in an adapter that trains on.

        TRL copies such an adapter as "ref" only if `beta` is not 0. A new adapter is switched off instead.
        """
        if not is_peft_model(self.model):
            return True
        return self._continues_adapter and "ref" not in self._unwrapped().peft_config

    def _engine(self) -> str | None:
        """ "fsdp", "zero3" (weights are sharded), "zero" (DeepSpeed's other stages) or None; see `Plan.check`."""
        if getattr(self, "is_fsdp_enabled", False):
            return "fsdp"
        plugin = getattr(self.args, "deepspeed_plugin", None)
        if plugin is None:
            return None
        return "zero3" if plugin.zero_stage == 3 else "zero"

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    # Services

    def _sync_teacher(self, step: int) -> None:
        if any(method.sync_teacher(step, self._run_shape()) for method in self.plan.using("sync_teacher")):
            if self._teacher is None:
                self._teacher = Snapshot(self._unwrapped())
            else:
                self._teacher.refresh()

    def _before_update(self) -> None:
        """Gradient statistics to the methods, then their learning rate for this update."""
        found = self._gradients.result() if self._gradients else None
        if found is not None:
            own, square_of_mean, samples = found
            squares, count = self.accelerator.reduce(own, reduction="sum").tolist()
            noise = GradientNoise(
                squares / count, float(square_of_mean), samples, self.state.global_step, self._metrics_store()
            )
            for method in self.plan.using("observe_gradients"):
                method.observe_gradients(noise.for_method(method.name))
        changing = self.plan.using("learning_rate")
        if changing:
            self._scheduled_rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                for method in changing:
                    group["lr"] = method.learning_rate(float(group["lr"]), self.state.global_step)
            # The trainer logs the scheduler's rate as `learning_rate`
            self._metrics_store().mean("learning_rate_used", float(self.optimizer.param_groups[0]["lr"]))

    def _after_update(self) -> None:
        """The scheduler goes on from its own rates."""
        if self._scheduled_rates is not None:
            for group, rate in zip(self.optimizer.param_groups, self._scheduled_rates, strict=True):
                group["lr"] = rate
            self._scheduled_rates = None

    def _optimizer_step(self) -> OptimizerStep:
        group = self.optimizer.param_groups[0]
        betas = tuple(group["betas"]) if "betas" in group else None
        return OptimizerStep(float(group["lr"]), betas, group.get("eps"))

    def _fp32_head(self) -> bool:
        return bool(getattr(self.args, "cast_lm_head_to_fp32", False))

    def _policy_features(self, hidden: Tensor) -> Features:
        return Features(hidden, head_of(self._unwrapped(), self.temperature, self._fp32_head()))

    def _other_features(
        self,
        which: str,
        ids: Tensor,
        mask: Tensor,
        length: int,
        images: Mapping[str, Any] | None = None,
        attended: Tensor | None = None,
    ) -> Features:
        """Forward of teacher, reference or current policy without gradient: states of the last `length` tokens.

        `images` are the model's own arguments; `attended` replaces `mask` in attention, positions stay those of `mask`.
        """
        model, snapshot = self._unwrapped(), None
        if which == TEACHER:
            if self._teacher is None:  # a checkpoint of `save_only_model` holds none
                logger.warning(
                    f"No teacher snapshot at step {self.state.global_step}: it starts from the current weights"
                )
                self._teacher = Snapshot(model)
            snapshot = self._teacher
        elif which == REFERENCE and self.ref_model is not None:
            model = self.accelerator.unwrap_model(self.ref_model)
        elif which == REFERENCE:
            snapshot = self._reference
        with (
            torch.no_grad(),
            evaluating(model),
            weights_of(which, model, snapshot),
            self.accelerator.autocast(),
            attending(model, None if attended is None else [attended]),
        ):
            backbone: Any = base_model(model).base_model
            inputs = {"input_ids": ids, "attention_mask": mask, **(images or {})}
            hidden = backbone(**inputs, use_cache=False).last_hidden_state
            head = head_of(model, self.temperature, self._fp32_head(), detach=True)
        return Features(hidden[:, :-1][:, -length:], head)

    def _gather_values(self, values: Tensor) -> tuple[Tensor, slice]:
        """(n,) of each process, n may differ -> all of them in rank order, and where this process's are."""
        if self.accelerator.num_processes == 1:
            return values, slice(None)
        sizes = self.accelerator.gather(torch.tensor([values.numel()], device=values.device)).tolist()
        padded = values.new_zeros(max(sizes))
        padded[: values.numel()] = values
        parts = self.accelerator.gather(padded).view(len(sizes), -1)
        start = sum(sizes[: self.accelerator.process_index])
        everyone = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return everyone, slice(start, start + values.numel())

    # Metrics

    def _metrics_store(self) -> Metrics:
        if self._method_metrics is None:
            self._method_metrics = Metrics()
        return self._method_metrics

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's step. Losses that are not finite are counted: `logging_nan_inf_filter` shows an average in their place."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._gradients is not None:
            scaler = getattr(self.accelerator, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._gradients.after_backward(self.model.parameters(), scale)
        bad = (~torch.isfinite(loss.detach())).sum()
        self._loss_not_finite = bad if self._loss_not_finite is None else self._loss_not_finite + bad
        return loss

    def _reduce_metrics(self) -> None:
        """Adds the methods' means over all ranks to TRL's metrics: one collective for all of them."""
        if self._method_metrics is None or not self.model.training:
            return
        totals = self._method_metrics.totals
        names = sorted(set(gather_object(list(totals)))) if self.accelerator.num_processes > 1 else sorted(totals)
        if not names:
            return
        zero = torch.zeros(2)
        stacked = torch.stack([totals.get(name, zero).to(self.accelerator.device) for name in names])
        summed = self.accelerator.reduce(stacked, reduction="sum").tolist()
        for name, (total, weight) in zip(names, summed, strict=True):
            if weight > 0:
                self._metrics["train"][name].append(total / weight)
        totals.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log with the methods' metrics in it."""
        self._reduce_metrics()
        if self._loss_not_finite is not None and int(self._loss_not_finite) > 0:
            logger.warning(
                f"The loss was NaN or infinite in {int(self._loss_not_finite)} micro-batches up to step "
                f"{self.state.global_step}; the logged loss leaves them out. Look at rewards and log-probs, or lower "
                "the learning rate."
            )
        self._loss_not_finite = None
        super().log(logs, start_time)  # type: ignore[misc]

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's train; `True` resumes from the newest whole checkpoint, whose methods must be this run's."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.last_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise checkpoints.CheckpointError(f"nothing to resume: no whole checkpoint in {self.args.output_dir}")
        if isinstance(resume_from_checkpoint, str):
            self._check_same_methods(resume_from_checkpoint)
        for method in self.plan.methods:
            method.start_training()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that was killed after its last step has nothing left to do; transformers would make one step more."""
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _check_same_methods(self, checkpoint: str) -> None:
        path = Path(checkpoint) / checkpoints.METHODS_FILE
        content = checkpoints.load(path) if path.exists() else {"names": [], "states": {}}
        saved, names = content["names"], [method.name for method in self.plan.methods]
        if saved != names:
            raise checkpoints.CheckpointError(
                f"{checkpoint} was trained with methods {saved or 'none'}, this run names {names or 'none'}. Name the "
                "same methods in the same order to resume, or start a new run from its weights (model_name_or_path)."
            )
        for method in self.plan.methods:
            if (problem := method.state_problem(content["states"][method.name])) is not None:
                raise checkpoints.CheckpointError(f"{checkpoint} does not fit this run: {method.name}: {problem}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)  # type: ignore[attr-defined]
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            os.makedirs(folder, exist_ok=True)
            if not self.args.save_only_model:
                self._save_method_files(folder)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except Exception as error:
            if not checkpoints.is_whole(folder):
                raise checkpoints.discard(folder, run_dir, error) from error
            raise

    def _save_method_files(self, folder: str) -> None:
        if self.plan.methods and self.args.should_save:
            content = {
                "names": [m.name for m in self.plan.methods],
                "states": {m.name: m.state for m in self.plan.methods},
                "snapshots": {} if self._teacher is None else {TEACHER: self._teacher.values},
            }
            checkpoints.save(os.path.join(folder, checkpoints.METHODS_FILE), content)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._load_method_files(checkpoint)

    def _load_method_files(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, checkpoints.METHODS_FILE)
        if not self.plan.methods or not os.path.exists(path):
            return
        content = checkpoints.load(path)
        for method in self.plan.methods:
            method.state.clear()
            method.state.update(content["states"][method.name])
        if TEACHER in content["snapshots"]:
            self._teacher = Snapshot(self._unwrapped())
            self._teacher.load(content["snapshots"][TEACHER])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, then a section that names each method, its paper and its settings."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        path = Path(self.args.output_dir) / "README.md"
        if self.plan.methods and self.accelerator.is_main_process and path.exists():
            with path.open("a") as card:
                card.write(methods_section(self.plan, self.args.methods))


def methods_section(plan: Plan, settings: Mapping[str, Any]) -> str:
    """Markdown for a model card: one line for each method with its paper and the settings that deviate."""
    lines = ["", "## Methods", "", "Trained with `trl_ext` and the logic of these papers:", ""]
    for method in plan.methods:
        changed = ", ".join(f"`{key}={value}`" for key, value in settings.get(method.name, {}).items())
        lines.append(
            f"- `{method.name}`: {method.title}, [arXiv {method.paper}](https://arxiv.org/abs/{method.paper})"
            f" ({changed or 'default settings'})"
        )
    return "\n".join(lines) + "\n"
