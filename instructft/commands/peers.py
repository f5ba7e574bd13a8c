"""What somebody types who comes from another tool: its verbs and options, answered with ours."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from instructft.formatting import closest

# Our command -> what axolotl, LLaMA-Factory, TRL, torchtune, mlx-lm, ollama and their kin call it.
_VERBS: dict[str, str] = {
    "train": "sft fit finetune fine-tune finetuning tune lora qlora full resume run start tr",
    "launch": "torchrun accelerate distributed deepspeed multi-gpu",
    "check": "validate lint verify-config dry-run estimate audit test-config",
    "inspect": "show-data debug-data view-data preview show",
    "prepare": "preprocess tokenize pretokenize prep prepare-data cache",
    "recipes": "list ls list-recipes models configs",
    "init": "new create config copy cp quickstart template",
    "evaluate": "eval test benchmark score bench measure",
    "chat": "cli repl talk interactive shell console",
    "ui": "webchat webui web gradio app gui serve-ui page demo",
    "generate": "infer inference predict sample completion batch answer",
    "merge": "merge-lora merge-adapter merge-peft merge-and-unload fuse export-lora export-merged merge-sharded",
    "convert": "import-checkpoint from-nanogpt to-hf",
    "push": "upload publish share push-to-hub deploy",
    "export": "gguf to-gguf quantize ollama export-gguf llamacpp",
    "doctor": "env info version diagnose system-info report",
    "import": "migrate convert-config from-axolotl from-trl",
}
_NOT_HERE = {
    **dict.fromkeys(("dpo", "orpo", "kto", "ppo", "grpo", "rlhf", "reward", "rm", "simpo"), "preferences are learned"),
    **dict.fromkeys(("pretrain", "pt", "pre-train"), "a model is pretrained"),
}
_ARGUMENTS = {"train": "RECIPE", "launch": "RECIPE", "check": "RECIPE", "inspect": "RECIPE", "prepare": "RECIPE"}
_ARGUMENTS |= {"init": "NAME", "recipes": "", "merge": "MODEL OUTPUT", "push": "MODEL REPO_ID", "doctor": ""}
_ARGUMENTS |= {"generate": "MODEL --input FILE --output FILE", "convert": "CHECKPOINT.pt OUTPUT", "import": "CONFIG"}
_ARGUMENTS |= {"export": "MODEL OUTPUT"}
# Options that say which recipe: it is an argument here.
_RECIPE = ("config", "recipe", "config-file", "config_file", "yaml")


def command_of(word: str, commands: Collection[str]) -> str:
    """What to say of another tool's word for a command; "" where it is none, or one of ours mistyped.

    >>> command_of("sft", ["train"])
    'there is no command sft; here it is: instructft train RECIPE'
    """
    plain = word.lower().replace("_", "-")
    if word.endswith((".yaml", ".yml")):
        return f"{word} is a recipe, and a command stands before it: instructft train {shlex.quote(word)}"
    if plain in _NOT_HERE:
        return f"there is no command {word}: {_NOT_HERE[plain]} elsewhere, instructft trains on answers (SFT)"
    verbs = {verb: ours for ours, names in _VERBS.items() for verb in names.split() if ours in commands}
    if plain not in verbs and closest(plain, commands, cutoff=0.75):
        return ""
    near = verbs.get(plain) or verbs.get(closest(plain, verbs, cutoff=0.75) or "")
    line = f"instructft {near} {_ARGUMENTS.get(near, 'MODEL')}".strip() if near else ""
    return f"there is no command {word}; here it is: {line}" if near else ""


def keys_of(command: str, words: Sequence[str], options: Collection[str]) -> str:
    """What to say of recipe keys that are written as options; "" where they are none.

    Args:
        words: behind the command.
        options: that the command has.

    >>> keys_of("train", ["my.yaml", "--train.learning_rate", "1e-4", "--lr_scheduler_type=cosine"], ["--resume"])[-87:]
    'write: instructft train my.yaml train.learning_rate=1e-4 train.lr_scheduler_type=cosine'
    """
    given, rest = list(words), []
    recipe, keys = "", []
    while given:
        word = given.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name in options:
            rest.append(word)
            continue
        if not equals:
            takes = bool(given) and (not given[0].startswith("--"))
            value = given.pop(0) if takes else "true"
        bare = name.removeprefix("--")
        if bare in _RECIPE:
            recipe = value
        elif key := _key(bare):
            keys.append(f"{key}={value}")
        else:
            return ""
    line = shlex.join(["instructft", command, *([recipe] if recipe else []), *rest, *keys])
    return f"recipe keys are written without dashes, as KEY=VALUE behind the recipe; write: {line}"


def _key(option: str) -> str:
    """The recipe's key that an option of another tool stands for; "" where it is none."""
    from instructft.recipe.aliases import ALIASES
    from instructft.recipe.fields import leaves, legal_lora_fields, legal_train_fields
    from instructft.recipe.schema import Recipe

    name = option.replace("-", "_")
    last = name.rpartition(".")[2]
    known = leaves(Recipe)
    if "." in name and (name in {key for keys in known.values() for key in keys} or last in legal_train_fields()):
        return name
    if last in ALIASES:
        return ALIASES[last][0] or ""
    if len(found := known.get(last, [])) == 1:
        return found[0]
    if last in legal_train_fields():
        return f"train.{last}"
    return f"adapter.{last}" if last in legal_lora_fields() else last if last in Recipe.model_fields else ""
