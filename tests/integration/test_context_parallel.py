"""Two processes that share each row (context parallelism, on CPUs): the losses and weights of one that has it whole.

The ring is torch's own, around the CPU's kernel (`tests/helpers/context.py`); on a GPU it goes around torch's kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from instructft.checkpoints.manifest import verify
from instructft.checkpoints.resume import refuse_changes
from instructft.errors import ResumeError
from tests.integration.test_fsdp import (
    CONFIG,
    a_checkpoint_is_sealed_with_the_files_of_every_process,
    a_stopped_run_is_resumed_bit_for_bit,
    losses_and_weights_are_those_of_one_process,
    trained,
    what_is_saved_opens_and_is_whole,
)


class Case(NamedTuple):
    """A model of `test_fsdp`, processes in all, those that share a row, and what the recipe says besides."""

    name: str
    world: int
    size: int
    overrides: tuple[str, ...] = ()


CASES = {
    "llama": Case("llama", 2, 2),  # grouped heads, a head of its own
    "groups-of-two": Case("llama-lora", 4, 2),  # two groups, each with rows of its own; an adapter, rows of new tokens
    "three": Case("gpt2", 3, 3, ("train.pad_to_multiple_of=4",)),  # positions that are learned, no module `self_attn`
    "by-length": Case(
        "llama", 2, 2, ("train.train_sampling_strategy=group_by_length", "train.gradient_checkpointing=true")
    ),
}


PROMPTS = ["Hello", "Say 7919 and nothing else."]


def config(case: Case) -> str:
    sizes = f"parallelism_config_cp_size: {case.size}, parallelism_config_dp_shard_size: {case.world // case.size}"
    return f"{CONFIG}parallelism_config: {{{sizes}}}\n"


@pytest.mark.timeout(600)  # processes start, and train three times
@pytest.mark.parametrize(
    "name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.battery) for name in CASES]
)
def test_processes_that_share_each_row(tmp_path: Path, name: str) -> None:
    """One launch a case, since its start takes longer than its runs: all that a case promises is looked at here."""
    case = CASES[name]
    overrides = (*case.overrides, f"samples={json.dumps(PROMPTS)}")
    notes = trained(tmp_path, case.name, config(case), "context.py", case.world, overrides)
    assert len(notes) == case.world
    assert all(note["sharded"] == note["parameters"] > 10 for runs in notes for note in runs)
    batch = 2 * case.world // case.size
    losses_and_weights_are_those_of_one_process(tmp_path, batch, overrides, len(PROMPTS))
    answers_are_those_of_one_process(tmp_path)
    each_token_is_counted_once(tmp_path, case)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(case.world)]
    attention_went_through_the_ring(seen)
    a_row_that_is_not_the_same_divided_stops_the_run(seen, case)
    what_is_saved_opens_and_is_whole(tmp_path / "whole")
    if case.world == 2:
        a_checkpoint_is_sealed_with_the_files_of_every_process(tmp_path / "whole" / "checkpoint-6", "FULL_STATE_DICT")
    a_stopped_run_is_resumed_bit_for_bit(tmp_path, notes)
    it_is_resumed_with_as_many_to_a_row(tmp_path / "whole" / "checkpoint-3", case)


def it_is_resumed_with_as_many_to_a_row(folder: Path, case: Case) -> None:
    checkpoint = verify(folder)
    key = "processes that share a row"
    assert checkpoint.identity[key] == case.size
    refuse_changes(checkpoint, checkpoint.identity)
    without = {name: value for name, value in checkpoint.identity.items() if name != key}
    for other in ({**checkpoint.identity, key: 8}, without):
        with pytest.raises(ResumeError, match=f"{key}: {case.size} when checkpoint-3 was written, now"):
            refuse_changes(checkpoint, other)


def each_token_is_counted_once(folder: Path, case: Case) -> None:
    shared, one = (json.loads((folder / run / "run.json").read_text()) for run in ("whole", "one"))
    for figure in ("tokens", "supervised_tokens", "steps"):
        assert shared["train"][figure] == one["train"][figure] > 0
    assert (shared["hardware"]["processes"], shared["hardware"]["context_parallel"]) == (case.world, case.size)
    lines = [(folder / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "one")]
    for mine, other in zip(*([json.loads(line) for line in file] for file in lines), strict=True):
        for key in ("num_tokens", "mean_token_accuracy", "entropy", "eval_mean_token_accuracy", "eval_entropy"):
            assert mine.get(key) == pytest.approx(other.get(key), abs=1e-5) if key in other else key not in mine
    assert not (folder / "whole" / "rows.parquet").exists()


def answers_are_those_of_one_process(folder: Path) -> None:
    """While it trains, of prompts of unequal length: padding on the left, which takes a mask."""
    shared, one = ((folder / run / "samples.jsonl").read_text().splitlines() for run in ("whole", "one"))
    assert shared == one
    assert len(shared) == 3 * len(PROMPTS)


def attention_went_through_the_ring(seen: list[dict[str, Any]]) -> None:
    """In every process alike: 2 layers, 12 micro-batches and 2 evaluations at least, of a run in one go and another."""
    assert all(one == seen[0] for one in seen)
    assert seen[0]["forward"] > 2 * 2 * 12
    assert seen[0]["backward"] >= 2 * 2 * 12
    proofs = 2 * 3  # a layer each of three runs, before the first step
    assert seen[0]["evaluated"] >= proofs + 2 * 4  # and of two evaluations of two runs: validation rows are divided too
    assert seen[0]["masks_taken"] == 0  # else answers to several prompts at once would be wrong


def a_row_that_is_not_the_same_divided_stops_the_run(seen: list[dict[str, Any]], case: Case) -> None:
    """The proof before the first step, where processes hand nothing round, and where torch has no ring."""
    other, none = seen[0]["said"]
    assert f"--context-parallel {case.size}: " in other
    assert f"gives other log-probabilities where {case.size} processes share a row" in other
    assert "torch cannot divide the attention of" in none
    assert "does not have a sharding strategy registered" in none
