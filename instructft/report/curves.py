"""What is left of a run for a reader: the curves `loss.png` and `loss.pdf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def plot_loss(run: Path, title: str) -> list[Path]:
    """Draw training and validation loss over steps, with perplexity on the right-hand axis.

    Returns the files written, `loss.png` and `loss.pdf`; none when nothing was logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run)
    series = {
        label: [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
        for label, key in (("training", "loss"), ("validation", "eval_loss"))
    }
    if not any(series.values()):
        return []
    fig, ax = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for (label, points), colour, marker in zip(series.items(), ("#3b6fb6", "#d1495b"), ("", "o"), strict=True):
        if points:
            steps, losses = zip(*points, strict=True)
            ax.plot(
                steps, losses, color=colour, marker=marker, markersize=4, label=f"{label}, at last {losses[-1]:.3f}"
            )
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats per supervised token)")
    ax.margins(x=0.02)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    _perplexity_axis(ax)
    paths = [run / "loss.png", run / "loss.pdf"]
    fig.savefig(paths[0], dpi=160)
    # without a date in it, the same run gives the same bytes
    fig.savefig(paths[1], metadata={"CreationDate": None})
    plt.close(fig)
    return paths


def _perplexity_axis(ax: Any) -> None:
    """Perplexity, exp(loss), at round figures on the right-hand side."""
    import numpy as np

    to_perplexity = (lambda loss: np.exp(np.clip(loss, -50, 50)), lambda ppl: np.log(np.clip(ppl, 1e-20, None)))
    right = ax.secondary_yaxis("right", functions=to_perplexity)
    right.set_ylabel("perplexity")
    right.spines["right"].set_visible(False)
    steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000]
    ticks = [step for step in steps if np.log(step) <= ax.get_ylim()[1]]
    right.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
