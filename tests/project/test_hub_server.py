"""The Hub of the tests is one to the real clients: they push, list, load and retry; and its faults really happen."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.helpers.hub import KINDS, ROUTES, LocalHub

CARD = "---\nlicense: mit\nbase_model: gpt2\n---\n# A card\n"


@pytest.fixture
def api(hub):
    from huggingface_hub import HfApi

    return HfApi()


@pytest.fixture
def sleeps(monkeypatch):
    """Waits between retries, noted and not waited."""
    noted = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


def add(path, data):
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, data)


def test_a_private_repo_takes_commits_and_gives_every_byte_back(hub, api, tmp_path):
    from huggingface_hub import CommitOperationDelete, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    assert api.whoami()["name"] == "tester"
    api.create_repo("tester/m", private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("tester/m")
    api.create_repo("tester/m", exist_ok=True)
    first = hub.commits("tester/m")[0].oid
    files = {"README.md": CARD.encode(), "a/config.json": b"{}", "a/model.safetensors": os.urandom(70_000), "none": b""}
    made = api.create_commit(
        "tester/m", [add(*file) for file in files.items()], commit_message="one", parent_commit=first
    )
    assert made.oid == hub.commits("tester/m")[0].oid
    assert {name: data for name, data in hub.files("tester/m").items() if name != ".gitattributes"} == files
    assert [commit.parent for commit in hub.commits("tester/m")] == [first, None]

    # Git's own names, and what a client lists.
    git = subprocess.run(["git", "hash-object", "--stdin"], input=b"{}", capture_output=True, check=True)
    listed = {entry.path: entry for entry in api.list_repo_tree("tester/m", recursive=True, expand=True)}
    assert set(listed) == {".gitattributes", "a", *files}
    assert listed["a/config.json"].blob_id == git.stdout.decode().strip()
    assert listed["a/model.safetensors"].lfs.sha256 == hashlib.sha256(files["a/model.safetensors"]).hexdigest()
    assert [entry.path for entry in api.list_repo_tree("tester/m")] == [".gitattributes", "README.md", "a", "none"]
    assert [entry.path for entry in api.get_paths_info("tester/m", ["a", "a/config.json", "b"])] == [
        "a",
        "a/config.json",
    ]
    info = api.model_info("tester/m", files_metadata=True)
    assert (info.sha, info.private, {file.rfilename: file.size for file in info.siblings}["a/model.safetensors"]) == (
        made.oid,
        True,
        70_000,
    )

    # Adds and deletions in one commit; a stale parent and a file that is not there are refused, and change nothing.
    operations = [CommitOperationDelete("a/"), CommitOperationDelete("none"), add("b.txt", b"b")]
    second = api.create_commit("tester/m", operations, commit_message="two", parent_commit=made.oid)
    assert set(hub.files("tester/m")) == {".gitattributes", "README.md", "b.txt"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("tester/m", [add("c.txt", b"c")], commit_message="stale", parent_commit=made.oid)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.create_commit("tester/m", [CommitOperationDelete("gone")], commit_message="gone")
    assert [commit.commit_id for commit in api.list_repo_commits("tester/m")] == [second.oid, made.oid, first]
    assert [(ref.name, ref.target_commit) for ref in api.list_repo_refs("tester/m").branches] == [("main", second.oid)]

    # The first commit is still there, in its whole.
    folder = snapshot_download("tester/m", revision=made.oid)
    assert all(Path(folder, name).read_bytes() == data for name, data in files.items())
    assert str(tmp_path) in folder

    # The storage of large files never saw the token.
    stored = [request for request in hub.requests if request.path.startswith("/large/")]
    assert {request.method for request in stored} == {"PUT", "GET"}
    assert not any("authorization" in request.headers or hub.token.encode() in request.body for request in stored)


def test_upload_folder_leaves_what_is_there_and_a_card_is_checked(hub, api, tmp_path):
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "README.md").write_text(CARD)
    api.create_repo("tester/m")
    api.upload_folder(repo_id="tester/m", folder_path=tmp_path / "up")
    api.upload_folder(repo_id="tester/m", folder_path=tmp_path / "up")  # nothing new: no commit
    assert len(hub.commits("tester/m")) == 2
    for wrong in ("license: mine", "base_model: /home/me/model", "a: [", "model-index: [{name: m, results: [{}]}]"):
        (tmp_path / "up" / "README.md").write_text(f"---\n{wrong}\n---\n")
        with pytest.raises(ValueError, match="Invalid metadata"):
            api.upload_folder(repo_id="tester/m", folder_path=tmp_path / "up")


def test_a_large_file_in_parts_and_a_pointer_to_nothing(hub, api):
    hub.part_bytes = 30_000
    data = os.urandom(70_000)
    api.create_repo("tester/m")
    api.upload_file(repo_id="tester/m", path_or_fileobj=data, path_in_repo="m.bin")
    assert hub.files("tester/m")["m.bin"] == data
    assert sum("part=" in request.path for request in hub.requests if request.method == "PUT") == 3

    # Bytes other than those announced are refused, and so is a commit that names what never arrived.
    put = next(request for request in hub.requests if request.method == "PUT")
    signed = hub.storage + put.path.replace("&part=1", "")
    assert http("PUT", signed, data[:-1])[0] == 400
    assert http("PUT", signed.replace("size=70000", "size=70001"), data)[0] == 400
    assert http("PUT", signed.replace("signature=", "signature=1"), data)[0] == 403
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "lfsFile", "value": {"path": "n.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}},
    ]
    body = "\n".join(map(json.dumps, lines))
    url = f"{hub.url}/api/models/tester/m/commit/main"
    status = http("POST", url, body, Authorization=f"Bearer {hub.token}")[0]
    assert (status, len(hub.commits("tester/m"))) == (400, 2)


def test_who_may_see_and_write(hub, api):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    api.create_repo("tester/secret", private=True)
    hub.put("tester/open", {"a": "a"})
    for token in (False, hub.stranger_token):
        with pytest.raises(RepositoryNotFoundError) as missing:
            HfApi(token=token).model_info("tester/secret")
        assert missing.value.response.status_code == (404 if token else 401)
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).hf_hub_download("tester/secret", ".gitattributes")
        HfApi(token=token).hf_hub_download("tester/open", "a")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    for token, repo in (
        (hub.read_token, "tester/open"),
        (hub.stranger_token, "tester/open"),
        (hub.token, "other/open"),
    ):
        hub.put(repo, {"a": "a"})
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).upload_file(repo_id=repo, path_or_fileobj=b"b", path_in_repo="b")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("other/new")
    api.update_repo_settings("tester/secret", private=False, gated="auto")
    HfApi(token=False).model_info("tester/secret")
    with pytest.raises(GatedRepoError):
        HfApi(token=hub.stranger_token).hf_hub_download("tester/secret", ".gitattributes")


def test_what_is_missing_is_told_apart_and_long_lists_come_in_pages(hub, api):
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    hub.put("tester/m", {f"f{number:02}": str(number) for number in range(25)})
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("tester/none", "f01")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("tester/m", "f01", revision="none")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("tester/m", "none")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tester/m", "none"))
    hub.page = 10
    assert len(list(api.list_repo_tree("tester/m", recursive=True))) == 26
    assert sum(request.route == "tree" for request in hub.requests) == 1 + 3
    api.create_branch("tester/m", branch="side")
    api.upload_file(repo_id="tester/m", path_or_fileobj=b"s", path_in_repo="side", revision="side")
    assert "side" in hub.files("tester/m", revision="side")
    assert "side" not in hub.files("tester/m")


@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_of_the_hub_of_another_test_is_left(hub, api, name):
    from huggingface_hub import HfFileSystem

    hub.put("tester/m", {name: name, "same": name})
    listed = HfFileSystem().ls("tester/m", detail=False)
    assert set(listed) == {f"tester/m/{file}" for file in (".gitattributes", name, "same")}
    with open(api.hf_hub_download("tester/m", "same")) as file:
        assert file.read() == name


@pytest.mark.parametrize("name", ["small.txt", "large.bin"])
def test_a_cut_download_goes_on_where_it_was_cut(hub, api, monkeypatch, sleeps, name):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what did not fill a chunk is fetched again
    data = os.urandom(50_000)
    hub.put("tester/m", {name: data})
    hub.fault("resolve", "reset_midway", 2)
    with open(api.hf_hub_download("tester/m", name), "rb") as file:
        assert file.read() == data
    ranges = [request.headers.get("range") for request in hub.requests if request.status in (200, 206)]
    assert [asked for asked in ranges if asked] == ["bytes=25000-", "bytes=37000-"]
    assert hub.pending() == {}


def test_a_model_and_its_tokenizer_load_from_the_hub(hub, api, tiny_model, tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    api.create_repo("tester/m", private=True)
    api.upload_folder(repo_id="tester/m", folder_path=tmp_path / "m", path_in_repo="instruct")
    loaded = AutoModelForCausalLM.from_pretrained("tester/m", subfolder="instruct")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tiny_model.state_dict().values(), strict=True)
    )
    spoken = AutoTokenizer.from_pretrained("tester/m", subfolder="instruct")
    assert (spoken.chat_template, spoken("Say it.")["input_ids"]) == (
        tokenizer.chat_template,
        tokenizer("Say it.")["input_ids"],
    )
    hub.put("someone/base", {path.name: path for path in (tmp_path / "m").iterdir()})
    AutoModelForCausalLM.from_pretrained("someone/base")


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_load_from_the_hub(hub, streaming):
    import io

    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from pyarrow import parquet

    content = [{"text": f"row {number}", "n": number} for number in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in content).encode()
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(content), table)
    configs = [
        {"config_name": "short", "data_files": "short.jsonl"},
        {"config_name": "long", "data_files": "long.json.gz"},
    ]
    card = f"---\nconfigs: {json.dumps(configs)}\n---\n"
    hub.put(
        "tester/p",
        {"data/train-00000.parquet": table.getvalue(), "data/test-00000.parquet": table.getvalue()},
        "dataset",
    )
    hub.put(
        "tester/j",
        {"README.md": card, "short.jsonl": lines[: lines.index(b"\n") + 1], "long.json.gz": gzip.compress(lines)},
        "dataset",
    )
    hub.create("tester/closed", "dataset", private=True)
    hub.put("tester/closed", {"train.jsonl": lines}, "dataset")
    with pytest.raises(DatasetNotFoundError):
        load_dataset("tester/closed", token=False, streaming=streaming)
    for name, config in (("tester/p", None), ("tester/j", "long"), ("tester/closed", None)):
        assert list(load_dataset(name, config, split="train", streaming=streaming)) == content
    assert list(load_dataset("tester/j", "short", split="train", streaming=streaming)) == content[:1]
    if not streaming:
        assert list(load_dataset("tester/p", split="train[5:10]+test[:10%]")) == content[5:10] + content[:3]
    old = hub.put("tester/closed", {"train.jsonl": lines + b'{"text": "new", "n": 30}\n'}, "dataset")
    hub.put("tester/closed", {}, "dataset", delete=["train.jsonl"])
    assert len(list(load_dataset("tester/closed", split="train", revision=old, streaming=streaming))) == 31


def http(method, url, body=b"", **headers):
    """(status, body, headers) by a client that retries nothing; "closed" or "cut" where no whole reply came."""
    address = urlsplit(url)
    connection = HTTPConnection(address.netloc, timeout=5)
    try:
        connection.request(method, f"{address.path}?{address.query}", body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.headers
    except RemoteDisconnected:
        return ("closed",)
    except IncompleteRead:
        return ("cut",)
    finally:
        connection.close()


def raw(hub, route):
    """(method, address, body) of one request that the route would serve with 200 or 302."""
    sha = hashlib.sha256(b"large").hexdigest()
    api, lfs = f"{hub.url}/api/models/tester/m", f"{hub.url}/tester/m.git/info/lfs/objects"
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha, "size": 5}]}
    query = f"type=model&repo=tester/m&size=5&signature={hub._signature}"
    return {
        "whoami": ("GET", f"{hub.url}/api/whoami-v2", b""),
        "create": ("POST", f"{hub.url}/api/repos/create", json.dumps({"name": f"n{len(hub.repos)}"})),
        "validate": ("POST", f"{hub.url}/api/validate-yaml", json.dumps({"content": CARD})),
        "settings": ("PUT", f"{api}/settings", json.dumps({"visibility": "public"})),
        "auth": ("GET", f"{api}/auth-check/write", b""),
        "branch": ("POST", f"{api}/branch/b{len(hub.repos['model', 'tester/m'].branches)}", b"{}"),
        "refs": ("GET", f"{api}/refs", b""),
        "commits": ("GET", f"{api}/commits/main", b""),
        "commit": ("POST", f"{api}/commit/main", json.dumps({"key": "header", "value": {"summary": "s"}})),
        "preupload": ("POST", f"{api}/preupload/main", json.dumps({"files": [{"path": "a", "size": 1}]})),
        "tree": ("GET", f"{api}/tree/main", b""),
        "paths_info": ("POST", f"{api}/paths-info/main", "paths=a"),
        "info": ("GET", api, b""),
        "lfs_batch": ("POST", f"{lfs}/batch", json.dumps(batch)),
        "lfs_upload": ("PUT", f"{hub.storage}/large/{sha}?{query}", b"large"),
        "lfs_verify": ("POST", f"{lfs}/verify", json.dumps({"oid": sha, "size": 5})),
        "resolve": ("GET", f"{hub.url}/tester/m/resolve/main/a", b""),
    }[route]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", sorted(ROUTES))
def test_each_fault_happens_as_often_as_asked(route, kind):
    with LocalHub() as hub:
        hub.put("tester/m", {"a": "a" * 100, "l.bin": b"large"})
        repo = hub.repos["model", "tester/m"]

        def ask():
            return http(*raw(hub, route), Authorization=f"Bearer {hub.token}")[0]

        def made():
            return len(hub.repos) + len(repo.commits) + len(repo.branches)

        hub.fault(route, kind, 2)
        before = made()
        if (route, kind) == ("lfs_upload", "reset_midway"):  # its reply is empty: there is nothing to cut
            assert (ask(), hub.pending()) == (200, {"lfs_upload": 2})
            return
        failed = int(kind) if kind.isdigit() else "cut" if kind == "reset_midway" else "closed"
        assert [ask(), ask()] == [failed] * 2
        does = route in ("create", "commit", "branch") and kind in ("lost", "reset_midway")
        assert made() - before == (2 if does else 0)
        assert [request.status == 0 for request in hub.requests] == [failed == "closed"] * 2
        assert hub.pending() == {}
        assert ask() == (201 if route == "branch" else 200)
        assert not hub.errors


# What the client retries by itself; `hub.py` says it in words, and the push builds on it.
REQUESTS = {
    **dict.fromkeys(("preupload", "lfs_batch", "lfs_upload", "lfs_verify", "tree", "commits"), 6),
    **dict.fromkeys(("whoami", "create", "info", "paths_info", "refs", "validate", "commit"), 1),
}


@pytest.mark.parametrize("kind", ["503", "429", "drop", "lost"])
def test_what_the_client_retries_by_itself(hub, api, sleeps, kind):
    hub.put("tester/m", {"a": "a"})
    expected = {**REQUESTS, "resolve": 7 if kind.isdigit() else 1}  # HEAD: once at once, then with retries
    push = lambda: api.create_commit(  # noqa: E731
        "tester/m",
        [add(f"{time.time_ns()}.bin", os.urandom(9)), add("README.md", os.urandom(4).hex().encode())],
        commit_message="c",
    )
    calls = {
        "whoami": api.whoami,
        "create": lambda: api.create_repo("tester/new"),
        "info": lambda: api.model_info("tester/m"),
        "paths_info": lambda: api.get_paths_info("tester/m", "a"),
        "refs": lambda: api.list_repo_refs("tester/m"),
        "tree": lambda: list(api.list_repo_tree("tester/m")),
        "commits": lambda: api.list_repo_commits("tester/m"),
        "resolve": lambda: api.hf_hub_download("tester/m", "a"),
    }
    seen = {}
    for route in expected:
        hub.requests.clear()
        hub.fault(route, kind, 9)
        try:
            calls.get(route, push)()
        except Exception:
            seen[route] = sum(request.route == route for request in hub.requests)
        hub._faults.clear()
    assert seen == expected
    assert sleeps == [1, 2, 4, 8, 8] * sum(requests > 1 for requests in expected.values())
    assert len(hub.commits("tester/m")) == (3 if kind == "lost" else 2)  # sent once, and applied


@pytest.mark.parametrize(
    ("kind", "waits"), [("503", []), ("429", [1, 2, 4, 8, 8]), ("drop", [1] * 5), ("reset_midway", [1] * 5)]
)
@pytest.mark.parametrize("name", ["small.txt", "large.bin"])
def test_what_a_download_retries_once_it_began(hub, api, sleeps, kind, waits, name):
    from huggingface_hub import HfFileSystem

    hub.put("tester/m", {name: "a" * 100})
    hub.before = lambda request: request.method == "GET" and request.path.startswith(("/tester", "/large")) and fail()
    fail = lambda: hub.fault("resolve", kind)  # noqa: E731
    with pytest.raises(Exception, match=r"503|429|without sending|peer closed"):
        api.hf_hub_download("tester/m", name)
    assert sleeps == waits
    if kind in ("503", "drop"):
        sleeps.clear()
        with pytest.raises(Exception, match=r"503|without sending"):
            HfFileSystem().cat_file(f"tester/m/{name}")
        assert sleeps == [1, 2, 4, 8, 8]


def test_a_child_process_reaches_the_hub_and_no_later_test_is_online(hub, tmp_path):
    hub.put("tester/m", {"a.txt": "from the Hub"})
    seen = []
    hub.before = lambda request: seen.append(request.route)
    code = "from huggingface_hub import hf_hub_download; print(open(hf_hub_download('tester/m', 'a.txt')).read())"
    environment = {**os.environ, **hub.environment(tmp_path / "machine")}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (child.stdout.strip(), seen) == ("from the Hub", ["resolve", "resolve"]), child.stderr
    assert (tmp_path / "machine" / "hub").is_dir()
    status, body, headers = http("GET", hub.url + "/tester/m/resolve/main/a.txt", Range="bytes=-3")
    assert (status, body, headers["Content-Range"]) == (206, b"Hub", "bytes 9-11/12")


def test_without_the_fixture_the_session_is_offline(tmp_path):
    import datasets.config
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert "HF_TOKEN" not in os.environ
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().model_info("tester/m")
