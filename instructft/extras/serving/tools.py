"""Runs llama.cpp's converter, or the library that quantizes, in a process of its own.

    python tools.py convert CONVERTER PRE_TOKENIZER ARGUMENT…
    python tools.py quantize LIBRARY [SOURCE OUTPUT NUMBER]

The converter knows published vocabularies by a checksum and refuses every other one, such as one that was trained for a
run, although llama.cpp needs no more of it than the name of its pattern (`instructft.extras.serving.llama_cpp`). A name
that the converter knows itself goes first, unless it stands for another pattern than the one in tokenizer.json: the
checksum is of one text, and two patterns may cut that text alike.

`llama-quantize` is a command line around one function of llama.cpp's library, which packages bring where they do not
bring the program.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

PATTERNS = ("gpt-2", "smollm", "llama-bpe", "qwen2")  # that are told from tokenizer.json for sure


def convert(converter: str, pre_tokenizer: str, arguments: list[str]) -> None:
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
        except NotImplementedError:
            return pre_tokenizer
        return pre_tokenizer if found in PATTERNS else found

    TextModel.get_vocab_base_pre = named


class Parameters(ctypes.Structure):
    """`llama_model_quantize_params`: its first two fields, the same in every version, and room for all that follow."""

    _fields_ = (("threads", ctypes.c_int32), ("number", ctypes.c_int), ("others", ctypes.c_char * 1016))


def quantize(library: str, source: str = "", output: str = "", number: int = 0) -> int:
    """Write a GGUF file in fewer bits; without a source only see whether the library loads and has the function.

    Args:
        number: of `enum llama_ftype` in llama.h.

    Returns:
        The exit code: what the library returns, 0 for success.
    """
    if sys.platform == "win32":
        os.add_dll_directory(str(Path(library).parent))
    loaded = ctypes.CDLL(library)
    defaults, run = loaded.llama_model_quantize_default_params, loaded.llama_model_quantize
    defaults.restype, defaults.argtypes = Parameters, []
    run.restype, run.argtypes = ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    if not source:
        return 0
    loaded.llama_backend_init()
    parameters = defaults()
    parameters.number = number
    return int(run(os.fsencode(source), os.fsencode(output), ctypes.byref(parameters)))


if __name__ == "__main__":
    asked, tool, *rest = sys.argv[1:]
    if asked == "convert":
        convert(tool, rest[0], rest[1:])
    else:
        source, output, number = rest or ("", "", "0")
        sys.exit(quantize(tool, source, output, int(number)))
