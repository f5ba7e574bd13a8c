"""Output heads against each other: the loss of supervised positions and its gradient, forward and backward.

    python benchmarks/heads.py [--shape gpt2] [--steps 5] [--seconds 70] [--tiny]

Rows are hidden states in float32 under bfloat16 autocast, as training has them; a frozen head is in bfloat16, as below
an adapter. Each head is held against TRL's: how far apart the loss and both gradients are, as a share. Heads whose
library is not here are left out and named. On a CPU, and with `--tiny`, the figures are no speeds.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from instructft.models.kernels import gpu_head
from instructft.prompt.loss_mask import IGNORE_INDEX

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # rows, weight, labels -> sum of -log p

# vocabulary, width, supervised positions, whether the head is frozen
SHAPES: dict[str, tuple[int, int, int, bool]] = {
    "gpt2": (50_257, 768, 20_480, False),
    "qwen": (151_936, 1024, 10_240, False),
    "llama-lora": (128_256, 2048, 8192, True),
    "tiny": (211, 16, 128, False),
}


def trl(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """TRL's fused head; it scores supervised rows alone, so those that only fill up are taken out by a mask."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    kept = labels != IGNORE_INDEX
    found = ChunkedLogProbFunction.apply(
        rows[kept], weight, None, labels[kept], 1.0, 32_768, None, 1.0, ("entropy", "is_top1")
    )
    return -found[0].sum()


def ours(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, parts: gpu_head.Parts) -> torch.Tensor:
    """The gradient made in the forward pass, with entropy and top-1."""
    return gpu_head.score(rows, weight, None, labels, parts)[0]


def kernel(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same by the kernel, where it compiles and is right; training takes it then."""
    if problem := gpu_head.kernel_problem(rows.device):
        raise ImportError(problem)
    return ours(rows, weight, labels, gpu_head.kernel_parts)


def liger(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, without metrics."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    low = torch.get_autocast_dtype(rows.device.type)
    found = LigerFusedLinearCrossEntropyFunction.apply(
        rows.to(low), weight.to(low), labels, None, None, IGNORE_INDEX, 0.0, 0.0, "sum"
    )
    return found[0] if isinstance(found, tuple) else found


def of_torch(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """torch's own from 2.13 on, without metrics."""
    low = torch.get_autocast_dtype(rows.device.type)
    options = torch.nn.LinearCrossEntropyOptions()
    return torch.nn.functional.linear_cross_entropy(
        rows.to(low), weight.to(low), labels, ignore_index=IGNORE_INDEX, reduction="sum", options=options
    )


def chunk_loss(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of a chunk; its logits live in here alone."""
    logits = torch.nn.functional.linear(rows, weight).float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def recomputed(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, of_chunk: Head) -> torch.Tensor:
    """Chunks whose logits are made again in the backward pass, without metrics."""
    total = rows.new_zeros((), dtype=torch.float32)
    size = gpu_head.chunk_size(len(weight))
    for h, y in zip(rows.split(size), labels.split(size), strict=True):
        total = total + torch.utils.checkpoint.checkpoint(
            of_chunk, h, weight, y, use_reentrant=False, preserve_rng_state=False
        )
    return total


def contenders(device: torch.device) -> dict[str, Head]:
    """Name -> head; compiled ones where there is a GPU to compile for."""
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    found: dict[str, Head] = {"TRL": trl, "ours, operators": functools.partial(ours, parts=gpu_head.torch_parts)}
    if device.type == "cuda":
        found["ours, kernel"] = kernel
        found["ours, operators compiled"] = functools.partial(ours, parts=compiled(gpu_head.torch_parts))
        found["recomputed, compiled"] = functools.partial(recomputed, of_chunk=compiled(chunk_loss))
    else:
        found["recomputed"] = functools.partial(recomputed, of_chunk=chunk_loss)
    return {**found, "Liger": liger, "torch": of_torch}


def measure_heads(shape: str, steps: int = 5, until: float = math.inf) -> list[dict[str, Any]]:
    """One row for each head: milliseconds, memory beyond what was there, and how far it is from TRL's, or why not.

    None is begun after `until`, as `time.monotonic` has it; `in_words` makes a line of a table of each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary, width, count, frozen = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    rows = torch.nn.functional.layer_norm(drawn(count, width), (width,))
    weight = 0.02 * drawn(vocabulary, width)
    weight = weight.bfloat16() if frozen else weight
    labels = torch.randint(0, vocabulary, (count,), generator=generator, device=device)
    labels[-count // 20 :] = IGNORE_INDEX  # filled up
    found, reference = [], None
    for name, head in contenders(device).items():
        line: dict[str, Any] = {"shape": shape, "head": name}
        if time.monotonic() > until:
            found.append({**line, "left out": "no time left"})
            continue
        try:
            milliseconds, line["gib"], results = _measured(head, rows, weight, labels, frozen, steps)
            line["ms"] = statistics.median(milliseconds)
            reference = reference or results
            line["loss apart"], *gradients = (
                float((one - other).norm() / other.norm()) for one, other in zip(results, reference, strict=True)
            )
            line["gradients apart"] = max(gradients)
        except (ImportError, AttributeError) as error:
            line["left out"] = f"not here ({error})"
        except Exception as error:  # one head that fails is no reason to lose the others
            line["left out"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        found.append(line)
    return found


def _measured(
    head: Head, rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, frozen: bool, steps: int
) -> tuple[list[float], float, list[torch.Tensor]]:
    """Milliseconds of each step after two, GiB beyond what was there, and loss and gradients."""
    cuda = rows.is_cuda
    milliseconds = []
    results: list[torch.Tensor] = []
    for step in range(steps + 2):
        results = []
        one, other = rows.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        began = time.perf_counter()
        with torch.autocast(rows.device.type, torch.bfloat16):
            loss = head(one, other, labels) / count_of(labels)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        if step >= 2:
            milliseconds.append(1e3 * (time.perf_counter() - began))
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        results = [x.float() for x in (loss.detach(), one.grad, other.grad) if x is not None]
    return milliseconds, (peak - before) / 2**30, results


def count_of(labels: torch.Tensor) -> torch.Tensor:
    """Supervised tokens."""
    return (labels != IGNORE_INDEX).sum()


def in_words(line: dict[str, Any]) -> str:
    """One row of the table."""
    if "left out" in line:
        return f"| {line['shape']} | {line['head']} | {line['left out']} | | | |"
    apart = f"{line['loss apart']:.1e} | {line['gradients apart']:.1e}"
    return f"| {line['shape']} | {line['head']} | {line['ms']:.1f} | {line['gib']:.2f} | {apart} |"


def main() -> None:
    """Print the table, a shape after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=70, help="after which no head is begun")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    shapes = ["tiny"] if args.tiny else args.shape or [name for name in SHAPES if name != "tiny"]
    print("| shape | head | ms | GiB | loss apart | gradients apart |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for shape in shapes:
        for line in measure_heads(shape, args.steps, until):
            print(in_words(line), flush=True)


if __name__ == "__main__":
    main()
