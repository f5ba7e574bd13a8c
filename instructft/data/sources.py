"""Where each named data set lives, and under which licence.

To add a data set: one entry in `SOURCES`, three of its rows in `tests/data/test_sources.py`, one recipe. What becomes
of a row is decided in `instructft.data.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One named data set.

    Args:
        format: a key of `FORMATS`.
        licence: an SPDX name, or the publisher's words.
        hub: the Hub id of the data set, or
        url: where its file is fetched from, or
        path: its file in this package.
        files: files inside the Hub repository for each split; None leaves the choice to the `datasets` library.
        homepage: where to read about it.
    """

    format: str
    licence: str
    homepage: str
    hub: str | None = None
    url: str | None = None
    path: Path | None = None
    files: Mapping[str, list[str]] | None = field(default=None)


QUICKSTART = Path(__file__).with_name("quickstart")  # the bundled rows, and a tokenizer trained on them
_HH_FOLDERS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
_BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json"

SOURCES: dict[str, Source] = {
    # 15,011 rows written by Databricks employees, in eight categories; some carry a passage to read (context).
    "dolly-15k": Source(
        format="dolly",
        licence="CC-BY-SA-3.0",
        homepage="https://huggingface.co/datasets/databricks/databricks-dolly-15k",
        hub="databricks/databricks-dolly-15k",
    ),
    # 52,002 rows: Alpaca's instructions, answered by GPT-4.
    "alpaca-gpt4": Source(
        format="alpaca",
        licence="CC-BY-NC-4.0",
        homepage="https://huggingface.co/datasets/vicgalle/alpaca-gpt4",
        hub="vicgalle/alpaca-gpt4",
    ),
    # 52,002 rows: Stanford's instructions, answered by text-davinci-003.
    "alpaca": Source(
        format="alpaca",
        licence="CC-BY-NC-4.0",
        homepage="https://huggingface.co/datasets/tatsu-lab/alpaca",
        hub="tatsu-lab/alpaca",
    ),
    # About 161,000 dialogues with a preferred last answer. `red-team-attempts` has other columns and is left out.
    "hh-rlhf": Source(
        format="hh",
        licence="MIT",
        homepage="https://huggingface.co/datasets/Anthropic/hh-rlhf",
        hub="Anthropic/hh-rlhf",
        files={split: [f"{folder}/{split}.jsonl.gz" for folder in _HH_FOLDERS] for split in ("train", "test")},
    ),
    # 517,982 conversations with system prompts: the part of OpenOrca whose answers GPT-4 judged right.
    "slim-orca": Source(
        format="sharegpt",
        licence="MIT",
        homepage="https://huggingface.co/datasets/Open-Orca/SlimOrca",
        hub="Open-Orca/SlimOrca",
    ),
    # 1,100 rows from chapter 7 of "Build a Large Language Model (From Scratch)" by Sebastian Raschka.
    "llms-from-scratch": Source(
        format="alpaca",
        licence="Apache-2.0",
        homepage="https://github.com/rasbt/LLMs-from-scratch",
        url=_BOOK,
    ),
    # 2,822 rows made by `scripts/quickstart_data.py`: no network, learned from scratch in minutes on two CPU cores.
    "quickstart": Source(
        format="alpaca",
        licence="Apache-2.0",
        homepage="scripts/quickstart_data.py",
        path=QUICKSTART / "rows.jsonl",
    ),
    # 1,190 conversations of two to six questions, made by `scripts/quickstart_chat.py` from the same tables.
    "quickstart-chat": Source(
        format="messages",
        licence="Apache-2.0",
        homepage="scripts/quickstart_chat.py",
        path=QUICKSTART / "chat.jsonl",
    ),
}
