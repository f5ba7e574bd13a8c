"""What `make real` shares: the model, the rows, one tuned and merged model, and the file that figures are noted in."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

import instructft
from instructft.merging import comparison

HERE = Path(__file__).parent
REAL = os.environ.get("INSTRUCTFT_REAL")
collect_ignore_glob = [] if REAL else ["test_*.py"]  # only `make real` has fetched what they need

# The LoRA run that most tests look at, and what `held_out` reads of it.
TUNED = (
    "train.max_steps=8", "train.learning_rate=5e-4", "train.train_sampling_strategy=random",
    "train.eval_strategy=steps", "train.eval_steps=8", "train.eval_on_start=true",
)  # fmt: skip


# The order of the files, those that take longest first, so that no worker ends long before the other.
LONG = ("served", "batches", "qlora", "before_training", "gate", "full_model", "trl", "adapter", "vocabularies")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files by `LONG`; what other folders hold stays where it is, behind them."""
    place = {f"test_{name}": at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)) if item.path.parent == HERE else len(place))


@pytest.fixture(scope="session", autouse=True)
def short_answers() -> Iterator[None]:
    """Answers that a merge is proved with: a few tokens, since each is a pass over all weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "ANSWER", 8)
        yield


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of what `scripts/real_assets.py` fetched."""
    assert REAL is not None
    return Path(REAL)


@pytest.fixture(scope="session")
def smollm(real: Path) -> Path:
    """SmolLM2-135M-Instruct, as `from_pretrained` loads it."""
    return real / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def rows(real: Path) -> list[dict[str, str]]:
    """Real instruction rows in Alpaca's shape, shortest first."""
    found: list[dict[str, str]] = json.loads((real / "rows.json").read_text(encoding="utf-8"))
    return sorted(found, key=lambda row: len("".join(row.values())))


@pytest.fixture
def note(real: Path, request: pytest.FixtureRequest) -> Callable[[str, str, str], None]:
    """Note a figure: the promise, what was done, what came out."""
    long = any("make battery" in mark.kwargs["reason"] for mark in request.node.iter_markers("skipif"))
    return functools.partial(_note, real / "figures.jsonl", long)


@pytest.fixture
def note_long(real: Path) -> Callable[[str, str, str], None]:
    """The same for a figure that the battery alone makes, of a test that is shorter without it."""
    return functools.partial(_note, real / "figures.jsonl", True)


def _note(path: Path, long: bool, promise: str, how: str, figure: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"promise": promise, "how": how, "figure": figure, "battery": long}) + "\n")


@pytest.fixture(scope="session")
def recipe_of(smollm: Path, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A recipe on the real model and on the short rows of the real set; `settings` are merged into its sections."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "rows.json").write_text(json.dumps(rows[:200]), encoding="utf-8")

    def make(name: str, *overrides: str) -> Any:
        path = folder / f"{name}.yaml"
        path.write_text(
            f"model: {{name_or_path: {smollm}}}\n"
            f"data: {{datasets: [{{path: {folder / 'rows.json'}}}], max_length: 128, splits: {{validation: 0.1}}}}\n"
            "adapter: {type: lora, r: 16, alpha: 32, dropout: 0.0}\n"
            "train: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 2e-4, warmup_steps: 0,\n"
            "        use_cpu: true, report_to: none, eval_strategy: 'no', save_strategy: 'no', logging_steps: 1}\n"
            f"output_dir: {folder / name}\n",
            encoding="utf-8",
        )
        return instructft.load_recipe(path, list(overrides))

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that the workers of a session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


def once(folder: Path, make: Callable[[], object]) -> Path:
    """What the first worker that wants it makes in a folder, while the others wait."""
    made = folder.with_name(f"{folder.name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            make()
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tuned(recipe_of: Any, shared: Path) -> Path:
    """A LoRA run on the short rows, of 8 steps; not to be written into, since other tests read it."""
    recipe = recipe_of("tuned", *TUNED, f"output_dir={shared / 'tuned'}")
    return once(shared / "tuned", lambda: instructft.train(recipe, console=Console(quiet=True)))


@pytest.fixture(scope="session")
def merged(tuned: Path, shared: Path) -> Path:
    """The same merged into its base, with the recipe that says which rows were held out."""

    def make() -> None:
        instructft.merge_adapter(tuned, shared / "merged", console=Console(quiet=True))
        shutil.copy(tuned / "recipe.yaml", shared / "merged")

    return once(shared / "merged", make)


def held_out(run: Path) -> tuple[float, float]:
    """The validation loss before the first step and after the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return losses[0], losses[-1]


def noted_costs(proof: Any, what: str, note: Any) -> dict[tuple[str, str], Any]:
    """A line for each dtype and rounding of a proof's table."""
    costs = {(row["dtype"], row["rounding"]): row for row in proof["costs"]}
    for (dtype, rounding), row in costs.items():
        figure = f"KL {row['kl']:.1e}, top-1 {row['top1']:.1%}, loss {row['loss']:.4f}, {row['vanished']:.0%} vanished"
        note(what, f"{dtype}, {rounding}", figure)
    return costs


def differs_in_plain_transformers(folder: Path) -> float:
    """The largest difference of a logit between `from_pretrained` and this package, of what lies in a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = instructft.Chat(str(folder)).generator.model.float().eval()
    ids = torch.arange(100, 164)[None]
    with torch.inference_mode():
        return float((plain(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max())
