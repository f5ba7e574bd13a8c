"""Writes `benchmarks/REAL.md` from the figures that `make real` noted."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = HERE.parent / ".cache" / "real" / "figures.jsonl"

HEAD = """# On a real model

Written by `make real`: SmolLM2-135M-Instruct, rows of Alpaca-GPT4, real vocabularies, all through pip. Each
line is asserted by a test in `tests/real`, or stands beside another.

| promise | how | figure |
| --- | --- | --- |
"""


def main() -> None:
    """Write the table."""
    found = [json.loads(line) for line in FIGURES.read_text(encoding="utf-8").splitlines()]
    lines = sorted(f"| {row['promise']} | {row['how']} | {row['figure']} |" for row in found)
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    where = f"{os.cpu_count()} cores, Python {platform.python_version()}, {stack}"
    (HERE / "REAL.md").write_text(HEAD + "\n".join(lines) + f"\n\n{where}\n", encoding="utf-8")
    print((HERE / "REAL.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
