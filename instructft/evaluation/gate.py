"""`instructft gate`: the task up, the rest not down, as one verdict with an exit code.

The task is judged on the run's held-out rows (`instructft.evaluation.verdict.judge_task`), the rest on suites of short
questions whose answers rules judge (`instructft.evaluation.suites`). Both models answer both, each rest question as a
server would ask them: by their own chat template. Where these cannot tell, further ones are asked, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructft.checkpoints.as_saved import sums
from instructft.errors import TemplateError, UsageError
from instructft.evaluation.compare import (
    ask_both,
    check_json,
    check_models,
    plain_table,
    rows_of,
    train_on_of,
    write_json,
)
from instructft.evaluation.metrics import answers_to, evaluate
from instructft.evaluation.suites import Question, further, read_suites, shipped
from instructft.evaluation.verdict import MARGIN, NOT_DOWN, PASSED, TOO_FEW, UP, judge_rest, judge_task, verdict
from instructft.formatting import clock, short
from instructft.inference.generator import Generator
from instructft.inference.reference_model import START, own_tokenizer, recipe_of
from instructft.prompt.token_view import visible
from instructft.redaction import last_name
from instructft.report.card_results import GATE
from instructft.report.gate_section import tables
from instructft.report.judged import show_gate

ROWS = 200  # held-out rows of the task that are answered, unless `limit` says otherwise
ANSWER_TOKENS = 128  # of an answer to a held-out row, at most
DRAWS, TEMPERATURE, SEED = 3, 0.7, 0  # answers that must all be right where only what a model knew counts
SHOWN = 6  # questions that were right before and are not now
Tasks = Callable[[Generator], Mapping[str, Mapping[str, float]]]  # task -> question -> score, of other tools


def gate(
    model: str,
    against: str = START,
    suites: Sequence[str] = (),
    margin: float = MARGIN,
    data: str | None = None,
    limit: int | None = None,
    json_file: Path | None = None,
    other_tasks: Callable[[Sequence[str]], Tasks] | None = None,
) -> str:
    """Judge a model against what it began from, or another one; print tables and the verdict, and return it.

    In a run folder `gate.json` is written, and the verdict stands on its card and its report.

    Args:
        suites: names of suites that ship, `.jsonl` files, or tasks that `other_tasks` knows; none: all that ship.
        margin: what may be lost of all questions beside the task, as a share.
        data: rows of the task, a file or a recipe; None: what the run held out.
        limit: held-out rows at most.

    Returns:
        `passed`, `not passed` or `too few`.

    Example::

        gate("runs/support", suites=["facts", "ours.jsonl"], margin=0.03)
        # …
        # 'passed'

    Raises:
        UsageError: no such model, suite or task, or nothing to judge the task by; before weights are loaded.
    """
    from time import monotonic

    from rich.console import Console

    if not 0 < margin < 1:
        raise UsageError(f"--margin: found {margin:g}, expected a share above 0 and below 1, such as 0.05")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: found {limit}, expected 1 or more rows")
    check_models(model, against, option="--against")
    check_json(json_file)
    questions, names = read_suites(suites)
    if names and other_tasks is None:
        raise UsageError(f"--suite: there is no suite {names[0]}; there are {', '.join(shipped())}")
    others = other_tasks(names) if names and other_tasks else None
    recipe = recipe_of(model)
    rows, described, made_from = rows_of(recipe, data, None, limit or ROWS)
    train_on = train_on_of(recipe or made_from)
    console = Console(highlight=False)
    asked = f"{len(rows)} held-out rows and {len(questions)} questions" + (f" and {', '.join(names)}" if names else "")
    console.print(f"gate: {asked}, answered by both models …", markup=False)
    start = monotonic()
    vocabularies: list[dict[str, int]] = []  # of the models as they are asked, in turn

    def ask(generator: Generator) -> dict[str, Any]:
        first = not vocabularies
        vocabularies.append(generator.tokenizer.get_vocab())
        task = evaluate(generator, rows, train_on=train_on, max_new_tokens=ANSWER_TOKENS)["rows"]
        served = generator if first else _as_served(generator, model, against)
        answers = {"task": task, "answers": _answers(served, questions)}
        answers["others"] = others(served) if others else {}
        return answers if first else {**answers, "unknown": _unknown(served, questions)}

    both = ask_both(model, against, ask)
    after, before = both["tuned"], both["base"]
    unknown = before["unknown"]
    answered = [_row(q, after["answers"][q.id], before["answers"][q.id], q.id not in unknown) for q in questions]
    more = further(suites)
    rest = judge_rest(_scores(answered, after["others"], before["others"]), margin, first_look=bool(more))
    task = judge_task(after["task"], before["task"], vocabularies[0] == vocabularies[1])
    if more and rest["state"] == TOO_FEW and task["state"] == UP:  # else the verdict stands
        console.print(f"gate: {rest['questions']} questions cannot tell; {len(more):,} further ones are asked …")
        answered += _asked_again(model, against, more)
        rest = judge_rest(_scores(answered, after["others"], before["others"]), margin)
    said, reasons = verdict(task, rest)
    folder = Path(model).expanduser()
    found = {
        "passed": said == PASSED,
        "verdict": said,
        "reasons": reasons,
        "model": last_name(model),
        "against": against if against == START else last_name(against),
        "task": {"data": described, **task},
        "rest": rest,
        "not_known": len(unknown),
        "seconds": round(monotonic() - start, 1),
        "files": sums(folder),
        "rows": answered,
    }
    write_json(json_file, found)
    if (folder / "run.json").is_file():
        write_json(folder / GATE, found)
        show_gate(folder)
    _print(console, found)
    return said


# --------------------------------------------------------------------------------------------------------------------
# Questions and answers
# --------------------------------------------------------------------------------------------------------------------


def _as_served(reference: Generator, model: str, against: str) -> Generator:
    """The other model with its own template: asked by another one's it would know less than it does."""
    tokenizer = own_tokenizer(model, against)
    try:
        return Generator(reference.model, tokenizer) if tokenizer is not None else reference
    except TemplateError:  # which never ends an answer, say
        return reference


def _asked_again(model: str, against: str, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Both models' answers to further questions; the models are loaded once more, for they do not fit side by side."""
    turns: list[Generator] = []

    def ask(generator: Generator) -> dict[str, str]:
        turns.append(generator)
        return _answers(generator if len(turns) == 1 else _as_served(generator, model, against), questions)

    both = ask_both(model, against, ask)
    return [_row(q, both["tuned"][q.id], both["base"][q.id], True) for q in questions]


def _answers(generator: Generator, questions: Sequence[Question], temperature: float = 0.0) -> dict[str, str]:
    """The answer to each question, by its id; those of one limit of tokens share batches."""
    found: dict[str, str] = {}
    for tokens in sorted({question.max_new_tokens for question in questions}):
        some = [question for question in questions if question.max_new_tokens == tokens]
        answers = answers_to(generator, [q.messages for q in some], tokens, temperature=temperature)
        found |= {question.id: answer.text for question, answer in zip(some, answers, strict=True)}
    return found


def _unknown(generator: Generator, questions: Sequence[Question]) -> set[str]:
    """Of the questions that count only where the model knew the answer, the ids of those that it did not know.

    It knew what all of `DRAWS` answers that it draws have right. Its greedy answer, which is compared later, is not
    asked: what chance has picked once would count against the other model.
    """
    import torch

    left = [question for question in questions if question.known]
    unknown: set[str] = set()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for _ in range(DRAWS):
            answers = _answers(generator, left, TEMPERATURE)
            unknown |= {question.id for question in left if not question.right(answers[question.id])}
            left = [question for question in left if question.id not in unknown]
            if not left:
                break
    return unknown


def _row(question: Question, after: str, before: str, counts: bool) -> dict[str, Any]:
    return {
        "id": question.id,
        "suite": question.suite,
        "prompt": str(question.messages[-1]["content"]),
        "before": before,
        "after": after,
        "right": [question.right(before), question.right(after)],
        "counts": counts,
    }


def _scores(
    rows: Sequence[Mapping[str, Any]],
    after: Mapping[str, Mapping[str, float]],
    before: Mapping[str, Mapping[str, float]],
) -> dict[str, tuple[list[float], list[float]]]:
    """Suite or task -> the scores after and before, of the questions that count and that both were asked."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        ours, theirs = found.setdefault(row["suite"], ([], []))
        if row["counts"]:
            theirs.append(float(row["right"][0]))
            ours.append(float(row["right"][1]))
    for task in after:
        both = sorted(after[task].keys() & before[task].keys())
        found[task] = [after[task][one] for one in both], [before[task][one] for one in both]
    return found


# --------------------------------------------------------------------------------------------------------------------
# In the terminal
# --------------------------------------------------------------------------------------------------------------------


def _print(console: Any, found: Mapping[str, Any]) -> None:
    rest = found["rest"]
    console.print(f"\nthe task: {found['task']['data']}, against {found['against']}", markup=False)
    for head, rows in tables(found):
        table = plain_table(*head)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    if found["not_known"]:
        console.print(f"{found['not_known']} questions do not count: the model before training does not know them.")
    if rest["state"] == NOT_DOWN and rest["before"] <= rest["margin"]:
        console.print(
            f"The model before training has {rest['before']:.1%} of these right, no more than the margin: there is "
            "nothing here that could be lost. Questions that it can answer: --suite FILE"
        )
    lost = [row for row in found["rows"] if row["counts"] and row["right"] == [True, False]]
    for row in lost[:: max(1, len(lost) // SHOWN)][:SHOWN]:
        for word, text in (("lost: ", row["prompt"]), ("  before", row["before"]), ("  after ", row["after"])):
            console.print(f"{word} {visible(short(text, 100)) or '(nothing)'}", markup=False)
    console.print(f"\n{found['verdict'].upper()} in {clock(found['seconds'])}", style="bold", markup=False)
    for reason in found["reasons"]:
        console.print(f"- {reason}", markup=False)
