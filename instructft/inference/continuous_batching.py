"""Continuous batching: a row leaves the batch when its answer ends, and a waiting prompt takes its place.

All rows end in the same column; what is left of them is padding (`.`), which the attention mask takes out::

    columns   . . p p p p a a        p: prompt, a: answer. The cache holds every column but the last.
              p p p p p p p a        A row leaves: its part of the cache goes, and columns that are all padding.
              . . . . p p a a        A row joins: it is padded on the left until it ends where the others do.

A batch that waits for its longest answer computes mostly padding: of 32 answers whose lengths spread as those of a
language model do, the longest has about four times the mean. Measured on a CPU (benchmarks/RESULTS.md): 7.0 × as fast
as one by one, where transformers' `pipeline` is 2.7 ×. Its `generate_batch` (5.23) needs paged attention, and took 20
to 45 s for a batch of six short prompts with a tiny model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from instructft.inference.generator import Generator

# tokens after which it is read how many rows have ended: each time a GPU is waited for, a CPU has no queue
READ_EVERY = {"cpu": 1}
READ_EVERY_ELSEWHERE = 8
LEAVE = 4  # one row in this many ends before rows leave and join: each time the cache is copied


@dataclass
class Row:
    """A prompt on its way to its answer.

    Args:
        index: its place in what was asked.
        prompt: token ids.
        limit: tokens of an answer, at most.
        made: token ids of the answer so far.
    """

    index: int
    prompt: list[int]
    limit: int
    made: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt + self.made


class Batch:
    """Rows that are answered together: they `join`, and after each `step` those that have ended `leave`."""

    def __init__(self, generator: Generator, temperature: float, top_p: float):
        self.generator = generator
        self.settings = (temperature, top_p)
        self.rows: list[Row] = []
        self.rolls = True  # rows can join; not with a cache that has a window, a state or a fixed size
        self._cache: Any = None

    def join(self, rows: list[Row]) -> None:
        """Take rows in, and make the next token of each.

        Raises:
            RuntimeError: out of memory; `rows` are not in then.
        """
        cache = self._generate(rows, None, len(rows), 1)
        self.rolls = self.rolls and _is_plain(cache) and not _remembers_rows(self.generator.model)
        if self.rolls:
            self._cache = _joined(self._cache, cache)
        self.rows += rows

    def step(self) -> None:
        """Go on until some rows have ended; all of them where none can leave.

        Raises:
            RuntimeError: out of memory; the rows are as they were.
        """
        enough = -(-len(self.rows) // LEAVE) if self.rolls else len(self.rows)
        steps = max(row.limit - len(row.made) for row in self.rows)
        # A row that has ended is computed on until it leaves, and has no position behind the end of the context.
        steps = min(steps, self.generator.context - max(len(row.ids) for row in self.rows))
        cache, self._cache = self._cache, None  # a failure in the middle leaves no half of a cache
        cache = self._generate(self.rows, cache, enough, steps)
        if self.rolls:
            self._cache = cache

    def leave(self) -> list[Row]:
        """Take out the rows that have ended, and return them."""
        import torch

        keep = [i for i, row in enumerate(self.rows) if not self._ended(row)]
        if len(keep) == len(self.rows):
            return []
        gone = [row for row in self.rows if self._ended(row)]
        self.rows = [self.rows[i] for i in keep]
        if not self.rows:
            self._cache = None
        elif self._cache is not None:
            columns = max(len(row.ids) for row in self.rows) - 1
            for layer in self._cache.layers:
                rows = torch.tensor(keep, device=layer.keys.device)
                layer.keys = layer.keys[rows, :, -columns:]
                layer.values = layer.values[rows, :, -columns:]
        return gone

    def disperse(self) -> list[Row]:
        """Give all rows back as far as they are, with nothing left in memory; they may join again."""
        rows, self.rows, self._cache = self.rows, [], None
        return rows

    def _ended(self, row: Row) -> bool:
        return bool(row.made) and (row.made[-1] in self.generator.stop_ids or len(row.made) >= row.limit)

    def _generate(self, rows: list[Row], cache: Any, enough: int, steps: int) -> Any:
        """Let the model go on with `rows`, for `steps` tokens or until `enough` rows have ended; the new cache.

        A row that reaches its own limit, or the end of the context, ends there and cuts no other short.
        """
        import torch

        generator = self.generator
        texts = [row.ids for row in rows]
        width = max(map(len, texts))
        device = generator.model.device
        ids = torch.tensor([[generator.pad_id] * (width - len(text)) + text for text in texts], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=device)
        room = torch.tensor([row.limit - len(row.made) for row in rows], device=device)
        stops = torch.tensor(generator.stop_ids, device=device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        every = READ_EVERY.get(device.type, READ_EVERY_ELSEWHERE)

        def ended(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            nonlocal done
            made = input_ids.shape[1] - width
            done = done | torch.isin(input_ids[:, -1], stops) | (made >= room)
            # all rows that have ended end the call without this
            return torch.ones_like(done) if made % every == 0 and int(done.sum()) >= enough else done

        options = {**generator.options(steps, *self.settings), "return_dict_in_generate": True}
        if cache is not None:
            options[_cache_name()] = cache
        with generator.evaluating():
            out = generator.model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=[ended], **options)
        for row, new in zip(rows, out.sequences[:, width:].tolist(), strict=True):
            new = new[: row.limit - len(row.made)]
            end = next((n for n, token in enumerate(new, 1) if token in generator.stop_ids), len(new))
            row.made += new[:end]
        return getattr(out, _cache_name(), None)


def _cache_name() -> str:
    """The name of the cache that `generate` takes and returns; transformers 5.24 renamed it, and warns of the old."""
    from transformers.generation import GenerateDecoderOnlyOutput

    return "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


def _is_plain(cache: Any) -> bool:
    """Whether a cache is one column a token in every layer, so that rows and columns can be cut and joined."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    # an empty one is that of a model without a cache, which `generate` made and the model did not fill
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    return plain and cache.get_seq_length() > 0


def _remembers_rows(model: Any) -> bool:
    """Whether a model keeps a number for each row of its last batch beside the cache: Qwen-VL, offsets of positions."""
    return any(hasattr(module, "rope_deltas") for module in model.modules())


def _joined(cache: Any, new: Any) -> Any:
    """Both caches as one, whose rows end in the same column."""
    import torch

    if cache is None:
        return new
    for one, other in zip(cache.layers, new.layers, strict=True):
        # (B, heads, T, head width)
        columns = max(one.keys.shape[-2], other.keys.shape[-2])
        one.keys = torch.cat([_wide(one.keys, columns), _wide(other.keys, columns)])
        one.values = torch.cat([_wide(one.values, columns), _wide(other.values, columns)])
    return cache


def _wide(states: torch.Tensor, columns: int) -> torch.Tensor:
    """Padded on the left to `columns`; the attention mask hides what stands there."""
    import torch

    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[-2], 0))
