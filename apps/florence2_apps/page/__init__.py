"""`florence2 ui`: a page to ask a running server with a picture and to see the answer drawn over it."""

from florence2_apps.page.app import build
from florence2_apps.page.form import Server
from florence2_apps.page.page_server import http_endpoint, serve

__all__ = ["Server", "build", "http_endpoint", "serve"]
