"""The memory that `instructft check` estimates beside what a run of a few steps took on this card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu.jobs import Job, Result, Settings
from gpu.runs import content, recipe, save_model, shape, train

# what is tried -> architecture, whether an adapter is trained, and sections of the recipe
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "full, packs": ("gpt2", False, {}),
    "LoRA, packs": ("llama", True, {"adapter": {"type": "lora", "r": 16, "alpha": 32}}),
    "full, rows, checkpointing": (
        "gpt2", False, {"data": {"packing": False}, "train": {"gradient_checkpointing": True}}
    ),
}  # fmt: skip
WIDER = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "llama": {"num_hidden_layers": 12, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
              "num_key_value_heads": 8},
}  # fmt: skip
GIB = 2**30


def measure(settings: Settings, name: str) -> Result:
    """The estimate, then the run."""
    from types import SimpleNamespace

    import torch

    from instructft.data.prepare import prepare
    from instructft.models.memory import estimate
    from instructft.models.starting_point import starting_point
    from instructft.models.tokenizer import load_tokenizer
    from instructft.training.arguments import training_arguments

    architecture, adapter, sections = CASES[name]
    folder = settings.folder(f"memory-{architecture}-{'adapter' if adapter else 'full'}")
    model = save_model(settings, folder, shape(settings, architecture, **WIDER[architecture]), low=adapter)
    if not settings.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    given = content(settings, folder, **sections)
    given["model"] = {"name_or_path": str(model)}
    made = recipe(folder, name.replace(" ", "-").replace(",", ""), given)
    tokenizer = load_tokenizer(made)
    data = prepare(made, tokenizer)
    args, _ = training_arguments(made, data, SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    found = estimate(made, starting_point(made, tokenizer), data, args, device=settings.device)["memory"]
    train(made)
    parts = {part: round(size / GIB, 2) for part, size in found.items()}
    result: Result = {"parts": parts, "estimate": parts["total"]}
    beside = (found["framework"] + found["allocator"]) / GIB
    result["estimate of tensors"] = round(parts["total"] - beside, 2)
    if not settings.tiny:
        free, total = torch.cuda.mem_get_info()
        result["tensors"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        result["reserved"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        context = (total - free) - torch.cuda.memory_reserved()  # the driver's, and whatever else lies on the card
        result["in all"] = round((context + torch.cuda.max_memory_reserved()) / GIB, 2)
    return result


def jobs(settings: Settings) -> Iterator[Job]:
    """A job for each setting."""
    for name in list(CASES)[:1] if settings.tiny else CASES:
        yield Job(name, measure, {"settings": settings, "name": name}, limit=50)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown, GiB."""
    rows = ["| GiB | tensors: estimate | measured | error | in all: estimate | measured | error | reserved |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for one in found:
        cells = []
        for guess, real in (("estimate of tensors", "tensors"), ("estimate", "in all")):
            error = f"{one[guess] / one[real] - 1:+.1%}" if one.get(real) else ""
            cells += [one[guess], one.get(real, ""), error]
        rows.append(f"| {one['job']} | {' | '.join(map(str, cells))} | {one.get('reserved', '')} |")
    return rows
