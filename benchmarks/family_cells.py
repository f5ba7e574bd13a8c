"""What is asked of one architecture: a tiny model of it through `train`, `generate` and `merge`, by plain transformers.

    found = of_family("llama", folder)      # {"full": {"verdict": "right", "text": ""}, …}

Each cell is `right`, `refused` with the reason that a person is told, `none` where the model has no such part, `wrong`
with the figure, or `crash`. Only what
the commands use is called; what it is held against is `from_pretrained`, the model's own logits and a loop over rows.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny_families import build
from transformers import CONFIG_MAPPING

import instructft
from instructft.errors import InstructftError
from instructft.weights.model_class import refuse_what_does_not_answer

Cell = dict[str, Any]

COLUMNS = ("full", "saved", "packed", "answers", "lora", "merge", "experts")
CLOSE = 1e-4  # of a loss
SAME_STEP = 2e-3  # of an optimizer's step, as a share of its length
STEP = 0.01  # length of that step, as a share of the length of all weights
LEAK = 1e-5  # of the largest logit: two documents see each other
QUESTIONS = ("Name a fruit.", "What is the capital of France? Answer in a short sentence, please.", "Is 2 plus 6 8?")
ANSWER = 8  # tokens
RECIPE = """
model: {{name_or_path: {base}}}
data: {{datasets: [{{path: {rows}}}], template: instruction, max_length: 128, splits: {{validation: 0.25}}}}
adapter: {adapter}
train:
  max_steps: {steps}
  per_device_train_batch_size: 64
  learning_rate: {rate}
  lr_scheduler_type: constant
  warmup_steps: 0
  weight_decay: 0.0
  max_grad_norm: 0.0
  logging_steps: 1
  on_divergence: warn
  loss_spike_limit: 1000000
  use_cpu: true
  save_strategy: "no"
  report_to: []
output_dir: {out}
"""

# Fields of a configuration that say how it was saved, not what the model is; tokens that the tokenizer names; and what
# transformers 4 reads where transformers 5 has `rope_parameters`.
_OF_SAVING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_OF_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling", "num_experts")


class Bench:
    """A tiny model of a family in a folder, and the runs that are made of it."""

    def __init__(self, family: str, folder: Path, **more: Any):
        from rich.console import Console

        self.family, self.folder = family, folder
        self.console = Console(file=io.StringIO(), width=200)
        self.base = folder / "base"
        rows = folder / "rows.jsonl"
        pairs = [(f"How much is {i} plus {i + 3}?", f"{i} plus {i + 3} is {2 * i + 3}.") for i in range(6)]
        pairs += [(f"Say {word}" * (i + 1), f"{word}, as you wish") for i, word in enumerate(("soup", "rain", "pens"))]
        pairs += [(f"Which letter follows {letter}?", f"After {letter}.") for letter in "ABC"]
        rows.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs))
        self.rows = rows
        plain = instructft.load_recipe(str(self._recipe("tokenizer", name="quickstart")))
        tokens = instructft.load_tokenizer(plain)
        end = tokens.eos_token_id
        model = build(family, len(tokens), end, **more)
        model.save_pretrained(self.base)
        tokens.save_pretrained(self.base)
        self.kind = type(model).__name__
        self.sees = model.config.get_text_config() is not model.config
        self.weights = sum(weight.numel() for weight in model.parameters())
        self.router = hasattr(model.config.get_text_config(), "router_aux_loss_coef")

    def _recipe(self, what: str, *, name: str = "", adapter: str = "none", steps: int = 1, rate: float = 0.0) -> Path:
        text = RECIPE.format(
            base=name or self.base, rows=self.rows, adapter=adapter, steps=steps, rate=rate, out=self.folder / what
        )
        if name:
            text = text.replace("name_or_path: quickstart", "config: {model_type: gpt2}, tokenizer: quickstart")
        path = self.folder / f"{what}.yaml"
        path.write_text(text)
        return path

    def run(self, what: str, *overrides: str, **settings: Any) -> Path:
        """Train; the folder of the run."""
        out = self.folder / what
        shutil.rmtree(out, ignore_errors=True)
        path = self._recipe(what, **settings)
        instructft.train(instructft.load_recipe(str(path), list(overrides)), console=self.console)
        return out


def plain(folder: Path) -> Any:
    """A model as its users load it: by the class that its config names."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def losses(model: Any, rows: Any) -> torch.Tensor:
    """Mean loss of the supervised tokens by the model's own logits, each row alone."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])  # (1, T)
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
        kept = labels != -100
        total = total - logits[kept].log_softmax(-1).gather(-1, labels[kept][:, None]).sum()
        count += int(kept.sum())
    return total / count


def logged(out: Path) -> tuple[float, float]:
    """The first training loss and the last validation loss of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = next(line["loss"] for line in lines if line.get("step") == 1 and "loss" in line)
    return first, [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def right(text: str = "") -> Cell:
    return {"verdict": "right", "text": text}


def wrong(text: str) -> Cell:
    return {"verdict": "wrong", "text": text}


def tried(work: Callable[[], Cell]) -> Cell:
    """What `work` finds; an error of ours is a refusal, any other a crash."""
    try:
        return work()
    except InstructftError as error:
        return {"verdict": "refused", "text": " ".join(str(error).split())}
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"verdict": "crash", "text": text, "traceback": traceback.format_exc()[-2500:]}


# --------------------------------------------------------------------------------------------------------------------
# The cells
# --------------------------------------------------------------------------------------------------------------------


def of_family(family: str, folder: Path, **more: Any) -> dict[str, Any]:
    """All cells of a family; where it is refused by its name or cannot be built small, the reason in their place."""
    try:
        refuse_what_does_not_answer(CONFIG_MAPPING[family])
    except InstructftError as error:
        return {"family": family, "unbuilt": f"refused: {error}"}
    try:
        bench = Bench(family, folder, **more)
        model = plain(bench.base)
        with torch.no_grad():
            model(input_ids=torch.arange(9)[None], use_cache=False)
    except InstructftError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return {"family": family, "unbuilt": text}
    found: dict[str, Any] = {"family": family, "class": bench.kind, "weights": bench.weights, "sees": bench.sees}
    recipe = instructft.load_recipe(str(bench._recipe("rows")))
    data = instructft.prepare_dataset(recipe, instructft.load_tokenizer(recipe))
    reference = Reference(model, data)
    found["full"] = tried(lambda: full(bench, reference))
    run = bench.folder / "full"
    whole = (run / "run.json").exists()
    found["saved"] = (
        tried(lambda: saved(bench, run)) if whole else {"verdict": "refused", "text": "nothing was trained"}
    )
    found["packed"] = tried(lambda: packed(bench, reference, model))
    nothing = {"verdict": "refused", "text": "nothing was trained"}
    found["answers"] = tried(lambda: answers(run)) if whole else nothing
    found["lora"] = tried(lambda: adapted(bench, data["validation"]))
    if found["lora"]["verdict"] in ("right", "wrong"):
        found["merge"] = tried(lambda: merged(bench))
    else:
        found["merge"] = {"verdict": "refused", "text": "there is no adapter"}
    found["experts"] = tried(lambda: experts(bench, model, found))
    return found


class Reference:
    """One step of plain gradient descent on all rows, by a loop over them and the model's own logits."""

    def __init__(self, model: Any, data: Any):
        self.rows, self.validation = list(data["train"]), list(data["validation"])
        model.train()  # nothing is dropped out, but some routers choose at random while they are trained
        state = torch.get_rng_state()
        loss = losses(model, self.rows)
        self.random = not torch.equal(state, torch.get_rng_state())
        loss.backward()
        model.eval()
        self.loss = float(loss.detach())
        named = dict(model.named_parameters())
        grads = {n: w.grad for n, w in named.items() if w.grad is not None and bool(w.grad.isfinite().all())}
        length = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        weights = sum(float(w.detach().double().square().sum()) for w in named.values()) ** 0.5
        self.rate = STEP * weights / max(length, 1e-12)
        self.before = {name: weight.detach().clone() for name, weight in named.items()}
        self.step = {name: -self.rate * grad for name, grad in grads.items()}
        model.zero_grad(set_to_none=True)

    def apart(self, model: Any) -> tuple[float, str]:
        """How far a trained model's step is from this one, as a share of it, and the weight where it is farthest."""
        total = far = 0.0
        worst, where = -1.0, ""
        for name, weight in model.named_parameters():
            moved = weight.detach() - self.before[name]
            wanted = self.step.get(name, torch.zeros_like(moved))
            apart = float((moved - wanted).double().square().sum())
            total, far = total + float(wanted.double().square().sum()), far + apart
            if apart > worst:
                worst, where = apart, name
        return (far / max(total, 1e-30)) ** 0.5, where


def _held(bench: Bench, out: Path, reference: Reference) -> str:
    """What is wrong with a run of one step; "" where nothing is."""
    first, last = logged(out)
    model = plain(out)
    with torch.no_grad():
        asked = float(losses(model, reference.validation))
    if not abs(last - asked) <= CLOSE * max(1, asked):
        return f"validation loss {last:.5f}, by plain logits {asked:.5f}"
    if reference.random:
        return ""
    if not abs(first - reference.loss) <= CLOSE * max(1, reference.loss):
        return f"loss {first:.5f}, by plain logits {reference.loss:.5f}"
    apart, where = reference.apart(model)
    return f"the step is {apart:.1e} off, most at {where}" if not apart <= SAME_STEP else ""


def _said(out: Path) -> str:
    facts = json.loads((out / "run.json").read_text())
    return "; ".join((facts.get("rehearsal") or {}).get("said", []))


def _one_step(bench: Bench, what: str, reference: Reference, *overrides: str) -> Cell:
    router = ["train.router_aux_loss_coef=0.0"] if bench.router else []
    out = bench.run(what, "train.optim=sgd", *router, *overrides, rate=reference.rate)
    fault = _held(bench, out, reference)
    said = [_said(out), "the router draws experts in training: the step is not compared" if reference.random else ""]
    return wrong(fault) if fault else right("; ".join(line for line in said if line))


def full(bench: Bench, reference: Reference) -> Cell:
    """One step of all weights: loss, step and validation loss."""
    return _one_step(bench, "full", reference)


def saved(bench: Bench, out: Path) -> Cell:
    """Every tensor of the base is in the run, with its shape, and the configuration says what that of the base says."""
    old, new = _tensors(bench.base), _tensors(out)
    if lost := sorted(old.items() - new.items()):
        return wrong(f"{len(lost)} tensors of the base are not in the run: {', '.join(name for name, _ in lost[:3])}")
    if more := sorted(new.items() - old.items()):
        return wrong(f"{len(more)} tensors of the run are not in the base: {', '.join(name for name, _ in more[:3])}")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (bench.base, out))
    if changed := _changed(before, after):
        return wrong(f"config.json says something else: {', '.join(changed)}")
    return right()


def _changed(before: Any, after: Any) -> list[str]:
    """Fields that say something else, in sections too."""
    found = []
    for key in sorted((before.keys() | after.keys()) - {*_OF_SAVING, *_OF_TOKENS}):
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _changed(one, other)
        elif one != other:
            found.append(key)
    return found


def _tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def packed(bench: Bench, reference: Reference, model: Any) -> Cell:
    """The same step with the rows in packs; a refusal is held against what a document's neighbour changes."""
    found = tried(lambda: _one_step(bench, "packed", reference, "data.packing=true"))
    if found["verdict"] == "refused" and "data.packing" in found["text"]:
        if (share := leak(model)) > LEAK:
            found["text"] = f"{found['text']} (measured: {share:.1e})"
        else:
            return wrong(f"refused, but clean ({share:.1e}): {found['text']}")
    return found


@torch.no_grad()
def leak(model: Any) -> float:
    """How far a document's logits move with another document before it, as a share of the largest."""
    worst = 0.0
    for first, second in ((11, 9), (60, 50)):
        source = torch.Generator().manual_seed(first)
        rows = model.get_input_embeddings().weight.shape[0]
        one, other, after = (torch.randint(5, rows, (1, n), generator=source) for n in (first, first, second))
        positions = torch.cat([torch.arange(first), torch.arange(second)])[None]
        try:
            behind = [
                model(input_ids=torch.cat([x, after], 1), position_ids=positions, use_cache=False).logits[0, first:]
                for x in (one, other)
            ]
        except (TypeError, IndexError, RuntimeError, ValueError):
            return float("inf")  # it takes no positions at all
        alone = model(input_ids=after, use_cache=False).logits[0]
        worst = max(worst, *(float((x - alone).abs().max()) for x in behind)) / float(alone.abs().max())
    return worst


def answers(run: Path) -> Cell:
    """Greedy answers to prompts of unlike length in one batch, each held against a loop without cache or padding."""
    from instructft.inference.chat import as_generator
    from instructft.inference.continuous_batching import Row

    generator = as_generator(run)
    prompts = generator.encoder.prompts([[{"role": "user", "content": q}] for q in QUESTIONS])
    rows = [Row(i, ids, ANSWER) for i, ids in enumerate(prompts)]
    generator.complete(rows, batch_size=len(rows))
    model = plain(run)
    for row in rows:
        ids, made = list(row.prompt), []
        while len(made) < ANSWER and (not made or made[-1] not in generator.stop_ids):
            asked = torch.tensor([ids + made])
            with torch.no_grad():
                logits = model(input_ids=asked, attention_mask=torch.ones_like(asked), use_cache=False).logits[0, -1]
            made.append(int(logits.argmax()))
            top = logits.float().topk(2).values
            if float(top[0] - top[1]) < 1e-4 * float(logits.abs().max()):
                break  # a tie that rounding decides
        else:
            if list(row.made) != made:
                return wrong(f"answers {list(row.made)} to question {row.index + 1}, alone and by hand {made}")
    return right("" if generator.answers_together() else "one at a time: it does not pass over padding")


def adapted(bench: Bench, validation: Any) -> Cell:
    """LoRA on all linear layers: moved, base untouched, and the same loss when plain PEFT loads it."""
    from peft import PeftModel

    out = bench.run("lora", adapter="{type: lora, r: 4, dropout: 0.0}", steps=4, rate=1e-2)
    facts = json.loads((out / "run.json").read_text())
    model = PeftModel.from_pretrained(plain(bench.base), str(out)).eval()
    with torch.no_grad():
        asked = float(losses(model, list(validation)))
    _, last = logged(out)
    reached = sum(weight.numel() for weight in _under(model).values())
    if not abs(asked - last) <= CLOSE * max(1, abs(asked)):
        return wrong(f"validation loss {last:.5f}, loaded by PEFT {asked:.5f}")
    return right(_said(out)) | {"share": round(reached / bench.weights, 3), "proof": facts.get("adapter")}


@torch.no_grad()
def merged(bench: Bench) -> Cell:
    """The merged model against the base with its adapter attached."""
    from peft import PeftModel

    out = bench.folder / "merged"
    shutil.rmtree(out, ignore_errors=True)
    instructft.merge_adapter(str(bench.folder / "lora"), str(out), console=bench.console)
    ids = torch.randint(5, 500, (1, 24), generator=torch.Generator().manual_seed(4))
    before = plain(bench.base)(input_ids=ids, use_cache=False).logits
    attached = PeftModel.from_pretrained(plain(bench.base), str(bench.folder / "lora")).eval()
    wanted = attached(input_ids=ids, use_cache=False).logits
    apart = float((plain(out)(input_ids=ids, use_cache=False).logits - wanted).abs().max() / wanted.abs().max())
    effect = float((wanted - before).abs().max() / wanted.abs().max())
    good = apart < 1e-4 and effect > 10 * apart
    return (right() if good else wrong(f"{apart:.1e} apart, effect {effect:.1e}")) | {"apart": apart}


def _under(attached: Any) -> dict[int, torch.Tensor]:
    """The weights of the base that an adapter adds to, by their identity."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers = [part for part in attached.modules() if isinstance(part, LoraLayer)]
    weights = [part.get_param() if isinstance(part, ParamWrapper) else part.get_base_layer().weight for part in layers]
    return {id(weight): weight for weight in weights}


def _experts(model: Any) -> dict[str, torch.Tensor]:
    """The matrices of the experts among which a router chooses, as one parameter of a layer or as layers."""
    found = {}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        owners = [
            (part, type(model.get_submodule(".".join(parts[: i + 1]))).__name__) for i, part in enumerate(parts[:-1])
        ]
        named = any("expert" in f"{part} {kind}".lower() for part, kind in owners)
        other = any(re.search(r"shared|router|^gate$", part) for part, _ in owners) or "bias" in parts[-1]
        if named and not other and weight.dim() > 1:
            found[name] = weight
    return found


@torch.no_grad()
def experts(bench: Bench, model: Any, found: dict[str, Cell]) -> Cell:
    """The share of the experts' weights that the adapter reaches; each is merged as by PEFT's own merge."""
    from peft import PeftModel

    before = _experts(model)
    if not before:
        return {"verdict": "none", "text": ""}
    if found["merge"]["verdict"] == "refused":
        return {"verdict": "refused", "text": found["merge"]["text"]}
    attached = PeftModel.from_pretrained(plain(bench.base), str(bench.folder / "lora")).eval()
    under = _under(attached)
    weights = {name.replace(".base_layer", ""): w for name, w in attached.get_base_model().named_parameters()}
    names = [name for name in before if id(weights[name]) in under]
    if not names:  # not of a shape that PEFT takes for experts: where they are asked for, that has to be said
        with torch.enable_grad():
            bench.run("experts", adapter="{type: lora, r: 4, experts: true}")
        return wrong("asked for and not reached, and nothing says so")
    share = {"share": round(sum(before[name].numel() for name in names) / sum(w.numel() for w in before.values()), 3)}
    wanted, made = (
        dict(one.named_parameters()) for one in (attached.merge_and_unload(), plain(bench.folder / "merged"))
    )
    still = [name for name in names if torch.equal(wanted[name], before[name])]
    far = [name for name in before if not torch.allclose(made[name], wanted[name], rtol=1e-4, atol=1e-6)]
    if still or far:
        return wrong(f"{len(still)} did not move, {len(far)} are not merged as by PEFT: {(still + far)[:2]}") | share
    return right() | share
