"""What the Hub of the tests keeps: repos, commits, files as git knows them; and how it refuses."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".gz")  # what goes through LFS whatever its size
LARGE_BYTES = 10 * 2**20
LICENSES = re.compile(
    r"apache-2\.0|mit|[al]?gpl-[23]\.\d|mpl-2\.0|bsd(-[23]-clause)?|cc|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|odc-by|odbl"
    r"|pddl|unlicense|wtfpl|(.*-)?openrail(-m)?|gemma|llama[2-4](\.\d)?|etalab-2\.0|cdla-permissive-2\.0|unknown|other"
)


@dataclass
class Request:
    """One request as it arrived. `status` is what was answered: 0 where the connection was closed with no reply."""

    method: str
    path: str  # with the query
    headers: dict[str, str]
    body: bytes
    route: str
    status: int = 0


@dataclass(frozen=True)
class Blob:
    """A file's bytes, and whether git holds them or only a pointer to them."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """What git calls the blob: SHA-1 of the bytes, or of the pointer."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: its whole tree, not the difference."""

    oid: str
    parent: str | None
    message: str
    blobs: dict[str, Blob]
    description: str = ""
    user: str = "tester"
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z")

    @property
    def files(self) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.blobs.items()}


@dataclass
class Repo:
    """A repo: its commits, the head of each branch, and the large files that have arrived."""

    type: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # sha256 -> bytes
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def commit(self, blobs: dict[str, Blob], message: str, branch: str = "main", **extra: Any) -> Commit:
        parent = self.branches.get(branch)
        tree = "".join(f"{path}\0{blob.oid}\n" for path, blob in sorted(blobs.items()))
        oid = hashlib.sha1(f"{parent} {len(self.commits)} {self.id} {message}\n{tree}".encode()).hexdigest()
        self.commits[oid] = made = Commit(oid, parent, message, blobs, **extra)
        self.branches[branch] = oid
        return made

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        found = [commit for known, commit in self.commits.items() if len(oid) >= 5 and known.startswith(oid)]
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        line = [self.at(revision)]
        while line[-1].parent:
            line.append(self.commits[line[-1].parent])
        return line


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.reply = said({"error": message}, status, **{"X-Error-Message": message, **headers})
        if code:
            self.reply.headers["X-Error-Code"] = code


def said(value: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8", **headers})


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > LARGE_BYTES


def card_errors(content: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a card's header, as far as the Hub's own rules are known."""
    import yaml

    header = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if header is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        return [f"not valid YAML: {error}"], []
    if not isinstance(card, dict):
        return ["the YAML header must be a mapping"], []
    errors = []
    for key in ("base_model", "datasets"):
        values = card.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co.')
    licences = card.get("license") or []
    for value in licences if isinstance(licences, list) else [licences]:
        if not LICENSES.fullmatch(str(value)):
            errors.append(f'"license" must be one of {LICENSES.pattern}, found "{value}"')
    for model in card.get("model-index") or []:
        for result in model.get("results", [{}]):
            for path in ("task.type", "dataset.type", "dataset.name", "metrics"):
                there: Any = result
                for key in path.split("."):
                    there = there.get(key) if isinstance(there, dict) else None
                if not there:
                    errors.append(f'"model-index[0].results[0].{path}" is required')
    return errors, []
