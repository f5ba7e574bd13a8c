"""The built-in prompts are answered by both models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instructft.extras import reading
from instructft.inference.generator import Generator
from instructft.models.load_for_inference import load_for_inference


def test_prompts_for_reading(
    moved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    prompts = reading.reading_prompts()
    assert len(prompts) == 30
    assert len({row["prompt"] for row in prompts}) == 30
    assert len({row["kind"] for row in prompts}) >= 12
    monkeypatch.setattr(reading, "MAX_NEW_TOKENS", 3)
    reading.read_prompts(str(moved_run), "start", tmp_path / "p.json")
    results = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in results["tuned"]["rows"]] == [row["prompt"] for row in prompts]
    generator = Generator(*load_for_inference(str(moved_run)))
    first = generator.answers([[{"role": "user", "content": prompts[0]["prompt"]}]], 3)[0]
    assert results["tuned"]["rows"][0]["prediction"] == first.text
    assert results["tuned"]["rows"] != results["base"]["rows"]
    out = capsys.readouterr().out
    assert "[fact] What is the capital of Japan?" in out
    assert out.count("before") >= 30
