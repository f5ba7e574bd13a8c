"""Writes `benchmarks/REAL.md` from the figures that `make real` noted."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = HERE.parent / ".cache" / "real" / "figures.jsonl"

BATTERY = "\n## By the battery\n"  # kept as it is by a run without it

TABLE = """
| promise | how | figure |
| --- | --- | --- |
"""

HEAD = """# On a real model

Written by `make real`: SmolLM2-135M-Instruct, rows of Alpaca-GPT4, real vocabularies, all through pip. Each
line is asserted by a test in `tests/real`, or stands beside another.
"""


def _lines(figures: dict[str, str]) -> str:
    return "\n".join(sorted(f"{what} {figure} |" for what, figure in figures.items()))


def main() -> None:
    """Write the table."""
    found = [json.loads(line) for line in FIGURES.read_text(encoding="utf-8").splitlines()]
    usual, long = (
        {f"| {row['promise']} | {row['how']} |": row["figure"] for row in found if row["battery"] == battery}
        for battery in (False, True)
    )
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft"))
    where = f"{os.cpu_count()} cores, Python {platform.python_version()}, {stack}"
    page = HERE / "REAL.md"
    _, _, kept = page.read_text(encoding="utf-8").partition(BATTERY) if page.exists() else ("", "", "")
    if long:  # a battery may lack a program, and some of it may be run alone
        lines = [line for line in kept.splitlines() if line.startswith("| ") and line not in TABLE]
        stood = {
            f"{what} |": figure for what, _, figure in (line.removesuffix(" |").rpartition(" | ") for line in lines)
        }
        kept = TABLE + _lines({**stood, **long}) + f"\n\n{where}\n"
    text = HEAD + TABLE + _lines(usual) + f"\n\n{where}\n" + (BATTERY + kept if kept else "")
    page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
