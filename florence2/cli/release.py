"""Install an export as the next release of a Triton model repository."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, metavar="DIR", help="an export folder, made with `florence2 export`")
    parser.add_argument(
        "--repository", type=Path, required=True, metavar="REPO", help="the model repository; made if missing"
    )


def run(args: argparse.Namespace) -> int:
    from florence2_release.install import install

    number = install(args.export, args.repository)
    print(f"{args.repository}: release {number} installed; it is served from the next start on")
    return 0
