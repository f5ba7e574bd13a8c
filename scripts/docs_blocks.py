"""Fills the parts of README.md and docs/ that the code decides, each between two comments that name it.

    python scripts/docs_blocks.py            # fills them
    python scripts/docs_blocks.py --check    # exit 1 if a page is out of date

Layers come from tests/project/test_layers.py, modules from the first line of their docstrings. The questions below name
what to look for, not where it is: the file is found by the definition, so that no move makes an answer wrong.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "instructft"

# What each folder is for: the one place that says it.
FOLDERS = {
    "prompt": "a conversation to text, ids and loss mask; one renderer for training and inference",
    "data": "data sets to rows, packs and batches",
    "weights": "weight files on disk and on the Hub",
    "recipe": "YAML to a frozen Recipe, without torch",
    "adapters": "LoRA and QLoRA",
    "models": "tokenizer and model, ready to train or to answer",
    "checkpoints": "checkpoints: sealed, verified, resumed from",
    "report": "what a run leaves for readers: curves, report page, model card",
    "hub": "push to the Hub, and resume from it",
    "inference": "generate, chat, the chat page",
    "training": "SFTTrainer, a run from top to bottom; launch/: several processes and machines",
    "merging": "an adapter into its base, proved",
    "evaluation": "metrics with intervals, two models side by side",
    "check": "what can be known before a GPU is spent",
    "commands": "what the command line takes, a module for each group of commands",
    "extras": "what fine-tuning does not need: converting, servers, other tools' benchmarks",
}
# Question -> answer. {NAME} is the file that defines NAME; {NAME!test} is the test that mirrors it; {folder/} a folder.
QUESTIONS = {
    "Where is it decided which tokens carry loss?": "{encode_conversation}",
    "What do I edit to add a data set, and which test goes with it?": "`SOURCES` in {SOURCES}; {SOURCES!test}",
    "Where are all the legal recipe keys, and what happens to an unknown one?": (
        "{DataSection}; {_ATTENTION} turns it into an error that names the right key"
    ),
    "What does packing change?": "{best_fit}; in words: [Packing](packing.md)",
    "Where does QLoRA differ from LoRA?": "{trouble_with}; all else is {adapters/}",
    "Which module merges an adapter, and how is the result proved?": "{merge_adapter}; {measure_quantized}",
    "What is inside a run folder, and who reads it?": (
        "[The run folder](run-folder.md); {collect_facts} and {make_folder} write it, {load_for_inference} reads it"
    ),
    "How do I see one training row with its mask?": "`instructft inspect RECIPE`: {inspect_rows}, {RowView}",
    "Which order do rows have, and what decides it?": "{LengthGrouped} within a run, {prepare_dataset} before it",
    "What writes `metrics.jsonl`?": "{MetricsFile}",
    "What happens when a loss is NaN?": "{StepChecks} stops the run before the optimizer takes the step",
    "What happens at SIGTERM?": "{EvaluationLeft}: one signal finishes and saves the step, two stop now",
    "How does a run resume from the Hub?": "{newest_on_hub}",
}


@functools.cache
def layers() -> tuple[tuple[str, ...], ...]:
    """The layers from the bottom up, as the test that holds them has them."""
    tree = ast.parse((ROOT / "tests" / "project" / "test_layers.py").read_text(encoding="utf-8"))
    (found,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    ]
    return found


@functools.cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def definitions() -> dict[str, list[Path]]:
    """Name -> the modules that define it at their top level."""
    found: dict[str, list[Path]] = {}
    for path, tree in modules().items():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                found.setdefault(name, []).append(path)
    return found


def place(asked: str) -> str:
    """Where a name is defined, as a path in backticks.

    >>> place("prompt/")
    '`instructft/prompt/`'
    """
    if asked.endswith("/"):
        return f"`instructft/{asked}`"
    name, _, test = asked.partition("!")
    paths = definitions().get(name, [])
    if len(paths) != 1:
        sys.exit(f"QUESTIONS: {len(paths)} modules define {name}; expected one: name what answers the question today")
    path = paths[0].relative_to(ROOT)
    if test:
        path = Path("tests", *path.parts[1:-1], f"test_{path.name}")
    return f"`{path.as_posix()}`"


def said(tree: ast.Module) -> str:
    """The first line of a docstring, fit for a table."""
    return (ast.get_docstring(tree) or "").splitlines()[0].removesuffix(":").replace("|", "\\|").replace("<", "&lt;")


def folders() -> str:
    """The tree of the README: folders only."""
    names = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    if names != set(FOLDERS):
        sys.exit(f"FOLDERS: {sorted(names ^ set(FOLDERS))} stand on one side only")
    lines = [f"  {name + '/':14}{words}" for name, words in FOLDERS.items()]
    around = {
        "recipes/": "ready recipes; accelerate/ and cluster/ for several GPUs and machines",
        "docs/": "the documentation; `make docs` builds a site of it",
        "tests/": "mirrors instructft/: the test of data/packing.py is data/test_packing.py",
        "benchmarks/": "a script a figure, ours and the peer's side by side; RESULTS.md keeps the figures",
        "scripts/": "sets up .venv, writes what is generated",
    }
    missing = [name for name in around if not (ROOT / name).is_dir()]
    assert not missing, missing
    outer = [f"{name:16}{words}" for name, words in around.items()]
    return "\n".join(["```text", "instructft/     the package, from the bottom up", *lines, *outer, "```"])


def layer_lines() -> str:
    """The layers, each in a line, the top first."""
    lines = []
    for height, names in reversed(list(enumerate(layers(), 1))):
        kinds = [name + ("/" if name in FOLDERS else ".py") for name in names]
        lines.append(f"{height:>2}  {' · '.join(kinds)}")
    return "\n".join(["```text", *lines, "```"])


def module_tables() -> str:
    """Every module with what it is for, folder by folder."""
    parts = []
    for name, words in {"": "What all of it uses, and the command line", **FOLDERS}.items():
        folder = PACKAGE / name
        rows = [
            f"| `{path.relative_to(folder).as_posix()}` | {said(tree)} |"
            for path, tree in modules().items()
            if (path.parent == folder if not name else folder in path.parents)
        ]
        heading = f"### {name}/" if name else "### At the top"
        sentence = words[0].upper() + words[1:] + "."
        parts += [heading, "", sentence, "", "| module | what it is for |", "| --- | --- |", *rows, ""]
    return "\n".join(parts).rstrip()


def question_table() -> str:
    rows = [
        f"| {question} | {re.sub(r'{([^}]+)}', lambda match: place(match[1]), answer)} |"
        for question, answer in QUESTIONS.items()
    ]
    return "\n".join(["| question | look in |", "| --- | --- |", *rows])


def error_tree() -> str:
    """The drawing in `errors.py`."""
    drawn = (ast.get_docstring(modules()[PACKAGE / "errors.py"]) or "").split("::\n\n")[1].split("\n\n")[0]
    return "\n".join(["```text", *(line.removeprefix("    ") for line in drawn.splitlines()), "```"])


def mask_drawing() -> str:
    """The drawing of the module that decides the mask."""
    (path,) = definitions()["encode_conversation"]
    drawn = [
        line.strip()
        for line in (ast.get_docstring(modules()[path]) or "").splitlines()
        if "turn 2" in line or "<eos>###" in line
    ]
    return "\n".join(["```text", *drawn, "```"])


def branches_drawing() -> str:
    """The drawing of a folded row, and who sees whom in it."""
    from instructft.data.batches.branches import last_readers

    (path,) = definitions()["last_readers"]
    drawn = (ast.get_docstring(modules()[path]) or "").split("::\n\n")[1].split("\n\n")[0].splitlines()
    rows = {line[:16].strip(): line[16:].split() for line in drawn}
    tokens, starts = rows["input_ids"], [0, 2]
    lengths = [int(n) for n in rows["seq_lengths"]]
    last = last_readers(lengths, starts, len(tokens))
    head = "                  " + " ".join(tokens)
    lines = [
        f"slot {q} ({token}) sees    " + " ".join("■" if k <= q <= last[k] else "·" for k in range(len(tokens)))
        for q, token in enumerate(tokens)
    ]
    return "\n".join(["```text", *(line.removeprefix("    ") for line in drawn), "", head, *lines, "```"])


BLOCKS: dict[str, Callable[[], str]] = {
    "folders": folders,
    "layers": layer_lines,
    "modules": module_tables,
    "questions": question_table,
    "errors": error_tree,
    "mask": mask_drawing,
    "branches": branches_drawing,
}


def fill(text: str, page: str) -> str:
    """The page with its blocks as the code says them now."""

    def block(match: re.Match[str]) -> str:
        if match[1] not in BLOCKS:
            sys.exit(f"{page}: no block is called {match[1]}; there are {', '.join(BLOCKS)}")
        return f"<!-- {match[1]}: by scripts/docs_blocks.py -->\n\n{BLOCKS[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+): by scripts/docs_blocks\.py -->.*?<!-- end -->", block, text, flags=re.S)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    stale = []
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = fill(before, path.name)
        if after != before:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run python scripts/docs_blocks.py")


if __name__ == "__main__":
    main()
