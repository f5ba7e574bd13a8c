"""Compiles each block of a model in place, once for all steps; what has another shape, or is no training, runs eagerly.

`torch.compile` of a whole model traces the output head too, anew for every number of supervised tokens. Blocks of one
kind share a graph instead: twelve blocks of GPT-2 compile once, Gemma 3's sliding and full layers twice, and with LoRA
each kind twice, since the input of the first block needs no gradient. Names, hooks and `state_dict` stay as they are.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters

from instructft.formatting import clock, first_line

# On one H100, torch 2.11, GPT-2 of 124M, the same attention and head: 4 to 13 s, 314k to 372k tokens/s
SECONDS = 15.0  # that compiling takes, once a run
GAIN = 0.25  # share of a step that compiled blocks spare
SPEED = 3e14  # operations a second in such steps; a slower card earns the compiling sooner
SHAPES = 4  # that are compiled where the shape of a batch varies; torch itself keeps 8 graphs


@dataclass(frozen=True)
class Run:
    """What decides whether a run earns the compiling of its blocks.

    Args:
        cuda: whether it takes place on an NVIDIA or AMD GPU.
        fixed: whether every batch has one shape (flat packs).
        shared: whether the processes share the weights among them (FSDP, DeepSpeed).
        quantized: whether the base is in 4 or 8 bit.
        fp8: whether products are made in 8-bit floats.
        operations: of the whole run on one device, forward and backward.
    """

    cuda: bool
    fixed: bool
    shared: bool
    quantized: bool
    fp8: bool
    operations: float


def decide(asked: bool | str, run: Run) -> tuple[bool, str]:
    """Whether blocks are compiled, and why, for `train.torch_compile`: auto, true or false.

    >>> decide("auto", Run(cuda=False, fixed=True, shared=False, quantized=False, fp8=False, operations=1e18))
    (False, 'no GPU')
    """
    if asked is False:
        return False, "train.torch_compile is false"
    if run.shared:
        return False, "the processes share the weights of each block among them"
    if asked is True:
        return True, "train.torch_compile is true"
    if not run.cuda:
        return False, "no GPU"
    if run.fp8:
        return True, "FP8 is fast in compiled blocks alone"
    if run.quantized:
        return False, "the base is quantized (train.torch_compile=true tries it)"
    if not run.fixed:
        return False, "the shape of a batch varies; flat packs have one (data.packing=true on varlen attention)"
    earned = run.operations / SPEED * GAIN
    if earned < SECONDS:
        return False, f"the run is too short to earn the {SECONDS:.0f} s that it takes"
    return True, f"it takes about {SECONDS:.0f} s once, and is to spare {clock(earned)}"


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a model, in order: the elements of its outermost lists of layers.

    Example::

        [type(block).__name__ for block in blocks_of(load_model(recipe, tokenizer))]
        # ['GPT2Block', 'GPT2Block']
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = []
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, torch.nn.ModuleList):
            found.extend(module)
        else:
            waiting.extend(reversed(list(module.children())))
    layers = [block for block in found if isinstance(block, GradientCheckpointingLayer)]
    return layers or found


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run what is compiled as if it were not, without a new graph: for shapes that training does not have."""
    with torch.compiler.set_stance("force_eager"):
        yield


class CompiledBlocks:
    """The blocks of a model while they are compiled.

    Each block is compiled in place and traced whole: a break in the graph is an error, upon which that block runs
    eagerly, said once. It is compiled for what it first meets in training mode; batches of another shape (the last of
    an epoch, parts of one that did not fit into memory), evaluation and generation run eagerly.

    Args:
        model: with its adapter, if it is to have one: what is attached afterwards would be compiled anew.
        shapes: how many shapes of the hidden states are compiled: the first ones that come, and one larger than these.
        backend, mode: as `torch.compile` takes them.
        say: told in one line what a person should know.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        shapes: int = 1,
        backend: str | None = None,
        mode: str | None = None,
        say: Callable[[str], Any] = print,
    ):
        self.shapes, self.most = set[tuple[int, ...]](), shapes
        self.failed: dict[str, int] = {}  # why -> blocks
        self.seconds, self._graphs, self._said, self._say = 0.0, counters["stats"]["unique_graphs"], False, say
        self._settings = contextlib.ExitStack()
        # else a backward pass is compiled when it first runs, where a failure can no longer be put right
        self._settings.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        # several processes: graphs are cut where gradients are sent, which is between blocks anyway, and checkpoints
        # inside a graph cannot be cut
        self._settings.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
        self.blocks = blocks_of(model)
        for block in self.blocks:
            block.compile(backend=backend or "inductor", mode=mode, fullgraph=True, dynamic=False)
            block._compiled_call_impl = _Block(self, block, block._compiled_call_impl)

    @property
    def graphs(self) -> int:
        """Graphs that were made since."""
        return int(counters["stats"]["unique_graphs"] - self._graphs)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether hidden states of this shape are compiled; notes a new one while there is room."""
        if shape not in self.shapes:
            # a run that resumes at the end of an epoch meets a short batch first
            larger = math.prod(shape) > max(map(math.prod, self.shapes), default=0)
            if len(self.shapes) < self.most + larger:
                self.shapes.add(shape)
        return shape in self.shapes

    def note(self, block: torch.nn.Module, seconds: float, error: Exception | None) -> None:
        """Keep what the first call of a block took, or why one failed; said once all have been called."""
        self.seconds += seconds
        if error is not None:
            why = _reason(error)
            self.failed[why] = self.failed.get(why, 0) + 1
        if block is self.blocks[-1] and not self._said:
            self._said = True
            self._say(self.line())
        elif self._said and error is not None and self.failed[why] == 1:
            self._say(f"from here on blocks run as they are: {why}")

    def line(self) -> str:
        """What became of it, in one line."""
        total, failed = len(self.blocks), sum(self.failed.values())
        done = f"{total - failed} of {total} blocks compiled in {self.seconds:.0f} s, graphs: {self.graphs}"
        if not failed:
            return done
        why = max(self.failed, key=lambda reason: self.failed[reason])
        rest = "the run goes on without" if failed == total else "the others run as they are"
        return f"{done if failed < total else 'blocks are not compiled'}; {rest}: {why}"

    def facts(self) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "blocks": len(self.blocks) - sum(self.failed.values()),
            "of": len(self.blocks),
            "graphs": self.graphs,
            "seconds": round(self.seconds, 1),
            "failed": list(self.failed),
        }

    def undo(self) -> None:
        """Leave the blocks as they were, and room for the graphs of another run in this process (torch keeps 8)."""
        for block in self.blocks:
            block._compiled_call_impl = None
        self._settings.close()
        torch.compiler.reset()


class _Block:
    """What stands in for the call of one block."""

    def __init__(self, owner: CompiledBlocks, block: torch.nn.Module, compiled: Any):
        self.owner, self.block, self.compiled = owner, block, compiled
        self.works, self.met = True, set[tuple[int, ...]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        shape = tuple(hidden.shape) if torch.is_tensor(hidden) else ()
        if not (self.works and self.block.training and self.owner.takes(shape)):
            return self.block._call_impl(*args, **kwargs)
        began = 0.0 if shape in self.met else time.perf_counter()
        try:
            out, error = self.compiled(*args, **kwargs), None
        except (TorchDynamoException, FailOnRecompileLimitHit) as found:  # nothing has been computed yet
            self.works, error = False, found
            out = self.block._call_impl(*args, **kwargs)
        if began or error is not None:
            self.met.add(shape)
            self.owner.note(self.block, time.perf_counter() - began if began else 0.0, error)
        return out


def _reason(error: Exception) -> str:
    """The line of a compiler's long message that says what is wrong."""
    if isinstance(error, FailOnRecompileLimitHit):
        return "too many shapes, torch's limit of graphs is reached"
    while isinstance(inner := getattr(error, "inner_exception", None), Exception):
        error = inner
    return first_line(error).rstrip(".")
