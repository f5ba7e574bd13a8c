"""Several documents in one row, and the proof that none of them sees another.

A pack of three documents, with the position ids that keep them apart and the labels (`.` = -100)::

    input_ids    a a a a a b b b c c c c <pad>
    position_ids 0 1 2 3 4 0 1 2 0 1 2 3 0      each document counts from 0, each pad is a document of its own
    labels       . . a a a . b b . . c c .      a first token has nothing before it that may predict it
    seq_lengths  5         3     4

Packing changes which documents share a row and nothing else: none is split, cut or lost, and the loss of a step is
still the mean over its supervised tokens. Attention between documents is cut by `position_ids` alone, which is up to
the model; `probe` asks the model at hand before the first step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.errors import ModelError
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedModel


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 0) -> list[list[int]]:
    """Assign documents to packs: longest first, each into the fullest pack that still has room for it.

    Best-fit decreasing over the whole set (Johnson, 1974), which uses at most 11/9 of the packs that would be needed.
    Documents of one length are taken in a seeded order, and the packs come out in a seeded order.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a pack; no document may be longer.

    >>> sorted(map(sorted, best_fit([6, 4, 5, 3, 2], capacity=10)))
    [[0, 1], [2, 3, 4]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a document of {lengths.max()} tokens does not fit a pack of {capacity}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> packs with just that much
    rooms = 0  # bit r is set while by_room[r] holds a pack
    for document in order.tolist():
        length = int(lengths[document])
        enough = rooms >> length
        if enough:
            room = length + ((enough & -enough).bit_length() - 1)  # the least room that is enough
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            packs[pack].append(document)
        else:
            room, pack = capacity, len(packs)
            packs.append([document])
        left = room - length
        by_room[left].append(pack)
        rooms |= 1 << left
    return [packs[i] for i in rng.permutation(len(packs))]


def pack(dataset: Dataset, capacity: int, seed: int = 0) -> Dataset:
    """Pack rows of `input_ids` and `labels` into rows of at most `capacity` tokens.

    Each new row also holds `seq_lengths`, the tokens of each of its documents in order. The label of a document's
    first token becomes -100, so that it is never predicted from its neighbour's last.
    """
    import pyarrow as pa
    from datasets import Dataset

    columns = {name: _lists(dataset, name) for name in ("input_ids", "labels")}
    lengths = columns["input_ids"].value_lengths().to_numpy()
    packs = best_fit(lengths, capacity, seed)
    order = np.fromiter((d for documents in packs for d in documents), dtype=np.int64, count=len(lengths))
    per_pack = np.fromiter(map(len, packs), dtype=np.int64, count=len(packs))
    documents = lengths[order]
    ends = np.cumsum(documents, dtype=np.int64)
    # the documents in the order of the packs, end to end
    ids, labels = (lists.take(pa.array(order)).flatten().to_numpy() for lists in columns.values())
    labels = labels.copy()
    labels[ends - documents] = IGNORE_INDEX
    row_ends = ends[np.cumsum(per_pack) - 1]

    def lists(values: np.ndarray, ends: np.ndarray) -> pa.ListArray:
        offsets = pa.array(np.concatenate(([0], ends)), type=pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values, type=pa.int32()))

    table = {
        "input_ids": lists(ids, row_ends),
        "labels": lists(labels, row_ends),
        "seq_lengths": lists(documents, np.cumsum(per_pack)),
    }
    # of itself the library would pickle and hash every token, for as long as packing takes
    made_of = f"{dataset._fingerprint} pack {capacity} {seed}".encode()
    return Dataset(pa.table(table), fingerprint=hashlib.blake2b(made_of, digest_size=8).hexdigest())


def flat(dataset: Dataset) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The rows of a data set as flat arrays: `input_ids` and `labels`, with the start and length of each row."""
    columns = {name: _lists(dataset, name) for name in ("input_ids", "labels")}
    lengths = columns["input_ids"].value_lengths().to_numpy().astype(np.int64)
    return {name: lists.flatten().to_numpy() for name, lists in columns.items()}, np.cumsum(lengths) - lengths, lengths


def _lists(dataset: Dataset, column: str) -> pa.ListArray:
    return dataset.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()


def position_ids(seq_lengths: Sequence[int], width: int) -> np.ndarray:
    """Positions of a pack's tokens, each document from 0, each pad 0: (width,) int64.

    >>> position_ids([3, 2], width=7).tolist()
    [0, 1, 2, 0, 1, 0, 0]
    """
    positions = np.zeros(width, dtype=np.int64)
    start = 0
    for length in seq_lengths:
        positions[start : start + length] = np.arange(length)
        start += length
    return positions


def probe(model: PreTrainedModel, device: Any) -> float:
    """Ask the model whether two documents in one pack give the logits that each gives alone.

    Returns the largest difference, as a share of the largest logit.

    Raises:
        ModelError: the documents see each other; training on packs would leak, silently.
    """
    import torch

    was_training = model.training
    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, vocabulary, (1, n), generator=generator) for n in (11, 11, 9))

    def logits(*documents: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
        ids = torch.cat(documents, dim=1)
        with torch.inference_mode():
            out = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
        return out.logits[0].float()

    try:
        packed = logits(first, second)
        alone = torch.cat([logits(first), logits(second)])
        neighbour = logits(other, second)[11:]
    except TypeError as error:
        raise ModelError(_leaks(model, f"it takes no position_ids ({error})")) from error
    finally:
        model.train(was_training)
    scale = alone.abs().max().clamp(min=1e-6)
    difference = float((packed - alone).abs().max() / scale)
    leak = float((packed[11:] - neighbour).abs().max() / scale)
    # Rounding alone differs by the dtype: the two computations sum in different orders.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    if difference > tolerance or leak > tolerance / 2:
        raise ModelError(
            _leaks(
                model,
                f"logits of a document differ by {difference:.2g} of the largest when it stands in a pack, and by "
                f"{leak:.2g} when only its neighbour changes; up to {tolerance:g} would be rounding",
            )
        )
    return difference


def _leaks(model: PreTrainedModel, what: str) -> str:
    return (
        f"data.packing: {type(model).__name__} ({model.config.model_type}, attention "
        f"{model.config._attn_implementation}) lets documents of a pack see each other: {what}.\n"
        "Set data.packing=false (batches of rows of like length waste little), or try another "
        "model.attn_implementation."
    )
