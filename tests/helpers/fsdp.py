"""Runs in processes that share the weights among them (FSDP2), on CPUs. Started by `test_fsdp.py`, as a program.

    accelerate launch --config_file FSDP.yaml tests/fsdp.py PLAN.json

PLAN is a list of {"recipe", "overrides", "state_dict", "stop"}: trained one after the other by the same processes, with
checkpoints whole (FULL_STATE_DICT) or in shards, stopped by SIGTERM to the last process in step `stop`. Each process
writes a line of JSON for each run beside PLAN: how its parameters lay, and how the run ended.

accelerate (1.15) decides by the device whether it shards: with `use_cpu` it leaves FSDP out. What is patched here is
this decision alone; sharding, collectives, saving and loading are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from rich.console import Console

import instructft
from instructft.errors import Stopped
from instructft.training.trainer import Trainer

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
TRAINING_STEP = Trainer.training_step


def watch(note: dict[str, Any], stop: int | None) -> None:
    """Note how the parameters lie in the first step; send SIGTERM in step `stop`."""

    def watched(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if "parameters" not in note:
            self.model.state_dict()  # an evaluation leaves weights gathered; this puts them back in shards
            found = list(self.model.parameters())
            note["parameters"] = len(found)
            note["sharded"] = sum(isinstance(p, torch.distributed.tensor.DTensor) for p in found)
            note["numbers"] = [sum(p.numel() for p in found), sum(p.to_local().numel() for p in found)]
            note["fsdp2"] = self.is_fsdp2
            note["states"] = len(self.optimizer.state)  # of a resumed run, they are there before its first step
        last = self.args.process_index == self.args.world_size - 1
        if self.state.global_step + 1 == stop and last and not self.stop.signal:
            os.kill(os.getpid(), signal.SIGTERM)
        return TRAINING_STEP(self, *args, **kwargs)

    Trainer.training_step = watched


def main() -> None:
    plan = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with plan.with_name(f"notes-{rank}.jsonl").open("w") as file:
        for run in json.loads(plan.read_text()):
            os.environ["FSDP_STATE_DICT_TYPE"] = run["state_dict"]
            note: dict[str, Any] = {}
            watch(note, run["stop"])
            recipe = instructft.load_recipe(run["recipe"], run["overrides"])
            try:
                result = instructft.train(recipe, console=Console(quiet=True))
                note["ended"] = "done"
                note["resumed"] = [entry["step"] for entry in result.facts["train"]["resumed"]]
            except Stopped as stopped:
                note["ended"] = str(stopped)
            file.write(json.dumps(note) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
