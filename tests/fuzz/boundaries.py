"""Where files of strangers come in: for each such boundary a sound folder, and what reads it as the commands do."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instructft.recipe.shipped import shipped_recipes

RECIPE = b"""model:
  name_or_path: org/base
data:
  datasets:
    - path: rows.jsonl
  template: chatml
adapter: {type: lora, r: 8}
train:
  learning_rate: 1.0e-4
output_dir: runs/a
"""
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
ROWS = [{"instruction": f"Say {n}.", "input": "" if n % 2 else "twice", "output": f"{n} and é"} for n in range(1, 6)]
DIALOGUE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
TALKS = [
    {"messages": DIALOGUE, "tools": TOOLS},
    {"messages": [DIALOGUE[0], CALL, {"role": "tool", "content": "2"}, DIALOGUE[1]], "tools": json.dumps(TOOLS)},
]


class Boundary(NamedTuple):
    """A sound folder, and its reader.

    Args:
        files: path in the folder -> content.
        read: reads a folder, given which file was changed; what it gives back is compared where `sealed`.
        sealed: a change of any byte has to be refused, or leave what is read as it was.
        again: makes what was changed fit its sums again, as whoever writes a folder can.
    """

    files: Mapping[str, bytes]
    read: Callable[[Path, str], Any]
    sealed: bool = False
    again: Callable[[Path], None] | None = None


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# --------------------------------------------------------------------------------------------------------------------
# Recipes and rows
# --------------------------------------------------------------------------------------------------------------------


def recipes() -> Boundary:
    """Every recipe that is shipped."""
    from instructft.recipe.load import load_recipe

    files = {path.name: path.read_bytes() for path in shipped_recipes().values()}
    return Boundary(files, lambda folder, name: load_recipe(folder / name))


def rows() -> Boundary:
    """Data files of every type, read and mapped to conversations."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from instructft.data import readers
    from instructft.data.files.kinds import suffix_of
    from instructft.data.formats import detect_format, to_conversation
    from instructft.prompt.ledger import Unread, Unusable

    table = pa.Table.from_pylist(ROWS)
    parquet, stream = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    cells = [["instruction", "input", "output"], *(list(row.values()) for row in ROWS)]
    files = {
        "rows.jsonl": lines(ROWS),
        "talks.jsonl": lines(TALKS),
        "rows.json": json.dumps(ROWS).encode(),
        "rows.csv": "\n".join(",".join(f'"{cell}"' for cell in row) for row in cells).encode(),
        "rows.tsv": "\n".join("\t".join(row) for row in cells).encode(),
        "rows.parquet": parquet.getvalue(),
        "rows.arrow": stream.getvalue(),
    }

    def read(folder: Path, name: str) -> Any:
        found = list(readers.rows(folder / name, suffix_of(name), str(folder / name)))
        columns = list(dict.fromkeys(key for row in found for key in row))
        fmt = detect_format(columns, str(folder / name))
        for row in found:
            try:
                to_conversation(row, fmt)
            except (Unusable, Unread):
                continue
        return found

    return Boundary(files, read)


def packed_rows() -> Boundary:
    """Packed data files, which hold a sum of what is in them."""
    from instructft.data import readers
    from instructft.data.files.kinds import suffix_of
    from instructft.errors import DataError

    text = lines(ROWS)
    files = {
        "rows.jsonl.gz": gzip.compress(text),
        "rows.jsonl.bz2": bz2.compress(text),
        "rows.jsonl.xz": lzma.compress(text),
    }

    def read(folder: Path, name: str) -> Any:
        found = list(readers.rows(folder / name, suffix_of(name), str(folder / name)))
        if not found:  # as `readers.read_file` says it
            raise DataError(f"{folder / name} holds no rows")
        return found

    return Boundary(files, read, sealed=True)


def questions() -> Boundary:
    """What `generate` is given."""
    from instructft.inference.jsonl import read_rows

    asked = [{"prompt": "Hi"}, {"messages": DIALOGUE[:1], "id": 7}, {"instruction": "Add.", "input": "1 2"}]
    return Boundary({"rows.jsonl": lines(asked)}, lambda folder, name: read_rows(folder / name))


# --------------------------------------------------------------------------------------------------------------------
# Weights, adapters, checkpoints, runs
# --------------------------------------------------------------------------------------------------------------------


def safetensors(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A file of float32 zeros."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(place)


def headers() -> Boundary:
    """Weight files, by their headers, and the index of shards."""
    from instructft.weights.readable import require_readable
    from instructft.weights.weight_files import fingerprint

    names = {"a.weight": (4, 2), "b.bias": (3,), "c": ()}
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    files = {
        first: safetensors(names),
        second: safetensors({"d": (2, 2)}),
        "model.safetensors.index.json": json.dumps(
            {"metadata": {"total_size": 64}, "weight_map": {**dict.fromkeys(names, first), "d": second}}
        ).encode(),
    }

    def read(folder: Path, name: str) -> None:
        require_readable(folder)
        fingerprint(folder)

    return Boundary(files, read)


def adapters() -> Boundary:
    """Adapter folders, without their base."""
    from instructft.adapters.adapter_folder import read_adapter

    module = "base_model.model.transformer.h.0.attn.c_attn"
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"],
        "rank_pattern": {"h.1": 3}, "alpha_pattern": {}, "base_model_name_or_path": "base", "layers_pattern": None,
        "trainable_token_indices": {"wte": [1, 2]}, "use_dora": False, "target_parameters": None,
    }  # fmt: skip
    base = {
        "name_or_path": "base", "revision": None, "subfolder": None, "commit": None, "fingerprint": "0" * 64,
        "quantization": "none", "dtype": "float32", "vocab_size": 8,
    }  # fmt: skip
    shapes = {
        f"{module}.lora_A.weight": (2, 8),
        f"{module}.lora_B.weight": (24, 2),
        "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta": (2, 8),
    }
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "base.json": json.dumps(base).encode(),
        "adapter_model.safetensors": safetensors(shapes),
    }
    return Boundary(files, lambda folder, _: read_adapter(folder))


def _checkpoint(step: int = 4) -> dict[str, bytes]:
    """The files of a sealed checkpoint."""
    from instructft.checkpoints.manifest import seal

    state = {
        "global_step": step, "best_model_checkpoint": "run/checkpoint-2",
        "log_history": [{"step": 1, "loss": 2.0}, {"step": step, "loss": 1.5, "start_loss": 3.0}],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(safetensors({"a": (2, 2)}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "progress_0.json"):
            (folder / name).write_bytes(b"{}")
        (folder / "trainer_state.json").write_text(json.dumps(state))
        seal(folder, {"processes": 1, "data.max_length": 64}, {"torch": "2.13"})
        return {f"{folder.name}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def _seal_again(folder: Path) -> None:
    """Make the manifest fit its folder, and its sum itself, as far as it can still be read."""
    for path in folder.rglob("manifest.json"):
        with contextlib.suppress(Exception):  # what cannot be read is left as it is
            manifest = json.loads(path.read_bytes())["manifest"]
            with contextlib.suppress(Exception):
                for name, known in manifest["files"].items():
                    content = (path.parent / name).read_bytes()
                    if isinstance(known["size"], int) and isinstance(known["sha256"], str):
                        known.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
            digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps({"manifest": manifest, "sha256": digest}))


def checkpoints() -> Boundary:
    """Checkpoints that were damaged: none is resumed from."""
    from instructft.checkpoints.resume import find

    return Boundary(_checkpoint(), lambda folder, _: find(folder, "auto")[0], sealed=True)


def foreign_checkpoints() -> Boundary:
    """Checkpoints whose manifests their author sealed over what is wrong in them."""
    from instructft.checkpoints.resume import find, run_start

    def read(folder: Path, _: str) -> None:
        found, passed = find(folder, "auto")
        run_start(found, passed, {"processes": 1, "data.max_length": 64}).lines()

    return Boundary(_checkpoint(), read, again=_seal_again)


def hub() -> Boundary:
    """Checkpoints that a hostile Hub holds."""
    from instructft.hub import resume
    from instructft.recipe.schema import HubSection

    class Remote(NamedTuple):
        size: int
        sha256: str | None

    def read(folder: Path, _: str) -> None:
        run, store = folder / "run", {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store[path.relative_to(folder).as_posix()] = path.read_bytes()
        run.mkdir()

        def download(api: Any, repo_id: str, head: str, path: str, aside: Path) -> Path:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_bytes(store[path])
            return aside / path

        tree = {name: Remote(len(content), None) for name, content in store.items()}
        kept = resume._look, resume._download
        resume._look, resume._download = lambda hub: (None, "a/b", "head", tree), download  # type: ignore[assignment]
        try:
            resume.newest_on_hub(HubSection(repo_id="a/b"), run)
        finally:
            resume._look, resume._download = kept
            shutil.rmtree(run)

    newest = {name.replace("checkpoint-4", "last-checkpoint"): content for name, content in _checkpoint().items()}
    return Boundary({**newest, **_checkpoint(2)}, read, again=_seal_again)


def runs() -> Boundary:
    """Run folders, as `runs`, `compare` and the commands that take one read them."""
    from instructft.checkpoints.as_saved import require_as_saved
    from instructft.recipe.load import load_run_recipe
    from instructft.report.compare import answers, curves, figures, notes, overview, read_sides, recipe_differences
    from instructft.report.runs import find_runs

    weights = safetensors({"a": (2, 2)})
    facts = {
        "format": 1, "train": {"steps": 4, "seconds": 2.5}, "data": {"train": {"rows": 5}},
        "files": {"model.safetensors": {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}},
        "versions": {"torch": "2.13"}, "samples": [], "metrics": {"eval_loss": 1.5},
    }  # fmt: skip
    files = {
        "run.json": json.dumps(facts).encode(),
        "recipe.yaml": RECIPE,
        "metrics.jsonl": lines([{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.5, "eval_loss": 1.6}]),
        "model.safetensors": weights,
    }

    def read(folder: Path, name: str) -> None:
        list(find_runs(folder))
        require_as_saved(folder / "a", whole=True)
        load_run_recipe(folder / "a")
        sides = read_sides([str(folder / "a"), str(folder / "b")])
        for part in (overview, recipe_differences, figures, notes, answers):
            part(sides)
        if name.endswith("metrics.jsonl"):
            curves(sides)

    return Boundary({f"{run}/{name}": content for run in "ab" for name, content in files.items()}, read)


# --------------------------------------------------------------------------------------------------------------------
# With libraries: tokenizers, templates, models, files of torch
# --------------------------------------------------------------------------------------------------------------------


def tokenizer_files() -> dict[str, bytes]:
    """Byte-level BPE of a few hundred tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["Say it twice and again."],
        trainers.BpeTrainer(
            vocab_size=264, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "model_max_length": 64}
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps({**config, "chat_template": CHAT}).encode(),
        "special_tokens_map.json": b'{"eos_token": "<eos>"}',
    }


def tokenizers() -> Boundary:
    """Tokenizers, as `chat` and as `train` load them."""
    from instructft.models.load_for_inference import load_tokenizer_of
    from instructft.models.tokenizer import load_tokenizer
    from instructft.recipe.load import load_recipe

    def read(folder: Path, _: str) -> None:
        load_tokenizer(load_recipe("quickstart", [f"model.tokenizer={folder}", "data.template=instruction"]))
        load_tokenizer_of(str(folder))

    # as locate() wants it: a model folder
    return Boundary({**tokenizer_files(), "config.json": b'{"model_type": "gpt2"}'}, read)


def templates() -> Boundary:
    """Chat templates of models and of recipes, studied for training and rendered for chat."""
    from transformers import AutoTokenizer

    from instructft.errors import TemplateError
    from instructft.models.tokenizer import load_tokenizer
    from instructft.prompt.loss_mask import Encoder
    from instructft.prompt.render import Renderer
    from instructft.recipe.load import load_recipe

    with tempfile.TemporaryDirectory() as place:
        for name, content in tokenizer_files().items():
            (Path(place) / name).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(place)

    def read(folder: Path, name: str) -> None:
        tokenizer.chat_template = (folder / name).read_bytes().decode("utf-8", "surrogateescape")
        recipe = load_recipe("quickstart", [f"data.template={folder / name}"])
        for use in (
            lambda: load_tokenizer(recipe),
            lambda: Encoder(tokenizer),
            lambda: Renderer(tokenizer).texts([DIALOGUE[:1]], True),
        ):
            try:
                use()
            except TemplateError as error:
                if "template" not in str(error):
                    raise RuntimeError(f"it does not say what it is about: {error}") from error

    turns = "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    longer = CHAT.replace("<{{", turns + "<{{") + "{% if add_generation_prompt %}<assistant>{% endif %}"
    return Boundary({"short.jinja": CHAT.encode(), "chat_template.jinja": longer.encode()}, read)


def models() -> Boundary:
    """Model folders, loaded to chat with."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from instructft.models.load_for_inference import load_for_inference

    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=264, n_positions=16)).save_pretrained(
            place
        )
        files = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}
    return Boundary({**files, **tokenizer_files()}, lambda folder, _: load_for_inference(str(folder)))


def torch_files() -> Boundary:
    """Files of `torch.save`, which hold sums that torch does not compare."""
    import torch

    from instructft.extras.convert.state_dict import read_file

    held = {"model": {"transformer.wte.weight": torch.arange(8.0).reshape(4, 2)}, "config": {"n_layer": 1, "n_head": 1}}
    file = io.BytesIO()
    torch.save(held, file)

    def read(folder: Path, name: str) -> Any:
        found = read_file(folder / name)
        return {key: value.tolist() for key, value in found.tensors.items()}, dict(found.settings)

    return Boundary({"model.pt": file.getvalue()}, read, sealed=True)


PLAIN = (recipes, rows, packed_rows, questions, headers, adapters, checkpoints, foreign_checkpoints, hub, runs)
HEAVY = (tokenizers, templates, models, torch_files)
