"""Float32 copies in an optimizer: small updates are kept, state goes out and comes back, a refused step is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.optimization import Adafactor

from instructft.errors import CheckpointError
from instructft.recipe.conflicts import WITH_COPIES
from instructft.weights.float32_copies import CAN_SUM, Float32Copies, in_float32

RATE = 1e-4  # of weights near 1, where bfloat16 has steps of 4e-3 and 8e-3


def ones(*shape: int) -> Any:
    return torch.nn.Parameter(torch.ones(*shape, dtype=torch.bfloat16))


def optimizer(weights: list[Any], name: str = "adamw_torch", rate: float = RATE) -> torch.optim.Optimizer:
    if name == "adafactor":
        return Adafactor(weights, lr=rate, scale_parameter=False, relative_step=False)
    kinds: dict[str, Any] = {
        "adamw_torch": torch.optim.AdamW, "adamw_torch_fused": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop,
        "sgd": torch.optim.SGD,
    }  # fmt: skip
    options = {"fused": True} if name == "adamw_torch_fused" else {"momentum": 0.9} if name == "sgd" else {}
    made: torch.optim.Optimizer = kinds[name](weights, lr=rate, **options)
    return made


def step(made: torch.optim.Optimizer, weights: list[Any], times: int = 1) -> None:
    for _ in range(times):
        sum(weight.float().sum() for weight in weights).backward()  # a gradient of 1
        made.step()
        for weight in weights:
            weight.grad = None


@pytest.mark.parametrize("name", WITH_COPIES)
def test_updates_below_the_spacing_move_the_copies_and_over_steps_the_weights(name: str) -> None:
    alone, weight = ones(4, 4), ones(4, 4)
    stalls, moves = optimizer([alone], name), optimizer([weight], name)
    copies = Float32Copies(moves)
    (_, copy) = copies.pairs[0]
    step(stalls, [alone])
    step(moves, [weight])
    assert bool((copy < 1).all())
    assert copy.dtype == torch.float32
    assert bool((weight == 1).all())  # less than half of the spacing
    step(stalls, [alone], 60)
    step(moves, [weight], 60)
    assert bool((alone == 1).all())
    assert bool((weight < 1).all())
    assert torch.equal(weight, copy.bfloat16())


@pytest.mark.parametrize("name", WITH_COPIES)
def test_the_copies_are_what_float32_weights_would_be(name: str) -> None:
    """Bit for bit, with the decay of each group and a schedule."""
    one, two = torch.randn(3, 5).bfloat16(), torch.randn(5).bfloat16()
    found, expected = [[torch.nn.Parameter(value.to(kind)) for value in (one, two)]
                       for kind in (torch.bfloat16, torch.float32)]  # fmt: skip
    made = [
        optimizer([{"params": [a], "weight_decay": 0.1}, {"params": [b]}], name, 1e-2) for a, b in (found, expected)
    ]
    copies = Float32Copies(made[0])
    schedules = [torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.1, 5) for one in made]
    for number in range(5):
        for weights, one, schedule in zip((found, expected), made, schedules, strict=True):
            generator = torch.Generator().manual_seed(number)
            for weight in weights:
                gradient = torch.randn(weight.shape, generator=generator).bfloat16()
                weight.grad = gradient.float() if CAN_SUM or weight.dtype == torch.float32 else gradient
            one.step()
            schedule.step()
    for (weight, copy), other in zip(copies.pairs, expected, strict=True):
        assert torch.equal(copy, other)
        assert torch.equal(weight, other.bfloat16())


@pytest.mark.skipif(not CAN_SUM, reason="gradients are as wide as weights before torch 2.10")
def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    weight, rounded = ones(1), ones(1)
    Float32Copies(optimizer([weight]))
    Float32Copies(optimizer([rounded]), float32_gradients=False)
    for times in (1.0, *[1e-3] * 100):
        (weight.float() * times).sum().backward()
        (rounded.float() * times).sum().backward()
    assert (weight.grad.dtype, rounded.grad.dtype) == (torch.float32, torch.bfloat16)
    assert float(weight.grad) == pytest.approx(1.1, rel=1e-3)
    assert float(rounded.grad) == 1.0


@pytest.mark.parametrize("wide", [True, False])
def test_bfloat16_gradients_do_as_well_where_there_is_one_of_them(wide: bool) -> None:
    weight = ones(3)
    copies = Float32Copies(made := optimizer([weight], rate=1e-2), float32_gradients=wide)
    step(made, [weight], 3)
    assert float(copies.pairs[0][1].detach().max()) == pytest.approx(0.97, abs=1e-3)
    assert copies.pairs[0][1].grad is None


def test_a_step_that_is_left_out_leaves_everything() -> None:
    weight = ones(3)
    copies = Float32Copies(made := optimizer([weight], "adamw_torch_fused", 1e-2))
    step(made, [weight], 2)
    before = [t.detach().clone() for t in (*copies.pairs[0], *made.state[copies.pairs[0][1]].values())]
    made.step()  # no gradient
    weight.grad = torch.full((3,), float("nan"), dtype=torch.float32 if CAN_SUM else torch.bfloat16)
    made.found_inf = torch.ones(())  # type: ignore[attr-defined]  # as `step_checks` has it on a GPU
    made.step()
    after = [*copies.pairs[0], *made.state[copies.pairs[0][1]].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_state_goes_out_and_comes_back(tmp_path: Path) -> None:
    weights = [ones(2, 3), ones(3)]
    copies = Float32Copies(made := optimizer(weights))
    step(made, weights, 5)
    torch.save(made.state_dict(), tmp_path / "optimizer.pt")
    again = [ones(2, 3), ones(3)]
    others = Float32Copies(other := optimizer(again))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    step(made, weights, 50)
    step(other, again, 50)
    for one, two in zip(copies.pairs, others.pairs, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert bool((two[0] < 1).all())
    others.read(tmp_path / "optimizer.pt")
    assert float(others.pairs[0][1].detach().max()) == pytest.approx(1 - 5 * RATE, abs=1e-5)
    assert bool((again[0] == 1).all())


def test_a_state_without_copies_is_refused() -> None:
    weight = ones(2)
    plain = optimizer([ones(2)])
    made = optimizer([weight])
    Float32Copies(made)
    with pytest.raises(CheckpointError, match=r"no float32 copies.*train\.float32_copies"):
        made.load_state_dict(plain.state_dict())


def test_wide_weights_have_no_copy() -> None:
    wide, narrow = torch.nn.Parameter(torch.ones(2)), ones(2)
    copies = Float32Copies(made := optimizer([wide, narrow], rate=1e-2))
    step(made, [wide, narrow])
    assert [weight is narrow for weight, _ in copies.pairs] == [True]
    assert float(wide.detach().max()) == pytest.approx(0.99, abs=1e-3)
    assert copies.facts() == {"weights": 1, "bytes": 8, "gradients": "float32" if CAN_SUM else "bfloat16"}
    assert [w.dtype for w in in_float32([wide, narrow])] == [torch.float32] * 2


def test_what_is_saved_keeps_small_changes_on_average() -> None:
    """Rounded to the nearest, as they compute, the weights would be those that training began from."""
    layer = torch.nn.Linear(200, 200, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    tied = torch.nn.ModuleDict({"one": layer, "two": layer, "still": torch.nn.Linear(2, 2, dtype=torch.bfloat16)})
    copies = Float32Copies(made := optimizer([layer.weight], rate=1e-3))
    step(made, [layer.weight])
    assert bool((layer.weight == 1).all())
    state = copies.rounded_by_chance(tied)
    saved = state["one.weight"]
    assert saved.dtype == torch.bfloat16
    assert set(saved.unique().tolist()) == {1.0, 1 - 2**-8}
    assert float(saved.double().mean()) == pytest.approx(1 - 1e-3, abs=1e-4)
    assert state["two.weight"] is saved
    assert torch.equal(state["still.weight"], tied["still"].weight)
