"""The saved model, loaded again by plain transformers and PEFT, has the validation loss that the run reports.

`eval_loss` is made by the model in memory and by the head that training takes. What is handed on is a folder. Some of
the validation rows are asked of that folder, by `from_pretrained` and plain logits, and held against the figures that
the model in memory has for the same rows, by the head that its evaluations took.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device

from instructft.data.batches.branches import unfolded
from instructft.errors import ModelError
from instructft.models.kernels.fused_loss import scores
from instructft.models.memory import return_freed
from instructft.prompt.loss_mask import IGNORE_INDEX

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

ROWS = 4  # of the validation set
TOKENS = 2048  # of these rows in all, at most
MOST = 2 << 30  # bytes of weights; a larger model is not held in memory twice
TOLERANCE = 1e-3  # of the loss, in float32
ROUNDED = 3e-2  # where weights or autocast have 16 bits
ROUNDING = 2**-7  # of a weight in bfloat16, twice over


def prove_saved_loss(trainer: Trainer, folder: Path) -> dict[str, Any] | None:
    """Hold the saved model's loss on some validation rows against the run's own; None where it cannot be asked.

    Raises:
        ModelError: they differ.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    rows: Any = trainer.eval_dataset
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    quantized = getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None
    if rows is None or not hasattr(rows, "__len__") or size > MOST or quantized or _packed(rows[0]):
        return None
    chosen: list[dict[str, list[int]]] = []
    for row in rows.select(range(min(ROWS, len(rows)))):
        if not chosen or sum(len(one["input_ids"]) for one in chosen) + len(row["input_ids"]) <= TOKENS:
            chosen.append(row)
    ours = _of_the_run(trainer, chosen)
    return_freed()  # a second model beside what the last step left behind was the most that a run ever took
    saved = _load(model, folder)
    if saved is None:
        return None
    theirs = _by_logits(saved, [turn for row in chosen for turn in (unfolded(row) if "seq_starts" in row else [row])])
    exact = model.dtype == saved.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    limit = (TOLERANCE if exact else ROUNDED) * max(1.0, abs(ours))
    if not abs(ours - theirs) <= limit:
        raise ModelError(
            f"the model that was saved is not the one that was trained: on {len(chosen)} validation rows the run has a "
            f"loss of {ours:.4f}, and what was saved, loaded by from_pretrained, {theirs:.4f}. The figures of this run "
            "are not those of its folder"
        )
    if not hasattr(model, "peft_config") and (others := _others(model, saved)):
        raise ModelError(
            f"{', '.join(others[:3])} ({len(others)} in all) of {type(model).__name__} are others when what was saved "
            "is loaded by from_pretrained"
        )
    return {"rows": len(chosen), "loss": ours, "saved_loss": theirs}


def _packed(row: dict[str, list[int]]) -> bool:
    """Whether documents share a row; turns of one conversation may, and are taken apart again."""
    return "seq_lengths" in row and row.get("seq_starts", [0, 0]).count(0) > 1


def _of_the_run(trainer: Trainer, rows: list[dict[str, list[int]]]) -> float:
    """As an evaluation has it, on this process alone: the model in memory, by the head that was trained, one batch."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    was = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            out = scores(model, send_to_device(trainer.data_collator(rows), trainer.args.device))
    finally:
        model.train(was)
    return float(-out.log_probs.double().sum() / out.label_mask.sum())


def _load(model: Any, folder: Path) -> Any:
    """What lies in a folder, loaded by the field's own libraries onto the CPU; None where its base cannot be found."""
    from instructft.weights import remote_code
    from instructft.weights.model_class import auto_class

    if not hasattr(model, "peft_config"):
        return type(model).from_pretrained(folder, dtype="auto").eval()
    from peft import PeftModel

    config = model.peft_config["default"]
    if not config.base_model_name_or_path:
        return None
    base = auto_class(model.get_base_model().config).from_pretrained(
        config.base_model_name_or_path, revision=config.revision, dtype=model.dtype, **remote_code.flag()
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if base.get_input_embeddings().weight.shape[0] < rows:
        return None  # the rows of new tokens come from the adapter, which the loader of this package puts there
    return PeftModel.from_pretrained(base, str(folder)).eval()


@torch.no_grad()
def _others(model: Any, saved: Any) -> list[str]:
    """Names of weights that differ by more than a narrower type would round them."""
    found, others = dict(saved.named_parameters()), []
    for name, weight in model.named_parameters():
        if name in found:
            ours = weight.cpu().float()
            if bool(((ours - found[name].float()).abs() > ours.abs() * ROUNDING + 1e-6).any()):
                others.append(name)
    return others


@torch.no_grad()
def _by_logits(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss over supervised tokens, each row alone."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        labels = torch.tensor(row["labels"], device=model.device)[1:]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
        kept = labels != IGNORE_INDEX
        log_p = logits[kept].log_softmax(-1).gather(-1, labels[kept][:, None])
        total, count = total - float(log_p.double().sum()), count + int(kept.sum())
    return total / max(count, 1)
