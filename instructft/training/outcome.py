"""What a run leaves when it ends: the facts of `run.json`, and a folder filled with a model that is whole.

What is being written has a name that no library takes for a model: `final.partial/` until the model is whole, then its
files move to their place, and `run.json` comes last. By `run.json` a run is known to be finished. What fails after the
last step loses nothing: `unproved/` holds the model then, and the run has failed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.as_saved import sums
from instructft.checkpoints.run_folder import PARTIAL, sync, sync_one
from instructft.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from instructft.data.prepare import Prepared
    from instructft.data.streaming import Streamed
    from instructft.models.starting_point import StartingPoint
    from instructft.recipe.schema import Recipe
    from instructft.training.trainer import Trainer

UNPROVED = "unproved"  # what was trained in a run that failed after its last step


def collect_facts(
    recipe: Recipe, data: Prepared | Streamed, trainer: Trainer, metrics: dict[str, Any], precision: str
) -> dict[str, Any]:
    """The contents of `run.json`."""
    import torch

    from instructft.training.run_warnings import told
    from instructft.training.stopping import ending

    seen, seconds = trainer.seen, trainer.progress.seconds
    spikes, rows_at_once = trainer.step_checks.spikes, trainer.micro_batches.rows_at_once
    device = trainer.args.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "versions": dict(trainer.versions),
        "hardware": {
            "device": hardware,
            "processes": trainer.args.world_size,
            **({"context_parallel": size} if (size := trainer.get_cp_size()) > 1 else {}),
            "precision": precision,
        },
        "seed": recipe.train["seed"],
        "data": {
            "fingerprint": data.fingerprint,
            "rows": data.rows,
            "dropped": dict(data.dropped),
            "alike": data.alike,
            "cut": {"rows": data.cut, "tokens": data.cut_tokens},
            "tokens": data.tokens["train"],
            "supervised_tokens": data.supervised_tokens["train"],
            "supervised_share": data.supervised_tokens["train"] / max(data.tokens["train"], 1),
            "padding_share": 1 - seen["tokens"] / max(seen["slots"], 1),
        },
        "train": {
            "seconds": seconds,
            "seconds_by_part": {name: round(value, 3) for name, value in trainer.budget.seconds.items()},
            "evaluation_share": round(trainer.budget.share_of(seconds), 4),
            "steps": trainer.state.global_step,
            "tokens": seen["tokens"],
            "supervised_tokens": seen["supervised_tokens"],
            "tokens_per_second": seen["tokens"] / seconds,
            "resumed": trainer.progress.resumes,
            **({"loss_spikes": spikes} if spikes else {}),
            **ending(trainer),
            **({"rows_at_once": rows_at_once} if rows_at_once else {}),
        },
        "float32_copies": trainer.copies.facts() if trainer.copies is not None else None,
        "metrics": metrics,
        "warnings": told(Path(trainer.args.output_dir)),
    }


def _give_names(partial: Path, run: Path) -> None:
    """Move the final model to its place, the file by which libraries know a model last."""
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs beside recipe.yaml
    known = ("config.json", "adapter_config.json")
    readable = partial.stat().st_mode & 0o666  # safetensors lets the owner alone read its files
    sync(partial)  # a name must not stand for a file that a power cut would empty
    for path in sorted(partial.iterdir(), key=lambda path: (path.name in known, path.name)):
        path.chmod(readable)
        path.replace(run / path.name)
    partial.rmdir()
    sync_one(run)


def library_versions(recipe: Recipe) -> dict[str, str]:
    """Library -> version, of all that have a part in this run.

    >>> library_versions(recipe)["torch"]
    '2.13.0+cpu'
    """
    from importlib.metadata import version

    libraries = ["torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers"]
    if recipe.model.quantization != "none":
        libraries.append("bitsandbytes")
    return {"instructft": __version__, **{name: version(name) for name in libraries}}


@contextlib.contextmanager
def kept_unproved(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, console: Console) -> Iterator[None]:
    """Whatever fails inside, what was trained is kept in `unproved/`, and the error is raised again.

    Where processes share the weights among them each would have to take part in writing, and others may not have
    failed: what had been written by then is kept.
    """
    try:
        yield
    except Exception:
        if trainer.is_world_process_zero():
            run = Path(trainer.args.output_dir)
            try:
                if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
                    _write_unproved(trainer, tokenizer, run / UNPROVED)
                    shutil.rmtree(run / PARTIAL, ignore_errors=True)
                elif (run / PARTIAL).is_dir():
                    shutil.rmtree(run / UNPROVED, ignore_errors=True)
                    (run / PARTIAL).replace(run / UNPROVED)
                if (run / UNPROVED).is_dir():
                    say = (
                        f"what was trained is kept in {run / UNPROVED}; it is not proved, and not the run's final model"
                    )
                    console.print(say, markup=False, highlight=False)
            except Exception as trouble:  # must not hide why the run failed
                say = f"what was trained could not be kept in {run / UNPROVED}: {trouble}"
                console.print(say, markup=False, highlight=False)
        raise


def _write_unproved(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    from instructft.models.load import fit_special_tokens

    shutil.rmtree(folder, ignore_errors=True)
    fit_special_tokens(trainer.accelerator.unwrap_model(trainer.model), tokenizer)
    trainer.save_model(str(folder))


def save(
    trainer: Trainer,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    data: Prepared | Streamed,
    origin: StartingPoint,
) -> None:
    """Write the final model, its tokenizer and the metadata of the run."""
    from instructft.adapters.lora import is_peft
    from instructft.models.load import fit_special_tokens
    from instructft.models.tokenizer import hand_on
    from instructft.report.curves import plot_loss
    from instructft.report.model_card import write_card
    from instructft.report.page import draw_report
    from instructft.report.row_file import write_rows
    from instructft.training.rehearsal.saved_loss import prove_saved_loss
    from instructft.weights.model_class import auto_class
    from instructft.weights.older_readers import for_older_readers
    from instructft.weights.weight_files import require_whole

    run = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    fit_special_tokens(model, tokenizer)  # the trainer aligns them with the tokenizer's EOS, which may be another
    trainer.save_model(str(run / PARTIAL))
    seen = trainer.rows_seen()
    if not trainer.is_world_process_zero():
        return
    require_whole(model, run / PARTIAL)
    hand_on(recipe, run / PARTIAL)
    facts["like_base"] = compared_with_base(model, run / PARTIAL, recipe, origin)
    facts["stored"] = stored_as(run / PARTIAL)
    facts["generation"] = generation_facts(model, origin)
    facts["model_class"] = auto_class((model.get_base_model() if is_peft(model) else model).config).__name__
    for_older_readers(run / PARTIAL)
    shared = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    facts["saved"] = None if shared else prove_saved_loss(trainer, run / PARTIAL)
    shutil.rmtree(run / UNPROVED, ignore_errors=True)  # of an attempt before this one, which is proved
    (run / "run.json").unlink(missing_ok=True)  # of a shorter run, if this one was resumed from there
    facts["files"] = sums(run / PARTIAL)
    _give_names(run / PARTIAL, run)
    if trainer.history is not None and seen is not None:
        write_rows(run, data, seen, trainer.history.since)  # type: ignore[arg-type]  # streams have no history
    plot_loss(run, recipe.name)
    write_card(run, recipe, facts)
    draw_report(run, recipe, facts, tokenizer, data)
    _write_facts(run, facts)  # last: by it a run is known to be finished


def compared_with_base(model: Any, folder: Path, recipe: Recipe, origin: StartingPoint) -> dict[str, Any] | None:
    """What was saved, in the types of its base and held against it; None for an adapter, which its loading proves.

    Raises:
        ModelError: it is not what its base is.
    """
    from instructft.adapters.lora import is_peft
    from instructft.weights.base_manifest import save_like_base
    from instructft.weights.base_record import base_folder

    if not origin.name or is_peft(model) or getattr(origin.config, "quantization_config", None):
        return None
    base = base_folder(origin.name, origin.revision, origin.subfolder)
    return save_like_base(model, folder, base, recipe.model.dtype != "auto") if base else None


def stored_as(folder: Path) -> str:
    """The type of most of the saved weights: `bfloat16`."""
    from instructft.adapters.adapter_folder import WEIGHTS, is_adapter
    from instructft.weights.weight_files import DTYPES, read_header, weight_files

    sizes: Counter[str] = Counter()
    for file in [folder / WEIGHTS] if is_adapter(folder) else weight_files(folder):
        for tensor in read_header(file).values():
            sizes[tensor.dtype] += tensor.end - tensor.start
    kind = sizes.most_common(1)[0][0]
    return DTYPES[kind][0] if kind in DTYPES else kind


def generation_facts(model: Any, origin: StartingPoint) -> dict[str, Any]:
    """How the saved model answers whoever asks without settings, and what of its base's settings was left out."""
    from transformers import GenerationConfig

    from instructft.models.load import answer_plainly

    saved, left_out = model.generation_config, {}
    if origin.name:
        where = {"revision": origin.revision, "subfolder": origin.subfolder}
        with contextlib.suppress(OSError, ValueError):  # many have none
            left_out = answer_plainly(GenerationConfig.from_pretrained(origin.name, local_files_only=True, **where))
    ends = {name: getattr(saved, name) for name in ("eos_token_id", "pad_token_id")}
    return {**ends, "do_sample": False, "left_out": left_out}


def template_facts(tokenizer: PreTrainedTokenizerBase, origin: StartingPoint) -> dict[str, str | None]:
    """Hashes of the template that is trained, and of the one that the base has of its own (None: it has none)."""
    from instructft.models.base_template import at_hand, hash_of

    own = at_hand(origin.name, origin.revision, origin.subfolder) if origin.name else None
    return {"sha256": hash_of(str(tokenizer.chat_template)), "of_base": own}


def say_of_saved(facts: Mapping[str, Any], model: Any, console: Console) -> None:
    """Tell in which type the final model is stored, and which settings of its base's answers it does not have."""
    stored, alike = facts.get("stored"), (facts.get("like_base") or {}).get("dtype")
    if not stored:  # another process has saved it
        return
    why = ""
    if alike and alike != str(model.dtype).removeprefix("torch."):
        why = ", as its base is (model.dtype=float32 keeps what was trained)"
    if facts.get("float32_copies"):
        why = ", rounded by chance from its float32 copies, so that small changes are kept on average"
    console.print(f"the final model is stored in {stored}{why}", highlight=False)
    if left_out := facts["generation"]["left_out"]:
        listed = ", ".join(f"{name} {value}" for name, value in left_out.items())
        console.print(
            f"generation_config.json does not have its base's {listed}: a server would answer by them unasked",
            markup=False,
            highlight=False,
        )


def _write_facts(run: Path, facts: dict[str, Any]) -> None:
    """`run.json`, whole and on the disk, or not there."""
    partial = run / "run.json.partial"
    partial.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
    sync_one(partial)
    partial.replace(run / "run.json")
    sync_one(run)


def final_metrics(trainer: Trainer) -> dict[str, Any]:
    """The last value of every metric; validates once more if the last validation was before the last step."""
    from instructft.training.stopping import restored

    history = trainer.state.log_history
    evaluated = max((entry["step"] for entry in history if "eval_loss" in entry), default=-1)
    best = restored(trainer)
    if trainer.eval_dataset is not None and evaluated != trainer.state.global_step and best is None:
        trainer.evaluate()
    metrics: dict[str, Any] = {}
    # the final model is that of the best checkpoint, and so are its figures
    at_best = [entry for entry in trainer.state.log_history if entry["step"] == best and "eval_loss" in entry]
    for entry in [*trainer.state.log_history, *at_best]:
        metrics.update(entry)
    return {key: value for key, value in metrics.items() if key not in ("step", "epoch", "total_flos")}
