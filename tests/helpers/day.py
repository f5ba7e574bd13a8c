"""A run under a stream of faults, drawn by a seed, until it has reached its end: what a long day brings, in short.

    python tests/helpers/day.py RECIPE OUT SECONDS SEED fork|exec

Started by `test_day.py` as a program. Trains RECIPE once in peace, then once more while a fault comes every few
seconds: the terminal hangs up, nobody reads standard output any more, the disk is full for a while, the Hub is silent
or answers 503 for a while, the clock jumps, the process is killed, and after it `metrics.jsonl` is damaged. Faults that
last overlap with others, also with the next start. After each end the same command is given again.

The run is spread over SECONDS by a pause before each step; when they are over, the faults are, and it goes on to its
end. Its folder lies on a disk of its own, a small tmpfs; the Hub is that of the tests. `exec` starts every process
anew, `fork` from this one, which has imported what it needs. Prints a line of JSON: what came, how each process ended,
and what there was in the end, beside the run in peace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from tests.helpers.crash import FILLER, fill_up, own_mounts, sealed  # noqa: E402

WELL, SILENT, BROKEN = 0.0, 1.0, 2.0
ENDS = ("kill", "hang up", "damage")  # faults that end the process
LASTING = ("full disk", "Hub silent", "Hub 503")
FAULTS = (*ENDS, *LASTING, "closed output", "clock")
SHARED = "INSTRUCTFT_DAY"  # in the environment: the file that all processes share
_TIMES = ("runtime", "per_second")  # in the names of what is measured by a clock


class Shared:
    """Numbers that the processes of a day share, in a file that each of them has mapped."""

    names = ("clock", "deadline", "steps", "hub", "silent", "refused", "asked")

    def __init__(self, path: Path):
        if not path.exists():
            path.write_bytes(bytes(8 * len(self.names)))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, name: str) -> float:
        return float(struct.unpack_from("d", self._map, 8 * self.names.index(name))[0])

    def __setitem__(self, name: str, value: float) -> None:
        struct.pack_into("d", self._map, 8 * self.names.index(name), value)


# --------------------------------------------------------------------------------------------------------------------
# The process that trains, and the Hub
# --------------------------------------------------------------------------------------------------------------------


def command_line(arguments: list[str]) -> None:
    """`instructft ARGUMENTS`, with a clock that is moved from outside, and at the pace of the day."""
    shared, real, real_ns = Shared(Path(os.environ[SHARED])), time.time, time.time_ns
    time.time = lambda: real() + shared["clock"]  # type: ignore[assignment]
    time.time_ns = lambda: real_ns() + int(shared["clock"] * 1e9)  # type: ignore[assignment]
    import datasets
    import huggingface_hub.constants
    import torch

    from instructft.cli import main
    from instructft.training.trainer import Trainer

    torch.set_num_threads(1)
    # where this was forked from, they were imported for tests that reach no Hub
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = False
    step = Trainer.training_step

    def paced(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared["steps"] += 1
        left = (self.state.max_steps - self.state.global_step) * self.args.gradient_accumulation_steps
        time.sleep(max(0.0, (shared["deadline"] - time.monotonic()) / max(left, 1)))
        return step(self, *args, **kwargs)

    Trainer.training_step = paced  # type: ignore[method-assign]
    sys.argv = ["instructft", *arguments]
    main()


def serve_hub(shared: Shared, told: int) -> None:
    """Be the Hub until the process that started it is gone; writes to `told` what others need to reach it."""
    from tests.helpers.hub import LocalHub
    from tests.helpers.hub_store import Request

    parent = os.getppid()
    address = os.environ.get("HF_ENDPOINT", "")
    hub = LocalHub(int(address.rpartition(":")[2]) if address.startswith("http://127.0.0.1:") else 0)

    def before(request: Request) -> None:
        if shared["hub"] == SILENT:
            shared["silent"] += 1
        while shared["hub"] == SILENT:
            time.sleep(0.02)
        if shared["hub"] == BROKEN:
            shared["refused"] += 1
            hub.fault(request.route, "503")

    hub.before = before
    with os.fdopen(told, "w") as pipe:
        json.dump(hub.environment(Path(os.environ["HF_HOME"])), pipe)
    while os.getppid() == parent:
        time.sleep(0.2)
        if shared["asked"]:
            sums = {f"{repo_id}/{name}": hashlib.sha256(content).hexdigest()
                    for _, repo_id in list(hub.repos) for name, content in hub.files(repo_id).items()}  # fmt: skip
            Path(os.environ[SHARED]).with_name("pushed.json").write_text(json.dumps(sums))
            shared["asked"] = 0


def fork(do: Any, *args: Any) -> int:
    """The process that does this and ends."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        do(*args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass
class Process:
    """One process of the run: where it writes, and what was done to it."""

    pid: int
    output: int | None  # this end of its standard output
    errors: Path
    began: float
    steps: float  # of all processes when it began
    done: list[str] = field(default_factory=list)
    code: int | None = None

    @classmethod
    def start(cls, arguments: list[str], folder: Path, number: int, fresh: bool, shared: Shared) -> Process:
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        errors = folder / f"errors-{number}"
        out = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        began, steps = time.monotonic(), shared["steps"]
        if fresh:
            moves = [(os.POSIX_SPAWN_DUP2, theirs, 1), (os.POSIX_SPAWN_DUP2, out, 2), (os.POSIX_SPAWN_CLOSE, ours)]
            program = [sys.executable, __file__, "instructft", *arguments]
            pid = os.posix_spawn(sys.executable, program, os.environ, file_actions=moves)
        else:

            def run() -> None:
                os.close(ours)
                os.dup2(theirs, 1)
                os.dup2(out, 2)
                sys.stdout = sys.__stdout__ = os.fdopen(1, "w")  # type: ignore[misc]
                sys.stderr = sys.__stderr__ = os.fdopen(2, "w")  # type: ignore[misc]
                command_line(arguments)

            pid = fork(run)
        os.close(theirs)
        os.close(out)
        return cls(pid, ours, errors, began, steps)

    def look(self) -> bool:
        """Read what was printed; whether the process is at work still."""
        with contextlib.suppress(BlockingIOError):
            while self.output is not None and os.read(self.output, 1 << 16):
                pass
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def close_output(self) -> None:
        if self.output is not None:
            os.close(self.output)
            self.output = None

    def said(self) -> str:
        return self.errors.read_text(errors="replace")


# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file of lines as disks, editors and people do; in words, how."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) < 3:
        return ""
    how = rng.choice(("cut", "digit", "garbage", "gone", "twice", "zeros", "half", "all", "bytes"))
    at = rng.randrange(len(lines))
    line = lines[at]
    if how == "cut":  # the end of the file
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
    elif how == "digit":  # JSON still, and another number
        digits = [i for i, byte in enumerate(line) if chr(byte).isdigit()]
        place = rng.choice(digits)
        lines[at] = line[:place] + (b"1" if line[place : place + 1] != b"1" else b"2") + line[place + 1 :]
    elif how == "garbage":
        lines.insert(at, b"\xff\xfe not a line of ours\n")
    elif how == "gone":
        del lines[at]
    elif how == "twice":
        lines.insert(at, line)
    elif how == "zeros":  # as a power cut leaves a block
        lines[-1] = lines[-1] + bytes(512)
    elif how == "half":
        lines[at] = line[: len(line) // 2] + b"\n"
    elif how == "all":
        lines = []
    else:
        lines[at] = bytes(byte ^ 0x55 if rng.random() < 0.1 else byte for byte in line[:-1]) + b"\n"
    path.write_bytes(b"".join(lines))
    return how


def allowed(process: Process, run: Path) -> bool:
    """Whether a process ended as it should after what was done to it."""
    said, done, code = process.said(), process.done, process.code
    if "Traceback (most recent call last)" in said or "Fatal Python error" in said:
        return False
    if code == 0:
        return (run / "run.json").exists()
    if code == -signal.SIGKILL:
        return "kill" in done
    if code in (129, -signal.SIGHUP):  # -1: before there was anything to be saved
        return "hang up" in done
    if code in (1, 2) and "full disk" in done:
        return "the disk is full" in said or "are free" in said
    if code in (1, 2) and {"Hub silent", "Hub 503"} & set(done):  # without a checkpoint here the Hub is asked for one
        return "the Hub" in said or "127.0.0.1" in said or "tester/" in said
    return False


def day(recipe: str, out: Path, seconds: float, seed: int, fresh: bool) -> dict[str, Any]:
    """What the module says."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` has it ignored, and a run respects that
    os.environ[SHARED] = str(out / "shared")
    disk, shared, rng = out / "disk", Shared(out / "shared"), random.Random(seed)
    disk.mkdir()
    own_mounts()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    reading, writing = os.pipe()
    hub = fork(serve_hub, shared, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        os.environ.update(json.load(pipe))
    whole, run = out / "whole", disk / "run"
    peace = Process.start(["train", recipe, f"output_dir={whole}"], out, 0, fresh, shared)
    while peace.look():
        time.sleep(0.02)
    assert peace.code == 0, peace.said()
    scale = 8.0 if fresh else 1.0
    begun = time.monotonic()
    shared["deadline"] = begun + seconds
    arguments = ["train", recipe, f"output_dir={run}", "hub.repo_id=tester/day", "hub.push=checkpoints"]
    came: list[str] = []
    odd: list[dict[str, Any]] = []
    ended: list[int] = []
    lasting: dict[str, float] = {}  # when they are over
    bag: list[str] = []
    moves = 0

    def over(name: str) -> None:
        if name == "full disk":
            (disk / FILLER).unlink(missing_ok=True)
        else:
            shared["hub"] = WELL

    def draw() -> str:
        if not bag:
            bag.extend(rng.sample(FAULTS, len(FAULTS)))
        return bag.pop()

    def quiet() -> bool:
        """The day is over, and has brought every fault at least once."""
        return time.monotonic() > begun + seconds and set(came) >= set(FAULTS)

    try:
        while True:
            process = Process.start(arguments, out, len(ended) + 1, fresh, shared)
            process.done += lasting
            early = rng.random() < 0.1  # also while it starts
            due: float | None = time.monotonic() + rng.uniform(0, 2) * scale if early else None
            spoil = False
            while process.look():
                time.sleep(0.02)
                now = time.monotonic()
                for name in [name for name, end in lasting.items() if now > end or quiet()]:
                    del lasting[name]
                    over(name)
                if not quiet():
                    shared["deadline"] = max(shared["deadline"], now + 0.2 * scale)
                    if due is None and shared["steps"] > process.steps:
                        due = now + rng.uniform(0.1, 1.0) * scale
                if due is None or now < due or quiet() or process.done[-1:] in (["kill"], ["hang up"]):
                    continue
                due = now + rng.uniform(0.1, 1.0) * scale
                name = draw()
                came.append(name)
                spoil = name == "damage"
                if name in ENDS:
                    by_kill = name == "kill" or (spoil and rng.random() < 0.5)
                    process.done.append("kill" if by_kill else "hang up")
                    os.kill(process.pid, signal.SIGKILL if by_kill else signal.SIGHUP)
                elif name == "closed output":
                    process.done.append(name)
                    process.close_output()
                elif name == "clock":
                    shared["clock"] += rng.choice((-86400.0, -3600.0, -60.0, 60.0, 3600.0, 86400.0))
                    moves += 1
                else:
                    process.done.append(name)
                    other = {"Hub silent": "Hub 503", "Hub 503": "Hub silent"}.get(name, "")
                    lasting.pop(other, None)
                    lasting[name] = now + rng.uniform(0.3, 2.0) * scale
                    if name == "full disk":
                        fill_up(disk)
                    else:
                        shared["hub"] = SILENT if name == "Hub silent" else BROKEN
            process.close_output()
            ended.append(int(process.code or 0))
            if not allowed(process, run):
                odd.append({"number": len(ended), "code": process.code, "done": process.done,
                            "said": process.said()[-3000:]})  # fmt: skip
            if process.code == 0 or len(ended) > 20 + seconds or len(odd) > 10:
                break
            if spoil and (how := damage(run / "metrics.jsonl", rng)):
                came.append(f"damage: {how}")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        told: dict[str, Any] = {
            "seconds": time.monotonic() - begun,
            "processor": used.ru_utime + used.ru_stime,
            "came": Counter(came),
            "ended": Counter(ended),
            "odd": odd,
            "silent": shared["silent"],
            "refused": shared["refused"],
            "clock moved": moves,
            "said": said_of(out, len(ended)),
            "sealed": len(sealed(run)),
        }
        told["whole"], told["run"] = ending(whole), ending(run)
        shared["asked"] = 1
        while shared["asked"]:
            time.sleep(0.1)
        told["pushed"] = json.loads((out / "pushed.json").read_text()).get("tester/day/model.safetensors")
        return told
    finally:
        over("Hub")
        os.kill(hub, signal.SIGKILL)
        os.waitpid(hub, 0)


def said_of(out: Path, processes: int) -> Counter[str]:
    """How many processes said what only a fault makes them say."""
    words = {"disk": "the disk is full", "room": "are free", "output": "standard output:", "lost": "the run goes on"}
    found: Counter[str] = Counter()
    for number in range(1, processes + 1):
        text = (out / f"errors-{number}").read_text(errors="replace")
        found.update(name for name, word in words.items() if word in text)
    return found


def ending(run: Path) -> dict[str, Any]:
    """Of a run that has ended: the sums of its weights, of its last checkpoint, and what it logged, less the times."""
    newest = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    files = [run / "model.safetensors", run / "rows.parquet"]
    files += [path for path in sorted(newest.iterdir()) if path.suffix in (".pt", ".pth", ".safetensors")]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in record.items() if not any(part in key for part in _TIMES)}
            for record in records]  # fmt: skip
    sums = {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"files": sums, "logged": kept}


def main() -> None:
    if sys.argv[1] == "instructft":
        return command_line(sys.argv[2:])
    recipe, out, seconds, seed, how = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(day(recipe, out, seconds, seed, how == "exec")), flush=True)
    return None


if __name__ == "__main__":
    main()
