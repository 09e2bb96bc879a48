"""`florence2 ui`: a page to ask a running server with a picture and to see the answer drawn over it."""

from florence2_apps.page.app import build
from florence2_apps.page.request import Server
from florence2_apps.page.server import http_endpoint, serve

__all__ = ["Server", "build", "http_endpoint", "serve"]
