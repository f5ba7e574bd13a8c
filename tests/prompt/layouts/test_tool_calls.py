"""Tools and calls of every layout in the form that templates take."""

from __future__ import annotations

import pytest

from instructft.prompt.layouts.tool_calls import calls_of, tools_of
from instructft.prompt.ledger import Ledger


@pytest.mark.parametrize(
    "given",
    [
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        [{"type": "function", "name": "f", "parameters": {}}],
        [{"name": "f", "input_schema": {}}],
        {"name": "f", "parameters": {}},
        '[{"name": "f", "parameters": {}}]',
    ],
)
def test_tools(given):
    ledger = Ledger()
    assert tools_of(given, "tools", ledger) == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert not ledger.found


def test_arguments_are_encoded_once_and_what_is_no_json_stays():
    given = [{"name": "f", "arguments": '"{\\"a\\": 1}"'}, {"name": "f", "arguments": "{broken"}, {"name": "f"}]
    found = [call["function"]["arguments"] for call in calls_of(given, "tool_calls", Ledger())]
    assert found == [{"a": 1}, "{broken", {}]


def test_what_is_no_call_is_written_down():
    ledger = Ledger()
    assert calls_of("f(1)", "tool_calls", ledger) == []
    assert tools_of("use f", "tools", ledger) is None
    assert [finding.what for finding in ledger.found] == ["tool_calls", "tools"]
