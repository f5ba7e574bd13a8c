"""The last words of a run name what to read and what to type, and that works as typed."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from instructft.commands.train import print_outcome


@pytest.mark.parametrize("name", ["first", "my first", "it's [bold]", "-x"])
def test_the_last_line_works_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path(name)
    run.mkdir()
    (run / "report.html").touch()
    facts = {"train": {"steps": 3, "seconds": 2.0, "tokens_per_second": 10.0}}
    result = SimpleNamespace(output_dir=run, facts=facts, metrics={"eval_loss": 1.0}, pushed=None)
    print_outcome(result)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[0] == "Read"
    assert Path(words[1].rstrip(",")).samefile(run / "report.html")
    assert words[-3:-1] == ["instructft", "chat"]
    assert Path(words[-1]).samefile(run)
    (run / "report.html").unlink()  # it could not be drawn
    print_outcome(result)
    assert "report.html" not in capsys.readouterr().out
