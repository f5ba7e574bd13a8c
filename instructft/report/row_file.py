"""`rows.parquet`: what became of each training row, written when a run ends, and which rows stand out in it.

One line for each row of the data that was trained on: its id, where it stands, its tokens, its loss at first and at
last sight, and hashes of its prompt and its answer, by which rows are found that ask the same and answer otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instructft.errors import UsageError
from instructft.formatting import first_line
from instructft.redaction import without_places

if TYPE_CHECKING:
    from instructft.data.batches.row_history import Origins, Seen
    from instructft.data.load import Part
    from instructft.data.prepare import Prepared

ROWS = "rows.parquet"
_FALLEN, _KNOWN = 0.9, 0.1  # shares of the first loss, and of the median one


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
        """Of each kind its rows, what matters most first."""
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
