"""A ledger of memory: which tensors live at the same time while some code runs, though none of them has storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Notes each new storage when an operation makes it, and when the last tensor on it goes.

    Works on real tensors as on those of `FakeTensorMode`. A view adds nothing; two tensors on one storage count once.

    >>> with Ledger([]) as ledger:
    ...     x = torch.ones(10)
    ...     y = x + 1
    ...     del x
    >>> ledger.peak(), ledger.peak(without=[y])
    (80, 40)

    Args:
        known: tensors that are there before, and are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        # storages are compared by identity, and looked at no longer than they live
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._numbers[tensor.untyped_storage()] = -1
        self._entries: list[tuple[int, int]] = []  # (number of the storage, bytes: more than 0 made, less freed)
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._numbers:
            return
        number, size = self._next, storage.nbytes()
        self._next += 1
        self._numbers[storage] = number
        self._entries.append((number, size))
        weakref.finalize(storage, self._entries.append, (number, -size))

    def peak(self, without: Iterable[torch.Tensor] = ()) -> int:
        """The most bytes that lived at the same time, those of some tensors left out."""
        left_out = {self._numbers.get(tensor.untyped_storage()) for tensor in without}
        live = most = 0
        for number, size in self._entries:
            if number not in left_out:
                live += size
                most = max(most, live)
        return most
