"""What a name on the Hub looks like, and which paths stay inside a repository: one rule each, for all who ask."""

from __future__ import annotations

import pytest

from instructft.weights.base_record import is_hub_id, stays_inside


@pytest.mark.parametrize("name", ["gpt2", "org/name", "openai-community/gpt2", "_org/My.Model_v1-2"])
def test_names_on_the_hub(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["", "./gpt2", "../gpt2", "/gpt2", "~/gpt2", "org/", "org/..", "a/b/c", "org/ü", "a b"]
)
def test_no_names_on_the_hub(name: str) -> None:
    assert not is_hub_id(name)


@pytest.mark.parametrize("path", [None, "", "instruct/", "a/b", "a..b/c", "checkpoint-1/fsdp_0/.metadata"])
def test_paths_inside(path: str | None) -> None:
    assert stays_inside(path)


@pytest.mark.parametrize("path", ["/a", "~/a", "..", "a/../b", "a/..", "C:/a", "a\\..\\b", "a\nb"])
def test_paths_that_leave(path: str) -> None:
    assert not stays_inside(path)
