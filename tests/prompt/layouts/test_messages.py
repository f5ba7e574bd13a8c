"""Messages of every layout in one form: what each key becomes, and what is refused by name."""

from __future__ import annotations

import pytest

from instructft.prompt.layouts.messages import conversation_of
from instructft.prompt.ledger import Unread


def read(*turns):
    return list(conversation_of([{"role": "user", "content": "Q"}, *turns])[1:])


def answer(content="A", **more):
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (answer(train=False), answer(weight=0)),
        (answer(loss=0.0), answer(weight=0)),
        (answer(weight="0"), answer(weight=0)),
        (answer(masked=True), answer(weight=0)),
        (answer(mask=0), answer()),
        (answer(weight=1.0, train=True, id=7), answer()),
        (
            answer("abcd", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True}]),
            answer("abcd", train_spans=[(0, 2, True), (2, 4, False)]),
        ),
        (answer(thinking="T"), answer(reasoning_content="T")),
        (answer("<think>\nT\n</think>\n\nA"), answer(reasoning_content="T")),
        (answer("<think>T</think>A"), answer("<think>T</think>A")),
        (
            answer(
                None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
            ),
            answer("", tool_calls=[CALL]),
        ),
        (
            answer([{"type": "text", "text": "A"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]),
            answer(tool_calls=[CALL]),
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "4"}]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ),
        ({"role": "ipython", "content": {"c": 4}}, {"role": "tool", "content": '{"c":4}'}),
        ({"from": "BOT:", "value": "A"}, answer()),
    ],
)
def test_a_turn_in_normal_form(turn, expected):
    assert read(turn) == [expected]


@pytest.mark.parametrize(
    ("turn", "named"),
    [
        (answer(weight=0.5), "key `weight` .*: an answer is trained or not .*repeat"),
        (answer(loss_scale=2), "key `loss_scale` .*: an answer is trained or not"),
        ({"role": "user", "content": "Q", "train": True}, "data.ignore: \\[user.train\\]"),
        (answer(channel="analysis"), "key `channel`"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part `image_url`"),
        ({"role": "alien", "content": "x"}, "alien"),
        (answer(tool_calls="call f"), "key `tool_calls`"),
        (answer(value="other"), "key `value`"),
    ],
)
def test_what_nothing_reads_is_named(turn, named):
    with pytest.raises(Unread, match=named):
        read(turn)
