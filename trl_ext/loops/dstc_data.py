"""DSTC's data: instructions -> sampled codes and tests -> execution results -> pairs, all kept on disk.

    rounds/settings.json                what decides the data; a resumed run must agree
    rounds/dstc/part-0001/samples.jsonl one instruction a line: every sampled code and test, and who sampled them
                         results.jsonl  the usable codes and tests, R, why each run ended as it did, the executor
                         pairs.jsonl    the selection and the pair, or why there is none
    rounds/dstc/report.json             the numbers of the build

A part is some instructions that are sampled together. Each file appears whole, so a run that stopped goes on after it. A
pair that the trainer would cut at max_length is left out, for without its test or the end of it its label need not hold.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.data_sources import DataError
from trl_ext.executor import Executor, Job
from trl_ext.loops import dstc
from trl_ext.loops.building import prompt_of
from trl_ext.loops.dstc_rows import Room, instructions
from trl_ext.loops.dstc_settings import Dstc
from trl_ext.loops.round_files import ROUNDS, RoundFolder, check_settings, compare_settings, digest
from trl_ext.loops.sampling import Drawing, Sampler

Line = dict[str, Any]
Row = Mapping[str, Any]
TOO_LONG = "longer than max_length"
HOW = ("executor", "at_once", "vllm_server_base_url")
"""Settings that say how the data are made, not which: a resumed run may change them. Of the address only whether there
is one decides: vLLM and transformers draw other replies."""


def build(
    data: Sequence[Row] | Dataset,
    loop: Dstc,
    sampler: Sampler,
    executor: Executor,
    folder: str,
    seed: int,
    model: str,
    room: Room = Room(),
) -> list[Line]:
    """One line for each instruction: its pair or why it has none. `folder` is the run's.

    Raises DataError as `instructions`, or when no pair comes out, CheckpointError for another build in `folder`.
    """
    rows = instructions(data, loop.entry_point)
    check_settings(folder, _settings(loop, seed, model, rows, room.limit))
    place, found, judged = Path(folder) / ROUNDS / loop.name, [], []
    size = max(1, loop.generation_batch_size // max(loop.num_codes, loop.num_tests))
    for number, start in enumerate(range(0, len(rows), size)):
        part, files = rows[start : start + size], RoundFolder(place / f"part-{number + 1:04}")
        key = f"{seed}/dstc/{number + 1}"
        samples = files.lines("samples", lambda: sampled(part, start, loop, sampler, key, model))  # noqa: B023
        results = files.lines("results", lambda: executed(samples, loop, executor))  # noqa: B023
        found += files.lines("pairs", lambda: selected(part, results, loop, key, room))  # noqa: B023
        judged += results
    numbers = report(judged, found, loop)
    RoundFolder(place).value("report", lambda: numbers)
    if not numbers["pairs"]:
        raise DataError(f"dstc: no pair came out of {len(rows)} instructions: {numbers['skipped']}; see {place}")
    return found


def check_begun(
    data: Sequence[Row] | Dataset, loop: Dstc, folder: str, seed: int, model: str, limit: int | None = None
) -> None:
    """Raises CheckpointError when `folder` has a build with other settings or rows, DataError as `instructions`.

    `limit`: the trainer's max_length. Writes nothing.
    """
    compare_settings(folder, _settings(loop, seed, model, instructions(data, loop.entry_point), limit))


def _settings(loop: Dstc, seed: int, model: str, rows: Sequence[Row], limit: int | None) -> dict[str, Any]:
    kept = {key: value for key, value in dataclasses.asdict(loop).items() if key not in HOW}
    kept |= {"loop": loop.name, "backend": loop.backend, "seed": seed, "model": model, "max_length": limit}
    data = digest([prompt_of(row), row["entry_point"]] for row in rows)
    return kept | {"rows": len(rows), "data": data}


def _asked(row: Row, template: str) -> Line:
    """What is sampled for, or trained on: the prompt in the template and what the chat template is called with."""
    return prompt_of(row) | {"prompt": asked(row, template)}


def asked(row: Row, template: str) -> list[dict[str, str]]:
    """The row's prompt with its last turn in the template."""
    turns = [dict(turn) for turn in row["prompt"]]
    text = template.format(prompt=turns[-1]["content"], entry_point=row["entry_point"])
    return [*turns[:-1], {**turns[-1], "content": text}]


def sampled(rows: Sequence[Row], start: int, loop: Dstc, sampler: Sampler, seed: str, model: str) -> list[Line]:
    """J codes and K tests for each row."""
    drawing = Drawing(loop.temperature, loop.top_p, loop.max_completion_length, loop.generation_batch_size)
    codes = sampler.sample([_asked(r, loop.code_prompt) for r in rows], loop.num_codes, drawing, f"{seed}/c")
    tests = sampler.sample([_asked(r, loop.test_prompt) for r in rows], loop.num_tests, drawing, f"{seed}/t")
    who = {"model": model, "backend": loop.backend, "seed": seed}
    return [
        {"index": start + i, "entry_point": row["entry_point"], **who, "codes": c, "tests": t}
        for i, (row, c, t) in enumerate(zip(rows, codes, tests, strict=True))
    ]


def executed(samples: Sequence[Line], loop: Dstc, executor: Executor) -> list[Line]:
    """The usable codes and tests of each line, run against each other."""
    found = []
    for line in samples:
        codes, dropped_codes = dstc.kept([reply["text"] for reply in line["codes"]])
        tests, dropped_tests = dstc.kept([reply["text"] for reply in line["tests"]], line["entry_point"])
        jobs = [job(code, test, line["entry_point"], loop.judging) for code in codes for test in tests]
        outcomes = executor.run_all(jobs, loop.limits, loop.at_once)
        by_code = [outcomes[i : i + len(tests)] for i in range(0, len(outcomes), len(tests))] if tests else []
        found.append(
            {
                **{key: line[key] for key in ("index", "entry_point", "model", "seed")},
                "executor": executor.name,
                "judging": loop.judging,
                "limits": dataclasses.asdict(loop.limits),
                "codes": codes,
                "tests": tests,
                "dropped": {"codes": dropped_codes, "tests": dropped_tests},
                "results": [[int(outcome.passed) for outcome in row] for row in by_code],
                "reasons": [[outcome.reason for outcome in row] for row in by_code],
                "timeouts": sum(outcome.timed_out for outcome in outcomes),
                "seconds": sum(outcome.seconds for outcome in outcomes),
            }
        )
    return found


def job(code: str, test: str, entry_point: str, judging: str) -> Job:
    """One cell of R: the code under the test, or both as one program."""
    return Job(code, test, entry_point) if judging == "separate" else Job(f"{code}\n\n{test}\n")


def selected(rows: Sequence[Row], results: Sequence[Line], loop: Dstc, seed: str, room: Room) -> list[Line]:
    """The pair of each line, with the sums of the tests in it, or the reason for none."""
    pairs = zip(rows, results, strict=True)
    return [_selected(row, line, loop, f"{seed}/{line['index']}", room) for row, line in pairs]


def _selected(row: Row, line: Line, loop: Dstc, seed: str, room: Room) -> Line:
    kept = {"index": line["index"], **_asked(row, loop.train_prompt), "how": loop.selection}
    results = line["results"] if line["tests"] else [[] for _ in line["codes"]]
    try:
        found = dstc.select(results, loop.selection, loop.require_gap, seed)
        chosen, rejected = dstc.pair_texts(line["codes"], line["tests"], found, loop.concat)
        if not (room.holds(kept, chosen) and room.holds(kept, rejected)):
            raise dstc.Skipped(TOO_LONG)
    except dstc.Skipped as reason:
        return {**kept, "skipped": str(reason)}
    a, b = dstc.code_sums(results), dstc.test_sums(results)
    return {
        **kept,
        "skipped": None,
        "selection": dataclasses.asdict(found),
        "chosen": chosen,
        "rejected": rejected,
        "code_sums": [a[found.chosen_code], a[found.rejected_code]],
        "test_sums": [b[found.chosen_test], b[found.rejected_test]],
    }


def report(results: Sequence[Line], lines: Sequence[Line], loop: Dstc) -> dict[str, Any]:
    """Pass rates, skips by reason, dropped replies, sums of the tests in the pairs, time."""
    rates = [(dstc.code_sums(r["results"]), dstc.test_sums(r["results"])) for r in results if r["results"]]
    codes = [a / len(b) for sums, b in rates for a in sums]
    tests = [b / len(a) for a, sums in rates for b in sums]
    pairs = [line for line in lines if line["skipped"] is None]
    reasons = Counter(line["skipped"] for line in lines if line["skipped"] is not None)
    dropped = {kind: sum((Counter(r["dropped"][kind]) for r in results), Counter()) for kind in ("codes", "tests")}
    return {
        "instructions": len(lines),
        "pairs": len(pairs),
        "skipped": {reason: count / len(lines) for reason, count in reasons.most_common()},
        "code_pass_rate": _mean(codes),
        "test_pass_rate": _mean(tests),
        "dropped": {kind: dict(counts) for kind, counts in dropped.items()},
        "chosen_test_sums": _histogram(p["test_sums"][0] for p in pairs),
        "rejected_test_sums": _histogram(p["test_sums"][1] for p in pairs),
        "runs": sum(len(r["codes"]) * len(r["tests"]) for r in results),
        "timeouts": sum(r["timeouts"] for r in results),
        "seconds": sum(r["seconds"] for r in results),
        "selection": loop.selection,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _histogram(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
