"""Make one checkpoint of a run, an adapter or a fine-tuned model."""

import argparse
from pathlib import Path

EXTRA = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="a run's folder, an adapter of peft or ms-swift, or a whole model"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--base", metavar="CKPT", help="the adapter's base; left out, the one that it names")
    parser.add_argument(
        "--layout",
        choices=("native", "microsoft"),
        default="native",
        help="transformers' own, the default, or the one of microsoft/Florence-2-*, for their remote code",
    )


def run(args: argparse.Namespace) -> int:
    from florence2_training.merge import merge

    merged = merge(args.run_folder, args.output, args.base, args.layout)
    proof = f", {merged.samples} answers equal to the unmerged model's" if merged.samples else ""
    print(f"{args.output}: {args.layout} layout, from {merged.source}{proof}")
    return 0
