"""Two processes that are stopped in every epoch, at seeded steps, end with the bits of those that never were."""

from __future__ import annotations

import json
import random
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import BATTERY
from tests.helpers.processes import launch
from tests.integration.test_distributed import DDP, metrics

EPOCHS, STEPS = 3 if BATTERY else 2, 7  # of 54 rows, 8 a step: the last one of an epoch is not full
RECIPE = """
model:
  config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, n_positions: 128, resid_pdrop: 0.3}}
  tokenizer: quickstart
data: {{datasets: [{{path: rows.jsonl{streaming}}}], template: instruction, max_length: {length}, packing: {packing},
        splits: {{validation: {held_out}}}}}
train:
  {{max_steps: {steps}, per_device_train_batch_size: {rows}, gradient_accumulation_steps: 2, logging_steps: 1,
   save_steps: 100, eval_steps: 3, use_cpu: true, learning_rate: 1e-2, report_to: none{more}}}
output_dir: {out}
"""
KINDS = {
    "group_by_length": {},
    "packed": {"packing": "true", "rows": 1},
    "streaming": {"streaming": ", streaming: true", "held_out": 0, "more": ", eval_strategy: 'no'"},
}
if BATTERY:
    KINDS |= {  # what orders rows at random or not at all is one process' order dealt out: tests/data/test_row_order.py
        "random": {"more": ", train_sampling_strategy: random"},
        "sequential": {"more": ", train_sampling_strategy: sequential"},
        "dispatched": {"more": ", accelerator_config: {dispatch_batches: true, split_batches: true}"},
        "split": {"more": ", accelerator_config: {split_batches: true}"},
        "uneven": {"more": ", dataloader_drop_last: true"},
        "workers": {"more": ", dataloader_num_workers: 1"},
        "random-packed": {"packing": "true", "rows": 1, "more": ", train_sampling_strategy: random"},
        "streaming-packed": {"streaming": ", streaming: true", "held_out": 0, "packing": "true", "rows": 1,
                             "more": ", eval_strategy: 'no'"},
    }  # fmt: skip

# Each run by the same processes, since they take longer to start than to train: whole, then with a stop at each step
# that is named, a SIGTERM to the second process alone.
DRIVER = """
import contextlib, json, os, signal, sys
import instructft
from instructft.data.batches.parts import ONCE_MORE
from instructft.errors import Stopped
from instructft.training.trainer import Trainer
from rich.console import Console
step, stop = Trainer.training_step, None
def watched(self, *args, **kwargs):
    global stop
    if stop == self.state.global_step + 1:
        stop = None  # a second signal would stop it at once
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)
Trainer.training_step = watched
ONCE_MORE["cpu"] = 1  # rows of unlike length are trained in parts, of which each process has its own number
for recipe, stops in json.loads(sys.argv[1]) if __name__ == "__main__" else ():
    loaded = instructft.load_recipe(recipe)
    for stop in (*stops, None):
        with contextlib.suppress(Stopped):
            instructft.train(loaded, console=Console(quiet=True))
"""


def rows(path: Path) -> None:
    """60 rows of uneven length."""
    rows = [
        {"instruction": f"Say number {i * 7919}.", "output": " ".join([f"{i * 104729}"] * (1 + i % 7))}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.timeout(2400 if BATTERY else 600)  # eleven kinds
def test_two_processes_stopped_in_every_epoch_go_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "rows.jsonl")
    chosen = random.Random(0)
    runs, stops = [], {}
    for kind, changes in KINDS.items():
        stops[kind] = [epoch * STEPS + chosen.randrange(1, STEPS) for epoch in range(EPOCHS)]
        for name, at in (("whole", []), ("stopped", stops[kind])):
            values = {"streaming": "", "length": 128, "packing": "false", "held_out": 0.1, "rows": 2, "more": "",
                      "steps": EPOCHS * STEPS, "out": f"{kind}-{name}", **changes}  # fmt: skip
            recipe = tmp_path / f"{kind}-{name}.yaml"
            recipe.write_text(RECIPE.format(**values))
            runs.append((str(recipe), at))
    done = launched(tmp_path, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    different = []
    for kind in KINDS:
        whole, stopped = tmp_path / f"{kind}-whole", tmp_path / f"{kind}-stopped"
        facts = json.loads((stopped / "run.json").read_text())["train"]
        assert [resume["step"] for resume in facts["resumed"]] == stops[kind]
        if (whole / "model.safetensors").read_bytes() != (stopped / "model.safetensors").read_bytes():
            different.append(kind)
        elif logged(whole) != logged(stopped):
            different.append(f"{kind} (metrics)")
        elif kind != "streaming" and len({(run / "rows.parquet").read_bytes() for run in (whole, stopped)}) > 1:
            different.append(f"{kind} (rows)")
    assert different == []


def launched(folder: Path, runs: list[tuple[str, list[int]]], text: str = DRIVER) -> CompletedProcess[str]:
    (folder / "driver.py").write_text(text)
    (folder / "ddp.yaml").write_text(DDP)
    return launch(str(folder / "ddp.yaml"), [str(folder / "driver.py"), json.dumps(runs)], folder)


def logged(folder: Path) -> list[dict[str, float]]:
    """All that was logged, less what tells the time."""
    return [{k: v for k, v in line.items() if "second" not in k and "time" not in k} for line in metrics(folder)]
