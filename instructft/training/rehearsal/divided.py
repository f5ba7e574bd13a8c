"""Whether a row gives the same when processes share it: asked of the model at hand, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from instructft.errors import ModelError
from instructft.formatting import first_line
from instructft.models.kernels.fused_loss import scores
from instructft.training.out_of_memory import ran_out
from instructft.training.rehearsal.head import bare, precision_of

if TYPE_CHECKING:
    from instructft.training.trainer import Trainer

PIECE = 8  # tokens of a piece; each process has two of a row
EXACT, ROUNDED = 1e-4, 5e-2  # nats that a token's log-probability may differ by on average: in float32, in less


class ProofOfDivision(TrainerCallback):
    """Asks when training begins, where the model lies as it is trained; stops a run whose rows cannot be divided.

    torch hands keys and values round for the kernels that it has a ring for. Which one a model's attention comes to is
    decided where it runs, and layers that look at other tokens by other ways than attention would see a part of the row
    without a word.

    Args:
        say: told in one line.
    """

    def __init__(self, trainer: Trainer, say: Callable[[str], Any]):
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask, in every process."""
        size = self.trainer.get_cp_size()
        difference = division_difference(self.trainer)
        limit = EXACT if precision_of(self.trainer) == torch.float32 and args.device.type == "cpu" else ROUNDED
        if not difference <= limit:
            raise ModelError(
                f"--context-parallel {size}: {type(bare(self.trainer.model)).__name__} gives other log-probabilities "
                f"where {size} processes share a row: {difference:.1e} nats a token on average (up to {limit:g} would "
                "be rounding). It looks at other tokens by other ways than attention; train it on whole rows"
            )
        self.say(
            f"each row is divided among {size} processes: log-probabilities of a row divided and whole differ by "
            f"{difference:.1e} on average"
        )


def division_difference(trainer: Trainer) -> float:
    """How far the log-probabilities of two short rows are from themselves where processes share them: nats, the mean.

    Every process must call.

    Raises:
        ModelError: torch has no ring for what this model's attention comes to here.
    """
    model: Any = trainer.model_wrapped
    words, device = trainer.model.config.get_text_config().vocab_size, trainer.args.device
    width = 2 * trainer.get_cp_size() * PIECE
    ids = torch.randint(0, words, (2, width), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            whole = scores(model, batch).log_probs  # (2, T - 1)
            divide, parts = trainer._prepare_context_parallel_inputs(model, batch)
            with divide():
                mine = scores(model, parts).log_probs  # (2, T / processes)
    except (NotImplementedError, RuntimeError) as error:
        if ran_out(error):
            raise
        raise ModelError(
            f"--context-parallel: torch cannot divide the attention of {type(bare(trainer.model)).__name__} on "
            f"{device.type} ({first_line(error)}). Its ring has the flash, memory-efficient and cuDNN kernels of CUDA; "
            "with grouped heads they take 16 bits (train.bf16=true)"
        ) from error
    finally:
        trainer.model.train(was_training)
        trainer._reshard()
    wanted = torch.nn.functional.pad(whole, (0, 1)).gather(1, parts["position_ids"])  # by where each slot stood
    apart = (mine - wanted).abs().double().mean().nan_to_num(nan=float("inf"))
    return float(trainer.accelerator.reduce(apart, "mean"))
