"""`instructft doctor`: what this machine has and lacks, to be pasted into a bug report; nothing private is in it.

What a library says of itself is often wrong: attention and quantization are tried, on a tensor, in a process of its
own that may crash or hang. Homes, user names, tokens and the machine's name are taken out.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from instructft.formatting import first_line, memory_size, short, size
from instructft.redaction import bare_url, environment_secrets, redact, without_roots
from instructft.version import __version__

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "huggingface_hub")
# Packages that a run may ask for -> what gets them.
OPTIONAL = {
    "bitsandbytes": "instructft[quant]", "torchao": "instructft[fp8]", "gradio": "instructft[ui]",
    "lm_eval": "instructft[eval]", "gguf": "instructft[gguf]", "flash_attn": "flash-attn --no-build-isolation",
    "liger_kernel": "instructft[liger]", "deepspeed": "deepspeed", "vllm": "instructft[vllm]",
    "wandb": "instructft[wandb]", "trackio": "instructft[trackio]", "mlflow": "mlflow",
}  # fmt: skip
# Of the environment, what changes a run; of any other variable nothing is told.
VARIABLES = (
    "ACCELERATE_USE_FSDP", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HUB_DISABLE_XET",
    "HF_HUB_OFFLINE", "MKL_NUM_THREADS", "NCCL_DEBUG", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_OFFLINE",
)  # fmt: skip
PATIENCE = 90.0  # seconds for each trial; the first one loads torch and transformers
TRIALS = ("device", "bf16", "eager", "sdpa", "flash_attention_2", "flex_attention", "varlen", "4bit", "8bit", "fp8")
_MARK = "instructft doctor: "  # before a result, since libraries print too
WORKS = "works"


def examine(patience: float = PATIENCE) -> Iterator[tuple[str, Any]]:
    """What there is, a subject after the other; the trials come last and take seconds.

    Example::

        dict(examine())["attention"]
        # {'eager': 'works', 'sdpa': 'works', 'flash_attention_2': 'FlashAttention2 … not installed', …}
    """
    yield "instructft", {"version": __version__, "python": platform.python_version(), "system": platform.platform()}
    yield "versions", {name: _version(name) or "not installed" for name in LIBRARIES}
    yield "machine", machine()
    yield "driver", driver()
    yield "environment", environment()
    yield "optional", {name: version for name in OPTIONAL if (version := _version(name))}
    yield "missing", {name: f"pip install {typed}" for name, typed in pip_lines().items()}
    found = dict(try_all(TRIALS, patience))
    yield "device", found["device"]
    yield "precision", {"bfloat16": found["bf16"]}
    yield "attention", {name: found[name] for name in TRIALS[2:7]}
    yield "quantization", {name: found[name] for name in TRIALS[7:]}


def doctor(*, as_json: bool = False, patience: float = PATIENCE) -> None:
    """Print what `examine` finds: text to paste, or one JSON object."""
    private = _private()
    if as_json:
        print(json.dumps(private(dict(examine(patience))), indent=2, ensure_ascii=False))
        return
    for subject, found in examine(patience):
        for line in _said(subject, private(found)):
            print(line, flush=True)
        if subject == "missing":
            print("trying attention and quantization …", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# What can be told without torch
# --------------------------------------------------------------------------------------------------------------------


def _version(name: str) -> str:
    """The version of a package that is installed, without importing it."""
    for spelled in (name, name.replace("_", "-")):
        try:
            return metadata.version(spelled)
        except metadata.PackageNotFoundError:
            continue
    return ""


def pip_lines() -> dict[str, str]:
    """Package that is missing -> what pip is to install, quoted for a shell."""
    missing = {name: source for name, source in OPTIONAL.items() if not _version(name)}
    return {name: f"'{source}'" if "[" in source else source for name, source in missing.items()}


def machine() -> dict[str, Any]:
    """Processor, memory and disk."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    while not cache.is_dir() and cache != cache.parent:
        cache = cache.parent
    return {
        "processor": _processor(),
        "cores": cores,
        "memory": memory.total,
        "memory_free": memory.available,
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "cache_free": shutil.disk_usage(cache).free,
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except (OSError, ValueError):
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def driver() -> dict[str, str]:
    """NVIDIA's driver and the cards that it knows, as nvidia-smi says it; empty where there is none."""
    asked = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"trouble": short(done.stdout + done.stderr, 200)}
    cards = [line.partition(", ")[2] for line in lines]
    counted = [f"{cards.count(card)} × {card}" for card in dict.fromkeys(cards)]
    return {"version": lines[0].partition(", ")[0], "cards": "; ".join(counted)}


def environment() -> dict[str, str]:
    """The variables that change a run, and of the token only whether there is one."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if "HF_ENDPOINT" in found:
        found["HF_ENDPOINT"] = bare_url(found["HF_ENDPOINT"])
    return {**found, **({"HF_TOKEN": "set"} if os.environ.get("HF_TOKEN") else {})}


# --------------------------------------------------------------------------------------------------------------------
# What is tried, in a process of its own
# --------------------------------------------------------------------------------------------------------------------


def try_all(names: tuple[str, ...], patience: float) -> Iterator[tuple[str, Any]]:
    """Each trial with what came of it; one that crashes or hangs costs the others nothing but a new process."""
    left = list(names)
    while left:
        for name, found in _one_process(tuple(left), patience):
            left.remove(name)
            yield name, found


def _one_process(names: tuple[str, ...], patience: float) -> Iterator[tuple[str, Any]]:
    """Results of trials in one process, up to the first that ends it; that one's result is how."""
    code = "import sys; from instructft.check.doctor import report_trials; report_trials(sys.argv[1:])"
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *names],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=quiet,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    assert child.stdout is not None
    assert child.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(child.stdout, lines.put, lambda: lines.put(None)), daemon=True),
        threading.Thread(target=_read, args=(child.stderr, errors.append, lambda: None), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        for name in names:
            try:
                while (line := lines.get(timeout=patience)) is not None and not line.startswith(_MARK):
                    pass
            except queue.Empty:
                yield name, f"no answer within {patience:.0f} s"
                return
            if line is None:
                yield name, _how_it_ended(child, errors, readers[1])
                return
            yield name, json.loads(line.removeprefix(_MARK))
    finally:
        child.kill()
        child.wait()


def _read(stream: Any, take: Callable[[str], object], end: Callable[[], object]) -> None:
    for line in stream:
        take(line)
    end()


def _how_it_ended(child: subprocess.Popen[str], errors: list[str], reader: threading.Thread) -> str:
    code = child.wait()
    reader.join(timeout=5)
    last = next((line.strip() for line in reversed(errors) if line.strip()), "")
    ended = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
    return short(f"{ended}: {last}" if last else ended, 300)


def report_trials(names: list[str]) -> None:
    """In the process of its own: a result a line, as soon as it is known."""
    for name in names:
        found: Any
        try:
            found = trial(name)
        except Exception as error:  # of any library
            found = short(f"{type(error).__name__}: {first_line(error)}", 300)
        print(f"\n{_MARK}{json.dumps(found)}", flush=True)


def trial(name: str) -> Any:
    """Try one thing here: `works`, or why it does not; of `device` what there is."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "device":
        return _device(where)
    if name == "bf16":
        numbers = torch.ones(8, 8, device=where, dtype=torch.bfloat16)
        if where == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "emulated: this card has no bfloat16 of its own"
        return WORKS if float((numbers @ numbers).sum()) == 512.0 else "gives wrong numbers"
    if name in ("4bit", "8bit"):
        return _quantized(name, where)
    if name == "fp8":
        return _fp8(where)
    if name == "varlen":
        return _varlen(where)
    return _attention(name, where)


def _device(where: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"type": where, "torch": torch.__version__, "cuda": torch.version.cuda, "cards": []}
    for index in range(torch.cuda.device_count() if where == "cuda" else 0):
        card = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        capability = f"{card.major}.{card.minor}"
        found["cards"].append(
            {"name": card.name, "memory": card.total_memory, "memory_free": free, "capability": capability}
        )
    return found


def _attention(name: str, where: str) -> str:
    """A step of a tiny model: the way forward and back."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape: dict[str, int] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 32}
    config = LlamaConfig(**shape, num_hidden_layers=1, num_key_value_heads=2, max_position_embeddings=32)
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype, trust_remote_code=False).to(
        where
    )
    ids = torch.arange(16, device=where)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return WORKS if bool(torch.isfinite(loss)) else "gives what is no number"


def _varlen(where: str) -> str:
    from instructft.models.kernels.varlen import varlen_attn

    if where != "cuda":
        return "needs a GPU; packs are attended to by their masks here"
    if varlen_attn is None:
        return "this torch has no torch.nn.attention.varlen (2.10 or newer has)"
    import torch

    row = torch.ones(8, 2, 64, device=where, dtype=torch.bfloat16, requires_grad=True)
    borders = torch.tensor([0, 3, 8], device=where, dtype=torch.int32)
    found = varlen_attn(row, row, row, borders, borders, 5, 5)
    found.sum().backward()
    return WORKS if bool(torch.isfinite(found).all()) else "gives what is no number"


def _quantized(name: str, where: str) -> str:
    """A small matrix there and back, and a step through a quantized layer."""
    import torch

    from instructft.adapters.quantization import trouble_with

    if trouble := trouble_with(where, name):
        return trouble
    import bitsandbytes as bnb

    kind = bnb.nn.Linear4bit if name == "4bit" else bnb.nn.Linear8bitLt
    more: dict[str, Any] = {"quant_type": "nf4"} if name == "4bit" else {"has_fp16_weights": False}
    layer = kind(64, 64, bias=False, **more).to(where)
    given = torch.ones(2, 64, device=where, dtype=torch.float16 if where == "cuda" else torch.float32)
    given.requires_grad_(True)
    layer(given).float().sum().backward()
    return WORKS if given.grad is not None and bool(torch.isfinite(given.grad).all()) else "gives what is no number"


def _fp8(where: str) -> str:
    import torch

    if where == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        return "this card has no products of 8-bit floats (from compute capability 8.9)"
    if not _version("torchao"):
        return "torchao is not installed"
    if where != "cuda":
        return "emulated here: slow, to try a recipe"
    import torchao.float8

    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, device=where, dtype=torch.bfloat16))
    torchao.float8.convert_to_float8_training(layer)
    given = torch.ones(32, 64, device=where, dtype=torch.bfloat16, requires_grad=True)
    layer(given).sum().backward()
    return WORKS


# --------------------------------------------------------------------------------------------------------------------
# As it is told
# --------------------------------------------------------------------------------------------------------------------


def _private() -> Callable[[Any], Any]:
    """Takes out of what is told the folders, the names and the secrets of this machine."""
    secrets = environment_secrets()
    names = {platform.node(), platform.node().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name
        names.add(getpass.getuser())
    own = [name for name in names if len(name) > 2 and name not in ("root", "localhost")]
    folders = [Path(sys.prefix), Path(sys.base_prefix)]

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        if not isinstance(value, str):
            return value
        text = redact(without_roots(value, folders))
        for secret in secrets:
            text = text.replace(secret, "…")
        for name in own:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "…", text)
        return text

    return clean


def _said(subject: str, found: Any) -> Iterator[str]:
    """The lines of a subject."""
    if subject == "instructft":
        yield f"instructft {found['version']} · Python {found['python']} · {found['system']}"
    elif subject == "versions":
        yield from _wrapped("libraries", [f"{name} {version}" for name, version in found.items()])
    elif subject == "machine":
        yield f"{'processor':13}{found['processor']}, {found['cores']} cores"
        yield f"{'memory':13}{memory_size(found['memory'])}, {memory_size(found['memory_free'])} free"
        yield f"{'disk':13}{size(found['disk_free'])} free here, {size(found['cache_free'])} in the cache of the Hub"
    elif subject == "driver" and found:
        told = found.get("trouble") or f"{found['version']}, {found['cards']}"
        yield f"{'driver':13}{told}"
    elif subject == "environment" and found:
        yield from _wrapped("environment", [f"{name}={value}" for name, value in found.items()])
    elif subject == "optional" and found:
        yield from _wrapped("also here", [f"{name} {version}" for name, version in found.items()])
    elif subject == "missing" and found:
        yield from _listed("not here", found)
    elif subject == "device":
        yield from _device_lines(found)
    elif subject in ("precision", "attention", "quantization"):
        yield from _listed(subject, found)


def _device_lines(found: Any) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{'device':13}torch could not be asked: {found}"
        return
    built = f"built for CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
    yield f"{'device':13}{found['type']} (torch {found['torch']}, {built})"
    for card in found["cards"]:
        memory = f"{memory_size(card['memory'])}, {memory_size(card['memory_free'])} free"
        yield f"{'':13}{card['name']}, {memory}, compute capability {card['capability']}"


def _listed(title: str, found: dict[str, Any]) -> Iterator[str]:
    width = max(map(len, found))
    for at, (name, what) in enumerate(found.items()):
        yield f"{'' if at else title:13}{name:{width}}  {what}"


def _wrapped(title: str, parts: list[str], width: int = 100) -> Iterator[str]:
    """Parts between dots, over as many lines as they need."""
    line = ""
    for part in parts:
        if line and len(line) + len(part) + 3 > width - 13:
            yield f"{title:13}{line}"
            title, line = "", ""
        line = f"{line} · {part}" if line else part
    yield f"{title:13}{line}"
