"""The pages of docs/: links, commands, recipes and Python for real, and what the code decides as the code says it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import instructft
from instructft import errors, load_recipe
from instructft.cli import app
from instructft.data.formats import FORMATS
from instructft.data.sources import SOURCES
from instructft.recipe.fields import field_problem, legal_lora_fields, legal_train_fields
from tests.helpers.markdown import FENCED, Page, code
from tests.helpers.quickstart import rows as quickstart_rows

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = {path.name: Page(path) for path in [*ROOT_PAGES, *sorted(DOCS.glob("*.md"))]}


def script(name: str) -> Any:
    """A script of scripts/, imported by its path."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


REFERENCE = script("docs_reference")
HARDWARE = script("docs_hardware")

# Pages


@pytest.mark.parametrize("name", ["docs_reference", "docs_blocks", "docs_hardware"])
def test_what_is_written_by_a_script_is_what_it_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", "--check"])
    script(name).main()  # which ends with what is out of date


def gpu_lines() -> dict[str, list[str]]:
    """Model -> how much it takes and which card has that, a cell for each goal, as the page says."""
    lines = [line.strip("| ").split(" | ") for line in HARDWARE.rows(PAGES["hardware.md"].text)]
    assert [line[0] for line in lines] == [f"`{model.name}`" for model in HARDWARE.MODELS]
    assert [line[4] for line in lines] == [f"`{model.recipe}`" for model in HARDWARE.MODELS]
    return {line[0].strip("`"): line[1:4] for line in lines}


def test_the_card_of_a_gpu_line_is_the_smallest_that_holds_it() -> None:
    for cells in gpu_lines().values():
        for cell in cells:
            named, size = cell.rstrip(")").split(" (")
            near = [float(size.removesuffix(" GiB")) + part for part in (-0.05, 0, 0.05)]  # the page rounds
            assert named in [HARDWARE.card(int(one * HARDWARE.GIB)) for one in near], cell


@pytest.mark.battery
@pytest.mark.parametrize("goal", HARDWARE.GOALS)
@pytest.mark.parametrize("model", HARDWARE.MODELS, ids=lambda model: model.name)
def test_a_gpu_line_is_what_check_estimates(model: Any, goal: str) -> None:
    said = gpu_lines()[model.name][list(HARDWARE.GOALS).index(goal)]
    assert f"({HARDWARE.need(model, goal) / HARDWARE.GIB:.1f} GiB)" in said


def test_a_page_that_is_out_of_date_is_seen() -> None:
    blocks = script("docs_blocks")
    text = "a\n<!-- layers: by scripts/docs_blocks.py -->\nold\n<!-- end -->\nb\n"
    filled = blocks.fill(text, "page")
    assert "old" not in filled
    assert "cli.py" in filled
    assert blocks.fill(filled, "page") == filled
    with pytest.raises(SystemExit, match="nobody"):
        blocks.place("nobody")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    for link in page.links():
        assert not re.match(r"https?:", link), f"{link}: name what is elsewhere in words; this page is read offline"
        file, _, anchor = link.partition("#")
        target = page.path.parent / file if file else page.path
        assert target.is_file(), link
        if page.path.parent == DOCS:
            assert DOCS in target.parents, f"{link} is not part of the site"
        if anchor:
            assert anchor in Page(target).anchors(), link


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"- ([\w-]+\.md)$", text, re.M)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))
    assert {*PAGES["index.md"].links()} >= {*listed} - {"index.md"}


def test_the_site_builds_without_a_warning_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="no MkDocs: make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (built.returncode, built.stderr) == (0, "")
    pages = [path for path in (tmp_path / "site").glob("*.html") if path.name != "404.html"]
    assert len(pages) == len(list(DOCS.glob("*.md")))
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=.https?:[^>]*>|@import", text), path.name


def test_files_that_are_named_are_there() -> None:
    found = 0
    for page in PAGES.values():
        for span in page.spans():
            if re.fullmatch(r"(instructft|tests|recipes|scripts|benchmarks|docs)/[\w./-]*", span):
                assert (ROOT / span).exists(), f"{page.path.name}: {span}"
                found += 1
    assert found > 20


def test_the_questions_are_answered_by_files() -> None:
    rows = PAGES["architecture.md"].table("question")
    assert len(rows) == 13
    for question, (answer,) in rows.items():
        assert [path for path in code(answer) if path.startswith("instructft/")], question


# Commands


def command_lines() -> list[list[str]]:
    """Every command line of instructft on any page, in words."""
    lines = [line.removeprefix("$ ") for page in PAGES.values() for text in page.blocks() for line in text.splitlines()]
    spans = [span.split(" > ")[0] for page in PAGES.values() for span in page.spans()]
    lines += [span for span in spans if not re.search(r"[…\[]|[A-Z]{4}", span)]
    ours = [line for line in lines if re.match(r"(\s*\.venv/bin/)?instructft +[a-z]", line)]
    return [shlex.split(line, comments=True)[1:] for line in ours]


def parse(words: list[str]) -> dict[str, Any]:
    """What the real parser makes of a command line; raises what it would print."""
    group = typer.main.get_command(app)
    context = group.make_context("instructft", list(words))
    _, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    return command.make_context(words[0], rest, parent=context).params


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support(tmp_path, monkeypatch)
    for name in ("mine", "tickets"):  # what init would have written
        (tmp_path / f"{name}.yaml").write_text(
            (tmp_path / "support.yaml").read_text(encoding="utf-8"), encoding="utf-8"
        )
    lines = command_lines()
    assert len(lines) >= 20
    recipes = 0
    for words in lines:
        if len(words) == 1:  # a command that is only named
            assert words[0] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
            continue
        given = parse(words)
        if words[0] == "train" and given["recipe"] != "my.yaml":  # which is the wrong recipe
            load_recipe(given["recipe"], given["overrides"] or [])
            recipes += 1
        if words[0] == "init" and given["data"] is None:
            assert (ROOT / "recipes" / f"{given['name']}.yaml").is_file()
    assert recipes >= 2


def test_the_table_of_commands_is_complete() -> None:
    listed = [code(cell)[0].split() for cell in PAGES["commands.md"].table("command")]
    group = typer.main.get_command(app)
    assert sorted(words[1] for words in listed) == sorted(group.commands)  # type: ignore[attr-defined]
    for _, name, *rest in listed:
        options = group.commands[name].params  # type: ignore[attr-defined]
        known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        assert {word.strip("[]") for word in rest if word.strip("[]").startswith("--")} <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named: set[str] = set()
    for page in PAGES.values():
        text = "\n".join([*page.spans(), *(text for _, text in FENCED.findall(page.text))])
        named |= set(re.findall(r"^(?:\S+ +)?make ([a-z-]+)", text, re.M))
    assert {"quickstart", "test", "test-latest", "venv", "lint", "docs", "battery"} <= named
    assert named <= targets


def test_exit_codes_are_those_of_the_program() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(code) for code in PAGES["errors.md"].table("exit code")} == codes


def test_messages_that_are_quoted_are_said() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "instructft").rglob("*.py"))
    quoted = [
        words for cell in PAGES["troubleshooting.md"].table("what you see") for words in re.findall('"(.+?)"', cell)
    ]
    assert quoted
    assert [words for words in quoted if words not in source] == []


def test_our_environment_variables_are_read() -> None:
    source = (ROOT / "instructft" / "cli.py").read_text(encoding="utf-8")
    for name in ("INSTRUCTFT_TRACEBACK", "HF_HUB_DISABLE_TELEMETRY"):
        assert any(name in cell for cell in PAGES["errors.md"].table("environment variable"))
        assert f'"{name}"' in source


# Recipes


def support(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of recipe.md next to a file of rows, in the current directory."""
    text = PAGES["recipe.md"].block_with("yaml-language-server")
    (folder / "support.yaml").write_text(text, encoding="utf-8")
    (folder / "support.jsonl").write_text(json.dumps({"question": "Q", "answer": "A"}) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder / "support.yaml"


def test_the_recipe_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(support(tmp_path, monkeypatch))
    assert recipe.output_dir == "runs/support"
    assert recipe.data.datasets[0].columns == {"instruction": "question", "output": "answer"}
    hub = PAGES["hub.md"].block_with("repo_id")
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
    shown = PAGES["recipe.md"].block_with("my.yaml: 7 problems")
    assert shown == f"$ instructft train my.yaml\ninstructft: {raised.value}\n"


def test_keys_exist() -> None:
    properties = REFERENCE.json_schema()["properties"]
    keys = {
        match.groups()
        for page in PAGES.values()
        for text in page.spans()
        if (match := re.match(r"(model|data|adapter|train|hub|check)\.([a-z_]+)(?=$|[\s=]|:(?!\d))", text))
        and not text.endswith((".safetensors", ".py", ".log"))
    }
    assert len(keys) >= 15
    for name, key in keys:
        shape = properties[name]
        known = shape["properties"] if "properties" in shape else shape["anyOf"][0]["properties"]
        assert key in known, f"{name}.{key}"


def test_the_reference_has_every_key() -> None:
    listed = {code(cell)[0] for _, rows in PAGES["recipe-reference.md"].tables() for cell in rows}
    assert listed == {key.rpartition(".")[2] for key in REFERENCE.properties()}
    assert set(REFERENCE.OWN) <= set(REFERENCE.properties())


NEEDS = {  # what else an example wants
    "data.datasets.0.streaming": ["data.splits={validation: 0}", "train.max_steps=10"],
    "model.config": ["model.name_or_path=null", "model.tokenizer=quickstart"],
    "model.quantization": ["adapter.type=lora"],
    "adapter": ["adapter.type=lora"],
    "train.early_stopping_patience": ["data.splits={validation: 0.1}"],
    "train.float32_copies": ["model.dtype=bfloat16"],
    "hub.push": ["hub.repo_id=ada/support"],
    "hub.path_in_repo": ["hub.repo_id=ada/support"],
}


@pytest.mark.parametrize("key", REFERENCE.OWN)
def test_examples_of_our_own_keys_load(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "held-out.jsonl"):
        Path(name).write_text('{"instruction": "Q", "output": "A"}\n', encoding="utf-8")
    Path("my_metrics.py").write_text("def score(prediction, reference, row):\n    return 1.0\n", encoding="utf-8")
    Path("out.txt").write_text("0123456789abcdef\n", encoding="utf-8")
    entry = {"name": "quickstart"} if key.startswith("data.datasets.0.") else "quickstart"
    if key.startswith("data.datasets.0.") and key.rpartition(".")[2] in ("name", "hub", "path", "url"):
        entry = {}
    elif key.rpartition(".")[2] in ("revision", "config", "split"):
        entry = {"hub": "org/name"}
    plain: Any = {"model": {"name_or_path": "org/name"}, "data": {"datasets": [entry]}}
    if key == "model.config":
        plain["model"] = {}
    Path("recipe.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    example = f"{key}={REFERENCE.OWN[key][1]}"
    load_recipe("recipe.yaml", [*NEEDS.get(key, NEEDS.get(key.split(".")[0], [])), example])


def test_examples_of_fields_are_legal() -> None:
    known = REFERENCE.properties()
    for section, fields in (("train", legal_train_fields()), ("adapter", legal_lora_fields())):
        for name, row in fields.items():
            key = f"{section}.{name}"
            if key not in REFERENCE.OWN:
                assert not field_problem(key, row, REFERENCE.upstream_example(name, known[key])), key


# Data and templates


def test_data_sets_and_formats() -> None:
    page = PAGES["data.md"]
    (names,) = re.findall(r"\*\*Data sets by name:\*\*([^.]*)\.", page.text)
    assert code(names) == list(SOURCES)
    rows = page.table("format")
    assert [code(cell)[0] for cell in rows] == list(FORMATS)
    for cell, (needed, more) in rows.items():
        known = FORMATS[code(cell)[0]]
        names = {name for name in code(needed) if re.fullmatch("[a-z_]+", name)}
        assert names == set(known.columns)
        assert set(code(more)) == set(known.optional)


def test_templates_render_exactly_so() -> None:
    from instructft.prompt.loss_mask import render
    from instructft.prompt.templates import TEMPLATES

    rows = PAGES["data.md"].table("`data.template`")
    assert [code(cell)[0] for cell in rows] == list(TEMPLATES)
    asked = [{"role": "user", "content": "{question}"}, {"role": "assistant", "content": "{answer}"}]
    for cell, (text,) in rows.items():
        tokenizer = instructft.load_tokenizer(load_recipe("quickstart", [f"data.template={code(cell)[0]}"]))
        own_end = tokenizer.eos_token if TEMPLATES[code(cell)[0]].stop is None else "<eos>"
        rendered = render(asked, tokenizer).replace(own_end, "<eos>")
        assert code(text) == [rendered.replace("\n", "\\n")]


def test_licences() -> None:
    said = " ".join(PAGES["data.md"].section("Licences of the data").split())
    for name, source in SOURCES.items():
        if name.startswith("quickstart"):
            assert "quickstart's data are Apache-2.0" in said
        else:
            assert re.search(rf"`{name}`[^;.]* {re.escape(source.licence)}", said), name


# Python


def test_python_compiles_and_names_what_exists() -> None:
    assert len(PAGES["python.md"].blocks("python")) == 2
    for text in PAGES["python.md"].blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "instructft":
                assert {alias.name for alias in node.names} <= set(instructft.__all__)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "instructft":
                assert node.attr in instructft.__all__
    assert all(hasattr(instructft, name) for name in instructft.__all__)
    headings = set(re.findall(r"^## (\w+)$", PAGES["python-reference.md"].text, re.M))
    assert headings == set(instructft.__all__) - {"__version__"}


@pytest.mark.drawn
def test_python_runs_and_leaves_the_run_folder_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first block trains ten steps; the second asks that model instead of the quickstart's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    first, second = PAGES["python.md"].blocks("python")
    scope: dict[str, Any] = {}
    exec(compile(first, "python.md, first block", "exec"), scope)
    out = capsys.readouterr().out
    assert out.startswith("2<|endoftext|>\n")
    assert list(scope["splits"]) == ["train", "validation", "test"]
    quickstart = PAGES["quickstart.md"].text
    assert f"{len(scope['splits']['test'])} test rows are held out" in quickstart
    assert f"{len(scope['splits']['test'])} test rows are held out" in PAGES["README.md"].text
    assert f"{len(quickstart_rows()):,} question-answer rows" in quickstart

    # what data.md shows of a start is what a start shows
    labels = [line[:9].strip() for line in PAGES["data.md"].block_with("A training row").splitlines()[:8]]
    shown = [line[:9].strip() for line in out.splitlines()]
    assert labels[0] == "model"
    always = [label for label in labels if label not in ("dropped", "cut")]
    assert always == [label for label in shown if label in always]
    assert "A training row; what carries loss is between ⟦ and ⟧:" in out

    listed = {name.rstrip("/") for cell in PAGES["run-folder.md"].table("file") for name in code(cell)}
    assert {path.name for path in Path("runs/ten").iterdir()} == listed - {"checkpoint-N"}

    Path("runs/ten").rename("runs/quickstart")
    exec(compile(second, "python.md, second block", "exec"), {})


def test_the_tests_that_security_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    gone = [test for file, test in named if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")]
    assert gone == []
