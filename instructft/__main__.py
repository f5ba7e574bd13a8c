"""`python -m instructft` is the same as the command `instructft`."""

import os
import sys

_ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# `-m` looks for modules in the working directory first, beside a recipe; what lies there is not run
if sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False) and os.getcwd() != _ours:
    del sys.path[0]

from instructft.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
