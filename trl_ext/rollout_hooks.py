"""The rollout side of the GRPO trainer: prompts, rewards, groups and streams, right after TRL has scored them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from trl_ext import kept_rows, whole_groups
from trl_ext.base import MethodTrainer
from trl_ext.batch import images_of, loss_mask_of, replaced, whole
from trl_ext.forward import watched_hidden, weights_of
from trl_ext.hidden_prompt import attending, image_tokens, without
from trl_ext.method import REF_LOGPS, REFERENCE, Chosen, Draw, Group, Rollout, RunShape, Unavailable
from trl_ext.revision import Prompts


@dataclass(frozen=True)
class Scored:
    """What reward functions saw and gave: local rows, and rewards (world * rows, F) before and after shaping."""

    rows: Sequence[dict[str, Any]]
    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[list[int]]
    rewards: Tensor
    shaped: Tensor


class RolloutHooks(MethodTrainer):
    """Mixin in front of TRL's GRPOTrainer. Groups are whole only here: TRL shuffles rows before the loss."""

    _scored: Scored | None = None
    _prompts: Prompts | None = None
    _watching: bool = False
    _sampled: dict[str, Tensor] = {}

    # Set by TRL's trainer
    _logs: dict[str, Any]
    _tokenizer: Any
    _tokenize_prompts: Any
    _generate_single_turn: Any
    _other: Any
    eos_token_ids: list[int]
    generation_config: Any
    generation_kwargs: dict[str, Any]
    reward_func_names: list[str]
    reward_weights: Tensor
    train_dataset: Any
    use_vllm: bool
    vllm_generation: Any

    @functools.cached_property
    def decode_one(self) -> Callable[[int], str]:
        """Text of one token id, remembered: rollouts ask for the same few thousand ids over and over."""
        return functools.cache(lambda token: self._tokenizer.decode([token], skip_special_tokens=True))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.plan.methods and self.model.training):
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        rows, drawn = self._chosen(inputs)
        for method in self.plan.using("edit_prompts"):
            rows = method.edit_prompts(rows)
        asked = Prompts(list(rows), drawn)
        watching = bool(self.plan.using("sampled")) and self._keeps_old_logps()
        with replaced(self, _watching=watching, _sampled={}, _prompts=asked):
            batch = super()._generate_and_score_completions(asked.rows)  # type: ignore[misc]
            batch |= self._sampled
        if asked.before is not None:
            self._show_rewards(asked.before)
        assert not self.plan.using("sampled") or watching == ("old_per_token_logps" in batch)  # as TRL 1.16 decides
        scored, self._scored = self._scored, None
        assert scored is not None  # TRL always calls _calculate_rewards
        if REF_LOGPS in self.plan.needs() and "ref_per_token_logps" not in batch:
            batch["ref_per_token_logps"] = self._reference_logps(batch)
        rollout = self._rollout(batch, scored) if self.plan.using("measure", "streams", "keep_rows") else None
        if self.plan.on_groups:
            self._use_groups(batch, scored, self._measured(rollout), asked)
        if rollout is not None:
            rollout = dataclasses.replace(rollout, advantages=batch["advantages"])
            self._add_streams(batch, rollout)
            batch = self._without_dropped(batch, rollout)
        if self.plan.using("coupled"):
            rank, size = self.accelerator.process_index, self.args.num_generations
            step, device = self.state.global_step, self.accelerator.device
            batch |= whole_groups.marks(len(scored.rows), rank, size, step, device)
        return batch

    def _chosen(self, inputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The rows of this rollout and, if a method drew them instead of the data loader, where they stand (P,)."""
        if not self.plan.using("choose_prompts"):
            return inputs, None
        group, rank = self.args.num_generations, self.accelerator.process_index
        rows, drawn = self._draw(len(inputs) * self.accelerator.num_processes // group, None)
        if rows is None:
            return inputs, None
        places = range(rank * len(inputs), (rank + 1) * len(inputs))
        return [dict(rows[place // group]) for place in places], drawn

    def _draw(self, count: int, number: int | None) -> tuple[Any, Tensor | None]:
        """`count` rows from the method that draws prompts, and where they stand. Without one: None, or, with a `number`,
        rows drawn uniformly from the run's seed and that number."""
        size = len(self.train_dataset)
        for method in self.plan.using("choose_prompts"):
            draw = Draw(
                count,
                size,
                self.args.seed,
                self.state.global_step,
                self._metrics_store(),
                self._row,
                folder=self.args.output_dir,
                on_main=self._on_main,
            )
            drawn = method.choose_prompts(draw.for_method(method.name))
            if isinstance(drawn, Tensor):
                if drawn.shape != (count,) or drawn.unique().numel() != count:
                    raise ValueError(f"{method.name}: drew {tuple(drawn.shape)} rows, not {count} different ones")
                return [self._row(i) for i in drawn.tolist()], drawn.clone()
            if drawn is not None:
                rows = drawn.rows if isinstance(drawn, Chosen) else drawn
                if len(rows) != count:
                    raise ValueError(f"{method.name}: gave {len(rows)} rows, not {count}")
                return list(rows), drawn.numbers.clone() if isinstance(drawn, Chosen) else None
        if number is None:
            return None, None
        chosen = random.Random(f"{self.args.seed}/{number}").sample(range(size), count)
        return [self._row(i) for i in chosen], None

    def _on_main(self, make: Callable[[], Any]) -> Any:
        """What `make()` gives on the main process, on all of them; what it raises, too, as the others would wait."""
        value: Any = None
        raised: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                value = make()
            except Exception as error:  # any: the other processes must hear of it before it is raised
                raised = error
        told = None if raised is None else (isinstance(raised, Unavailable), f"on the main process: {raised}")
        value, problem = broadcast_object_list([value, told])
        if raised is not None:
            raise raised
        if problem is not None:
            outside, text = problem
            raise Unavailable(text) if outside else RuntimeError(text)
        return value

    def _row(self, index: int) -> dict[str, Any]:
        return dict(self.train_dataset[index])

    def _show_rewards(self, rewards: Tensor) -> None:
        """TRL's latest reward metrics say what came without help: rewards (world * rows, F)."""
        logged = self._metrics["train"]
        for i, name in enumerate(self.reward_func_names):
            logged[f"rewards/{name}/mean"][-1] = rewards[:, i].nanmean().item()
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        logged["reward"][-1] = total[~rewards.isnan().all(1)].mean().item()

    def _keeps_old_logps(self) -> bool:
        """Whether TRL's scoring begins with a forward for the old log-probs."""
        window = self.args.steps_per_generation * self.args.num_iterations
        corrected = self.use_vllm and self.args.vllm_importance_sampling_correction
        return self.args.gradient_accumulation_steps % window != 0 or corrected

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        forward = functools.partial(super()._get_per_token_logps_and_entropies, model, input_ids, attention_mask)  # type: ignore[misc]
        if not self._watching:
            return forward(logits_to_keep, *args, **kwargs)
        self._watching = False  # what follows in the same rollout is the reference
        blocks: list[dict[str, Tensor]] = []
        rows = iter(zip(input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:], strict=True))

        def see(hidden: Tensor) -> None:
            ids, mask = (torch.stack(part) for part in zip(*itertools.islice(rows, hidden.size(0)), strict=True))
            policy = self._policy_features(hidden)
            blocks.append(
                {
                    f"{method.name}/{key}": value
                    for method in self.plan.using("sampled")
                    for key, value in method.sampled(policy, ids, mask).items()
                }
            )

        with watched_hidden(self._unwrapped(), logits_to_keep, see):
            result = forward(logits_to_keep, *args, **kwargs)
        self._sampled = {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}
        return result

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        if not (self.plan.methods and self.model.training):
            return rewards
        self._scored = Scored(inputs, prompts, completions, completion_ids_list, rewards, rewards)
        if not self.plan.using("shape_rewards"):
            return rewards
        group = self._group(self._scored, torch.zeros_like(rewards[:, 0]))
        for i, name in enumerate(self.reward_func_names):
            group.metrics.mean(f"rewards/{name}/unshaped", rewards[:, i].nan_to_num(), ~rewards[:, i].isnan())
        shaped: Tensor = self.plan.fold("shape_rewards", group.rewards, group).flatten(0, 1)
        self._scored = dataclasses.replace(self._scored, shaped=shaped)
        return shaped

    def _group(self, scored: Scored, advantages: Tensor) -> Group:
        """`advantages` (world * rows,) -> the view in whole groups; lengths are gathered once."""
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)  # TRL counts padding as an end too
        device = scored.rewards.device
        local = [
            [len(ids), int(not ids or ids[-1] not in ends), *_tools_used(completion), _number_of(prompt)]
            for ids, completion, prompt in zip(scored.completion_ids, scored.completions, scored.prompts, strict=True)
        ]
        gathered = self.accelerator.gather(torch.tensor(local, device=device))
        lengths, cut, calls, turns, questions = gathered.view(-1, self.args.num_generations, 5).unbind(-1)
        size = self.args.num_generations
        return Group(
            rewards=scored.shaped.view(-1, size, len(self.reward_func_names)),
            outcomes=scored.rewards.view(-1, size, len(self.reward_func_names)),
            advantages=advantages.view(-1, size),
            lengths=lengths,
            truncated=cut.bool(),
            tool_calls=calls,
            tool_turns=turns,
            questions=questions.mode(1).values,  # a completion of a second attempt may have another prompt
            reward_names=self.reward_func_names,
            step=self.state.global_step,
            run=self._run_shape(),
            metrics=self._metrics_store(),
            reward_weights=self.reward_weights.to(device),
            seed=self.args.seed,
        )

    def _measured(self, rollout: Rollout | None) -> dict[str, Tensor]:
        """What the methods' `measure` returned, of all processes (P, G)."""
        found: dict[str, Tensor] = {}
        for method in self.plan.using("measure"):
            assert rollout is not None
            for key, value in method.measure(rollout.for_method(method.name)).items():
                if value.shape != (len(rollout.rows),):
                    raise ValueError(f"{method.name}: measured '{key}' is {tuple(value.shape)}, not one value per row")
                found[f"{method.name}/{key}"] = self.accelerator.gather(value).view(-1, self.args.num_generations)
        return found

    def _use_groups(self, batch: dict[str, Any], scored: Scored, measured: dict[str, Tensor], asked: Prompts) -> None:
        group = self._group(scored, self.accelerator.gather(batch["advantages"]))
        group = dataclasses.replace(group, measured=measured, drawn=asked.drawn)
        if asked.unhelped is not None:
            group = dataclasses.replace(group, outcomes=asked.unhelped)
        if asked.discarded:
            places, rewards = zip(*asked.discarded, strict=True)
            group = dataclasses.replace(
                group, discarded_drawn=torch.tensor(places), discarded_rewards=torch.stack(rewards)
            )
        advantages = self.plan.fold("group_advantages", group.advantages, group)
        if advantages is not group.advantages:
            rows = len(scored.rows)
            everyone = advantages.flatten()
            batch["advantages"] = everyone[self.accelerator.process_index * rows :][:rows]
            shown: Any = self._logs["advantages"]  # the completions table holds TRL's values for these rows
            for _ in range(everyone.numel()):
                shown.pop()
            shown.extend(everyone.tolist())
        for method in self.plan.using("observe"):
            method.observe(group.for_method(method.name))

    def _run_shape(self) -> RunShape:
        served = self.args.steps_per_generation * self.args.num_iterations
        return RunShape(
            max_steps=self.state.max_steps,
            num_generations=self.args.num_generations,
            steps_per_rollout=served / self.args.gradient_accumulation_steps,
        )

    def _without_dropped(self, batch: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
        """The batch without the rows that a method drops, as far as equal shapes allow; see `trl_ext.kept_rows`."""
        found = [m.keep_rows(rollout.for_method(m.name)) for m in self.plan.using("keep_rows")]
        wanted = [keep for keep in found if keep is not None]
        if not wanted:
            return batch
        keep = torch.stack(wanted).all(0)
        counts = self.accelerator.gather(keep.sum().view(1)).tolist()
        room = kept_rows.room_for(max(counts), self.args.steps_per_generation)
        rollout.metrics.mean("rows_forwarded", room / keep.numel())
        batch = kept_rows.without(batch, keep, room)
        batch["num_items_in_batch"] = self.accelerator.gather(loss_mask_of(batch).sum()).sum()
        batch[kept_rows.SCALE] = torch.tensor(room * len(counts) / max(1, sum(counts)))
        return batch

    def _add_streams(self, batch: dict[str, Any], rollout: Rollout) -> None:
        for method in self.plan.using("streams"):
            for key, value in method.streams(rollout.for_method(method.name)).items():
                if value.size(0) != len(rollout.rows):
                    raise ValueError(
                        f"{method.name}: stream '{key}' has {value.size(0)} rows, not {len(rollout.rows)}"
                    )
                batch[f"{method.name}/{key}"] = value

    def _rollout(self, batch: dict[str, Any], scored: Scored) -> Rollout:
        rows, start = len(scored.rows), self.accelerator.process_index * len(scored.rows)
        return Rollout(
            rows=scored.rows,
            prompts=scored.prompts,
            completions=self._tokenizer.batch_decode(scored.completion_ids, skip_special_tokens=True),
            completion_ids=batch["completion_ids"],
            mask=loss_mask_of(batch),
            rewards=scored.rewards[start : start + rows],
            advantages=batch["advantages"],
            reward_names=self.reward_func_names,
            step=self.state.global_step,
            run=self._run_shape(),
            pad_token_id=self._tokenizer.pad_token_id,
            metrics=self._metrics_store(),
            decode_one=self.decode_one,
            encode_prompts=lambda prompts: self._tokenize_prompts(list(prompts))[0],
            generate=self._answer,
            entropies=lambda: self._entropies(batch),
            gather=self._gather_values,
            other=functools.partial(self._other, batch),
            micro_batch=self.args.per_device_train_batch_size,
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"],
            images=image_tokens(batch["prompt_ids"], self.model.config) > 0,
            decode=lambda ids: self._tokenizer.decode(list(ids), skip_special_tokens=True),
            blind_logps=lambda hide: self._blind_logps(batch, hide),
            ref_logps=lambda: batch["ref_per_token_logps"],
            old_logps=batch.get("old_per_token_logps"),
            sampled={key: batch[key] for key in self._sampled_keys(batch)},
        )

    def _sampled_keys(self, batch: dict[str, Any]) -> list[str]:
        names = tuple(f"{method.name}/" for method in self.plan.using("sampled"))
        return [key for key in batch if key.startswith(names)] if names else []

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor:
        """(rows, T) of the sampled tokens under the reference, which TRL does not ask for without `beta`."""
        ids, mask = whole(batch)
        size = self.args.per_device_train_batch_size
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            weights_of(REFERENCE, self._unwrapped(), self._reference),
        ):
            logps, _, _ = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                self.model, ids, mask, batch["completion_ids"].size(1), size, **images_of(batch)
            )
        return logps

    def _blind_logps(self, batch: dict[str, Any], hide: Tensor) -> Tensor:
        ids, mask = whole(batch)
        size = self.args.per_device_train_batch_size
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            attending(self._unwrapped(), without(mask, hide).split(size)),
        ):
            logps, _, _ = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                self.model, ids, mask, batch["completion_ids"].size(1), size, **images_of(batch)
            )
        return logps

    def _entropies(self, batch: dict[str, Any]) -> Tensor:
        ids, mask = whole(batch)
        size = self.args.per_device_train_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            _, entropies, _ = super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                self.model, ids, mask, batch["completion_ids"].size(1), size, compute_entropy=True, **images_of(batch)
            )
        return entropies

    def _answer(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]:
        """Greedy answers of the current policy, thinking off, through TRL's own generation."""
        ids = [
            self._tokenizer.apply_chat_template(
                p, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
            )
            for p in prompts
        ]
        with self._greedy(max_new_tokens):
            completion_ids, _ = self._generate_single_turn(ids, None, {}, num_generations=1)
        return self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)

    def _greedy(self, max_new_tokens: int) -> contextlib.AbstractContextManager[None]:
        """TRL's generation, answering greedily inside the block."""
        if self.use_vllm:
            return replaced(self.vllm_generation, max_completion_length=max_new_tokens, temperature=0.0)
        sampling = dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))  # would only draw warnings
        greedy = {**self.generation_kwargs, **sampling, "max_new_tokens": max_new_tokens, "do_sample": False}
        config = type(self.generation_config)(**greedy, disable_compile=True)
        return replaced(self, generation_config=config, generation_kwargs=greedy)


def _tools_used(completion: Any) -> tuple[int, int]:
    """How many tools a completion called, and in how many of its turns."""
    if isinstance(completion, str):
        return 0, 0
    calls = [len(turn.get("tool_calls") or ()) for turn in completion if turn["role"] == "assistant"]
    return sum(calls), sum(map(bool, calls))


def _number_of(prompt: Any) -> int:
    """62 bits of a hash of a prompt: its text, and its images' pixels."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=_content)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2


def _content(value: Any) -> str:
    """What stands for something that is no text: the hash of its bytes if it has any, else its class."""
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else type(value).__name__
