"""What the weights of a full fine-tuning are held in, and the loss that it comes to: same start, rows and rate.

    python benchmarks/weights_dtype.py [--steps 40] [--rate 1e-4] [--layers 4] [--width 256] [--accumulation 1]

float32; bfloat16 with float32 copies in the optimizer; bfloat16 rounded by chance, with AdamW's state in 8 bits (needs
torchao); and plain bfloat16, which rounds to the nearest and so loses most updates of a small rate. A GPT-2 of random
weights, which are bfloat16's own numbers so that all begin alike, on the bundled rows. `moved` is the share of the
numbers of all matrices, as the last checkpoint holds them, that are others than in the beginning.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from contestants import source_and_tokenizer
from data_prep import build_rows
from gpu.runs import NO_DROPOUT, losses, recipe, train

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16, float32 copies": ("bfloat16", {"float32_copies": True}),
    "bfloat16, rounded by chance, 8-bit states": (
        "bfloat16", {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=true"},
    ),
    "bfloat16": ("bfloat16", {}),
}  # fmt: skip


def start(folder: Path, tokenizer: str, layers: int, width: int) -> Path:
    """The model that all begin from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = {"n_layer": layers, "n_embd": width, "n_head": max(1, width // 64), "n_positions": 256, **NO_DROPOUT}
    known = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=len(known), **shape))
    model.bfloat16().float().save_pretrained(folder / "model")
    known.save_pretrained(folder / "model")
    return folder / "model"


def moved(before: Path, after: Path) -> float:
    """The share of the numbers of all matrices that are others than before."""
    from safetensors.torch import load_file

    first, last = (load_file(path / "model.safetensors") for path in (before, after))
    pairs = [(value.float(), last[name].float()) for name, value in first.items() if value.dim() > 1]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def main() -> None:
    """One run after the other, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--accumulation", type=int, default=1)
    args = parser.parse_args()
    print("| | first loss | last loss | mean of the last quarter | moved |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source, tokenizer = source_and_tokenizer(folder, bundled=True)
        build_rows(source, folder / "rows.json", 8 * args.steps * args.accumulation + 8)
        model = start(folder, tokenizer, args.layers, args.width)
        for name, (dtype, options) in WAYS.items():
            given = {
                "model": {"name_or_path": str(model), "dtype": dtype},
                "data": {"datasets": [{"path": str(folder / "rows.json")}], "template": "instruction",
                         "max_length": 128, "splits": {"validation": 0.0}},
                "train": {"max_steps": args.steps, "per_device_train_batch_size": 8, "logging_steps": 1,
                          "gradient_accumulation_steps": args.accumulation, "save_steps": args.steps,
                          "learning_rate": args.rate, "report_to": [], "use_cpu": True, **options},
            }  # fmt: skip
            try:
                run = Path(train(recipe(folder, str(len(list(folder.glob("*.yaml")))), given)).output_dir)
            except Exception as error:  # torchao is not everywhere
                print(f"| {name} | not done: {str(error).splitlines()[0]} | | | |", flush=True)
                continue
            found = losses(run)
            late = statistics.mean(found[-max(1, len(found) // 4) :])
            share = moved(model, run / f"checkpoint-{args.steps}")
            print(f"| {name} | {found[0]:.4f} | {found[-1]:.4f} | {late:.4f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
