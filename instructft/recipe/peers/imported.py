"""`instructft import CONFIG`: a configuration of axolotl, LLaMA-Factory or TRL as a recipe, with an account of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from instructft.errors import RecipeError, UsageError
from instructft.formatting import first_line, short
from instructft.recipe.commented import commented, flow
from instructft.recipe.peers import axolotl, llamafactory, trl
from instructft.recipe.peers.peer import Config, boolean
from instructft.recipe.yaml_reader import read_document

PEERS: tuple[ModuleType, ...] = (axolotl, llamafactory, trl)
_PROBLEM = re.compile(r"^(?:line \d+[^:]*: )?([\w.]+): (.*)", re.DOTALL)


@dataclass
class Imported:
    """What became of a configuration.

    Args:
        tool: whose it is.
        values: what it says.
        signs: keys by which that was told.
        text: the recipe.
        taken: keys of the file that have a place in it.
        problems: why the recipe does not load as it stands: files that are not here, as a rule.
    """

    tool: str
    values: dict[str, Any]
    signs: list[str]
    text: str
    taken: int
    config: Config
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The account, for people."""
        config = self.config
        found = [f"{self.tool}'s configuration, by its keys {', '.join(self.signs[:4])}"]
        found.append(f"{self.taken} keys have a place, {len(config.lost)} have no counterpart")
        sections = (
            ("no counterpart", [f"{key}: {short(flow(value), 60)}\n    {why}" for key, value, why in config.lost]),
            ("means something else here", config.differs),
            ("so here anyway", [f"{key}: {why}" for key, why in config.same]),
            ("without a value there", [", ".join(config.empty)] if config.empty else []),
            ("does not load yet", self.problems),
        )
        for title, lines in sections:
            if lines:
                found += ["", f"{title}:", *(f"  {line}" for line in lines)]
        return found

    def write(self, target: Path) -> list[Path]:
        """Write the recipe, and beside it the files that it needs; none of them may be there."""
        files = {target: self.text, **{target.parent / name: text for name, text in self.config.files.items()}}
        if there := next((path for path in files if path.exists()), None):
            raise UsageError(f"{there} exists already; name another file, in another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return list(files)


def kind_of(values: dict[str, Any], source: str) -> tuple[ModuleType, list[str]]:
    """Whose configuration it is, and the keys that say so.

    >>> kind_of({"base_model": "gpt2", "micro_batch_size": 2}, "x.yml")[0].NAME
    'axolotl'

    Raises:
        UsageError: nobody's that is known.
    """
    found = {peer: [sign for sign in (*peer.NEEDS, *peer.SIGNS) if sign in values] for peer in PEERS}
    best = max(PEERS, key=lambda peer: len(found[peer]))
    if not found[best] or all(need not in values for need in best.NEEDS):
        if "model" in values and "data" in values:
            raise UsageError(f"{source}: this is a recipe already; instructft train {source}")
        known = "; ".join(f"{peer.NAME}: {', '.join((*peer.NEEDS, *peer.SIGNS[:3]))}" for peer in PEERS)
        raise UsageError(f"{source}: found keys of no tool that is known ({known})")
    return best, list(dict.fromkeys(found[best]))


def read(source: Path, name: str) -> Imported:
    """Read a configuration, and make a recipe of it that would be called `name`.

    Raises:
        UsageError: the file cannot be read, is nobody's, or asks for what is no supervised fine-tuning.
    """
    if not source.is_file():
        raise UsageError(f"there is no file {source}")
    document = read_document(source)
    if not isinstance(document.values, dict) or document.problems:
        raise RecipeError(str(source), document.lines() or ["expected keys such as base_model or model_name_or_path"])
    values = {key: boolean(value) for key, value in document.values.items()}
    peer, signs = kind_of(values, str(source))
    config = Config(dict(values), source.parent)
    try:
        peer.translate(config)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # a list where a text is taken, and the like
        raise UsageError(
            f"{source}: a value is of another kind than {peer.NAME} takes there: {first_line(error)}"
        ) from error
    config.rest(peer.NAME, peer.NONE, peer.FAMILIES)
    order = ("model", "data", "adapter", "train", "hub", "output_dir")
    config.draft.values = {key: config.draft.values[key] for key in order if key in config.draft.values}
    problems = _until_it_loads(config, name)
    gone = {key for key, _, _ in config.lost} | {key for key, _ in config.same} | set(config.empty)
    taken = sum(1 for key in values if key not in gone)
    text = commented(config.draft.values, config.draft.reasons, _head(peer.NAME, source, name, config))
    return Imported(peer.NAME, values, signs, text, taken, config, problems)


def _until_it_loads(config: Config, name: str) -> list[str]:
    """Take out what a recipe refuses, which then has no counterpart; returns what cannot be taken out."""
    for _ in range(5):
        try:
            config.draft.recipe(name)
        except RecipeError as error:
            kept, moved = [], False
            for problem in error.problems:
                match = _PROBLEM.match(problem)
                path = match.group(1) if match else ""
                if match and path.split(".")[0] in ("train", "adapter", "hub") and path in config.origin:
                    section, key = path.split(".", 1)
                    value = config.draft.values[section].pop(key)
                    config.lost.append((config.origin[path] or path, value, match.group(2)))
                    moved = True
                elif not any(file in problem for file in config.files):  # is written beside the recipe
                    kept.append(problem)
            if not moved:
                return kept
        else:
            return []
    return []


def _head(tool: str, source: Path, name: str, config: Config) -> list[str]:
    launch = f"instructft launch {name}.yaml --strategy {config.strategy}" if config.strategy else ""
    lines = [f"From {tool}'s {source.name}: beside each key is what stood there.", ""]
    lines.append(f"Launch:    {launch or f'instructft train {name}.yaml'}")
    if config.strategy:
        lines.append(f"           the other file divides the model among processes; {config.strategy} does so here")
    for title, found in (
        ("No counterpart:", [f"{key}: {short(flow(value), 40)} ({why})" for key, value, why in config.lost]),
        ("Means something else here:", config.differs),
    ):
        if found:
            lines += ["", title, *(f"- {line}" for line in found)]
    return lines
