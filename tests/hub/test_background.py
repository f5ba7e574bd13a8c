"""Uploads during training: the newest wins, retention takes nothing away, and no fault of the Hub ends a run."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import instructft
from instructft.hub import background
from instructft.hub.background import Publisher
from tests.helpers.hub import REPO_ID, LocalHub, own, push


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


def test_checkpoints_and_the_model_are_pushed_during_training(begin: Any, hub: LocalHub) -> None:
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
    monkeypatch.setattr(background, "STOP_LIMIT", 0.3)
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


def test_a_finished_run_is_not_held(begin: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a Hub that is silent, whatever each of its requests may take."""
    monkeypatch.setattr(background, "FINAL_LIMIT", 0.3)
    monkeypatch.setattr(background, "SLOWEST", 1 << 30)
    held = threading.Event()
    for push_of in ("end", "checkpoints"):
        one, run, _ = begin(push=push_of)
        hub.before = lambda request: held.wait(10)
        one.checkpoint_sealed(run / "checkpoint-2", 2, 1000, 2.0, ["checkpoint-2"])
        status = one.finish(final=True)
        assert not held.is_set()
        assert str(status) == f"not pushed: the Hub did not take it in 0 s\n  instructft push {run} {REPO_ID}"
        shutil.rmtree(run)
    held.set()
    for thread in threading.enumerate():  # what it left behind must not ask the Hub of another test
        if thread.name == "instructft-push":
            thread.join(10)


def test_never_and_end_push_no_checkpoints(begin: Any, hub: LocalHub) -> None:
    publisher, run, _ = begin(push="end")
    publisher.checkpoint_sealed(run / "checkpoint-1", 1, 1000, 2.0, ["checkpoint-1"])
    assert hub.requests == []
    assert not publisher.finish(final=False).pushed
    assert hub.requests == []
    assert publisher.finish(final=True).pushed
    assert folders_there(hub) == set()
