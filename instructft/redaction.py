"""Takes this machine's folders out of what leaves it: in JSON and YAML that was parsed, a path becomes its last name.

The recipe of a run, an adapter's configuration and a checkpoint's manifest name folders as they are called here. To
others these say nothing but who ran it and where.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from instructft.formatting import yaml_text

# Keys whose values are words of a person or of a model, never a path.
_WORDS = {"samples", "system_prompt", "chat_template", "prompt", "messages", "prediction", "reference", "response"}
# Keys that name a model: a folder here, or an id on the Hub.
MODEL_KEYS = {"name_or_path", "_name_or_path", "base_model_name_or_path", "tokenizer", "model_name_or_path"}
# A tokenizer's other strings are tokens.
_TOKENIZER_KEYS = {"name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file"}
_TOKENIZER_KEYS |= {"special_tokens_map_file", "added_tokens_file"}
_PATH = re.compile(r"(/|~[/\\]|\.\.[/\\]|[A-Za-z]:[\\/]|\\\\|file:)[^\n]*")
_CACHED = re.compile(r"models--(.+?)[/\\]snapshots[/\\]")


def without_places(value: Any, folders: Iterable[Path] = (), key: str = "") -> Any:
    """A parsed document with every path to a folder of this machine cut down to its last name.

    Args:
        folders: whose paths are also taken out where they stand inside a longer text; the home and the working
            directory always are.
        key: under which `value` stands.

    >>> without_places({"name_or_path": "/home/ada/models/base", "samples": ["/help"]})
    {'name_or_path': 'base', 'samples': ['/help']}
    """
    return _walk(value, _roots(folders), key)


def without_places_by_key(values: Mapping[str, Any], folders: Iterable[Path] = ()) -> dict[str, Any]:
    """The same for values by dotted keys of a recipe, each under the last name of its key.

    >>> without_places_by_key({"model.name_or_path": "/home/ada/models/base", "train.max_steps": 3})
    {'model.name_or_path': 'base', 'train.max_steps': 3}
    """
    roots = _roots(folders)
    return {key: _walk(value, roots, key.rpartition(".")[2]) for key, value in values.items()}


def without_roots(text: str, folders: Iterable[Path] = ()) -> str:
    """A text for people (a model card, a page) without the paths of known folders.

    >>> without_roots("see /home/ada/runs/a/loss.png", [Path("/home/ada/runs/a")])
    'see loss.png'
    """
    return _cut(text, _roots(folders))


def of_file(name: str, content: bytes, folders: Iterable[Path] = ()) -> bytes:
    """A file's content as it may leave: JSON, JSON lines and YAML by their values, cards and pages by known folders.

    What holds no such path comes back byte for byte, and so does what cannot be parsed.
    """
    folders = list(folders)
    roots = _roots(folders)
    try:
        text = content.decode("utf-8")
        if name == "tokenizer_config.json":
            found = json.loads(text)
            clean = {k: _walk(v, roots, k) if k in _TOKENIZER_KEYS else v for k, v in found.items()}
            return content if clean == found else _json(clean)
        if name.endswith(".json"):
            found = json.loads(text)
            clean = _walk(found, roots, "")
            return content if clean == found else _json(clean)
        if name.endswith(".jsonl"):
            return "".join(_line(line, roots) for line in text.splitlines(keepends=True)).encode()
        if name.endswith((".yaml", ".yml")):
            return _yaml(text, roots).encode()
        if name.endswith((".md", ".html")):
            return _card(text, roots).encode()
    except (ValueError, AttributeError, RecursionError):
        pass
    return content


def last_name(path: str) -> str:
    """The name by which a path may be told to others; of a model in the Hub's cache its id.

    >>> last_name("/home/ada/.cache/huggingface/hub/models--org--name/snapshots/0123/"), last_name("/data/rows.jsonl")
    ('org/name', 'rows.jsonl')
    """
    if cached := _CACHED.search(path):
        return cached[1].replace("--", "/")
    parts = [part for part in re.split(r"[/\\]+", path) if part not in ("", ".", "..", "~", "file:")]
    return parts[-1] if parts else "."


def _walk(value: Any, roots: list[re.Pattern[str]], key: str) -> Any:
    if key in _WORDS:
        return value
    if isinstance(value, Mapping):
        return {name: _walk(inner, roots, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(inner, roots, key) for inner in value]
    if not isinstance(value, str) or not value or "\n" in value:
        return _cut(value, roots) if isinstance(value, str) else value
    if _is_place(value) or (key in MODEL_KEYS and Path(value).expanduser().is_dir()):
        return last_name(value)
    return _cut(value, roots)


def _is_place(text: str) -> bool:
    """Whether a whole string is a path that is no other machine's: absolute, from home, or out of the folder here."""
    if not _PATH.fullmatch(text) or " " in text.split("/")[0]:
        return False
    # `/no_think` is a word of some models
    return len(re.split(r"[/\\]+", text.rstrip("/\\"))) > 2 or Path(text).expanduser().exists()


def _roots(folders: Iterable[Path]) -> list[re.Pattern[str]]:
    """Patterns of the folders that are known, the longest first."""
    known: set[str] = set()
    for folder in (*folders, Path.cwd(), Path.home(), *filter(None, [_of_environment("HF_HOME")])):
        for path in (folder.expanduser().absolute(), folder.expanduser().resolve()):
            if len(path.parts) > 1 and path != Path(path.anchor) / "tmp":
                known.add(str(path))
    before = r"(?<![\w.:/\\-])"  # not the middle of a URL or of a longer path
    return [re.compile(f"{before}{re.escape(path)}(?:[/\\\\]|(?![\\w.-]))") for path in sorted(known, key=len)[::-1]]


def _of_environment(name: str) -> Path | None:
    found = os.environ.get(name)
    return Path(found) if found else None


def _cut(text: str, roots: list[re.Pattern[str]]) -> str:
    for root in roots:
        text = root.sub("", text)
    return text


def _line(line: str, roots: list[re.Pattern[str]]) -> str:
    found = json.loads(line) if line.strip() else None
    clean = _walk(found, roots, "")
    return line if clean == found else json.dumps(clean, ensure_ascii=False) + "\n"


def _yaml(text: str, roots: list[re.Pattern[str]]) -> str:
    """YAML that is written anew only where it held a path; comments stand before its first key."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return _cut(text, roots)
    clean = _walk(found, roots, "")
    if clean == found or not isinstance(clean, dict):
        return text
    head = [line for line in text.splitlines(keepends=True) if line.startswith("#")][:1]
    return "".join(head) + yaml_text(clean)


def _card(text: str, roots: list[re.Pattern[str]]) -> str:
    """A card with its blocks of YAML cleaned by their values, and the rest by known folders."""

    def block(found: re.Match[str]) -> str:
        return found[1] + _yaml(found[2], roots).rstrip("\n") + found[3]

    return _cut(re.sub(r"(```yaml\n)(.*?)(\n```)", block, text, flags=re.S), roots)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def bare_url(url: str) -> str:
    """Scheme, host and path of a URL: a query may be a signature, and a name before the host a password.

    >>> bare_url("https://ada:pw@host.example:8080/rows.jsonl?api_key=K3y#top")
    'https://host.example:8080/rows.jsonl'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def is_secret(key: Any) -> bool:
    """Whether a key names a credential, whose value is never shown."""
    return isinstance(key, str) and bool(_SECRET.search(key)) and not _NOT_SECRET.match(key)


def redact(text: str) -> str:
    """The text with everything that looks like an access token blotted out."""
    return _SECRET_VALUE.sub(lambda found: f"{found[1] or 'hf_'}…", text)


def without_secrets(words: Iterable[str]) -> list[str]:
    """A command line as it may be kept: no tokens, no values of keys that name a credential, no queries of URLs.

    >>> without_secrets(["push", "--api-key", "K3y", "hub.token=K3y", "eos_token=</s>", "https://ada:pw@a.example/x?key=K3y"])
    ['push', '--api-key', '…', 'hub.token=…', 'eos_token=</s>', 'https://a.example/x']
    """
    kept: list[str] = []
    for word in words:
        named = kept[-1].lstrip("-").replace("-", "_") if kept and kept[-1].startswith("--") else ""
        if is_secret(named) and not word.startswith("-"):
            kept.append("…")
            continue
        word = _ASSIGNED.sub(
            lambda found: found[0] if _NOT_SECRET.match(found[2]) else f"{found[1]}{found[2]}{found[3]}…", word
        )
        kept.append(redact(_URL.sub(lambda found: _safe_url(found[0]), word)))
    return kept


def environment_secrets() -> list[str]:
    """The values of the environment whose names say that they are credentials."""
    named = re.compile(r"(TOKEN|PASSWORD|SECRET|API_?KEY|ACCESS_KEY(_ID)?)$", re.IGNORECASE)
    return sorted({value for name, value in os.environ.items() if named.search(name) and len(value) >= 8}, key=len)[
        ::-1
    ]


def _safe_url(url: str) -> str:
    try:
        return bare_url(url)
    except ValueError:  # brackets that are none of an address
        return "…"


# names of credentials; `eos_token` and the like are words of a tokenizer
_SECRET = re.compile(r"(?:^|_)(?:token|password|secret|api_?key)$|^use_auth_token$", re.IGNORECASE)

_NOT_SECRET = re.compile(r"^(?:eos|bos|pad|unk|sep|cls|mask|stop|end|start|image|stop_word)_token$")

_SECRET_VALUE = re.compile(
    r"\b(?:(?:hf|api_org)_[A-Za-z0-9]{6,}|(gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA|sk-)[A-Za-z0-9_-]{16,})"
)

_ASSIGNED = re.compile(
    r"((?:[\w-]+\.)*)([\w-]*(?:token|password|secret|api[_-]?key))(\s*[=:]\s*)[^\s,}\]]+", re.IGNORECASE
)

_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\",}]+")
