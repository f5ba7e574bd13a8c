"""Reads pages of Markdown for tests: blocks, inline code, tables, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Page:
    """One page, as text and in parts."""

    def __init__(self, path: Path):
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.prose = FENCED.sub("", self.text)

    def blocks(self, *languages: str) -> list[str]:
        """The fenced blocks of these languages, or all."""
        return [text for name, text in FENCED.findall(self.text) if not languages or name in languages]

    def block_with(self, part: str) -> str:
        (found,) = (text for text in self.blocks() if part in text)
        return found

    def spans(self) -> list[str]:
        """All inline code, as it is read: in a table `\\|` is a `|`."""
        return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", self.prose)]

    def section(self, title: str) -> str:
        (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", self.text, re.M | re.S)
        return text

    def tables(self) -> Iterator[tuple[str, dict[str, list[str]]]]:
        """Heading of the first column, and first cell -> the other cells, of every table."""
        for table in re.findall(r"(?:^\|.*\n)+", self.text, re.M):
            head, _, *rows = ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines())
            yield head[0], {row[0]: row[1:] for row in rows}

    def table(self, heading: str) -> dict[str, list[str]]:
        (found,) = (rows for name, rows in self.tables() if name == heading)
        return found

    def anchors(self) -> set[str]:
        """The anchors of headings, as GitHub and MkDocs make them alike."""
        heads = re.findall(r"^#+ (.*)$", self.prose, re.M)
        return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}

    def links(self) -> list[str]:
        """Where links and pictures lead."""
        return re.findall(r"\]\(([^()\s]+)\)", self.prose)


def code(cell: str) -> list[str]:
    """The inline code of a table's cell."""
    return [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", cell)]
