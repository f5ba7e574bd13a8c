"""The project's own files: pins that fit the ranges, make targets, CI, the set-up script, what the wheel holds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import instructft

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SETUP = [
    "pyproject.toml",
    "constraints.txt",
    "requirements.lock",
    "scripts/build-constraints.txt",
]  # what .venv is made of


# Pins


def environment(python: str) -> dict[str, str]:
    """What a marker asks, for one Python on Linux."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }


def pins(python: str) -> dict[str, Version]:
    """The pins of constraints.txt that hold for one Python on Linux, by canonical name."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate(environment(python)):
            continue
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        name = canonicalize_name(pin.name)
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = Version(specifier.version)
    return found


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    groups = [group for name, group in extras.items() if name != "vllm"]  # in an environment of its own
    return [Requirement(line) for group in [PROJECT["dependencies"], *groups] for line in group]


def test_extras_that_are_named_exist_and_are_named_where_users_look() -> None:
    """In messages and pages, as `instructft[ui]`; the README lists them all."""
    extras = set(PROJECT["optional-dependencies"])
    assert {"eval", "fp8", "gguf", "liger", "quant", "trackio", "ui", "vllm", "wandb"} <= extras
    pages = [*(ROOT / "instructft").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    for page in pages:
        for named in re.findall(r"instructft\[([a-z0-9,]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, page
    (listed,) = re.findall(r"^Extras: .*?\n\n", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`\[(\w+)\]`", listed)) == extras - {"dev", "docs"}


def test_what_the_code_says_to_install_brings_what_the_code_looks_for() -> None:
    """`instructft[wandb]` for `wandb`, `instructft[liger]` for `liger_kernel`."""
    from instructft.check.doctor import OPTIONAL
    from instructft.recipe.installed import _TRACKERS

    asked = {**OPTIONAL, **{module: source.strip("'") for module, source in _TRACKERS.values()}}
    named = {name: source.split("[")[1].rstrip("]") for name, source in asked.items() if "[" in source}
    assert {"wandb", "trackio", "liger_kernel", "vllm", "gguf"} <= set(named)
    for module, extra in named.items():
        first = Requirement(PROJECT["optional-dependencies"][extra][0]).name
        assert canonicalize_name(first) == canonicalize_name(module), extra


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_within_its_range(python: str) -> None:
    pinned = pins(python)
    checked = 0
    for requirement in requirements():
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin for Python {python}"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} is outside {requirement.specifier}"
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_what_is_pinned_each_with_its_sums(python: str) -> None:
    """All that dev, quant and ui lead to, but torch and what it brings; `sh scripts/lock.sh` writes it."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", "")
    locked = {}
    for line in text.splitlines():
        pin, *sums = line.split("--hash=")
        requirement = Requirement(pin)
        assert sums, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one.strip()) for one in sums), line
        if not requirement.marker or requirement.marker.evaluate(environment(python)):
            (specifier,) = requirement.specifier
            locked[canonicalize_name(requirement.name)] = Version(specifier.version)
    pinned = pins(python)
    assert locked == {name: pinned.get(name) for name in locked}
    assert "torch" not in locked
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"], *extras["quant"], *extras["ui"]]:
        asked = Requirement(line)
        if asked.name != "torch" and (not asked.marker or asked.marker.evaluate(environment(python))):
            assert canonicalize_name(asked.name) in locked, line


def test_nothing_is_missing_of_what_was_installed_without_its_dependencies() -> None:
    """A lock that forgot one would leave a hole: pip was told to add nothing."""
    left, seen = [("instructft", extra) for extra in ("", "dev", "quant", "ui")], set()
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in metadata.requires(name) or ():
            asked = Requirement(line)
            if asked.marker and not asked.marker.evaluate({"extra": extra}):
                continue
            installed = metadata.version(asked.name)
            assert asked.specifier.contains(installed, prereleases=True), f"{name} asks for {asked}: {installed}"
            left += [(asked.name, more) for more in {"", *asked.extras}]
    assert len(seen) > 80


def test_what_the_package_imports_is_declared() -> None:
    """Not only brought along by another package, which may stop to."""
    names = {"ruamel": "ruamel-yaml", "markdown_it": "markdown-it-py"}
    asked = {"vllm", "triton"}  # not on every machine: `vllm_backend` says how to get it; torch for CUDA brings triton
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    imported: dict[str, Path] = {}
    for path in (ROOT / "instructft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found = [node.module]
            imported |= {name.split(".")[0]: path for name in found}
    assert len(imported) > 40
    for name, path in imported.items():
        if name not in sys.stdlib_module_names | asked | {"instructft"}:
            assert canonicalize_name(names.get(name, name)) in declared, f"{name}, in {path.name}"


def test_pins_fit_every_build_of_torch() -> None:
    assert all(not version.local for python in PYTHONS for version in pins(python).values())


def test_python_range_is_the_one_that_is_pinned() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [v for v in (f"3.{minor}" for minor in range(8, 18)) if Version(v) in supported] == PYTHONS


# Make and CI


def test_make_has_the_targets_and_lists_them() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make")
    listed = subprocess.run([make, "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in [
        "quickstart",
        "test",
        "test-latest",
        "lint",
        "types",
        "docs",
        "battery",
        "gpu-check",
        "bench-gpu",
        "gpu-wheels",
        "sbom",
        "venv",
        "clean",
        "help",
    ]:
        assert re.search(rf"^make {target} +\S", listed, re.M), target
        subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True, check=True)


def test_ci_runs_everything_and_swallows_no_failure() -> None:
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    text = ci.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert not re.search(r"\|\|\s*(true|:)", text)
    for target in ["lint", "types", "test", "real-assets", "real"]:
        assert re.search(rf"make {target}\b", text)


MAKE = """#!/bin/sh
echo "$@: $(pwd -P): $(ls -A ..): $(ls -A): $(git log --format=%s)" >>"$CALLS"
[ "$1" != test ] && [ "$1" != real-assets ] || echo "$TESTED"
[ "$1" != "$BREAKS" ] || exit 2
"""


@pytest.mark.parametrize(
    ("breaks", "tested", "code"),
    [
        ("", "12 passed", 0),
        ("", "3 skipped", 1),
        ("lint", "12 passed", 2),
        ("test", "12 passed", 2),
        ("real-assets", "12 passed\nnot to be had: a model", 0),  # no network: said, and no failure
        ("real-assets", "12 passed\nTraceback", 1),
        ("real", "12 passed", 2),
    ],
)
def test_ci_works_in_a_clone_that_lies_alone(tmp_path: Path, breaks: str, tested: str, code: int) -> None:
    """With a stand-in for make, in a repository of which one file is committed."""
    git, bash = shutil.which("git"), shutil.which("bash")
    if git is None or bash is None:
        pytest.skip("no git or no bash")
    checkout, bin, calls = tmp_path / "checkout", tmp_path / "bin", tmp_path / "calls"
    for folder in (checkout / ".ci", checkout / "scripts", bin, tmp_path / "temporary"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    for name in ("browser.sh", "axe.sh"):  # one that cannot be had is said, and nothing more
        (checkout / "scripts" / name).write_text("exit 1\n")
    (bin / "make").write_text(MAKE)
    (bin / "make").chmod(0o755)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        named = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run([git, *named, *command], cwd=checkout, check=True)
    (checkout / "not-committed").touch()
    done = subprocess.run(
        [bash, str(checkout / ".ci" / "run")],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "temporary"),
             "CALLS": str(calls), "BREAKS": breaks, "TESTED": tested},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if breaks != "lint":
        assert [line.split(":")[0] for line in done.stdout.splitlines()[:2]] == ["No browser", "No axe-core"]
    lines = calls.read_text().replace("\n", " ").split("first")[:-1]
    targets = ["venv", "lint", "types", "test", "real-assets", "real"]
    last = "test" if "skipped" in tested else breaks
    assert [line.split(":")[0].strip() for line in lines] == targets[: targets.index(last) + 1 if last else None]
    assert ("make real was not run" in done.stdout) == ("not to be had" in tested)
    for line in lines:
        _, place, beside, inside, _ = line.split(": ")
        assert place.startswith(str((tmp_path / "temporary").resolve()))
        assert beside == Path(place).name
        assert sorted(inside.split()) == [".ci", ".git", "scripts"]
    assert not list((tmp_path / "temporary").iterdir())


# The set-up script, with stand-ins for Python that install nothing

FAKE_PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$1 $2" in
  '-c import sys;'*) echo {version} ;;
  '-c import ensurepip, venv') exit {no_venv} ;;
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip') [ -z "$PIP_BREAKS" ] || [ "$3" != install ] || exit 1 ;;
esac
"""


class Checkout:
    """A copy of the files that the set-up reads, and a PATH whose Pythons are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        self.bin.mkdir()
        for name in [*SETUP, "scripts/venv.sh", "instructft/version.py"]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for tool in ["dirname", "cat", "cksum", "grep", "date", "tail", "touch", "mkdir", "rm", "cp"]:
            path = shutil.which(tool)
            assert path
            (self.bin / tool).symlink_to(path)

    def python(self, name: str, version: str, no_venv: int = 0) -> None:
        (self.bin / name).write_text(FAKE_PYTHON.format(version=version, no_venv=no_venv))
        (self.bin / name).chmod(0o755)

    def setup(self, *which: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        env = {"PATH": str(self.bin), "CALLS": str(self.calls), "PIP_BREAKS": "", **env}
        return subprocess.run(
            ["/bin/sh", "scripts/venv.sh", *which], cwd=self.root, env=env, capture_output=True, text=True, timeout=60
        )

    def made_anew(self) -> bool:
        return "-m venv" in self.calls.read_text()

    def installed(self) -> bool:
        return "-m pip install" in self.calls.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if not Path("/bin/sh").exists():
        pytest.skip("no POSIX shell")
    return Checkout(tmp_path)


def test_setup_happens_once(checkout: Checkout) -> None:
    checkout.python("python3", "3.12.1")
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert checkout.made_anew()
    assert checkout.installed()
    calls = checkout.calls.read_text()
    assert "-c constraints.txt torch" in calls
    assert "--no-deps --require-hashes -r requirements.lock" in calls
    second = checkout.setup()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert not checkout.made_anew()
    assert not checkout.installed()


def test_a_setup_from_an_index_with_builds_of_its_own(checkout: Checkout) -> None:
    checkout.python("python3", "3.12.1")
    assert checkout.setup(NO_HASHES="1").returncode == 0
    calls = checkout.calls.read_text()
    assert "-c constraints.txt -e" in calls
    assert "hashes" not in calls


def test_the_newest_is_installed_beside_the_pinned_on_the_same_torch(checkout: Checkout) -> None:
    checkout.python("python3", "3.12.1")
    assert checkout.setup().returncode == 0
    result = checkout.setup("latest")
    assert result.returncode == 0, result.stderr
    assert checkout.made_anew()
    calls = checkout.calls.read_text()
    assert "constraints.txt" not in calls
    assert "--upgrade --upgrade-strategy eager -c .venv-latest/torch.txt -e" in calls
    (pin,) = (checkout.root / ".venv-latest" / "torch.txt").read_text().splitlines()
    assert Version(pin.removeprefix("torch==")) == pins("3.12")["torch"]
    for which in ([], ["latest"]):  # neither disturbs the other
        assert checkout.setup(*which).stdout == ""
    stamp = checkout.root / ".venv-latest" / ".stamp"
    stamp.write_text(re.sub(r"\d{4}-\d\d-\d\d", "2020-02-02", stamp.read_text()))
    checkout.setup("latest")
    assert checkout.installed()  # another day
    assert not checkout.made_anew()
    assert checkout.setup("newest").returncode == 2


@pytest.mark.parametrize("changed", SETUP)
def test_a_changed_dependency_is_installed_into_the_same_environment(checkout: Checkout, changed: str) -> None:
    checkout.python("python3", "3.12.1")
    checkout.setup()
    with (checkout.root / changed).open("a") as file:
        file.write("# changed\n")
    assert checkout.setup().returncode == 0
    assert checkout.installed()
    assert not checkout.made_anew()
    checkout.setup()
    assert not checkout.installed()


def test_an_unfinished_setup_starts_from_nothing(checkout: Checkout) -> None:
    checkout.python("python3", "3.12.1")
    broken = checkout.setup(PIP_BREAKS="1")
    assert broken.returncode == 1
    assert "failed after" in broken.stderr
    assert "install.log" in broken.stderr
    (checkout.root / ".venv" / "half-copied").touch()
    assert checkout.setup().returncode == 0
    assert checkout.made_anew()
    assert not (checkout.root / ".venv" / "half-copied").exists()


def test_an_environment_copied_from_elsewhere_is_made_anew(checkout: Checkout) -> None:
    checkout.python("python3", "3.12.1")
    checkout.setup()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert checkout.setup().returncode == 0
    assert checkout.made_anew()


def test_the_first_python_that_fits_and_runs_is_taken(checkout: Checkout) -> None:
    checkout.python("python3", "3.14.0")
    (checkout.bin / "python3.12").write_text("#!/bin/sh\nexit 127\n")  # a version manager's shim for what is not there
    (checkout.bin / "python3.12").chmod(0o755)
    checkout.python("python3.11", "3.11.7", no_venv=1)
    checkout.python("python3.13", "3.13.0")
    assert checkout.setup().returncode == 0
    assert "3.13.0" in (checkout.root / ".venv/bin/python").read_text()


def test_no_python_that_fits(checkout: Checkout) -> None:
    checkout.python("python3", "3.9.2")
    result = checkout.setup()
    assert result.returncode == 1
    assert "No Python 3.10 to 3.13 found; found python3 (3.9.2)." in result.stderr
    assert not (checkout.root / ".venv").exists()
    assert "looked for python3.99" in checkout.setup(PYTHON="python3.99").stderr


def test_no_venv_module(checkout: Checkout) -> None:
    checkout.python("python3", "3.11.2", no_venv=1)
    result = checkout.setup()
    assert result.returncode == 1
    assert "python3 (3.11.2)" in result.stderr
    assert "apt install python3-venv" in result.stderr


# What is shipped


def test_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_wheel_holds_all_that_the_package_reads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"instructft-{instructft.__version__}-py3-")
    names = set(zipfile.ZipFile(wheel).namelist())

    def files(folder: str) -> set[str]:
        found = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {path.relative_to(ROOT).as_posix() for path in found}

    code, recipes = files("instructft"), files("recipes")
    assert "instructft/prompt/jinja/instruction.jinja" in code
    assert "instructft/recipe/sft_config_fields.json" in code
    assert "recipes/quickstart.yaml" in recipes
    assert "instructft/py.typed" in names  # so that type checkers of other projects read our annotations
    assert code | {f"instructft/{name}" for name in recipes} <= names
    assert {f"instructft/{name}" for name in files("docs") if name.endswith(".md")} <= names  # for `instructft docs`
    assert not any(name.startswith(("tests/", "benchmarks/", "recipes/", "docs/")) for name in names)
