"""`instructft merge`: an adapter into its base, tensor by tensor on disk, proved before anything is called a model.

A model that was trained whole goes the same way where a narrower `dtype` is asked for: all its tensors are replaced.

::

    read_adapter, locate_base ─► make_plan ─► OUTPUT.partial-…/ ─► prove ─► OUTPUT/
      exit 2, nothing written                  weights, then config   exit 1, removed

Only a few megabytes of weights are in memory while it merges. Where the proof finds that another rounding loses less of
what was learned, the weights are written again with that one. The folder has its final name once it is complete, on
disk and proved; a merge that was killed leaves a `.partial-` folder, which the next merge to the same place removes.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters.adapter_folder import WEIGHTS, AdapterFolder, is_adapter, read_adapter
from instructft.adapters.attach import locate_base
from instructft.checkpoints.as_saved import require_as_saved
from instructft.checkpoints.run_folder import partial_folder, refuse_used
from instructft.errors import AdapterError, ModelError, UsageError
from instructft.formatting import size
from instructft.hub.files import TOKENIZER
from instructft.merging.arithmetic import merged
from instructft.merging.comparison import Texts, choose_texts
from instructft.merging.edits import refuse_unproved
from instructft.merging.full_model import full_plan, is_full, read_full, start_of
from instructft.merging.metadata import config_text, copy_metadata, run_recipe, write_metadata
from instructft.merging.plan import Machine, Plan, choose_machine, make_plan
from instructft.merging.proof import Merge, better_rounding, costly, prove
from instructft.merging.quantized_base import BASES, DEQUANTIZED, ORIGINAL, dequantized_base
from instructft.merging.quantized_base import measure_quantized as compare_quantized
from instructft.report.model_card import COSTS, cost_cells
from instructft.weights import remote_code
from instructft.weights.rounding import NEAREST, ROUNDINGS, STOCHASTIC
from instructft.weights.tensor_io import (
    Planned,
    Stored,
    index_of,
    pieces,
    read_checkpoint,
    read_tensors,
    shards,
    write_shard,
    write_text,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console


DTYPES = ("auto", "float32", "bfloat16", "float16")
_HEADROOM = 64 << 20  # bytes beside the weights: tokenizer, metadata


@dataclass(frozen=True)
class Merged:
    """A finished merge: its folder, and what `run.json` says of it under `merge`."""

    output_dir: Path
    facts: Mapping[str, Any]


def merge_adapter(
    run: str | Path,
    output: str | Path,
    *,
    verify: bool = True,
    dtype: str = "auto",
    rounding: str = "auto",
    max_shard_size: str = "5GB",
    measure_quantized: bool = False,
    into: str = ORIGINAL,
    console: Console | None = None,
) -> Merged:
    """Merge the LoRA adapter of a run folder, or any adapter folder, into its base.

    Args:
        run: a run folder with an adapter, a checkpoint in one, or an adapter folder of PEFT's.
        output: a folder that is not there yet, or empty.
        verify: run the adapter and the merged model on the same texts, and keep the merge only if they agree.
        dtype: of the merged weights; `auto` keeps that of the base, tensor by tensor.
        rounding: of the weights that change, to bfloat16: `nearest`, `stochastic`, or `auto`, which takes the one that
            is measured to lose less (without a proof: stochastic).
        max_shard_size: of one weight file, as `5GB` or `200MiB`.
        measure_quantized: also measure how far the merged model is from the adapter on the quantized base that it was
            trained on, and whether the other base would be nearer.
        into: of an adapter that was trained on a quantized base: `original`, the base as it was published, or
            `dequantized`, the quantized one unpacked again.

    Example::

        merge_adapter("runs/tinyllama-lora", "merged").facts["proof"]["kl"]
        # 0.0002

    Raises:
        UsageError: the output is not free, the disk is full, or an option has no proved merge; nothing is written.
        AdapterError: the adapter is broken or its base is not there; nothing is written.
        ModelError: the merged model is not the adapted one; nothing is kept.
    """
    import torch
    from rich.console import Console

    console = console or Console(soft_wrap=True)
    output = Path(output).expanduser()
    most = _bytes(max_shard_size)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: found {dtype}, expected {', '.join(DTYPES)}")
    if rounding not in ("auto", *ROUNDINGS):
        raise UsageError(f"--rounding: found {rounding}, expected auto, {', '.join(ROUNDINGS)}")
    if into not in BASES:
        raise UsageError(f"--into: found {into}, expected {', '.join(BASES)}")
    refuse_used(output)
    began = time.perf_counter()
    with contextlib.ExitStack() as held:  # what is only needed meanwhile
        adapter = _read(Path(run).expanduser(), dtype)
        if measure_quantized and adapter.base.quantization == "none":
            raise UsageError(f"--measure-quantized: {run} was trained on a base that is not quantized; leave it out")
        if into == DEQUANTIZED and adapter.base.quantization == "none":
            raise UsageError(f"--into: {run} was trained on a base that is not quantized; leave it out")
        full = is_full(adapter)
        base = original = start_of(adapter) if full else locate_base(adapter)
        for folder in (adapter.folder, original):
            require_as_saved(folder, whole=True)
        tensors = read_checkpoint(adapter.folder) if full else read_tensors(adapter.folder / WEIGHTS)
        _refuse_not_finite(adapter.folder, tensors)
        stored = None if dtype == "auto" else getattr(torch, dtype)
        if into == DEQUANTIZED:
            stored = stored or _plan(adapter, original, None).dtype
            base = held.enter_context(dequantized_base(adapter, original, output.absolute().parent))
        plan = full_plan(adapter, base, stored) if full else _plan(adapter, base, stored)
        machine = choose_machine(plan) if verify else None
        files = shards((output.planned for output in plan.outputs.values()), most)
        total = sum(out.planned.bytes for out in plan.outputs.values())
        _refuse_full_disk(output, total)

        for line in _inputs(adapter, original, into, plan):
            console.print(line, markup=False, highlight=False)
        name = str(plan.dtype).removeprefix("torch.")
        written = STOCHASTIC if rounding == "auto" else rounding
        facts: dict[str, Any] = {
            "base": adapter.base.name_or_path,
            "base_fingerprint": adapter.base.fingerprint or None,
            "full" if full else "adapter": str(adapter.folder),
            **({} if adapter.base.quantization == "none" else {"into": into}),
            "dtype": name,
            "tensors": len(plan.outputs),
            "changed": plan.tensors_changed,
            "bytes": total,
        }
        with partial_folder(output) as folder:
            _write_weights(folder, plan, tensors, files, written, console)
            copy_metadata(adapter.folder, base, folder)
            # last: without it no library takes the folder for a model
            write_text(folder / "config.json", config_text(base, folder, plan.model, name, plan.untied))
            if machine:
                began_proof = time.perf_counter()
                texts = _texts(adapter, folder, plan, machine, console)

                def proved(rounding: str) -> dict[str, Any]:
                    merge = Merge(base, adapter, tensors, folder, read_checkpoint(folder), plan, rounding)
                    return prove(merge, texts, machine)

                proof = proved(written)
                if rounding == "auto" and (better := better_rounding(proof, name, written)) != written:
                    written = better
                    _write_weights(folder, plan, tensors, files, written, console)
                    proof = proved(written)
                facts["proof"] = {**proof, "seconds": time.perf_counter() - began_proof}
                if measure_quantized:
                    facts["quantized"] = compare_quantized(adapter, original, folder, into, texts, machine)
            facts |= {"rounding": written if name == "bfloat16" else NEAREST, "seconds": time.perf_counter() - began}
            write_metadata(folder, adapter, facts)
        _report(console, output, facts)
        return Merged(output, facts)


def _inputs(adapter: AdapterFolder, base: Path, into: str, plan: Plan) -> list[str]:
    """What is merged into what, a line each."""
    if not is_full(adapter):
        unpacked = f"{adapter.base.quantization} and unpacked again" if into == DEQUANTIZED else "not quantized"
        what = f"adapter {adapter.folder}, {plan.tensors_changed} of {len(plan.outputs)} tensors change"
        return [f"base    {base}, {unpacked}", what]
    begin = f"base    {base}"
    if base == adapter.folder:
        begin = "base    not here: what rounding takes of the change that training made cannot be said"
    return [begin, f"model   {adapter.folder}, trained whole: {len(plan.outputs)} tensors"]


def _plan(adapter: AdapterFolder, base: Path, dtype: torch.dtype | None) -> Plan:
    try:
        return make_plan(base, read_checkpoint(base), adapter.folder, adapter.shapes, adapter.base.vocab_size, dtype)
    except ModelError as error:  # said before anything is written, so it is an error in what was given
        raise AdapterError(str(error)) from error


def _write_weights(
    folder: Path,
    plan: Plan,
    tensors: Mapping[str, Stored],
    files: Mapping[str, list[Planned]],
    rounding: str,
    console: Console,
) -> None:
    """Merge piece by piece, with a bar on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    total = sum(tensor.bytes for group in files.values() for tensor in group)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("merging", total=total)

        def produce(name: str) -> Iterator[torch.Tensor]:
            out = plan.outputs[name]
            for piece in merged(out.base, out.edit, tensors, out.planned.dtype, rounding):
                yield piece
                progress.advance(task, piece.nbytes)

        for file, group in files.items():
            write_shard(folder / file, group, produce)
    if index := index_of(files):
        write_text(folder / "model.safetensors.index.json", index)


def _texts(adapter: AdapterFolder, folder: Path, plan: Plan, machine: Machine, console: Console) -> Texts:
    from transformers import AutoTokenizer

    tokenizer = None  # of a folder without its files transformers makes one that knows no token (5.23)
    if any((folder / name).is_file() for name in TOKENIZER):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            tokenizer = AutoTokenizer.from_pretrained(folder, **remote_code.flag())
    context = getattr(plan.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    rows = plan.model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        console.print(
            f"warning: the tokenizer has {len(tokenizer):,} tokens and the model {rows:,} rows: a text with one of the "
            "others fails in every library",
            style="yellow",
        )
    texts = choose_texts(run_recipe(adapter.folder), tokenizer, context, rows)
    precision = str(machine.dtype).removeprefix("torch.")
    where = machine.device if machine.whole else "cpu, read from the disk since it does not fit in memory"
    console.print(f"proof   {len(texts.rows)} × {texts.source}, in {precision} on {where}", highlight=False)
    return texts


def _report(console: Console, output: Path, facts: Mapping[str, Any]) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    if proof := facts.get("proof"):
        _report_proof(console, proof)
        if costly(proof) and facts["dtype"] != "float32":
            say(
                f"        {facts['dtype']} costs {proof['kl'] / proof['effect_kl']:.1%} of what training did; "
                f"--dtype {costly(proof)[0]} would not"
            )
    else:
        say("proof   none: not verified (--no-verify)")
    if quantized := facts.get("quantized"):
        say(
            f"        against the adapter on its {quantized['quantization']} base: KL {quantized['kl']:.1e}, "
            f"largest difference of a logit {quantized['difference']:.2e}, "
            f"{quantized['equal_tokens']} of {quantized['tokens']} tokens equal"
        )
        other = quantized["other"]
        losses = ""
        if quantized["trained_loss"] is not None:
            losses = (
                f"; loss {quantized['trained_loss']:.4f} as trained, {quantized['loss']:.4f} and {other['loss']:.4f}"
            )
        say(
            f"        on the {other['into']} base instead: KL {other['kl']:.1e}{losses}; nearer to what was trained: "
            f"--into {quantized['nearer']}"
        )
    rounded = "" if facts["dtype"] != "bfloat16" else f", {facts['rounding']} rounding"
    say(f"Merged into {output}, {size(facts['bytes'])} in {facts['dtype']}{rounded}. Talk to it:")
    say(f"\n  instructft chat {output}\n")


def _report_proof(console: Console, proof: Mapping[str, Any]) -> None:
    from rich.padding import Padding
    from rich.table import Table

    def say(text: str) -> None:
        console.print(f"        {text}", markup=False, highlight=False)

    weights = proof["weights"]
    equal, trained = f"are PEFT's merge in float64 (to {weights.get('deviation', 0):.0e})", "the adapter"
    if "deviation" not in weights:
        equal, trained = "are the trained ones, rounded", "training"
    say(f"{weights['tensors']} tensors {equal}; {weights['applied']:.1%} of the change is in the file")
    if proof["exact"] is not None:
        say(
            f"loaded, its rounding undone: a logit differs by {proof['exact']:.2e} at most, allowed "
            f"{proof['tolerance']:.2e}; {trained} changes them by {proof['effect']:.2e}, KL {proof['effect_kl']:.2g}"
        )
    say(f"{proof['compared']}: {proof['equal_tokens']} of {proof['tokens']} tokens equal")
    if not proof["costs"]:
        say(f"as it is stored: KL {proof['kl']:.1e}, {proof['top1']:.1%} of the most likely tokens equal")
        return
    table = Table("stored as", *COSTS, box=None, padding=(0, 2, 0, 0))
    for row in proof["costs"]:
        table.add_row(f"{row['dtype']}, {row['rounding']}", *cost_cells(row))
    console.print(Padding.indent(table, 8))


# --------------------------------------------------------------------------------------------------------------------
# Before anything is written
# --------------------------------------------------------------------------------------------------------------------


def _read(run: Path, dtype: str) -> AdapterFolder:
    if not run.is_dir():
        raise UsageError(f"there is no folder {run}; give a run folder or a checkpoint in it that holds an adapter")
    if not is_adapter(run):
        if not (run / "config.json").is_file():
            raise UsageError(
                f"{run} holds no adapter (there is no adapter_config.json in it): there is nothing to merge"
            )
        if dtype == "auto":
            raise UsageError(
                f"{run} holds a full model already (there is no adapter_config.json in it): there is nothing to merge; "
                "--dtype bfloat16 stores it in less, and measures what that costs"
            )
        return read_full(run)
    adapter = read_adapter(run)
    refuse_unproved(adapter.config, run)
    return adapter


def _refuse_not_finite(folder: Path, tensors: Mapping[str, Stored]) -> None:
    import torch

    for name, tensor in tensors.items():
        if not all(bool(torch.isfinite(tensor.read(*run)).all()) for run in pieces(tensor.rows, tensor.width)):
            raise AdapterError(f"{folder}: {name} holds infinite values or NaN: the adapter is broken; train it again")


def _refuse_full_disk(output: Path, total: int) -> None:
    parent = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < total + _HEADROOM:
        raise UsageError(
            f"{parent}: {free / 1e9:.2f} GB are free, and the merged model needs {(total + _HEADROOM) / 1e9:.2f} GB; "
            "make room, or choose an OUTPUT on another disk"
        )


def _bytes(text: str) -> int:
    """A size in bytes.

    >>> _bytes("5GB"), _bytes("200MiB")
    (5000000000, 209715200)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if found:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    if size < 1:
        raise UsageError(f"--max-shard-size: found {text}, expected a size such as 5GB or 200MB")
    return size
