"""Rounding by chance keeps a small change on average, where rounding to the nearest loses it."""

from __future__ import annotations

import pytest
import torch

from instructft.weights.rounding import Rounder, unit_in_last_place


def some(count: int = 200_000) -> torch.Tensor:
    """Weights that bfloat16 holds, each with a change of a twentieth of its last place."""
    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    return weights + 0.05 * unit_in_last_place(weights, torch.bfloat16)


def test_the_mean_stays_by_chance_alone() -> None:
    values = some()
    unit = unit_in_last_place(values, torch.bfloat16)
    off = {r: float(((Rounder("w", torch.bfloat16, r)(values).float() - values) / unit).mean()) for r in ROUNDINGS}
    assert off["nearest"] == pytest.approx(-0.05, abs=1e-3)  # all of the change is gone
    assert abs(off["stochastic"]) < 2e-3  # four times what 200,000 draws leave to chance


ROUNDINGS = ("nearest", "stochastic")


def test_a_value_goes_to_one_of_its_neighbours_and_stays_where_there_is_nothing_to_round() -> None:
    values = torch.cat([some(), -some(), torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    rounded = Rounder("w", torch.bfloat16, "stochastic")(values).float()
    assert ((rounded - values).abs() <= 1.001 * unit_in_last_place(values, torch.bfloat16)).all()
    exact = values.bfloat16().float()
    assert torch.equal(Rounder("w", torch.bfloat16, "stochastic")(exact).float(), exact)


def test_the_name_is_the_seed() -> None:
    values = some(1000)
    first, again, other = (Rounder(name, torch.bfloat16, "stochastic")(values) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_wider_dtypes_go_to_the_nearest(dtype: torch.dtype) -> None:
    values = some(1000).double() / 3
    assert torch.equal(Rounder("w", dtype, "stochastic")(values), values.to(dtype))
