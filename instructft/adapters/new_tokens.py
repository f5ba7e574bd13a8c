"""Rows that a vocabulary gains: embeddings grow to hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
