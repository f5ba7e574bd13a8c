"""Keeps bitsandbytes from fetching compiled code from the Hub, which it does wherever the package `kernels` is there.

On a CPU with AVX-512 BF16 it asks when it is imported, on Apple's GPUs when a layer first computes; who only wants to
fine-tune has asked for neither. It has its own code for both. PEFT and transformers import bitsandbytes wherever it is
installed, so that no call of ours comes before it: the two modules that ask are loaded with `kernels` out of sight.
There is no setting for it (bitsandbytes 0.50, `backends/cpu/ops.py` and `backends/mps/ops.py`).
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_ASKING = {"bitsandbytes.backends.cpu.ops", "bitsandbytes.backends.mps.ops"}
_NONE_THERE = "Failed to load CPU gemm_4bit_forward from kernels-community"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        log = logging.getLogger(module.__name__)
        with _hidden("kernels"):
            log.addFilter(_says_something_else)
            try:
                super().exec_module(module)
            finally:
                log.removeFilter(_says_something_else)
            if hasattr(module, "_get_kernel"):
                module._get_kernel()  # on Apple's GPUs: asks now and finds none, and does not ask again


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ASKING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def switch_off() -> None:
    """From now on bitsandbytes asks no Hub; one that is loaded already has asked."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _says_something_else(record: logging.LogRecord) -> bool:
    """Whether it is not the advice to install `kernels`; anything else that goes wrong there is said."""
    return not str(record.msg).startswith(_NONE_THERE)


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A package cannot be imported inside, whether it is installed or loaded."""
    loaded = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # how Python marks what cannot be imported
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules[name]
        else:
            sys.modules[name] = loaded
