"""`instructft generate`: a JSONL file of prompts in, the same rows with answers out, in the same order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructft.checkpoints.as_saved import require_as_saved
from instructft.errors import DataError, TemplateError, UsageError
from instructft.inference.generator import Answer, Generator, check_settings
from instructft.inference.jsonl import ADDED, BASE_ADDED, Asked, Output, SetAside, alone, first_ten, read_rows
from instructft.inference.reference_model import ReferenceModel, check_base, recipe_of
from instructft.models.load_for_inference import find_adapter, load_for_inference, locate
from instructft.weights.weight_files import fingerprint

WINDOW = 4096  # rows that are sorted by length together; an answer waits at most this long for its turn in the file
BACKENDS = ("transformers", "vllm")


def generate_file(
    model: str,
    source: Path,
    target: Path,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: str = "auto",
    base: str | None = None,
    backend: str = "transformers",
    columns: Mapping[str, str] | None = None,
) -> None:
    """Answer every row of `source` and append it to `target` with `response` and `finish_reason`.

    A row that has one of these already keeps it as `input_response` or `input_finish_reason`. What `target` holds
    already is kept, so that the same command continues what was interrupted; another model, or other settings, do not.
    Lines that cannot be asked are named, and set aside in `target`.rejected.jsonl.

    Args:
        base: a second model, or `start` (what the run began from), whose answers go to `base_response` and
            `base_finish_reason`.
        backend: transformers, or vllm where it is installed.
        columns: a column that we expect -> the one of `source`; default: as the run's recipe maps its data.

    Example::

        generate_file("runs/quickstart", Path("questions.jsonl"), Path("answers.jsonl"))  # {"prompt": "Hi"}
        # 3 answers written to answers.jsonl: 41 tokens in 0.4 s, 102 tokens/s.

    Raises:
        UsageError: a setting that is out of range, or a `target` that another model or other settings began.
        DataError: no row that can be asked, or a `target` that was made from other rows.
    """
    if batch_size != "auto" and not (batch_size.isascii() and batch_size.isdigit() and int(batch_size) > 0):
        raise UsageError(f"--batch-size: found {batch_size}, expected auto or a number of prompts")
    if backend not in BACKENDS:
        raise UsageError(f"--backend: found {backend}, expected {' or '.join(BACKENDS)}")
    if backend == "vllm" and base:
        raise UsageError("--base needs --backend transformers; with vllm, write each model's answers to its own file")
    check_settings(max_new_tokens, temperature, top_p)
    added = ADDED + BASE_ADDED if base else ADDED
    recipe = None if columns else recipe_of(model)
    mappings = [columns] if columns else [entry.columns for entry in (recipe.data.datasets if recipe else ())]
    rows, bad = read_rows(source, added, mappings, strict=bool(columns))
    with alone(target):
        _generate(model, source, target, rows, bad, (max_new_tokens, temperature, top_p, batch_size), base, backend)


def _generate(
    model: str,
    source: Path,
    target: Path,
    rows: list[Asked],
    bad: list[SetAside],
    wanted: tuple[int, float, float, str],
    base: str | None,
    backend: str,
) -> None:
    from rich.console import Console

    max_new_tokens, temperature, top_p, batch_size = wanted
    added = ADDED + BASE_ADDED if base else ADDED
    made_by: dict[str, Any] = {"model": _identity(model)}
    if base:
        check_base(model, base)
        made_by["base"] = base if base == "start" else _identity(base)
    made_by |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "backend": backend}
    output = Output(target, rows, added, made_by)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if any(f"input_{name}" in row.row for row in rows for name in added):
        console.print("Rows that had a response of their own keep it as input_response.")
    if output.complete:
        _say_set_aside(console, output, source, target, bad)
        console.print(f"{target} holds all {output.done} answers already.")
        return
    if kept := output.done + len(output.ahead):
        console.print(f"{target} holds {kept} of {len(output.rows)} answers already; continuing after them.")
    generator = _load(model, backend)
    reference = ReferenceModel.of(model, base, generator) if base else None
    too_long = _too_long(generator, output.rows[output.done :])
    if reference:
        with reference.answering() as other:
            too_long = _too_long(other, output.rows[output.done :]) | too_long
    output.set_aside(too_long)
    _say_set_aside(console, output, source, target, bad)
    if not output.rows:
        raise DataError(f"{source}: none of its prompts can be answered by {model}")
    settings = (max_new_tokens, temperature, top_p, None if batch_size == "auto" else int(batch_size))
    with output:
        _answer(console, output, generator, reference, settings)
    console.print(f"{target} is complete: {output.done} answers.")


def _load(model: str, backend: str) -> Generator:
    if backend == "vllm":
        from instructft.inference.vllm import VllmGenerator

        return VllmGenerator(model)
    require_as_saved(model, whole=False)
    return Generator(*load_for_inference(model))


def _answer(
    console: Any,
    output: Output,
    generator: Generator,
    reference: ReferenceModel | None,
    settings: tuple[int, float, float, Any],
) -> None:
    """Answer what is missing, window by window, and tell how fast it went."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    speed = TextColumn("{task.fields[speed]}")
    began, tokens, count = time.perf_counter(), 0, 0
    names = [ADDED, BASE_ADDED] if reference else [ADDED]
    work = {pair: output.missing(pair) for pair in names}
    with Progress(*columns, speed, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(map(len, work.values())), speed="")

        def taker(places: Sequence[int], pair: tuple[str, ...]) -> Callable[[int, Answer], None]:
            def take(i: int, answer: Answer) -> None:
                nonlocal tokens, count
                output.put(places[i], dict(zip(pair, (answer.text, answer.finish_reason), strict=True)))
                tokens, count = tokens + answer.tokens, count + 1
                progress.update(task, advance=1, speed=f"{tokens / (time.perf_counter() - began):,.0f} tokens/s")

            return take

        for start in range(output.done, len(output.rows), WINDOW):
            for pair in names:
                places = [i for i in work[pair] if start <= i < start + WINDOW]
                asked = [output.rows[i].messages for i in places]
                if not places:
                    continue
                if pair == ADDED:
                    generator.answers(asked, *settings, taker(places, pair))
                elif reference:
                    with reference.answering() as other:
                        other.answers(asked, *settings, taker(places, pair))
    seconds = time.perf_counter() - began
    console.print(f"{count} answers made: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s.")


def _identity(model: str) -> dict[str, str]:
    """What tells one model from another, wherever it lies: its weights, and what renders and cuts its prompts.

    Raises:
        UsageError: there is no such model.
    """
    location, revision = locate(model)
    folder = Path(location)
    if not folder.exists():
        return {"hub": location, "revision": revision}
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    adapter = find_adapter(model)
    if adapter is None:
        return {"weights": fingerprint(folder), "tokenizer": f"sha256:{digest.hexdigest()}"}
    weights = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    weights.update((folder / "adapter_model.safetensors").read_bytes())
    found = {"adapter": f"sha256:{weights.hexdigest()}", "tokenizer": f"sha256:{digest.hexdigest()}"}
    return found | {"base": adapter.base.fingerprint or adapter.base.name_or_path}


def _too_long(generator: Generator, rows: Sequence[Asked]) -> dict[int, str]:
    """Rows that this model cannot be asked, by line, before the first is."""
    found = {}
    for row in rows:
        try:
            generator.room(generator.encoder.prompts([row.messages])[0])
        except (UsageError, TemplateError) as error:
            found[row.line] = f": {error}"
    return found


def _say_set_aside(console: Any, output: Output, source: Path, target: Path, bad: list[SetAside]) -> None:
    lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if output.too_long else []
    text = {line: lines[line - 1].decode("utf-8", errors="replace").rstrip("\r") for line in output.too_long}
    aside = [*bad, *(SetAside(line, reason, text[line]) for line, reason in output.too_long.items())]
    aside.sort(key=lambda one: one.line)
    output.write_rejected(aside)
    if aside:
        count = "1 line is" if len(aside) == 1 else f"{len(aside)} lines are"
        console.print(f"{source}: {count} set aside in {target}.rejected.jsonl\n{first_ten(aside)}")
