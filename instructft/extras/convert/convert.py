"""`instructft convert`: a GPT-2 state dict of nanoGPT or its kin becomes a proved folder for `from_pretrained`.

::

    read_file ─► read_layout ─► OUTPUT.partial-…/ ─► prove ─► OUTPUT/
      exit 2, nothing written     weights, config      exit 1, removed

`convert.json` in the folder accounts for every tensor of the source: what it became, or why it was dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.checkpoints.atomic import partial_folder, refuse_used
from instructft.errors import UsageError
from instructft.extras.convert.layouts import ACTIVATIONS, Layout, read_layout
from instructft.extras.convert.proof import prove
from instructft.extras.convert.state_dict import Checkpoint, read_file
from instructft.extras.convert.targets import GPT2_VOCABULARY, Target, choose_vocabulary, make_targets
from instructft.formatting import first_line
from instructft.version import __version__
from instructft.weights.tensor_io import write_text

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

MAX_SHARD = 5_000_000_000  # bytes of one weight file


@dataclass(frozen=True)
class Converted:
    """A finished conversion: its folder, and what `convert.json` in it says."""

    output_dir: Path
    facts: Mapping[str, Any]


def convert(
    checkpoint: str | Path,
    output: str | Path,
    *,
    n_head: int | None = None,
    activation: str | None = None,
    tokenizer: str | None = None,
    keep_padding: bool = False,
    console: Console | None = None,
) -> Converted:
    """Convert a GPT-2 state dict, saved with `torch.save`, into a folder that `from_pretrained` loads.

    Args:
        checkpoint: the file: a state dict, or a checkpoint that holds one. Its dtypes are kept.
        output: a folder that is not there yet, or empty.
        n_head: attention heads, where the file does not say.
        activation: of the MLP, `gelu` (exact), `gelu_new` (tanh) or `relu`; default: as the code that writes such
            files has it.
        tokenizer: a folder or Hub id, saved beside the model.
        keep_padding: keep the embedding rows that belong to no token.

    >>> convert("out/ckpt.pt", "gpt2-mine").facts["proof"]["difference"]
    2.4e-06

    Raises:
        UsageError: the file, the output or an option cannot be used; nothing is written.
        ModelError: the converted model does not give the source's logits; nothing is kept.
    """
    from rich.console import Console

    console = console or Console(soft_wrap=True)
    output = Path(output).expanduser()
    if activation not in (None, *ACTIVATIONS):
        raise UsageError(f"--activation: found {activation}, expected {', '.join(ACTIVATIONS)}")
    refuse_used(output)
    source = read_file(Path(checkpoint).expanduser())
    layout = read_layout(source)
    heads = _heads(source, layout, n_head)
    why = "as --activation says" if activation else layout.activation_why
    activation = activation or layout.activation
    tok = _tokenizer(tokenizer) if tokenizer else None
    vocabulary, cut = choose_vocabulary(layout, tok, keep_padding)
    targets = make_targets(layout, vocabulary)
    # a folder by its name alone: no local path is published
    named = Path(tokenizer).expanduser().resolve().name if tokenizer and _is_folder(tokenizer) else tokenizer
    facts = _account(source, layout, targets, vocabulary, cut)
    facts |= {"n_head": heads, "activation": {"name": activation, "why": why}, "tokenizer": named}
    _say_found(console, source, layout, facts)

    with partial_folder(output) as folder:
        _write_weights(folder, targets)
        targets.clear()  # the model that is proved takes their memory
        if tok is not None:
            tok.model_max_length = min(tok.model_max_length, layout.positions)
            tok.save_pretrained(folder)
        _write_configs(folder, source, layout, heads, activation, vocabulary, tok)
        facts["proof"] = prove(layout, folder, heads, activation, vocabulary)
        write_text(folder / "convert.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    _say_done(console, output, facts)
    return Converted(output, facts)


# --------------------------------------------------------------------------------------------------------------------
# What the model becomes
# --------------------------------------------------------------------------------------------------------------------


def _heads(source: Checkpoint, layout: Layout, given: int | None) -> int:
    said = source.settings.get("n_head")
    if given is not None and said is not None and given != said:
        raise UsageError(f"--n-head: found {given}, but {source.settings_place} in {source.file} says {said}")
    heads = given if given is not None else said
    if heads is None:
        guess = layout.n_embd // 64
        hint = f"; GPT-2 has heads of 64, which would be --n-head {guess}" if guess and layout.n_embd % 64 == 0 else ""
        raise UsageError(
            f"{source.file} does not say how many attention heads the model has, and no tensor tells; "
            f"give --n-head, a divisor of {layout.n_embd}{hint}"
        )
    if not isinstance(heads, int) or heads < 1 or layout.n_embd % heads:
        raise UsageError(f"--n-head: found {heads}, expected a divisor of the width {layout.n_embd}")
    return heads


def _account(
    source: Checkpoint, layout: Layout, targets: Mapping[str, Target], vocabulary: int, cut: str
) -> dict[str, Any]:
    """What was found and done. Every tensor of the source is in `tensors` or in `dropped`."""
    became = {
        layout.sources[place]: {"to": name, "how": target.how}
        for name, target in targets.items()
        for place in target.places
    }
    if lost := sorted(source.tensors.keys() - became.keys() - layout.dropped.keys()):
        raise UsageError(f"{source.file}: no place in the converted model for {', '.join(lost[:5])}")
    return {
        "instructft": __version__,
        "source": source.file.name,
        "state_dict": source.place or "the file itself",
        "settings": {"from": source.settings_place or None, **source.settings},
        "left_out": list(source.left_out),
        "layers": layout.n_layer,
        "width": layout.n_embd,
        "mlp_width": layout.n_inner,
        "positions": layout.positions,
        "matrices": "(out, in), as in nn.Linear" if layout.linear else "(in, out), as in Conv1D",
        "tied": layout.tied,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "vocabulary": {"rows": layout.rows, "kept": vocabulary, "cut": cut or None},
        "tensors": became,
        "dropped": dict(layout.dropped),
        "added": {name: target.how for name, target in targets.items() if not target.places},
    }


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def _write_weights(folder: Path, targets: Mapping[str, Target]) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    try:
        save_torch_state_dict({name: made.tensor for name, made in targets.items()}, folder, max_shard_size=MAX_SHARD)
    except SafetensorError as error:  # a full disk
        raise OSError(first_line(error)) from error


def _write_configs(
    folder: Path,
    source: Checkpoint,
    layout: Layout,
    heads: int,
    activation: str,
    vocabulary: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    from transformers import GenerationConfig, GPT2Config

    last = GPT2_VOCABULARY - 1 if vocabulary == GPT2_VOCABULARY else None  # <|endoftext|>
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", last) for kind in ("bos", "eos")}
    # the tokenizer's pad token; without a tokenizer there is none to name
    special["pad_token_id"] = getattr(tokenizer, "pad_token_id", None)
    dropout = float(source.settings.get("dropout", 0.0))
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=layout.positions,
        n_embd=layout.n_embd,
        n_layer=layout.n_layer,
        n_head=heads,
        n_inner=None if layout.n_inner == 4 * layout.n_embd else layout.n_inner,
        activation_function=activation,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=layout.tied,
        architectures=["GPT2LMHeadModel"],
        dtype=layout.dtype,
        **special,
    )
    GenerationConfig(**special).save_pretrained(folder)
    config.save_pretrained(folder)


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from instructft.models.tokenizer import not_loaded

    place, _, revision = (name, "", "") if _is_folder(name) else name.partition("@")
    try:
        return AutoTokenizer.from_pretrained(
            str(Path(place).expanduser()), revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise UsageError(not_loaded("--tokenizer", name, "a tokenizer", error)) from error


# --------------------------------------------------------------------------------------------------------------------
# Said
# --------------------------------------------------------------------------------------------------------------------


def _say_found(console: Console, source: Checkpoint, layout: Layout, facts: Mapping[str, Any]) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    used = facts["activation"]
    head = "tied" if layout.tied else "its own output head"
    heads = (
        f"{facts['n_head']} heads ({'from ' + source.settings_place if 'n_head' in source.settings else '--n-head'})"
    )
    say(f"source     {source.file}, {source.place or 'a state dict'}: {len(source.tensors)} tensors, {facts['dtype']}")
    say(
        f"model      {layout.n_layer} layers × {layout.n_embd}, {heads}, {layout.positions} positions, "
        f"{layout.rows} tokens, {head}"
    )
    say(f"activation {used['name']}: {used['why']}; no tensor tells, --activation changes it")
    kept = facts["vocabulary"]["kept"]
    if kept != layout.rows:
        say(f"vocabulary {layout.rows - kept} {facts['vocabulary']['cut']} are cut; --keep-padding keeps them")
    if layout.linear:
        say("matrices   (out, in) in the source; transposed")
    if facts["added"]:
        say(f"biases     {len(facts['added'])} that the source does not have are zero")
    if layout.dropped:
        say(f"dropped    {len(layout.dropped)}: " + "; ".join(sorted(set(layout.dropped.values()))))


def _say_done(console: Console, output: Path, facts: Mapping[str, Any]) -> None:
    proof = facts["proof"]
    lengths = ", ".join(str(length) for length in proof["lengths"])
    lines = [
        f"proof      random ids of length {lengths}: largest difference of a logit {proof['difference']:.2e}, allowed "
        f"{proof['tolerance']:.2e}; largest logit {proof['scale']:.3g}",
        f"Converted into {output}.",
    ]
    if facts["tokenizer"] is None:
        known = facts["vocabulary"]["kept"] == GPT2_VOCABULARY
        name = "openai-community/gpt2" if known else "FOLDER or HUB_ID"
        hint = " (GPT-2's, by the size of its vocabulary)" if known else ""
        lines.append(
            f"It has no tokenizer: convert with --tokenizer {name}{hint}, or name it in the recipe as model.tokenizer."
        )
    console.print("\n".join(lines), markup=False, highlight=False)
