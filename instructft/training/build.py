"""From settings, data and a model to a trainer: what a recipe asks of it besides, collected in one place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters.adapter_folder import AdapterMetadata
from instructft.adapters.lora import count_parameters, is_peft
from instructft.checkpoints.resume import RunStart
from instructft.data.prepare import Prepared
from instructft.data.streaming import Streamed
from instructft.errors import UsageError
from instructft.models.attention import VARLEN
from instructft.models.branches import masks_for
from instructft.models.starting_point import StartingPoint
from instructft.recipe.schema import Recipe, metric_name
from instructft.training.arguments import reporters
from instructft.training.launch.context import context_size
from instructft.training.outcome import library_versions

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from instructft.data.batches.row_history import RowHistory
    from instructft.inference.generator import Generator
    from instructft.models.kernels.compiled_blocks import CompiledBlocks
    from instructft.models.kernels.fp8 import Converted
    from instructft.training.judging.budget import Budget
    from instructft.training.judging.judge import Judge
    from instructft.training.trainer import Trainer


def build_trainer(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared | Streamed,
    model: PreTrainedModel,
    args: SFTConfig,
    origin: StartingPoint,
    start: RunStart,
    console: Console,
) -> Trainer:
    """The trainer with its collator and with what watches it."""
    from transformers import PrinterCallback
    from transformers.integrations import TensorBoardCallback

    from instructft.data.batches.divided import multiple_of
    from instructft.data.collator import CompletionOnlyCollator
    from instructft.inference.generator import Generator
    from instructft.models.kernels.varlen import takes_borders
    from instructft.training.callbacks import MetricsFile, Outlasted, ProgressLine, Samples
    from instructft.training.judging.budget import Budget, decides
    from instructft.training.judging.judge import unanswerable
    from instructft.training.rehearsal.start_loss import StartLoss
    from instructft.training.run_warnings import RunWarnings
    from instructft.training.stopping import EarlyStopping
    from instructft.training.trainer import Trainer

    run = Path(args.output_dir)
    say = functools.partial(console.print, markup=False, highlight=False)
    validation = data.splits.get("validation")
    budget = Budget(
        recipe.train["evaluation_budget"], decides(recipe.train), 0 if validation is None else len(validation), say
    )
    callbacks: list[TrainerCallback] = [budget, MetricsFile(run / "metrics.jsonl", say), ProgressLine(console)]
    writer = None
    if args.process_index == 0 and "tensorboard" in reporters(recipe):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"), purge_step=start.step + 1 if start.step else None)
        callbacks.append(Outlasted(TensorBoardCallback(writer)))
    generator = Generator(model, tokenizer)
    asked = data.for_training if validation is None else validation
    stop_diverged = recipe.train["on_divergence"] == "stop"
    warnings = RunWarnings(generator, asked, run, console, budget, stop_diverged)
    callbacks.append(warnings)
    if patience := recipe.train["early_stopping_patience"]:
        callbacks.append(EarlyStopping(patience, say, metric_name(recipe.train)))
    if recipe.samples:  # after what may end the run: by then it is known which evaluation is the last
        path, trackers = run / "samples.jsonl", args.report_to or ()
        callbacks.append(Samples(recipe.samples, generator, path, console, writer, budget, trackers))
    judge = build_judge(recipe, generator, budget, args, say) if validation is not None else None
    metadata = None
    if is_peft(model) and args.should_save:
        metadata = AdapterMetadata(origin.record(model, recipe.model.quantization))
    masks = masks_for(model.config)
    multiple = args.pad_to_multiple_of
    if context_size() > 1:
        multiple = multiple_of(context_size(), multiple)
    collate = CompletionOnlyCollator(tokenizer.pad_token_id, multiple, takes_borders(model), masks)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=data.for_training,
        eval_dataset=validation,
        eval_groups=data.groups,
        budget=budget,
        judge=judge,
        find_batch=bool(recipe.train.get("auto_find_batch_size")),
        spike_limit=recipe.train["loss_spike_limit"],
        skip_spikes=recipe.train["on_loss_spike"] == "skip",
        say=say,
        identity=start.identity,
        versions=library_versions(recipe),
        lora_plus_ratio=recipe.adapter.lora_plus_ratio,
        float32_copies=recipe.train["float32_copies"],
        pack_width=recipe.data.max_length if recipe.data.packing else None,
        history=row_history(recipe, data, say),
        metadata=metadata,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.add_callback(StartLoss(trainer, asked if hasattr(asked, "__len__") else [data.example], say))
    trainer.remove_callback(PrinterCallback)
    handler = trainer.callback_handler
    handler.callbacks = [
        Outlasted(callback) if type(callback).__module__.startswith("transformers.integrations") else callback
        for callback in handler.callbacks
    ]
    if judge is not None and (why := unanswerable(trainer)):
        if judge.best is not None:
            raise UsageError(f"train.metric_for_best_model: held-out rows cannot be answered: {why}")
        judge.why_not = why
        say(f"held-out rows are not answered while it trains: {why}")
    if recipe.train["row_history"] and not trainer.plain_loss:
        say("rows.parquet is not kept: the losses of single tokens are not at hand with this loss")
    elif recipe.train["row_history"] and context_size() > 1:
        say("rows.parquet is not kept: no process has the losses of a whole row")
    warnings.stop, warnings.settle = trainer.stop, trainer.end_writing
    generator.precision = trainer.accelerator.autocast
    return trainer


def build_judge(
    recipe: Recipe, generator: Generator, budget: Budget, args: SFTConfig, say: Callable[[str], Any]
) -> Judge | None:
    """What has held-out rows answered while the model trains; None where the recipe wants none."""
    from instructft.data.load import drawn
    from instructft.training.judging.judge import Judge

    asked, name = recipe.evaluation, metric_name(recipe.train)
    if asked.rows == 0 or (args.eval_strategy == "no" and asked.rows == "auto" and not asked.metrics):
        return None
    deciding = name if name in (*asked.figures(), *asked.functions()) else None
    return Judge(
        generator,
        functools.partial(drawn, recipe, "validation"),
        budget,
        wanted=asked.rows if isinstance(asked.rows, int) else None,
        figures=asked.figures(),
        functions=asked.functions(),
        named=bool(asked.metrics),
        deciding=deciding,
        greater=args.greater_is_better is not False,
        say=say,
    )


def row_history(recipe: Recipe, data: Prepared | Streamed, say: Callable[[str], Any]) -> RowHistory | None:
    """Keeps the loss of each training row at first and last sight; None, and why, where nobody does."""
    from instructft.data.batches.row_history import MOST, RowHistory

    if not recipe.train["row_history"]:
        return None
    if not isinstance(data, Prepared) or data.origins is None:
        say("rows.parquet is not kept: rows that stream have no number by which they could be known again")
        return None
    if len(data.origins.part) > MOST:
        say(f"rows.parquet is not kept: {len(data.origins.part):,} rows are more than {MOST:,}")
        return None
    return RowHistory(data.origins)


def saves_beside(recipe: Recipe, trainer: Trainer, console: Console) -> bool:
    """Whether checkpoints are written while training goes on; say so, or why not where a GPU would gain by it."""
    from instructft.checkpoints.background import decide
    from instructft.models.memory import optimizer_bytes
    from instructft.weights.float32_copies import in_float32

    args, asked = trainer.args, recipe.train["save_in_background"]
    if args.save_strategy == "no":
        return False
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    saved = trained if is_peft(trainer.model) else trainer.model.parameters()
    copy = sum(weight.nbytes for weight in saved)
    moved = in_float32(trained) if recipe.train["float32_copies"] else trained
    copy += sum(one.nbytes for one in moved) if recipe.train["float32_copies"] else 0
    copy += optimizer_bytes(str(args.optim), moved)[0]
    alone = args.world_size == 1 and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    on, why = decide(asked, args.device.type == "cuda", alone, copy)
    if on or (args.device.type == "cuda" and asked):
        how = "beside training" if on else "while training waits"
        console.print(f"checkpoints are written {how}: {why}", markup=False, highlight=False)
    return on


@contextlib.contextmanager
def fp8_layers(recipe: Recipe, trainer: Trainer, console: Console) -> Iterator[Converted | None]:
    """While the model trains, make the products of its blocks in 8-bit floats, where the recipe says so; say how many.

    What was proved before holds of the model as it is saved: a scale of 8-bit floats is of a whole batch, and
    documents that are alone and packed would differ by more than rounding.
    """
    from instructft.models.kernels.fp8 import fp8_products

    if not recipe.train["fp8"]:
        yield None
        return
    with fp8_products(trainer.model, emulate=trainer.args.device.type == "cpu") as converted:
        console.print(converted.line(), markup=False, highlight=False)
        yield converted


@contextlib.contextmanager
def compiled_blocks(
    recipe: Recipe, trainer: Trainer, data: Prepared | Streamed, console: Console
) -> Iterator[CompiledBlocks | None]:
    """Compile the blocks of the model while it trains, where the recipe says so or the run earns it; say which."""
    from instructft.models.kernels.compiled_blocks import SHAPES, CompiledBlocks, Run, decide
    from instructft.models.memory import steps

    args, asked = trainer.args, recipe.train["torch_compile"]
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    count = steps(data, args, args.world_size)["steps"] if isinstance(data, Prepared) else args.max_steps
    trainable, total = count_parameters(trainer.model)
    # rows end to end have one shape; the name of the attention is no mask's (`varlen`), which other kernels need not be
    fixed = recipe.data.packing and trainer.model.config._attn_implementation == VARLEN
    on, why = decide(
        asked,
        Run(
            cuda=args.device.type == "cuda",
            fixed=fixed,
            shared=bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled),
            quantized=recipe.model.quantization != "none",
            fp8=recipe.train["fp8"],
            # forward takes 2 a weight and token, backward twice that; frozen weights need no gradient of their own
            operations=count * rows * data.tokens_per_row * (6 * trainable + 4 * (total - trainable)),
        ),
    )
    if on or (args.device.type == "cuda" and asked is not False):
        console.print(f"blocks are {'' if on else 'not '}compiled: {why}", markup=False, highlight=False)
    if not on:
        yield None
        return
    blocks = CompiledBlocks(
        trainer.model,
        shapes=1 if fixed else SHAPES,
        backend=recipe.train["torch_compile_backend"],
        mode=recipe.train["torch_compile_mode"],
        say=functools.partial(console.print, markup=False, highlight=False),
    )
    try:
        yield blocks
    finally:
        blocks.undo()


# --------------------------------------------------------------------------------------------------------------------
# The run, and what it leaves
# --------------------------------------------------------------------------------------------------------------------
