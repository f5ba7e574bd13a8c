"""Loads a recipe's tokenizer, with the chat template that the run trains and the tokens that this needs."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.data.sources import QUICKSTART
from instructft.errors import ModelFileError, TemplateError, UsageError, is_panic
from instructft.formatting import first_line
from instructft.models.latest import resolve_latest
from instructft.prompt.templates import BOS, TEMPLATES, with_adds
from instructft.weights import remote_code
from instructft.weights.model_class import PROCESSOR
from instructft.weights.readable import require_patterns_end, require_readable, unreadable_tokenizer
from instructft.whole_file import read_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from instructft.recipe.schema import Recipe

# Tokens that vocabularies hold in reserve; the first one found pads, so that no vocabulary grows for padding.
_SPARE_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>", "[UNK]")
# What a template added to a tokenizer that was loaded here.
_ADDED: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, list[str]] = weakref.WeakKeyDictionary()


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
    if getattr(tokenizer, "split_special_tokens", False):
        raise UsageError(
            f"model.tokenizer: {tokenizer.name_or_path} has split_special_tokens set, by which the special tokens of a "
            f"prompt come apart ({tokenizer.eos_token} is no longer one token), here and on every server; set it to "
            "false in a copy's tokenizer_config.json"
        )
    if tokenizer.eos_token is None and recipe.data.template != "chatml":
        raise UsageError(
            f"model.tokenizer: {tokenizer.name_or_path} has no EOS token, so no answer could end; "
            "use data.template=chatml, which brings one"
        )
    _set_template(tokenizer, recipe)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in _SPARE_PAD_TOKENS if t in vocabulary), tokenizer.eos_token)
    try:
        encoder(tokenizer)  # studies the template; raises when it cannot be trained
    except TemplateError as error:
        if not recipe.data.template.endswith(".jinja"):
            raise
        raise TemplateError(f"data.template: {recipe.data.template}: {error}") from error
    return tokenizer


def _bare_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    recipe, _ = resolve_latest(recipe)
    from transformers import AutoTokenizer

    key = "model.tokenizer" if recipe.model.tokenizer else "model.name_or_path"
    name = recipe.model.tokenizer or recipe.model.name_or_path
    if recipe.model.tokenizer == "quickstart":
        name = str(QUICKSTART)
    own = recipe.model.tokenizer is None
    revision = (recipe.model.revision if own else None) or "main"
    trust = remote_code.pinned(str(name), revision) if own else {"trust_remote_code": False}
    folder = Path(str(name)).expanduser() / ((recipe.model.subfolder if own else None) or "")
    try:
        require_readable(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, subfolder=(recipe.model.subfolder if own else None) or "", **trust
        )
        require_patterns_end(tokenizer, str(name))
    except ModelFileError as error:
        raise UsageError(f"{key}: {error}") from error
    except BaseException as error:  # tokenizers raise anything, and panic
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        hint = unreadable_tokenizer(folder)
        if _only_sentencepiece(str(name), revision, (recipe.model.subfolder if own else None) or ""):
            hint = "its tokenizer.model is SentencePiece's, which is not installed here: pip install sentencepiece"
        raise UsageError(not_loaded(key, str(name), "a tokenizer", error, hint)) from error
    return tokenizer


def _only_sentencepiece(name: str, revision: str, subfolder: str) -> bool:
    """Whether the package is missing that reads `tokenizer.model`, and there is no `tokenizer.json` beside it."""
    from transformers.utils import is_sentencepiece_available

    return not is_sentencepiece_available() and bool(
        _file_of(name, "tokenizer.model", revision=revision, subfolder=subfolder)
        and not _file_of(name, "tokenizer.json", revision=revision, subfolder=subfolder)
    )


def _file_of(name: str, file: str, **where: Any) -> str | None:
    """The path of a file of a folder or of the Hub; None where it is not, or not to be had."""
    from transformers.utils.hub import cached_file

    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    try:
        found: str | None = cached_file(name, file, **where, **quiet, _raise_exceptions_for_gated_repo=False)
    except Exception:  # a connection that breaks raises whatever the library's client does
        return None
    return found


def hand_on(recipe: Recipe, folder: Path) -> None:
    """Give a folder that holds a saved tokenizer what others read of it, and take out what is of this machine.

    `tokenizer.model`, SentencePiece's own file, is not written by transformers; llama.cpp and others read it. Nor is
    what a whole checkpoint says of its images and sounds. How a tokenizer was found (`is_local`, `local_files_only`)
    says nothing where it is read.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in held.items() if key not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    base = recipe.model.name_or_path
    where = {"revision": recipe.model.revision or "main", "subfolder": recipe.model.subfolder or ""}
    if base and (folder / "config.json").is_file():
        for file in sorted(PROCESSOR):
            if found := _file_of(base, file, **where):
                _hand_on_processor(Path(found), folder / file)
    name, own = recipe.model.tokenizer or base, recipe.model.tokenizer is None
    if not name or name == "quickstart" or (folder / "tokenizer.model").exists():
        return
    if found := _file_of(name, "tokenizer.model", **(where if own else {})):
        shutil.copyfile(found, folder / "tokenizer.model")


def _hand_on_processor(source: Path, target: Path) -> None:
    """As it is; an older chat template inside gives way to the trained one, which lies beside it."""
    held = json.loads(source.read_text(encoding="utf-8"))
    if "chat_template" not in held:
        shutil.copyfile(source, target)
        return
    del held["chat_template"]
    target.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """Ids that have no trained embedding in the base: what the template added, and all beyond its `rows` rows.

    Some vocabularies hold empty rows in reserve, so that a new token need not lie beyond them.
    """
    added = _ADDED.get(tokenizer)
    if added is None:  # one that was saved: the model's own knows which tokens are new in it
        template = TEMPLATES.get(recipe.data.template)
        asked = [*(recipe.model.new_tokens or ()), *(template.tokens if template else ())]
        known = _bare_tokenizer(recipe).get_vocab() if asked else {}
        added = [token for token in asked if token not in known]
    return sorted({*tokenizer.convert_tokens_to_ids(added), *range(rows, len(tokenizer))})


def not_loaded(key: str, name: str, what: str, error: BaseException, hint: str = "") -> str:
    """The message for a model or tokenizer that could not be loaded: which key named it, why, and the way out."""
    reason = first_line(error)
    folder = Path(name).expanduser()
    if hint := hint or remote_code.wanted(error):
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
    mine = [token for token in recipe.model.new_tokens or () if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in mine])
    _ADDED[tokenizer] = mine
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
        _ADDED[tokenizer] = [*mine, *missing]
        if template.stop:
            tokenizer.eos_token = template.stop
        text = template.text()
        if adds_bos(tokenizer):
            text = BOS + text
    else:
        text = _template_file(name)
    text = with_adds(text, recipe.data.template_adds)
    if recipe.data.system_prompt:
        text = _default_system(recipe.data.system_prompt) + text
    text = with_date(text, recipe.data.template_date)
    options = dict(recipe.data.template_options)
    if unread := [option for option in options if not re.search(rf"\b{re.escape(option)}\b", text)]:
        raise TemplateError(f"data.template_options.{unread[0]}: the chat template ({name}) does not read it")
    tokenizer.chat_template = with_options(text, options)


def with_date(text: str, day: str) -> str:
    """A chat template in which today is `day` (YYYY-MM-DD), where it asks for the date at all.

    Else the prompt of tomorrow would not be the one that was trained: not when the run resumes, nor on a server.

    >>> with_date("{{ strftime_now('%d %b %Y') }}", "2024-07-26").splitlines()[0]
    '{%- macro strftime_now(format) -%}'
    """
    bare = _DATE.sub("", text)  # without the date of a run that this one goes on from
    calls = re.findall(r"""strftime_now\(\s*(?:(?:format\s*=\s*)?["']([^"']+)["']\s*\))?""", bare)
    if not calls:
        return text
    moment = datetime.strptime(day, "%Y-%m-%d")
    formats = [form for form in dict.fromkeys(calls) if form]
    lines = ["{%- macro strftime_now(format) -%}"]
    for word, form in zip(["if", *["elif"] * len(formats)], formats, strict=False):
        lines.append("{%- " + word + " format == " + json.dumps(form) + " -%}" + moment.strftime(form))
    if "" in calls:  # a format that the template makes up: each of its signs gives way to what it stands for
        signs = {f"%{sign}": moment.strftime(f"%{sign}") for sign in _SIGNS}
        signs |= {"%-d": str(moment.day), "%-m": str(moment.month)}
        said = "".join(f".replace({json.dumps(sign)}, {json.dumps(meant)})" for sign, meant in signs.items())
        lines.append(("{%- else -%}" if formats else "{%- if true -%}") + "{{- format" + said + " -}}")
    return "\n".join([*lines, "{%- endif -%}", "{%- endmacro -%}", bare])


_SIGNS = "aAbBdHIjmMpSwyYfUWcxXDeFTR"  # of strftime
_DATE = re.compile(r"\{%- macro strftime_now\(format\) -%\}.*?\{%- endmacro -%\}\n?", re.DOTALL)  # of `with_date`


def date_in_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The day (YYYY-MM-DD) that the chat template puts into prompts; None where it asks for none."""
    return recipe.data.template_date if _DATE.search(str(tokenizer.chat_template)) else None


def said_of_date(day: str) -> str:
    """That the date is pinned, for whoever reads a prompt and wonders.

    >>> said_of_date("2024-07-26")
    'prompts say 2024-07-26, here and wherever the model is served, not the day of the run (data.template_date)'
    """
    return f"prompts say {day}, here and wherever the model is served, not the day of the run (data.template_date)"


def with_options(text: str, options: dict[str, Any]) -> str:
    """A chat template that takes these values for what nobody gives it: chat and every server then ask as trained."""
    lines = [
        "{%- if " + name + " is not defined -%}{%- set " + name + " = " + _literal(value) + " -%}{%- endif -%}"
        for name, value in options.items()
    ]
    return "\n".join([*lines, text])


def _literal(value: Any) -> str:
    """A value of a recipe as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _template_file(name: str) -> str:
    import jinja2

    try:
        text = read_whole(Path(name).expanduser())
        # {% generation %} is an extension of transformers; its tags stand alone, so they can be left out here
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        return text
    except UnicodeDecodeError as error:
        raise TemplateError(f"data.template: {name} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise TemplateError(f"data.template: {name} could not be read: {error.strerror}") from error
    except RecursionError as error:
        raise TemplateError(f"data.template: {name}: not a Jinja template: it is nested too deep to be read") from error
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
