"""The whole way with the checkpoint that ships here: export, release, serve, ask over gRPC and HTTP, draw, stop.

What it makes lies in var/demo; a second run uses it again.
"""

import shutil
import sys
from pathlib import Path

from florence2_cli.ask import describe
from florence2_client import Florence2Client, Instances
from florence2_export.export import export
from florence2_release.install import install
from florence2_release.server import TritonServer

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "var" / "demo"
QUESTIONS = (
    ("grpc", "scene-1.png", "<OD>"),
    ("grpc", "scene-1.png", "<CAPTION>"),
    ("grpc", "word-1.png", "<OCR>"),
    ("http", "page-1.png", "<OD>"),
    ("http", "page-1.png", "<CAPTION>"),
    ("http", "word-2.png", "<OCR_WITH_REGION>"),
)


def main() -> int:
    say("exporting demo/checkpoint")
    manifest = export(str(HERE / "checkpoint"), WORK / "export")
    parity = manifest.parity
    print(f"  {parity['generations_equal']} of {parity['generations']} generations equal to the checkpoint's")
    say("installing the export as a release")
    # Afresh every time: it costs no second, and holds whatever model.py is in the clone now.
    shutil.rmtree(WORK / "repository", ignore_errors=True)
    install(WORK / "export", WORK / "repository")
    say("starting Triton")
    with TritonServer(WORK / "repository") as server:
        server.wait_ready(progress=lambda line: print(f"  {line}", flush=True))
        print(f"  HTTP {server.http_url}, gRPC {server.grpc_url}")
        urls = {"grpc": server.grpc_url, "http": server.http_url}
        for protocol, picture, prompt in QUESTIONS:
            ask(protocol, urls[protocol], HERE / "pictures" / picture, prompt)
        say("stopping the server")
    return 0


def ask(protocol: str, url: str, picture: Path, prompt: str) -> None:
    with Florence2Client(url) as client:
        answer = client.run(prompt, picture)
    say(f"{protocol}  {picture.name}  {prompt}")
    print("  " + describe(answer).replace("\n", "\n  "))
    if isinstance(answer, Instances):
        drawn = WORK / "drawn" / f"{picture.stem}-{prompt.strip('<>')}.png"
        drawn.parent.mkdir(exist_ok=True)
        answer.draw().save(drawn)
        print(f"  drawn: {drawn}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
