"""`trl-ext publish` against a Hub on this machine: what arrives, twice, interrupted, refused; and the dry run."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from tests.hub.conftest import BASE, recipe
from tests.hub.standin import TOKEN, Failure, Repo, StandIn
from tests.tiny import tiny_path, tiny_tokenizer
from trl_ext import pushing, saved, staging
from trl_ext.card_data import License
from trl_ext.cli import main
from trl_ext.hub import Wish, base_license
from trl_ext.run_facts import PublishError, base_name, local_names, read_run

REPO = "alice/my-run"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "curves.png", "recipe.yaml"}


def publish(run: Path, *more: str, repo: str = REPO) -> int:
    return main(["publish", str(run), "--repo", repo, "--base", BASE, *more])


def test_a_run_arrives_and_gives_the_same_log_probs(
    run: Path, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(run) == 0
    shown = capsys.readouterr()
    assert f"Published, {hub.endpoint}/{REPO}" in shown.out and TOKEN not in shown.out + shown.err
    files = hub.repos[REPO].files
    assert set(files) - {".gitattributes"} == FILES
    assert files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    config, own = json.loads(files["adapter_config.json"]), json.loads((run / "adapter_config.json").read_text())
    assert config == {**own, "base_model_name_or_path": BASE}
    for name, content in files.items():
        (tmp_path / "loaded").mkdir(exist_ok=True)
        (tmp_path / "loaded" / name).write_bytes(content)
    ids = saved.probe_ids(tiny_tokenizer(), "1 + 1 =")
    models = [saved.reload(str(place), tiny_path(), torch.device("cpu")) for place in (run, tmp_path / "loaded")]
    first, second = (saved.log_probs(model, ids) for model in models)
    with models[0].disable_adapter():
        assert not torch.equal(first, saved.log_probs(models[0], ids)), "the adapter does something"
    assert torch.equal(first, second)


def test_the_recipe_is_a_recipe_without_this_machine(run: Path, hub: StandIn) -> None:
    publish(run)
    text = hub.repos[REPO].files["recipe.yaml"].decode()
    found, own = yaml.safe_load(text), yaml.safe_load((run / "recipe.yaml").read_text())
    assert "output_dir" not in found and "dataset_name" not in found and "push_to_hub" not in found
    assert "left out: dataset_name." in text.partition("\n")[0]
    assert found["model_name_or_path"] == BASE
    gone = {key for key in own if key not in found}
    assert all(
        key.startswith(("hub_", "vllm_"))
        for key in gone - {"output_dir", "dataset_name", "push_to_hub", "resume_from_checkpoint", "logging_dir"}
    )
    assert all(found[key] == own[key] for key in found if key != "model_name_or_path")


def test_twice_sends_nothing_new(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run)
    before, sent = dict(hub.repos[REPO].files), len(hub.uploads())
    capsys.readouterr()
    assert publish(run) == 0
    assert "Nothing new" in capsys.readouterr().out
    assert len(hub.uploads()) == sent and hub.repos[REPO].commits == 1 and hub.repos[REPO].files == before


def test_a_changed_run_sends_what_changed_and_removes_what_is_gone(run: Path, hub: StandIn) -> None:
    publish(run)
    hub.repos[REPO].files["notes.txt"] = b"of the user"
    (run / "curves.png").unlink()
    weights = len(hub.lines("^PUT /lfs"))
    assert publish(run) == 0
    assert set(hub.repos[REPO].files) == (FILES | {".gitattributes", "notes.txt"}) - {"curves.png"}
    assert len(hub.lines("^PUT /lfs")) == weights, "the weights were there"


def test_an_interrupted_publication_goes_on(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    hub.failures.append(Failure("POST .*/commit/", 500, times=100))
    assert publish(run) == 2
    assert "run the same command later" in capsys.readouterr().err
    assert hub.repos[REPO].commits == 0
    large = len(hub.lines("^PUT /lfs"))
    assert large == 2, "weights and curves were sent once, whatever the commit did"
    hub.failures.clear()
    assert publish(run) == 0
    assert len(hub.lines("^PUT /lfs")) == large and set(hub.repos[REPO].files) >= FILES


@pytest.mark.parametrize(
    "place",
    [
        "GET /api/whoami",
        "GET /api/models/alice",
        "POST /api/repos/create",
        "preupload",
        "objects/batch",
        "PUT /lfs",
        "commit",
    ],
)
def test_a_failure_that_passes_is_passed_over(run: Path, hub: StandIn, place: str) -> None:
    hub.failures.append(Failure(place, 503))
    assert publish(run) == 0
    assert hub.failures[0].times == 0 and hub.repos[REPO].commits == 1


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("GET /api/whoami", 401, "the token is not valid"),
        ("POST /api/repos/create", 403, "no permission (403)"),
        ("commit", 403, "no permission (403)"),
        ("GET /api/whoami", 500, "the Hub failed (500) three times"),
    ],
)
def test_refusals_say_what_to_do(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str], place: str, status: int, words: str
) -> None:
    hub.failures.append(Failure(place, status, times=100))
    assert publish(run) == 2
    shown = capsys.readouterr()
    assert words in shown.err and TOKEN not in shown.err + shown.out
    assert not hub.lines("commit") or place == "commit"


def test_an_organisation_of_others_is_refused(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(run, repo="others/my-run") == 2
    assert "rights to create a model under the namespace others" in capsys.readouterr().err


def test_no_answer_no_token_no_name(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish(run, repo="alice/my run") == 2
    assert "is no name for a repository" in capsys.readouterr().err
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert publish(run) == 2
    assert "no answer from http://127.0.0.1" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert publish(run) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert publish(run) == 2
    assert "set HF_TOKEN" in capsys.readouterr().err
    assert not hub.uploads()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("---\nlicense: mit\n---\n", "was not made by trl-ext"),
        ("", "was not made by trl-ext"),
        ("---\ntags: [trl-ext]\nbase_model: other/base\n---\n", "holds an adapter of other/base, not of qwen/tiny"),
        (
            "---\ntags: [trl-ext]\nbase_model: qwen/tiny\nbase_model_relation: finetune\ntrl_ext_run: merged\n---\n",
            "holds a whole model of qwen/tiny (the run merged), whose files an adapter would replace",
        ),
    ],
)
def test_something_else_is_written_over_on_request_only(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str], card: str, words: str
) -> None:
    hub.repos[REPO] = Repo(files={"README.md": card.encode(), "adapter_model.bin": b"x", "tokenizer.json": b"{}"})
    assert publish(run) == 2
    assert words in capsys.readouterr().err and not hub.uploads()
    assert publish(run, "--yes-overwrite") == 0
    assert set(hub.repos[REPO].files) == {*FILES, "adapter_model.bin"}, "a tokenizer would be taken for ours"


def test_the_run_that_is_replaced_is_named(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(run) == 0
    assert "in place of" not in capsys.readouterr().out
    own = hub.repos[REPO].files["README.md"]
    hub.repos[REPO].files["README.md"] = own.replace(b"trl_ext_run: my-run", b"trl_ext_run: earlier")
    assert publish(run) == 0
    assert "in place of the run earlier" in capsys.readouterr().out


def test_the_owner_s_default_decides_unless_private_is_asked_for(run: Path, hub: StandIn) -> None:
    def asked() -> dict:
        return json.loads([body for _, path, body in hub.requests if path.endswith("repos/create")][-1])

    publish(run)
    assert not {"private", "visibility"} & set(asked())
    publish(run, "--private", repo="alice/hidden")
    assert asked().get("private") is True or asked().get("visibility") == "private"


def test_names_that_were_files_when_the_run_began_are_none_on_the_hub(
    run: Path, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = yaml.safe_load((run / "recipe.yaml").read_text())
    written = json.loads((run / "local_names.json").read_text())
    assert written == {name: name for name in (own["model_name_or_path"], own["dataset_name"])}
    for name in ("data/private_rows.jsonl", "rows.jsonl", "../x/rows.jsonl", "data/private"):
        (run / "recipe.yaml").write_text(yaml.safe_dump({**own, "dataset_name": name}))
        (run / "local_names.json").write_text(json.dumps({**written, "data/private": "/x/data/private"}))
        assert publish(run) == 0
        files = hub.repos[REPO].files
        assert "datasets" not in ModelCard(files["README.md"].decode()).data.to_dict()
        assert "dataset_name" not in yaml.safe_load(files["recipe.yaml"])
        assert "a data set that is not public" in files["README.md"].decode()
    adapter = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "models/my-sft"}))
    (run / "recipe.yaml").write_text(yaml.safe_dump({**own, "model_name_or_path": "models/my-sft"}))
    (run / "local_names.json").write_text(json.dumps({"models/my-sft": tiny_path()}))
    with pytest.raises(PublishError, match="name it on the Hub with --base"):
        base_name(read_run(run), None)
    assert read_run(run).base_folder == Path(tiny_path())


def test_local_names_are_taken_where_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    recipe = {
        "model_name_or_path": "user/model",
        "dataset_name": "data",
        "datasets": [{"path": "data"}, {"path": "a/b"}],
    }
    assert local_names(recipe) == {"data": str(tmp_path / "data")}


def test_a_base_that_is_named_in_the_run_is_asked_for_too(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "gone/base"}))
    assert main(["publish", str(run), "--repo", REPO, "--license", "mit"]) == 2
    assert "gone/base on" in (shown := capsys.readouterr().err) and "no such repository (404)" in shown


def test_a_file_that_cannot_be_read_is_told(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "tokenizer_config.json").write_text("{")
    with pytest.raises(PublishError, match=r"tokenizer_config\.json cannot be read:\n  - it is no JSON"):
        staging._tidy(run / "tokenizer_config.json")
    (run / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PublishError, match=r"its card .*README\.md cannot be read .* --license"):
        base_license("qwen/tiny", run, None)
    (run / "adapter_config.json").write_text("{")
    assert publish(run) == 2
    assert "adapter_config.json cannot be read" in capsys.readouterr().err


def test_private_is_kept_or_refused(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(run, "--private") == 0 and hub.repos[REPO].private
    hub.repos[REPO].private = False
    assert publish(run, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err


def test_a_name_alone_goes_to_the_token_s_user(run: Path, hub: StandIn) -> None:
    assert publish(run, repo="short") == 0
    assert "alice/short" in hub.repos


def test_a_dry_run_writes_what_would_be_sent_and_asks_nobody(
    run: Path, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry"
    assert publish(run, "--dry-run", "--out", str(out)) == 2
    assert "--license" in capsys.readouterr().err, "the base's card is on the Hub alone"
    assert publish(run, "--dry-run", "--out", str(out), "--license", "apache-2.0") == 0
    assert hub.requests == []
    assert publish(run) == 0
    sent = {name: content for name, content in hub.repos[REPO].files.items() if name != ".gitattributes"}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == sent


def test_the_base_s_licence_is_inherited_or_asked_for(
    run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    own = b"---\nlicense: other\nlicense_name: qwen\nlicense_link: https://a.example/l\n---\n"
    hub.repos[BASE].files["README.md"] = own
    assert publish(run) == 0
    data = ModelCard(hub.repos[REPO].files["README.md"].decode()).data
    assert (data.license, data.license_name, data.license_link) == ("other", "qwen", "https://a.example/l")
    hub.repos[BASE].files["README.md"] = b"---\ntags: [x]\n---\n"
    assert publish(run) == 2
    assert "the licence of qwen/tiny is not known" in capsys.readouterr().err
    assert publish(run, "--license", "Apache 2") == 2
    assert "no identifier of the Hub" in capsys.readouterr().err
    assert publish(run, "--license", "other") == 2
    assert "--license-name and --license-link" in capsys.readouterr().err


def test_a_gated_base_and_a_missing_one(run: Path, hub: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    hub.failures.append(Failure("GET /api/models/qwen", 403, 1, {"X-Error-Code": "GatedRepo"}))
    assert publish(run) == 2
    assert "gated: accept its terms" in capsys.readouterr().err
    del hub.repos[BASE]
    assert publish(run) == 2
    assert "no such repository (404)" in capsys.readouterr().err


def test_what_is_no_finished_adapter_run(
    run: Path, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(words: str, *more: str) -> None:
        assert publish(run, *more) == 2
        assert words in capsys.readouterr().err

    weights = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").unlink()
    refused("it holds no adapter_model.safetensors")
    (run / "adapter_model.bin").write_bytes(weights)
    refused("adapter_model.bin is a pickle")
    (run / "adapter_model.safetensors").write_bytes(b"not weights")
    refused("adapter_model.safetensors is no safetensors file")
    (run / "adapter_model.safetensors").write_bytes(weights + b"more")
    refused("adapter_model.safetensors is no safetensors file")
    base = hub.repos.pop(BASE)
    (run / "adapter_model.safetensors").write_bytes(weights)
    refused("no such repository (404)", "--license", "mit")
    hub.repos[BASE] = base
    assert main(["publish", str(run), "--repo", REPO]) == 2
    assert "name it on the Hub with --base" in capsys.readouterr().err
    (run / "status.json").write_text('{"status": "running"}')
    refused("the run did not finish")
    assert main(["publish", str(tmp_path), "--repo", REPO]) == 2
    assert "it is no run" in capsys.readouterr().err
    assert not hub.uploads()


def test_a_tokenizer_goes_along_when_it_is_the_run_s_own(run: Path, hub: StandIn) -> None:
    publish(run)
    assert "tokenizer.json" not in hub.repos[REPO].files, "padding and truncation are no difference"
    template = run / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    assert publish(run) == 0
    files = hub.repos[REPO].files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(files)
    assert f'AutoTokenizer.from_pretrained("{REPO}")' in files["README.md"].decode()
    template.write_text(template.read_text().removesuffix("{# another #}"))
    assert publish(run) == 0
    assert "tokenizer.json" not in hub.repos[REPO].files, "what an earlier publication left is removed"


def test_push_to_hub_publishes_once_at_the_end_and_no_checkpoint(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    keys = {"push_to_hub": True, "hub_base_model": BASE, "hub_private_repo": True, "hub_token": TOKEN, "max_steps": 2}
    assert main(["train", recipe(tmp_path, **keys)]) == 0
    repo = hub.repos[REPO]
    assert repo.commits == 1 and repo.private and set(repo.files) - {".gitattributes"} == FILES
    assert not any("checkpoint" in line for line in hub.lines())
    shown = capsys.readouterr()
    assert f"Published: {hub.endpoint}/{REPO}" in shown.out and TOKEN not in shown.out + shown.err
    written = [path for path in (tmp_path / "my-run").rglob("*") if path.is_file()]
    assert any("checkpoint" in str(path) for path in written)
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_a_token_that_is_not_asked_for_is_not_kept(tmp_path: Path) -> None:
    assert main(["train", recipe(tmp_path, hub_token=TOKEN, max_steps=1)]) == 0
    written = [path for path in (tmp_path / "my-run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_a_push_that_fails_leaves_a_finished_run(
    hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.failures.append(Failure("commit", 403, times=100))
    keys = {"push_to_hub": True, "hub_base_model": BASE, "hub_private_repo": True, "hub_license": "mit"}
    assert main(["train", recipe(tmp_path, **keys)]) == 2
    shown = capsys.readouterr().err
    assert "no permission (403)" in shown and f"--repo {REPO} --base {BASE} --license mit --private" in shown
    licence = License("other", "own terms", "https://a.example/l")
    assert pushing._by_hand(Wish(REPO, license=licence), "runs/x") == (
        f"trl-ext publish runs/x --repo {REPO} --license other --license-name 'own terms' --license-link https://a.example/l"
    )
    hub.failures.clear()
    assert publish(tmp_path / "my-run") == 0


def test_push_to_hub_fails_before_training(hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"push_to_hub": True, "hub_strategy": "all_checkpoints"}
    assert main(["train", recipe(tmp_path, **keys)]) == 2
    shown = capsys.readouterr().err
    assert "hub_strategy: uploads during training" in shown and "hub_base_model" in shown
    hub.failures.append(Failure("whoami", 401))
    assert main(["train", recipe(tmp_path, push_to_hub=True, hub_base_model=BASE)]) == 2
    assert "the token is not valid" in capsys.readouterr().err
    assert main(["train", recipe(tmp_path, push_to_hub=True, hub_base_model="models/my sft")]) == 2
    assert "hub_base_model: models/my sft: not a name on the Hub" in capsys.readouterr().err
    assert main(["train", recipe(tmp_path, push_to_hub=True, hub_base_model="no/such", hub_license="mit")]) == 2
    assert "no such repository (404)" in capsys.readouterr().err
    hub.repos[REPO] = Repo(files={"README.md": b"---\nlicense: mit\n---\n"})
    assert main(["train", recipe(tmp_path, push_to_hub=True, hub_base_model=BASE)]) == 2
    assert "exists and was not made by trl-ext" in capsys.readouterr().err
    del hub.repos[REPO]
    assert pushing._base_problems("a/b", "c/d") == ["hub_base_model: c/d: the recipe trains a/b; leave it out"]
    assert not (tmp_path / "my-run").exists()
