"""`instructft docs` finds the pages of a checkout and of a wheel, and answers a mistyped name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from instructft.errors import UsageError
from instructft.extras import documentation
from instructft.extras.documentation import pages, show_page

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_is_listed_with_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    show_page(None)
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-2]} == {path.stem for path in DOCS.glob("*.md")}
    assert lines[0].split()[0] == "index"
    assert any(line.split(maxsplit=1) == ["resume", "Stopping and resuming"] for line in lines)


@pytest.mark.parametrize("name", ["convert", "convert.md", "docs/convert.md", "Convert"])
def test_a_page_is_printed_as_it_is_written(capsys: pytest.CaptureFixture[str], name: str) -> None:
    show_page(name)
    assert capsys.readouterr().out == (DOCS / "convert.md").read_text(encoding="utf-8")


def test_what_a_page_takes_in_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    show_page("releases")
    said = capsys.readouterr().out
    assert "--8<--" not in said
    assert "Unreleased" in said
    show_page("architecture")
    assert "<!--" not in capsys.readouterr().out


def test_in_a_terminal_it_is_laid_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("errors", "index"):
        show_page(name)
    said = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert "| --- |" not in said
    assert max(map(len, said.splitlines())) <= 60


def test_a_mistyped_name_is_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean `instructft docs resume`"):
        show_page("resum")
    with pytest.raises(UsageError, match="there is index, quickstart"):
        show_page("../../etc/passwd")
    monkeypatch.setattr(documentation, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(UsageError, match="not installed here"):
        show_page("errors")


def test_a_wheel_has_them_inside_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside = tmp_path / "instructft" / "docs"
    inside.mkdir(parents=True)
    for name in ("index", "releases"):
        (inside / f"{name}.md").write_text((DOCS / f"{name}.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(documentation, "__file__", str(tmp_path / "instructft" / "extras" / "documentation.py"))
    assert list(pages()) == ["index"]  # the releases are in a file that a wheel does not hold
