"""Attention that keeps documents apart by their borders, as kernels for packs do, and runs that train with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from instructft.training.rehearsal import isolation
from instructft.training.trainer import Trainer

NAME = "borders"


def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, cu_seq_lens_q: Any = None, **kwargs: Any) -> Any:
    """Each document alone. query, key, value: (1, H, T, D) -> (1, T, H, D)."""
    ends = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.unique().tolist()[1:]
    parts, start = [], 0
    for end in ends:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        start = end
    return torch.cat(parts, dim=2).transpose(1, 2), None


def flat(patch: pytest.MonkeyPatch) -> None:
    """Let runs train packs end to end."""
    AttentionInterface.register(NAME, attend)
    made = Trainer.__init__

    def flattening(self: Any, **kwargs: Any) -> None:
        kwargs["model"].set_attn_implementation(NAME)
        kwargs["data_collator"].flatten = True
        made(self, **kwargs)

    patch.setattr(Trainer, "__init__", flattening)
    # its packs have no borders
    patch.setattr(isolation, "prove_isolation", lambda trainer, attention, *_: attention)
