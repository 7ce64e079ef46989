"""KTOConfig and KTOTrainer: TRL's, with methods for labelled completions. Change one import and name the papers.

TRL runs policy and reference and computes its loss and metrics, through two callables that keep what they return.
Methods then see both as a `LabelInput`. A method's own loss takes the place of TRL's: TRL runs with the weights of both
classes at 0, and as `apo_zero_unpaired`, the one of its losses that needs no forward on mismatched pairs. Without a
method each override hands straight through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from trl_ext.batch import replaced
from trl_ext.compat import check_trl
from trl_ext.grpo import METHODS_HELP
from trl_ext.method import REFERENCE, LabelInput, LabelSet, Method, Metrics, Setup
from trl_ext.plan import Plan, PlanError, did_you_mean, make_plan, normalise
from trl_ext.prompt_embedding import SentenceEncoder, mean_hidden, packed_prompts
from trl_ext.recording import Forwards, RecordingTrainer

check_trl()
LOSS_TYPES = ("kto", "apo_zero_unpaired")
"""TRL's names in `loss_type`."""
WITHOUT_KL = "apo_zero_unpaired"


@dataclass
class KTOConfig(trl.KTOConfig):
    """TRL's KTOConfig with `methods`. Names and values are checked here (PlanError).

    `loss_type` is one of TRL's, or the name of a method of `methods` that brings a loss for labelled completions.
    """

    _VALID_DICT_FIELDS = trl.KTOConfig._VALID_DICT_FIELDS + ["methods"]

    loss_type: str = field(
        default="kto",
        metadata={"help": "`kto`, `apo_zero_unpaired`, or the name of a method under `methods` that brings a loss."},
    )
    methods: dict[str, Any] | str | None = field(default=None, metadata={"help": METHODS_HELP})

    def __post_init__(self) -> None:
        self.methods = normalise(self.methods)
        super().__post_init__()
        check_loss(self, make_plan(self.methods, "kto", Setup(self)))


def check_loss(args: trl.KTOConfig, plan: Plan) -> None:
    """Raises PlanError when `loss_type` and the methods of `plan` do not fit, with every reason."""
    own = [method.name for method in plan.using("label_loss")]
    known, problems = [*LOSS_TYPES, *own], []
    if args.loss_type not in known:
        problems.append(
            f"loss_type: '{args.loss_type}' is neither a loss of TRL nor a method under `methods` that brings one"
            f"{did_you_mean(args.loss_type, known)} (known here: {', '.join(known)})"
        )
    elif len(own) > 1:
        problems.append(f"{' and '.join(own)} each replace the loss: name only one of them")
    elif own and args.loss_type != own[0]:
        problems.append(f"{own[0]}: replaces TRL's loss, so name it: `loss_type: {own[0]}`")
    for method in plan.methods:
        if foreign := sorted(method.needs() - {REFERENCE}):
            problems.append(f"{method.name}: the kto trainer does not provide {', '.join(foreign)}")
    if problems:
        raise PlanError(problems)


class KTOTrainer(RecordingTrainer, trl.KTOTrainer):  # type: ignore[misc]
    """Drop-in for `trl.KTOTrainer`; `args.methods` names the papers. See `trl_ext.method` for what they may add.

    Raises PlanError before the model is loaded when the methods cannot run as configured.
    """

    _tag_names = [*trl.KTOTrainer._tag_names, "trl-ext"]
    _labels_started: bool = False

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        self._make_plan("kto", args, model)
        self._encoders: dict[str, SentenceEncoder] = {}
        if args is None:
            super().__init__(model, ref_model, args, *rest, **kwargs)
        else:
            check_loss(args, self.plan)
            stock = args.loss_type if args.loss_type in LOSS_TYPES else WITHOUT_KL
            with replaced(args, loss_type=stock):
                super().__init__(model, ref_model, args, *rest, **kwargs)
        self._start_methods(Setup(self.args, engine=self._engine()))
        for method in self.plan.methods:
            for path in method.sentence_encoders():
                self._encoders[path] = SentenceEncoder(path, self.accelerator.device, method.name)

    def _own_method(self) -> Method | None:
        """The method whose loss `loss_type` names."""
        return next(iter(self.plan.using("label_loss")), None)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        training, own = self.model.training, self._own_method()
        observing = self.plan.using("observe_labels") if training else ()
        if own is None and not observing:
            return super()._compute_loss(model, inputs, return_outputs)
        if training:
            self._start_labels()
        seen, weights = Forwards(), torch.tensor([self.undesirable_weight, self.desirable_weight])
        off = {} if own is None else {"desirable_weight": 0.0, "undesirable_weight": 0.0}
        with replaced(self, ref_model=self._reference_into(seen, self.ref_model), **off):
            result = super()._compute_loss(self._policy_into(seen, model, inputs), inputs, return_outputs)
            x = self._label_input(seen, inputs, training)
        loss, outputs = result if return_outputs else (result, None)
        if own is not None:
            self._metrics["train" if training else "eval"].pop("kl", None)  # TRL's 0: nothing measured it
            loss = loss + (weights.to(x.logps.device)[x.label.long()] * self._own_loss(own, x)).mean()
        for method in observing:
            method.observe_labels(x.for_method(method.name))
        return (loss, outputs) if return_outputs else loss

    def _own_loss(self, method: Method, x: LabelInput) -> Tensor:
        loss = method.label_loss(x.for_method(method.name))
        if loss is None or loss.shape != x.logps.shape:
            got = None if loss is None else tuple(loss.shape)
            raise ValueError(
                f"{method.name}: label_loss must return one loss per completion, {tuple(x.logps.shape)}, got {got}"
            )
        return loss

    def _label_input(self, seen: Forwards, inputs: dict[str, Any], training: bool) -> LabelInput:
        reference = inputs["ref_logps"] if self.precompute_ref_logps else self._sums(seen.reference, inputs)

        prompt = inputs["attention_mask"] * (1 - inputs["completion_mask"])

        def embed(rows: Tensor, encoder: str | None) -> Tensor:
            ids, mask = packed_prompts(inputs["input_ids"][rows], prompt[rows], self._tokenizer.pad_token_id)
            return self._embedded(ids, mask, encoder)

        return LabelInput(
            logps=self._sums(seen.policy, inputs),
            ref_logps=reference,
            label=inputs["label"].bool(),
            beta=self.beta,
            step=self.state.global_step,
            training=training,
            metrics=(training and self._method_metrics) or Metrics(),  # evaluation leaves no trace in training's
            gather=self._gather_values,
            embed_prompts=embed,
            has_prompt=prompt.any(1),
        )

    def _sums(self, forward: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's sums over a sequence (B,) from a forward that has run; see `DPOTrainer._sums`."""
        return self.compute_ref_log_probs(lambda **kwargs: forward, inputs)[0]

    # Prompts

    def _start_labels(self) -> None:
        """`start_labels` of every method, once, in training, after a checkpoint's state is in place."""
        starting = () if self._labels_started else self.plan.using("start_labels")
        self._labels_started = True
        for method in starting:
            data = self.train_dataset
            if not isinstance(data, Dataset) or "prompt_ids" not in data.column_names:
                raise PlanError(
                    [f"{method.name}: draws prompts from the whole training set: a stream, or images, have none"]
                )
            blocks = data.select_columns("prompt_ids").iter(1000)
            has_prompt = torch.tensor([len(ids) > 0 for block in blocks for ids in block["prompt_ids"]])
            label = torch.tensor(data["label"][:]).bool()
            method.start_labels(LabelSet(label, has_prompt, self.args.seed, self._embed_rows))

    def _embed_rows(self, indices: Tensor, encoder: str | None) -> Tensor:
        """(n,) rows of the training set -> (n, E): each process embeds every W-th of them.

        A process for which no row is left embeds the first one, so that it takes part in the gather.
        """
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        data: Any = self.train_dataset
        shares = [indices[r::processes] for r in range(processes)]
        own = [share if len(share) else indices[:1] for share in shares]
        blocks = own[rank].split(self.args.per_device_train_batch_size)
        found = torch.cat([self._embed_prompts(data[block.tolist()]["prompt_ids"], encoder) for block in blocks])
        everyone = self._gather_values(found.flatten())[0].view(-1, found.size(1))
        out = everyone.new_empty(len(indices), everyone.size(1))
        for r, part in enumerate(everyone.split([len(share) for share in own])):
            out[r::processes] = part[: len(shares[r])]
        return out.cpu()

    def _embed_prompts(self, prompts: list[list[int]], encoder: str | None) -> Tensor:
        ids = pad_sequence(
            [torch.tensor(p) for p in prompts], batch_first=True, padding_value=self._tokenizer.pad_token_id
        )
        mask = pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts], batch_first=True)
        return self._embedded(ids.to(self.accelerator.device), mask.to(self.accelerator.device), encoder)

    def _embedded(self, ids: Tensor, mask: Tensor, encoder: str | None) -> Tensor:
        """Right-padded prompts (n, L) -> (n, E) float32."""
        if encoder is not None:
            texts = [
                self._tokenizer.decode(row[m.bool()], skip_special_tokens=True)
                for row, m in zip(ids, mask, strict=True)
            ]
            return self._encoders[encoder](texts)
        length = ids.size(1)
        # One more place: `_other_features` leaves out the state after the last token, which nothing predicts from
        hidden = self._other_features(REFERENCE, pad(ids, (0, 1)), pad(mask, (0, 1)), length).hidden
        return mean_hidden(hidden, mask)
