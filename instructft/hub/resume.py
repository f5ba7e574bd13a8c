"""Brings the newest checkpoint of a run from the Hub, where this machine has none: whole, verified, or not at all.

::

    REPO/checkpoint_tokens_500k_loss_1.2345/ ─► run/.fetch/checkpoint-40/ ─ verified ─► run/checkpoint-40/

What is on its way lies in a folder that nothing takes for a checkpoint. One that is not whole is passed over and named.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.manifest import MANIFEST, Checkpoint, require_space, verify
from instructft.errors import CheckpointError, HubError, ResumeError
from instructft.hub.commit import connect, look, refusal, retried, status_of
from instructft.models.latest import progress
from instructft.weights.base_record import stays_inside

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from instructft.hub.commit import Tree
    from instructft.recipe.schema import HubSection

_ASIDE = ".fetch"  # in the run folder: what is on its way


def newest_on_hub(hub: HubSection, run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Fetch the newest checkpoint that verifies, with the best one that it names, into the run folder.

    Returns it, and why newer ones were passed over; (None, []) where the repository has none, or is not there.

    Example::

        newest_on_hub(recipe.hub, Path("runs/support"))
        # (Checkpoint(folder=PosixPath('runs/support/checkpoint-80'), …), [])

    Raises:
        ResumeError: the Hub cannot be reached or does not let us in, or there are checkpoints and none verifies: a run
            never starts over by itself.
    """
    found = _look(hub)
    if found is None:
        return None, []
    api, repo_id, head, tree = found
    passed: list[str] = []
    folders = _checkpoints(tree, hub.path_in_repo)
    for folder in folders:
        try:
            fetched = _fetch(api, repo_id, head, tree, folder, run)
        except CheckpointError as error:
            passed.append(f"{repo_id}/{folder}: {error}")
            continue
        except HubError as error:
            raise _unreached(hub, str(error)) from error
        finally:
            shutil.rmtree(run / _ASIDE, ignore_errors=True)
        _fetch_best(api, repo_id, head, tree, folders, fetched, run)
        _write_metrics(run, fetched.folder)
        return fetched, passed
    if passed:
        reasons = "\n".join(f"  {reason}" for reason in passed)
        raise ResumeError(
            f"none of the checkpoints in {repo_id} is whole:\n{reasons}\n"
            "To start over: --resume never, or another hub.repo_id or hub.path_in_repo"
        )
    return None, []


def _look(hub: HubSection) -> tuple[HfApi, str, str, Tree] | None:
    """The repository's commit and files; None where there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name = str(hub.repo_id)
    try:
        api = connect()
        if "/" not in name:
            name = f"{retried('asking who is logged in', lambda: api.whoami()['name'])}/{name}"
        try:
            retried(f"reading {name}", lambda: api.repo_info(name), also=RepositoryNotFoundError)
        except RepositoryNotFoundError as error:
            if status_of(error) == 401:
                raise HubError(refusal(error, f"reading {name}")) from error
            return None
        head, tree = look(api, name)
    except HubError as error:
        raise _unreached(hub, str(error)) from error
    return api, name, head, tree


def _unreached(hub: HubSection, why: str) -> ResumeError:
    return ResumeError(
        f"hub.repo_id: whether {hub.repo_id} holds a checkpoint to resume from is not known: {why}.\n"
        "To start over without it: --resume never"
    )


def _checkpoints(tree: Tree, path_in_repo: str | None) -> list[str]:
    """Folders with a manifest at the place of a run, the furthest first."""
    place = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    folders = [path.removesuffix(f"/{MANIFEST}") for path in tree if path.endswith(f"/{MANIFEST}")]
    here = [folder for folder in folders if folder.startswith(place) and "/" not in folder[len(place) :]]
    counted = {folder: how_far for folder in here if (how_far := progress(folder[len(place) :]))}
    return sorted(counted, key=lambda folder: (counted[folder], folder), reverse=True)


def _fetch(api: HfApi, repo_id: str, head: str, tree: Tree, folder: str, run: Path) -> Checkpoint:
    """One checkpoint, under its own name in the run folder.

    Raises:
        CheckpointError: it is not whole on the Hub, or not what was written.
        HubError: the Hub could not be reached.
    """
    aside = run / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    path = _download(api, repo_id, head, f"{folder}/{MANIFEST}", aside)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))["manifest"]
        step, files = int(manifest["step"]), dict(manifest["files"])
        size = sum(int(known["size"]) for known in files.values())
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not what was written") from error
    if bad := [name for name in files if not stays_inside(name)]:
        raise CheckpointError(f"{bad[0]} leaves the folder")
    for name, known in files.items():  # ahead of the first large file
        remote = tree.get(f"{folder}/{name}")
        if remote is None:
            raise CheckpointError(f"{name} is missing")
        if remote.size != known["size"] or (remote.sha256 and remote.sha256 != known.get("sha256")):
            raise CheckpointError(f"{name} is not what was written")
    require_space(run, size)
    for name in files:
        _download(api, repo_id, head, f"{folder}/{name}", aside)
    named = aside / f"checkpoint-{step}"
    (aside / folder).rename(named)
    verified = verify(named, foreign=True)
    _state_of(named)
    target = run / named.name
    if target.exists():  # cut short, or it would have been resumed
        shutil.rmtree(target)
    named.rename(target)
    return Checkpoint(target, verified.step, verified.identity, verified.versions)


def _download(api: HfApi, repo_id: str, head: str, path: str, aside: Path) -> Path:
    fetch = lambda: api.hf_hub_download(repo_id, path, revision=head, local_dir=aside)  # noqa: E731
    return Path(retried(f"fetching {path} of {repo_id}", fetch))


def _fetch_best(
    api: HfApi, repo_id: str, head: str, tree: Tree, folders: list[str], fetched: Checkpoint, run: Path
) -> None:
    """The best checkpoint so far, which a run that ends with it must have; where it is gone, the newest has to do."""
    state = _state_of(fetched.folder)
    best = Path(state.get("best_model_checkpoint") or "").name
    if not best or (run / best).exists():
        return
    for folder in folders:
        aside = run / _ASIDE
        try:
            path = _download(api, repo_id, head, f"{folder}/{MANIFEST}", aside)
            if f"checkpoint-{json.loads(path.read_text(encoding='utf-8'))['manifest']['step']}" == best:
                _fetch(api, repo_id, head, tree, folder, run)
                return
        except (CheckpointError, HubError, KeyError, ValueError, TypeError, RecursionError):
            continue
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _state_of(folder: Path) -> dict[str, Any]:
    """What the trainer keeps of a run, as far as it is read here; the words of a log for what is no number.

    Raises:
        CheckpointError: it is none; whoever sealed a checkpoint may have sealed anything.
    """
    words = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}
    try:
        text = (folder / "trainer_state.json").read_text(encoding="utf-8")
        state = json.loads(text, parse_constant=words.__getitem__)
        history = state.get("log_history") or []
        sound = isinstance(history, list) and all(type(entry["step"]) is int for entry in history)
        sound = sound and isinstance(state.get("best_model_checkpoint") or "", str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{folder.name}: trainer_state.json is not what a trainer writes")
    return dict(state)


def _write_metrics(run: Path, folder: Path) -> None:
    """`metrics.jsonl` up to the checkpoint, from what the trainer keeps of it: one line for each logged step."""
    lines: dict[int, dict[str, Any]] = {}
    for entry in _state_of(folder).get("log_history") or ():
        step = entry["step"]
        if "start_loss" in entry and step == 0:  # it stands in the first step's line
            continue
        values = {key: value for key, value in entry.items() if key != "step"}
        lines.setdefault(step, {"step": step}).update(values)
    path = run / "metrics.jsonl"
    if lines and not path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in lines.values()), encoding="utf-8")
