"""What a resumed run must know: random states as they were, and weights under whatever names they lie on the disk."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import instructft
from instructft.errors import CheckpointError
from instructft.training.judging.budget import Budget
from instructft.training.resumable import Progress, load_weights, random_states_kept, renamed_on_disk
from tests.conftest import TINY

QUIET = Console(quiet=True)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_are_as_before() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with random_states_kept(torch.device("cpu")):
        drawn()
    assert drawn() == expected


def test_a_macs_gpu_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: list[Any] = [torch.tensor([7, 255, 0], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(device=torch.device("mps"), process_index=0), _metrics={}, _tr_loss=0.0,
        _globalstep_last_logged=0, _total_loss_scalar=0.0, counts=(0, 0, 0),
        micro_batches=SimpleNamespace(rows_at_once=None),
        step_checks=SimpleNamespace(recent_losses=[], spikes=[], since_log={}),
        stop=SimpleNamespace(left_evaluation=False),
        budget=Budget(None), judge=None, history=None,
    )  # fmt: skip
    progress = Progress(trainer)
    with progress.training(None):
        progress.write(tmp_path)
    state[0] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    progress.restore_random_states(tmp_path)
    assert state[0].tolist() == [7, 255, 0]


@pytest.mark.parametrize("kind", ["mixtral", "gemma3"])
def test_weights_that_are_named_otherwise_on_the_disk_come_back(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from instructft.weights.model_class import auto_class
    from tests.helpers.towers import config_of

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 64, "num_local_experts": 2}
    config = config_of(kind, 100) if kind == "gemma3" else AutoConfig.for_model(kind, **sizes)
    trained = auto_class(config).from_config(config)
    trained.save_pretrained(tmp_path, max_shard_size="20KB")
    model = auto_class(config).from_config(config)
    assert renamed_on_disk(model, tmp_path)
    load_weights(model, tmp_path)
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from tests.helpers.towers import config_of

    AutoModelForImageTextToText.from_config(config_of("gemma3", 100)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not of this model"):
        load_weights(AutoModelForImageTextToText.from_config(config_of("gemma3", 200)), tmp_path)


def test_a_mixture_resumes_with_the_weights_that_it_had(write_recipe: Any, tmp_path: Path) -> None:
    """Mixtral's experts lie one by one on the disk; upstream loads such a checkpoint without them, and says nothing."""
    config = (
        "config: {model_type: mixtral, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 1, intermediate_size: 32, num_local_experts: 4, max_position_embeddings: 128, "
        "router_jitter_noise: 0.0}"
    )
    text = re.sub(r"config: \{.*?\}", config, TINY, count=1, flags=re.DOTALL)
    settings = ["train.lr_scheduler_type=constant", "train.save_strategy=steps", "train.save_steps=2", "samples=[]"]

    def after(folder: str, *steps: int) -> Path:
        for count in steps:
            more = [f"output_dir={tmp_path / folder}", f"train.max_steps={count}"]
            result = instructft.train(instructft.load_recipe(write_recipe(text), [*settings, *more]), console=QUIET)
        return Path(result.output_dir) / "model.safetensors"

    assert after("resumed", 2, 4).read_bytes() == after("whole", 4).read_bytes()
