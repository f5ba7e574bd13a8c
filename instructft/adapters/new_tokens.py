"""Rows that a vocabulary gains: embeddings grow to hold them, and an adapter trains them and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Grow the embeddings to `tokens` rows; each new row is the mean of the old ones. They never shrink."""
    import torch

    old = model.get_input_embeddings().weight.shape[0]
    if tokens <= old:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[old:] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[old:] = layer.bias[:old].float().mean().to(layer.bias.dtype)


def rows_to_train(model: Any, fields: dict[str, Any], new_tokens: Sequence[int]) -> dict[str, list[int]]:
    """Module name -> ids: the input embedding, and the head unless it is the same matrix."""
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UsageError(
            f"data.template: brings new tokens, whose rows in the output head of {type(model).__name__} must be "
            "trained; PEFT drops the bias of a head that it trains rows of. Use a template without tokens of its own, "
            "such as data.template=instruction"
        )
    own = fields.get("trainable_token_indices") or {}
    rows = dict(own) if isinstance(own, dict) else {names[id(embedding)]: list(own)}
    whole = fields.get("modules_to_save") or ()
    for module in (embedding,) if tied(model) else (embedding, head):
        name = names[id(module)]
        if any(name == saved or name.endswith(f".{saved}") for saved in whole):
            continue  # trained as a whole
        given = next((key for key in rows if name == key or name.endswith(f".{key}")), name)
        rows[given] = sorted({*rows.get(given, ()), *new_tokens})
    return rows


def token_rows(module: Any) -> Any:
    """PEFT's layer that holds a module's trained token rows, or None.

    Its `token_indices["default"]` are n ids and `trainable_tokens_delta["default"]` the (n, D) rows in their place.
    """
    layer = getattr(module, "_modules", {}).get("token_adapter")
    return layer if layer is not None and layer.active_adapters and not layer.disable_adapters else None


def tied(model: Any) -> bool:
    """Whether input embedding and output head are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
