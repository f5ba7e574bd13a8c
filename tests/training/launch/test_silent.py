"""A process that hangs is named within `train.ddp_timeout`, and the others end."""

from __future__ import annotations

from pathlib import Path

import pytest

from instructft.errors import InstructftError
from instructft.training.launch.silent import silent_named, state_of
from tests.helpers.processes import launch
from tests.helpers.telling import telling

ACCELERATE = Path(__file__).parents[3] / "recipes" / "accelerate"
PROGRAM = """
import sys, time, torch
from instructft.errors import InstructftError
from instructft.training.launch.silent import silent_named, state_of
state = state_of(cpu=True, seconds=2)
torch.distributed.barrier()
try:
    with silent_named(state, 2):
        if state.process_index == {silent}:
            time.sleep(4)
        else:
            torch.distributed.barrier()
except InstructftError as error:
    open(f"{folder}/said-{{state.process_index}}", "w").write(str(error))
"""


@pytest.mark.parametrize("silent", telling([0, 1], 1))
def test_the_process_that_hangs_is_named(tmp_path: Path, silent: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(silent=silent, folder=tmp_path))
    done = launch(str(ACCELERATE / "ddp.yaml"), [str(tmp_path / "program.py")], tmp_path, processes=2)
    (said,) = tmp_path.glob("said-*")
    assert said.name == f"said-{1 - silent}", done.stderr
    assert said.read_text().startswith(
        f"the process of rank {silent} of 2 did not answer for 2 s (train.ddp_timeout), so the others ended too"
    )


def test_of_one_process_every_error_keeps_its_words() -> None:
    state = state_of(cpu=True, seconds=1800)
    with pytest.raises(RuntimeError, match=r"^timed out$") as kept, silent_named(state, 1800):
        raise RuntimeError("timed out")
    assert not isinstance(kept.value, InstructftError)
