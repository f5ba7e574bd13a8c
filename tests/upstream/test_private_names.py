"""Every private name of a library that we stand on: where it is used, and what breaks when an upgrade drops it.

A name that begins with an underscore may go without notice. Each that we cannot do without stands here once; the first
test fails by its name when it is gone, the second when the package uses one that is not listed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import instructft

PACKAGE = Path(instructft.__file__).parent


class Private(NamedTuple):
    """A private name, where upstream keeps it, where we use it, and what breaks without it."""

    name: str
    owner: str  # `module:Class`, or a module
    used_in: str  # below instructft/
    breaks: str
    how: str = "attribute"  # attribute (of the class or module) | instance (set by its code) | overridden


TRAINER = "trl:SFTTrainer"
TABLE = (
    Private("_get_grad_norm", TRAINER, "training/trainer.py", "a step is no longer judged before it is taken",
            "overridden"),
    Private("_save_checkpoint", TRAINER, "training/trainer.py", "checkpoints are written and never sealed",
            "overridden"),
    Private("_save", TRAINER, "training/trainer.py", "folders of an adapter lack their base's record", "overridden"),
    Private("_run_epoch", TRAINER, "training/trainer.py", "a resumed run loses counts, and may train a step too many",
            "overridden"),
    Private("_finalize_training", TRAINER, "training/trainer.py", "a run resumed at its end loses its counts",
            "overridden"),
    Private("_evaluate", TRAINER, "training/trainer.py", "a signal during an evaluation ends in a traceback",
            "overridden"),
    Private("_determine_best_metric", TRAINER, "training/trainer.py", "an evaluation that a signal ended is the best",
            "overridden"),
    Private("_get_train_sampler", TRAINER, "training/trainer.py", "rows are no longer grouped by length", "overridden"),
    Private("_get_eval_sampler", TRAINER, "training/trainer.py", "validation sums are put back in the wrong order",
            "overridden"),
    Private("_prepare_inputs", TRAINER, "training/step_checks.py", "validation and rows of a bad step stay on the CPU"),
    Private("_metrics", TRAINER, "training/resumable.py", "a resumed run logs other means", "instance"),
    Private("_tr_loss", TRAINER, "training/resumable.py", "a resumed run logs another loss", "instance"),
    Private("_total_loss_scalar", TRAINER, "training/resumable.py", "train_loss leaves out steps before a resume",
            "instance"),
    Private("_globalstep_last_logged", TRAINER, "training/resumable.py", "a resumed run logs another loss", "instance"),
    Private("_total_train_tokens", TRAINER, "training/trainer.py", "a step done again counts its tokens twice",
            "instance"),
    Private("_attn_implementation", "transformers:PretrainedConfig", "data/packing.py",
            "packs are not flattened for flash attention"),
    Private("_fingerprint", "datasets:Dataset", "data/tokenize.py", "the cache of rows has no key", "instance"),
    Private("_parameters", "torch.nn:Module", "adapters/frozen_check.py", "frozen weights go unseen", "instance"),
    Private("_buffers", "torch.nn:Module", "models/fake_step.py", "memory is estimated without buffers", "instance"),
    Private("_extract_corpus_statistics", "sacrebleu.metrics.base:Metric", "evaluation/confidence.py",
            "BLEU has no interval"),
    Private("_compute_score_from_stats", "sacrebleu.metrics.base:Metric", "evaluation/confidence.py",
            "BLEU has no interval"),
)  # fmt: skip
# Private names of Python itself, or of a module that is looked for and may be absent.
STANDARD = {"_exit"}
OPTIONAL = {"_get_kernel"}  # bitsandbytes.backends.mps.ops, asked for with hasattr


def owner(of: str) -> Any:
    module, _, name = of.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@pytest.mark.parametrize("private", TABLE, ids=lambda private: f"{private.owner}.{private.name}")
def test_it_is_still_there(private: Private) -> None:
    found = owner(private.owner)
    there = hasattr(found, private.name)
    if private.how == "instance":
        there = any(
            re.search(rf"\b{private.name}\b", inspect.getsource(kind)) for kind in found.__mro__ if kind is not object
        )
    assert there, f"{private.owner} has no {private.name} any more: {private.breaks} ({private.used_in})"


def test_it_is_still_used() -> None:
    for private in TABLE:
        text = (PACKAGE / private.used_in).read_text(encoding="utf-8")
        assert re.search(rf"\b{private.name}\b", text), f"{private.used_in} no longer uses {private.name}"


def private_names() -> dict[str, set[str]]:
    """Private attributes that the package reads or overrides and does not define itself, with the files."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    ours: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                ours.add(node.attr)
    trainer = owner(TRAINER)
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if isinstance(node, ast.FunctionDef) and path.name == "trainer.py" and hasattr(trainer, node.name):
                name = node.name  # overridden
            elif name in ours:
                continue
            if name.startswith("_") and not name.startswith("__"):
                found.setdefault(name, set()).add(path.relative_to(PACKAGE).as_posix())
    return found


def test_no_other_is_used() -> None:
    listed = {private.name for private in TABLE} | STANDARD | OPTIONAL
    found = private_names()
    assert len(found) > 10
    assert {name: files for name, files in found.items() if name not in listed} == {}
