"""Writes `instructft/sft_config_fields.json`: every field of `trl.SFTConfig` and `peft.LoraConfig`, so that a recipe
can be checked without importing torch. Run it after an upgrade of trl, transformers or peft:

    python scripts/sft_config_fields.py            # writes the file
    python scripts/sft_config_fields.py --check    # exit 1 if the file is out of date
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "instructft" / "recipe" / "sft_config_fields.json"
PLAIN = {int: "int", float: "float", bool: "bool", str: "str", dict: "dict", list: "list", tuple: "list"}


def kinds_of(hint: Any) -> tuple[list[str], list[str]]:
    """The JSON kinds that a type hint takes, and the words where it is an enum or a literal.

    >>> kinds_of(int | None)
    (['int', 'null'], [])
    """
    origin = typing.get_origin(hint)
    if hint in (None, type(None)):
        return ["null"], []
    if origin in (typing.Union, types.UnionType):
        kinds, words = [], []
        for part in typing.get_args(hint):
            more_kinds, more_words = kinds_of(part)
            kinds += [kind for kind in more_kinds if kind not in kinds]
            words += more_words
        return kinds, words
    if origin is typing.Literal:
        values = typing.get_args(hint)
        kinds = list(dict.fromkeys(PLAIN[type(value)] for value in values))
        return kinds, [value for value in values if isinstance(value, str)]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return ["str"], [member.value for member in hint]
    base = origin or hint
    if base in PLAIN:
        return [PLAIN[base]], []
    if base is Any:
        return ["str"], []
    return ["dict"], []  # a configuration class; YAML writes it as a mapping


def fields_of(config: type, choices: dict[str, list[str]]) -> dict[str, Any]:
    """Name -> kinds, default, choices and help of each field of a dataclass."""
    hints = typing.get_type_hints(config)
    table = {}
    for field in dataclasses.fields(config):
        kinds, words = kinds_of(hints[field.name])
        words = choices.get(field.name) or list(field.metadata.get("choices") or words)
        if any("[" in word for word in words):  # a pattern such as `pissa_niter_[number of iters]`
            words = []
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            default = None
        text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
        table[field.name] = {
            "kinds": kinds,
            "default": default.value if isinstance(default, enum.Enum) else default,
            **({"choices": words} if words else {}),
            "help": text.split(". ")[0].rstrip(".")[:240],
        }
    return table


def table() -> dict[str, Any]:
    """The whole content of the file."""
    from peft import LoraConfig
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    # what the annotations leave open
    choices = {
        "report_to": ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)],
        "pad_to_multiple_of": ["auto"],
        "include_num_input_tokens_seen": ["all", "non_padding", "no"],
    }
    sft = fields_of(SFTConfig, choices)
    sft["report_to"]["kinds"].remove("null")  # None ends in "None is not supported"
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("trl", "transformers", "peft")},
        "sft_config": sft,
        "lora_config": fields_of(LoraConfig, {}),
    }


if __name__ == "__main__":
    # one field a line: small, and a diff shows which field changed
    content = table()
    lines = [f' "versions": {json.dumps(content["versions"])}']
    for section in ("sft_config", "lora_config"):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in content[section].items())
        lines.append(f' "{section}": {{\n{rows}\n }}')
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == text else f"{TARGET} is out of date")
    TARGET.write_text(text, encoding="utf-8")
    print(f"{TARGET}: {len(content['sft_config'])} + {len(content['lora_config'])} fields")
