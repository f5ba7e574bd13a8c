"""What is not there is said at a glance: names with what is near, files with their line, packages by pip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instructft import load_recipe
from instructft.errors import DataError, UsageError
from instructft.models.first_look import look_for_the_hub, missing, refuse_at_a_glance

ROW = {"instruction": "1 + 1?", "output": "2"}
RECIPE = """
model: {config: {model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 64}, tokenizer: quickstart}
data: {datasets: [{path: rows.jsonl}], template: instruction, max_length: 64}
train: {use_cpu: true}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a recipe, its rows, two runs, and a folder named as an owner on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    Path("my.yaml").write_text(RECIPE, encoding="utf-8")
    Path("rows.jsonl").write_text((json.dumps(ROW) + "\n") * 8, encoding="utf-8")
    for name in ("tiny/checkpoint-2", "tiny/checkpoint-10", "qa"):
        Path("runs", name).mkdir(parents=True)
    for name in ("tiny", "qa"):
        Path("runs", name, "instructft.json").write_text("{}", encoding="utf-8")
    Path("google/gemma").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/tinny", 'there is no model folder runs/tinny; in runs/: qa, tiny; did you mean "runs/tiny"?'),
        (
            "runs/tiny/checkpoint-9",
            "there is no model folder runs/tiny/checkpoint-9; in runs/tiny/: checkpoint-2, checkpoint-10",
        ),
        ("runs/nope/checkpoint-1", "there is no model folder runs/nope/checkpoint-1, nor is there runs/nope; in runs/"),
        ("./nowhere", "there is no model folder ./nowhere; here: google, runs"),
        ("runs/a?b", "there is no model folder runs/a?b; in runs/: qa, tiny"),
        ("models/of/mine", "there is no model folder models/of/mine, nor is there models; give a run folder, or a Hub"),
        ("runs/tiny", ""),
        ("openai-community/gpt2", ""),
        ("gpt2", ""),
        ("google/gemma-7b", ""),  # a folder of this name holds no run: it is a name on the Hub
        ("org/name@v2", ""),
    ],
)
def test_names_of_models(here, name, said):
    found = missing(name)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_bare_name_is_a_run_where_no_owner_may_be_left_out(here):
    assert missing("tinny", bare=False).endswith('in runs/: qa, tiny; did you mean "runs/tiny"?')


def test_offline_what_the_cache_does_not_hold_is_told_at_once(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    assert "HF_HUB_OFFLINE is set" in missing("org/name@v2")
    (here / "hub" / "models--org--name").mkdir(parents=True)
    assert missing("org/name@v2") == ""


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.report_to=[swanlab, clearml]"], ["swanlab is not installed; pip install swanlab", "clearml"]),
        (["model.attn_implementation=flash_attention_3"], ["flash_attn_interface is not installed", "=auto"]),
        (["train.use_liger_kernel=true"], ["train.use_liger_kernel", "pip install 'instructft[liger]'"]),
    ],
)
def test_packages_count_where_training_takes_place(here, monkeypatch, overrides, parts):
    monkeypatch.setattr("instructft.recipe.installed._is_installed", lambda module: False)
    recipe = load_recipe("my.yaml", overrides)
    refuse_at_a_glance(recipe)
    with pytest.raises(UsageError) as caught:
        refuse_at_a_glance(recipe, here=True)
    for part in parts:
        assert part in str(caught.value)


IN_4_BITS = ["model={}", "model.quantization=4bit", "adapter=lora"]


def model_folder(name, width):
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps({"hidden_size": width}), encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.fp16=true"], "train.fp16: this run is on the CPU (train.use_cpu), where float16 would be left out"),
        (["train.use_cpu=false", "train.tf32=true"], "train.tf32: this run is on the CPU, and tf32"),
        ([*IN_4_BITS, "model.name_or_path=narrow"], "model.quantization: hidden_size: its rows of 96 weights"),
    ],
)
def test_what_a_cpu_has_not_is_told_where_it_is_certain(here, monkeypatch, overrides, said):
    monkeypatch.setattr("instructft.recipe.installed._is_installed", lambda module: True)
    monkeypatch.setattr("instructft.adapters.quantization._torch_takes_avx512", lambda: True)
    monkeypatch.setattr("instructft.recipe.installed._GPUS", ())
    model_folder("narrow", 96)
    recipe = load_recipe("my.yaml", overrides)
    refuse_at_a_glance(recipe)
    with pytest.raises(UsageError) as caught:
        refuse_at_a_glance(recipe, here=True)
    assert said in str(caught.value)


def test_where_there_may_be_a_gpu_nothing_is_refused_at_a_glance(here, monkeypatch):
    monkeypatch.setattr("instructft.recipe.installed._is_installed", lambda module: True)
    monkeypatch.setattr("instructft.adapters.quantization._torch_takes_avx512", lambda: True)
    monkeypatch.setattr("instructft.recipe.installed._GPUS", ("null",))  # a device that every machine has
    model_folder("narrow", 96)
    model_folder("wide", 128)
    of_a_gpu = ["train.use_cpu=false", "train.fp16=true", *IN_4_BITS, "model.name_or_path=narrow"]
    refuse_at_a_glance(load_recipe("my.yaml", of_a_gpu), here=True)
    monkeypatch.setattr("instructft.recipe.installed._GPUS", ())
    refuse_at_a_glance(load_recipe("my.yaml", [*IN_4_BITS, "model.name_or_path=wide"]), here=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
def test_a_config_that_is_a_pipe_is_not_waited_for(here):
    model_folder("narrow", 96)
    Path("narrow/config.json").unlink()
    os.mkfifo("narrow/config.json")
    refuse_at_a_glance(load_recipe("my.yaml", [*IN_4_BITS, "model.name_or_path=narrow"]), here=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", json.dumps(ROW) + "\n{broken\n", "a.jsonl, line 2, column 2: not JSON"),
        ("a.csv", "instruction;result\nx;y\n", "no known format has the columns instruction, result"),
        ("a.json", '{"x": 1}', "expected a list of rows"),
    ],
)
def test_data_files(here, name, content, said):
    Path(name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.datasets\[0\]: ") as caught:
        refuse_at_a_glance(load_recipe("my.yaml", [f"data.datasets=[{{path: {name}}}]"]))
    assert said in str(caught.value)


def test_nothing_heavy_is_loaded_for_it(here):
    code = (
        "import sys; from instructft import load_recipe; from instructft.models.first_look import refuse_at_a_glance\n"
        "refuse_at_a_glance(load_recipe('my.yaml'), here=True)\n"
        "try:\n"
        "    refuse_at_a_glance(load_recipe('my.yaml', ['train.fp16=true']), here=True)\n"
        "except Exception: pass\n"
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout == "set()\n", done.stderr


@pytest.fixture
def closed(here, monkeypatch):
    """A Hub that nobody can reach, a cache that holds org/kept, and the count of tries."""
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_CACHE", str(here / "hub"))
    (here / "hub" / "models--org--kept").mkdir(parents=True)
    tries = []

    def connect(place, timeout):
        tries.append(place)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.create_connection", connect)
    return tries


def test_a_hub_that_cannot_be_reached_is_tried_once(closed):
    with pytest.raises(UsageError) as caught:
        look_for_the_hub(["org/kept", "org/name@v2"])
    assert str(caught.value).startswith("org/name is no folder here and not in the Hub's cache, and the Hub cannot be")
    assert "127.0.0.1: Connection refused" in str(caught.value)
    assert closed == [("127.0.0.1", 9)]


def test_what_the_cache_holds_is_taken_without_further_tries(closed):
    assert look_for_the_hub(["org/kept"], may_stay_away=False) == ""
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "going on with what its cache holds" in look_for_the_hub(["org/kept", "runs/tiny"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_folder_asks_no_hub(closed):
    assert look_for_the_hub(["runs/tiny", "./google"]) == ""
    assert closed == []
