"""What all tests share: no network, no GPU, tiny models, and a tokenizer that is made in the process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Said before any library reads it at import: caches of this session's own, no telemetry, threads that do not spin.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="instructft-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["COLUMNS"] = "120"
os.environ.pop("INSTRUCTFT_TRACEBACK", None)

import pytest

REPO = Path(__file__).resolve().parent.parent
REAL_DATA = REPO.parent / "shared" / "data"  # real rows and the real GPT-2 tokenizer, where they are at hand


@pytest.fixture(scope="session")
def bare_tokenizer() -> Callable[[], Any]:
    """Makes a GPT-2-like tokenizer whose pad token is its EOS: the real one where it is at hand."""

    def make() -> Any:
        if (REAL_DATA / "gpt2-tokenizer").is_dir():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(REAL_DATA / "gpt2-tokenizer")
        else:
            from instructft.quickstart import tokenizer as bundled

            tokenizer = bundled()
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    return make


@pytest.fixture
def tokenizer() -> Any:
    """The bundled tokenizer with the template `instruction`."""
    from instructft.quickstart import tokenizer
    from instructft.templates import TEMPLATES

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
    return GPT2LMHeadModel(config).eval()


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
        path.write_text(text, encoding="utf-8")
        return path

    return write
