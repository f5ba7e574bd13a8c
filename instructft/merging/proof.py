"""Proves a merge: the adapter on its base and the merged model, on the same texts, one after the other.

Three things are compared. **Weights**: each merged tensor with what PEFT's own merge makes of it in memory, within
half a unit in the last place of its dtype. **Logits**: the largest difference must stay within a tolerance. **Greedy
answers**, token by token, are counted.

The tolerance is derived, not chosen: storing weights in bfloat16 moves every merged weight by up to half a unit in
the last place, and how far that moves the logits depends on the model. So the adapted model's merged weights are moved
by random amounts of just that size, and a merge may differ by four times what this did to the logits, or by a
ten-thousandth of the largest logit, which is float32's share.

One model is in memory at a time: the base with its adapter is let go before the merged one is loaded. A model that
does not fit is mapped from its files: the system brings in what a layer computes with, and lets it go again. All texts
then go through in one batch, and the most likely next tokens are counted in place of those of answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import InstructftError, ModelError
from instructft.formatting import first_line
from instructft.merging.plan import Machine, Plan
from instructft.merging.weight_proof import compare_weights, jittered
from instructft.weights import remote_code

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from instructft.adapters.adapter_folder import AdapterFolder
    from instructft.recipe.schema import Recipe
    from instructft.weights.tensor_io import Stored

LOGITS = 64 << 20  # bytes of logits that are kept for one model
_COMPARED = {True: "greedy answers", False: "most likely next tokens"}  # of a model that fits in memory, and not
MARGIN = 4  # the tolerance is this many times what simulated rounding does
FLOOR = 1e-4  # of the largest logit: what float32 arithmetic in another order may do
ROWS = 8  # texts
LENGTH = 256  # tokens of a text
ANSWER = 32  # tokens of an answer, at most

FIXED = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "Translate to German: The weather is fine today.",
    "Give three tips for staying healthy.",
    "What is 17 times 23?",
    "Summarize: A fox saw grapes on a high vine, could not reach them, and said that they were sour.",
    "def fibonacci(n):",
)


@dataclass(frozen=True)
class Texts:
    """What both models are shown."""

    rows: list[list[int]]  # token ids, for the logits
    prompts: list[list[int]]  # token ids that are answered
    source: str  # where they come from, in words
    stop_ids: list[int]
    pad_id: int
    answer: int  # tokens of an answer, at most


@dataclass(frozen=True)
class Seen:
    """What one model made of them."""

    logits: list[torch.Tensor]  # a text each, (positions kept, V), float32 on the CPU
    answers: list[list[int]]


# --------------------------------------------------------------------------------------------------------------------
# The proof
# --------------------------------------------------------------------------------------------------------------------


def prove(
    base: Path,
    adapter: AdapterFolder,
    merged: Path,
    files: Mapping[str, Stored],
    plan: Plan,
    texts: Texts,
    machine: Machine,
) -> dict[str, Any]:
    """Compare the merged model in `merged` with the adapter on its base.

    Args:
        files: the merged tensors as they lie on disk.

    Returns:
        `difference`, `tolerance`, `rounding`, `effect` and `scale`, in logits; `tokens` and `equal_tokens` of the
        greedy answers, or of what `compared` says; `weights`; `texts`, `source`, `precision`, `device`.

    Raises:
        ModelError: the merged model is not the adapted one.
    """
    from accelerate.utils.memory import clear_device_cache

    live, unexpected = _adapted(base, adapter, machine)
    see = look if machine.whole else look_once
    seen = see(live, texts)
    with live.disable_adapter():
        effect = difference(seen.logits, see(live, texts, answers=False).logits)
    mergeable = not plan.untied  # PEFT's merge changes both of two tied weights where only one was adapted
    weights = compare_weights(live, plan, files) if mergeable else None
    with jittered(live, plan, mergeable, machine.whole):
        rounding = difference(seen.logits, see(live, texts, answers=False).logits)
    del live
    clear_device_cache(garbage_collection=True)

    model = _merged(merged, plan, unexpected, machine)
    now = see(model, texts)
    del model
    clear_device_cache(garbage_collection=True)
    scale = max(float(logits.abs().max()) for logits in seen.logits)
    found = difference(seen.logits, now.logits)
    tolerance = max(MARGIN * rounding, FLOOR * scale)
    tokens, equal = agreement(seen.answers, now.answers)
    if not found <= tolerance:  # not a number is no proof either
        raise ModelError(
            f"the merged model is not the adapted one: a logit differs by {found:.3g}, allowed is {tolerance:.3g} "
            f"(the adapter itself changes logits by {effect:.3g}); of {_COMPARED[machine.whole]} {equal} of {tokens} "
            "tokens are equal. Nothing was kept"
        )
    return {
        "difference": found,
        "tolerance": tolerance,
        "rounding": rounding,
        "effect": effect,
        "scale": scale,
        "tokens": tokens,
        "equal_tokens": equal,
        "weights": weights,
        "texts": len(texts.rows),
        "source": texts.source,
        "precision": str(machine.dtype).removeprefix("torch."),
        "device": machine.device,
        "compared": _COMPARED[machine.whole],
    }


def measure_quantized(
    adapter: AdapterFolder, base: Path, merged: Path, texts: Texts, machine: Machine
) -> dict[str, Any]:
    """How far the merged model is from the adapter on the quantized base that it was trained on; nothing is required.

    Raises:
        UsageError: it was not trained on a quantized base, or this machine cannot load one.
    """
    import torch
    from accelerate.utils.memory import clear_device_cache

    from instructft.adapters.quantization import configuration

    kind = adapter.base.quantization
    dtype = getattr(torch, adapter.base.dtype, torch.float32)
    live, _ = _adapted(base, adapter, machine, quantization_config=configuration(kind, dtype), dtype=dtype)
    see = look if machine.whole else look_once
    seen = see(live, texts)
    del live
    clear_device_cache(garbage_collection=True)
    model, _ = _load(merged, machine.dtype)
    now = see(model.to(machine.device), texts)
    del model
    clear_device_cache(garbage_collection=True)
    tokens, equal = agreement(seen.answers, now.answers)
    found = difference(seen.logits, now.logits)
    return {"quantization": kind, "difference": found, "tokens": tokens, "equal_tokens": equal}


def _load(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **remote_code.flag(), **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ModelError(f"{folder} could not be loaded: {first_line(error)}") from error
    return model.eval(), info


def _adapted(base: Path, adapter: AdapterFolder, machine: Machine, **options: Any) -> tuple[Any, set[str]]:
    from instructft.adapters.attach import attach

    model, info = _load(base, options.pop("dtype", machine.dtype), **options)
    if not options:
        model.to(machine.device)
    return attach(model, adapter), set(info["unexpected_keys"])


def _merged(folder: Path, plan: Plan, unexpected: set[str], machine: Machine) -> PreTrainedModel:
    """The merged model, loaded as anybody loads it: whole, without tensors that it has no place for."""
    model, info = _load(folder, machine.dtype)
    bad = sorted({*info["missing_keys"], *(set(info["unexpected_keys"]) - unexpected)})
    bad += sorted(str(name) for name in info["mismatched_keys"])
    if bad:
        raise ModelError(f"the merged model does not load whole: {', '.join(bad[:3])} ({len(bad)} in all)")
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != plan.model.get_input_embeddings().weight.shape[0] or rows != model.config.get_text_config().vocab_size:
        raise ModelError(f"the merged model has {rows} embedding rows, and its config.json says otherwise")
    return model.to(machine.device)


# --------------------------------------------------------------------------------------------------------------------
# What both models are shown, and what they make of it
# --------------------------------------------------------------------------------------------------------------------


def choose_texts(
    recipe: Recipe | None, tokenizer: PreTrainedTokenizerBase | None, context: int, vocabulary: int
) -> Texts:
    """Rows that the recipe holds out, where it holds any out and its data is here; else fixed texts, or token ids.

    Args:
        tokenizer: that of the merged model; None when it has none.
        context: tokens that the model takes at most.
        vocabulary: rows of its embedding.
    """
    from instructft.prompt.loss_mask import encoder

    limit = min(LENGTH, context)
    room = max(1, limit - ANSWER)
    if tokenizer is None:
        import torch

        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(vocabulary, (len(FIXED), min(32, room)), generator=draw).tolist()
        return Texts(rows, rows, "random token ids", [], 0, ANSWER)
    if not isinstance(tokenizer.chat_template, str):
        rows = prompts = [tokenizer(text)["input_ids"] for text in FIXED]
        source, stop = "fixed texts", tokenizer.eos_token_id
    else:
        stop = encoder(tokenizer).stop_token_id
        if conversations := _held_out(recipe):
            prompts = encoder(tokenizer).prompts([messages[:-1] for messages in conversations])
            rows = [row["input_ids"] for row in encoder(tokenizer).encode(conversations).lists()]
            source = "the recipe's held-out rows"
        else:
            rows = prompts = encoder(tokenizer).prompts([[{"role": "user", "content": text}] for text in FIXED])
            source = "fixed texts"
    return Texts(
        rows=[ids[:limit] for ids in rows if ids],
        prompts=[ids[-room:] for ids in prompts if ids],
        source=source,
        stop_ids=[] if stop is None else [stop],
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop or 0,
        answer=ANSWER,
    )


def _held_out(recipe: Recipe | None) -> list[Any]:
    from instructft.data.load import conversations

    if recipe is None:
        return []
    for split in ("test", "validation"):
        if recipe.data.holds_out(split):
            try:
                return [row["messages"] for row in conversations(recipe, split, ROWS)]
            except (InstructftError, OSError, ValueError):  # the data has moved: another text proves as much
                return []
    return []


def look(model: Any, texts: Texts, answers: bool = True) -> Seen:
    """Logits and greedy answers of a model, one text at a time: no padding takes part."""
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=texts.answer, eos_token_id=texts.stop_ids or None, pad_token_id=texts.pad_id
    )
    logits, made = [], []
    with torch.inference_mode():
        for ids in texts.rows:
            batch = torch.tensor([ids], device=model.device)  # (1, T)
            found = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits[0]  # (T, V)
            logits.append(_kept(found, len(ids), len(texts.rows)))
        for ids in texts.prompts if answers else []:
            batch = torch.tensor([ids], device=model.device)
            out = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=greedy)
            made.append(out[0, len(ids) :].tolist())
    return Seen(logits, made)


def look_once(model: Any, texts: Texts, answers: bool = True) -> Seen:
    """As `look`, with every weight used once: all texts in one batch; for answers the most likely next tokens."""
    import torch

    lengths = [len(ids) for ids in texts.rows]
    batch = torch.full((len(lengths), max(lengths)), texts.pad_id)  # (B, T)
    mask = torch.zeros_like(batch)
    for i, ids in enumerate(texts.rows):
        batch[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
    with torch.inference_mode():
        found = model(input_ids=batch, attention_mask=mask, use_cache=False).logits  # (B, T, V)
    logits = [_kept(row, length, len(lengths)) for row, length in zip(found, lengths, strict=True)]
    return Seen(logits, [row[:n].argmax(-1).tolist() for row, n in zip(found, lengths, strict=True)] if answers else [])


def _kept(logits: torch.Tensor, length: int, texts: int) -> torch.Tensor:
    """Logits of some positions, evenly over a text of `length` tokens: (positions, V), float32 on the CPU."""
    import torch

    keep = max(1, LOGITS // (texts * logits.shape[-1] * 4))
    places = torch.linspace(0, length - 1, min(keep, length), device=logits.device).round().long()
    return logits[places].float().cpu()


def difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of a logit.

    Example::

        difference([torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 2.5]])])
        # 0.5
    """
    import torch

    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


def agreement(one: Iterable[list[int]], other: Iterable[list[int]]) -> tuple[int, int]:
    """Tokens of all answers, and how many of them are equal at their place.

    >>> agreement([[5, 6, 7]], [[5, 6, 8, 9]])
    (4, 2)
    """
    pairs = list(zip(one, other, strict=True))
    total = sum(max(len(a), len(b)) for a, b in pairs)
    return total, sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
