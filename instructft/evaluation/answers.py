"""What one answer is worth beside its reference: the figures by name, each for a row, and functions of a user's own.

A figure is a number from 0 to 1, or None where it does not apply to a row: JSON is asked of answers whose reference is
JSON, calls of answers whose reference has some. Thoughts (`<think>…</think>`) are no part of an answer.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instructft.errors import UsageError
from instructft.evaluation.confidence import FEWEST, mean_of
from instructft.evaluation.words import characters, rouge_l, words
from instructft.formatting import first_line, short

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
_MOST_CALLS = 64  # in one answer
_LONGEST = 20_000  # characters in which calls are looked for


class Answered(NamedTuple):
    """An answer beside its reference.

    Args:
        prediction, reference: as text, rendered alike; thoughts included.
        stopped: the answer ended by itself.
        calls: name and arguments of each call of the reference.
    """

    prediction: str
    reference: str
    stopped: bool = True
    calls: tuple[tuple[str, Any], ...] = ()


def spoken(text: str) -> str:
    """An answer without its thoughts, also where the prompt has opened them.

    >>> spoken("<think>\\neasy\\n</think>\\n\\n2"), spoken("easy</think>2"), spoken("<think> and on")
    ('2', '2', '')
    """
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif text.lstrip().startswith("<think>"):
        text = ""
    return text.strip()


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that both have, as often as both have them (SQuAD: https://aclanthology.org/D16-1264).

    >>> token_f1("the capital is Oslo", "Oslo")
    0.4
    """
    cut = words if words(reference) else characters
    ours, theirs = Counter(cut(prediction)), Counter(cut(reference))
    if not ours or not theirs:
        return float(prediction.strip() == reference.strip())
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total())


def as_json(text: str) -> Any:
    """The object or list that a whole text is, also within a fence of Markdown; None where it is none.

    >>> as_json('```json\\n{"a": 1}\\n```'), as_json("12"), as_json('{"a": 1} or so')
    ({'a': 1}, None, None)
    """
    fenced = _FENCED.fullmatch(text.strip())
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def calls_in(text: str) -> list[tuple[str, Any]]:
    """Name and arguments of the calls that a text writes as JSON, in whatever marks a template puts around them.

    >>> calls_in('<tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>')
    [('f', {'a': 1})]
    """
    found: list[tuple[str, Any]] = []
    decoder, at, text = json.JSONDecoder(), 0, text[:_LONGEST]
    while len(found) < _MOST_CALLS and (at := text.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if call := _call(value):
            found.append(call)
            at = end
        else:
            at += 1  # a call may lie within
    return found


def _call(value: Any) -> tuple[str, Any] | None:
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(name := inner.get("name"), str):
        return None
    key = next((key for key in ("arguments", "parameters") if key in inner), None)
    return (name, _object(inner[key])) if key else None


def _object(arguments: Any) -> Any:
    """Arguments that are written as the JSON text of an object, as that object."""
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _calls(row: Answered) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]] | None:
    """Calls of the prediction and of the reference; None where the reference has none, or they cannot be told."""
    if not row.calls:
        return None
    wanted = [(name, _object(arguments)) for name, arguments in row.calls]
    if calls_in(spoken(row.reference)) == wanted:
        return calls_in(spoken(row.prediction)), wanted
    # the template writes calls in no JSON that is known here: the same call is the same text
    same = " ".join(spoken(row.prediction).split()) == " ".join(spoken(row.reference).split())
    return (wanted if same else []), wanted


def _tool_calls(row: Answered) -> float | None:
    found = _calls(row)
    return None if found is None else float(found[0] == found[1])


def _tool_names(row: Answered) -> float | None:
    found = _calls(row)
    return None if found is None else float([name for name, _ in found[0]] == [name for name, _ in found[1]])


def _valid_json(row: Answered) -> float | None:
    if as_json(spoken(row.reference)) is None:
        return None
    return float(as_json(spoken(row.prediction)) is not None)


# name -> what one answer is worth; those of `instructft.recipe.schema.ANSWER_FIGURES`
FIGURES: dict[str, Callable[[Answered], float | None]] = {
    "exact_match": lambda row: float(spoken(row.prediction) == spoken(row.reference)),
    "token_f1": lambda row: token_f1(spoken(row.prediction), spoken(row.reference)),
    "rougeL": lambda row: rouge_l(spoken(row.prediction), spoken(row.reference)),
    "stops": lambda row: float(row.stopped),
    "valid_json": _valid_json,
    "tool_names": _tool_names,
    "tool_calls": _tool_calls,
}


class Own:
    """A figure of the user's: a function of prediction, reference and row, in a file of Python.

    Args:
        file, function: where it stands. The file is run here: `instructft.recipe.validate` says which may be.

    Raises:
        UsageError: the file does not run, or has no such function.
    """

    def __init__(self, file: str, function: str):
        self.place = f"evaluation.metrics: {file}:{function}"
        path = Path(file)
        try:
            self.digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            spec: Any = importlib.util.spec_from_file_location(f"instructft_metric_{path.stem}", path)
            module = importlib.util.module_from_spec(spec)
            with _as_script(path, module):
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # code of the user's: it may raise anything
            raise UsageError(f"{self.place}: the file does not run: {_said(error)}") from error
        self.function: Any = getattr(module, function, None)
        if not callable(self.function):
            raise UsageError(
                f"{self.place}: the file has no such function; expected "
                f"def {function}(prediction: str, reference: str, row: dict) -> float"
            )

    def __call__(self, prediction: str, reference: str, row: Mapping[str, Any]) -> float:
        """What one answer is worth.

        Raises:
            ValueError: the function fails, or gives no number.
        """
        try:
            value = self.function(prediction, reference, copy.deepcopy(dict(row)))  # asked at every evaluation
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.place} fails: {_said(error)}") from error
        try:
            worth = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            worth = math.nan
        if not math.isfinite(worth):
            raise ValueError(f"{self.place}: found {short(repr(value), 60)}, expected a finite number")
        return worth


@contextlib.contextmanager
def _as_script(path: Path, module: Any) -> Iterator[None]:
    """While a file runs, it finds the files beside it, as a script does, and itself, as dataclasses want it."""
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        sys.modules.pop(module.__name__, None)
        with contextlib.suppress(ValueError):  # the file may have changed the list
            sys.path.remove(folder)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def calls_of(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """Name and arguments of the calls of the last message.

    >>> calls_of([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}])
    (('f', {'a': 1}),)
    """
    functions = [call.get("function") or call for call in messages[-1].get("tool_calls") or ()]
    return tuple((str(function.get("name")), function.get("arguments")) for function in functions)


class FurtherFigures:
    """Figures of a recipe that are judged answer by answer, beside those that every evaluation has.

    Args:
        figures: names of ours.
        own: the user's.
    """

    def __init__(self, figures: Sequence[str], own: Mapping[str, Own]):
        self.figures, self.own = figures, own
        self.failed: dict[str, str] = {}  # figure of the user's -> why it had no answer for some row

    def worth(self, answered: Answered, row: Mapping[str, Any]) -> dict[str, float | None]:
        """What one answer is worth, by name; None where a figure does not apply, or fails."""
        found = {name: FIGURES[name](answered) for name in self.figures}
        for name, own in self.own.items():
            try:
                found[name] = own(answered.prediction, answered.reference, row)
            except ValueError as error:
                found[name] = None
                self.failed.setdefault(name, str(error))
        return found

    def over(self, rows: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
        """Of each figure that applies to some row `value`, `interval`, `rows`, and `failed` where it did."""
        found: dict[str, Any] = {}
        for name in (*self.figures, *self.own):
            scores = [score for row in rows if (score := row[name]) is not None]
            if scores:
                measure = mean_of(scores)
                interval = measure.interval() if len(scores) >= FEWEST else None
                found[name] = {"value": measure.whole(), "interval": interval, "rows": len(scores)}
            elif name in self.failed:
                found[name] = {"value": None, "interval": None, "rows": 0}
            if name in self.failed:
                found[name]["failed"] = self.failed[name]
        return found


def own_figures(functions: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, Own]]:
    """Name and figure of each of the user's functions."""
    for name, (file, function) in functions.items():
        yield name, Own(file, function)
