"""Rows in the layouts of published data sets, in words of our own, and what one would write down for each by hand."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Turn = tuple[str, str]  # role and text; `read` is an answer that carries no loss


class Layout(NamedTuple):
    """One row of a data set, as its page lays rows out.

    Args:
        entry: what a recipe says beside the path; nothing for most.
        tools: the functions that the prompt lists.
    """

    row: dict[str, Any]
    turns: list[Turn]
    tools: tuple[dict[str, Any], ...] = ()
    entry: dict[str, Any] = {}  # noqa: RUF012 - of a tuple, never written to


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


def chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def called(name: str, arguments: str) -> str:
    """A call as ChatML writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def written(turns: list[Turn], tools: tuple[dict[str, Any], ...] = ()) -> list[tuple[str, bool]]:
    """The row in ChatML as one would write it by hand: texts in order, and whether each carries loss."""
    pieces: list[tuple[str, bool]] = []
    if tools:
        system = turns[0][1] + "\n\n" if turns[0][0] == "system" else ""
        listed = "".join(f"\n{json.dumps(tool)}" for tool in tools)
        pieces.append((f"<|im_start|>system\n{system}{_BEFORE}{listed}{_AFTER}<|im_end|>\n", False))
        turns = turns[1:] if system else turns
    for role, text in turns:
        pieces.append((f"<|im_start|>{'assistant' if role == 'read' else role}\n", False))
        pieces += [(text + "<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL: dict[str, Any] = {"type": "function", "function": WEATHER}
OSLO, ROME = called("get_weather", '{"city": "Oslo"}'), called("get_weather", '{"city": "Rome"}')
ASK: Turn = ("user", "Is it cold in Oslo?")
PAIR: list[Turn] = [("user", "What floats?"), ("assistant", "Wood does.")]
SAID = said(("human", "What floats?"), ("gpt", "Wood does."))
CHAT = chat(*PAIR)
FOUR: list[Turn] = [*PAIR, ("user", "And iron?"), ("assistant", "It sinks.")]
THOUGHT = "<think>\nDensity decides.\n</think>\n\nWood does."
THINKS: list[Turn] = [("user", "What floats?"), ("assistant", THOUGHT)]
_HERMES = (
    "You are a function calling AI model. You are provided with function signatures within <tools> </tools> XML tags. "
    f"You may call one or more functions.\n<tools>\n{[TOOL]}\n</tools>\nFor each call return a JSON object."
)
_SCHEMA = '{"title": "Thing", "type": "object", "properties": {"floats": {"type": "boolean"}}}'
_IN_MESSAGE = {"language": "English", "redacted": False, "toxic": False, "turn_identifier": 7}
_NODE = {"lang": "en", "review_count": 3, "review_result": True, "deleted": False, "synthetic": False, "user_id": "u"}
_XLAM_PARAMETERS = {"city": {"description": "The city.", "type": "str", "default": "Oslo"}}
_XLAM = {"name": "get_weather", "description": "Weather of a city", "parameters": _XLAM_PARAMETERS}

LAYOUTS: dict[str, Layout] = {
    # -- tools --------------------------------------------------------------------------------------------------------
    "glaive-function-calling": Layout(
        {
            "sample": "SYSTEM: You are a helpful assistant, who has access to the following functions -\n"
            f"{json.dumps(WEATHER, indent=4)}\nUSER: Is it cold in Oslo?\nASSISTANT: <functioncall> "
            '{"name": "get_weather", "arguments": \'{"city": "Oslo"}\'}\nFUNCTION RESPONSE: {"degrees": 4}\n'
            "ASSISTANT: Four degrees.\n"
        },
        [
            ("system", "You are a helpful assistant, who has access to the following functions -"),
            *[ASK, ("assistant", OSLO), ("tool", '{"degrees": 4}'), ("assistant", "Four degrees.")],
        ],
        (TOOL,),
    ),
    "glaive-function-calling-v2": Layout(
        {
            "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if "
            f"required -\n{json.dumps(WEATHER, indent=4)}\n",
            "chat": "USER: Is it cold in Oslo?\n\n\nASSISTANT: Let me see.\n<functioncall> "
            '{"name": "get_weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>\n\n\n'
            'FUNCTION RESPONSE: {"degrees": 4}\n\n\nASSISTANT: Four degrees. <|endoftext|>\n\n\n',
        },
        [
            (
                "system",
                "You are a helpful assistant with access to the following functions. Use them if required -",
            ),
            *[ASK, ("assistant", "Let me see.\n" + OSLO), ("tool", '{"degrees": 4}'), ("assistant", "Four degrees.")],
        ],
        (TOOL,),
    ),
    "glaive-function-calling-v2, no functions": Layout(
        {
            "system": "SYSTEM: You are a helpful assistant, with no access to external functions.\n",
            "chat": "USER: What floats?\n\n\nASSISTANT: Wood does. <|endoftext|>\n\n\n",
        },
        [("system", "You are a helpful assistant, with no access to external functions."), *PAIR],
    ),
    "xlam-function-calling-60k": Layout(
        {
            "id": 17,
            "query": "Is it cold in Oslo?",
            "answers": json.dumps([{"name": "get_weather", "arguments": {"city": c}} for c in ("Oslo", "Rome")]),
            "tools": json.dumps([_XLAM]),
        },
        [ASK, ("assistant", f"{OSLO}\n{ROME}")],
        ({"type": "function", "function": _XLAM},),
    ),
    "APIGen-MT-5k": Layout(
        {
            "conversations": said(
                ("human", "Hello."),
                ("gpt", "How can I help?"),
                ("human", "Is it cold in Oslo?"),
                ("function_call", '{"name": "get_weather", "arguments": {"city": "Oslo"}}'),
                ("observation", '{"degrees": 4}'),
                ("gpt", "Four degrees."),
            ),
            "tools": json.dumps([WEATHER]),
            "system": "Follow the policy.",
        },
        [
            *[("system", "Follow the policy."), ("user", "Hello."), ("assistant", "How can I help?"), ASK],
            *[("assistant", OSLO), ("tool", '{"degrees": 4}'), ("assistant", "Four degrees.")],
        ],
        (TOOL,),
    ),
    "ToolACE": Layout(
        {
            "system": f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([WEATHER])}",
            "conversations": said(
                ("user", "Is it cold in Oslo?"),
                ("assistant", '[get_weather(city="Oslo")]'),
                ("tool", '[{"name": "get_weather", "results": {"degrees": 4}}]'),
                ("assistant", "Four degrees."),
            ),
        },
        [
            ("system", f"Here is a list of functions in JSON format that you can invoke:\n{json.dumps([WEATHER])}"),
            *[ASK, ("assistant", '[get_weather(city="Oslo")]')],
            *[("tool", '[{"name": "get_weather", "results": {"degrees": 4}}]'), ("assistant", "Four degrees.")],
        ],
    ),
    "hermes-function-calling-v1": Layout(
        {
            "id": "a-1",
            "conversations": said(
                ("system", _HERMES),
                ("human", "Is it cold in Oslo?"),
                ("gpt", "<tool_call>\n{'name': 'get_weather', 'arguments': {'city': 'Oslo'}}\n</tool_call>"),
                ("tool", '<tool_response>\n{"degrees": 4}\n</tool_response>'),
                ("gpt", "Four degrees."),
            ),
            "tools": json.dumps([TOOL]),
            "category": "Weather",
            "subcategory": "Cities",
            "task": "Look it up",
        },
        [
            *[("system", _HERMES), ASK],
            ("assistant", "<tool_call>\n{'name': 'get_weather', 'arguments': {'city': 'Oslo'}}\n</tool_call>"),
            *[("tool", '<tool_response>\n{"degrees": 4}\n</tool_response>'), ("assistant", "Four degrees.")],
        ],
    ),
    "hermes-function-calling-v1, JSON mode": Layout(
        {
            "id": "a-2",
            "conversations": said(
                ("system", f"Answer in JSON. Here's the schema:\n<schema>\n{_SCHEMA}\n</schema>"),
                ("human", "Does wood float?"),
                ("gpt", '{"floats": true}'),
            ),
            "category": "Things",
            "subcategory": "Wood",
            "schema": _SCHEMA,
            "task": "x",
        },
        [
            ("system", f"Answer in JSON. Here's the schema:\n<schema>\n{_SCHEMA}\n</schema>"),
            *[("user", "Does wood float?"), ("assistant", '{"floats": true}')],
        ],
    ),
    # -- OpenAI's fine-tuning files -----------------------------------------------------------------------------------
    "OpenAI, chat": Layout({"messages": chat(("system", "Be brief."), *PAIR)}, [("system", "Be brief."), *PAIR]),
    "OpenAI, weights": Layout(
        {"messages": [*CHAT[:1], {**CHAT[1], "weight": 0}, *chat(*FOUR[2:3]), {**chat(FOUR[3])[0], "weight": 1}]},
        [FOUR[0], ("read", FOUR[1][1]), *FOUR[2:]],
    ),
    "OpenAI, tools": Layout(
        {
            "messages": [
                *chat(ASK),
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
            ],
            "parallel_tool_calls": False,
            "tools": [TOOL],
        },
        [ASK, ("assistant", OSLO)],
        (TOOL,),
    ),
    "OpenAI, parallel calls": Layout(
        {
            "messages": [
                *chat(ASK),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": f"call_{city}",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
                        }
                        for city in ("Oslo", "Rome")
                    ],
                },
                {"role": "tool", "tool_call_id": "call_Oslo", "content": "4"},
                {"role": "tool", "tool_call_id": "call_Rome", "content": "20"},
                *chat(("assistant", "In Oslo.")),
            ],
            "parallel_tool_calls": True,
            "tools": [TOOL],
        },
        [ASK, ("assistant", f"{OSLO}\n{ROME}"), ("tool", "4"), ("tool", "20"), ("assistant", "In Oslo.")],
        (TOOL,),
    ),
    "OpenAI, functions": Layout(
        {
            "messages": [
                *chat(ASK),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                },
                {"role": "function", "name": "get_weather", "content": "4"},
                *chat(("assistant", "Yes.")),
            ],
            "functions": [WEATHER],
        },
        [ASK, ("assistant", OSLO), ("tool", "4"), ("assistant", "Yes.")],
        (TOOL,),
    ),
    # -- reasoning ----------------------------------------------------------------------------------------------------
    "OpenThoughts-114k": Layout(
        {
            "system": "Think in a thorough, systematic way.",
            "conversations": said(
                ("user", "What floats?"),
                (
                    "assistant",
                    "<|begin_of_thought|>\n\nDensity.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nWood does.\n\n"
                    "<|end_of_solution|>",
                ),
            ),
        },
        [
            *[("system", "Think in a thorough, systematic way."), ("user", "What floats?")],
            (
                "assistant",
                "<|begin_of_thought|>\n\nDensity.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nWood does.\n\n"
                "<|end_of_solution|>",
            ),
        ],
    ),
    "OpenThoughts-114k, metadata": Layout(
        {
            "problem": "What floats?",
            "deepseek_reasoning": "Density decides.",
            "deepseek_solution": "Wood does.",
            "ground_truth_solution": "Wood.",
            "domain": "physics",
            "source": "school",
            "test_cases": '{"inputs": ["a"]}',
            "starter_code": None,
        },
        THINKS,
        entry={
            "columns": {
                "question": "problem",
                "answer": "deepseek_solution",
                "reasoning": "deepseek_reasoning",
            }
        },
    ),
    "OpenThoughts2-1M": Layout(
        {
            "conversations": said(("user", "What floats?"), ("assistant", THOUGHT)),
            "question": "What floats?",
            "source": "school",
            "id": 4,
        },
        THINKS,
    ),
    "OpenThoughts3-1.2M": Layout(
        {
            "difficulty": 7,
            "source": "school",
            "domain": "physics",
            "conversations": said(("human", "What floats?"), ("gpt", THOUGHT)),
        },
        THINKS,
    ),
    "Llama-Nemotron-Post-Training-Dataset": Layout(
        {
            "input": chat(PAIR[0]),
            "output": THOUGHT,
            "category": "science",
            "license": "cc-by-4.0",
            "reasoning": "on",
            "generator": "a model",
            "used_in_training": "a model",
            "version": "v1.1",
            "system_prompt": "detailed thinking on",
        },
        [("system", "detailed thinking on"), *THINKS],
    ),
    "Nemotron-Post-Training-Dataset-v1": Layout(
        {
            "uuid": "a-3",
            "license": "CC BY 4.0",
            "generator": "a model",
            "version": "0.0.1",
            "category": "stem",
            "reasoning": "on",
            "messages": [
                {"role": "user", "content": "What floats?", "tool_calls": []},
                {"role": "assistant", "content": THOUGHT, "tool_calls": []},
            ],
            "metadata": '{"seed": 1}',
        },
        THINKS,
    ),
    "Nemotron-Post-Training-Dataset-v1, tool_calling": Layout(
        {
            "uuid": "a-4",
            "license": "CC BY 4.0",
            "generator": "a model",
            "version": "0.0.1",
            "category": "tool_calling",
            "reasoning": "off",
            "messages": [
                {"role": "user", "content": ASK[1], "tool_calls": []},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
            ],
            "metadata": "{}",
            "tools": json.dumps([TOOL]),
        },
        [ASK, ("assistant", OSLO)],
        (TOOL,),
    ),
    # -- conversations ------------------------------------------------------------------------------------------------
    "UltraChat": Layout({"id": "5", "data": [text for _, text in FOUR]}, FOUR),
    "ultrachat_200k": Layout({"prompt": "What floats?", "prompt_id": "f0e3", "messages": CHAT}, PAIR),
    "oasst trees": Layout(
        {
            "message_tree_id": "m1",
            "tree_state": "ready_for_export",
            "prompt": {
                **{**_NODE, "message_id": "m1", "text": "What floats?", "role": "prompter"},
                "labels": {"spam": {"value": 0.0, "count": 3}},
                "emojis": {"+1": 2},
                "replies": [
                    {**_NODE, "text": "Iron does.", "role": "assistant", "rank": 1, "replies": [], "parent_id": "m1"},
                    {
                        **{**_NODE, "text": "Wood does.", "role": "assistant", "rank": 0, "parent_id": "m1"},
                        "replies": [
                            {**_NODE, "text": "Why?", "role": "prompter", "replies": []},
                            {
                                **{**_NODE, "text": "And iron?", "role": "prompter"},
                                "replies": [{**_NODE, "text": "It sinks.", "role": "assistant", "replies": []}],
                            },
                        ],
                    },
                    {**_NODE, "text": "(gone)", "role": "assistant", "deleted": True, "replies": []},
                ],
            },
        },
        FOUR,
    ),
    "openassistant-guanaco": Layout(
        {"text": "### Human: What floats?### Assistant: Wood does.### Human: And iron?### Assistant: It sinks."}, FOUR
    ),
    "guanaco-llama2-1k": Layout(
        {"text": "<s>[INST] What floats? [/INST] Wood does. </s><s>[INST] And iron? [/INST] It sinks. </s>"}, FOUR
    ),
    "LIMA": Layout({"conversations": [text for _, text in FOUR], "source": "multi_turn"}, FOUR),
    "tulu-3-sft-mixture": Layout({"id": "t_0", "messages": chat(*FOUR), "source": "ai2-adapt-dev/x"}, FOUR),
    "smoltalk": Layout({"messages": CHAT, "source": "smol-magpie-ultra"}, PAIR),
    "smoltalk, smol-magpie-ultra": Layout(
        {
            "messages": CHAT,
            "category": "science",
            "difficulty": "easy",
            "quality": "good",
            "reward_model_score": 0.2,
            "conversation_tokens": 12,
        },
        PAIR,
    ),
    "smoltalk2": Layout(
        {
            "messages": CHAT,
            "chat_template_kwargs": {
                "custom_instructions": "",
                "enable_thinking": False,
                "python_tools": [],
                "xml_tools": [],
            },
            "source": "smoltalk-everyday",
        },
        PAIR,
    ),
    "Magpie": Layout(
        {
            "conversation_id": "c1",
            "uuid": "u1",
            "model": "a model",
            "gen_input_configs": {"temperature": 1.0, "top_p": 1.0, "input_generator": "a model", "seed": None},
            "gen_response_configs": {"temperature": 0.0},
            "instruction": "What floats?",
            "response": "Wood does.",
            "conversations": SAID,
            "task_category": "Information seeking",
            "other_task_category": ["Reasoning"],
            "task_category_generator": "a model",
            "difficulty": "easy",
            "intent": "The user wants to know what floats.",
            "knowledge": "To answer, one has to know densities.",
            "difficulty_generator": "a model",
            "input_quality": "good",
            "quality_explanation": "It is clear.",
            "quality_generator": "a model",
            "llama_guard_2": "safe",
            "reward_model": "a model",
            "instruct_reward": -3.1,
            "min_neighbor_distance": 0.2,
            "repeat_count": 0,
            "min_similar_uuid": None,
            "min_similar_conversation_id": "c2",
            "instruction_length": 12,
            "response_length": 10,
            "language": "EN",
            "created": 1718,
        },
        PAIR,
    ),
    "no_robots": Layout({"prompt": "What floats?", "prompt_id": "9e", "messages": CHAT, "category": "Open QA"}, PAIR),
    "Capybara": Layout(
        {
            "source": "TaskSource",
            "conversation": [{"input": a[1], "output": b[1]} for a, b in (FOUR[:2], FOUR[2:])],
        },
        FOUR,
    ),
    "WildChat-1M": Layout(
        {
            "conversation_hash": "h1",
            "model": "a model",
            "timestamp": "2023-04-09T00:02:53Z",
            "conversation": [
                {
                    **{**CHAT[0], **_IN_MESSAGE, "country": "Norway", "state": "Oslo", "timestamp": None},
                    "hashed_ip": "9f",
                    "header": {"accept-language": "nb", "user-agent": "a browser"},
                },
                {
                    **{**CHAT[1], **_IN_MESSAGE, "country": None, "state": None, "timestamp": "2023-04-09T00:02:53Z"},
                    "hashed_ip": None,
                    "header": {"accept-language": None, "user-agent": None},
                },
            ],
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"categories": {"hate": False}, "flagged": False}],
            "detoxify_moderation": [{"toxicity": 0.01}],
            "toxic": False,
            "redacted": False,
            "state": "Oslo",
            "country": "Norway",
            "hashed_ip": "9f",
            "header": {"accept-language": "nb", "user-agent": "a browser"},
        },
        PAIR,
    ),
    "lmsys-chat-1m": Layout(
        {
            "conversation_id": "c3",
            "model": "a model",
            "conversation": CHAT,
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"categories": {"hate": False}, "flagged": False}],
            "redacted": False,
        },
        PAIR,
    ),
    "OpenHermes-2.5": Layout(
        {
            "custom_instruction": False,
            "topic": "Physics",
            "model_name": None,
            "model": None,
            "skip_prompt_formatting": False,
            "category": "general",
            "conversations": [{**turn, "weight": None} for turn in SAID],
            "views": 12.0,
            "language": None,
            "id": None,
            "title": "What floats",
            "idx": "4",
            "hash": 81,
            "avatarUrl": None,
            "system_prompt": None,
            "source": "camelai",
        },
        PAIR,
    ),
    "SlimOrca": Layout(
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {**SAID[0], "weight": 0.0},
                {**SAID[1], "weight": 1.0},
            ]
        },
        [("system", "Be brief."), *PAIR],
    ),
    "OpenOrca": Layout(
        {"id": "niv.1", "system_prompt": "Be brief.", "question": "What floats?", "response": "Wood does."},
        [("system", "Be brief."), *PAIR],
    ),
    "orca-agentinstruct-1M": Layout({"messages": json.dumps(chat(("system", ""), *FOUR))}, FOUR),
    "aya_dataset": Layout(
        {
            "inputs": "What floats?",
            "targets": "Wood does.",
            "language": "English",
            "language_code": "eng",
            "annotation_type": "original-annotations",
            "user_id": "8f",
        },
        PAIR,
    ),
    "ShareGPT": Layout(
        {
            "id": "x_0",
            "conversations": [{**turn, "markdown": turn["value"], "text": None} for turn in SAID],
        },
        PAIR,
    ),
    "NuminaMath-CoT": Layout(
        {"source": "school", "problem": "What floats?", "solution": "Wood does.", "messages": CHAT}, PAIR
    ),
}
