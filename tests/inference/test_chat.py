"""A model by its name, a conversation within its context, and prompts as training would render them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import instructft
from instructft.errors import ModelError, UsageError
from instructft.inference.chat import Chat, generate
from instructft.inference.generator import Generator
from instructft.models.load_for_inference import load_for_inference, locate
from instructft.prompt.loss_mask import encode_conversation, encode_prompt, encoder
from instructft.prompt.templates import TEMPLATES
from tests.helpers.inference import (
    CAPITALS,
    ask,
    forced,
    record_calls,
    said,
)


def test_no_prompts_no_answers(trained: tuple[Any, Any]) -> None:
    assert Generator(*trained).answers([]) == []
    assert generate(trained[0], [], tokenizer=trained[1]) == []


def test_strings_and_messages(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    prompts = ["Capital of Cuba?", said("France"), "Capital of Japan?"]
    assert instructft.generate(model, prompts, tokenizer=tokenizer) == ["La Habana, Cuba.", "Paris.", "東京 🗼!"]
    with pytest.raises(UsageError, match="needs its tokenizer"):
        instructft.generate(model, prompts)


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

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **_: trained[0].config)
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
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short"):
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


def test_an_empty_answer_leaves_no_turn(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    forced(model, [], [tokenizer.eos_token_id], monkeypatch)
    chat = Chat(model, tokenizer)
    assert chat.send("Hi") == ""
    assert chat.turns == []
