"""Merging an adapter: ours and PEFT's `merge_and_unload`, each in a process of its own, on the same model on disk.

    python benchmarks/merge.py [--gigabytes 0.9 2.7] [--repeats 3] [--folder DIR]

The base is a Llama-shaped model of random bfloat16 weights in shards of 200 MB, the adapter LoRA of rank 16 on all its
linear layers. Both sides write shards of 200 MB; neither verifies the result. Ours waits until the files are on disk
(fsync) and PEFT does not; `as PEFT writes` is ours without the wait. Prints the peak memory of each process
(ru_maxrss, with the share of a process that only imports the libraries) and the seconds of the merge, imports left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD = "200MB"
RANK = 16
WAYS = {"import": "imports alone", "ours": "instructft", "nosync": "instructft, as PEFT writes", "peft": "PEFT"}


def skeleton(gigabytes: float) -> Any:
    """A Llama without weights: as many layers of 2,048 dimensions as make up its size in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32_000}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    layer = 2048 * (2 * 2048 + 2 * 512 + 3 * 5632) * 2 / 1e9
    layers = max(1, round((gigabytes - 2 * 32_000 * 2048 * 2 / 1e9) / layer))
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **sizes))


def build(folder: Path, gigabytes: float) -> None:
    """Write base and adapter, by the piece: this process stays small whatever their size."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    from instructft.weights.base_record import BaseModelRecord, base_fingerprint
    from instructft.weights.tensor_io import Planned, index_of, pieces, shards, write_shard

    torch.manual_seed(0)
    model = skeleton(gigabytes)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = shards((Planned(name, torch.bfloat16, shape) for name, shape in shapes.items()), 200_000_000)

    def produce(name: str) -> Any:
        shape = shapes[name]
        for start, stop in pieces(shape[0], shape[1] if len(shape) > 1 else 1):
            yield (torch.randn(stop - start, *shape[1:]) * 0.02).to(torch.bfloat16)

    for file, group in files.items():
        write_shard(base / file, group, produce)
    if index := index_of(files):
        (base / "model.safetensors.index.json").write_text(index)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(base)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=RANK, lora_alpha=32, target_modules=linear, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )
    with torch.device("meta"):
        wanted = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    weights = {name: torch.randn(tensor.shape) * 0.02 for name, tensor in wanted.items()}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = str(base)
    config.save_pretrained(adapter)
    rows = model.config.vocab_size
    record = BaseModelRecord(str(base), fingerprint=base_fingerprint(str(base)), vocab_size=rows, dtype="bfloat16")
    record.write(adapter)


def merge(way: str, folder: Path) -> float:
    """Merge into `folder/out` in one way; seconds, imports left out."""
    import peft
    import torch
    import transformers
    from rich.console import Console

    import instructft.merging.merge

    transformers.AutoModelForCausalLM  # noqa: B018  the library imports on first use
    peft.PeftModel  # noqa: B018
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    if way == "import":
        return 0.0
    if way == "nosync":
        os.fsync = lambda handle: None
    if way == "peft":
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        model = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        model.save_pretrained(folder / "out", max_shard_size=SHARD)
    else:
        instructft.merging.merge.merge_adapter(
            folder / "adapter", folder / "out", verify=False, max_shard_size=SHARD, console=Console(quiet=True)
        )
    return time.perf_counter() - began


def worker(way: str, folder: Path, gigabytes: float) -> None:
    import resource

    if way == "build":
        build(folder, gigabytes)
        print("RESULT {}")
        return
    seconds = merge(way, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"seconds": seconds, "peak_mib": peak}))


def run(way: str, folder: Path, gigabytes: float) -> dict[str, float]:
    """One measurement in a process of its own; what was written before is on disk when it begins."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--worker", way, "--folder", str(folder), "--gigabytes", str(gigabytes)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in out.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{way} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.9, 2.7])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Where to put the models; default: the system's temporary folder.")
    parser.add_argument("--worker", choices=["build", *WAYS])
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder, args.gigabytes[0])
        return
    print("| model | | peak MiB | above imports, MiB | seconds |")
    print("| --- | --- | ---: | ---: | ---: |")
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            run("build", folder / "made", gigabytes)
            folder = folder / "made"
            size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / 1e9
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(args.repeats):  # interleaved, so that a slower spell of the machine meets them all
                for way in WAYS:
                    found[way].append(run(way, folder, gigabytes))
        peaks = {way: statistics.median(one["peak_mib"] for one in runs) for way, runs in found.items()}
        for way, title in WAYS.items():
            seconds = statistics.median(one["seconds"] for one in found[way])
            shown = f"{seconds:.1f}" if seconds else ""
            print(f"| {size:.2f} GB | {title} | {peaks[way]:,.0f} | {peaks[way] - peaks['import']:,.0f} | {shown} |")


if __name__ == "__main__":
    main()
