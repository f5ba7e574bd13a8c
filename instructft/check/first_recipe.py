"""`instructft init --data FILE --model ID`: a recipe from the rows, the model and the machine at hand, with reasons.

Every number follows from something that was counted here: rows and tokens from the file, memory from the estimate that
`check` makes. What no count decides (learning rate, epochs) is a convention, and called one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from instructft.check.columns import LOOKED_AT, Choose, Reading, reading_of
from instructft.data.formats import detect_format
from instructft.errors import DataError, UsageError
from instructft.recipe.commented import Draft, commented

GOALS = ("lora", "full", "qlora")


@dataclass(frozen=True)
class Look:
    """What can be told of rows and a model without any library."""

    data: str
    model: str
    goal: str
    file: Path
    reading: Reading
    names: tuple[str, ...]  # columns of the rows
    held_out: bool  # there are files of a split for validation


def look(
    data: str,
    model: str,
    goal: str,
    file: Path,
    *,
    columns: Mapping[str, str] | None = None,
    choose: Choose | None = None,
    say: Callable[[str], Any] = print,
) -> Look:
    """Look at what was typed and at the first rows.

    Args:
        data: a file, folder, pattern or URL of rows.
        goal: lora, full or qlora.
        file: where the recipe is to be written.
        columns: our column -> the file's, where somebody has said it.
        choose: asks which column it is, where the file does not tell.
        say: told in one line of each finding.

    Raises:
        UsageError: what was typed is not right, or nothing can be read.
    """
    if goal not in GOALS:
        raise UsageError(f"--goal: found {goal}, expected {', '.join(GOALS)}")
    _refuse_absent_model(model)
    rows, held_out = _rows(data)
    reading = reading_of(rows, data, columns, choose)
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    _say_reading(reading, names, say)
    return Look(data, model, goal, file, reading, names, held_out)


def write(found: Look, say: Callable[[str], Any] = print) -> None:
    """Count tokens, decide, and write the recipe. Imports torch.

    Raises:
        UsageError: the model or all of the rows cannot be read, or this machine cannot do it; nothing is written.
    """
    from instructft.check.sizing import sized

    draft = Draft()
    _model_and_data(draft, found)
    sized(draft, found.goal, found.file.stem, say)
    text = commented(draft.values, draft.reasons, _head(found))
    found.file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with found.file.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{found.file} exists already; name another file") from None


def _refuse_absent_model(model: str) -> None:
    """What can be told of a model without any library."""
    from instructft.weights.base_record import is_hub_id

    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            holds = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise UsageError(f"--model: {model} holds no model (no config.json); it holds {holds}")
    elif not is_hub_id(model):
        raise UsageError(f"--model: there is no folder {model}, and no model on the Hub has such a name")


def _rows(data: str) -> tuple[list[Mapping[str, Any]], bool]:
    """The first rows, and whether there is a split for validation beside them."""
    from instructft.data import readers
    from instructft.data.files.locate import located

    splits = located(data, "--data")
    files = splits.get("train") or next(iter(splits.values()), [])
    rows: list[Mapping[str, Any]] = []
    for file in files:
        found = readers.rows(file.path, file.suffix, file.name) if file.path else file.rows()
        rows += islice(found, LOOKED_AT - len(rows))
        if len(rows) >= LOOKED_AT:
            break
    if not rows:
        raise DataError(f"--data: {data} holds no rows")
    return rows, "validation" in splits and "train" in splits


def _say_reading(reading: Reading, names: tuple[str, ...], say: Callable[[str], Any]) -> None:
    if reading.because:
        mapped = ", ".join(f"{ours} is {_quoted(theirs)}" for ours, theirs in reading.columns.items())
        say(f"{'columns':10} a guess: {mapped}")
        for line in reading.because:
            say(f"{'':10}   {line}")
        say(f"{'':10}   if it is wrong: --columns {' '.join(f'{a}={_quoted(b)}' for a, b in reading.columns.items())}")
    else:
        mapped = "".join(f", {ours} is {_quoted(theirs)}" for ours, theirs in reading.columns.items())
        say(f"{'columns':10} {reading.format}{mapped}")
    if unread := reading.unread(names):
        say(f"{'not read':10} {', '.join(unread)}")


def _quoted(name: str) -> str:
    return name if name.isidentifier() else f'"{name}"'


# --------------------------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------------------------


def _model_and_data(draft: Draft, found: Look) -> None:
    reading = found.reading
    draft.put("model.name_or_path", found.model)
    if found.goal == "qlora":
        draft.put("model.quantization", "4bit", "QLoRA: the frozen base in 4 bits, an adapter over it")
    entry: dict[str, Any] = {"url" if "://" in found.data else "path": found.data}
    if detect_format(list(dict.fromkeys([*found.names, *reading.columns])), found.data) != reading.format:
        entry["format"] = reading.format
    if reading.columns:
        entry["columns"] = dict(reading.columns)
        draft.reasons["data.datasets.0.columns"] = "ours: the file's" + ("; a guess" if reading.because else "")
    draft.put("data.datasets", [entry])
    draft.put("data.template", "auto")
    draft.put("data.train_on", "responses", "the answers carry loss, up to the token that ends each")
    if reading.ignore:
        draft.put("data.ignore", list(reading.ignore), "columns and keys that no model sees")
    if found.held_out:
        draft.put("data.validation", [{**entry, "split": "validation"}], "the files beside it that are named so")
    if found.goal != "full":
        draft.put("adapter", {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"})
        draft.reasons["adapter.r"] = "rank of the update, a convention: 8 to 64, more for what is new to the model"
        draft.reasons["adapter.alpha"] = "twice the rank, a convention: the update is scaled by alpha / r"
        draft.reasons["adapter.target_modules"] = "all of attention and MLP (arXiv:2305.14314); the head stays out"


def _head(found: Look) -> list[str]:
    how = {"lora": "with a LoRA adapter", "full": "whole", "qlora": "with an adapter over its weights in 4 bits"}
    return [
        f"{Path(found.model).name} learns from {Path(found.data).name}, {how[found.goal]}.",
        "",
        f"Launch:    instructft train {found.file}",
        f"Before:    instructft inspect {found.file}   shows rows with their mask",
        f"           instructft check {found.file}   audits all of them, and estimates memory and time",
        "Written by instructft init: where the reason is a count, it was counted on this file and this machine.",
    ]
