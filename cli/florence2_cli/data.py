"""Look through a data set before training on it, or convert one."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from florence2.answer_limits import AnswerLimits

EXTRA = "eval"
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for action, help_text in (
        ("check", "look through data sets: samples, boxes, labels, pictures"),
        ("convert", "write a split as JSON lines or COCO detection"),
    ):
        command = actions.add_parser(action, help=help_text, description=help_text)
        many = action == "check"
        command.add_argument(
            "data", type=Path, metavar="DATA", nargs="+" if many else None, help="a file or folder of samples"
        )
        command.add_argument("--format", help="how it is written; default: recognised")
        command.add_argument(
            "--images", type=Path, metavar="DIR", help="the folder picture paths start from; default: the file's"
        )
        (_check_arguments if many else _convert_arguments)(command)


def _check_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-images", action="store_true", help="don't decode and compare pictures")
    command.add_argument(
        "--checkpoint",
        metavar="CKPT",
        help="a checkpoint's folder or hub id, to hold answers against its decoder's length and settings",
    )
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page of samples with their boxes drawn")
    command.add_argument("--samples", type=int, default=24, metavar="N", help="samples on the page; default 24")
    command.add_argument("--seed", type=int, default=0, help="which samples; default 0")
    command.add_argument("--json", action="store_true", help="print JSON, with every finding in words")
    command.add_argument("--strict", action="store_true", help="warnings, too, make the exit code 1")


def _convert_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl: image, prefix, suffix; .json: COCO detection",
    )
    command.add_argument("--split", metavar="NAME", help="which split, where there are several")
    command.add_argument("--skip-bad", action="store_true", help="exit code 0 even if samples had to be left out")


def run(args: argparse.Namespace) -> int:
    return _check(args) if args.action == "check" else _convert(args)


def _check(args: argparse.Namespace) -> int:
    from florence2_data.check import check
    from florence2_data.formats import open_data
    from florence2_data.sample_page import write_page

    limits = _limits(args) if args.checkpoint else None
    splits = [split for path in args.data for split in open_data(path, args.format, args.images)]
    samples = args.samples if args.html else 0
    report, shown = check(splits, limits, not args.no_images, samples, args.seed, every_message=args.json)
    print(json.dumps(report.as_json(), indent=2) if args.json else report.as_text())
    if args.html:
        write_page(args.html, report, shown)
    return int(report.total("error") > 0 or (args.strict and report.total("warning") > 0))


def _limits(args: argparse.Namespace) -> "AnswerLimits":
    args.extra = "export"
    from florence2_export.answer_limits import read_answer_limits

    return read_answer_limits(args.checkpoint)


def _convert(args: argparse.Namespace) -> int:
    from florence2_data.convert import convert
    from florence2_data.formats import open_split
    from florence2_data.record import Problem

    split = open_split(args.data, args.format, args.images, args.split)
    left_out = 0

    def report(problem: Problem) -> None:
        nonlocal left_out
        left_out += 1
        if left_out <= _SHOWN:
            print(problem, file=sys.stderr)

    count = convert(split, args.output, report)
    if left_out:
        print(f"{left_out} samples left out", file=sys.stderr)
    print(f"{args.output}: {count} samples")
    return int(left_out > 0 and not args.skip_bad)
