"""What may leave this machine, and what it looks like when it does.

::

    folder ─► the list of kinds below ─► paths of this machine taken out ─► scanned for the token ─► Leaving
                │
                └─► everything else is left out by name: pickles, logs, caches, code, dotfiles, links

Of a sealed checkpoint all leaves that a resumed run needs, under a manifest that fits what leaves.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from instructft.adapters.adapter_folder import CONFIG, WEIGHTS, is_adapter
from instructft.checkpoints.manifest import MANIFEST, NAME, kind, manifest_text, read_manifest
from instructft.errors import HubError, ModelError
from instructft.redaction import of_file, without_places_by_key
from instructft.weights.base_record import stays_inside
from instructft.weights.model_class import PROCESSOR
from instructft.weights.weight_files import NAMES, weight_files

IN_MEMORY = 1 << 20  # bytes; a file up to here is read once, so that what was scanned is what is sent
_BLOCK = 1 << 22
_OVERLAP = 512  # bytes, more than any token has
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
INDEX = NAMES[0][1]

# What a later command or another library reads of a model, by name.
CONFIGS = {"config.json", "generation_config.json", CONFIG, "base.json"} | PROCESSOR
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "tekken.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "tiktoken.model",
}  # fmt: skip
RUN_FILES = {"recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "loss.png", "loss.pdf", "report.html"}
KEPT = {"README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"}  # never deleted from a repository
_WEIGHTS = re.compile(rf"model(-\d+-of-\d+)?\.safetensors|{re.escape(INDEX)}|{re.escape(WEIGHTS)}")
_TEMPLATES = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_PICKLE = "training_args.bin"


@dataclass(frozen=True)
class Leaving:
    """A file on its way to the Hub, scanned.

    Args:
        path_in_repo: `instruct/config.json`.
        content: its bytes, or for a large file where they lie.
        size: bytes.
        sha256: of the content; the Hub knows large files by it.
        blob: git's SHA-1 of the content; the Hub knows small files by it.
    """

    path_in_repo: str
    content: Path | bytes
    size: int
    sha256: str
    blob: str


class Gathered(NamedTuple):
    """What leaves of a folder, and what does not: name -> why."""

    leaving: list[Leaving]
    left_out: dict[str, str]


def gather(folder: Path, *, under: str = "", made: Mapping[str, bytes] | None = None) -> Gathered:
    """What leaves of a run folder, a merged model, an adapter folder, a model folder or a sealed checkpoint.

    Args:
        under: the folder in the repository that it goes to.
        made: files that are written for the Hub in place of those in the folder: name -> content.

    Example::

        gather(Path("runs/quickstart")).leaving[0].path_in_repo, gather(Path("runs/quickstart")).left_out
        # ('README.md', {'tensorboard': 'not part of a model'})

    Raises:
        HubError: a file that is needed is a link, or one holds an access token.
        ModelError: there are no weights as safetensors.
        CheckpointError: a checkpoint's manifest cannot be read.
    """
    sealed = kind(folder) == "sealed" and folder.name.startswith("checkpoint-")
    wanted, left_out = _of_checkpoint(folder) if sealed else _of_model(folder)
    contents: dict[str, Path | bytes] = {}
    for name in wanted:
        contents[name] = _as_it_leaves(folder, name)
    contents |= made or {}
    leaving = {name: _weigh(folder, name, content) for name, content in sorted(contents.items())}
    if sealed:
        manifest = _manifest(folder, leaving)
        leaving[MANIFEST] = _weigh(folder, MANIFEST, manifest)
    place = f"{under.strip('/')}/" if under.strip("/") else ""
    return Gathered(
        [Leaving(place + f.path_in_repo, f.content, f.size, f.sha256, f.blob) for f in leaving.values()], left_out
    )


def is_replaced(name: str) -> bool:
    """Whether a file of this name, in the folder of a model on the Hub, is part of that model: another one replaces it.

    >>> is_replaced("model-00002-of-00003.safetensors"), is_replaced("notes.md"), is_replaced("README.md")
    (True, False, False)
    """
    return bool(name in CONFIGS | TOKENIZER | RUN_FILES or _WEIGHTS.fullmatch(name) or _TEMPLATES.fullmatch(name))


# --------------------------------------------------------------------------------------------------------------------
# Which files
# --------------------------------------------------------------------------------------------------------------------


def _of_model(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of what leaves of a model, adapter or run folder, and why the rest does not."""
    weights = {WEIGHTS} if is_adapter(folder) else {path.name for path in weight_files(folder)}
    if pickled := sorted(name for name in weights if not name.endswith(".safetensors")):
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when they are read: they are not "
            "uploaded. Load the model where you trust it and save it again with save_pretrained, as safetensors"
        )
    if (folder / INDEX).is_file() and WEIGHTS not in weights and "model.safetensors" not in weights:
        weights.add(INDEX)
    taken, left_out = [], {}
    for path in sorted(folder.iterdir()):
        name = path.name
        known = name in weights or name in CONFIGS | TOKENIZER | RUN_FILES | KEPT
        if path.is_symlink():
            if name in weights or name in ("config.json", CONFIG):
                raise HubError(f"{path} is a symbolic link, and links are not followed; put the file itself there")
            left_out[name] = "a symbolic link"
        elif path.is_dir() and name == "additional_chat_templates":
            inner = [f"{name}/{p.name}" for p in sorted(path.iterdir()) if p.is_file() and not p.is_symlink()]
            taken += [inside for inside in inner if _TEMPLATES.fullmatch(inside)]
        elif path.is_file() and known:
            taken.append(name)
        else:
            left_out[name] = _why_not(name)
    return taken, left_out


def _of_checkpoint(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The files of a checkpoint's manifest without those that a resumed run never reads."""
    taken, left_out = [], {}
    for name in read_manifest(folder)["files"]:
        inside = [folder / part for part in (name, *map(str, Path(name).parents)) if part != "."]
        if any(path.is_symlink() for path in inside) or not stays_inside(name):
            raise HubError(f"{folder / name} is a symbolic link, and links are not followed; put the file itself there")
        # torch's sharded checkpoints keep their table of contents in a file named .metadata
        hidden = any(part.startswith(".") and part != ".metadata" for part in Path(name).parts)
        if Path(name).name == _PICKLE or hidden or name.endswith(".py"):
            left_out[name] = _why_not(Path(name).name)
        else:
            taken.append(name)
    return taken, left_out


def _why_not(name: str) -> str:
    if name == _PICKLE:
        return "a pickle of this machine's settings"
    if name == "evaluation.json":
        return "it holds held-out rows; its numbers are in the card"
    if name == "train.log":
        return "it names this machine and what was typed on it"
    if name == "gate.json":
        return "it holds all questions with both answers; its verdict is in the card"
    if name.endswith(".py"):
        return "custom code, which is not uploaded"
    if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        return "a pickle"
    if NAME.fullmatch(name):
        return "a checkpoint; hub.push: checkpoints uploads them"
    return "not part of a model"


def _manifest(folder: Path, leaving: Mapping[str, Leaving]) -> bytes:
    """A checkpoint's manifest that fits its files as they leave."""
    manifest = read_manifest(folder)
    identity = manifest["identity"]
    told = without_places_by_key(identity, [folder.parent])
    files = {name: {"size": file.size, "sha256": file.sha256} for name, file in leaving.items()}
    manifest = {**manifest, "identity": told, "files": files}
    return manifest_text(manifest).encode()


# --------------------------------------------------------------------------------------------------------------------
# As they leave
# --------------------------------------------------------------------------------------------------------------------


def _as_it_leaves(folder: Path, name: str) -> Path | bytes:
    """A file's content without paths of this machine; a large one stays where it is."""
    path = folder / name
    last = Path(name).name
    text = last.endswith((".json", ".jsonl", ".yaml", ".yml", ".md", ".html"))
    rewritten = text and last not in TOKENIZER - {"tokenizer_config.json"} and last != INDEX
    if rewritten or path.stat().st_size <= IN_MEMORY:
        with _open(path) as file:
            content = file.read()
        return of_file(last, content, [folder, folder.parent]) if rewritten else content
    return path


def _open(path: Path) -> IO[bytes]:
    """Open a file that is no link, also when it became one a moment ago."""
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror}; links are not followed") from error


def _weigh(folder: Path, name: str, content: Path | bytes) -> Leaving:
    """Hash a file and look for tokens in it, in one pass."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    scan = Scan(folder / name)
    for block in _blocks(content):
        sha256.update(block)
        blob.update(block)
        scan.feed(block)
    return Leaving(name, content, size, sha256.hexdigest(), blob.hexdigest())


def _blocks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with _open(content) as file:
        while block := file.read(_BLOCK):
            yield block


class Scan:
    """Looks for access tokens in the bytes of a file as they pass, in memory that does not grow.

    The token of this login is looked for as it is, and so is anything that looks like one of the Hub's.

    >>> Scan(Path("notes.md")).feed(b"no secrets")
    """

    def __init__(self, path: Path):
        self._path, self._tokens = path, [token.encode() for token in secrets()]
        self._tail, self._lines = b"", 1

    def feed(self, block: bytes) -> None:
        """Look at the next bytes.

        Raises:
            HubError: they hold a token; the message names file and line, never the token.
        """
        text = self._tail + block
        places = [at for token in self._tokens if (at := text.find(token)) >= 0]
        places += [found.start() for found in [_TOKEN.search(text)] if found]
        if places:
            line = self._lines + text.count(b"\n", 0, min(places))
            raise HubError(
                f"{self._path}, line {line}: found an access token, or what looks like one; nothing was uploaded. Take "
                "it out of the file, and make the token invalid at https://huggingface.co/settings/tokens"
            )
        keep = text[-_OVERLAP:]
        self._lines += text.count(b"\n", 0, len(text) - len(keep))
        self._tail = keep


def secrets() -> list[str]:
    """The access tokens that this process knows of."""
    from huggingface_hub import get_token

    found: list[Any] = [get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    return sorted({token.strip() for token in found if token and len(token.strip()) >= 8})
