"""Which attention trains a run's packs: by the borders of documents where that can be had, else why it cannot."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.formatting import first_line
from instructft.models.load import weights_dtype
from instructft.weights import remote_code
from instructft.weights.model_class import auto_class

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from trl import SFTConfig

    from instructft.recipe.schema import Recipe

VARLEN = "varlen"
_KEY = "model.attn_implementation"
TOLERANCE = 2e-2  # of the kernel from plain arithmetic in float32, as a share of the norm, where numbers have 16 bits


@dataclass(frozen=True)
class Attention:
    """The attention of a run.

    Args:
        name: as transformers has it; "" leaves it to transformers.
        why: the reason why it is no faster one; "" where there is none to give.
        may_change: chosen here and not by the recipe, so that another one may take its place.
    """

    name: str
    why: str = ""
    may_change: bool = False

    def facts(self) -> dict[str, str]:
        """For `run.json`."""
        return {"name": self.name, **({"why": self.why} if self.why else {})}

    def __str__(self) -> str:
        if self.name == VARLEN:
            return f"{VARLEN}, by the borders of documents, without a mask"
        return f"{self.name} ({self.why})" if self.why else self.name


def check_attention(recipe: Recipe, config: PretrainedConfig) -> None:
    """Refuse an attention that this machine or this architecture does not have; done on shapes alone.

    Raises:
        UsageError: what is missing, and what to write instead.
    """
    import torch

    asked = recipe.model.attn_implementation
    if asked == "auto" or "/" in asked:  # a kernel on the Hub is fetched when it is used
        return
    named = None if asked == VARLEN else asked
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(
                copy.deepcopy(config), attn_implementation=named, **remote_code.flag()
            )
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{_KEY}: {asked} cannot be used here: {first_line(error).rstrip('.')}; or write {_KEY}=auto"
        ) from error
    if asked == VARLEN:
        from instructft.models.kernels.varlen import own_attention, refusal

        why = _own_code(type(model).__name__) if own_attention(type(model)) else refusal(config)
        if why:
            raise UsageError(f"{_KEY}: {VARLEN} cannot train {type(model).__name__}: {why}; or write {_KEY}=auto")


def choose_attention(recipe: Recipe, config: PretrainedConfig, args: SFTConfig, folds: bool = False) -> Attention:
    """The attention that a recipe names or, with `auto`, the one that is best for packs on this machine.

    Args:
        args: of the trainer, with device and precision as they were decided.
        folds: turns are folded, which takes a mask.

    Example::

        choose_attention(load_recipe("quickstart", ["data.packing=true"]), config, args)
        # Attention(name='', why='varlen is taken on CUDA', may_change=False)

    Raises:
        UsageError: `varlen` is named, and this machine or this precision does not have it.
    """
    asked = recipe.model.attn_implementation
    if asked == VARLEN:
        if why := _not_here(recipe, args) if args.device.type == "cuda" else "":
            raise UsageError(f"{_KEY}: {VARLEN} cannot be used here: {why}; or write {_KEY}=auto")
        return Attention(VARLEN)
    if asked != "auto" or not recipe.data.packing:
        return Attention("" if asked == "auto" else asked)
    why = "it knows borders alone, and folded turns take a mask" if folds else _why_not(recipe, config, args)
    return Attention("", f"not {VARLEN}: {why}") if why else Attention(VARLEN, may_change=True)


def switch_attention(model: Any, attention: Attention) -> Attention:
    """Give a loaded model the attention that was chosen; the one that it has then."""
    if attention.name == VARLEN:
        from instructft.models.kernels.varlen import switch_on

        if not switch_on(model):
            attention = Attention("", f"not {VARLEN}: {_own_code(type(model).__name__)}")
    return Attention(str(model.config._attn_implementation), attention.why, attention.may_change)


def give_up(model: Any, why: str) -> Attention:
    """Another attention in place of the one that was chosen here, for the reason `why`."""
    from instructft.models.kernels.varlen import switch_off

    switch_off(model)
    return Attention(str(model.config._attn_implementation), f"not {VARLEN}: {why}")


def _own_code(model: str) -> str:
    return f"{model} computes attention in its own code"


def _why_not(recipe: Recipe, config: PretrainedConfig, args: SFTConfig) -> str:
    from instructft.models.kernels.varlen import refusal

    if args.device.type != "cuda":
        return "it is taken on CUDA"
    if recipe.train.get("auto_find_batch_size"):
        return "packs end to end cannot be halved, as train.auto_find_batch_size may have to"
    return _not_here(recipe, args) or refusal(config) or _kernel_trouble(config, _half(recipe, args), args.device)


def _not_here(recipe: Recipe, args: SFTConfig) -> str:
    """What this torch or this run's precision lacks for the kernel; "" where it is all there."""
    import torch

    from instructft.models.kernels.varlen import OLDEST_TORCH

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} has no such kernel; it comes with {'.'.join(map(str, OLDEST_TORCH))}"
    if _half(recipe, args) is None:
        return "it has no float32; write train.bf16=true (or train.fp16=true)"
    return ""


def mask_by_positions(model: Any) -> Any:
    """Hand a model the masks of its packs, where its own code makes none from positions; the hook's handle.

    gpt-oss and AfMoE build their masks without `position_ids` (transformers 5.23), and take ready ones by the kind of
    layer. Whatever comes with a mask or a cache (rows, answers) is left as it is.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    width = bare.get_input_embeddings().weight

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        given = any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values"))
        if ids is None or positions is None or given:
            return None
        like = width.new_empty(1).expand(*ids.shape, 1)  # (B, T, 1): its shape, type and device are read
        about = {"config": module.config, "inputs_embeds": like, "attention_mask": None, "past_key_values": None}
        masks = {"full_attention": create_causal_mask(**about, position_ids=positions)}
        if getattr(module.config, "sliding_window", None):
            masks["sliding_attention"] = create_sliding_window_causal_mask(**about, position_ids=positions)
        return args, {**kwargs, "attention_mask": masks}

    return bare.base_model.register_forward_pre_hook(add, with_kwargs=True)


def _half(recipe: Recipe, args: SFTConfig) -> torch.dtype | None:
    """The type of 16 bits that a run's attention is computed in; None where it has more."""
    import torch

    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    dtype = weights_dtype(recipe)
    return None if dtype == torch.float32 else dtype


def _kernel_trouble(config: PretrainedConfig, dtype: torch.dtype | None, device: torch.device) -> str:
    """What is wrong with the kernel on this device, tried on heads of this model: a card may be too old for it."""
    import torch

    from instructft.models.kernels import varlen

    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    groups, width = getattr(text, "num_key_value_heads", None) or heads, varlen.head_width(text) or 64
    borders = torch.tensor([0, 5, 70, 71, 96, 96, 96], dtype=torch.int32, device=device)  # with two empty documents
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, count, 96, width, generator=generator).to(device) for count in (heads, groups, groups, heads)
    )
    found = []
    try:
        for kind in (dtype, torch.float32):  # by the kernel, and in plain arithmetic
            one, two, three = (part.to(kind).requires_grad_() for part in (q, k, v))
            how: dict[str, Any] = {"sliding_window": 17, "cu_seq_lens_q": borders, "max_length_q": 96}
            out, _ = varlen.attend(torch.nn.Module(), one, two, three, None, **how)
            grads = torch.autograd.grad(out, (one, two, three), grad.transpose(1, 2).to(kind))
            found.append([value.detach().float() for value in (out, *grads)])
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        return f"its kernel fails on this device ({first_line(error)})"
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
    return "" if apart <= TOLERANCE else f"its kernel is {apart:.1e} from plain arithmetic on this device"
