"""The JSON schema of a recipe (draft 2020-12), by which editors complete keys and mark wrong ones.

It is pydantic's of the models, and what these cannot know, from the shipped lists of fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instructft.recipe.aliases import TRAIN_BOUNDS
from instructft.recipe.fields import OWN_TRAIN_FIELDS, legal_lora_fields, legal_train_fields
from instructft.recipe.schema import ANSWER_FIGURES, TRAIN_DEFAULTS, Recipe, thaw

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "dict": "object"}
_OPEN = (None, None, "")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the short forms that the loader takes.

    >>> json_schema()["properties"]["data"]["properties"]["max_length"]["default"]
    1024
    """
    from instructft.data.formats import FORMATS
    from instructft.data.sources import SOURCES
    from instructft.prompt.templates import TEMPLATES

    schema: dict[str, Any] = _inline(Recipe.model_json_schema(), {})
    schema.pop("$defs", None)
    properties = schema["properties"]
    for name, field in Recipe.model_fields.items():
        if field.exclude:
            del properties[name]
    properties["output_dir"].pop("default", None)  # runs/<recipe name>

    data = properties["data"]["properties"]
    entry = data["datasets"]["items"]
    names = {"enum": list(SOURCES)}
    entry["properties"]["name"] = {**names, "description": entry["properties"]["name"]["description"]}
    entry["properties"]["format"]["anyOf"] = [{"enum": list(FORMATS)}, {"type": "null"}]
    entry["oneOf"] = [{"required": [key]} for key in ("name", "hub", "path", "url")]
    one = {"anyOf": [names, entry]}
    data["datasets"] = {
        "description": data["datasets"]["description"],
        "anyOf": [names, entry, {"type": "array", "minItems": 1, "items": one}],
    }
    templates = [{"enum": ["auto", *TEMPLATES, "tokenizer"]}, {"type": "string", "pattern": r"\.jinja$"}]
    data["template"] = {"anyOf": templates, "default": "auto", "description": data["template"]["description"]}

    adapter = properties["adapter"]
    del adapter["properties"]["more"]
    for name, row in legal_lora_fields().items():
        adapter["properties"].setdefault(name, _field(row, row["default"]))
    properties["adapter"] = {
        "description": adapter.pop("description"),
        "anyOf": [adapter, {"enum": ["none", "lora", None]}],
    }
    properties["train"] = {
        "description": f"{', '.join(OWN_TRAIN_FIELDS)}, and the fields of trl.SFTConfig by their own names",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            name: _field(row, TRAIN_DEFAULTS.get(name, row["default"]), TRAIN_BOUNDS.get(name, _OPEN))
            for name, row in legal_train_fields().items()
        },
    }
    for name in ("model", "evaluation", "hub", "check"):
        properties[name]["type"] = ["object", "null"]
    metrics = properties["evaluation"]["properties"]["metrics"]
    one = {"anyOf": [{"enum": list(ANSWER_FIGURES)}, {"type": "string", "pattern": r"\.py:[^:]+$"}]}
    about = {"default": [], "description": metrics["description"]}
    properties["evaluation"]["properties"]["metrics"] = {"anyOf": [one, {"type": "array", "items": one}], **about}
    properties["samples"]["type"] = ["array", "null"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "instructft recipe"}


def _inline(node: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema without `$ref`, so that each section stands where it is used."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    definitions = node.get("$defs", definitions)
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        rest = {key: value for key, value in node.items() if key not in ("$ref", "default")}
        return _inline({**target, **rest}, definitions)
    # titles repeat the key; a property that is called `title` is a mapping, and stays
    return {
        key: _inline(value, definitions)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str)) and key != "$defs"
    }


def _field(
    row: Mapping[str, Any], default: Any, bounds: tuple[float | None, float | None, str] = _OPEN
) -> dict[str, Any]:
    """The schema of one field of SFTConfig or LoraConfig."""
    types: list[dict[str, Any]] = [{"type": _TYPES.get(kind, "null")} for kind in row["kinds"]]
    if choices := row.get("choices"):
        words = {"enum": choices}
        types = [words if kind == {"type": "string"} else kind for kind in types]
        types = [{"type": "array", "items": words} if kind == {"type": "array"} else kind for kind in types]
    least, greatest = bounds[:2]
    for kind in types:
        if kind.get("type") in ("integer", "number"):
            kind |= {"minimum": least} if least is not None else {}
            kind |= {"maximum": greatest} if greatest is not None else {}
    shape = types[0] if len(types) == 1 else {"anyOf": types}
    return {**shape, "default": thaw(default), "description": row["help"]}
