"""A merge that is killed leaves nothing that is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instructft import merge_adapter
from instructft.weights import tensor_io
from tests.conftest import BATTERY
from tests.helpers.merging import (
    CONFIGS,
    QUIET,
    load_whole,
    make_adapter,
    make_base,
)
from tests.helpers.processes import python

POINTS = 50 if BATTERY else 10  # the first call, the last, and some between


@contextlib.contextmanager
def counted(kill_at: int) -> Iterator[list[int]]:
    """Counts what reaches the disk: writes, flushes, renames; kills this process at one of them."""
    calls = [0]
    originals = (tensor_io._write, os.fsync, os.rename)

    def wrap(original: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == kill_at:
                if half:  # killed in the middle of a write
                    file, data = arguments
                    file.write(memoryview(data)[: len(data) // 2])
                    file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    tensor_io._write, os.fsync, os.rename = wrap(originals[0], half=True), wrap(originals[1]), wrap(originals[2])
    try:
        yield calls
    finally:
        tensor_io._write, os.fsync, os.rename = originals


def driver(folder: Path, points: int) -> None:
    """In a process of its own: for each kill point a child that merges and dies; then a merge that lives."""
    import torch

    torch.set_num_threads(1)
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"

    def run(target: Path, kill_at: int) -> int:
        with counted(kill_at) as calls:
            merge_adapter(adapter, target, verify=False, max_shard_size="100KB", console=QUIET)
        return calls[0]

    total = run(folder / "whole", 0)
    right = load_whole(folder / "whole").state_dict()
    wrong_folders, complete = 0, 0
    for i in range(points):
        kill_at = 1 + i * (total - 1) // (points - 1)
        child = os.fork()
        if not child:
            run(out, kill_at)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), (kill_at, total)
        assert os.WTERMSIG(status) == signal.SIGKILL
        left = [path for path in folder.iterdir() if path.name.startswith("out")]
        assert len(left) == 1, left
        try:
            found = load_whole(left[0]).state_dict()
        except Exception:
            wrong_folders += out.exists()  # under its own name it must load
        else:
            complete += 1
            wrong_folders += any(not torch.equal(found[name], right[name]) for name in right)
        if out.exists():
            shutil.rmtree(out)
    run(out, 0)
    again = load_whole(out).state_dict()
    same = all(torch.equal(again[name], right[name]) for name in right)
    left_over = [path.name for path in folder.iterdir() if "partial" in path.name]
    assert base.is_dir()
    result = {"calls": total, "wrong": wrong_folders, "complete": complete, "same": same, "left": left_over}
    print("RESULT " + json.dumps(result))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kill points are children by fork")
def test_a_killed_merge_leaves_nothing_that_is_wrong(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2", shards="100KB")
    make_adapter(tmp_path / "adapter", base, **CONFIGS["tokens"])
    made = python([__file__, str(tmp_path), str(POINTS)], tmp_path)
    line = next((line for line in made.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line, made.stdout[-2000:] + made.stderr[-4000:]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["calls"] > 40
    assert result["wrong"] == 0
    assert result["complete"] < POINTS / 2  # most points lie where the folder cannot be loaded yet
    assert result["same"]
    assert result["left"] == []


if __name__ == "__main__":
    driver(Path(sys.argv[1]), int(sys.argv[2]))
