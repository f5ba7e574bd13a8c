"""What `make real` shares: the model, the rows, and the file that figures are noted in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

REAL = os.environ.get("INSTRUCTFT_REAL")
collect_ignore_glob = [] if REAL else ["test_*.py"]  # only `make real` has fetched what they need


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of what `scripts/real_assets.py` fetched."""
    assert REAL is not None
    return Path(REAL)


@pytest.fixture(scope="session")
def smollm(real: Path) -> Path:
    """SmolLM2-135M-Instruct, as `from_pretrained` loads it."""
    return real / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def rows(real: Path) -> list[dict[str, str]]:
    """Real instruction rows in Alpaca's shape, shortest first."""
    found: list[dict[str, str]] = json.loads((real / "rows.json").read_text(encoding="utf-8"))
    return sorted(found, key=lambda row: len("".join(row.values())))


@pytest.fixture(scope="session")
def note(real: Path) -> Callable[[str, str, str], None]:
    """Note a figure: the promise, what was done, what came out."""

    def write(promise: str, how: str, figure: str) -> None:
        with (real / "figures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"promise": promise, "how": how, "figure": figure}) + "\n")

    return write
