"""Parts of a run: folders, the check of what was saved, warnings on the way, and 4-bit weights that stay trainable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_path, tiny_tokenizer
from trl_ext import run_folder, saved
from trl_ext.checkpoints import CheckpointError
from trl_ext.quantized import keep_trainable
from trl_ext.watch import CUT_LOGS, FLAT_LOGS, Watch, warn_dropped


def checkpoint(folder: Path, step: int, whole: bool = True) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text('{"global_step": 1}' if whole else '{"glob')


def test_a_new_run_never_writes_over_another(tmp_path: Path) -> None:
    base = str(tmp_path / "x")
    assert run_folder.new_folder(base) == base
    Path(base).mkdir()
    assert run_folder.new_folder(base) == base, "an empty folder holds no run"
    run_folder.mark(base, "running")
    assert run_folder.new_folder(base) == f"{base}-2"
    run_folder.mark(f"{base}-2", "finished")
    assert run_folder.new_folder(base) == f"{base}-3"


def test_the_newest_unfinished_run_is_resumed(tmp_path: Path) -> None:
    base = str(tmp_path / "x")
    with pytest.raises(CheckpointError, match="there is no folder"):
        run_folder.folder_to_resume(base)
    for number, name in enumerate(["x", "x-2", "x-10", "x-11", "x-other"]):
        checkpoint(tmp_path / name, number, whole=name != "x-11")
    assert run_folder.folder_to_resume(base) == f"{base}-10", "x-11 has no whole checkpoint, 10 comes after 2"
    run_folder.mark(f"{base}-10", "finished")
    assert run_folder.folder_to_resume(base) == f"{base}-2"
    run_folder.mark(f"{base}-2", "finished")
    run_folder.mark(base, "finished")
    with pytest.raises(CheckpointError, match=r"x-11 holds no whole checkpoint; .*x-10 is finished"):
        run_folder.folder_to_resume(base)


def test_a_saved_adapter_is_checked_against_the_trained_model(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = saved.probe_ids(tiny_tokenizer(), [{"role": "user", "content": "1 + 1 ="}])
    expected = saved.log_probs(model, ids)
    assert expected.shape == (ids.size(1) - 1,)
    model.save_pretrained(tmp_path)
    again = saved.reload(str(tmp_path), tiny_path(), torch.device("cpu"))
    assert saved.check_equal(expected, saved.log_probs(again, ids), "here") == 0.0
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.1)
    model.save_pretrained(tmp_path)
    other = saved.log_probs(saved.reload(str(tmp_path), tiny_path(), torch.device("cpu")), ids)
    with pytest.raises(saved.SavedModelError, match="the model loaded from here differs"):
        saved.check_equal(expected, other, "here")
    with pytest.raises(saved.SavedModelError):
        saved.check_equal(expected, expected * float("nan"), "here")


class Fixed(torch.nn.Module):
    """Gives the same logits to any input."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]]))


def test_log_probs_by_hand() -> None:
    model = Fixed().train()
    found = saved.log_probs(model, torch.tensor([[0, 1, 0]]))
    # log softmax(0, 1)[1] = -log(1 + e^-1); log softmax(2, 0)[0] = -log(1 + e^-2)
    assert torch.allclose(found, torch.tensor([-0.313262, -0.126928]), atol=1e-5)
    assert model.training, "the mode is given back"


@pytest.mark.parametrize("saved_in_between", [False, True])
def test_four_bit_weights_stay_trainable_after_an_evaluation(saved_in_between: bool) -> None:
    nn = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    linear = nn.Linear4bit(192, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = nn.Params4bit(torch.randn(64, 192) / 8, requires_grad=False, quant_type="nf4")
    layer = keep_trainable(torch.nn.Sequential(linear.to("cpu")))
    identity = torch.eye(192)
    layer.eval()
    with torch.no_grad():
        weight = layer(identity)  # W^T; generation and evaluation run before the first step
    if saved_in_between:
        layer.state_dict()
    layer.train()
    x = torch.randn(3, 192, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    # y = x W^T, so d sum(y) / dx is the row sums of W^T
    assert torch.allclose(x.grad, weight.sum(1).expand(3, 192), atol=1e-4)
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(identity), weight), "and the weights are still the same"


def log(watch: Watch, step: int, **logs: float) -> None:
    args, state = (
        SimpleNamespace(max_completion_length=64),
        SimpleNamespace(global_step=step, is_world_process_zero=True),
    )
    watch.on_log(args, state, None, logs={key.replace("__", "/"): value for key, value in logs.items()})


def test_flat_groups_are_said_once_after_some_logs_in_a_row() -> None:
    watch = Watch()
    for step in range(FLAT_LOGS - 1):
        log(watch, step, frac_reward_zero_std=1.0, reward=0.0)
    log(watch, 10, frac_reward_zero_std=0.9)
    log(watch, 11, loss=1.0)
    assert watch.warnings == []
    for step in range(2 * FLAT_LOGS):
        log(watch, 20 + step, frac_reward_zero_std=1.0, reward=0.0)
    (said,) = watch.warnings
    assert said.startswith(f"step {20 + FLAT_LOGS - 1}: all completions of a prompt got the same reward")


def test_cut_completions_are_said_once() -> None:
    watch = Watch()
    for step in range(5 * CUT_LOGS):
        log(watch, step, completions__clipped_ratio=0.75)
    (said,) = watch.warnings
    assert "75% of the completions are cut off at max_completion_length 64" in said


def test_most_prompts_dropped_is_said() -> None:
    watch = Watch()
    warn_dropped(watch, 5, 5, 100)
    warn_dropped(watch, None, 5, 100)
    warn_dropped(watch, 0, 5, None)
    assert watch.warnings == []
    warn_dropped(watch, 6, 5, 100)
    assert "6 of 11 prompts are longer than max_prompt_tokens 100" in watch.warnings[0]
