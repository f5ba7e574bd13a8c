"""A trainer ahead of its first step, as a run builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from instructft.checkpoints.resume import RunStart
from instructft.data.prepare import prepare
from instructft.models.load import load_model
from instructft.models.starting_point import starting_point
from instructft.models.tokenizer import load_tokenizer
from instructft.training.arguments import training_arguments
from instructft.training.build import build_trainer
from tests.helpers.device import ON_GPU


def trainer_of(recipe: Any) -> Any:
    state = PartialState(cpu=not ON_GPU)
    tokenizer = load_tokenizer(recipe)
    origin = starting_point(recipe, tokenizer)
    data = prepare(recipe, tokenizer)
    args, _ = training_arguments(recipe, data, state)
    model = load_model(recipe, tokenizer, start=origin)
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    start = RunStart({}, None, [], {})
    return build_trainer(recipe, tokenizer, data, model, args, origin, start, Console(quiet=True))
