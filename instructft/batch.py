"""`instructft generate`: a JSONL file of prompts in, the same rows with answers out, in the same order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from instructft.errors import DataError
from instructft.generate import Generator, load_for_inference
from instructft.sources import Message

CHUNK = 256  # rows answered between two writes; within a chunk, prompts of like length share a batch


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

    Rows that `target` holds already are kept, so that the same command continues what was interrupted.

    Raises:
        DataError: a row without a prompt, or a `target` that was made from other rows.
    """
    from rich.console import Console
    from rich.progress import track

    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size) > 0):
        raise DataError(f"--batch-size: found {batch_size}, expected auto or a number of prompts")
    rows = read_rows(source)
    done = _finished(target, rows)
    console = Console(stderr=True)
    if done == len(rows):
        console.print(f"{target} holds all {done} answers already.", highlight=False)
        return
    generator = Generator(*load_for_inference(model))
    size = 16 if batch_size == "auto" else int(batch_size)
    chunk = max(size, CHUNK if size <= CHUNK else size)
    starts = range(done, len(rows), chunk)
    with target.open("a", encoding="utf-8") as file:
        for start in track(starts, description="Answering", console=console, disable=not console.is_terminal):
            part = rows[start : start + chunk]
            answers = generator.answers([asked for _, asked in part], max_new_tokens, temperature, top_p, size)
            for (row, _), answer in zip(part, answers, strict=True):
                out = {**row, "response": answer.text, "finish_reason": answer.finish_reason}
                file.write(json.dumps(out, ensure_ascii=False) + "\n")
            file.flush()
    console.print(f"{len(rows) - done} answers written to {target}.", highlight=False)


def read_rows(source: Path) -> list[tuple[dict[str, Any], list[Message]]]:
    """The rows of a JSONL file, each with the conversation that is to be answered.

    Raises:
        DataError: every line that is not JSON or holds no prompt, up to ten of them.
    """
    if not source.is_file():
        raise DataError(f"--input: there is no file {source}")
    rows: list[tuple[dict[str, Any], list[Message]]] = []
    bad: list[str] = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row, _asked(row)))
        except json.JSONDecodeError as error:
            bad.append(f"line {number}, column {error.colno}: not JSON: {error.msg}")
        except DataError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(f"{source}: {len(bad)} bad lines\n  " + "\n  ".join(bad[:10]) + more)
    if not rows:
        raise DataError(f"{source} holds no rows")
    return rows


def _asked(row: Any) -> list[Message]:
    """The conversation that a row asks to continue."""
    if not isinstance(row, dict):
        raise DataError("expected an object with messages, prompt or instruction")
    messages = row.get("messages")
    if messages is None:
        for key, extras in (("instruction", ("input", "context")), ("prompt", ())):
            if isinstance(row.get(key), str) and row[key].strip():
                given = {extra: row[extra] for extra in extras if row.get(extra)}
                messages = [{"role": "user", "content": row[key], **given}]
    if not isinstance(messages, list) or not messages:
        raise DataError("found no prompt; expected messages, prompt, or instruction with optional input or context")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError("a message needs a role and a content, both text")
        if message.get("role") not in ("system", "user", "assistant"):
            raise DataError(f"role {message.get('role')!r} is unknown; expected system, user or assistant")
    if messages[-1]["role"] != "user":
        raise DataError("the last message is not the user's, so there is nothing to answer")
    return messages


def _finished(target: Path, rows: list[tuple[dict[str, Any], list[Message]]]) -> int:
    """How many answers `target` holds; a half-written last line is taken off."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return 0
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.decode("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            made = json.loads(line)
            row = {key: value for key, value in made.items() if key not in ("response", "finish_reason")}
        except (json.JSONDecodeError, AttributeError):
            row = {}
        expected = rows[number - 1][0] if number <= len(rows) else {}
        if {k: v for k, v in expected.items() if k not in ("response", "finish_reason")} != row or not row:
            raise DataError(
                f"--output: line {number} of {target} is not an answer to line {number} of the input, so it was made "
                "from other rows; name another file, or remove it"
            )
    if len(whole) < len(content):
        target.write_bytes(whole)
    return len(lines)
