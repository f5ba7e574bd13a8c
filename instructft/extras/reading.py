"""`instructft evaluate MODEL --prompts`: thirty prompts of many kinds, answered to be read; no figure replaces that.

The prompts lie in `reading_prompts.json`, written for this project, Apache-2.0 like the rest of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instructft.evaluation.compare import ask_both, check_json, check_models, write_json
from instructft.evaluation.metrics import answers_to
from instructft.inference.generator import Generator
from instructft.prompt.render import Message

MAX_NEW_TOKENS = 200


def reading_prompts() -> list[dict[str, str]]:
    """The thirty prompts, each with its `kind`.

    >>> reading_prompts()[0]
    {'kind': 'fact', 'prompt': 'What is the capital of Japan?'}
    """
    found: list[dict[str, str]] = json.loads(
        Path(__file__).with_name("reading_prompts.json").read_text(encoding="utf-8")
    )
    return found


def read_prompts(model: str, base: str | None = None, json_file: Path | None = None) -> None:
    """Print the answers to the built-in prompts, base and tuned below each other; write `json_file`.

    The file holds `tuned` and, with `base`, `base`: each `rows` of `kind`, `prompt`, `prediction`, `finish_reason`.

    >>> read_prompts("runs/gpt2-dolly", base="start")
    [fact] What is the capital of Japan?
      before  …
      after   Tokyo.

    Raises:
        UsageError: no such model, or a base that cannot be told; before weights are loaded.
    """
    from rich.console import Console

    check_models(model, base)
    check_json(json_file)
    results = ask_both(model, base, lambda generator: {"rows": _answered(generator)})
    write_json(json_file, results)
    console = Console(highlight=False, soft_wrap=True)
    for i, row in enumerate(results["tuned"]["rows"]):
        console.print(f"\n[{row['kind']}] {row['prompt']}", markup=False, style="bold")
        if base:
            _print(console, "before", results["base"]["rows"][i])
        _print(console, "after " if base else "answer", row)


def _answered(generator: Generator) -> list[dict[str, Any]]:
    rows = reading_prompts()
    asked: list[list[Message]] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    return [
        {**row, "prediction": answer.text, "finish_reason": answer.finish_reason}
        for row, answer in zip(rows, answers_to(generator, asked, MAX_NEW_TOKENS), strict=True)
    ]


def _print(console: Any, who: str, row: dict[str, Any]) -> None:
    text = row["prediction"].replace("\n", "\n          ") or "(nothing)"
    console.print(f"  {who}  {text}{'' if row['finish_reason'] == 'stop' else ' …'}", markup=False)
