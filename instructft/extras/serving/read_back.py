"""A GGUF file beside the model that it was made of: what it says of the tokenizer, and what its weights answer.

Its weights are read by transformers, which unpacks each block of them to the numbers that it stands for. So the table
holds what the file costs, and not how a server rounds while it computes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructft.errors import InstructftError, ModelError
from instructft.formatting import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREFIX = "tokenizer.ggml"


@dataclass(frozen=True)
class Text:
    """Ids that both are shown, and the positions whose next token counts: those that carry loss."""

    ids: list[int]
    places: list[int]


@dataclass(frozen=True)
class Figures:
    """One file.

    Args:
        kl: from the model to the file, in nats a token; the whole vocabulary counts.
        top1: share of equal most likely tokens.
        perplexity: of the file over the tokens that carry loss.
    """

    kl: float
    top1: float
    perplexity: float
    tokens: int


class NotReadError(InstructftError):
    """A file that transformers cannot read back, with the reason."""


def settle_tokenizer(
    file: Path, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[int]
) -> list[str]:
    """Make a file begin and end texts as training did; what was changed, in words.

    Args:
        prompt: ids of any prompt, as in training.
        stops: the tokens that end an answer, that of a plain one first.

    Raises:
        ModelError: it has other tokens than the tokenizer.
    """
    import gguf

    reader = gguf.GGUFReader(str(file), "r+")
    tokens = reader.get_field(f"{_PREFIX}.tokens")
    if tokens is None or len(tokens.data) < len(tokenizer):
        found = 0 if tokens is None else len(tokens.data)
        raise ModelError(f"{file.name} holds {found:,} tokens, and the tokenizer has {len(tokenizer):,}")
    done = []
    eos = reader.get_field(f"{_PREFIX}.eos_token_id")
    if eos is not None and int(eos.parts[-1][0]) not in stops:
        done.append(
            f"ends answers at {tokenizer.decode([stops[0]])!r}, not {tokenizer.decode([int(eos.parts[-1][0])])!r}"
        )
        eos.parts[-1][0] = stops[0]
    bos = reader.get_field(f"{_PREFIX}.add_bos_token")
    begins = tokenizer.bos_token_id is not None and list(prompt[:1]) == [tokenizer.bos_token_id]
    if bos is not None and bool(bos.parts[-1][0]) and not begins:
        done.append("adds no BOS, as in training")
        bos.parts[-1][0] = 0
    reader.data.flush()
    return done


def weights_of(file: Path, config: Any) -> PreTrainedModel:
    """The model of a file, in float32 on the CPU.

    Args:
        config: of the model that it was made of; what transformers makes of a file lacks fields (GPT-2's positions).

    Raises:
        NotReadError: transformers does not read its architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {"gguf_file": file.name, "config": copy.deepcopy(config), "dtype": torch.float32}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), trust_remote_code=False, **given)
    except Exception as error:  # of many kinds, by architecture
        raise NotReadError(f"transformers does not read it: {first_line(error)}") from error
    return model.eval()


def compared(model: Any, other: Any, texts: Sequence[Text]) -> tuple[Figures, float]:
    """How far `other` is from `model` over some texts, and the model's own perplexity."""
    import torch

    divergence, equal, nll, own, count = 0.0, 0, 0.0, 0.0, 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([text.ids])
            p, q = (_log_probs(one, ids, text.places) for one in (model, other))
            width = min(p.shape[-1], q.shape[-1])  # a converter may pad the vocabulary
            p, q = p[:, :width], q[:, :width]
            following = torch.tensor([text.ids[place + 1] for place in text.places])[:, None]
            divergence += float((p.exp() * (p - q)).sum())
            equal += int((p.argmax(-1) == q.argmax(-1)).sum())
            nll -= float(q.gather(1, following).sum())
            own -= float(p.gather(1, following).sum())
            count += len(text.places)
    figures = Figures(max(0.0, divergence / count), equal / count, math.exp(min(700.0, nll / count)), count)
    return figures, math.exp(min(700.0, own / count))


def _log_probs(model: Any, ids: Any, places: Sequence[int]) -> Any:
    """Log-probabilities of the tokens behind `places`, (places, V)."""
    import torch

    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, list(places)]
    return torch.log_softmax(logits.cpu().double(), -1)


def texts_of(rows: Sequence[dict[str, Any]], context: int) -> Iterator[Text]:
    """Encoded rows as texts: ids, and the places before each token that carries loss."""
    from instructft.prompt.loss_mask import IGNORE_INDEX

    for row in rows:
        ids, labels = row["input_ids"][:context], row["labels"][:context]
        places = [i for i, label in enumerate(labels[1:]) if label != IGNORE_INDEX]
        if places:
            yield Text(list(ids), places)
