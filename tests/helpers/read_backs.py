"""Where a program waits for a GPU: counted by CUDA, or on a CPU by the calls that would wait."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = {
    "aten._local_scalar_dense.default",  # item, bool, float, int
    "aten.nonzero.default",
    "aten.equal.default",
    "aten.masked_select.default",
    "aten._unique2.default",
    "aten.unique_consecutive.default",
}
_BY_INDEX = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}
_METHODS = {"tolist", "numpy", "cpu", "__array__"}  # read memory past the dispatcher on a CPU


class ReadBacks:
    """While it is open, `found` is filled with what was asked and where: two frames outside of torch."""

    def __init__(self, on_cuda: bool = False) -> None:
        self.on_cuda = on_cuda
        self.found: list[tuple[str, str]] = []
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> ReadBacks:
        if self.on_cuda:
            self._modes.enter_context(_asked_of_cuda(self.found))
            return self
        self._modes.enter_context(_Operators(self.found))
        self._modes.enter_context(_Methods(self.found))
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Count no longer."""
        self._modes.close()


@contextlib.contextmanager
def _asked_of_cuda(found: list[tuple[str, str]]) -> Iterator[None]:
    """By a warning of CUDA's own at each call that waits."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: (
            found.append((str(message)[:60], _place())) if "synchroniz" in str(message) else None
        )
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return " < ".join(f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno} {f.name}" for f in reversed(frames[-2:]))


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[tuple[str, str]]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = name in _BY_INDEX and any(x is not None and not x.dtype.is_signed for x in args[1])
        if name in _OPERATORS or by_mask:
            self.found.append((name + " by a mask" * by_mask, _place()))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[tuple[str, str]]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS:
            self.found.append((f"Tensor.{name}", _place()))
        return func(*args, **(kwargs or {}))
