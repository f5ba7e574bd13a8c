"""The text of a recipe: YAML 1.2, overrides, and what is no recipe at all."""

from __future__ import annotations

import time

import pytest

from tests.helpers.recipes import GOOD

# text of the recipe, how its one problem begins (place and key path), what else that must hold
BAD = {
    "empty": ("", "the file is empty", "`model` and `data`"),
    "only a comment": ("# nothing\n", "the file is empty", ""),
    "a list": ("- a\n", "line 1: found a list", "`model:`"),
    "a tab": ("model:\n\tname_or_path: a\n", "line 2, column 1: not valid YAML", "spaces, not with tabs"),
    "a colon": (GOOD + "output_dir: a: b\n", "line 3, column 14: not valid YAML", "needs quotes"),
    "too deep": (
        GOOD + "samples:\n  - a: b\n     c: d\n",
        "line 5, column 7: not valid YAML",
        "line 5 is indented deeper than line 4, whose key has a value already",
    ),
    "a path of Windows": (GOOD + 'output_dir: "C:\\Users"\n', "line 3, column 18: not valid YAML", "single quotes"),
    "never closed": (GOOD + "samples: [a\n", "line 4, column 1: not valid YAML", ""),
    "two documents": (GOOD + "---\na: 1\n", "line 3, column 1: not valid YAML", "another document"),
    "not UTF-8": (GOOD.encode() + b"output_dir: \xff\n", "the file is not UTF-8 text", "UTF-8"),
    "python tag": (
        GOOD + "output_dir: !!python/object/apply:os.getcwd []\n",
        "line 3: output_dir: the YAML tag",
        "refused",
    ),
    "own tag": (GOOD + "output_dir: !env HOME\n", "line 3: output_dir: the YAML tag `!env` is refused", ""),
    "alias of itself": (GOOD + "samples: &a [*a]\n", "line 3: samples.0: the alias *a contains itself", ""),
    "unknown alias": (GOOD + "samples: *a\n", "line 3, column 10: not valid YAML: found undefined alias 'a'", ""),
    "old YAML": ("%YAML 1.1\n---\n" + GOOD, "line 1: `%YAML 1.1`", "1.2"),
    "given twice": (GOOD + "train:\n  seed: 1\n  seed: 2\n", "line 5: train.seed: given twice (line 4 and line 5)", ""),
    "key of keys": (GOOD + "? [a]\n: 1\n", "line 3: found a key that is not a word", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_text_that_is_no_recipe(problems, case):
    text, start, fragment = BAD[case]
    (found,) = problems(text)
    assert found.startswith(start)
    assert fragment in found


def test_yaml_is_1_2(load):
    recipe = load(
        GOOD
        + "train:\n  learning_rate: 1e-5\n  run_name: no\n  warmup_steps: 010\n  adam_epsilon: 1E-8\n"
        + "samples: [yes, 2024-01-31, off, 'null', \"tab\\t\"]\n"
    )
    assert recipe.train["learning_rate"] == 1e-5
    assert recipe.train["run_name"] == "no"
    assert recipe.train["warmup_steps"] == 10
    assert recipe.samples == ("yes", "2024-01-31", "off", "null", "tab\t")


def test_anchors_and_merges(load):
    text = GOOD + "train:\n  lr_scheduler_kwargs: &a {x: 1, y: 2}\n  accelerator_config: {<<: *a, y: 3}\n"
    assert load(text).train["accelerator_config"] == {"x": 1, "y": 3}


def test_overrides(load):
    recipe = load(
        GOOD,
        "train.learning_rate=1e-4",
        "data.packing=true",
        "data.datasets=[{name: dolly-15k}, alpaca]",
        "data.datasets.1.rows=100",
        "hub.repo_id=a/b",
        "adapter=lora",
        "adapter.r=4",
        "train.run_name=a=b",
        "train.report_to=none",
        "samples=[Hello]",
        "data.system_prompt=",
        "train.max_steps=5",
        "train.max_steps=6",
    )
    assert recipe.train["learning_rate"] == 1e-4
    assert recipe.data.packing is True
    assert [entry.name for entry in recipe.data.datasets] == ["dolly-15k", "alpaca"]
    assert recipe.data.datasets[1].rows == 100
    assert (recipe.adapter.type, recipe.adapter.r) == ("lora", 4)
    assert recipe.train["run_name"] == "a=b"
    assert recipe.samples == ("Hello",)
    assert recipe.data.system_prompt is None
    assert recipe.train["max_steps"] == 6
    assert load(GOOD, "data.datasets.0.rows=7").data.datasets[0].rows == 7  # into a bare name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", 'override "train.max_steps": expected KEY=VALUE'),
        ("=5", 'override "": expected KEY=VALUE'),
        ("data.packing=no", 'override "data.packing=no": data.packing: found "no" (text), expected true or false'),
        ("data.datasets.3.rows=1", 'override "data.datasets.3.rows=1": data.datasets: has 1 entries'),
        (
            "data.datasets.rows=1",
            'override "data.datasets.rows=1": data.datasets: is a list; write data.datasets.0.rows',
        ),
        ("output_dir.x=1", 'override "output_dir.x=1": output_dir: is a single value'),
        ("train.seed=[", 'override "train.seed=…": not valid YAML'),
        ("trian.seed=1", 'override "trian.seed=1": trian: unknown key; did you mean "train"?'),
        ("lr=1", 'override "lr=1": lr: unknown key; here it is called train.learning_rate'),
        ("train={seed: x}", 'override "train={seed: x}": train.seed: found "x" (text)'),
        ("train.seed=!!python/none", 'override "train.seed=…": train.seed: the YAML tag'),
    ],
)
def test_bad_overrides(problems, override, message):
    assert problems(GOOD + "output_dir: x\n", override)[0].startswith(message)


def test_a_yaml_bomb_is_refused_at_once(problems):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    started = time.perf_counter()
    assert "once its aliases" in problems(bomb)[0]
    assert "nested too deeply" in problems("a: " + "[" * 50_000)[0]
    assert "a recipe has a few thousand" in problems("#" * 300_000)[0]
    assert time.perf_counter() - started < 2
