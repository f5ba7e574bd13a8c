"""Whether the Hub has another chat template for a base than when a run began: said, and never waited for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from instructft.models import base_template
from instructft.models.base_template import TemplateWatch, at_hand, hash_of, on_the_hub, own_template

OLD, NEW = "{{ messages }}", "{{ messages[0] }}"
SEVERAL = [{"name": "tool_use", "template": NEW}, {"name": "default", "template": OLD}]


def config(template: Any) -> str:
    return json.dumps({"chat_template": template, "eos_token": "</s>"})


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"chat_template.jinja": OLD, "tokenizer_config.json": config(NEW)}, OLD),
        ({"tokenizer_config.json": config(OLD)}, OLD),
        ({"tokenizer_config.json": config(SEVERAL)}, OLD),
        ({"tokenizer_config.json": config({"default": OLD})}, OLD),
        ({"tokenizer_config.json": "[]"}, None),
        ({"tokenizer_config.json": '{"eos'}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_template_of_files(files: dict[str, str], found: str | None) -> None:
    assert own_template(files.get) == found


def run_of(folder: Path, revision: str | None = None, of_base: str | None = None, name: str = "org/base") -> Path:
    folder.mkdir(exist_ok=True)
    facts = {"base": {"name_or_path": name, "revision": revision, "subfolder": None},
             "template": {"sha256": "0" * 16, "of_base": hash_of(OLD) if of_base is None else of_base}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_another_template_on_the_hub_is_told(hub: Any, tmp_path: Path) -> None:
    hub.put("org/base", {"tokenizer_config.json": config(OLD).encode()})
    run = run_of(tmp_path / "run")
    assert on_the_hub("org/base", None, None) == hash_of(OLD)
    assert TemplateWatch(run).said(10) == ""
    hub.put("org/base", {"chat_template.jinja": NEW.encode()})
    assert TemplateWatch(run).said(10) == (
        f"the chat template of org/base on the Hub has changed since this run began (sha256 {hash_of(OLD)} then, "
        f"{hash_of(NEW)} now); this model keeps the one it was trained with"
    )
    (run / "checkpoint-3").mkdir()
    assert "has changed" in TemplateWatch(run / "checkpoint-3").said(10)
    assert at_hand("org/base", None, None) is None  # nothing of it went into the cache, or moved a branch there


@pytest.mark.parametrize(
    "facts",
    [{"revision": "a" * 40}, {"of_base": ""}, {"name": "/models/base"}],
    ids=["a commit", "it had none", "a folder"],
)
def test_nobody_is_asked_where_nothing_can_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(base_template, "on_the_hub", lambda name, *_: asked.append(name))
    run = run_of(tmp_path / "run", **facts)
    if facts.get("of_base") == "":
        run.joinpath("run.json").write_text((run / "run.json").read_text().replace('"of_base": ""', '"of_base": null'))
    assert TemplateWatch(run).said(10) == TemplateWatch(tmp_path).said(10) == TemplateWatch("org/base").said(10) == ""
    assert asked == []


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(base_template, "on_the_hub", lambda *_: time.sleep(60))
    watch = TemplateWatch(run_of(tmp_path / "run"))
    assert watch.said() == ""
    assert watch._thread is not None
    assert watch._thread.daemon

    def gone(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(base_template, "on_the_hub", gone)
    assert TemplateWatch(run_of(tmp_path / "run")).said(10) == ""


def test_without_a_network_the_cache_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_template, "at_hand", lambda *_: hash_of(NEW))
    assert "has changed" in TemplateWatch(run_of(tmp_path / "run")).said(10)  # tests are offline
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(OLD)
    monkeypatch.undo()
    assert at_hand(str(folder), None, None) == hash_of(OLD)
