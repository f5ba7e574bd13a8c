"""The examples in docstrings are true: each `>>>` runs, offline, and gives what is written below it.

An example may use the names in `known`. One that needs a model, a run folder or the Hub is written as an indented
block without `>>>`.
"""

from __future__ import annotations

import doctest
import functools
import importlib
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "instructft"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Modules whose examples do not run as they are written, one line each, until they do.
NOT_YET = {
    "instructft.adapters.adapter_folder",
    "instructft.adapters.attach",
    "instructft.adapters.frozen_check",
    "instructft.adapters.lora",
    "instructft.adapters.quantization",
    "instructft.checkpoints.atomic",
    "instructft.checkpoints.manifest",
    "instructft.data.packing",
    "instructft.data.streaming_rows",
    "instructft.evaluation.checkpoints",
    "instructft.evaluation.compare",
    "instructft.evaluation.confidence",
    "instructft.evaluation.metrics",
    "instructft.extras.convert.convert",
    "instructft.extras.convert.layouts",
    "instructft.extras.convert.state_dict",
    "instructft.extras.lm_eval",
    "instructft.extras.reading",
    "instructft.hub.background",
    "instructft.hub.commit",
    "instructft.hub.files",
    "instructft.hub.push",
    "instructft.hub.resume",
    "instructft.inference.batch_file",
    "instructft.inference.chat",
    "instructft.inference.continuous_batching",
    "instructft.inference.generate_file",
    "instructft.inference.jsonl",
    "instructft.inference.reference_model",
    "instructft.inference.terminal",
    "instructft.inference.terminal_commands",
    "instructft.inference.vllm",
    "instructft.inference.web_sessions",
    "instructft.launch.processes",
    "instructft.merging.merge",
    "instructft.merging.proof",
    "instructft.merging.weight_proof",
    "instructft.models.fake_step",
    "instructft.models.latest",
    "instructft.models.memory",
    "instructft.models.starting_point",
    "instructft.prompt.fast_bpe",
    "instructft.prompt.loss_mask",
    "instructft.prompt.token_view",
    "instructft.report.page",
    "instructft.training.out_of_memory",
    "instructft.training.run",
    "instructft.training.warning_signs",
    "instructft.weights.verify_saved",
    "instructft.weights.weight_files",
}


def with_examples() -> list[str]:
    """The modules of the package that hold a `>>>`, by their dotted names."""
    paths = (path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@functools.cache
def known() -> dict[str, Any]:
    """Names that every example may use: they are what a reader of the documentation has at hand."""
    import numpy

    from instructft.prompt.templates import TEMPLATES
    from instructft.recipe.load import load_recipe
    from tests.helpers.quickstart import tokenizer

    made = tokenizer()
    made.chat_template = TEMPLATES["instruction"].text()
    at_hand: dict[str, Any] = {"np": numpy, "Path": Path, "load_recipe": load_recipe, "tokenizer": made}
    return at_hand | {"recipe": load_recipe("quickstart")}


def failures(name: str) -> list[str]:
    """What is wrong with the examples of a module, one text for each docstring."""
    said: list[str] = []
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for example in doctest.DocTestFinder().find(module, name, globs={**known(), **vars(module)}):
        runner.run(example, out=said.append)
    return said


@pytest.mark.parametrize("name", with_examples())
def test_examples_give_what_is_written_below_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(REPO / "recipes")
    monkeypatch.chdir(tmp_path)  # what an example writes never lies in the checkout
    found = failures(name)
    if found and name in NOT_YET:
        pytest.xfail("its examples are not written to be run")
    assert not found, "\n".join(found)


def test_a_wrong_example_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_example.py").write_text('"""Sums.\n\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert "Expected:" in "".join(failures("wrong_example"))
