"""Answers through vLLM: it is given our prompt ids, stop tokens and adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from instructft.errors import UsageError
from instructft.inference.generate_file import generate_file
from tests.helpers.inference import (
    ASKED,
    ROWS,
    read,
    write,
)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in with vLLM's names, which answers each prompt with its length in sevens; what it was given."""
    import types

    calls: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, model: str, **options: Any):
            calls.append({"model": model, **options})

        def generate(
            self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, lora_request: Any = None
        ) -> list[Any]:
            calls.append({"prompts": prompts, "sampling": sampling_params, "lora": lora_request})
            out = []
            for n, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                ids = [25] * (len(prompt["prompt_token_ids"]) % 3 + 1)
                stop, reason = params["stop_token_ids"], "stop" if n % 2 else "length"
                whole = [*ids, stop[0]] if n % 4 == 1 else ids  # some releases leave the stop token out
                output = types.SimpleNamespace(token_ids=whole, finish_reason=reason)
                out.append(types.SimpleNamespace(outputs=[output]))
            return out

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **k: k  # type: ignore[attr-defined]
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *a: a  # type: ignore[attr-defined]
    for name, made in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)
    return calls


def test_vllm_is_given_our_ids(folder: str, vllm: list[dict[str, Any]], tmp_path: Path, tokenizer: Any) -> None:
    from instructft.prompt.loss_mask import encode_prompt

    source, target = write(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"
    generate_file(folder, source, target, max_new_tokens=9, temperature=0.5, top_p=0.9, backend="vllm")
    load, call = vllm
    assert load == {"model": folder, "skip_tokenizer_init": True, "trust_remote_code": False}
    assert [p["prompt_token_ids"] for p in call["prompts"]] == [encode_prompt(m, tokenizer) for m in ASKED]
    for params in call["sampling"]:
        assert params["stop_token_ids"] == [tokenizer.eos_token_id]
        assert (params["temperature"], params["top_p"], params["max_tokens"]) == (0.5, 0.9, 9)
        assert params["detokenize"] is False
    assert call["lora"] is None
    made = read(target)
    assert [row["finish_reason"] for row in made] == [("length", "stop")[n % 2] for n in range(len(ROWS))]
    letter = tokenizer.decode([25])
    assert [row["response"] for row in made] == [
        (letter * (len(p["prompt_token_ids"]) % 3 + 1)).strip() for p in call["prompts"]
    ]


@pytest.mark.parametrize("plain", [True, False])
def test_vllm_and_adapters(plain: bool, vllm: list[dict[str, Any]], tmp_path: Path) -> None:
    from instructft.inference.vllm import VllmGenerator
    from tests.helpers.adapters import make_adapter, make_base

    base = make_base("llama", tmp_path / "base")
    adapter, *_ = make_adapter(base, tmp_path / "adapter", use_dora=not plain)
    if not plain:
        with pytest.raises(UsageError, match="Merge it first: instructft merge"):
            VllmGenerator(str(adapter))
        assert vllm == []
        return
    VllmGenerator(str(adapter)).answers([[{"role": "user", "content": "Hi"}]], 5)
    assert vllm[0] == {
        "model": str(base), "skip_tokenizer_init": True, "trust_remote_code": False, "enable_lora": True,
        "max_lora_rank": 8,
    }  # fmt: skip
    assert vllm[1]["lora"] == ("adapter", 1, str(adapter))


def test_vllm_that_is_not_there(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    source = write(tmp_path / "in.jsonl", *ROWS)
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        generate_file(folder, source, tmp_path / "out.jsonl", backend="vllm")
    with pytest.raises(UsageError, match="expected transformers or vllm"):
        generate_file(folder, source, tmp_path / "out.jsonl", backend="tgi")
    with pytest.raises(UsageError, match="--base needs --backend transformers"):
        generate_file(folder, source, tmp_path / "out.jsonl", backend="vllm", base="start")
    assert not (tmp_path / "out.jsonl").exists()
