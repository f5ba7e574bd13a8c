"""The account of one row: what it says that nothing here reads, and what is known not to matter.

A value is used, known not to matter (`HARMLESS`, or the recipe's `data.ignore`), or written down here and refused
before a step is taken: a column that is thrown away without a word is how a model learns the rejected answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from instructft.errors import DataError

# Columns and keys about a row, not of it: none of them says what a model should read or write.
_HARMLESS = """
id ids idx index uid uuid guid key row __index_level_0__ hash md5 sha1 sha256 checksum fingerprint signature
source sources src origin dataset dataset_name datasource subset config split fold shard part position number
category categories task tasks task_type task_name type types kind domain domains topic topics subtopic subject
subjects tag tags keyword keywords difficulty level grade quality complexity field area genre style intent intents
score scores rating ratings reward rewards votes upvotes downvotes rank perplexity ppl similarity confidence
instruct_reward min_neighbor_distance input_quality quality_explanation used_in_training title
language lang languages langdetect locale country region
model models model_name models_used generator generated_by engine teacher provider backend gen_input_configs
temperature top_p top_k max_tokens max_completion_tokens seed stream n store service_tier parallel_tool_calls
finish_reason stop_reason usage cost latency duration logprobs system_fingerprint object choices_count
timestamp timestamps time date datetime created created_at created_time updated updated_at modified year version
author authors annotator annotators annotations worker username user_name avatarurl views
license licence copyright url urls uri link links website homepage file filename file_name path filepath
repo repository revision commit metadata meta extra extra_info additional_info
turn num_turns turn_identifier length len word_count char_count
toxicity toxic moderation detoxify redacted pii nsfw flagged safe safety llama_guard_2 llama_guard_3 hashed_ip
deleted review_count review_result tree_state synthetic lang_score emojis
subcategory subcategories cluster embedding embeddings cache_control skip_prompt_formatting
"""
HARMLESS = frozenset(_HARMLESS.split())
_ABOUT = re.compile(
    r"(?:^|_)(?:ids?|uuid|hash|fingerprint|url|count|length|tokens|index|scores?|timestamp|date|language|language_code"
    r"|model|generator|version|license|category|type|moderation|configs?)$|^(?:num|n|original)_|^unnamed:"
)
# Harmless beside another field that tells whose rows these are, and more than that elsewhere.
_BESIDE = {
    "gen_input_configs": ("knowledge",),  # Magpie
    "hashed_ip": ("state", "header"),  # WildChat, a row and a message
}
# A field of these names may hold a text that matters, or just say whether there is one.
_SWITCHED = frozenset(("reasoning", "thinking", "custom_instruction"))
_SWITCHES = frozenset(["on", "off", "yes", "no", "true", "false", "none", "low", "medium", "high"])

# Why a column is refused, where more can be said than that nothing reads it.
_PREFERENCES = (
    "rows that compare answers (DPO, KTO, reward models) are not trained as they stand: keep the good answers as "
    "conversations and leave this out"
)
_MEDIA = "images, sound and video are not read; a model would be trained as if they were not there"
_TOKENS = "tokens that were made elsewhere are not read; give the text"
_NAMES_OF = {
    _PREFERENCES: "chosen rejected label labels winner loser preferred preference chosen_response "
    "rejected_response preferred_output non_preferred_output",
    _MEDIA: "image images audio audios video videos image_url pixel_values input_audio",
    _TOKENS: "input_ids attention_mask token_ids",
}
_WHY = {name: why for why, names in _NAMES_OF.items() for name in names.split()}


class Unusable(Exception):
    """A row that cannot be trained on: a verdict, caught and counted in `run.json` under `reason`.

    Args:
        reason: a key of the account, such as `empty_answer`.
        detail: what was found there and what was expected.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason.replace('_', ' ')}{detail and ': '}{detail}")
        self.reason, self.detail = reason, detail


class Finding(NamedTuple):
    """Something of a row that nothing reads."""

    what: str  # the column, key or role, such as "column `label`"
    value: str  # as it stands in the row, shortened
    why: str  # what it means, or what was expected


class Unread(DataError):
    """A row with something in it that nothing reads, and that could change what is trained."""

    def __init__(self, found: Iterable[Finding]):
        self.found = list(found)
        super().__init__("\n".join(f"{f.what} ({f.value}): {f.why}" for f in self.found))


class Ledger:
    """What has been found in one row and is read by nothing.

    >>> ledger = Ledger(ignore=frozenset({"mood"}))
    >>> ledger.rest({"id": 7, "mood": "good", "label": False}, known={"messages"}, place="column `{}`")
    >>> [(finding.what, finding.value) for finding in ledger.found]
    [('column `label`', 'false')]
    """

    def __init__(self, ignore: frozenset[str] = frozenset(), strip: bool = False):
        self.ignore, self.strip = ignore, strip
        self.found: list[Finding] = []

    def unread(self, what: str, value: Any, why: str) -> None:
        self.found.append(Finding(what, shown(value), why))

    def rest(self, fields: Any, known: Iterable[str], place: str, role: str = "") -> None:
        """Write down all fields of a mapping that are not `known`, empty or harmless.

        Args:
            place: how a field is called in messages; `{}` is its name.
            role: whose message it is; `data.ignore` may name the key of one role: `user.train`.
        """
        beside: list[str] | None = None
        for name, value in fields.items():
            if name in known or absent(value) or self.ignores(name, role):
                continue
            lower = str(name).lower()
            why = refused(lower)
            if not why and (lower in HARMLESS or _ABOUT.search(lower) or (lower in _SWITCHED and is_switch(value))):
                continue
            if beside is None:
                beside = [fine for other, names in _BESIDE.items() if other in fields for fine in names]
            if lower not in beside:
                self.unread(place.format(name), value, why or "nothing reads it")

    def ignores(self, name: Any, role: str = "") -> bool:
        return bool(self.ignore) and (name in self.ignore or f"{role}.{name}" in self.ignore)

    def close(self) -> None:
        """Raise `Unread` where something was found."""
        if self.found:
            raise Unread(self.found)

    def text(self, value: Any, where: str) -> str:
        """A value as the text that a model reads: "" where there is none, numbers and objects as compact JSON.

        >>> [Ledger().text(value, "answer") for value in (None, " a ", 20, True, {"a": [1]})]
        ['', ' a ', '20', 'true', '{"a":[1]}']

        Raises:
            Unusable: half a surrogate pair, or bytes.
        """
        if isinstance(value, str):
            text = value
        elif value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        elif isinstance(value, bytes | bytearray):
            raise Unusable("not_text", f"{where} holds bytes, expected text")
        else:
            text = compact(value)
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can spell it, as of a cut emoji, and no tokenizer takes it
                half = f"U+{ord(text[error.start]):04X}"
                raise Unusable("not_text", f"{where} holds half a character ({half}), expected whole ones") from None
        return text.strip() if self.strip else text


def refused(name: str) -> str:
    """Why a field of this name is refused wherever it stands; "": it is not.

    >>> refused("images")
    'images, sound and video are not read; a model would be trained as if they were not there'
    """
    return _WHY.get(name.lower(), "")


def is_switch(value: Any) -> bool:
    """Whether a value says that something is so, or how much, and is no text to be read: Nemotron's `reasoning`.

    >>> is_switch("off"), is_switch(True), is_switch("Off we go: 2 + 2 is 4.")
    (True, True, False)
    """
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCHES)


def absent(value: Any) -> bool:
    """Whether a value says nothing: null and NaN alike, an empty text, list or object."""
    if isinstance(value, str):
        return not value or value.isspace()
    if value is None or value == [] or value == {}:
        return True
    return isinstance(value, float) and math.isnan(value)


def compact(value: Any) -> str:
    """A value as JSON without spaces; dates and their like as they print.

    >>> compact({"city": "Tromsø", "days": [1, 2]})
    '{"city":"Tromsø","days":[1,2]}'
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def shown(value: Any, width: int = 60) -> str:
    """A value for a message, in one short line."""
    text = compact(value)
    return text if len(text) <= width else f"{text[:width]}…"
