"""What a run on several devices would take, on paper: operations, bytes between devices, seconds of a step, hours.

    operations of a token = 4 × parameters + 2 × those that are trained: forward, backward through and to the weights
    bytes of a device     = what a ring of N moves: (N - 1) / N of all that is gathered and reduced
    seconds of a step     = the longer of both, since they overlap

Cards do three tenths of their peak so, as published runs do (`EFFICIENCY`). Not counted: attention's own operations,
which are few where documents are short, and what checkpointing computes again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Share of the peak of dense bfloat16 products. torchtune's published runs on 8 H100, in tokens/s of a GPU: Llama 3.1 8B
# full 5,762, compiled 6,667, and 70B LoRA 1,092, which are 0.28, 0.32 and 0.31.
EFFICIENCY = 0.30
LINK_SHARE = 0.8  # of a link's rate that a ring reaches
IN_A_MACHINE = 8  # devices; beyond them the network between machines is the narrowest part
NETWORK = 50e9  # bytes/s of a device, 400 Gbit/s


class Card(NamedTuple):
    """A kind of GPU: operations/s of dense bfloat16 products, and bytes/s to its neighbours in one direction."""

    peak: float
    link: float


CARDS = {
    "h100": Card(989e12, 450e9),
    "h200": Card(989e12, 450e9),
    "a100": Card(312e12, 300e9),
}


def on_paper(needs: dict[str, Any], strategy: str, card: str = "h100", element: int = 2) -> dict[str, Any]:
    """Time of a run on the devices that an estimate is of.

    Args:
        needs: `parameters` and `schedule`, as `instructft.models.memory.estimate` gives them.
        strategy: ddp, fsdp2, zero2 or zero3.
        element: bytes of a weight as it computes.

    Example::

        llama = {"parameters": {"all": 8_030_261_248, "trainable": 8_030_261_248}, "schedule": schedule}  # 8 devices
        on_paper(llama, "fsdp2")["tokens_per_second_per_device"]
        # 6158.0
    """
    counts, schedule = needs["parameters"], needs["schedule"]
    devices, batches = schedule["processes"], schedule["gradient_accumulation_steps"]
    kind = CARDS[card]
    operations = (4 * counts["all"] + 2 * counts["trainable"]) * schedule["tokens_per_step"] / devices
    moved = bytes_between(counts, strategy, batches, element) * (devices - 1) / devices
    link = min(kind.link, NETWORK if devices > IN_A_MACHINE else kind.link) * LINK_SHARE
    computing, communicating = operations / (EFFICIENCY * kind.peak), moved / link
    seconds = max(computing, communicating)
    return {
        "card": card,
        "operations": operations,
        "bytes_between_devices": moved,
        "computing_seconds": computing,
        "communicating_seconds": communicating,
        "step_seconds": seconds,
        "tokens_per_second_per_device": schedule["tokens_per_step"] / devices / seconds,
        "seconds": seconds * schedule["steps"],
    }


def bytes_between(counts: dict[str, int], strategy: str, batches: int, element: int) -> float:
    """Bytes of weights and gradients that go through a ring in one step, were it infinitely long.

    >>> bytes_between({"all": 100, "trainable": 100}, "ddp", 1, 2)  # gradients in float32, reduced and handed out
    800
    """
    gradients = 4 * counts["trainable"]
    if strategy == "ddp":  # once a step
        return 2 * gradients
    if strategy == "zero2":  # gradients each batch, the new weights once
        return batches * gradients + element * counts["trainable"]
    return batches * (2 * element * counts["all"] + gradients)
