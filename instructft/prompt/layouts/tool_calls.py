"""Tools and their calls, as data sets write them, in the one form that chat templates take.

OpenAI's (`tools`, `functions`, `tool_calls`, `function_call`), Anthropic's (`input_schema`, `tool_use`), bare ones
(`{"name", "arguments"}`, as in xLAM) and JSON text of any of these.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from instructft.prompt.ledger import Ledger, absent

Json = dict[str, Any]


def parsed(value: Any) -> Any:
    """The list or object that a text spells, in JSON or as Python prints it (CSV files from pandas); else the value.

    >>> parsed('[{"name": "f"}]'), parsed("[{'name': None}]"), parsed("[see below")
    ([{'name': 'f'}], [{'name': None}], '[see below')
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return value
    return found if isinstance(found, list | dict) else value


def tools_of(value: Any, where: str, ledger: Ledger) -> list[Json] | None:
    """Function schemas as templates take them: `{"type": "function", "function": {"name", …, "parameters"}}`.

    >>> tools_of('[{"name": "f", "input_schema": {"type": "object"}}]', "tools", Ledger())
    [{'type': 'function', 'function': {'name': 'f', 'parameters': {'type': 'object'}}}]
    """
    if absent(value):
        return None
    given = parsed(value)
    if isinstance(given, Mapping):
        given = list(given.values()) if given and all(_is_schema(v) for v in given.values()) else [given]
    if not isinstance(given, list | tuple):
        ledger.unread(where, value, "expected a list of function schemas, or its JSON text")
        return None
    tools = []
    for entry in given:
        entry = parsed(entry)
        schema = entry.get("function", entry) if isinstance(entry, Mapping) else None
        schema = parsed(schema)
        if not _is_schema(schema):
            ledger.unread(f"{where}[]", entry, "expected a function schema: {name, description, parameters}")
            continue
        schema = {k: v for k, v in schema.items() if not (k == "type" and v == "function")}
        if "input_schema" in schema:
            schema["parameters"] = schema.pop("input_schema")
        if isinstance(schema.get("parameters"), str):
            schema["parameters"] = parsed(schema["parameters"])
        tools.append({"type": "function", "function": schema})
    return tools or None


def _is_schema(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)


def calls_of(value: Any, where: str, ledger: Ledger) -> list[Json]:
    """Calls as templates take them, their arguments as an object where they are one.

    >>> calls_of('{"name": "f", "arguments": "{\\\\"a\\\\": 1}"}', "function_call", Ledger())
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}]
    """
    if absent(value):
        return []
    given = parsed(value)
    calls = []
    for entry in [given] if isinstance(given, Mapping) else given if isinstance(given, list | tuple) else [None]:
        call = _call(parsed(entry), where, ledger)
        if call is None:
            ledger.unread(where, value, 'expected calls: {"name": …, "arguments": {…}}, or their JSON text')
            return []
        calls.append(call)
    return calls


def _call(entry: Any, where: str, ledger: Ledger) -> Json | None:
    if not isinstance(entry, Mapping):
        return None
    function = parsed(entry.get("function"))
    inner = function if isinstance(function, Mapping) else entry
    if not isinstance(name := inner.get("name"), str) or not name:
        return None
    key = next((k for k in ("arguments", "parameters", "args", "input") if not absent(inner.get(k))), "arguments")
    call: Json = {"type": "function"}
    if not absent(entry.get("id")):
        call["id"] = entry["id"]
    call["function"] = {"name": name, "arguments": _arguments(inner.get(key))}
    known = {"id", "type", "function", "index"} if inner is not entry else {"id", "type", "index", "name", key}
    ledger.rest(entry, known, f"{where}[].{{}}")
    if inner is not entry:
        ledger.rest(inner, {"name", key}, f"{where}[].function.{{}}")
    return call


def _arguments(value: Any) -> Any:
    """An object where the text is one's JSON; what a model once wrote wrongly stays the text that it was."""
    if isinstance(value, Mapping):
        return dict(value)
    if absent(value):
        return {}
    if isinstance(value, str):
        try:
            found = json.loads(value)
            found = json.loads(found) if isinstance(found, str) else found  # encoded twice
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, dict) else value
    return value
