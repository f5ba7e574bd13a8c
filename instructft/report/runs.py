"""`instructft runs`: the runs of a folder in one table, read from what each has left; without torch.

A run that is damaged, was stopped or is under way is a row like any other, and its state says what is the matter.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.lock import holder
from instructft.checkpoints.manifest import folders, kind, step_of
from instructft.checkpoints.run_folder import LOCK, is_run
from instructft.errors import UsageError
from instructft.formatting import FORMS, closest, first_line, name_of, nearest, plain_table
from instructft.redaction import bare_url, last_name
from instructft.report.card_results import read_evaluation, read_gate
from instructft.report.logs import last_records

if TYPE_CHECKING:
    from rich.console import Console

DEPTH = 3  # folders below the one that is asked for: runs/project/run is found
_KEYS = ("name", "model", "data", "rows", "steps", "loss", "eval_loss", "warnings", "when", "state")
_FIGURES = ("exact_match", "rougeL", "bleu")  # of an evaluation, where there is room for few
# Of what a run logs of its validation: no figures of how good it is.
_NO_FIGURES = re.compile(
    r"eval_(loss|perplexity|entropy|mean_token_accuracy|num_tokens|runtime|.*_per_second|.*_(low|high))"
)


@dataclass(frozen=True)
class Run:
    """A run as its files tell of it; None where they do not.

    Args:
        folder: as it was asked for, with the way to it.
        rows: of training.
        loss, eval_loss: the last ones.
        start_loss: before the first step.
        figures: of the last evaluation, of answers while it trained, and 1 or 0 for the gate.
        warnings: how many were told.
        when: seconds since the epoch when it ended, or last wrote.
        state: `finished`, `running (123 on host)`, `stopped at step 40`, `broken: …`.
    """

    folder: str
    name: str
    state: str
    model: str | None = None
    data: str | None = None
    rows: int | None = None
    steps: int | None = None
    start_loss: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    warnings: int = 0
    when: float | None = None


def find_runs(folder: Path) -> list[Run]:
    """The runs in a folder and the folders below, or the one that the folder is, the last one first.

    Example::

        [run.name for run in find_runs(Path("runs"))]
        # ['second', 'first']

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        begin = "; `instructft train RECIPE` makes runs/ and a run in it" if folder == Path("runs") else ""
        near = nearest(folder.name, (path.name for path in folder.absolute().parent.glob("*") if path.is_dir()))
        raise UsageError(f"there is no folder {folder}{near or begin}")
    found = [read_run(path, str(path.relative_to(folder))) for path in _run_folders(folder, DEPTH)]
    return sorted(found, key=lambda run: -(run.when or 0))


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    try:
        if is_run(folder) or (folder / "run.json").is_file():
            yield folder
            return
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # of another user
        return
    for path in inner if depth else ():
        if not path.name.startswith("."):
            yield from _run_folders(path, depth - 1)


def read_run(folder: Path, name: str = ".") -> Run:
    """What the files of a run folder say; what cannot be read is said in its state, and hides nothing else."""
    facts, trouble = read_facts(folder)
    model, data = _made_from(folder)
    logged: dict[str, Any] = {}
    for record in last_records(folder / "metrics.jsonl"):
        logged |= record
    metrics = {**logged, **_section(facts, "metrics")}
    files = [folder / name for name in ("run.json", "metrics.jsonl", "instructft.json", "recipe.yaml")]
    written = [path.stat().st_mtime for path in files if path.is_file()]
    warnings = facts.get("warnings")
    told = warnings if isinstance(warnings, list) else last_records(folder / "warnings.jsonl")
    return Run(
        folder=str(folder),
        name=folder.resolve().name if name == "." else name,
        state=_state(folder, facts, trouble, logged.get("step")),
        model=model,
        data=data,
        rows=_whole(_section(_section(facts, "data"), "rows").get("train")),
        steps=_whole(_section(facts, "train").get("steps")) or _whole(logged.get("step")),
        start_loss=_number(metrics.get("start_loss")),
        loss=_number(metrics.get("loss")),
        eval_loss=_number(metrics.get("eval_loss")),
        figures=_figures(folder, metrics),
        warnings=len(told),
        when=written[0] if written else None,
    )


def read_facts(folder: Path) -> tuple[dict[str, Any], str]:
    """The contents of `run.json`, and what is wrong with it; both empty where there is none."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"run.json cannot be read: {first_line(error)}"
    sections = [found.get("train"), found.get("data") or {}] if isinstance(found, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        return {}, "run.json holds no facts of a run"
    return found, ""


def _state(folder: Path, facts: Mapping[str, Any], trouble: str, step: Any) -> str:
    if who := holder(folder / LOCK):
        return f"running (process {who})"
    if trouble:
        return f"broken: {trouble}"
    if facts:
        return "finished"
    if (folder / "unproved").is_dir():
        return "failed after its last step; what was trained is in unproved/"
    sealed = [path for path in folders(folder) if kind(path) == "sealed"]
    if sealed:
        return f"stopped, resumes from step {step_of(sealed[0]):,}"
    return f"stopped at step {step:,}, without a checkpoint" if isinstance(step, int) else "stopped before step 1"


def _made_from(folder: Path) -> tuple[str | None, str | None]:
    """Model and data of a resolved recipe, by the lines that we write it in: parsing all would take seconds."""
    try:
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None, None
    sections = dict(re.findall(r"^(model|data|adapter):\n((?: .*\n|\n)*)", text, re.M))
    keys = dict(re.findall(r"^ +(name_or_path|model_type|subfolder): (.+)$", sections.get("model", ""), re.M))
    adapter = dict(re.findall(r"^  (type|r): (.+)$", sections.get("adapter", ""), re.M))
    start, made = (_plain(keys.get(key, "null")) for key in ("name_or_path", "model_type"))
    model = _told(start) if start != "null" else f"{made}, random" if made != "null" else None
    if model and adapter.get("type") == "lora":
        model += f" + LoRA r={adapter.get('r')}"
    entries = re.search(r"^  datasets:\n((?:  [- ].*\n)*)", sections.get("data", ""), re.M)
    found = re.findall(r"^ +(?:- )?(name|hub|path|url): (.+)$", entries[1], re.M) if entries else []
    sets = [bare_url(_plain(text)) if key == "url" else _told(_plain(text)) for key, text in found]
    sets = [name for name in sets if name != "null"]
    return model, ", ".join(sets) or None


def _told(name: str) -> str:
    """A model or a data set as a table has it: an id of the Hub whole, of a path the last name."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else last_name(name)


def _plain(text: str) -> str:
    """A scalar of YAML without its quotes."""
    text = text.strip()
    return text[1:-1].replace("''", "'") if text[:1] == text[-1:] and text[:1] in ("'", '"') else text


def _figures(folder: Path, metrics: Mapping[str, Any]) -> dict[str, float]:
    evaluated = (read_evaluation(folder) or {}).get("tuned", {})
    figures = {name: evaluated[name] for name in FORMS if name != "loss" and _number(evaluated.get(name)) is not None}
    figures |= {"test_loss": evaluated["loss"]} if _number(evaluated.get("loss")) is not None else {}
    while_training = {
        name.removeprefix("eval_"): value
        for name, value in metrics.items()
        if name.startswith("eval_") and not _NO_FIGURES.fullmatch(name) and _number(value) is not None
    }
    gate = read_gate(folder)
    return {**while_training, **figures, **({"gate": float(gate["passed"])} if gate else {})}


def _section(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    """A number, also one that is not finite: a run that diverged is not one of which nothing is known."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def show_runs(folder: Path, *, as_json: bool = False, sort: str | None = None) -> None:
    """Print the runs of a folder: a table, or with `as_json` a list of objects.

    Args:
        sort: a column or a figure to sort by; `-loss` the other way round. Default: the last one first.

    Raises:
        UsageError: there is no such folder, or nothing of that name to sort by.
    """
    runs = find_runs(folder)
    if sort is not None:
        runs = _sorted(runs, sort)
    if as_json:
        print(json.dumps([strict(asdict(run)) for run in runs], indent=2, ensure_ascii=False))
        return
    if not runs:
        print(f"{folder} holds no run of instructft")
        return
    _print(runs)


def _sorted(runs: Sequence[Run], asked: str) -> list[Run]:
    key = asked.removeprefix("-").replace("-", "_")
    figures = {name for run in runs for name in run.figures}
    if key not in _KEYS and key not in figures:
        names = [*_KEYS, *sorted(figures)]
        near = closest(key, names)
        hint = f'; did you mean "{near}"?' if near else f"; there is {', '.join(names)}"
        raise UsageError(f"--sort: nothing is named {asked}{hint}")
    found = [(run.figures.get(key) if key in figures else getattr(run, key), run) for run in runs]
    known = [(value, run) for value, run in found if value is not None and value == value]
    known.sort(key=lambda pair: pair[0], reverse=asked.startswith("-"))
    return [run for _, run in known] + [run for value, run in found if value is None or value != value]


def strict(value: Any) -> Any:
    """A value as strict JSON has it: what is not a finite number is null."""
    if isinstance(value, Mapping):
        return {key: strict(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(runs: Sequence[Run]) -> None:
    from rich.text import Text

    figures = [name for name in _FIGURES if any(name in run.figures for run in runs)]
    others = sorted({name for run in runs for name in run.figures} - set(FORMS) - {"gate", "test_loss"})
    figures += [name for name in others if name not in figures][:2]
    gate = ["gate"] if any("gate" in run.figures for run in runs) else []
    heads = ["run", "state", "steps", "loss", "eval loss", *map(name_of, figures), *gate, "warnings", "when"]
    heads += ["model", "data", "rows"]
    table = []
    for run in runs:
        shown = [figure(name, run.figures.get(name)) for name in figures]
        verdict = [{1.0: "passed", 0.0: "failed", None: ""}[run.figures.get("gate")]] if gate else []
        line = [run.name, run.state, whole(run.steps), loss(run.loss), loss(run.eval_loss), *shown, *verdict]
        line += [str(run.warnings or ""), when(run.when), run.model or "", run.data or "", whole(run.rows)]
        table.append([printable(cell) for cell in line])
    console = wide_console()
    columns, left_out = _that_fit(heads, table, console.width)
    words = {"run", "state", "model", "data", "when"}
    printed = plain_table(*(heads[i] for i in columns), left=0)
    for i, column in zip(columns, printed.columns, strict=True):
        column.justify = "left" if heads[i] in words else "right"
        column.no_wrap = heads[i] not in ("run", "state")
    for line in table:
        printed.add_row(*(Text(line[i]) for i in columns))
    console.print(printed)
    if left_out:
        print(f"Too narrow for: {', '.join(left_out)}. A wider terminal shows them, and --json.")


def _that_fit(heads: Sequence[str], table: Sequence[Sequence[str]], width: int) -> tuple[list[int], list[str]]:
    """The columns for which there is room, and the names of the others."""
    widths = [max(len(head), *(len(line[i]) for line in table)) + 2 for i, head in enumerate(heads)]
    # a state of many words may go over several lines; no other column may
    widths[1] = min(widths[1], 26)
    widths[0] = min(widths[0], 32)
    empty = {i for i, head in enumerate(heads) if not any(line[i] for line in table)}
    columns = [i for i in range(len(heads)) if i not in empty]
    left_out: list[str] = []
    figures = heads[5:-5]
    for head in ("rows", "data", *reversed(figures[1:]), "model", "when", *figures[:1], "steps", "warnings"):
        if sum(widths[i] for i in columns) <= width:
            break
        if (at := heads.index(head)) in columns:
            columns.remove(at)
            left_out.insert(0, head)
    return columns, left_out


def wide_console() -> Console:
    """A console whose tables keep their lines whole in a file or a pipe, as wide as they are."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def printable(text: str) -> str:
    """A text whose control characters are signs."""
    if text.isprintable():
        return text
    from instructft.prompt.token_view import visible  # which loads numpy

    return visible(text)


def figure(name: str, value: float | None) -> str:
    """A figure as a table has it."""
    if value is None:
        return ""
    return FORMS[name].format(value) if name in FORMS else f"{value:.3f}"


def loss(value: float | None) -> str:
    """A loss as a table has it."""
    if value is None:
        return ""
    return f"{value:.4f}" if math.isfinite(value) else "not a number"


def whole(value: int | None) -> str:
    """A count as a table has it."""
    return "" if value is None else f"{value:,}"


def when(value: float | None) -> str:
    """A moment as a table has it, by the clock of this machine."""
    return "" if value is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
