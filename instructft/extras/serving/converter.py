"""Runs llama.cpp's converter in a process of its own, and tells it how a tokenizer cuts text that it does not know.

    python converter.py CONVERTER PRE_TOKENIZER ARGUMENT…

The converter knows published vocabularies by a checksum and refuses every other one, such as one that was trained for a
run, although llama.cpp needs no more of it than the name of its pattern (`instructft.extras.serving.llama_cpp`). What
the converter knows itself goes first.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import Any


def run(converter: str, pre_tokenizer: str, arguments: list[str]) -> None:
    """Run the converter as its own command line would."""
    sys.path[0] = str(Path(converter).parent)  # where it looks for its modules, in place of this folder
    sys.argv = [converter, *arguments]
    if pre_tokenizer:
        sys.path.insert(1, str(Path(converter).parent / "gguf-py"))
        _tell(pre_tokenizer)
    runpy.run_path(converter, run_name="__main__")


def _tell(pre_tokenizer: str) -> None:
    try:  # llama.cpp's own module, which lies beside the converter and is installed nowhere
        TextModel = importlib.import_module("conversion.base").TextModel
    except (ImportError, AttributeError):  # a version that keeps everything in one file
        return
    known = TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            found: str = known(self, tokenizer)
            return found
        except NotImplementedError:
            return pre_tokenizer

    TextModel.get_vocab_base_pre = named


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
