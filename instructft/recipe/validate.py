"""Everything that can be wrong with a recipe, collected so that all of it is said at once.

Secrets, unknown keys, fields of SFTConfig and LoraConfig, names and files, types and bounds, in this order. Each
problem names the line, the key, what was found, what was expected and the nearest right name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from instructft.data.files.kinds import SUFFIXES, not_known, suffix_of
from instructft.data.files.locate import as_pattern
from instructft.errors import RecipeError
from instructft.formatting import closest, nearest
from instructft.recipe.aliases import ADAPTER_HOMES, ALIASES, MODELS_OWN, TRAIN_HOMES, VALUE_HINTS
from instructft.recipe.fields import (
    describe,
    field_problem,
    leaves,
    legal_lora_fields,
    legal_train_fields,
    section_keys,
    section_of,
    show,
    wrong_value,
)
from instructft.recipe.schema import ANSWER_FIGURES, AdapterSection, Recipe, freeze
from instructft.recipe.yaml_reader import Document, KeyPath, dotted
from instructft.redaction import is_secret
from instructft.weights import remote_code
from instructft.weights.base_record import is_hub_id, stays_inside

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_ATTENTION = ("auto", "eager", "sdpa", "varlen", *_FLASH, "flex_attention")
_OWN_ADAPTER = section_keys(AdapterSection)


class _Check:
    """One pass over a document. A value with a problem is taken out, so that the rest can still be checked."""

    def __init__(self, document: Document, folder: Path, strict: bool):
        self.document, self.folder, self.strict = document, folder, strict
        self.values: dict[str, Any] = document.values

    def problem(self, path: KeyPath, message: str) -> None:
        """Note what is wrong with a value, under the key that was written: `data.datasets` for a bare name in it."""
        if path not in self.document.unread:  # of those it was said already
            self.document.add(self.document.written(path) or path, message)
        self.document.bad.add(path)

    # secrets ---------------------------------------------------------------------------------------------------------

    def secrets(self, value: Any, path: KeyPath = ()) -> None:
        """Refuse every credential, at any depth, and never show one."""
        if isinstance(value, dict):
            for key in [key for key in value if is_secret(key)]:
                del value[key]
                say = "a token never belongs in a recipe (its value is not shown); set HF_TOKEN or run `hf auth login`"
                self.document.add((*path, key), say)
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            self.secrets(child, (*path, key))

    # unknown keys ----------------------------------------------------------------------------------------------------

    def unknown_keys(self, value: Any, model: type[BaseModel], path: KeyPath = ()) -> None:
        """Take out the keys that are no field of a section, and say what they are called here."""
        if not isinstance(value, dict):
            return
        legal = section_keys(model)
        more = legal_lora_fields() if path == ("adapter",) else {}
        for key in [key for key in value if key not in legal and key not in more]:
            del value[key]
            self.unknown((*path, key), [*legal, *more])
        for key, child in value.items():
            section = section_of(model.model_fields[key].annotation) if key in model.model_fields else None
            if section is not None:
                entries = enumerate(child) if isinstance(child, list) else [(None, child)]
                for index, entry in entries:
                    self.unknown_keys(entry, section, (*path, key) if index is None else (*path, key, index))

    def unknown(self, path: KeyPath, legal: Iterable[str]) -> None:
        section, key = path[:-1], str(path[-1])
        if not self.strict and section in {("train",), ("adapter",)}:
            return
        homes = TRAIN_HOMES if section == ("train",) else ADAPTER_HOMES if section == ("adapter",) else {}
        elsewhere = leaves(Recipe).get(key, [])
        if key in homes:
            say, targets = f"has another home; {homes[key]}", re.findall(r"\b[a-z_]+(?:\.\w+)+", homes[key])
        elif key in ALIASES:
            target, note = ALIASES[key]
            say = f"unknown key; here it is called {target}" + (f" ({note})" if note else "") if target else note
            say, targets = (say, [target]) if target else (f"unknown key; {say}", [])
        elif elsewhere:
            say, targets = f"has another place; write it as {' or '.join(elsewhere)}", elsewhere
        elif "." in key:
            nested = key.replace(".", ": {") + ": …" + "}" * key.count(".")
            say, targets = f"a dotted key is for overrides; in a file write {nested}", [key]
        elif key in TRAIN_HOMES:
            say, targets = f"unknown key; {TRAIN_HOMES[key]}", []
        else:
            near = nearest(key, legal, cutoff=0.75, prefix=dotted((*section, "")))
            if not near and (alias := closest(key, ALIASES, cutoff=0.85)) and ALIASES[alias][0]:
                near = f"; did you mean {ALIASES[alias][0]}?"
            if not near and (leaf := closest(key, leaves(Recipe), cutoff=0.75)):
                near = f"; did you mean {' or '.join(leaves(Recipe)[leaf])}?"
            near = near or nearest(key, legal, prefix=dotted((*section, "")))
            names = list(legal)
            upstream = "peft.LoraConfig" if section == ("adapter",) else "trl.SFTConfig"
            listed = f"; expected one of {', '.join(names)}" if len(names) < 15 else f"; {upstream} has no such field"
            say, targets = f"unknown key{near or listed}", re.findall(r"[a-z_]+(?:\.\w+)+", near)
        self.document.add(path, say)
        for target in targets:
            self.document.bad.add(tuple(int(part) if part.isdecimal() else part for part in target.split(".")))

    # fields of SFTConfig and LoraConfig ------------------------------------------------------------------------------

    def fields(self, section: str, legal: Mapping[str, dict[str, Any]], *, own: Iterable[str] = ()) -> None:
        """Check `train:`, or what `adapter:` holds of PEFT's, against the shipped list of fields."""
        values = self.values[section]
        if not isinstance(values, dict):
            return
        for key in [key for key in values if key not in own]:
            if key not in legal:
                del values[key]
                self.unknown((section, key), legal)
                continue
            wrong = field_problem(f"{section}.{key}", legal[key], values[key])
            if wrong:
                if self.strict:
                    self.problem((section, key), wrong)
                del values[key]

    # names, files, addresses -----------------------------------------------------------------------------------------

    def references(self) -> None:
        """Check what names something outside the recipe: data sets, formats, templates, local files."""
        from instructft.data.formats import FORMATS
        from instructft.data.sources import SOURCES
        from instructft.prompt.templates import TEMPLATES

        data, model, hub = self.values["data"], self.values["model"], self.values["hub"]
        judged = self.values["evaluation"]
        for key in ("datasets", "validation", "test"):
            entries = data.get(key) if isinstance(data, dict) else None
            for index, entry in enumerate(entries if isinstance(entries, list) else []):
                if isinstance(entry, dict):
                    self.dataset(entry, ("data", key, index), SOURCES, FORMATS)
        if isinstance(data, dict):
            if str(data.get("template")).endswith(".jinja"):
                self.local_file(data, ("data", "template"))
            else:
                self.word(data, ("data", "template"), ("auto", *TEMPLATES, "tokenizer"), "a .jinja file")
            if isinstance(data.get("exclude"), str):
                self.local_file(data, ("data", "exclude"))
        if isinstance(model, dict):
            for key in ("name_or_path", "tokenizer"):
                if isinstance(model.get(key), str) and model[key].startswith((".", "~", "/")):
                    self.local_file(model, ("model", key))
            if not re.search("[/|]", str(model.get("attn_implementation"))):
                self.word(model, ("model", "attn_implementation"), _ATTENTION, "a kernel on the Hub")
            self.inside_repo(model, ("model", "subfolder"))
        if isinstance(hub, dict):
            self.inside_repo(hub, ("hub", "path_in_repo"))
            self.hub_id(hub, ("hub", "repo_id"))
        if isinstance(judged, dict) and isinstance(judged.get("metrics"), list):
            for index, entry in enumerate(judged["metrics"]):
                if isinstance(entry, str) and entry not in ANSWER_FIGURES and self.strict:
                    self.metric(judged["metrics"], ("evaluation", "metrics", index))

    def metric(self, entries: list[Any], path: KeyPath) -> None:
        """A figure of ours, or `FILE.py:FUNCTION`, which gets where the file is.

        A recipe may come from a stranger, and a metric is code: a file is run where it was typed on the command line,
        or lies beside or below the recipe, links followed. Any other one wants the flag.
        """
        written = entries[int(path[-1])]
        name, colon, function = written.rpartition(":")
        if not colon or not name.endswith(".py") or not function.isidentifier():
            near = nearest(written, ANSWER_FIGURES)
            listed = f"; expected one of {', '.join(ANSWER_FIGURES)}, or FILE.py:FUNCTION"
            self.problem(path, f'"{written}" is unknown{near or listed}')
            return
        file, typed = Path(name).expanduser(), self.document.place(path).startswith("override")
        here = [file, self.folder / file] if typed else [self.folder / file, file]
        found = next((place for place in here if place.is_file()), None)
        if found is None:
            near = nearest(file.name, [place.name for place in _siblings(file, self.folder)], cutoff=0.75)
            self.problem(path, f'there is no "{name}" (looked in {Path.cwd()} and beside the recipe){near}')
        elif not (typed or remote_code.allowed() or found.resolve().is_relative_to(self.folder.resolve())):
            say = f"{found.resolve()} is code, and lies outside of the recipe's folder, so that it is not run unasked"
            self.problem(path, f"{say}; read it, then put it beside the recipe, or add {remote_code.FLAG}")
        else:
            entries[int(path[-1])] = f"{found}:{function}"

    def word(self, values: dict[str, Any], path: KeyPath, names: Sequence[str], more: str) -> None:
        """A value is one of some names; `more` says what else may stand there."""
        value = values.get(str(path[-1]))
        if isinstance(value, str) and value and value not in names:
            hint = VALUE_HINTS.get((dotted(path), value))
            if path == ("data", "template") and not hint and not closest(value, names) and MODELS_OWN.match(value):
                hint = "the template that a model brings is written tokenizer, or auto, which takes it too"
            near = f"; {hint}" if hint else nearest(value, names)
            listed = f"; expected {', '.join(names)} or {more}"
            self.problem(path, f'"{value}" is unknown{near or listed}')
            del values[str(path[-1])]

    def dataset(
        self, entry: dict[str, Any], path: KeyPath, sources: Mapping[str, Any], formats: Mapping[str, Any]
    ) -> None:
        name, form, url = entry.get("name"), entry.get("format"), entry.get("url")
        if isinstance(name, str) and name not in sources:
            if name.endswith(SUFFIXES):
                near = f"; a file is written {{{'url' if '://' in name else 'path'}: {name}}}"
            else:
                near = nearest(name, sources)
                near = near or (f"; a data set on the Hub is written {{hub: {name}}}" if "/" in name else "")
            self.problem((*path, "name"), f'"{name}" is unknown{near or "; expected one of " + ", ".join(sources)}')
        if isinstance(form, str) and form not in formats:
            near = nearest(form, formats) or f"; expected one of {', '.join(formats)}, or nothing: it is detected"
            self.problem((*path, "format"), f'"{form}" is unknown{near}')
            del entry["format"]
        if isinstance(url, str) and not re.match(r"https?://[^/@\s]+/\S*$", url):
            if "@" in url:
                say = "holds a password (its value is not shown); download the file and write {path: FILE}"
            else:
                say = f"found {show(url)}, expected the http(s) address of a file"
            self.problem((*path, "url"), say)
        self.hub_id(entry, (*path, "hub"))
        if isinstance(entry.get("path"), str):
            self.data_file(entry, (*path, "path"))

    def local_file(self, values: dict[str, Any], path: KeyPath) -> Path | None:
        """A file must be there, seen from the current directory or from the recipe; `values` gets where it is."""
        key = str(path[-1])
        written = Path(values[key]).expanduser()
        if not self.strict:
            return None
        found = next((file for file in (written, self.folder / written) if file.exists()), None)
        if found is None:
            beside = f" (looked in {Path.cwd()} and beside the recipe)" if not written.is_absolute() else ""
            near = nearest(written.name, [file.name for file in _siblings(written, self.folder)], cutoff=0.75)
            self.problem(path, f'there is no "{values[key]}"{beside}{near}')
        elif found != written or values[key].startswith("~"):
            values[key] = str(found)
        return found

    def data_file(self, values: dict[str, Any], path: KeyPath) -> None:
        """A file of rows, a folder, or where nothing is called that a pattern that some file fits."""
        written = values["path"]
        if self.strict and (pattern := as_pattern(written, self.folder)):
            values["path"] = pattern
            return
        found = self.local_file(values, path)
        if found and found.is_file() and suffix_of(found.name) not in SUFFIXES:
            self.problem(path, not_known(written))

    def inside_repo(self, values: dict[str, Any], path: KeyPath) -> None:
        value = values.get(str(path[-1]))
        if isinstance(value, str) and not stays_inside(value):
            self.problem(path, f'found "{value}", expected a folder inside the repo, such as instruct/')
            del values[str(path[-1])]

    def hub_id(self, values: dict[str, Any], path: KeyPath) -> None:
        value = values.get(str(path[-1]))
        if isinstance(value, str) and not is_hub_id(value):
            self.problem(path, f'found "{value}", expected a name on the Hub, such as org/name')

    # types and bounds ------------------------------------------------------------------------------------------------

    def build(self) -> Recipe:
        """Build the Recipe; what does not fit is reported, taken out, and the rest tried again."""
        adapter = self.values["adapter"]
        if isinstance(adapter, dict):
            extra = [key for key in adapter if key in legal_lora_fields() and key not in _OWN_ADAPTER]
            adapter["more"] = {key: adapter.pop(key) for key in extra}
        for _ in range(10):
            try:
                return Recipe.model_validate(freeze(self.values))
            except ValidationError as error:
                paths = {self.existing(problem["loc"]): problem for problem in error.errors(include_url=False)}
            for path, problem in paths.items():
                if any(other[: len(path)] == path for other in paths if other != path):
                    continue  # pydantic calls a list too short whose only entry is wrong
                if problem["type"] != "missing":
                    self.problem(path, wrong_value(dotted(path), _get(self.values, path), Recipe, path))
                elif not self.document.is_bad(path):  # else a wrong key stands for it
                    self.document.add(path, f"missing; expected {describe(Recipe, path)}")
            for path in paths:
                self.take_out(path)
        raise RecipeError(str(self.folder), self.document.lines())  # not reached: each round takes out what failed

    def existing(self, loc: tuple[Any, ...]) -> KeyPath:
        """A path in the recipe: pydantic's location without the branches of a union that it ends in."""
        value: Any = self.values
        for at, part in enumerate(loc):
            if isinstance(value, dict) and (part in value or (at == len(loc) - 1 and loc[0] == "data")):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return loc[:at]
        return loc

    def take_out(self, path: KeyPath) -> None:
        """Remove a value, so that its default takes its place; a data set gives way to a harmless one."""
        parent = _get(self.values, path[:-1])  # None if it was taken out itself
        if len(path) in (2, 3) and path[0] == "data" and path[1] in ("datasets", "validation", "test"):
            harmless = {"name": "quickstart"}
            parent[path[-1]] = harmless if len(path) == 3 else [harmless]
        elif isinstance(parent, list):
            self.take_out(path[:-1])
        elif path == ("data",):
            parent["data"] = {"datasets": [{"name": "quickstart"}]}
        elif isinstance(parent, dict):
            parent.pop(path[-1], None)


def check(document: Document, folder: Path, *, strict: bool) -> Recipe:
    """Check a document whose short forms are written out; problems go into it, and what is sound comes back.

    Args:
        folder: the recipe's, in which relative paths are looked up too.
        strict: False for the recipe of a finished run, whose fields and files may be gone by now.
    """
    walk = _Check(document, folder, strict)
    walk.secrets(walk.values)
    walk.unknown_keys(walk.values, Recipe)
    walk.fields("train", legal_train_fields())
    walk.fields("adapter", legal_lora_fields(), own=_OWN_ADAPTER)
    walk.references()
    return walk.build()


def _get(value: Any, path: KeyPath) -> Any:
    for part in path:
        if isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _siblings(written: Path, folder: Path) -> Iterator[Path]:
    for place in (written.parent, folder / written.parent):
        if place.is_dir():
            yield from sorted(place.iterdir())[:1000]
