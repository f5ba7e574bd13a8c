"""Every language model of transformers through all that a run does, each figure held against plain transformers.

    python benchmarks/families.py                      # all of them; what has a line in the results is not asked again
    python benchmarks/families.py llama qwen3_moe      # these, anew
    python benchmarks/families.py --table              # the table in docs/models.md, from the results

A family has a process of its own with a limit of time, and a line in the results; `family_cells.py` has what is asked.
The exit code is 1 where a cell is wrong or a crash: what is refused with a true reason is no fault.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from family_cells import COLUMNS, of_family
from tiny_families import FAMILIES, OTHERS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
LIMIT = 400  # seconds of a family
REFUSED = "refused: "

# model_type -> what people know it by: the families that are used first, in the order of the table
KNOWN = {
    "llama": "Llama 2 and 3, SmolLM2, TinyLlama", "qwen2": "Qwen 2 and 2.5", "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen 3 MoE", "qwen3_5_text": "Qwen 3.5, text", "gemma3_text": "Gemma 3, text",
    "gemma4_text": "Gemma 4, text", "mistral": "Mistral 7B", "ministral3": "Ministral 3, text", "mixtral": "Mixtral",
    "phi3": "Phi-3 and Phi-4", "smollm3": "SmolLM3", "olmo2": "OLMo 2", "olmo3": "OLMo 3", "granite": "Granite 3",
    "granitemoehybrid": "Granite 4", "gpt_oss": "gpt-oss", "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3 and R1", "glm4": "GLM-4", "lfm2": "LFM2", "falcon_h1": "Falcon-H1", "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia", "gemma3": "Gemma 3", "gemma3n": "Gemma 3n", "gemma4": "Gemma 4",
    "mistral3": "Mistral Small 3, Ministral 3", "qwen3_5": "Qwen 3.5", "qwen3_5_moe": "Qwen 3.5 MoE",
    "qwen3_vl": "Qwen 3 VL", "qwen2_5_vl": "Qwen 2.5 VL", "llama4": "Llama 4", "mllama": "Llama 3.2 Vision",
}  # fmt: skip
HEADS = {
    "full": "full", "saved": "saved whole", "packed": "packed", "answers": "answers", "lora": "LoRA", "merge": "merged",
    "experts": "experts",
}  # fmt: skip
# What a cell says -> the note below the table; what matches nothing stands there as it was said.
NOTES = (
    (r"see each other", "documents of a pack would see each other, which the probe finds before the first step"),
    (r"the loss does not reach", "what the loss does not reach is named before the first step, and not trained"),
    (r"fused head (and|fails)", "the loss is computed from the model's own logits: its head is more than a product"),
    (r"no loss of a router", "without a loss of its own for the router, which the model fails to compute"),
    (r"one (prompt )?at a time", "prompts are answered one at a time: the model does not pass over padding"),
    (r"all-linear leaves out", "all-linear leaves out layers that PEFT refuses to adapt, and names them"),
    (r"no merge of this kind of adapter", "no merge of adapters over the weights of experts is proved"),
    (r"draws experts", "its router draws experts by chance in training: the loss is compared, the step is not"),
    (r"PEFT would not find", "layers of which PEFT would not find again what is saved get no adapter, and are named"),
    (r"reads both ways", "the model reads both ways, and would learn to copy the answer that it sees"),
    (r"cannot be asked whether", "it fails on a pack"),
    (r"no single tensor in this", "the checkpoint holds them transposed or in parts, and no merge into that is proved"),
    (r"has no experts that are", "its experts are neither layers nor one weight with a part for each: PEFT has no way"),
    (r"pad token in the embeddings", "loading sets the row of the pad token to zero, which ends the texts here"),
    (r"does not load as it was written", "what is merged would not load as it is written"),
    (r"cannot answer", "no answers while it trains"),
    (r"nothing was trained", "nothing was trained"),
    (r"there is no adapter", "there is no adapter"),
)
# --------------------------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------------------------


def _child(family: str, folder: str, results: str, commit: str) -> None:
    """One family in its process; its line goes into the results."""
    quiet = open(Path(folder, "said"), "w")  # noqa: SIM115  (for as long as the process lives)
    os.dup2(quiet.fileno(), 1)
    os.dup2(quiet.fileno(), 2)
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = of_family(family, Path(folder))
    _add(Path(results), found | {"seconds": round(time.perf_counter() - began, 1), "commit": commit})


def _add(results: Path, found: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(found) + "\n")


def read(results: Path) -> dict[str, dict[str, Any]]:
    """family -> its newest line."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {found["family"]: found for found in map(json.loads, lines)}


def sweep(families: list[str], results: Path, limit: int) -> None:
    """Ask each family in a process of its own, forked from this one, which has imported all that is needed."""
    import trl.trainer.sft_trainer  # noqa: F401

    import instructft.merging.merge
    import instructft.training.trainer  # noqa: F401
    from instructft.report import curves, page

    def not_drawn(*_: Any, **__: Any) -> None:
        """Pictures are half of the time of a run of one step."""

    setattr(curves, "plot_loss", not_drawn)  # noqa: B010  (a function of the module, for these processes)
    setattr(page, "draw_report", not_drawn)  # noqa: B010
    commit = commit_here()
    gc.collect()
    gc.freeze()  # each collection in a child would walk through all that was imported here
    context: Any = multiprocessing.get_context("fork")
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            child = context.Process(target=_child, args=(family, folder, str(results), commit))
            child.start()
            child.join(limit)
            if child.is_alive():
                child.kill()
                child.join()
                _add(results, {"family": family, "unbuilt": f"not done in {limit} s", "commit": commit})
            elif child.exitcode:
                last = Path(folder, "said").read_text().strip().splitlines()[-1:]
                _add(results, {"family": family, "unbuilt": f"its process ended with {child.exitcode}: {last}"})
        print(in_words(read(results)[family]), flush=True)


def commit_here() -> str:
    """The commit that is asked, with a + where files differ from it; "" outside of a checkout."""
    asked = ("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no")
    try:
        commit, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def in_words(found: dict[str, Any]) -> str:
    """One family in one line."""
    if "unbuilt" in found:
        return f"{found['family']:24s} not built: {found['unbuilt'][:150]}"
    cells = [f"{name} {found[name]['verdict']}" for name in COLUMNS]
    faults = [f"\n    {c}: {found[c]['text'][:260]}" for c in COLUMNS if found[c]["verdict"] not in ("right", "none")]
    return f"{found['family']:24s} {' · '.join(cells)} · {found.get('seconds', 0)} s{''.join(faults)}"


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


class Notes:
    """What cells say beyond right and refused, each said once below the table."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def mark(self, cell: dict[str, Any], kind: str) -> str:
        """One cell: a tick or a word, with the numbers of its notes."""
        text = re.sub(r"/\S+/", "", cell["text"]).replace(kind, "the model")
        found = [note for pattern, note in NOTES if re.search(pattern, text)]
        if not found and text:
            found = [text]
        for note in found:
            if note not in self.said:
                self.said.append(note)
        word = {"right": "✓", "none": "—"}.get(cell["verdict"], cell["verdict"])
        share = f" {cell['share']:.0%}" if "share" in cell else ""
        numbers = ", ".join(str(self.said.index(note) + 1) for note in found)
        return word + share + (f" ({numbers})" if numbers else "")


def table(results: dict[str, dict[str, Any]]) -> str:
    """All families as Markdown: those that are used first, the others, and those that were not asked."""
    notes = Notes()
    head = "| " + " | ".join(HEADS.values()) + " |\n"
    rule = "| --- |" + " :-: |" * len(HEADS) + "\n"
    built = {family: found for family, found in results.items() if "unbuilt" not in found}

    def rows(families: list[str]) -> str:
        made = []
        for family in families:
            found = built[family]
            name = f"`{family}`" + (f", {KNOWN[family]}" if family in KNOWN else "")
            cells = (notes.mark(found[column], found["class"]) for column in HEADS)
            made.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(made)

    seeing = [family for family in (*KNOWN, *sorted(built.keys() - KNOWN.keys())) if built.get(family, {}).get("sees")]
    text = built.keys() - {*seeing}
    first = "| models people use first " + head + rule + rows([family for family in KNOWN if family in text])
    others = "| all others " + head + rule + rows(sorted(text - KNOWN.keys()))
    towers = "| models that see or hear, on text " + head + rule + rows(seeing)
    said = "\n".join(f"{i}. {note}" for i, note in enumerate(notes.said, 1))
    unbuilt = {family: found["unbuilt"] for family, found in sorted(results.items()) if "unbuilt" in found}
    no = {family: text for family, text in unbuilt.items() if text.startswith(REFUSED)}
    refused = "\n".join(
        f"- `{f}`: {text.rpartition('to answer: ')[2].partition('. Take')[0]}" for f, text in no.items()
    )
    left = "\n".join(f"- `{family}`: {text.partition('. ')[0]}" for family, text in unbuilt.items() if family not in no)
    cells = [found[column]["verdict"] for found in built.values() for column in HEADS]
    counts = ", ".join(f"{cells.count(v)} {v}" for v in ("right", "refused", "wrong", "crash"))
    there = len(cells) - cells.count("none")
    commits = sorted({found.get("commit", "") for found in results.values()})
    of = f" All rows are of commit {commits[0]}." if len(commits) == 1 and commits[0] else ""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft")
    )
    return (
        f"{len(results)} families, of which {len(built)} are asked below, {len(no)} are refused by their config, and "
        f"{len(unbuilt) - len(no)} could not be asked; on a CPU in float32 with {versions}. Of {there} cells: {counts}."
        f"{of}\n\n"
        f"{first}\n\n{towers}\n\n{others}\n\nNotes:\n\n{said}\n\n"
        f"Refused by their config, since they cannot be trained to answer:\n\n{refused}\n\n"
        f"Not asked, since no tiny model of them is built here:\n\n{left}\n"
        f"- {len(OTHERS)} more that see or hear: {', '.join(f'`{family}`' for family in OTHERS)}"
    )


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """Fill the block of docs/models.md."""
    block = f"<!-- families: by benchmarks/families.py -->\n\n{table(results)}\n\n<!-- end -->"
    pattern = r"<!-- families: by benchmarks/families\.py -->.*?<!-- end -->"
    PAGE.write_text(re.sub(pattern, lambda _: block, PAGE.read_text(encoding="utf-8"), flags=re.S), encoding="utf-8")


def main() -> None:
    """Ask the families that are named, or all that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--results", type=Path, default=ROOT / ".cache" / "families.jsonl")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of a family")
    parser.add_argument("--table", action="store_true", help="ask nothing, write the table in docs/models.md")
    args = parser.parse_args()
    if unknown := set(args.families) - set(FAMILIES):
        sys.exit(f"no causal architecture of the transformers that is installed: {', '.join(sorted(unknown))}")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.results)
    if args.table:
        write_page(done)
        return
    warnings.filterwarnings("ignore")
    families = args.families or [family for family in (*KNOWN, *sorted({*FAMILIES} - {*KNOWN})) if family not in done]
    sweep(families, args.results, args.limit)
    found = read(args.results)
    faults = [f for f in args.families or FAMILIES if any(faulty(found[f].get(column)) for column in COLUMNS)]
    if faults:
        sys.exit(f"wrong or crashed: {', '.join(faults)}")


def faulty(cell: dict[str, Any] | None) -> bool:
    """Whether a cell is neither right nor refused, and what it asks of is there."""
    return cell is not None and cell["verdict"] not in ("right", "refused", "none")


if __name__ == "__main__":
    main()
