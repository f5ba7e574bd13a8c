"""Figures and names as people read them, where a unit, a word or a guess turns."""

from __future__ import annotations

import math

import pytest

from instructft import formatting


@pytest.mark.parametrize(
    ("count", "disk", "memory"),
    [
        (0, "0.0 kB", "0 KiB"),
        ((1 << 20) - 1, "1.0 MB", "1,024 KiB"),
        (1 << 20, "1.0 MB", "1 MiB"),
        (10**9, "1.0 GB", "954 MiB"),
        (1 << 30, "1.1 GB", "1.0 GiB"),
        (5000 << 30, "5368.7 GB", "5,000.0 GiB"),
    ],
)
def test_disks_count_by_thousands_and_memory_by_1024(count: int, disk: str, memory: str) -> None:
    assert (formatting.size(count), formatting.memory_size(count)) == (disk, memory)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min"), (90_000, "25 h 0 min")]
)
def test_durations_turn_where_they_are_rounded(seconds: float, words: str) -> None:
    assert formatting.clock(seconds) == words


def test_the_nearest_name_counts_neither_case_nor_hyphens() -> None:
    assert formatting.closest("DOLLY_15K", ["alpaca", "dolly-15k"]) == "dolly-15k"
    assert formatting.closest("zzz", ["alpaca", "dolly-15k"]) is None
    assert formatting.nearest("sed", ["seed"], prefix="train.") == '; did you mean "train.seed"?'
    assert formatting.nearest("zzz", ["seed"]) == ""


def test_short_keeps_what_fits() -> None:
    assert formatting.short("four", 4) == "four"
    assert formatting.short("a  longer\ttext", 8) == "a longe…"


def test_yaml_is_read_back_as_it_was() -> None:
    from ruamel.yaml import YAML

    values = {
        "words": ["no", "1e5", "-", "", "0x10", "a: b", "ö"],
        "numbers": [1e-5, 1e22, 0.1, -3, math.inf],
        "n": None,
    }
    text = formatting.yaml_text(values)
    assert YAML(typ="safe", pure=True).load(text) == values
    assert list(YAML(typ="safe", pure=True).load(text)) == list(values)


def test_no_rows_have_no_lengths() -> None:
    import numpy as np

    assert formatting.quantiles(np.array([])) == {"p50": 0, "p90": 0, "p99": 0, "max": 0}
    assert formatting.quantiles(np.arange(1, 101)) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
