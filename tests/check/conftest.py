"""What the tests of checks share: real steps without a process that imports torch anew."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instructft.check import measure
from tests.conftest import BATTERY
from tests.helpers.processes import python


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps are made by a fork of what has imported torch; `make battery` starts a process for each."""
    if not BATTERY:

        def run(line: list[str], env: dict[str, str], **_: Any) -> Any:
            return python(line[1:], tmp_path, **env)

        monkeypatch.setattr(measure, "subprocess", SimpleNamespace(run=run))
