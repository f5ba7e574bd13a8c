"""Where a run resumes from, and what must be as it was: a resumed run is the run that was never stopped, or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.as_saved import require_as_saved
from instructft.checkpoints.lineage import set_aside
from instructft.checkpoints.manifest import Checkpoint, folders, kind, newest, verify
from instructft.errors import CheckpointError, ModelFileError, ResumeError
from instructft.redaction import without_places_by_key
from instructft.weights.readable import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from instructft.models.starting_point import StartingPoint
    from instructft.recipe.schema import Recipe

# Fields of `train:` that change nothing that is trained; all the others are fixed for a run's life.
_FREE = (
    *(
        "evaluation_budget",
        "row_history",
        "logging_",
        "eval_",
        "save_",
        "log_",
        "report_to",
        "run_name",
        "project",
        "trackio_",
        "disable_tqdm",
        "debug",
    ),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "include_", "batch_eval_metrics"),
    *("per_device_eval_batch_size", "prediction_loss_only", "do_", "torch_empty", "skip_memory_metrics"),
    # how rows are loaded, not which: `dataloader_drop_last` is fixed
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    "dataloader_multiprocessing_context",
    *("ddp_", "use_cpu", "fp16_full_eval", "bf16_full_eval", "enable_jit_checkpoint"),
    "torch_compile",  # how blocks are computed: last bits may differ, and what was done stands in run.json
)
# Fields that may change on purpose; a change is recorded.
_OPEN = ("train.loss_spike_limit", "train.on_loss_spike", "train.early_stopping_patience", "train.on_divergence")
_TEMPLATE = "data.template (its text)"
_ORDER = "train.train_sampling_strategy (its order)"
# Fields that older checkpoints do not hold, with what they were then unless someone set them.
_LATER = {"train.dataloader_drop_last": False, "train.on_divergence": "stop", "model.overrides": None}
_LATER |= {"train.fp8": False, "train.deterministic": False, "adapter.experts": "auto", "data.mix_by": "rows"}
_LATER |= {"train.float32_copies": False}
_LATER |= {_ORDER: "of one length in a step"}
# Facts that older checkpoints do not hold, and that nobody can tell now.
_UNKNOWN = ("precision", "device")
_LENGTH = ("train.max_steps", "train.num_train_epochs")
# Schedules whose learning rate at a step does not depend on how many steps follow.
_OPEN_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")


@dataclass(frozen=True)
class RunStart:
    """How a run begins: anew, or from a checkpoint. Use `run_start`.

    Args:
        identity: what the run is made of now.
        checkpoint: what it resumes from; None begins anew.
        passed: why newer checkpoints were passed over.
        changed: fields that differ from the checkpoint's and may: key -> [then, now].
    """

    identity: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    passed: list[str] = field(default_factory=list)
    changed: Mapping[str, list[Any]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def exact(self) -> bool:
        """Whether it goes on to the same bits: a GPU adds up in any order, unless it is held to one."""
        return self.identity.get("device", "cpu") == "cpu" or bool(self.identity.get("train.deterministic"))

    @property
    def folder(self) -> str | None:
        """What `Trainer.train` is told."""
        return str(self.checkpoint.folder) if self.checkpoint else None

    def finished(self, run: Path) -> dict[str, Any] | None:
        """The `run.json` of a run that has reached its end already."""
        if self.checkpoint is None or self.changed or not (run / "run.json").is_file():
            return None
        try:
            facts = read_object(run / "run.json")
            done = facts["train"]["steps"] == self.step
        except (ModelFileError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{run / 'run.json'} is damaged, so whether the run has ended is not known ({error}). Remove that "
                f"file, and the same command ends the run anew from {self.checkpoint.folder.name}"
            ) from error
        if not done:
            return None
        try:
            require_as_saved(run, whole=False)
        except ModelFileError as error:
            raise ResumeError(
                f"{run} is finished, but its model is damaged: {error}. To have it written anew from "
                f"{self.checkpoint.folder.name}, remove {run / 'run.json'} and run the same command"
            ) from error
        return facts

    def lines(self) -> list[str]:
        """What a person should know, line by line."""
        lines = [f"passed over: {reason}" for reason in self.passed]
        if self.checkpoint:
            lines.append(f"resuming from {self.folder}, {self.step:,} steps done; every byte of it verified")
            if not self.exact:
                lines.append(
                    f"on {self.identity['device']} it is equal to a run that was never stopped but for rounding; "
                    "train.deterministic=true makes runs equal to the last bit"
                )
            lines += [f"changed: {key}, {_short(then)} to {_short(now)}" for key, (then, now) in self.changed.items()]
        return lines

    def set_aside(self, run: Path) -> list[str]:
        """Leave the run one line of checkpoints, which ends with the one that it resumes from; say what was moved."""
        place, names = set_aside(run, self.step) if self.checkpoint else (None, [])
        if place is None:
            return []
        what = f"{', '.join(names)} now in {place}" if names else f"run.json of the finished run now in {place}"
        return [f"set aside: {what}; the run continues from checkpoint-{self.step}, and these stay as they are"]

    def record(self, versions: Mapping[str, str]) -> list[dict[str, Any]]:
        """What `run.json` keeps of it; a library of another version is no reason to stop, but to be known."""
        if self.checkpoint is None:
            return []
        then = self.checkpoint.versions
        others = {name: [then.get(name), now] for name, now in versions.items() if then.get(name) != now}
        found = {"step": self.step, "passed_over": self.passed, "changed": dict(self.changed), "versions": others}
        return [found | {"exact": self.exact}]


def run_start(checkpoint: Checkpoint | None, passed: list[str], identity: Mapping[str, Any]) -> RunStart:
    """Begin anew, or from a checkpoint if what the run is made of is as it was; raises `ResumeError`."""
    changed = refuse_changes(checkpoint, identity) if checkpoint else {}
    return RunStart(identity, checkpoint, passed, changed)


def identity(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, fingerprint: str, start: StartingPoint, args: SFTConfig
) -> dict[str, Any]:
    """What a run is made of: every recipe key that is fixed for its life, and what these led to.

    Args:
        fingerprint: of the prepared data.
        start: where the weights come from.
        args: of the trainer, with device, precision and processes as they were decided here.
    """
    from instructft.data.row_order import ORDER

    flat = fixed_keys(recipe)
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
    made = {"data (its rows)": fingerprint, _TEMPLATE: template, "processes": args.world_size}
    # left to the hardware by the recipe, and other bits on other hardware
    made |= {"precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "as the weights"}
    made |= {"device": args.device.type}
    if args.train_sampling_strategy == "group_by_length":
        made[_ORDER] = ORDER
    if start.name:
        made["model (its weights)"] = start.fingerprint
    plain: dict[str, Any] = json.loads(json.dumps({**flat, **made}, default=str))
    # of a path the last name: rows and weights are known by their content, and a run may be resumed on another machine
    return without_places_by_key(plain, [Path(recipe.output_dir)])


def fixed_keys(recipe: Recipe) -> dict[str, Any]:
    """Every recipe key that shapes a run, by its dotted path; not where it lies, how it is watched or what it saves.

    >>> fixed_keys(load_recipe("quickstart"))["train.seed"]
    42
    """
    values = recipe.to_dict()
    for key in ("fold_turns", "exclude"):  # what became of them is in the rows
        del values["data"][key]
    for entry in values["data"]["datasets"] or ():
        if entry.get("repeat") == 1:  # as it was before there was such a key
            del entry["repeat"]
    found = {f"{name}.{key}": value for name in ("model", "data", "adapter") for key, value in values[name].items()}
    return found | {f"train.{key}": value for key, value in values["train"].items() if not key.startswith(_FREE)}


def refuse_changes(checkpoint: Checkpoint, now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Compare a checkpoint's identity with that of the run that would resume from it.

    Returns the changes that are allowed: key -> [then, now].

    Raises:
        ResumeError: names every field that must not change, with what it was.
    """
    then, now = {**_LATER, **checkpoint.identity}, {**_LATER, **now}
    free = tuple(f"train.{name}" for name in _FREE)  # some were fixed once
    then = {key: value for key, value in then.items() if not key.startswith(free)}
    now = {key: value for key, value in now.items() if key in then or key not in _UNKNOWN}
    changed = {key: [then.get(key), now.get(key)] for key in sorted({*then, *now}) if then.get(key) != now.get(key)}
    # the rows follow from these keys; told apart, they would only be said twice
    if any(key.startswith("data.") for key in changed):
        changed.pop("data (its rows)", None)
    grown = {key for key in _LENGTH if _may_grow(key, checkpoint, now)}
    allowed = {key: change for key, change in changed.items() if key in grown or key in _OPEN}
    refused = {key: change for key, change in changed.items() if key not in allowed}
    if refused:
        lines = [f"  {key}: {_short(a)} when {checkpoint.folder.name} was written, now {_short(b)}{_why(key)}"
                 for key, (a, b) in refused.items()]  # fmt: skip
        raise ResumeError(
            f"{checkpoint.folder.parent} cannot be resumed with these changes:\n" + "\n".join(lines) + "\n"
            "Set them back, or begin another run with output_dir=…"
        )
    return allowed


def _may_grow(key: str, checkpoint: Checkpoint, now: Mapping[str, Any]) -> bool:
    """A run may become longer where that does not change the learning rate of the steps behind it."""
    then, wanted = checkpoint.identity.get(key), now.get(key)
    schedule, warmup = now.get("train.lr_scheduler_type"), now.get("train.warmup_steps")
    open_end = schedule in _OPEN_SCHEDULES and not (isinstance(warmup, float) and 0 < warmup < 1)
    grows = isinstance(then, int | float) and isinstance(wanted, int | float) and wanted > then > 0
    return open_end and grows


def _why(key: str) -> str:
    if key in _LENGTH:
        return "; it may only grow, and with a schedule that does not depend on it (lr_scheduler_type: constant)"
    if key == _TEMPLATE:
        return "; where it is the tokenizer's own, it has changed at its source since: model.revision pins a commit"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "…"


def find(run: Path, asked: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a run resumes from, and the newer ones that were passed over, each with its reason.

    Args:
        asked: `auto` (the newest that verifies), `never`, or a checkpoint's folder.

    Raises:
        ResumeError: the one that was asked for is not whole, or there are some and none verifies: a run never starts
            over by itself. (One that was stopped while its first checkpoint was written has nothing to resume from.)
    """
    if asked == "never":
        return None, []
    if asked != "auto":
        folder = Path(asked).expanduser()
        folder = folder if folder.is_dir() or not (run / asked).is_dir() else run / asked
        if not folder.is_dir():
            raise ResumeError(f"--resume {asked}: there is no such folder; {_there(run)}")
        if folder.resolve().parent != run.resolve():
            raise ResumeError(f"--resume {asked}: it is no checkpoint of {run}; a run is resumed in its own folder")
        try:
            return verify(folder), []
        except CheckpointError as error:
            raise ResumeError(f"--resume {asked}: {error}; {_there(run)}") from error
    found, passed = newest(run)
    if found is None and any(kind(folder) != "cut short" for folder in folders(run)):
        reasons = "\n".join(f"  {reason}" for reason in passed)
        raise ResumeError(
            f"none of the checkpoints in {run} is whole:\n{reasons}\nTo begin anew, choose another output_dir"
        )
    return found, passed


def _there(run: Path) -> str:
    names = ", ".join(path.name for path in folders(run))
    return f"{run} holds {names}" if names else f"{run} holds no checkpoint"
