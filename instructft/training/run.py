"""A run from top to bottom: data, model, training, evaluation, and a run folder that says what happened."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters import quantization
from instructft.adapters.experts import said_of_reach, share_reached
from instructft.adapters.lora import count_parameters, is_peft
from instructft.checkpoints.manifest import full_disk_explained
from instructft.checkpoints.resume import RunStart, find, identity, run_start
from instructft.checkpoints.run_folder import make_folder, own, refuse_used_folder
from instructft.data.prepare import Prepared, prepare, prepare_held_out
from instructft.data.streaming import Streamed, prepare_stream
from instructft.models.attention import Attention, check_attention, choose_attention, switch_attention
from instructft.models.branches import why_not
from instructft.models.latest import asks_for_latest, forget_newest, resolve_latest
from instructft.models.load import load_model
from instructft.models.starting_point import StartingPoint, starting_point
from instructft.models.tokenizer import date_in_prompts, load_tokenizer, said_of_date
from instructft.recipe.installed import check_against_installed
from instructft.recipe.schema import Recipe
from instructft.report.logs import keep_printed, lasting_output
from instructft.training.arguments import (
    as_decided,
    decide_checkpointing,
    follow_model,
    refuse_what_cannot_run,
    remarks,
    steps_of,
    training_arguments,
    with_checkpointing,
)
from instructft.training.build import build_trainer, compiled_blocks, fp8_layers, saves_beside
from instructft.training.launch.context import batches_at_once, context_size, model_problems, refuse
from instructft.training.launch.silent import silent_named, state_of
from instructft.training.launch.workers import first_process
from instructft.training.out_of_memory import explained
from instructft.training.outcome import (
    collect_facts,
    final_metrics,
    kept_unproved,
    save,
    say_of_saved,
    template_facts,
)
from instructft.weights.model_class import frozen_as_named, towers, towers_in_words
from instructft.whole_file import write_whole

if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig

    from instructft.adapters.frozen_check import AdapterProof, FrozenProof
    from instructft.checkpoints.manifest import Checkpoint
    from instructft.hub.background import Publisher, Status
    from instructft.training.rehearsal.rehearse import Rehearsal
    from instructft.training.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """What a run leaves: its folder, the contents of its `run.json`, and on the first process how `hub.push` went."""

    output_dir: Path
    facts: Mapping[str, Any]
    pushed: Status | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The last value of each metric, under the trainer's own names (`eval_loss`, `train_loss`, …)."""
        return self.facts["metrics"]


def train(recipe: Recipe, *, resume: str = "auto", rehearsal: bool = True, console: Console | None = None) -> Result:
    """Train the recipe's model and leave a complete run folder.

    Args:
        resume: `auto` resumes from the newest checkpoint in the run folder that verifies, where there is one; `never`
            refuses a run folder that is not empty; else the checkpoint to resume from.
        rehearsal: try all that the run will do on one short batch first (`training.rehearsal`).

    Example::

        result = train(load_recipe("quickstart", overrides=["train.max_steps=10"]))
        sorted(p.name for p in result.output_dir.glob("*.json*"))
        # ['config.json', 'generation_config.json', 'metrics.jsonl', 'run.json', 'samples.jsonl', …]

    Raises:
        UsageError: recipe, data or run folder are not right; raised before any weight is loaded.
        ResumeError: the run cannot be resumed.
        Stopped: a signal ended the run; its last step is saved.
        InstructftError: the run failed.
    """
    patience = recipe.train.get("ddp_timeout") or 1800
    state = state_of(bool(recipe.train.get("use_cpu")), patience)
    console = console or _console(state)
    run = Path(recipe.output_dir)
    refuse_what_cannot_run(recipe, state)
    check_against_installed(recipe, quantization.device(recipe))
    # `held` by the first process, for all
    with lasting_output(), full_disk_explained(run), silent_named(state, patience), contextlib.ExitStack() as held:
        if recipe.train["deterministic"]:
            from instructft.models.kernels.deterministic import COST, deterministic

            console.print(COST, markup=False, highlight=False)
            held.enter_context(deterministic())
        first_process(state, lambda: held.enter_context(own(recipe, resume)))
        return _train(recipe, run, resume, rehearsal, state, console)


def _train(recipe: Recipe, run: Path, resume: str, rehearsal: bool, state: PartialState, console: Console) -> Result:
    checkpoint, passed = first_process(state, lambda: _where_from(recipe, run, resume))
    if asks_for_latest(recipe):
        forget_newest()
        named = recipe
        recipe, why = first_process(state, lambda: resolve_latest(named, checkpoint))
        console.print(f"model.subfolder: latest is {recipe.model.subfolder} ({why})", markup=False, highlight=False)

    tokenizer = load_tokenizer(recipe)
    origin = starting_point(recipe, tokenizer)  # a model that does not fit is refused before the data is read
    check_attention(recipe, origin.config)
    if context_size() > 1:
        refuse(model_problems(origin.config, recipe))
    quantization.check(recipe, origin.config)
    before = checkpoint.identity if checkpoint else None
    recipe, left_open = follow_model(recipe, origin.config, before)
    asked = recipe
    with state.main_process_first():
        data = _prepared(asked, tokenizer, origin)
        known = checkpoint.identity.get("data.packing", data.packed) if checkpoint else data.packed
        recipe = as_decided(asked, bool(known), data.per_pack)
        if data.packed != recipe.data.packing:
            data = _prepared(recipe, tokenizer, origin)
    args, precision = training_arguments(recipe, data, state)
    undecided, batches = recipe, args
    recipe, why = first_process(state, lambda: decide_checkpointing(undecided, origin, data, batches, before))
    if recipe != undecided:
        args, precision = training_arguments(recipe, data, state)
    left_open += [("checkpointing", why)] if why else []
    model: PreTrainedModel | None = None
    if asked.data.packing == "auto" and recipe.data.packing and checkpoint is None:
        model = load_model(recipe, tokenizer, start=origin)
        switch_attention(model, choose_attention(recipe, origin.config, args, data.folds))
        packed, width = model, recipe.data.max_length
        why = first_process(state, lambda: why_rows(packed, args, width))
        if why:
            checkpointing = recipe.train["gradient_checkpointing"]
            packs, recipe = data, with_checkpointing(as_decided(asked, False, data.per_pack), checkpointing)
            data = _prepared(recipe, tokenizer, origin)
            args, precision = training_arguments(recipe, data, state)
            from instructft.training.rehearsal.isolation import cost_of_rows

            console.print(cost_of_rows(why, packs, data, args), markup=False, highlight=False)
    made_of = first_process(state, lambda: identity(recipe, tokenizer, data.fingerprint, origin, args))
    if context_size() > 1:  # other rows would make a step
        made_of["processes that share a row"] = context_size()
    start = run_start(checkpoint, passed, made_of)
    if facts := start.finished(run):
        console.print(f"{run} is finished, {facts['train']['steps']:,} steps: there is nothing to resume")
        return Result(run, facts)

    attention = choose_attention(recipe, origin.config, args, data.folds)
    if model is None:
        model = load_model(recipe, tokenizer, start=origin)
    attention = switch_attention(model, attention)
    base, template = origin.facts(), template_facts(tokenizer, origin)  # now: a branch on the Hub may move meanwhile
    announce(recipe, tokenizer, data, model, args, precision, attention, console, left_open)
    for line in remarks(recipe, args, origin.config, steps_of(args, data)):
        console.print(f"note: {line}", style="yellow", markup=False, highlight=False)
    for line in start.lines():
        console.print(line, markup=False, highlight=False)
    with full_disk_explained(run), uploads(recipe, run, state.is_main_process, console) as publisher:
        if state.is_main_process:
            make_folder(run, fresh=checkpoint is None)
            for line in start.set_aside(run):
                console.print(line, markup=False, highlight=False)
            write_whole(run / "recipe.yaml", recipe.to_yaml())
            keep_printed(run)
        state.wait_for_everyone()
        trainer = build_trainer(recipe, tokenizer, data, model, args, origin, start, console)
        trainer.publisher = publisher
        trainer.sealing.beside = saves_beside(recipe, trainer, console)
        if recipe.data.packing:
            attention = packs_apart(trainer, attention, recipe.data.max_length, console)
        if data.folds:
            turns_apart(trainer, recipe.data.max_length, console)
        found = rehearse_run(trainer, data, console) if rehearsal else None
        # 8-bit floats come and go with layers of another layout, and are for training all weights
        proof = None if recipe.train["fp8"] else watch_adapter(trainer, found.reach.may_stay if found else ())

        with (
            explained(recipe, trainer),
            trackers_closed(trainer),
            fp8_layers(recipe, trainer, console) as fp8,
            compiled_blocks(recipe, trainer, data, console) as compiled,
        ):
            _run(trainer, start, console)
            with kept_unproved(trainer, tokenizer, console):
                adapter = prove_adapter(proof, trainer, console)
                metrics = final_metrics(trainer)
                facts = collect_facts(recipe, data, trainer, metrics, precision) | adapter | {"base": base}
                facts["template"] = template
                facts["attention"] = attention.facts()
                facts["rehearsal"] = found.facts if found else None
                facts["torch_compile"] = compiled.facts() if compiled else None
                facts["fp8"] = {"layers": fp8.layers, "of": fp8.of, "emulated": fp8.emulated} if fp8 else None

        with kept_unproved(trainer, tokenizer, console):
            save(trainer, recipe, tokenizer, facts, data, origin)
        say_of_saved(facts, model, console)
        state.wait_for_everyone()  # the others need not wait for an upload
        status = publisher.finish(final=True) if publisher else None
    return Result(run, facts, status)


def _where_from(recipe: Recipe, run: Path, asked: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint a run resumes from, in its folder or with `auto` on the Hub; and why others were passed over."""
    found, passed = find(run, asked)
    if found is None:
        refuse_used_folder(run)
        if asked == "auto" and recipe.hub.repo_id:
            from instructft.hub.resume import newest_on_hub

            return newest_on_hub(recipe.hub, run)
    return found, passed


def _console(state: PartialState) -> Console:
    from rich.console import Console

    return Console(quiet=not state.is_main_process, soft_wrap=True)


# --------------------------------------------------------------------------------------------------------------------
# Before the first step
# --------------------------------------------------------------------------------------------------------------------


def _prepared(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, origin: StartingPoint) -> Prepared | Streamed:
    def why() -> str:
        if context_size() > 1:
            return "processes share each row (--context-parallel), and torch's ring takes no mask"
        return why_not(recipe, origin.config)

    cannot_fold = functools.cache(why)
    if recipe.data.datasets[0].streaming:
        return prepare_stream(recipe, tokenizer, prepare_held_out(recipe, tokenizer, cannot_fold), cannot_fold)
    return prepare(recipe, tokenizer, cannot_fold)


def announce(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared | Streamed,
    model: PreTrainedModel,
    args: SFTConfig,
    precision: str,
    attention: Attention,
    console: Console,
    left_open: Sequence[tuple[str, str]] = (),
) -> None:
    """Say what is about to be trained: model, rows, tokens, the share that carries loss, what was dropped or cut.

    Args:
        left_open: what the recipe leaves open, as it was decided, with the reason.
    """
    import torch
    from rich.markup import escape
    from rich.table import Table

    from instructft.prompt.token_view import coloured

    trainable, total = count_parameters(model)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    start = recipe.model.name_or_path or "random weights"
    share = "all trainable" if total == trainable else f"{trainable:,} trainable ({trainable / total:.2%})"
    if recipe.model.quantization != "none":
        share += f", base in {recipe.model.quantization}"
    table.add_row("model", escape(f"{start} · {total:,} parameters, {share}"))
    if aside := towers(model.get_base_model() if is_peft(model) else model):
        table.add_row("frozen", escape(towers_in_words(aside)))
    if recipe.model.freeze:
        table.add_row("frozen", escape(f"{frozen_as_named(model, recipe.model.freeze)}, as model.freeze says"))
    if is_peft(model):
        table.add_row("adapter", f"reaches {said_of_reach(share_reached(model))}")
    there = torch.cuda.device_count() if args.device.type == "cuda" else 0
    of = f" of {there} here" if there > args.world_size else ""
    table.add_row("device", escape(f"{args.device.type} × {args.world_size}{of} · {precision}"))
    table.add_row("attention", escape(str(attention)))
    for what, how_much in data.account(recipe.data.max_length):
        table.add_row(what, f"{recipe.data.train_on}: {how_much}" if what == "loss on" else how_much)
    if day := date_in_prompts(recipe, tokenizer):
        table.add_row("date", said_of_date(day))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * batches_at_once(args.world_size)
    what = "packs" if recipe.data.packing else "rows"
    table.add_row("step", f"{batch} {what}, about {round(batch * data.tokens_per_row):,} tokens")
    if context_size() > 1:
        table.add_row("rows", f"each divided among {context_size()} processes, by torch's ring")
    for what, how in left_open:
        table.add_row(what, escape(how))
    table.add_row("run", escape(str(recipe.output_dir)))
    console.print(table)
    example = {name: values[:300] for name, values in data.example.items()}
    mark = "in [bold green]green[/]" if console.color_system else "between ⟦ and ⟧"
    console.print(f"\nA training row; what carries loss is {mark}:", highlight=False)
    console.print(coloured(example, tokenizer))
    console.print()


def packs_apart(trainer: Trainer, attention: Attention, max_length: int, console: Console) -> Attention:
    """Ask the model whether documents of a pack see each other; stops the run when they do."""
    from instructft.training.rehearsal.isolation import prove_isolation

    return prove_isolation(trainer, attention, max_length, console)


def turns_apart(trainer: Trainer, max_length: int, console: Console) -> None:
    """Ask the model whether turns of a folded row see each other; stops the run when they do."""
    from instructft.training.rehearsal.isolation import prove_branches

    prove_branches(trainer, max_length, console)


def why_rows(model: Any, args: SFTConfig, max_length: int) -> str:
    """Ask a model that is loaded and no more whether documents of a pack see each other: why, or nothing."""
    from instructft.training.rehearsal.isolation import why_not_apart

    return why_not_apart(model, args, max_length)


def rehearse_run(trainer: Trainer, data: Prepared | Streamed, console: Console) -> Rehearsal:
    """Try on one short batch what the run will do; what cannot work stops it here."""
    from instructft.training.rehearsal.rehearse import rehearse

    return rehearse(trainer, data.example, functools.partial(console.print, markup=False, highlight=False))


def watch_adapter(trainer: Trainer, may_stay: Collection[str]) -> AdapterProof | FrozenProof | None:
    """Take the fingerprint of all weights that are to stay as they are; of an adapter's, `may_stay` need not move."""
    from instructft.adapters.frozen_check import AdapterProof, FrozenProof

    if not is_peft(trainer.model):
        if all(weight.requires_grad for weight in trainer.model.parameters()):
            return None
        return FrozenProof(trainer.model)
    proof = AdapterProof(trainer.model, may_stay)
    trainer.add_callback(proof)
    return proof


def prove_adapter(proof: AdapterProof | FrozenProof | None, trainer: Trainer, console: Console) -> dict[str, Any]:
    """Stop unless the adapter moved and what is frozen did not; what was found goes into `run.json`."""
    from instructft.adapters.frozen_check import FrozenProof, in_words

    if proof is None:
        return {}
    if isinstance(proof, FrozenProof):
        frozen = proof.verdict(trainer.accelerator.unwrap_model(trainer.model), judge=trainer.is_world_process_zero())
        console.print(f"{frozen['tensors']:,} frozen weights are what they were (compared bit by bit)", highlight=False)
        return {"frozen": frozen}
    verdict = proof.verdict(trainer.accelerator.unwrap_model(trainer.model), judge=trainer.is_world_process_zero())
    console.print(in_words(verdict), highlight=False)
    return {"adapter": verdict | {"reaches": share_reached(trainer.accelerator.unwrap_model(trainer.model))}}


@contextlib.contextmanager
def uploads(recipe: Recipe, run: Path, first: bool, console: Console) -> Iterator[Publisher | None]:
    """What `hub.push` asks for, on the first process; a run that ends early says where its uploads stand."""
    from instructft.hub.background import Publisher

    if recipe.hub.push == "never" or not first:
        yield None
        return
    say = functools.partial(console.print, markup=False, highlight=False)
    publisher = Publisher(recipe, run, say)
    try:
        yield publisher
    except BaseException:
        say(str(publisher.finish(final=False)))
        raise


@contextlib.contextmanager
def trackers_closed(trainer: Trainer) -> Iterator[None]:
    """Trackers close after the last evaluation, which may come after the training."""
    from instructft.training.callbacks import Outlasted

    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Outlasted):
                callback.end()


def _run(trainer: Trainer, start: RunStart, console: Console) -> None:
    from instructft.training.callbacks import ProgressLine

    trainer.progress.resumes = start.record(trainer.versions)
    try:
        trainer.train(resume_from_checkpoint=start.folder)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressLine):
                callback.close()
    trainer.stop.raise_if_stopped(trainer.sealing.last)
