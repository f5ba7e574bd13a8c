"""What a checkpoint must hold so that a run can resume from it to the same bits.

A folder with weights alone loads, and trains on: with an optimizer that has forgotten its moments, a learning rate from
the start of the schedule, other dropout. Upstream resumes from such a folder without a word (transformers 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# In words -> what its files may be called: as the Trainer writes them, in shards (FSDP2), or by DeepSpeed, which keeps
# weights, optimizer and schedule of each process in one folder.
_DEEPSPEED = r"global_step\d+/.+"
_ONCE = {
    "weights": rf"(adapter_)?model[^/]*\.safetensors|pytorch_model[^/]*\.bin|pytorch_model_fsdp_\d+/.+|{_DEEPSPEED}",
    "the optimizer's state": rf"optimizer\.(pt|bin)|optimizer_\d+/.+|{_DEEPSPEED}",
    "the schedule's state": rf"scheduler\.pt|{_DEEPSPEED}",
    "the trainer's state": r"trainer_state\.json",
}


def missing(files: Iterable[str], processes: int) -> list[str]:
    """What a resumed run would need and is not among a checkpoint's files, in words; [] where all of it is.

    Args:
        files: paths inside the checkpoint.
        processes: that train together.

    >>> missing(["model.safetensors", "trainer_state.json", "scheduler.pt", "rng_state.pth", "progress_0.json"], 1)
    ["the optimizer's state"]
    """
    files = set(files)
    found = [what for what, names in _ONCE.items() if not any(re.fullmatch(names, file) for file in files)]
    for rank in range(processes):
        of = "" if processes == 1 else f" of process {rank}"
        if ("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth") not in files:
            found.append(f"random states{of}")
        if f"progress_{rank}.json" not in files:
            found.append(f"progress{of}")
    return found
