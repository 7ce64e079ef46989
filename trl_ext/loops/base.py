"""What every loop says of itself, and the question that is put to it before a run writes anything."""

from __future__ import annotations

from typing import Any, ClassVar


class LoopSettings:
    """Base of what a recipe sets under `loop: {NAME: settings}`. A loop also has `check` and `describe`."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    trainers: ClassVar[tuple[str, ...]]
    """The trainers that it can drive."""
    makes_data: ClassVar[bool] = False
    """Whether the loop makes what the trainer learns from, so that the data set gives prompts and rewards score."""
    in_rounds: ClassVar[bool] = False
    """Whether the trainer is called once a round, so that its schedule is that of one round."""

    def check_begun(self, recipe: Any, model: str, data: Any) -> None:
        """Raises CheckpointError when the run's folder holds data of the loop that other settings made. Writes nothing."""
