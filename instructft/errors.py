"""Errors that are for the person at the keyboard, and the exit code of each.

::

    InstructftError           exit 1   the run failed
    ├── UsageError            exit 2   recipe, data or usage is wrong, said before any weight is loaded
    │   ├── RecipeError                every problem of a recipe at once
    │   ├── DataError                  a file or a row that cannot be used
    │   ├── TemplateError              a chat template under which no honest mask exists
    │   └── ResumeError                a run that cannot be resumed: no checkpoint verifies, or a fixed key has changed
    ├── Stopped               143, 130, 129, 138: stopped by SIGTERM, SIGINT, SIGHUP or SIGUSR1, with a checkpoint
    ├── NotFiniteError        exit 1   a loss or gradient that is not a number; the step was not taken
    ├── DivergedError         exit 1   a loss that has risen above that of a guess; checkpoints before it are kept
    ├── OutOfMemoryError      exit 1   memory that ran out in training: what held it, and which keys would help
    ├── CheckpointError       exit 1   a checkpoint that cannot be written, or is not what was written
    ├── HubError              exit 1   the Hub cannot be reached or refuses, or something must not leave this machine
    └── ModelError            exit 1   weights that cannot be loaded or used
        ├── ModelFileError    exit 2   a file of a model or tokenizer that cannot be read
        └── AdapterError      exit 2   an adapter folder that is broken or does not fit its base, said before any weight

Every message says what was found, what was expected and what to do next.
"""

from __future__ import annotations

MOST_PROBLEMS = 20  # of one recipe that are shown
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SIGHUP = 129  # stopped because its terminal is gone (128 + 1)
EXIT_SIGUSR1 = 138  # stopped by a scheduler ahead of the time limit (128 + 10)
EXIT_SIGTERM = 143  # stopped by SIGTERM (128 + 15)
EXIT_SIGINT = 130  # stopped by Ctrl-C (128 + 2)


def is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a library in Rust (tokenizers, safetensors), which is no `Exception`."""
    return type(error).__name__ == "PanicException"


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
        more = [f"and {len(problems) - MOST_PROBLEMS:,} more"] if len(problems) > MOST_PROBLEMS else []
        shown = [*problems[:MOST_PROBLEMS], *more]
        super().__init__(f"{file}: {count}\n" + "\n".join(f"  {problem}" for problem in shown))


class DataError(UsageError):
    """A data file or row that cannot be used; names the file, and the line where there is one."""


class TemplateError(UsageError):
    """A chat template that fails to render, or under which no honest loss mask exists."""


class ResumeError(UsageError):
    """A run that cannot be resumed: no checkpoint of it verifies, or a key that is fixed for its life has changed."""


class Stopped(InstructftError):
    """A run that a signal has ended; the same command resumes it."""

    def __init__(self, message: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(message)


class NotFiniteError(InstructftError):
    """A loss or a gradient that is infinite or not a number; raised before the optimizer takes the step."""


class DivergedError(InstructftError):
    """A loss that has risen above that of the untrained model and of a guess; checkpoints before it are kept."""


class OutOfMemoryError(InstructftError):
    """Memory that ran out while training; says what held it, and which recipe keys would help most."""


class CheckpointError(InstructftError):
    """A checkpoint that cannot be written, is incomplete, or is not what was written."""


class HubError(InstructftError):
    """The Hub cannot be reached or refuses what was asked of it, or a file must not leave this machine."""


class ModelError(InstructftError):
    """Weights or a tokenizer that cannot be loaded, or that do not fit each other."""


class ModelFileError(ModelError):
    """A file of a model or tokenizer that cannot be read; names it. Exit code 2: nothing was begun."""

    exit_code = EXIT_USAGE


class AdapterError(ModelError):
    """An adapter folder that is broken, or whose base is unknown or another one. Exit code 2: nothing was begun."""

    exit_code = EXIT_USAGE
