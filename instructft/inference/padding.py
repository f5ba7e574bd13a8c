"""Whether a model passes over padding: what a prompt in a batch is answered, held against the same prompt alone.

Prompts of unlike length share a batch by padding on the left, which the attention mask takes out. RWKV reads no mask,
and its state takes the padding in: such a model has to be asked one prompt at a time. Whether one does so is asked of
the model at hand, with the calls by which it will answer: `generate`, with its cache and its own positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from instructft.inference.generator import Generator

TOKENS = (9, 4)  # of the two prompts: windows of four tokens, which some models press into one, hold pads and text
STEPS = 2  # tokens that are made: the first by the prompt, the second by the cache
# Of the largest logit, in float32 and in 16 bits. What pads take part in differs by shares, not by rounding.
PADDING_TOLERANCE = (1e-3, 5e-2)


def padding_difference(generator: Generator) -> float:
    """The largest difference between the logits of a short prompt alone and beside a longer one, as a share.

    Random states are as they were, since nothing is drawn from them.
    """
    import torch

    model: Any = generator.model
    if generator.context < TOKENS[0] + STEPS:
        return 0.0
    source = torch.Generator().manual_seed(0)
    # not of the embeddings: with rows of new tokens PEFT makes their weight anew, and under FSDP2 it cannot (peft 0.21)
    rows = getattr(model.config.get_text_config(), "vocab_size", None) or model.get_input_embeddings().weight.shape[0]
    prompts = [torch.randint(0, rows, (n,), generator=source) for n in TOKENS]
    pad = torch.full((TOKENS[0] - TOKENS[1],), generator.pad_id)
    if not generator.counts_from_pads:  # its row may be zero, which is not read, until it is trained
        pad = torch.randint(0, rows, pad.shape, generator=source)
    long, short = prompts[0], torch.cat([pad, prompts[1]])
    mask = torch.ones(2, TOKENS[0], dtype=torch.long)
    mask[1, : len(pad)] = 0
    alone = _logits(generator, prompts[1][None], torch.ones(1, TOKENS[1], dtype=torch.long))
    batched = _logits(generator, torch.stack([long, short]), mask)
    worst = 0.0
    for one, other in zip(alone, batched, strict=True):
        scale = float(one[0].abs().max().clamp(min=1e-6))
        worst = max(worst, float((one[0] - other[-1]).abs().max()) / scale)
        if int(one[0].argmax()) != int(other[-1].argmax()):
            break  # a tie that rounding decides: what comes after follows other tokens
    return worst


def _logits(generator: Generator, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The logits (B, V) of each token that the model makes after `ids` (B, T)."""
    device = generator.model.device
    options = generator.options(STEPS, 0.0, 1.0) | {"eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with generator.evaluating():
        out: Any = generator.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
    return [step.float() for step in out.logits]
