"""Keys that are right one by one, and contradict each other."""

from __future__ import annotations

import pytest

from tests.helpers.recipes import DATA, GOOD, MODEL

# text of the recipe, how its one problem begins (place and key path), what else that must hold
BAD = {
    "two models": (
        "model:\n  name_or_path: a\n  config: {model_type: gpt2}\n  tokenizer: gpt2\n" + DATA,
        "line 3: model.config: found name_or_path and config",
        "keep one",
    ),
    "quantized, no adapter": (
        "model: {name_or_path: a, quantization: 4bit}\n" + DATA,
        "line 1: model.quantization:",
        "lora",
    ),
    "adapter, random weights": (
        "model:\n  config: {model_type: gpt2}\n  tokenizer: gpt2\nadapter: lora\n" + DATA,
        "line 4: adapter.type:",
        "random weights (model.config)",
    ),
    "rank, no adapter": (GOOD + "adapter: {r: 4}\n", "line 3: adapter.r:", "write adapter.type: lora"),
    "two sources": (
        MODEL + "data: {datasets: [{name: alpaca, hub: a/b}]}\n",
        "line 2: data.datasets.0:",
        "name and hub",
    ),
    "splits": (
        MODEL + "data: {datasets: alpaca, splits: {validation: 0.5, test: 0.5}}\n",
        "line 2: data.splits:",
        "below 1",
    ),
    "accumulation": (
        GOOD + "train:\n  tokens_per_step: 9999\n  gradient_accumulation_steps: 2\n",
        "line 5: train.gradient_accumulation_steps: contradicts train.tokens_per_step",
        "keep one",
    ),
    "precision": (GOOD + "train: {bf16: true, fp16: true}\n", "line 3: train.bf16: contradicts train.fp16", "keep one"),
    "nothing to evaluate": (
        MODEL + "data: {datasets: alpaca, splits: {validation: 0}}\ntrain: {eval_strategy: epoch}\n",
        "line 3: train.eval_strategy: epoch, but there is nothing to evaluate on",
        "data.splits.validation",
    ),
    "best without evaluation": (
        GOOD + "train: {load_best_model_at_end: true, eval_strategy: 'no'}\n",
        "line 3: train.load_best_model_at_end:",
        "eval_strategy no",
    ),
    "best between evaluations": (
        GOOD + "train: {load_best_model_at_end: true, save_steps: 100, eval_steps: 30}\n",
        "line 3: train.load_best_model_at_end:",
        "found 100 and 30",
    ),
    "best by a figure that is not asked for": (
        GOOD + "evaluation: {metrics: [exact_match]}\ntrain: {metric_for_best_model: token_f1}\n",
        "line 4: train.metric_for_best_model: eval_token_f1 is not measured",
        "eval_mean_token_accuracy, eval_exact_match",
    ),
    "best by answers to no rows": (
        GOOD + "evaluation: {rows: 0}\ntrain: {metric_for_best_model: exact_match}\n",
        "line 4: train.metric_for_best_model: exact_match is of answers to held-out rows, and evaluation.rows is 0",
        "auto",
    ),
    "figures of answers to no rows": (
        GOOD + "evaluation: {rows: 0, metrics: [stops]}\n",
        "line 3: evaluation.metrics: judges answers, and evaluation.rows is 0",
        "auto",
    ),
    "answers to rows that are not held out": (
        MODEL + "data: {datasets: alpaca, splits: {validation: 0}}\nevaluation: {rows: 20}\n",
        "line 3: evaluation.rows: there is nothing to answer",
        "hold rows out",
    ),
    "two names of one thing": (
        GOOD + "train: {activation_checkpointing: true, gradient_checkpointing: false}\n",
        "line 3: train.gradient_checkpointing: contradicts train.activation_checkpointing",
        "",
    ),
    "labels that nothing smooths": (
        GOOD + "train: {loss_type: dft, label_smoothing_factor: 0.1}\n",
        "line 3: train.label_smoothing_factor: would be left out without a word with train.loss_type: dft",
        "keep one",
    ),
    "no optimizer in checkpoints": (
        GOOD + "train: {save_only_model: true}\n",
        "line 3: train.save_only_model: true leaves optimizer, schedule and random states out",
        "train.save_total_limit",
    ),
    "rows trained twice": (
        GOOD + "train: {ignore_data_skip: true}\n",
        "line 3: train.ignore_data_skip: true begins",
        "take it out",
    ),
    "callbacks anew": (
        GOOD + "train: {restore_callback_states_from_checkpoint: true}\n",
        "line 3: train.restore_callback_states_from_checkpoint: true makes",
        "take it out",
    ),
    "batches in any order": (
        GOOD + "train: {dataloader_in_order: false, dataloader_num_workers: 2}\n",
        "line 3: train.dataloader_in_order: false takes",
        "take it out",
    ),
    "an order that nobody knows again": (
        GOOD + "train:\n  accelerator_config:\n    use_seedable_sampler: false\n",
        "line 5: train.accelerator_config.use_seedable_sampler: false draws",
        "take it out",
    ),
    "a place that is kept twice": (
        GOOD + "train:\n  accelerator_config:\n    use_stateful_dataloader: true\n",
        "line 5: train.accelerator_config.use_stateful_dataloader: true keeps",
        "take it out",
    ),
    "a process without a batch": (
        GOOD + "train:\n  accelerator_config:\n    even_batches: false\n",
        "line 5: train.accelerator_config.even_batches: false leaves",
        "take it out",
    ),
    "batches of unequal width": (
        GOOD + "train:\n  accelerator_config:\n    dispatch_batches: true\n",
        "line 5: train.accelerator_config.dispatch_batches: true joins",
        "split_batches: true",
    ),
    "prefetch": (GOOD + "train: {dataloader_prefetch_factor: 2}\n", "line 3: train.dataloader_prefetch", "num_workers"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_contradiction_is_said_at_the_key_that_was_written(problems, case):
    text, start, fragment = BAD[case]
    (found,) = problems(text)
    assert found.startswith(start)
    assert fragment in found


def test_two_figures_of_one_name(problems, tmp_path):
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text("")
    for metrics in ("one.py:score, two.py:score", "one.py:loss", "one.py:exact_match"):
        for found in problems(GOOD + f"evaluation: {{metrics: [{metrics}]}}\n"):
            assert "would stand for two figures; give the function another name" in found
