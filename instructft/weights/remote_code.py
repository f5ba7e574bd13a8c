"""Whether a model may bring code of its own: where the command line says so, and of the Hub only a pinned commit.

`instructft COMMAND … --trust-remote-code` calls `allow`; no recipe can. Code runs with all rights of whoever starts it,
and a branch is what its owner makes of it tomorrow.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from instructft.errors import UsageError

FLAG = "--trust-remote-code"
_state = {"allowed": False}


def allow(yes: bool = True) -> None:
    """Let models run code of their own from now on, in this process."""
    _state["allowed"] = yes


def allowed() -> bool:
    """Whether the command line said so."""
    return _state["allowed"]


def flag() -> dict[str, bool]:
    """The argument of `from_pretrained` and `from_config`, said outright: left out, they ask at the terminal.

    >>> flag()
    {'trust_remote_code': False}
    """
    return {"trust_remote_code": allowed()}


def pinned(name: str, revision: str | None) -> dict[str, Any]:
    """`flag` for a model that is loaded by name, with the commit that its code is taken from.

    >>> allow(); pinned("org/name", "0123456789abcdef0123456789abcdef01234567")["code_revision"][:8]
    '01234567'

    Raises:
        UsageError: code is allowed, and the name is one of the Hub without a commit.
    """
    if not allowed() or Path(name).expanduser().exists():
        return flag()
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UsageError(
            f"{FLAG}: the code of {name} would run here, so its commit must be pinned. Read the code, then write the "
            f"commit's 40 hex digits to model.revision, or after the name: {name}@COMMIT (found {revision or 'main'})"
        )
    return {**flag(), "code_revision": revision}


def wanted(error: BaseException) -> str:
    """What to do, if an error of transformers says that a model has code of its own; else ""."""
    if "trust_remote_code" not in str(error):
        return ""
    return (
        "it brings Python code of its own, which runs with all your rights. If you have read it: pin model.revision to "
        f"its commit (40 hex digits), and add {FLAG} to the command"
    )
