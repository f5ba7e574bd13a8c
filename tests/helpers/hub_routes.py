"""The routes of the Hub of the tests: which request means what, and the work behind each."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from tests.helpers.hub_store import Blob, Commit, Refusal, Reply, Repo, Request, card_errors, is_large, said

if TYPE_CHECKING:
    from tests.helpers.hub import LocalHub


@dataclass
class Work:
    """The work of one request; a method for each route."""

    hub: LocalHub
    request: Request
    name: str
    groups: dict[str, str]
    query: dict[str, str]

    def run(self) -> Reply:
        fault = self.hub._take(self.request.route, ("503", "429", "drop", "lost"))
        if fault in ("503", "429"):
            extra = {"Retry-After": str(self.hub.retry_after)} if self.hub.retry_after >= 0 else {}
            return Refusal(int(fault), "A fault that was asked for", **extra).reply
        if fault == "drop":
            return Reply(0)
        try:
            with self.hub._lock:
                reply: Reply = getattr(self, self.name)()
        except Refusal as refusal:
            reply = refusal.reply
        return Reply(0) if fault == "lost" else reply

    def repo(self, write: bool = False, content: bool = False) -> Repo:
        kind = "dataset" if self.groups["type"].startswith("dataset") else "model"
        return self.hub._repo(self.request, kind, self.groups["repo"], write, content)

    def body(self) -> Any:
        return json.loads(self.request.body or b"{}")

    def whoami(self) -> Reply:
        user, role = self.hub._user(self.request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
        return said({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})

    def create(self) -> Reply:
        user, role = self.hub._user(self.request)
        asked = self.body()
        kind, owner = asked.get("type") or "model", asked.get("organization") or user
        repo_id = f"{owner}/{asked['name']}"
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if owner != user or role != "write":
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return said({"error": f"You already created this {kind} repo", "url": url}, 409)
        self.hub.create(repo_id, kind, asked.get("visibility") == "private" or bool(asked.get("private")))
        return said({"url": url, "name": repo_id, "id": repo_id})

    def validate(self) -> Reply:
        errors, warnings = card_errors(self.body()["content"])
        lists = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return said(lists, 400 if errors else 200)

    def settings(self) -> Reply:
        repo, asked = self.repo(write=True), self.body()
        repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
        repo.gated = bool(asked.get("gated", repo.gated))
        return said({"private": repo.private, "gated": repo.gated})

    def auth(self) -> Reply:
        self.repo(write="write" in self.groups, content=True)
        return said({})

    def branch(self) -> Reply:
        repo, name = self.repo(write=True), self.groups["name"]
        if self.request.method == "DELETE":
            repo.branches.pop(name)
        elif name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        else:
            repo.branches[name] = repo.at(self.body().get("startingPoint") or "main").oid
        return said({}, 201)

    def refs(self) -> Reply:
        heads = self.repo().branches.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
        return said({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def commits(self) -> Reply:
        line = self.repo().history(self.groups["rev"])
        entries = [
            {"id": c.oid, "title": c.message, "message": c.description, "authors": [{"user": c.user}], "date": c.date}
            for c in line
        ]
        return self.paged(entries, self.hub.page)

    def paged(self, entries: list[Any], size: int) -> Reply:
        start = int(self.query.get("cursor", 0))
        reply = said(entries[start : start + size])
        if start + size < len(entries):
            following = urlencode({**self.query, "cursor": start + size})
            reply.headers["Link"] = f'<{self.hub.url}{urlsplit(self.request.path).path}?{following}>; rel="next"'
        return reply

    def entry(self, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
        """What the tree says of a file or a folder; None where there is neither."""
        if path in commit.blobs:
            blob = commit.blobs[path]
            found: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            if blob.lfs:
                found["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        else:
            inside = sorted((p, b.oid) for p, b in commit.blobs.items() if p.startswith(f"{path}/"))
            if not inside:
                return None
            found = {
                "type": "directory",
                "oid": hashlib.sha1(repr(inside).encode()).hexdigest(),
                "size": 0,
                "path": path,
            }
        if expand:
            found["lastCommit"] = {"id": commit.oid, "title": commit.message, "date": commit.date}
        return found

    def tree(self) -> Reply:
        commit, folder = self.repo().at(self.groups["rev"]), self.groups.get("path", "").strip("/")
        expand, recursive = (self.query.get(key) == "true" for key in ("expand", "recursive"))
        prefix = f"{folder}/" if folder else ""
        below = [path for path in commit.blobs if path.startswith(prefix)]
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {self.groups['rev']}", "EntryNotFound")
        names = set()
        for path in below:
            parts = path[len(prefix) :].split("/")
            names |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2)}
        entries = [self.entry(commit, name, expand) for name in sorted(names)]
        return self.paged(entries, min(self.hub.page, 50) if expand else self.hub.page)

    def paths_info(self) -> Reply:
        commit = self.repo().at(self.groups["rev"])
        if self.request.headers.get("content-type", "").startswith("application/json"):
            asked = self.body()
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(self.request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand") == ["true"]
        found = (self.entry(commit, path.strip("/"), expand) for path in paths)
        return said([entry for entry in found if entry])

    def info(self) -> Reply:
        repo = self.repo()
        commit = repo.at(self.groups.get("rev", "main"))
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.blobs.items()):
            siblings.append({"rfilename": path})
            if "blobs" in self.query:
                siblings[-1] |= {"size": len(blob.data), "blobId": blob.oid}
                if blob.lfs:
                    lfs = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
                    siblings[-1]["lfs"] = lfs
        about = {"_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24], "id": repo.id, "author": repo.id.split("/")[0]}
        about |= {"sha": commit.oid, "lastModified": commit.date, "createdAt": commit.date, "private": repo.private}
        about |= {"gated": "auto" if repo.gated else False, "disabled": False, "tags": [], "siblings": siblings}
        return said({**about, "downloads": 0, "likes": 0, **({"modelId": repo.id} if repo.type == "model" else {})})

    def preupload(self) -> Reply:
        blobs = self.repo(write=True).at(self.groups["rev"]).blobs
        told = []
        for file in self.body()["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in blobs:
                told[-1]["oid"] = blobs[file["path"]].etag
        return said({"files": told})

    def commit(self) -> Reply:
        repo, branch = self.repo(write=True), self.groups["rev"]
        if branch not in repo.branches or "create_pr" in self.query:
            raise Refusal(404, f"Not a branch here: {branch} (and pull requests are not served)", "RevisionNotFound")
        lines = [json.loads(line) for line in self.request.body.splitlines() if line.strip()]
        header = lines[0]["value"]
        head = repo.at(branch)
        if not head.oid.startswith(header.get("parentCommit") or head.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(head.blobs)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"].rstrip("/")
            if key == "file":
                blobs[path] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                data = repo.stored.get(value["oid"])
                if data is None or value.get("size", len(data)) != len(data):
                    raise Refusal(400, f"An LFS pointer pointed to a file that does not exist. Offending file: {path}")
                blobs[path] = Blob(data, True)
            elif key == "deletedFile" and path in blobs:
                del blobs[path]
            elif key == "deletedFolder" and (gone := [name for name in blobs if name.startswith(f"{path}/")]):
                for name in gone:
                    del blobs[name]
            else:
                raise Refusal(404, f"A file with this name doesn't exist: {path} ({key})", "EntryNotFound")
        user = str(self.hub._user(self.request)[0])
        made = repo.commit(blobs, header["summary"], branch, description=header.get("description", ""), user=user)
        url = f"{self.hub.url}/{'datasets/' if repo.type == 'dataset' else ''}{repo.id}/commit/{made.oid}"
        return said({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    # Large files

    def signed(self, base: str, repo: Repo, sha: str, size: int, **more: Any) -> str:
        sign = {"type": repo.type, "repo": repo.id, "size": size, "signature": self.hub._signature, **more}
        return f"{base}/large/{sha}?{urlencode(sign)}"

    def signed_repo(self) -> Repo:
        if self.query.get("signature") != self.hub._signature:
            raise Refusal(403, "The signature of this address is wrong")
        return self.hub.repos[self.query["type"], self.query["repo"]]

    def lfs_batch(self) -> Reply:
        asked = self.body()
        if asked.get("operation") != "upload":
            raise Refusal(422, f"operation: expected upload, found {asked.get('operation')}")
        repo, objects, part = self.repo(write=True), [], self.hub.part_bytes
        for given in asked["objects"]:
            sha, size = given["oid"], given["size"]
            objects.append({"oid": sha, "size": size})
            if sha in repo.stored:
                continue
            upload: dict[str, Any] = {"href": self.signed(self.hub.storage, repo, sha, size)}
            if part and size > part and "multipart" in asked["transfers"]:
                upload["href"] = self.signed(self.hub.url, repo, sha, size)
                numbers = range(1, math.ceil(size / part) + 1)
                upload["header"] = {str(n): self.signed(self.hub.storage, repo, sha, size, part=n) for n in numbers}
                upload["header"]["chunk_size"] = str(part)
            kind = "datasets/" if repo.type == "dataset" else ""
            verify = f"{self.hub.url}/{kind}{repo.id}.git/info/lfs/objects/verify"
            objects[-1]["actions"] = {"upload": upload, "verify": {"href": verify}}
        return said({"transfer": "multipart" if part else "basic", "objects": objects})

    def lfs_upload(self) -> Reply:
        repo, sha, data = self.signed_repo(), self.groups["sha"], self.request.body
        if "part" in self.query:
            repo.parts[sha, int(self.query["part"])] = data
            return Reply(200, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        if self.request.method == "POST":
            given = [(part["partNumber"], part["etag"].strip('"')) for part in self.body()["parts"]]
            parts = [repo.parts.get((sha, number), b"") for number, _ in given]
            if [etag for _, etag in given] != [hashlib.md5(part).hexdigest() for part in parts]:
                raise Refusal(400, "InvalidPart")
            data = b"".join(parts)
        if len(data) != int(self.query["size"]) or hashlib.sha256(data).hexdigest() != sha:
            raise Refusal(400, f"BadDigest: {len(data)} bytes of sha256 {hashlib.sha256(data).hexdigest()}, not {sha}")
        repo.stored[sha] = data
        return Reply(200, headers={"ETag": f'"{sha}"'})

    def lfs_verify(self) -> Reply:
        repo, asked = self.repo(write=True), self.body()
        if len(repo.stored.get(asked["oid"], b"")) != asked["size"] or asked["oid"] not in repo.stored:
            raise Refusal(404, f"Not stored in this size: {asked['oid']}")
        return said({})

    def resolve(self) -> Reply:
        repo = self.repo(content=True)
        commit = repo.at(self.groups["rev"])
        about = {"X-Repo-Commit": commit.oid}
        blob = commit.blobs.get(self.groups["path"])
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **about)
        if not blob.lfs:
            return self.download(blob.data, {**about, "ETag": f'"{blob.oid}"'})
        size = len(blob.data)
        about |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(size)}
        return Reply(302, b"", {**about, "Location": self.signed(self.hub.storage, repo, blob.sha256, size)})

    def large(self) -> Reply:
        sha = self.groups["sha"]
        return self.download(self.signed_repo().stored[sha], {"ETag": f'"{sha}"'})

    def download(self, data: bytes, headers: dict[str, str]) -> Reply:
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.request.headers.get("range", ""))
        if asked is None or asked.groups() == ("", ""):
            return Reply(200, data, headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= stop:
            return Reply(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


_REPO = r"(?P<repo>[^/]+/[^/]+|[^/]+)"
_API = rf"/api/(?P<type>models|datasets)/{_REPO}"
_GIT = rf"/(?P<type>datasets/|){_REPO}"
_REV = "(?P<rev>[^/]+)"
TABLE = (  # route, method, path, method of Work; the first that fits
    ("whoami", "GET", "/api/whoami-v2", "whoami"),
    ("create", "POST", "/api/repos/create", "create"),
    ("validate", "POST", "/api/validate-yaml", "validate"),
    ("settings", "PUT", f"{_API}/settings", "settings"),
    ("auth", "GET", f"{_API}/auth-check(?P<write>/write)?", "auth"),
    ("branch", "POST|DELETE", f"{_API}/branch/(?P<name>[^/]+)", "branch"),
    ("refs", "GET", f"{_API}/refs", "refs"),
    ("commits", "GET", f"{_API}/commits/{_REV}", "commits"),
    ("commit", "POST", f"{_API}/commit/{_REV}", "commit"),
    ("preupload", "POST", f"{_API}/preupload/{_REV}", "preupload"),
    ("tree", "GET", f"{_API}/tree/{_REV}(?:/(?P<path>.*))?", "tree"),
    ("paths_info", "POST", f"{_API}/paths-info/{_REV}", "paths_info"),
    ("info", "GET", f"{_API}(?:/revision/{_REV})?", "info"),
    ("lfs_batch", "POST", rf"{_GIT}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("lfs_verify", "POST", rf"{_GIT}\.git/info/lfs/objects/verify", "lfs_verify"),
    ("lfs_upload", "PUT|POST", "/large/(?P<sha>[0-9a-f]{64})", "lfs_upload"),
    ("resolve", "GET|HEAD", "/large/(?P<sha>[0-9a-f]{64})", "large"),
    ("resolve", "GET|HEAD", f"{_GIT}/resolve/{_REV}/(?P<path>.+)", "resolve"),
)
ROUTES = {route for route, *_ in TABLE}
