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
    curve, proof = losses(run), merge.facts
    found: Result = {"first loss": curve[0], "last loss": curve[-1], "answers": len(answers)}
    found |= {name: proof.get(name) for name in ("difference", "exact", "tolerance", "effect", "device", "precision")}
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
    for bits in ("none", "4bit", "8bit"):
        if settings.tiny and bits != "4bit":
            continue
        if bits == "none" or bitsandbytes:
            yield Job(
                bits, adapt, {"settings": settings, "bits": bits}, limit=70, fresh=bits != "none" and not settings.tiny
            )
        else:
            yield Job(bits, missing)


def missing() -> Result:
    """What stands where bitsandbytes is not there."""
    return {"left out": "bitsandbytes is not installed"}


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown."""
    rows = [
        "A logit of the merged model differs from the adapter's on its base by `difference`, by `exact` with the "
        "rounding undone (allowed: `tolerance`); the adapter itself changes logits by `effect`\n",
        "| base | first loss | last loss | difference | exact | tolerance | effect | GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        if "first loss" in one:
            proof = " | ".join("" if one[name] is None else f"{one[name]:.1e}"
                               for name in ("difference", "exact", "tolerance", "effect"))  # fmt: skip
            rows.append(f"| {one['job']} | {one['first loss']:.4f} | {one['last loss']:.4f} | {proof} | "
                        f"{one.get('GiB', '')} |")  # fmt: skip
    return rows
