"""One commit or none, whatever fails on the way; refusals are one clear message."""

from __future__ import annotations

import random
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instructft.errors import HubError
from instructft.hub import commit
from tests.conftest import BATTERY
from tests.helpers.hub import REPO_ID, LocalHub, own, push


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
            assert times >= commit.TRIES
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


class Refused(Exception):
    """What the library raises, with the reply in it."""

    def __init__(self, status: int, **headers: str):
        super().__init__(f"status {status} for hf_{'a1' * 17}")
        self.response = SimpleNamespace(status_code=status, headers=headers)


def waits_of(*errors: Exception) -> tuple[list[float], str]:
    """How long a request waited between its tries, and what it ended with."""
    left, waits = list(errors), []

    def request() -> str:
        if left:
            raise left.pop(0)
        return "done"

    try:
        return waits, commit.retried("reading x", request, waits.append)
    except HubError as error:
        return waits, str(error)


def test_waits_grow_are_spread_and_as_long_as_the_hub_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "WAIT", 1.0)
    waits, said = waits_of(*[Refused(503)] * 9)
    assert len(waits) == commit.TRIES - 1
    assert all(2**n <= wait <= 2**n + 1 for n, wait in enumerate(waits))
    assert waits != waits_of(*[Refused(503)] * 9)[0]  # two that fail together do not come back together
    assert re.fullmatch(r"reading x failed 6 times, last with: status 503 for hf_…; try again later", said)
    assert waits_of(Refused(429, **{"retry-after": "7"})) == ([7.0], "done")
    assert waits_of(Refused(429, **{"retry-after": "999999"})) == ([commit.STALLED], "done")
    for status in (400, 401, 403, 404, 409):
        waits, said = waits_of(Refused(status))
        assert waits == []
        assert "hf_a1" not in said


def test_waiting_takes_no_chance_from_the_run() -> None:
    """Uploads run beside the training, and where its random numbers stand is part of a checkpoint."""
    import numpy as np
    import torch

    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    assert len(waits_of(*[Refused(503)] * 9)[0]) == commit.TRIES - 1
    assert states() == before


def test_a_hub_that_is_silent_is_not_waited_for(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by calls that name a limit of their own, which is none: `repo_info`."""
    monkeypatch.setattr(commit, "STALLED", 0.2)
    held = threading.Event()
    hub.before = lambda request: held.wait(20)
    try:
        with pytest.raises(HubError, match=r"reading tester/model failed 6 times, last with: .*time"):
            commit.open_repository(commit.connect(), REPO_ID, True, lambda seconds: None)
    finally:
        held.set()
