"""`make gpu-wheels`: wheels that a machine with torch for CUDA, and no network, lacks for `make gpu-check`.

    python scripts/gpu_wheels.py FOLDER [--python 3.12] [--platform x86_64] [--list]

What instructft and its tests need, in the versions of constraints.txt, and what makes a GPU faster or smaller
(bitsandbytes, torchao, Liger); without torch, triton and NVIDIA's libraries, which such a machine has. Where it has no
pip either, a wheel is a zip file: unpack them all into one folder, and put that on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
EXTRAS = ("quant",)
TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "jsonschema", "packaging")
FASTER = ("torchao", "liger-kernel")  # not pinned: what fits the torch that is there is not known here
THERE = re.compile(r"(torch|torchvision|triton|pytorch-triton|nvidia-.*|cuda-.*|setuptools)$")


def pins(environment: dict[str, str]) -> dict[str, str]:
    """Name -> version, of the lines of constraints.txt that count for a Python and a platform."""
    found = {}
    for line in (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate(environment):
                found[canonicalize_name(one.name)] = str(one.specifier)
    return found


def wanted(environment: dict[str, str]) -> list[str]:
    """Requirements, pinned where constraints.txt knows them: all that instructft and its tests lead to."""
    pinned = pins(environment)
    found: set[str] = set()
    todo = [Requirement(line) for line in metadata.requires("instructft") or []]
    todo = [one for one in todo if applies(one, environment, EXTRAS)] + [Requirement(name) for name in TESTS]
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name in found or THERE.match(name):
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another Python than this one: it is fetched, and what it needs is in the list or is not
        todo += [other for other in map(Requirement, lines) if applies(other, environment, tuple(one.extras))]
    return sorted(f"{name}{pinned.get(name, '')}" for name in found) + list(FASTER)


def applies(one: Requirement, environment: dict[str, str], extras: tuple[str, ...]) -> bool:
    """Whether a requirement counts there, with one of these extras or none."""
    return one.marker is None or any(one.marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def main() -> None:
    """Download, a wheel after the other, so that one that is not to be had does not cost the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/gpu-wheels"))
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--platform", default="x86_64", help="its processor: x86_64 or aarch64")
    parser.add_argument("--list", action="store_true", help="say what would be fetched")
    args = parser.parse_args()
    environment = {
        **default_environment(), "python_version": args.python, "python_full_version": f"{args.python}.0",
        "platform_machine": args.platform, "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
    }  # fmt: skip
    names = wanted(environment)
    if args.list:
        print("\n".join(names))
        return
    tags = [f"manylinux_2_{minor}_{args.platform}" for minor in range(39, 16, -1)]
    tags += [f"manylinux2014_{args.platform}"]
    how = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
           "--only-binary=:all:", "--dest", str(args.folder), "--python-version", args.python,
           "--implementation", "cp", *(f"--platform={tag}" for tag in tags)]  # fmt: skip
    left = [name for name in names if subprocess.run([*how, name], check=False, capture_output=True).returncode]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    for name in list(left):  # some have no wheel because they are Python alone: made here, it fits there too
        made = subprocess.run([*build, "--wheel-dir", str(args.folder), name], check=False, capture_output=True)
        if made.returncode == 0:
            left.remove(name)
    wheels = list(args.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 2**20:,.0f} MiB, in {args.folder}")
    for name in left:
        print(f"not to be had: {name}")
    print(
        f"There: python -m pip install --no-index --no-deps {args.folder}/*.whl, or without pip\n"
        f"  (cd {args.folder} && for w in *.whl; do python3 -m zipfile -e $w site; done)\n"
        f"  PYTHONPATH={args.folder}/site python3 benchmarks/gpu_check.py --out runs/gpu-check"
    )


if __name__ == "__main__":
    main()
