"""Which files of a run are published, and what is changed in them first. What is not named here stays at home.

Weights (safetensors only), the adapter's configuration, the tokenizer where it is not the base's, the recipe, the
curves, the card. Never optimizer states, checkpoints, caches, logs, completions, data or the state of methods.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from trl_ext.leaks import Content, public_host
from trl_ext.recipe import without_secrets
from trl_ext.run_facts import ADAPTER_CONFIG, FILE_ENDINGS, RECIPE, PublishError, Run, read_json

ADAPTER = "adapter_model.safetensors"
MODEL, MODEL_INDEX, MODEL_CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
CARD, CURVES = "README.md", "curves.png"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
WHOLE_MODEL = (MODEL_CONFIG, "generation_config.json")
PATTERNS = (SHARD, STAGE_RECIPE) = ("model-*-of-*.safetensors", "recipe_*.yaml")
NAMES = (*TOKENIZER, *WHOLE_MODEL, ADAPTER, ADAPTER_CONFIG, MODEL, MODEL_INDEX, CARD, RECIPE, CURVES)
"""With `PATTERNS`, all names under which this package publishes anything."""
MACHINE_KEYS = ("output_dir", "logging_dir", "resume_from_checkpoint", "env", "push_to_hub", "vllm_group_port")
MACHINE_PREFIXES = ("hub_", "vllm_server_")
"""Keys of a recipe that say where it ran and where it went, not what was done."""


def stage(run: Run, base: str, whole_model: bool = False) -> dict[str, Content]:
    """Name -> content of everything but the card. `whole_model` allows a run without adapter. Raises PublishError."""
    if run.adapter is None:
        files = dict(_whole_model(run, whole_model))
        tokenizer = True
    else:
        if not (run.folder / ADAPTER).exists():
            raise PublishError(f"{run.folder} cannot be published", [_no_weights(run, ADAPTER)])
        files = {ADAPTER: run.folder / ADAPTER, ADAPTER_CONFIG: _adapter_config(run.adapter, base)}
        tokenizer = own_tokenizer(run)
    if tokenizer:
        files |= {name: _tidy(run.weights / name) for name in TOKENIZER if (run.weights / name).exists()}
    whole = run.adapter is None  # then the base is that of the first stage, else that of this one
    for i, (name, recipe) in enumerate(run.earlier.items()):
        files[f"recipe_{name}.yaml"] = public_recipe(recipe, base if whole and i == 0 else None, run.local).encode()
    files[RECIPE] = public_recipe(run.recipe, None if whole and run.earlier else base, run.local).encode()
    if (run.folder / CURVES).exists():
        files[CURVES] = run.folder / CURVES
    return files


def _no_weights(run: Run, name: str) -> str:
    pickled = sorted(path.name for path in run.weights.glob("*.bin") if path.name != "training_args.bin")
    if not pickled:
        return f"it holds no {name}"
    return f"{pickled[0]} is a pickle, which runs code when loaded: save as {name} (save_safetensors) and try again"


def _whole_model(run: Run, allowed: bool) -> Iterator[tuple[str, Content]]:
    weights = [run.weights / MODEL, *sorted(run.weights.glob(SHARD))]
    weights = [path for path in weights if path.exists()]
    if not weights:
        raise PublishError(f"{run.folder} cannot be published", [_no_weights(run, MODEL)])
    if not allowed:
        size = sum(path.stat().st_size for path in weights) / 2**30
        raise PublishError(
            f"{run.folder} is not published",
            [f"it holds no adapter but a whole model of {size:.2f} GiB: --full-model publishes it"],
        )
    yield from ((path.name, path) for path in weights)
    if (run.weights / MODEL_INDEX).exists():
        yield MODEL_INDEX, run.weights / MODEL_INDEX
    yield from ((name, _tidy(run.weights / name)) for name in WHOLE_MODEL if (run.weights / name).exists())


def _adapter_config(config: Mapping[str, Any], base: str) -> bytes:
    return (json.dumps({**config, "base_model_name_or_path": base}, indent=2, sort_keys=True) + "\n").encode()


def _tidy(path: Path) -> Content:
    """JSON without the name of the folder that it was loaded from; other files as they are."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
        return path
    content = read_json(path)
    if not isinstance(content, dict):
        return path
    kept = {
        k: v for k, v in content.items() if k not in ("_name_or_path", "name_or_path", "is_local", "local_files_only")
    }
    return path if kept == content else (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def own_tokenizer(run: Run) -> bool:
    """Whether the run's tokenizer differs from the base's in tokens, rules or chat template, or that cannot be told."""
    from transformers import AutoTokenizer

    if not (run.folder / "tokenizer_config.json").exists():
        return False
    try:
        source, revision = str(run.base_folder or run.trained_from), run.loading.get("revision")
        base = AutoTokenizer.from_pretrained(source, revision=revision or "main", local_files_only=True)
    except (OSError, ValueError):  # not in the cache, or code of its own
        return True
    return _what_it_does(AutoTokenizer.from_pretrained(str(run.folder), local_files_only=True)) != _what_it_does(base)


def _what_it_does(tokenizer: Any) -> list[Any]:
    """Without padding and truncation, which a trainer sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return [rules, tokenizer.special_tokens_map, tokenizer.chat_template]


# The recipe


def public_recipe(recipe: Mapping[str, Any], base: str | None, local: Collection[str] = ()) -> str:
    """The resolved recipe as YAML, without secrets, local paths and addresses. Its model is `base`; None keeps the
    recipe's, which is left out if it is local, such as an earlier stage's.
    """
    removed: list[str] = []
    kept = {k: v for k, v in recipe.items() if k not in MACHINE_KEYS and not k.startswith(MACHINE_PREFIXES)}
    kept = without_secrets(kept if base is None else {**kept, "model_name_or_path": base})
    cleaned = _cleaned(kept, "", removed, local)
    head = (
        "# Every setting of this training run. Keys that name files, addresses or secrets of the machine are left out"
    )
    head += f": {', '.join(removed)}.\n" if removed else ".\n"
    return head + yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True)


def _cleaned(value: Any, place: str, removed: list[str], local: Collection[str]) -> Any:
    """`value` without entries that are a path or an address of this machine; their keys go to `removed`."""
    if isinstance(value, Mapping):
        inner = {key: f"{place}.{key}".lstrip(".") for key in value}
        theirs = [key for key, item in value.items() if _of_the_machine(item, local)]
        removed += [inner[key] for key in theirs]
        return {k: _cleaned(item, inner[k], removed, local) for k, item in value.items() if k not in theirs}
    if isinstance(value, list):
        kept = [item for item in value if not _of_the_machine(item, local)]
        removed += [place] * (len(value) - len(kept))
        return [_cleaned(item, place, removed, local) for item in kept]
    return value


def _of_the_machine(value: Any, local: Collection[str]) -> bool:
    """Whether a text names a file or an address of the machine. `local`: names that were files when the run began."""
    if not isinstance(value, str) or any(c.isspace() for c in value):
        return False
    if value in local or value.startswith(("~/", "./", "../", "file:")) or value[1:3] == ":\\":
        return True
    if value.startswith("/"):  # "/no_think" is a word
        return value.count("/") > 1 or Path(value).exists()
    if "://" not in value and value.lower().endswith(FILE_ENDINGS):
        return True
    host = urlsplit(value).hostname if "://" in value else _host(value)
    return host is not None and not public_host(host)


def _host(value: str) -> str | None:
    """Of host:port without a scheme; "1:10" and "train:100" are other things."""
    found = re.fullmatch(r"(localhost|\d+(?:\.\d+){3}|[a-z][a-z0-9.-]*(?=:\d{4})):\d{2,5}(/.*)?", value.lower())
    return found[1] if found else None
