"""Nothing leaves that is not for others: tokens, paths of this machine, files that are no part of a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import instructft
from instructft.cli import app
from instructft.errors import HubError
from instructft.hub.files import IN_MEMORY, Scan, gather
from tests.helpers.hub import REPO_ID, LocalHub, own, push


def test_the_token_is_nowhere_but_in_headers(
    trained: dict[str, Path], hub: LocalHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained["lora"], tmp_path / "run")
    result = CliRunner().invoke(app, ["push", str(run), REPO_ID])
    assert result.exit_code == 0, result.output
    push(run / "checkpoint-2")
    hub.fault("commit", "503", 6)
    with pytest.raises(HubError) as caught:
        push(trained["full"], "tester/other")
    token = hub.token.encode()
    assert any(token in " ".join(request.headers.values()).encode() for request in hub.requests)
    written = capfd.readouterr()
    assert token not in (result.output + written.out + written.err + str(caught.value)).encode()
    for request in hub.requests:
        assert token not in request.body, request.path
        assert hub.token not in request.path
    for path in run.rglob("*"):
        assert not path.is_file() or token not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl", "model.safetensors"])
def test_a_token_in_a_file_stops_the_push(name: str, trained: dict[str, Path], hub: LocalHub, tmp_path: Path) -> None:
    run = shutil.copytree(trained["full"], tmp_path / "run")
    path = run / name
    if name.endswith(".safetensors"):
        content = bytearray(path.read_bytes())
        content[-60 : -60 + len(hub.token)] = hub.token.encode()
        path.write_bytes(content)
    else:
        path.write_text("\n\n" + f'{{"x": "{"hf_" + "a1" * 17}"}}\n' + path.read_text())
    with pytest.raises(HubError, match=rf"{re.escape(name)}, line \d+: found an access token") as caught:
        push(run)
    assert hub.token not in str(caught.value)
    if not name.endswith(".safetensors"):
        assert "line 3" in str(caught.value)
        assert "hf_a1" not in str(caught.value)
    assert hub.requests == []


def test_what_was_not_scanned_is_not_sent(model: Path, hub: LocalHub) -> None:
    """A file that changes after it was looked at: what is committed is what was scanned, or nothing."""
    from safetensors.torch import load_file, save_file

    index = model / "model.safetensors.index.json"
    largest = max(model.glob("model-0*.safetensors"), key=lambda path: path.stat().st_size)
    tensors = load_file(largest)
    weight_map = json.loads(index.read_text())["weight_map"] | {"more": largest.name}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({**tensors, "more": next(iter(tensors.values())).new_zeros(600_000)}, largest, {"format": "pt"})
    scanned = largest.read_bytes()
    assert len(scanned) > IN_MEMORY

    def before(request: Any) -> None:
        largest.write_bytes(scanned[:-40] + hub.token.encode() + b"\0")

    hub.before = before
    with pytest.raises(HubError):
        push(model, checked=True)
    hub.before = None
    assert len(hub.commits(REPO_ID)) == 1


def test_a_token_across_two_blocks_is_found(hub: LocalHub) -> None:
    for cut in range(1, len(hub.token)):
        scan = Scan(Path("file"))
        blocks = b"line\nline\n" + b"x" * 3000 + b"\n" + hub.token[:cut].encode(), hub.token[cut:].encode()
        with pytest.raises(HubError, match="line 4"):
            list(map(scan.feed, blocks))
    Scan(Path("file")).feed(b"hf_hub_download and hf_short1234")


def test_paths_of_this_machine_stay_here(trained: dict[str, Path], hub: LocalHub) -> None:
    for kind, run in trained.items():
        push(run, f"tester/{kind}")
        if kind == "lora":
            push(run / "checkpoint-2", f"tester/{kind}")
        for name, content in own(hub.files(f"tester/{kind}")).items():
            assert b"canary-place" not in content, (kind, name)
            assert str(Path.home()).encode() not in content, (kind, name)
    files = hub.files("tester/lora")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "full"
    assert json.loads(files["base.json"])["name_or_path"] == "full"
    assert b"canary-place" in (trained["lora"] / "base.json").read_bytes()  # here it is as it was
    assert instructft.load_recipe  # what left is a recipe still
    from instructft.recipe.yaml_reader import read_document

    target = trained["full"].parent / "back.yaml"
    target.write_bytes(files["recipe.yaml"])
    assert read_document(target).values["model"]["name_or_path"] == "full"


def test_only_what_belongs_to_a_model_leaves(trained: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained["full"], tmp_path / "run")
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    for name in ("training_args.bin", ".env", "modeling_own.py", "notes.txt", "optimizer.pt"):
        (run / name).write_text("x")
    (run / "tensorboard").mkdir()
    (run / "vocab.json").symlink_to(secret)
    found = gather(run)
    assert set(found.left_out) == {
        "training_args.bin", ".env", "modeling_own.py", "notes.txt", "optimizer.pt", "tensorboard", "vocab.json",
        "checkpoint-1", "checkpoint-2", "instructft.json", "train.log", "rows.parquet",
    }  # fmt: skip
    names = {file.path_in_repo for file in found.leaving}
    assert names == {p.name for p in trained["full"].iterdir() if p.is_file()} - {
        "instructft.json",
        "train.log",
        "rows.parquet",
    }
    assert "this machine" in found.left_out["train.log"]
    assert "code" in found.left_out["modeling_own.py"]
    assert "link" in found.left_out["vocab.json"]
