"""Ask one thing of thousands of pictures, with the answers in a file; goes on where it was ended."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence2_cli.ask import add_question, question

if TYPE_CHECKING:
    from florence2_apps.label import Job, Labelled, Source

EXTRA = "label"
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="FOLDER|LIST|PARQUET",
        help="pictures: a folder; a .txt of paths and URLs, one a line; a .jsonl with the column; a .parquet with it, "
        "or a folder of those; folders and Parquet may be elsewhere, as in s3://…",
    )
    add_question(parser)
    parser.add_argument(
        *("--output", "-o"),
        required=True,
        metavar="OUT",
        help="a .jsonl, a line per picture; COCO as .json, or .parquet, with the lines in the .jsonl of that name",
    )
    parser.add_argument("--column", default="image", help="of a .jsonl or Parquet, default %(default)s")
    parser.add_argument(
        "--in-flight", type=_positive, default=32, metavar="N", help="pictures asked about at once, default %(default)s"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on Ray Data: local starts a Ray here, auto and HOST:PORT are a cluster's; OUT is a folder then, "
        "here or elsewhere, OUT.jsonl or OUT.parquet",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="with --ray: processes that ask, each with so many in flight; default: one per machine",
    )


def run(args: argparse.Namespace) -> int:
    from florence2_apps.label import Job, open_source

    if args.workers and not args.ray:
        raise ValueError("--workers are Ray's: give --ray, too")
    job = Job(args.prompt, {name: value for name, value in question(args).items() if value is not None})
    source = open_source(args.source, args.column)
    labelled = (_on_ray if args.ray else _here)(args, source, job)
    failed = f", {labelled.failed} not; their lines say why" if labelled.failed else ""
    print(f"{args.output}: {labelled.pictures - labelled.failed} pictures labelled{' now' * bool(args.ray)}{failed}")
    return int(labelled.failed > 0)


def _here(args: argparse.Namespace, source: "Source", job: "Job") -> "Labelled":
    from florence2_apps.label.labelling import RETRIES, label
    from florence2_client import Florence2Client, ServerRefused
    from tqdm import tqdm

    if "://" in args.output:
        raise ValueError(f"{args.output} is elsewhere, where --ray can write; name a file here")
    output, failed = Path(args.output), 0
    for path in (output, output.with_suffix(".jsonl")):
        if path.exists() and os.path.exists(args.source) and path.samefile(args.source):
            raise ValueError(f"{path} is the source itself; name another file")

    def show(done: int, row: dict[str, Any] | None) -> None:
        nonlocal failed
        if row is None:
            # What other runs did is not in the rate.
            bar.initial = bar.n = done
            bar.refresh()
            return
        bar.update()
        failed += row["error"] is not None
        if row["error"] is not None and failed <= _SHOWN:
            more = "; more are only counted" if failed == _SHOWN else ""
            bar.write(f"florence2: {row['image']}: {row['error']}{more}", file=sys.stderr)

    with (
        Florence2Client(args.url, model=args.model, retries=RETRIES) as client,
        tqdm(total=len(source), unit=" pictures", disable=None) as bar,
    ):
        try:
            return label(source, job, output, client, in_flight=args.in_flight, progress=show)
        except ServerRefused as error:
            if error.status in ("INVALID_ARGUMENT", "NOT_FOUND"):
                raise
            raise RuntimeError(f"{error}; the same command goes on from here") from error


def _on_ray(args: argparse.Namespace, source: "Source", job: "Job") -> "Labelled":
    args.extra = "ray"
    if args.ray == "local":
        # Nobody asked for a Ray of this machine to be counted.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from florence2_apps.label.ray import label_on_ray

    if not args.verbose:
        # Ray's log files have it all.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.init(args.ray, log_to_driver=args.verbose, logging_level=logging.WARNING)
    workers = args.workers or sum(node["Alive"] for node in ray.nodes())
    asked = {"url": args.url, "model": args.model, "in_flight": args.in_flight}
    return label_on_ray(source, job, args.output, workers=workers, **asked)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)
