"""`rows.parquet`: what became of each training row; and `instructft rows`, which tells the rows that stand out.

One line for each row of the data that was trained on: its id, where it stands, its tokens, its loss at first and at
last sight, and hashes of its prompt and its answer, by which rows are found that ask the same and answer otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.errors import DataError, UsageError
from instructft.formatting import first_line, short
from instructft.redaction import without_places

if TYPE_CHECKING:
    from instructft.data.batches.row_history import Origins, Seen
    from instructft.data.load import Part
    from instructft.data.prepare import Prepared

ROWS = "rows.parquet"
KINDS = {  # in the order in which they are shown; words that follow a number of rows
    "never_learned": "never learned: seen more than once, and the loss has not fallen by a tenth; above the median now",
    "contradicting": "contradicting: the same prompt with another answer elsewhere",
    "at_once": "learned at once: a loss below a tenth of the median when first seen",
    "hardest": "with the highest loss at last sight",
    "longest": "with the most tokens",
}
_FALLEN, _KNOWN = 0.9, 0.1  # shares of the first loss, and of the median one
_TEXT = 160  # characters of a row that are shown


# --------------------------------------------------------------------------------------------------------------------
# Written
# --------------------------------------------------------------------------------------------------------------------


def write_rows(run: Path, data: Prepared, seen: Seen, since: int = 0) -> None:
    """Write `rows.parquet` from what all processes have seen, `since` a step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    origins = data.origins
    assert origins is not None
    supervised, prompts, answers = _of_documents(data, origins)
    keys, of = np.unique(np.stack([origins.part, origins.row]), axis=1, return_inverse=True)
    of = of.reshape(-1)
    tokens = np.zeros(len(origins.part), dtype=np.int64)
    tokens[origins.documents] = origins.lengths
    first_document = np.full(keys.shape[1], len(of))
    np.minimum.at(first_document, of, np.arange(len(of)))

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(of, weights=values, minlength=keys.shape[1])

    was_seen = seen.first_step >= 0
    weight = np.where(was_seen, supervised, 0)
    weights = total(weight)
    with np.errstate(invalid="ignore"):
        first, last = (total(np.where(was_seen, values, 0) * weight) / weights for values in (seen.first, seen.last))
    first_step, last_step = np.full(keys.shape[1], np.iinfo(np.int32).max), np.full(keys.shape[1], -1)
    np.minimum.at(first_step, of[was_seen], seen.first_step[was_seen])
    np.maximum.at(last_step, of, seen.last_step)
    never = last_step < 0
    known = [_known(part, keys[1][keys[0] == i]) for i, part in enumerate(data.parts)]
    ids, sources, files, places = ([one for found in known for one in found[k]] for k in range(4))
    columns = {
        "id": pa.array(ids, pa.string()),
        "source": pa.array(sources, pa.string()).dictionary_encode(),
        "file": pa.array(files, pa.string()).dictionary_encode(),
        "row": pa.array(places, pa.int64()),
        "tokens": pa.array(total(tokens).astype(np.int64)),
        "supervised_tokens": pa.array(total(supervised).astype(np.int64)),
        "loss_first": pa.array(first, pa.float32(), mask=never),
        "loss_last": pa.array(last, pa.float32(), mask=never),
        "step_first": pa.array(first_step, pa.int32(), mask=never),
        "step_last": pa.array(last_step, pa.int32(), mask=never),
        "prompt": pa.array(prompts[first_document]),
        "answer": pa.array(answers[first_document]),
        "dataset": pa.array(keys[0], pa.int32()),
        "number": pa.array(keys[1], pa.int64()),
    }
    partial = run / f"{ROWS}.partial"
    pq.write_table(pa.table(columns, metadata={"since": str(since)}), partial, compression="zstd")
    partial.replace(run / ROWS)


def _known(part: Part, numbers: np.ndarray) -> tuple[list[str], list[str], list[str | None], list[int]]:
    """Id, source, file and place of these rows of a data set; no folder of this machine."""
    source = without_places({"path": part.label})["path"]
    found = [part.found(number) for number in numbers.tolist()]
    return part.ids(numbers), [source] * len(found), [name for name, _ in found], [place for _, place in found]


def _of_documents(data: Prepared, origins: Origins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each document its supervised tokens, and hashes of its first answer and of the prompt before it.

    0 stands for no prompt: a document that has none asks nothing.
    """
    from instructft.data.arrow.token_rows import tokens_of

    many = len(origins.part)
    supervised = np.zeros(many, dtype=np.int64)
    prompts, answers = np.zeros((2, many), dtype=np.uint64)
    rows, entry = tokens_of(data.splits["train"]), 0
    done = np.zeros(many, dtype=bool)
    for block in rows.blocks():
        columns, _, sizes = block.flat()
        at, end = 0, int(sizes.sum())
        while at < end:
            document, length = int(origins.documents[entry]), int(origins.lengths[entry])
            if not done[document]:
                done[document] = True
                carries = columns["labels"][at : at + length] >= 0
                carries[0] = False  # nothing before it could predict it
                supervised[document] = carries.sum()
                start = int(carries.argmax())
                stop = start + int(np.append(~carries[start:], True).argmax())
                ids = columns["input_ids"][at : at + length]
                answers[document] = _hash(ids[start:stop])
                prompts[document] = _hash(ids[:start]) if start > 1 else 0
            at, entry = at + length, entry + 1
    return supervised, prompts, answers


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=8).digest(), "little") or 1


# --------------------------------------------------------------------------------------------------------------------
# Read
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """`rows.parquet` as arrays; losses are NaN, and steps -1, of rows that training did not come to."""

    columns: dict[str, np.ndarray]
    since: int

    def __len__(self) -> int:
        return len(self.columns["id"])

    @property
    def twice(self) -> np.ndarray:
        """Which rows were seen at more than one step: (rows,) bool."""
        wide: np.ndarray = self.columns["step_last"] > self.columns["step_first"]
        return wide

    def kinds(self) -> dict[str, np.ndarray]:
        """Of each of `KINDS` its rows, what matters most first."""
        first, last, tokens = (self.columns[name] for name in ("loss_first", "loss_last", "tokens"))
        seen = np.flatnonzero(np.isfinite(last))
        never = at_once = np.zeros(0, dtype=np.int64)
        if len(seen):
            high = last > np.median(last[seen])
            with np.errstate(invalid="ignore"):
                never = np.flatnonzero(self.twice & (last >= _FALLEN * first) & high)
                at_once = np.flatnonzero(first < _KNOWN * np.median(first[seen]))
        worst = np.nan_to_num(last, nan=-1.0)
        return {
            "never_learned": never[np.argsort(-worst[never], kind="stable")],
            "contradicting": self._contradicting(worst),
            "at_once": at_once[np.argsort(first[at_once], kind="stable")],
            "hardest": seen[np.argsort(-last[seen], kind="stable")],
            "longest": np.argsort(-tokens, kind="stable"),
        }

    def _contradicting(self, worst: np.ndarray) -> np.ndarray:
        """Rows that ask what others ask and answer otherwise: prompt by prompt, first where all their losses are high.

        A prompt with several answers cannot be learned better than by how often each of them comes.
        """
        prompts, answers = self.columns["prompt"], self.columns["answer"]
        order = np.argsort(prompts, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1) if len(order) else []
        found = [rows for rows in groups if prompts[rows[0]] and len(rows) > 1 and len(np.unique(answers[rows])) > 1]
        found.sort(key=lambda rows: (-float(worst[rows].min()), int(rows.min())))
        return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def read_rows(run: Path) -> Rows:
    """The `rows.parquet` of a run folder.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run / ROWS
    if not path.is_file():
        why = (
            "the run has not ended, was made by an older version, streams its rows, or says train.row_history: false"
            if run.is_dir()
            else "there is no such folder"
        )
        raise UsageError(f"{run} holds no {ROWS}: {why}; expected the folder of a run that has ended")
    try:
        table = pq.read_table(path)
        steps = ("step_first", "step_last")
        found = {
            name: np.asarray(column.combine_chunks().fill_null(-1 if name in steps else float("nan")))
            if name in (*steps, "loss_first", "loss_last")
            else np.asarray(column.to_pylist() if name in ("id", "source", "file") else column)
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        return Rows(found, int((table.schema.metadata or {}).get(b"since", b"0")))
    except (OSError, pa.ArrowInvalid, ValueError) as error:
        say = f"{path} is damaged ({first_line(error)}); the same run, trained once more, writes it anew"
        raise UsageError(say) from error


def tell_rows(run: Path, most: int, as_json: bool, exclude: Path | None, kinds: Sequence[str]) -> None:
    """Print the rows of a run that stand out, with what they say; write the ids of some kinds to a file.

    Args:
        most: rows of each kind that are shown.
        exclude: a file that is not there yet; None: no ids are written.
        kinds: whose ids.

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
        ids = _write_ids(exclude, rows, {kind: found[kind] for kind in kinds}, text)
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
        ranked = kind in ("hardest", "longest")
        count = "" if ranked else f"{found['rows']:,} "
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
            said = "   ".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in part.conversation(raw))
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
