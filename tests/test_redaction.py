"""What leaves this machine holds no credential and no folder of it; all else stays byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instructft import redaction


@pytest.mark.parametrize("key", ["token", "hf_token", "HUB_TOKEN", "wandb_api_key", "apikey", "client_secret"])
def test_names_of_credentials(key: str) -> None:
    assert redaction.is_secret(key)


@pytest.mark.parametrize("key", ["eos_token", "pad_token", "max_new_tokens", "tokens_per_step", "tokenizer", 5])
def test_words_of_a_tokenizer_are_no_credentials(key: object) -> None:
    assert not redaction.is_secret(key)


def test_an_access_token_is_blotted_out_of_a_text() -> None:
    assert redaction.redact("got hf_AbCdEf123456, and api_org_AbCdEf123") == "got hf_…, and hf_…"
    assert redaction.redact("hf_hub is a name") == "hf_hub is a name"


FOLDER = "/home/somebody/models/base"
FILES = {
    "adapter_config.json": (json.dumps({"base_model_name_or_path": FOLDER}), "base"),
    "rows.jsonl": (json.dumps({"file": FOLDER}) + "\n", "base"),
    "recipe.yaml": (f"# mine\nmodel:\n  name_or_path: {FOLDER}\n", "# mine"),
    "README.md": (f"# A card\n\n```yaml\nmodel:\n  name_or_path: {FOLDER}\n```\n", "# A card"),
    "tokenizer_config.json": (json.dumps({"name_or_path": FOLDER, "eos_token": "/s/a/b"}), "/s/a/b"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_this_machine_is_taken_out_of_every_kind_of_file(name: str) -> None:
    text, kept = FILES[name]
    clean = redaction.of_file(name, text.encode()).decode()
    assert "somebody" not in clean
    assert kept in clean


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"a":1,  "name_or_path": "org/name"}'),
        ("rows.jsonl", b'{"a":  1}\n\n{"b": 2}\n'),
        ("recipe.yaml", b"model: {name_or_path: org/name}   # as written\n"),
        ("broken.json", b'{"a": '),
        ("broken.yaml", b"a: [\n"),
        ("model.safetensors", b"\xff\x00/home/somebody/a/b"),
    ],
)
def test_what_holds_no_folder_or_is_not_parsed_stays_as_it_is(name: str, content: bytes) -> None:
    assert redaction.of_file(name, content) == content


def test_known_folders_are_cut_out_of_prose(tmp_path: Path) -> None:
    assert redaction.without_roots(f"see {tmp_path}/loss.png", [tmp_path]) == "see loss.png"
    assert redaction.without_roots(f"https://host{tmp_path}/loss.png", [tmp_path]) == f"https://host{tmp_path}/loss.png"
