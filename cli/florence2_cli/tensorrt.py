"""Build a TensorRT plan of an export's vision encoder, on the machine that serves."""

import argparse
import os
from pathlib import Path

EXTRA = "gpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "export", type=Path, metavar="EXPORT", help="an export folder, fp16 or fp32; the plan goes there"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.path.expanduser("~/.cache/florence2")),
        metavar="DIR",
        help="plans of before, by graph, TensorRT and GPU; default %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    from florence2_export.tensorrt import build

    plan = build(args.export, args.cache)
    print(f"{plan}: release the export and serve it with --profile tensorrt")
    return 0
