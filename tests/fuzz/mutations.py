"""Damages and forges files, by a seed: bytes of any file, values of JSON and YAML, headers of tensors, templates."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

# What a value becomes. Each is one that some parser, type check or arithmetic took for granted not to meet.
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**30, 0.5, float("nan"), float("inf"), "", "a", "-1", "\ud800", "a\0b", "../../x", "/etc"),
    *("x" * 70_000, "{{ 1 }}", "((\\w|[.])+)+#", [], [[]], [None], ["a", "b"], {}, {"a": 1}, {"": None}, [0.0, 64.5]),
)
_DEEP = "[" * 5_000 + "]" * 5_000
_LONG = "1" + "0" * 5_000

_YAML = (
    *("!!python/object/apply:os.system [touch ran]", "&a [*a]", "&a {b: *a}", "[", "{", "}", "'", "\t- x", "null", "~"),
    *("0x1F", "1e400", ".nan", "-.inf", "2026-01-01", "on", "'a\\0b'", "\ufeff", "? [a]", "<<: {a: 1}", "|", ">-", "-"),
    *(_LONG, "1" * 30, _DEEP[:600], "rows[1].parquet", "../../../etc/passwd", "http://127.0.0.1:1/x", "[1, {a: [b]}]"),
)
_TEMPLATE = (
    *("{{ 10 ** 5000 }}", "{{ ('a' * 9999) | length }}", "{% include 'x' %}", "{% import 'x' as y %}", "{{ x.y.z }}"),
    *("{% extends 'x' %}", "{{ raise_exception('no') }}", "{{ '%d' | format('a') }}", "{{ ''.__class__.__mro__ }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[99].content }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}"),
    *("{{ messages | map(attribute='x') | list }}", "{{ (" * 300 + "1" + ") }}" * 300, "{{ range(10 ** 12) | list }}"),
    *("{% set messages = [] %}", "{{ namespace(a=1).a.b }}", "{{ self }}", "{{ cycler() }}", "{{ lipsum(1) }}", "\0"),
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{%",
        "}}",
        "{#",
        "\ud800",
        "{{ messages.append(1) }}",
        "{{ 2 ** 'a' }}",
    ),
    *("{{ 0 | round(99999) }}", "{{ 'a' | center(99999) }}", "{{ messages | tojson(indent=9) }}", "{% break %}"),
    *(
        "{{ strftime_now('%Y') }}",
        "{{ strftime_now('%' * 9) }}",
        "{{ caller() }}",
        "{% generation %}",
        "{{ loop.index }}",
    ),
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Bytes as a broken disk, a download that was cut, or an editor leaves them."""
    raw = bytearray(content)
    at = chance.randrange(len(raw) + 1)
    size = chance.choice((1, 2, 8, 100))
    how = chance.randrange(9)
    if how == 0:
        return bytes(raw[:at])
    if how == 1:
        raw[at : at + size] = bytes(min(size, len(raw) - at))
    elif how == 2:
        raw[at : at + size] = b""
    elif how == 3:
        raw[at:at] = chance.randbytes(size)
    elif how == 4:
        raw[at:at] = raw[at : at + size]
    elif how == 5 and raw:
        raw[at % len(raw)] ^= 1 << chance.randrange(8)
    elif how == 6:
        raw[at : at + size] = b"\xff" * min(size, len(raw) - at)
    elif how == 7:
        return chance.choice((b"", b"\0", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b"PK\3\4", b"\x80\4."))
    else:
        raw += chance.randbytes(size)
    return bytes(raw)


def forged_value(value: Any, chance: random.Random) -> Any:
    """A value of JSON with one part of it, anywhere, as nobody writes it."""
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        for key in one if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ():
            places.append((one, key))
            walk(one[key])

    value = json.loads(json.dumps({"root": value}))
    walk(value)
    holder, key = chance.choice(places)
    how = chance.randrange(5)
    if how == 0 and holder is not value:
        del holder[key]
    elif how == 1:
        holder[key] = [holder[key]]
    elif how == 2 and isinstance(holder, dict) and holder is not value:
        holder[chance.choice(("", "a", str(key).upper(), f"{key}_"))] = holder.pop(key)
    else:
        holder[key] = chance.choice(ODD)
    return value["root"]


def forged_json(content: bytes, chance: random.Random) -> bytes:
    """A file of JSON with one odd value; now and then nested or long as no parser of Python's takes it."""
    text = json.dumps(forged_value(json.loads(content), chance))
    if chance.random() < 0.1:
        text = re.sub(r'(?<=: )("[^"]*"|\d+)(?=[,}])', chance.choice((_DEEP, _LONG)), text, count=1)
    return text.encode()


def forged_lines(content: bytes, chance: random.Random) -> bytes:
    """JSON a line: one of the lines forged."""
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = forged_json(lines[at], chance)
    return b"\n".join(lines)


def forged_yaml(content: bytes, chance: random.Random) -> bytes:
    """A recipe with one value, key or line as nobody writes it."""
    lines = content.decode().splitlines()
    at = chance.choice([number for number, line in enumerate(lines) if ":" in line and not line.startswith("#")])
    key, _, rest = lines[at].partition(":")
    odd = chance.choice(_YAML)
    lines[at] = chance.choice(
        (
            f"{key}: {odd}",
            f"{key}: {odd}",
            f"{key}: {odd}",
            f"{key}x:{rest}",
            f"{key}: {{a:{rest or ' 1'}}}",
            f" {lines[at]}",
            odd,
        )
    )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def forged_header(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header says something else of its tensors."""
    size = int.from_bytes(content[:8], "little")
    header = forged_json(content[8 : 8 + size], chance)
    told = chance.choice((len(header), len(header), len(header), 2**63, 0, len(header) - 1))
    return told.to_bytes(8, "little") + header + content[8 + size :]


def forged_template(content: bytes, chance: random.Random) -> bytes:
    """A template with a piece more, or a piece less."""
    text = content.decode()
    at = chance.randrange(len(text) + 1)
    if chance.random() < 0.3:
        text = text[:at] + text[at + chance.randrange(1, 20) :]
    else:
        at = chance.choice((0, len(text), at))
        text = text[:at] + chance.choice(_TEMPLATE) + text[at:]
    return text.encode("utf-8", "surrogatepass")


_FORGED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **{".json": forged_json, ".jsonl": forged_lines, ".yaml": forged_yaml, ".jinja": forged_template},
    ".safetensors": forged_header,
}


def mutated(name: str, content: bytes, chance: random.Random) -> bytes:
    """A file of a name, damaged in one time of three or forged by what it holds."""
    forge = _FORGED.get("." + name.rpartition(".")[2])
    return forge(content, chance) if forge and chance.random() < 0.67 else damaged(content, chance)
