"""Measure a running server with Triton's perf_analyzer."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from florence2_apps.load.analyzer import Analyzer, Level
    from florence2_apps.load.inputs import Asked
    from florence2_apps.load.load_levels import Run

    # Prompt (None: all of the input), protocol and load of each.
    Runs = Sequence[tuple[str | None, str, Level]]

EXTRA = "bench"
PORTS = {"grpc": 8001, "http": 8000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for action, help_text, add in (
        ("prepare", "write perf_analyzer's input from a folder of pictures and a mix of tasks", _prepare_arguments),
        ("run", "measure over a range of concurrencies or request rates", _run_arguments),
        ("tasks", "measure one task after the other on a folder of pictures", _tasks_arguments),
    ):
        command = actions.add_parser(action, help=help_text, description=help_text)
        add(command)
        command.add_argument("--model", default="florence2", help="the ensemble's name, default %(default)s")


def _prepare_arguments(command: argparse.ArgumentParser) -> None:
    _input_arguments(command, "those that take nothing else")
    command.add_argument("--output", "-o", type=Path, required=True, metavar="FILE.json")
    command.add_argument("--url", default="localhost:8001", metavar="HOST:PORT", help="gRPC, default %(default)s")
    command.add_argument(
        "--no-validation", action="store_true", help="don't ask the server for the answers that must come back"
    )


def _input_arguments(command: argparse.ArgumentParser, default: str) -> None:
    """`default`: the tasks, in words."""
    command.add_argument("pictures", type=Path, metavar="PICTURES", help="a folder")
    command.add_argument(
        "--task",
        action="append",
        dest="tasks",
        metavar="PROMPT[=WEIGHT]",
        help='again for each, such as "<OD>=3" (asked three times as often) and "<CAPTION_TO_PHRASE_GROUNDING>a car"; '
        f"default: {default}",
    )
    command.add_argument("--limit", type=_count, default=64, metavar="N", help="pictures at most, default %(default)s")
    command.add_argument(
        "--text",
        default="an object",
        help="what follows a task that takes text and is given none; default: %(default)s. Regions are the middle of "
        "the picture",
    )
    command.add_argument("--num-beams", type=_count, metavar="N", help="left out, these are the checkpoint's")
    command.add_argument("--max-new-tokens", type=_count, metavar="N")


def _count(text: str) -> int:
    return int(_above_zero(str(int(text))))


def _above_zero(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return float(text)


def _run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input-data", type=Path, required=True, metavar="FILE.json", help="written by florence2 bench prepare"
    )
    command.add_argument("--no-validation", action="store_true", help="don't compare answers with the file's")
    load = command.add_mutually_exclusive_group(required=True)
    load.add_argument("--concurrency-range", metavar="RANGE", help="requests in flight: 1:16:5, or 1,2,4,8")
    load.add_argument(
        "--request-rate-range",
        metavar="RANGE",
        help="requests sent per second, however many are in flight: 0.5:2:0.5, or 1,2,4. Answers are not compared: "
        "perf_analyzer mixes them up then",
    )
    command.add_argument(
        "--request-distribution",
        choices=("constant", "poisson"),
        default="constant",
        help="of the times between requests, at a request rate; default %(default)s",
    )
    _measuring_arguments(command, ["grpc", "http"])


def _tasks_arguments(command: argparse.ArgumentParser) -> None:
    _input_arguments(command, "all")
    command.add_argument("--concurrency", type=_count, default=36, metavar="N", help="in flight, default %(default)s")
    command.add_argument("--no-validation", action="store_true", help="don't compare answers with single requests'")
    _measuring_arguments(command, ["grpc"])


def _measuring_arguments(command: argparse.ArgumentParser, protocols: list[str]) -> None:
    command.add_argument("--output", "-o", type=Path, required=True, metavar="FOLDER", help="for the report")
    command.add_argument("--url", default="localhost:8001", metavar="HOST:PORT", help="gRPC, default %(default)s")
    command.add_argument("--http-url", default="localhost:8000", metavar="HOST:PORT", help="default %(default)s")
    command.add_argument("--metrics-url", default="localhost:8002/metrics", metavar="URL", help="default %(default)s")
    command.add_argument(
        "--protocol",
        action="append",
        choices=("grpc", "http"),
        dest="protocols",
        help=f"may be given twice; default: {' and '.join(protocols)}",
    )
    command.set_defaults(default_protocols=protocols)
    command.add_argument("--perf-analyzer", type=Path, metavar="FILE", help="default: the one on the PATH")
    command.add_argument(
        "--window-requests", type=_count, default=50, metavar="N", help="in each window at least, default %(default)s"
    )
    command.add_argument(
        "--stability-percentage",
        type=_above_zero,
        default=10,
        metavar="PERCENT",
        help="that three windows in a row may differ by, default %(default)s",
    )
    command.add_argument(
        "--max-trials", type=_count, default=10, metavar="N", help="windows at most, default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    if args.action == "prepare":
        return _prepare(args)
    # What may be missing is asked for first.
    from florence2_apps.load import measurements  # noqa: F401
    from florence2_apps.load.analyzer import Analyzer

    analyzer = Analyzer.find(args.perf_analyzer)
    made, runs = (_of_file if args.action == "run" else _of_tasks)(args)
    return _measure(args, analyzer, made, runs)


def _prepare(args: argparse.Namespace) -> int:
    import json

    from florence2_apps.load.inputs import plain_tasks

    made = _made(args, args.tasks or plain_tasks())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(made, ensure_ascii=False), "utf-8")
    validated = "" if args.no_validation else ", with the answers that must come back"
    print(f"{args.output}: {len(made['data'])} requests{validated}")
    return 0


def _made(args: argparse.Namespace, tasks: list[str]) -> dict[str, Any]:
    from florence2_apps.load import inputs

    pictures = inputs.pictures_in(args.pictures, args.limit)
    if len(pictures) <= inputs.REMEMBERED:
        print(
            f"{args.pictures} has {len(pictures)} pictures: the server keeps the features of {inputs.REMEMBERED} and "
            "will not encode these again; take more, as many as are in flight beside those",
            file=sys.stderr,
        )
    asked = inputs.requests(pictures, inputs.read_mix(tasks, args.text))
    settings = {name: getattr(args, name) for name in ("num_beams", "max_new_tokens") if getattr(args, name)}
    answers = None if args.no_validation else _answers(args, asked)
    return inputs.document(asked, answers, settings)


def _answers(args: argparse.Namespace, asked: list["Asked"]) -> list[str]:
    from florence2_client import Florence2Client

    # Somebody waits for it: a few seconds, no more.
    with Florence2Client(args.url, model=args.model, retries=5) as client:
        pairs = ((one.prompt, one.picture) for one in asked)
        found = client.run_many(pairs, num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
        return [answer.text for answer in found]


def _of_file(args: argparse.Namespace) -> tuple[dict[str, Any], "Runs"]:
    from florence2_apps.load import inputs
    from florence2_apps.load.analyzer import levels

    kind = "concurrency" if args.concurrency_range else "request-rate"
    found = levels(kind, args.concurrency_range or args.request_rate_range)
    made = inputs.read(args.input_data)
    if args.no_validation or kind == "request-rate":
        made.pop("validation_data", None)
    protocols = args.protocols or args.default_protocols
    return made, [(None, protocol, level) for protocol in protocols for level in found]


def _of_tasks(args: argparse.Namespace) -> tuple[dict[str, Any], "Runs"]:
    from florence2_apps.load import inputs
    from florence2_apps.load.analyzer import Level

    from florence2.tasks import TASKS

    made = _made(args, args.tasks or list(TASKS))
    level = Level("concurrency", args.concurrency)
    prompts = dict.fromkeys(inputs.prompts(made))
    protocols = args.protocols or args.default_protocols
    return made, [(prompt, protocol, level) for protocol in protocols for prompt in prompts]


def _measure(args: argparse.Namespace, analyzer: "Analyzer", made: dict[str, Any], runs: "Runs") -> int:
    import os

    from florence2_apps.load import measurements
    from florence2_apps.load.analyzer import Windows
    from florence2_apps.load.load_levels import Target, sweep
    from florence2_apps.load.server_counters import server_metadata

    windows = Windows(
        args.window_requests,
        args.stability_percentage,
        args.max_trials,
        getattr(args, "request_distribution", Windows.distribution),
    )
    target = Target({"grpc": args.url, "http": args.http_url}, args.metrics_url, args.model)
    setting = measurements.Setting(
        command=shlex.join(["florence2", *sys.argv[1:]]),
        perf_analyzer=analyzer.version,
        server=server_metadata(args.http_url),
        model=args.model,
        requests=len(made["data"]),
        validated="validation_data" in made,
        windows=windows,
        load_before=os.getloadavg()[0],
        machine=measurements.machine(),
        date=measurements.today(),
    )
    measured: list[Run] = []
    for one in sweep(analyzer, target, made, runs, windows, progress=lambda line: print(line, file=sys.stderr)):
        measured.append(one)
        # What was measured stays, whatever comes next.
        measurements.write(args.output, measured, setting)
    print(measurements.markdown(measured), end="")
    print(f"\n{args.output / 'report.html'}")
    return int(any(one.failed for one in measured))
