"""Arithmetic of a training step: matrix products counted by hand, as the floor of what a method may cost."""

from __future__ import annotations

from dataclasses import dataclass

MULTIPLY_ADD = 2  # floating-point operations per multiply-add


@dataclass(frozen=True)
class Shape:
    """A decoder of Qwen3's kind and one micro-batch: B rows of L prompt and T completion tokens."""

    rows: int
    prompt: int
    completion: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def body_weights(self) -> int:
        """Weights of the linear layers of all blocks: q, k, v, o and the gated MLP."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


@dataclass(frozen=True)
class Passes:
    """How often each part of the base step runs, in forwards. Full training on CPU: body 3, head 4.

    A backward pass is one product for the gradient of the input and one for that of the weight, which frozen weights
    do not need; TRL's head projects again in its backward pass; gradient checkpointing runs the body's forward again.
    TRL scores completion tokens alone on a GPU, and every token of the sequence elsewhere.
    """

    frozen: bool = False
    checkpointing: bool = False
    every_token: bool = True

    @property
    def body(self) -> int:
        return 1 + (1 if self.frozen else 2) + int(self.checkpointing)

    @property
    def head(self) -> int:
        return 2 + (1 if self.frozen else 2)

    @property
    def span(self) -> int:
        """Projections of a span token: the student's with its backward, and the teacher's."""
        return 1 + (1 if self.frozen else 2) + 1


def body_flops(shape: Shape, rows: int, length: int) -> float:
    """One forward of the blocks: 2 weights tokens, plus two (length, length) products per head and layer."""
    linear = MULTIPLY_ADD * shape.body_weights * rows * length
    attention = 2 * MULTIPLY_ADD * length**2 * shape.heads * shape.head_dim * shape.layers * rows
    return linear + attention


def head_flops(shape: Shape, tokens: int) -> float:
    """One projection of `tokens` positions to the vocabulary: 2 H V tokens."""
    return MULTIPLY_ADD * shape.hidden * shape.vocab * tokens


def step_flops(shape: Shape, passes: Passes) -> float:
    """Forward and backward of TRL's step without a method."""
    length = shape.prompt + shape.completion
    scored = length - 1 if passes.every_token else shape.completion
    return passes.body * body_flops(shape, shape.rows, length) + passes.head * head_flops(shape, shape.rows * scored)


@dataclass(frozen=True)
class Extra:
    """What a method computes besides TRL's step, without gradient: `forwards` of the blocks over all rows and tokens,
    and projections of all completion tokens to the vocabulary, `heads`; a fraction for a part of the rows.
    """

    forwards: float = 0.0
    heads: float = 0.0


def extra_share(shape: Shape, passes: Passes, extra: Extra) -> float:
    """The extra work over that of TRL's step."""
    forwards = extra.forwards * body_flops(shape, shape.rows, shape.prompt + shape.completion)
    heads = extra.heads * head_flops(shape, shape.rows * shape.completion)
    return (forwards + heads) / step_flops(shape, passes)


def floor_ratio(shape: Shape, passes: Passes, teacher_rows: int, teacher_prompt: int, span_tokens: int) -> float:
    """Step with a teacher over step without: 1 + (teacher forwards of some rows + projections of span tokens) / step."""
    teacher = body_flops(shape, teacher_rows, teacher_prompt + shape.completion)
    return 1 + (teacher + passes.span * head_flops(shape, span_tokens)) / step_flops(shape, passes)
