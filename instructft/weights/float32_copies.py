"""Float32 copies of bfloat16 weights, in the optimizer: it moves the copies, and rounds them into the weights.

In bfloat16, with its 8 bits, a weight of 1.0 has neighbours at a distance of 0.004 and 0.008, and an update of 1e-4 is
rounded away, today and on every other day. Added to a copy in float32 it stays (Micikevicius et al., 2018:
1710.03740), and no weight has to be cast in a step, as autocast does.

    backward ─► weight.grad, summed in float32 ─► optimizer.step(), which knows the copies alone ─► weight, to nearest
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from instructft.errors import CheckpointError
from instructft.weights.rounding import STOCHASTIC, Rounder

KEY = "float32_copies"  # of the optimizer's state_dict: the copies, in the order of its groups
_PIECE = 1 << 24  # numbers that are rounded at once
CAN_SUM = hasattr(torch.Tensor, "grad_dtype")  # torch 2.10: a gradient may be wider than its weight


class Float32Copies:
    """Puts copies in the place of an optimizer's narrow weights, by its public hooks; its type and state stay its own.

    Gradients of micro-batches add up in float32, unless they are averaged over processes: DDP's buckets are as wide as
    the weights (torch 2.13). A step that the optimizer does not take leaves the copies and the weights as they are.

    Args:
        optimizer: just made: any that keeps its state in tensors of its parameters, and makes it at the first step.
        float32_gradients: sum them in float32, where torch can.

    Example::

        weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        copies = Float32Copies(optimizer := torch.optim.SGD([weight], lr=1e-3))
        weight.sum().backward()
        optimizer.step()
        copies.pairs[0][1], weight  # tensor([0.9990, 0.9990]), tensor([1., 1.], dtype=torch.bfloat16)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, float32_gradients: bool = True):
        self.float32_gradients = float32_gradients and CAN_SUM
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # weight, copy
        for group in optimizer.param_groups:
            group["params"] = [self._copied(weight) if is_narrow(weight) else weight for weight in group["params"]]
        optimizer.register_step_pre_hook(self._hand_over)
        optimizer.register_step_post_hook(self._round)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _copied(self, weight: Any) -> torch.Tensor:
        copy = torch.nn.Parameter(weight.detach().float())
        if self.float32_gradients:
            weight.grad_dtype = torch.float32
        self.pairs.append((weight, copy))
        return copy

    def _hand_over(self, *_: Any) -> None:
        for weight, copy in self.pairs:  # None passes the weight over, as any optimizer does
            copy.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def _round(self, *_: Any) -> None:
        for _, copy in self.pairs:
            copy.grad = None  # the trainer frees the weights' own
        if self.pairs:
            torch._foreach_copy_(*map(list, zip(*self.pairs, strict=True)))

    def _save(self, _: Any, state: dict[str, Any]) -> None:
        state[KEY] = [copy.detach() for _, copy in self.pairs]

    def _load(self, _: Any, state: dict[str, Any]) -> None:
        if KEY not in state:
            raise CheckpointError(
                "the optimizer's state holds no float32 copies of the weights: it is of a run without "
                "train.float32_copies"
            )
        self.put_back(state.pop(KEY))

    @torch.no_grad()
    def put_back(self, copies: Sequence[torch.Tensor]) -> None:
        """Let the copies be these, and the weights what they round to."""
        for (_, copy), value in zip(self.pairs, copies, strict=True):
            copy.copy_(value)
        self._round()

    def facts(self) -> dict[str, Any]:
        """For `run.json`: weights that have a copy, bytes of the copies, and in what gradients were summed."""
        return {
            "weights": len(self.pairs),
            "bytes": sum(copy.nbytes for _, copy in self.pairs),
            "gradients": "float32" if self.float32_gradients else "bfloat16",
        }

    def read(self, file: Path) -> None:
        """The copies of a checkpoint: `file` is where its optimizer's state lies."""
        self.put_back(torch.load(file, map_location="cpu", weights_only=True, mmap=True)[KEY])

    @torch.no_grad()
    def rounded_by_chance(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The model's `state_dict` on the CPU, of the copies: small changes are kept on average (`weights.rounding`).

        The weights themselves, rounded to nearest, are what the next step computes with; most of what was trained would
        be missing in them.
        """
        copies = {id(weight): copy for weight, copy in self.pairs}
        made: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
        found = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in made:
                copy = copies.get(id(tensor))
                made[id(tensor)] = tensor.detach() if copy is None else _by_chance(name, copy, tensor.dtype)
            found[name] = made[id(tensor)]
        return found


def is_narrow(weight: torch.Tensor) -> bool:
    """Whether a weight has fewer bits than a copy would."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize < 4


def in_float32(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What an optimizer with copies moves in place of these weights: shapes alone (meta tensors), for estimates."""
    return [torch.empty_like(w, dtype=torch.float32, device="meta") if is_narrow(w) else w for w in weights]


def _by_chance(name: str, copy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = Rounder(name, dtype, STOCHASTIC)
    return torch.cat([rounded(piece.cpu()) for piece in copy.detach().flatten().split(_PIECE)]).view(copy.shape)
