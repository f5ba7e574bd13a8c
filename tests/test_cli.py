"""The command line: what is wrong is said once and clearly, with exit code 2, before any weight is loaded."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

import instructft
from instructft import cli

REPO = Path(__file__).resolve().parent.parent

ROW = json.dumps({"instruction": "What is 1 + 1?", "input": "", "output": "2"})
RECIPE = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128}, tokenizer: quickstart}
data:
  datasets: [{path: rows.jsonl}]
  template: instruction
  max_length: 128
  splits: {validation: 0.1}
train: {max_steps: 1, use_cpu: true}
output_dir: run
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory with a sound recipe `my.yaml` and its rows."""
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(RECIPE, encoding="utf-8")
    unlike = [" ".join(random.Random(n).sample(string.ascii_lowercase, 20)) for n in range(20)]
    rows = [json.dumps({"instruction": text, "input": "", "output": text[:9]}) for text in unlike]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test when any weights are loaded or made."""
    from transformers import AutoModelForCausalLM

    for name in ("from_pretrained", "from_config"):
        monkeypatch.setattr(AutoModelForCausalLM, name, lambda *args, **kwargs: pytest.fail("weights were loaded"))


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["instructft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def said_clearly(code, out, err, *parts):
    """One message, exit code 2, no traceback; every part of it is there."""
    assert code == 2, err
    for part in parts:
        assert part in err, f"{part!r} is not in: {err}"
    assert "Traceback" not in err
    assert out == ""
    assert err.count("instructft: ") == 1, err
    assert not Path("run").is_dir() or not list(Path("run").glob("*.safetensors"))


# --------------------------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------------------------

MODEL = RECIPE.splitlines()[1]

# what is replaced in the recipe, by what, and what is said about it
BAD_RECIPES = {
    "unknown key": (
        "max_length: 128",
        "max_lenght: 128",
        ["my.yaml: 1 problem", "line 6", "data.max_lenght", "max_length"],
    ),
    "another tool's key": ("max_length: 128", "cutoff_len: 128", ["data.cutoff_len", "max_length"]),
    "key given twice": ("max_length: 128", "max_length: 128\n  max_length: 64", ["line 7", "max_length", "twice"]),
    "wrong type": ("max_length: 128", "max_length: long", ["line 6", "data.max_length", "long", "tokens"]),
    "bad value": ("max_length: 128", "max_length: 0", ["line 6", "data.max_length", "0"]),
    "not YAML": ("max_length: 128", "max_length: [", ["my.yaml", "line"]),
    "no data": ("datasets: [{path: rows.jsonl}]", "{}", ["my.yaml"]),
    "unknown data set": ("[{path: rows.jsonl}]", "doly-15k", ["doly-15k", "dolly-15k"]),
    "unknown format": ("{path: rows.jsonl}", "{path: rows.jsonl, format: alpacca}", ["format", "alpacca", "alpaca"]),
    "unknown template": ("template: instruction", "template: chatlm", ["data.template", "chatlm", "chatml"]),
    "missing template": ("template: instruction", "template: mine.jinja", ["data.template", "mine.jinja"]),
    "splits too large": ("{validation: 0.1}", "{validation: 0.6, test: 0.5}", ["data.splits", "0.6 + 0.5"]),
    "unknown train field": ("max_steps: 1", "max_stepps: 1", ["train.max_stepps", "max_steps"]),
    "wrong train type": ("max_steps: 1", "learning_rate: fast", ["train.learning_rate", "fast"]),
    "a field with another home": ("max_steps: 1", "output_dir: x", ["train.output_dir", "output_dir"]),
    "missing data file": ("rows.jsonl", "row.jsonl", ['there is no "row.jsonl"', "rows.jsonl"]),
    "data file is a folder": ("rows.jsonl", ".", ["data.datasets[0]", "expected a list of rows"]),
    "unknown ending": ("rows.jsonl", "my.yaml", ["data.datasets", "my.yaml", "save the rows as .jsonl"]),
    "missing model folder": (MODEL, "model: {name_or_path: ./nowhere}", ["line 2", "model.name_or_path", "./nowhere"]),
    "missing tokenizer folder": ("tokenizer: quickstart", "tokenizer: ./nowhere", ["model.tokenizer", "./nowhere"]),
    "no tokenizer": (", tokenizer: quickstart", "", ["model.tokenizer", "missing"]),
    "a token": ("max_steps: 1", "hub_token: hf_abcdefghijklmnop", ["train.hub_token", "HF_TOKEN"]),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes(here, run, no_weights, case):
    old, new, parts = BAD_RECIPES[case]
    assert old in RECIPE
    Path("my.yaml").write_text(RECIPE.replace(old, new, 1), encoding="utf-8")
    code, out, err = run("train", "my.yaml")
    said_clearly(code, out, err, *parts)
    assert "hf_abc" not in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.yaml"], ["nowhere.yaml", "there is no such file"]),
        (["quickstrt"], ["quickstrt", "did you mean"]),
        (["."], ["found a folder"]),
        (["my.yaml", "train.learning_rat=1"], ["train.learning_rat", "learning_rate"]),
        (["my.yaml", "max_length"], ["max_length"]),
        (["my.yaml", "data.max_length=x", "train.max_steps=y"], ["2 problems", "data.max_length", "train.max_steps"]),
    ],
)
def test_bad_arguments_of_train(here, run, no_weights, arguments, parts):
    said_clearly(*run("train", *arguments), *parts)


# --------------------------------------------------------------------------------------------------------------------
# Data, tokenizer, template, model, run folder
# --------------------------------------------------------------------------------------------------------------------

KNOWN = ["no known format has the columns", "  dolly: instruction, response", "map them in the recipe"]

# the file's name, its content, what is said
BAD_FILES = {
    "empty": ("a.json", "", ["a.json is empty"]),
    "no rows": ("a.json", "[]", ["a.json holds no rows"]),
    "not JSON": ("a.json", '[{"instruction": "a",\n  "output": }]', ["a.json, line 2, column 13: not JSON"]),
    "an object": ("a.json", '{"rows": 7}', ["a.json holds a JSON object, expected a list of rows"]),
    "a row that is none": ("a.json", f"[{ROW}, 7]", ["a.json: row 2 is a JSON number, expected an object"]),
    "a bad line": ("a.jsonl", f"{ROW}\n{{instruction: a}}\n", ["a.jsonl, line 2, column 2: not JSON"]),
    "not UTF-8": ("a.jsonl", b'{"instruction": "\xe9"}\n', ["a.jsonl: line 1, byte 18 is not UTF-8"]),
    "bad gzip": ("a.jsonl.gz", b"\x1f\x8bnonsense", ["a.jsonl.gz could not be read"]),
    "cut gzip": (
        "a.jsonl.gz",
        gzip.compress(ROW.encode() * 99, mtime=0)[:50],
        ["a.jsonl.gz could not be read: Compressed file"],
    ),
    "bad parquet": ("a.parquet", b"PAR1", ["a.parquet is not a whole Parquet file"]),
    "ragged CSV": ("a.csv", "instruction,output\na,b\na,b,c\n", ["a.csv, line 3: found 3 cells, expected 2"]),
    "unknown columns": ("a.jsonl", '{"question": "a", "reply": "b"}\n', [*KNOWN, "question, reply"]),
    "unknown columns in CSV": ("a.csv", "question;reply\na;b\n", [*KNOWN, "question, reply"]),
    "not text": (
        "a.jsonl",
        '{"instruction": "a", "output": "\\ud83d"}\n' * 3,
        ["a.jsonl can be trained on: 3 with half a character"],
    ),
    "no row left": (
        "a.jsonl",
        '{"instruction": "a", "output": ""}\n{"instruction": "", "output": "b"}\n{"instruction": "a"}\n',
        ["no row of a.jsonl can be trained on: 2 with an empty answer, 1 with an empty question"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_data_files(here, run, no_weights, case):
    name, content, parts = BAD_FILES[case]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("my.yaml").write_text(RECIPE.replace("rows.jsonl", name), encoding="utf-8")
    said_clearly(*run("train", "my.yaml"), "data.datasets[0]", *parts)


# overrides, and what is said
BAD_SETTINGS = {
    "format without its columns": (
        ["data.datasets=[{path: rows.jsonl, format: dolly}]"],
        [
            "data.datasets[0]: rows.jsonl is read as dolly, which needs the column response",
            "instruction, input, output",
        ],
    ),
    "mapping to an absent column": (
        ["data.datasets=[{path: rows.jsonl, columns: {instruction: question}}]"],
        ["data.datasets[0].columns: rows.jsonl has no column for instruction: question", "instruction, input, output"],
    ),
    "more rows than there are": (
        ["data.datasets=[{path: rows.jsonl, rows: 21}]"],
        ["data.datasets[0].rows: 21 rows are wanted, but there are 20"],
    ),
    "splits that leave nothing": (
        ["data.datasets=[{path: rows.jsonl, rows: 1}]", "data.splits.validation=0.9"],
        ["data.splits leaves no row to train on"],
    ),
    "a split of nothing": (["data.splits.test=0.01"], ["data.splits.test: 0.01 of so few rows is no row at all"]),
    "a row too long": (
        ["data.max_length=10", "data.on_too_long=error"],
        ["data.datasets[0]: row 1 of rows.jsonl has", "tokens, more than data.max_length (10)"],
    ),
    "every answer cut away": (
        ["data.max_length=5"],
        ["no row of rows.jsonl can be trained on: 20 whose answer begins behind data.max_length"],
    ),
    "unknown Hub data set": (
        ["data.datasets=[{hub: no-such-org/no-such-data}]"],
        ["data.datasets[0]: no-such-org/no-such-data could not be fetched from the Hugging Face Hub"],
    ),
    "max_length above the positions": (["data.max_length=129"], ["data.max_length: 129", "128 positions"]),
    "tokenizer without a template": (["data.template=tokenizer"], ["data.template: tokenizer, but", "chatml"]),
    "template with bad Jinja": (["data.template=bad.jinja"], ["template"]),
    "template without an end": (["data.template=endless.jinja"], ["no special token", "{{ eos_token }}"]),
    "model folder without a model": (["model={name_or_path: folder, tokenizer: quickstart}"], ["folder", "model"]),
    "folder without a tokenizer": (["model.tokenizer=folder"], ["model.tokenizer: folder", "a tokenizer"]),
    "unknown model type": (["model.config.model_type=gpt22"], ["model.config", "gpt22"]),
    "unknown Hub model": (
        ["model={name_or_path: no-such-org/no-such-model}"],
        ["model.name_or_path: there is no model folder no-such-org/no-such-model", "HF_HUB_OFFLINE is set"],
    ),
    "a run folder in use": (
        ["output_dir=used"],
        ["output_dir: used is not empty", "it holds notes.txt"],
    ),
    "a run folder that is a file": (["output_dir=my.yaml"], ["output_dir", "my.yaml"]),
    "a run folder below a file": (["output_dir=my.yaml/run"], ["output_dir", "my.yaml"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_what_does_not_fit_together(here, run, no_weights, case):
    for folder in ("folder", "used"):
        Path(folder).mkdir()
        Path(folder, "notes.txt").write_text("mine", encoding="utf-8")
    Path("bad.jinja").write_text("{% for m in messages %}{{ m.content }", encoding="utf-8")
    Path("endless.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", encoding="utf-8")
    overrides, parts = BAD_SETTINGS[case]
    code, out, err = run("train", "my.yaml", *overrides)
    said_clearly(code, out, err, *parts)
    assert Path("used/notes.txt").read_text(encoding="utf-8") == "mine"
    assert Path("my.yaml").read_text(encoding="utf-8") == RECIPE


def test_the_recipe_that_all_of_them_spoil_is_sound(here):
    recipe = instructft.load_recipe("my.yaml")
    assert len(instructft.prepare_dataset(recipe, instructft.load_tokenizer(recipe))["train"]) == 18


# --------------------------------------------------------------------------------------------------------------------
# Other commands
# --------------------------------------------------------------------------------------------------------------------

OTHER = {
    "chat with a missing folder": (["chat", "./nowhere"], ["there is no model folder ./nowhere"]),
    "chat with an empty folder": (["chat", "unfinished/empty"], ["unfinished/empty holds no model"]),
    "chat with an unfinished run": (["chat", "unfinished"], ["its run is unfinished", "checkpoint-10"]),
    "generate from a missing file": (
        ["generate", "./model", "--input", "none.jsonl", "--output", "o.jsonl"],
        ["--input: there is no file none.jsonl"],
    ),
    "generate from bad lines": (
        ["generate", "./model", "--input", "bad.jsonl", "--output", "o.jsonl"],
        [
            "bad.jsonl holds no rows that can be asked",
            "line 1, column 1: not JSON",
            "line 2: found no prompt",
            "line 4: role 'bot' is unknown",
        ],
    ),
    "generate with a bad batch size": (
        ["generate", "./model", "--input", "asked.jsonl", "--output", "o.jsonl", "--batch-size", "0"],
        ["--batch-size: found 0, expected auto or a number"],
    ),
    "evaluate without a recipe": (["evaluate", "model"], ["there is no recipe.yaml beside this model", "--data"]),
    "evaluate on a missing file": (["evaluate", "model", "--data", "none.json"], ["none.json"]),
    "evaluate on a broken file": (["evaluate", "model", "--data", "asked.jsonl"], ["--data: asked.jsonl, line 2"]),
    "init of an unknown recipe": (["init", "quickstrt"], ["there is no shipped recipe quickstrt; there is"]),
    "init below a file": (["init", "quickstart", "my.yaml/new.yaml"], ["its folder cannot be made"]),
    "init over a file": (["init", "quickstart", "my.yaml"], ["my.yaml exists already"]),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_commands(here, run, no_weights, case):
    for folder in ("unfinished/checkpoint-10", "unfinished/empty"):
        Path(folder).mkdir(parents=True)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}", encoding="utf-8")
    Path("asked.jsonl").write_text(
        '{"prompt": "a"}\nnonsense\n{"question": "b"}\n\n{"messages": [{"role": "bot", "content": "c"}]}\n',
        encoding="utf-8",
    )
    lines = Path("asked.jsonl").read_text(encoding="utf-8").splitlines()
    Path("bad.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    arguments, parts = OTHER[case]
    said_clearly(*run(*arguments), *parts)
    assert not Path("o.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstart", "--foo"], "No such option: --foo"),
        (["train"], "Missing argument 'RECIPE'"),
        (["trian"], "No such command 'trian'"),
        (["generate", "x", "--input", "a.jsonl"], "Missing option '--output'"),
        (["chat", "x", "--temperature", "hot"], "Invalid value for '--temperature'"),
    ],
)
def test_usage_errors_are_plain_and_end_with_2(here, run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("Error: ") == 1
    assert f"Error: {message}" in err
    assert "Traceback" not in err
    assert err.isascii()  # no boxes


def test_version_recipes_and_init(here, run):
    assert run("--version") == (0, f"instructft {instructft.__version__}\n", "")
    code, out, _ = run("recipes")
    assert code == 0
    shipped = sorted(path.stem for path in (REPO / "recipes").glob("*.yaml"))
    assert [line.split()[0] for line in out.splitlines()] == shipped
    assert json.loads(run("recipes", "--schema")[1])["properties"]["data"]
    assert run("init", "quickstart", "mine.yaml")[0] == 0
    assert instructft.load_recipe("mine.yaml").data == instructft.load_recipe("quickstart").data


def test_an_unforeseen_error_is_one_line_and_exit_1(here, run, monkeypatch):
    monkeypatch.setattr("instructft.recipe.shipped.shipped_recipes", lambda: 1 / 0)
    code, out, err = run("recipes")
    assert (code, out) == (1, "")
    assert (
        err == "instructft: ZeroDivisionError: division by zero\nSet INSTRUCTFT_TRACEBACK=1 to see where it happened.\n"
    )


def test_a_traceback_on_demand(here, monkeypatch):
    monkeypatch.setenv("INSTRUCTFT_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["instructft", "train", "nowhere.yaml"])
    with pytest.raises(instructft.InstructftError, match="there is no such file"):
        cli.main()


# --------------------------------------------------------------------------------------------------------------------
# Real processes, and what they load
# --------------------------------------------------------------------------------------------------------------------

SPY = """
import sys
def loaded():
    heavy = "torch transformers datasets trl peft pandas pyarrow numpy tokenizers ruamel rich jinja2 pydantic"
    print("loaded:", *[name for name in heavy.split() if name in sys.modules], file=sys.stderr)
"""


def python(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run(
        [sys.executable, "-c", SPY + code],
        capture_output=True,
        text=True,
        env=env,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )


def command(*arguments, **environment):
    """A command as a user runs it, with a last line on stderr that names the heavy libraries it loaded."""
    return python(
        f"import atexit, runpy; atexit.register(loaded); sys.argv[1:] = {list(arguments)!r}\n"
        "runpy.run_module('instructft', run_name='__main__', alter_sys=True)",
        **environment,
    )


def test_a_module_beside_a_recipe_is_not_run(tmp_path):
    """`-m` would look there first, and so would the children that train."""
    from instructft.training.launch.workers import safe_path

    for name in ("secrets", "calendar", "typer"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w'); raise SystemExit('ran')\n")
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    env.pop("PYTHONSAFEPATH", None)
    lines = [([sys.executable, "-m", "instructft", "--version"], env)]
    if sys.version_info >= (3, 11):
        lines.append(([sys.executable, "-m", "secrets"], {**env, **safe_path()}))
    for line, environment in lines:
        ran = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "my.yaml", "--foo"], ["--version"]])
def test_help_and_usage_errors_load_nothing_heavy(here, arguments):
    ran = command(*arguments)
    assert ran.returncode == (2 if "--foo" in arguments else 0)
    # typer itself asks pydantic what the arguments of one command are
    assert ran.stderr.splitlines()[-1] in ("loaded:", "loaded: pydantic" if arguments[0] == "train" else "")
    assert ("train" in ran.stdout) == (ran.returncode == 0 and arguments != ["--version"])


def test_an_error_in_a_recipe_waits_for_no_torch(here):
    Path("my.yaml").write_text(RECIPE.replace("max_length", "max_lenght"), encoding="utf-8")
    ran = command("train", "my.yaml")
    message, loaded = ran.stderr.rsplit("\n", 2)[:2]
    assert ran.returncode == 2
    assert message.startswith("reading my.yaml …\ninstructft: my.yaml: 1 problem\n  line 6: data.max_lenght: ")
    assert set(loaded.split()[1:]) <= {"pydantic", "ruamel", "rich"}


def test_an_error_in_the_data_in_a_process_of_its_own(here):
    Path("rows.jsonl").write_text(f"{ROW}\nnonsense\n", encoding="utf-8")
    ran = command("train", "my.yaml")
    assert ran.returncode == 2
    said, loaded = ran.stderr.rsplit("\n", 2)[:2]
    assert said == (
        "reading my.yaml …\ninstructft: data.datasets[0]: rows.jsonl, line 2, column 1: not JSON: Expecting value"
    )
    assert not {"torch", "transformers", "datasets", "pyarrow"} & set(loaded.split())
    assert ran.stdout == ""


def test_a_traceback_on_demand_in_a_process_of_its_own(here):
    ran = command("train", "nowhere.yaml", INSTRUCTFT_TRACEBACK="1")
    assert ran.returncode == 1
    assert "Traceback (most recent call last)" in ran.stderr
    assert "RecipeError: nowhere.yaml: 1 problem" in ran.stderr


def test_import_loads_nothing_heavy_and_train_is_the_function_in_any_order():
    ran = python(
        "import instructft; loaded()\n"
        "import instructft.training.run, instructft.evaluation.metrics, instructft.inference.chat\n"
        "assert callable(instructft.train) and callable(instructft.evaluate) and callable(instructft.generate)\n"
        "from instructft import train\n"
        "assert train is instructft.train is sys.modules['instructft.training.run'].train\n"
        "for name in instructft.__all__: assert getattr(instructft, name) is not None, name\n"
        "assert set(instructft.__all__) == set(dir(instructft))\n"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[0] == "loaded:"


def test_every_public_name_resolves():
    for name in instructft.__all__:
        assert getattr(instructft, name) is not None
    assert callable(instructft.train)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        instructft.trian  # noqa: B018


def test_columns_may_be_typed_in_a_row():
    words = ["evaluate", "run", "--columns", "a=b", "c=d", "--limit", "3", "--columns", "e=f"]
    named = ["evaluate", "run", "--columns", "a=b", "--columns", "c=d", "--limit", "3", "--columns", "e=f"]
    assert cli._each_named(words) == named
    overrides = ["train", "r.yaml", "train.max_steps=1", "data.packing=true"]
    assert cli._each_named(overrides) == overrides


LOADING = {
    "train": ["my.yaml"],
    "check": ["my.yaml"],
    "inspect": ["my.yaml"],
    "prepare": ["my.yaml"],
    "evaluate": ["model"],
    "chat": ["model"],
    "ui": ["model"],
    "generate": ["model", "--input", "rows.jsonl", "--output", "o.jsonl"],
    "merge": ["model", "merged"],
    "convert": ["ckpt.pt", "converted"],
    "push": ["model", "org/name", "--dry-run"],
    "gate": ["model"],
}
TELL_FIRST = {"init", "verify", "export"}  # what they read, reach or found, before libraries load


@pytest.mark.parametrize("command", LOADING)
def test_a_command_that_loads_torch_says_so_before_it_does(here, run, monkeypatch, command):
    """And on stderr: what it prints for others to read stays as it was."""
    Path("model").mkdir()
    Path("model/config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "datasets", None)  # the first of the libraries that take seconds
    code, out, err = run(command, *LOADING[command])
    *signs, end, _ = err.splitlines()
    assert (code, out) == (1, "")
    assert "import of datasets halted" in end
    assert signs[0] == ("reading my.yaml …" if LOADING[command] == ["my.yaml"] else signs[-1])
    assert re.fullmatch(r"loading torch(, transformers and model| and transformers) …", signs[-1])


def test_every_command_that_loads_torch_is_in_the_table_above():
    import inspect

    for functions in cli.GROUPS.values():
        for function in functions:
            loads = "quiet_libraries(" in inspect.getsource(function)
            assert loads == (function.__name__ in LOADING or function.__name__ in TELL_FIRST), function.__name__
