"""`instructft ui`: a chat page in the browser, on this machine only, that asks nobody else for anything.

Gradio draws the page. Its fonts from elsewhere, its telemetry and its record of past calls are off, and the browser is
told to load nothing from other places, whatever a model writes.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError
from instructft.inference.chat import as_generator, locate
from instructft.inference.generator import check_settings
from instructft.inference.reference_model import START, Beside, check_base
from instructft.inference.web_sessions import Desk, Settings

if TYPE_CHECKING:
    from gradio import Blocks

ADDRESS = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100  # tried one after the other where none is named
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; frame-src 'none'; base-uri 'self'; form-action 'self'"
)


def serve(
    model: str,
    *,
    port: int | None = None,
    share: bool = False,
    base: str | None = None,
    settings: Settings | None = None,
) -> None:
    """Load a model and serve the page until Ctrl-C.

    Args:
        port: on 127.0.0.1; None takes the first free one from 7860.
        share: also make a public link through Gradio's servers, for whoever knows it.
        base: the model beside it; None: what the model began from, where that is known.
        settings: what the page begins with.

    Raises:
        UsageError: gradio is not installed, no such model, or the port is taken; before any weight is loaded.
    """
    _require_gradio()
    settings = settings or Settings()
    check_settings(settings.max_new_tokens, settings.temperature, settings.top_p)
    locate(model)
    port = free_port(port)
    if base is not None:
        check_base(model, base)
    from instructft.inference.web_page import build

    generator = as_generator(model)
    desk = Desk(generator, _beside(model, base, generator))
    page = build(desk, model, settings)
    page, url = start(page, port, share)
    print(f"{model} answers at {url} (Ctrl-C ends it)", flush=True)
    if share:
        print(f"Whoever knows this link can talk to it: {page.share_url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        page.close(verbose=False)


def start(page: Blocks, port: int, share: bool = False) -> tuple[Blocks, str]:
    """Serve a page that was built, in the background; the page and its address. `page.close()` ends it."""
    import gradio as gr
    from starlette.middleware import Middleware

    from instructft.inference.web_page import STYLE

    page.queue(default_concurrency_limit=8, max_size=64)
    fonts = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
    theme = gr.themes.Default(
        primary_hue="blue", font=fonts, font_mono=("ui-monospace", "Menlo", "Consolas", "monospace")
    )
    _, url, _ = page.launch(
        server_name=ADDRESS,
        server_port=port,
        share=share,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(_Policy)]},
        theme=theme,
        css=STYLE,
    )
    return page, url


def free_port(port: int | None) -> int:
    """A port of 127.0.0.1 that is free: the one that is named, or the first one from 7860.

    Raises:
        UsageError: it is taken, or all are.
    """
    for number in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((ADDRESS, number))
            except OSError:
                continue
            return number
    if port is not None:
        raise UsageError(f"--port: {port} cannot be used, another program holds it; choose another, or leave it out")
    raise UsageError(f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are all taken; name a free one with --port")


def _beside(model: str, base: str | None, generator: Any) -> Beside | None:
    """The model beside it; None where none was named and nothing says what it began from."""
    try:
        return Beside.of(model, base or START, generator)
    except UsageError:
        if base is not None:
            raise
        return None


def _require_gradio() -> None:
    # said before gradio is imported: it reads them then
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UsageError(
            f"instructft ui needs gradio, which is not installed ({error}). Install it: pip install 'instructft[ui]'"
        ) from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise UsageError(
            f"instructft ui needs gradio 6.31 or later, found {gradio.__version__}: pip install 'instructft[ui]'"
        )


class _Policy:
    """Tells the browser with every answer to load from this server only. Plain ASGI, so that streams stay streams."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)
