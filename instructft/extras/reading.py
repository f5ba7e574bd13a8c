"""`instructft evaluate MODEL --prompts`: thirty prompts of many kinds, answered to be read; no figure replaces that.

The prompts lie in `reading_prompts.json`, written for this project, Apache-2.0 like the rest of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instructft.evaluation.compare import json_place
from instructft.inference.chat import Generator, load_for_inference, locate
from instructft.inference.reference_model import ReferenceModel, check_base

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

    locate(model)
    if base:
        check_base(model, base)
    json_place(json_file)
    tuned = Generator(*load_for_inference(model))
    results = {"tuned": {"rows": _answered(tuned)}}
    if base:
        with ReferenceModel.of(model, base, tuned).answering() as other:
            results["base"] = {"rows": _answered(other)}
    if json_file:
        json_file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console = Console(highlight=False, soft_wrap=True)
    for i, row in enumerate(results["tuned"]["rows"]):
        console.print(f"\n[{row['kind']}] {row['prompt']}", markup=False, style="bold")
        if base:
            _print(console, "before", results["base"]["rows"][i])
        _print(console, "after " if base else "answer", row)


def _answered(generator: Generator) -> list[dict[str, Any]]:
    prompts = reading_prompts()
    fits = [row for row in prompts if len(_ids(generator, row)) < generator.context]
    answers = iter(generator.answers([[_turn(row)] for row in fits], MAX_NEW_TOKENS))
    rows: list[dict[str, Any]] = []
    for row in prompts:
        if row in fits:
            answer = next(answers)
            rows.append({**row, "prediction": answer.text, "finish_reason": answer.finish_reason})
        else:  # a model whose context is so short that the question fills it
            rows.append({**row, "prediction": "", "finish_reason": "length"})
    return rows


def _turn(row: dict[str, str]) -> dict[str, str]:
    return {"role": "user", "content": row["prompt"]}


def _ids(generator: Generator, row: dict[str, str]) -> list[int]:
    return generator.encoder.prompts([[_turn(row)]])[0]


def _print(console: Any, who: str, row: dict[str, Any]) -> None:
    text = row["prediction"].replace("\n", "\n          ") or "(nothing)"
    console.print(f"  {who}  {text}{'' if row['finish_reason'] == 'stop' else ' …'}", markup=False)
