"""Private names of other libraries: each stands in one table with what breaks; an upgrade that drops one fails here.

A name of another library that begins with an underscore may go in any release. Public hooks are used where they exist;
what remains is listed here. After an upgrade this file says by name what has gone, and where it was used.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "instructft"


class Private(NamedTuple):
    """A private name: where upstream has it, the module of ours that uses it, and what breaks without it."""

    name: str
    owner: str  # module, or module:class
    used_in: str
    breaks: str


TRAINER = "transformers.trainer:Trainer"
SFT = "trl.trainer.sft_trainer:SFTTrainer"
MODULE = "torch.nn.modules.module:Module"
PRETRAINED = "transformers.modeling_utils:PreTrainedModel"
TABLE = (
    # what the trainer overrides
    Private("_run_epoch", TRAINER, "training/trainer", "a resumed run that is at its end trains one step more"),
    Private("_evaluate", TRAINER, "training/trainer", "a signal in an evaluation ends the run with an error"),
    Private("_determine_best_metric", TRAINER, "training/trainer", "an evaluation that a signal left has no metrics"),
    Private("_get_grad_norm", TRAINER, "training/trainer", "steps are judged without their gradient"),
    Private("_save_checkpoint", TRAINER, "training/trainer", "checkpoints are not sealed: none is resumed from"),
    Private("_load_rng_state", TRAINER, "training/trainer", "a run on a Mac's GPU resumes with other dropout"),
    Private("_load_from_checkpoint", TRAINER, "training/trainer", "weights named otherwise on the disk are lost"),
    Private("_load_best_model", TRAINER, "training/trainer", "the best checkpoint is not gone back to, the same way"),
    Private("_save", TRAINER, "training/trainer", "adapters of checkpoints have no metadata; FSDP2 saves no model"),
    Private("_get_train_sampler", TRAINER, "training/trainer", "group_by_length follows the micro-batch size"),
    Private("_get_eval_sampler", TRAINER, "training/trainer", "validation pads more; data sets' own losses mix rows"),
    Private("_train_batch_size", TRAINER, "training/trainer", "flat packs have another shape than a batch has rows"),
    Private("_prepare_context_parallel_inputs", TRAINER, "training/trainer",
            "processes that share a row are given the whole of it"),
    Private("_prepare_cp", "accelerate.accelerator:Accelerator", "training/trainer",
            "answers to several prompts lose their mask while processes share rows"),
    Private("_set_signature_columns_if_needed", SFT, "training/trainer", "branches are trained as documents"),
    Private("_signature_columns", TRAINER, "training/trainer", "branches are trained as documents"),
    # what the trainer counts
    Private("_tr_loss", TRAINER, "training/resumable", "the first loss that a resumed run logs is wrong"),
    Private("_globalstep_last_logged", TRAINER, "training/resumable", "the first loss of a resumed run is wrong"),
    Private("_total_loss_scalar", TRAINER, "training/resumable", "the mean loss of a resumed run is wrong"),
    Private("_metrics", SFT, "training/trainer", "num_tokens, entropy and accuracy are upstream's, or lost"),
    Private("_total_train_tokens", SFT, "training/batch_size", "a step that is done again is counted twice"),
    Private("_n_gpu", "transformers.training_args:TrainingArguments", "training/arguments",
            "one process among several GPUs ends with TRL's refusal of DataParallel"),
    # models and their layers
    Private("_parameters", MODULE, "adapters/frozen_check", "4-bit weights are not found under FSDP2"),
    Private("_buffers", MODULE, "models/fake_step", "the memory estimate cannot lay a model out on fake tensors"),
    Private("_forward_hooks", MODULE, "models/kernels/activations", "a hook on an activation would be lost"),
    Private("_forward_pre_hooks", MODULE, "models/kernels/activations", "a hook on an activation would be lost"),
    Private("_modules", MODULE, "adapters/lora", "rows of new tokens are not found"),
    Private("_orig_mod", "torch._dynamo.eval_frame:OptimizedModule", "weights/weight_files",
            "a compiled model's saved weights have other names than its own"),
    Private("_no_split_modules", PRETRAINED, "models/memory", "the estimate takes every layer for one that is whole"),
    Private("_did_swap_in_out_features", "peft.tuners.lora.layer:ParamWrapper", "merging/edits",
            "experts are merged transposed"),
    Private("_model_mapping", "transformers:AutoModelForCausalLM", "weights/model_class",
            "the class that a config names is not found"),
    Private("_init_weights", PRETRAINED, "training/rehearsal/saves", "a pad row that loading sets to zero is not seen"),
    Private("_is_hf_initialized", "transformers.initialization", "training/rehearsal/saves",
            "a pad row that loading keeps is taken for one that it sets to zero"),
    Private("_keys_to_ignore_on_save", PRETRAINED, "weights/weight_files", "a whole model is taken for one with gaps"),
    Private("_attn_implementation", "transformers.configuration_utils:PreTrainedConfig", "models/kernels/varlen",
            "packs are not flattened for attention by borders, and answers fail under it"),
    Private("_can_set_attn_implementation", PRETRAINED, "models/kernels/varlen",
            "attention by borders is announced for a model whose own code goes on"),
    Private("_python_dispatch", "torch.utils", "models/fake_step", "no memory estimate"),
    Private("_pytree", "torch.utils", "models/fake_step", "no memory estimate"),
    Private("_subclasses", "torch", "models/memory", "no memory estimate"),
    Private("_foreach_copy_", "torch", "weights/float32_copies", "weights stay what they were beside their copies"),
    Private("_dynamo", "torch", "models/kernels/compiled_blocks", "a block that cannot be compiled ends the run"),
    Private("_functorch", "torch", "models/kernels/compiled_blocks",
            "a backward pass that cannot be compiled ends the run"),
    Private("_compiled_call_impl", MODULE, "models/kernels/compiled_blocks", "blocks are not compiled"),
    Private("_call_impl", MODULE, "models/kernels/compiled_blocks", "evaluation enters compiled blocks"),
    # data
    Private("_fingerprint", "datasets.arrow_dataset:Dataset", "data/arrow/encoded", "prepared rows are lost"),
    Private("_indices", "datasets.arrow_dataset:Dataset", "data/arrow/token_rows", "other rows are trained"),
    Private("ExamplesIterable", "datasets.iterable_dataset", "data/streaming", "a stream pickles the tokenizer"),
    Private("_compile_jinja_template", "transformers.utils.chat_template_utils", "prompt/render",
            "rendering takes half as long again"),
    # figures, and what libraries say
    Private("_extract_corpus_statistics", "sacrebleu.metrics.base:Metric", "evaluation/confidence", "no BLEU"),
    Private("_compute_score_from_stats", "sacrebleu.metrics.bleu:BLEU", "evaluation/confidence", "no BLEU"),
    Private("_get_default_store", "torch.distributed.distributed_c10d", "training/launch/silent",
            "a process that hangs is not named"),
    Private("_functions", "bitsandbytes.autograd", "adapters/quantization", "a warning at each of millions of calls"),
    Private("_get_kernel", "bitsandbytes.backends.mps.ops", "adapters/quantization",
            "a Mac asks the Hub for a kernel while it trains"),
)  # fmt: skip


def owner_of(entry: Private) -> Any:
    module, _, name = entry.owner.partition(":")
    if module.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def upstream_has(name: str, owner: Any) -> bool:
    """Whether a class, one of its bases, or a module has the name, or sets it on its instances."""
    if hasattr(owner, name):
        return True
    if inspect.ismodule(owner):
        submodules = Path(str(owner.__file__)).parent
        if (submodules / name).is_dir() or (submodules / f"{name}.py").is_file():
            return True
        return f'"{name}"' in inspect.getsource(owner)  # an attribute of tensors that the module looks for
    return any(
        f"self.{name}" in inspect.getsource(base) for base in owner.__mro__[:-1] if base.__module__ != "builtins"
    )


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_upstream_still_has_it(entry: Private) -> None:
    if entry.name == "_get_kernel":  # its module cannot be imported where there is no GPU of Apple's
        pytest.importorskip("bitsandbytes")
        module = importlib.util.find_spec(entry.owner)
        assert module is not None, f"{entry.owner} has gone: {entry.breaks}"
        found = f"def {entry.name}" in Path(str(module.origin)).read_text(encoding="utf-8")
    else:
        found = upstream_has(entry.name, owner_of(entry))
    assert found, f"{entry.owner} has no {entry.name} any more (instructft/{entry.used_in}.py): {entry.breaks}"


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_it_is_used_where_the_table_says(entry: Private) -> None:
    assert entry.name in (PACKAGE / f"{entry.used_in}.py").read_text(encoding="utf-8")


def test_a_name_that_has_gone_is_seen() -> None:
    assert not upstream_has("_run_epoch_of_another_release", owner_of(TABLE[0]))
    assert not upstream_has("_tr_losses", owner_of(TABLE[0]))
    assert not upstream_has("_pytrees", importlib.import_module("torch.utils"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that are ours: functions, classes, variables, and what is set on `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def used(tree: ast.Module, ours: set[str]) -> Iterator[tuple[str, int]]:
    """Private names that are not ours, as far as the text tells: of an object, of `super()`, in an import."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            names = [node.attr] if of_super or node.attr not in ours else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            names = [str(node.args[1].value)] if isinstance(node.args[1], ast.Constant) else []
            names = [name for name in names if name not in ours]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("instructft"):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and ast.unparse(node).count("."):
            names = str(node.value).split(".") if str(node.value).replace(".", "").isidentifier() else []
        yield from ((name, getattr(node, "lineno", 0)) for name in names if private(name))


@functools.cache
def trees() -> dict[str, ast.Module]:
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}


STANDARD_LIBRARY = {"_exit", "_asdict", "_fields"}  # `os._exit` and those of named tuples, which are documented


def unlisted(texts: dict[str, ast.Module]) -> list[str]:
    """Private names of others that are used and not in the table, each with its place."""
    known = {entry.name for entry in TABLE} | STANDARD_LIBRARY
    ours = {name for tree in texts.values() for name in defined(tree)}
    return [
        f"{path}:{line} {name}" for path, tree in texts.items() for name, line in used(tree, ours) if name not in known
    ]


def test_every_private_name_of_others_stands_in_the_table() -> None:
    assert len(trees()) > 50
    assert unlisted(trees()) == []


@pytest.mark.parametrize(
    "text",
    [
        "trainer._hidden = 1",
        "super()._hidden()",
        "from torch._hidden import x",
        "from torch import _hidden",
        "import torch._hidden",
        "getattr(model, '_hidden', None)",
        "log('torch._hidden')",
    ],
)
def test_one_that_is_not_listed_is_seen(text: str) -> None:
    assert unlisted({"new.py": ast.parse(text)}) == ["new.py:1 _hidden"]
