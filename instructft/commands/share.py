"""What becomes of a model elsewhere: merged, converted, on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instructft.commands.options import ModelArgument, option, quiet_libraries


def merge(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, an adapter folder."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder for the merged model.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove that the merged model answers as the adapter does.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto (the base's), float32, bfloat16 or float16.")] = "auto",
    rounding: Annotated[
        str, typer.Option(help="To bfloat16: nearest, stochastic, or auto, which takes what loses less.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one weight file.")] = "5GB",
    measure_quantized: Annotated[
        bool, typer.Option("--measure-quantized", help="Also compare with the adapter on its quantized base.")
    ] = False,
    into: Annotated[
        str, typer.Option(help="Of a QLoRA adapter: original (the published base), or dequantized (as it was trained).")
    ] = "original",
) -> None:
    """Merge a LoRA adapter into its base, shard by shard, and prove it."""
    from instructft.checkpoints.run_folder import refuse_used

    refuse_used(output)
    quiet_libraries(model)
    from instructft.merging.merge import merge_adapter

    merge_adapter(
        model,
        output,
        verify=verify,
        dtype=dtype,
        rounding=rounding,
        max_shard_size=max_shard_size,
        measure_quantized=measure_quantized,
        into=into,
    )


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT.pt", help="A GPT-2 state dict of torch.save, as nanoGPT's ckpt.pt.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder for the converted model.")],
    n_head: Annotated[int | None, option(min=1, help="Attention heads, where the file does not say.")] = None,
    activation: Annotated[
        str | None,
        option(
            metavar="gelu|gelu_new|relu",
            help="Of the MLP: exact GELU, tanh GELU, ReLU; default: as the code that writes such files has it.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, option(metavar="FOLDER|HUB_ID", help="A tokenizer to save with the model.")
    ] = None,
    keep_padding: Annotated[
        bool, typer.Option("--keep-padding", help="Keep embedding rows that belong to no token.")
    ] = False,
) -> None:
    """Make a `from_pretrained` folder of a GPT-2 state dict in nanoGPT's layout and its kin, and prove it."""
    from instructft.checkpoints.run_folder import refuse_used

    refuse_used(output)
    quiet_libraries()
    from instructft.extras.convert.convert import convert as convert_checkpoint

    convert_checkpoint(
        checkpoint, output, n_head=n_head, activation=activation, tokenizer=tokenizer, keep_padding=keep_padding
    )


def push(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run folder, a checkpoint in it, an adapter folder, any model folder."),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to, as org/name; made where there is none.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see it. Private never goes into a public repository.")
    ] = True,
    path_in_repo: Annotated[str | None, option(metavar="FOLDER", help="A folder in the repository.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go up, with sizes; no login is needed.")
    ] = False,
) -> None:
    """Upload model, tokenizer, chat template and model card to the Hub, in one commit, and read it back."""
    from instructft.hub.push import check_request, push_to_hub, rehearse_push

    check_request(model, repo_id, path_in_repo)
    if not dry_run:
        from instructft.hub.commit import require_login

        require_login(repo_id)
    quiet_libraries()
    if dry_run:
        print(rehearse_push(model, repo_id, path_in_repo))
        return
    pushed = push_to_hub(model, repo_id, private=private, path_in_repo=path_in_repo)
    if pushed.left_out:
        print("left out: " + ", ".join(f"{name} ({why})" for name, why in sorted(pushed.left_out.items())))
    print(pushed)


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new or empty folder for the files.")],
    fmt: Annotated[
        str, typer.Option("--format", metavar="gguf|ollama", help="ollama: GGUF with a Modelfile.")
    ] = "gguf",
    quantize: Annotated[str, option(metavar="NAME,…", help="Beside f16, as q8_0,q4_k_m.")] = "",
    converter: Annotated[
        Path | None, option(help="llama.cpp's folder, or its convert_hf_to_gguf.py; default: where it is found.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Held-out rows that every file is compared on; 0: none.")] = 64,
) -> None:
    """Export for llama.cpp and Ollama, by llama.cpp's own tools; each file is read back and compared with the model."""
    from instructft.checkpoints.run_folder import refuse_used
    from instructft.extras.serving.llama_cpp import find_converter, formats, require_format

    refuse_used(output)
    require_format(fmt)
    formats(quantize)
    print(f"converter  {find_converter(converter)}", flush=True)
    quiet_libraries(model)
    from instructft.extras.serving.export import export as export_model

    export_model(model, output, fmt, quantize, converter, rows)
