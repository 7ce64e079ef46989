"""`push_to_hub: true` in a recipe: one publication when the run is finished, the same as `trl-ext publish`.

The trainers' own uploads are switched off: during training they send the whole output folder, with logs, completions,
and the pickled arguments that hold the token; with `hub_strategy: checkpoint` also the optimizer's state.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from trl_ext import hub
from trl_ext.card_data import License
from trl_ext.recipe import Recipe, RecipeError
from trl_ext.run_facts import PublishError, is_hub_name


def wish_of(recipe: Recipe) -> hub.Wish | None:
    """What the recipe asks to publish, None for nothing; TRL's own uploads are off afterwards. Raises RecipeError."""
    args, extra = recipe.training_args, recipe.extra
    token, args.hub_token = args.hub_token, None  # the arguments are pickled into the folder
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    problems = []
    if recipe.values.get("hub_strategy", "end") not in ("end", None):
        problems.append(
            "hub_strategy: uploads during training hold checkpoints, logs and replies; set `end` or leave out"
        )
    if args.hub_always_push:
        problems.append("hub_always_push: the run is published once, when it is finished; leave it out")
    if args.hub_revision:
        problems.append("hub_revision: the run is published to the main branch; leave it out")
    base = str(recipe.model_args.model_name_or_path)
    problems += _base_problems(base, extra.hub_base_model)
    if not recipe.model_args.use_peft:
        problems.append("push_to_hub: publishes adapters; for a whole model: trl-ext publish RUN --full-model")
    if problems:
        raise RecipeError(str(recipe.path), problems)
    own = License(extra.hub_license) if extra.hub_license else None
    return hub.Wish(args.hub_model_id or "", bool(args.hub_private_repo), extra.hub_base_model, own, token=token)


def _base_problems(base: str, given: str | None) -> list[str]:
    if is_hub_name(base):
        wrong = given not in (None, base)
        return [f"hub_base_model: {given}: the recipe trains {base}; leave it out"] if wrong else []
    if given is None:
        return [f"hub_base_model: the adapter's base, {base}, is local; name it on the Hub"]
    return [] if is_hub_name(given) else [f"hub_base_model: {given}: not a name on the Hub, such as Qwen/Qwen3-1.7B"]


def check(wish: hub.Wish, model: str, folder: str) -> hub.Wish:
    """`wish` with its repository's full name; before training, so that a wrong token or name does not wait for its end.

    `model` as the recipe names it; `folder`: the run's, whose name is the repository's if the recipe gives none.
    Raises PublishError.
    """
    api, wish = hub.ready(replace(wish, repo=wish.repo or Path(folder).resolve().name))
    local = Path(model).expanduser() if Path(model).expanduser().is_dir() else None
    base = wish.base or model
    hub.ask_for(base, api)
    hub.check_place(api, wish, hub.Claim((base,), "adapter"))
    return replace(wish, license=wish.license or hub.base_license(base, local, api))


def push(wish: hub.Wish, folder: str) -> hub.Published:
    """Publishes a finished run. Raises PublishError, which says how to do it by hand."""
    try:
        return hub.publish(folder, wish)
    except PublishError as error:
        error.add_note(f"The run itself is finished and saved. Later: {_by_hand(wish, folder)}")
        raise


def _by_hand(wish: hub.Wish, folder: str) -> str:
    """The command that publishes the same in the same way."""
    named = {"--repo": wish.repo, "--base": wish.base}
    if wish.license is not None:
        own = {"--license": wish.license.id, "--license-name": wish.license.name, "--license-link": wish.license.link}
        named |= own if wish.license.id == "other" else {"--license": wish.license.id}
    words = [word for key, value in named.items() if value for word in (key, value)]
    return shlex.join(["trl-ext", "publish", folder, *words, *(["--private"] if wish.private else [])])
