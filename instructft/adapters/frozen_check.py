"""Proves that a run trained the adapter and nothing else: every frozen weight is the same at the end, bit for bit.

Of a quantized weight its packed bytes are compared and all that they are unpacked with, which is stricter than what
they stand for, and costs no unpacking. The bytes mean the same before and after, since their layout is fixed
(`quantization.fix_layout`); where a kernel has laid them out anew, that is said, and not taken for a change.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from transformers import TrainerCallback

from instructft.adapters.frozen_pairs import BENEATH
from instructft.adapters.lora import count_parameters
from instructft.adapters.quantization import packed_for_kernel
from instructft.errors import InstructftError
from instructft.weights.weight_files import without_wrappers

_CHUNK = 1 << 22  # numbers at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ADAPTER = re.compile(r"\.lora_|\.trainable_tokens_delta\.|\.modules_to_save\.")


class AdapterProof(TrainerCallback):
    """Looks at all weights before the first step and after the last.

    Args:
        model: with its adapter.
        may_stay: names of weights that are trained and need not move, such as the rows of tokens that do not occur.

    Example::

        proof = AdapterProof(model)                 # doctest: +SKIP
        trainer.add_callback(proof); trainer.train()
        proof.verdict(model)
        # {'trainable': 2360832, 'total': 126802176, 'moved': True, 'base_unchanged': True}
    """

    def __init__(self, model: Any, may_stay: Collection[str] = ()):
        self._before = {name: (digest(tensor), tensor.dtype) for name, tensor in _tensors(model)}
        # by name and not by `requires_grad`, so that a base that is trained by mistake is found too
        biases = getattr(model.peft_config["default"], "bias", "none") != "none"
        names = {without_wrappers(name) for name, _ in model.named_parameters()}
        self._frozen = {n for n in names if not _ADAPTER.search(n) and not (biases and n.endswith(".bias"))}
        self._frozen |= {n for n in names if f".{BENEATH}." in n}  # pairs that stay, beside those that are trained
        self._may_stay = frozenset(may_stay)
        self._counts = count_parameters(model)
        self._rate = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note the highest learning rate: without one above 0 nothing can move."""
        self._rate = max([self._rate, *(float(group["lr"]) for group in optimizer.param_groups)])

    def verdict(self, model: Any, *, judge: bool = True) -> dict[str, Any]:
        """What moved. In a distributed run every process must ask, and the first one judges: others may hold no
        weights before they are sharded.

        Returns:
            `trainable` and `total` parameters, `moved` (False only where every learning rate was 0), `base_unchanged`,
            and where there are some, the names of those that `stayed` and might.

        Raises:
            InstructftError: a weight of the base changed, or a part of the adapter did not.
        """
        changed = set()
        for name, tensor in _tensors(model):
            value, dtype = self._before.get(name, (None, tensor.dtype))
            if value is None or digest(tensor.to(dtype)) != value:  # FSDP2 may hold a bfloat16 weight as float32
                changed.add(name)
        missing = set(self._before) - {name for name, _ in _tensors(model)}
        touched = sorted((changed | missing) & {name for name in self._before if _owner(name) in self._frozen})
        if touched and judge:
            raise InstructftError(
                f"the base changed while its adapter was trained: {len(touched)} weights, the first {touched[0]}. "
                "The adapter would not fit the base on disk"
            )
        must = [name for name in self._before if name not in self._frozen and _learns(name)]
        stayed = sorted(set(must) - changed)
        still = [name for name in stayed if name not in self._may_stay]
        if must and stayed == sorted(must):
            still = stayed
        if still and self._rate > 0 and judge:
            raise InstructftError(
                f"the adapter did not move: {len(still)} of {len(must)} tensors are what they were before the first "
                f"step, the first {still[0]}. It got no gradient (or every step overflowed, with train.fp16)"
            )
        trainable, total = self._counts
        verdict = {"trainable": trainable, "total": total, "moved": not still, "base_unchanged": True}
        return {**verdict, "stayed": stayed} if stayed and not still else verdict


class FrozenProof:
    """The same for a model that is trained without an adapter, and not whole: what is frozen stays as it is.

    Args:
        model: with `requires_grad` as training has it.
    """

    def __init__(self, model: Any):
        self._frozen = {without_wrappers(name) for name, weight in model.named_parameters() if not weight.requires_grad}
        self._before = {n: (digest(tensor), tensor.dtype) for n, tensor in _tensors(model) if n in self._frozen}

    def verdict(self, model: Any, *, judge: bool = True) -> dict[str, Any]:
        """How many weights stayed as they were; asked by every process, judged by the first.

        Raises:
            InstructftError: one of them changed.
        """
        now = {name: tensor for name, tensor in _tensors(model) if name in self._before}
        changed = [n for n, (value, dtype) in self._before.items() if n not in now or digest(now[n].to(dtype)) != value]
        if changed and judge:
            raise InstructftError(
                f"weights that are frozen changed in training: {len(changed)} of {len(self._before)}, the first "
                f"{changed[0]}. The model is not the one that was asked for"
            )
        return {"tensors": len(self._before), "unchanged": True}


def in_words(verdict: dict[str, Any]) -> str:
    """A line for the terminal.

    >>> in_words({"trainable": 10, "total": 1000, "moved": True, "base_unchanged": True})
    'the adapter moved (10 of 1,000 parameters), the base did not (compared bit by bit)'
    """
    share = f"{verdict['trainable']:,} of {verdict['total']:,} parameters"
    if not verdict["moved"]:
        return f"the adapter ({share}) is what it was at the start: the learning rate was 0 in every step"
    stayed = f", all but {len(verdict['stayed'])} tensors" if verdict.get("stayed") else ""
    return f"the adapter moved ({share}{stayed}), the base did not (compared bit by bit)"


def digest(tensor: torch.Tensor) -> tuple[int, int]:
    """Two sums over a tensor's bits, plain and weighted by position, modulo 2^64. Runs where the tensor lies.

    >>> digest(torch.tensor([1, 2], dtype=torch.int32))
    (3, 5)
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    places = torch.arange(1, min(_CHUNK, len(bits)) + 1, device=bits.device)
    total = bits.new_zeros(2, dtype=torch.int64)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        plain = part.sum()
        total += torch.stack([plain, (part * places[: len(part)]).sum() + start * plain])
    first, second = total.tolist()
    return first, second


def _tensors(model: Any) -> Any:
    """(name, tensor) of every parameter, whole, and of the scales that belong to a quantized one."""
    from peft.utils.integrations import gather_params_ctx

    for name, parameter in model.named_parameters():
        name = without_wrappers(name)
        with gather_params_ctx(parameter):  # DeepSpeed ZeRO-3 keeps a share of each
            data = parameter.data
            yield name, data.full_tensor() if hasattr(data, "full_tensor") else data  # FSDP2
    for name, module in model.named_modules():
        # 4 bit: FSDP2 makes plain parameters of the packed weights, and the layer alone keeps their scales then
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None) or module.__dict__.get("quant_state")
        if state is None:
            continue
        name = f"{without_wrappers(name)}.weight"
        if packed_for_kernel(state):
            raise InstructftError(
                f"{name} lies in memory as a kernel of bitsandbytes for this CPU wants it, expected as it was packed: "
                "whether the base changed cannot be said. Load the model with instructft, which fixes the layout"
            )
        yield f"{name}:absmax", state.absmax
        yield f"{name}:code", state.code
        if state.state2 is not None:
            yield f"{name}:absmax2", state.state2.absmax
            yield f"{name}:code2", state.state2.code
            yield f"{name}:offset", state.offset


def _owner(name: str) -> str:
    return name.partition(":")[0]


def _learns(name: str) -> bool:
    """Whether a tensor must change in any run: B, and rows of new tokens. (A moves too, but only after B.)"""
    return "lora_B" in name or "lora_embedding_B" in name or "trainable_tokens_delta" in name
