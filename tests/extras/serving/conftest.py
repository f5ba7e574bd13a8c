"""A run of quickstart's model that ends its answers, and the model that it began from, for the tests of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.device import DEVICE

RECIPE = """
model: {{name_or_path: {base}}}
data: {{datasets: [{{name: quickstart, rows: 40}}], template: instruction, max_length: 128, splits: {{test: 0.5}}}}
train: {{max_steps: 1, use_cpu: true}}
output_dir: {run}
"""
TUNED = ("Yes, it is.",)  # the same to all: no tie in it
BASE = ("No, never.",)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its recipe; beside it `base`, what it began from: each gives one answer to all."""
    import instructft
    from instructft.prompt.templates import TEMPLATES
    from tests.helpers.quickstart import tokenizer as bundled

    folder = tmp_path_factory.mktemp("serving")
    tokenizer = bundled()
    tokenizer.chat_template = TEMPLATES["instruction"].text()
    tokenizer.model_max_length = 1 << 20
    for name, answers in (("base", BASE), ("run", TUNED)):
        trained(tokenizer, answers).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=folder / "base", run=folder / "run"), encoding="utf-8")
    recipe = instructft.load_recipe(folder / "recipe.yaml")
    (folder / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return folder / "run"


def trained(tokenizer: Any, answers: tuple[str, ...]) -> Any:
    """Quickstart's model, which gives these answers to whatever it is asked, and ends there."""
    import torch

    import instructft
    from instructft.data.collator import CompletionOnlyCollator
    from instructft.prompt.loss_mask import encode_conversation

    torch.manual_seed(0)
    model = instructft.load_model(instructft.load_recipe("quickstart"), tokenizer).to(DEVICE)
    asked = ("Capital of France?", "Name three colours.", "Why?", "(7) What is the sea? Be brief.")
    rows = [
        encode_conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answers[i % len(answers)]}],
            tokenizer,
        )
        for i, question in enumerate(asked)
    ]
    batch = {k: v.to(DEVICE) for k, v in CompletionOnlyCollator(tokenizer.pad_token_id)(rows).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
