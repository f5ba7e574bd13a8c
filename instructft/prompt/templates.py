"""The built-in chat templates: one Jinja file each in `jinja/`, saved with every model that is trained with it.

To add one: a `.jinja` file and an entry here. It must end each answer with a special token, or nothing would teach
the model to stop; `instructft.prompt.loss_mask` refuses one that does not.
"""

from __future__ import annotations

import functools
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


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(template.text() for template in TEMPLATES.values())


def is_built_in(text: str) -> bool:
    """Whether a chat template is one of these, with or without a BOS in front (`instructft.models.load`)."""
    return text.removeprefix(BOS) in _texts()
