"""Puts a model on the Hub: whole or not at all, read back, and with nothing in it that is not for others.

::

    REPO/
      config.json, *.safetensors, tokenizer.json, README.md, …   the final model, here or in `path_in_repo`
      checkpoint_tokens_500k_loss_1.2345/                        a checkpoint to resume from
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructft.adapters.adapter_folder import is_adapter, read_adapter
from instructft.checkpoints import manifest
from instructft.checkpoints.as_saved import require_as_saved
from instructft.errors import CheckpointError, ModelError, UsageError
from instructft.formatting import size
from instructft.hub import commit
from instructft.hub.files import Gathered, gather, is_replaced
from instructft.models.base_template import TemplateWatch
from instructft.models.first_look import missing
from instructft.models.latest import checkpoint_name
from instructft.redaction import of_file, without_places
from instructft.report.model_card import bare_card, for_the_hub
from instructft.weights import remote_code
from instructft.weights.base_record import is_hub_id, stays_inside
from instructft.weights.weight_files import read_header, weight_files


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Args:
        repo_id: with the name of its owner.
        url: where a browser finds it.
        commit: that holds it (40 hex digits).
        made: False where everything was there already.
        files: of the model on the Hub, each read back with its size and hash.
        size: bytes of them.
        deleted: paths of an earlier push that went in the same commit.
        left_out: what stayed here, and why.
    """

    repo_id: str
    url: str
    commit: str
    made: bool
    files: int
    size: int
    deleted: tuple[str, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """What a person wants to know of it.

        Example::

            print(pushed)
            # pushed to https://huggingface.co/ada/support (commit 0123abcd): 12 files, 498.1 MiB, each read back
        """
        how = "pushed to" if self.made else "already there, byte for byte:"
        text = f"{how} {self.url} (commit {self.commit[:8]}): {self.files} files, {self.size / 2**20:,.1f} MiB, "
        text += "each read back"
        return text + (f"; of the model before it {len(self.deleted)} files deleted" if self.deleted else "")


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    path_in_repo: str | None = None,
    say: Callable[[str], Any] = print,
    checked: bool = False,
    pause: commit.Pause | None = None,
) -> Pushed:
    """Upload a model with tokenizer, chat template, recipe, metrics and model card, in one commit.

    What an earlier push left in the same place, and this model does not have, goes in that commit. Other files stay.

    Args:
        run: a run folder, a merged model, an adapter folder, any model folder; of a checkpoint in a run all that a
            resumed run needs goes into a folder of its own (`checkpoint_tokens_500k_loss_1.2345`).
        private: a new repository is made private; into a public one nothing is uploaded then.
        path_in_repo: a folder in the repository, such as `instruct`.
        checked: the model is known to be whole, since this process has just saved it.
        pause: sleeps between tries; it may raise to give up.

    Example::

        push_to_hub("runs/quickstart", "ada/quickstart").url
        # 'https://huggingface.co/ada/quickstart'

    Raises:
        UsageError: there is no such model, its run is unfinished, or the place in the repository is none.
        AdapterError, ModelError, CheckpointError: it is not whole.
        HubError: the Hub cannot be reached or refuses, or a file must not leave this machine. The repository is as it
            was, or holds the whole model.
    """
    folder, place = check_request(run, repo_id, path_in_repo)
    more: dict[str, Any] = {"private": private, "say": say, **({"pause": pause} if pause else {})}
    if manifest.NAME.fullmatch(folder.name):
        try:
            manifest.verify(folder)
        except CheckpointError:
            if manifest.kind(folder) != "foreign":
                raise
        else:
            tokens, loss = progress_of(folder)
            return push_checkpoint(folder, repo_id, place, tokens, loss, **more)
    watch = None
    if not checked:
        watch = TemplateWatch(folder)
        require_finished(folder)
        say(f"reading {folder}: whether it is whole, and what of it leaves …")
        require_whole_folder(folder)
    made = {"README.md": _readme(folder, repo_id, place)} if not (folder / "README.md").is_symlink() else {}
    gathered = gather(folder, under=place, made=made)
    if not checked:
        require_as_saved(folder, whole=True)
    new = {file.path_in_repo for file in gathered.leaving}

    def delete(tree: commit.Tree, head: str) -> Iterable[str]:
        inside = f"{place}/" if place else ""
        return [path for path in tree if path.startswith(inside) and is_replaced(path[len(inside) :])
                and path not in new]  # fmt: skip

    if watch is not None and (line := watch.said(patience=3.0)):
        say(line)
    kind = "Adapter" if is_adapter(folder) else "Model"
    return _push(gathered, repo_id, delete, f"{kind} {folder.resolve().name}", **more)


def check_request(run: str | Path, repo_id: str, path_in_repo: str | None) -> tuple[Path, str]:
    """The folder that is pushed and its place in the repository, as far as they can be told at a glance.

    Raises:
        UsageError: there is no such folder, or the name or the place is none on the Hub.
    """
    folder, place = Path(run).expanduser(), clean_place(path_in_repo)
    _require_name(repo_id)
    if not folder.is_dir():
        raise UsageError(missing(str(run), bare=False) or f"there is no model folder {run}; push what lies here")
    return folder, place


def rehearse_push(run: str | Path, repo_id: str, path_in_repo: str | None = None) -> str:
    """What a push would upload, with sizes, and what would stay here and why; asks no Hub and needs no login.

    Example::

        print(rehearse_push("runs/quickstart", "ada/quickstart"))
        #     2.6 MB  model.safetensors
        # …
        # 12 files, 3.1 MB, would go to ada/quickstart; nothing was uploaded

    Raises:
        UsageError, AdapterError, ModelError, CheckpointError, HubError: as a push would, before it asks the Hub.
    """
    folder, place = check_request(run, repo_id, path_in_repo)
    sealed = manifest.NAME.fullmatch(folder.name) and manifest.kind(folder) == "sealed"
    if sealed:
        manifest.verify(folder)
        name = checkpoint_name(*progress_of(folder))
        gathered = gather(folder, under=f"{place}/{name}" if place else name)
    else:
        require_finished(folder)
        require_whole_folder(folder)
        gathered = gather(folder, under=place, made={"README.md": _readme(folder, repo_id, place)})
        require_as_saved(folder, whole=True)
    lines = [f"{size(file.size):>10}  {file.path_in_repo}" for file in gathered.leaving]
    lines += [f"{'stays here':>10}  {name} ({why})" for name, why in sorted(gathered.left_out.items())]
    total = sum(file.size for file in gathered.leaving)
    return "\n".join(
        [*lines, f"{len(gathered.leaving)} files, {size(total)}, would go to {repo_id}; nothing was uploaded"]
    )


def push_checkpoint(
    folder: Path,
    repo_id: str,
    place: str,
    tokens: int,
    loss: float | None,
    *,
    retired: Callable[[commit.Tree, str], Iterable[str]] = lambda tree, head: (),
    **more: Any,
) -> Pushed:
    """Upload a sealed checkpoint into its folder on the Hub; what `retired` names goes in the same commit.

    Args:
        tokens: trained until then; they and `loss` are its name there.
        more: private, say, pause, as `hub.commit` takes them.
    """
    name = checkpoint_name(tokens, loss)
    under = f"{place}/{name}" if place else name
    gathered = gather(folder, under=under)
    new = {file.path_in_repo for file in gathered.leaving}

    def delete(tree: commit.Tree, head: str) -> Iterable[str]:
        old = [path for path in tree if path.startswith(f"{under}/")] if f"{under}/{manifest.MANIFEST}" in tree else []
        return {*old, *retired(tree, head)} - new

    return _push(gathered, repo_id, delete, f"Checkpoint at step {manifest.step_of(folder)}", **more)


def _push(gathered: Gathered, repo_id: str, delete: Any, message: str, **more: Any) -> Pushed:
    done = commit.commit(repo_id, gathered.leaving, delete, message=message, **more)
    total, files = sum(file.size for file in gathered.leaving), len(gathered.leaving)
    return Pushed(done.repo_id, done.url, done.oid, done.made, files, total, done.deleted, gathered.left_out)


def clean_place(path_in_repo: str | None) -> str:
    """A folder in a repository, without slashes around it; "" is the repository's root.

    >>> clean_place("instruct/"), clean_place(None)
    ('instruct', '')

    Raises:
        UsageError: it leaves the repository.
    """
    place = (path_in_repo or "").strip()
    parts = [part for part in place.split("/") if part not in ("", ".")]
    if not stays_inside(place) or ".git" in parts:
        raise UsageError(f'path_in_repo: found "{place}", expected a folder inside the repository, such as instruct/')
    return "/".join(parts)


def _require_name(repo_id: str) -> None:
    if not is_hub_id(repo_id):
        raise UsageError(f"found {repo_id}, expected a name on the Hub, such as org/name")


# --------------------------------------------------------------------------------------------------------------------
# Whole, or it does not leave
# --------------------------------------------------------------------------------------------------------------------


def require_finished(folder: Path) -> None:
    """Refuse a run that has not reached its end, and what another command is still writing.

    Raises:
        UsageError: with what to push instead.
    """
    if re.search(r"\.partial(-[0-9a-f]{8})?$", folder.resolve().name):
        raise UsageError(f"{folder} was never finished; push the folder that was to become of it")
    holds = is_adapter(folder) or (folder / "config.json").is_file()
    sealed = [path for path in manifest.folders(folder) if manifest.kind(path) == "sealed"]
    hint = f"; to upload where it stands: instructft push {sealed[0]} REPO_ID" if sealed else ""
    run = (folder / "recipe.yaml").is_file()
    if run and not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds a run that is unfinished (there is no run.json): train it to its end{hint}")
    if not holds:
        raise UsageError(f"{folder} holds no model (there is no adapter_config.json and no config.json in it){hint}")


def require_whole_folder(folder: Path) -> None:
    """Refuse an adapter or a model of which something is missing or damaged; no weight is loaded.

    Raises:
        AdapterError: the adapter is broken.
        ModelError: a file of the model cannot be read, or tensors that its configuration asks for are not there.
    """
    if is_adapter(folder):
        read_adapter(folder)
        return
    found = {name: entry for path in weight_files(folder) if path.suffix == ".safetensors"
             for name, entry in read_header(path).items()}  # fmt: skip
    if not found:  # pickled weights: gather refuses them
        return
    wanted = _tensors(folder, set(found))
    missing = sorted(set(wanted) - set(found))
    other = sorted(name for name in set(wanted) & set(found) if found[name].shape != wanted[name])
    if missing or other:
        what = f"{', '.join(missing[:3])} missing" if missing else f"{other[0]} has another shape than config.json says"
        raise ModelError(f"{folder} is not whole: {what} ({len(missing) + len(other)} of {len(wanted)} tensors)")


def _tensors(folder: Path, found: set[str]) -> dict[str, tuple[int, ...]]:
    """The tensors that a model's configuration asks for; none where this version of transformers cannot tell."""
    import torch
    from transformers import AutoConfig

    from instructft.weights.model_class import auto_class
    from instructft.weights.weight_files import tensors

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **remote_code.flag())
        if getattr(config, "quantization_config", None):  # its tensors are packed
            return {}
        with torch.device("meta"):
            model = auto_class(config).from_config(config, **remote_code.flag())
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return {}
    return tensors(model, dict.fromkeys(found))


def progress_of(folder: Path) -> tuple[int, float | None]:
    """(tokens trained, last loss logged) of a checkpoint; what its name on the Hub is made of."""
    tokens, loss = 0, None
    for path in sorted(folder.glob("progress_*.json")):
        counts = json.loads(path.read_text(encoding="utf-8")).get("counts") or [0]
        tokens += int(counts[0])
    state = folder / "trainer_state.json"
    if state.is_file():
        history = json.loads(state.read_text(encoding="utf-8")).get("log_history", [])
        loss = next((float(entry["loss"]) for entry in reversed(history) if "loss" in entry), None)
    return tokens, loss


def _readme(folder: Path, repo_id: str, place: str) -> bytes:
    """The model card as it leaves; one is written where there is none."""
    path = folder / "README.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        config = read_adapter(folder).config if is_adapter(folder) else {}
        base = without_places(config.get("base_model_name_or_path"), key="base_model_name_or_path")
        text = bare_card(repo_id.rpartition("/")[2], base if base else None, bool(config))
    return of_file("README.md", for_the_hub(text, repo_id, place, folder).encode(), [folder, folder.parent])
