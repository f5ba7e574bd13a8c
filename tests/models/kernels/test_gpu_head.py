"""The GPU's head: TRL's log-probabilities, entropy, accuracy and gradients, in fewer products.

Tried on a CPU by plain operators; the kernel on a GPU, or on a CPU where Triton is there and TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from instructft.data.batches.flat_packs import supervised_positions
from instructft.models.kernels import fused_loss, gpu_head, softmax_kernel
from instructft.models.kernels.fused_loss import nll_of
from tests.helpers.read_backs import ReadBacks
from tests.models.kernels.test_fused_loss import OUTPUTS, SHAPES, Products, batch, models

PARTS = {"operators": gpu_head.torch_parts, "kernel": gpu_head.kernel_parts}
INTERPRETED = softmax_kernel.available() and os.environ.get("TRITON_INTERPRET") == "1"  # a kernel's way onto a CPU
WIDTH, VOCABULARY = 16, 211


@pytest.fixture(autouse=True, params=PARTS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU, or the CPU taken for one; chunks of eight positions, and what turns logits into a gradient there."""
    cuda = torch.cuda.is_available() and not INTERPRETED
    if request.param == "kernel" and not (cuda or INTERPRETED):
        pytest.skip("neither a GPU nor an interpreter for the kernel")
    monkeypatch.setattr(fused_loss, "_DEVICES", ())
    monkeypatch.setattr(gpu_head, "head_for", lambda device: PARTS[request.param])
    monkeypatch.setattr(gpu_head, "CHUNK", 8)
    with torch.device("cuda" if cuda else "cpu") as device:
        yield device.type


def with_positions(inputs: dict[str, torch.Tensor], multiple: int = 8) -> dict[str, torch.Tensor]:
    """A batch with what the collator says of it: positions filled up with position 0 and no label."""
    where, wanted = supervised_positions(inputs["labels"])
    more = -len(where) % multiple
    return {
        **inputs,
        "supervised": torch.nn.functional.pad(where, (0, more)),
        "supervised_labels": torch.nn.functional.pad(wanted, (0, more), value=-100),
    }


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_trl(shape: str, said: bool) -> None:
    ours, theirs = models(shape)
    inputs = batch()
    out = ours(**(with_positions(inputs) if said else inputs), fused_lm_head=True)
    ref = theirs(**inputs, fused_lm_head=True)
    for name in (*OUTPUTS, "label_mask"):
        torch.testing.assert_close(getattr(out, name).float(), getattr(ref, name).float(), atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(out.loss, ref.loss)
    for result in (out, ref):
        (nll_of(result) / 7).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("with_the_sum", [False, True])
def test_tokens_of_unequal_weight(with_the_sum: bool) -> None:
    """loss_type: dft weighs each token by its own probability."""
    ours, theirs = models("phi, whose head has a bias")
    for model, inputs in ((ours, with_positions(batch())), (theirs, batch())):
        out = model(**inputs, fused_lm_head=True)
        loss = -(out.log_probs * out.log_probs.exp().detach()).sum()
        (loss + nll_of(out) if with_the_sum else loss).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_products_in_sixteen_bits_are_summed_in_float32(weights: torch.dtype, device: str) -> None:
    """Two thousand positions of one label: sums in bfloat16 stand still at 256 times what is added."""
    torch.manual_seed(0)
    count = 2_000
    rows = (torch.ones(count, WIDTH) + 0.1 * torch.randn(count, WIDTH)).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, WIDTH)).to(weights).requires_grad_()
    labels = torch.full((count,), 3)
    parts = gpu_head.head_for(rows.device)
    assert parts is not None
    with torch.autocast(device, torch.bfloat16):
        nll, *_ = gpu_head.score(rows, weight, None, labels, parts)
    nll.backward()
    exact_rows, exact = rows.detach().clone().requires_grad_(), weight.detach().float().requires_grad_()
    reference = torch.nn.functional.cross_entropy(exact_rows @ exact.t(), labels, reduction="sum")
    reference.backward()
    assert nll.dtype == torch.float32
    assert weight.grad is not None
    assert rows.grad is not None
    assert weight.grad.dtype == weights
    torch.testing.assert_close(nll, reference, rtol=1e-3, atol=0)
    for found, wanted in ((weight.grad.float(), exact.grad), (rows.grad, exact_rows.grad)):
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize(("frozen", "products"), [(False, 3), (True, 2), (None, 1)])
def test_products_are_as_few_as_can_be(frozen: bool | None, products: int) -> None:
    """Three; two where an adapter leaves the head as it is; one where nothing is trained."""
    count = 40
    rows = torch.randn(count, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=not frozen)
    labels = torch.randint(0, VOCABULARY, (count,))
    parts = gpu_head.head_for(rows.device)
    assert parts is not None
    counter = Products()
    with counter, torch.set_grad_enabled(frozen is not None):
        nll, *_ = gpu_head.score(rows, weight, None, labels, parts)
        if frozen is not None:
            nll.backward()
    assert sum(map(math.prod, counter.shapes)) == products * count * 256 * WIDTH  # 211 tokens are filled up
    assert (weight.grad is None) == (frozen is not False)


def test_nothing_is_read_back() -> None:
    ours, _ = models("gpt2")
    inputs = {k: v for k, v in with_positions(batch()).items() if k != "attention_mask"}
    inputs["position_ids"] = torch.arange(20).expand(3, 20)
    states = ours.base_model(input_ids=inputs["input_ids"]).last_hidden_state
    ours.base_model.forward = lambda **kwargs: type("Out", (), {"last_hidden_state": states})()
    with ReadBacks() as seen:
        nll_of(ours(**inputs, fused_lm_head=True)).backward()
    assert seen.found == []
    del inputs["supervised"]
    with ReadBacks() as seen, torch.no_grad():
        ours(**inputs, fused_lm_head=True)
    assert [what for what, _ in seen.found] == ["aten.nonzero.default"]


def test_a_batch_without_loss_gives_a_zero_that_can_be_differentiated() -> None:
    ours, _ = models("gpt2")
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for one in (inputs, with_positions(inputs), {**inputs, "supervised": torch.zeros(8, dtype=torch.long),
                                                 "supervised_labels": torch.full((8,), -100)}):  # fmt: skip
        out = ours(**one, fused_lm_head=True)
        nll_of(out).backward()
        assert out.loss == 0
        assert all(not p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_of_equal_logits_the_first_is_the_answer() -> None:
    hidden, weight = torch.zeros(3, 4), torch.randn(7, 4)  # all logits are zero
    parts: Any = gpu_head.head_for(hidden.device)
    *_, is_top1 = gpu_head.score(hidden, weight, None, torch.tensor([0, 3, 0]), parts)
    assert is_top1.tolist() == [True, False, True]


def test_what_the_collator_says_reaches_no_other_forward() -> None:
    """Neither a model's own forward, nor TRL's, which scores sharded heads and low precision on a CPU."""
    ours, theirs = models("llama")
    said = {**with_positions(batch()), "counts": (1, 2, 3)}
    with torch.no_grad():
        torch.testing.assert_close(ours(**said).loss, theirs(**batch()).loss)
        fused_loss.add_plain_head(ours)
        torch.testing.assert_close(ours(**said, fused_lm_head=True).loss, theirs(**batch(), fused_lm_head=True).loss)


def test_a_kernel_that_does_not_compile_or_errs_is_not_used(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.undo()
    here = torch.device(device)
    monkeypatch.setattr(softmax_kernel, "available", lambda: True)

    def fails(*args: Any) -> Any:
        raise RuntimeError("no such instruction\nin line 3")

    def errs(*args: Any) -> Any:
        grad, *rest = gpu_head.torch_parts(*args)
        return grad * 1.1, *rest

    for kernel, problem in (
        (gpu_head.torch_parts, None),
        (fails, "RuntimeError: no such instruction"),
        (errs, "it computes something else than plain operators"),
    ):
        monkeypatch.setattr(gpu_head, "kernel_parts", kernel)
        assert gpu_head.kernel_problem.__wrapped__(here) == problem


def test_chunks_are_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [gpu_head.chunk_size(v) for v in (256, 50_257, 151_936, 262_208, 10**9)] == [4096, 4096, 2048, 1024, 256]
