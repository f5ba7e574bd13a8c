"""A document gives in a pack what it gives alone: by kind of attention, dtype and architecture.

The proof is the one that every packed run makes before its first step: no gradient from a document to its neighbour,
and logits that differ by rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from gpu.jobs import Job, Result, Settings, in_words
from gpu.runs import content, recipe, shape

KINDS = ("auto", "sdpa", "eager", "varlen", "flex_attention", "flash_attention_2")
DTYPES = ("autocast", "bfloat16", "float16", "float32")  # the first: float32 weights, work in bfloat16
WIDTH = 512


def prove(settings: Settings, attention: str) -> Result:
    """Every dtype and architecture under one kind of attention; a leak or an error is told, not raised."""
    import torch

    import instructft
    from instructft.data.packing import probe

    found: Result = {"attention": attention}
    for architecture in ("gpt2", "llama"):
        folder = settings.folder("packs")
        given = content(settings, folder)
        given["model"] |= {"config": shape(settings, architecture), "attn_implementation": attention}
        given["model"]["dtype"] = "float32"
        for dtype in DTYPES[-1:] if settings.tiny else DTYPES:
            name = f"{architecture} {dtype}"
            try:
                made = recipe(folder, f"{attention}-{architecture}-{dtype}", given)
                tokenizer = instructft.load_tokenizer(made)
                held = torch.float32 if dtype == "autocast" else getattr(torch, dtype)
                model: Any = instructft.load_model(made, tokenizer).to(settings.device, held)
                with torch.autocast(settings.device, torch.bfloat16, enabled=dtype == "autocast"):
                    difference = probe(model, model.device, 64 if settings.tiny else WIDTH)
                found[name] = f"{difference:.1e} ({model.config._attn_implementation})"
            except Exception as error:
                found[name] = f"no: {in_words(error)[:200]}"
    return found


def jobs(settings: Settings) -> Iterator[Job]:
    """A job for each kind of attention."""
    for name in KINDS[:2] if settings.tiny else KINDS:
        if name.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
            continue
        yield Job(name, prove, {"settings": settings, "attention": name}, limit=40)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown: what differs between packed and alone, as a share of the largest logit."""
    columns = [name for name in found[0] if name not in ("part", "job", "attention", "seconds")]
    rows = ["The largest difference of a logit between packed and alone, as a share of the largest logit\n"]
    rows += [f"| attention | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return rows + [f"| {one['attention']} | {' | '.join(str(one.get(name, '')) for name in columns)} |"
                   for one in found]  # fmt: skip
