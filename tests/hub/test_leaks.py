"""What must not leave the machine: planted in every place of a run, it reaches neither the Hub nor a dry run."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.hub.conftest import BASE
from tests.hub.standin import TOKEN, StandIn
from trl_ext import leaks, staging
from trl_ext.cli import main
from trl_ext.leaks import Machine

HF = "hf_" + "Ab3" * 12
NOWHERE = Machine({}, ("/home/jo",), {"jo-laptop": "the name of this machine"})
PLANTED = "PLANTED-9f3c"
"""A text that stands in every file that must stay at home."""


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"token: {HF}", "a Hugging Face token"),
        ("sk-proj-" + "a1B2" * 6, "an API key"),
        ("AKIA" + "ABCD" * 4, "an AWS key"),
        ("ghp_" + "a1B2" * 9, "a GitHub token"),
        ("github_pat_" + "a1B2_" * 6, "a GitHub token"),
        ("Authorization: Bearer abc.def-123456789", "a bearer token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("https://jo:pa55word@example.org/x", "a password in an address"),
        ("see /home/jo", "a path of this machine"),
        ("in /data/projects/x.jsonl", "a path of this machine"),
        ("file:///etc/passwd", "a path of this machine"),
        ("~/secret/data", "a path of this machine"),
        (r"C:\Users\jo\data", "a path of this machine"),
        ("on JO-Laptop.", "the name of this machine"),
        ("asks 10.0.0.3:8000 and waits", "an address of this network"),
        ("asks localhost:8000/v1", "an address of this network"),
        ("asks http://192.168.1.9/v1", "an address of this network"),
    ],
)
def test_a_find_names_file_and_line_and_not_the_secret(text: str, what: str) -> None:
    found = leaks.leaks("README.md", f"first\n{text}\n".encode(), NOWHERE)
    assert found == [f"README.md, line 2: {what}"]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/jo/x and and/or/not",
        "hf_transfer, hf-mirror, sk-learn-contributions, task-specific-something",
        "bearer of bad tidings; a commit: 0123456789abcdef0123456789abcdef01234567",
        "<|im_start|></think> /no_think 1/2/3 runs/x/adapter_model.safetensors",
        "the joyous jo-laptops",
        "curand 10.3.9.90, https://36kr.com and https://8.8.8.8/x, localhost: no port, 10.0.0.3",
    ],
)
def test_ordinary_text_is_no_leak(text: str) -> None:
    assert leaks.leaks("README.md", text.encode(), NOWHERE) == []


def test_every_string_of_json_is_seen_and_word_pieces_are_no_paths() -> None:
    content = {"a": {"b": ["x", "/home/jo/y"]}, "c": 1}
    assert leaks.leaks("x.json", json.dumps(content).encode(), NOWHERE) == ["x.json, .a.b[1]: a path of this machine"]
    twice = b'{"k": "\\u0068f_' + HF[3:].encode() + b'", "k": "fine"}'
    assert leaks.leaks("x.json", twice, NOWHERE) == ["x.json, .k: a Hugging Face token"], "escapes, and a key twice"
    key = {HF: 1}
    assert leaks.leaks("x.json", json.dumps(key).encode(), NOWHERE) == [
        "x.json, a key of the file: a Hugging Face token"
    ]
    vocabulary = {"model": {"vocab": {"/home/jo": 0, "/usr/lib/x": 1}, "merges": [["/home/", "jo"]]}}
    assert leaks.leaks("tokenizer.json", json.dumps(vocabulary).encode(), NOWHERE) == []
    assert leaks.leaks("vocab.json", b'{"/home/jo": 0}', NOWHERE) == []
    vocabulary["model"]["vocab"][HF] = 2
    assert len(leaks.leaks("tokenizer.json", json.dumps(vocabulary).encode(), NOWHERE)) == 1
    added = {"added_tokens": [{"content": "/home/jo"}]}
    assert len(leaks.leaks("tokenizer.json", json.dumps(added).encode(), NOWHERE)) == 1


def test_a_key_that_stands_twice_in_the_header_of_the_weights_is_seen_twice() -> None:
    def weights(header: str) -> bytes:
        whole = header.replace("%s", HF).encode()
        return struct.pack("<Q", len(whole)) + whole

    twice = weights('{"__metadata__": {"note": "%s"}, "__metadata__": {"format": "pt"}}')
    assert leaks.leaks("x.safetensors", twice, NOWHERE) == ["x.safetensors, metadata note: a Hugging Face token"]
    inner = weights('{"__metadata__": {"note": "%s", "note": "fine"}}')
    assert leaks.leaks("x.safetensors", inner, NOWHERE) == ["x.safetensors, metadata note: a Hugging Face token"]
    tensor = weights('{"a": {"dtype": "%s", "shape": [0], "data_offsets": [0, 0]}}')
    assert leaks.leaks("x.safetensors", tensor, NOWHERE) == ["x.safetensors, what a tensor is: a Hugging Face token"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", b'{"a": 1,}', "x.json is no JSON: .* line 1, column 9"),
        ("x.json", b"\xff", "x.json is not text in UTF-8: byte 0"),
        ("x.json", b"[" * 100_000, "x.json cannot be searched|x.json is no JSON"),
        ("x.jinja", b"ok \xff", "x.jinja is not text in UTF-8: byte 3"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        leaks.leaks(name, content, NOWHERE)


def test_local_names_and_addresses_leave_a_recipe() -> None:
    keys = {
        "judge": "10.0.0.3:8000",
        "server": "localhost:8000/v1",
        "rows": "rows.jsonl",
        "more": ["../x/rows.jsonl", "openai/gsm8k"],
        "mine": "data/own",
        "model": "user/name",
        "ratio": "1:10",
        "host": "gpu-node:8000",
        "world": "api.example.org:8000",
    }
    kept = yaml.safe_load(staging.public_recipe(keys, None, {"data/own": "/x/data/own"}))
    assert kept == {"more": ["openai/gsm8k"], "model": "user/name", "ratio": "1:10", "world": "api.example.org:8000"}


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (_chunk(b"tEXt", b"Source\0" + HF.encode()), "PNG part tEXt"),
        (_chunk(b"zTXt", b"Source\0\0" + zlib.compress(HF.encode())), "PNG part zTXt"),
        (_chunk(b"iTXt", b"Source\0\1\0en\0\0" + zlib.compress(HF.encode())), "PNG part iTXt"),
        (_chunk(b"iTXt", b"Source\0\0\0en\0\0" + HF.encode()), "PNG part iTXt"),
        (_chunk(b"eXIf", b"II" + HF.encode()), "PNG part eXIf"),
        (_chunk(b"IEND", b"") + HF.encode(), "bytes after the PNG"),
    ],
)
def test_a_picture_is_searched_beside_its_pixels(part: bytes, place: str) -> None:
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", bytes(13)) + _chunk(b"IDAT", zlib.compress(b"\0" * 9))
    whole = start + part + (b"" if b"IEND" in part else _chunk(b"IEND", b""))
    assert leaks.leaks("x.png", whole, NOWHERE) == [f"x.png, {place}: a Hugging Face token"]
    assert leaks.leaks("x.png", start + _chunk(b"IEND", b""), NOWHERE) == []
    with pytest.raises(ValueError, match="no PNG"):
        leaks.leaks("x.png", b"text", NOWHERE)


def test_secrets_of_this_process_count_by_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MY_API_KEY": "q8Zr-1xTt/77",
        "DB_PASSWORD": "changeme",
        "TOKENIZERS_PARALLELISM": "disabled12",
        "USE_TOKEN": "true",
        "REPEAT_SECRET": "aaaaaaaaaaaa",
        "HF_TOKEN": "unusual-form-1",
    }.items():
        monkeypatch.setenv(name, value)
    secrets = leaks.this_machine().secrets
    assert (
        secrets["q8Zr-1xTt/77"] == "the value of $MY_API_KEY" and "changeme" in secrets and "unusual-form-1" in secrets
    )
    assert not {"disabled12", "true", "aaaaaaaaaaaa"} & set(secrets)
    found = leaks.leaks("a.txt", b"x=q8Zr-1xTt/77", leaks.this_machine())
    assert found == ["a.txt, line 1: the value of $MY_API_KEY"]


def test_names_that_are_public_or_common_are_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "joanna")
    monkeypatch.setattr("socket.gethostname", lambda: "box7.lab.example")
    names = leaks.this_machine().names
    assert set(names) == {"joanna", "box7.lab.example", "box7"}
    assert "joanna" not in leaks.this_machine(public=["Joanna"]).names
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    assert "root" not in leaks.this_machine().names


def test_allowed_texts_are_passed_over_but_tokens_never() -> None:
    assert leaks.leaks("a.txt", b"/data/public/x", NOWHERE, ["/data/public/x"]) == []
    assert leaks.leaks("a.txt", HF.encode(), NOWHERE, [HF]) == ["a.txt, line 1: a Hugging Face token"]


def _publish(run: Path, *more: str) -> int:
    return main(["publish", str(run), "--repo", "alice/my-run", "--base", BASE, *more])


def test_nothing_of_the_files_that_stay_at_home_is_sent(run: Path, hub: StandIn, tmp_path: Path) -> None:
    """Secrets in every file and folder that training, loops and evaluations leave, and in keys of the recipe."""
    text = f"{PLANTED} {HF} /home/jo/data {tmp_path}"
    for name in (
        *("log.jsonl", "log.csv", "questions.jsonl", "report.md", "plan.txt", "training_args.bin", "methods.pt"),
        *(
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            ".env",
            "adapter_model.bin",
            "notes.json",
        ),
        *("checkpoint-1/optimizer.pt", "checkpoint-1/adapter_model.safetensors", "proposer/adapter_config.json"),
        *(
            "completions/completions_00001.parquet",
            "rows.jsonl",
            "README.md",
            ".cache/x",
            "runs/events.out",
            "model.txt",
        ),
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {
        "hub_token": HF,
        "env": {"X": f"{PLANTED} {HF}"},
        "vllm_server_base_url": f"http://{PLANTED}:8000",
        "deepspeed": f"/home/jo/{PLANTED}/ds.json",
        "methods": {"trace": {"annotator": {"api_key": f"{PLANTED}-key", "base_url": "http://10.0.0.3:8000/v1"}}},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = json.loads((run / "report.json").read_text()) | {"method_lines": [text], "other": text}
    (run / "report.json").write_text(json.dumps(report))
    versions = json.loads((run / "versions.json").read_text()) | {"platform": text}
    (run / "versions.json").write_text(json.dumps(versions))
    dry = tmp_path / "dry"
    assert _publish(run, "--dry-run", "--out", str(dry), "--license", "mit") == 0
    assert _publish(run) == 0
    sent = hub.received() + b"".join(path.name.encode() + path.read_bytes() for path in dry.rglob("*"))
    for secret in (PLANTED, HF, TOKEN, "/home/jo", str(tmp_path), "10.0.0.3"):
        assert secret.encode() not in sent
        assert base64.b64encode(secret.encode())[:-4] not in sent
    assert all(PLANTED not in line for line in hub.lines())


def _in_json(name: str, key: str):
    def plant(run: Path, secret: str) -> None:
        content = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({**content, key: secret}))

    return plant


def _in_recipe(run: Path, secret: str) -> None:
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**content, "system_prompt": f"Never say {secret}"}))


def _in_weights(run: Path, secret: str) -> None:
    path = run / "adapter_model.safetensors"
    weights = load_file(path)
    path.unlink()
    save_file(weights, path, metadata={"format": "pt", "note": secret})


def _in_template(run: Path, secret: str) -> None:
    (run / "chat_template.jinja").write_text(f"{{# {secret} #}}")


def _in_curves(run: Path, secret: str) -> None:
    path = run / "curves.png"
    path.write_bytes(path.read_bytes()[:-12] + _chunk(b"tEXt", b"Author\0" + secret.encode()) + _chunk(b"IEND", b""))


def _in_versions(run: Path, secret: str) -> None:
    content = json.loads((run / "versions.json").read_text())
    content["packages"]["torch"] = secret
    (run / "versions.json").write_text(json.dumps(content))


def _in_settings(run: Path, secret: str) -> None:
    content = json.loads((run / "report.json").read_text())
    content["methods"] = {"high_entropy": f"annotator={secret}"}
    (run / "report.json").write_text(json.dumps(content))


@pytest.mark.parametrize("secret", [HF, "/srv/data/jo/x"])
@pytest.mark.parametrize(
    ("plant", "place"),
    [
        (_in_json("adapter_config.json", "note"), "adapter_config.json, .note"),
        (_in_recipe, "recipe.yaml, line"),
        (_in_weights, "adapter_model.safetensors, metadata note"),
        (_in_template, "chat_template.jinja, line 1"),
        (_in_curves, "curves.png, PNG part tEXt"),
        (_in_versions, "README.md, line"),
        (_in_settings, "README.md, line"),
    ],
)
def test_a_secret_in_a_published_file_stops_everything(
    trained: Path, tmp_path: Path, hub: StandIn, capsys: pytest.CaptureFixture[str], plant, place: str, secret: str
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "my-run"))
    plant(run, secret)
    assert _publish(run) == 2
    shown = capsys.readouterr()
    assert place in shown.err and secret not in shown.err + shown.out
    assert not hub.uploads() and not hub.lines("repos/create") and secret.encode() not in hub.received()
    assert _publish(run, "--dry-run", "--out", str(tmp_path / "dry"), "--license", "mit") == 2
    assert not (tmp_path / "dry").exists()
