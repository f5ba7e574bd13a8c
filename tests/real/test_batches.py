"""Rows in packs, in padded batches and after a kill are what they are alone and in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import instructft


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
    prompts = [row["instruction"] for row in rows[:50]]
    together = instructft.generate(str(smollm), prompts, max_new_tokens=12)
    alone = [instructft.generate(str(smollm), [prompt], max_new_tokens=12)[0] for prompt in prompts[:10]]
    equal = sum(a == b for a, b in zip(together, alone, strict=False))
    note("answers in batches", "50 prompts together, the first 10 of them alone", f"{equal} of 10 equal")
    assert equal == 10


def test_a_run_that_is_killed_goes_on_to_the_same_bits(recipe_of: Any, tmp_path: Path, note: Any) -> None:
    """SIGKILL right behind the first checkpoint, in a process of its own."""
    import os
    import signal
    import subprocess
    import sys
    import time

    from safetensors.torch import load_file

    asked = ("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2")
    through = recipe_of("through", *asked)
    instructft.train(through, console=Console(quiet=True))
    killed = recipe_of("killed", *asked)
    path = tmp_path / "killed.yaml"
    path.write_text(killed.to_yaml(), encoding="utf-8")
    out = Path(killed.output_dir)
    with subprocess.Popen([sys.executable, "-m", "instructft", "train", str(path)], stdout=subprocess.DEVNULL) as child:
        while not (out / "checkpoint-2" / "manifest.json").is_file() and child.poll() is None:
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    assert not (out / "run.json").exists()
    instructft.train(killed, console=Console(quiet=True))
    one, other = (load_file(Path(r.output_dir) / "adapter_model.safetensors") for r in (through, killed))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    note("resume after kill -9", "LoRA, 4 steps, killed behind the second", "every weight equal to the bit")
