"""`instructft verify`: what a running server reads and answers, beside what was trained, and why where it differs.

conversations ─► prompt ids of the server  ══  prompt ids of training        no weights are loaded for this
              ─► greedy answers of the server  ══  ours, token by token      near ties are told from differences
              ─► why each answer ended  ══  ours
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UsageError
from instructft.evaluation.compare import check_json, write_json
from instructft.extras.serving.asked import Asked, choose
from instructft.extras.serving.causes import (
    OTHER_EOS,
    QUANTIZED,
    STOP_REMOVED,
    UNKNOWN,
    Cause,
    Place,
    around,
    first_difference,
    of_answer,
    of_prompt,
    served_by_base,
)
from instructft.extras.serving.client import RefusedError
from instructft.extras.serving.servers import Served, Server
from instructft.formatting import short
from instructft.inference.continuous_batching import Row
from instructft.inference.generator import Generator
from instructft.inference.reference_model import START, ReferenceModel, check_base, recipe_of
from instructft.models.load_for_inference import load_for_inference, load_tokenizer_of, locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 50  # conversations
MAX_NEW_TOKENS = 32  # of an answer
NEAR = 0.1  # nats between the two tokens, up to which other arithmetic may choose the other one
SHOWN = 5  # differences of a kind that are printed
_BROKEN = re.compile("\ufffd+")  # bytes of no character, of which decoders make one sign or several


@dataclass
class Difference:
    """One conversation that a server reads or answers otherwise.

    Args:
        what: `prompt`, `answer`, `stop` or `count`.
        gap: nats between our token and the server's, as our model sees them; None where there are not two.
        near_tie: so small that another order of sums decides.
    """

    row: int
    kind: str
    what: str
    cause: str
    what_to_do: str
    ours: str
    theirs: str
    position: int | None = None
    gap: float | None = None
    near_tie: bool = False


@dataclass
class Found:
    """All that was found.

    Args:
        told: whether the server told the ids of its prompts.
        answered: conversations whose answers were compared.
        tokens: of answers, on our side.
    """

    server: str
    asked: int = 0
    told: bool = True
    equal_prompts: int = 0
    answered: int = 0
    equal_answers: int = 0
    equal_stops: int = 0
    tokens: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: all equal, near ties apart; 1: a difference; 2: none seen by a server that cannot tell its tokens."""
        if any(not one.near_tie for one in self.differences):
            return EXIT_FAILED
        return EXIT_DONE if self.told else EXIT_USAGE


def verify(
    model: str,
    server: Server,
    rows: int = ROWS,
    answers: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    json_file: Path | None = None,
) -> Found:
    """Compare a server with the model that it should serve; print what was found, write `json_file`.

    Args:
        rows: conversations whose prompts are compared.
        answers: how many of them are also answered; None: half.
        max_new_tokens: of an answer.

    Example::

        verify("merged", reach(Client("http://127.0.0.1:8080"))).exit_code
        # 0

    Raises:
        UsageError: no such model, or a server that does not answer.
    """
    from rich.console import Console

    locate(model)
    check_json(json_file)
    if rows < 1:
        raise UsageError(f"--rows: found {rows}, expected 1 or more")
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    tokenizer = load_tokenizer_of(model)
    from instructft.prompt.loss_mask import encoder

    asked, said = choose(recipe_of(model), encoder(tokenizer), rows, _context(model))
    if not asked:
        raise UsageError(f"the chat template of {model} takes no conversation that its context has room for")
    say(f"asked    {len(asked)} conversations: {said}")
    found = Found(f"{server.kind} {server.version}".strip(), len(asked), server.tells_ids)
    equal = _compare_prompts(server, asked, tokenizer, found)
    if found.told:
        say(f"prompts  {found.equal_prompts} of {found.asked} equal, id by id")
    else:
        say(f"prompts  {server.kind} does not tell the ids of a prompt: their number is compared below, no more")
    _say_differences(say, [one for one in found.differences if one.what == "prompt"])
    wanted = (len(asked) + 1) // 2 if answers is None else answers
    if chosen := _some(equal, wanted):
        _compare_answers(model, server, [asked[i] for i in chosen], chosen, max_new_tokens, found)
        near = sum(one.near_tie for one in found.differences)
        say(
            f"answers  {found.equal_answers} of {found.answered} equal, greedy, {max_new_tokens} tokens at most"
            + (f"; {near} more part at a near tie" if near else "")
        )
        say(f"stops    {found.equal_stops} of {found.equal_answers} equal answers end for the same reason")
        _say_differences(say, [one for one in found.differences if one.what != "prompt"])
    elif wanted:
        say("answers  none compared: no prompt was equal")
    write_json(json_file, {**asdict(found), "exit_code": found.exit_code})
    say(_verdict(found, server))
    return found


def _some(places: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly over all: the kinds of conversations follow one another.

    >>> _some([1, 2, 3, 4, 5, 6], 3)
    [1, 3, 5]
    """
    count = min(most, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def _context(model: str) -> int:
    """Tokens that the model takes, by its configuration; no weights are loaded."""
    from instructft.inference.generator import UNLIMITED
    from instructft.models.load_for_inference import context_of

    return context_of(model) or UNLIMITED


def _verdict(found: Found, server: Server) -> str:
    real = [one for one in found.differences if not one.near_tie]
    if real:
        causes = list(dict.fromkeys(one.cause for one in real))
        return f"\nNot served as trained: {', '.join(causes)}."
    if not found.told:
        return (
            f"\nNo difference seen, and not proved: {server.kind} cannot tell its prompt ids. Compared were the number "
            f"of prompt tokens, {found.answered} answers as text and why they ended."
        )
    return "\nServed as trained."


# --------------------------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------------------------


def _compare_prompts(
    server: Server, asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase, found: Found
) -> list[int]:
    """The places of the conversations whose prompts are equal, or not known to differ."""
    equal = []
    for i, one in enumerate(asked):
        if not found.told:
            equal.append(i)
            continue
        try:
            theirs, _ = server.prompt_ids(one.conversation)
        except RefusedError as refused:
            if refused.status in (404, 405, 501):  # a version or a gateway without that path
                found.told = False
                equal.append(i)
                continue
            found.differences.append(_refused(i, one, "prompt", tokenizer, refused))
            continue
        except (KeyError, TypeError):
            found.told = False
            equal.append(i)
            continue
        place = first_difference(one.ids, theirs)
        if place is None:
            equal.append(i)
            found.equal_prompts += 1
            continue
        cause = of_prompt(one.ids, theirs, one.conversation, tokenizer, server.template if _jinja(server) else None)
        ours, other = (around(ids, place.position, tokenizer) for ids in (one.ids, theirs))
        found.differences.append(_of(i, one, "prompt", cause, ours, other, place.position))
    return equal


def _refused(row: int, one: Asked, what: str, tokenizer: PreTrainedTokenizerBase, refused: RefusedError) -> Difference:
    """A conversation that the server does not take; where it takes none now, that is no finding but an error."""
    if not refused.of_this_request:
        raise refused
    cause = Cause("refused", "the server, or its template, does not take this conversation")
    return _of(row, one, what, cause, around(one.ids, 0, tokenizer), str(refused))


def _jinja(server: Server) -> bool:
    """Whether the template that a server tells is in the language of ours."""
    return server.template is not None and server.tells_ids


def _of(
    row: int, one: Asked, what: str, cause: Cause, ours: str, theirs: str, position: int | None = None
) -> Difference:
    return Difference(row + 1, one.kind, what, cause.name, cause.what_to_do, ours, theirs, position)


# --------------------------------------------------------------------------------------------------------------------
# Answers
# --------------------------------------------------------------------------------------------------------------------


def _compare_answers(
    model: str, server: Server, asked: Sequence[Asked], numbers: Sequence[int], most: int, found: Found
) -> None:
    generator = Generator(*load_for_inference(model))
    rows = [Row(i, one.ids, min(most, generator.context - len(one.ids))) for i, one in enumerate(asked)]
    generator.complete(rows)
    differing: list[tuple[int, Served, list[int], Difference]] = []
    for row, one, number in zip(rows, asked, numbers, strict=True):
        try:
            served = server.answer(one.conversation, row.limit)
        except RefusedError as refused:
            if refused.status in (404, 405, 501):  # a server without that path
                raise
            found.differences.append(_refused(number, one, "answer", generator.tokenizer, refused))
            continue
        found.answered += 1
        found.tokens += len(row.made)
        if served.prompt_tokens not in (None, len(one.ids)):
            found.differences.append(_miscounted(number, one, served))
        ours, theirs = _both(generator, row.made, served)
        place = first_difference(ours, theirs)
        if place is None:
            found.equal_answers += 1
            finish = "stop" if row.made and row.made[-1] in generator.stop_ids else "length"
            calls = served.finish in ("tool_calls", "eos_token", "stop_sequence")
            if finish == served.finish or (finish == "stop" and calls):
                found.equal_stops += 1
            else:
                cause = STOP_REMOVED if served.finish == "length" else OTHER_EOS
                found.differences.append(_of(number, one, "stop", cause, finish, served.finish))
            continue
        difference = _answered_otherwise(generator, one, number, row, ours, theirs, place, served, server.weights)
        found.differences.append(difference)
        if not difference.near_tie and difference.cause in (UNKNOWN, QUANTIZED):
            differing.append((row.index, served, theirs, difference))
    _blame_base(model, generator, asked, differing, most)


def _both(generator: Generator, made: list[int], served: Served) -> tuple[list[int], list[int]]:
    """The ids of both answers without what ended them; of texts, where a server tells no ids."""
    stops = generator.stop_ids
    ours = made[:-1] if made and made[-1] in stops else made
    if served.ids is not None:
        ended = served.ids and served.ids[-1] in stops and served.finish != "length"
        told = served.ids[:-1] if ended else served.ids
        if "\ufffd" not in generator.tokenizer.decode(told):  # llama.cpp tells not all tokens of one character
            return ours, told
    text = generator.tokenizer.decode(ours, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    texts = [_BROKEN.sub("\ufffd", one).rstrip("\ufffd").strip() for one in (text, served.text)]
    first, second = generator.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return first, second


def _miscounted(number: int, one: Asked, served: Served) -> Difference:
    more = (served.prompt_tokens or 0) - len(one.ids)
    doubled = "one more than in training, as a doubled BOS is" if more == 1 else f"{more:+} beside training"
    cause = Cause("prompt of another length", f"{doubled}: another template, or special tokens that are added")
    return _of(number, one, "count", cause, f"{len(one.ids)} tokens", f"{served.prompt_tokens} tokens")


def _answered_otherwise(
    generator: Generator,
    one: Asked,
    number: int,
    row: Row,
    ours: list[int],
    theirs: list[int],
    place: Place,
    served: Served,
    weights: str,
) -> Difference:
    stops = generator.stop_ids
    ended = bool(row.made) and row.made[-1] in stops
    told = of_answer(theirs, place, stops, ended, served.finish, weights)
    cause = told or Cause(UNKNOWN, "the same prompt, and other weights or other arithmetic")
    shown, other = (around(ids, place.position, generator.tokenizer) for ids in (ours, theirs))
    difference = _of(number, one, "answer", cause, shown, other, place.position)
    if cause == STOP_REMOVED and place.position < len(theirs) and theirs[place.position] in stops:
        return difference
    chosen = [token if token is not None else stops[0] for token in (place.ours, place.theirs)]
    difference.gap = _gap(generator, one.ids + ours[: place.position], *chosen)
    if difference.gap is not None and difference.gap <= NEAR:
        difference.near_tie = True
        difference.cause = "near tie"
        difference.what_to_do = ""
    return difference


def _gap(generator: Generator, ids: list[int], ours: int, theirs: int) -> float | None:
    """Nats by which our model prefers its own next token to another one; None for one that it does not have."""
    import torch

    with generator.evaluating():
        inputs = torch.tensor([ids], device=generator.model.device)
        logits = generator.model(input_ids=inputs, use_cache=False).logits[0, -1].double()
    return float(logits[ours] - logits[theirs]) if 0 <= theirs < len(logits) else None


def _blame_base(
    model: str,
    generator: Generator,
    asked: Sequence[Asked],
    differing: Sequence[tuple[int, Served, list[int], Difference]],
    most: int,
) -> None:
    """Where the server's answers are those of what the run began from, say so: what was trained has no effect there."""
    if not differing:
        return
    try:
        check_base(model, START)
        with ReferenceModel.of(model, START, generator).answering() as base:
            rows = [Row(i, asked[place].ids, most) for i, (place, *_) in enumerate(differing)]
            base.complete(rows)
            given = [_both(base, row.made, served)[0] for row, (_, served, *_) in zip(rows, differing, strict=True)]
    except Exception:  # where it cannot be had, nothing is said of it
        return
    places = [difference.position or 0 for *_, difference in differing]
    if served_by_base([theirs for *_, theirs, _ in differing], given, places):
        for *_, difference in differing:
            difference.cause = "adapter without effect"
            difference.what_to_do = (
                "these are the answers of the model that the run began from; serve the merged model, or name the "
                "adapter in the request (vLLM: --lora-modules)"
            )


# --------------------------------------------------------------------------------------------------------------------
# What is printed
# --------------------------------------------------------------------------------------------------------------------


def _say_differences(say: Any, differences: Sequence[Difference]) -> None:
    for cause in dict.fromkeys(one.cause for one in differences):
        some = [one for one in differences if one.cause == cause]
        what_to_do = f": {some[0].what_to_do}" if some[0].what_to_do else ""
        say(f"  {cause} ({len(some)}){what_to_do}")
        for one in some[:SHOWN]:
            where = "" if one.position is None else f", token {one.position + 1}"
            gap = "" if one.gap is None else f", {one.gap:.3f} nats apart"
            say(f"    row {one.row} ({one.kind}), {one.what}{where}{gap}")
            say(f"      trained  {short(one.ours, 200)}")
            say(f"      server   {short(one.theirs, 200)}")
        if len(some) > SHOWN:
            say(f"    and {len(some) - SHOWN} more")
