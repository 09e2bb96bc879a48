"""The page behind an HTTP server of its own, which lets a browser load nothing from anywhere else."""

import contextlib
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from florence2.images import Limits

_FOLDER = Path(__file__).parent
# Gradio's own scripts are inline, and it shows pictures that were just dropped from data: and blob: URLs.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
_HEADERS = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer")]
_SYSTEM = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Until SIGINT or SIGTERM; port 0 picks a free one. Raises OSError where it can't listen there."""
    with _listening(host, port) as listening:
        address = f"[{host}]" if ":" in host else host
        print(f"page: http://{address}:{listening.getsockname()[1]}", flush=True)
        # uvicorn complains of connections that open pages hold when it stops; Gradio prints what goes wrong itself.
        config = uvicorn.Config(application(page), log_level="critical", timeout_graceful_shutdown=3)
        # uvicorn stops in order at either signal, then raises it again.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(
            f"the page can't be at {host}, port {port}: {error.strerror}; name another with --host or --port"
        ) from error


def application(page: gr.Blocks) -> FastAPI:
    """The page at /, without Gradio's own pages and links; a picture may be as large as the server takes it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_StayHere)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=_SYSTEM, font_mono=_MONO),
        css_paths=_FOLDER / "page.css",
        max_file_size=int(Limits.megabytes * 1e6),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
    )


class _StayHere:
    """The policy with every response, streams of events among them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def http_endpoint(url: str) -> str:
    """Of the server at the client's `url`, for curl: the URL itself where it is HTTP, else Triton's own port, 8000."""
    if "://" not in url:
        url = f"grpc://{url}"
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return url.rstrip("/")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{'https' if parts.scheme == 'grpcs' else 'http'}://{host}:8000"
