"""`instructft generate`: a JSONL file of prompts in, the same rows with answers out, in the same order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructft.answer import CPU_BATCH, check_settings
from instructft.errors import DataError, TemplateError, UsageError
from instructft.generate import Generator, load_for_inference
from instructft.sources import Message

CHUNK = 8  # batches answered between two writes; within them, prompts of like length share a batch
ADDED = ("response", "finish_reason")


def generate_file(
    model: str,
    source: Path,
    target: Path,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: str = "auto",
) -> None:
    """Answer every row of `source` and append it to `target` with `response` and `finish_reason`.

    A row that has one of these already keeps it as `input_response` or `input_finish_reason`. Rows that `target`
    holds already are kept, so that the same command continues what was interrupted.

    >>> generate_file("runs/quickstart", Path("questions.jsonl"), Path("answers.jsonl"))  # {"prompt": "Hi"}
    3 answers written to answers.jsonl.

    Raises:
        UsageError: a setting that is out of range, or a prompt that fills the model's context.
        DataError: a row without a prompt, or a `target` that was made from other rows.
    """
    from rich.console import Console
    from rich.progress import track

    if batch_size != "auto" and not (batch_size.isascii() and batch_size.isdigit() and int(batch_size) > 0):
        raise UsageError(f"--batch-size: found {batch_size}, expected auto or a number of prompts")
    check_settings(max_new_tokens, temperature, top_p)
    rows = read_rows(source)
    done = _finished(target, [row for _, row, _ in rows])
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if done == len(rows):
        console.print(f"{target} holds all {done} answers already.")
        return
    if done:
        console.print(f"{target} holds {done} of {len(rows)} answers already; going on behind them.")
    if any(f"input_{name}" in row for _, row, _ in rows for name in ADDED):
        console.print("Rows that had a response of their own keep it as input_response.")
    generator = Generator(*load_for_inference(model))
    _check_prompts(generator, source, rows[done:])
    size = None if batch_size == "auto" else int(batch_size)
    chunk = CHUNK * (size or CPU_BATCH)
    starts = range(done, len(rows), chunk)
    with target.open("a", encoding="utf-8", newline="\n") as file:
        for start in track(starts, description="Answering", console=console, disable=not console.is_terminal):
            part = rows[start : start + chunk]
            answers = generator.answers([asked for _, _, asked in part], max_new_tokens, temperature, top_p, size)
            for (_, row, _), answer in zip(part, answers, strict=True):
                out = {**row, "response": answer.text, "finish_reason": answer.finish_reason}
                file.write(json.dumps(out, ensure_ascii=False) + "\n")
            file.flush()
    console.print(f"{len(rows) - done} answers written to {target}.")


def read_rows(source: Path) -> list[tuple[int, dict[str, Any], list[Message]]]:
    """The rows of a JSONL file: line number, the row as it goes to the output, and the conversation to be answered.

    Raises:
        DataError: every line that is not JSON or holds no prompt, up to ten of them.
    """
    if not source.is_file():
        raise DataError(f"--input: there is no file {source}")
    rows: list[tuple[int, dict[str, Any], list[Message]]] = []
    bad: list[str] = []
    # Not `splitlines`: JSON may hold U+2028 and its like inside a text.
    for number, line in enumerate(source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
            rows.append((number, _kept(row), _asked(row)))
        except json.JSONDecodeError as error:
            bad.append(f"line {number}, column {error.colno}: not JSON: {error.msg}")
        except UnicodeDecodeError as error:
            bad.append(f"line {number}: not UTF-8 at byte {error.start + 1}")
        except DataError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        count = "1 bad line" if len(bad) == 1 else f"{len(bad)} bad lines"
        raise DataError(f"{source}: {count}\n  " + "\n  ".join(bad[:10]) + more)
    if not rows:
        raise DataError(f"{source} holds no rows")
    return rows


def _no_constant(name: str) -> None:
    raise DataError(f"not JSON: {name} is no number there")


def _kept(row: Any) -> dict[str, Any]:
    """The row with names of its own for what the output adds; nothing that came in is written over.

    >>> _kept({"prompt": "Hi", "response": "Hello"})
    {'prompt': 'Hi', 'input_response': 'Hello'}
    """
    if not isinstance(row, dict):
        raise DataError("expected an object with messages, prompt or instruction")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    kept = {}
    for name, value in row.items():
        free = name
        while free in ADDED or (free != name and free in row):
            free = f"input_{free}"
        kept[free] = value
    return kept


def _asked(row: dict[str, Any]) -> list[Message]:
    """The conversation that a row asks to continue."""
    messages = row.get("messages")
    if messages is None:
        for key, extras in (("prompt", ()), ("instruction", ("input", "context"))):
            if isinstance(row.get(key), str) and row[key].strip():
                given = {extra: row[extra] for extra in extras if row.get(extra)}
                messages = [{"role": "user", "content": row[key], **given}]
                break
    if not isinstance(messages, list) or not messages:
        raise DataError("found no prompt; expected messages, prompt, or instruction with optional input or context")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError("a message needs a role and a content, both text")
        if message.get("role") not in ("system", "user", "assistant"):
            raise DataError(f"role {message.get('role')!r} is unknown; expected system, user or assistant")
        for extra in ("input", "context"):
            if not isinstance(message.get(extra, ""), str):
                raise DataError(f"{extra} is not text")
    if messages[-1]["role"] != "user":
        raise DataError("the last message is not the user's, so there is nothing to answer")
    return messages


def _check_prompts(
    generator: Generator, source: Path, rows: Sequence[tuple[int, dict[str, Any], list[Message]]]
) -> None:
    """Find every prompt that cannot be answered before the first is, and name its line."""
    bad = []
    for number, _, asked in rows:
        try:
            generator.room(generator.encoder.prompts([asked])[0])
        except (UsageError, TemplateError) as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(
            f"{source}: {len(bad)} of {len(rows)} prompts cannot be answered\n  " + "\n  ".join(bad[:10]) + more
        )


def _finished(target: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many answers `target` holds; a half-written last line is taken off."""
    if target.is_dir():
        raise DataError(f"--output: {target} is a folder; name a file")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return 0
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            made = json.loads(line)
            same = {**made, **dict.fromkeys(ADDED)} == {**rows[number - 1], **dict.fromkeys(ADDED)}
            answered = all(name in made for name in ADDED)
        except (ValueError, TypeError, IndexError):
            same = answered = False
        if not (same and answered):
            raise DataError(
                f"--output: line {number} of {target} is not an answer to row {number} of the input, so it was made "
                "from other rows; name another file, or remove it"
            )
    if len(whole) < len(content):
        if not lines and not _begins_row(content, rows[0]):
            raise DataError(f"--output: {target} holds something else than answers; name another file, or remove it")
        with target.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def _begins_row(content: bytes, row: Mapping[str, Any]) -> bool:
    """Whether a half-written only line began as this row: nobody else's file is cut."""
    begun = json.dumps(row, ensure_ascii=False).encode("utf-8")[:-1]
    return content[: len(begun)] == begun[: len(content)]
