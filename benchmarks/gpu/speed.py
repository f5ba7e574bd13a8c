"""Training on one GPU: ours, TRL's SFTTrainer at its best, and a plain PyTorch loop, on packs of rows of many lengths.

Shapes of models that people train, with random weights: GPT-2 124M and one of 250M, Qwen3-0.6B in full, Llama-3.2-1B
and Llama-3.1-8B by LoRA. Rows in Alpaca's shape in packs of 1,024 to 4,096 tokens; bfloat16 autocast over float32
weights, or a frozen bfloat16 base.

TRL gets every setting that it has for such rows: our packs as its own, flattened (its default) or one at a time; no
packs, but rows of like length side by side; `wrapped`, which is fast and lets documents see each other; flash-attention
and Liger where they are installed. The table names its fastest that is correct and its fastest that leaks.

Operations of a token are 6 for each matrix weight that is trained (4 where it is frozen), the head for supervised
tokens only, and 6 × the width of attention × the mean length of a token's document in each layer: forward and backward
of what causal attention over documents needs, whatever was computed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contestants import WORKERS, Task, make_model, source_and_tokenizer
from data_prep import build_rows
from gpu.jobs import Job, Result, Settings

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"model_type": "gpt2", "n_positions": 2048, **NO_DROPOUT}
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, packs in a batch, tokens in a pack, and how long its jobs may take."""

    title: str
    config: dict[str, Any]
    packs: int
    width: int
    adapter: bool = False
    every: bool = False  # all settings of TRL, where others try those that have a chance


SHAPES = {
    "gpt2": Shape("GPT-2 124M, 32 × 1,024", GPT2, 32, 1024, every=True),
    "seed": Shape("GPT-2 250M, 16 × 2,048", {**GPT2, "n_embd": 1024, "n_layer": 16, "n_head": 16}, 16, 2048),
    "qwen": Shape(
        "Qwen3 0.6B, 8 × 2,048",
        {
            "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        8, 2048,
    ),
    "llama1b": Shape(
        "Llama 1.2B LoRA, 8 × 2,048",
        {**LLAMA, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
         "tie_word_embeddings": True},
        8, 2048, adapter=True,
    ),
    "llama8b": Shape(
        "Llama 8B LoRA, 2 × 4,096",
        {**LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "tie_word_embeddings": False},
        2, 4096, adapter=True,
    ),
}  # fmt: skip
TINY = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 1490},
    "other": {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 1490},
}  # fmt: skip
COPIES = "instructft, float32 copies"  # of bfloat16 weights, without autocast
TOLERANCE = 2e-3  # of losses, where the batches are the same

# Dense bfloat16 (V100 and T4: float16) operations a second, from the vendor's data sheets; the first name that fits.
PEAK = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def contestants(task: Task, documents: float, every: bool) -> dict[str, tuple[Task, str, str]]:
    """Name -> task, the library that it needs or "", and what it is to us: ours, narrow, same, correct or leaks.

    `same` has our batches, so that its losses are held against ours; `narrow` is ours with bfloat16 weights, which
    others are not measured with, so that it is no match for them. A run of a few steps is too short to earn the
    time that compiling takes, so ours is measured as it is, and as a long run would be.
    """
    trl = dataclasses.replace(task, which="trl")
    same = dataclasses.replace(trl, packs="ours")
    one = dataclasses.replace(same, batch=1, accumulation=task.batch)
    rows = dataclasses.replace(trl, packs="none", batch=max(1, round(task.batch * documents)))
    wrapped = dataclasses.replace(trl, options={"packing_strategy": "wrapped"})
    flash = {"attention": "flash_attention_2"}
    liger = {"options": {"use_liger_kernel": True}}
    copies = dataclasses.replace(task, dtype="bfloat16", options={"float32_copies": True})
    found = {
        "instructft": (task, "", "ours"),
        "instructft, compiled": (dataclasses.replace(task, options={"torch_compile": True}), "triton", "ours"),
        "TRL, rows of like length": (rows, "", "correct"),
        "TRL, packs, flash-attention": (dataclasses.replace(same, **flash), "flash_attn", "same"),
        "TRL, wrapped": (wrapped, "", "leaks"),
        "plain loop": (dataclasses.replace(task, which="plain"), "", "same"),
        "TRL, one pack at a time": (one, "", "same"),
    }
    if not task.adapter:
        compiled = dataclasses.replace(copies, options={"float32_copies": True, "torch_compile": True})
        found |= {COPIES: (copies, "", "narrow"), f"{COPIES}, compiled": (compiled, "triton", "narrow")}
    if every:
        found |= {
            "TRL, packs flattened": (same, "", "same"),
            "instructft, sdpa": (dataclasses.replace(task, attention="sdpa"), "", "ours"),
            "TRL, packs, flash-attention, Liger": (dataclasses.replace(same, **flash, **liger), "flash_attn", "same"),
            "TRL, rows of like length, Liger": (dataclasses.replace(rows, **liger), "liger_kernel", "correct"),
            "instructft, fp8": (dataclasses.replace(task, options={"fp8": True}), "torchao", "ours"),
        }
    return found


def model(settings: Settings, name: str) -> Result:
    """The model of a shape, on disk; its sizes."""
    return make_model(task_of(settings, name)[0])


def rows(settings: Settings, name: str) -> Result:
    """The rows of a shape, prepared without a GPU; what is known of them."""
    task, enough = task_of(settings, name)
    source, _ = source_and_tokenizer(Path(task.folder), bundled=settings.tiny)
    build_rows(source, Path(task.folder) / "rows.json", enough)
    return WORKERS["prepare"](dataclasses.replace(task, gpu=False))


def task_of(settings: Settings, name: str) -> tuple[Task, int]:
    """What ours trains, and the rows that are enough for it."""
    shape, tiny = SHAPES[name], settings.tiny
    folder = settings.folder(f"speed-{name}")
    _, tokenizer = source_and_tokenizer(folder, bundled=tiny)
    small = TINY["gpt2" if shape.config["model_type"] == "gpt2" else "other"]
    task = Task(
        str(folder), here=True, tokenizer=tokenizer, packing=True, sampling="sequential",
        max_length=128 if tiny else shape.width, batch=2 if tiny else shape.packs, steps=4 if tiny else 15,
        warmup=2 if tiny else 5, logging=2 if tiny else 5, seconds=6, gpu=not tiny, low=not tiny,
        adapter=shape.adapter, shape={**shape.config, **(small if tiny else {})},
    )  # fmt: skip
    return task, task.steps * task.batch * task.max_length // 32


def train(task: Task, kind: str) -> Result:
    """One contestant."""
    found = WORKERS[task.which](task)
    return {"kind": kind, **{name: value for name, value in found.items() if name not in ("entropy", "tokens")}}


def jobs(settings: Settings, name: str = "") -> Iterator[Job]:
    """Model and rows, then a job for each contestant."""
    shape = SHAPES[name]
    given = {"settings": settings, "name": name}
    sizes = yield Job("model", model, given, limit=90)
    made = yield Job("rows", rows, given, limit=60)
    if "failed" in sizes or "documents" not in made:
        return
    task, _ = task_of(settings, name)
    for who, (one, needs, kind) in contestants(task, made["documents"], shape.every).items():
        if settings.tiny and not worth_a_try(name, who, kind):
            continue
        if needs and (settings.tiny or importlib.util.find_spec(needs) is None):
            continue
        yield Job(who, train, {"task": one, "kind": kind}, limit=100)


def worth_a_try(name: str, who: str, kind: str) -> bool:
    """On a CPU: ours in full and with an adapter, everybody else's settings once, and ours with float32 copies."""
    if who == COPIES:
        return name == "gpt2"
    if who == "instructft":
        return name in ("gpt2", "llama1b")
    return name == "gpt2" and kind != "ours"


def operations(made: Result, config: dict[str, Any], adapter: bool) -> float:
    """Operations of a token, forward and backward."""
    layers = config.get("n_layer") or config.get("num_hidden_layers") or 12
    width = config.get("n_embd") or config.get("hidden_size") or 768
    if "head_dim" in config:
        width = config["head_dim"] * config["num_attention_heads"]
    matrices = (4 if adapter else 6) * (made["body"] + made["head"] * made["supervised_share"])
    return matrices + 6 * layers * width * made["attended"]


def peak_of(device: str) -> float | None:
    """The GPU's dense bfloat16 peak, if its name is known."""
    return next((value for name, value in PEAK.items() if all(word in device for word in name.split())), None)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown, then TRL at its best and how far losses are apart."""
    by_name = {one["job"]: one for one in found}
    name = found[0]["part"].partition(".")[2]
    shape, made = SHAPES[name], {**by_name.pop("model"), **by_name.pop("rows")}
    mine = [one for one in by_name.values() if one["kind"] == "ours"]
    ours, loop = max(mine, key=lambda one: one["tokens_per_second"], default=None), by_name.get("plain loop")
    reference = by_name.get("instructft")
    work = operations(made, shape.config, shape.adapter)
    lines = [
        f"{shape.title}: {made['parameters'] / 1e6:,.0f}M parameters, {made['documents']:.1f} documents a pack, "
        f"{made['fill']:.1%} full, {made['supervised_share']:.0%} of tokens carry loss\n",
        "| | tokens/s | our fastest / it | share of peak | GiB | first step, s | losses from ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for who, one in by_name.items():
        speed, peak = one["tokens_per_second"], peak_of(one["device"])
        ratio = f"{ours['tokens_per_second'] / speed:.2f}" if ours else ""
        share = f"{speed * work / peak:.1%}" if peak else ""
        lines.append(
            f"| {who}{' (leaks)' if one['kind'] == 'leaks' else ''} | {speed:,.0f} | {ratio} | {share} | "
            f"{one['peak_mib'] / 1024:.1f} | {one['first_step_seconds']:.1f} | {apart(reference, one)} |"
        )
    trl = {who: one for who, one in by_name.items() if who.startswith("TRL")}
    for words, leaks in (("correct", False), ("leaking", True)):
        some = {who: one["tokens_per_second"] for who, one in trl.items() if (one["kind"] == "leaks") == leaks}
        if some and ours:
            best = max(some, key=some.__getitem__)
            lines.append(f"\nTRL's fastest {words}: {best}, {some[best]:,.0f}; ours is "
                        f"{ours['tokens_per_second'] / some[best]:.2f} ×")  # fmt: skip
    if ours and loop:
        lines.append(f"\nOf a plain loop: {ours['tokens_per_second'] / loop['tokens_per_second']:.2f} ×")
    return lines


def apart(ours: Result | None, other: Result) -> str:
    """The largest difference of losses, where the batches are the same."""
    if ours is None or ours is other or other["kind"] not in ("ours", "narrow", "same"):
        return ""
    gap = max(abs(a - b) for a, b in zip(ours["losses"], other["losses"], strict=False))
    return f"{gap:.1e}{'' if gap <= TOLERANCE else ' DIFFER'}"
