"""The copy that a checkpoint is written from beside training, and the thread that writes it."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.peft_model
import psutil
import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file

from instructft.checkpoints import background
from instructft.checkpoints.background import Writes, Writing, copied, decide, deferred, has_room

# Whether


def test_auto_means_a_gpu_one_process_and_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1250))
    assert decide("auto", cuda=True, alone=True, copy=1000)[0]
    for asked, cuda, alone, copy, why in (
        ("auto", False, True, 1000, "auto means on a GPU"),
        ("auto", True, False, 1000, "write a checkpoint together"),
        ("auto", True, True, 1001, "leaves too little of the host memory"),
        (False, True, True, 0, "train.save_in_background is false"),
    ):
        on, said = decide(asked, cuda, alone, copy)
        assert not on
        assert why in said
    assert decide(True, cuda=False, alone=True, copy=1001)[0]  # each save asks `has_room` again
    assert has_room(1000)
    assert not has_room(1001)


# The copy


def trained() -> torch.optim.Optimizer:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    return optimizer


def test_a_copy_is_saved_to_the_same_bytes_whatever_becomes_of_the_original(tmp_path: Path) -> None:
    state = trained().state_dict()
    whole = torch.arange(20.0)
    state["more"] = [whole[2:6], whole[4:], whole.view(4, 5).T, (1, "x", None), torch.tensor(3), torch.empty(0)]
    for name in ("now", "later"):
        (tmp_path / name).mkdir()
    torch.save(state, tmp_path / "now" / "optimizer.pt")
    copy = copied(state)
    whole.zero_()
    state["state"][0]["exp_avg"].zero_()
    state["param_groups"][0]["lr"] = 5.0
    torch.save(copy, tmp_path / "later" / "optimizer.pt")
    assert (tmp_path / "now" / "optimizer.pt").read_bytes() == (tmp_path / "later" / "optimizer.pt").read_bytes()


class Kind(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "odd",
    [
        torch.nn.Parameter(torch.ones(2)),  # saved as what it is
        torch.ones(2).as_subclass(Kind),
        torch.ones(2, requires_grad=True),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        lambda: 0,
        threading.Lock(),
        {threading.Lock(): 0},
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_what_might_be_saved_otherwise_is_not_copied(odd: Any) -> None:
    assert copied({"state": [1.0, torch.ones(1), odd]}) is None
    assert copied({"state": [1.0, torch.ones(1)]}) is not None


def test_a_copy_is_written_with_the_place_of_its_original(tmp_path: Path) -> None:
    copy = copied({"weight": torch.ones(3)})
    setattr(copy["weight"].untyped_storage(), background._PLACE, "cuda:7")
    torch.save(copy, tmp_path / "optimizer.pt")
    assert b"cuda:7" in (tmp_path / "optimizer.pt").read_bytes()
    assert torch.load(tmp_path / "optimizer.pt", map_location="cpu")["weight"].tolist() == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_copy_from_a_gpu_is_saved_to_the_same_bytes(tmp_path: Path) -> None:
    state = {"weight": torch.randn(1000, device="cuda"), "step": torch.tensor(3.0)}
    for name, content in (("now", state), ("later", copied(state))):
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "optimizer.pt")
    assert (tmp_path / "now" / "optimizer.pt").read_bytes() == (tmp_path / "later" / "optimizer.pt").read_bytes()


# What is written later


def test_weights_and_optimizer_states_of_the_folder_are_written_later(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    (folder / "default").mkdir(parents=True)
    writers = [transformers.modeling_utils.safe_save_file, peft.peft_model.safe_save_file, torch.save]
    assert writers[:2] == [save_file, save_file]  # upstream's names for it, which are replaced for a while
    weights: Any = {"weight": torch.ones(4)}
    later: Writes = []
    with deferred(folder, later):
        transformers.modeling_utils.safe_save_file(
            weights, str(folder / "model.safetensors"), metadata={"format": "pt"}
        )
        peft.peft_model.safe_save_file(weights, folder / "default" / "adapter_model.safetensors")
        torch.save(weights, str(folder / "optimizer.pt"))
        torch.save(weights, folder / "scheduler.pt")
        peft.peft_model.safe_save_file(weights, tmp_path / "other.safetensors")
        weights["weight"].zero_()
    assert writers == [transformers.modeling_utils.safe_save_file, peft.peft_model.safe_save_file, torch.save]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["other.safetensors", "scheduler.pt"]
    for write in later:
        write()
    for name in ("model.safetensors", "default/adapter_model.safetensors"):
        assert load_file(folder / name)["weight"].tolist() == [1, 1, 1, 1]
    assert torch.load(folder / "optimizer.pt")["weight"].tolist() == [1, 1, 1, 1]


def test_what_memory_does_not_suffice_for_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(content: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(background, "copied", fails)
    later: Writes = []
    with deferred(tmp_path, later):
        torch.save({"weight": torch.ones(1)}, tmp_path / "optimizer.pt")
    assert later == []
    assert (tmp_path / "optimizer.pt").is_file()


def test_writers_are_given_back_after_a_failure(tmp_path: Path) -> None:
    save = torch.save
    with pytest.raises(OSError, match="full"), deferred(tmp_path, []):
        raise OSError("full")
    assert torch.save is save


# The thread


def test_what_a_thread_raises_is_raised_where_it_is_waited_for_and_once() -> None:
    def fails() -> None:
        raise OSError("full")

    writing = Writing(fails)
    with pytest.raises(OSError, match="full"):
        writing.wait()
    writing.wait()
    assert not writing.failed


def test_it_is_known_to_have_failed_before_anybody_waits() -> None:
    gate = threading.Event()
    writing = Writing(lambda: gate.wait(10) and 1 / 0)
    assert not writing.failed
    gate.set()
    assert writing._thread is not None
    writing._thread.join()
    assert writing.failed


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="a signal goes to the process here")
def test_a_signal_that_the_thread_gets_is_answered_while_it_is_waited_for() -> None:
    answered, found = threading.Event(), []
    before = signal.signal(signal.SIGUSR2, lambda *_: answered.set())

    def work() -> None:
        time.sleep(0.3)  # by then it is waited for
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        found.append(answered.wait(5))

    try:
        Writing(work).wait()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert found == [True]


def test_without_a_thread_the_work_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    done: list[int] = []
    writing = Writing(lambda: done.append(1))
    assert done == [1]
    writing.wait()
