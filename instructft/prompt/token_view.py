"""A row of training data as a person can read it: which tokens carry loss, which are special, where documents begin.

In a terminal what carries loss is green, and the rest is dim; where there is no colour, brackets say it::

    ### Instruction:⏎
    Add 1 and 1.⏎
    ⏎
    ### Response:⏎
    ⟦2⟨<|endoftext|>⟩⟧

Text of the data is shown, never obeyed: it is no markup, and control characters become visible signs.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.rule import Rule
from rich.text import Text

from instructft.prompt.loss_mask import IGNORE_INDEX, encoder

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from transformers import PreTrainedTokenizerBase

STYLES = {  # (carries loss, is special): dim and reverse at once cannot be read in some terminals
    (True, False): "bold green",
    (False, False): "dim",
    (True, True): "reverse bold green",
    (False, True): "reverse bright_black",
}
SIGN = "magenta"  # a control character of the data
_UNFINISHED = "\ufffd"  # what decoding gives for bytes that are no whole character
_LONGEST_WAIT = 32  # tokens; bytes that never become a character are shown as they are after so many


class Piece(NamedTuple):
    """One token; or several that share a character, as an emoji does in a byte-level vocabulary."""

    text: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]  # -100 = no loss
    special: bool

    @property
    def loss(self) -> bool:
        """Whether any of its tokens carries loss."""
        return any(label != IGNORE_INDEX for label in self.labels)


def count(parts: Sequence[Piece]) -> tuple[int, int]:
    """Tokens of some pieces, and how many of them carry loss."""
    labels = [label for part in parts for label in part.labels]
    return len(labels), sum(label != IGNORE_INDEX for label in labels)


def documents(row: Mapping[str, Sequence[int]]) -> list[range]:
    """The positions of each document of a row; a row that is not packed is one document.

    >>> documents({"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]})
    [range(0, 3), range(3, 5)]
    """
    total, start, found = len(row["input_ids"]), 0, []
    for length in row.get("seq_lengths") or [total]:
        if start < min(start + length, total):
            found.append(range(start, min(start + length, total)))
        start += length
    if start < total:
        found.append(range(start, total))
    return found


def pieces(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[Piece]]:
    """The pieces of each document of a row; all their texts joined are the decoded row.

    Example::

        [piece.text for piece in pieces(encode_conversation(messages, tokenizer), tokenizer)[0] if piece.loss]
        # ['2', '<|endoftext|>']
    """
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    decode = _Decoder(tokenizer)
    found = []
    for document in documents(row):
        ids = [int(row["input_ids"][i]) for i in document]
        labels = [int(row["labels"][i]) for i in document]
        cuts = _cut(ids, special, decode)
        found.append([Piece(text, tuple(ids[a:b]), tuple(labels[a:b]), ids[a] in special) for text, a, b in cuts])
    return found


class _Decoder:
    """Decodes tokens behind those that stand before them: some vocabularies drop the space of a first word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._decode = cache(lambda ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))
        self.context: tuple[int, ...] = ()

    def __call__(self, ids: tuple[int, ...]) -> str:
        return self._decode(self.context + ids)[len(self._decode(self.context)) :]


def _cut(ids: list[int], special: set[int], decode: _Decoder) -> Iterator[tuple[str, int, int]]:
    """Text, start and end of each piece of one document."""
    start, held = 0, ""  # tokens from `start` on wait for the rest of a character; they decode to `held`
    for end in range(1, len(ids) + 1):
        text = decode(tuple(ids[start:end]))
        alone = ids[end - 1] in special or (text.startswith(held) and text[len(held) :].strip(_UNFINISHED))
        if start < end - 1 and alone:  # what waited is not finished by this token, and stands for itself
            yield held, start, end - 1
            decode.context, start = tuple(ids[start : end - 1]), end - 1
            text = decode((ids[start],))
        waits = not text or text.endswith(_UNFINISHED)
        if waits and end < len(ids) and end - start < _LONGEST_WAIT and ids[end - 1] not in special:
            held = text
            continue
        yield text, start, end
        # behind bytes that are no character the next text would not begin where this one ends
        decode.context = () if text.endswith(_UNFINISHED) else tuple(ids[start:end])
        start, held = end, ""


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


_BRACKETS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "⟦⟧⟨⟩"})  # the data's own, where ours mark


@lru_cache(maxsize=4096)
def _hidden(char: str) -> bool:
    # Cf holds what turns the direction of writing around, and what has no width. U+200D joins emoji.
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\n\t\u200c\u200d"


def signs(text: str) -> Iterator[tuple[str, bool]]:
    """Text as `(shown, is a sign)`: control characters become signs; new lines and tabs stay.

    >>> list(signs("a\\x1b[31m"))
    [('a', False), ('\\\\x1b', True), ('[31m', False)]
    """
    for hidden, chars in groupby(text, key=_hidden):
        part = "".join(chars)
        yield part.encode("unicode_escape").decode() if hidden else part, hidden


def visible(text: str) -> str:
    """Text with its control characters as visible signs, safe to print."""
    return "".join(shown for shown, _ in signs(text))


# --------------------------------------------------------------------------------------------------------------------
# Terminal
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowView:
    """A row that a rich console prints in colour, or with brackets where it has none."""

    documents: list[list[Piece]]
    ids: bool = False
    starts: tuple[int, ...] = ()  # the first position of each document, or branch

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = no_colour(console)
        for name, parts in zip(names(self.starts or (0,) * len(self.documents)), self.documents, strict=True):
            if len(self.documents) > 1:
                tokens, loss = count(parts)
                title = f"{name} · {tokens:,} tokens, {loss:,} with loss"
                yield Rule(Text(title, style="cyan"), align="left", style="cyan")
            if self.ids:
                yield from _interlinear(parts, options.max_width, plain)
            else:
                yield _running(parts, plain)


def names(starts: Sequence[int]) -> list[str]:
    """What the parts of a row are called: documents, and branches of the document before them.

    A branch is read behind the first tokens of the document, or of the branch that it leaves, and begins with a copy of
    the last of these.

    >>> names([0, 7, 0])
    ['document 1 of 2', 'branch of document 1, behind its first 7 tokens', 'document 2 of 2']
    >>> names([0, 7])
    ['trunk', 'branch behind the first 7 tokens']
    """
    total, document, found = sum(start == 0 for start in starts), 0, []
    for start in starts:
        document += start == 0
        if total > 1:
            branch = f"branch of document {document}, behind its first {start:,} tokens"
            found.append(branch if start else f"document {document} of {total}")
        else:
            found.append(f"branch behind the first {start:,} tokens" if start else "trunk")
    return found


def coloured(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, ids: bool = False) -> RowView:
    """The row for a rich console; with `ids`, each token stands above its id.

    Example::

        rich.print(coloured(row, tokenizer))
    """
    found = pieces(row, tokenizer)
    return RowView(found, ids, tuple(row.get("seq_starts") or ())[: len(found)])


def no_colour(console: Console) -> bool:
    """Whether brackets must say what colours cannot: in a file, a pipe, or with NO_COLOR."""
    return console.no_color or console.color_system is None


def _shown(piece: Piece, plain: bool, spaces: str = " ", tab: str = "⇥   ", line: str = "⏎\n") -> Text:
    text, style = Text(), STYLES[piece.loss, piece.special]
    for part, sign in signs(piece.text):
        part = part.translate(_BRACKETS) if plain else part
        part = part.replace(" ", spaces).replace("\t", tab).replace("\n", line)
        text.append(part, style=SIGN if sign else style)
    return Text.assemble("⟨", text, "⟩") if plain and piece.special else text


def _running(parts: Sequence[Piece], plain: bool) -> Text:
    """A document as running text; each new line is a sign and a break."""
    text = Text()
    for loss, run in groupby(parts, key=lambda part: part.loss):
        shown = Text().join(_shown(part, plain) for part in run)
        if plain and loss:
            broken = _drop_break(shown)
            shown = Text.assemble("⟦", shown, "⟧", "\n" * broken)
        text.append_text(shown)
    _drop_break(text)  # the console ends the line
    return text


def _drop_break(text: Text) -> bool:
    if broken := text.plain.endswith("\n"):
        text.right_crop(1)
    return broken


def _interlinear(parts: Sequence[Piece], width: int, plain: bool) -> Iterator[Text]:
    """A document token by token, each above its id; without colour, `^` stands under what carries loss."""
    lines = [Text(), Text(), Text()]  # tokens, ids, marks
    for part in parts:
        shown = _shown(part, plain, "·", "⇥", "⏎")
        if not shown.cell_len:  # a joiner by itself
            shown = Text(shown.plain.encode("unicode_escape").decode(), style=SIGN)
        below = "+".join(map(str, part.ids))
        cell = max(shown.cell_len, len(below))
        if lines[0] and lines[0].cell_len + cell >= width:
            yield from _closed(lines, plain)
        marks = Text("^" * cell if part.loss else "")
        for line, content in zip(lines, (shown, Text(below, style="cyan"), marks), strict=True):
            line.append_text(content).append(" " * (cell + 1 - content.cell_len))
        if part.text.endswith("\n"):
            yield from _closed(lines, plain)
    if lines[0]:
        yield from _closed(lines, plain)


def _closed(lines: list[Text], plain: bool) -> Iterator[Text]:
    done, lines[:] = lines[: 3 if plain else 2], [Text(), Text(), Text()]
    for line in done:
        line.rstrip()
        yield line


@dataclass(frozen=True)
class Shown:
    """A row with its place in the split.

    Args:
        number: its place, counted from 1.
        of: rows in the split.
        documents: its pieces, document by document.
        cut: whether its end was cut off.
        starts: the first position of each document; more than 0 is a branch of the document before it.
    """

    number: int
    of: int
    documents: list[list[Piece]]
    cut: bool = False
    starts: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens, and those that carry loss."""
        return count([piece for document in self.documents for piece in document])

    @property
    def parts_in_words(self) -> list[str]:
        """How many documents and branches it holds, where it is not one document."""
        branches = sum(start > 0 for start in self.starts)
        documents = len(self.documents) - branches
        found = [f"{documents} documents"] if documents > 1 else []
        return found + ([f"{branches} {'branches' if branches > 1 else 'branch'}"] if branches else [])

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What the page shows of each document."""
        called = names(self.starts or (0,) * len(self.documents))
        return [
            {
                "name": name[0].upper() + name[1:],
                "counts": count(document),
                "runs": [(loss, count(list(run))[0]) for loss, run in groupby(document, key=lambda p: p.loss)],
                "html": "".join(map(_span, document)),
            }
            for name, document in zip(called, self.documents, strict=True)
        ]


def show(
    row: Mapping[str, Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    number: int = 1,
    of: int = 1,
    max_length: int | None = None,
) -> Shown:
    """A row made ready to be shown, and whether it was cut at `max_length`."""
    documents = pieces(row, tokenizer)
    starts = tuple(row.get("seq_starts") or (0,) * len(documents))[: len(documents)]
    cut = False
    if max_length is not None:
        learned = encoder(tokenizer)
        ending = learned.stop_token + learned.after_ending
        for document, start in zip(documents, starts, strict=True):
            full = start + sum(len(piece.ids) for piece in document) >= max_length
            cut |= full and not "".join(piece.text for piece in document[-32:]).endswith(ending)
    return Shown(number, of, documents, cut, starts)


def _span(piece: Piece) -> str:
    """One piece for the page. The signs of new lines and tabs are drawn by the style, so that a copy is the text."""
    kind = "l" if piece.loss else "n"
    ids, labels = (" ".join(map(str, values)) for values in (piece.ids, piece.labels))
    # a label is the token's own id, or -100; what is neither, or both in one character, is spelled out
    odd = f' data-l="{labels}"' if piece.loss and piece.labels != piece.ids else ""
    text = "".join(f'<i class="c">{html.escape(t)}</i>' if sign else html.escape(t) for t, sign in signs(piece.text))
    for char, name in (("\n", "nl"), ("\t", "tab")):
        text = text.replace(char, f'<i class="{name}"></i>{char}')
    # the break stands behind the token, so that its id stays on its line
    text, broken = (text[:-1], "\n") if text.endswith("\n") else (text, "")
    return f'<span class="{kind}{" s" if piece.special else ""}" data-i="{ids}"{odd}>{text}</span>{broken}'
