"""Proves a merge, and measures what storing it costs: two questions, two answers.

**Is the arithmetic right?** Only here is a merge refused. Each tensor is held against PEFT's own merge in float64
(`instructft.merging.weight_proof`). Then the merged folder is loaded as anybody loads it, its rounding is undone in
memory, and its logits must be those of the adapter on its base to a ten-thousandth of the largest one, which is
float32's share: names, ties, configuration and embeddings are what they were. Where float32 does not fit in memory, the
loaded weights are held against the files instead.

**What does the dtype cost?** The merged model as it is stored, and as it would be in other dtypes and roundings, beside
the adapter on its base: KL, most likely tokens, loss of held-out rows. Of the roundings the one that loses least is
taken.

One model is in memory at a time: the base with its adapter is let go before the merged one is loaded. A model that does
not fit is mapped from its files: the system brings in what a layer computes with, and lets it go again; only what is
stored is measured then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import ModelError
from instructft.merging.arithmetic import Place, rounded
from instructft.merging.comparison import Seen, Texts, agreement, apart, look, look_once
from instructft.merging.full_model import is_full
from instructft.merging.plan import Machine, Plan
from instructft.merging.weight_proof import Changed, compare_stored, compare_weights
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class
from instructft.weights.readable import reading
from instructft.weights.rounding import NEAREST, STOCHASTIC
from instructft.weights.tensor_io import Stored, pieces

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from instructft.adapters.adapter_folder import AdapterFolder

_COMPARED = {True: "greedy answers", False: "most likely next tokens"}  # of a model that fits in memory, and not
FLOOR = 1e-4  # of the largest logit: what float32 arithmetic in another order may do
WORTH = 0.01  # of the adapter's own effect: a dtype that costs more is named


@dataclass(frozen=True)
class Merge:
    """What is to be proved: an adapter, its base, and the folder that was written."""

    base: Path
    adapter: AdapterFolder
    tensors: Mapping[str, Stored]  # the adapter's
    folder: Path
    files: Mapping[str, Stored]  # the merged tensors as they lie on disk
    plan: Plan
    rounding: str  # that they were written with


def prove(merge: Merge, texts: Texts, machine: Machine) -> dict[str, Any]:
    """Compare a merged model with the adapter on its base.

    Returns:
        `weights`, as `compare_weights` gives them; of the model as it is stored `kl`, `top1`, `loss`, `difference` (of
        a logit), and `tokens` and `equal_tokens` of the greedy answers, or of what `compared` says; `exact`, the
        largest difference of a logit with the rounding undone, within `tolerance` (None where it was not asked);
        `effect`, `effect_kl`, `effect_loss`: what the adapter does to its base; `costs`, a row for each dtype and
        rounding; `scale`, `texts`, `source`, `precision`, `device`.

    Raises:
        ModelError: the merged model is not the adapted one.
    """
    from accelerate.utils.memory import clear_device_cache

    see = look if machine.whole else look_once
    if is_full(merge.adapter):
        live, unexpected = _loaded(merge.adapter.folder, machine)
        seen = see(live, texts)
        del live
        clear_device_cache(garbage_collection=True)
        live, _ = _loaded(merge.base, machine)
        effect = apart(seen, see(live, texts, answers=False))
        weights = compare_stored(merge.plan, merge.tensors, merge.files, merge.rounding)
    else:
        live, unexpected = load_adapted(merge.base, merge.adapter, machine)
        seen = see(live, texts)
        with live.disable_adapter():
            effect = apart(seen, see(live, texts, answers=False))
        weights = compare_weights(live, merge.plan, merge.tensors, merge.files, merge.rounding)
    del live
    clear_device_cache(garbage_collection=True)

    model = _merged(merge.folder, merge.plan, unexpected, machine)
    _refuse_other_weights(model, merge)
    now = see(model, texts)
    found = apart(seen, now)
    scale = max(float(logits.abs().max()) for logits in seen.logits)
    tolerance = exact = None
    costs: list[dict[str, Any]] = []
    if machine.whole and str(machine.dtype) == "torch.float32":
        costs = _costs(model, merge, texts, seen)
        exact, tolerance = costs[-1]["difference"], FLOOR * scale  # the last one is float32, which rounds nothing
    elif not _rounds(merge.plan):
        exact, tolerance = found["difference"], FLOOR * scale
    del model
    clear_device_cache(garbage_collection=True)
    if exact is not None and tolerance is not None and not exact <= tolerance:  # not a number is no proof either
        raise ModelError(
            f"the merged model is not the adapted one: with its rounding undone a logit differs by {exact:.3g}, "
            f"allowed is {tolerance:.3g} (the adapter itself changes logits by {effect['difference']:.3g}). "
            "Nothing was kept"
        )
    tokens, equal = agreement(seen.answers, now.answers)
    return {
        **found,
        "exact": exact,
        "tolerance": tolerance,
        "effect": effect["difference"],
        "effect_kl": effect["kl"],
        "effect_top1": effect["top1"],
        "effect_loss": None if seen.loss is None else {"base": effect["loss"], "adapter": seen.loss},
        "scale": scale,
        "tokens": tokens,
        "equal_tokens": equal,
        "weights": weights,
        "costs": costs,
        "texts": len(texts.rows),
        "source": texts.source,
        "precision": str(machine.dtype).removeprefix("torch."),
        "device": machine.device,
        "compared": _COMPARED[machine.whole],
    }


def better_rounding(proof: Mapping[str, Any], dtype: str, rounding: str) -> str:
    """The rounding of this dtype that loses least, unless the present one loses next to nothing more."""
    of_dtype = {row["rounding"]: row["kl"] for row in proof["costs"] if row["dtype"] == dtype and row["kl"] is not None}
    if not of_dtype:
        return rounding
    best = min(of_dtype, key=lambda name: of_dtype[name])
    return best if of_dtype[best] < 0.9 * of_dtype.get(rounding, float("inf")) else rounding


def costly(proof: Mapping[str, Any]) -> list[str]:
    """Where storing the model costs more than a hundredth of what the adapter does: the dtypes that would not."""
    limit = WORTH * proof["effect_kl"]
    if proof["kl"] <= limit or not limit:
        return []
    return [row["dtype"] for row in proof["costs"] if row["kl"] is not None and row["kl"] <= limit]


def _rounds(plan: Plan) -> bool:
    """Whether any weight is stored in less than it was computed in."""
    return any(
        out.planned.dtype.itemsize < (4 if out.edit.names else out.base.dtype.itemsize)
        for out in plan.outputs.values()
        if out.planned.dtype.is_floating_point
    )


# --------------------------------------------------------------------------------------------------------------------
# What a dtype costs
# --------------------------------------------------------------------------------------------------------------------


def _costs(model: PreTrainedModel, merge: Merge, texts: Texts, seen: Seen) -> list[dict[str, Any]]:
    """What each dtype and rounding costs, the last of them float32, which rounds nothing."""
    import torch

    own = merge.plan.dtype
    wanted = [(torch.float16, NEAREST), (torch.float32, NEAREST)]
    if own == torch.bfloat16:
        wanted = [(own, NEAREST), (own, STOCHASTIC), *wanted]
    rows = []
    for dtype, rounding in wanted[-1:] if own == torch.float32 else wanted:
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "rounding": rounding}
        try:
            changed = _put(model, merge, dtype, rounding)
        except ModelError:  # float16 ends at 65,504
            rows.append({**row, "kl": None, "top1": None, "difference": None, "loss": None, "vanished": None})
            continue
        found = apart(seen, look(model, texts, answers=False))
        rows.append({**row, **found, "vanished": changed.figures()["vanished"]})
    return rows


def _put(model: PreTrainedModel, merge: Merge, dtype: torch.dtype, rounding: str) -> Changed:
    """Give a loaded model the merged weights as a dtype and rounding would store them."""
    import torch

    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    changed, changes = Changed(), merge.plan.changed
    with torch.no_grad():
        for name, place in _every(merge.plan):
            out = merge.plan.outputs[place.name]
            if not out.planned.dtype.is_floating_point:
                continue
            start = 0
            for exact, piece in rounded(out.base, out.edit, merge.tensors, dtype, rounding):
                stop = start + len(piece)
                place.of(places[name]).view(-1, *piece.shape[1:])[start:stop] = piece.to(places[name].dtype)
                if name in changes:
                    changed.count(piece.double(), exact.double(), out, start, stop)
                start = stop
    return changed


def _refuse_other_weights(model: PreTrainedModel, merge: Merge) -> None:
    """Each weight of the loaded model is the one in its file."""
    import torch

    places = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, place in _every(merge.plan):
        stored = merge.files[place.name]
        for start, stop in pieces(stored.rows, stored.width):
            found = stored.read(start, stop)
            held = place.of(places[name]).view(-1, *found.shape[1:])[start:stop].cpu()
            if not torch.equal(held, found.to(held.dtype)) and not bool(found.isnan().any()):
                raise ModelError(
                    f"the merged model does not load as it was written: {name} is not {place.name} of its file. "
                    "Nothing was kept"
                )


def _every(plan: Plan) -> Iterator[tuple[str, Place]]:
    """Parameter and place of each of its tensors in the files."""
    return ((name, place) for name, places in plan.places.items() for place in places)


# --------------------------------------------------------------------------------------------------------------------
# Loading both
# --------------------------------------------------------------------------------------------------------------------


def load_plain(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model in evaluation mode by the class that its config names, and what loading it said (`missing_keys`, …).

    Raises:
        ModelFileError: it cannot be read.
    """
    from transformers import AutoConfig

    with reading(str(folder), folder):
        config = AutoConfig.from_pretrained(folder, **remote_code.flag())
        model, info = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **remote_code.flag(), **options
        )
    return model.eval(), info


def _loaded(folder: Path, machine: Machine) -> tuple[Any, set[str]]:
    model, info = load_plain(folder, machine.dtype)
    return model.to(machine.device), set(info["unexpected_keys"])


def load_adapted(base: Path, adapter: AdapterFolder, machine: Machine, **options: Any) -> tuple[Any, set[str]]:
    """The adapter on its base as a `PeftModel`, and the tensors of the base that the model has no place for.

    Args:
        options: of `from_pretrained`, such as `quantization_config`; with them the model stays where that puts it.

    Raises:
        ModelFileError, AdapterError: one of the two cannot be read, or they do not fit each other.
    """
    from instructft.adapters.attach import attach

    model, info = load_plain(base, options.pop("dtype", machine.dtype), **options)
    if not options:
        model.to(machine.device)
    return attach(model, adapter), set(info["unexpected_keys"])


def _merged(folder: Path, plan: Plan, unexpected: set[str], machine: Machine) -> PreTrainedModel:
    """The merged model, loaded as anybody loads it: whole, without tensors that it has no place for."""
    model, info = load_plain(folder, machine.dtype)
    bad = sorted({*info["missing_keys"], *(set(info["unexpected_keys"]) - unexpected)})
    bad += sorted(str(name) for name in info["mismatched_keys"])
    if bad:
        raise ModelError(f"the merged model does not load whole: {', '.join(bad[:3])} ({len(bad)} in all)")
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [one.config.get_text_config().vocab_size for one in (model, plan.model)]
    if rows != plan.model.get_input_embeddings().weight.shape[0] or ids[0] != ids[1]:
        raise ModelError(f"the merged model has {rows} embedding rows, and its config.json says otherwise")
    return model.to(machine.device)
