"""The whole way with the checkpoint that ships here: export, release, serve, ask over gRPC and HTTP, draw, stop.

What it makes lies in var/demo; a second run uses it again.
"""

import sys
from pathlib import Path

from florence2_client import Florence2Client
from florence2_export.export import export
from florence2_release.install import install
from florence2_release.server import TritonServer

from florence2.cli.ask import describe
from florence2.drawing import draw
from florence2.images import decode
from florence2.manifest import FILE_NAME

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
    release = released()
    say(f"serving release {release}")
    with TritonServer(WORK / "repository") as server:
        server.wait_ready(progress=lambda line: print(f"  {line}", flush=True))
        print(f"  HTTP {server.http_url}, gRPC {server.grpc_url}")
        urls = {"grpc": f"127.0.0.1:{server.grpc_port}", "http": f"127.0.0.1:{server.http_port}"}
        for protocol, picture, prompt in QUESTIONS:
            ask(protocol, urls[protocol], HERE / "pictures" / picture, prompt)
        say("stopping the server")
    return 0


def released() -> int:
    """The number of the release that holds the export: installed now, unless it is the latest already."""
    repository, exported = WORK / "repository", (WORK / "export" / FILE_NAME).read_bytes()
    numbers = sorted(int(folder.name) for folder in repository.glob("beam_search/[0-9]*"))
    if numbers and (repository / "beam_search" / str(numbers[-1]) / FILE_NAME).read_bytes() == exported:
        return numbers[-1]
    say("installing the export as a release")
    return install(WORK / "export", repository)


def ask(protocol: str, url: str, picture: Path, prompt: str) -> None:
    with Florence2Client(url, protocol=protocol) as client:
        answer = client.ask(picture, prompt)
    say(f"{protocol}  {picture.name}  {prompt}")
    print("  " + describe(answer.answer).replace("\n", "\n  "))
    if isinstance(answer.value, dict):
        drawn = WORK / "drawn" / f"{picture.stem}-{prompt.strip('<>')}.png"
        drawn.parent.mkdir(exist_ok=True)
        draw(decode(picture.read_bytes()), answer.answer).save(drawn)
        print(f"  drawn: {drawn}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
