"""Chat templates × tokenizers × conversations, each judged by an oracle that never looks into the package.

The oracle is a server: it gives the template, through transformers alone, the messages before an answer in each form
that servers send (a thought in its field or in the content, arguments as an object or as text, `developer` as it is or
as `system`, content as text or as parts) and takes a form that shows all that the row says. What the template then
puts behind the prompt, up to the token that ends a turn, is what has to carry loss, and nothing else.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]

# The token that ends a turn, by family; the first that a template holds becomes the tokenizer's EOS.
ENDS = (
    "<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|return|>", "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>", "<|end|>", "<end_of_utterance>", "<|eot|>", "</s>", "<|endoftext|>",
)  # fmt: skip
# And those that hand over to a tool.
CALL_ENDS = ("<|eom_id|>", "<|call|>", "<|eom|>")
# What such templates use as special tokens: with bars, and the few without.
_SPECIAL = re.compile(
    r"<\|[^|<>\s']{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_(?:turn|utterance)>|<\|?turn\|?>|<turn\|>"
    r"|<\|?tool_(?:call|response)\|>|<\|tool_(?:call|response)>|<\|channel>|<channel\|>|</?s>|<bos>|<eos>|\[gMASK\]|<sop>"
)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: dict[str, Any], number: str = "abcdef123") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, number: str = "abcdef123") -> Message:
    return {"role": "tool", "content": text, "tool_call_id": number, "name": "get_weather"}


WEATHER = [
    {"type": "function",
     "function": {"name": "get_weather", "description": "The weather of today",
                  "parameters": {"type": "object", "required": ["city"],
                                 "properties": {"city": {"type": "string", "description": "its name"}}}}}
]  # fmt: skip
_OSLO, _ROME = call("get_weather", {"city": "Oslo"}), call("get_weather", {"city": "Rome"}, "bcdefg234")

# name -> messages, and the tools that may be called
CONVERSATIONS: dict[str, tuple[list[Message], Any]] = {
    "one turn": ([user("Capital of France?"), answer("Paris is it.")], None),
    "many turns": (
        [user("Hi"), answer("Hello!"), user("Two and two?"), answer("Four"), user("Three?"), answer("Six.")],
        None,
    ),
    "system": ([{"role": "system", "content": "Be terse."}, user("Two and two?"), answer("Four")], None),
    "developer": ([{"role": "developer", "content": "Be terse."}, user("Two and two?"), answer("Four")], None),
    "thought in content": (
        [user("2 and 2?"), answer("<think>\nTwo twice.\n</think>\n\nFour"),
         user("3 and 3?"), answer("<think>\nThree twice.\n</think>\n\nSix")],
        None,
    ),
    "thought in a field": (
        [user("2 and 2?"), answer("Four", reasoning_content="Two twice."),
         user("3 and 3?"), answer("Six", reasoning_content="Three twice.")],
        None,
    ),
    "call": ([user("Oslo?"), answer("", tool_calls=[_OSLO]), result("cold"), answer("It freezes.")], WEATHER),
    "parallel calls": (
        [user("Oslo, Rome?"), answer("", tool_calls=[_OSLO, _ROME]), result("cold"), result("warm", "bcdefg234"),
         answer("It freezes, it burns.")],
        WEATHER,
    ),
    "words and a call": (
        [user("Oslo?"), answer("Let me look.", tool_calls=[_OSLO]), result("cold"), answer("It freezes.")],
        WEATHER,
    ),
    "result last": ([user("Oslo?"), answer("", tool_calls=[_OSLO]), result("cold")], WEATHER),
    "greeting first": ([answer("Welcome!"), user("Bye"), answer("Goodbye.")], None),
    "weights": ([user("2 and 2?"), answer("Five", weight=0), user("No."), answer("Four", weight=1)], None),
    "white space": ([user(" a \n"), answer("\n  code\n"), user("x"), answer("  y")], None),
}  # fmt: skip


def templates() -> dict[str, str]:
    """The published chat templates that TRL ships, without its copies for training."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    files = [path for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith("_training")]
    return {path.stem: path.read_text(encoding="utf-8") for path in files}


@functools.cache
def _core(kind: str) -> str:
    """The `tokenizer.json` of a kind."""
    from tests.helpers import families

    if kind == "GPT-2":
        return (Path(__file__).parents[1] / "assets" / "gpt2" / "tokenizer.json").read_text(encoding="utf-8")
    if kind == "Llama":
        return str(families._metaspace().to_str())
    return str(families._bpe([], ["<|endoftext|>"], cut=families._CUT.replace("DIGITS", ""), nfc=True).to_str())


def tokenizer(kind: str, template: str) -> Any:
    """A tokenizer of a kind (GPT-2, Llama, Qwen) that knows the special tokens of a template, and has it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(kind)),
        **({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if kind == "Llama" else {}),
    )
    special = sorted(set(_SPECIAL.findall(template)))
    end = next((token for token in ENDS if token in template), made.eos_token or "<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": [token for token in special if token != end]})
    made.add_special_tokens({"eos_token": end})
    if "bos_token" in template and made.bos_token is None:
        made.add_special_tokens({"bos_token": "<|begin|>"})
    made.chat_template = template
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The oracle
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What a server would do for one answer.

    Args:
        exact: (prompt, answer) in each form of the messages that shows all of them; the answer ends with its token.
        prompts: prompts in forms where the answer is no continuation, so that only what it says can be compared.
        shown: facts that some form of the template shows.
    """

    exact: list[tuple[str, str]] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    shown: frozenset[str] = frozenset()


def facts(message: Message) -> list[str]:
    """What an answer says: its thought, its words, the names and the values of its calls."""
    found = []
    content = message.get("content") or ""
    if "</think>" in content:
        thought, content = content.split("</think>")
        found.append(thought.replace("<think>", "").strip())
    found += [message["reasoning_content"]] if message.get("reasoning_content") else []
    found += [content.strip()] if content.strip() else []
    for one in message.get("tool_calls") or ():
        found += [one["function"]["name"], *map(str, one["function"]["arguments"].values())]
    return found


def forms(messages: Sequence[Message], tools: Any) -> Iterator[list[Message]]:
    """The forms in which servers hand these messages to a template."""
    thinks = any("reasoning_content" in m or "</think>" in (m.get("content") or "") for m in messages)
    calls = any(m.get("tool_calls") for m in messages)
    older = any(m["role"] == "developer" for m in messages)
    for thought, text, as_system, empty, parts in itertools.product(
        ("content", "reasoning_content", "reasoning", "thinking") if thinks else ("",),
        (False, True) if calls else (False,),
        (False, True) if older else (False,),
        ("", None) if calls else ("",),
        (False, True),
    ):
        yield [_form(message, thought, text, as_system, empty, parts) for message in messages]


def _form(message: Message, thought: str, text: bool, as_system: bool, empty: str | None, parts: bool) -> Message:
    made = {key: value for key, value in message.items() if key not in ("weight", "reasoning_content")}
    if made["role"] == "developer" and as_system:
        made["role"] = "system"
    content, said = made.get("content") or "", message.get("reasoning_content") or ""
    if "</think>" in content:
        said, content = (part.strip("\n") for part in content.replace("<think>", "").split("</think>"))
    if said and thought == "content":
        content = f"<think>\n{said}\n</think>\n\n{content}"
    elif said:
        made[thought] = said
    made["content"] = content or empty
    if parts and content:
        made["content"] = [{"type": "text", "text": content}]
    if text and made.get("tool_calls"):
        made["tool_calls"] = [
            {**one, "function": {**one["function"], "arguments": json.dumps(one["function"]["arguments"])}}
            for one in made["tool_calls"]
        ]
    return made


def _rendered(made: Any, messages: Sequence[Message], tools: Any, options: dict[str, Any], prompt: bool) -> str | None:
    try:
        text = made.apply_chat_template(  # in a batch of one, which may be empty
            [list(messages)], tools=tools, tokenize=False, add_generation_prompt=prompt, **options
        )[0]
    except Exception:  # whatever a template raises is its refusal
        return None
    # a Python value that was printed where text belongs was not meant: the other form is
    return None if "[{'type'" in text or '"{\\"' in text else text


def served(made: Any, messages: Sequence[Message], k: int, tools: Any, options: dict[str, Any]) -> Served:
    """What a server would ask for, and get, where message `k` is the answer."""
    wanted = facts(messages[k])
    before = [fact for m in messages[:k] if m["role"] != "assistant" for fact in [(m["content"] or "").strip()]]
    exact: list[tuple[str, str]] = []
    prompts: list[str] = []
    shown: set[str] = set()
    for form in forms(messages[: k + 1], tools):
        given, whole = _rendered(made, form[:k], tools, options, True), _rendered(made, form, tools, options, False)
        if not k and whole is not None and not (given and whole.startswith(given)):  # nothing was said before
            bos = made.bos_token if made("a")["input_ids"][:1] == [made.bos_token_id] else None
            empty = _rendered(made, [{"role": "system", "content": ""}], tools, options, True)
            begun = (bos and given and bos + given, empty)  # what a server may begin with in place of nothing
            given = next((one for one in begun if one and whole.startswith(one)), given or empty)
        if given is None or whole is None:
            continue
        if not all(fact in given or json.dumps(fact)[1:-1] in given for fact in before):
            continue
        if tools and "get_weather" not in given and any(m.get("tool_calls") for m in messages):
            continue
        shown |= {fact for fact in wanted if fact in whole[len(_same(given, whole)) :]}
        said = _ended(made, whole[len(given) :], messages[k]) if whole.startswith(given) else None
        if said is not None and all(fact in said for fact in wanted):
            exact.append((given, said))
        else:
            prompts.append(given)
    return Served(list(dict.fromkeys(exact)), list(dict.fromkeys(prompts)), frozenset(shown))


def _same(one: str, other: str) -> str:
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(map(len, (one, other))))
    ]


def _ended(made: Any, text: str, message: Message) -> str | None:
    """An answer up to the special token that ends it; None where none follows its last fact."""
    last = max((text.rfind(fact) + len(fact) for fact in facts(message) if fact in text), default=-1)
    if last < 0:
        return None
    stops = "|".join(map(re.escape, (*ENDS, *CALL_ENDS)))
    special = "|".join(map(re.escape, sorted(_special(made), key=len, reverse=True)))
    first = re.search(stops, text[last:])
    ends = [first] if first else list(re.finditer(special, text[last:]))[-1:]
    return text[: last + ends[0].end()] if ends else None


@functools.lru_cache(maxsize=8)
def _special(made: Any) -> tuple[str, ...]:
    return tuple(t.content for t in made.added_tokens_decoder.values() if t.special)


# ---------------------------------------------------------------------------------------------------------------------
# The judgement
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """`right`, `told` (right, and what is left out is reported), `refused`, `needless` (refused, although a server
    takes it), or `wrong`; and why."""

    kind: str
    why: str = ""


# What a recipe can say for rows that a published template has no place for: `data.template_adds`, and options.
OFF: dict[str, Any] = {"enable_thinking": False}
KEYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "enable_thinking: false": ((), OFF),
    "enable_thinking: true": ((), {"enable_thinking": True}),
    "thinking": (("thinking",), OFF),
    "tools": (("tools",), {}),
    "system": (("system",), {}),
    "tools, system": (("tools", "system"), {}),
    "tools, thinking": (("tools", "thinking"), OFF),
}


def judge_with_keys(kind: str, template: str, messages: list[Message], tools: Any = None) -> tuple[str, Verdict]:
    """The first of `KEYS` with which a conversation is trained right, held against the same oracle; "": none."""
    verdict = Verdict("refused")
    for key, (adds, options) in KEYS.items():
        verdict = judge(_with_adds(kind, template, adds), messages, tools, options)
        if verdict.kind not in ("refused", "needless"):
            return key, verdict
    return "", verdict


@functools.lru_cache(maxsize=len(KEYS))
def _with_adds(kind: str, template: str, adds: tuple[str, ...]) -> Any:
    from instructft.prompt.templates import with_adds

    return tokenizer(kind, with_adds(template, adds))


def spans(rows: Sequence[dict[str, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """(ids before it, ids that carry loss) of each stretch of loss."""
    found = []
    for row in rows:
        start = None
        for i, label in enumerate([*row["labels"], -100]):
            if label != -100 and start is None:
                start = i
            elif label == -100 and start is not None:
                found.append((row["input_ids"][:start], row["labels"][start:i]))
                start = None
    return found


def judge(made: Any, messages: list[Message], tools: Any = None, options: dict[str, Any] | None = None) -> Verdict:
    """Encode a conversation with the package, and hold what carries loss against the oracle."""
    from instructft.errors import InstructftError
    from instructft.prompt.layouts.messages import conversation_of
    from instructft.prompt.loss_mask import encoder

    options = options or {}
    asked = next(i for i, m in enumerate(messages) if m["role"] == "user")
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
    oracle = {k: served(made, messages, k, tools, options) for k in wanted}
    must = [k for k in wanted if k > asked]
    can = all(oracle[k].exact for k in must)
    try:
        found = encoder(made).encode([conversation_of(messages, tools=tools, options=options)])
    except InstructftError as error:
        return Verdict("needless" if can else "refused", str(error).splitlines()[0])
    rows, left_out = found.lists(), {what for _, what in found.left_out}
    trained = spans(rows)
    problems = []
    for k in wanted:
        right = [span for span in trained if _fits(made, span, oracle[k], messages, k, left_out)]
        if len(right) > 1:
            problems.append(f"answer {k + 1} carries loss {len(right)} times")
        elif right:
            trained.remove(right[0])
        elif k in must:
            problems.append(f"answer {k + 1} is not trained as served")
    problems += [f"loss on {made.decode(ids)!r} behind …{made.decode(head[-12:])!r}" for head, ids in trained]
    if problems:
        return Verdict("wrong", "; ".join(problems))
    return Verdict("told", ", ".join(sorted(left_out))) if left_out else Verdict("right")


def _fits(made: Any, span: Any, oracle: Served, messages: Sequence[Message], k: int, left_out: set[str]) -> bool:
    head, ids = span
    said = _text(made, ids)
    for given, text in oracle.exact:
        # the ids of a prompt are those that a server sends; behind them the same text, whatever merges at the border
        if head == _ids(made, given) and _text(made, head + ids) == _text(made, _ids(made, given + text)):
            return True
    if oracle.exact:
        return False
    # no form continues the prompt: the answer says all that it says, and nothing but markup besides
    missing = [fact for fact in facts(messages[k]) if fact not in said]
    if any(fact in oracle.shown for fact in missing) or (missing and not left_out):
        return False
    others = [
        f for i, m in enumerate(messages) if i != k for f in (facts(m) if m["role"] == "assistant" else [m["content"]])
    ]
    if any(len(fact) > 3 and fact in said and not any(fact in own for own in facts(messages[k])) for fact in others):
        return False
    ends = made.convert_ids_to_tokens(ids[-1]) in _special(made)
    return ends and any(head == _ids(made, given) for given in oracle.prompts)


def _text(made: Any, ids: Sequence[int]) -> str:
    return made.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@functools.lru_cache(maxsize=4096)
def _cached_ids(made: Any, text: str) -> tuple[int, ...]:
    return tuple(made(text, add_special_tokens=False)["input_ids"])


def _ids(made: Any, text: str) -> list[int]:
    return list(_cached_ids(made, text))
