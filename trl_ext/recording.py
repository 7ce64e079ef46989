"""What policy and reference return in one call of TRL's loss, kept for methods: DPO and KTO alike.

TRL's loss gets callables in place of the two models. They run the real forward and keep what came out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trl_ext.base import MethodTrainer
from trl_ext.forward import captured_hidden, weights_of
from trl_ext.method import HIDDEN, REFERENCE


class Forwards:
    """The last fused forward of each model in one call of TRL's loss. KTO's forward on mismatched pairs comes first."""

    policy: Any = None
    reference: Any = None
    hidden: Tensor | None = None


class RecordingTrainer(MethodTrainer):
    """Mixin for trainers that call `model(...)` and `self.ref_model(...)` with TRL's fused head inside their loss."""

    def _policy_into(self, seen: Forwards, model: Any, inputs: dict[str, Any]) -> Any:
        """The policy as TRL calls it; log-probs and, if a method needs them, hidden states are kept in `seen`."""
        wanted = HIDDEN in self.plan.needs()

        def policy(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):  # TRL recomputes the logits for `compute_metrics`
                return model(**kwargs)
            length = inputs["completion_mask"].size(1) - 1
            with captured_hidden(self._unwrapped(), length, wanted) as hidden:
                seen.policy = model(**kwargs)
            seen.hidden = hidden[0] if wanted else None
            return seen.policy

        return policy

    def _reference_into(self, seen: Forwards, ref_model: Any) -> Any:
        """The reference as TRL calls `ref_model`; under PEFT that is the policy with the adapter off, or "ref"."""

        def reference(**kwargs: Any) -> Any:
            if ref_model is not None:
                seen.reference = ref_model(**kwargs)
            else:
                with weights_of(REFERENCE, self._unwrapped(), None):
                    seen.reference = self.model(**kwargs)
            return seen.reference

        return reference
