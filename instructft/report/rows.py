"""`instructft rows`: how each training row was learned (never, at once, against others); a list to leave some out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructft.errors import DataError, UsageError
from instructft.formatting import short
from instructft.report.row_file import Rows, read_rows

KINDS = {  # in the order in which they are shown; words that follow a number of rows
    "never_learned": "never learned: seen more than once, and the loss has not fallen by a tenth; above the median now",
    "contradicting": "contradicting: the same prompt with another answer elsewhere",
    "at_once": "learned at once: a loss below a tenth of the median when first seen",
    "hardest": "with the highest loss at last sight",
    "longest": "with the most tokens",
}
RANKED = ("hardest", "longest")  # of all rows, in that order: those at the top are meant
_TEXT = 160  # characters of a row that are shown


def tell_rows(run: Path, most: int, as_json: bool, exclude: Path | None, kinds: Sequence[str]) -> None:
    """Print the rows of a run that stand out, with what they say; write the ids of some kinds to a file.

    Args:
        most: rows of each kind that are shown.
        exclude: a file that is not there yet; None: no ids are written.
        kinds: whose ids; of `RANKED` ones, those of the rows that are shown.

    Raises:
        UsageError: the run keeps no `rows.parquet`, a kind that there is not, or a file that is there already.
    """
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"--kinds: {wrong[0]!r} is unknown; expected {', '.join(KINDS)}, with commas between")
    if exclude is not None and (exclude.exists() or not exclude.absolute().parent.is_dir()):
        what = "is there already" if exclude.exists() else "lies in no folder that exists"
        raise UsageError(f"--exclude: {exclude} {what}; name a new file, which data.exclude can take")
    rows = read_rows(run)
    found, text = rows.kinds(), _texts(run, rows)
    facts = {
        kind: {"rows": len(numbers), "examples": [_facts(rows, int(n), text) for n in numbers[:most]]}
        for kind, numbers in found.items()
    }
    for kind in ("never_learned", "contradicting", "at_once"):
        facts[kind]["ids"] = list(dict.fromkeys(rows.columns["id"][found[kind]].tolist()))
    if as_json:
        seen = int(np.isfinite(rows.columns["loss_last"]).sum())
        about = {"rows": len(rows), "seen": seen, "seen_again": int(rows.twice.sum()), "since_step": rows.since}
        print(json.dumps({**about, **facts}, indent=2))
    else:
        print("\n".join(_lines(run, rows, facts)))
    if exclude is not None:
        chosen = {kind: found[kind][:most] if kind in RANKED else found[kind] for kind in kinds}
        ids = _write_ids(exclude, rows, chosen, text)
        if not as_json:
            wrote = f"Wrote {exclude}: {ids:,} ids. A recipe leaves these rows out with data.exclude: {exclude}"
            none = f"No row is of these kinds ({', '.join(kinds)}), so {exclude} is not written"
            print(f"\n{wrote if ids else none}")


def _facts(rows: Rows, number: int, text: Callable[[int], str]) -> dict[str, Any]:
    """What is known of a row, as JSON takes it."""
    found = {name: rows.columns[name][number] for name in rows.columns if name not in ("prompt", "answer", "number")}
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in found.items()}
    plain = {k: None if (isinstance(v, float) and v != v) or (k.startswith("step") and v < 0) else v
             for k, v in plain.items()}  # fmt: skip
    return plain | {"text": text(number)}


def _lines(run: Path, rows: Rows, facts: dict[str, Any]) -> Iterator[str]:
    last, first = rows.columns["loss_last"], rows.columns["loss_first"]
    seen, again = np.isfinite(last), int(rows.twice.sum())
    yield f"{run}: {len(rows):,} training rows, {int(seen.sum()):,} seen, {again:,} more than once"
    if seen.any():
        medians = [float(np.median(values[seen])) for values in (first, last)]
        yield f"loss of a row, median: {medians[0]:.3f} at first sight, {medians[1]:.3f} at the last"
    if rows.since:
        yield f"losses before step {rows.since:,} were not kept: the checkpoint that the run resumed from holds none"
    if not again:
        yield "no row was seen twice, so which were never learned cannot be told; train.num_train_epochs: 2 tells"
    for kind, found in facts.items():
        count = "rows " if kind in RANKED else f"{found['rows']:,} "
        yield f"\n{count}{KINDS[kind]}"
        for one in found["examples"]:
            losses = "not seen" if one["loss_last"] is None else f"{one['loss_first']:.3f} → {one['loss_last']:.3f}"
            yield f"  {one['id']}  {losses:>15}  {one['tokens']:>6,} tokens  {_place(one)}"
            if one["text"]:
                yield f"      {one['text']}"


def _place(one: dict[str, Any]) -> str:
    """Where a row stands: its source, its file where there are several, its row from 1."""
    return f"{' '.join(filter(None, (one['source'], one['file'])))} row {one['row']:,}"


def _texts(run: Path, rows: Rows) -> Callable[[int], str]:
    """What a row says, safe to print; "" where the data is not there any more, or says something else by now."""
    from instructft.data.load import load_parts
    from instructft.data.readers import ROW
    from instructft.prompt.ledger import Unread, Unusable
    from instructft.prompt.token_view import visible
    from instructft.recipe.load import load_run_recipe

    try:
        parts = load_parts(load_run_recipe(run))
    except (DataError, UsageError):
        return lambda number: ""

    def text(number: int) -> str:
        part, place = parts[int(rows.columns["dataset"][number])], int(rows.columns["number"][number])
        if place >= len(part.raw) or part.ids(np.array([place])) != [rows.columns["id"][number]]:
            return ""
        raw = part.raw[place]
        try:
            said = " · ".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in part.conversation(raw))
        except (Unread, Unusable):
            said = raw[ROW]
        return short(visible(said).replace("\n", " "), _TEXT)

    return text


def _write_ids(file: Path, rows: Rows, chosen: dict[str, np.ndarray], text: Callable[[int], str]) -> int:
    """Write the ids of some rows, each once, with what a person wants to know of it; how many there are."""
    lines: dict[str, str] = {}
    for kind, numbers in chosen.items():
        for number in numbers.tolist():
            one = _facts(rows, number, text)
            lines.setdefault(one["id"], f"{one['id']}  {kind}  {_place(one)}  {one['text']}")
    if not lines:
        return 0
    about = "# rows that are not trained on (data.exclude): an id begins a line, the rest is for people\n"
    try:
        file.write_text(about + "".join(f"{line}\n" for line in lines.values()), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--exclude: {file} cannot be written ({error.strerror})") from error
    return len(lines)
