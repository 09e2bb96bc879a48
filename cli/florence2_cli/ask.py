"""Send one picture and one prompt to a running server."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence2_client import Instance, Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="an image file, or an http(s) URL, which is fetched from here")
    add_question(parser)
    parser.add_argument("--json", action="store_true", help="print answer, text, tokens and scores as JSON")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the picture with the answer drawn over it")


def add_question(parser: argparse.ArgumentParser) -> None:
    """What is asked of a picture, and who is asked."""
    parser.add_argument("prompt", metavar="PROMPT", help='a task, such as "<OD>", with its text if it takes one')
    add_server(parser)
    parser.add_argument(
        *("--region", "-r"),
        type=float,
        nargs=4,
        metavar=("X1", "Y1", "X2", "Y2"),
        help="a box in pixels, for region tasks",
    )
    parser.add_argument("--min-score", type=float, metavar="S", help="leave out boxes of a lower score, from 0 to 1")
    parser.add_argument("--num-beams", type=int, metavar="N", help="1 is greedy; left out, these are the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, metavar="N")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Who is asked."""
    parser.add_argument(
        "--url",
        default="localhost:8001",
        metavar="HOST:PORT",
        help="gRPC endpoint, default %(default)s; grpcs://, http:// and https:// go before it",
    )
    parser.add_argument("--model", default="florence2", help="the ensemble's name, default %(default)s")


def question(args: argparse.Namespace) -> dict[str, Any]:
    """Of `add_question`'s arguments those that the client's methods take."""
    names = ("region", "min_score", "num_beams", "max_new_tokens")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    from florence2_client import Florence2Client

    # Somebody waits for it: a few seconds, no more.
    with Florence2Client(args.url, model=args.model, retries=5) as client:
        answer = client.run(args.prompt, args.image, **question(args))
    print(answer.to_json() if args.json else describe(answer))
    if args.draw:
        answer.draw().save(args.draw)
        if not args.json:
            print(f"drawn: {args.draw}")
    return 0


def describe(answer: "Result") -> str:
    """A text as it is; a line per box, quad or polygon; and a line where the answer was cut short."""
    from florence2_client import Instances

    lines = map(_line, answer) if isinstance(answer, Instances) else [str(answer)]
    text = "\n".join(lines) or "nothing found"
    return text if answer.finish_reason == "stop" else f"{text}\n(cut short by the limit on new tokens)"


def _line(instance: "Instance") -> str:
    outlines = instance.polygons or (instance.quad or instance.box,)
    points = " ".join(f"{number:.1f}" for outline in outlines for number in outline)
    return f"{instance.label or '-'}  {instance.score:.2f}  {points}"
