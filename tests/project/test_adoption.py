"""What people adopt the project by: a notebook, an image, hooks and issue templates, each against what is there."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_notebook_runs_offline_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter runs it: another process, whose messages are what the page shows."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] for cell in cells)  # nobody's figures, nobody's folders
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def shown(cell: Any) -> list[str]:
        """What each message brings to the page."""
        return [
            output.text if "text" in output else output.get("data", {}).get("text/plain", "") for output in cell.outputs
        ]

    row, run, chat = shown(cells[1]), shown(cells[2]), shown(cells[3])
    assert "learned: 2<|endoftext|>" in "".join(row)
    plain = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in run]
    steps = [text for text in plain if re.match(r"step \d+/10 · loss", text)]
    assert [text.split()[1] for text in steps] == ["5/10", "10/10"]  # each a message of its own, as it happens
    assert "> And of Italy?" in "".join(chat)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
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


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions in order, each with what follows it on one line."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in (line.split(maxsplit=1) for line in lines)]


def test_every_command_of_the_image_is_one_that_its_programs_take() -> None:
    """With the arguments as they stand, by the programs of this machine; nothing is fetched, no user is made."""
    defaults = dict(rest.split("=", 1) for word, rest in dockerfile() if word == "ARG")
    asked = [
        command
        for word, rest in dockerfile()
        if word == "RUN"
        for command in re.sub(r'"?\$(\w+)"?', lambda match: defaults[match[1]], rest).replace('"', "").split(" && ")
    ]
    assert [shlex.split(command)[0] for command in asked] == ["pip", "pip", "useradd", "mkdir", "chown"]
    for command in asked:
        program, *arguments = shlex.split(command)
        if program == "pip":
            assert arguments[0] == "install"
            said = subprocess.run([sys.executable, "-m", "pip", *arguments, "--help"], capture_output=True, text=True)
            assert said.returncode == 0, said.stderr  # each of them is an option of pip's
            package = arguments[-1]
            assert package == ".[ui,quant]" or Requirement(package).name == "torch"
            constraints = [value for flag, value in itertools.pairwise(arguments) if flag in ("-c", "--constraint")]
            assert all((ROOT / name).is_file() for name in constraints)
        elif program == "useradd" and (tool := shutil.which("useradd", path=f"{os.environ['PATH']}:/usr/sbin")):
            said = subprocess.run([tool, *arguments[:-1], "--help"], capture_output=True, text=True)
            assert said.returncode == 0, said.stderr
        elif program in ("mkdir", "chown"):
            assert arguments[-1] == "/work"
    assert [rest for word, rest in dockerfile() if word == "WORKDIR"][-1] == "/work"


def test_the_image_holds_what_the_package_needs_and_runs_without_roots_rights() -> None:
    lines = dockerfile()
    text = "\n".join(f"{word} {rest}" for word, rest in lines)
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert set(copied) <= {name.removeprefix("!") for name in kept if name.startswith("!")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for needed in ("pyproject.toml", "README.md", "LICENSE", "instructft", "recipes", "docs"):  # what its wheel holds
        assert needed in copied
    (extras,) = re.findall(r"\.\[([\w,]+)\]", text)
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    (torch,) = re.findall(r"ARG TORCH=(\S+)", text)
    assert f"torch=={torch}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    users = [rest for word, rest in lines if word == "USER"]
    assert users == ["1000"]
    assert '["instructft"]' in dict(lines)["ENTRYPOINT"]
    assert 'instructft = "instructft.cli:main"' in project
