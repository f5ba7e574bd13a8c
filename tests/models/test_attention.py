"""Which attention a run takes, and in which words it says why: by recipe, configuration, machine and precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from instructft import load_recipe
from instructft.errors import UsageError
from instructft.models import attention
from instructft.models.attention import Attention, check_attention, choose_attention, give_up, switch_attention
from instructft.models.kernels import varlen
from tests.conftest import TINY

SHAPE = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
STILL = AutoConfig.for_model(**SHAPE, attn_pdrop=0.0)
OWN = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}  # of GPT-Neo
PACKED = ["data.packing=true"]


def args(device: str = "cuda", bf16: bool = True) -> Any:
    return SimpleNamespace(device=torch.device(device), bf16=bf16, fp16=False)


@pytest.fixture
def chosen(write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The attention of the tiny recipe with these overrides, as on a card whose kernel does what it should."""
    path = write_recipe()
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    monkeypatch.setattr(attention, "_kernel_trouble", lambda *_: "")

    def choose(*overrides: str, config: Any = STILL, given: Any = None) -> Attention:
        return choose_attention(load_recipe(path, list(overrides)), config, given or args())

    return choose


def test_auto_takes_borders_for_packs_on_a_card(chosen: Any) -> None:
    assert chosen(*PACKED) == Attention("varlen", may_change=True)
    assert chosen() == Attention("")  # no packs
    assert chosen(*PACKED, "model.attn_implementation=sdpa") == Attention("sdpa")
    assert chosen(*PACKED, "model.attn_implementation=eager") == Attention("eager")


@pytest.mark.parametrize(
    ("overrides", "config", "given", "torch_version", "words"),
    [
        ([], STILL, args("cpu"), "2.13.0", "it is taken on CUDA"),
        ([], STILL, args(), "2.10.1", "torch 2.10.1 has no such kernel; it comes with 2.11"),
        ([], STILL, args(bf16=False), "2.13.0", "it has no float32; write train.bf16=true"),
        ([], AutoConfig.for_model(**SHAPE), args(), "2.13.0", "dropout of 0.1 (attn_pdrop)"),
        (["train.auto_find_batch_size=true"], STILL, args(), "2.13.0", "packs end to end cannot be halved"),
    ],
)
def test_auto_takes_a_mask_and_says_why(
    chosen: Any, monkeypatch: Any, overrides: list[str], config: Any, given: Any, torch_version: str, words: str
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    found = chosen(*PACKED, *overrides, config=config, given=given)
    assert found.name == ""
    assert not found.may_change
    assert found.why.startswith("not varlen: ")
    assert words in found.why


def test_weights_of_16_bits_without_autocast_will_do(chosen: Any) -> None:
    assert chosen(*PACKED, "model.dtype=bfloat16", given=args(bf16=False)).name == "varlen"


def test_folded_turns_take_a_mask(write_recipe: Any) -> None:
    found = choose_attention(load_recipe(write_recipe(), PACKED), STILL, args(), folds=True)
    assert found == Attention("", "not varlen: it knows borders alone, and folded turns take a mask")


def test_named_on_a_machine_without_it(chosen: Any, monkeypatch: Any) -> None:
    named = [*PACKED, "model.attn_implementation=varlen"]
    assert chosen(*named) == Attention("varlen")
    assert chosen(*named, given=args("cpu", bf16=False)) == Attention("varlen")
    with pytest.raises(UsageError, match=r"attn_implementation: varlen cannot be used here: it has no float32"):
        chosen(*named, given=args(bf16=False))
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    with pytest.raises(UsageError, match=r"torch 2\.9\.0 has no such kernel; it comes with 2\.11; or write .*=auto"):
        chosen(*named)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AutoConfig.for_model(**SHAPE), r"cannot train GPT2LMHeadModel: .* set model\.overrides=\{attn_pdrop: 0\.0\}"),
        (AutoConfig.for_model("gpt_neo", **OWN), "in its own code"),
    ],
)
def test_named_for_a_model_that_it_cannot_train(write_recipe: Any, config: Any, words: str) -> None:
    recipe = load_recipe(write_recipe(), [*PACKED, "model.attn_implementation=varlen"])
    with pytest.raises(UsageError, match=words):
        check_attention(recipe, config)
    check_attention(recipe, STILL)


def test_recipes_that_contradict_themselves(write_recipe: Any) -> None:
    named = "model.attn_implementation=varlen"
    with pytest.raises(UsageError, match=r"varlen attends to packs by their borders, and data\.packing is false"):
        load_recipe(write_recipe(), [named])
    with pytest.raises(UsageError, match="varlen gets packs as one row, which cannot be halved"):
        load_recipe(write_recipe(), [named, *PACKED, "train.auto_find_batch_size=true"])


def test_switching_and_giving_up() -> None:
    model = AutoModelForCausalLM.from_config(STILL)
    found = switch_attention(model, Attention("varlen", may_change=True))
    assert (found.name, found.why, found.may_change) == ("varlen", "", True)
    assert str(found) == "varlen, by the borders of documents, without a mask"
    left = give_up(model, "it leaks")
    assert str(left) == "sdpa (not varlen: it leaks)"
    assert not varlen.takes_borders(model)
    assert switch_attention(model, Attention("")).facts() == {"name": "sdpa"}
    own = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neo", **OWN))
    left = switch_attention(own, Attention("varlen", may_change=True))
    assert left.why == "not varlen: GPTNeoForCausalLM computes attention in its own code"
    assert not left.may_change


def test_the_kernel_is_tried_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    device = torch.device("cpu")  # plain arithmetic in both, here
    assert attention._kernel_trouble(config, torch.bfloat16, device) == ""
    real = varlen.by_document

    def wrong(q: Any, k: Any, v: Any, borders: Any, scale: float, left: int) -> Any:
        return real(q, k, v, borders, scale, left + 1 if q.dtype == torch.bfloat16 else left)

    monkeypatch.setattr(varlen, "by_document", wrong)
    assert "from plain arithmetic on this device" in attention._kernel_trouble(config, torch.bfloat16, device)

    def old(*_: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

    monkeypatch.setattr(varlen, "by_document", old)
    assert "Ampere GPUs or newer" in attention._kernel_trouble(config, torch.bfloat16, device)


PUBLISHED = TINY.replace(
    "config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}", "name_or_path: FOLDER"
)


class TestOverrides:
    """Fields of a published configuration that a recipe sets anew."""

    @pytest.fixture
    def recipe(self, tmp_path: Any, tokenizer: Any, tiny_model: Any, write_recipe: Any) -> Any:
        tiny_model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        path = write_recipe(PUBLISHED.replace("FOLDER", str(tmp_path / "base")))
        return lambda *overrides: load_recipe(path, list(overrides))

    def test_the_model_is_loaded_and_saved_with_them(self, recipe: Any, tokenizer: Any) -> None:
        from instructft import load_model
        from instructft.models.starting_point import starting_point

        asked = recipe("model.overrides={attn_pdrop: 0, resid_pdrop: 0.2}")
        start = starting_point(asked, tokenizer)
        assert start.config.attn_pdrop == 0
        assert varlen.refusal(start.config) == ""
        model = load_model(asked, tokenizer, start=start)
        assert (model.config.attn_pdrop, model.config.resid_pdrop, model.config.embd_pdrop) == (0, 0.2, 0.1)
        assert model.transformer.h[0].attn.attn_dropout.p == 0

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            (
                "{attn_pdrp: 0}",
                r"model\.overrides\.attn_pdrp: gpt2 has no such field .*; did you mean \"attn_pdrop\"\?",
            ),
            ("{vocab_size: 7}", r"model\.overrides\.vocab_size: gpt2 has no such field that could be set anew"),
            ("{attn_pdrop: none}", r"model\.overrides\.attn_pdrop: found 'none', expected a number such as 0\.1"),
        ],
    )
    def test_what_means_nothing_is_refused(self, recipe: Any, tokenizer: Any, override: str, words: str) -> None:
        from instructft.models.starting_point import starting_point

        with pytest.raises(UsageError, match=words):
            starting_point(recipe(f"model.overrides={override}"), tokenizer)

    def test_over_an_adapter_only_dropout(self, recipe: Any, tokenizer: Any) -> None:
        from instructft.models.starting_point import starting_point

        starting_point(recipe("model.overrides={attn_pdrop: 0}", "adapter=lora"), tokenizer)
        with pytest.raises(UsageError, match=r"layer_norm_epsilon: an adapter is loaded over its base's own"):
            starting_point(recipe("model.overrides={layer_norm_epsilon: 0.1}", "adapter=lora"), tokenizer)

    def test_random_weights_have_a_configuration_of_their_own(self, write_recipe: Any) -> None:
        with pytest.raises(UsageError, match=r"write these fields into model\.config"):
            load_recipe(write_recipe(), ["model.overrides={attn_pdrop: 0}"])
