"""What was measured of a model since it was trained, as its card has it: sections for people, results for the Hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructft.formatting import FORMS, name_of, yaml_text

EVALUATION = "evaluation.json"  # in the run folder, as `instructft evaluate --json` writes it
GATE = "gate.json"  # the same of `instructft gate`
HELD_OUT = "held-out"  # split of what `instructft evaluate` measured, in the card's head


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """The contents of `evaluation.json` in a run folder; None where there is none that can be read."""
    try:
        found = json.loads((run / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("tuned"), dict) else None


def read_gate(run: Path) -> dict[str, Any] | None:
    """The contents of `gate.json` in a run folder; None where there is none that can be read."""
    try:
        found = json.loads((run / GATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("passed"), bool) else None


def evaluation_section(results: Mapping[str, Any] | None) -> str:
    """A section with what `instructft evaluate` found, base and tuned side by side; "" where there is nothing."""
    names = [name for name in ("base", "tuned") if results and isinstance(results.get(name), dict)]
    if not results or not names:
        return ""
    rows = []
    for figure, form in FORMS.items():
        values = [results[name].get(figure) for name in names]
        if all(isinstance(value, int | float) for value in values):
            rows.append(f"| {name_of(figure)} | " + " | ".join(map(form.format, values)) + " |")
    count = len(results["tuned"].get("rows") or ())
    head = f"| {count} held-out rows | {' | '.join(names)} |" if count else f"| | {' | '.join(names)} |"
    return "\n".join(["", "## Evaluation", "", head, "| --- |" + " ---: |" * len(names), *rows, ""])


def with_results(
    head: dict[str, Any], evaluation: Mapping[str, Any] | None, name: str, sets: Sequence[str]
) -> dict[str, Any]:
    """A card's head with what `instructft evaluate` found, as the Hub's leaderboards read it."""
    tuned = (evaluation or {}).get("tuned") or {}
    measured = [
        {"type": figure, "value": round(value, 6), "name": name_of(figure)}
        for figure in FORMS
        if isinstance(value := tuned.get(figure), int | float) and math.isfinite(value)
    ]
    if not measured:
        return head
    index = head.get("model-index") or [{"name": name, "results": []}]
    results = index[0]["results"]
    if any(one.get("dataset", {}).get("split") == HELD_OUT for one in results):
        return head
    about = results[0]["dataset"] if results else {"name": f"{', '.join(sets)} (held out)", "type": sets[0]}
    more = {"task": {"type": "text-generation"}, "dataset": {**about, "split": HELD_OUT}, "metrics": measured}
    return {**head, "model-index": [{**index[0], "results": [*results, more]}, *index[1:]]}


def head_with_results(text: str, evaluation: Mapping[str, Any] | None) -> str:
    """The same for a card that was written before; one whose head somebody has changed so that it is none stays."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    end = text.find("\n---\n", 4)
    if evaluation is None or not text.startswith("---\n") or end < 0:
        return text
    try:
        head = YAML(typ="safe", pure=True).load(text[4:end])
        if not isinstance(head, dict) or "model-index" not in head:
            return text
        made = with_results(head, evaluation, "", ())
    except (YAMLError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return text
    return text if made is head else f"---\n{yaml_text(made).strip()}{text[end:]}"


def plain(text: str) -> str:
    """A text from elsewhere (a name, a licence) as Markdown that shows it and does nothing.

    >>> plain("# <b>bold\\n# _Trusted_ my_name")
    '\\\\# \\\\<b\\\\>bold # \\\\_Trusted\\\\_ my_name'
    """
    return re.sub(r"([\\`*\[\]<>|]|(?<!\w)_|_(?!\w)|^[#+-])", r"\\\1", " ".join(text.split()))
