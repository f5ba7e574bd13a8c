"""Names the file of a model folder that cannot be read: before a library opens it, and when one has failed.

Libraries end on a damaged file with whatever their parser says (`'added_tokens'`, `unhashable type: 'list'`), mostly
without the file's name, and pass over some: a `generation_config.json` that is cut short is left out without a word,
and with it the tokens at which the model stops.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instructft.errors import InstructftError, ModelFileError, is_panic
from instructft.formatting import first_line, short
from instructft.weights import remote_code
from instructft.weights.weight_files import ADAPTER_WEIGHTS, NAMES, read_header, weight_files
from instructft.whole_file import read_whole, require_file

_AGAIN = "copy or download it again"
# files that hold one JSON object
_OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "run.json"),
    *("adapter_config.json", *(index for _, index in NAMES)),
)
# files of a tokenizer, which libraries read whole
_TABLES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "chat_template.jinja")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelFileError: it is none, or cannot be read.
    """
    try:
        found = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON ({first_line(error)}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: found {type(found).__name__}, expected a JSON object; {_AGAIN}")
    return found


def require_readable(folder: Path) -> None:
    """See that every file of a model can be read that says so at a glance: configurations, headers of weights.

    Args:
        folder: of a model or an adapter; one that is not there, such as a name on the Hub, is left to its reader.

    Raises:
        ModelFileError: with the file, and what was found in it.
    """
    if not folder.is_dir():
        return
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    for name in _TABLES:
        if (folder / name).is_file():
            try:
                require_file(folder / name)
            except OSError as error:
                raise ModelFileError(f"{folder / name} cannot be a tokenizer's: {error.strerror}") from error
    index = folder / NAMES[0][1]
    has_shards = not (folder / NAMES[0][0]).is_file() and index.is_file()
    for file in [*(weight_files(folder) if has_shards else ()), folder / NAMES[0][0], folder / ADAPTER_WEIGHTS]:
        if file.is_file():
            read_header(file)


@contextlib.contextmanager
def reading(name: str, folder: str | Path = "") -> Iterator[None]:
    """While a library reads a model or a tokenizer: all its ways to fail as one error that names the file.

    Args:
        name: as the user said it.
        folder: where its files are, if they are on this machine.

    Raises:
        ModelFileError: whatever the library raises, a panic of a tokenizer in Rust included.
    """
    place = Path(folder).expanduser() if folder else None
    if place is not None:
        require_readable(place)
    try:
        yield
    except (InstructftError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelFileError(f"{name} could not be loaded: {_why(error, place)}") from error


def _why(error: BaseException, folder: Path | None) -> str:
    if isinstance(error, Exception) and (wanted := remote_code.wanted(error)):
        return wanted
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors, so that reading it could run code; use a model "
            "whose weights are safetensors"
        )
    if folder is not None and (found := unreadable_tokenizer(folder)):
        return found
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    field = "Validation error for field" in reason  # of a configuration
    return f"{folder / 'config.json'}: {reason}" if field and folder is not None else reason


def unreadable_tokenizer(folder: Path) -> str:
    """What is wrong with `tokenizer.json`; "" where nothing is."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return ""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict) or not isinstance(read.get("model"), dict):
            return f"{path} is no tokenizer: expected an object with a model; {_AGAIN}"
        Tokenizer.from_file(str(path))
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return f"{path} is no tokenizer that can be read: {first_line(error)}; {_AGAIN}"
    return ""


def require_patterns_end(tokenizer: Any, name: str) -> None:
    """Try the regular expressions of a tokenizer on texts over which one of exponential time gives up.

    The library bounds each match and panics; it is better known before a run begins, or a question is asked.

    Raises:
        ModelFileError: with the pattern.
    """
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts = [part for part in (getattr(core, key, None) for key in ("normalizer", "pre_tokenizer")) if part]
    patterns = [pattern for part in parts for pattern in _patterns(json.loads(part.__getstate__()))]
    letters = sorted({sign for pattern in patterns for sign in pattern})[:64]
    after = "".join(letters)  # a match is not even tried where a character that it needs is nowhere
    for unit in {*_UNITS, *letters} if patterns else ():
        for end in ("", "!", f" {after}", f"\n{after}"):
            try:
                core.encode(unit * 40 + end, add_special_tokens=False)
            except BaseException as error:
                if not is_panic(error):
                    raise
                which = ", ".join(short(pattern, 80) for pattern in patterns)
                raise ModelFileError(
                    f"the tokenizer of {name} (tokenizer.json) does not come to an end on some texts: {error}; "
                    f"of its patterns: {which}"
                ) from error


_UNITS = ("a", "A", "1", " ", "\n", "\t", "_", ".", "-", "'", "é", "中", "aA", "a ", "a1", "ab", "1,", ". ")


def _patterns(found: Any) -> Iterator[str]:
    """Every regular expression in the description of a part of a tokenizer."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if key == "Regex" and isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            yield from _patterns(value)
