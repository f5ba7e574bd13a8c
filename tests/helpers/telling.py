"""Of a sweep, the members that tell most: `make test` runs these, `make battery` the others too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def telling(members: Iterable[Any], *kept: Any) -> list[Any]:
    """Every member as a parameter, those that are not `kept` with the mark `battery`.

    >>> [one.values for one in telling(["gpt2", "llama"], "llama")]
    [('gpt2',), ('llama',)]
    """
    members = list(members)
    assert all(one in members for one in kept), f"kept, and no member: {[one for one in kept if one not in members]}"
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=[] if one in kept else [pytest.mark.battery])
        for one in members
    ]
