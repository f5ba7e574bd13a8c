"""Whether a fused output head computes what the model's own logits say; where it does not, the logits are trained.

A fused head takes logits for `lm_head(hidden)`, times a factor, under a cap that it knows. That is a claim about a
model: ModernBERT's decoder puts a dense layer and a norm before that, RecurrentGemma a cap of another name behind it,
and a head that leaves them out trains another model than the one that is saved. Here the claim is tried on one short
batch: log-probability, entropy, top-1 and the gradient that goes back into the model, once as they are and once with
hidden states so large that a cap or any other curve must show.

The layers below are what a rehearsal takes its time for: they are gone through once for all who look at the model's own
logits, and not again for a head that hands them the same inputs.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from instructft.errors import ModelError
from instructft.models.kernels.fused_loss import add_plain_head, from_logits, nll_of, scores
from instructft.training.out_of_memory import ran_out
from instructft.weights.model_class import backbone

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

Batch = dict[str, torch.Tensor]

LARGE = 50.0  # the largest logit of the second look; soft caps stand at 8 to 50
TOLERANCE = 1e-3  # of log-probabilities of up to LARGE nats, in float32; fused heads are within 2.3e-5
ROUNDED = 5e-2  # the same where hidden states or logits are rounded to 16 bits, or products to TensorFloat-32


@dataclass(frozen=True)
class Head:
    """What training will ask for its loss.

    Args:
        kind: `fused`, or `logits` for the model's own.
        difference: between the two, as a share of the largest value; None where the fused head fails.
        why: why it is the logits, or why there is no router's loss; "" where all is as it should be.
    """

    kind: str
    difference: float | None
    why: str = ""


@dataclass(frozen=True)
class _Call:
    """What a module was given, under the names of its forward, and gave."""

    inputs: dict[str, Any]
    out: Any

    def has(self, inputs: dict[str, Any]) -> bool:
        """Whether these are the same inputs, and so would give the same."""
        return self.inputs.keys() == inputs.keys() and all(_same(inputs[name], self.inputs[name]) for name in inputs)


@dataclass(frozen=True)
class OwnPass:
    """What the model makes of a batch by its own forward, with the graph that leads there.

    Args:
        logits: (B, T, V).
        embedded: what its embeddings gave, of which gradients can be asked; None where that was not called.
        below: what the layers below the head were given, and gave; None where there is no telling them apart.
    """

    logits: torch.Tensor
    embedded: torch.Tensor | None
    below: _Call | None

    @classmethod
    def of(cls, trainer: Trainer, batch: Batch) -> OwnPass:
        """Go through the model once, in the precision of a step."""
        model: Any = trainer.model
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states: list[torch.Tensor] = []

        def watch(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            states.append(out.detach().requires_grad_())
            return states[-1].clone()  # some models go on with it in place

        hook = model.get_input_embeddings().register_forward_hook(watch)
        try:
            with as_in_a_step(trainer), _below(model) as found:
                logits = model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        return cls(logits, states[0] if states else None, found[0] if len(found) == 1 else None)


def choose_head(trainer: Trainer, batch: Batch) -> tuple[Head, OwnPass]:
    """Give the model the first head that computes what its own logits say, with the router's loss if that can be had.

    Returns:
        the head, and the pass that it was held against.

    Raises:
        ModelError: the model's own forward fails, or cannot compute the router's loss that the recipe asks for.
    """
    model: Any = bare(trainer.model)
    fused, text = model.forward, model.config.get_text_config()
    difference, why, error = None, "", None
    own: OwnPass | None = None
    router = [trainer.aux_loss_enabled, *([False] if trainer.aux_loss_enabled else [])]
    for trainer.aux_loss_enabled in router:
        if hasattr(text, "output_router_logits"):
            text.output_router_logits = trainer.aux_loss_enabled
        for kind in ("fused", "logits"):
            model.forward = fused
            if kind == "logits":
                add_plain_head(model)
            own = own or _own_pass(trainer, batch)
            with _below(model, call=own.below if own else None) as below:
                failed = _failure(trainer, batch)
            error = failed or error  # the last one is that of the model's own forward
            if failed:
                why = why or f"the fused head fails on {type(model).__name__} ({_short(failed)})"
                continue
            own = own or OwnPass.of(trainer, batch)
            if kind == "fused":
                difference = compare(trainer, batch, own, below[0].out if len(below) == 1 else None)
                if difference > (limit := tolerance(trainer)):
                    why = (
                        f"the fused head and the logits of {type(model).__name__} differ by {difference:.1e} "
                        f"(up to {limit:g} would be rounding)"
                    )
                    continue
            return Head(kind, difference, _in_words(trainer, kind, why, router[0], error)), own
    raise ModelError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be trained here: its forward fails on a batch of "
        f"{tuple(batch['input_ids'].shape)} tokens: {_short(error)}"
    ) from error


def _in_words(trainer: Trainer, kind: str, why: str, router: bool, error: Exception | None) -> str:
    if router and not trainer.aux_loss_enabled:
        if trainer.args.router_aux_loss_coef:
            raise ModelError(
                f"train.router_aux_loss_coef: found {trainer.args.router_aux_loss_coef}, but "
                f"{type(bare(trainer.model)).__name__} fails to compute its router's loss ({_short(error)}); set it to "
                "0.0"
            ) from error
        why = f"no loss of a router is trained: the model fails to compute one ({_short(error)})"
    if kind == "logits":
        why += "; the loss is computed from the model's own logits, which takes more memory"
    return why


def bare(model: Any) -> Any:
    """The causal language model below an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def as_in_a_step(trainer: Trainer) -> Iterator[None]:
    """The precision of the run's steps: accelerate puts autocast around a model only when training begins."""
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        yield


def precision_of(trainer: Trainer) -> torch.dtype:
    """The type that the model computes in when it is trained."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
    found: torch.dtype = mixed.get(str(trainer.accelerator.mixed_precision), trainer.model.dtype)
    return found


def tolerance(trainer: Trainer) -> float:
    """How far rounding alone may part two ways to compute the same logits."""
    exact = precision_of(trainer) == trainer.model.dtype == torch.float32 and trainer.args.device.type != "cuda"
    return TOLERANCE if exact else ROUNDED


def compare(trainer: Trainer, batch: Batch, own: OwnPass, fused: Any = None) -> float:
    """The largest difference between what training computes and what the logits say, as a share of what they say.

    Args:
        fused: what the layers below the head gave on the way to the loss of training; None: they are gone through.
    """
    worst, scale = 0.0, 1.0
    for look in range(2):
        with as_in_a_step(trainer):
            wanted, largest = _looked_at(trainer.model, batch, own.below.out if own.below else None, scale, plain=True)
            found, _ = _looked_at(trainer.model, batch, fused, scale, plain=False)
            # at the second look nearly all probability lies on one token: what is left of a gradient is rounding
            names = ("log_probs", "entropy", *(("gradient",) if look == 0 else ()))
        for name in names:
            one, other = found[name], wanted[name]
            if other is None or one is None:
                continue
            if name == "gradient":
                apart, size = (one - other).norm(), other.norm()
            else:
                apart, size = (one - other).abs().max(), other.abs().max()
                if name == "entropy":  # of a token that is all but certain it is 0, and what is seen of it rounding
                    size = size.clamp(min=1.0)
            share = float(apart / size.clamp(min=1e-6))
            worst = max(worst, share if share == share else float("inf"))  # a NaN is no agreement
        if not 0 < largest < LARGE or wanted["gradient"] is None:
            break
        scale = LARGE / largest
    return worst


def _looked_at(
    model: Any, batch: Batch, below: Any, scale: float, *, plain: bool
) -> tuple[dict[str, torch.Tensor | None], float]:
    """Scores of a batch with the hidden states multiplied by `scale`, their gradient, and the largest logit."""
    largest = 0.0
    with _below(model, below, scale) as found, _frozen(model.get_output_embeddings()):
        if plain:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            largest = float(logits.detach().abs().max())
            seen = from_logits(logits, batch["labels"][:, 1:].to(logits.device))
        else:
            seen = scores(model, batch)
    gradient = None
    if found and seen.log_probs is not None:
        gradient = torch.autograd.grad(nll_of(seen), _hidden(found[-1].out), allow_unused=True)[0]
    values = {"log_probs": seen.log_probs, "entropy": seen.entropy, "gradient": gradient}
    return {name: None if value is None else value.detach().float() for name, value in values.items()}, largest


@contextlib.contextmanager
def _below(
    model: Any, known: Any = None, scale: float | None = None, call: _Call | None = None
) -> Iterator[list[_Call]]:
    """What the layers below the head are given and give within; nothing where the model is one piece.

    Args:
        known: what they have given before: they are not gone through again.
        scale: multiply their hidden states, of which gradients can be asked then.
        call: nor are they gone through again where they are given what they were given here.
    """
    below, found = backbone(bare(model)), list[_Call]()
    if below is bare(model):
        yield found
        return
    forward, names = below.forward, list(inspect.signature(below.forward).parameters)

    def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return {name: x for name, x in given.items() if x is not None and not (x is False and name[:7] == "output_")}

    def run(*args: Any, **kwargs: Any) -> Any:
        if known is not None:
            return known
        return call.out if call and call.has(inputs_of(args, kwargs)) else forward(*args, **kwargs)

    def take(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if scale is not None:
            hidden = (_hidden(out).detach() * scale).requires_grad_()
            if isinstance(out, tuple):
                out = (hidden, *out[1:])
            else:
                out = copy.copy(out)
                out["last_hidden_state"] = hidden
        found.append(_Call(inputs_of(args, kwargs), out))
        return out

    hook = below.register_forward_hook(take, with_kwargs=True)
    if known is not None or call is not None:
        below.forward = run
    try:
        yield found
    finally:
        hook.remove()
        below.forward = forward


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs of a module are equal; what cannot be told is not."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, bool | int | float | str) and type(one) is type(other) and one == other)


@contextlib.contextmanager
def _frozen(module: Any) -> Iterator[None]:
    """No gradient of a module's own weights: of a head it is as large as the head, and here nobody looks at it."""
    weights = [weight for weight in module.parameters() if weight.requires_grad] if module is not None else []
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _hidden(out: Any) -> torch.Tensor:
    states: torch.Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return states


def _own_pass(trainer: Trainer, batch: Batch) -> OwnPass | None:
    """The model's own pass; None where it fails, which the loss of training then says better."""
    try:
        return OwnPass.of(trainer, batch)
    except Exception as error:
        if ran_out(error):
            raise
        return None


def _failure(trainer: Trainer, batch: Batch) -> Exception | None:
    """What goes wrong when the loss of a batch is computed as training will; None where nothing does."""
    try:
        with torch.no_grad(), as_in_a_step(trainer):
            trainer.compute_loss(trainer.model, dict(batch))
    except Exception as error:
        if ran_out(error):
            raise
        return error
    return None


def _short(error: Exception | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
