"""Two processes equal one, with every group split between them. DESIGN.md, invariant 2."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import distill_worker, pair_worker
from tests.distributed.launch import accelerate_launch, two_processes
from tests.distributed.worker import CASES, PAIRS, train
from tests.tiny import weights
from trl_ext.cli import main
from trl_ext.methods import METHODS


@pytest.fixture(scope="session")
def saved_by_two(tmp_path_factory):
    return two_processes("tests.distributed.worker", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", [*CASES, *PAIRS])
def test_two_processes_equal_one(saved_by_two, tmp_path, case):
    saved = torch.load(saved_by_two / f"{case}.pt", weights_only=True)
    single = train(case, str(tmp_path), processes=1)
    moved = 0.0
    for name, value in weights(single).items():
        torch.testing.assert_close(saved["weights"][name], value, rtol=2e-3, atol=5e-5)
        moved += float(value.abs().sum())
    assert moved > 0
    for two, one in zip(saved["log"], single.state.log_history, strict=True):
        for key, value in two.items():
            if key.split("/")[0] in METHODS and "seconds" not in key:
                assert value == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


# In this file, so that no two launches run at a time


def compared(saved, single, tolerance):
    """Asserts that weights and the methods' metrics of two processes are those of one; how many numbers of the log."""
    for name, value in weights(single).items():
        torch.testing.assert_close(saved["weights"][name], value, rtol=2e-3, atol=5e-5)
    count = 0
    for two, one in zip(saved["log"], single.state.log_history, strict=True):
        for key in (key for key in two if key.split("/")[0] in METHODS):
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=tolerance), key
            count += 1
    return count


@pytest.fixture(scope="module")
def distilled_by_two(tmp_path_factory):
    return two_processes("tests.distributed.distill_worker", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", distill_worker.CASES)
def test_two_processes_distil_as_one(distilled_by_two, tmp_path, case):
    saved = torch.load(distilled_by_two / f"{case}.pt", weights_only=True)
    single = distill_worker.train(case, str(tmp_path), processes=1)
    assert compared(saved, single, 1e-5) > 30


@pytest.fixture(scope="module")
def paired_by_two(tmp_path_factory):
    return two_processes("tests.distributed.pair_worker", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", pair_worker.CASES)
def test_two_processes_learn_from_pairs_and_labels_as_one(paired_by_two, tmp_path, case):
    """The reward shift is that of the whole batch, whichever process holds its rows."""
    saved = torch.load(paired_by_two / f"{case}.pt", weights_only=True)
    single = pair_worker.train(case, str(tmp_path), processes=1)
    assert compared(saved, single, 1e-4) >= 9


@pytest.fixture(scope="module")
def failed_on_one(tmp_path_factory):
    out = two_processes("tests.distributed.failing_worker", tmp_path_factory.mktemp("two"))
    return [torch.load(out / f"process-{i}.pt", weights_only=True) for i in range(2)]


@pytest.mark.parametrize(
    ("case", "there", "here"),
    [
        ("raises", "reward 'first' raised OSError: the judge is down", "reward 'first' failed on process 1"),
        ("hangs", "reward 'first' did not return within 0.5 seconds", "reward 'first' failed on process 1"),
        ("ensemble", "reward 'reward_ensemble' did not return within 0.5 seconds", "it failed on process 1, which"),
        ("waits", "reward 'second' did not return within 0.5 seconds", "reward 'second' failed on process 1"),
        ("refilled", "reward 'first' raised OSError: the judge is down", "reward 'first' failed on process 1"),
        ("annotated", "AnnotatorError: nobody answers", "annotator: it failed on process 1"),
    ],
)
def test_what_fails_on_one_process_ends_both_and_nothing_is_lost(failed_on_one, case, there, here):
    main_process, other = (found[case] for found in failed_on_one)
    assert there in other["said"] and here in main_process["said"]
    assert main_process["saved"] == other["saved"] == "checkpoint-2"
    assert main_process["same"] in (True, None) and other["same"] == main_process["same"]


def test_a_recipe_under_accelerate_launch_equals_one_process(tmp_path):
    """Pairs are not sampled, so the two must agree: 2 x 8 pairs a step against 16."""

    def words(folder: str, batch: int) -> list[str]:
        keys = {"max_steps": 2, "optim": "sgd", "learning_rate": 10, "dataset_options.n": 64, "eval_rows": 0}
        keys |= {"per_device_train_batch_size": batch, "output_dir": tmp_path / folder}
        return ["train", "sandbox_dpo", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]

    accelerate_launch("ddp", words("two", 8))
    assert main(words("one", 16)) == 0
    two, one = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("two", "one"))
    assert two.keys() == one.keys()
    moved = 0.0
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-3, atol=5e-5)
        moved += float(value.abs().sum()) if "lora_B" in name else 0.0
    assert moved > 0  # lora_B starts at zero
    assert "8 pairs x 2 processes" in (tmp_path / "two" / "plan.txt").read_text()


def test_a_recipe_with_a_method_samples_under_accelerate_launch(tmp_path):
    """Groups of 16 are split over the two; both steps are logged once, TRACE's numbers with them."""
    keys = {"max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 16, "eval_rows": 0}
    keys |= {"output_dir": tmp_path / "run"}
    accelerate_launch("ddp", ["train", "sandbox_trace", *(w for k, v in keys.items() for w in (f"--{k}", str(v)))])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "reward" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert any(key.startswith("trace/") for key in steps[0])
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for name, value in saved.items() if "lora_B" in name) > 0
    assert "on each of 2 processes" in " ".join((tmp_path / "run" / "plan.txt").read_text().split())
