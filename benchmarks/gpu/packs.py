"""A document gives in a pack what it gives alone: by kind of attention, precision and architecture.

The proof is the one that every packed run makes before its first step, on the road of such a run: no gradient from a
document to its neighbour, and logits that differ by rounding. The run ends there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from gpu.jobs import Job, Result, Settings, in_words
from gpu.runs import content, recipe, shape, train

# kind of attention -> architectures, the first of which is the more telling
KINDS = {"auto": ("gpt2", "llama"), "sdpa": ("llama",), "flash_attention_2": ("llama",), "eager": ("llama",),
         "flex_attention": ("llama",)}  # fmt: skip
# name -> dtype of weights, and keys of `train:`
PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16 autocast": ("float32", {"bf16": True}),
    "bfloat16": ("bfloat16", {"bf16": True}),
    "float16 autocast": ("float32", {"bf16": False, "fp16": True}),
    "float32": ("float32", {"bf16": False}),
}


class Proved(BaseException):
    """The proof has been made: there is nothing to train."""


def prove(settings: Settings, attention: str) -> Result:
    """Every precision and architecture under one kind of attention; a leak or an error is told, not raised."""
    tried: list[tuple[str, float]] = []
    _stop_after_the_proof(tried)
    found: Result = {"attention": attention}
    for architecture in KINDS[attention]:
        folder = settings.folder("packs")
        for name, (dtype, train_keys) in list(PRECISIONS.items())[-1 if settings.tiny else 0 :]:
            model = {"config": shape(settings, architecture), "attn_implementation": attention, "dtype": dtype}
            given = content(settings, folder, model=model, train=train_keys)
            tried.clear()
            try:
                train(recipe(folder, f"{attention}-{architecture}-{name.replace(' ', '-')}", given))
                words = "no proof was made"
            except Proved:
                words = " ".join(f"{difference:.1e} ({kind})" for kind, difference in tried)
            except Exception as error:
                words = f"no: {in_words(error)[:200]}"
            found[f"{architecture}, {name}"] = words
    return found


def _stop_after_the_proof(tried: list[tuple[str, float]]) -> None:
    """Let a run end behind its proof, whoever has imported it; the kind of attention and the difference are kept."""
    import instructft.data.packing as packing

    probe = packing.probe

    def and_stop(model: Any, *args: Any, **kwargs: Any) -> float:
        tried.append((model.config._attn_implementation, probe(model, *args, **kwargs)))
        raise Proved

    for module in list(sys.modules.values()):
        if getattr(module, "probe", None) is probe:
            module.probe = and_stop  # type: ignore[attr-defined]


def jobs(settings: Settings) -> Iterator[Job]:
    """A job for each kind of attention."""
    for name in list(KINDS)[:2] if settings.tiny else KINDS:
        if name.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
            continue
        yield Job(name, prove, {"settings": settings, "attention": name}, limit=40)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown: what differs between packed and alone, as a share of the largest logit."""
    known = ("part", "job", "attention", "seconds")
    columns = list(dict.fromkeys(name for one in found for name in one if name not in known))
    rows = ["The largest difference of a logit between packed and alone, as a share of the largest logit\n"]
    rows += [f"| attention | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return rows + [f"| {one['attention']} | {' | '.join(str(one.get(name, '')) for name in columns)} |"
                   for one in found]  # fmt: skip
