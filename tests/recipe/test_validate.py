"""Every mistake in a recipe is said with line, key and the nearest right name, all at once."""

from __future__ import annotations

import textwrap

import pytest

from instructft.errors import RecipeError
from instructft.recipe.load import load_recipe, load_run_recipe
from instructft.weights import remote_code
from tests.helpers.recipes import DATA, GOOD, MODEL

# text of the recipe, how its one problem begins (place and key path), what else that must hold
BAD = {
    # unknown values
    "dataset name": (
        MODEL + "data:\n  datasets: doly-15k\n",
        'line 3: data.datasets: "doly-15k" is unknown',
        '"dolly-15k"?',
    ),
    "dataset in a list": (
        MODEL + "data:\n  datasets:\n  - alpaca\n  - {name: slimorca}\n",
        'line 5: data.datasets.1.name: "slimorca" is unknown',
        'did you mean "slim-orca"?',
    ),
    "file as a name": (MODEL + "data: {datasets: a/b.jsonl}\n", "line 2: data.datasets:", "{path: a/b.jsonl}"),
    "hub id as a name": (MODEL + "data: {datasets: org/set}\n", "line 2: data.datasets:", "{hub: org/set}"),
    "format": (
        MODEL + "data:\n  datasets:\n    hub: a/b\n    format: share_gpt\n",
        "line 5: data.datasets.0.format:",
        '"sharegpt"?',
    ),
    "template": (MODEL + "data:\n  datasets: alpaca\n  template: chatlm\n", "line 4: data.template:", '"chatml"?'),
    "attention": (
        "model:\n  name_or_path: a\n  attn_implementation: sdp\n" + DATA,
        "line 3: model.attn_impl",
        '"sdpa"?',
    ),
    "dtype of other tools": (
        "model:\n  name_or_path: a\n  dtype: bf16\n" + DATA,
        'line 3: model.dtype: found "bf16" (text), expected one of auto, float32, bfloat16, float16',
        "write bfloat16",
    ),
    "train_on": (MODEL + "data: {datasets: alpaca, train_on: response}\n", "line 2: data.train_on:", '"responses"?'),
    "optimizer": (GOOD + "train:\n  optim: adamw_torch_fusd\n", "line 4: train.optim:", '"adamw_torch_fused"?'),
    "scheduler": (GOOD + "train:\n  lr_scheduler_type: cosin\n", "line 4: train.lr_scheduler_type:", '"cosine"?'),
    "report_to in a list": (GOOD + "train: {report_to: [wandbb]}\n", "line 3: train.report_to:", '"wandb"?'),
    "qlora": (GOOD + "adapter: qlora\n", "line 3: adapter:", "adapter.type: lora and model.quantization: 4bit"),
    # missing
    "no data": (MODEL, "data.datasets: missing; expected a name", ""),
    "no model": (DATA, "model.name_or_path: missing;", "model.config"),
    "no tokenizer": ("model:\n  config: {model_type: gpt2}\n" + DATA, "line 1: model.tokenizer: missing;", "random"),
    "no model type": (
        "model:\n  tokenizer: gpt2\n  config: {n_layer: 2}\n" + DATA,
        "line 3: model.config: has no model_type",
        "gpt2",
    ),
    "no repo": (GOOD + "hub: {push: end}\n", "line 3: hub.push: end needs hub.repo_id", ""),
    "no source": (
        MODEL + "data: {datasets: [{rows: 5}]}\n",
        "line 2: data.datasets.0: found none of them,",
        "exactly one",
    ),
    # files, folders, addresses
    "no data file": (
        MODEL + "data: {datasets: {path: a.jsonl}}\n",
        'line 2: data.datasets.0.path: there is no "a.jsonl"',
        "",
    ),
    "ending": (MODEL + "data: {datasets: [{path: mine.yaml}]}\n", "line 2: data.datasets.0.path:", "save the rows as"),
    "no file fits": (MODEL + "data: {datasets: [{path: 'x*.csv'}]}\n", "line 2: data.datasets.0.path:", "there is no"),
    "no template file": (
        MODEL + "data: {datasets: alpaca, template: a.jinja}\n",
        "line 2: data.template: there is no",
        "",
    ),
    "a template of a model": (
        MODEL + "data:\n  datasets: alpaca\n  template: llama3\n",
        "line 4: data.template:",
        "is written tokenizer",
    ),
    "no model folder": (
        "model: {name_or_path: ./nope}\n" + DATA,
        'line 1: model.name_or_path: there is no "./nope"',
        "",
    ),
    "up and out": (
        GOOD + "hub: {repo_id: a/b, path_in_repo: a/../../b}\n",
        "line 3: hub.path_in_repo:",
        "inside the repo",
    ),
    "absolute": ("model: {name_or_path: a, subfolder: /etc}\n" + DATA, "line 1: model.subfolder:", "inside the repo"),
    "repo id": (GOOD + "hub: {repo_id: a/b/c}\n", "line 3: hub.repo_id:", "org/name"),
    "address": (MODEL + "data: {datasets: [{url: 'ftp://a/b'}]}\n", "line 2: data.datasets.0.url:", "http(s)"),
    "figure": (
        GOOD + "evaluation: {metrics: [exact_mach]}\n",
        'line 3: evaluation.metrics.0: "exact_mach" is unknown',
        'did you mean "exact_match"?',
    ),
    "figure in a file that is not there": (
        GOOD + "evaluation: {metrics: mine.py:score}\n",
        'line 3: evaluation.metrics: there is no "mine.py"',
        "beside the recipe",
    ),
    "rows to answer": (
        GOOD + "evaluation: {rows: all}\n",
        'line 3: evaluation.rows: found "all" (text), expected auto or a whole number',
        "held-out rows answered at every evaluation",
    ),
    # unknown keys
    "section": (GOOD + "trian:\n  seed: 1\n", "line 3: trian: unknown key", 'did you mean "train"?'),
    "key of train": (
        GOOD + "train: {learning_rat: 1}\n",
        "line 3: train.learning_rat: unknown key",
        '"train.learning_rate"?',
    ),
    "key of a data set": (
        MODEL + "data:\n  datasets:\n  - {name: alpaca, wieght: 2}\n",
        "line 4: data.datasets.0.wieght: unknown key",
        '"data.datasets.0.weight"?',
    ),
    "key of splits": (
        MODEL + "data: {datasets: alpaca, splits: {valid: 0.1}}\n",
        "line 2: data.splits.valid: unknown key",
        '"data.splits.validation"?',
    ),
    "key of peft": (GOOD + "adapter: {type: lora, rank_patern: {}}\n", "line 3: adapter.rank_patern:", "rank_pattern"),
    "nothing near": (GOOD + "zzz: 1\n", "line 3: zzz: unknown key", "expected one of model, data,"),
    "field gone from SFTConfig": (
        GOOD + "train: {warmup_ratio: 0.1}\n",
        "line 3: train.warmup_ratio:",
        "warmup_steps: 0.03",
    ),
    "wrong section": (GOOD + "learning_rate: 1\n", "line 3: learning_rate:", "write it as train.learning_rate"),
    "wrong section, two homes": (GOOD + "seed: 1\n", "line 3: seed:", "data.seed or train.seed"),
    "dotted key in a file": (GOOD + "train.seed: 1\n", "line 3: train.seed:", "train: {seed: …}"),
    "lora_alpha": (GOOD + "adapter: {type: lora, lora_alpha: 8}\n", "line 3: adapter.lora_alpha:", "use adapter.alpha"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_has_one_clear_message(problems, case):
    text, start, fragment = BAD[case]
    (found,) = problems(text)
    assert found.startswith(start)
    assert fragment in found


def test_all_problems_come_out_at_once_in_the_order_of_the_file(problems):
    text = textwrap.dedent("""\
        model:
          name_or_path: gpt2
          quantization: 4bit
        data:
          datasets: doly-15k
          max_length: long
          max_length: 12
        train:
          micro_batch_size: 4
          bf16: true
          fp16: true
          max_length: 512
        hub: {push: end}
        oops: !!python/none x
        """)
    found = problems(text, "train.max_steps=ten", "data.seed=-1")
    assert [line.split(": ")[:2] for line in found] == [
        ["line 3", "model.quantization"],
        ["line 5", "data.datasets"],
        ["line 6", "data.max_length"],
        ["line 7", "data.max_length"],
        ["line 9", "train.micro_batch_size"],
        ["line 10", "train.bf16"],
        ["line 12", "train.max_length"],
        ["line 13", "hub.push"],
        ["line 14", "oops"],
        ["line 14", "oops"],
        ['override "train.max_steps=ten"', "train.max_steps"],
        ['override "data.seed=-1"', "data.seed"],
    ]


def test_a_wrong_key_that_stands_for_a_required_one_is_said_once(problems):
    found = problems("base_model: gpt2\ndatasets: dolly-15k\n")
    assert [line.split(": ")[1] for line in found] == ["base_model", "datasets"]


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("train: {hub_token: S3CRET}\n", ""),
        ("train: {push_to_hub_token: S3CRET}\n", ""),
        ("hub: {repo_id: a/b, token: S3CRET}\n", ""),
        ("hf_token: S3CRET\n", ""),
        ("wandb_api_key: S3CRET\n", ""),
        ("", "hub.token=S3CRET"),
        ("", "model.token=S3CRET"),
        ("", "hub={repo_id: a/b, token: S3CRET}"),
        ("", "hub.token=[S3CRET"),
        ("", "hub_token S3CRET"),
        ("train: {run_name: [hf_S3CRETS3CRET]}\n", ""),
        ("samples: hf_S3CRETS3CRET\n", ""),
        ("", "train.max_steps=hf_S3CRETS3CRET"),
        ("nonsense: {token: S3CRET}\n", ""),
        ("samples: [{token: S3CRET}]\n", ""),
    ],
)
def test_a_token_is_refused_and_never_echoed(problems, text, override):
    found = problems(GOOD + text, *[override] * bool(override))
    assert "S3CRET" not in "\n".join(found)
    assert any("HF_TOKEN" in line for line in found) or "hf_" in text + override or "[" in override or " " in override


def test_a_password_in_an_address_is_refused_and_not_shown(problems):
    found = problems(MODEL + "data: {datasets: [{url: 'https://me:S3CRET@host/a.json'}]}\n")
    assert found[0].startswith("line 2: data.datasets.0.url: holds a password")
    assert "S3CRET" not in found[0]


def test_code_of_a_metric_is_not_run_unasked(tmp_path):
    """A recipe may be a stranger's: what lies outside of its folder is not for it to run; a person may say so."""
    folder = tmp_path / "theirs"
    (folder / "below").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "below"):
        (place / "mine.py").write_text("raise SystemExit('it ran')")
    (folder / "linked.py").symlink_to(tmp_path / "mine.py")

    def load(metric, *overrides):
        (folder / "recipe.yaml").write_text(GOOD + f"evaluation: {{metrics: [{metric}]}}\n")
        return load_recipe(folder / "recipe.yaml", overrides).evaluation.metrics

    assert load("mine.py:score") == (f"{folder / 'mine.py'}:score",)
    assert load("below/mine.py:score") == (f"{folder / 'below' / 'mine.py'}:score",)
    outside = (f"{tmp_path / 'mine.py'}:score", "../mine.py:score", "below/../../mine.py:score", "linked.py:score")
    for metric in outside:
        with pytest.raises(RecipeError, match=r"lies outside of the recipe's folder.*--trust-remote-code"):
            load(metric)
    typed = f"{tmp_path / 'mine.py'}:score"
    assert load("mine.py:score", f"evaluation.metrics=[{typed}]") == (typed,)
    remote_code.allow()
    try:
        assert load("../mine.py:score") == (f"{folder / '..' / 'mine.py'}:score",)
    finally:
        remote_code.allow(False)
    # the recipe of a run is read by commands that judge nothing by it, where the file may be gone
    (folder / "recipe.yaml").write_text(GOOD + "evaluation: {metrics: [gone.py:score]}\n")
    assert load_run_recipe(folder).evaluation.functions() == {"score": ("gone.py", "score")}
