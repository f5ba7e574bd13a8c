"""Everything that only a GPU can show, in one command of at most eight minutes, with no network.

    make gpu-check      (python benchmarks/gpu_check.py [--seconds 480] [--only speed.gpt2,packs] [--out FOLDER])

Parts come in the order of what is worth knowing first; each consists of jobs, each a process with a limit of its own.
Each line of results is written as soon as it is there: `results.jsonl`, `results.json` and the tables of `results.md`
in the folder `--out`, so that a check that was cut short has told what it found. What was not done says why: a library
that is not installed, an error, no time left. The exit code is 0 as soon as a part was measured.

Needs torch with CUDA, and what instructft needs; `make gpu-wheels` brings the rest to a machine without network.
`--tiny` runs the same code on a CPU, at sizes at which the figures say nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # works without an installed instructft, from any folder

from gpu.jobs import CAREFUL, Result, Settings, run, warm  # noqa: E402

# part -> its module in gpu/, its limit in seconds, and the least with which it is worth a start
PARTS: dict[str, tuple[str, float, float]] = {
    "ceilings": ("ceilings", 45, 5),
    "speed.gpt2": ("speed", 150, 20),
    "speed.seed": ("speed", 90, 20),
    "speed.qwen": ("speed", 90, 25),
    "speed.llama1b": ("speed", 80, 25),
    "packs": ("packs", 70, 10),
    "resume": ("resume", 90, 15),
    "qlora": ("qlora", 150, 20),
    "memory": ("memory", 75, 20),
    "quickstart": ("quickstart", 70, 15),
    "fp8": ("fp8", 120, 25),
    "heads": ("heads", 90, 20),
    "speed.llama8b": ("speed", 150, 60),
    "tests": ("suite", 240, 30),
}
BEGAN = "INSTRUCTFT_GPU_CHECK_BEGAN"


def chosen(only: str) -> list[str]:
    """The parts that `--only` names: `speed` is all of speed."""
    if not only:
        return list(PARTS)
    asked = [word.strip() for word in only.split(",") if word.strip()]
    for word in asked:
        if not any(part == word or part.startswith(f"{word}.") for part in PARTS):
            raise SystemExit(f"--only: found {word}, expected some of {', '.join(PARTS)}")
    return [part for part in PARTS if any(part == word or part.startswith(f"{word}.") for word in asked)]


class Results:
    """What was found so far, on the disk as soon as it is known."""

    def __init__(self, out: Path):
        self.out = out
        self.found: dict[str, list[Result]] = {}
        self.machine: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").write_text("")

    def add(self, part: str, job: str, found: Result) -> None:
        """One more line."""
        line = {"part": part, "job": job, **found}
        self.found.setdefault(part, []).append(line)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.write()
        print(f"{part} · {job}: {brief(found)}", flush=True)

    def write(self) -> None:
        """All of it anew."""
        whole = {"machine": self.machine, "parts": self.found}
        (self.out / "results.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False), encoding="utf-8")
        (self.out / "results.md").write_text("\n".join(self.markdown()) + "\n", encoding="utf-8")

    def markdown(self) -> Iterator[str]:
        """The tables of all parts, and what went wrong."""
        yield "# GPU check\n"
        yield " · ".join(f"{name} {value}" for name, value in self.machine.items())
        for part, found in self.found.items():
            yield f"\n## {part} ({sum(one.get('seconds', 0) for one in found):.0f} s)\n"
            good = [one for one in found if not {"failed", "left out"} & set(one)]
            try:
                yield from importlib.import_module(f"gpu.{PARTS[part][0]}").table(good) if good else []
            except Exception as error:  # figures are worth more than their table
                yield f"the table failed ({type(error).__name__}: {error}); the figures are in results.json"
            wrong = [f"- {one['job']}: {word}, {one[word]}" for one in found for word in ("failed", "left out")
                     if word in one]  # fmt: skip
            yield from ["", *wrong] if wrong else []


def brief(found: Result) -> str:
    """A result in a line."""
    short = {name: value for name, value in found.items() if not isinstance(value, list | dict)}
    return " · ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
                      for name, value in short.items())  # fmt: skip


def check(parts: list[str], settings: Settings, results: Results, seconds: float, method: str) -> None:
    """Do part after part until the time is over."""
    ends = time.perf_counter() + seconds
    if settings.tiny:  # on a busy machine too every part is tried
        ends = float("inf")
    logs = results.out / "logs"
    logs.mkdir(exist_ok=True)
    for part in parts:
        module, limit, least = PARTS[part]
        left = ends - time.perf_counter()
        if left < least:
            results.add(part, "all", {"left out": f"no time left ({left:.0f} s, it wants {least:.0f} or more)"})
            continue
        part_ends = ends if settings.tiny else min(ends, time.perf_counter() + limit)
        jobs: Any = importlib.import_module(f"gpu.{module}").jobs
        steps = jobs(settings, part.partition(".")[2]) if "." in part else jobs(settings)
        found: Result | None = None
        while True:
            try:
                job = steps.send(found)
            except StopIteration:
                break
            except Exception as error:
                results.add(part, "all", {"failed": f"{type(error).__name__}: {error}"})
                break
            left = part_ends - time.perf_counter()
            if left < 3:
                found = {"left out": "the time of this part is over"}
            else:
                log = logs / f"{part}-{job.name}.log".replace(" ", "-").replace(",", "").replace("/", "-")
                found = run(job, left, log, method, patient=settings.tiny)
            results.add(part, job.name, found)


def machine() -> dict[str, str]:
    """Versions, and what is not there."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "torchao",
                 "liger_kernel", "flash_attn", "triton"):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not there"
    return found


def main() -> None:
    """Check, and print each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="of all parts together")
    parser.add_argument("--only", default="", help="parts, with commas between: " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder for models and rows, kept; default: a temporary one")
    parser.add_argument("--spawn", action="store_true", help="start each job anew instead of forking")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, at sizes at which the figures say nothing")
    args = parser.parse_args()
    parts = chosen(args.only)
    began = float(os.environ.setdefault(BEGAN, str(time.time())))  # a second start counts from the first
    scratch = Path(args.scratch or os.environ.get(CAREFUL) or tempfile.mkdtemp(prefix="gpu-check-")).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HF_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_WAIT_POLICY": "PASSIVE", "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    settings = Settings(scratch, args.tiny)
    try:
        results = Results(args.out.resolve())
        left = warm(settings)
        del os.environ[BEGAN]
        method = "spawn" if args.spawn else "fork"
        results.machine = machine() | {"imports": f"{time.time() - began:.0f} s", **({"note": left} if left else {})}
        results.write()
        print(" · ".join(f"{name} {value}" for name, value in results.machine.items()), flush=True)
        check(parts, settings, results, args.seconds - (time.time() - began), method)
        print(f"{time.time() - began:.0f} s in all; tables: {results.out / 'results.md'}")
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    if not any(not {"failed", "left out"} & set(one) for found in results.found.values() for one in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
