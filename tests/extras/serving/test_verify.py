"""Every kind of server that serves as trained passes, and what each can get wrong is found by its name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from instructft.extras.serving.client import Client
from instructft.extras.serving.servers import Served, reach
from instructft.extras.serving.verify import Found, verify
from instructft.models.load_for_inference import load_for_inference
from tests.helpers.chat_servers import ChatServer
from tests.helpers.quickstart import tokenizer as bundled

KINDS = ("llama.cpp", "vLLM", "TGI", "Ollama", "other")


def check(run: Path, kind: str, *faults: str, served: Path | None = None, rows: int = 6) -> Found:
    with ChatServer(kind, *load_for_inference(str(served or run)), *faults) as server:
        return verify(str(run), reach(Client(server.url)), rows, max_new_tokens=12)


def causes(found: Found) -> set[str]:
    return {one.cause for one in found.differences}


@pytest.mark.parametrize("kind", KINDS)
def test_served_as_trained(run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(run, kind)
    assert not found.differences
    assert (found.answered, found.equal_answers, found.equal_stops) == (3, 3, 3)
    told = kind in ("llama.cpp", "vLLM", "TGI")
    assert found.told is told
    assert found.exit_code == (0 if told else 2)
    said = capsys.readouterr().out
    assert ("Served as trained." in said) is told
    assert "3 held out" in said
    if not told:
        assert "cannot tell its prompt ids" in said
    else:
        assert "6 of 6 equal, id by id" in said


@pytest.mark.parametrize("kind", ["llama.cpp", "vLLM", "TGI"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("other template", "template not picked up"), ("doubled BOS", "BOS that training did not have")],
)
def test_another_prompt_is_found_by_name(run: Path, kind: str, fault: str, cause: str) -> None:
    found = check(run, kind, fault)
    assert causes(found) == {cause}
    assert found.exit_code == 1
    assert found.equal_prompts == 0
    assert found.differences[0].position == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_that_is_removed_is_found_by_name(run: Path, kind: str) -> None:
    found = check(run, kind, "no stop")
    assert causes(found) == {"stop token removed"}
    assert found.exit_code == 1


@pytest.mark.parametrize("kind", ["llama.cpp", "Ollama"])
def test_the_base_in_place_of_what_was_trained_is_found_by_name(run: Path, kind: str) -> None:
    found = check(run, kind, served=run.parent / "base")
    assert causes(found) == {"adapter without effect"}
    assert found.exit_code == 1
    assert all(one.gap is not None and one.gap > 0.1 for one in found.differences)


@pytest.mark.parametrize("kind", ["Ollama", "other"])
def test_a_server_that_tells_no_ids_is_caught_by_their_number(run: Path, kind: str) -> None:
    found = check(run, kind, "doubled BOS")
    assert "prompt of another length" in causes(found)
    assert found.exit_code == 1


@pytest.mark.parametrize("kind", ["llama.cpp", "other"])
def test_a_conversation_that_is_refused_is_a_difference_and_the_others_are_compared(run: Path, kind: str) -> None:
    """With ids the prompt is refused; without them the answer is."""
    found = check(run, kind, "no system", rows=24)
    refused = [one for one in found.differences if one.cause == "refused"]
    assert found.differences == refused
    assert {one.what for one in refused} == {"prompt" if kind == "llama.cpp" else "answer"}
    assert all("answers 400: " in one.theirs for one in refused)
    assert found.answered == found.equal_answers > 0
    assert found.exit_code == 1


def test_a_token_that_this_model_does_not_have_is_no_near_tie(run: Path) -> None:
    from instructft.extras.serving.verify import _gap
    from instructft.inference.generator import Generator

    generator = Generator(*load_for_inference(str(run)))
    assert _gap(generator, [1, 2, 3], 5, generator.model.config.vocab_size) is None
    assert _gap(generator, [1, 2, 3], 5, 5) == 0


def test_a_near_tie_is_no_difference(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's model is the trained one with a little noise: where its answers part, the two tokens are close."""
    import torch

    from instructft.extras.serving import verify as module

    model, tokenizer = load_for_inference(str(run))
    with torch.no_grad():
        ours = model.get_input_embeddings().weight
        ours.add_(torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    monkeypatch.setattr(module, "NEAR", 1e9)
    with ChatServer("llama.cpp", model, tokenizer) as server:
        found = verify(str(run), reach(Client(server.url)), 6, max_new_tokens=12)
    ties = [one for one in found.differences if one.near_tie]
    assert ties
    assert {one.cause for one in ties} == {"near tie"}
    assert found.exit_code == 0


def test_the_results_are_written(run: Path, tmp_path: Path) -> None:
    with ChatServer("vLLM", *load_for_inference(str(run)), "other template") as server:
        verify(str(run), reach(Client(server.url)), 4, json_file=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["exit_code"] == 1
    assert found["differences"][0]["cause"] == "template not picked up"


def test_the_command_ends_with_what_was_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from instructft import cli

    monkeypatch.setenv("SERVER_KEY", "secret-7")
    for faults, code in (((), 0), (("doubled BOS",), 1)):
        with ChatServer("llama.cpp", *load_for_inference(str(run)), *faults, key="secret-7") as server:
            words = ["verify", str(run), "--server", f"{server.url}/v1", "--api-key-env", "SERVER_KEY", "--rows", "4"]
            monkeypatch.setattr("sys.argv", ["instructft", *words])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert (ended.value.code or 0) == code
        said: Any = capsys.readouterr()
        assert said.out.startswith("server   llama.cpp b1 at")
        assert "secret-7" not in said.out + said.err
        assert "has changed since" not in said.err


@pytest.mark.parametrize("command", ["verify", "chat"])
def test_a_command_says_that_the_template_on_the_hub_is_another_one_now(
    run: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from instructft import cli
    from instructft.models import base_template

    then, now = "0" * 16, "1" * 16
    monkeypatch.setattr(base_template, "_recorded", lambda folder: ({"name_or_path": "org/base"}, then))
    monkeypatch.setattr(base_template, "at_hand", lambda *_: now)
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    with ChatServer("llama.cpp", *load_for_inference(str(run))) as server:
        more = ["--server", server.url, "--rows", "2", "--answers", "0"] if command == "verify" else []
        monkeypatch.setattr("sys.argv", ["instructft", command, str(run), *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert (ended.value.code or 0) == 0
    assert f"org/base on the Hub has changed since this run began (sha256 {then} then, {now} now)" in (
        capsys.readouterr().err
    )


def test_bytes_of_no_character_are_no_difference() -> None:
    """Of such bytes one decoder makes one sign, another one several."""
    from instructft.extras.serving import verify as module

    tokenizer = bundled()
    made = [*tokenizer("To (").input_ids, *tokenizer("東").input_ids[:1], *tokenizer("京").input_ids[:1]]
    made += tokenizer(").").input_ids
    assert "\ufffd\ufffd" in tokenizer.decode(made)
    generator: Any = SimpleNamespace(stop_ids=[0], tokenizer=tokenizer)
    told = Served("To (\ufffd).", None, "stop", None)
    ours, theirs = module._both(generator, made, told)
    assert ours == theirs


def test_a_character_of_which_not_all_tokens_are_told_is_compared_as_text() -> None:
    from instructft.extras.serving import verify as module

    tokenizer = bundled()
    made = tokenizer("To (東).").input_ids
    generator: Any = SimpleNamespace(stop_ids=[0], tokenizer=tokenizer)
    left_out = [*tokenizer("To (").input_ids, *tokenizer("東").input_ids[1:], *tokenizer(").").input_ids]
    ours, theirs = module._both(generator, made, Served("To (東).", left_out, "stop", None))
    assert ours == theirs
