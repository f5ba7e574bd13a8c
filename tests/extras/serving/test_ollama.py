"""The Modelfile: fixed texts learned from a template, their proof, what is refused, stops and sampling.

Go renders what is written in `tests/real/test_served.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from instructft.errors import TemplateError
from instructft.extras.serving.asked import own
from instructft.extras.serving.ollama import modelfile, parts_of
from instructft.prompt.conversation import Conversation
from instructft.prompt.loss_mask import encoder
from instructft.prompt.templates import TEMPLATES
from tests.helpers.quickstart import tokenizer as bundled

COUNTING = """{%- for m in messages -%}
{{ loop.index if loop.index > 2 }}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}"""
FORGETS = """{%- for m in messages -%}{%- if loop.index0 >= messages | length - 4 -%}
<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}"""
GREETS = """{{ bos_token }}{% if messages[0]['role'] != 'system' %}<system>Be kind.{{ eos_token }}{% endif %}
{%- for m in messages -%}<{{ m['role'] }}>{{ m['content'] | trim }}{{ eos_token }}{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}"""


def with_template(text: str, *tokens: str) -> Any:
    made = bundled()
    made.chat_template = text
    if tokens:
        made.add_special_tokens({"additional_special_tokens": list(tokens)})
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_parts_of_a_built_in_template_give_its_texts(name: str) -> None:
    chat = encoder(with_template(TEMPLATES[name].text(), *TEMPLATES[name].tokens))
    parts = parts_of(chat)
    tried = 0
    for kind, conversation in own(chat, 30):
        if kind in ("one turn", "system", "many turns"):
            assert parts.text(conversation) == chat.render([conversation], True)[0]
            tried += 1
    assert tried >= 18


@pytest.mark.parametrize("text", [COUNTING, FORGETS], ids=["counts", "forgets"])
def test_what_fixed_texts_cannot_express_is_refused_with_the_place(text: str) -> None:
    with pytest.raises(TemplateError, match=r"cannot express this chat template: .*(depends on|renders)"):
        parts_of(encoder(with_template(text)))


def test_a_default_system_message_and_what_strips_contents(tokenizer: Any) -> None:
    made = with_template(GREETS)
    parts = parts_of(encoder(made))
    assert parts.begin == "<|endoftext|><system>Be kind.<|endoftext|><user>"
    assert parts.system == ("<|endoftext|><system>", "<|endoftext|><user>")
    assert "# Training took outer white space off contents" in modelfile(made, "./a.gguf", None)


def test_stops_and_sampling() -> None:
    made = with_template(TEMPLATES["chatml"].text(), *TEMPLATES["chatml"].tokens)
    text = modelfile(made, "./a.gguf", GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20))
    assert text.splitlines()[-5:] == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1",
    ]
    assert "FROM ./a.gguf\n" in text
    assert "# Tools are not in it" in text
    assert "PARAMETER temperature 0\n" in modelfile(made, "./a.gguf", GenerationConfig())


def test_quotes_and_letters_of_a_template_survive() -> None:
    open_ = '"""'
    text = f"""{{%- for m in messages -%}}{open_}{{{{ m['role'] }}}} Größe 🗼\\{{{{ '\\n' }}}}{{{{ m['content'] }}}}"""
    text += (
        f"""{{{{ eos_token }}}}{{%- endfor -%}}{{%- if add_generation_prompt %}}{open_}assistant Größe{{% endif -%}}"""
    )
    made = with_template(text)
    template = modelfile(made, "./a.gguf", None).partition('TEMPLATE """')[2].partition('"""')[0]
    assert template.endswith("{{- end -}}")
    assert "Größe 🗼" in template
    asked = Conversation([{"role": "user", "content": "Q"}])
    assert parts_of(encoder(made)).text(asked) == encoder(made).render([asked], True)[0]
