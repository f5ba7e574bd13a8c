"""The built-in chat templates: one Jinja file each in `jinja/`, saved with every model that is trained with it.

To add one: a `.jinja` file and an entry here. It must end each answer with a special token, or nothing would teach
the model to stop; `instructft.prompt.loss_mask` refuses one that does not.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "jinja"
BOS = "{{- bos_token -}}\n"  # stands in front where a model was trained with a BOS


@dataclass(frozen=True)
class Template:
    """A built-in chat template.

    Args:
        file: its name in `jinja/`.
        stop: the token that ends an answer; None for the tokenizer's own EOS.
        tokens: special tokens that a tokenizer gains when it lacks them.
    """

    file: str
    stop: str | None = None
    tokens: tuple[str, ...] = ()

    def text(self) -> str:
        """The Jinja source."""
        return (_FOLDER / self.file).read_text(encoding="utf-8")


TEMPLATES: dict[str, Template] = {
    # ### Instruction: … ### Response: …, with ### Input: or ### Context: where a row has one
    "instruction": Template("instruction.jinja"),
    # the same headings below Stanford Alpaca's preamble
    "alpaca": Template("alpaca.jinja"),
    # \n\nHuman: … \n\nAssistant: …, as in Anthropic HH
    "human-assistant": Template("human-assistant.jinja"),
    # <|im_start|>role … <|im_end|>, with two tokens of its own
    "chatml": Template("chatml.jinja", stop="<|im_end|>", tokens=("<|im_start|>", "<|im_end|>")),
}


# What a chat template may be given that it lacks (`data.template_adds`), each a Jinja file of its own:
#   tools     are told in the system message, calls stand in the answer and results in a user's message
#   system    the system message stands before the first question
#   thinking  where a prompt opens a thought, `enable_thinking: false` closes it, empty
ADDS = ("tools", "system", "thinking")


def with_adds(text: str, adds: Collection[str]) -> str:
    """A chat template with what it lacks: it is saved with the model, so that every server renders the same.

    >>> with_adds("{{ messages[0].content }}", ["system"]).endswith("{{ messages[0].content }}")
    True
    """
    sources = {name: (_FOLDER / f"add-{name}.jinja").read_text(encoding="utf-8") for name in ADDS if name in adds}
    if after := sources.pop("thinking", ""):
        text = "{%- set rendered -%}" + text.removesuffix("\n") + "{% endset %}" + after
    return "".join([*sources.values(), text])


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(template.text() for template in TEMPLATES.values())


def is_built_in(text: str) -> bool:
    """Whether a chat template is one of these, with or without a BOS in front (`instructft.models.load`)."""
    return text.removeprefix(BOS) in _texts()
