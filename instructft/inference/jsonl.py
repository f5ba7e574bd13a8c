"""The files of `instructft generate`: rows that are asked come in, the same rows go out in order with their answers.

::

    answers.jsonl                the input's rows with their answers, in the input's order
    answers.jsonl.meta.json      the model and the settings that made them: nothing else continues this file
    answers.jsonl.ahead.jsonl    while it is made: answers whose turn has not come, so that a killed run keeps them
    answers.jsonl.rejected.jsonl lines that cannot be asked, each with its number and the reason
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructft.checkpoints.lock import only_one
from instructft.errors import DataError, UsageError
from instructft.formatting import first_line, short
from instructft.prompt.conversation import Message
from instructft.whole_file import write_whole

Columns = dict[str, str]  # what the output adds to a row: `response`, `finish_reason`, …
ADDED = ("response", "finish_reason")
BASE_ADDED = ("base_response", "base_finish_reason")


@dataclass(frozen=True)
class Asked:
    """A row that can be asked."""

    line: int  # in the input, from 1
    row: dict[str, Any]  # as it goes to the output, before the answer is added
    messages: list[Message]  # to be answered


@dataclass(frozen=True)
class SetAside:
    """A line that cannot be asked, and why."""

    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}{self.reason}"


def read_rows(
    source: Path,
    added: tuple[str, ...] = ADDED,
    columns: Sequence[Mapping[str, str]] = (),
    strict: bool = False,
) -> tuple[list[Asked], list[SetAside]]:
    """The rows of a JSONL file, and the lines that are none: not JSON, or without a prompt.

    Args:
        columns: how rows like these may be read, ours -> theirs: where a row has no prompt of its own, by the first
            whose columns it has.
        strict: every row is to be read so.

    Example::

        read_rows(Path("questions.jsonl"))  # {"prompt": "Hi"}
        # ([Asked(line=1, row={'prompt': 'Hi'}, messages=[{'role': 'user', 'content': 'Hi'}])], [])

    Raises:
        DataError: there is no such file, or not one row in it can be asked.
    """
    if not source.is_file():
        raise DataError(f"--input: there is no file {source}")
    rows: list[Asked] = []
    bad: list[SetAside] = []
    # Not `splitlines`: JSON may hold U+2028 and its like inside a text.
    for number, line in enumerate(source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
            rows.append(Asked(number, _kept(row, added), _asked(_mapped(row, columns, strict))))
            continue
        except json.JSONDecodeError as error:
            reason = f", column {error.colno}: not JSON: {error.msg}"
        except UnicodeDecodeError as error:
            reason = f": not UTF-8 at byte {error.start + 1}"
        except RecursionError:
            reason = ": nested too deeply"
        except DataError as error:
            reason = f": {error}"
        except ValueError as error:  # a number of more digits than Python reads
            reason = f": not JSON: {first_line(error)}"
        bad.append(SetAside(number, reason, line.decode("utf-8", errors="replace").rstrip("\r")))
    if not rows:
        raise DataError(f"{source} holds no rows" + (f" that can be asked\n{first_ten(bad)}" if bad else ""))
    return rows, bad


def first_ten(bad: list[SetAside]) -> str:
    """Ten of them, a line each, and how many more there are."""
    more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
    return "\n".join(f"  {one}" for one in bad[:10]) + more


def _no_constant(name: str) -> None:
    raise DataError(f"not JSON: {name} is no number there")


def _finite(text: str) -> float:
    """A number as written, unless it is too large for one: it would come out as `Infinity`, which is no JSON."""
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise DataError(f"not JSON: {short(text, 40)} is larger than any number there")
    return number


def _kept(row: Any, added: tuple[str, ...]) -> dict[str, Any]:
    """The row with names of its own for what the output adds; nothing that came in is written over."""
    if not isinstance(row, dict):
        raise DataError("expected an object with messages, prompt or instruction")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    kept = {}
    for name, value in row.items():
        free = name
        while free in added or (free != name and free in row):
            free = f"input_{free}"
        kept[free] = value
    return kept


_ASKING = ("messages", "prompt", "instruction")
_NAMES = {"question": "instruction", "query": "instruction", "problem": "instruction"}  # of formats with other names


def _mapped(row: Any, columns: Sequence[Mapping[str, str]], strict: bool) -> Any:
    """The row with what stands in mapped columns under our names too; an answer may be missing, a question not."""
    own = isinstance(row, dict) and any(row.get(name) is not None for name in _ASKING)
    if not isinstance(row, dict) or (own and not strict):
        return row
    lacking: list[str] = []
    for mapping in columns:
        ours = {_NAMES.get(name, name): theirs for name, theirs in mapping.items()}
        asks = [theirs for name, theirs in ours.items() if name in _ASKING]
        lacking = [theirs for theirs in asks if row.get(theirs) is None]
        if asks and not lacking:
            return {**row, **{name: row[theirs] for name, theirs in ours.items() if theirs in row}}
    if strict:
        missing = ", ".join(lacking) or "is mapped to a question"
        raise DataError(f"--columns: no column {missing}; it has {', '.join(row)}")
    return row


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


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold an output file: no other process answers into it meanwhile.

    Raises:
        UsageError: another one does.
        DataError: the file's folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = target.with_name(f".{target.name}.lock")
            held.enter_context(only_one(lock, f"--output: {target}: `instructft generate`", "name another file"))
        except OSError as error:
            raise DataError(f"--output: {target} cannot be written ({error.strerror or error})") from error
        yield


class Output:
    """The output file of one run, which continues where an earlier one stopped.

    Args:
        added: the columns that an answer brings.
        made_by: the model and the settings, as JSON holds them.

    Raises:
        DataError: the file holds other rows, or something else.
        UsageError: another model, or other settings, made it.
    """

    def __init__(self, target: Path, rows: Sequence[Asked], added: tuple[str, ...], made_by: Mapping[str, Any]):
        self.target, self.added, self.made_by = target, added, dict(made_by)
        if target.is_dir():
            raise DataError(f"--output: {target} is a folder; name a file")
        companions = (target, self._companion("ahead.jsonl"))
        begun = target.exists() and any(path.exists() and path.stat().st_size for path in companions)
        meta = self._meta() if begun else {}
        # rows that this model cannot be asked, as the run before has found out
        self.too_long: dict[int, str] = {int(line): reason for line, reason in meta.get("too_long", {}).items()}
        self.rows = [row for row in rows if row.line not in self.too_long]
        self.done = self._finished([row.row for row in self.rows])
        if begun:
            self._check(meta)
        self.ahead: dict[int, Columns] = self._read_ahead() if meta else {}

    @property
    def complete(self) -> bool:
        """Whether every row has its answer."""
        return self.done == len(self.rows)

    def missing(self, added: Sequence[str]) -> list[int]:
        """Places in `rows` that still lack one of these columns."""
        return [i for i in range(self.done, len(self.rows)) if not set(added) <= set(self.ahead.get(i, {}))]

    def set_aside(self, too_long: Mapping[int, str]) -> None:
        """Take rows out that this model cannot be asked, by line; before the first answer."""
        ahead = {self.rows[i].line: columns for i, columns in self.ahead.items()}
        self.too_long |= too_long
        self.rows = [row for row in self.rows if row.line not in self.too_long]
        self.ahead = {i: ahead[row.line] for i, row in enumerate(self.rows) if row.line in ahead}

    def write_rejected(self, aside: Sequence[SetAside]) -> None:
        """Write down the lines that are not asked, each with the reason."""
        rejected = self._companion("rejected.jsonl")
        if not aside:
            rejected.unlink(missing_ok=True)
            return
        rejected.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"line": one.line, "reason": one.reason.lstrip(":, "), "text": one.text} for one in aside]
        write_whole(rejected, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def __enter__(self) -> Output:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        meta = {**self.made_by, "too_long": {str(line): reason for line, reason in sorted(self.too_long.items())}}
        write_whole(self._companion("meta.json"), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
        self._file = self.target.open("a", encoding="utf-8", newline="\n")
        ahead = self._companion("ahead.jsonl")
        write_whole(ahead, "".join(self._ahead_line(i, columns) for i, columns in self.ahead.items()))
        self._ahead_file = ahead.open("a", encoding="utf-8", newline="\n")
        self._flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._ahead_file.close()
        if self.complete:
            self._companion("ahead.jsonl").unlink(missing_ok=True)

    def put(self, i: int, columns: Columns) -> None:
        """Take an answer to `rows[i]`: it goes to the file as soon as all rows before it are there."""
        self.ahead[i] = self.ahead.get(i, {}) | columns
        if i > self.done or not set(self.added) <= set(self.ahead[i]):
            self._ahead_file.write(self._ahead_line(i, columns))
            self._ahead_file.flush()
        self._flush()

    def _ahead_line(self, i: int, columns: Columns) -> str:
        return json.dumps({"line": self.rows[i].line, **columns}, ensure_ascii=False) + "\n"

    def _flush(self) -> None:
        while set(self.added) <= set(self.ahead.get(self.done, {})):
            columns = self.ahead.pop(self.done)
            row = {**self.rows[self.done].row, **{name: columns[name] for name in self.added}}
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.done += 1
        self._file.flush()

    def _companion(self, suffix: str) -> Path:
        return self.target.with_name(f"{self.target.name}.{suffix}")

    def _meta(self) -> dict[str, Any]:
        try:
            meta = json.loads(self._companion("meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            meta = None
        if not isinstance(meta, dict) or not isinstance(meta.get("too_long"), dict):
            raise UsageError(
                f"--output: {self._companion('meta.json')} is not readable as JSON; name another output file"
            )
        return meta

    def _check(self, meta: Mapping[str, Any]) -> None:
        """Refuse to put answers of one model, or of other settings, behind those of another."""
        way_out = f"repeat the command that began {self.target}, name another file"
        if not meta:
            raise UsageError(
                f"--output: there is no {self._companion('meta.json')} to say which model and settings made "
                f"{self.target}; name another file"
            )
        for key, value in self.made_by.items():
            if meta.get(key) != value:
                raise UsageError(
                    f"--output: {self.target} was begun with another {key}: found {_json(meta.get(key))}, and now "
                    f"{_json(value)}; {way_out}"
                )

    def _read_ahead(self) -> dict[int, Columns]:
        """Answers whose turn had not come; a half-written last line is made again."""
        try:
            content = self._companion("ahead.jsonl").read_bytes()
        except FileNotFoundError:
            return {}
        places = {row.line: i for i, row in enumerate(self.rows)}
        ahead: dict[int, Columns] = {}
        for line in content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]:
            try:
                made = json.loads(line)
                i = places.get(made["line"], -1)
                if i >= self.done:
                    ahead[i] = ahead.get(i, {}) | {name: str(made[name]) for name in self.added if name in made}
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        return ahead

    def _finished(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """How many answers the file holds; a half-written last line is taken off."""
        if not self.target.exists():
            return 0
        nothing = dict.fromkeys(self.added)
        content = self.target.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                made = json.loads(line)
                same = {**made, **nothing} == {**rows[number - 1], **nothing}
                answered = all(name in made for name in self.added)
            except (ValueError, TypeError, IndexError):
                same = answered = False
            if not (same and answered):
                raise DataError(
                    f"--output: line {number} of {self.target} is not an answer to row {number} of the input, so it "
                    "was made from other rows; name another file"
                )
        if len(whole) < len(content):
            if not lines and not (rows and _begins_row(content, rows[0])):
                raise DataError(f"--output: {self.target} holds something else than answers; name another file")
            with self.target.open("r+b") as file:
                file.truncate(len(whole))
        return len(lines)


def _begins_row(content: bytes, row: Mapping[str, Any]) -> bool:
    """Whether a half-written only line began as this row: nobody else's file is cut."""
    begun = json.dumps(row, ensure_ascii=False).encode("utf-8")[:-1]
    return content[: len(begun)] == begun[: len(content)]


def _json(value: Any) -> str:
    return short(json.dumps(value, ensure_ascii=False), 200)
