"""A right merge is proved, and a wrong one is not kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructft import merge_adapter
from instructft.errors import ModelError
from instructft.merging import arithmetic, merge, proof
from instructft.merging.plan import Machine
from instructft.merging.proof import better_rounding, costly
from tests.helpers.merging import (
    CONFIGS,
    QUIET,
    files_in,
    make_adapter,
    make_base,
    with_tokenizer,
)
from tests.helpers.telling import telling


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "float32"), ("llama", "bfloat16"), ("llama", "float16")])
def test_a_right_merge_is_proved(kind: str, dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    base = make_base(tmp_path / "base", kind, dtype, tied=kind == "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, use_dora=kind == "llama"), tokenizer)
    facts = merge_adapter(adapter, tmp_path / "out", console=QUIET).facts
    found = facts["proof"]
    assert facts["dtype"] == dtype
    assert found["exact"] <= found["tolerance"] < found["effect"] / 5
    assert found["kl"] < found["effect_kl"] / 5
    assert found["weights"]["tensors"] == (8 if kind == "gpt2" else 14)
    assert found["weights"]["deviation"] < 1e-12
    assert found["weights"]["applied"] == pytest.approx(1, abs=0.02)
    assert found["tokens"] == 3 * 4
    if dtype == "float32":
        assert found["difference"] < 1e-5
        assert found["equal_tokens"] == found["tokens"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["merge"] == json.loads(json.dumps(facts))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{found['difference']:.2e}" in card
    assert f"{found['equal_tokens']} of {found['tokens']}" in card


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "the delta is forgotten": lambda weight, right: weight.source.read().float(),
    "the scale is twice too large": lambda weight, right: 2 * right - weight.source.read().float(),
    "the delta has the wrong sign": lambda weight, right: 2 * weight.source.read().float() - right,
    "a thousandth of the delta is missing": lambda weight, right: right - (right - weight.source.read().float()) / 1000,
}


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("by", "whole"), [("weights", True), ("weights", False), ("logits", True)])
def test_a_wrong_merge_is_refused(
    wrong: str, by: str, whole: bool, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    read = arithmetic._Weight.read

    def miscalculated(self: Any, start: int, stop: int) -> Any:
        return WRONG[wrong](self, read(self, 0, self.rows))[start:stop]

    monkeypatch.setattr(arithmetic._Weight, "read", miscalculated)
    if not whole:
        machine = Machine("cpu", torch.bfloat16, whole=False)
        monkeypatch.setattr(merge, "choose_machine", lambda *_: machine)
    if by == "logits":
        monkeypatch.setattr(proof, "compare_weights", lambda *_: {})
    with pytest.raises(ModelError, match="not merged as PEFT" if by == "weights" else "is not the adapted one"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    assert files_in(tmp_path) == {"base", "adapter"}


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    telling(
        [
            ("gpt2", "float32", "lora"),
            ("gpt2", "float32", "tokens"),
            ("llama", "bfloat16", "dora"),
            ("llama", "float16", "saved"),
        ],
        ("gpt2", "float32", "lora"),
        ("llama", "bfloat16", "dora"),
    ),
)
def test_a_model_larger_than_the_memory_is_proved_alike(
    kind: str, dtype: str, options: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures, or nearly so where rounding is drawn anew, from files that are mapped."""
    import torch

    base = make_base(tmp_path / "base", kind, dtype, tied=kind == "gpt2")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base, **CONFIGS[options]), tokenizer)
    found = []
    for is_whole in (True, False):
        machine = Machine("cpu", getattr(torch, dtype), is_whole)
        monkeypatch.setattr(merge, "choose_machine", lambda *_, machine=machine: machine)
        found.append(merge_adapter(adapter, tmp_path / str(is_whole), console=QUIET).facts["proof"])
    whole, mapped = found
    assert mapped["compared"] == "most likely next tokens"
    assert mapped["tokens"] > whole["tokens"]
    assert mapped["weights"] == whole["weights"]
    for figure in ("scale", "effect", "effect_kl"):
        assert mapped[figure] == pytest.approx(whole[figure], rel=0.5), figure
    assert mapped["kl"] < mapped["effect_kl"] / 5
    if dtype == "float32":
        assert mapped["exact"] == mapped["difference"] <= mapped["tolerance"] < mapped["effect"] / 5


@pytest.mark.usefixtures("short_answers")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_larger_than_the_memory_stays_in_its_files(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a model is looked at, its weights are the files' own pages, which the system can let go."""
    import torch

    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False, shards="100KB")
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    looks, held, look_once = [], [], proof.look_once

    def spy(model: Any, *arguments: Any, **more: Any) -> Any:
        mapped = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        places = [[int(end, 16) for end in m[0].split("-")] for m in mapped if m[-1].endswith(".safetensors")]
        weights = [p for name, p in model.named_parameters() if "lora" not in name]
        looks.append([any(start <= p.data_ptr() < end for start, end in places) for p in weights])
        held.append([p.detach().clone() for p in weights])
        return look_once(model, *arguments, **more)

    machine = Machine("cpu", torch.bfloat16, whole=False)
    monkeypatch.setattr(merge, "choose_machine", lambda *_: machine)
    monkeypatch.setattr(proof, "look_once", spy)
    merge_adapter(adapter, tmp_path / "out", console=QUIET)
    assert len(looks) == 3  # the adapter, its base, merged
    assert all(len(weights) > 20 and all(weights) for weights in looks)
    # a page that is written to is the process's own: after PEFT merged each layer no bit may be another
    assert all(torch.equal(before, after) for before, after in zip(held[0], held[1], strict=True))


def costs(**kl: float) -> dict[str, Any]:
    rows = [{"dtype": "bfloat16", "rounding": name, "kl": value} for name, value in kl.items() if name != "float16"]
    rows.append({"dtype": "float16", "rounding": "nearest", "kl": kl.get("float16")})
    return {"costs": rows, "kl": kl["stochastic"], "effect_kl": 0.1}


def test_the_rounding_that_loses_least_is_taken_and_a_draw_changes_nothing() -> None:
    assert better_rounding(costs(nearest=8e-3, stochastic=2e-4), "bfloat16", "stochastic") == "stochastic"
    assert better_rounding(costs(nearest=1e-4, stochastic=2e-4), "bfloat16", "stochastic") == "nearest"
    assert better_rounding(costs(nearest=1.95e-4, stochastic=2e-4), "bfloat16", "stochastic") == "stochastic"
    assert better_rounding({"costs": []}, "bfloat16", "stochastic") == "stochastic"


def test_a_dtype_that_costs_more_than_a_hundredth_of_the_effect_names_those_that_do_not() -> None:
    assert costly(costs(nearest=8e-3, stochastic=9e-4, float16=1e-6)) == []
    assert costly(costs(nearest=8e-3, stochastic=2e-3, float16=1e-6)) == ["float16"]
    assert costly(costs(nearest=8e-3, stochastic=2e-3)) == []  # float16 does not hold the values


@pytest.mark.usefixtures("short_answers")
def test_weights_are_written_again_where_the_other_rounding_loses_less(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "llama", "bfloat16", tied=False)
    adapter = with_tokenizer(make_adapter(tmp_path / "adapter", base), tokenizer)
    monkeypatch.setattr(merge, "better_rounding", lambda *_: "nearest")
    facts = merge_adapter(adapter, tmp_path / "again", console=QUIET).facts
    assert facts["rounding"] == "nearest"
    bytes_of = {}
    for name in ("nearest", "stochastic"):
        merge_adapter(adapter, tmp_path / name, rounding=name, verify=False, console=QUIET)
        bytes_of[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == bytes_of["nearest"] != bytes_of["stochastic"]
