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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from instructft.data.arrow.store import cached, mapped, write
from instructft.data.arrow.token_rows import COLUMNS, PARTS, cuts, tokens_of
from instructft.errors import ModelError
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel


_GATHERED = 1 << 22  # tokens of packs that are gathered together; so few are not worth a file


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


def arrange(lengths: np.ndarray, capacity: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`best_fit` as two arrays: the documents in the order of their packs, and how many each pack holds.

    >>> [values.tolist() for values in arrange(np.array([6, 4, 5]), capacity=10)]
    [[2, 0, 1], [1, 2]]
    """
    packs = best_fit(lengths, capacity, seed)
    order = np.fromiter((d for documents in packs for d in documents), dtype=np.int64, count=len(lengths))
    return order, np.fromiter(map(len, packs), dtype=np.int64, count=len(packs))


def pack(
    dataset: Dataset, capacity: int, seed: int = 0, arranged: tuple[np.ndarray, np.ndarray] | None = None
) -> Dataset:
    """Pack rows of `input_ids` and `labels` into rows of at most `capacity` tokens.

    Each new row also holds `seq_lengths`, the tokens of each of its documents in order. The label of a document's
    first token becomes -100, so that it is never predicted from its neighbour's last. Rows of folded turns have
    `seq_lengths` and `seq_starts` of their own (`instructft.data.batches.branches`), and so have their packs.

    Args:
        arranged: `arrange` of the rows with this capacity and seed, where it is known.
    """
    import pyarrow as pa
    from datasets import Dataset

    rows = tokens_of(dataset)
    parts = rows if PARTS[1] in dataset.column_names else None
    order, per_pack = arranged or arrange(rows.lengths, capacity, seed)
    rows, lasts = rows.some(order), np.cumsum(per_pack)
    parts = parts.some(order) if parts else None
    schema = pa.schema({name: pa.list_(pa.int32()) for name in (*COLUMNS, *(PARTS if parts else PARTS[:1]))})

    def lists(values: np.ndarray, sizes: np.ndarray) -> pa.ListArray:
        offsets = pa.array(np.concatenate(([0], np.cumsum(sizes))), type=pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values, type=pa.int32()))

    def batches() -> Iterator[pa.RecordBatch]:
        """The packs in order, some at a time: their documents are gathered from wherever they lie."""
        for first, last in cuts(np.add.reduceat(rows.lengths, lasts - per_pack), _GATHERED):
            some = slice(int(lasts[first] - per_pack[first]), int(lasts[last - 1]))
            columns, starts, documents = rows.some(some).flat()
            columns["labels"][starts[documents > 0]] = IGNORE_INDEX
            inside = per_pack[first:last]
            sizes = np.add.reduceat(documents, np.cumsum(inside) - inside)
            made = [lists(columns["input_ids"], sizes), lists(columns["labels"], sizes)]
            if parts:
                branches, _, each = parts.some(some).flat(PARTS)
                inside = np.add.reduceat(each, np.cumsum(inside) - inside)
                made += [lists(branches[name], inside) for name in PARTS]
            else:
                made.append(lists(documents, inside))
            yield pa.record_batch(made, schema=schema)

    # of itself the library would pickle and hash every token, for as long as packing takes
    made_of = f"{dataset._fingerprint} pack 3 {capacity} {seed}".encode()
    fingerprint = blake2b(made_of, digest_size=8).hexdigest()
    if rows.lengths.sum() <= _GATHERED:
        return Dataset(pa.Table.from_batches(batches(), schema), fingerprint=fingerprint)
    return mapped(cached(fingerprint, lambda path: write(path, schema, batches())), fingerprint)


def position_ids(
    seq_lengths: Sequence[int] | np.ndarray, width: int, starts: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Positions of a pack's tokens, each document from 0, each pad 0: (width,) int64.

    Args:
        starts: the first position of each branch, where turns are folded.

    >>> position_ids([3, 2], width=7).tolist()
    [0, 1, 2, 0, 1, 0, 0]
    """
    lengths = np.asarray(seq_lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    positions = np.zeros(width, dtype=np.int64)
    first = ends - lengths if starts is None else ends - lengths - np.asarray(starts, dtype=np.int64)
    positions[: ends[-1]] = np.arange(ends[-1]) - np.repeat(first, lengths)
    return positions


def document_numbers(seq_lengths: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """Which document each slot of a pack belongs to, as state-space kernels take it (`seq_idx`): (width,) int32.

    >>> document_numbers([3, 2], width=7).tolist()
    [0, 0, 0, 1, 1, 2, 3]
    """
    lengths = np.asarray(seq_lengths, dtype=np.int64)
    each = np.concatenate([lengths, np.ones(width - lengths.sum(), dtype=np.int64)])  # a pad is a document of its own
    return np.repeat(np.arange(len(each), dtype=np.int32), each)


def padded_slots(lengths: np.ndarray, rows: int, seed: int | None = None) -> int:
    """Slots of all batches of `rows` rows that are padded to their longest.

    Args:
        seed: of a random order; None: rows of like length share a batch.

    >>> padded_slots(np.array([1, 5, 1, 5]), rows=2)
    12
    """
    order = np.sort(lengths) if seed is None else np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(order), rows)
    sizes = np.diff(np.append(starts, len(order)))
    return int((np.maximum.reduceat(order, starts) * sizes).sum())


def flat_borders(lengths: Sequence[int], width: int, device: Any = None) -> dict[str, Any]:
    """Where documents end to end begin and end, as attention by borders takes it: the same for queries and keys.

    Args:
        width: tokens of the longest document at most.

    >>> flat_borders([3, 2], width=5)["cu_seq_lens_q"].tolist()
    [0, 3, 5]
    """
    import torch

    borders = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": width, "max_length_k": width}


def probe(
    model: PreTrainedModel,
    device: Any,
    width: int = 64,
    borders: bool = False,
    numbered: bool = False,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Ask the model whether two documents in one pack give the logits that each gives alone.

    A document that sees nothing of its neighbour has logits whose gradient at the neighbour's tokens is zero: exactly,
    in every dtype, since what is multiplied by an attention of 0 is 0. Rounding does not enter, as it does where
    logits are compared, and a leak of a model in bfloat16 cannot hide behind it.

    Args:
        width: tokens of the pack, padding included, as training will have them: windows and chunks begin to matter
            where a row is longer than they are.
        borders: hand the borders of documents to the model, whose attention tells them apart by these.
        numbered: hand the number of its document to the model with each token (`seq_idx`).
        alone: within it the model takes documents alone, without borders.

    Returns the largest difference between alone and packed, as a share of the largest logit.

    Raises:
        ModelError: the documents see each other; training on packs would leak, silently.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    pads = 2
    lengths = (-(-(width - pads) // 2), (width - pads) // 2)
    ids = torch.randint(0, model.get_input_embeddings().weight.shape[0], (width,), generator=generator)
    first, second, _ = ids.split([*lengths, pads])
    inputs = {"position_ids": torch.from_numpy(position_ids(lengths, width))[None]}
    inputs |= flat_borders([*lengths, *[1] * pads], width, device) if borders else {}
    if numbered:
        inputs["seq_idx"] = torch.from_numpy(document_numbers(lengths, width))[None]
    slots = [torch.arange(lengths[0]), torch.arange(lengths[0], sum(lengths))]
    return look(model, device, ids, inputs, [first, second], slots, _leaks, alone)


def look(
    model: PreTrainedModel,
    device: Any,
    ids: torch.Tensor,
    inputs: dict[str, Any],
    rows: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
    refusal: Callable[[PreTrainedModel, str], str],
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Ask the model whether rows that share one give the logits that each gives alone, and depend on nothing else.

    Args:
        ids: (T,), of the row that they share.
        inputs: what keeps them apart in it.
        rows: the ids of each alone, (n,).
        slots: where the tokens of each stand in the shared row, (n,).
        refusal: words for what was found.

    Returns and raises what `probe` does.
    """
    import torch

    was_training = model.training
    model.eval()
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    states: list[torch.Tensor] = []

    def watch(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        states.append(out.detach().requires_grad_())
        return states[-1].clone()  # some models go on with it in place

    def on_device(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: on_device(one) for name, one in value.items()}
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def logits(tokens: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        return model(input_ids=tokens[None].to(device), **on_device(more), use_cache=False).logits[0]

    try:
        with torch.inference_mode(), alone():
            positions = [torch.arange(len(one))[None] for one in rows]
            single = [logits(one, {"position_ids": p}).float() for one, p in zip(rows, positions, strict=True)]
        torch.clear_autocast_cache()  # of weights lowered in inference mode, through which no gradient goes
        hook = embedding.register_forward_hook(watch)
        try:
            found = logits(ids, inputs)
        finally:
            hook.remove()
        shared = [found[where.to(found.device)] for where in slots]
        # a loss of many unlike weights, so that nothing cancels
        sums = [(part.float() * torch.randn(part.shape, generator=generator).to(part.device)).sum()
                for part in shared]  # fmt: skip
        for scale in (
            2**13,
            2**10,
            2**7,
            16,
            1,
            2**-4,
        ):  # as large as it stays finite, so that nothing vanishes in float16
            grads = [torch.autograd.grad(one * scale, states, retain_graph=True) for one in sums]
            if all(bool(torch.isfinite(part).all()) for grad in grads for part in grad):
                break
    except TypeError as error:
        raise ModelError(refusal(model, f"it takes no position_ids ({error})")) from error
    finally:
        model.train(was_training)
    leak = 0.0
    for where, grad in zip(slots, grads, strict=True):
        own = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, where, True)
        for part in (part[0].abs().float().amax(-1).cpu() for part in grad if part.dim() == 3):
            seen = float(part[~own].max())  # not a number is no zero either
            share = seen / max(float(part[own].max().nan_to_num(1.0)), 1e-30)
            leak = max(leak, share if share > 0 else float(seen != 0))
    there = torch.cat([part.detach().float() for part in shared])
    whole = torch.cat(single)
    difference = float((there - whole).abs().max() / whole.abs().max().clamp(min=1e-6))
    # a model may keep documents apart and still count their positions in its own way; rounding differs by the dtype
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(there.device.type)
    tolerance = 1e-4 if exact else 5e-2
    if leak > 0 or not difference <= tolerance:
        raise ModelError(
            refusal(
                model,
                f"logits of a document differ by {difference:.2g} of the largest when it stands in a pack (up to "
                f"{tolerance:g} would be rounding), and their gradient at its neighbour's tokens is {leak:.2g} of that "
                "at its own (0 where it sees none)",
            )
        )
    return difference


def _leaks(model: PreTrainedModel, what: str) -> str:
    return (
        f"data.packing: {type(model).__name__} ({model.config.model_type}, attention "
        f"{model.config._attn_implementation}) lets documents of a pack see each other: {what}.\n"
        "Set data.packing=false (batches of rows of like length waste little; auto takes them by itself), or try "
        "another model.attn_implementation."
    )
