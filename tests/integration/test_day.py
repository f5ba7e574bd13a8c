"""A day of a run in short: whatever happens to what surrounds it, it ends with the bits of the run in peace."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.day import FAULTS
from tests.helpers.device import here
from tests.helpers.processes import python

# The day, in seconds. From a minute on every process is started anew, as a shell does it.
SECONDS = float(os.environ.get("INSTRUCTFT_DAY", "600" if int(os.environ.get("INSTRUCTFT_KILLS", "0")) > 3 else "6"))
SEED = int(os.environ.get("INSTRUCTFT_DAY_SEED", "7"))
LONG = SECONDS >= 60

RECIPE = f"""
model:
  config: {{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16, n_positions: 64}}
  tokenizer: quickstart
data:
  datasets: [{{name: quickstart, rows: 60}}]
  template: instruction
  max_length: 64
  splits: {{validation: 0.1}}
train:
  max_steps: {min(1200, int(SECONDS)) if LONG else 40}
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  logging_steps: {2 if LONG else 1}
  eval_steps: {20 if LONG else 10}
  save_steps: {5 if LONG else 2}
  save_total_limit: 2
  learning_rate: 1e-2
  use_cpu: true
  report_to: none
evaluation:
  rows: 0  # how many are answered is decided by a share of the time, and so by the clock
"""


@pytest.mark.timeout(300 + 4 * SECONDS)
def test_a_day_of_faults_ends_with_the_bits_of_a_day_in_peace(tmp_path: Path) -> None:
    mount = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("this machine lets nobody mount a tmpfs")
    except OSError:
        pytest.skip("there is no unshare here")
    (tmp_path / "day.yaml").write_text(here(RECIPE))
    program = str(Path(__file__).parents[1] / "helpers" / "day.py")
    how = "exec" if LONG else "fork"
    done = python([program, str(tmp_path / "day.yaml"), str(tmp_path / "out"), str(SECONDS), str(SEED), how], tmp_path,
                  HF_HUB_OFFLINE="0", COLUMNS="200")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    if kept := os.environ.get("INSTRUCTFT_DAY_LOG"):
        summary = {name: value for name, value in told.items() if name not in ("whole", "run")}
        Path(kept).write_text(json.dumps(summary, indent=1) + "\n")
    assert not told["odd"], json.dumps(told["odd"], indent=1)
    assert set(told["came"]) >= set(FAULTS)
    assert told["clock moved"]
    assert told["run"]["files"] == told["whole"]["files"], told["came"]
    assert told["run"]["logged"] == told["whole"]["logged"]
    assert told["pushed"] == told["whole"]["files"]["model.safetensors"]
