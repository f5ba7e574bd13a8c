"""The page's server: on this machine only, for this page only, and the browser loads nothing from anywhere else.

Gradio's telemetry, its fonts from elsewhere and its record of past calls are off.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from instructft.errors import UsageError

if TYPE_CHECKING:
    from gradio import Blocks

ADDRESS = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100  # tried one after the other where none is named
BODY = 1 << 20  # bytes of a request at most: a conversation
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; frame-src 'none'; base-uri 'self'; form-action 'self'"
)
_STYLE = """
#head { padding: .25rem 0; overflow-wrap: anywhere; }
#head h1 { font-size: 1.25rem; margin: 0; }
#head p { margin: 0; font-size: .9rem; opacity: .75; }
footer, #beside button[aria-label="Clear"] { display: none !important; }  /* one conversation, cleared in one place */
#chat .examples { display: flex; flex-wrap: wrap; justify-content: center; gap: .5rem; padding: 1rem; }
#chat .example { width: auto; max-width: 100%; min-height: 0; padding: .4rem .9rem; border-radius: 999px; }
#settings :is(.min_value, .max_value) { color: inherit; }
:is(#chat, #base) .prose.chatbot.md { opacity: 1; }
:is(#chat, #base) .token { color: inherit; }  /* Gradio's colours are too faint to read: WCAG asks for 4.5 to 1 */
:is(#chat, #base) .token:is(.comment, .prolog, .doctype, .cdata) { color: #5b6270; }
:is(#chat, #base) .token:is(.keyword, .atrule, .attr-value, .tag, .selector) { color: #0550ae; }
:is(#chat, #base) .token:is(.string, .char, .builtin, .inserted, .attr-name, .regex) { color: #0a6b2c; }
:is(#chat, #base) .token:is(.function, .class-name, .property, .variable) { color: #a3195b; }
:is(#chat, #base) .token:is(.number, .boolean, .constant, .symbol, .deleted) { color: #8a3b00; }
.dark :is(#chat, #base) .token:is(.comment, .prolog, .doctype, .cdata) { color: #a5acb8; }
.dark :is(#chat, #base) .token:is(.keyword, .atrule, .attr-value, .tag, .selector) { color: #d8a5ea; }
.dark :is(#chat, #base) .token:is(.string, .char, .builtin, .inserted, .attr-name, .regex) { color: #9bd58a; }
.dark :is(#chat, #base) .token:is(.function, .class-name, .property, .variable) { color: #7cc0f5; }
.dark :is(#chat, #base) .token:is(.number, .boolean, .constant, .symbol, .deleted) { color: #f0b178; }
"""
# What Gradio draws as a list holds buttons, which are no list items: to a screen reader it is a group, with a name. And
# code that is wider than the page scrolls with the arrow keys only where Tab can reach it.
_NAMES = """() => {
  const name = () => {
    document.querySelectorAll(".examples[role=list]").forEach((one) => {
      one.setAttribute("role", "group");
      one.setAttribute("aria-label", "Prompts to begin with");
    });
    document.querySelectorAll("[data-testid=bot] pre:not([tabindex])").forEach((one) => (one.tabIndex = 0));
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}"""


def start(page: Blocks, port: int, share: bool = False) -> str:
    """Serve a page that was built, in the background; its address. `page.close()` ends it."""
    import gradio as gr
    from starlette.middleware import Middleware

    hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
    fonts, mono = ("system-ui", "-apple-system", "Segoe UI", "sans-serif"), ("ui-monospace", "Menlo", "monospace")
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
        max_file_size=1,  # byte: there is nothing to upload a file for
        app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)]},
        theme=gr.themes.Default(primary_hue="blue", font=fonts, font_mono=mono),
        css=_STYLE,
        js=_NAMES,
    )
    if share and page.share_url:
        hosts.add(_host(page.share_url))
    return url


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


class Guard:
    """Answers this machine's own page, and nobody else's; tells the browser to load from this server only.

    Plain ASGI, so that streams stay streams. A page of another site that is open in the same browser can send requests
    here too: under a name that its owner lets point to 127.0.0.1 (`Host` tells), or as a form (`Origin` tells).

    Args:
        hosts: names with ports under which the page is asked for, such as `127.0.0.1:7860`; more may be added.
    """

    def __init__(self, app: Any, hosts: set[str]):
        self.app, self.hosts = app, hosts

    def refusal(self, scope: Any) -> tuple[int, str]:
        """Why a request is not answered, with its status; (0, "") where it is."""
        said = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if said.get("host", "") not in self.hosts:
            return 421, "this page is asked for by another name than its own"
        origin = said.get("origin")
        if scope.get("method", "GET") not in ("GET", "HEAD") and origin and _host(origin) not in self.hosts:
            return 403, "another page sent this"
        if scope["path"].rstrip("/").endswith("/upload"):
            return 403, "there is nothing here to upload a file for"
        length = said.get("content-length", "0")
        if not length.isdigit() or int(length) > BODY:
            return 413, f"more than {BODY} bytes"
        return 0, ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # there is no socket to be had here
            return
        status, why = self.refusal(scope)
        if not status:
            await self.app(scope, receive, with_policy)
            return
        headers = [(b"content-type", b"text/plain")]
        await with_policy({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": why.encode()})


def _host(url: str) -> str:
    return url.partition("://")[2].rstrip("/")
