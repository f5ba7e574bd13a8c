"""Which of the weights that are to be trained get a gradient; those that the loss does not reach are left out.

A vision tower takes no part in the loss of text, Jamba reads the weight of `dt_proj` past any adapter on it, and rows
of new tokens that do not occur in the data stay as they are. Such weights cost memory, stop a run of several processes,
and would be saved as if they had been trained. An expert that one short batch was not routed to is none of them.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from instructft.adapters.lora import is_peft
from instructft.data.arrow.token_rows import tokens_of
from instructft.errors import ModelError
from instructft.training.rehearsal.head import as_in_a_step
from instructft.weights.model_class import shortest_names
from instructft.weights.weight_files import without_wrappers

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

PASSES = 8  # more, where layers are left out at random
LARGE = 1 << 20  # numbers of a weight whose gradient is not made as a whole
PIECE = 1 << 20  # numbers of a gradient that are looked at together; in most the first of them are not zero
_INNER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Reach:
    """What the loss reaches of the weights that the recipe trains.

    Args:
        left_out: layers that had an adapter, and weights that are frozen now.
        may_stay: weights that are trained and need not move: experts without a token, rows of absent tokens.
        absent: ids whose rows are trained, and that do not occur in the training rows.
    """

    left_out: list[str] = field(default_factory=list)
    may_stay: list[str] = field(default_factory=list)
    absent: list[int] = field(default_factory=list)

    def lines(self, tokens: Any) -> list[str]:
        """What a person should know; nothing where all is as it should be."""
        said = []
        if self.left_out:
            said.append(
                f"the loss does not reach {len(self.left_out)} weights, which are not trained: {kinds(self.left_out)}"
            )
        if self.absent:
            some = ", ".join(str(token) for token in tokens(self.absent[:6])) + (", …" if len(self.absent) > 6 else "")
            said.append(f"rows of {len(self.absent)} tokens are trained that no training row holds: {some}")
        return said


def kinds(names: Collection[str]) -> str:
    """Names of layers or weights in a few words.

    >>> kinds(["layers.0.k_proj", "layers.1.k_proj"])
    'layers.*.k_proj'
    """
    found = sorted({_INNER.sub("*", name) for name in names})
    return ", ".join(found[:6]) + (f" and {len(found) - 6} kinds more" if len(found) > 6 else "")


def leave_out_unreached(trainer: Trainer, batch: dict[str, torch.Tensor]) -> Reach:
    """Freeze what gets no gradient, take adapters off it, and say what may stay as it is.

    Raises:
        ModelError: nothing that is to be trained gets a gradient.
    """
    model: Any = trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    reached, moving = _gradients(trainer, batch, training=True)
    config = model.config.get_text_config()
    if any(getattr(config, name, 0) for name in ("layerdrop", "decoder_layerdrop")):  # a layer may have been left out
        for _ in range(PASSES):
            again, more = _gradients(trainer, batch, training=True)
            reached, moving = reached | again, moving | more
    if not reached:
        way_out = "choose others (adapter.target_modules)"
        if _gradients(trainer, batch, training=False)[0]:
            way_out = "gradient checkpointing cuts it off: train.gradient_checkpointing_kwargs={use_reentrant: false}"
        raise ModelError(
            f"none of the {len(trained)} weights of {type(model).__name__} that are to be trained gets a gradient; "
            f"{way_out}"
        )
    some = {_kind(name) for name in reached}
    unreached = {name for name in trained - reached if _kind(name) not in some}
    left_out = take_adapters_off(model, unreached) if is_peft(model) else []
    for name, weight in model.named_parameters():
        if name in unreached:
            weight.requires_grad_(False)
            left_out.append(name)
    rows, absent = _absent_rows(trainer)
    stay = (trained - moving) | rows
    return Reach(sorted(left_out), sorted(without_wrappers(name) for name in stay), absent)


def _gradients(trainer: Trainer, batch: dict[str, torch.Tensor], *, training: bool) -> tuple[set[str], set[str]]:
    """Names of the weights that get a gradient, and of those where one number of it at least is not zero.

    Each is looked at and let go as it comes: all of them together are as large as the model. Of large layers the
    gradient's product with a vector is looked at in its place, and of embeddings the rows that were read.
    """
    model: Any = trainer.model
    was = model.training
    found: set[str] = set()
    moving: set[str] = set()

    def look(name: str, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            found.add(name)
            grad = weight.grad.detach()
            numbers = grad._values() if grad.is_sparse else grad
            if any(bool(part.any()) for part in numbers.flatten().split(PIECE)):
                moving.add(name)
            weight.grad = None

    hooks = [
        weight.register_post_accumulate_grad_hook(functools.partial(look, name))
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    model.train(training)
    try:
        trainer.accelerator.unwrap_model(model).zero_grad(set_to_none=True)
        with _sketched(model, look), _sparse(model):
            with as_in_a_step(trainer):
                loss = trainer.compute_loss(model, dict(batch))
            loss.backward()
        return found, moving
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        model.train(was)


@contextlib.contextmanager
def _sketched(model: Any, look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Let each call of a large linear layer bring the product of its weight's gradient with a random vector.

    That product is zero where the gradient is, costs a vector in place of a matrix, and comes by the same road: the
    layer gives what it gave, plus zeros that want a gradient. A weight that is read past its layer has its own.
    """
    names = {id(weight): name for name, weight in model.named_parameters() if weight.requires_grad}
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and id(layer.weight) in names and layer.weight.numel() >= LARGE
    ]
    source, hooks = torch.Generator().manual_seed(0), list[Any]()

    def begin(layer: Any, args: Any) -> None:
        layer.weight.requires_grad_(False)

    def end(vector: torch.Tensor, zeros: torch.Tensor, layer: Any, args: Any, kwargs: Any, out: torch.Tensor) -> Any:
        layer.weight.requires_grad_(True)
        product = (args[0] if args else kwargs["input"]).detach().float() @ vector
        return out + (product[..., None] * zeros).to(out.dtype)

    for layer in layers:
        zeros = torch.zeros(layer.out_features, device=layer.weight.device, requires_grad=True)
        zeros.register_post_accumulate_grad_hook(functools.partial(look, names[id(layer.weight)]))
        vector = torch.randn(layer.in_features, generator=source).to(zeros.device)
        after = functools.partial(end, vector, zeros)
        hooks.append(layer.register_forward_pre_hook(begin))
        hooks.append(layer.register_forward_hook(after, prepend=True, with_kwargs=True))  # ahead of any other
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.weight.requires_grad_(True)


@contextlib.contextmanager
def _sparse(model: Any) -> Iterator[None]:
    """Let embeddings have a gradient of the rows that were read, in place of one as large as they are."""
    every = [one for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    tables = [one for one in every if one.weight.requires_grad and not one.sparse]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


def _kind(name: str) -> str:
    """A weight's name with any number for each but the first, which counts layers: an expert stands for all of them.

    >>> _kind("model.layers.3.mlp.experts.17.up_proj.weight")
    'model.layers.3.mlp.experts.*.up_proj.weight'
    """
    first = _INNER.search(name)
    return name if first is None else name[: first.end()] + _INNER.sub("*", name[first.end() :])


def take_adapters_off(model: Any, unreached: set[str]) -> list[str]:
    """Put the plain layer back where all weights of an adapter on it are among these; the names of these layers."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    base, taken, kept = model.get_base_model(), [], set()
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    ]
    for name, module in layers:
        own = {f"base_model.model.{name}.{part}" for part, _ in module.named_parameters() if "lora_" in part}
        if own and own <= unreached:
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, module.get_base_layer())
            unreached -= own
            taken.append(name)
        else:
            kept.add(name)
    if taken:
        model.peft_config["default"].target_modules = set(shortest_names(base, kept))
    return taken


def _absent_rows(trainer: Trainer) -> tuple[set[str], list[int]]:
    """Trained rows of tokens that the training rows do not hold: the weights all of whose rows are, and the ids."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    dataset: Any = trainer.train_dataset
    names: set[str] = set()
    absent: set[int] = set()
    layers = [(n, m) for n, m in trainer.model.named_modules() if isinstance(m, TrainableTokensLayer)]
    if not layers:
        return names, []
    blocks = tokens_of(dataset).blocks() if hasattr(dataset, "__len__") else ()
    seen = {token for block in blocks for token in np.unique(block.flat(("input_ids",))[0]["input_ids"]).tolist()}
    for name, layer in layers:
        ids = np.asarray(layer.token_indices["default"])
        there = np.array([token in seen for token in ids.tolist()], dtype=bool)
        if not there.any():
            names |= {f"{name}.{part}" for part, _ in layer.named_parameters() if "trainable_tokens_delta" in part}
        absent |= set(ids[~there].tolist())
    return names, sorted(absent) if hasattr(dataset, "__len__") else []
