"""Which tokens carry loss: whole id lists, for every template, and for templates that nobody here wrote."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructft.errors import InstructftError, TemplateError
from instructft.prompt.loss_mask import encode_conversation, encode_prompt, encode_turns, encoder, render
from instructft.prompt.templates import TEMPLATES
from tests.helpers.conversations import assistant, user, with_template

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def templated(request: Any, bare_tokenizer: Any) -> tuple[str, Any]:
    """(template name, GPT-2-like tokenizer with it), as `load_tokenizer` sets it up."""
    return request.param, with_template(bare_tokenizer(), request.param)


# What each template must render, piece by piece; True marks what carries loss. Written out by hand, turn by turn.
def expected_pieces(name: str, eos: str, turns: int, system: bool, extra: str | None) -> list[tuple[str, bool]]:
    questions, answers = ["Add 1 and 1.", "And 2?", "And 3?"], ["The sum is 2.", "4", "7, I think."]
    heading = {"input": "### Input:\n", "context": "### Context:\n"}
    pieces: list[tuple[str, bool]] = []
    for i in range(turns):
        first = i == 0
        lead = ""
        if name in ("instruction", "alpaca"):
            lead = "Be brief.\n\n" if system and first else ""
            if name == "alpaca" and first:
                lead += PREAMBLE_INPUT if extra else PREAMBLE
            body = f"### Instruction:\n{questions[i]}\n\n"
            if extra and first:
                body += f"{heading[extra]}Some text.\n\n"
            pieces += [(lead + body + "### Response:\n", False), (answers[i] + eos, True)]
        elif name == "human-assistant":
            lead = "Be brief." if system and first else ""
            question = questions[i] + ("\n\nSome text." if extra and first else "")
            pieces += [(f"{lead}\n\nHuman: {question}\n\nAssistant:", False), (f" {answers[i]}{eos}", True)]
        else:
            lead = "<|im_start|>system\nBe brief.<|im_end|>\n" if system and first else ""
            question = questions[i] + ("\n\nSome text." if extra and first else "")
            lead = lead if first else "\n"  # the newline after the answer before
            pieces += [
                (f"{lead}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False),
                (f"{answers[i]}<|im_end|>", True),
            ]
    if name == "chatml":
        pieces.append(("\n", False))
    return pieces


def conversation(turns: int, system: bool, extra: str | None) -> list[dict[str, str]]:
    messages = [SYSTEM] if system else []
    extras = {extra: "Some text."} if extra else {}
    for question, answer in [("Add 1 and 1.", "The sum is 2."), ("And 2?", "4"), ("And 3?", "7, I think.")][:turns]:
        messages += [user(question, **extras), assistant(answer)]
        extras = {}
    return messages


@pytest.mark.parametrize("extra", [None, "input", "context"])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rendered_text_and_whole_id_lists(
    templated: tuple[str, Any], turns: int, system: bool, extra: str | None
) -> None:
    name, tokenizer = templated
    messages = conversation(turns, system, extra)
    pieces = expected_pieces(name, tokenizer.eos_token, turns, system, extra)
    assert render(messages, tokenizer) == "".join(text for text, _ in pieces)

    ids, labels = [], []
    for text, loss in pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if loss else [-100] * len(piece)
    row = encode_conversation(messages, tokenizer)
    assert row == {"input_ids": ids, "labels": labels}
    # … and the whole text tokenized at once, as a server would, gives the same ids
    assert ids == tokenizer(render(messages, tokenizer), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("train_on", ["responses", "last_response", "everything"])
def test_train_on(templated: tuple[str, Any], train_on: str) -> None:
    name, tokenizer = templated
    row = encode_conversation(conversation(3, True, None), tokenizer, train_on)
    pieces = expected_pieces(name, tokenizer.eos_token, 3, True, None)
    trained = [text for text, loss in pieces if loss]
    wanted = {"responses": trained, "last_response": trained[-1:], "everything": [text for text, _ in pieces]}[train_on]
    kept = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert kept == [i for text in wanted for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_an_answer_of_weight_zero_is_read_but_not_trained(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "chatml")
    messages = conversation(2, False, None)
    messages[1] = {**messages[1], "weight": 0}
    row, full = encode_conversation(messages, tokenizer), encode_conversation(conversation(2, False, None), tokenizer)
    assert row["input_ids"] == full["input_ids"]
    kept = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(kept) == "4<|im_end|>"


# ---------------------------------------------------------------------------------------------------------------------
# Properties, over conversations that contain the templates' own markers
# ---------------------------------------------------------------------------------------------------------------------

MARKERS = [
    "### Instruction:\n", "### Response:\n", "### Input:", "\n\nHuman: ", "\n\nAssistant:", "<|im_start|>assistant\n",
    "<|im_end|>", "<|endoftext|>", "{{ eos_token }}", "{% generation %}",
    "\n", "\n\n", " ", "  ", "\t", "\u00a0", "\u2028",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=8)), min_size=1, max_size=5).map("".join)
answers = texts.filter(lambda text: text.strip() != "")
chats = st.tuples(st.booleans(), st.lists(st.tuples(texts, answers), min_size=1, max_size=3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chat=chats)
def test_properties(templated: tuple[str, Any], chat: tuple[bool, list[tuple[str, str]]]) -> None:
    name, tokenizer = templated
    messages = [SYSTEM] if chat[0] else []
    for question, answer in chat[1]:
        messages += [user(question), assistant(answer)]
    trained: list[tuple[list[int], list[int]]] = []  # (ids before, ids) of every stretch that carries loss
    for row in encode_turns(messages, tokenizer):
        ids, labels, start = row["input_ids"], row["labels"], 0
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        for loss, run in groupby(labels, key=lambda label: label != -100):
            end = start + len(list(run))
            if loss:
                trained.append((ids[:start], ids[start:end]))
            start = end
    # each turn: the ids that a server sends, and behind them the answer as it is in the row, with its end
    asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    space = " " if name == "human-assistant" else ""
    assert [before for before, _ in trained] == [encode_prompt(messages[:i], tokenizer) for i in asked]
    assert [before for before, _ in trained] == [
        tokenizer(render(messages[:i], tokenizer, True), add_special_tokens=False)["input_ids"] for i in asked
    ]
    assert [tokenizer.decode(run, clean_up_tokenization_spaces=False) for _, run in trained] == [
        f"{space}{messages[i]['content']}{tokenizer.eos_token}" for i in asked
    ]
    assert all(run[-1] == tokenizer.eos_token_id for _, run in trained)


# ---------------------------------------------------------------------------------------------------------------------
# Templates that nobody here wrote
# ---------------------------------------------------------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
)
# ChatML without {% generation %} that, like Qwen 3, takes the reasoning out of earlier answers
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "{% endgeneration %}<|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def foreign(tokenizer: Any, template: str, *tokens: str) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)} if tokens else {})
    tokenizer.chat_template = template
    return tokenizer


def kept(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_a_template_without_generation_markers(bare_tokenizer: Any) -> None:
    tokenizer = foreign(bare_tokenizer(), LLAMA3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    row = encode_conversation(conversation(2, True, None), tokenizer)
    assert kept(tokenizer, row) == "The sum is 2.<|eot_id|>4<|eot_id|>"
    assert encoder(tokenizer).stop_token == "<|eot_id|>"
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_template_with_generation_markers_still_teaches_the_end_of_turn(bare_tokenizer: Any) -> None:
    # the marker closes before <|im_end|>: taken literally, the model would never learn to stop
    tokenizer = foreign(bare_tokenizer(), GENERATION, "<|im_start|>", "<|im_end|>")
    row = encode_conversation(conversation(2, True, None), tokenizer)
    assert kept(tokenizer, row) == "The sum is 2.<|im_end|>4<|im_end|>"


def test_a_template_that_rewrites_history(bare_tokenizer: Any) -> None:
    tokenizer = foreign(bare_tokenizer(), QWEN3, "<|im_start|>", "<|im_end|>")
    plain = conversation(2, False, None)
    assert kept(tokenizer, encode_conversation(plain, tokenizer)) == "The sum is 2.<|im_end|>4<|im_end|>"

    reasoning = [user("1+1?"), assistant("<think>easy</think>2"), user("2+2?"), assistant("<think>hm</think>4")]
    rows = encode_turns(reasoning, tokenizer)  # each turn as it is served: the first with its thought, then without
    assert [kept(tokenizer, row) for row in rows] == ["<think>easy</think>2<|im_end|>", "<think>hm</think>4<|im_end|>"]
    assert "easy" not in tokenizer.decode(rows[1]["input_ids"])
    for row, end in zip(rows, (1, 3), strict=True):
        prompt = encode_prompt(reasoning[:end], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
    assert encoder(tokenizer).encode([reasoning], turns="last").lists() == rows[1:]
    with pytest.raises(TemplateError, match="rewrites"):
        encode_conversation(reasoning, tokenizer)
    last = encode_conversation(reasoning, tokenizer, "last_response")
    assert kept(tokenizer, last) == "<think>hm</think>4<|im_end|>"


PREFILLS = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def test_a_thought_that_the_prompt_opens_is_for_the_answer_to_close(bare_tokenizer: Any) -> None:
    tokenizer = foreign(bare_tokenizer(), PREFILLS, "<|im_start|>", "<|im_end|>")
    with pytest.raises(TemplateError, match="opens a thought"):
        encode_conversation([user("1+1?"), assistant("2")], tokenizer)
    row = encode_conversation([user("1+1?"), {**assistant("2"), "reasoning_content": "easy"}], tokenizer)
    assert kept(tokenizer, row) == "easy\n</think>\n\n2<|im_end|>"


def test_a_template_that_never_ends_an_answer_is_refused(bare_tokenizer: Any) -> None:
    tokenizer = foreign(bare_tokenizer(), "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(TemplateError, match="never learn to stop"):
        encode_conversation([user("a"), assistant("b")], tokenizer)


def test_two_bos_tokens_are_refused(bare_tokenizer: Any) -> None:
    twice = "{{ bos_token }}" + LLAMA3
    tokenizer = foreign(bare_tokenizer(), twice, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    with pytest.raises(TemplateError, match="two BOS"):
        encoder(tokenizer)


def test_a_generation_prompt_whose_end_merges_with_the_answer(bare_tokenizer: Any) -> None:
    # "Assistant: " + "Paris" merges into "Assistant:" + " Paris" once it is history: fine for one answer, not for two
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = foreign(bare_tokenizer(), template)
    one = [user("Capital?"), assistant("Paris")]
    row, prompt = encode_conversation(one, tokenizer), encode_prompt(one[:1], tokenizer)
    assert row["input_ids"][: len(prompt)] == prompt
    assert kept(tokenizer, row) == "Paris" + tokenizer.eos_token
    rows = encode_turns([*one, user("And Peru?"), assistant("Lima")], tokenizer)
    assert [kept(tokenizer, row) for row in rows] == ["Paris" + tokenizer.eos_token, "Lima" + tokenizer.eos_token]


def test_the_encoder_follows_a_changed_template(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "instruction")
    first = encode_conversation([user("a"), assistant("b")], tokenizer)
    tokenizer.chat_template = TEMPLATES["human-assistant"].text()
    assert encode_conversation([user("a"), assistant("b")], tokenizer) != first


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
def test_a_tokenizer_with_a_prefix_space(kind: str) -> None:
    """As Llama 2 and Mistral 7B have it: a piece alone would gain a space that the whole text does not have."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if kind == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    corpus = ["the sum is two and I think that Paris is a city", "[INST] Hello there [/INST] Hi"] * 4
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    core.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("[INST]", special=True), AddedToken("[/INST]", special=True)])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    messages = [user("Hello there"), assistant("the sum is two"), user("And?"), assistant("Paris")]
    row = encode_conversation(messages, tokenizer)
    assert row["input_ids"] == tokenizer(render(messages, tokenizer), add_special_tokens=False)["input_ids"]
    for i in (1, 3):
        prompt = encode_prompt(messages[:i], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][len(prompt)] != -100
    assert kept(tokenizer, row).replace(" ", "") == "thesumistwo</s>Paris</s>"


def test_a_conversation_without_messages_or_answers_is_an_error_of_ours(bare_tokenizer: Any) -> None:
    tokenizer = with_template(bare_tokenizer(), "chatml")
    for messages in ([], [user("Hi")], [user("Hi"), {**assistant("Ho"), "weight": 0}]):
        with pytest.raises(InstructftError):
            encode_conversation(messages, tokenizer)
    with pytest.raises(InstructftError, match="a conversation without messages"):
        encode_conversation([], tokenizer)
