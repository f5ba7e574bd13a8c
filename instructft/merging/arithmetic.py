"""The arithmetic of a merge: what an adapter does to one weight, piece by piece, in float64, rounded once.

::

    LoRA     W + s·B·A                     s = alpha / r, or alpha / √r with rsLoRA (Kalajdzievski, 2023: 2312.03732)
    experts  W[e] + s·B[e]·A[e]            `target_parameters`: all experts of a layer are one parameter of the model
    DoRA     m · (W + s·B·A) / ‖W + s·B·A‖   the norm over what feeds one output (Liu et al., 2024: 2402.09353)
    bias     b + s·b_B                     `lora_bias`
    tokens   W with some rows replaced     `trainable_token_indices`

The arithmetic is PEFT's `get_delta_weight` and `merge`. PEFT rounds the delta to its dtype and then the sum to the
weight's; here the sum alone is rounded (`instructft.weights.rounding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from instructft.errors import ModelError
from instructft.weights.rounding import NEAREST, Rounder
from instructft.weights.tensor_io import Stored, pieces

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint lies in a parameter of the model: it is all of it, or rows of one expert.

    ::

        experts.gate_up_proj (E, 2F, D)    [e, :F] is experts.e.gate_proj.weight, [e, F:] is experts.e.up_proj.weight
                                           or all of it is experts.gate_up_proj (E, D, 2F), each expert transposed
        gate_up_proj (2F, D)               [:F] is gate_proj.weight, [F:] is up_proj.weight
    """

    name: str  # of the tensor
    expert: int | None = None
    start: int = 0
    stop: int | None = None
    transposed: bool = False  # of a parameter (E, …, …) each expert

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its part of a parameter, as a view."""
        if not self.is_part:  # one number too
            return parameter
        if self.transposed:
            return parameter.transpose(1, 2)
        return (parameter if self.expert is None else parameter[self.expert])[self.start : self.stop]

    @property
    def is_part(self) -> bool:
        """Whether it is less than the parameter, or lies otherwise than that."""
        return self.expert is not None or self.stop is not None or self.transposed


@dataclass(frozen=True)
class Lora:
    """A low-rank change of a weight; the names are those of tensors in the adapter file."""

    a: str  # (r, in); of E experts (E·r, in), one after the other
    b: str  # (out, r); of E experts (out, r·E), each in every E-th column
    scaling: float
    transposed: bool  # the weight is stored (in, out): GPT-2's Conv1D, embeddings, gpt-oss's experts
    magnitude: str | None = None  # DoRA's, (out,)
    experts: int = 1  # E; with more than one the weight is (E, …, …)
    place: Place | None = None  # which part of such a weight it is, where that is stored in parts


@dataclass(frozen=True)
class Edit:
    """All that an adapter does to one parameter of the base."""

    lora: Lora | None = None
    bias: tuple[str, float] | None = None  # name of lora_B's bias, (out,), and the scaling
    tokens: tuple[str, tuple[int, ...]] | None = None  # name of new rows, (n, width), and where each goes
    replaced: str | None = None  # the adapter's own copy of the whole parameter
    rows: int | None = None  # the vocabulary grew to this many; rows that are new start as the mean of the old

    @property
    def names(self) -> list[str]:
        """The adapter's tensors that it takes."""
        lora = [self.lora.a, self.lora.b, self.lora.magnitude] if self.lora else []
        rest = [self.bias and self.bias[0], self.tokens and self.tokens[0], self.replaced]
        return [name for name in [*lora, *rest] if name]

    def at(self, place: Place) -> Edit:
        """What it does to a part of the parameter."""
        if self.lora is None or not place.is_part:
            return self
        if place.transposed:
            return replace(self, lora=replace(self.lora, transposed=not self.lora.transposed))
        return replace(self, lora=replace(self.lora, place=place))


def merged(
    base: Stored, edit: Edit, adapter: Mapping[str, Stored], dtype: torch.dtype, rounding: str = NEAREST
) -> Iterator[torch.Tensor]:
    """The rows of a parameter after the merge, in order, piece by piece, as `dtype`.

    Args:
        rounding: of a parameter that the adapter changes; one that only changes its dtype goes to the nearest value.

    Raises:
        ModelError: a merged value is not finite, or too large for `dtype`.
    """
    return (stored for _, stored in rounded(base, edit, adapter, dtype, rounding))


def rounded(
    base: Stored, edit: Edit, adapter: Mapping[str, Stored], dtype: torch.dtype, rounding: str = NEAREST
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As `merged`, each piece before and after it is rounded."""
    import torch

    round_ = Rounder(base.name, dtype, rounding if edit.names else NEAREST)
    for piece in unrounded(base, edit, adapter):
        if piece.dtype == dtype:  # as it stands: NaN or not is the base's matter
            yield piece, piece
            continue
        stored = round_(piece)
        if stored.numel() and not torch.isfinite(torch.stack(stored.aminmax())).all():  # the extremes of NaN are NaN
            raise ModelError(
                f"{base.name}: a merged value is infinite or not a number in {str(dtype).removeprefix('torch.')}; "
                "train again, or merge with --dtype float32"
            )
        yield piece, stored


def unrounded(base: Stored, edit: Edit, adapter: Mapping[str, Stored]) -> Iterator[torch.Tensor]:
    """The rows of a parameter after the merge in float64; in its own dtype where the adapter leaves it as it is."""
    source = adapter[edit.replaced] if edit.replaced else base
    if not edit.names and edit.rows is None:
        for start, stop in pieces(source.rows, source.width):
            yield source.read(start, stop)
        return
    weight = _Weight(source, edit, adapter)
    for start, stop in pieces(weight.rows, source.width):
        yield weight.read(start, stop).reshape(stop - start, *source.shape[1:])


class _Weight:
    """A merged weight that is computed as it is read."""

    def __init__(self, source: Stored, edit: Edit, adapter: Mapping[str, Stored]):
        import torch

        self.source, self.edit = source, edit
        self.dtype = torch.float64
        self.rows = edit.rows or source.rows

        def load(name: str) -> torch.Tensor:
            return adapter[name].read().to(self.dtype)

        lora = edit.lora
        self.fill = self._mean() if self.rows > source.rows else None  # (width,)
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        if lora:
            self.a, self.b = self._factors(lora, adapter)
        self.bias = load(edit.bias[0]) * edit.bias[1] if edit.bias else None
        self.tokens = load(edit.tokens[0]) if edit.tokens else None
        self.factor = load(lora.magnitude).reshape(-1) if lora and lora.magnitude else None
        if lora and lora.transposed and self.factor is not None:
            self.factor = self.factor / self._column_norms()

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, (stop - start, width)."""
        import torch

        rows = self._adapted(start, stop)
        lora = self.edit.lora
        if lora and self.factor is not None:
            if lora.transposed:
                rows *= self.factor
            else:
                rows *= (self.factor[start:stop] / torch.linalg.vector_norm(rows, dim=1)).unsqueeze(1)
        if self.bias is not None:
            rows += self.bias[start:stop].unsqueeze(1)
        if self.edit.tokens and self.tokens is not None:
            for place, index in enumerate(self.edit.tokens[1]):
                if start <= index < stop:
                    rows[index - start] = self.tokens[place]
        return rows

    def _adapted(self, start: int, stop: int) -> torch.Tensor:
        """W + s·B·A, without DoRA's norm."""
        import torch

        known = min(max(start, self.source.rows), stop)  # rows from here on are new
        rows = self.source.read(start, known).reshape(known - start, self.source.width).to(self.dtype)
        if self.fill is not None and known < stop:
            rows = torch.cat([rows, self.fill.expand(stop - known, -1)])
        if self.edit.lora and self.a is not None and self.b is not None:
            if self.a.dim() == 3:
                self._add_to_experts(rows, start)
            elif self.edit.lora.transposed:
                rows.addmm_(self.a[:, start:stop].T, self.b.T, alpha=self.edit.lora.scaling)
            else:
                rows.addmm_(self.b[start:stop], self.a, alpha=self.edit.lora.scaling)
        return rows

    def _factors(self, lora: Lora, adapter: Mapping[str, Stored]) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B: (r, in) and (out, r); of a weight that holds all experts (E, r, in) and (E, out, r)."""
        a, b, count, place = adapter[lora.a], adapter[lora.b], lora.experts, lora.place
        if count == 1 and place is not None:  # rows of a layer that the checkpoint has as two
            return a.read().to(self.dtype), b.read(place.start, place.stop).to(self.dtype)
        if count == 1:
            return a.read().to(self.dtype), b.read().to(self.dtype)
        if place is None or place.expert is None:
            apart = b.read().reshape(b.rows, -1, count).permute(2, 0, 1)
            return a.read().reshape(count, -1, a.width).to(self.dtype), apart.to(self.dtype)
        rank, expert = a.rows // count, place.expert
        one = a.read(expert * rank, (expert + 1) * rank)
        if lora.transposed:
            return one[:, place.start : place.stop].to(self.dtype), b.read()[:, expert::count].to(self.dtype)
        return one.to(self.dtype), b.read(place.start, place.stop)[:, expert::count].to(self.dtype)

    def _add_to_experts(self, rows: torch.Tensor, start: int) -> None:
        """Add s·B·A to experts that are rows of `rows`, the first of them expert `start`."""
        lora = self.edit.lora
        if lora is None or self.a is None or self.b is None:
            return
        for at, row in enumerate(rows, start):
            change = self.b[at] @ self.a[at]
            row.add_((change.T if lora.transposed else change).reshape(-1), alpha=lora.scaling)

    def _column_norms(self) -> torch.Tensor:
        """The norm of each column of W + s·B·A: of what feeds one output where the weight is stored (in, out)."""
        import torch

        squares = torch.zeros(self.source.width, dtype=torch.float64)
        for start, stop in pieces(self.rows, self.source.width):
            squares += self._adapted(start, stop).double().square_().sum(dim=0)
        return squares.sqrt_().to(self.dtype)

    def _mean(self) -> torch.Tensor:
        """The mean row, as new tokens start in training."""
        import torch

        total = torch.zeros(self.source.width, dtype=torch.float64)
        for start, stop in pieces(self.source.rows, self.source.width):
            total += self.source.read(start, stop).reshape(stop - start, -1).double().sum(dim=0)
        return (total / self.source.rows).to(self.dtype)
