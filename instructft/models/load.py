"""Loads the tokenizer and the model of a recipe, and makes them agree on template, special tokens and sizes.

With `adapter: lora` the model comes frozen, with the adapter in it (`instructft.adapters.lora`); with
`model.quantization` its linear layers are packed while they are read (`instructft.adapters.quantization`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.adapters import lora, quantization
from instructft.adapters.attach import AdapterFolder, attach
from instructft.adapters.new_tokens import fit_embeddings
from instructft.data.sources import QUICKSTART
from instructft.errors import ModelError, TemplateError, UsageError
from instructft.formatting import first_line
from instructft.models.latest import settled
from instructft.models.starting_point import adapter_to_go_on_with, weights_of
from instructft.prompt.templates import BOS, TEMPLATES
from instructft.weights import remote_code

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

# Tokens that vocabularies hold in reserve; the first one found pads, so that no vocabulary grows for padding.
_SPARE_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>", "[UNK]")


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------------------------


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, with the chat template that this run trains in place.

    The template's own tokens are added when they are missing, its stop token becomes `eos_token`, and a tokenizer
    without a pad token gets one that its vocabulary already holds.

    >>> tok = load_tokenizer(load_recipe("quickstart"))
    >>> tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    '### Instruction:\\nHi\\n\\n### Response:\\n'

    Raises:
        UsageError: it cannot be found or loaded; the message says which key named it.
        TemplateError: the template cannot be used with it.
    """
    from instructft.prompt.loss_mask import encoder

    tokenizer = _bare_tokenizer(recipe)
    if tokenizer.eos_token is None and recipe.data.template != "chatml":
        raise UsageError(
            f"model.tokenizer: {tokenizer.name_or_path} has no EOS token, so no answer could end; "
            "use data.template=chatml, which brings one"
        )
    _set_template(tokenizer, recipe)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in _SPARE_PAD_TOKENS if t in vocabulary), tokenizer.eos_token)
    encoder(tokenizer)  # studies the template; raises when it cannot be trained
    return tokenizer


def _bare_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    recipe, _ = settled(recipe)
    from transformers import AutoTokenizer

    key = "model.tokenizer" if recipe.model.tokenizer else "model.name_or_path"
    name = recipe.model.tokenizer or recipe.model.name_or_path
    if recipe.model.tokenizer == "quickstart":
        name = str(QUICKSTART)
    own = recipe.model.tokenizer is None
    revision = (recipe.model.revision if own else None) or "main"
    trust = remote_code.pinned(str(name), revision) if own else {"trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, subfolder=(recipe.model.subfolder if own else None) or "", **trust
        )
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        raise UsageError(not_loaded(key, str(name), "a tokenizer", error)) from error


def not_loaded(key: str, name: str, what: str, error: Exception) -> str:
    """The message for a model or tokenizer that could not be loaded: which key named it, why, and the way out."""
    reason = first_line(error)
    folder = Path(name).expanduser()
    if hint := remote_code.wanted(error):
        return f"{key}: {name} could not be loaded as {what}: {hint}."
    if folder.is_dir():
        holds = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        hint = f"the folder {name} holds {holds}"
    else:
        hint = (
            f"there is no folder {name} here, and the Hugging Face Hub did not give it: check the spelling and the "
            "network; a private or gated model needs `hf auth login` or HF_TOKEN"
        )
    return f"{key}: {name} could not be loaded as {what}; {hint}.\n  {reason}"


def _set_template(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Put the recipe's chat template into the tokenizer, with the tokens that it needs."""
    from tokenizers import AddedToken

    name = recipe.data.template
    own = tokenizer.chat_template
    if isinstance(own, dict):  # some models carry several; the one for chatting is called default
        own = own.get("default")
    if name == "tokenizer" and not own:
        raise TemplateError(
            f"data.template: tokenizer, but {tokenizer.name_or_path} has no chat template of its own; "
            f"choose one of {', '.join(TEMPLATES)} or a .jinja file"
        )
    if name == "auto":
        name = "tokenizer" if own else "instruction"

    if name == "tokenizer":
        text = str(own)
    elif name in TEMPLATES:
        template = TEMPLATES[name]
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in template.tokens if token not in vocabulary]
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        if template.stop:
            tokenizer.eos_token = template.stop
        text = template.text()
        if adds_bos(tokenizer):
            text = BOS + text
    else:
        text = _template_file(name)
    if recipe.data.system_prompt:
        text = _default_system(recipe.data.system_prompt) + text
    tokenizer.chat_template = text


def _template_file(name: str) -> str:
    import jinja2

    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        # {% generation %} is an extension of transformers; its tags stand alone, so they can be left out here
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        return text
    except UnicodeDecodeError as error:
        raise TemplateError(f"data.template: {name} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise TemplateError(f"data.template: {name} could not be read: {error.strerror}") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"data.template: {name}, line {error.lineno}: not a Jinja template: {error}") from error


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model was trained with a BOS in front: a template replaces what the tokenizer would have added."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _default_system(prompt: str) -> str:
    """Jinja that puts a system prompt before conversations that bring none.

    It goes into the saved template, so that every server asks the model with the prompt that it was trained with.
    """
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}\n"
        "  {%- set messages = [{'role': 'system', 'content': " + json.dumps(prompt) + "}] + messages -%}\n"
        "{%- endif -%}\n"
    )


# --------------------------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------------------------


def load_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration, checked against the recipe and its adapter; no weights are read.

    Raises:
        UsageError: unknown or unreadable; `data.max_length` is more than the model's positions; an adapter that does
            not fit the architecture.
    """
    from transformers import AutoConfig

    if recipe.model.config is not None:
        settings: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **recipe.model.config,
        }
        try:
            config = AutoConfig.for_model(**settings)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"model.config: {error}") from error
        if len(tokenizer) > config.vocab_size:
            raise UsageError(
                f"model.config.vocab_size: {config.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens; "
                "leave the key out, and it follows the tokenizer"
            )
    else:
        recipe, _ = settled(recipe)
        name, revision, subfolder = weights_of(recipe)
        try:
            config = AutoConfig.from_pretrained(
                name, revision=revision, subfolder=subfolder, **remote_code.pinned(name, revision)
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(not_loaded("model.name_or_path", name, "a model", error)) from error
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.data.max_length > positions:
        raise UsageError(
            f"data.max_length: {recipe.data.max_length} tokens are more than the {positions} positions of "
            f"{recipe.model.name_or_path or 'model.config'}; set data.max_length to {positions} or less"
        )
    if recipe.adapter.type != "none" and adapter_to_go_on_with(recipe) is None:
        lora.check(recipe, config, new_tokens(recipe, tokenizer, config.get_text_config().vocab_size))
    return config


def new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Ids that have no trained embedding in the base: what the template added, and all beyond its `rows` rows.

    Some vocabularies hold empty rows in reserve, so that a new token need not lie beyond them.
    """
    template = TEMPLATES.get(recipe.data.template)
    known = _bare_tokenizer(recipe).get_vocab() if template and template.tokens else {}
    added = {tokenizer.convert_tokens_to_ids(t) for t in (template.tokens if template else ()) if t not in known}
    return sorted(added | set(range(rows, len(tokenizer))))


def weights_dtype(recipe: Recipe, device: str | None = None) -> torch.dtype:
    """The type in which weights are held.

    Trained weights are float32 (`dtype: auto`): AdamW's updates are mostly smaller than bfloat16 can add to a weight.
    Frozen ones, below an adapter, need no such room: on a GPU they are bfloat16 where it has that, float16 with
    `train.fp16`; on a CPU float32, which is faster there.

    >>> weights_dtype(load_recipe("quickstart"))
    torch.float32
    """
    import torch

    if recipe.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        return dtype
    if recipe.model.quantization != "none" and recipe.train.get("bf16"):
        return torch.bfloat16  # bitsandbytes rounds the biases of packed layers to what comes in
    if recipe.adapter.type == "none" or not (device or quantization.device(recipe)).startswith("cuda"):
        return torch.float32
    if recipe.train.get("fp16"):
        return torch.float16
    here = torch.cuda.is_available()
    return torch.bfloat16 if not here or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the recipe's model, or start one from random weights, ready to be trained with `tokenizer`.

    Full fine-tuning keeps its weights in float32 (`weights_dtype`) and lets autocast do the work in bfloat16 where
    the hardware has it. With an adapter it is a `peft.PeftModel` over the frozen base. Embedding rows of tokens that
    the template added start from the mean of the old rows. Random weights depend on `train.seed` alone.

    Raises:
        UsageError: the model is unknown or does not fit the recipe.
        ModelError: its weights could not be read.
    """
    from transformers import AutoModelForCausalLM, set_seed

    recipe, _ = settled(recipe)
    config = load_config(recipe, tokenizer)
    quantization.check(recipe)
    dtype = weights_dtype(recipe)
    attention = None if recipe.model.attn_implementation == "auto" else recipe.model.attn_implementation
    if recipe.model.config is not None:
        set_seed(recipe.train["seed"])
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, **remote_code.flag()
        )
    else:
        name, revision, subfolder = weights_of(recipe)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                revision=revision,
                subfolder=subfolder,
                **remote_code.pinned(name, revision),
                **quantization.loading(recipe, dtype),
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ModelError(not_loaded("model.name_or_path", name, "a model", error)) from error
    quantization.fix_layout(model)
    rows = model.get_input_embeddings().weight.shape[0]
    adapter = adapter_to_go_on_with(recipe)
    if adapter is not None:
        return _go_on_with(adapter, model, tokenizer)
    fit_embeddings(model, len(tokenizer))
    fit_special_tokens(model, tokenizer)
    added = new_tokens(recipe, tokenizer, rows) if recipe.adapter.type != "none" else []
    return lora.ADAPTERS[recipe.adapter.type](model, recipe, added)


def _go_on_with(adapter: AdapterFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The base with an adapter that was trained before, ready to be trained further."""
    if len(tokenizer) > max(adapter.base.vocab_size, model.get_input_embeddings().weight.shape[0]):
        raise UsageError(
            f"data.template: needs tokens that the adapter in {adapter.folder} was not trained with "
            f"({len(tokenizer)}, expected {adapter.base.vocab_size}); use data.template=tokenizer"
        )
    adapted = lora.as_trained_here(attach(model, adapter, trainable=True))
    fit_special_tokens(adapted, tokenizer)
    return adapted


def fit_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let configuration and generation configuration stop where the trained template stops."""
    from instructft.prompt.loss_mask import encoder

    stop = encoder(tokenizer).stop_token_id
    config, generation = model.config.get_text_config(), model.generation_config
    known = generation.eos_token_id if generation.eos_token_id is not None else []
    known = [known] if isinstance(known, int) else list(known)
    stops = [stop, *(token for token in known if token != stop)]
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = stop
    config.bos_token_id = generation.bos_token_id = tokenizer.bos_token_id
    _make_saveable(generation)


def _make_saveable(generation: GenerationConfig) -> None:
    """Some published models carry sampling settings without `do_sample`, which transformers refuses to save."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
