"""Batch generation: ours, one by one, and transformers' `pipeline("text-generation", batch_size=…)`, in one run.

    python benchmarks/generate.py [--prompts 500] [--batch-size 32] [--data FILE] [--tokenizer DIR] [--rolling-off]

The model is a GPT-2 of 6 layers × 384 with random weights, float32, on the CPU, greedy. The embedding of the end token
is scaled, so that answers end at random places: on average after some 30 tokens, as in the instruction set that the
prompts come from. Prints tokens/s of each way, and in how many rows the answers of the other two differ from those
that were made one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
DATA = Path(__file__).resolve().parent.parent / "tests" / "assets"
END = 2.0  # how much longer the end token's embedding is than others'


def build(tokenizer: Any) -> Any:
    """The model; a sharp one, so that no choice hangs on the last bit of a float."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 1024}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.1)
        model.transformer.wpe.weight.normal_(0, 0.3)
        model.transformer.wte.weight[tokenizer.eos_token_id] *= END
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32, help="of ours and of the pipeline")
    parser.add_argument("--data", type=Path, default=DATA / "rows.json")
    parser.add_argument("--tokenizer", default=str(DATA / "gpt2"))
    parser.add_argument("--rolling-off", action="store_true", help="ours also without rows that leave and join")
    options = parser.parse_args()

    import transformers

    from instructft.inference import continuous_batching
    from instructft.inference.generator import Generator
    from instructft.prompt.templates import TEMPLATES

    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATES["instruction"].text()
    model = build(tokenizer)
    given = json.loads(options.data.read_text(encoding="utf-8"))
    rows = [given[i % len(given)] for i in range(options.prompts)]
    asked = [[{"role": "user", "content": row["instruction"], "input": row["input"]}] for row in rows]
    generator = Generator(model, tokenizer)
    texts: dict[str, list[str]] = {}
    speeds: dict[str, float] = {}
    counted: dict[str, int] = {}

    def report(name: str, answers: list[str], tokens: int, began: float) -> None:
        seconds = time.perf_counter() - began
        texts[name], speeds[name], counted[name] = answers, tokens / seconds, tokens
        differ = sum(a != b for a, b in zip(answers, texts["one by one"], strict=True))
        ratio = speeds[name] / speeds["one by one"]
        print(
            f"{name:24} {tokens:8,} tokens {seconds:8.1f} s {speeds[name]:8.1f} tokens/s {ratio:6.2f} × one by one, "
            f"{differ} of {len(rows)} rows differ",
            flush=True,
        )

    def ours(name: str, batch_size: int) -> None:
        began = time.perf_counter()
        answers = generator.answers(asked, batch_size=batch_size)
        report(name, [answer.text for answer in answers], sum(answer.tokens for answer in answers), began)

    generator.answers(asked[:2], max_new_tokens=4)
    ours("one by one", 1)
    ours("instructft", options.batch_size)
    if options.rolling_off:
        leave, continuous_batching.LEAVE = continuous_batching.LEAVE, 1
        ours("instructft, not rolling", options.batch_size)
        continuous_batching.LEAVE = leave
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = generator.encoder.render(asked, True)
    given = {"return_full_text": False, "add_special_tokens": False, "max_new_tokens": 256, "do_sample": False}
    began = time.perf_counter()
    made = pipeline(prompts, batch_size=options.batch_size, pad_token_id=tokenizer.eos_token_id, **given)
    answers = [one[0]["generated_text"].strip() for one in made]
    # what it makes is text only; where that is equal, so are the tokens
    report("transformers' pipeline", answers, counted["one by one"], began)


if __name__ == "__main__":
    main()
