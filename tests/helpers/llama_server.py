"""llama.cpp's own server, from the package xllamacpp, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROGRAM = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.chat_template, params.n_ctx = sys.argv[1], sys.argv[2], int(sys.argv[3])
params.n_gpu_layers, params.n_parallel, params.warmup, params.verbosity = 0, 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(file: Path, template: str = "", context: int = 2048) -> Iterator[str]:
    """Serve a GGUF file for a `with` block; the address.

    Args:
        template: a chat template in place of the file's own.
    """
    command = [sys.executable, "-c", _PROGRAM, str(file), template, str(context)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()
