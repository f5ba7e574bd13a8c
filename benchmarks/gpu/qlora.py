"""LoRA over a base in 4 and 8 bit, and in bfloat16 beside them: trained, merged, proved, and answering."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from gpu.jobs import Job, Result, Settings
from gpu.runs import content, losses, recipe, save_model, shape, train


def base(settings: Settings) -> Result:
    """The model that all are trained from."""
    return {"model": str(save_model(settings, settings.folder("qlora"), shape(settings, "llama"), low=True))}


def adapt(settings: Settings, bits: str) -> Result:
    """Train, merge (which proves the merge), and answer with the merged model."""
    import instructft

    folder = settings.folder("qlora")
    given = content(
        settings, folder,
        model={"name_or_path": str(folder / "model"), "tokenizer": None, "quantization": bits},
        adapter={"type": "lora", "r": 16, "alpha": 32},
    )  # fmt: skip
    given["model"].pop("tokenizer")
    done = train(recipe(folder, bits, given))
    run = Path(done.output_dir)
    merged = folder / f"merged-{bits}"
    merge = instructft.merge_adapter(run, merged)
    answers = instructft.generate(str(merged), ["What is the capital of Norway?"], max_new_tokens=8)
    curve = losses(run)
    found: Result = {"first loss": curve[0], "last loss": curve[-1], "answers": len(answers), "merge": str(merge)[:300]}
    if not settings.tiny:
        import torch

        found["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def jobs(settings: Settings) -> Iterator[Job]:
    """The base, then each kind."""
    made = yield Job("base", base, {"settings": settings})
    if "failed" in made:
        return
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    for bits in ("4bit", "8bit", "none"):
        if settings.tiny and bits == "8bit":
            continue  # bitsandbytes has no such layers on every CPU
        if bits == "none" or bitsandbytes:
            yield Job(bits, adapt, {"settings": settings, "bits": bits}, limit=50)
        else:
            yield Job(bits, missing)


def missing() -> Result:
    """What stands where bitsandbytes is not there."""
    return {"left out": "bitsandbytes is not installed"}


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown."""
    rows = ["| base | first loss | last loss | merge | GiB |", "| --- | ---: | ---: | --- | ---: |"]
    return rows + [
        f"| {one['job']} | {one['first loss']:.4f} | {one['last loss']:.4f} | {one['merge']} | {one.get('GiB', '')} |"
        for one in found if "first loss" in one
    ]  # fmt: skip
