"""Send one picture and one prompt to a running server."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument("prompt", metavar="PROMPT", help='a task, such as "<OD>", with its text if it takes one')
    parser.add_argument(
        "--url", default="localhost:8001", metavar="HOST:PORT", help="gRPC endpoint, default %(default)s"
    )
    parser.add_argument("--model", default="florence2", help="the ensemble's name, default %(default)s")
    parser.add_argument("--json", action="store_true", help="print answer, text, tokens and scores as JSON")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the picture with the answer drawn over it")
    parser.add_argument(
        *("--region", "-r"),
        type=float,
        nargs=4,
        metavar=("X1", "Y1", "X2", "Y2"),
        help="a box in pixels, for region tasks",
    )
    parser.add_argument("--num-beams", type=int, metavar="N", help="1 is greedy; left out, these are the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, metavar="N")


def run(args: argparse.Namespace) -> int:
    from florence2_client import Florence2Client

    from florence2.drawing import draw
    from florence2.images import decode

    data = args.image.read_bytes()
    with Florence2Client(args.url, model=args.model) as client:
        answer = client.ask(
            data,
            args.prompt,
            region=args.region,
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
        )
    print(answer.to_json() if args.json else describe(answer.answer))
    if args.draw:
        draw(decode(data), answer.answer).save(args.draw)
        if not args.json:
            print(f"drawn: {args.draw}")
    return 0


def describe(answer: dict) -> str:
    """A text as it is; a line per box, quad or polygon."""
    from florence2.answers import instances

    (value,) = answer.values()
    if isinstance(value, str):
        return value
    lines = []
    for kind, shape, label, score in instances(value):
        points = shape if kind != "polygons" else [number for outline in shape for number in outline]
        lines.append(f"{label or '-'}  {score:.2f}  {' '.join(f'{number:.1f}' for number in points)}")
    return "\n".join(lines) or "nothing found"
