"""What the tests of a report share: the facts and lines of a run, and a reader of its page."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

EVIL = "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)> &amp; \"' \x1b[31m \u202eback"


class Read(html.parser.HTMLParser):
    """Tags, links and text of a page; insists that what is opened is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(v) for k, v in attributes if k in ("src", "href", "srcset", "action")]
        self.links += [str(v) for k, v in attributes if k == "xlink:href" and not str(v).startswith("#m")]
        self.links += [k for k, _ in attributes if k.startswith("on")]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def facts_of(**changes: Any) -> dict[str, Any]:
    facts = {
        "versions": {"instructft": "0.1.0", "torch": "2.13.0"},
        "hardware": {"device": "cpu", "processes": 1, "precision": "float32"},
        "seed": 42,
        "data": {
            "fingerprint": "0123456789abcdef",
            "rows": {"train": 96, "validation": 12, "test": 12},
            "dropped": {"near_duplicate_of_held_out": 7},
            "cut": {"rows": 0, "tokens": 0},
            "tokens": 3210,
            "supervised_tokens": 1234,
            "padding_share": 0.125,
        },
        "train": {"seconds": 754.2, "steps": 40, "tokens": 6543, "supervised_tokens": 2468, "tokens_per_second": 4321.0,
                  "resumed": []},
        "metrics": {"loss": 1.25, "eval_loss": 1.5, "eval_perplexity": 4.48, "train_loss": 2.0},
    }  # fmt: skip
    for path, value in changes.items():
        *keys, last = path.split("__")
        inner: Any = facts
        for key in keys:
            inner = inner[key]
        inner[last] = value
    return facts


def fill(run: Path, lines: list[dict[str, Any]], samples: list[tuple[int, str, str]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    records = [{"step": s, "prompt": p, "response": r, "finish_reason": "stop"} for s, p, r in samples]
    (run / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return run


LINES = [
    {"step": s, "loss": 4.0 - s / 20, "learning_rate": 1e-3, "tokens_per_second": 4000.0 + s} for s in range(10, 50, 10)
] + [{"step": 40, "eval_loss": 1.5}]


# What `instructft gate` writes, without its rows.
_FIGURES = {"before": 0.6, "after": 0.5, "difference": -0.1, "interval": [-0.15, -0.05]}
GATE_FOUND: dict[str, Any] = {
    "passed": False, "verdict": "not passed",
    "reasons": ["the rest is down: -10.0%"],
    "against": "start",
    "task": {
        "rows": 1200, "metric": "rougeL",
        "loss": {"before": 2.0, "after": 1.5, "difference": -0.5, "interval": [-0.6, -0.4], "state": "up"},
        "rougeL": {"before": 0.3, "after": 0.3, "difference": 0.0, "interval": None, "state": "noise"},
    },
    "rest": {"state": "down", "margin": 0.05, "lost": ["facts"], "questions": 300, **_FIGURES,
             "suites": {"facts": {"questions": 100, **_FIGURES}, "json": {"questions": 200, **_FIGURES}}},
}  # fmt: skip
