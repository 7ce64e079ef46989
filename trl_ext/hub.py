"""A run on the Hub: `trl-ext publish`, and `push_to_hub: true` in a recipe.

Files are staged by an allow-list (`staging`), described by a card (`cards`), searched for what must not leave the machine
(`leaks`), and sent as one commit. The Hub knows contents by their hash: what is there already is not sent again, so
that a second or an interrupted publication costs what is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from trl_ext import run_folder, staging
from trl_ext.card_data import Card, License, Subject, evaluation_of
from trl_ext.cards import card
from trl_ext.hub_errors import patiently, told
from trl_ext.leaks import Content, leaks, this_machine
from trl_ext.run_facts import PublishError, Run, base_name, read_run

DRY_RUNS = "publish_out"


@dataclass(frozen=True)
class Wish:
    """What is asked for. `repo`: "user/name", or "name" for the token's own user. `private` false leaves a new one to the
    owner's default. `base`, `license`: where the run and the base do not say. `allow`: texts that are no leak.
    `overwrite`: also a repository that holds something else.
    """

    repo: str
    private: bool = False
    base: str | None = None
    license: License | None = None
    results: str | None = None
    whole_model: bool = False
    overwrite: bool = False
    allow: tuple[str, ...] = ()
    token: str | None = None


@dataclass(frozen=True)
class Published:
    """Where it is. `files`: what is there of this run; `words`: what happened."""

    place: str
    files: tuple[str, ...]
    words: str


def prepare(folder: str | Path, wish: Wish, api: HfApi | None = None) -> dict[str, Content]:
    """Name -> content of all that is published: staged, described, and searched. Without `api` nothing is asked.

    Raises PublishError with every problem.
    """
    run = read_run(folder)
    base = base_name(run, wish.base)
    if api is not None:
        ask_for(base, api)
    license = wish.license or base_license(base, run.base_folder, api)
    evaluation: Subject | None = None if wish.results is None else evaluation_of(wish.results, run)
    files = staging.stage(run, base, wish.whole_model)
    names = [*files, staging.CARD]
    files[staging.CARD] = card(Card(run, wish.repo, base, license, names, evaluation)).encode()
    _search(run, files, (*wish.repo.split("/"), *base.split("/")), wish.allow)
    return dict(sorted(files.items()))


def ask_for(base: str, api: HfApi) -> None:
    """Raises PublishError for a base that nobody could load."""
    with told(base, api):
        patiently(lambda: api.model_info(base))


def _search(run: Run, files: Mapping[str, Content], public: tuple[str, ...], allow: tuple[str, ...]) -> None:
    folders = [run.folder.absolute(), *([run.base_folder] if run.base_folder else [])]
    machine = this_machine(folders, public)
    found = []
    for name, content in files.items():
        try:
            found += leaks(name, content, machine, allow)
        except ValueError as error:  # a file that cannot be read through is not sent
            found.append(str(error))
    if found:
        found.append("remove what is there, or pass over a path or a name (not a token) with --allow TEXT")
        raise PublishError(f"{run.folder} is not published", found)


def base_license(base: str, folder: Path | None, api: HfApi | None) -> License:
    """The base's licence from its folder, from this machine's cache, or from the Hub. Raises PublishError."""
    cached = try_to_load_from_cache(base, "README.md")
    places = [
        folder / "README.md" if folder else None,
        Path(cached) if isinstance(cached, str) else None,
    ]
    for path in places:
        if path is not None and path.exists() and (known := _license(_card_of(base, path).data)):
            return known
    if api is not None:
        with told(base, api):
            info = patiently(lambda: api.model_info(base))
        if info.card_data is not None and (known := _license(info.card_data)):
            return known
    asked = "" if api is not None else " on this machine (a dry run asks nobody)"
    raise PublishError(
        f"the licence of {base} is not known{asked}",
        ["an adapter inherits it: read the base's terms and name it with --license, for instance apache-2.0"],
    )


def _card_of(base: str, path: Path) -> ModelCard:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        raise PublishError(
            f"the licence of {base} is not known",
            [f"its card {path} cannot be read ({said}): mend it, or name the licence with --license"],
        ) from None


def _license(data: Any) -> License | None:
    known = data.license
    return License(known, data.license_name, data.license_link) if isinstance(known, str) and known else None


def dry_run(folder: str | Path, wish: Wish, out: str | None = None) -> Published:
    """Writes the files that would be sent to `out` (publish_out/NAME), whole, and sends nothing."""
    if "/" not in wish.repo:
        raise PublishError(f"--repo {wish.repo} is not enough", ["a dry run asks nobody who you are: give user/name"])
    check_name(wish.repo)
    files = prepare(folder, wish)
    place = Path(out) if out else Path(run_folder.new_folder(f"{DRY_RUNS}/{Path(folder).resolve().name}"))
    if place.exists() and any(place.iterdir()):
        raise PublishError(f"--out {place} cannot be used", ["it is not empty"])
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, place / name)
        else:
            (place / name).write_bytes(content)
    return Published(str(place), tuple(files), f"Dry run: nothing was sent. These files would be, from {place}:")


def publish(folder: str | Path, wish: Wish) -> Published:
    """Sends the run as one commit, and what an earlier one of ours left is removed in it. Raises PublishError."""
    api, wish = ready(wish)
    files = prepare(folder, wish, api)
    ours = Claim.of(files[staging.CARD])
    with told(wish.repo, api):
        before = _existing(api, wish.repo)
        replaced = _replaced(before, wish, ours) if before is not None else None
        if before is None:  # `private=False` would overrule an organisation's default
            patiently(lambda: api.create_repo(wish.repo, private=wish.private or None, exist_ok=True))
        done = patiently(lambda: _commit(api, wish.repo, files, _stale(before, files)))
    place, new = f"{api.endpoint}/{wish.repo}", before is None or done.oid != before.sha
    said = "Published" if new else "Nothing new: all was there before"
    said += f" in place of the run {replaced}, which stays in the repository's history" if replaced else ""
    return Published(place, tuple(files), f"{said}, {place}:")


def _commit(api: HfApi, repo: str, files: Mapping[str, Content], stale: list[str]) -> Any:
    sent = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(repo, [*sent, *map(CommitOperationDelete, stale)], commit_message="Publish with trl-ext")


def ready(wish: Wish) -> tuple[HfApi, Wish]:
    """The Hub with a token that it accepts, and `wish` with the full name of its repository. Raises PublishError."""
    token = wish.token or get_token()
    if token is None:
        raise PublishError(
            f"{wish.repo} cannot be written", ["no token: set HF_TOKEN, or log in with `hf auth login`"]
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    check_name(wish.repo)
    with told(wish.repo, api):
        user = patiently(lambda: api.whoami())["name"]
    return api, wish if "/" in wish.repo else replace(wish, repo=f"{user}/{wish.repo}")


def check_name(repo: str) -> None:
    """Raises PublishError for a name that the Hub does not take."""
    try:
        validate_repo_id(repo)
    except hub_errors.HFValidationError as error:
        raise PublishError(f"--repo {repo} is no name for a repository", [" ".join(str(error).split())]) from None


def _existing(api: HfApi, repo: str) -> Any:
    try:
        return patiently(lambda: api.model_info(repo))
    except hub_errors.RepositoryNotFoundError as error:
        if error.response.status_code == 404:
            return None
        raise


@dataclass(frozen=True)
class Claim:
    """What a card says about itself: its bases, what it is to them, and the run that it is from."""

    bases: tuple[str, ...]
    relation: str | None
    run: str | None = None

    @staticmethod
    def of(content: Content) -> Claim:
        """Of a card of ours."""
        assert isinstance(content, bytes)
        return Claim.read(ModelCard(content.decode()).data)

    @staticmethod
    def read(data: Any) -> Claim:
        """Of any card's metadata."""
        found = data.to_dict()
        bases = found.get("base_model")
        bases = bases if isinstance(bases, list) else [bases]
        return Claim(tuple(map(str, bases)), found.get("base_model_relation"), found.get("trl_ext_run"))


def check_place(api: HfApi, wish: Wish, ours: Claim) -> None:
    """Raises PublishError when the repository exists and must not be written over with a run of that kind."""
    with told(wish.repo, api):
        before = _existing(api, wish.repo)
        if before is not None:
            _replaced(before, wish, ours)


def _replaced(info: Any, wish: Wish, ours: Claim) -> str | None:
    """The other run of ours that the repository holds, if any. Raises PublishError when it is not ours to write."""
    held = [file.rfilename for file in info.siblings or () if file.rfilename != ".gitattributes"]
    if wish.private and not info.private:
        raise PublishError(
            f"{wish.repo} exists and is public", ["make it private in its settings, or leave out --private"]
        )
    if held and not wish.overwrite and (why := _foreign(info.card_data, ours)):
        raise PublishError(
            f"{wish.repo} exists and {why}", ["choose another --repo, or write over it with --yes-overwrite"]
        )
    run = Claim.read(info.card_data).run if info.card_data is not None else None
    return run if run not in (None, ours.run) else None


def _stale(info: Any, files: Mapping[str, Content]) -> list[str]:
    """Files of ours in the repository that this run does not have."""
    held = [file.rfilename for file in info.siblings or ()] if info is not None else []
    return [
        name
        for name in held
        if name not in files and (name in staging.NAMES or any(fnmatch(name, p) for p in staging.PATTERNS))
    ]


def _foreign(data: Any, ours: Claim) -> str | None:
    """Why a repository does not hold the same kind of thing as ours of the same base, from its card."""
    if data is None or "trl-ext" not in (data.tags or ()):
        return "was not made by trl-ext"
    held = Claim.read(data)
    kinds = {"adapter": "an adapter", "finetune": "a whole model"}
    what = f"holds {kinds.get(str(held.relation), 'an adapter')} of {', '.join(held.bases)}"
    run = f" (the run {held.run})" if held.run else ""
    if not set(ours.bases) & set(held.bases):
        return f"{what}{run}, not of {', '.join(ours.bases)}"
    if held.relation not in (None, ours.relation):
        return f"{what}{run}, whose files {kinds[str(ours.relation)]} would replace"
    return None
