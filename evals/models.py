"""One base model in memory, its adapters on top, switched on and off: base and candidate are the same network."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evals.generation.hf import HFGenerator, end_ids, left_padded
from evals.generation.store import digest, text_hash
from trl_ext.quantized import keep_trainable

WEIGHTS = ("*.safetensors", "*.bin", "config.json", "*.gguf")
PROBES = 8


class ModelError(RuntimeError):
    """A model or adapter cannot be evaluated; the message says why and what to do."""


@dataclass(frozen=True)
class BaseSpec:
    """How the base is loaded. `quantization`: keyword arguments of `BitsAndBytesConfig`, None for none. `dtype` "auto"
    is the checkpoint's own.
    """

    model: str
    revision: str | None = None
    quantization: Mapping[str, Any] | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter to compare with its base: a name for the report, its folder, its training step if a checkpoint."""

    name: str
    folder: Path
    step: int | None = None

    @property
    def slot(self) -> str:
        """The name under which PEFT holds it, which must not have a dot."""
        return "adapter_" + text_hash(self.name)[:12]


@dataclass(frozen=True)
class Activity:
    """What an adapter does to the next-token distribution at the end of probe prompts.

    `largest`: the largest change of a logit; `kl`: mean KL(adapter || base) in nats.
    """

    largest: float
    kl: float


@dataclass
class Loaded:
    """The base with every adapter attached, and its tokenizer."""

    model: Any
    tokenizer: Any
    spec: BaseSpec
    adapters: Sequence[Adapter] = ()
    identity: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def active(self, adapter: Adapter | None) -> Iterator[Any]:
        """The model with this adapter switched on; None: with none."""
        if not self.adapters:
            yield self.model
        elif adapter is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.set_adapter(adapter.slot)
            yield self.model

    @contextlib.contextmanager
    def answering(self, adapter: Adapter | None, batch_size: int, constraint: Any = None) -> Iterator[HFGenerator]:
        """A generator of replies with this adapter switched on."""
        with self.active(adapter) as model:
            yield HFGenerator(model, self.tokenizer, batch_size, constraint)

    def activity(self, adapter: Adapter, prompts: Sequence[str]) -> Activity:
        """Compares logits with and without the adapter on up to `PROBES` prompts, at the last position."""
        with self.active(None) as model:
            base = _last_logits(model, self.tokenizer, prompts[:PROBES])
        with self.active(adapter) as model:
            changed = _last_logits(model, self.tokenizer, prompts[:PROBES])
        old, new = base.log_softmax(-1), changed.log_softmax(-1)
        return Activity(float((changed - base).abs().max()), float((new.exp() * (new - old)).sum(-1).mean()))

    @property
    def ends(self) -> list[int]:
        """The tokens that end a reply."""
        return end_ids(self.model, self.tokenizer)

    @property
    def dtype(self) -> str:
        """Precision of the weights that compute."""
        return str(self.model.dtype).removeprefix("torch.")


def load(spec: BaseSpec, tokenizer: Any, adapters: Sequence[Adapter], device: torch.device) -> Loaded:
    """Loads the base once and attaches the adapters without merging. Raises ModelError."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None if spec.quantization is None else BitsAndBytesConfig(**spec.quantization)
    placement: dict[str, Any] = {} if quantization is None else {"device_map": {"": device}}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            spec.model,
            revision=spec.revision,
            dtype=spec.dtype,
            quantization_config=quantization,
            trust_remote_code=spec.trust_remote_code,
            **placement,
        )
    except OSError as error:
        raise ModelError(f"cannot load the base model '{spec.model}': {error}") from error
    model = keep_trainable(model) if quantization else model.to(device)
    if adapters:
        model = _attach(model, adapters)
    model.eval()
    identity = {a.name: adapter_digest(a) for a in adapters} | {"base": base_identity(spec, model.config)}
    return Loaded(model, tokenizer, spec, adapters, identity)


def _attach(model: Any, adapters: Sequence[Adapter]) -> Any:
    from peft import PeftModel

    # Adapters stay in the precision of their files: PEFT would widen them, and then they compute other numbers.
    first, *rest = adapters
    try:
        model = PeftModel.from_pretrained(model, first.folder, adapter_name=first.slot, autocast_adapter_dtype=False)
        for adapter in rest:
            model.load_adapter(adapter.folder, adapter_name=adapter.slot, autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError) as error:
        names = ", ".join(str(a.folder) for a in adapters)
        raise ModelError(f"cannot attach the adapter ({names}) to this base: {error}") from error
    return model


def load_tokenizer(name: str, spec: BaseSpec) -> Any:
    """The tokenizer of a model name or folder, padding on the left. Raises ModelError without one or its template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=spec.revision if name == spec.model else None, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a tokenizer from '{name}': {error}") from error
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of '{name}' has no chat template: name one that has it with --tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does to a text: its serialised form, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return text_hash(backend.to_str()) if backend is not None else digest(sorted(tokenizer.get_vocab().items()))


def own_template(folder: Path) -> str | None:
    """The chat template that an adapter's folder brings along, None when it brings none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(folder).chat_template  # type: ignore[no-any-return]


def folder_digest(folder: str | Path, patterns: Sequence[str]) -> str:
    """SHA-256 over the names and bytes of a folder's files; a path's name is no part of it."""
    found = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    if not found:
        raise ModelError(f"{folder} holds none of {', '.join(patterns)}")
    total = hashlib.sha256()
    for path in found:
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def adapter_digest(adapter: Adapter) -> str:
    """Changes with any weight or setting of an adapter."""
    return folder_digest(adapter.folder, ("adapter_model.*", "adapter_config.json"))


def base_identity(spec: BaseSpec, config: Any) -> str:
    """The Hub's commit of a downloaded model, else a hash of the folder's weights."""
    if Path(spec.model).is_dir():
        return folder_digest(spec.model, WEIGHTS)
    commit = getattr(config, "_commit_hash", None)
    if commit is None:
        raise ModelError(
            f"'{spec.model}' has neither a local folder nor a commit, so its replies cannot be kept apart"
        )
    return f"{spec.model}@{commit}"


def template_hash(tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """SHA-256 of the chat template and the settings that it is called with."""
    return digest([tokenizer.chat_template, dict(settings)])


def adapter_folder(name: str) -> Path:
    """The local folder of an adapter: `name` itself, or a download from the Hub. Raises ModelError."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["adapter_*", "tokenizer*", "chat_template*", "special_tokens_map.json"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # the hub's errors share no base class
            raise ModelError(f"adapter '{name}' is no local folder, and the Hub did not give it: {error}") from error
    if not (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{name} holds no adapter_config.json. A whole model is compared with: --model BASE --candidate"
        )
    return folder


def base_of(adapter: Path) -> str:
    """The base model that an adapter names."""
    name = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{adapter}/adapter_config.json names no base model: give it with --model")
    return str(name)


def _last_logits(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:  # (PROBES, V)
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    batch, mask = left_padded(ids, tokenizer.pad_token_id)
    with torch.no_grad():
        found = model(input_ids=batch.to(model.device), attention_mask=mask.to(model.device), logits_to_keep=1)
    return found.logits[:, -1].double().cpu()
