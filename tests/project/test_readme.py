"""The README: its file tree against the disk, its commands against the parser, its recipe and its Python for real."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import instructft
from instructft import errors
from instructft.cli import app
from instructft.data.quickstart import rows as quickstart_rows
from instructft.data.sources import FORMATS, SOURCES
from instructft.recipe.schema import json_schema, load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCED.findall(README) if name == language]


def block_with(language: str, part: str) -> str:
    (found,) = (text for text in blocks(language) if part in text)
    return found


def spans() -> list[str]:
    """All inline code, as it is read: in a table `\\|` is a `|`."""
    return [code.replace("\\|", "|") for code in re.findall(r"`([^`\n]+)`", FENCED.sub("", README))]


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    return text


def tables() -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Heading of the first column, and first cell -> the other cells, of every table."""
    for table in re.findall(r"(?:^\|.*\n)+", README, re.M):
        head, _, *rows = ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines())
        yield head[0], {row[0]: row[1:] for row in rows}


def table(heading: str) -> dict[str, list[str]]:
    (found,) = (rows for name, rows in tables() if name == heading)
    return found


def code(cell: str) -> list[str]:
    return [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", cell)]


# The file tree


def tree() -> dict[str, str]:
    """Path -> what the tree says of it."""
    found, folder = {}, ""
    for line in block_with("", "instructft/\n  __init__.py").splitlines():
        indented, name, said = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folder = folder if indented else ""
        found[folder + name] = said
        if name.endswith("/") and not indented:
            folder = name
    return found


def test_the_tree_lists_what_is_there() -> None:
    listed = set(tree())
    files = {path for path in listed if not path.endswith("/")}
    for folder, pattern in [("instructft", "*.py"), ("instructft", "*.json"), ("recipes", "*.yaml"), ("scripts", "*")]:
        on_disk = {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern) if path.is_file()}
        assert on_disk
        suffix = pattern.lstrip("*")
        assert on_disk == {path for path in files if path.startswith(f"{folder}/") and path.endswith(suffix)}
    assert "instructft/templates/" in listed
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_the_tree_says_what_each_file_is_for() -> None:
    plain = {"README.md", "LICENSE", "instructft/", "recipes/", "scripts/"}
    assert {path for path, said in tree().items() if not said} == plain


@pytest.mark.parametrize("row", [*table("question")], ids=lambda row: row[:40])
def test_the_answers_to_where_is_what_are_there(row: str) -> None:
    named = [path for path in code(table("question")[row][0]) if "/" in path]
    assert named or "encode_conversation" in table("question")[row][0]
    assert [path for path in named if not (ROOT / path).exists()] == []


# Commands


def commands() -> list[list[str]]:
    """Every command line of instructft in a block, in words."""
    lines = [line.removeprefix("$ ") for _, text in FENCED.findall(README) for line in text.splitlines()]
    lines += [span.split(" > ")[0] for span in spans() if not re.search(r"[…\[]|[A-Z]{4}", span)]
    ours = [line for line in lines if re.match(r"(\.venv/bin/)?instructft +[a-z]", line)]
    return [shlex.split(line, comments=True)[1:] for line in ours]


def parse(words: list[str]) -> dict[str, Any]:
    """What the real parser makes of a command line; raises what it would print."""
    group = typer.main.get_command(app)
    context = group.make_context("instructft", list(words))
    _, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    return command.make_context(words[0], rest, parent=context).params


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_recipe(tmp_path, monkeypatch)
    assert len(commands()) >= 8
    recipes = 0
    for words in commands():
        if len(words) == 1:  # a command that is only named
            assert words[0] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
            continue
        given = parse(words)
        if words[0] == "train" and given["recipe"] != "my.yaml":  # which is the wrong recipe
            load_recipe(given["recipe"], given["overrides"] or [])
            recipes += 1
        if words[0] == "init":
            assert given["name"] in shipped_recipes()
    assert recipes >= 2


def test_the_table_of_commands_is_complete() -> None:
    listed = [code(cell)[0].split() for cell in table("command")]
    group = typer.main.get_command(app)
    assert sorted(words[1] for words in listed) == sorted(group.commands)  # type: ignore[attr-defined]
    for _, name, *rest in listed:
        options = group.commands[name].params  # type: ignore[attr-defined]
        known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        assert {word.strip("[]") for word in rest if word.strip("[]").startswith("--")} <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    text = "\n".join([*spans(), *(text for _, text in FENCED.findall(README))])
    named = set(re.findall(r"^(?:\S+ +)?make ([a-z-]+)", text, re.M))
    assert {"quickstart", "test", "venv", "lint", "types"} <= named
    assert named <= targets


def test_exit_codes_are_those_of_the_program() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(code) for code in table("exit code")} == codes


def test_our_environment_variables_are_read() -> None:
    source = (ROOT / "instructft" / "cli.py").read_text(encoding="utf-8")
    for name in ("INSTRUCTFT_TRACEBACK", "HF_HUB_DISABLE_TELEMETRY"):
        assert any(name in cell for cell in table("environment variable"))
        assert f'"{name}"' in source


# Recipes


def own_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's recipe beside a file of rows, in the current directory."""
    text = block_with("yaml", "yaml-language-server")
    (folder / "support.yaml").write_text(text, encoding="utf-8")
    (folder / "support.jsonl").write_text(json.dumps({"question": "Q", "answer": "A"}) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder / "support.yaml"


def test_the_recipe_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(own_recipe(tmp_path, monkeypatch))
    assert recipe.output_dir == "runs/support"
    assert recipe.data.datasets[0].columns == {"instruction": "question", "output": "answer"}
    hub = block_with("yaml", "repo_id")
    path = tmp_path / "hub.yaml"
    path.write_text(f"model: {{name_or_path: org/name}}\ndata: {{datasets: quickstart}}\n{hub}", encoding="utf-8")
    assert load_recipe(path).hub.push == "checkpoints"


WRONG = """\
model:
  name_or_path: openai-community/gpt2
  lora_r: 8
data:
  datasets: doly-15k
  cutoff_len: 512
  splits: {validation: 0.6, test: 0.5}
train:
  learning_rate: fast
  max_length: 1024
  fp16: true
  bf16: true
"""


def test_a_wrong_recipe_says_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(WRONG, encoding="utf-8")
    with pytest.raises(errors.RecipeError) as raised:
        load_recipe("my.yaml")
    assert block_with("", "my.yaml: 7 problems") == f"$ instructft train my.yaml\ninstructft: {raised.value}\n"


def test_keys_exist() -> None:
    properties = json_schema()["properties"]
    keys = [
        match.groups()
        for text in spans()
        if (match := re.match(r"(model|data|adapter|train|hub)\.([a-z_]+)(?=$|[\s=:])", text))
        and not text.endswith(".safetensors")
    ]
    assert len(keys) >= 8
    for name, key in keys:
        shape = properties[name]
        known = shape["properties"] if "properties" in shape else shape["anyOf"][0]["properties"]
        assert key in known, f"{name}.{key}"


# Data and templates


def test_data_sets_and_formats() -> None:
    (names,) = re.findall(r"\*\*Data sets by name:\*\*([^.]*)\.", README)
    assert code(names) == list(SOURCES)
    rows = table("format")
    assert [code(cell)[0] for cell in rows] == list(FORMATS)
    for cell, (needed, more) in rows.items():
        known = FORMATS[code(cell)[0]]
        names = {name for name in code(needed) if re.fullmatch("[a-z]+", name)}
        assert names == set(known.columns)
        assert set(code(more)) == set(known.optional)


def test_templates_render_exactly_so() -> None:
    from instructft.models.tokenizer import load_tokenizer
    from instructft.prompt.loss_mask import render
    from instructft.prompt.templates import TEMPLATES

    rows = table("`data.template`")
    assert [code(cell)[0] for cell in rows] == list(TEMPLATES)
    asked = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    for cell, (text,) in rows.items():
        tokenizer = load_tokenizer(load_recipe("quickstart", [f"data.template={code(cell)[0]}"]))
        own_end = tokenizer.eos_token if TEMPLATES[code(cell)[0]].stop is None else "<eos>"
        rendered = render(asked, tokenizer).replace(own_end, "<eos>")
        assert code(text) == [rendered.replace("\n", "\\n")]


def test_the_picture_of_the_mask_is_the_one_in_the_code() -> None:
    from instructft.prompt import loss_mask

    picture = block_with("", "added by the prompt of turn 2")
    assert picture.splitlines() == [
        line.strip() for line in (loss_mask.__doc__ or "").splitlines() if "turn 2" in line or "<eos>###" in line
    ]


def test_licences() -> None:
    said = " ".join(section("Licence").split())
    for name, source in SOURCES.items():
        if name == "quickstart":
            assert "Apache-2.0, the quickstart data included" in said
        else:
            assert re.search(rf"`{name}`[^;.]* {re.escape(source.licence)}", said), name


# Python


def test_python_compiles_and_names_what_exists() -> None:
    assert len(blocks("python")) == 2
    for text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "instructft":
                assert {alias.name for alias in node.names} <= set(instructft.__all__)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "instructft":
                assert node.attr in instructft.__all__
    assert all(hasattr(instructft, name) for name in instructft.__all__)


def test_python_runs_and_leaves_the_run_folder_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first block trains ten steps; the second asks that model instead of the quickstart's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    first, second = blocks("python")
    scope: dict[str, Any] = {}
    exec(compile(first, "README.md, first Python block", "exec"), scope)
    out = capsys.readouterr().out
    assert out.startswith("2<|endoftext|>\n")
    assert list(scope["splits"]) == ["train", "validation", "test"]
    assert f"{len(scope['splits']['test'])} test rows are held out" in README
    assert f"{len(quickstart_rows()):,} question-answer rows" in README

    # what the README shows of a start is what a start shows
    labels = [line[:9].strip() for line in block_with("", "A training row").splitlines()[:8]]
    shown = [line[:9].strip() for line in out.splitlines()]
    assert labels[0] == "model"
    always = [label for label in labels if label not in ("dropped", "cut")]
    assert always == [label for label in shown if label in always]
    assert "A training row; what carries loss is between ⟦ and ⟧:" in out

    listed = {name.rstrip("/") for cell in table("file") for name in code(cell)}
    assert {path.name for path in Path("runs/ten").iterdir()} == listed - {"checkpoint-N"}

    Path("runs/ten").rename("runs/quickstart")
    exec(compile(second, "README.md, second Python block", "exec"), {})
