"""Start Triton on a model repository, wait until it is ready, and run until stopped."""

import argparse
import contextlib
import http.client
import ipaddress
import json
import math
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from florence2_release.server import TritonServer
    from florence2_release.watchdog import Watchdog

ENSEMBLE = "florence2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", required=True, metavar="REPO", help="the model repository to serve")
    for name, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002), ("health", 8003)):
        parser.add_argument(
            f"--{name}-port",
            type=int,
            default=port,
            metavar="PORT",
            help=f"default {port}; 0 picks a free one",
        )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on, default %(default)s")
    parser.add_argument(
        "--profile",
        help="what the models are configured for: cpu, cuda, cuda-python, tensorrt, tensorrt-ep, or one of your own in "
        "REPO/MODEL/configs; left out, what they are configured for already, cpu at first",
    )
    parser.add_argument(
        "--response-cache",
        type=_megabytes,
        metavar="MEGABYTES",
        help="memory for answers to identical requests and for the image features of pictures that are asked about "
        "again (2 MB each for a base model); by default nothing is kept",
    )
    parser.add_argument(
        "--engine-cache",
        type=Path,
        metavar="DIR",
        help="where TensorRT's engines are kept, default florence2-triton in the user's cache folder",
    )
    parser.add_argument(
        "--max-http-megabytes",
        type=_megabytes,
        metavar="MEGABYTES",
        help="refuse larger HTTP requests before they are read (Triton 25.06 and later); by default 64",
    )


def _megabytes(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no size; leave it out")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from florence2_release import startup
    from florence2_release.health import Health, close_health, serve_health
    from florence2_release.repository import Repository
    from florence2_release.watchdog import Watchdog, keep_running

    server = _server(args)
    watchdog = Watchdog(server, _say)
    repository, serving = Repository(server.repository), contextlib.ExitStack()
    profile: str | None = args.profile
    cache: bool | None = bool(args.response_cache)

    def prepare() -> None:
        startup.prepare(repository, profile, cache, args.engine_cache)

    prepare()
    health = Health(server)
    _stop_on_signals()
    try:
        if repository.ensembles():
            serving.enter_context(startup.served(repository))
        endpoint = serve_health(health, args.host, args.health_port)
        serving.callback(close_health, endpoint)
        _start(server, args.verbose)
        _say(_endpoints(server, endpoint.server_port))
        watchdog.start()
        # What is configured already is what a server is started again with.
        profile = cache = None
        keep_running(server, prepare, _say)
    except KeyboardInterrupt:
        health.is_draining = True
        _say("stopping: requests in flight may finish (Ctrl-C again ends them)")
        return _stop(server, watchdog, bool(args.response_cache))
    finally:
        health.is_draining = True
        watchdog.stop()
        server.stop()
        serving.close()


def _server(args: argparse.Namespace) -> "TritonServer":
    from florence2_release.server import TritonServer

    return TritonServer(
        args.repository,
        host=args.host,
        http_port=args.http_port,
        grpc_port=args.grpc_port,
        metrics_port=args.metrics_port,
        cache_size=args.response_cache and args.response_cache * 2**20,
        max_http_size=args.max_http_megabytes and args.max_http_megabytes * 2**20,
    )


def _start(server: "TritonServer", verbose: bool) -> None:
    server.start()
    if verbose:
        threading.Thread(target=_follow_log, args=(server,), daemon=True).start()
    _warn_of_open_wheel(server)
    # As long as it takes: TensorRT builds engines at the first start.
    server.wait_ready(timeout=math.inf, progress=_say)


def _stop(server: "TritonServer", watchdog: "Watchdog", has_cache: bool) -> int:
    """-> the exit code."""
    try:
        watchdog.stop()
        if has_cache:
            _say(_hits(server))
        server.stop()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    _say("stopped")
    return 0


def _stop_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)


def _say(line: str) -> None:
    print(line, flush=True)


def _follow_log(server: "TritonServer") -> None:
    shown = 0
    while True:
        text = server.log_text()
        # Another server's.
        shown = shown if len(text) >= shown else 0
        print(text[shown:], end="", file=sys.stderr, flush=True)
        shown = len(text)
        time.sleep(0.5)


def _warn_of_open_wheel(server: "TritonServer") -> None:
    from florence2_release.ports import ipv4

    if server.installation and server.installation.wheel and not ipaddress.ip_address(ipv4(server.host)).is_loopback:
        print(
            f"warning: {server.host} is open to the network, and nvidia-pytriton's server is Triton 24.10, "
            "without the security fixes since: use NVIDIA's image there",
            file=sys.stderr,
        )


def _hits(server: "TritonServer") -> str:
    """How much of what came in the response cache has answered."""
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/models/stats", timeout=5) as response:
            models = json.load(response)["model_stats"]
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"the response cache's figures can't be read: {error}"
    lines = []
    for name in ("beam_search", "vision_encoder"):
        found = [model["inference_stats"] for model in models if model["name"] == name]
        hits, misses = (sum(stats[f"cache_{kind}"]["count"] for stats in found) for kind in ("hit", "miss"))
        lines.append(f"{name} {hits} of {hits + misses} requests")
    return f"answered from the response cache: {', '.join(lines)}"


def _endpoints(server: "TritonServer", health_port: int) -> str:
    lines = [
        "ready",
        f"  HTTP     {server.http_url}",
        f"  gRPC     {server.grpc_url}",
        f"  metrics  {server.metrics_url}",
        f"  health   {server.http_url.rpartition(':')[0]}:{health_port}/ready",
    ]
    if (server.repository / ENSEMBLE).is_dir():
        # Through a pipe, as an argument may have 128 KiB at most (execve(2)); curl drops the newlines.
        body = """(printf '{"prompt": "<OD>", "image": "'; base64 < photo.jpg; printf '"}')"""
        lines.append(f"  {body} | curl -s {server.http_url}/v2/models/{ENSEMBLE}/generate -d @-")
    return "\n".join(lines)
