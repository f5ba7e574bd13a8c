"""`instructft export`: a model for llama.cpp and Ollama, by llama.cpp's own tools, read back and compared.

run with adapter ─► merged, proved ─┐
any other model ────────────────────┴► convert_hf_to_gguf.py ─► f16 ─► llama-quantize ─► q4_k_m …
                                                                 │ read back, beside the merged model
                                                                 ▼
                                          OUTPUT/NAME-f16.gguf … export.json [Modelfile]
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.run_folder import partial_folder, refuse_used
from instructft.errors import ModelError, TemplateError, UsageError
from instructft.evaluation.compare import plain_table
from instructft.extras.serving.asked import choose, held_out
from instructft.extras.serving.llama_cpp import (
    CONVERTED,
    convert,
    find_converter,
    find_quantizer,
    formats,
    quantize,
    require_format,
)
from instructft.extras.serving.ollama import modelfile
from instructft.extras.serving.read_back import (
    Figures,
    NotReadError,
    Text,
    compared,
    settle_tokenizer,
    texts_of,
    weights_of,
)
from instructft.formatting import first_line, size, typed
from instructft.inference.reference_model import recipe_of
from instructft.models.load_for_inference import context_of, find_adapter, load_for_inference, load_tokenizer_of, locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 64  # that a file is compared on
SOURCE = "f16"  # what is always written, and what the others are made of
SAME = 0.01  # nats a token that f16 may be away from the model


def export(
    model: str, output: Path, fmt: str = "gguf", quantized: str = "", converter: Path | None = None, rows: int = ROWS
) -> dict[str, Any]:
    """Write `output`, print the table of its files, and return what `export.json` says.

    Args:
        fmt: `gguf`, or `ollama`: the same with a Modelfile.
        quantized: names with commas between, such as `q8_0,q4_k_m`.
        converter: llama.cpp's script or folder; None: it is looked for.
        rows: that every file is compared with the model on; 0: nothing is compared, and no weights are loaded.

    Example::

        export("runs/quickstart", Path("quickstart-gguf"), quantized="q8_0")["files"][0]["top1"]
        # 1.0

    Raises:
        UsageError: no model, no converter, or an output that is not free; nothing is written.
        TemplateError: Ollama's language cannot express the chat template; nothing is written.
        ModelError: the converter fails, or the file is not the model; nothing is kept.
    """
    from rich.console import Console

    require_format(fmt)
    if rows < 0:
        raise UsageError(f"--rows: found {rows}, expected 1 or more, or 0 to compare nothing")
    refuse_used(output)
    locate(model)
    script = find_converter(converter)
    names = [SOURCE, *(name for name in formats(quantized) if name != SOURCE)]
    others = [name for name in names if name not in CONVERTED]
    quantizer = find_quantizer(script, others[0]) if others else None
    _require_gguf()
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    with partial_folder(output) as folder:
        merged = _as_folder(model, folder / "merged")
        loaded, tokenizer = _loaded(merged, rows)
        name = f"./{_file(model, names[-1])}"
        asks = modelfile(tokenizer, name, _generation(merged)) if fmt == "ollama" else None
        texts, source = _texts(model, tokenizer, rows)
        say(f"compared   {source}")
        found: list[dict[str, Any]] = []
        own = 0.0
        staged = _staged(merged, folder / "staged")
        for name in names:
            file = folder / _file(model, name)
            if name in CONVERTED:
                convert(script, staged, file, name)
            else:
                assert quantizer is not None
                quantize(quantizer, folder / _file(model, SOURCE), file, name)
            changed = _settled(file, tokenizer)
            for line in changed if name == SOURCE else ():
                say(f"tokenizer  {line}")
            figures, own, why = _read_back(loaded, file, texts, own)
            if name == SOURCE and figures is not None and not figures.kl <= SAME:
                raise ModelError(
                    f"read back, {file.name} is not the model: KL {figures.kl:.2g} nats a token, expected {SAME}"
                )
            found.append(
                {"file": file.name, "format": name, "bytes": file.stat().st_size, "not_read": why}
                | (vars(figures) if figures else {})
            )
        facts = {
            "model": _called(model),  # no path of this machine: the folder is made to be handed on
            "converter": str(script.name),
            "compared_on": source,
            "perplexity": own,
            "files": found,
        }
        (folder / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if asks is not None:
            (folder / "Modelfile").write_text(asks, encoding="utf-8")
        for scratch in ("merged", "staged"):
            shutil.rmtree(folder / scratch, ignore_errors=True)
    _report(console, output, facts, fmt, model)
    return facts


def _staged(merged: Path, folder: Path) -> Path:
    """The model as the converter wants it: with `n_ctx`, which transformers 5 no longer writes for GPT-2."""
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    if "n_positions" not in config or "n_ctx" in config:
        return merged
    folder.mkdir()
    for file in merged.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}), encoding="utf-8")
    return folder


def _loaded(merged: Path, rows: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model in float32, where files are compared with it, and its tokenizer."""
    if not rows:
        return None, load_tokenizer_of(str(merged))
    model, tokenizer = load_for_inference(str(merged))
    return model.float(), tokenizer


def _generation(merged: Path) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(merged) if (merged / "generation_config.json").is_file() else None


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError("reading a file back needs the package gguf: pip install 'instructft[gguf]'") from error


def _called(model: str) -> str:
    """The name of a model's files."""
    return Path(model.partition("@")[0]).expanduser().resolve().name


def _file(model: str, name: str) -> str:
    return f"{_called(model)}-{name}.gguf"


def _as_folder(model: str, merged: Path) -> Path:
    """A folder with the whole model: where it lies, fetched from the Hub, or merged into `merged`."""
    adapter = find_adapter(model)
    if adapter is not None:
        from instructft.merging.merge import merge_adapter

        merge_adapter(str(adapter.folder), merged)
        return merged
    location, revision = locate(model)
    if Path(location).is_dir():
        return Path(location).resolve()
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    return Path(snapshot_download(location, revision=revision, allow_patterns=wanted))


def _settled(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    from instructft.prompt.loss_mask import encoder

    chat = encoder(tokenizer)
    try:
        stops, prompt = chat.stop_ids, chat.prompts([[{"role": "user", "content": "Hi"}]])[0]
    except TemplateError:
        return []
    return settle_tokenizer(file, tokenizer, prompt, stops) if stops else []


def _texts(model: str, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[list[Text], str]:
    """What files are compared on: answers of rows that the run held out, else whole prompts of our own."""
    from instructft.prompt.loss_mask import encoder

    if not most:
        return [], "nothing: --rows 0"
    recipe, context = recipe_of(model), context_of(model) or 1024
    conversations = held_out(recipe, answered=True)
    if conversations:
        encoded = encoder(tokenizer).encode(conversations[:most]).lists()
        if texts := list(texts_of(encoded, context)):
            count = sum(len(text.places) for text in texts)
            return texts, f"on {count:,} answer tokens of {len(conversations[:most])} rows that the run held out"
    asked, _ = choose(None, encoder(tokenizer), most, context)
    texts = [Text(one.ids, list(range(len(one.ids) - 1))) for one in asked if len(one.ids) > 1]
    if not texts:
        raise UsageError(f"the chat template of {model} takes no conversation that its context has room for")
    count = sum(len(text.places) for text in texts)
    return texts, f"on {count:,} tokens of {len(texts)} prompts of our own: no held-out rows are known"


def _read_back(model: Any, file: Path, texts: Sequence[Text], own: float) -> tuple[Figures | None, float, str]:
    if not texts:
        return None, own, "not asked for"
    try:
        other = weights_of(file, model.config)
    except NotReadError as error:
        return None, own, first_line(error)
    figures, own = compared(model, other, texts)
    return figures, own, ""


def _report(console: Any, output: Path, facts: dict[str, Any], fmt: str, model: str) -> None:
    table = plain_table("file", "size", "KL", "top-1", "perplexity")
    first = facts["perplexity"]
    table.add_row("the model itself", "", "", "", f"{first:.4f}" if first else "")
    for row in facts["files"]:
        cells = (
            ("", "", "") if row["not_read"] else (f"{row['kl']:.1e}", f"{row['top1']:.2%}", f"{row['perplexity']:.4f}")
        )
        table.add_row(row["file"], size(row["bytes"]), *cells)
    console.print(table)
    for why in {row["not_read"] for row in facts["files"] if row["not_read"]}:
        console.print(f"Not read back: {why}. Serve it, and compare with instructft verify.", markup=False)
    console.print(f"\nExported to {output}. Serve it, and see whether it is served as trained:\n", markup=False)
    if fmt == "ollama":
        console.print(f"  cd {typed(output)} && ollama create {_in_ollama(model)} -f Modelfile\n", markup=False)
    else:  # the first: fewer bits answer otherwise, which the table has already told
        console.print(
            f"  llama-server -m {typed(output / facts['files'][0]['file'])} --port 8080\n"
            f"  instructft verify {typed(model)} --server http://127.0.0.1:8080\n",
            markup=False,
        )


def _in_ollama(model: str) -> str:
    """A name that Ollama takes for a model.

    >>> _in_ollama("runs/My First_Run (2)"), _in_ollama("org/name@main")
    ('my-first_run-2', 'name')
    """
    return re.sub(r"[^a-z0-9._-]+", "-", _called(model).lower()).strip("-._") or "model"
