"""Only kernels whose results never vary: on a GPU too, the same run gives the same bits, and so does a resumed one.

A GPU adds up by atomics wherever order does not matter to the sum, and it matters to the last bit: flash attention's
backward pass, the gradient of embeddings, indices that repeat. A CPU needs none of this.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from instructft.errors import ModelError

COST = (
    "deterministic: kernels whose results never vary; attention's backward pass takes longer and more memory, and an "
    "operation that has no such kernel ends the run"
)
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it as it is first used; its results vary with its work space


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Hold torch to such kernels, and leave its settings as they were. Before the first use of a GPU.

    Raises:
        ModelError: an operation has none.
    """
    settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn
    before, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # shows who reads what nobody wrote, for a price
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise ModelError(
            f"train.deterministic: {found[1]} has no kernel here whose results never vary; take train.deterministic "
            "out, or train on the CPU (train.use_cpu=true)"
        ) from error
    finally:
        torch.use_deterministic_algorithms(settings[0], warn_only=settings[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = before
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
