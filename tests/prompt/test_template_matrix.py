"""Published chat templates × tokenizers × conversations: loss lies on what a server would ask for, or it is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from instructft.prompt.loss_mask import Encoder, Rows
from tests.helpers.telling import telling
from tests.helpers.template_matrix import CONVERSATIONS, Verdict, judge, judge_with_keys, templates, tokenizer

# Families that differ in kind: thoughts taken out of history, calls of their own, two tokens of end, content in parts.
FEW = ("qwen3", "gptoss", "deepseekv3", "glm4moe", "llama3_1", "gemma3", "phi3", "smolvlm", "nemotron_3_nano")


def verdicts(kind: str, names: Any) -> dict[tuple[str, str], Verdict]:
    found = {}
    for name in names:
        made = tokenizer(kind, templates()[name])
        for what, (messages, tools) in CONVERSATIONS.items():
            found[name, what] = judge(made, messages, tools)
    return found


def held(found: dict[tuple[str, str], Verdict]) -> None:
    bad = {key: verdict for key, verdict in found.items() if verdict.kind in ("wrong", "needless")}
    assert not bad, "\n".join(f"{'/'.join(key)}: {verdict.kind}: {verdict.why}" for key, verdict in bad.items())


def test_no_published_template_is_trained_in_another_way_than_it_is_served() -> None:
    found = verdicts("Qwen", templates())
    held(found)
    count = Counter(verdict.kind for verdict in found.values())
    assert len(templates()) >= 40
    assert count["right"] >= 400  # of 533; what is refused a server cannot serve either


@pytest.mark.parametrize("kind", telling(["Llama", "GPT-2"], "Llama"))
def test_with_other_tokenizers_too(kind: str) -> None:
    held(verdicts(kind, FEW))


@pytest.mark.battery
@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_all_of_them_with_other_tokenizers(kind: str) -> None:
    held(verdicts(kind, templates()))


@pytest.mark.parametrize("name", ["nemotron_3_nano", "nemotron_3_ultra"])
def test_what_is_refused_for_a_thought_is_trained_with_thinking_off(name: str) -> None:
    made = tokenizer("GPT-2", templates()[name])
    for what, (messages, tools) in CONVERSATIONS.items():
        if "thought" in what:
            continue
        assert judge(made, messages, tools).kind == "refused"
        assert judge(made, messages, tools, {"enable_thinking": False}).kind == "right", what


# Templates, and what no key helps with: a template that wants turns to alternate takes no greeting.
BEYOND = [(name, "greeting first") for name in ("cohere", "cohere2", "gemma", "gemma3")]
LACKING = ("gemma", "deepseekv3", "llava_next", "qwen3_5_nothink")


def hold_with_keys(kind: str, name: str) -> None:
    made, refused = tokenizer(kind, templates()[name]), 0
    for what, (messages, tools) in CONVERSATIONS.items():
        if judge(made, messages, tools).kind == "refused":
            refused += 1
            key, verdict = judge_with_keys(kind, templates()[name], messages, tools)
            assert bool(key) == ((name, what) not in BEYOND), (name, what, key, verdict)
            assert not key or verdict.kind in ("right", "told"), (name, what, key, verdict)
    assert refused or name not in LACKING


@pytest.mark.parametrize("name", telling(LACKING, "deepseekv3"))
def test_what_a_template_lacks_can_be_given_to_it(name: str) -> None:
    hold_with_keys("Qwen", name)


@pytest.mark.battery
@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "Qwen"])
def test_what_any_of_them_lacks_can_be_given_to_it(kind: str) -> None:
    for name in templates():
        hold_with_keys(kind, name)


def test_of_several_calls_none_is_left_out() -> None:
    messages, tools = CONVERSATIONS["parallel calls"]
    verdict = judge(tokenizer("GPT-2", templates()["gptoss"]), messages, tools)
    assert verdict.kind == "refused"
    assert "all of the 2 tool calls" in verdict.why


@pytest.mark.parametrize("fault", ["a label too few", "a label too many", "the end is not trained", "a space in front"])
def test_the_oracle_sees_what_is_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder.encode

    def broken(self: Encoder, *args: Any, **kwargs: Any) -> Rows:
        rows = encode(self, *args, **kwargs)
        ids, labels = rows.input_ids.copy(), rows.labels.copy()
        carry = np.flatnonzero(labels != -100)
        if fault == "a label too few":
            labels[carry[0]] = -100
        elif fault == "a label too many":
            labels[carry[0] - 1] = ids[carry[0] - 1]
        elif fault == "the end is not trained":
            labels[carry[-1]] = -100
        else:
            ids[carry[0] - 1] = self.tokenize([" "])[0][0]
        return Rows(ids, labels, rows.lengths, rows.conversation)

    monkeypatch.setattr(Encoder, "encode", broken)
    messages, tools = CONVERSATIONS["many turns"]
    assert judge(tokenizer("GPT-2", templates()["qwen2_5"]), messages, tools).kind == "wrong"
