"""Every shipped recipe is run as it is, from a Hub on this machine that holds its model, small, and rows of its data.

What may be overridden, and why: `train.max_steps` (time), `use_cpu` (the same run on a machine with a GPU), the number
of rows (a few hundred are there, and packs of them take time), and `output_dir`. Splits, template, lengths, batches,
accumulation, optimizer, learning rates, adapters and quantization are the recipe's own.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import threading
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instructft.data.sources import SOURCES
from instructft.recipe.load import load_recipe
from instructft.recipe.schema import Recipe
from instructft.recipe.shipped import recipe_purpose, shipped_recipes
from instructft.training.launch.command import launch
from tests.helpers.families import MODELS, published
from tests.helpers.telling import telling

ROWS = 600  # rows of each data set here: 0.002 of them is still one row
FEW = "data.datasets.0.rows=60"
INSTEAD = {
    "gpt2-alpaca-gpt4": [FEW],
    "smollm2-360m": [FEW],
    "llama-3.2-1b": [FEW],
    "tinyllama-lora": [FEW],
    "mistral-7b-qlora": [FEW],
    "llama-3-70b-qlora-fsdp2": [FEW],
}
# recipe -> what a question looks like in its template, and the token that ends an answer
INSTRUCTION = "### Instruction:\nHi\n\n### Response:\n"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    + INSTRUCTION
)
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
SMOLLM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
ASKED = {
    "gpt2-dolly": (INSTRUCTION, "<|endoftext|>"),
    "gpt2-alpaca-gpt4": (ALPACA, "<|endoftext|>"),
    "gpt2-medium-llms-from-scratch": (ALPACA, "<|endoftext|>"),
    "gpt2-lora-alpaca": (ALPACA, "<|endoftext|>"),
    "gpt2-hh": ("\n\nHuman: Hi\n\nAssistant:", "<|endoftext|>"),
    "slimorca-chatml": (CHATML, "<|im_end|>"),
    "qwen3-0.6b": (CHATML, "<|im_end|>"),
    "smollm2-360m": (CHATML, "<|im_end|>"),
    "smollm2-135m-instruct": (SMOLLM + CHATML, "<|im_end|>"),
    "llama-3.2-1b": ("<|begin_of_text|>" + CHATML, "<|im_end|>"),
    "llama-3-70b-qlora-fsdp2": ("<|begin_of_text|>" + INSTRUCTION, "<|end_of_text|>"),
    "mistral-7b-qlora": ("<s>" + CHATML, "<|im_end|>"),
    "tinyllama-lora": ("<s>" + INSTRUCTION, "</s>"),
}
ADAPTERS = {
    "gpt2-lora-alpaca",
    "llama-3-70b-qlora-fsdp2",
    "mistral-7b-qlora",
    "smollm2-135m-instruct",
    "tinyllama-lora",
}


# Data sets as they lie on the Hub: files, columns, types


@cache
def rows() -> list[dict[str, str]]:
    from tests.helpers.quickstart import rows

    return rows()[:ROWS]


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def dolly() -> dict[str, bytes]:
    made = [
        {"instruction": r["instruction"], "context": r["input"], "response": r["output"], "category": "closed_qa"}
        for r in rows()
    ]
    return {"databricks-dolly-15k.jsonl": jsonl(made)}


def alpaca(file: str) -> dict[str, bytes]:
    columns = {name: [row[name] for row in rows()] for name in ("instruction", "input", "output")}
    columns["text"] = [f"Below is an instruction.\n\n{row['instruction']}\n{row['output']}" for row in rows()]
    return {f"data/{file}": parquet(columns)}


def hh() -> dict[str, bytes]:
    def said(row: dict[str, str], answer: str) -> str:
        more = "\n\nHuman: Say it again, please.\n\nAssistant: " + answer
        return f"\n\nHuman: {row['instruction']} {row['input']}\n\nAssistant: {answer}{more}"

    pairs = [{"chosen": said(row, row["output"]), "rejected": said(row, "No.")} for row in rows()]
    names = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
    files = {}
    for n, name in enumerate(names):
        files[f"{name}/train.jsonl.gz"] = gzip.compress(jsonl(pairs[n::5]))
        files[f"{name}/test.jsonl.gz"] = gzip.compress(jsonl(pairs[4::20][n::4]))
    attempts = [{"min_harmlessness_score_transcript": -1.0, "num_params": "52B", "transcript": "\n\nHuman: Hi"}]
    array = json.dumps(attempts).encode()
    return {**files, "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(array)}


def slim_orca() -> dict[str, bytes]:
    def conversation(n: int, row: dict[str, str]) -> list[dict[str, Any]]:
        system = [{"from": "system", "value": "You are an AI assistant. Think like you explain.", "weight": None}]
        human = {"from": "human", "value": f"{row['instruction']} {row['input']}".strip(), "weight": 0.0}
        return [*(system if n % 4 else []), human, {"from": "gpt", "value": row["output"], "weight": 1.0}]

    made = [{"conversations": conversation(n, row)} for n, row in enumerate(rows())]
    return {"oo-labeled_correct.gpt4.sharegpt.jsonl": jsonl(made)}


DATA: dict[str, Callable[[], dict[str, bytes]]] = {
    "databricks/databricks-dolly-15k": dolly,
    "vicgalle/alpaca-gpt4": lambda: alpaca("train-00000-of-00001-6ef3991c06080e14.parquet"),
    "tatsu-lab/alpaca": lambda: alpaca("train-00000-of-00001-a09b74b3ef9c3b56.parquet"),
    "Anthropic/hh-rlhf": hh,
    "Open-Orca/SlimOrca": slim_orca,
}


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file of "LLMs from scratch", at an address of this machine in place of GitHub's."""
    body = json.dumps([{name: row[name] for name in ("instruction", "input", "output")} for row in rows()]).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    source = SOURCES["llms-from-scratch"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/{Path(str(source.url)).name}"
    monkeypatch.setitem(SOURCES, "llms-from-scratch", dataclasses.replace(source, url=here))
    yield
    server.shutdown()
    server.server_close()


def stock(hub: Any, recipe: Recipe) -> str:
    """Put a recipe's model and data sets on the Hub, and return the model's commit."""
    for entry in recipe.data.datasets:
        if name := entry.hub or SOURCES[str(entry.name)].hub:
            hub.put(name, DATA[name]() | {"README.md": b"---\nlicense: other\n---\n"}, type="dataset")
    commit: str = hub.put(str(recipe.model.name_or_path), published(str(recipe.model.name_or_path)))
    return commit


def overrides(name: str, run: Path | str) -> list[str]:
    return ["train.max_steps=2", "train.use_cpu=true", *INSTEAD.get(name, []), f"output_dir={run}"]


# Tests


def test_all_are_run_here() -> None:
    """A recipe or a model that is not known here would otherwise be left out without a word."""
    files = list((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    hub = {file.stem for file in files if load_recipe(file.stem).model.name_or_path}
    assert len(files) == 14
    assert set(shipped_recipes()) == {file.stem for file in files}
    assert hub == set(ASKED) == set(shipped_recipes()) - {"quickstart"}
    assert {load_recipe(name).model.name_or_path for name in ASKED} == set(MODELS)
    used = {SOURCES[str(entry.name)].hub for name in ASKED for entry in load_recipe(name).data.datasets}
    assert used == {*DATA, None}  # the book's is a file on GitHub


# Other recipes here have the same models and templates, or their parts between them.
LIKE = ("gpt2-alpaca-gpt4", "gpt2-lora-alpaca", "llama-3-70b-qlora-fsdp2", "slimorca-chatml", "smollm2-360m")


@pytest.mark.drawn
@pytest.mark.parametrize("name", telling(sorted(ASKED), *sorted(ASKED.keys() - set(LIKE))))
def test_it_runs_from_the_hub(name: str, hub: Any, book: None, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    from instructft import train
    from instructft.models.load_for_inference import load_for_inference

    run = tmp_path / "run"
    recipe = load_recipe(name, overrides(name, run))
    commit = stock(hub, recipe)
    train(recipe, console=Console(quiet=True))

    # the run folder is whole
    facts = json.loads((run / "run.json").read_text())
    found = {path.name for path in run.iterdir()}
    weights = {"adapter_model.safetensors", "adapter_config.json", "base.json"} if name in ADAPTERS else {"config.json"}
    assert found >= {"recipe.yaml", "metrics.jsonl", "README.md", "loss.png", "tokenizer.json", *weights}
    assert facts["train"]["steps"] == 2
    assert facts["metrics"]["train_loss"] > 0
    assert (facts["base"]["name_or_path"], facts["base"]["commit"]) == (recipe.model.name_or_path, commit)
    if name in ADAPTERS:
        assert json.loads((run / "base.json").read_text())["commit"] == commit
        assert facts["adapter"]["base_unchanged"] is True

    # it loads, is asked as its family is, and stops where an answer ends
    model, tokenizer = load_for_inference(str(run))
    asked, stop = ASKED[name]
    question = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == asked
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    stops = GenerationConfig.from_pretrained(run).eos_token_id
    assert stop_id in (stops if isinstance(stops, list) else [stops])
    assert model.generation_config.eos_token_id == stops
    only_answers_carry_loss(recipe, tokenizer, stop_id, facts["data"])


def only_answers_carry_loss(recipe: Recipe, tokenizer: Any, stop_id: int, data: dict[str, Any]) -> None:
    """What carries loss in the rows that were trained is their answers, each with its end, and nothing else."""
    from instructft.data.prepare import prepare

    prepared = prepare(recipe, tokenizer)
    assert prepared.fingerprint == data["fingerprint"]  # the saved tokenizer makes the rows that were trained
    assert 0.05 < data["supervised_tokens"] / data["tokens"] < 0.9
    answers = {row["output"].strip() for row in rows()}
    opening = "<think>\n\n</think>\n\n" if "Qwen3" in str(recipe.model.name_or_path) else ""  # its own template's
    seen = 0
    for row in prepared.splits["train"]:
        supervised = [label for label in row["labels"] if label != -100]
        assert supervised[-1] == stop_id
        while supervised:
            end = supervised.index(stop_id)
            text = tokenizer.decode(supervised[:end])
            assert text.startswith(opening)
            assert text.removeprefix(opening).strip() in answers
            supervised = supervised[end + 1 :]
            seen += 1
    assert seen >= data["rows"]["train"]


@pytest.mark.parametrize("name", ["gpt2-hh", "llama-3.2-1b"])
def test_check_reads_it_from_the_hub(
    name: str, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from instructft import cli

    recipe = load_recipe(name, overrides(name, tmp_path / "run"))
    stock(hub, recipe)
    monkeypatch.setattr("sys.argv", ["instructft", "check", name, *overrides(name, tmp_path / "run"), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    report = json.loads(capfd.readouterr().out)
    wanted = recipe.data.datasets[0].rows or 4 * ROWS // 5  # of hh-rlhf the training files of four folders
    assert (report["ok"], report["data"]["total"]["rows"]) == (True, wanted)
    assert 0 < report["training"]["supervised_tokens"] < report["training"]["tokens"]
    assert report["estimate"]["memory"]["total"] > 0
    assert not (tmp_path / "run").exists()


def test_a_gated_model_is_said_to_be_one(hub: Any, tmp_path: Path) -> None:
    from instructft.errors import UsageError
    from instructft.models.tokenizer import load_tokenizer

    recipe = load_recipe("llama-3.2-1b", overrides("llama-3.2-1b", tmp_path / "run"))
    stock(hub, recipe)
    hub.repos["model", recipe.model.name_or_path].gated = True
    with pytest.raises(UsageError, match=r"meta-llama/Llama-3\.2-1B .*gated model needs `hf auth login` or HF_TOKEN"):
        load_tokenizer(recipe)


def test_the_launch_half_of_the_70b_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    """Its other half, the recipe, runs above in one process."""
    name = "llama-3-70b-qlora-fsdp2"
    assert launch(name, strategy="fsdp2", processes="2", dry_run=True) == 0
    line = capfd.readouterr().out.split()
    assert line[:2] == ["accelerate", "launch"]
    assert line[-3:] == ["instructft", "train", name]
    assert Path(line[line.index("--config_file") + 1]).name == "fsdp2.yaml"
    assert line[line.index("--num_processes") + 1] == "2"
    recipe = load_recipe(name)
    assert recipe.model.quantization == "4bit"
    assert recipe.model.dtype == "bfloat16"


@pytest.mark.parametrize("name", sorted(ASKED))
def test_its_header_says_what_why_and_how(name: str) -> None:
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\nmodel:")]
    assert 40 < len(recipe_purpose(path)) <= 118
    assert f"instructft {'launch' if 'fsdp2' in name else 'train'} {name}" in head
    assert "# Hardware:  meant for " in head
    assert "# Measured:  run " in head
    assert "local Hub with small random weights" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert max(map(len, text.splitlines())) <= 120
    recipe = load_recipe(name)
    for entry in recipe.data.datasets:  # the licences of model and data stand beside their names
        assert SOURCES[str(entry.name)].licence in text
    named = next(line for line in text.splitlines() if f"name_or_path: {recipe.model.name_or_path}" in line)
    assert any(licence in named for licence in ("Apache-2.0", "MIT", "Llama 3.2 Community", "Llama 3 Community"))
    if "meta-llama" in named:
        assert "gated" in named
        assert f"huggingface.co/{recipe.model.name_or_path}" in head
