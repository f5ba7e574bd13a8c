"""Asks in a terminal for what was not typed; where nobody can answer, says what to type."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from instructft.errors import UsageError


@dataclass(frozen=True)
class Wanted:
    """What `init` is to write: a shipped recipe `name`, or one for `data`."""

    file: Path
    name: str = ""
    data: str | None = None
    model: str = ""
    goal: str = "lora"


def in_terminal() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def what_to_write(name: str | None, file: Path | None, data: str | None, model: str | None, goal: str | None) -> Wanted:
    """What `instructft init` was asked for, with what is missing asked in a terminal.

    Raises:
        UsageError: nobody can be asked, or the file is there already.
    """
    if name is not None and data is None and model is None and goal is None:
        return Wanted(file or Path(f"{name}.yaml"), name=name)
    if name is not None and file is not None:
        raise UsageError(f"with --data or --model one FILE is written; found {name} and {file}")
    file = Path(name) if name is not None else None
    if (data is None or model is None) and not in_terminal():
        missing = " and ".join(flag for flag, value in (("--data FILE", data), ("--model ID", model)) if value is None)
        raise UsageError(f"init: expected NAME, a shipped recipe (`instructft recipes`), or {missing}")
    data = data or _asked("Rows to train on (a file of JSON, JSONL, CSV, Parquet, …)")
    if file is not None and file.exists():
        raise UsageError(f"{file} exists already; name another file")
    asked = model is None
    model = model or _asked("Model (a folder, or a Hub id such as HuggingFaceTB/SmolLM2-135M-Instruct)")
    goal = goal or (
        _asked("Train a LoRA adapter (lora), all weights (full), or 4-bit (qlora)?", "lora") if asked else "lora"
    )
    stem = re.sub(r"[^\w-]+", "", Path(data.rstrip("/")).name.split(".")[0])  # of a pattern what can be a name
    usual = Path(f"{stem or 'recipe'}.yaml")
    if file is None:
        file = Path(_asked("Write the recipe to", str(usual))) if asked else usual
    if file.exists():
        raise UsageError(f"{file} exists already; name another file")
    return Wanted(file, data=data, model=model, goal=goal)


def which(question: str, candidates: list[str]) -> str:
    """One of several, by its number or name."""
    for number, candidate in enumerate(candidates, 1):
        print(f"  {number}  {candidate}")
    while True:
        said = _asked(question)
        if said in candidates:
            return said
        if said.isdecimal() and 1 <= int(said) <= len(candidates):
            return candidates[int(said) - 1]
        print(f"  expected 1 to {len(candidates)}")


def _asked(question: str, default: str | None = None) -> str:
    return str(typer.prompt(question, default=default)).strip()
