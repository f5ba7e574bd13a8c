"""Writes docs/hardware.md: what fits on which GPU, by the memory estimate of `instructft check`, and what was measured.

    python scripts/docs_hardware.py              # words, and the figures of benchmarks/REAL.md and RESULTS.md
    python scripts/docs_hardware.py --estimate   # its table anew too: minutes, since every cell traces a step
    python scripts/docs_hardware.py --check      # exit 1 if the page is out of date

No weight is loaded and nothing is fetched: below stand the shapes that each model's config.json has on the Hub. A test
makes a cell of the smallest model anew, the battery makes all of them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "hardware.md"
GIB = 1 << 30
WIDTH = 2048  # tokens: one row of a batch, the rest is accumulation, which takes no memory
CARDS = (8, 12, 16, 24, 40, 48, 80)  # GB that GPUs are sold with
_FREE = 0.95  # of it, which a driver and a screen leave


class Model(NamedTuple):
    """A model of the Hub: its shapes, and the shipped recipe that trains it or one like it."""

    name: str
    recipe: str
    config: dict[str, Any]


def llama(width: int, inner: int, layers: int, heads: int, groups: int, words: int, **more: Any) -> dict[str, Any]:
    """The shapes of a model that is built as Llama."""
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": words,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, **more,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
MODELS = [
    Model("HuggingFaceTB/SmolLM2-135M", "smollm2-135m-instruct", llama(576, 1536, 30, 9, 3, 49152, **TIED)),
    Model(
        "Qwen/Qwen3-0.6B",
        "qwen3-0.6b",
        llama(1024, 3072, 28, 16, 8, 151936, model_type="qwen3", head_dim=128, **TIED),
    ),
    Model("meta-llama/Llama-3.2-1B", "llama-3.2-1b", llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED)),
    Model("meta-llama/Llama-3.2-3B", "llama-3.2-1b", llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED)),
    Model("meta-llama/Llama-3.1-8B", "mistral-7b-qlora", llama(4096, 14336, 32, 32, 8, 128256)),
]
# how a model is trained: `--goal` of `instructft init` -> what it sets
GOALS = {
    "qlora": {"model": {"quantization": "4bit"}, "adapter": {"type": "lora", "r": 16, "target_modules": "all-linear"}},
    "lora": {"model": {}, "adapter": {"type": "lora", "r": 16, "target_modules": "all-linear"}},
    "full": {"model": {}, "adapter": {"type": "none"}},
}


def need(model: Model, goal: str) -> int:
    """Bytes on a GPU for a step on one row of WIDTH tokens, all of them answers, with checkpointing, in bfloat16."""
    from transformers import AutoConfig
    from trl import SFTConfig

    from instructft import load_recipe
    from instructft.models.fake_step import Batch
    from instructft.models.memory import memory
    from instructft.models.starting_point import StartingPoint

    asked = {
        "model": {"name_or_path": model.name, "dtype": "auto", **GOALS[goal]["model"]},
        "data": {"datasets": [{"name": "quickstart"}], "template": "auto", "max_length": WIDTH},
        "adapter": GOALS[goal]["adapter"],
        "train": {"gradient_checkpointing": True, "bf16": True, "use_cpu": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(asked), encoding="utf-8")
        recipe = load_recipe(str(path))
        args = SFTConfig(output_dir=folder, use_cpu=True, bf16=True, gradient_checkpointing=True, report_to=[])
    config = AutoConfig.for_model(**model.config)
    config.architectures = None
    start = StartingPoint(model.name, "", "", {}, None, config, [], config.vocab_size)
    found = memory(recipe, start, Batch(1, WIDTH, WIDTH, True), args, "cuda", accumulates=True, base=0)
    if not all(found["exact"].values()):
        sys.exit(f"{model.name}, {goal}: its step could not be traced; take it out of MODELS")
    return int(found["memory"]["total"])


def card(size: int) -> str:
    """The smallest GPU that holds so much.

    >>> card(9 * GIB)
    '12 GB'
    """
    fits = [gb for gb in CARDS if size <= gb * 1e9 * _FREE]
    return f"{fits[0]} GB" if fits else "several"


def line(model: Model) -> str:
    """A model's line of the table."""
    sizes = [need(model, goal) for goal in GOALS]
    told = [f"{card(size)} ({size / GIB:.1f} GiB)" for size in sizes]
    return "| " + " | ".join([f"`{model.name}`", *told, f"`{model.recipe}`"]) + " |"


HEAD = """<!-- Written by scripts/docs_hardware.py; change that, then run it again. -->

# What fits on which GPU

**Estimated**, by what `instructft check` counts, and not measured on these cards: memory of one GPU for a step on one
row of 2,048 tokens, all of which carry loss, in bfloat16 with gradient checkpointing. In brackets what is needed,
before them the smallest card that has it. A larger batch by `train.gradient_accumulation_steps` takes no memory.

| model | `--goal qlora` | `--goal lora` | `--goal full` | recipe to begin with |
| --- | --- | --- | --- | --- |
"""
REST = """
QLoRA holds the base in 4 bits, LoRA in bfloat16; an adapter of rank 16 on all linear layers. `full` trains all weights
in float32, with two states of AdamW each: 16 bytes a weight. Where one card is too small, several divide them:
`instructft check RECIPE --devices 8 --strategy fsdp2` says what each needs ([Several GPUs](several-gpus.md)). For your
rows and your model:

```sh
instructft init --data my.jsonl --model ID --goal lora   # a recipe that fits this machine
instructft check my.yaml --device cuda                   # the same estimate, of the recipe as it stands
instructft check my.yaml --measure                       # steps on this machine, and what they took
```

Where it does not fit: `train.per_device_train_batch_size: 1`, a smaller `data.max_length`, `--goal qlora`, or for all
weights `train.optim: paged_adamw_8bit` (6 bytes a weight less). A run whose memory ends says what brings how much.

## What was measured

| on | what | estimated | measured |
| --- | --- | --- | --- |
{measured}
| one H100 | GPT-2 124M, all weights, 32 packs of 1,024 tokens, blocks compiled | | 12.5 GiB |

From `benchmarks/REAL.md` and `benchmarks/RESULTS.md`, which say how. On a GPU the estimate has not been held against a
measurement yet: take the next larger card where it is close. `make gpu-check` does it on yours.
"""


def measured() -> list[str]:
    """Lines of estimates that were held against a peak, from the tables that the benchmarks write."""
    real, results = ((ROOT / "benchmarks" / f"{name}.md").read_text(encoding="utf-8") for name in ("REAL", "RESULTS"))
    figures = r"^\| memory estimate \| (.+?) \| ([\d.]+ GB), measured ([\d.]+ GB)[^|]* \|$"
    found = re.findall(figures, real, re.MULTILINE)
    table = results.split("## Memory, estimated and measured")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \|", table, re.MULTILINE)
    lines = [(f"SmolLM2-135M, {what}", estimate, peak) for what, estimate, peak in found]
    lines += [(what, f"{estimate} MiB", f"{peak} MiB") for what, estimate, peak in rows if "124M" in what]
    return [f"| CPU | {what} | {estimate} | {peak} |" for what, estimate, peak in lines]


def rows(text: str) -> list[str]:
    """The estimated lines of a page."""
    return [line for line in text.splitlines() if line.startswith("| `")]


def page(estimated: list[str]) -> str:
    """All of it."""
    return HEAD + "\n".join(estimated) + "\n" + REST.replace("{measured}", "\n".join(measured()))


def main() -> None:
    before = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    text = page([line(model) for model in MODELS] if "--estimate" in sys.argv else rows(before))
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif text != before:
        sys.exit("out of date: hardware.md; run python scripts/docs_hardware.py")


if __name__ == "__main__":
    main()
