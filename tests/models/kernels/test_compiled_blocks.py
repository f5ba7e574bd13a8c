"""Compiled blocks: one graph a kind, none anew over many steps, eager's losses, and nothing but training compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from instructft.models.kernels.compiled_blocks import CompiledBlocks, Run, blocks_of, decide, eager

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip
GROUPED = {**SMALL, "head_dim": 8}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": GPT2,
    "Llama": {"model_type": "llama", **SMALL},
    "Qwen3": {"model_type": "qwen3", **GROUPED},
    "Gemma 3": {"model_type": "gemma3_text", **GROUPED, **SLIDING},  # under sdpa its two kinds differ in the mask alone
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def make(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name])).train()


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=True))


def batches(steps: int, rows: int = 2, width: int = 32) -> list[dict[str, torch.Tensor]]:
    """Packs of one width; documents and supervised tokens vary from step to step."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        ids = torch.randint(1, 96, (rows, width), generator=generator)
        share = 0.4 + 0.4 * torch.rand((), generator=generator)
        labels = torch.where(torch.rand(rows, width, generator=generator) < share, ids, -100)
        border = int(torch.randint(4, width - 4, (), generator=generator))
        positions = torch.cat([torch.arange(border), torch.arange(width - border)]).expand(rows, -1)
        found.append({"input_ids": ids, "labels": labels, "position_ids": positions.contiguous()})
    return found


def trained(
    model: Any, data: list[dict[str, torch.Tensor]], after_first: Callable[[], Any] = lambda: None
) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step, batch in enumerate(data):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not step and after_first:
            after_first()
    return losses


def no_more_graphs() -> None:
    torch._dynamo.config.error_on_recompile = True


@pytest.mark.parametrize(("name", "lora"), [*((name, False) for name in MODELS), ("GPT-2", True), ("Gemma 3", True)])
def test_a_graph_for_each_kind_and_none_anew(name: str, lora: bool) -> None:
    data = batches(20)
    attach = with_lora if lora else lambda model: model
    expected = trained(attach(make(name)), data)
    said: list[str] = []
    torch.manual_seed(0)
    model = attach(make(name))
    compiled = CompiledBlocks(model, backend="aot_eager", say=said.append)
    found = trained(model, data, no_more_graphs)
    assert found == pytest.approx(expected, abs=1e-5)
    # with LoRA the first block's input needs no gradient, and the others' does
    assert compiled.graphs == 1 + lora
    assert [line.partition(" in ")[0] for line in said] == ["3 of 3 blocks compiled"]
    assert compiled.facts()["blocks"] == 3


@pytest.mark.battery  # the others compile by a backend without a C compiler
def test_inductor_gives_the_same_losses() -> None:
    data = batches(3)
    expected = trained(make("GPT-2"), data)
    model = make("GPT-2")
    compiled = CompiledBlocks(model)
    assert trained(model, data, no_more_graphs) == pytest.approx(expected, abs=1e-5)
    assert (compiled.graphs, compiled.facts()["blocks"]) == (1, 3)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, lora: bool) -> None:
    data = batches(4)
    losses = []
    for compile_them in (False, True):
        model = with_lora(make("Qwen3")) if lora else make("Qwen3")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if lora:
            model.enable_input_require_grads()
        said: list[str] = []
        if compile_them:
            compiled = CompiledBlocks(model, backend="aot_eager", say=said.append)
        losses.append(trained(model, data, no_more_graphs))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert compiled.facts()["blocks"] == 3, said


def test_names_and_weights_stay() -> None:
    plain, model = make("Llama"), make("Llama")
    compiled = CompiledBlocks(model, backend="aot_eager")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    trained(model, batches(1))
    compiled.undo()
    graphs = compiled.graphs
    trained(model, batches(1))
    assert compiled.graphs == graphs


def test_nothing_but_training_in_the_first_shape_is_compiled() -> None:
    model = make("GPT-2")
    compiled = CompiledBlocks(model, backend="aot_eager")
    trained(model, batches(1))
    assert compiled.graphs == 1
    trained(model, batches(1, width=24))  # the last batch of an epoch
    trained(model, batches(1, rows=1))
    model.eval()
    with torch.no_grad():
        model(**batches(1)[0])
        model.generate(batches(1)[0]["input_ids"][:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert compiled.graphs == 1


def test_several_shapes_where_rows_have_many() -> None:
    model = make("GPT-2")
    compiled = CompiledBlocks(model, backend="aot_eager", shapes=2)
    trained(model, [batches(1, width=width)[0] for width in (24, 32, 16, 24)])
    assert (compiled.graphs, len(compiled.shapes)) == (2, 2)


def test_a_resumed_run_may_meet_the_last_batch_of_an_epoch_first() -> None:
    model = make("GPT-2")
    compiled = CompiledBlocks(model, backend="aot_eager")
    trained(model, [batches(1, rows=rows)[0] for rows in (1, 3, 2, 3)])
    assert compiled.shapes == {(1, 32, 32), (3, 32, 32)}


def test_eager_holds_in_training_mode_too() -> None:
    model = make("GPT-2")
    compiled = CompiledBlocks(model, backend="aot_eager")
    with eager():
        trained(model, batches(1))
    assert compiled.graphs == 0


def test_what_cannot_be_compiled_runs_eagerly_and_says_so() -> None:
    data = batches(3)
    expected = trained(make("Llama"), data)
    model, said = make("Llama"), list[str]()
    broken = model.model.layers[1].mlp

    def with_a_break(x: torch.Tensor, forward: Any = broken.forward) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    broken.forward = with_a_break
    compiled = CompiledBlocks(model, backend="aot_eager", say=said.append)
    assert trained(model, data) == pytest.approx(expected, abs=1e-5)
    assert compiled.facts()["blocks"] == 2
    assert said[0].startswith("2 of 3 blocks compiled")
    assert "the others run as they are: " in said[0]


def test_a_compiler_that_fails_stops_no_run() -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler here")

    data, said = batches(2), list[str]()
    expected = trained(make("GPT-2"), data)
    model = make("GPT-2")
    CompiledBlocks(model, backend=no_compiler, say=said.append)
    assert trained(model, data) == expected
    assert said == [said[0]]
    assert said[0].startswith("blocks are not compiled; the run goes on without: ")
    assert "no C++ compiler here" in said[0]


def test_a_backward_pass_that_does_not_compile_stops_no_run() -> None:
    from torch._dynamo.backends.common import aot_autograd

    def forward(graph: Any, inputs: Any) -> Any:
        return graph.forward

    def backward(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no kernel for the backward pass")

    data, said = batches(2), list[str]()
    expected = trained(make("GPT-2"), data)
    model = make("GPT-2")
    CompiledBlocks(model, backend=aot_autograd(fw_compiler=forward, bw_compiler=backward), say=said.append)
    assert trained(model, data) == expected
    assert "no kernel for the backward pass" in said[0]


@pytest.mark.battery
def test_graphs_that_come_anew_again_and_again_are_left_at_torchs_limit() -> None:
    """Borders of documents, whose number may grow in a run, are no part of the shape that is looked at."""
    model, said = make("GPT-2"), list[str]()
    compiled = CompiledBlocks(model, backend="aot_eager", shapes=20, say=said.append)
    data = [batches(1, width=width)[0] for width in range(12, 23)]
    expected = trained(make("GPT-2"), data)
    assert trained(model, data) == pytest.approx(expected, abs=1e-5)
    assert compiled.facts()["blocks"] == 0
    assert said[1:] == ["from here on blocks run as they are: too many shapes, torch's limit of graphs is reached"]


def test_as_many_runs_in_one_process_as_one_likes() -> None:
    for width in range(12, 22):
        model = make("GPT-2")
        compiled = CompiledBlocks(model, backend="aot_eager")
        trained(model, batches(1, width=width))
        assert compiled.facts()["blocks"] == 3
        compiled.undo()


def test_an_error_of_the_model_itself_is_raised() -> None:
    model = make("GPT-2")
    CompiledBlocks(model, backend="aot_eager")
    trained(model, batches(1))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.tensor([[96] * 32] * 2))


def test_blocks_are_found_under_an_adapter_and_experts_are_not_blocks() -> None:
    assert [type(block).__name__ for block in blocks_of(with_lora(make("GPT-2")))] == ["GPT2Block"] * 3
    mixture = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **SMALL, num_local_experts=2, num_experts_per_tok=1)
    )
    assert len(blocks_of(mixture)) == 3


RUN = Run(cuda=True, fixed=True, shared=False, quantized=False, fp8=False, operations=1e18)


@pytest.mark.parametrize(
    ("asked", "change", "on", "why"),
    [
        ("auto", {}, True, "about 15 s once, and is to spare 13 min 53 s"),
        ("auto", {"operations": 1e16}, False, "too short to earn"),
        ("auto", {"cuda": False}, False, "no GPU"),
        ("auto", {"fixed": False}, False, "the shape of a batch varies"),
        ("auto", {"quantized": True}, False, "the base is quantized"),
        ("auto", {"shared": True}, False, "share the weights"),
        ("auto", {"fp8": True, "operations": 1.0}, True, "FP8 is fast in compiled blocks alone"),
        ("auto", {"fp8": True, "cuda": False}, False, "no GPU"),
        (True, {"cuda": False, "fixed": False, "operations": 1.0}, True, "train.torch_compile is true"),
        (True, {"shared": True}, False, "share the weights"),
        (False, {}, False, "train.torch_compile is false"),
    ],
)
def test_when_blocks_are_compiled(asked: Any, change: dict[str, Any], on: bool, why: str) -> None:
    found = decide(asked, dataclasses.replace(RUN, **change))
    assert found[0] is on
    assert why in found[1]
