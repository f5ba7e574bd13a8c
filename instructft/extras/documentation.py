"""`instructft docs`: a page of the documentation in the terminal, from the wheel or a checkout, without the network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from instructft.errors import UsageError
from instructft.formatting import closest

_SNIPPET = re.compile(r'^--8<-- "([\w.]+)"$', re.M)  # another file's text, as the site takes it in
_COMMENT = re.compile(r"^<!--.*?-->\n?", re.M | re.S)


def pages() -> dict[str, Path]:
    """Name -> file of each page, the first one to read first.

    >>> pages()["quickstart"].name
    'quickstart.md'
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "docs", package.parent / "docs"):  # an installed wheel, a checkout
        if (folder / "index.md").is_file():
            found = {path.stem: path for path in folder.glob("*.md") if _text(path)}
            return dict(sorted(found.items(), key=lambda page: (page[0] not in ("index", "quickstart"), page[0])))
    return {}


def show_page(name: str | None) -> None:
    """Print a page: laid out in a terminal, as it is written elsewhere; without a name the list of pages.

    Raises:
        UsageError: there is no such page.
    """
    found = pages()
    if not found:
        raise UsageError("the documentation is not installed here; it comes with the wheel and in docs/ of a checkout")
    if name is None:
        width = max(map(len, found))
        for page, path in found.items():
            print(f"{page:{width}}  {_title(_text(path))}")
        print("\nRead one with: instructft docs PAGE")
        return
    asked = name.lower().removeprefix("docs/").removesuffix(".md")
    if asked not in found:
        near = closest(asked, found)
        hint = f"did you mean `instructft docs {near}`?" if near else f"there is {', '.join(found)}"
        raise UsageError(f"there is no page {name}; {hint}")
    text = _COMMENT.sub("", _text(found[asked])).strip() + "\n"
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text, hyperlinks=False), width=min(console.width, 110))


def _text(path: Path) -> str:
    """A page with what it takes in; "" where that is not here, as the list of releases is not in a wheel."""
    text = path.read_text(encoding="utf-8")
    for name in _SNIPPET.findall(text):
        other = path.parents[1] / name
        if not other.is_file():
            return ""
        text = text.replace(f'--8<-- "{name}"', other.read_text(encoding="utf-8"))
    return text


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.M)
    return found[1] if found else ""
