"""Plain TRL learns the same from the same rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import instructft
from tests.real.conftest import TUNED


def test_plain_trl_learns_the_same(recipe_of: Any, tuned: Path, tmp_path: Path, note: Any) -> None:
    """The same rows in the same order, masks and first weights: the same losses, measured the same way.

    TRL's own `eval_loss` is another number of the same model: the mean of the means of batches, in which a token of a
    batch of short answers weighs more. It is computed here from the losses of rows, to be sure that this is all.
    """
    import torch
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    recipe = recipe_of("trl", *TUNED)
    ours = json.loads((tuned / "run.json").read_text(encoding="utf-8"))
    tokenizer = instructft.load_tokenizer(recipe)
    splits = instructft.prepare_dataset(recipe, tokenizer)
    set_seed(recipe.train["seed"])
    model = instructft.load_model(recipe, tokenizer)
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=5e-4, warmup_steps=0,
        bf16=False, report_to="none", save_strategy="no", use_cpu=True, max_length=None,
        gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, data_collator=instructft.CompletionOnlyCollator(tokenizer.pad_token_id),
        train_dataset=splits["train"], eval_dataset=splits["validation"], processing_class=tokenizer,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds, reported = time.perf_counter() - began, trainer.evaluate()["eval_loss"]
    trained, sums = trainer.model.eval(), []
    for row in splits["validation"]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.inference_mode():
            log_p = trained(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        kept = labels != -100
        sums.append((-float(log_p[kept].gather(-1, labels[kept][:, None]).sum()), int(kept.sum())))
    batches = [sums[i : i + 8] for i in range(0, len(sums), 8)]
    means = [sum(loss for loss, _ in batch) / sum(tokens for _, tokens in batch) for batch in batches]
    of_batches = sum(mean * len(batch) for mean, batch in zip(means, batches, strict=True)) / len(sums)
    loss = sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)
    mine = ours["metrics"]["eval_loss"]
    note("beside plain TRL", "the same 8 steps, validation loss a token, TRL's and ours", f"{loss:.4f}, {mine:.4f}")
    note("beside plain TRL", "TRL's own eval_loss, a mean of batches' means", f"{reported:.4f}, {of_batches:.4f} here")
    note(
        "beside plain TRL",
        "seconds of training, TRL's and ours",
        f"{seconds:.0f}, {ours['train']['seconds_by_part']['steps']:.0f}",
    )
    assert loss == pytest.approx(mine, abs=2e-3)
    assert reported == pytest.approx(of_batches, abs=2e-3)
