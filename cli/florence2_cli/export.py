"""Export a checkpoint to ONNX graphs, proved against it."""

import argparse
from pathlib import Path

EXTRA = "export"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint's folder, or its id on the Hugging Face hub")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the export folder; default exports/NAME, NAME-fp16, NAME-int8 or NAME-transformers.js",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--layout",
        choices=("triton", "transformers.js"),
        default="triton",
        help="what the folder is for: `florence2 release` (default), or browsers and Node",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        help="fp32 (default) gives the checkpoint's own answers; fp16 is for GPUs, int8 for CPUs",
    )


def run(args: argparse.Namespace) -> int:
    name = Path(args.checkpoint).resolve().name
    if args.layout == "transformers.js":
        if args.precision:
            raise ValueError(
                "--layout transformers.js writes fp32, fp16 and 8-bit files at once; leave --precision out"
            )
        return _for_javascript(args, args.output or Path("exports") / f"{name}-transformers.js")
    precision = args.precision or "fp32"
    default = name if precision == "fp32" else f"{name}-{precision}"
    return _for_triton(args, args.output or Path("exports") / default, precision)


def _for_triton(args: argparse.Namespace, output: Path, precision: str) -> int:
    from florence2_export.export import export

    manifest = export(args.checkpoint, output, args.revision, precision)
    parity = manifest.parity
    worst = max(figures["relative"] for figures in parity["graphs"].values())
    print(
        f"{output}: {manifest.layout} layout, {manifest.precision}, largest difference {worst:.1e} of the output, "
        f"{parity['generations_equal']} of {parity['generations']} generations equal to the checkpoint's"
    )
    return 0


def _for_javascript(args: argparse.Namespace, output: Path) -> int:
    from florence2_export.javascript import export_javascript

    parity = export_javascript(args.checkpoint, output, args.revision).parity
    figures = "; ".join(
        f"{precision} {own['generations_equal']} of {own['generations']}, largest difference {own['relative']:.1e}"
        for precision, own in parity.items()
    )
    print(f"{output}: transformers.js files, greedy generations equal to the checkpoint's: {figures}")
    return 0
