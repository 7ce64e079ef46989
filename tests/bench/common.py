"""What the benches share: where results go, what machine made them, intervals over seeds, tables."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
_STARTED = time.perf_counter()

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% t interval over n values; `low` and `high` are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 when the whole interval lies on that side of 0, else 0: nothing could be told."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def text(self, scale: float = 1.0, digits: int = 3, plus: bool = False) -> str:
        """'0.512 [0.493, 0.531]', each value times `scale`; `plus` writes the sign of the mean."""
        mean = f"{self.mean * scale:{'+' if plus else ''}.{digits}f}"
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{self.low * scale:.{digits}f}, {self.high * scale:.{digits}f}]"


def t_interval(values: Sequence[float]) -> Interval:
    """mean +- t_{0.975, n-1} s / sqrt(n), s with n - 1. ValueError for no value, or for one that is not finite."""
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    df = n - 1
    # Beyond the table: Cornish-Fisher expansion around the normal quantile, right to three digits.
    quantile = _T_975[df - 1] if df <= len(_T_975) else 1.95996 + 2.3723 / df + 2.8225 / df**2
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive method); with fewer than three values the quartiles are the extremes."""
    median = statistics.median(values)
    if len(values) < 3:
        return Spread(median, min(values), max(values))
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def machine() -> dict[str, Any]:
    """Date, processor, cores, threads, accelerator and the versions that matter."""
    import torch
    import transformers
    import trl

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_text(m: dict[str, Any]) -> str:
    """One line for a table's foot."""
    where = f"{m['gpu']}, " if m["gpu"] else ""
    return (
        f"{m['date']}, {where}{m['cpu']}, {m['cores']} cores ({m['threads']} threads), torch {m['torch']}, "
        f"transformers {m['transformers']}, trl {m['trl']}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write_json(path: Path, value: Any) -> None:
    """Writes `value` so that `path` is either as before or whole, also when the bench is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def say(text: str) -> None:
    """A line of progress with the seconds since the start, on standard error."""
    print(f"[{time.perf_counter() - _STARTED:6.0f} s] {text}", file=sys.stderr, flush=True)


def quiet() -> None:
    """Offline, no telemetry, no progress bars of libraries. Call before transformers is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CI", "1")  # TRL sends no telemetry from CI
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
