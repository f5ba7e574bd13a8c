"""Answers: a batch equals one by one, the prompt is the trained one, and a stream is what a batch says."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft.errors import ModelError, UsageError
from instructft.inference import generator as answer_module
from instructft.inference.chat import Chat, generate
from instructft.inference.continuous_batching import Batch
from instructft.inference.generator import Generator, _Pieces
from instructft.prompt.loss_mask import encode_conversation, encode_prompt
from instructft.prompt.templates import TEMPLATES
from tests.helpers.inference import (
    CAPITALS,
    ask,
    forced,
    record_calls,
    reference,
    said,
    sharpen,
)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_batch_equals_one_by_one(kind: str, tiny_model: Any, llama: Any, tokenizer: Any) -> None:
    """Lengths differ a lot, and the longest prompt reaches the end of the context long before the others."""
    model = sharpen({"gpt2": tiny_model, "llama": llama}[kind])
    generator = Generator(model, tokenizer)
    texts = ["Hi", "7" * 100, "Add 1 and 2.", "8" * 70, "x", "9" * 92, "Say it. " * 6, "no"]
    longest = max(len(encode_prompt(ask(t), tokenizer)) for t in texts)
    assert 128 - 25 < longest < 128
    answers = generator.answers([ask(t) for t in texts], max_new_tokens=40, batch_size=len(texts))
    for text, answer in zip(texts, answers, strict=True):
        ids = reference(model, tokenizer, ask(text), 40)
        assert answer == generator._answer(ids), text
        assert generator.answers([ask(text)], max_new_tokens=40) == [answer]


@pytest.mark.parametrize("batch_size", [None, 1, 3, 50])
def test_order_and_done(batch_size: int | None, trained: tuple[Any, Any]) -> None:
    countries = [*CAPITALS, *reversed(CAPITALS), "France"]
    seen: dict[int, str] = {}
    answers = Generator(*trained).answers(
        [said(c) for c in countries], batch_size=batch_size, done=lambda i, a: seen.update({i: a.text})
    )
    assert [a.text for a in answers] == [CAPITALS[c] for c in countries]
    assert [seen[i] for i in range(len(countries))] == [CAPITALS[c] for c in countries]
    assert {a.finish_reason for a in answers} == {"stop"}


def test_finish_reason_and_limit(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    generator = Generator(model, tokenizer)
    ids = tokenizer(CAPITALS["Cuba"], add_special_tokens=False)["input_ids"]
    exactly = generator.answers([said("Cuba")], max_new_tokens=len(ids) + 1)[0]
    assert (exactly.text, exactly.finish_reason) == (CAPITALS["Cuba"], "stop")
    short = generator.answers([said("Cuba"), said("France")], max_new_tokens=len(ids))
    assert short[0].finish_reason == "length"
    assert short[0].text == CAPITALS["Cuba"]  # all but the stop token
    two = generator.answers([said("Cuba")], max_new_tokens=2)[0]
    assert (two.text, two.finish_reason) == (tokenizer.decode(ids[:2]).strip(), "length")


def test_stops_at_the_tokens_of_the_generation_config_too(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    comma = tokenizer(CAPITALS["Cuba"], add_special_tokens=False)["input_ids"]
    stop = next(i for i in comma if "," in tokenizer.decode([i]))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    try:
        generator = Generator(model, tokenizer)
        answer = generator.answers([said("Cuba")])[0]
        assert (answer.text, answer.finish_reason) == ("La Habana", "stop")
        assert "".join(generator.stream(said("Cuba"))).strip() == "La Habana"
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def test_pad_is_eos(trained: tuple[Any, Any]) -> None:
    from copy import deepcopy

    model, tokenizer = trained[0], deepcopy(trained[1])
    tokenizer.pad_token = tokenizer.eos_token
    conversations = [said(c) for c in CAPITALS] + [
        [*ask("a b c d e f g h"), {"role": "assistant", "content": "i"}, *said("Peru")]
    ]
    answers = Generator(model, tokenizer).answers(conversations, max_new_tokens=20)
    assert [a.text for a in answers[:4]] == list(CAPITALS.values())


def test_prompt_longer_than_the_context(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    long = ask("word " * 200)
    length = len(encode_prompt(long, tokenizer))
    for run in (
        lambda: generate(model, ["Hi", long], tokenizer=tokenizer),
        lambda: list(Generator(model, tokenizer).stream(long)),
    ):
        with pytest.raises(UsageError, match=rf"has {length} tokens; the model's context of 96 leaves no room"):
            run()
    with pytest.raises(UsageError, match="prompt 2 has"):
        generate(model, ["Hi", long], tokenizer=tokenizer)


def test_out_of_memory_halves_and_remembers(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(*trained)
    sizes: list[int] = []
    original = Batch._generate

    def little_memory(self: Batch, rows: list[Any], *rest: Any) -> Any:
        sizes.append(len(rows) if rest[0] is not None else len({id(row) for row in [*self.rows, *rows]}))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return original(self, rows, *rest)

    monkeypatch.setattr(Batch, "_generate", little_memory)
    countries = list(CAPITALS) * 4
    assert [a.text for a in generator.answers([said(c) for c in countries])] == [CAPITALS[c] for c in countries]
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[2:]) == 4
    sizes.clear()
    generator.answers([said("Peru")] * 6)
    assert max(sizes) == 4  # what worked is kept
    with pytest.raises(ModelError, match="6 prompts at once do not fit"):
        generator.answers([said("Peru")] * 6, batch_size=6)

    def broken(*_: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(Batch, "_generate", broken)
    with pytest.raises(RuntimeError, match="something else"):
        generator.answers([said("Peru")])


def test_sizes_by_length(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(*trained)
    monkeypatch.setattr(generator, "model", type("OnCpu", (), {"device": torch.device("cpu")})())
    assert generator._auto_size(50) == answer_module.CPU_BATCH
    monkeypatch.setattr(generator, "model", type("OnGpu", (), {"device": torch.device("cuda")})())
    assert generator._auto_size(64) == answer_module.GPU_BATCH
    assert generator._auto_size(8192) == answer_module.GPU_TOKENS // 8192
    assert generator._auto_size(1 << 20) == 1


def test_leftovers_in_the_generation_config_change_nothing(
    tiny_model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the answers, nor a word on stderr, in memory and after a way over the disk."""
    model = sharpen(tiny_model)
    texts = ["Hi there", "Add 3 and 4.", "word " * 20]
    expected = [Generator(model, tokenizer)._answer(reference(model, tokenizer, ask(t), 24)).text for t in texts]
    leftovers = {
        "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.4, "typical_p": 0.3, "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2, "max_length": 30, "min_length": 60, "min_new_tokens": 3, "num_beams": 3,
        "suppress_tokens": list(range(100, 900)), "bad_words_ids": [[5], [300]], "forced_eos_token_id": 7,
        "length_penalty": 2.0, "early_stopping": True, "num_return_sequences": 2, "max_time": 1e-6,
        "begin_suppress_tokens": list(range(2, 1400)), "stop_strings": ["e"],
    }  # fmt: skip
    for do_sample in (False, True):
        model.generation_config.update(**leftovers, do_sample=do_sample)
        caplog.clear()
        with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            logging.getLogger("transformers").addHandler(caplog.handler)
            try:
                made = generate(model, texts, tokenizer=tokenizer, max_new_tokens=24)
                streamed = ["".join(Generator(model, tokenizer).stream(ask(t), 24)).strip() for t in texts]
                generate(model, texts, tokenizer=tokenizer, max_new_tokens=4, temperature=0.7, top_p=0.9)
            finally:
                logging.getLogger("transformers").removeHandler(caplog.handler)
        assert made == streamed == expected
        assert [str(w.message) for w in warned] == []
        assert caplog.messages == []
    assert model.generation_config.repetition_penalty == 5.0  # the model is given back as it was


def test_greedy_is_silent(
    trained: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = trained
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert generate(tmp_path, [said("Peru")]) == [CAPITALS["Peru"]]
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert "Peru" not in capfd.readouterr().err


def test_sampling(tiny_model: Any, tokenizer: Any) -> None:
    def sample(seed: int, **settings: Any) -> list[str]:
        torch.manual_seed(seed)
        return generate(tiny_model, ["Hi", "Ho"], tokenizer=tokenizer, max_new_tokens=12, **settings)

    greedy = sample(0)
    assert sample(1) == greedy
    assert sample(0, temperature=1.0) == sample(0, temperature=1.0) != sample(1, temperature=1.0)
    assert sample(3, temperature=1e-4) == greedy
    assert sample(3, temperature=1.0, top_p=1e-6) == greedy
    # the whole distribution is drawn from, not the 50 likeliest that transformers takes by default
    torch.manual_seed(0)
    first = [a[:] for a in generate(tiny_model, ["Hi"] * 200, tokenizer=tokenizer, max_new_tokens=1, temperature=10.0)]
    assert len(set(first)) > 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"temperature": -0.1}, "temperature: found -0.1"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"top_p": 0.0}, "top_p: found 0"),
        ({"top_p": 1.1}, "top_p: found 1.1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """Said before anything is loaded: there is no such folder."""
    with pytest.raises(UsageError, match=message):
        generate("./none", ["Hi"], **settings)
    with pytest.raises(UsageError, match=message):
        Chat("./none", **settings)


def test_batch_size_out_of_range(trained: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="batch_size: found 0"):
        generate(trained[0], ["Hi"], tokenizer=trained[1], batch_size=0)


def test_training_goes_on_as_before(tokenizer: Any, tiny_model: Any) -> None:
    tiny_model.train()
    generator = Generator(tiny_model, tokenizer)
    assert generator.answers([ask("Hi")], 8) == generator.answers([ask("Hi")], 8)  # no dropout
    assert "".join(generator.stream(ask("Hi"), 8)).strip() == generator.answers([ask("Hi")], 8)[0].text
    assert tiny_model.training


def test_answers_in_training_are_computed_in_its_precision(
    tokenizer: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT generates past the call that accelerate puts under autocast: an adapter would answer in float32."""
    generator, seen = Generator(tiny_model, tokenizer), []
    tiny_model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    generator.answers([ask("Hi")], 4)
    assert set(seen) == {torch.float32}
    seen.clear()
    generator.precision = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    generator.answers([ask("Hi")], 4)
    assert set(seen) == {torch.bfloat16}


@pytest.fixture(params=sorted(TEMPLATES))
def trained_with(
    request: pytest.FixtureRequest, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, list[Any]]:
    """For each built-in template: tokenizer, model, and what the model is called with."""
    recipe = instructft.load_recipe(write_recipe(), overrides=[f"data.template={request.param}"])
    tokenizer = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, tokenizer).eval()
    return tokenizer, model, record_calls(model, monkeypatch)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_head_is_given_a_last_token_of_its_own(rows: int, tiny_model: Any, tokenizer: Any) -> None:
    """A view into the prompt takes torch 30 times as long in bfloat16; without an answer's being another."""
    generator, head, seen = Generator(tiny_model, tokenizer), tiny_model.get_output_embeddings(), list[Any]()
    ids = torch.arange(rows * 6).reshape(rows, 6)
    hooks = len(head._forward_pre_hooks)
    with generator.evaluating():
        watch = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].stride()))
        logits = tiny_model(input_ids=ids, logits_to_keep=1).logits
        watch.remove()
    width = tiny_model.config.hidden_size
    assert seen == [(width, width, 1)]
    assert len(head._forward_pre_hooks) == hooks
    tiny_model.eval()
    with torch.no_grad():
        assert torch.equal(tiny_model(input_ids=ids, logits_to_keep=1).logits, logits)


def test_the_model_is_given_the_prompt_that_was_trained(trained_with: tuple[Any, Any, list[Any]]) -> None:
    tokenizer, model, calls = trained_with
    conversations = [
        ask("Hi"),
        [{"role": "system", "content": "Be brief."}, *ask("Add."), {"role": "assistant", "content": "3"}, *ask("Go")],
        [{"role": "user", "content": "Sum.", "input": "1 2"}],
        [{"role": "user", "content": "Who?", "context": "It was Ada."}],
    ]
    generate(model, conversations, tokenizer=tokenizer, max_new_tokens=2)
    batch = next(call for call in calls if len(call["input_ids"]) == len(conversations))  # behind that of the padding
    calls.clear()
    for messages in conversations:
        list(Generator(model, tokenizer).stream(messages, 2))
    given = [row[keep.bool()].tolist() for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    prompts = [encode_prompt(messages, tokenizer) for messages in conversations]
    assert sorted(given) == sorted(prompts)
    # all of the padding stands on the left
    assert all(keep.tolist() == sorted(keep.tolist()) for keep in batch["attention_mask"])
    assert [call["input_ids"].tolist() for call in calls] == [[prompt] for prompt in prompts]
    for messages, prompt in zip(conversations, prompts, strict=True):
        whole = encode_conversation([*messages, {"role": "assistant", "content": "Yes, 3."}], tokenizer)["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert len(whole) > len(prompt)


def test_evaluate_and_the_page_ask_what_was_trained(trained_with: tuple[Any, Any, list[Any]]) -> None:
    from instructft.inference.web.answers import Settings, reply

    tokenizer, model, calls = trained_with
    asked = [{"role": "system", "content": "Be brief."}, *ask("Name the capital of Cuba.")]
    conversation = [*asked, {"role": "assistant", "content": "La Habana"}]
    instructft.evaluate(model, [{"messages": conversation}], tokenizer=tokenizer, max_new_tokens=2)
    settings = Settings(system="Be brief.", max_new_tokens=2)
    list(reply(Generator(model, tokenizer), [], asked[1]["content"], settings))
    first_of_each = [calls[0], calls[-1]]  # a batch goes on in calls of its own, from what it has
    prompts = [call["input_ids"].tolist() for call in first_of_each]
    trained = encode_conversation(conversation, tokenizer)
    assert prompts == [[trained["input_ids"][: len(prompts[0][0])]]] * 2
    first = next(i for i, label in enumerate(trained["labels"]) if label != -100)
    assert len(prompts[0][0]) == first  # up to the first token that carries loss, and no further


def test_space_before_an_answer_is_no_part_of_it(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`human-assistant` asks up to `Assistant:`, so that every answer begins with a space."""
    from copy import deepcopy

    model, tokenizer = trained[0], deepcopy(trained[1])
    tokenizer.chat_template = TEMPLATES["human-assistant"].text()
    generator = Generator(model, tokenizer)
    ids = tokenizer(" Paris. ", add_special_tokens=False)["input_ids"]
    assert generator._answer([*ids, tokenizer.eos_token_id]).text == "Paris."
    forced(model, encode_prompt(said("France"), tokenizer), [*ids, tokenizer.eos_token_id], monkeypatch)
    assert generator.answers([said("France")])[0].text == "Paris."
    assert "".join(generator.stream(said("France"))).lstrip() == "Paris. "
    assert next(generator.stream(said("France"))).startswith("P")


@pytest.mark.parametrize("country", sorted(CAPITALS))
def test_streaming_equals_not_streaming(country: str, trained: tuple[Any, Any]) -> None:
    pieces = list(Generator(*trained).stream(said(country)))
    assert "".join(pieces).strip() == CAPITALS[country]
    assert len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)


TEXTS = [
    "🙂👩‍👩‍👧 naïve",
    "你好，世界。没有空格的句子",
    "สวัสดีครับ",
    "tab\tand\n\n  indent\n",
    "plain words only",
    "é" * 9,
]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_over_several_tokens(text: str, tokenizer: Any) -> None:
    """The bundled vocabulary has most characters as two to four bytes."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = _Pieces(tokenizer.decode, [tokenizer.eos_token_id])
    pieces.put(torch.tensor([[1, 2, 3]]))
    got = []
    for token in [*ids, tokenizer.eos_token_id]:
        pieces.put(torch.tensor([token]))
        while not pieces.queue.empty():
            got.append(pieces.queue.get())
    assert "".join(got) == text  # nothing waits for a space or for the end
    pieces.end()
    assert [pieces.queue.get(), pieces.queue.get()] == ["", None]
    assert not any("\ufffd" in piece for piece in got)


def test_a_character_cut_by_the_limit_is_left_off(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    emoji = tokenizer("ok 🙂", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(emoji[:-1]).endswith("\ufffd")
    forced(model, encode_prompt(ask("Hi"), tokenizer), emoji, monkeypatch)
    generator = Generator(model, tokenizer)
    assert generator.answers([ask("Hi")], len(emoji) - 1)[0] == answer_module.Answer("ok", "length")
    assert "".join(generator.stream(ask("Hi"), len(emoji) - 1)).strip() == "ok"


def test_an_error_in_the_model_reaches_the_reader(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("the model broke")

    monkeypatch.setattr(trained[0], "generate", broken)
    with pytest.raises(RuntimeError, match="the model broke"):
        list(Generator(*trained).stream(said("Peru")))


def test_stopping_really_ends_the_generation(tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    original = tiny_model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        out = original(*args, **kwargs)
        out.logits[..., tokenizer.eos_token_id] = -1e9
        return out

    monkeypatch.setattr(tiny_model, "forward", counted)
    stopped = threading.Event()
    pieces = Generator(tiny_model, tokenizer).stream(ask("Hi"), 100, stopped=stopped)
    next(pieces)
    stopped.set()
    list(pieces)
    assert len(steps) < 100
