"""Checkpoints written beside training: what fills them is copied to host memory in a pause, a thread writes the files.

::

    training    ──■ copy ■── step ── step ── step ──■ waits for the thread, copy ■──
                         │                          │
    the thread           └─ files ─ sums ─ fsync ─ manifest ─ retention ─┘

What is copied is what upstream hands to its writers: weights and the optimizer's state. All that is small, and all that
reads what training changes, is written in the pause as ever. So the files are those of a checkpoint that training waits
for, byte for byte, and until the manifest is there the folder counts as one whose writing was cut short.

`torch.distributed.checkpoint.async_save` stages its state the same way, and its stager copies here. It writes another
format, which no `from_pretrained` reads, and answers to the processes of a group (torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from instructft.formatting import memory_size

Writes = list[Callable[[], Any]]  # each writes one file
SPARE = 1.25  # times the copy that must be free: the machine reads, and the disk's cache fills, beside it
_LOOK = 0.2  # seconds
_AS_IT_IS = (type(None), bool, int, float, complex, str, bytes)
_PLACE = "instructft_place"  # on a copied storage: where the original lies, as torch writes it into the file


# --------------------------------------------------------------------------------------------------------------------
# Whether
# --------------------------------------------------------------------------------------------------------------------


def decide(asked: bool | str, cuda: bool, alone: bool, copy: int) -> tuple[bool, str]:
    """Whether checkpoints are written beside training, and why (or why not).

    Args:
        asked: `train.save_in_background`.
        cuda: the model trains on a GPU of this kind.
        alone: one process, which holds all that is saved.
        copy: about the bytes of host memory that it takes.

    Example::

        decide("auto", cuda=True, alone=True, copy=3 << 29)
        # (True, 'each stops it for a copy of about 1.5 GiB in host memory')
    """
    if not asked:
        return False, "train.save_in_background is false"
    if not alone:
        return False, "several processes, FSDP or DeepSpeed write a checkpoint together"
    if asked is True or (cuda and has_room(copy)):
        return True, f"each stops it for a copy of about {memory_size(copy)} in host memory"
    if not cuda:
        return False, "train.save_in_background: auto means on a GPU"
    return False, f"a copy of about {memory_size(copy)} leaves too little of the host memory that is free"


def has_room(copy: int) -> bool:
    """Whether so many bytes can be copied into host memory, with some to spare."""
    return int(psutil.virtual_memory().available) >= SPARE * copy


# --------------------------------------------------------------------------------------------------------------------
# The copy
# --------------------------------------------------------------------------------------------------------------------


def copied(content: Any) -> Any:
    """A copy in host memory that is saved to the same bytes; None of what is not known to be.

    Tensors that share their memory share it in the copy. What is not dicts, lists and tuples of plain tensors, numbers
    and texts may hold what training goes on to change, or be saved as what it is not.

    Example::

        copied({"state": {0: {"step": torch.tensor(3.0)}}})
        # {'state': {0: {'step': tensor(3.)}}}
    """
    tensors: list[torch.Tensor] = []
    if not _is_plain(content, tensors):
        return None
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        copy = stager.stage(content)
    finally:
        stager.close()
    copies: list[torch.Tensor] = []
    _is_plain(copy, copies)
    for tensor, there in zip(tensors, copies, strict=True):
        if tensor.device.type != "cpu":
            place = torch.serialization.location_tag(tensor.untyped_storage())
            setattr(there.untyped_storage(), _PLACE, place)
    return copy


def _is_plain(content: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether it is all of the kinds that are copied; its tensors are added to the list, in their order."""
    if type(content) is torch.Tensor:
        tensors.append(content)
        return content.layout is torch.strided and not content.requires_grad and content.device.type != "meta"
    if type(content) is dict:
        return all(type(key) in _AS_IT_IS and _is_plain(value, tensors) for key, value in content.items())
    if type(content) in (list, tuple):
        return all(_is_plain(value, tensors) for value in content)
    return type(content) in _AS_IT_IS


# torch writes into a file where each tensor lies: `cuda:0`, and of a copy the same.
torch.serialization.register_package(0, lambda storage: getattr(storage, _PLACE, None), lambda storage, place: None)


@contextlib.contextmanager
def deferred(folder: Path, later: Writes) -> Iterator[None]:
    """Inside, weights and optimizer states that are saved into a folder are copied; `later` gets what will write them.

    What cannot be copied is written at once.
    """
    import peft.peft_model
    import transformers.modeling_utils
    from transformers.trainer import OPTIMIZER_NAME

    def deferring(write: Callable[..., Any], only: str | None) -> Callable[..., Any]:
        @functools.wraps(write)
        def call(content: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            path = Path(file) if isinstance(file, str | os.PathLike) else Path()
            if folder in path.parents and only in (None, path.name):
                try:
                    copy = copied(content)
                except (
                    Exception
                ):  # a limit of this process, of which `has_room` does not know, or an odd kind of device
                    copy = None
                if copy is not None:
                    later.append(functools.partial(write, copy, file, *args, **kwargs))
                    return None
            return write(content, file, *args, **kwargs)

        return call

    with contextlib.ExitStack() as undo:
        for owner, name, only in (
            (transformers.modeling_utils, "safe_save_file", None),
            (peft.peft_model, "safe_save_file", None),
            (torch, "save", OPTIMIZER_NAME),  # the schedule, random states and arguments are small
        ):
            write = getattr(owner, name)
            undo.callback(setattr, owner, name, write)
            setattr(owner, name, deferring(write, only))
        yield


# --------------------------------------------------------------------------------------------------------------------
# The thread
# --------------------------------------------------------------------------------------------------------------------


class Writing:
    """Work under way in a thread; what it raises is raised where it is waited for.

    Example::

        writing = Writing(lambda: seal(folder, identity, versions))
        writing.failed  # False, so far
        writing.wait()
    """

    def __init__(self, work: Callable[[], Any]):
        self._work = work
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="instructft-checkpoint")
        try:
            self._thread.start()
        except RuntimeError:  # the machine gives this process no more threads
            self._thread = None
            self._run()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error, which `wait` raises."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until it has ended."""
        # the system gives a signal to any thread, and Python answers it in the main one, if that one looks
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK)
        error, self._error = self._error, None
        if error is not None:
            raise error
