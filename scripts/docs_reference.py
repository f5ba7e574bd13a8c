"""Writes the pages of docs/ that the code decides: every key of a recipe, and the Python API.

    python scripts/docs_reference.py            # writes docs/recipe-reference.md and docs/python-reference.md
    python scripts/docs_reference.py --check    # exit 1 if one of them is out of date

Types, defaults and descriptions are those of the JSON schema that editors read, so a page cannot drift from the loader.
What the schema does not hold, the unit and an example of each key, stands below; a test loads every example.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import instructft  # noqa: E402
from instructft.recipe.aliases import TRAIN_BOUNDS  # noqa: E402
from instructft.recipe.fields import OWN_TRAIN_FIELDS, legal_lora_fields, legal_train_fields  # noqa: E402

HEAD = "<!-- Written by scripts/docs_reference.py; change the code it reads, then run it again. -->\n\n"
SECTIONS = {  # the recipe's own sections, in the order of the page, each with the page that explains it
    "model": "Either `name_or_path`, or `config` with `tokenizer` to start from random weights. See [the Hub](hub.md).",
    "data": "Which conversations, how they are rendered, cut, packed and held out. See [Data and templates](data.md).",
    "data.datasets": "An entry has exactly one of `name`, `hub`, `path` and `url`. A name is short for `{name: …}`.",
    "data.splits": "Shares of the rows that are held out; the rest is trained.",
    "adapter": "`adapter: lora` is short for `{type: lora}`. See [LoRA, QLoRA and merging](lora.md).",
    "train": "Our own keys. Fields of `trl.SFTConfig` may stand next to them: [below](#fields-of-trlsftconfig).",
    "evaluation": "Held-out rows that are answered while it trains. See [Evaluation](evaluation.md#while-it-trains).",
    "hub": "The access token comes from `HF_TOKEN` or the login, never from a recipe. See [the Hub](hub.md).",
    "check": "What `instructft check` lets pass: beyond a limit it ends with exit code 2. `null` sets no limit.",
}
# dotted key -> (unit, example as it is written after the colon)
OWN: dict[str, tuple[str, str]] = {
    "model.name_or_path": ("", "openai-community/gpt2"),
    "model.config": ("", "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 64}"),
    "model.tokenizer": ("", "quickstart"),
    "model.revision": ("", "main"),
    "model.subfolder": ("", "latest"),
    "model.dtype": ("", "bfloat16"),
    "model.attn_implementation": ("", "sdpa"),
    "model.overrides": ("", "{attn_pdrop: 0.0}"),
    "model.freeze": ("", "[model.embed_tokens, 'model.layers.[0-7]']"),
    "model.new_tokens": ("", "[<plan>, </plan>]"),
    "model.quantization": ("bits a weight", "4bit"),
    "data.datasets": ("", "dolly-15k"),
    "data.template": ("", "chatml"),
    "data.system_prompt": ("", "You are a patient assistant."),
    "data.train_on": ("", "last_response"),
    "data.turns": ("", "last"),
    "data.fold_turns": ("", "true"),
    "data.template_options": ("", "{enable_thinking: false}"),
    "data.template_adds": ("", "[tools]"),
    "data.ignore": ("", "[mood, user.train]"),
    "data.strip": ("", "true"),
    "data.exclude": ("", "out.txt"),
    "data.template_date": ("YYYY-MM-DD", "2026-01-31"),
    "data.max_length": ("tokens a row", "512"),
    "data.on_too_long": ("", "drop"),
    "data.packing": ("", "auto"),
    "data.splits": ("shares of the rows", "{validation: 0.05, test: 0.05}"),
    "data.validation": ("entries like those of `data.datasets`", "[{path: held-out.jsonl, label: support}]"),
    "data.test": ("entries like those of `data.datasets`", "[{hub: org/name, split: test}]"),
    "data.seed": ("", "7"),
    "data.datasets.0.name": ("", "alpaca"),
    "data.datasets.0.hub": ("", "org/name"),
    "data.datasets.0.path": ("", "rows.jsonl"),
    "data.datasets.0.url": ("", "https://example.org/rows.jsonl"),
    "data.datasets.0.format": ("", "alpaca"),
    "data.datasets.0.config": ("", "default"),
    "data.datasets.0.split": ("", "train[:10%]"),
    "data.datasets.0.revision": ("", "main"),
    "data.datasets.0.rows": ("rows", "2000"),
    "data.datasets.0.weight": ("relative share", "2.0"),
    "data.datasets.0.repeat": ("times an epoch", "3"),
    "data.mix_by": ("", "tokens"),
    "data.datasets.0.columns": ("", "{instruction: question, output: answer}"),
    "data.datasets.0.label": ("", "medical"),
    "data.datasets.0.streaming": ("", "true"),
    "data.splits.validation": ("share of the rows", "0.02"),
    "data.splits.test": ("share of the rows", "0.1"),
    "adapter.type": ("", "lora"),
    "adapter.r": ("rank", "8"),
    "adapter.alpha": ("", "16"),
    "adapter.dropout": ("share of the inputs", "0.1"),
    "adapter.target_modules": ("", "[c_attn, c_proj]"),
    "adapter.use_dora": ("", "true"),
    "adapter.use_rslora": ("", "true"),
    "adapter.lora_plus_ratio": ("times train.learning_rate", "16.0"),
    "adapter.experts": ("", "true"),
    "adapter.stack": ("", "true"),
    "train.tokens_per_step": ("tokens a step, all processes", "16384"),
    "train.loss_spike_limit": ("times the median loss", "5.0"),
    "train.on_loss_spike": ("", "skip"),
    "train.on_divergence": ("", "warn"),
    "train.early_stopping_patience": ("evaluations", "3"),
    "train.torch_compile": ("", "true"),
    "train.torch_compile_backend": ("", "aot_eager"),
    "train.torch_compile_mode": ("", "max-autotune-no-cudagraphs"),
    "train.evaluation_budget": ("share of the time trained", "0.05"),
    "train.save_in_background": ("", "true"),
    "train.row_history": ("", "false"),
    "train.fp8": ("", "true"),
    "train.float32_copies": ("", "true"),
    "train.deterministic": ("", "true"),
    "hub.repo_id": ("", "ada/support"),
    "hub.private": ("", "false"),
    "hub.path_in_repo": ("", "instruct/"),
    "hub.push": ("", "end"),
    "check.max_dropped_share": ("share of the rows", "0.01"),
    "check.max_refused_share": ("share of the rows", "0.01"),
    "check.max_cut_share": ("share of the rows", "0.05"),
    "check.max_duplicate_share": ("share of the rows", "0.1"),
    "check.max_contradictions": ("rows", "0"),
    "check.max_leaks": ("rows", "0"),
    "check.max_markers": ("rows", "0"),
    "check.max_memory_gib": ("GiB", "22"),
    "evaluation.rows": ("rows", "100"),
    "evaluation.metrics": ("", "[exact_match, my_metrics.py:score]"),
    "samples": ("", "[How do I reset my password?]"),
    "output_dir": ("", "runs/support"),
}
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
# Fields of SFTConfig and LoraConfig whose default would be a poor example.
FIELDS = {
    "num_train_epochs": 2,
    "max_steps": 1000,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "report_to": ["wandb"],
    "optim": "adafactor",
    "neftune_noise_alpha": 5,
    "dataloader_num_workers": 2,
    "layers_to_transform": [0, 1],
    "layer_replication": [[0, 4], [2, 6]],
    "trainable_token_indices": [50257],
    "alora_invocation_tokens": [27, 91],
    "modules_to_save": ["lm_head"],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "exclude_modules": ["lm_head"],
}


@functools.cache
def json_schema() -> dict[str, Any]:
    """The schema as editors get it, from the command that prints it."""
    command = [sys.executable, "-m", "instructft", "recipes", "--schema"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    schema: dict[str, Any] = json.loads(printed)
    return schema


def properties() -> dict[str, dict[str, Any]]:
    """Dotted key -> its shape in the JSON schema, for every key; a list's entry is written `.0.`."""
    found: dict[str, dict[str, Any]] = {}

    def walk(shape: dict[str, Any], prefix: str) -> None:
        for name, inner in shape["properties"].items():
            if not (prefix == "" and name in SECTIONS):
                found[prefix + name] = inner
            below = prefix + name
            for part in [inner, *inner.get("anyOf", [])]:
                if name == "datasets" and "properties" in part:
                    walk(part, below + ".0.")
                elif "properties" in part:
                    walk(part, below + ".")

    walk(json_schema(), "")
    return found


def kind(shape: dict[str, Any]) -> str:
    """The type of a key, in words.

    >>> kind({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'integer from 1, or null'
    """
    parts = [kind(part) for part in shape.get("anyOf", [])]
    if parts:
        return ", or ".join(dict.fromkeys(parts))
    if "const" in shape:
        return f"`{shape['const']}`"
    if "enum" in shape:
        words = [f"`{word}`" for word in shape["enum"]]
        return " · ".join(words)
    if shape.get("pattern") == r"\.jinja$":
        return "a `.jinja` file"
    types = shape.get("type", "anything")
    said = " or ".join(types if isinstance(types, list) else [types])
    for name, words in {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
    }.items():
        if name in shape:
            said += f" {words} {shape[name]:,}"
    if "items" in shape and "enum" in shape["items"]:
        said = f"array of {kind(shape['items'])}"
    return said.replace("object", "mapping").replace("array", "list")


def value(plain: Any) -> str:
    """A value as it is written in YAML.

    >>> value(None), value(True), value(["a"]), value(2e-05)
    ('null', 'true', '[a]', '2e-05')
    """
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    if isinstance(plain, dict):
        return "{" + ", ".join(f"{key}: {value(inner)}" for key, inner in plain.items()) + "}"
    if isinstance(plain, list | tuple):
        return "[" + ", ".join(map(value, plain)) + "]"
    return str(plain) if plain != "" else '""'


def upstream_example(name: str, shape: dict[str, Any]) -> Any:
    """A legal value of a field of SFTConfig or LoraConfig: its default where that says something."""
    if name in FIELDS:
        return FIELDS[name]
    parts = shape.get("anyOf", [shape])
    default = shape.get("default")
    if isinstance(default, bool):
        return not default
    if default not in (None, "", [], {}):
        return default
    for part in parts:
        if "enum" in part:
            return part["enum"][0]
        if part.get("type") in ("integer", "number"):
            return max(1, part.get("minimum", 1))
        if part.get("type") == "boolean":
            return True
    return {"string": "name", "array": ["name"], "object": {}}.get(parts[0].get("type"), "name")


def row(key: str, shape: dict[str, Any], unit: str, example: str) -> str:
    """One line of a table."""
    name = key.rpartition(".")[2]
    default = f"`{value(shape['default'])}`" if "default" in shape else "required" if key == "data.datasets" else ""
    said = " ".join(shape.get("description", "").split())
    kinds = "a name, an entry, or a list of them" if key == "data.datasets" else kind(shape)
    cells = [f"`{name}`", kinds, default, unit, f"`{name}: {example}`", said]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def table(rows: Iterator[str] | list[str]) -> str:
    head = "| key | type | default | unit | example | what it is |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n"


def in_section(key: str, section: str) -> bool:
    return key.replace(".0.", ".").rpartition(".")[0] == section


def recipe_page() -> str:
    known = properties()
    own = {key: shape for key, shape in known.items() if key in OWN}
    upstream = {*(f"train.{name}" for name in legal_train_fields() if name not in OWN_TRAIN_FIELDS)}
    upstream |= {*(f"adapter.{name}" for name in legal_lora_fields())}
    if untold := sorted({*known} - {*own} - upstream):
        sys.exit(f"give these keys a unit and an example in OWN, in {Path(__file__).name}: {', '.join(untold)}")
    pages = [
        HEAD + "# Recipe reference\n",
        "Every key of a recipe, by section. YAML 1.2: `1e-5` is a number and `no` is a word. An unknown key, a key\n"
        "given twice and a wrong type are errors that name the line. `KEY=VALUE` after a command overrides one key by\n"
        "its dotted path, as in `train.learning_rate=1e-4`. How to write one: [A recipe of your own](recipe.md).\n",
        "Only `model` and `data.datasets` are required.\n",
        "## At the top\n",
        table([row(key, own[key], *OWN[key]) for key in own if "." not in key]),
    ]
    for section, said in SECTIONS.items():
        pages += [f"## {section}\n", said + "\n"]
        pages.append(table([row(key, own[key], *OWN[key]) for key in own if in_section(key, section)]))
    for title, section, said in [
        ("Fields of trl.SFTConfig", "train", "Under `train:`; the descriptions are TRL's and transformers'."),
        ("Fields of peft.LoraConfig", "adapter", "Under `adapter:`; the descriptions are PEFT's."),
    ]:
        rows = [
            row(key, shape, upstream_unit(key), value(upstream_example(key.partition(".")[2], shape)))
            for key, shape in known.items()
            if key not in OWN and in_section(key, section)
        ]
        pages += [f"## {title}\n", said + "\n", table(rows)]
    return "\n".join(pages)


def upstream_unit(key: str) -> str:
    """The unit that our messages name for a field, in brackets there."""
    words = TRAIN_BOUNDS.get(key.removeprefix("train."), ("", "", ""))[2]
    if "of steps" in words:
        return "steps, or a share of them"
    return words.partition("(")[2].partition(")")[0]


# The Python API


def public() -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Every public name with its definition, read and not imported, since importing costs torch."""
    for name, module in sorted(instructft._PUBLIC.items()):
        spec = importlib.util.find_spec(f"instructft.{module}")
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        (node,) = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        yield name, node


def signature(node: ast.FunctionDef, name: str, method: bool = False) -> str:
    arguments = ast.unparse(node.args)
    if method:
        arguments = arguments.partition(", ")[2] if ", " in arguments else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    line = f"{name}({arguments}){returns}"
    if len(line) <= 100:
        return line
    return f"{name}(\n{textwrap.indent(_wrapped(arguments), '    ')}\n){returns}"


def _wrapped(arguments: str) -> str:
    """Arguments on lines of their own, split at commas outside brackets."""
    lines, depth, current = [], 0, ""
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            lines.append(current.strip() + ",")
            current = ""
        else:
            current += letter
    return "\n".join([*lines, current.strip() + ","])


def prose(node: ast.AST) -> str:
    """A docstring as Markdown: doctests and indented blocks as they stand, in fences."""
    said = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    blocks = []
    for part in said.split("\n\n"):
        example = part.lstrip().startswith(">>>")
        if example:
            language = "pycon" if ">>>" in part else "text"
            blocks.append(f"```{language}\n{textwrap.dedent(part)}\n```")
        elif re.match(r".*:\n    ", part):
            head, _, rest = part.partition("\n")
            items = textwrap.dedent(rest)
            if head in ("Args:", "Raises:"):
                items = re.sub(r"^(?=\S)", "- ", items, flags=re.M)
            blocks.append(f"**{head}**\n\n{items}")
        else:
            blocks.append(part.replace("<", "&lt;"))
    return "\n\n".join(blocks)


def python_page() -> str:
    parts = [
        HEAD + "# Python reference\n",
        "The names of `import instructft`. Importing loads no torch; each name loads on first use. Examples, and what\n"
        "a run of them prints: [Python API](python.md).\n",
    ]
    for name, node in public():
        if isinstance(node, ast.FunctionDef):
            parts += [f"## {name}\n", f"```python\n{signature(node, name)}\n```\n", prose(node) + "\n"]
            continue
        parts.append(f"## {name}\n")
        start = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if start:
            parts.append(f"```python\n{signature(start[0], name, method=True)}\n```\n")
        parts.append(prose(node) + "\n")
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
                line = signature(item, item.name, method=True)
                parts += [f"### {name}.{item.name}\n", f"```python\n{line}\n```\n", prose(item) + "\n"]
    return "\n".join(parts)


PAGES = {"recipe-reference.md": recipe_page, "python-reference.md": python_page}


def main() -> None:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make().rstrip() + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date: {', '.join(stale)}; run python scripts/docs_reference.py")


if __name__ == "__main__":
    main()
