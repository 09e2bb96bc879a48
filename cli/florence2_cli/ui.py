"""Serve a page to drop a picture on and see a running server's answer drawn over it."""

import argparse

from florence2_cli.ask import add_server

EXTRA = "ui"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument(
        "--http-url",
        metavar="URL",
        help="the server's HTTP endpoint as the page writes it for curl; left out, port 8000 of the same host",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address the page listens on, default %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="of the page, default %(default)s; 0 picks a free one")


def run(args: argparse.Namespace) -> int:
    from florence2_apps.page import Server, build, http_endpoint, serve
    from florence2_client import Florence2Client

    server = Server(args.url, args.model, args.http_url or http_endpoint(args.url))
    # Somebody waits for it: a few seconds, no more.
    with Florence2Client(args.url, model=args.model, retries=5) as client:
        serve(build(client, server), args.host, args.port)
    return 0
