"""Rows in packs, in padded batches and after a kill are what they are alone and in one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft
from instructft.data.load import conversations

# The same model and kind of run that `tuned` has rehearsed; what is asked here comes after it.
AS_REHEARSED: dict[str, Any] = {"rehearsal": False, "console": Console(quiet=True)}


def test_packs_and_padded_rows_have_the_loss_and_gradients_of_rows_alone(recipe_of: Any, rows: Any, note: Any) -> None:
    import torch

    recipe = recipe_of("packs")
    tokenizer = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, tokenizer).eval()
    alike = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in (rows[0], rows[60], rows[120])
    ]
    encoded = [instructft.encode_conversation(messages, tokenizer) for messages in alike]
    collate = instructft.CompletionOnlyCollator(tokenizer.pad_token_id)
    pack = {
        "input_ids": [i for row in encoded for i in row["input_ids"]],
        "labels": [i for row in encoded for i in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in encoded],
    }
    weights = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():  # B of a new adapter is zero: its A would get no gradient
        if "lora_B" in name:
            parameter.data.normal_(std=0.01, generator=torch.Generator().manual_seed(0))

    def of(batches: list[Any]) -> tuple[float, list[Any]]:
        model.zero_grad()
        total, count = 0.0, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            here = int((batch["labels"][:, 1:] != -100).sum())
            share = model(**batch, use_cache=False).loss * here / count
            share.backward()
            total += float(share.detach())
        return total, [p.grad.clone() for p in weights]

    alone = of([collate([row]) for row in encoded])
    for name, batch in (("packed", collate([pack])), ("padded", collate(encoded))):
        loss, gradients = of([batch])
        largest = max(float(g.abs().max()) for g in alone[1])
        off = max(float((a - b).abs().max()) for a, b in zip(gradients, alone[1], strict=True)) / largest
        note(
            f"{name} against alone",
            "3 rows, loss and gradients",
            f"{abs(loss - alone[0]):.1e}, {off:.1e} of the largest",
        )
        assert loss == pytest.approx(alone[0], abs=1e-4)
        assert off < 1e-3


def test_answers_in_batches_are_those_one_by_one(smollm: Path, rows: Any, note: Any) -> None:
    generator = instructft.Chat(str(smollm)).generator
    prompts = [row["instruction"] for row in rows[:50]]
    together = instructft.generate(generator, prompts, max_new_tokens=4, batch_size=16)
    alone = [instructft.generate(generator, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    equal = sum(a == b for a, b in zip(together, alone, strict=True))
    note("answers in batches", "50 prompts, in batches of 16 and one by one", f"{equal} of 50 equal")
    assert equal == 50


def test_a_run_that_is_killed_goes_on_to_the_same_bits(recipe_of: Any, tmp_path: Path, note: Any) -> None:
    """SIGKILL right behind the first checkpoint, in a process of its own."""
    import os
    import signal
    import subprocess
    import sys
    import time

    from safetensors.torch import load_file

    asked = (
        "train.max_steps=3",
        "train.save_strategy=steps",
        "train.save_steps=2",
        "train.per_device_train_batch_size=2",
    )
    through = recipe_of("through", *asked)
    instructft.train(through, **AS_REHEARSED)
    killed = recipe_of("killed", *asked)
    path = tmp_path / "killed.yaml"
    path.write_text(killed.to_yaml(), encoding="utf-8")
    out = Path(killed.output_dir)
    with subprocess.Popen(
        [sys.executable, "-m", "instructft", "train", str(path), "--no-rehearsal"], stdout=subprocess.DEVNULL
    ) as child:
        while not (out / "checkpoint-2" / "manifest.json").is_file() and child.poll() is None:
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    assert not (out / "run.json").exists()
    instructft.train(killed, **AS_REHEARSED)
    one, other = (load_file(Path(r.output_dir) / "adapter_model.safetensors") for r in (through, killed))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    note("resume after kill -9", "LoRA, 3 steps, killed behind the second", "every weight equal to the bit")


def test_two_processes_learn_what_one_does(recipe_of: Any, tmp_path: Path, note: Any) -> None:
    """Two real processes (gloo) with half the rows of a step each, and one with all of them."""
    from safetensors.torch import load_file

    from tests.helpers.processes import launch

    asked = ("train.max_steps=2", "train.eval_strategy=steps", "train.eval_steps=2", "data.splits={validation: 0.03}")
    one = recipe_of("one", *asked)
    two = recipe_of("two", *asked, "train.per_device_train_batch_size=2")
    for recipe in (one, two):
        (tmp_path / Path(recipe.output_dir).name).with_suffix(".yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    ddp = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
    (tmp_path / "ddp.yaml").write_text(ddp, encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nfrom instructft.cli import main\n"
        f"sys.argv = ['instructft', 'train', '--no-rehearsal', {str(tmp_path / 'two.yaml')!r}]\nmain()\n",
        encoding="utf-8",
    )
    instructft.train(one, **AS_REHEARSED)
    done = launch(str(tmp_path / "ddp.yaml"), [str(program)], tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
        for recipe in (one, two)
    )
    names = ("loss", "eval_loss")
    pairs = [(a[n], b[n]) for a, b in zip(first, second, strict=True) for n in names if n in a]
    off = max(abs(a - b) for a, b in pairs)
    left, right = (load_file(Path(recipe.output_dir) / "adapter_model.safetensors") for recipe in (one, two))
    cosine = min(
        float(
            (left[name].flatten().double() @ right[name].flatten().double()) / (left[name].norm() * right[name].norm())
        )
        for name in left
        if float(left[name].norm())
    )
    note(
        "two processes (gloo) against one",
        "LoRA, 2 steps of 4 rows",
        f"losses to {off:.1e}, weights' cosine {cosine:.4f}",
    )
    assert off < 1e-3
    assert cosine > 0.98  # Adam's first steps divide a gradient by itself: what is nearly nothing may turn its sign


def test_a_run_that_gets_no_better_stops_and_keeps_its_best(recipe_of: Any, note: Any) -> None:
    """At a rate that float32 cannot add to a weight no evaluation is better than the first: two more end the run."""
    recipe = recipe_of(
        "early", "train.max_steps=12", "train.eval_strategy=steps", "train.eval_steps=1", "train.save_strategy=steps",
        "train.save_steps=1", "train.early_stopping_patience=2", "train.learning_rate=1e-12",
        "train.per_device_train_batch_size=1", "train.evaluation_budget=1", "data.splits={validation: 0.03}",
    )  # fmt: skip
    result = instructft.train(recipe, **AS_REHEARSED)
    run = Path(result.output_dir)
    seen = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in seen if "eval_loss" in line}
    assert sorted(losses) == [1, 2, 3]
    assert result.metrics["eval_loss"] == losses[1]
    again = instructft.evaluate(str(run), conversations(recipe, "validation"), max_new_tokens=1)["loss"]
    assert again == pytest.approx(losses[1], abs=1e-3)
    note("early stopping", "patience 2", f"stopped after step {max(losses)} of 12, the model is step 1's: {again:.3f}")
