"""Two processes that share the weights (FSDP2, on CPUs): the losses of one process, whole models, exact resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import instructft
from instructft.checkpoints.manifest import read_manifest, verify
from instructft.errors import UsageError
from instructft.models.load_for_inference import load_for_inference
from tests.helpers.processes import launch

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
    "gpt2": ("gpt2", "", "instruction", "SHARDED_STATE_DICT"),
    "llama": ("llama", "", "chatml", "FULL_STATE_DICT"),
    "gpt2-lora": ("gpt2", LORA, "instruction", "SHARDED_STATE_DICT"),
    "llama-lora": ("llama", LORA, "chatml", "FULL_STATE_DICT"),
}
ALWAYS = ("gpt2", "llama-lora")  # all weights and an adapter, a tied head and rows of new tokens, parts and whole


def trained(
    folder: Path,
    name: str,
    config: str = CONFIG,
    program: str = "fsdp.py",
    world: int = 2,
    overrides: Sequence[str] = (),
) -> list[list[dict[str, Any]]]:
    """A case trained by two processes: in one go (`whole`), and stopped in step 5 and resumed (`stopped`).

    Args:
        config: accelerate's.
        program: of `tests/helpers`, which trains.

    Returns what each process noted: of the run in one go, the one that was stopped, the one that was resumed.
    """
    model, adapter, template, state_dict = CASES[name]
    rows = [{"instruction": f"Say {i * 7919}.", "output": " ".join([f"{i * 104729}"] * (1 + i % 7))} for i in range(60)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    start, base = folder / "base.yaml", folder / "base"
    new = f"config: {MODELS[model]}, tokenizer: quickstart"
    start.write_text(RECIPE.format(model=new, data=data, template="instruction", adapter=""))
    recipe = instructft.load_recipe(start)
    tokenizer = instructft.load_tokenizer(recipe)
    instructft.load_model(recipe, tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)

    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=f"name_or_path: {base}", data=data, template=template, adapter=adapter))
    plan: list[dict[str, Any]] = []
    for run, stop in (("whole", None), ("stopped", 5), ("stopped", None)):
        out = [f"output_dir={folder / run}", *(["samples=[]"] if run == "stopped" else []), *overrides]
        plan.append({"recipe": str(path), "overrides": out, "state_dict": state_dict, "stop": stop})
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "fsdp.yaml").write_text(config)
    file = str(Path(__file__).parents[1] / "helpers" / program)
    done = launch(str(folder / "fsdp.yaml"), [file, str(folder / "plan.json")], folder, processes=world)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if "Error" in line]
    files = [folder / f"notes-{rank}.jsonl" for rank in range(world)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(p for p in (run / "model.safetensors", run / "adapter_model.safetensors") if p.exists()))


def logged(run: Path, *names: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *names) if name in line} for line in lines]


@pytest.mark.timeout(600)  # two processes start, and train three times
@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.battery) for name in CASES]
)
def test_two_processes_that_share_the_weights(tmp_path: Path, name: str) -> None:
    """One launch a case, since its start takes longer than its runs: all that a case promises is looked at here."""
    notes = trained(tmp_path, name)
    each_process_holds_a_part_of_every_weight(notes)
    losses_and_weights_are_those_of_one_process(tmp_path)
    what_is_saved_opens_and_is_whole(tmp_path / "whole")
    a_checkpoint_is_sealed_with_the_files_of_every_process(tmp_path / "whole" / "checkpoint-6", CASES[name][3])
    a_stopped_run_is_resumed_bit_for_bit(tmp_path, notes)


def each_process_holds_a_part_of_every_weight(notes: list[list[dict[str, Any]]]) -> None:
    assert [len(runs) for runs in notes] == [3, 3]
    for first, second in zip(*notes, strict=True):
        for note in (first, second):
            assert note["fsdp2"]
            assert note["sharded"] == note["parameters"] > 20
        assert first["numbers"][0] == second["numbers"][0] == first["numbers"][1] + second["numbers"][1]
        assert 0.4 < first["numbers"][1] / first["numbers"][0] < 0.6


def losses_and_weights_are_those_of_one_process(
    folder: Path, batch: int = 4, overrides: Sequence[str] = (), prompts: int = 1
) -> None:
    two, one = folder / "whole", folder / "one"
    recipe = instructft.load_recipe(
        folder / "recipe.yaml",
        [f"train.per_device_train_batch_size={batch}", f"output_dir={one}", "samples=[]", *overrides],
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
    assert samples == [step for step in (0, 4, 6) for _ in range(prompts)]


def what_is_saved_opens_and_is_whole(run: Path) -> None:
    """The final model and a checkpoint: no rank's part of a weight is missing or zero."""
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


def a_checkpoint_is_sealed_with_the_files_of_every_process(checkpoint: Path, state_dict: str) -> None:
    assert verify(checkpoint).step == 6
    files = set(read_manifest(checkpoint)["files"])
    assert {
        f"{what}_{rank}.{kind}" for what, kind in (("rng_state", "pth"), ("progress", "json")) for rank in (0, 1)
    } <= files
    if state_dict == "SHARDED_STATE_DICT":
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            assert {f"{part}/.metadata", f"{part}/__0_0.distcp", f"{part}/__1_0.distcp"} <= files
    else:
        assert {"pytorch_model_fsdp.bin", "optimizer.bin"} <= files


def a_stopped_run_is_resumed_bit_for_bit(folder: Path, notes: list[list[dict[str, Any]]]) -> None:
    for _, stopped, resumed in notes:
        assert stopped["ended"] == "stopped by SIGTERM; checkpoint-5 is saved"
        assert (resumed["ended"], resumed["resumed"]) == ("done", [5])
        assert resumed["states"] > 0  # the optimizer's, before the first step
    whole, other = folder / "whole", folder / "stopped"
    mine, others = weights(whole), weights(other)
    assert set(mine) == set(others)
    assert all(torch.equal(tensor, others[key]) for key, tensor in mine.items())
    assert logged(whole, "loss", "eval_loss", "grad_norm", "num_tokens") == logged(
        other, "loss", "eval_loss", "grad_norm", "num_tokens"
    )


def test_fsdp_that_accelerate_would_leave_out_is_refused(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the patch of `fsdp.py` nothing is sharded on a CPU; the run says so in place of training as DDP."""
    from types import SimpleNamespace

    from accelerate.state import DistributedType

    from instructft.training.arguments import refuse_what_cannot_run

    recipe = instructft.load_recipe(write_recipe())
    state: Any = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_CPU)
    refuse_what_cannot_run(recipe, state)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="the launcher asks for FSDP"):
        refuse_what_cannot_run(recipe, state)
