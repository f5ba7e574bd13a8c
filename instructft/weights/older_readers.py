"""Lets transformers 4 read what transformers 5 saved: the same values once more, under the names that it knows.

transformers 5 keeps the base of rotary positions in `rope_parameters` alone, where version 4 takes 10,000; it counts
experts under a name of its own, and names a class of tokenizers that version 4 has not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # both are one class in transformers 5


def for_older_readers(folder: Path) -> None:
    """Write into `config.json` and `tokenizer_config.json` of a saved model what older readers look for."""
    if (path := folder / "tokenizer_config.json").is_file():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if (name := tokenizer.get("tokenizer_class")) in TOKENIZER:
            path.write_text(_text(tokenizer | {"tokenizer_class": TOKENIZER[name]}), encoding="utf-8")
    if (path := folder / "config.json").is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        add_older_names(config)
        path.write_text(_text(config), encoding="utf-8")


def add_older_names(config: dict[str, Any]) -> None:
    """Add to a configuration, and to its text part, what version 4 calls otherwise."""
    for section in (config, config.get("text_config")):
        if not isinstance(section, dict):
            continue
        if "num_local_experts" in section:
            section.setdefault("num_experts", section["num_local_experts"])
        rope = section.get("rope_parameters")
        if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
            continue  # some models have other positions in each kind of layer, which version 4 cannot say
        section.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            section.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
