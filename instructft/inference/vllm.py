"""Answers through vLLM, where it is installed: the same prompt ids, stop tokens and adapter, on vLLM's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from instructft.adapters.adapter_folder import AdapterFolder
from instructft.adapters.attach import locate_base
from instructft.errors import ModelError, UsageError
from instructft.inference.generator import MAX_NEW_TOKENS, Answer, Generator, check_settings
from instructft.models.load_for_inference import find_adapter, load_tokenizer_of, locate
from instructft.prompt.conversation import Message
from instructft.weights import remote_code

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA adapters that vLLM makes room for


class VllmGenerator(Generator):
    """A `Generator` whose batches vLLM computes; it schedules them itself, so that a batch size means nothing.

    Example::

        VllmGenerator("runs/quickstart").answers([[{"role": "user", "content": "Hi"}]])
        # [Answer(text='Hello.', finish_reason='stop')]

    Raises:
        UsageError: vLLM is not installed, or cannot serve this adapter; said before weights are loaded.
    """

    def __init__(self, name: str):
        try:
            import vllm
        except ImportError as error:
            raise UsageError(
                "--backend vllm: vLLM is not installed here. Install it with pip install 'instructft[vllm]' (Linux, "
                "in an environment of its own: it pins its own torch), or leave --backend out"
            ) from error
        from transformers import AutoConfig, GenerationConfig

        location, revision = locate(name)
        adapter = find_adapter(name)
        rank = _rank(adapter) if adapter else 0
        place = str(locate_base(adapter)) if adapter else location
        where: dict[str, Any] = {} if Path(place).exists() else {"revision": revision}
        config = AutoConfig.from_pretrained(place, **where, **remote_code.pinned(place, revision))
        own = adapter is not None and (adapter.folder / "generation_config.json").is_file()
        try:
            generation = GenerationConfig.from_pretrained(str(adapter.folder) if adapter and own else place, **where)
        except OSError:  # a model without one: what its configuration says
            generation = GenerationConfig.from_model_config(config)
        shape = SimpleNamespace(generation_config=generation, config=config)
        super().__init__(cast("Any", shape), load_tokenizer_of(name))
        options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": rank} if adapter else {}
        # Prompts go in and answers come out as ids: the text is made here, as everywhere else.
        options |= remote_code.pinned(place, revision)
        self._engine = vllm.LLM(model=place, skip_tokenizer_init=True, **where, **options)
        self._sampling = vllm.SamplingParams
        self._adapter: dict[str, Any] = {}
        if adapter:
            from vllm.lora.request import LoRARequest

            self._adapter = {"lora_request": LoRARequest("adapter", 1, str(adapter.folder))}

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int | None = None,
        done: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answer each conversation, in order, as `Generator.answers` does.

        Raises:
            UsageError: a prompt that leaves no room for an answer in the model's context.
            ModelError: vLLM gave no answer to one.
        """
        check_settings(max_new_tokens, temperature, top_p)
        rows = self.rows(conversations, max_new_tokens)
        settings = [
            self._sampling(
                temperature=temperature,
                top_p=top_p,
                max_tokens=row.limit,
                stop_token_ids=self.stop_ids,
                detokenize=False,
            )
            for row in rows
        ]
        asked = [{"prompt_token_ids": row.prompt} for row in rows]
        made = self._engine.generate(asked, settings, use_tqdm=False, **self._adapter) if asked else []
        answers = []
        for i, request in enumerate(made):
            output = request.outputs[0]
            if output.finish_reason not in ("stop", "length"):
                raise ModelError(f"vLLM gave no answer to prompt {i + 1}: it ended with {output.finish_reason!r}")
            answer = self._answer(self._whole(list(output.token_ids), output.finish_reason))
            answers.append(answer)
            if done:
                done(i, answer)
        return answers

    def _whole(self, ids: list[int], finish_reason: str) -> list[int]:
        """The ids with the stop token at their end; releases of vLLM differ in whether it is among them."""
        ended = ids and ids[-1] in self.stop_ids
        return ids if ended or finish_reason == "length" else [*ids, self.stop_ids[0]]


def _rank(adapter: AdapterFolder) -> int:
    """The smallest room that holds this adapter; an adapter that vLLM would read only in part is refused."""
    plain = all(".lora_A." in name or ".lora_B." in name for name in adapter.shapes)
    ranks = [shape[0] for name, shape in adapter.shapes.items() if ".lora_A." in name]
    if not plain or adapter.config.get("use_dora") or not ranks or max(ranks) > RANKS[-1]:
        raise UsageError(
            f"--backend vllm: vLLM serves plain LoRA of a rank up to {RANKS[-1]}, and {adapter.folder} is more than "
            f"that. Merge it first: instructft merge {adapter.folder} FOLDER"
        )
    return next(rank for rank in RANKS if rank >= max(ranks))
