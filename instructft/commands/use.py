"""Answers: in the terminal, on a page, for a file of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from instructft.commands.options import (
    ColumnsOption,
    MaxNewTokensOption,
    ModelArgument,
    TemperatureOption,
    TopPOption,
    option,
    quiet_libraries,
)


def chat(
    model: ModelArgument,
    system: Annotated[str | None, option(help="A system prompt.")] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 256,
    base: Annotated[str, typer.Option(help="What /compare asks; `start`: what the run began from.")] = "start",
    plain: Annotated[bool, typer.Option("--plain", help="Answers as they stand, their Markdown not drawn.")] = False,
) -> None:
    """Talk to a model in the terminal; what is an option here is a command there (/temp, /top-p, /max, /system)."""
    quiet_libraries(model, base)
    from instructft.inference.chat import Chat
    from instructft.inference.terminal import as_text, converse
    from instructft.models.base_template import TemplateWatch

    watch = TemplateWatch(model)
    told = Chat(
        model,
        system=as_text(system) if system else None,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
    )
    if line := watch.said():
        print(line, file=sys.stderr)
    converse(told, model, base, plain)


def ui(
    model: ModelArgument,
    port: Annotated[int | None, option(min=1, max=65535, help="On 127.0.0.1; default: a free one.")] = None,
    base: Annotated[str | None, option(help="A model to compare with; default: what the run began from.")] = None,
    system: Annotated[str, option(help="A system prompt to begin with.")] = "",
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 256,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through Gradio's servers.")] = False,
) -> None:
    """Talk to a model on a page in the browser, served on this machine only."""
    quiet_libraries(model, base)
    from instructft.inference.web.answers import Settings
    from instructft.inference.web.page import serve

    settings = Settings(system, temperature, top_p, max_new_tokens)
    serve(model, port=port, share=share, base=base, settings=settings)


def generate(
    model: ModelArgument,
    input: Annotated[Path, typer.Option("--input", help="JSONL: messages, prompt, or instruction with input/context.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL: each row with response and finish_reason.")],
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    batch_size: Annotated[str, typer.Option(help="Prompts answered at once, or auto.")] = "auto",
    base: Annotated[
        str | None, option(help="A second model, for base_response; `start`: what the run began from.")
    ] = None,
    backend: Annotated[str, typer.Option(help="transformers, or vllm where it is installed.")] = "transformers",
    columns: ColumnsOption = None,
) -> None:
    """Answer a file of prompts. The same command again resumes where it stopped."""
    from instructft.data.formats import columns_asked

    mapped = columns_asked(columns or ())
    quiet_libraries(model, base)
    from instructft.inference.generate_file import generate_file

    generate_file(model, input, output, max_new_tokens, temperature, top_p, batch_size, base, backend, mapped)
