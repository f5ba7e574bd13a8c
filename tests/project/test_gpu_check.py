"""`make gpu-check` runs whole on a CPU, so that it is known to run before a GPU is there; and what ends a job early."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of the check."""
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module


def checked(folder: Path, *arguments: str) -> dict[str, Any]:
    """What `make gpu-check` finds on a CPU, from another folder and with nothing but the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(REPO / "benchmarks" / "gpu_check.py"), "--tiny", "--out", str(folder / "out")]
    done = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())["parts"]
    wrong = [f"{one['part']} · {one['job']}: {one['failed']}" for part in found.values() for one in part
             if "failed" in one]  # fmt: skip
    assert not wrong
    assert [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()] == [
        one for part in found.values() for one in part
    ]
    assert "the table failed" not in (folder / "out" / "results.md").read_text()
    return found


def test_a_part_runs_on_a_cpu(tmp_path: Path) -> None:
    assert list(checked(tmp_path, "--only", "packs")) == ["packs"]


@pytest.mark.battery
@pytest.mark.timeout(600)
def test_every_part_runs_on_a_cpu(script: Any, tmp_path: Path) -> None:
    found = checked(tmp_path)
    assert list(found) == list(script("gpu_check").PARTS)
    who = {one["job"]: one for one in found["speed.gpt2"]}
    assert {"instructft", "TRL, rows of like length", "TRL, wrapped", "plain loop"} < set(who)
    assert who["instructft, float32 copies"]["losses"] == pytest.approx(who["instructft"]["losses"], abs=5e-3)
    same = [one["losses"] for one in who.values() if one.get("kind") in ("ours", "same")]
    assert len(same) == 4
    assert all(losses == pytest.approx(same[0], abs=1e-4) for losses in same)
    [resumed] = [one for one in found["resume"] if "same bits" in one]
    assert resumed["same bits"]
    tables = (tmp_path / "out" / "results.md").read_text()
    for words in ("TRL's fastest correct: ", "TRL's fastest leaking: ", "| sdpa | ", "resumed beside unbroken | yes"):
        assert words in tables, words


def sleep() -> None:
    time.sleep(60)


def end_by(number: int) -> None:
    os.kill(os.getpid(), number)


def count(seconds: float) -> dict[str, float]:
    print("counted")
    return {"given": seconds}


def wrong() -> None:
    raise ValueError("no\nsuch thing")


def test_a_job_has_a_limit_and_its_end_is_told(script: Any, tmp_path: Path) -> None:
    jobs = script("gpu.jobs")

    def run(job: Any, seconds: float = 50) -> dict[str, Any]:
        found: dict[str, Any] = jobs.run(job, seconds, tmp_path / "log", "fork")
        found.pop("seconds")
        return found

    began = time.monotonic()
    assert run(jobs.Job("slow", sleep, limit=0.5)) == {"failed": "not done after 0 s"}
    assert run(jobs.Job("slow", sleep), seconds=0.5) == {"failed": "not done after 0 s"}
    assert time.monotonic() - began < 40
    assert run(jobs.Job("fine", count, {"seconds": 0}, limit=40)) == {"given": 25}
    assert "counted" in (tmp_path / "log").read_text()
    assert run(jobs.Job("wrong", wrong)) == {"failed": "ValueError: no such thing"}
    killed = {"number": signal.SIGKILL}
    assert run(jobs.Job("killed", end_by, killed, killed=True)) == {}
    assert "exit code -9" in run(jobs.Job("killed", end_by, killed))["failed"]
    assert "exit code -15" in run(jobs.Job("ended", end_by, {"number": signal.SIGTERM}, killed=True))["failed"]


class Card:
    """Stands in for a GPU: which imports wake its driver, and what is imported and asked for."""

    def __init__(self, jobs: Any, wakes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
        self.imported: list[str] = []
        self.again: list[str] = []
        self.jobs, self.wakes = jobs, wakes
        monkeypatch.setattr(jobs, "run", self.run)
        monkeypatch.setattr(jobs, "_import", self.take)
        monkeypatch.setattr(jobs.os, "execv", self.start_again)

    def take(self, name: str) -> None:
        import torch

        assert sys.modules["bitsandbytes"] is None
        assert torch.cuda.is_available()
        assert (torch.cuda.device_count(), torch.cuda.get_device_capability()) == (1, (9, 0))
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        self.imported.append(name)

    def run(self, job: Any, *_: Any) -> dict[str, Any]:
        known = [*self.imported, job.given["name"]] if job.name == "trial" else self.imported
        if set(known) & set(self.wakes):
            return {"failed": "RuntimeError: Cannot re-initialize CUDA in forked subprocess"}
        properties = {"multi_processor_count": 132, "major": 9}
        return {"device": "H", "devices": 1, "capability": (9, 0), "properties": properties}

    def start_again(self, program: str, arguments: list[str]) -> None:
        self.again = [program, *arguments]
        raise SystemExit


def test_a_driver_that_an_import_would_wake_stays_asleep(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    jobs = script("gpu.jobs")
    settings = jobs.Settings(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "packs"])
    monkeypatch.delenv(jobs.CAREFUL, raising=False)
    before = torch.cuda.is_available, sys.modules.get("bitsandbytes")
    counts = getattr(torch._C, "_cuda_getDeviceCount", "a build for the CPU has none")
    card = Card(jobs, (), monkeypatch)
    assert jobs.warm(settings) == ""
    assert card.imported == list(jobs.IMPORTS)
    assert torch.cuda.is_available is before[0]
    assert getattr(torch._C, "_cuda_getDeviceCount", "a build for the CPU has none") is counts
    assert sys.modules.get("bitsandbytes") is before[1]
    assert before[1] is not None or "bitsandbytes" not in sys.modules

    card = Card(jobs, ("peft",), monkeypatch)
    with pytest.raises(SystemExit):
        jobs.warm(settings)
    assert card.again == [sys.executable, sys.executable, "gpu_check.py", "--only", "packs"]
    assert os.environ[jobs.CAREFUL] == str(tmp_path)
    card = Card(jobs, ("peft",), monkeypatch)
    assert jobs.warm(settings) == "importing peft wakes the driver, so each job does that anew"
    assert card.imported == [name for name in jobs.IMPORTS if name != "peft"]
    assert jobs.CAREFUL not in os.environ


def test_results_are_written_as_they_come(script: Any, tmp_path: Path, capsys: Any) -> None:
    check = script("gpu_check")
    results = check.Results(tmp_path)
    results.add("packs", "sdpa", {"failed": "it leaks", "seconds": 2.0})
    results.add("packs", "eager", {"attention": "eager", "gpt2 float32": "1e-07", "seconds": 1.0})
    assert [json.loads(line)["job"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [
        "sdpa", "eager",
    ]  # fmt: skip
    text = (tmp_path / "results.md").read_text()
    assert "| eager | 1e-07 |" in text
    assert "- sdpa: failed, it leaks" in text
    assert "packs · sdpa: failed it leaks" in capsys.readouterr().out


def test_only_takes_parts_and_what_begins_with_them(script: Any) -> None:
    check = script("gpu_check")
    assert check.chosen("") == list(check.PARTS)
    assert check.chosen("packs,speed.gpt2") == ["speed.gpt2", "packs"]
    assert check.chosen("speed") == [part for part in check.PARTS if part.startswith("speed.")]
    with pytest.raises(SystemExit, match="found spead, expected some of ceilings"):
        check.chosen("spead")


def test_no_time_is_said_and_not_waited_for(script: Any, tmp_path: Path) -> None:
    check = script("gpu_check")
    settings = script("gpu.jobs").Settings(tmp_path)
    results = check.Results(tmp_path / "out")
    check.check(["ceilings", "tests"], settings, results, 3.0, "fork")
    assert [one["left out"] for found in results.found.values() for one in found] == [
        "no time left (3 s, it wants 5 or more)", "no time left (3 s, it wants 30 or more)",
    ]  # fmt: skip


def test_share_of_the_peak(script: Any) -> None:
    speed = script("gpu.speed")
    assert speed.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert speed.peak_of("NVIDIA H100 PCIe") == 756e12
    assert speed.peak_of("NVIDIA L40S") == 362e12
    assert speed.peak_of("cpu") is None
    made = {"body": 100, "head": 10, "supervised_share": 0.5, "attended": 3.0}
    config = {"n_layer": 2, "n_embd": 8}
    attention = 6 * 2 * 8 * 3  # operations of a token in causal attention, forward and backward
    assert speed.operations(made, config, adapter=False) == 6 * 105 + attention
    assert speed.operations(made, config, adapter=True) == 4 * 105 + attention
    wide = {"num_hidden_layers": 2, "hidden_size": 8, "head_dim": 8, "num_attention_heads": 2}
    assert speed.operations(made, wide, adapter=False) == 6 * 105 + 2 * attention


def test_losses_of_other_batches_are_not_compared(script: Any) -> None:
    apart = script("gpu.speed").apart
    mine = {"losses": [2.0, 1.0], "kind": "ours"}
    assert apart(mine, {"losses": [2.0, 1.001], "kind": "same"}) == "1.0e-03"
    assert apart(mine, {"losses": [2.0, 1.1], "kind": "same"}) == "1.0e-01 DIFFER"
    assert apart(mine, {"losses": [3.0, 1.1], "kind": "leaks"}) == ""


def test_wheels_are_what_is_pinned_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    wheels = importlib.import_module("gpu_wheels")
    environment = {**wheels.default_environment(), "python_version": "3.12", "python_full_version": "3.12.0",
                   "platform_machine": "x86_64", "sys_platform": "linux"}  # fmt: skip
    names = [line.partition("==")[0] for line in wheels.wanted(environment)]
    assert {"transformers", "trl", "peft", "accelerate", "bitsandbytes", "pytest", "tokenizers"} < set(names)
    assert not {name for name in names if name.startswith(("torch", "nvidia", "triton"))} - {"torchao"}
    if wheels.pins(wheels.default_environment())["transformers"] != f"=={version('transformers')}":
        pytest.skip("what is installed is not what is pinned: its packages may need others")
    unpinned = [line for line in wheels.wanted(environment) if "==" not in line]
    assert unpinned == list(wheels.FASTER)
