"""What lives at the same time in a step is seen on any tensors; a formula stands in where it cannot be."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig

from instructft.models.fake_step import Batch, MemoryTracker, _without_tracebacks, activation_bytes


def test_the_tracker_sees_what_lives_at_once() -> None:
    with MemoryTracker([]) as tracker:
        x = torch.ones(10)
        y = x + 1
        z = y.view(5, 2)  # no storage of its own
        del x
        y += 1
    assert (tracker.peak(), tracker.peak(without=[z])) == (80, 40)


def test_the_formula_of_korthikanti() -> None:
    # 34 s b h bytes a layer in 16 bit, and 5 a b s² of scores where they are kept (arXiv:2205.05198, equation 1)
    config = AutoConfig.for_model("gpt2", n_layer=3, n_embd=256, n_head=4, attn_pdrop=0.0)
    assert activation_bytes(config, Batch(8, 256, 0), 2) == 3 * 34 * 8 * 256 * 256
    config._attn_implementation = "eager"
    assert activation_bytes(config, Batch(8, 256, 0), 2) == 3 * (34 * 8 * 256 * 256 + 5 * 4 * 8 * 256 * 256)
    assert activation_bytes(config, Batch(8, 256, 0), 2, True) < activation_bytes(config, Batch(8, 256, 0), 2)


def test_what_cannot_be_traced_is_no_trouble_and_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with _without_tracebacks():
        log.error("failed while attempting to run meta")
    assert capfd.readouterr().err == ""
    log.error("another trouble")
    assert "another trouble" in capfd.readouterr().err
