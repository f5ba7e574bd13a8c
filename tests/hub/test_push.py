"""Publishing: bytes equal, whole or not at all, in its place."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instructft.checkpoints import manifest
from instructft.cli import app
from instructft.errors import AdapterError, CheckpointError, HubError, InstructftError, ModelError, UsageError
from instructft.hub.push import clean_place
from instructft.redaction import last_name, without_places
from tests.conftest import BATTERY
from tests.helpers.hub import REPO_ID, LocalHub, own, push


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_what_is_pushed_is_what_is_fetched(kind: str, trained: dict[str, Path], hub: LocalHub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    run = trained[kind]
    pushed = push(run)
    assert pushed.made
    assert len(hub.commits(REPO_ID)) == 2  # the first one is the Hub's own
    fetched = Path(snapshot_download(REPO_ID, local_dir=tmp_path / "fetched"))
    weights = {"lora": "adapter_model.safetensors"}.get(kind, "model.safetensors")
    for name in (weights, "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (fetched / name).read_bytes() == (run / name).read_bytes(), name
    assert {p.name for p in fetched.iterdir()} >= {"README.md", "recipe.yaml", "run.json"}
    assert hub.repos["model", REPO_ID].private
    if kind != "lora":
        from instructft.models.load_for_inference import load_bare

        assert load_bare(str(fetched))[0].dtype
    assert not push(run).made
    assert len(hub.commits(REPO_ID)) == 2
    assert hub.errors == []


def test_a_push_says_that_the_template_of_the_base_is_another_one_now(
    trained: dict[str, Path], hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from instructft.hub.push import push_to_hub
    from instructft.models import base_template

    monkeypatch.setattr(base_template, "_recorded", lambda folder: ({"name_or_path": "org/base"}, "0" * 16))
    monkeypatch.setattr(base_template, "on_the_hub", lambda *_: "1" * 16)
    told: list[str] = []
    assert push_to_hub(trained["lora"], REPO_ID, say=told.append).made
    assert any("the chat template of org/base on the Hub has changed since this run began" in line for line in told)


def test_a_checkpoint_that_was_pushed_verifies(trained: dict[str, Path], hub: LocalHub, tmp_path: Path) -> None:
    run = trained["lora"]
    pushed = push(run / "checkpoint-2", path_in_repo="instruct/")
    names = own(hub.files(REPO_ID))
    (folder,) = {name.rpartition("/")[0] for name in names}
    assert re.fullmatch(r"instruct/checkpoint_tokens_[\d.]+[kMG]?_loss_\d+\.\d{4}", folder), folder
    assert "training_args.bin" in pushed.left_out
    back = tmp_path / "checkpoint-2"
    for name, content in names.items():
        path = back / name.removeprefix(f"{folder}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = manifest.verify(back)
    assert found.step == 2
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.json", "adapter_model.safetensors"):
        assert (back / name).read_bytes() == (run / "checkpoint-2" / name).read_bytes(), name
    there = manifest.verify(run / "checkpoint-2").identity
    assert {key: without_places(value, key=key.rpartition(".")[2]) for key, value in there.items()} == found.identity
    (back / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        manifest.verify(back)


def test_what_is_not_whole_does_not_leave(model: Path, trained: dict[str, Path], hub: LocalHub, tmp_path: Path) -> None:
    cases: list[tuple[type[InstructftError], str, Callable[[Path], Any]]] = [
        (ModelError, "missing", lambda f: next(f.glob("model-00002*")).unlink()),
        (ModelError, "cut short", lambda f: os.truncate(next(f.glob("model-00001*")), 2000)),
        (ModelError, "not whole", lambda f: _edit(f / "config.json", n_layer=3)),
        (UsageError, "unfinished", lambda f: (f / "recipe.yaml").write_text("model: {}\n")),
        (UsageError, "holds no model", lambda f: (f / "config.json").unlink()),
        (HubError, "symbolic link", lambda f: _make_link(next(f.glob("model-00001*")))),
        (HubError, "symbolic link", lambda f: _make_link(f / "config.json")),
    ]
    for i, (error, text, harm) in enumerate(cases):
        folder = shutil.copytree(model, tmp_path / f"{i}")
        harm(folder)
        with pytest.raises(error, match=text):
            push(folder)
    adapter = shutil.copytree(trained["lora"], tmp_path / "adapter")
    os.truncate(adapter / "adapter_model.safetensors", 500)
    with pytest.raises(AdapterError):
        push(adapter)
    damaged = adapter / "checkpoint-2"
    os.truncate(damaged / "optimizer.pt", 100)
    with pytest.raises(CheckpointError, match="optimizer"):
        push(damaged)
    partial = shutil.copytree(model, tmp_path / "merged.partial-0123abcd")
    with pytest.raises(UsageError, match="never finished"):
        push(partial)
    assert hub.requests == []


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _make_link(path: Path) -> None:
    elsewhere = path.rename(path.parent.parent / f"elsewhere-{path.parent.name}")
    path.symlink_to(elsewhere)


def test_another_model_replaces_the_old_one_and_nothing_else(model: Path, tmp_path: Path, hub: LocalHub) -> None:
    push(model)
    old = own(hub.files(REPO_ID))
    assert sum(name.startswith("model-0000") for name in old) > 1
    theirs = {"notes.md": b"mine", "data/config.json": b"{}", "my.safetensors": b"x", "LICENSE": b"mit"}
    hub.put(REPO_ID, dict(theirs))
    from transformers import AutoModelForCausalLM

    one = shutil.copytree(model, tmp_path / "one")
    for path in (*one.glob("model-*"), one / "model.safetensors.index.json"):
        path.unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(one)
    before = len(hub.commits(REPO_ID))
    pushed = push(one)
    files = own(hub.files(REPO_ID))
    assert len(hub.commits(REPO_ID)) == before + 1
    assert set(pushed.deleted) == {name for name in old if name.startswith("model-") or "index" in name}
    assert set(files) == {p.name for p in one.iterdir()} | set(theirs) | {"README.md"}
    assert {name: files[name] for name in theirs} == theirs


def test_path_in_repo_keeps_models_apart(model: Path, hub: LocalHub) -> None:
    hub.create(REPO_ID, private=True)
    hub.put(REPO_ID, {"config.json": '{"pre": "training"}', "model.safetensors": b"pre"})
    push(model, path_in_repo="instruct/")
    files = own(hub.files(REPO_ID))
    assert files["model.safetensors"] == b"pre"
    assert files["instruct/config.json"] == (model / "config.json").read_bytes()
    card = files["instruct/README.md"].decode()
    assert f'from_pretrained("{REPO_ID}", subfolder="instruct")' in card
    assert "PATH" not in card
    for bad in ("../up", "/abs", "a/../b", "a\\b", "~x", ".git/hooks", "c:/x"):
        with pytest.raises(UsageError, match="path_in_repo"):
            push(model, path_in_repo=bad)
    assert clean_place("./instruct//v2/") == "instruct/v2"


FORKS = """
import os, sys
import instructft.hub.push, transformers, torch, huggingface_hub
from instructft.hub import commit
commit.WAIT = 0.001
torch.set_num_threads(1)
from huggingface_hub import HfApi, CommitOperationAdd, get_session, hf_api, errors
get_session()
for line in sys.stdin:
    folder, repo_id = line.split()
    instructft.hub.push.require_whole_folder(instructft.hub.push.Path(folder))  # what it imports, before the first fork
    instructft.hub.push.gather(instructft.hub.push.Path(folder))
    gate, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(gate, 1)
        try:
            instructft.hub.push.push_to_hub(folder, repo_id, say=lambda line: None)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    os.write(go, b"x")
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_push_that_is_killed_leaves_one_whole_model(model: Path, tmp_path: Path, hub: LocalHub) -> None:
    """At each request of a push over another model, and of one into a new repository."""
    push(model)
    old = own(hub.files(REPO_ID))
    new = shutil.copytree(model, tmp_path / "new")
    for path in new.glob("model-*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-8:] = b"\0" * 8
        path.write_bytes(content)
    push(new, "tester/new")
    wanted = own(hub.files("tester/new"))
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin
    assert process.stdout
    killed, outcomes, child = 0, set(), 0

    def attempt(repo_id: str, at: int | None) -> int:
        nonlocal child
        assert process.stdin
        assert process.stdout
        count = 0

        def before(request: Any) -> None:
            nonlocal count
            count += 1
            if count == at:
                os.kill(child, signal.SIGKILL)

        process.stdin.write(f"{new} {repo_id}\n")
        process.stdin.flush()
        hub.before = None
        child = int(process.stdout.readline())
        hub.before = before
        status = int(process.stdout.readline())
        hub.before = None
        return status

    for kind, step in (("over", 1), ("fresh", 2)) if BATTERY else (("over", 3), ("fresh", 5)):
        at = 0
        while True:
            at += step
            repo_id = f"tester/{kind}-{at}"
            if kind == "over":
                hub.put(repo_id, dict(old))
                hub.repos["model", repo_id].private = True
            status = attempt(repo_id, at)
            if status == 0:
                break
            assert status == signal.SIGKILL
            killed += 1
            time.sleep(0.05)  # what the Hub had in hand when the connection broke
            there = own(hub.files(repo_id)) if ("model", repo_id) in hub.repos else {}
            card = {"README.md": there.get("README.md", b"").replace(repo_id.encode(), b"tester/new")} if there else {}
            before_push = old if kind == "over" else {}
            outcomes.add("old" if there == before_push else "new" if _same({**there, **card}, wanted) else "a mix")
            assert attempt(repo_id, None) == 0
            made = len(hub.commits(repo_id))
            assert made == (3 if kind == "over" else 2), (kind, at, made)
            assert set(own(hub.files(repo_id))) == set(wanted)
    process.stdin.close()
    process.wait(10)
    assert killed >= (20 if BATTERY else 8)
    assert outcomes == {"old", "new"}
    assert hub.errors == []


def _same(there: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    card = {name: content.replace(b"# new", b"").replace(b"tester/new", b"") for name, content in wanted.items()}
    return {k: v for k, v in there.items() if k != "README.md"} == {
        k: v for k, v in card.items() if k != "README.md"
    } and "README.md" in there


def test_paths_and_words_are_told_apart() -> None:
    here = Path.cwd()
    assert without_places({"a": "/data/x/rows.jsonl", "b": "/no_think", "c": "https://x.org/data/x", "d": "~/x/y"}) == {
        "a": "rows.jsonl", "b": "/no_think", "c": "https://x.org/data/x", "d": "y",
    }  # fmt: skip
    assert without_places({"samples": ["/usr/bin/env"], "name_or_path": "org/name"}) == {
        "samples": ["/usr/bin/env"], "name_or_path": "org/name",
    }  # fmt: skip
    assert without_places({"note": f"read {here}/a/b.json twice", "path": "C:\\Users\\ada\\x.csv"}) == {
        "note": "read a/b.json twice", "path": "x.csv",
    }  # fmt: skip
    assert last_name("/c/hub/models--org--name/snapshots/0123/") == "org/name"


def test_the_card_is_what_the_hub_reads(trained: dict[str, Path], hub: LocalHub, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run = shutil.copytree(trained["lora"], tmp_path / "run")
    rows = [{"prompt": "a secret question", "prediction": "b", "reference": "c"}] * 3
    numbers = {"perplexity": 8.0, "exact_match": 0.5, "rougeL": 0.25, "bleu": 12.5, "rows": rows}
    results = {"tuned": {"loss": 2.0, **numbers}, "base": {"loss": 3.5, **numbers}}
    (run / "evaluation.json").write_text(json.dumps(results))
    push(run)
    files = hub.files(REPO_ID)
    text = files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert {result.metric_type for result in card.data.eval_results} >= {"loss", "perplexity"}
    assert "| loss | 3.500 | 2.000 |" in text
    assert b"a secret question" not in b"".join(files.values())
    assert "Licence of the base: not known here" in text
    assert f'from_pretrained("{REPO_ID}")' in text
    assert f"instructft chat {REPO_ID}" in text
    assert "PATH" not in text.replace("PATH_", "")
    (recipe,) = re.findall(r"```yaml\n(.*?)\n```", text, re.S)
    assert "max_steps: 2" in recipe
    merged = trained["merged"]
    push(merged, "tester/merged")
    text = hub.files("tester/merged")["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.tags) == ("transformers", ["instructft", "sft", "trl", "merged"])
    assert "as a LoRA adapter" not in text
    assert "- Adapter: LoRA, rank 2" in text
    assert "peft" not in text.split("## Recipe")[0]
    parts = ("| training loss", "## Merge", "**not verified**", "## Use", "instructft chat tester/merged", "max_steps")
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_the_command_says_what_it_did_and_fails_with_1(model: Path, hub: LocalHub) -> None:
    run = CliRunner().invoke(app, ["push", str(model), REPO_ID, "--path-in-repo", "v1"])
    assert run.exit_code == 0, run.output
    assert re.search(
        rf"pushed to \S+/{REPO_ID} \(commit [0-9a-f]{{8}}\): \d+ files, [\d.]+ MiB, each read back", run.output
    )
    again = CliRunner().invoke(app, ["push", str(model), REPO_ID, "--path-in-repo", "v1"])
    assert "already there, byte for byte" in again.output
    hub.fault("info", "503", 6)
    with pytest.raises(HubError) as caught:
        CliRunner().invoke(app, ["push", str(model), REPO_ID], catch_exceptions=False)
    assert caught.value.exit_code == 1
    with pytest.raises(UsageError, match="no model folder"):
        CliRunner().invoke(app, ["push", "nowhere", REPO_ID], catch_exceptions=False)


def test_a_dry_run_lists_what_would_go_and_asks_no_hub(
    model: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "notes.txt").write_text("mine", encoding="utf-8")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.__init__", lambda *_, **__: pytest.fail("the Hub was asked"))
    run = CliRunner().invoke(app, ["push", str(model), REPO_ID, "--path-in-repo", "v1", "--dry-run"])
    assert run.exit_code == 0, run.output
    assert re.search(r"\d+\.\d [kM]B  v1/model-\d+-of-\d+\.safetensors\n", run.output)
    assert "notes.txt (" in run.output
    assert re.search(rf"\d+ files, [\d.]+ [kM]B, would go to {REPO_ID}; nothing was uploaded\n$", run.output)


def test_a_name_without_an_owner_is_told_with_the_login_that_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    with pytest.raises(HubError, match=r"^support names no owner: write OWNER/support"):
        CliRunner().invoke(app, ["push", str(model), "support"], catch_exceptions=False)
