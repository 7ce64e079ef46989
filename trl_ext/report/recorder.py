"""The run's log, written as it comes, and its progress."""

from __future__ import annotations

import atexit
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trl_ext.plan import Plan
from trl_ext.report import files
from trl_ext.report.progress import LiveBar, PlainLines, headline, time_left


def quiet(trainer: Any) -> None:
    """Switches transformers' own progress printing off; `Recorder` takes its place."""
    trainer.args.disable_tqdm = True
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)


class Recorder(TrainerCallback):
    """Writes every log entry to `log.jsonl` at once, all of them to `log.csv` at the end, and shows progress.

    `log.jsonl` starts with what the trainer already knows: nothing, or on resume the entries of the checkpoint, so
    entries after the resumed step are dropped and every step is there once. A number that is not finite is null there
    and "nan" in the table. `close()` ends the display when training fails.
    """

    def __init__(self, output_dir: str, total_steps: int, plan: Plan, console: Console | None = None) -> None:
        self.folder = Path(output_dir)
        self.total, self.plan = total_steps, plan
        self.console = console or Console()
        self._shown: LiveBar | PlainLines | None = None
        self._started = 0.0
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts or restores the log, and the display. A `total_steps` below 1 leaves the count to the trainer."""
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_text(self.folder / files.LOG, "".join(map(files.log_line, state.log_history)))
        self._started, self._first = time.monotonic(), state.global_step
        total = self.total if self.total > 0 else state.max_steps
        self.close()
        self._shown = (LiveBar if self.console.is_terminal else PlainLines)(self.console, total)
        self._shown.advance(state.global_step, self._left(state.global_step))
        atexit.register(self.close)  # an exception passes no callback; the cursor must come back all the same

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends one entry, flushed to the operating system, and shows its headline."""
        if not state.is_world_process_zero or logs is None:
            return
        entry = {"step": state.global_step, **logs}
        with (self.folder / files.LOG).open("a") as log:
            log.write(files.log_line(entry))
        if self._shown is not None and (numbers := headline(entry, self.plan)):
            self._shown.show(state.global_step, self._left(state.global_step), numbers)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._shown is not None:
            self._shown.advance(state.global_step, self._left(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the display and writes `log.csv`."""
        self.close()
        if state.is_world_process_zero:
            files.write_text(self.folder / files.LOG_TABLE, files.log_table(files.read_log(self.folder)))

    def close(self) -> None:
        """Ends the display; safe to call at any time."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None
            atexit.unregister(self.close)

    def _left(self, step: int) -> str:
        total = self._shown.total if self._shown is not None else self.total
        return time_left(time.monotonic() - self._started, step - self._first, total - step)
