"""recipes/accelerate: each file is read by accelerate's own loader and means what its head says, and the plugins take it.

The launch of a recipe by `accelerate launch` is in test_two_processes.py, since no two launches run at a time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def loaded(name: str):
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    found = loaded(name)
    assert (found.distributed_type, found.num_processes, found.num_machines) == (KINDS[name], 2, 1)
    assert found.mixed_precision == "no"  # the recipe decides
    raw = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert all(getattr(found, key) == value for key, value in raw.items() if isinstance(value, (int, dict)))
    assert f"recipes/accelerate/{name}.yaml" in (FOLDER / f"{name}.yaml").read_text()  # the command in its head


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sets what `accelerate launch` would set for a process; returns the command that it would start."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "trl_ext", "plan", "sandbox_grpo"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if name.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        command, found = prepare_deepspeed_cmd_env(args)
    else:
        command, found = [], prepare_multi_gpu_env(args)
    for key, value in found.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    return command


def test_fsdp2_as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    environment("fsdp2", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()  # reads the environment
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.activation_checkpointing
    assert plugin.cpu_ram_efficient_loading is False


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_as_launched(name: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without DeepSpeed: the environment, and the configuration that the plugin makes of it."""
    environment(name, monkeypatch)
    found = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    assert found["stage"] == stage
    assert found["offload_optimizer"]["device"] == found["offload_param"]["device"] == "none"
    assert found["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
