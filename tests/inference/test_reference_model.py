"""The model that another one is compared with: how it is asked, and what is refused before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from instructft.errors import UsageError
from instructft.inference import reference_model
from instructft.inference.generator import Generator
from instructft.inference.reference_model import ReferenceModel, check_base, own_tokenizer, recipe_of
from instructft.prompt.templates import TEMPLATES


@pytest.mark.parametrize("own_words", [False, True])
def test_one_with_another_vocabulary_is_asked_in_its_own_way(
    own_words: bool, tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """One of the same family gets the tuned model's template, with embeddings for tokens that training added."""
    from copy import deepcopy

    theirs = deepcopy(tokenizer)
    theirs.chat_template = TEMPLATES["alpaca"].text()
    if own_words:
        theirs.add_tokens(["<|theirs|>"])
    tiny_model.resize_token_embeddings(len(theirs), mean_resizing=False)
    tiny_model.save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<|ours|>"])
    reference = ReferenceModel(str(tmp_path), None, Generator(tiny_model, tokenizer), None)
    with reference.answering() as base:
        assert base.tokenizer.chat_template == (theirs if own_words else tokenizer).chat_template
        assert len(base.model.get_input_embeddings().weight) == len(base.tokenizer)
        kept = tiny_model.get_input_embeddings().weight[:100]
        assert torch.equal(base.model.get_input_embeddings().weight[:100], kept)
    with reference.answering() as again:
        assert again is base  # loaded once


def test_what_is_no_base_is_told_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    for name in ("load_base", "load_bare", "load_model", "load_for_inference"):
        monkeypatch.setattr(reference_model, name, refuse)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="needs a run folder"):
        check_base(str(tmp_path), "start")
    with pytest.raises(UsageError, match=r"no model folder \./none"):
        check_base(str(tmp_path), "./none")
    assert check_base(str(tmp_path), str(tmp_path)) == (None, None)


def test_the_recipe_of_a_run_is_that_of_its_checkpoints(write_recipe: Any, tmp_path: Path) -> None:
    import instructft

    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    assert recipe_of(str(tmp_path / "run")) is None
    recipe = instructft.load_recipe(write_recipe())
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    for folder in ("run", "run/checkpoint-2"):
        found = recipe_of(str(tmp_path / folder))
        assert found is not None
        assert found.data.template == recipe.data.template


def test_its_own_template_is_that_which_it_was_published_with(
    write_recipe: Any, tokenizer: Any, tiny_model: Any, tmp_path: Path
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    tokenizer.chat_template = TEMPLATES["alpaca"].text()
    tokenizer.save_pretrained(base)
    tiny_model.save_pretrained(base)
    run.mkdir()
    (run / "config.json").write_text("{}", encoding="utf-8")
    recipe = write_recipe(f"model: {{name_or_path: {base}}}\ndata: {{datasets: quickstart, template: instruction}}\n")
    (run / "recipe.yaml").write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    for named in ("start", str(base)):
        own = own_tokenizer(str(run), named)
        assert own is not None
        assert own.chat_template == TEMPLATES["alpaca"].text()
    (base / "chat_template.jinja").unlink()
    assert own_tokenizer(str(run), "start") is None  # asked as the tuned model is
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    assert own_tokenizer(str(run), "start") is None
