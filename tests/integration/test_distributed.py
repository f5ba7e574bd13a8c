"""Two real processes (gloo on the CPU) against one: the same losses and weights, and data that is prepared once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import instructft
from instructft.report.row_file import read_rows
from tests.conftest import OWN_PORT
from tests.helpers.processes import launch

RECIPE = """
model:
  config: {{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128,
            resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}}
  tokenizer: quickstart
  dtype: {dtype}
data: {{datasets: [{{path: {data}{streaming}}}], template: instruction, max_length: 128,
        splits: {{validation: {held_out}}}}}
train:
  {{max_steps: 4, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, logging_steps: 1, use_cpu: true,
   optim: sgd, learning_rate: 0.5, evaluation_budget: null{more}}}
output_dir: {out}
{judged}
"""
pytestmark = pytest.mark.timeout(400)
DDP = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"

# The command, with a note of each process that encodes rows; STOP=RANK:STEP sends one process SIGTERM in a step.
DRIVER = """
import os, signal, sys, time
from instructft.data.tokenize import Batches
from instructft.training.trainer import Trainer
step = Trainer.training_step
def watched(self, *args, **kwargs):
    if os.environ.get("STOP") == f"{{os.environ['RANK']}}:{{self.state.global_step}}":
        del os.environ["STOP"]  # a second signal would stop it at once
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("SLOW", "0")))
    return step(self, *args, **kwargs)
Trainer.training_step = watched
encode = Batches.__call__
def noted(self, table, numbers):
    with open(recipe + ".log", "a") as file:
        file.write(f"{{os.environ['RANK']}} {{len(numbers)}}\\n")
    return encode(self, table, numbers)
Batches.__call__ = noted
from instructft.cli import main
for recipe in {recipes!r}:  # by the same processes: they take longer to start than to train
    sys.argv = ["instructft", "train", recipe]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def written(folder: Path, text: str = RECIPE, **recipes: dict[str, Any]) -> list[str]:
    """Recipes for two processes, 2 rows a micro-batch, 8 a step: a configuration, and a program that trains them."""
    for name, values in recipes.items():
        (folder / f"{name}.yaml").write_text(
            text.format(out=folder / name, **{"judged": "", "dtype": "auto", "more": "", **values})
        )
    driver = folder / f"{'-'.join(recipes)}.py"
    driver.write_text(DRIVER.format(recipes=[str(folder / f"{name}.yaml") for name in recipes]))
    (folder / "ddp.yaml").write_text(DDP)
    return [str(folder / "ddp.yaml"), str(driver)]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def one_process(two: Path, rows: int, accumulation: int) -> Path:
    """The same recipe on one process, its global batch divided in another way."""
    out = two.with_name(f"{two.name}-{rows}x{accumulation}")
    batch = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={accumulation}"]
    recipe = instructft.load_recipe(two.with_suffix(".yaml"), [*batch, f"output_dir={out}"])
    instructft.train(recipe, console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of uneven length."""
    path = tmp_path_factory.mktemp("distributed") / "rows.jsonl"
    rows = [
        {"instruction": f"Say number {i * 7919}.", "output": " ".join([f"{i * 104729}"] * (1 + i % 7))}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one(data: Path) -> None:
    """A run and one on a stream, in one launch, since its start takes longer; looked at against one process."""
    folder = data.parent
    (folder / "mine.py").write_text("def length(prediction, reference, row): return len(prediction) / len(reference)")
    judged = "evaluation: {rows: 5, metrics: [mine.py:length, token_f1]}"  # of six rows, so that one process has more
    config, driver = written(
        folder,
        rows={"data": data, "streaming": "", "held_out": 0.1, "judged": judged},
        stream={"data": data, "streaming": ", streaming: true", "held_out": 0},
        copies={
            "data": data, "streaming": "", "held_out": 0, "dtype": "bfloat16", "more": ", float32_copies: true"
        },
    )  # fmt: skip
    done = launch(config, [driver], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    float32_copies_follow_the_mean_of_both(folder / "copies")
    one = one_process(folder / "rows", 4, 2)
    losses_and_weights_are_those_of_one_process(folder / "rows", one)
    rows_have_the_history_of_one_process(folder / "rows", one)
    the_metadata_is_written_once_and_counts_both_processes(folder / "rows", one)
    the_data_is_prepared_by_one_process_only(folder / "rows.yaml.log")
    a_stream_is_divided_among_processes(folder / "stream")


def float32_copies_follow_the_mean_of_both(two: Path) -> None:
    """But for rounding: DDP averages gradients in bfloat16, and one process sums them in float32."""
    one = one_process(two, 4, 2)
    facts = [json.loads((run / "run.json").read_text())["float32_copies"]["gradients"] for run in (two, one)]
    assert facts == ["bfloat16", "float32"]
    assert "gradients are summed in bfloat16" in (two / "train.log").read_text()
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)
    assert losses[0][-1] < losses[0][0] - 0.05
    states = [torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True) for run in (two, one)]
    began = torch.load(two / "checkpoint-1" / "optimizer.pt", weights_only=True)["float32_copies"]
    mine, other, first = (torch.cat([c.flatten() for c in found]) for found in (
        *(state["float32_copies"] for state in states), began))  # fmt: skip
    assert float((mine - other).norm()) < 0.03 * float((other - first).norm())


def losses_and_weights_are_those_of_one_process(two: Path, one: Path) -> None:
    """However the eight rows of a step are divided: two processes, or one with 1, 2 or 4 micro-batches."""
    weights = load_file(two / "model.safetensors")
    for other in (one, one_process(two, 8, 1), one_process(two, 2, 4)):
        same_losses(two, other, "loss", "eval_loss")
        answers = [
            [(line["eval_length"], line["eval_answered"]) for line in metrics(run) if "eval_length" in line]
            for run in (two, other)
        ]
        assert answers[0] == answers[1]  # of which each process has its part
        assert len(answers[0]) == 4
        others = load_file(other / "model.safetensors")
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, others[name], atol=2e-6, rtol=0)


def rows_have_the_history_of_one_process(two: Path, one: Path) -> None:
    """A row is seen by either process, in one epoch by this one and in the next by that one."""
    ours, theirs = (read_rows(run).columns for run in (two, one))
    assert (ours["step_last"] > 0).sum() > 30
    for name in ("id", "row", "tokens", "supervised_tokens", "step_first", "step_last"):
        assert ours[name].tolist() == theirs[name].tolist(), name
    for name in ("loss_first", "loss_last"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)


def a_stream_is_divided_among_processes(two: Path) -> None:
    """The rows of a step are those of one process: none is trained twice, none passed over."""
    one = one_process(two, 4, 2)
    same_losses(two, one, "loss")
    facts, other = (json.loads((run / "run.json").read_text())["train"] for run in (two, one))
    assert {k: facts[k] for k in ("tokens", "supervised_tokens")} == {
        k: other[k] for k in ("tokens", "supervised_tokens")
    }


LASTING = (
    RECIPE.replace("resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0", "resid_pdrop: 0.3")
    .replace("max_steps: 4", "max_steps: 12, save_steps: 5")
    .replace("optim: sgd, learning_rate: 0.5", "learning_rate: 1e-2")
)


@pytest.mark.battery  # through the launcher: test_launch.py
def test_two_processes_that_were_stopped_go_on_bit_for_bit(data: Path) -> None:
    """SIGTERM to one of two, then to the launcher; dropout, and a random state of its own on each."""
    folder, given = data.parent, {"data": data, "streaming": "", "held_out": 0.1}
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    done = run([*accelerate, *written(folder, LASTING, whole=given)])
    assert done.returncode == 0, done.stderr[-3000:]
    whole, out = folder / "whole", folder / "stopped"
    command = [*accelerate, *written(folder, LASTING, stopped=given)]

    done = run(command, STOP="1:2")
    assert done.returncode != 0
    assert "stopped by SIGTERM; checkpoint-3 is saved" in done.stdout + done.stderr
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3"]
    assert not (out / "run.json").exists()

    with subprocess.Popen(
        command, env={**os.environ, **OWN_PORT, "OMP_NUM_THREADS": "1", "SLOW": "0.3"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    ) as launcher:  # fmt: skip
        wait_for(lambda: metrics(out)[-1]["step"] >= 4)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        launcher.terminate()
        launcher.wait(60)
    assert len(workers) >= 2
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), seconds=5)
    assert not (out / "run.json").exists()

    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads((out / "run.json").read_text())["train"]["resumed"]
    assert first["step"] == 3 < second["step"] < 12
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    losses = [[(line["step"], line["loss"]) for line in metrics(run) if "loss" in line] for run in (out, whole)]
    assert losses[0] == losses[1]


def wait_for(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def same_losses(two: Path, one: Path, *names: str) -> None:
    for name in names:
        losses = [[record[name] for record in metrics(run) if name in record] for run in (two, one)]
        assert len(losses[0]) == 4
        assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def the_metadata_is_written_once_and_counts_both_processes(two: Path, one: Path) -> None:
    facts, other = (json.loads((run / "run.json").read_text()) for run in (two, one))
    assert facts["hardware"]["processes"] == 2
    assert facts["data"]["fingerprint"] == other["data"]["fingerprint"]
    for name in ("tokens", "supervised_tokens", "steps"):
        assert facts["train"][name] == other["train"][name]
    assert metrics(two)[-1]["num_tokens"] == metrics(one)[-1]["num_tokens"] == facts["train"]["tokens"]
    assert [record["step"] for record in metrics(two)] == [1, 2, 3, 4]


def the_data_is_prepared_by_one_process_only(log: Path) -> None:
    encoded = [line.split() for line in log.read_text().splitlines()]
    assert {rank for rank, _ in encoded} == {"0"}
    assert sum(int(rows) for _, rows in encoded) == 60
