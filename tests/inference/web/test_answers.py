"""Answers of the page: those of `chat`, for each of two models its own; kept in the browser, and as a row to train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft.inference.chat import Chat
from instructft.inference.generator import Generator
from instructft.inference.reference_model import ReferenceModel
from instructft.inference.web.answers import (
    Answer,
    Settings,
    Turn,
    all_drawn,
    base_drawn,
    drawn,
    from_json,
    markdown,
    reply,
    row,
    to_json,
)
from instructft.models.load_for_inference import load_for_inference
from tests.helpers.device import in_float32
from tests.helpers.inference import Scripted


def ask(
    generator: Generator, turns: list[Turn], question: str, reference: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    """Ask, and put the turn behind `turns`; what the page shows at the end."""
    turn = list(reply(generator, turns, question, Settings(**settings), reference))[-1]
    turns.append(turn)
    return drawn(turn, turns[:-1])


def said(shown: list[dict[str, Any]]) -> list[str]:
    """Answers as they are, what else is said by its title."""
    return [m["metadata"]["title"] if not m["content"] else m["content"][0]["text"] for m in shown]


def test_answers_are_those_of_chat(tiny_model: Any, tokenizer: Any) -> None:
    """Prompt ids, settings and history as `instructft chat` has them: the same words come out, turn by turn."""
    with torch.no_grad():  # so that the words differ, and do not end at once
        tiny_model.transformer.wpe.weight.mul_(50)
    generator = Generator(tiny_model, tokenizer)
    prompts: list[list[int]] = []
    turns: list[Turn] = []
    chat = Chat(generator, system="Be brief.", max_new_tokens=6)
    for question in ("Hi", "And you?", "Bye"):
        shown = ask(generator, turns, question, system=" Be brief. ", max_new_tokens=6)
        answer = chat.send(question)
        assert (turns[-1].question, turns[-1].answer.text) == (question, answer)
        assert said(shown)[0] == markdown(answer)
        prompts += generator.encoder.prompts([chat.messages])
        assert answer
    assert len(prompts[2]) > len(prompts[1]) > len(prompts[0])
    sampled = {tuple(said(ask(generator, [], "Hi", temperature=2.0, max_new_tokens=9))) for _ in range(5)}
    assert len(sampled) > 1


def test_an_answer_grows_piece_by_piece_and_what_there_is_of_it_stays(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instructft.inference.web.answers.PACE", 0)
    answers = reply(scripted, [], "Hi", Settings())
    grown = [next(answers), next(answers)]
    assert [turn.answer.text for turn in grown] == ["Hello", "Hello there"]
    assert not grown[-1].answer.whole
    answers.close()  # type: ignore[attr-defined]  # the stop button
    assert scripted.at_once == 0  # the model's work has ended
    scripted.pieces = ["Yes."]
    assert said(ask(scripted, [grown[-1]], "More")) == ["Yes."]
    assert [m["content"] for m in scripted.asked[-1]] == ["Hi", "Hello there", "More"]


def test_a_full_context_drops_the_oldest_and_says_so(scripted: Scripted) -> None:
    turns: list[Turn] = []  # a context of 128 tokens
    questions = [f"{n} " + "1 2 3 4 5 6 7 8 9 " * 2 for n in range(4)]
    notices = [said(ask(scripted, turns, question, max_new_tokens=32))[:-1] for question in questions]
    assert notices[0] == []
    assert [n for ns in notices for n in ns] == [
        f"The context is full: the oldest {left} turns have left it."
        for left in sorted({t.answer.left for t in turns} - {0})
    ]
    kept = [t.question for t in turns[turns[-1].answer.left // 2 :]]
    assert [m["content"] for m in scripted.asked[-1] if m["role"] == "user"] == kept
    assert turns[-1].answer.left > 0
    assert len(scripted.encoder.prompts([scripted.asked[-1]])[0]) + 32 <= 128
    assert "of the model's context of 128" in said(ask(scripted, turns, "1 2 3 " * 200))[0]
    assert turns[-1].answer.text == ""
    ask(scripted, turns, "Hi")
    assert not any("1 2 3 1" in m["content"] for m in scripted.asked[-1])  # it is no part of the conversation


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"temperature": 11.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)
def test_settings_that_do_not_work_are_told(settings: Any, named: str, scripted: Scripted) -> None:
    assert named in said(ask(scripted, [], "Hi", **settings))[0]
    assert scripted.asked == []


def test_no_answer_is_no_part_of_the_conversation(scripted: Scripted) -> None:
    turns: list[Turn] = []
    scripted.pieces = [" "]
    assert said(ask(scripted, turns, "Hi")) == ["No answer: it is no part of the conversation."]
    ask(scripted, turns, "Ho")
    assert [m["content"] for m in scripted.asked[-1]] == ["Ho"]


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("a <b>c</b> &lt; ![x](http://y)", "a &lt;b>c&lt;/b> &amp;lt; !\\[x](http://y)"),
        ("`<b>` and ``a ` <i>`` <u>", "`<b>` and ``a ` <i>`` &lt;u>"),
        ("```html\n<p>&amp;\n```\n<p>", "```html\n<p>&amp;\n```\n&lt;p>"),
        ("~~~\n<p>", "~~~\n<p>"),  # still being written
        ("bell \x07\tand\n    four", "bell \\x07\tand\n    four"),
    ],
)
def test_markdown_draws_no_html(text: str, drawn: str) -> None:
    assert markdown(text) == drawn


def test_what_it_began_from_answers_beside_it(
    write_recipe: Callable[..., Path], tmp_path: Path, tokenizer: Any
) -> None:
    """With an adapter: its base in the same memory, the adapter off for that answer only."""
    recipe = instructft.load_recipe(write_recipe())
    own = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, own)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)  # so that answers do not end at once
    model.save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    text = f"""
model: {{name_or_path: {tmp_path / "base"}}}
data: {{datasets: [{{name: quickstart, rows: 60}}], template: instruction, max_length: 128}}
adapter: {{type: lora, r: 8, alpha: 64}}
train: {{max_steps: 6, learning_rate: 0.05, use_cpu: true, logging_steps: 6}}
output_dir: {tmp_path / "run"}
"""
    run = str(instructft.train(instructft.load_recipe(write_recipe(text, "lora.yaml"), in_float32())).output_dir)
    generator = Generator(*load_for_inference(run))
    base = Generator(*load_for_inference(str(tmp_path / "base")))
    reference = ReferenceModel.of(run, "start", generator)
    turns: list[Turn] = []
    tuned_alone, base_alone = Chat(generator, max_new_tokens=8), Chat(base, max_new_tokens=8)
    for question in ("Hi", "What is the capital of Norway?", "And of Italy?"):
        ask(generator, turns, question, reference, max_new_tokens=8)
        expected = tuned_alone.send(question), base_alone.send(question)  # each reads its own answers
        assert turns[-1].base is not None
        assert (turns[-1].answer.text, turns[-1].base.text) == expected
        assert expected[0] != expected[1]
    shown = [m for m in base_drawn(turns) if m["role"] == "assistant" and m["content"]]
    assert said(shown) == [markdown(m["content"]) for m in base_alone.turns[1::2]]
    ask(generator, turns := [], "Hi", max_new_tokens=8)
    assert turns[0].answer.text == tuned_alone.turns[1]["content"]  # the adapter is on again


def test_where_the_other_model_was_not_asked_it_reads_the_first_ones_answer(scripted: Scripted) -> None:
    class Reference:
        base = "start"

        @contextmanager
        def answering(self) -> Iterator[Scripted]:
            yield other

    other = Scripted(scripted.model, scripted.tokenizer)
    other.pieces = ["I", " too"]
    turns: list[Turn] = []
    ask(scripted, turns, "One")
    for question in ("Two", "Three"):
        ask(scripted, turns, question, Reference())
    expected = ["One", "Hello there.", "Two", "I too", "Three"]
    assert [m["content"] for m in other.asked[-1]] == expected
    assert [m["content"] for m in scripted.asked[-1]] == ["One", "Hello there.", "Two", "Hello there.", "Three"]
    notes = [m["metadata"]["title"] for m in base_drawn(turns) if not m["content"]]
    assert notes == ["It was not asked, and reads the other answer."]


def test_a_saved_conversation_is_a_row_that_a_recipe_trains(
    scripted: Scripted, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """All but an answer that was stopped: it would teach to stop in the middle."""
    turns: list[Turn] = []
    ask(scripted, turns, "a\n    b <b>")
    scripted.pieces = [" "]
    ask(scripted, turns, "Nothing to say")
    scripted.pieces = ["Half an", " answer"]
    turns.append(next(reply(scripted, turns, "More", Settings())))
    text = row(turns, " Be brief. ")
    messages = json.loads(text)["messages"]
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\n    b <b>"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "Half an", "weight": 0},
    ]
    assert row([]) == row([Turn("Only a question")]) == ""
    (tmp_path / "chat.jsonl").write_text(text, encoding="utf-8")
    recipe = instructft.load_recipe(
        write_recipe(
            f"""
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 32, n_positions: 128}}, tokenizer: quickstart}}
data:
  datasets: {{path: {tmp_path / "chat.jsonl"}}}
  template: instruction
  max_length: 128
  splits: {{validation: 0, test: 0}}
"""
        )
    )
    tokenizer = instructft.load_tokenizer(recipe)
    (trained,) = instructft.prepare_dataset(recipe, tokenizer)["train"]
    learned = [i for i in trained["labels"] if i != -100]
    assert tokenizer.decode(learned, skip_special_tokens=True) == "Hello there."


def test_what_a_browser_keeps_comes_back_and_nothing_else_does(scripted: Scripted) -> None:
    turns: list[Turn] = []
    for question in ("One", "1 2 3 " * 200, "Two"):
        ask(scripted, turns, question)
    turns[-1] = Turn("Two", turns[-1].answer, Answer("base", True, 2, ("note",)))
    settings = Settings("Be brief.", 0.5, 0.9, 17)
    assert from_json(to_json(turns, settings, True)) == (turns, settings, True)
    assert len(all_drawn(turns)) == 6
    for text in (None, "", "x", "[]", "{}", '{"turns": 3}', '{"turns": [{}], "settings": {}, "compare": 1}', "null"):
        assert from_json(text) is None
