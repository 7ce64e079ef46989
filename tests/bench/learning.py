"""Learning curves on the sandbox against plain GRPO at equal rollouts: `python -m tests.bench.learning --methods trace`.

Each run is a process with one thread that trains once (`learning_run`) from the recipe `sandbox_grpo` with the arm's
methods and whatever else the method's own sandbox recipe changes; plain GRPO gets the same changes, without the method;
seeds change data order and sampling, the warm-started model is the same. An arm of `REWARD_ARMS` (rl_struct) changes the
rewards, and only its own. Finished runs are kept
in OUT/runs and not repeated, so an interrupted bench goes on where it stopped. A bench of TRACE carries the
span probe (`probe`) in all arms, which changes nothing. Arms: a method's name, or several joined by "+".
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.common import RESULTS, ROOT, machine, machine_text, quiet, say, write_json

quiet()

from tests.bench import claims, learning_report, plots  # noqa: E402 - after the environment is set
from tests.bench.forgetful import ensure_forgetful  # noqa: E402
from tests.bench.learning_report import BASELINE, Run  # noqa: E402
from tests.bench.learning_run import RECIPE, RunSettings  # noqa: E402
from trl_ext.methods import METHODS  # noqa: E402
from trl_ext.recipe import load_recipe  # noqa: E402
from trl_ext.sandbox import ensure_model  # noqa: E402

ABLATIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "trace": {"all tokens": {"spans": "all"}, "random spans": {"spans": "random"}},
    "high_entropy": {"lowest": {"lowest": True}},
    "dgpo": {"without entropy": {"kappa": 0}},
    "dcpo": {"one temperature": {"temperature_high": 1.0, "temperature_low": 1.0}},
    "capo": {"nothing rejected": {"tau_fisher": "inf", "tau_hessian": "inf"}},
    "velocity_rank": {"no bonus": {"kappa": "inf"}},
    "pgpo": {"mass not kept": {"conserve_mass": False}},
    "d3s": {"no schedule": {"sample_end": 0.25, "token_end": 0.2}},
    "epo": {"bonus alone": {"alpha": 0.0}},
    "real": {"no anchor": {"form": "product"}},
    "group_dpo": {"mean over the group": {"over_group": "mean"}},
    "mdpo": {"no KL": {"t": "inf"}},
    "target_surrogate": {"no target": {"eta": "inf"}},
    "safe": {"without gradient": {"grad": "constant"}},
    "riskpo": {"risk seeking": {"variant": "code", "risk": "seeking"}},
    "oblr_po": {"mean baseline": {"baseline": False}},
    "rods": {
        "random seeds": {"seeds": "random"},
        "no retirement": {"leave": "none"},
        "no injection": {"capacity": 0},
    },
    "scaf_grpo": {"hint not in the prompt": {"replace_hint_prompt": True}},
    "dynamic_sampling": {"middle accuracies only": {"low": 0.2, "high": 0.8}},
}
"""Method -> name of the ablation -> the settings that it changes: the cards' controls."""
REWARD_ARMS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "rl_struct": {  # a weight of 0 keeps the term in the log; order: valid, struct, format, correct, length
        "without struct": ("--reward_weights", "1.0", "0.0", "0.5", "0.5", "0.1"),
        "without valid": ("--reward_weights", "0.0", "1.0", "0.5", "0.5", "0.1"),
    },
}
"""Arms that are rewards and no method: the end of a sandbox recipe's name -> ablation -> words of a command line."""
MODELS = ("sandbox", "forgetful")
QUICK = {"steps": 4, "eval_every": 2, "eval_rows": 40, "seeds": 2}
QUICK_OVERRIDES = ("--per_device_train_batch_size", "32", "--max_completion_length", "48")
Go = Callable[[RunSettings], Run]


def settings_of(method: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The method's settings in its own sandbox recipe, or its defaults, with `changed` over them."""
    recipe = ROOT / "recipes" / f"sandbox_{method}.yaml"
    own = load_recipe(str(recipe)).raw["methods"][method] if recipe.exists() else None
    return {**(own or {}), **changed}


def recipe_changes(methods: Sequence[str]) -> tuple[str, ...]:
    """What the methods' own sandbox recipes change beside the method, for all arms, as words of a command line."""
    return _changes(name for arm in methods for name in arm.split("+") if name not in REWARD_ARMS)


def own_changes(arm: str) -> tuple[str, ...]:
    """What only this arm changes: the rewards of one of `REWARD_ARMS`, and those of its ablation."""
    name, _, ablation = arm.partition(", ")
    if name not in REWARD_ARMS:
        return ()
    return (*_changes([name]), *(REWARD_ARMS[name][ablation] if ablation else ()))


def _changes(names: Iterable[str]) -> tuple[str, ...]:
    plain = load_recipe(RECIPE).raw
    words: dict[str, Any] = {}
    for method in dict.fromkeys(names):
        path = ROOT / "recipes" / f"sandbox_{method}.yaml"
        own = load_recipe(str(path)).raw if path.exists() else {}
        words |= {k: v for k, v in own.items() if k not in ("methods", "max_steps") and plain.get(k) != v}
    return tuple(word for key, value in words.items() for word in (f"--{key}", _word(value)))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def arms(methods: Sequence[str], ablations: bool, changed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Arm -> `methods` mapping; plain GRPO comes first."""
    found: dict[str, Any] = {BASELINE: {}}
    for arm in methods:
        if arm in REWARD_ARMS:
            found |= {arm: {}, **{f"{arm}, {label}": {} for label in (REWARD_ARMS[arm] if ablations else ())}}
            continue
        parts = {name: settings_of(name, changed.get(name, {})) for name in arm.split("+")}
        found[arm] = parts
        if ablations and len(parts) == 1:
            for label, control in ABLATIONS.get(arm, {}).items():
                found[f"{arm}, {label}"] = {arm: {**parts[arm], **control}}
    return found


def place(folder: Path, settings: RunSettings) -> Path:
    """The file of a run: its name tells arm and seed, its hash everything else."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    words = re.sub(r"[^a-z0-9]+", "-", settings.arm.lower()).strip("-")
    return folder / "runs" / f"{words}-seed{settings.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def in_process(settings: RunSettings) -> Run:
    """One run in a process of its own, with one thread. RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "settings.json", Path(folder) / "run.json"
        write_json(asked, dataclasses.asdict(settings))
        command = [sys.executable, "-m", "tests.bench.learning_run", str(asked), str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{settings.arm}, seed {settings.seed}, failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def run_all(wanted: Sequence[RunSettings], folder: Path, jobs: int, go: Go) -> list[Run]:
    """Runs what is not stored yet, `jobs` at a time; each result is stored as soon as it is there."""

    def one(settings: RunSettings) -> Run:
        path = place(folder, settings)
        if path.exists():
            return json.loads(path.read_text())
        found = go(settings)
        write_json(path, found)
        say(
            f"{settings.arm}, seed {settings.seed}: {found['seconds']:.0f} s ({found['cpu_seconds']:.0f} s of processor)"
        )
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, wanted))


def bench(
    chosen: Mapping[str, Any],
    seeds: int,
    folder: Path,
    jobs: int,
    go: Go = in_process,
    tag: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """All arms and seeds -> the result with tables and verdict; the picture beside it. Seed by seed, so that what an
    interrupted bench has finished is comparable."""
    shared = {**settings, "overrides": settings.get("overrides", ())}
    wanted = [
        RunSettings(arm, methods, seed, **{**shared, "overrides": (*shared["overrides"], *own_changes(arm))})
        for seed in range(seeds)
        for arm, methods in chosen.items()
    ]
    runs: dict[str, dict[int, Run]] = {arm: {} for arm in chosen}
    for asked, found in zip(wanted, run_all(wanted, folder, jobs, go), strict=True):
        runs[asked.arm][asked.seed] = found
    about = {
        **settings,
        "model": Path(settings.get("model") or "sandbox").name,
        "seeds": list(range(seeds)),
        "recipe": RECIPE,
        "arms": dict(chosen),
    }
    result = {
        "bench": "learning",
        "machine": {**machine(), "threads": 1},
        "about": about,
        "seconds_per_run": sum(r["seconds"] for own in runs.values() for r in own.values()) / len(wanted),
        "summary": learning_report.summary(runs),
        "tables": learning_report.tables(runs),
        "verdict": learning_report.verdict(runs),
        "claims": [checked for arm in chosen if arm in claims.CLAIMS for checked in claims.check(runs, arm)],
    }
    name = "learning_" + "_".join(arm for arm in chosen if arm != BASELINE and "," not in arm).replace("+", "-")
    name += f"_{tag}" if tag else ""
    result["picture"] = f"{name}.png"
    plots.draw(
        runs, folder / f"{name}.png", f"{seeds} seeds, mean and 95% interval. {machine_text(result['machine'])}"
    )
    write_json(folder / f"{name}.json", result)
    say(f"written: {folder / name}.json and .png")
    return result


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods",
        default="trace",
        help="arms, joined by commas: trace,high_entropy,trace+high_entropy; all: each alone",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--ablations", action="store_true", help="also the cards' controls (`ABLATIONS`)")
    parser.add_argument("--settings", type=json.loads, default={}, help='JSON, e.g. {"trace": {"action": "both"}}')
    parser.add_argument(
        "--overrides", type=shlex.split, default=[], help="changes of the recipe for all arms: '--learning_rate 3e-4'"
    )
    parser.add_argument(
        "--model", choices=MODELS, default="sandbox", help="forgetful: leaves out keys (`tests.bench.forgetful`)"
    )
    parser.add_argument("--tag", default="", help="end of the result's name, to keep it beside another setting's")
    parser.add_argument("--quick", action="store_true", help="two seeds of four steps: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder (default tests/bench/results; a temporary one if quick)")
    args = parser.parse_args(words)
    if args.methods != "all":
        return _one(args)
    for name, cls in METHODS.items():
        if cls.trainer == "grpo":
            _one(argparse.Namespace(**{**vars(args), "methods": name}))


def _one(args: argparse.Namespace) -> None:
    """One bench, as the command line asks for it."""
    chosen = arms(args.methods.split(","), args.ablations, args.settings)
    sizes: dict[str, Any] = {"steps": args.steps, "eval_every": max(1, args.steps // 5), "eval_rows": 400}
    sizes["overrides"] = (*recipe_changes(args.methods.split(",")), *args.overrides)
    sizes["probe"] = "trace" in args.methods
    seeds, folder = args.seeds, args.out or RESULTS
    if args.quick:
        sizes |= {k: v for k, v in QUICK.items() if k != "seeds"}
        sizes["overrides"] += QUICK_OVERRIDES
        seeds, folder = QUICK["seeds"], args.out or Path(tempfile.mkdtemp(prefix="learning-"))
    say("the sandbox's model: built and warm-started on first use")
    ensure_model()
    if args.model == "forgetful":
        sizes["model"] = ensure_forgetful(folder / "runs" / "forgetful")
    result = bench(chosen, seeds, folder, args.jobs, tag=args.tag, **sizes)
    sys.stdout.write(learning_report.markdown(result) + "\n")


if __name__ == "__main__":
    main()
