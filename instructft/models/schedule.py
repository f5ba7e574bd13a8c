"""How long a run will be: its steps, their rows and tokens, and the time at a known speed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import SFTConfig

    from instructft.data.prepare import Prepared
    from instructft.recipe.schema import Recipe


def steps(data: Prepared, args: SFTConfig, processes: int = 1) -> dict[str, Any]:
    """Steps of a run, with rows and tokens of each, as `transformers.Trainer` counts them."""
    rows, tokens = len(data.splits["train"]), data.tokens["train"]
    share = math.floor if args.dataloader_drop_last else math.ceil
    batches = share(share(rows / args.per_device_train_batch_size) / processes)  # of one process in one epoch
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return {
        "rows": rows,
        "tokens": tokens,
        "steps": count,
        "steps_per_epoch": per_epoch,
        "epochs": count / per_epoch,
        "rows_per_step": rows_per_step,
        "tokens_per_step": round(tokens / per_epoch),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": processes,
        "total_tokens": round(tokens * count / per_epoch),
    }


def duration(recipe: Recipe, schedule: dict[str, Any], processes: int, given: float | None) -> dict[str, Any]:
    """Seconds of training, from a given speed or the last run of this recipe on as many processes."""
    speed, source = given, "given"
    if speed is None:
        speed, source = last_speed(recipe, processes)
    seconds = schedule["total_tokens"] / speed if speed else None
    return {"tokens_per_second": speed, "source": source if speed else None, "seconds": seconds}


def last_speed(recipe: Recipe, processes: int) -> tuple[float | None, str]:
    """Tokens per second of the newest run of a recipe of this name beside `output_dir`, and its `run.json`."""
    found = sorted(Path(recipe.output_dir).parent.glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    title = f"# {' '.join(recipe.name.split())}:"  # the first line of a run's recipe.yaml names the recipe
    for path in found:
        try:
            with path.with_name("recipe.yaml").open(encoding="utf-8") as file:
                same = file.readline().startswith(title)
            facts = json.loads(path.read_text(encoding="utf-8"))
            if same and facts["hardware"]["processes"] == processes:
                return float(facts["train"]["tokens_per_second"]), str(path)
        except (OSError, ValueError, KeyError, TypeError):  # of another version, or cut off
            continue
    return None, ""
