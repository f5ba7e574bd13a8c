"""What one process does for all: the others wait for its result, or for its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from instructft.errors import InstructftError

if TYPE_CHECKING:
    from accelerate import PartialState

Result = TypeVar("Result")


def first_process(state: PartialState, do: Callable[[], Result]) -> Result:
    """Call `do` on the first process only; every process gets what it returned, or raises what it raised.

    >>> first_process(PartialState(), lambda: 2 + 2)
    4
    """
    if state.num_processes == 1:
        return do()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if state.is_main_process:
        try:
            told[0] = do()
        except InstructftError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    result: Result = told[0]
    return result
