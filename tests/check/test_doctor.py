"""`instructft doctor` tells what works here, survives what crashes or hangs, and says nothing private."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from instructft.check import doctor as module
from instructft.check.doctor import doctor, environment, pip_lines, report_trials, trial, try_all


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the processes of their own trials that take no torch: one works, one crashes, one hangs, one raises."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time, sys\n"
        "from instructft.check import doctor\n"
        "def trial(name):\n"
        "    if name == 'crashes': print('oh no', file=sys.stderr); sys.stderr.flush(); os.kill(os.getpid(), 9)\n"
        "    if name == 'ends': sys.exit(3)\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    if name == 'raises': raise ValueError('no such kernel\\nat line 3')\n"
        "    print('noise of a library')\n"
        "    return 'works'\n"
        "doctor.trial = trial\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))


def test_what_crashes_or_hangs_costs_the_others_nothing(trials: None) -> None:
    names = ("one", "crashes", "raises", "hangs", "ends", "last")
    found = dict(try_all(names, patience=5.0))
    assert tuple(found) == names
    assert found["one"] == found["last"] == "works"
    assert found["crashes"] == "its process was ended by signal 9: oh no"
    assert found["raises"] == "ValueError: no such kernel"
    assert found["hangs"] == "no answer within 5 s"
    assert found["ends"].startswith("its process ended with exit code 3")


def test_here_the_usual_attention_works() -> None:
    import torch

    assert trial("eager") == trial("sdpa") == trial("bf16") == "works"
    found = trial("device")
    assert found["torch"] == torch.__version__
    assert len(found["cards"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report_trials(["flash_attention_9"])
    (line,) = capsys.readouterr().out.split("\n")[1:-1]
    assert "flash_attention_9" in json.loads(line.removeprefix("instructft doctor: "))


def test_nothing_private_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home" / "adalovelace"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmn")
    monkeypatch.setenv("MY_API_KEY", "supersecretkey")
    monkeypatch.setenv("LOGNAME", "adalovelace")
    monkeypatch.setenv("HF_ENDPOINT", "https://ada:pw@hub.example/?key=K3y")
    monkeypatch.setattr("platform.node", lambda: "box17.corp")
    said = f"cannot open {home}/lib.so for adalovelace on box17: hf_abcdefghijklmn hf_ofanother supersecretkey"
    monkeypatch.setattr(module, "try_all", lambda names, patience: dict.fromkeys(names, said).items())
    doctor()
    text = capsys.readouterr().out
    doctor(as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    for told in (text, json.dumps(found)):
        assert "cannot open" in told
        for private in (
            str(home.parent),
            "hf_ofan",
            "adalovelace",
            "box17",
            "hf_abcdef",
            "supersecret",
            "K3y",
            "ada:pw",
            sys.prefix,
        ):
            assert private not in told, private
    assert found["environment"]["HF_TOKEN"] == "set"
    assert found["environment"]["HF_ENDPOINT"] == "https://hub.example/"
    assert "numpy" not in environment()


def test_a_missing_package_comes_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_version", lambda name: "")
    found = pip_lines()
    assert found["bitsandbytes"] == "'instructft[quant]'"
    assert found["wandb"] == "'instructft[wandb]'"
    extras = {name.partition("[")[2].rstrip("]'") for name in found.values() if "[" in name}
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in text for extra in extras)
