"""Products in 8-bit floats beside bfloat16: the same rows and weights, 200 steps, losses and tokens a second."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.jobs import Job, Result, Settings, left_out
from gpu.runs import content, recipe, shape, train

# wide enough for FP8 to pay; GPT-2's layers are Conv1D, which torchao knows nothing of
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 6, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
              "num_key_value_heads": 8, "tie_word_embeddings": True},
    "gpt2": {"n_layer": 6, "n_embd": 2048, "n_head": 16},
}  # fmt: skip
STEPS = 200


def run(settings: Settings, architecture: str, fp8: bool) -> Result:
    """One run; its losses, and the median speed of its log."""
    folder = settings.folder(f"fp8-{architecture}")
    steps = 2 if settings.tiny else STEPS
    config = shape(settings, architecture, **SHAPES[architecture])
    given = content(
        settings, folder, rows=STEPS * 8 * 1024 // 150, model={"config": config},
        train={"max_steps": steps, "logging_steps": 1 if settings.tiny else 10, "learning_rate": 3e-4,
               **({"fp8": True} if fp8 else {})},
    )  # fmt: skip
    done = train(recipe(folder, "fp8" if fp8 else "bfloat16", given))
    text = (Path(done.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    speeds = [line["tokens_per_second"] for line in lines[1:] if line.get("tokens_per_second")]
    return {"losses": [line["loss"] for line in lines], "tokens_per_second": statistics.median(speeds or [0.0]),
            "precision": done.facts["hardware"]["precision"]}  # fmt: skip


def missing() -> Result:
    """What stands where torchao is not there."""
    return left_out("torchao is not installed")


def jobs(settings: Settings) -> Iterator[Job]:
    """With and without, for each architecture."""
    if importlib.util.find_spec("torchao") is None:
        yield Job("all", missing)
        return
    for architecture in list(SHAPES)[:1] if settings.tiny else SHAPES:
        for fp8 in (False,) if settings.tiny else (False, True):
            name = f"{architecture}, {'fp8' if fp8 else 'bfloat16'}"
            given = {"settings": settings, "architecture": architecture, "fp8": fp8}
            yield Job(name, run, given, limit=70)


def table(found: list[Result]) -> list[str]:
    """Rows of Markdown."""
    rows = ["| | tokens/s | first loss | last loss | mean of the second half | precision |",
            "| --- | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for one in found:
        late = statistics.mean(one["losses"][len(one["losses"]) // 2 :])
        rows.append(f"| {one['job']} | {one['tokens_per_second']:,.0f} | {one['losses'][0]:.4f} | "
                    f"{one['losses'][-1]:.4f} | {late:.4f} | {one['precision']} |")  # fmt: skip
    return rows
