"""Every tensor of the merged model is the right one: tied or not, renamed, grown; and where its proof runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from instructft import merge_adapter
from instructft.adapters.adapter_folder import read_adapter
from instructft.errors import UsageError
from instructft.merging import plan as plan_module
from instructft.merging.plan import choose_machine, in_memory, make_plan
from instructft.weights import tensor_io
from tests.helpers.merging import (
    CONFIGS,
    QUIET,
    files_in,
    free_memory,
    is_tied,
    live,
    load_whole,
    logits_of,
    make_adapter,
    make_base,
    plan_of,
    refused,
)
from tests.helpers.mixtures import make_mixture
from tests.helpers.telling import telling


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_new_tokens_are_in_the_merged_model_and_nowhere_else(kind: str, tied: bool, tmp_path: Path) -> None:
    import torch

    base = make_base(tmp_path / "base", kind, "bfloat16", tied=tied, shards="60KB")
    names = ["wte" if kind == "gpt2" else "embed_tokens", *([] if tied else ["lm_head"])]
    tokens = {name: [1490, 1492] for name in names}
    adapter = make_adapter(tmp_path / "adapter", base, rows=1493, trainable_token_indices=tokens)
    merge_adapter(adapter, tmp_path / "out", verify=False, dtype="float32", console=QUIET)
    model, expected = load_whole(tmp_path / "out"), live(adapter, base)
    assert (logits_of(model) - logits_of(expected)).abs().max() < 1e-5
    assert is_tied(model) is tied
    rows = model.get_input_embeddings().weight.data
    before = load_whole(base).get_input_embeddings().weight.data
    assert rows.shape[0] == model.config.vocab_size == logits_of(model).shape[-1] == 1493
    assert torch.equal(rows[:1490], before)
    assert torch.allclose(rows[1491], before.mean(dim=0), atol=1e-6)  # new, and not trained
    assert (rows[1490] - before.mean(dim=0)).abs().max() > 1e-2


def test_names_of_a_checkpoint_without_the_prefix_stay_as_they_are(tmp_path: Path) -> None:
    """GPT-2's first checkpoints hold `h.0…`, not `transformer.h.0…`."""
    from transformers import AutoModelForCausalLM

    whole = make_base(tmp_path / "whole", "gpt2")
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.transformer.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", **CONFIGS["tokens"])
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert "h.0.attn.c_attn.weight" in tensor_io.read_checkpoint(tmp_path / "out")
    merged = load_whole(tmp_path / "out")
    assert (logits_of(merged) - logits_of(live(adapter, tmp_path / "base"))).abs().max() < 1e-5
    assert is_tied(merged)


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(
    ("target", "use_dora"),
    telling(
        [("embed_tokens", False), ("lm_head", False), ("lm_head", True)], ("embed_tokens", False), ("lm_head", True)
    ),
)
def test_weights_that_training_made_differ_are_tied_no_more(target: str, use_dora: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=True)
    options = {"target_modules": ["q_proj", target], "use_dora": use_dora}
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    facts = merge_adapter(adapter, tmp_path / "out", console=QUIET).facts
    model = load_whole(tmp_path / "out")
    assert not is_tied(model)
    assert model.config.tie_word_embeddings is False
    assert (logits_of(model) - logits_of(live(adapter, base))).abs().max() < 1e-5
    assert facts["proof"]["weights"]["tensors"] == 3  # those of two that were one, each on its own
    assert facts["proof"]["source"] == "random token ids"  # neither adapter nor base has a tokenizer


def test_weights_that_loading_puts_together_in_an_unknown_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts one after the other are known; of anything else no tensor of the file has a proved place."""
    base = make_mixture(tmp_path / "base", "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensor_io.read_checkpoint(base)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge_adapter(adapter, tmp_path / "out", verify=False, console=QUIET)
    assert (logits_of(load_whole(tmp_path / "out")) - logits_of(live(adapter, base))).abs().max() < 1e-5
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(adapter)
    make_adapter(adapter, base, target_modules=[], target_parameters=["experts.gate_up_proj"])
    plan = plan_of(adapter, base)
    assert plan.tensors_changed == 2 * 2 * 4  # of two layers w1 and w3 of each expert
    assert [(place.expert, place.start, place.stop) for place in plan.changed[next(iter(plan.changed))]][3:5] == [
        (3, 0, 320),
        (0, 320, 640),
    ]
    monkeypatch.setattr(plan_module, "_experts", lambda *_: ())
    refused(adapter, "put together when the model is loaded", UsageError)


def test_where_a_proof_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    base = make_base(tmp_path / "base", "llama", "bfloat16")
    adapter = read_adapter(make_adapter(tmp_path / "adapter", base))
    planned = make_plan(base, tensor_io.read_checkpoint(base), adapter.folder, adapter.shapes, 1490, None)
    parameters = sum(weight.numel() for weight in planned.model.parameters())
    held = in_memory(planned)
    assert 5 * 4 * 1490 * 32 <= held < 5 * 4 * 1490 * 32 + 1000  # the largest weight
    for room, expected in (
        (parameters * 4 * 1.15, ("float32", True)),
        (parameters * 4 * 1.15 - 1, ("bfloat16", True)),
        (parameters * 2 * 1.15 - 1, None),  # so small that its largest weight does not fit beside
    ):
        free_memory(int(room) + 1 + (1 << 30), monkeypatch)
        if expected is None:
            with pytest.raises(UsageError, match="--no-verify"):
                choose_machine(planned)
            free_memory(held + (1 << 30), monkeypatch)
            monkeypatch.setattr(planned.model, "parameters", lambda: [torch.empty(1 << 40, device="meta")])
            expected = ("bfloat16", False)
        found = choose_machine(planned)
        assert (str(found.dtype).removeprefix("torch."), found.whole) == expected
    wider = make_plan(base, tensor_io.read_checkpoint(base), adapter.folder, adapter.shapes, 1490, torch.float32)
    assert in_memory(wider) == held + parameters * 4  # loading changes every weight


def test_a_model_that_does_not_fit_in_memory_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", base)
    free_memory(1 << 20, monkeypatch)
    with pytest.raises(UsageError, match="--no-verify"):
        merge_adapter(adapter, tmp_path / "out", console=QUIET)
    assert files_in(tmp_path) == {"base", "adapter"}
