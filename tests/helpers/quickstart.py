"""The bundled rows and tokenizer, as tests ask for them."""

from __future__ import annotations

import json
from typing import Any

from instructft.data.sources import QUICKSTART


def rows() -> list[dict[str, str]]:
    """Rows of `instruction`, `input`, `output` and `category`."""
    return [json.loads(line) for line in (QUICKSTART / "rows.jsonl").open(encoding="utf-8")]


def tokenizer() -> Any:
    """Without a chat template; a new one at every call."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QUICKSTART)
