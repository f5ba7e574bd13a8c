"""Publishing: bytes equal, one commit or none, nothing that is not for others, and no fault of the Hub ends a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import instructft
from instructft.checkpoints import manifest
from instructft.cli import app
from instructft.errors import AdapterError, CheckpointError, HubError, InstructftError, ModelError, UsageError
from instructft.hub import background, patience
from instructft.hub.background import Publisher
from instructft.hub.files import IN_MEMORY, Scan, gather
from instructft.hub.push import clean_place, push_to_hub
from instructft.redaction import last_name, without_places
from tests.conftest import BATTERY
from tests.helpers.hub import LocalHub

REPO_ID = "tester/model"
RECIPE = """
model:
  {start}
data:
  datasets: [{{name: quickstart, rows: 40}}]
  template: instruction
  max_length: 64
  splits: {{validation: 0.1}}
train:
  {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, save_steps: 1, use_cpu: true, report_to: none}}
output_dir: {out}
"""
START = "config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}\n  tokenizer: quickstart"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full run, a LoRA run on it, and the merge of both, each in a folder whose path is easy to find again."""
    top = tmp_path_factory.mktemp("canary-place")
    runs = {}
    for kind, start in (("full", START), ("lora", f"name_or_path: {top / 'full'}")):
        path = top / f"{kind}.yaml"
        adapter = "adapter: {type: lora, r: 2}\n" if kind == "lora" else ""
        path.write_text(RECIPE.format(start=start, out=top / kind) + adapter)
        instructft.train(instructft.load_recipe(path), console=Console(quiet=True))
        runs[kind] = top / kind
    instructft.merge_adapter(runs["lora"], top / "merged", verify=False)
    return {**runs, "merged": top / "merged"}


@pytest.fixture
def model(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> Path:
    """A small model folder, in shards."""
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits between tries are short, ours and the library's."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(patience, "WAIT", 0.001)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


def push(folder: Path, repo_id: str = REPO_ID, **more: Any) -> Any:
    return push_to_hub(folder, repo_id, say=lambda line: None, **more)


def own(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


# Whole


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


# In its place


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


def test_private_never_goes_into_a_public_repository(model: Path, hub: LocalHub) -> None:
    hub.create(REPO_ID, private=False)
    with pytest.raises(HubError, match=r"is public.*--public"):
        push(model)
    assert len(hub.commits(REPO_ID)) == 1
    assert not any(request.method in ("PUT", "POST") for request in hub.requests)
    push(model, private=False)
    assert "config.json" in hub.files(REPO_ID)
    push(model, "tester/other", private=False)
    assert not hub.repos["model", "tester/other"].private


def test_who_may_not_write_is_told_so(model: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"403.*role write"):
        push(model, "stranger/model")
    for token, text in (("hf_" + "x" * 34, "401"), (hub.read_token, "403")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=text) as caught:
            push(model)
        assert token not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    with pytest.raises(HubError, match=r"no access token.*HF_TOKEN.*hf auth login"):
        push(model)
    assert hub.requests == []


# One commit

ROUTES = [
    "info",
    "tree",
    "preupload",
    "lfs_batch",
    "lfs_upload",
    "lfs_verify",
    "create",
    "commit",
    "commits",
    "validate",
]


@pytest.mark.parametrize("kind", ["503", "429", "drop", "lost"])
@pytest.mark.parametrize("route", ROUTES)
def test_faults_are_waited_out_or_leave_nothing(route: str, kind: str, model: Path, hub: LocalHub) -> None:
    hub.put("tester/other", {"a": "b"})
    for times in range(1, 7) if BATTERY else (1, 6):
        repo_id = f"tester/{kind}-{route}-{times}"
        hub.fault(route, kind, times)
        error = _pushes(model, repo_id)
        if error is not None:  # the library tries some requests again by itself, and those are not given up so soon
            assert times >= patience.TRIES
            assert re.search("failed 6 times, last with: .*; try again later", error)
            hub._faults.clear()
            assert _pushes(model, repo_id) is None
        assert [commit.message for commit in hub.commits(repo_id)] == ["Model model", "initial commit"]
        assert set(own(hub.files(repo_id))) == {p.name for p in model.iterdir()} | {"README.md"}
        hub._faults.clear()
    assert hub.errors == []


def _pushes(model: Path, repo_id: str) -> str | None:
    try:
        push(model, repo_id, checked=True)
    except HubError as error:
        return str(error)
    return None


def test_a_lost_reply_is_looked_up_and_nothing_is_sent_twice(model: Path, hub: LocalHub) -> None:
    hub.create(REPO_ID, private=True)
    hub.fault("commit", "lost")
    pushed = push(model)
    assert pushed.made
    assert [request.route for request in hub.requests].count("commit") == 1
    newest, first = hub.commits(REPO_ID)
    assert newest.oid == pushed.commit
    assert newest.parent == first.oid


def test_a_lost_reply_and_then_another_commit(model: Path, hub: LocalHub) -> None:
    """Our commit was made, its reply lost, and somebody changed one of its files since: it is not made again."""
    hub.create(REPO_ID, private=True)
    hub.fault("commit", "lost")
    done = []

    def meddle(request: Any) -> None:
        if not done and request.route == "info" and len(hub.commits(REPO_ID)) == 2:
            done.append(hub.put(REPO_ID, {"README.md": "theirs"}))

    # the route is known only once the request is worked on
    real = hub._take

    def take(route: str, kinds: Any) -> Any:
        meddle(SimpleNamespace(route=route))
        return real(route, kinds)

    hub._take = take  # type: ignore[method-assign]
    pushed = push(model)
    theirs, ours, _ = hub.commits(REPO_ID)
    assert done == [theirs.oid]
    assert pushed.commit == ours.oid
    assert hub.files(REPO_ID)["README.md"] == b"theirs"


def test_a_head_that_moved_is_built_upon(model: Path, hub: LocalHub) -> None:
    hub.create(REPO_ID, private=True)
    real, moved = hub._take, []

    def take(route: str, kinds: Any) -> Any:
        if route == "commit" and len(moved) < 3:
            moved.append(hub.put(REPO_ID, {f"theirs-{len(moved)}.md": "x"}))
        return real(route, kinds)

    hub._take = take  # type: ignore[method-assign]
    push(model)
    files = hub.files(REPO_ID)
    assert {"theirs-0.md", "theirs-1.md", "theirs-2.md", "config.json"} <= set(files)
    assert hub.commits(REPO_ID)[0].parent == moved[-1]
    assert len(hub.commits(REPO_ID)) == 5


FORKS = """
import os, sys
import instructft.hub.push, transformers, torch, huggingface_hub
from instructft import patience
patience.WAIT = 0.001
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


# Nothing that is not for others


def test_the_token_is_nowhere_but_in_headers(
    trained: dict[str, Path], hub: LocalHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained["lora"], tmp_path / "run")
    result = CliRunner().invoke(app, ["push", str(run), REPO_ID])
    assert result.exit_code == 0, result.output
    push(run / "checkpoint-2")
    hub.fault("commit", "503", 6)
    with pytest.raises(HubError) as caught:
        push(trained["full"], "tester/other")
    token = hub.token.encode()
    assert any(token in " ".join(request.headers.values()).encode() for request in hub.requests)
    written = capfd.readouterr()
    assert token not in (result.output + written.out + written.err + str(caught.value)).encode()
    for request in hub.requests:
        assert token not in request.body, request.path
        assert hub.token not in request.path
    for path in run.rglob("*"):
        assert not path.is_file() or token not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl", "model.safetensors"])
def test_a_token_in_a_file_stops_the_push(name: str, trained: dict[str, Path], hub: LocalHub, tmp_path: Path) -> None:
    run = shutil.copytree(trained["full"], tmp_path / "run")
    path = run / name
    if name.endswith(".safetensors"):
        content = bytearray(path.read_bytes())
        content[-60 : -60 + len(hub.token)] = hub.token.encode()
        path.write_bytes(content)
    else:
        path.write_text("\n\n" + f'{{"x": "{"hf_" + "a1" * 17}"}}\n' + path.read_text())
    with pytest.raises(HubError, match=rf"{re.escape(name)}, line \d+: found an access token") as caught:
        push(run)
    assert hub.token not in str(caught.value)
    if not name.endswith(".safetensors"):
        assert "line 3" in str(caught.value)
        assert "hf_a1" not in str(caught.value)
    assert hub.requests == []


def test_what_was_not_scanned_is_not_sent(model: Path, hub: LocalHub) -> None:
    """A file that changes after it was looked at: what is committed is what was scanned, or nothing."""
    from safetensors.torch import load_file, save_file

    index = model / "model.safetensors.index.json"
    largest = max(model.glob("model-0*.safetensors"), key=lambda path: path.stat().st_size)
    tensors = load_file(largest)
    _edit(index, metadata={}, weight_map=json.loads(index.read_text())["weight_map"] | {"more": largest.name})
    save_file({**tensors, "more": next(iter(tensors.values())).new_zeros(600_000)}, largest, {"format": "pt"})
    scanned = largest.read_bytes()
    assert len(scanned) > IN_MEMORY

    def before(request: Any) -> None:
        largest.write_bytes(scanned[:-40] + hub.token.encode() + b"\0")

    hub.before = before
    with pytest.raises(HubError):
        push(model, checked=True)
    hub.before = None
    assert len(hub.commits(REPO_ID)) == 1


def test_a_token_across_two_blocks_is_found(hub: LocalHub) -> None:
    for cut in range(1, len(hub.token)):
        scan = Scan(Path("file"))
        blocks = b"line\nline\n" + b"x" * 3000 + b"\n" + hub.token[:cut].encode(), hub.token[cut:].encode()
        with pytest.raises(HubError, match="line 4"):
            list(map(scan.feed, blocks))
    Scan(Path("file")).feed(b"hf_hub_download and hf_short1234")


def test_paths_of_this_machine_stay_here(trained: dict[str, Path], hub: LocalHub) -> None:
    for kind, run in trained.items():
        push(run, f"tester/{kind}")
        if kind == "lora":
            push(run / "checkpoint-2", f"tester/{kind}")
        for name, content in own(hub.files(f"tester/{kind}")).items():
            assert b"canary-place" not in content, (kind, name)
            assert str(Path.home()).encode() not in content, (kind, name)
    files = hub.files("tester/lora")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "full"
    assert json.loads(files["base.json"])["name_or_path"] == "full"
    assert b"canary-place" in (trained["lora"] / "base.json").read_bytes()  # here it is as it was
    assert instructft.load_recipe  # what left is a recipe still
    from instructft.recipe.yaml_reader import read_document

    target = trained["full"].parent / "back.yaml"
    target.write_bytes(files["recipe.yaml"])
    assert read_document(target).values["model"]["name_or_path"] == "full"


def test_only_what_belongs_to_a_model_leaves(trained: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained["full"], tmp_path / "run")
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    for name in ("training_args.bin", ".env", "modeling_own.py", "notes.txt", "optimizer.pt"):
        (run / name).write_text("x")
    (run / "tensorboard").mkdir()
    (run / "vocab.json").symlink_to(secret)
    found = gather(run)
    assert set(found.left_out) == {
        "training_args.bin", ".env", "modeling_own.py", "notes.txt", "optimizer.pt", "tensorboard", "vocab.json",
        "checkpoint-1", "checkpoint-2",
    }  # fmt: skip
    names = {file.path_in_repo for file in found.leaving}
    assert names == {p.name for p in trained["full"].iterdir() if p.is_file()}
    assert "code" in found.left_out["modeling_own.py"]
    assert "link" in found.left_out["vocab.json"]


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


# The card


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
    assert "not verified" in hub.files("tester/merged")["README.md"].decode()


def test_the_licence_of_a_base_with_a_card_is_told(trained: dict[str, Path], tmp_path: Path) -> None:
    from instructft.report.model_card import card

    base = shutil.copytree(trained["full"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(start=f"name_or_path: {base}", out=tmp_path / "run"))
    facts = json.loads((trained["full"] / "run.json").read_text())
    text = card(instructft.load_recipe(path), facts)
    assert "license: apache-2.0" in text.split("\n---\n")[0]
    assert str(tmp_path) not in text


# The command


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


# Beside training


@pytest.fixture
def begin(trained: dict[str, Path], tmp_path: Path, hub: LocalHub) -> Any:
    def make(push: str = "checkpoints", path_in_repo: str | None = None) -> tuple[Publisher, Path, list[str]]:
        run = shutil.copytree(trained["full"], tmp_path / "run")
        text = (trained["full"].parent / "full.yaml").read_text()
        place = f", path_in_repo: {path_in_repo}" if path_in_repo else ""
        path = tmp_path / "hub.yaml"
        path.write_text(f"{text}hub: {{repo_id: {REPO_ID}, push: {push}{place}}}\n")
        said: list[str] = []
        return Publisher(instructft.load_recipe(path), run, said.append), run, said

    return make


def folders_there(hub: LocalHub) -> set[str]:
    return {name.rpartition("/")[0] for name in own(hub.files(REPO_ID)) if name.endswith("manifest.json")}


def test_checkpoints_and_the_model_are_pushed_beside_training(begin: Any, hub: LocalHub) -> None:
    publisher, run, said = begin(path_in_repo="instruct")
    names = ["checkpoint-1", "checkpoint-2"]
    publisher.checkpoint_sealed(run / names[0], 1, 1_000, 2.5, names[:1])
    publisher.wait()
    hub.put(REPO_ID, {"instruct/checkpoint_tokens_mine/manifest.json": "{}", "instruct/checkpoint_tokens_mine/x": "x"})
    assert len(folders_there(hub)) == 2
    shutil.rmtree(run / names[0])  # retention
    publisher.checkpoint_sealed(run / names[1], 2, 2_000, 2.25, names[1:])
    status = publisher.finish(final=True)
    assert status.pushed, (status, said)
    assert str(status) == f"pushed {hub.url}/{REPO_ID}"
    theirs = "instruct/checkpoint_tokens_mine"
    (ours,) = folders_there(hub) - {theirs}
    assert "2.25" in ours
    assert f"{theirs}/x" in hub.files(REPO_ID)
    assert hub.files(REPO_ID)["instruct/config.json"] == (run / "config.json").read_bytes()
    assert not (run / ".upload").exists()
    assert [line.split(":")[0] for line in said] == names


def test_what_retention_takes_is_still_uploaded_and_the_newest_wins(begin: Any, hub: LocalHub) -> None:
    publisher, run, said = begin()
    slow = []

    def before(request: Any) -> None:
        if not slow:
            slow.append(request)
            time.sleep(0.5)

    hub.before = before
    for step in (1, 2):  # both wait while the first request of the first one hangs
        name = f"checkpoint-{step}"
        for again in range(3):
            publisher.checkpoint_sealed(run / name, step, step * 1000 + again, 2.0, [name])
            while not slow:
                time.sleep(0.01)
        shutil.rmtree(run / name)
    status = publisher.finish(final=True)
    assert status.pushed, (status, said)
    commits = [commit.message for commit in hub.commits(REPO_ID)]
    assert len(commits) == 4, commits  # the Hub's own, the first checkpoint, the last one, the model
    assert len(folders_there(hub)) == 1


@pytest.mark.parametrize("kind", ["503", "drop", "lost"])
def test_a_dead_hub_ends_no_run(kind: str, begin: Any, hub: LocalHub) -> None:
    publisher, run, said = begin()
    for route in ("info", "create", "commit", "whoami"):
        hub.fault(route, kind, 10_000)
    publisher.checkpoint_sealed(run / "checkpoint-1", 1, 1000, 2.0, ["checkpoint-1"])
    status = publisher.finish(final=True)
    assert not status.pushed
    assert f"instructft push {run} {REPO_ID}" in str(status)
    assert str(status).startswith("not pushed: ")
    assert "checkpoint-1 not pushed" in said[0]
    hub._faults.clear()
    assert push(run).made  # the command that it named


def test_a_stopped_run_is_not_held(begin: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PATIENCE", 0.3)
    one, run, _ = begin()
    held = threading.Event()  # the Hub answers nothing until this is set
    hub.before = lambda request: held.wait(10)
    one.checkpoint_sealed(run / "checkpoint-2", 2, 1000, 2.0, ["checkpoint-2"])
    status = one.finish(final=False)
    assert not held.is_set()  # it came back while the upload was held
    assert one._thread
    assert one._thread.is_alive()
    held.set()
    assert not status.pushed
    assert status.command == f"instructft push {run / 'checkpoint-2'} {REPO_ID}"
    hub.before = None
    one._thread.join(5)
    assert not one._thread.is_alive()
    assert ("model", REPO_ID) not in hub.repos or len(hub.commits(REPO_ID)) == 1


def test_never_and_end_push_no_checkpoints(begin: Any, hub: LocalHub) -> None:
    publisher, run, _ = begin(push="end")
    publisher.checkpoint_sealed(run / "checkpoint-1", 1, 1000, 2.0, ["checkpoint-1"])
    assert hub.requests == []
    assert not publisher.finish(final=False).pushed
    assert hub.requests == []
    assert publisher.finish(final=True).pushed
    assert folders_there(hub) == set()
