"""Runs in processes that share rows (context parallelism), on CPUs; a program, started as `fsdp.py` is, with its PLAN.

    accelerate launch --config_file CONTEXT.yaml tests/helpers/context.py PLAN.json

torch (2.13) has its ring for the kernels of CUDA alone. What is added here is the CPU's flash kernel: the ring itself,
what it hands round, merges and adds up, is torch's, as is the division of a batch. On a GPU torch's own kernels run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate.accelerator
import torch
from rich.console import Console
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

import instructft
from instructft.errors import ModelError
from tests.helpers import fsdp

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SEEN: dict[str, Any] = {"forward": 0, "evaluated": 0, "backward": 0, "masks_taken": 0, "said": []}


def ring_on_a_cpu(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """The ring around the CPU's kernel, as `_sdpa_handler` puts it around those of CUDA."""
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    mesh = given["query"].device_mesh
    given = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in given.items()}
    assert given.pop("attn_mask", None) is None
    if op is FORWARD:
        SEEN["forward"] += 1
        SEEN["evaluated"] += not torch.is_grad_enabled()
        found = ring._templated_ring_attention(mesh.get_group(), 2, op, **given)
    else:
        SEEN["backward"] += 1
        grad = given.pop("grad_out")
        found = ring._templated_ring_attention_backward(mesh.get_group(), 2, op, grad, "grad_out", **given)
    return tuple(DTensor.from_local(value, mesh, [Shard(2)], run_check=False) for value in found)


def alone(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """What a ring is that hands nothing round: each process attends to its own part of a row."""
    mesh = args[0].device_mesh
    found = op(*(value.to_local() if isinstance(value, DTensor) else value for value in args), **kwargs)
    return tuple(DTensor.from_local(value, mesh, [Shard(2)], run_check=False) for value in found)


def refused(plan: Path, handlers: dict[Any, Any]) -> str:
    """What a run says whose ring is another one, or none."""
    run = json.loads(plan.read_text())[0]
    for kernel in (FORWARD, BACKWARD):
        ring.custom_ops.pop(kernel, None)
    ring.custom_ops.update(handlers)
    recipe = instructft.load_recipe(run["recipe"], [f"output_dir={plan.parent / f'refused-{len(handlers)}'}"])
    try:
        instructft.train(recipe, console=Console(quiet=True))
    except ModelError as error:
        return str(error)
    return ""


def watch_masks() -> None:
    """Count models from whose attention accelerate takes the mask for good."""
    attach = accelerate.accelerator._attach_context_parallel_hooks

    def counted(model: Any) -> None:
        SEEN["masks_taken"] += 1
        attach(model)

    accelerate.accelerator._attach_context_parallel_hooks = counted


def main() -> None:
    watch_masks()
    ring.custom_ops.update({FORWARD: ring_on_a_cpu, BACKWARD: ring_on_a_cpu})
    fsdp.main()
    plan = Path(sys.argv[1])
    SEEN["said"] = [refused(plan, {FORWARD: alone, BACKWARD: alone}), refused(plan, {})]
    plan.with_name(f"seen-{os.environ['RANK']}.json").write_text(json.dumps(SEEN))


if __name__ == "__main__":
    main()
