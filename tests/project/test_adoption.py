"""What people adopt the project by: a notebook, an image, hooks and issue templates, each against what is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_notebook_runs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its cells in order, in one scope, as a kernel runs them."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    scope: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # nobody's figures, nobody's folders
            exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), scope)
    said = capsys.readouterr().out
    assert "learned: 2<|endoftext|>" in said
    assert "step 20/20" in said  # progress is seen
    assert "> And of Italy?" in said
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def test_hooks_run_what_make_runs() -> None:
    hooks = [
        h for r in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"] for h in r["hooks"]
    ]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy"]
    for hook in hooks:
        python, *words = shlex.split(hook["entry"])
        assert python == ".venv/bin/python"
        made = " ".join(word for word in words if word != "--force-exclude")
        assert made in MAKEFILE.replace("$(BIN)/python ", "")
        assert shutil.which(words[1]) or __import__(words[1])


def test_issue_templates_ask_for_what_is_needed() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert set(forms) == {"bug.yml", "config.yml", "wish.yml"}
    for name in ("bug.yml", "wish.yml"):
        ids = [field["id"] for field in forms[name]["body"]]
        assert len(set(ids)) == len(ids)
        assert {"name", "description", "body"} <= set(forms[name])
    assert {"command", "output", "expected", "versions"} == {field["id"] for field in forms["bug.yml"]["body"]}


def test_the_image_holds_what_the_package_needs_and_runs_without_roots_rights() -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert set(copied) <= {name.removeprefix("!") for name in kept if name.startswith("!")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for needed in ("pyproject.toml", "README.md", "LICENSE", "instructft", "recipes"):  # what a build of it reads
        assert needed in copied
    (extras,) = re.findall(r"\.\[([\w,]+)\]", text)
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    (torch,) = re.findall(r"ARG TORCH=(\S+)", text)
    assert f"torch=={torch}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    users = [rest for word, rest in lines if word == "USER"]
    assert users == ["1000"]
    assert '["instructft"]' in dict(lines)["ENTRYPOINT"]
    assert 'instructft = "instructft.cli:main"' in project
