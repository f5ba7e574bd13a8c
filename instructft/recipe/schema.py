"""All the legal keys of a recipe, with type, default and unit. No torch.

The keys are the fields of the models below; `train:` also takes the fields of `trl.SFTConfig`, and `adapter:` those of
`peft.LoraConfig`, by their own names (`instructft.recipe.fields`). An unknown key is an error that names the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from instructft.formatting import yaml_text
from instructft.recipe.fields import OWN_TRAIN_FIELDS, legal_train_fields
from instructft.redaction import bare_url

# What `train:` holds unless the recipe says otherwise, where that differs from trl.SFTConfig.
TRAIN_DEFAULTS: dict[str, Any] = {
    **{name: row["default"] for name, row in OWN_TRAIN_FIELDS.items()},  # ours: not fields of SFTConfig
    "seed": 42,  # the same as SFTConfig's, here because it belongs to every record of a run
    "gradient_checkpointing": False,  # recomputing every layer costs a fifth of the speed; a small model has the memory
    "logging_steps": 10,  # steps
    "logging_nan_inf_filter": False,  # a loss of NaN must be seen, not logged as 0.0
    "report_to": ("tensorboard",),  # curves without an account
    "train_sampling_strategy": "group_by_length",  # steps of all lengths, batches of like length: little padding
    "save_strategy": "steps",
    "save_steps": 0.25,  # share of all steps: a short run has checkpoints too, a long one does not fill the disk
}


# What answers to held-out rows are judged by (`instructft.evaluation.answers` says how); the higher the better.
ANSWER_FIGURES = ("exact_match", "token_f1", "rougeL", "stops", "valid_json", "tool_names", "tool_calls")


def metric_name(train: Mapping[str, Any]) -> str:
    """What the best checkpoint is judged by, without `eval_`.

    >>> metric_name({"metric_for_best_model": "eval_perplexity"}), metric_name({})
    ('perplexity', 'loss')
    """
    return str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")


def train_defaults(written: Mapping[str, Any], validation: bool) -> dict[str, Any]:
    """`TRAIN_DEFAULTS` and the defaults that follow from other keys.

    >>> train_defaults({"per_device_train_batch_size": 2}, validation=True)["per_device_eval_batch_size"]
    2
    """
    defaults = dict(TRAIN_DEFAULTS)
    chosen = {**defaults, **written}
    best = bool(chosen.get("load_best_model_at_end"))  # needs evaluations exactly where checkpoints are
    if chosen["early_stopping_patience"] is not None and validation and written.get("eval_strategy") != "no":
        best = bool(chosen.get("load_best_model_at_end", True))
        defaults["load_best_model_at_end"] = True
        defaults["save_strategy"] = written.get("eval_strategy", "steps")
        defaults["save_steps"] = written.get("eval_steps", 0.1)  # a checkpoint at every evaluation, to go back to
        chosen = {**defaults, **written}
    if validation:
        defaults["eval_strategy"] = "epoch" if best and chosen["save_strategy"] == "epoch" else "steps"
    else:
        defaults["eval_strategy"] = "no"  # there is nothing to evaluate on
    if {**defaults, **written}["eval_strategy"] == "steps":
        defaults["eval_steps"] = chosen["save_steps"] if best else 0.1  # share of all steps
    if "eval_steps" in written or "eval_strategy" in written:
        defaults["evaluation_budget"] = None  # somebody has said when
    if "per_device_train_batch_size" in written:  # what fits in training fits in evaluation
        defaults["per_device_eval_batch_size"] = written["per_device_train_batch_size"]
    if metric_name(written) in ("perplexity", "entropy"):
        defaults["greater_is_better"] = False  # upstream knows it of names that end in `loss` alone
    if written.get("activation_checkpointing") is not None:  # its newer name, which wins in transformers
        defaults["gradient_checkpointing"] = written["activation_checkpointing"]
    return defaults


class FrozenDict(dict[str, Any]):
    """A dict that cannot be changed, yet pickles, deep-copies and unpacks like one."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a recipe is read-only; change a value with an override, e.g. train.max_steps=10")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """Mappings to FrozenDict and lists to tuples, all the way down."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The opposite of `freeze`: new plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value


FrozenMap = Annotated[Mapping[str, Any], AfterValidator(freeze)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """`model:` what is trained. Either `name_or_path`, or `config` with `tokenizer` to start from random weights."""

    name_or_path: str | None = Field(default=None, min_length=1, description="Hub id or folder of the model")
    config: FrozenMap | None = Field(
        default=None, description="a model config with its model_type; starts from random weights"
    )
    tokenizer: str | None = Field(default=None, min_length=1, description="Hub id or folder; default: the model's own")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    subfolder: str | None = Field(
        default=None, min_length=1, description="a folder inside the repo; `latest` takes its newest checkpoint"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of the weights in memory"
    )
    attn_implementation: str = Field(
        default="auto",
        min_length=1,
        description="auto, eager, sdpa, varlen (packs by their borders), flash_attention_2 or another that "
        "transformers knows; auto takes varlen for packs on CUDA where the model allows it",
    )
    overrides: FrozenMap | None = Field(
        default=None, description="fields of the model's own config.json that are set anew, e.g. {attn_pdrop: 0.0}"
    )
    freeze: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="regular expressions for names of layers or weights that stay as they are",
    )
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None, min_length=1, description="tokens of your own that the vocabulary gains; their rows are trained"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="bits of the frozen base weights; needs adapter.type: lora"
    )


class DatasetEntry(_Section):
    """One of `data.datasets`: exactly one of `name`, `hub`, `path` and `url`, and how to read it."""

    name: str | None = Field(default=None, description="a data set that instructft knows by name")
    hub: str | None = Field(default=None, description="a data set id on the Hub, org/name")
    path: str | None = Field(
        default=None,
        min_length=1,
        description="a local file of rows (JSON, JSONL, CSV, TSV, Parquet, Arrow), a folder, or a pattern",
    )
    url: str | None = Field(default=None, description="http(s) address of such a file")
    format: str | None = Field(default=None, description="shape of the rows; default: detected by their columns")
    config: str | None = Field(default=None, min_length=1, description="the data set's configuration on the Hub")
    split: str | None = Field(default=None, min_length=1, description="the data set's split, e.g. train[:10%]")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit on the Hub")
    rows: int | None = Field(default=None, gt=0, description="rows to take at most; default: all")
    weight: float = Field(default=1.0, gt=0, description="share in a mix, relative to the other data sets")
    repeat: float = Field(
        default=1.0,
        gt=0,
        description="how often its rows are trained in an epoch; 0.5: half of them, drawn by data.seed",
    )
    columns: Annotated[Mapping[str, str], AfterValidator(freeze)] = Field(
        default_factory=FrozenDict, description="column that the format expects: column in this data set"
    )
    label: str | None = Field(
        default=None, min_length=1, description="what it is called in logs and reports; default: its name or place"
    )
    streaming: bool = Field(default=False, description="read rows as they come instead of downloading all first")


class Splits(_Section):
    """`data.splits`: shares of the rows that are held out; the rest is trained."""

    validation: float = Field(default=0.05, ge=0, lt=1, description="share of the rows, evaluated during training")
    test: float = Field(
        default=0.0, ge=0, lt=1, description="share of the rows, never seen in training; for `evaluate`"
    )


class DataSection(_Section):
    """`data:` which conversations, how they are rendered, cut, packed and held out."""

    datasets: tuple[DatasetEntry, ...] = Field(min_length=1, description="each with name, hub, path or url")
    mix_by: Literal["rows", "tokens"] = Field(
        default="rows", description="what the weights of data sets are shares of, where they differ"
    )
    template: str = Field(
        default="auto", min_length=1, description="auto, a built-in name, tokenizer, or a .jinja file"
    )
    system_prompt: str | None = Field(default=None, description="system message of every conversation that has none")
    template_options: FrozenMap = Field(
        default_factory=FrozenDict,
        description="what the template takes, such as {enable_thinking: false}; a row's chat_template_kwargs win",
    )
    template_adds: tuple[Literal["tools", "system", "thinking"], ...] = Field(
        default=(), description="what the template lacks and is given, here and in the saved model"
    )
    template_date: str = Field(
        default="2024-07-26",
        pattern=r"^\d{4}-\d\d-\d\d$",
        description="the day, YYYY-MM-DD, for templates that put today's date in: the same in every run and server",
    )
    train_on: Literal["responses", "last_response", "everything"] = Field(
        default="responses", description="which tokens carry loss"
    )
    turns: Literal["all", "last"] = Field(
        default="all",
        description="where a template rewrites history: every turn as it is served, or the last row alone",
    )
    fold_turns: Literal["auto"] | bool = Field(
        default="auto",
        description="such turns in one row, what they share once (sdpa, eager); auto: where the model is proved to "
        "keep them apart and a tenth of the tokens is saved",
    )
    ignore: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="columns and message keys that are known not to matter; others unread are an error"
    )
    strip: bool = Field(default=False, description="whether outer white space of texts is taken off")
    exclude: str | None = Field(
        default=None,
        min_length=1,
        description="a file of row ids, one a line, that are not trained on; `instructft rows RUN --exclude FILE` "
        "writes one",
    )
    max_length: int = Field(
        default=1024, gt=1, description="tokens per row; left out, no more than the model has positions"
    )
    on_too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate", description="what happens to a row longer than max_length"
    )
    packing: bool | Literal["auto"] = Field(
        default=False,
        description="several conversations in one row of max_length, kept apart; auto: where that saves more than a "
        "tenth of the slots and the model is proved to keep them apart",
    )
    splits: Splits = Field(default=Splits(), description="shares of the rows that are held out")
    validation: tuple[DatasetEntry, ...] | None = Field(
        default=None, min_length=1, description="data sets of their own to evaluate on, in place of a share of the rows"
    )
    test: tuple[DatasetEntry, ...] | None = Field(
        default=None, min_length=1, description="data sets of their own for `evaluate`, in place of a share of the rows"
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="which rows are held out, mixing and packing order")

    def holds_out(self, split: str) -> bool:
        """Whether a split, `validation` or `test`, has rows: a share of all, or data sets of its own."""
        return bool(getattr(self, split)) or getattr(self.splits, split) > 0


class AdapterSection(_Section):
    """`adapter:` LoRA, and with `model.quantization` QLoRA. `adapter: lora` is short for `{type: lora}`.

    Any other field of peft.LoraConfig may stand beside these by its own name; it lands in `more`.
    """

    type: Literal["none", "lora"] = Field(default="none", description="none trains all weights")
    r: int = Field(default=16, gt=0, description="rank of the update")
    alpha: int = Field(
        default=32, gt=0, description="the update is scaled by alpha / r (by alpha / sqrt(r) with use_rslora)"
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="share of the adapter's inputs that are dropped")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", min_length=1, description="all-linear, a regular expression, or a list of module names"
    )
    use_dora: bool = Field(default=False, description="weight-decomposed LoRA, arXiv:2402.09353")
    use_rslora: bool = Field(default=False, description="rank-stabilized LoRA, arXiv:2312.03732")
    lora_plus_ratio: float | None = Field(
        default=None, ge=1, description="times the learning rate, for B alone (LoRA+, arXiv:2402.12354)"
    )
    experts: bool | Literal["auto"] = Field(
        default="auto",
        description="whether the experts of a mixture get an adapter; auto: where target_modules is all-linear",
    )
    stack: bool = Field(
        default=False,
        description="over an adapter in model.name_or_path: true trains a new one on top of it, which stays as it is; "
        "false trains that one further",
    )
    more: FrozenMap = Field(default_factory=FrozenDict, exclude=True)  # not a key

    def peft_kwargs(self) -> dict[str, Any]:
        """What `peft.LoraConfig` is to be called with, under PEFT's names.

        >>> AdapterSection(type="lora", r=8).peft_kwargs()["lora_alpha"]
        32
        """
        own: dict[str, Any] = {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        own |= {"target_modules": self.target_modules, "use_dora": self.use_dora, "use_rslora": self.use_rslora}
        plain: dict[str, Any] = thaw({**own, **self.more})
        return plain


class HubSection(_Section):
    """`hub:` where the result goes. The access token comes from HF_TOKEN or the login, never from here."""

    repo_id: str | None = Field(default=None, description="name or org/name on the Hub")
    private: bool = Field(default=True, description="whether a new repo is private")
    path_in_repo: str | None = Field(default=None, min_length=1, description="folder in the repo, e.g. instruct/")
    push: Literal["never", "end", "checkpoints"] = Field(default="never", description="what is uploaded, and when")


class CheckSection(_Section):
    """`check:` what `instructft check` lets pass: a report beyond a limit ends with exit code 2. Null: no limit."""

    max_dropped_share: float | None = Field(
        default=0.2, ge=0, le=1, description="share of a data set's rows; dropped. Stops a run too"
    )
    max_refused_share: float | None = Field(
        default=0.0, ge=0, le=1, description="share of a data set's rows; refused by the template. Stops a run too"
    )
    max_cut_share: float | None = Field(default=None, ge=0, le=1, description="share of rows; cut at max_length")
    max_duplicate_share: float | None = Field(
        default=None, ge=0, le=1, description="share of rows; the same or nearly the same as an earlier one"
    )
    max_contradictions: int | None = Field(default=None, ge=0, description="rows; one question, different answers")
    max_leaks: int | None = Field(default=None, ge=0, description="rows; held out, and trained or nearly so")
    max_markers: int | None = Field(default=None, ge=0, description="rows; an answer holds the template's markers")
    max_memory_gib: float | None = Field(
        default=None, gt=0, description="GiB on one device; as estimated, or measured with --measure"
    )


class EvaluationSection(_Section):
    """`evaluation:` held-out rows that the model in training answers, and what its answers are judged by."""

    rows: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="held-out rows answered at every evaluation, drawn by data.seed; auto: what takes at most half of "
        "train.evaluation_budget; 0: none",
    )
    metrics: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description=f"{', '.join(ANSWER_FIGURES)}; without one of these names all that apply; beside them functions "
        "of your own, FILE.py:FUNCTION",
    )

    def figures(self) -> tuple[str, ...]:
        """The figures of ours that are wanted.

        >>> EvaluationSection(metrics=("exact_match", "my_metrics.py:score")).figures()
        ('exact_match',)
        """
        return tuple(name for name in self.metrics if name in ANSWER_FIGURES) or ANSWER_FIGURES

    def functions(self) -> dict[str, tuple[str, str]]:
        """Name -> file and function of the user's own figures.

        >>> EvaluationSection(metrics=("exact_match", "my_metrics.py:score")).functions()
        {'score': ('my_metrics.py', 'score')}
        """
        own = [name.rpartition(":") for name in self.metrics if name not in ANSWER_FIGURES]
        return {function: (file, function) for file, _, function in own}


class Recipe(_Section):
    """A whole recipe, read-only all the way down. Made by `load_recipe`."""

    model: ModelSection = Field(default=ModelSection(), description="what is trained")
    data: DataSection = Field(description="what it is trained on")
    adapter: AdapterSection = Field(default=AdapterSection(), description="all weights, or a LoRA adapter")
    train: FrozenMap = Field(default_factory=FrozenDict, description="our own keys, and fields of trl.SFTConfig")
    evaluation: EvaluationSection = Field(
        default=EvaluationSection(), description="held-out rows that are answered while it trains"
    )
    samples: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="prompts answered at evaluations, as train.evaluation_budget allows"
    )
    hub: HubSection = Field(default=HubSection(), description="where the result goes")
    check: CheckSection = Field(default=CheckSection(), description="limits for `instructft check`")
    output_dir: str = Field(default="", min_length=1, description="the run folder; default: runs/<recipe name>")

    # not keys: what is known about the recipe itself
    name: str = Field(default="", exclude=True)  # the file's stem, or the shipped recipe's name
    source: str = Field(default="", exclude=True)  # the file it was read from
    train_written: frozenset[str] = Field(default=frozenset(), exclude=True)  # the keys of `train` that somebody wrote

    def train_resolved(self) -> dict[str, Any]:
        """Every legal key of `train:` with the value that will be used, SFTConfig's own defaults included."""
        values = {name: row["default"] for name, row in legal_train_fields().items()} | dict(self.train)
        if self.train.get("tokens_per_step") is not None:
            del values["gradient_accumulation_steps"]  # follows from the number of processes
        resolved: dict[str, Any] = thaw(values)
        return resolved

    def sft_kwargs(self) -> dict[str, Any]:
        """What `trl.SFTConfig` is to be called with: `train` as plain dicts and lists, without our own keys.

        >>> load_recipe("quickstart", ["train.max_steps=10"]).sft_kwargs()["max_steps"]
        10
        """
        fields = {key: thaw(value) for key, value in self.train.items() if key not in OWN_TRAIN_FIELDS}
        for key, row in legal_train_fields().items():  # upstream refuses 0 where it wants 0.0; steps are counted
            if "float" in row["kinds"] and type(fields.get(key)) is int and not key.endswith("_steps"):
                fields[key] = float(fields[key])
        return fields

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain dicts and lists: every key, every default."""
        model, adapter = self.model.model_dump(), self.adapter.model_dump() | dict(self.adapter.more)
        del model["name_or_path" if self.model.config is not None else "config"]
        data = self.data.model_dump()
        for entry in data["datasets"]:
            for key in ("name", "hub", "path", "url"):
                if entry[key] is None:
                    del entry[key]
        for entry in (*data["datasets"], *(data["validation"] or ()), *(data["test"] or ())):
            if entry.get("url"):
                entry["url"] = bare_url(entry["url"])  # what is signed stays in memory
        rest = {"evaluation": self.evaluation.model_dump(), "samples": self.samples}
        rest |= {"hub": self.hub.model_dump(), "check": self.check.model_dump()}
        rest["output_dir"] = self.output_dir
        sections = {"model": model, "data": data, "adapter": adapter, "train": self.train_resolved(), **rest}
        plain: dict[str, Any] = thaw(sections)
        return plain

    def told(self) -> dict[str, Any]:
        """What a recipe says beyond the defaults, as plain dicts and lists: enough to run it again.

        >>> load_recipe("quickstart").told()["data"]["template"]
        'instruction'
        """
        whole = self.to_dict()
        usual = Recipe(data=DataSection(datasets=(DatasetEntry(name=""),))).to_dict()
        defaults = {name: row["default"] for name, row in legal_train_fields().items()}
        train = train_defaults({}, self.data.holds_out("validation"))
        # a seed belongs to every record of a run, and so does the learning rate, which follows from the model
        always = {"seed", "learning_rate", "max_length", "template", "train_on", "type"}
        usual["train"] = {**thaw(defaults), **thaw(train)}
        found: dict[str, Any] = {}
        for section, values in whole.items():
            if not isinstance(values, dict):
                if values not in (usual.get(section), []):
                    found[section] = values
                continue
            kept = {k: v for k, v in values.items() if k in always or v != usual[section].get(k)}
            if section == "data":
                entry = usual["data"]["datasets"][0]
                for key in ("datasets", "validation", "test"):
                    if kept.get(key):
                        kept[key] = [
                            {k: v for k, v in one.items() if v is not None and v != entry.get(k, "")}
                            for one in kept[key]
                        ]
            if section == "train":  # some defaults follow from what is kept
                follow = {**usual["train"], **thaw(train_defaults(kept, self.data.holds_out("validation")))}
                kept |= {k: v for k, v in values.items() if v != follow.get(k)}
            if kept and not (section == "adapter" and values["type"] == "none"):
                found[section] = kept
        return found

    def to_yaml(self) -> str:
        """The resolved recipe as YAML 1.2; read again it gives an equal Recipe."""
        title = " ".join(self.name.split()) or "recipe"
        comment = f"# {title}: the recipe as it was resolved, every default spelled out"
        return f"{comment}\n{yaml_text(self.to_dict())}"

    def __eq__(self, other: object) -> bool:
        """Equal when they ask for the same run, whatever was written and whatever was default."""
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        sections = (self.model, self.data, self.adapter, self.evaluation, self.samples, self.hub, self.check)
        return hash((*sections, self.output_dir))
