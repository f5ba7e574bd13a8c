"""What a batch is before processes divide it: no target is lost at a border, and no padding counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instructft.data.batches.divided import multiple_of, ready_to_divide
from instructft.data.collator import CompletionOnlyCollator
from instructft.errors import DataError

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 1], "labels": [-100, -100, 7, 8, 9, 1]},
    {"input_ids": [3, 4, 1], "labels": [-100, 4, 1]},
]

NAMES = ("position_ids", "shift_labels")


def batch(size: int = 2, pad: int = 0, multiple: int | None = None) -> dict[str, torch.Tensor]:
    return CompletionOnlyCollator(pad, multiple_of(size, multiple))(ROWS)


def test_targets_are_known_before_the_tokens_part() -> None:
    found = {name: values.tolist() for name, values in ready_to_divide(batch(), 2).items()}
    assert found == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 0, 0], [3, 4, 1, 0, 0, 0, 0, 0]],
        "labels": [[-100, -100, 7, 8, 9, 1, -100, -100], [-100, 4, 1, -100, -100, -100, -100, -100]],
        "shift_labels": [[-100, 7, 8, 9, 1, -100, -100, -100], [4, 1, -100, -100, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 6, 7]] * 2,
        "attention_mask": [[1] * 8] * 2,
    }


def test_the_batch_itself_stays_whole() -> None:
    """torch shortens what it divides in place; the step's rows may still have to be named."""
    whole = batch()
    before = {name: values.clone() for name, values in whole.items()}
    for values in ready_to_divide(whole, 2).values():
        values.resize_(2, 4).fill_(3)
    assert all(torch.equal(values, before[name]) for name, values in whole.items())


@pytest.mark.parametrize("size", [2, 3])
def test_no_target_is_lost_or_taken_twice_between_processes(size: int) -> None:
    """Each slot of torch's own order stands on one process with its own target, its position, and what it is."""
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _create_default_load_balancer

    ready = ready_to_divide(batch(size), size)
    width = ready["input_ids"].shape[1]
    balancer = _create_default_load_balancer(width, size, torch.device("cpu"))
    assert balancer is not None
    order = balancer._generate_indices()[0]
    parts = [{name: values[:, mine] for name, values in ready.items()} for mine in order.chunk(size)]
    if size == 2:
        assert [part["position_ids"][0].tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    told = []
    for part in parts:
        supervised = part["shift_labels"] != -100
        rows, positions, targets = (
            values[supervised] for values in (torch.arange(2)[:, None].expand_as(supervised), *map(part.get, NAMES))
        )
        told += torch.stack([rows, positions, targets], dim=1).tolist()
    wanted = [
        [i, at - 1, label]
        for i, one in enumerate(ROWS)
        for at, label in enumerate(one["labels"])
        if at and label != -100
    ]
    assert sorted(told) == sorted(wanted)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, initializer_range=0.5, **small)).eval()


def log_probs(model: Any, ready: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the targets, row by row."""
    out = model(**{name: ready[name] for name in ("input_ids", "attention_mask", "position_ids")}).logits
    targets = ready["shift_labels"]
    found: torch.Tensor = out.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return found[targets != -100]


@torch.no_grad()
def test_padding_changes_nothing_though_it_is_not_masked() -> None:
    model = llama()
    narrow, wide = ready_to_divide(batch(), 2), ready_to_divide(batch(pad=11, multiple=32), 2)
    assert (narrow["input_ids"].shape[1], wide["input_ids"].shape[1]) == (8, 32)
    masked = {**narrow, "attention_mask": batch()["attention_mask"]}
    torch.testing.assert_close(log_probs(model, narrow), log_probs(model, masked), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs(model, narrow), log_probs(model, wide), atol=1e-5, rtol=0)


def test_a_mask_of_ones_keeps_transformers_from_taking_pieces_for_documents() -> None:
    """Slots 0 1 6 7 of a row are no two documents of two tokens; without a mask transformers (5.23) takes them so."""
    from transformers.masking_utils import create_causal_mask

    model, piece = llama(), [0, 1, 6, 7]
    part = {name: values[:, piece] for name, values in ready_to_divide(batch(), 2).items()}
    about = {"config": model.config, "inputs_embeds": torch.zeros(2, 4, 16), "past_key_values": None}
    assert create_causal_mask(**about, attention_mask=part["attention_mask"], position_ids=part["position_ids"]) is None
    assert create_causal_mask(**about, attention_mask=None, position_ids=part["position_ids"]) is not None


def test_what_cannot_be_divided_is_refused() -> None:
    whole = batch()
    left = {**whole, "attention_mask": whole["attention_mask"].flip(1)}
    packs = {name: values for name, values in whole.items() if name != "attention_mask"}
    trees = {**whole, "attention_mask": torch.ones(2, 1, 8, 8)}
    for wrong, size, said in (
        (whole, 3, "8 tokens wide, expected a multiple of 6 where 3 processes"),
        (left, 2, "padded on the right, .* found another one"),
        (packs, 2, "found none, as of packs"),
        (trees, 2, "found another one"),
    ):
        with pytest.raises(DataError, match=said):
            ready_to_divide(wrong, size)
