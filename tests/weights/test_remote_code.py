"""Code that comes with a model runs where the command line says so, at a pinned commit, and nowhere else."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.cli import main
from instructft.errors import InstructftError, UsageError
from instructft.models.load_for_inference import load_for_inference
from instructft.training.run import train
from instructft.weights import remote_code

QUIET = Console(quiet=True)
CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel

Path({marker!r}).write_text("the code ran")


class OddConfig(GPT2Config):
    model_type = "odd"


class OddModel(GPT2LMHeadModel):
    config_class = OddConfig
"""
RECIPE = """
model: {{name_or_path: org/odd, revision: {revision}}}
data: {{datasets: [{{name: quickstart, rows: 60}}], template: instruction, max_length: 64, splits: {{validation: 0}}}}
train: {{max_steps: 2, per_device_train_batch_size: 4, use_cpu: true, report_to: none, save_strategy: 'no'}}
output_dir: {out}
"""


@pytest.fixture(autouse=True)
def as_at_the_start() -> Any:
    yield
    remote_code.allow(False)


@pytest.fixture
def odd(hub: Any, tokenizer: Any, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model on the Hub that needs code of its own: its commit, and a file that tells whether the code ran."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub as cached

    for module in (cached, dynamic_module_utils):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    folder = tmp_path / "odd"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_odd.py").write_text(CODE.format(marker=str(marker)))
    return hub.put("org/odd", {path.name: path for path in folder.iterdir()}), marker


def recipe(tmp_path: Path, revision: str) -> Any:
    (tmp_path / "odd.yaml").write_text(RECIPE.format(revision=revision, out=tmp_path / "run"))
    return instructft.load_recipe(tmp_path / "odd.yaml")


def test_without_the_flag_no_code_runs_and_the_way_out_is_named(odd: Any, tmp_path: Path) -> None:
    commit, marker = odd
    with pytest.raises(UsageError, match=r"brings Python code of its own.*pin model\.revision.*--trust-remote-code"):
        train(recipe(tmp_path, commit), console=QUIET)
    with pytest.raises(InstructftError, match="brings Python code of its own"):
        load_for_inference(f"org/odd@{commit}")
    assert not marker.exists()


@pytest.mark.parametrize("revision", ["main", "v1.0", "0123abc"])
def test_a_commit_must_be_pinned(odd: Any, tmp_path: Path, revision: str) -> None:
    remote_code.allow()
    with pytest.raises(UsageError, match=rf"its commit must be pinned.*\(found {revision}\)"):
        train(recipe(tmp_path, revision), console=QUIET)
    with pytest.raises(UsageError, match="its commit must be pinned"):
        load_for_inference("org/odd")
    assert not odd[1].exists()


def test_with_both_it_trains_and_what_is_left_loads_the_same_way(
    odd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, marker = odd
    remote_code.allow()
    result = train(recipe(tmp_path, commit), console=QUIET)
    assert marker.read_text() == "the code ran"
    assert result.facts["train"]["steps"] == 2
    model, _ = load_for_inference(str(result.output_dir))
    assert type(model).__name__ == "OddModel"
    remote_code.allow(False)
    with pytest.raises(InstructftError, match="brings Python code of its own"):
        load_for_inference(str(result.output_dir))


@pytest.mark.parametrize("place", [1, 3])
def test_the_flag_stands_before_or_behind_a_command(monkeypatch: pytest.MonkeyPatch, capsys: Any, place: int) -> None:
    words = ["instructft", "recipes"]
    words.insert(min(place, len(words)), remote_code.FLAG)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert remote_code.allowed()
    assert "quickstart" in capsys.readouterr().out


def test_no_model_is_loaded_without_a_word_on_its_code() -> None:
    """Left out, the argument asks at the terminal, and code runs that nobody pinned."""
    calls = []
    for path in sorted((Path(instructft.__file__).parent).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            named = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            if named and function.value.id.startswith("Auto") and function.attr in ("from_pretrained", "from_config"):
                said = ast.unparse(ast.Module([ast.Expr(node)], []))
                calls.append(
                    (
                        f"{path.name}:{node.lineno}",
                        "trust_remote_code" in said or ("**" in said and "trust" in said) or "remote_code" in said,
                    )
                )
    assert len(calls) > 10
    assert [place for place, said in calls if not said] == []


def test_no_recipe_can_say_so(tmp_path: Path) -> None:
    for line in ("train: {trust_remote_code: true}", "model: {name_or_path: a/b, trust_remote_code: true}"):
        path = tmp_path / "bad.yaml"
        path.write_text(f"{line}\ndata: {{datasets: quickstart}}\n")
        with pytest.raises(UsageError, match=r"trust.remote.code"):
            instructft.load_recipe(path)
