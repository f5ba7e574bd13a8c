"""What all tests share: no network, tiny models, a tokenizer that is made in the process, and the CPU or one GPU."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.device import DEVICE, ON_GPU, here

# The address of the Hub that the fixture `hub` starts: kept for this process, because the libraries read it at import.
# Bound and not listening: outside of such a test it is refused.
HUB_ADDRESS = socket.socket()
HUB_ADDRESS.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
HUB_ADDRESS.bind(("127.0.0.1", 0))

# Said before any library reads it at import: caches of this session's own, no telemetry, threads that do not spin, and
# no token or cache of whoever runs the tests.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="instructft-tests-")
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_ADDRESS.getsockname()[1]}"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
for _mine in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_mine, None)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it brings
if ON_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums in one order, so that runs can be compared
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests whatever the machine has
os.environ["COLUMNS"] = "120"
os.environ.pop("INSTRUCTFT_TRACEBACK", None)

BATTERY = int(os.environ.get("INSTRUCTFT_KILLS", "0")) > 3  # `make battery`: the same tests with larger counts


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: what waits for other processes, and for clocks, leaves a fifth of them idle."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable + 1


def pytest_configure() -> None:
    """On a GPU: it has to be there, and sums are made in one order where there are kernels for that."""
    if ON_GPU:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(f"INSTRUCTFT_TEST_DEVICE: found {DEVICE}, and torch sees no such device here")
        torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what is marked `battery` to `make battery`."""
    if not BATTERY:
        for item in items:
            if item.get_closest_marker("battery"):
                item.add_marker(pytest.mark.skip(reason="make battery runs it"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Draw curves where a test is marked `drawn` alone: they are half of the time of a tiny run.

    A hook, since a fixture of one test comes after those that a whole module shares, which train.
    """
    draw_curves(item.get_closest_marker("drawn") is not None)


def draw_curves(drawn: bool) -> None:
    """Whether runs draw their curves, from here to the next test."""
    from instructft.report import curves, page

    for module, name, instead in (
        (curves, "plot_loss", lambda *_: []),
        (page, "chart", lambda *_: None),
        (page, "bars", lambda title, *_: curves.Chart(title, "", "", [], [], [])),
    ):
        real = _DRAWS.setdefault(name, getattr(module, name))
        setattr(module, name, real if drawn else instead)


_DRAWS: dict[str, Any] = {}  # what draws, as the package has it
_FROZEN = [len(sys.modules)]  # modules that were there when the collector was last told to pass them over


def pytest_runtest_teardown() -> None:
    """Keep the garbage collector from going over torch and its kin again and again: accelerate asks for a full
    collection in every run, which takes a third of a second with a million objects of modules alone."""
    if len(sys.modules) > _FROZEN[0] + 300:
        _FROZEN[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


# For `accelerate launch` on one machine: torch's `--standalone`, whose store binds port 0 and keeps what it got.
# Without it two launches at a time both find port 29500 free, and the second that binds it dies.
OWN_PORT = {"PET_STANDALONE": "1"}

REPO = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "assets"
GPT2 = DATA / "gpt2"  # the real tokenizer
ROWS = DATA / "rows.json"  # Alpaca's shape


@pytest.fixture(scope="session")
def bare_tokenizer() -> Callable[[], Any]:
    """Makes a GPT-2 tokenizer whose pad token is its EOS."""

    def make() -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(GPT2)
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    return make


@pytest.fixture(scope="session")
def device() -> str:
    """The device on which the tests have their models: cpu or cuda."""
    return DEVICE


@pytest.fixture
def tokenizer() -> Any:
    """The bundled tokenizer with the template `instruction`."""
    from instructft.prompt.templates import TEMPLATES
    from tests.helpers.quickstart import tokenizer

    made = tokenizer()
    made.chat_template = TEMPLATES["instruction"].text()
    return made


@pytest.fixture
def tiny_model(tokenizer: Any) -> Any:
    """A random GPT-2 of 2 layers × 32 with 128 positions, and the vocabulary of `tokenizer`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config).eval().to(DEVICE)


TINY = """
model:
  config: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 128}
  tokenizer: quickstart
data:
  datasets: [{name: quickstart, rows: 120}]
  template: instruction
  max_length: 128
  splits: {validation: 0.1, test: 0.1}
train:
  max_steps: 4
  per_device_train_batch_size: 4
  logging_steps: 1
  use_cpu: true
"""


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe file (a tiny one unless given) whose run folder lies in `tmp_path`."""

    def write(text: str = TINY, name: str = "tiny.yaml") -> Path:
        path = tmp_path / name
        if "output_dir" not in text:
            text = f"{text}\noutput_dir: {tmp_path / 'run'}\n"
        path.write_text(here(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def moved_run(write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A run folder with the model that its recipe starts from, a little moved."""
    import torch

    import instructft

    recipe = instructft.load_recipe(write_recipe())
    tokenizer = instructft.load_tokenizer(recipe)
    model = instructft.load_model(recipe, tokenizer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture(params=[True, False], ids=["avx512_bf16", "no avx512_bf16"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On either kind of CPU: bitsandbytes' 4-bit layers that are made here believe that AVX-512 BF16 is there, or not.

    Where it is, they would lay their weights out anew in evaluation mode (`quantization.fix_layout`).
    """
    pytest.importorskip("bitsandbytes")
    if ON_GPU and not request.param:
        pytest.skip("is the same on a GPU")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A fresh Hub (`tests/hub.py`) that this process reaches too: online for this test, with caches of its own.

    Child processes get `os.environ` as it is in the test, or `hub.environment(folder)` for a machine of their own.
    """
    import datasets.config  # now: imported later in the test, it would copy "online" for the rest of the session
    import datasets.utils._dataset_viewer as viewer
    from huggingface_hub import HfFileSystem, close_session, constants
    from huggingface_hub.utils import _cache_assets, _cache_manager

    from tests.helpers.hub import LocalHub

    home = tmp_path / "hf"
    started = LocalHub(HUB_ADDRESS.getsockname()[1])
    assert started.url == constants.ENDPOINT, "huggingface_hub was imported before tests/conftest.py named the address"
    for name, value in started.environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setattr(datasets.config, name, False)

    # Every place that copied a folder's name at import.
    hub_cache, assets = str(home / "hub"), str(home / "assets")
    for module, name, folder in (
        (constants, "HF_HOME", str(home)),
        (constants, "HF_HUB_CACHE", hub_cache),
        (constants, "HUGGINGFACE_HUB_CACHE", hub_cache),
        (constants, "HF_ASSETS_CACHE", assets),
        (constants, "HF_TOKEN_PATH", str(home / "token")),
        (constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens")),
        (_cache_manager, "HF_HUB_CACHE", hub_cache),
        (_cache_assets, "HF_ASSETS_CACHE", assets),
        (datasets.config, "HF_CACHE_HOME", str(home)),
        (datasets.config, "HF_DATASETS_CACHE", home / "datasets"),
        (datasets.config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads"),
        (datasets.config, "EXTRACTED_DATASETS_PATH", home / "datasets" / "downloads" / "extracted"),
    ):
        monkeypatch.setattr(module, name, folder)

    # The real one answers at `datasets-server.<endpoint>`, which no resolver knows: "none there", without asking.
    def none_there(*_: Any, **__: Any) -> None:
        raise viewer.DatasetViewerError("the tests have no dataset viewer")

    monkeypatch.setattr(viewer, "get_exported_parquet_files", none_there)
    monkeypatch.setattr(viewer, "get_exported_dataset_infos", none_there)

    def forget() -> None:
        close_session()  # its kept-alive connections lead to a Hub that is gone
        HfFileSystem.clear_instance_cache()  # one instance per endpoint, with the listings of the test before

    forget()
    try:
        yield started
    finally:
        forget()
        started.close()
    assert not started.errors, "\n".join(started.errors)
