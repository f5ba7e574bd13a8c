"""Errors that are for the person at the keyboard, and the exit code of each.

::

    InstructftError           exit 1   the run failed
    ├── UsageError            exit 2   recipe, data or usage is wrong, said before any weight is loaded
    │   ├── RecipeError                every problem of a recipe at once
    │   ├── DataError                  a file or a row that cannot be used
    │   └── TemplateError              a chat template under which no honest mask exists
    └── ModelError            exit 1   weights that cannot be loaded or used

Every message says what was found, what was expected and what to do next.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGTERM = 143  # stopped by SIGTERM (128 + 15)


class InstructftError(Exception):
    """Base of every error raised on purpose; the command line prints its text without a traceback."""

    exit_code = EXIT_FAILED


class UsageError(InstructftError):
    """What was typed, a recipe or a data file is wrong. Exit code 2."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe with problems, all of them.

    Args:
        file: the recipe's path or name.
        problems: one line each, `line 3: data.max_length: found "long", expected a whole number of tokens`.
    """

    def __init__(self, file: str, problems: list[str]):
        self.file = file
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


class DataError(UsageError):
    """A data file or row that cannot be used; names the file, and the line where there is one."""


class TemplateError(UsageError):
    """A chat template that fails to render, or under which no honest loss mask exists."""


class ModelError(InstructftError):
    """Weights or a tokenizer that cannot be loaded, or that do not fit each other."""
