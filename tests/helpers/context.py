"""Runs in processes that share rows (context parallelism), on CPUs; a program, started as `fsdp.py` is, with its PLAN.

    accelerate launch --config_file CONTEXT.yaml tests/helpers/context.py PLAN.json

torch (2.13) has its ring for the kernels of CUDA alone. What is added here is the CPU's flash kernel: the ring itself,
what it hands round, merges and adds up, is torch's, as is the division of a batch. On a GPU torch's own kernels run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from tests.helpers import fsdp

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CALLS = {"forward": 0, "backward": 0}


def ring_on_a_cpu(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """The ring around the CPU's kernel, as `_sdpa_handler` puts it around those of CUDA."""
    given = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=False)} | kwargs
    mesh = given["query"].device_mesh
    given = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in given.items()}
    assert given.pop("attn_mask", None) is None
    if op is FORWARD:
        CALLS["forward"] += 1
        found = ring._templated_ring_attention(mesh.get_group(), 2, op, **given)
    else:
        CALLS["backward"] += 1
        grad = given.pop("grad_out")
        found = ring._templated_ring_attention_backward(mesh.get_group(), 2, op, grad, "grad_out", **given)
    return tuple(DTensor.from_local(value, mesh, [Shard(2)], run_check=False) for value in found)


ring.custom_ops.update({FORWARD: ring_on_a_cpu, BACKWARD: ring_on_a_cpu})


if __name__ == "__main__":
    fsdp.main()
