"""Answers: a batch equals one by one, the prompt is the trained one, and a conversation stays within the context."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import instructft
from instructft.errors import ModelError, UsageError
from instructft.inference import generator as answer_module
from instructft.inference.chat import Chat, generate, load_for_inference, locate
from instructft.inference.continuous_batching import Batch, Row
from instructft.inference.generator import Generator, _Pieces
from instructft.prompt.loss_mask import encode_conversation, encode_prompt, encoder
from instructft.prompt.templates import TEMPLATES

CAPITALS = {"France": "Paris.", "Japan": "東京 🗼!", "Peru": "Lima\nis it.", "Cuba": "La Habana, Cuba."}


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, Any]]:
    return ask(f"Capital of {text}?")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """A GPT-2 of 64 positions that knows `CAPITALS` by heart, and its tokenizer."""
    from tests.helpers.quickstart import tokenizer as bundled

    tokenizer = bundled()
    tokenizer.chat_template = TEMPLATES["instruction"].text()
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 96}
    config = GPT2Config(vocab_size=len(tokenizer), **shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [
        encode_conversation([*said(country), {"role": "assistant", "content": city}], tokenizer)
        for country, city in CAPITALS.items()
    ]
    for _ in range(80):
        loss = sum(model(**{k: torch.tensor([v]) for k, v in row.items()}).loss for row in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model.eval(), tokenizer


@pytest.fixture
def llama(tokenizer: Any) -> Any:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **shape)).eval()


def sharpen(model: Any) -> Any:
    """Random weights with clear choices, so that no greedy tie hangs on the last bit of a float."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6)
    return model


def reference(model: Any, tokenizer: Any, messages: list[Any], max_new_tokens: int) -> list[int]:
    """Greedy ids by the plainest loop there is: one row, no padding, no cache."""
    ids = encode_prompt(messages, tokenizer)
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < max_new_tokens and len(ids) < model.config.max_position_embeddings:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return ids[start:]


def record_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `model.generate` receives."""
    calls: list[dict[str, Any]] = []
    original = model.generate

    def spy(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", spy)
    return calls


# ------------------------------------------------------------------------------------------------------------ batches


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


def test_no_prompts_no_answers(trained: tuple[Any, Any]) -> None:
    assert Generator(*trained).answers([]) == []
    assert generate(trained[0], [], tokenizer=trained[1]) == []


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
    assert generator._auto_size(50) == answer_module.CPU_BATCH
    monkeypatch.setattr(generator, "model", type("OnGpu", (), {"device": torch.device("cuda")})())
    assert generator._auto_size(64) == answer_module.GPU_BATCH
    assert generator._auto_size(8192) == answer_module.GPU_TOKENS // 8192
    assert generator._auto_size(1 << 20) == 1


# ----------------------------------------------------------------------------------------------------------- settings


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


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(params=sorted(TEMPLATES))
def trained_with(
    request: pytest.FixtureRequest, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, list[Any]]:
    """For each built-in template: tokenizer, model, and what the model is called with."""
    recipe = instructft.load_recipe(write_recipe(), overrides=[f"data.template={request.param}"])
    tokenizer = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, tokenizer).eval()
    return tokenizer, model, record_calls(model, monkeypatch)


def test_the_model_is_given_the_prompt_that_was_trained(trained_with: tuple[Any, Any, list[Any]]) -> None:
    tokenizer, model, calls = trained_with
    conversations = [
        ask("Hi"),
        [{"role": "system", "content": "Be brief."}, *ask("Add."), {"role": "assistant", "content": "3"}, *ask("Go")],
        [{"role": "user", "content": "Sum.", "input": "1 2"}],
        [{"role": "user", "content": "Who?", "context": "It was Ada."}],
    ]
    generate(model, conversations, tokenizer=tokenizer, max_new_tokens=2)
    batch = calls[0]
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
    from instructft.inference.web_sessions import Desk, Settings

    tokenizer, model, calls = trained_with
    asked = [{"role": "system", "content": "Be brief."}, *ask("Name the capital of Cuba.")]
    conversation = [*asked, {"role": "assistant", "content": "La Habana"}]
    instructft.evaluate(model, [{"messages": conversation}], tokenizer=tokenizer, max_new_tokens=2)
    talks = Desk(Generator(model, tokenizer))
    list(talks.answer("tab", asked[1]["content"], Settings(system="Be brief.", max_new_tokens=2)))
    first_of_each = [calls[0], calls[-1]]  # a batch goes on in calls of its own, from what it has
    prompts = [call["input_ids"].tolist() for call in first_of_each]
    trained = encode_conversation(conversation, tokenizer)
    assert prompts == [[trained["input_ids"][: len(prompts[0][0])]]] * 2
    first = next(i for i, label in enumerate(trained["labels"]) if label != -100)
    assert len(prompts[0][0]) == first  # up to the first token that carries loss, and no further


OWN = {  # templates that models bring along
    "headers": (
        "{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
    ),
    "system by default": (
        "{% if messages[0].role != 'system' %}You help.\n{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
}


@pytest.mark.parametrize("template", [*sorted(TEMPLATES), *OWN])
def test_chat_goes_on_from_what_training_would_see(
    template: str, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several turns with a system prompt: the ids that chat feeds are a prefix of the trained row, turn by turn."""
    tokenizer.chat_template = OWN.get(template) or TEMPLATES[template].text()
    if template == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tiny_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fed: list[list[int]] = []

    def made(**given: Any) -> None:
        fed.append(given["input_ids"][0].tolist())
        answer = tokenizer(f" Answer {len(fed)}.", add_special_tokens=False)["input_ids"]
        given["streamer"].put(given["input_ids"])
        for token in [*answer, encoder(tokenizer).stop_token_id]:
            given["streamer"].put(torch.tensor([token]))
        given["streamer"].end()

    monkeypatch.setattr(tiny_model, "generate", made)
    chat = Chat(tiny_model, tokenizer, system="Be brief.", max_new_tokens=6)
    chat.generator.context = 4096
    for question in ("Hi", "And  \n now?", "日本 🗼"):
        assert chat.send(question).startswith("Answer")
        assert chat.finish_reason == "stop"
    row = encode_conversation(chat.messages, tokenizer)["input_ids"]
    assert len(fed) == 3
    for ids, longer in zip(fed, [*fed[1:], row], strict=True):
        assert row[: len(ids)] == ids
        assert len(ids) < len(longer)
    assert encode_prompt(chat.messages[:-1], tokenizer) == fed[-1]


def test_rows_leave_and_join(tiny_model: Any, llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty prompts through a batch of eight: rows come and go, and each answer is that of one alone."""
    for model in (tiny_model, llama):
        sharpen(model)
        with torch.no_grad():  # answers end at random places
            head = model.get_output_embeddings().weight
            head[tokenizer.eos_token_id] *= 3
        generator = Generator(model, tokenizer)
        asked = [ask("7" * (i * 7 % 60) + f" {i}?") for i in range(60)]
        alone = [generator.answers([one], 24)[0] for one in asked]
        joined: list[int] = []
        original = Batch.join
        monkeypatch.setattr(
            Batch,
            "join",
            lambda self, rows, o=original, joined=joined: (joined.append(len(self.rows)), o(self, rows))[1],
        )
        assert generator.answers(asked, 24, batch_size=8) == alone
        monkeypatch.setattr(Batch, "join", original)
        assert sum(n > 0 for n in joined) > 5  # most joined others that were on their way
        assert {a.finish_reason for a in alone} == {"stop", "length"}


def test_a_cache_that_cannot_be_cut_is_left_alone(tokenizer: Any) -> None:
    """A window in the cache: its columns are no tokens' own, so a batch waits for its longest answer."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=16, **shape)
    model = sharpen(MistralForCausalLM(config).eval())
    generator = Generator(model, tokenizer)
    batch = Batch(generator, 0.0, 1.0)
    batch.join([Row(0, encode_prompt(ask("Hi"), tokenizer), 4)])
    assert not batch.rolls
    asked = [ask("7" * (i * 5 % 40)) for i in range(1, 10)]
    assert generator.answers(asked, 12, batch_size=4) == [generator.answers([one], 12)[0] for one in asked]


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


def forced(model: Any, prompt: list[int], answer: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `model` say exactly `answer` after `prompt`."""
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        position = int(kwargs["attention_mask"].shape[1]) - len(prompt)
        out.logits = torch.full_like(out.logits, -100.0)
        out.logits[:, -1, answer[min(position, len(answer) - 1)]] = 100.0
        return out

    monkeypatch.setattr(model, "forward", forward)


def test_strings_and_messages(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    prompts = ["Capital of Cuba?", said("France"), "Capital of Japan?"]
    assert instructft.generate(model, prompts, tokenizer=tokenizer) == ["La Habana, Cuba.", "Paris.", "東京 🗼!"]
    with pytest.raises(UsageError, match="needs its tokenizer"):
        instructft.generate(model, prompts)


# -------------------------------------------------------------------------------------------------------------- loading


def test_run_folder_checkpoint_and_missing_folders(
    trained: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = trained
    run = tmp_path / "run@1"
    checkpoint = run / "checkpoint-5"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    assert generate(str(checkpoint), [said("Peru")]) == [CAPITALS["Peru"]]
    with pytest.raises(UsageError, match=r"no config.json in it\); its run is unfinished, but it holds checkpoint-5"):
        load_for_inference(str(run))
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    assert generate(run, [said("Peru")]) == [CAPITALS["Peru"]]
    assert "template" not in capsys.readouterr().err
    for name in ("./none", "/none", "no-such-run", "a/b/c"):
        with pytest.raises(UsageError, match=f"no model folder {name}"):
            locate(name)


def test_hub_id_with_revision(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[tuple[str, str]] = []

    def tokenizer(name: str, revision: str, **_: Any) -> Any:
        asked.append((name, revision))
        return trained[1]

    def model(name: str, revision: str, **_: Any) -> Any:
        asked.append((name, revision))
        return trained[0], {"missing_keys": []}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    assert generate("org/name@v1.2", [said("France")]) == ["Paris."]
    assert generate("org/name", [said("France")]) == ["Paris."]
    assert asked == [("org/name", "v1.2")] * 2 + [("org/name", "main")] * 2


def test_no_chat_template_falls_back_and_says_so(
    trained: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from copy import deepcopy

    model, tokenizer = trained[0], deepcopy(trained[1])
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert generate(tmp_path, [said("France"), said("Peru")]) == ["Paris.", CAPITALS["Peru"]]
    err = capsys.readouterr().err
    assert err.count("no chat template") == 1
    assert f"{tmp_path} has no chat template; it is asked with the template instruction." in err


def test_broken_models(trained: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = trained
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="could not be loaded"):
        load_for_inference(str(tmp_path))

    from safetensors.torch import load_file, save_file

    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds no weights for transformer.h.1.mlp.c_fc.weight \(1 in all\)"):
        load_for_inference(str(tmp_path))

    weights.unlink()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_for_inference(str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ streaming


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


# ----------------------------------------------------------------------------------------------------------------- chat


def test_chat_sends_the_whole_conversation(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    calls = record_calls(model, monkeypatch)
    chat = instructft.Chat(model, tokenizer, system="S", max_new_tokens=8)
    history: list[dict[str, Any]] = [{"role": "system", "content": "S"}]
    for turn, text in enumerate(["Hi", "Ho", "He"]):
        history.append({"role": "user", "content": text})
        answer = chat.send(text)
        assert calls[turn]["input_ids"].tolist() == [encode_prompt(history, tokenizer)]
        assert answer
        history.append({"role": "assistant", "content": answer})
        assert chat.messages == history
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "S"}]
    assert chat.left == 0
    assert Chat(model, tokenizer).send("Capital of Peru?") == CAPITALS["Peru"]


def test_the_oldest_turns_leave_a_full_context(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    calls = record_calls(model, monkeypatch)
    chat = Chat(model, tokenizer, system="Be brief.", max_new_tokens=6)
    sent = []
    for turn in range(8):
        chat.send(f"Turn {turn}: go on")
        sent.append(calls[-1]["input_ids"][0].tolist())
        kept = chat.messages[1:-1]
        assert chat.messages[0] == {"role": "system", "content": "Be brief."}
        assert sent[-1] == encode_prompt([chat.messages[0], *kept], tokenizer)
        assert len(sent[-1]) + 6 <= 96
        assert kept[0]["role"] == "user"
        assert chat.left + len(chat.turns) == 2 * (turn + 1)
    assert chat.left >= 2
    assert chat.turns[0]["content"] == f"Turn {chat.left // 2}: go on"


def test_no_more_turns_leave_than_must(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    chat = Chat(model, tokenizer, max_new_tokens=6)
    answer = {"role": "assistant", "content": "fine"}
    chat.turns = [m for i in range(5) for m in (*ask(f"Turn {i}: go on"), answer)]
    before = list(chat.turns)
    chat._make_room(ask("And now?")[0])
    assert 0 < chat.left < 10
    one_more = [*before[chat.left - 2 :], *ask("And now?")]
    assert len(encode_prompt(one_more, tokenizer)) + 6 > 96


def test_a_turn_that_is_too_long_harms_nothing(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    chat = Chat(model, tokenizer, system="S", max_new_tokens=6)
    chat.send("Hi")
    before = list(chat.turns)
    assert before
    with pytest.raises(UsageError, match=r"a prompt of \d+ tokens; of the model's context of 96"):
        chat.stream("word " * 90)
    assert (chat.turns, chat.left) == (before, 0)
    assert chat.send("Ho")
    assert chat.turns[:2] == before


def test_an_answer_stopped_early_stays_as_far_as_it_got(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    chat, stopped = Chat(model, tokenizer), threading.Event()
    pieces = chat.stream("Capital of Cuba?", stopped)
    first = next(pieces)
    stopped.set()
    rest = "".join(pieces)
    got = (first + rest).strip()
    assert chat.turns == [*said("Cuba"), {"role": "assistant", "content": got}]
    assert CAPITALS["Cuba"].startswith(got)

    chat.reset()
    pieces = chat.stream("Capital of Cuba?")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.turns[-1]["content"] == first.strip()
    assert threading.active_count() < 20
    assert not stopped.clear()


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


def test_an_empty_answer_leaves_no_turn(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    forced(model, [], [tokenizer.eos_token_id], monkeypatch)
    chat = Chat(model, tokenizer)
    assert chat.send("Hi") == ""
    assert chat.turns == []
