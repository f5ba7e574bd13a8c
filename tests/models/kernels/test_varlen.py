"""Attention by borders against sdpa's packs: logits and gradients of twelve architectures, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instructft.errors import ModelError
from instructft.models.kernels import varlen

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 96}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "attn_pdrop": 0.0}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
OPT = {"model_type": "opt", "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 96, "num_attention_heads": 4,
       "vocab_size": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "attention_dropout": 0.0}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT-2": GPT2,
    "GPT-2, layers scaled": {**GPT2, "scale_attn_by_inverse_layer_idx": True},
    "Llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "Qwen2": {"model_type": "qwen2", **SMALL, "num_key_value_heads": 2},
    "Qwen3": {"model_type": "qwen3", **GROUPED},
    "GPT-NeoX": {"model_type": "gpt_neox", **SMALL},
    "Mistral, window 8": {"model_type": "mistral", **GROUPED, "sliding_window": 8},
    "Gemma 3, window 8 and full": {"model_type": "gemma3_text", **GROUPED, "sliding_window": 8,
                                   "layer_types": ["sliding_attention", "full_attention"]},
    "Phi-3": {"model_type": "phi3", **SMALL, "num_key_value_heads": 2, "pad_token_id": 0},
    "OLMo 2": {"model_type": "olmo2", **SMALL, "num_key_value_heads": 2},
    "SmolLM3": {"model_type": "smollm3", **SMALL, "num_key_value_heads": 2, "pad_token_id": 0},
    "Granite": {"model_type": "granite", **SMALL, "num_key_value_heads": 2},
}  # fmt: skip
LENGTHS = [[11, 20, 9], [30, 8], [5, 5, 5, 25]]  # of 40 tokens each; the second pack has 2 of padding
WIDTH = 40


def model_of(shape: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def packs() -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
    """The same packs as (B, L) by positions, and flat by borders with empty documents at the end; their labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 96, (3, WIDTH), generator=generator)
    labels = torch.where(torch.rand(3, WIDTH, generator=generator) < 0.6, ids, -100)
    every = [n for pack in LENGTHS for n in [*pack, *([WIDTH - sum(pack)] if sum(pack) < WIDTH else [])]]
    borders = torch.tensor([0, *every]).cumsum(0)
    labels.view(-1)[borders[:-1]] = -100
    positions = torch.cat([torch.arange(n) for n in every]).view(3, WIDTH)
    filled = torch.nn.functional.pad(borders, (0, 17 - len(borders)), value=3 * WIDTH).to(torch.int32)
    flat = {"input_ids": ids.view(1, -1), "position_ids": positions.view(1, -1), "cu_seq_lens_q": filled,
            "attention_mask": torch.ones(1, 3 * WIDTH, dtype=torch.long),
            "cu_seq_lens_k": filled, "max_length_q": WIDTH, "max_length_k": WIDTH}  # fmt: skip
    return {"input_ids": ids, "position_ids": positions}, flat, labels


def step(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits.float().reshape(3, WIDTH, -1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1), reduction="sum")
    (loss / 50).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def documents() -> list[tuple[int, slice]]:
    return [
        (row, slice(sum(pack[:i]), sum(pack[: i + 1]))) for row, pack in enumerate(LENGTHS) for i in range(len(pack))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_masked_packs_and_of_documents_alone(family: str) -> None:
    model = model_of(FAMILIES[family])
    masked, flat, labels = packs()
    wanted, grads = step(model, masked, labels)
    assert varlen.switch_on(model)
    found, found_grads = step(model, flat, labels)
    largest = float(wanted.abs().max())
    assert found_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert float((found_grads[name] - grad).norm()) <= 1e-5 * max(float(grad.norm()), 1e-3), name
    with varlen.plain(model), torch.no_grad():
        assert model.config._attn_implementation == "sdpa"
        for row, place in documents():
            alone = model(masked["input_ids"][row : row + 1, place], use_cache=False).logits[0]
            assert float((found[row, place] - wanted[row, place]).abs().max()) <= 1e-5 * largest
            assert float((found[row, place] - alone).abs().max()) <= 1e-5 * largest
    assert model.config._attn_implementation == varlen.NAME


def test_a_model_whose_masked_packs_leak_keeps_documents_apart_by_borders() -> None:
    model = model_of(OPT)
    masked, flat, labels = packs()
    wanted, _ = step(model, masked, labels)
    varlen.switch_on(model)
    found, _ = step(model, flat, labels)
    with varlen.plain(model), torch.no_grad():
        alone = torch.cat([model(masked["input_ids"][row : row + 1, place]).logits[0] for row, place in documents()])
    apart = torch.cat([found[row, place] for row, place in documents()])
    leaked = torch.cat([wanted[row, place] for row, place in documents()])
    assert float((apart - alone).abs().max()) <= 1e-5
    assert float((leaked - alone).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_what_comes_in_float32_is_lowered(dtype: torch.dtype) -> None:
    model = model_of(FAMILIES["Qwen3"])  # norms of queries and keys
    masked, flat, labels = packs()
    wanted, grads = step(model, masked, labels)
    varlen.switch_on(model)
    seen = set()
    real = varlen.by_document

    def watch(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        seen.update({q.dtype, k.dtype, v.dtype})
        return real(q, k, v, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype):
        patch.setattr(varlen, "by_document", watch)
        found, found_grads = step(model, flat, labels)
    assert seen == {dtype}
    x = torch.randn(1, 4, 6, 8)  # values too, where a model puts a norm on them
    with torch.autocast("cpu", dtype):
        out, _ = varlen.attend(torch.nn.Module(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 6]), max_length_q=6)
    assert out.dtype == dtype
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    for name, grad in grads.items():
        assert float((found_grads[name] - grad).norm()) < 0.1 * float(grad.norm()), name


def test_answers_run_without_borders(tiny_model: Any) -> None:
    prompts, mask = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    asked = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted = tiny_model.generate(prompts, **asked)
    varlen.switch_on(tiny_model)
    with pytest.raises(ModelError, match="got no borders of documents"):
        tiny_model.generate(prompts, **asked)
    with varlen.plain(tiny_model):
        assert torch.equal(tiny_model.generate(prompts, **asked), wanted)
    assert tiny_model.config._attn_implementation == varlen.NAME


def test_what_answers_in_the_middle_of_training_has_no_borders(tiny_model: Any, tokenizer: Any) -> None:
    from instructft.inference.generator import Generator

    conversation = [[{"role": "user", "content": "Name a colour."}], [{"role": "user", "content": "Hello"}]]
    generator = Generator(tiny_model, tokenizer)
    wanted = generator.answers(conversation, 4)
    varlen.switch_on(tiny_model)
    assert generator.answers(conversation, 4) == wanted
    assert "".join(generator.stream(conversation[0], 4)) == wanted[0].text
    assert tiny_model.config._attn_implementation == varlen.NAME


def test_the_name_is_never_saved(tiny_model: Any, tmp_path: Any) -> None:
    varlen.switch_on(tiny_model)
    tiny_model.save_pretrained(tmp_path)
    assert varlen.NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_below_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of(FAMILIES["Llama"]), LoraConfig(r=2, target_modules="all-linear"))
    assert varlen.switch_on(model)
    assert varlen.takes_borders(model)
    with varlen.plain(model):
        assert not varlen.takes_borders(model)
    assert model.get_base_model().config._attn_implementation == varlen.NAME


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({**GPT2, "attn_pdrop": 0.1}, r"dropout of 0\.1 \(attn_pdrop\).* model\.overrides=\{attn_pdrop: 0\.0\}"),
        ({"model_type": "llama", **SMALL, "attention_dropout": 0.2}, r"\(attention_dropout\)"),
        ({"model_type": "gemma2", **GROUPED}, "capped at 50"),
        ({"model_type": "gpt_oss", **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
        ({"model_type": "llama", **SMALL, "head_dim": 320}, "320 wide"),
        ({"model_type": "llama", **SMALL, "head_dim": 12}, "12 wide"),
        ({"model_type": "bloom", "hidden_size": 64, "n_layer": 1, "n_head": 2}, "ALiBi"),
        ({"model_type": "falcon", **SMALL, "alibi": True}, "ALiBi"),
        ({"model_type": "deepseek_v3"}, "values are 128 wide"),
        ({"model_type": "llama4_text", **GROUPED}, "chunks of 8,192"),
    ],
)  # fmt: skip
def test_what_the_kernel_lacks_is_refused_from_the_configuration(shape: dict[str, Any], words: str) -> None:
    import re

    from transformers import AutoConfig

    assert re.search(words, varlen.refusal(AutoConfig.for_model(**shape)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_can_do_is_not_refused(family: str) -> None:
    from transformers import AutoConfig

    assert varlen.refusal(AutoConfig.for_model(**FAMILIES[family])) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dropout": 0.1}, "dropout in attention"),
        ({"softcap": 50.0}, "soft-capped"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "biases by position"),
        ({"is_causal": False}, "later tokens"),
        ({"cu_seq_lens_q": None}, "no borders"),
        ({"max_length_q": None}, "no borders"),
    ],
)
def test_what_no_configuration_told_is_refused_in_the_call(given: dict[str, Any], words: str) -> None:
    x = torch.zeros(1, 4, 6, 8)
    borders = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ModelError, match=words):
        varlen.attend(torch.nn.Module(), x, x, x, None, **{"cu_seq_lens_q": borders, "max_length_q": 6, **given})


def test_borders_that_leave_tokens_without_a_document_are_refused() -> None:
    x = torch.zeros(1, 4, 6, 8)
    with pytest.raises(ModelError, match="end at 5 of 6 tokens"):
        varlen.attend(torch.nn.Module(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 5]), max_length_q=6)


@pytest.mark.parametrize("family", ["GPT-2", "Qwen3"])
def test_a_compiler_sees_one_graph(family: str) -> None:
    model = model_of(FAMILIES[family])
    varlen.switch_on(model)
    _, flat, labels = packs()
    wanted, grads = step(model, flat, labels)
    torch._dynamo.reset()
    for block in model.base_model.h if family == "GPT-2" else model.base_model.layers:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    found, found_grads = step(model, flat, labels)
    torch.testing.assert_close(found, wanted)
    for name, grad in grads.items():
        torch.testing.assert_close(found_grads[name], grad, msg=name)


def test_the_kernel_of_torch_is_called_as_every_release_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def kernel(q: Any, k: Any, v: Any, one: Any, other: Any, most: int, longest: int, **how: Any) -> Any:
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert one is other
        assert most == longest == 6
        calls.append(how)
        return torch.empty_like(q)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    q, k, v = (torch.empty(8, 6, heads).permute(1, 2, 0) for heads in (4, 2, 2))
    for groups in (False, True):
        monkeypatch.setattr(varlen, "_ASKS_FOR_GROUPS", groups)
        assert varlen.by_kernel(q, k, v, torch.tensor([0, 6]), 6, 0.5, 3).shape == (6, 4, 8)
    same = {"scale": 0.5, "window_size": (3, 0)}
    assert calls == [same, {**same, "enable_gqa": True}]


def test_the_kernel_of_this_torch_takes_these_arguments() -> None:
    import inspect

    takes = inspect.signature(varlen.varlen_attn).parameters
    assert list(takes)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= takes.keys()


def test_an_architecture_with_attention_of_its_own_is_left_as_it_is() -> None:
    shape = {
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["global"], 1]],
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    before = model.config._attn_implementation
    assert not varlen.switch_on(model)
    assert model.config._attn_implementation == before
