"""Which published chat templates can be trained on every turn, and what is refused, held against an oracle.

    python benchmarks/templates.py [--write]     --write puts the table into docs/loss-mask.md

The oracle (`tests/helpers/template_matrix.py`) is a server that renders with transformers alone and never looks into
the package. Three kinds of tokenizer, thirteen conversations each.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "loss-mask.md"
BEGIN, END = "<!-- templates: by benchmarks/templates.py -->", "<!-- end -->"

sys.path.insert(0, str(REPO))

from tests.helpers.template_matrix import CONVERSATIONS, judge, judge_with_keys, templates, tokenizer  # noqa: E402

KINDS = ("GPT-2", "Llama", "Qwen")


def table(kinds: tuple[str, ...], names: list[str]) -> tuple[str, Counter[str]]:
    """One row a template, counted over tokenizers and conversations."""
    lines = [
        "| template | right | refused, by servers too | right with a key | wrong | what is refused, and the key |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    total: Counter[str] = Counter()
    for name in names:
        count: Counter[str] = Counter()
        refused: dict[str, dict[str, None]] = {}  # key -> conversations
        for kind in kinds:
            made = tokenizer(kind, templates()[name])
            for what, (messages, tools) in CONVERSATIONS.items():
                verdict = judge(made, messages, tools)
                count[verdict.kind] += 1
                if verdict.kind in ("refused", "needless"):
                    key, _ = judge_with_keys(kind, templates()[name], messages, tools)
                    refused.setdefault(key, {})[what] = None
                    count["key"] += bool(key)
        total += count
        wrong = count["wrong"] + count["needless"]
        given = "; ".join(
            (", ".join(some) if len(some) < 7 else f"{len(some)} of {len(CONVERSATIONS)}")
            + f" ({key if ':' in key else f'[{key}]' if key else 'none'})"
            for key, some in refused.items()
        )
        lines.append(
            f"| {name} | {count['right'] + count['told']} | {count['refused']} | {count['key']} | {wrong} | {given} |"
        )
    return "\n".join(lines), total


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="two templates, one tokenizer")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    names = list(templates())
    text, total = table(KINDS[:1], names[:2]) if args.tiny else table(KINDS, names)
    every = sum(total[kind] for kind in ("right", "told", "refused", "needless", "wrong"))
    said = (
        f"{every:,} combinations: {total['right']:,} right, {total['told']:,} right with a part that the template does "
        f"not show and that is reported, {total['refused']:,} refused where a server cannot serve them either, "
        f"{total['needless']:,} refused without need, {total['wrong']:,} silently wrong. With the key that the table "
        f"names {total['key']:,} of the refused are right: {total['right'] + total['told'] + total['key']:,} of all, "
        f"{(total['right'] + total['told'] + total['key']) / every:.1%}."
    )
    print(f"{said}\n\n{text}")
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        block = f"{BEGIN}\n\n{said}\n\n{text}\n\n{END}"
        PAGE.write_text(
            re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, page, flags=re.S), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
