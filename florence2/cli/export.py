"""Export a checkpoint to ONNX graphs, proved against it."""

import argparse
from pathlib import Path

EXTRA = "export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's folder, or its id on the Hugging Face hub")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the export folder; default exports/NAME")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="fp32 (default) gives the checkpoint's own answers; fp16 is for GPUs, int8 for CPUs",
    )


def run(args: argparse.Namespace) -> int:
    from florence2_export.export import export

    output = args.output or Path("exports") / Path(args.checkpoint).resolve().name
    manifest = export(args.checkpoint, output, args.revision, args.precision)
    parity = manifest.parity
    worst = max(figures["relative"] for figures in parity["graphs"].values())
    print(
        f"{output}: {manifest.layout} layout, {manifest.precision}, largest difference {worst:.1e} of the output, "
        f"{parity['generations_equal']} of {parity['generations']} generations equal to the checkpoint's"
    )
    return 0
