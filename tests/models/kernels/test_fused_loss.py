"""The CPU head against TRL's own: the same log-probabilities, entropy, accuracy and gradients."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from instructft.models.kernels import fused_loss
from instructft.models.kernels.fused_loss import add_plain_head, add_supervised_head

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 211, "n_positions": 32},
    "llama": {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 211,
    },
    "phi, whose head has a bias": {
        "model_type": "phi", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32,
        "num_attention_heads": 2, "vocab_size": 211,
    },
}  # fmt: skip
OUTPUTS = ("log_probs", "entropy", "is_top1")


class Products(TorchDispatchMode):
    """The sizes (n, k, m) of all products of matrices, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            one, other = args[-2:]
            self.shapes.append((*one.shape, other.shape[1]))
        return func(*args, **(kwargs or {}))


def models(shape: str) -> tuple[Any, Any]:
    """The same random model twice: with TRL's head, and with ours over it."""
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape])).eval()
    if getattr(ours.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(ours.get_output_embeddings().bias)
    theirs = copy.deepcopy(ours)
    add_fused_lm_head(ours, outputs=OUTPUTS)
    add_fused_lm_head(theirs, outputs=OUTPUTS)
    assert add_supervised_head(ours)
    return ours, theirs


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(0, 211, (3, 20))
    labels = input_ids.clone()
    labels[:, :6] = -100
    labels[1, 12:] = -100
    mask = torch.ones_like(input_ids)
    mask[1, 12:] = 0
    return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("block_bytes", [24 << 20, 4 * 211 * 5])  # all at once, and in blocks that do not divide evenly
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_trl(shape: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "_BLOCK_BYTES", block_bytes)
    ours, theirs = models(shape)
    calls = []
    monkeypatch.setattr(
        fused_loss._SupervisedLogProbs, "backward", _counted(fused_loss._SupervisedLogProbs.backward, calls)
    )
    out, ref = (model(**batch(), fused_lm_head=True) for model in (ours, theirs))
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(getattr(out, name).float(), getattr(ref, name).float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out.loss, ref.loss)
    for result in (out, ref):
        (-result.log_probs.sum() / 7).backward()
    assert calls == [1]  # ours really ran
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def _counted(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return staticmethod(counted)


def test_tokens_of_unequal_weight() -> None:
    """loss_type: dft weighs each token by its own probability."""
    ours, theirs = models("gpt2")
    for model in (ours, theirs):
        log_probs = model(**batch(), fused_lm_head=True).log_probs
        (-(log_probs * log_probs.exp().detach()).sum()).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_without_gradient_and_without_labels() -> None:
    ours, theirs = models("gpt2")
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**inputs, fused_lm_head=True).log_probs, theirs(**inputs, fused_lm_head=True).log_probs
        )
        plain = {k: v for k, v in inputs.items() if k != "labels"}
        torch.testing.assert_close(ours(**plain).logits, theirs(**plain).logits)


def test_an_evaluation_makes_no_gradient() -> None:
    ours, _ = models("gpt2")
    head, width = ours.get_output_embeddings(), SHAPES["gpt2"]["n_embd"]
    with torch.no_grad(), Products() as counter:
        out = ours(**batch(), fused_lm_head=True)
    products = [shape for shape in counter.shapes if head.out_features in shape]
    assert products == [(int(out.label_mask.sum()), width, head.out_features)]


def test_a_batch_without_loss_gives_a_zero_that_can_be_differentiated() -> None:
    ours, _ = models("gpt2")
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out = ours(**inputs, fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0


@pytest.mark.parametrize("change", [{"logit_scale": 0.5}, {"final_logit_softcapping": 30.0}])
def test_architectures_that_change_their_logits_keep_trls_head(change: dict[str, float]) -> None:
    config = AutoConfig.for_model(**SHAPES["llama"], **change)
    model = AutoModelForCausalLM.from_config(config)
    assert not add_supervised_head(model)


def test_a_frozen_head_is_left_alone_and_the_body_is_trained() -> None:
    """As below an adapter, where the head's gradient would cost as much as its scores."""
    ours, theirs = models("llama")
    for model in (ours, theirs):
        model.get_output_embeddings().weight.requires_grad_(False)
        model(**batch(), fused_lm_head=True).loss.backward()
        assert model.get_output_embeddings().weight.grad is None
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_micro_batches_add_up_to_the_gradient_of_the_whole() -> None:
    whole, parts = models("gpt2")[0], models("gpt2")[0]
    inputs = batch()
    count = (inputs["labels"][:, 1:] != -100).sum()
    (-whole(**inputs, fused_lm_head=True).log_probs.sum() / count).backward()
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        (-parts(**one, fused_lm_head=True).log_probs.sum() / count).backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_everything_is_made_on_the_models_device() -> None:
    """A stand-in for a Mac's GPU: tensors without storage, which refuse to meet any on the CPU."""
    hidden, weight, bias = (torch.empty(*shape, device="meta") for shape in ((7, 16), (211, 16), (211,)))
    labels = torch.empty(7, dtype=torch.long, device="meta")
    ids, rows = torch.empty(3, dtype=torch.long, device="meta"), torch.empty(3, 16, device="meta")
    found = fused_loss._SupervisedLogProbs.apply(hidden.requires_grad_(), weight, bias, labels, rows, ids)
    assert [x.device.type for x in found] == ["meta"] * 3
    assert [x.shape for x in found] == [(7,)] * 3


@pytest.mark.parametrize("changed", ["another device", "autocast"])
def test_the_rest_keeps_trls_head(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = models("gpt2")
    calls: list[int] = []
    monkeypatch.setattr(
        fused_loss._SupervisedLogProbs, "forward", _counted(fused_loss._SupervisedLogProbs.forward, calls)
    )
    if changed == "another device":
        monkeypatch.setattr(fused_loss, "_DEVICES", ())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=changed == "autocast"):
        loss, reference = (model(**batch(), fused_lm_head=True).loss for model in (ours, theirs))
    assert torch.equal(loss, reference)
    assert calls == []


def test_of_equal_logits_the_first_is_the_answer() -> None:
    hidden, weight = torch.zeros(3, 4), torch.randn(7, 4)  # all logits are zero
    labels = torch.tensor([0, 3, 0])
    *_, is_top1 = fused_loss._SupervisedLogProbs.apply(hidden, weight, None, labels, None, None)
    assert is_top1.tolist() == [True, False, True]


def test_a_forward_with_another_head_takes_what_it_took() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    before = list(inspect.signature(model.forward).parameters)
    add_supervised_head(model)
    add_plain_head(model)
    assert list(inspect.signature(model.forward).parameters) == before
