"""Two processes that share the weights (FSDP2, on CPUs): the losses of one process, whole models, exact resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import instructft
from instructft.checkpoints.manifest import read_manifest, verify
from instructft.errors import UsageError
from instructft.models.load_trained import load_for_inference

CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: "no"
fsdp_config:
  {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_reshard_after_forward: true,
   fsdp_cpu_ram_efficient_loading: false, fsdp_offload_params: false}
"""
MODELS = {
    "gpt2": "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128, resid_pdrop: 0.0, "
    "embd_pdrop: 0.0, attn_pdrop: 0.0}",  # tied head
    "llama": "{model_type: llama, num_hidden_layers: 2, hidden_size: 32, intermediate_size: 48, "
    "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128, tie_word_embeddings: false}",
}
RECIPE = """
model: {{{model}}}
data: {{datasets: [{{path: {data}}}], template: {template}, max_length: 128, splits: {{validation: 0.1}}}}
{adapter}
train:
  {{max_steps: 6, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, logging_steps: 1, eval_steps: 4,
   save_steps: 3, use_cpu: true, learning_rate: 1e-2, adam_epsilon: 1e-3, report_to: none}}
samples: [Hello]
"""
LORA = "adapter: {type: lora, r: 4, dropout: 0.0}"
# model, adapter, template (chatml brings tokens of its own, whose rows are trained), how checkpoints are written
CASES = {
    "gpt2": ("gpt2", "", "instruction", "FULL_STATE_DICT"),
    "llama": ("llama", "", "chatml", "SHARDED_STATE_DICT"),
    "gpt2-lora": ("gpt2", LORA, "instruction", "SHARDED_STATE_DICT"),
    "llama-lora": ("llama", LORA, "chatml", "FULL_STATE_DICT"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case trained by two processes: in one go (`NAME-whole`), and stopped in step 5 and gone on with."""
    folder = tmp_path_factory.mktemp("fsdp")
    rows = [{"instruction": f"Say {i * 7919}.", "output": " ".join([f"{i * 104729}"] * (1 + i % 7))} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan: list[dict[str, Any]] = []
    for name, (model, adapter, template, state_dict) in CASES.items():
        start = f"config: {MODELS[model]}, tokenizer: quickstart"
        base = folder / model
        if not base.exists():
            path = folder / f"{model}-base.yaml"
            path.write_text(RECIPE.format(model=start, data=folder / "rows.jsonl", template="instruction", adapter=""))
            recipe = instructft.load_recipe(path)
            tokenizer = instructft.load_tokenizer(recipe)
            instructft.load_model(recipe, tokenizer).save_pretrained(base)
            tokenizer.save_pretrained(base)
        path = folder / f"{name}.yaml"
        path.write_text(
            RECIPE.format(model=f"name_or_path: {base}", data=folder / "rows.jsonl", template=template, adapter=adapter)
        )
        for run, stop in (("whole", None), ("stopped", 5), ("stopped", None)):
            out = [f"output_dir={folder / f'{name}-{run}'}", *(["samples=[]"] if run == "stopped" else [])]
            plan.append({"recipe": str(path), "overrides": out, "state_dict": state_dict, "stop": stop})
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "fsdp.yaml").write_text(CONFIG)
    program = str(Path(__file__).parents[1] / "helpers" / "fsdp.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "fsdp.yaml")]
    done = subprocess.run(
        [*launch, program, str(folder / "plan.json")],
        capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "Error" in line]
    return folder


def notes(folder: Path, name: str) -> list[list[dict[str, Any]]]:
    """For each process what it noted of a case: the run in one go, the one that was stopped, the one that went on."""
    at = list(CASES).index(name) * 3
    found = [
        [json.loads(line) for line in (folder / f"notes-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    ]
    return [lines[at : at + 3] for lines in found]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(p for p in (run / "model.safetensors", run / "adapter_model.safetensors") if p.exists()))


def logged(run: Path, *names: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *names) if name in line} for line in lines]


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_a_part_of_every_weight(folder: Path, name: str) -> None:
    both = notes(folder, name)
    for first, second in zip(*both, strict=True):
        for note in (first, second):
            assert note["fsdp2"]
            assert note["sharded"] == note["parameters"] > 20
        assert first["numbers"][0] == second["numbers"][0] == first["numbers"][1] + second["numbers"][1]
        assert 0.4 < first["numbers"][1] / first["numbers"][0] < 0.6


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_one_process(folder: Path, name: str) -> None:
    two, one = folder / f"{name}-whole", folder / f"{name}-one"
    recipe = instructft.load_recipe(
        folder / f"{name}.yaml", ["train.per_device_train_batch_size=4", f"output_dir={one}", "samples=[]"]
    )
    instructft.train(recipe, console=Console(quiet=True))
    for key in ("loss", "eval_loss", "grad_norm"):
        pairs = list(zip(logged(two, key), logged(one, key), strict=True))
        assert len(pairs) == 6
        for a, b in pairs:
            assert a == pytest.approx(b, abs=1e-5)
    mine, others = weights(two), weights(one)
    assert set(mine) == set(others)
    for key, tensor in mine.items():
        assert tensor.shape == others[key].shape
        torch.testing.assert_close(tensor, others[key], atol=1e-5, rtol=0)
    samples = [json.loads(line)["step"] for line in (two / "samples.jsonl").read_text().splitlines()]
    assert samples == [0, 4, 6]


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_opens_and_is_whole(folder: Path, name: str) -> None:
    """The final model and a checkpoint: no rank's part of a weight is missing or zero."""
    run = folder / f"{name}-whole"
    final, _ = load_for_inference(str(run))
    half, _ = load_for_inference(str(run / "checkpoint-3"))
    before = dict(half.named_parameters())
    for key, tensor in final.named_parameters():
        assert before[key].shape == tensor.shape
        if tensor.dim() > 1:
            parts = [part for part in tensor.detach().chunk(2) if part.numel()]
            assert all(part.abs().max() > 0 for part in parts), key
    moved = [key for key, tensor in final.named_parameters() if not torch.equal(tensor, before[key])]
    assert len(moved) >= len(weights(run)) - 2  # a tied head counts once; key biases hardly move


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_sealed_with_the_files_of_every_process(folder: Path, name: str) -> None:
    checkpoint = folder / f"{name}-whole" / "checkpoint-6"
    assert verify(checkpoint).step == 6
    files = set(read_manifest(checkpoint)["files"])
    assert {
        f"{what}_{rank}.{kind}" for what, kind in (("rng_state", "pth"), ("progress", "json")) for rank in (0, 1)
    } <= files
    if CASES[name][3] == "SHARDED_STATE_DICT":
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            assert {f"{part}/.metadata", f"{part}/__0_0.distcp", f"{part}/__1_0.distcp"} <= files
    else:
        assert {"pytorch_model_fsdp.bin", "optimizer.bin"} <= files


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(folder: Path, name: str) -> None:
    for _, stopped, on in notes(folder, name):
        assert stopped["ended"] == "stopped by SIGTERM; checkpoint-5 is saved"
        assert (on["ended"], on["resumed"]) == ("done", [5])
        assert on["states"] > 0  # the optimizer's, before the first step
    whole, other = folder / f"{name}-whole", folder / f"{name}-stopped"
    mine, others = weights(whole), weights(other)
    assert set(mine) == set(others)
    assert all(torch.equal(tensor, others[key]) for key, tensor in mine.items())
    assert logged(whole, "loss", "eval_loss", "grad_norm", "num_tokens") == logged(
        other, "loss", "eval_loss", "grad_norm", "num_tokens"
    )


def test_fsdp_that_accelerate_would_leave_out_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the patch of `fsdp.py` nothing is sharded on a CPU; the run says so in place of training as DDP."""
    from types import SimpleNamespace

    from accelerate.state import DistributedType

    from instructft.training.run import _refuse_what_is_not_here

    recipe = instructft.load_recipe(folder / "gpt2.yaml")
    state: Any = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    _refuse_what_is_not_here(recipe, state)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="the launcher asks for FSDP"):
        _refuse_what_is_not_here(recipe, state)
