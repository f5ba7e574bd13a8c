"""Each kind of adapter is merged, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from instructft import merge_adapter
from instructft.errors import UsageError
from tests.helpers.merging import (
    CONFIGS,
    QUIET,
    is_tied,
    live,
    load_whole,
    logits_of,
    make_adapter,
    make_base,
    refused,
)
from tests.helpers.mixtures import MIXTURES, make_mixture


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", CONFIGS)
def test_a_merge_equals_the_live_adapter(kind: str, options: str, tmp_path: Path) -> None:
    tied = kind == "gpt2"
    base = make_base(tmp_path / "base", kind, tied=tied, shards="60KB")
    adapter = make_adapter(tmp_path / "adapter", base, **CONFIGS[options])
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    model = load_whole(tmp_path / "out")
    expected = logits_of(live(adapter, base))
    assert (logits_of(model) - expected).abs().max() < 1e-5
    assert (logits_of(load_whole(base)) - expected).abs().max() > 1e-2
    assert is_tied(model) is tied


@pytest.mark.parametrize("use_dora", [True, False])
def test_adapted_embeddings_of_an_untied_model(use_dora: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=False)
    options = {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3, "use_dora": use_dora}
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5


def test_lora_bias_goes_into_the_bias(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn", "c_fc"], lora_bias=True)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("ensure_weight_tying", True),
        ("a_later_option_of_peft", {"on": True}),
    ],
)
def test_options_without_a_proved_merge_are_refused_by_name(pair: tuple[Path, Path], key: str, value: Any) -> None:
    _, adapter = pair
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    refused(adapter, key, UsageError)


@pytest.mark.parametrize("kind", MIXTURES)
def test_each_expert_is_merged_with_its_own_pair(kind: str, tmp_path: Path) -> None:
    """Whether a checkpoint holds experts alone (Mixtral, Qwen3, DeepSeek) or as one tensor (gpt-oss, transposed)."""
    base = make_mixture(tmp_path / "base", kind)
    options = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    ours, theirs = logits_of(load_whole(tmp_path / "out")), logits_of(live(adapter, base))
    assert (ours - theirs).abs().max() < 1e-5
    assert (theirs - logits_of(load_whole(base))).abs().max() > 1e-3
