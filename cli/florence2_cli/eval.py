"""Score a model's answers, asking it first where none are given."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from florence2_data.record import Example, Problem
    from florence2_evaluation.models import Model
    from florence2_evaluation.prediction import Prediction
    from florence2_evaluation.score import Score

EXTRA = "eval"
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="a predictions file; with a model to ask, a data set of any format"
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", metavar="CKPT", help="ask a checkpoint: a folder, or an id on the hub")
    model.add_argument("--export", type=Path, metavar="DIR", help="ask an export, made with `florence2 export`")
    model.add_argument("--url", metavar="HOST:PORT", help="ask a running server, at its gRPC endpoint")
    parser.add_argument("--model", default="florence2", help="with --url: the ensemble's name, default %(default)s")
    parser.add_argument("--format", help="the data set's format, where it isn't recognised")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the data set's pictures are")
    parser.add_argument("--split", metavar="NAME", help="which part of the data set, if it has several")
    parser.add_argument("--limit", type=_positive, metavar="N", help="ask no more than N questions")
    parser.add_argument("--num-beams", type=int, metavar="N", help="1 is greedy; left out, these are the checkpoint's")
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="asked at once, default %(default)s"
    )
    parser.add_argument("--iou", type=float, default=0.5, help="what a box must reach to be right, default %(default)s")
    parser.add_argument("--predictions", type=Path, metavar="OUT.jsonl", help="write the answers, to be scored again")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="write a report with curves and pictures")


def run(args: argparse.Namespace) -> int:
    from florence2_evaluation.group import groups
    from florence2_evaluation.score import notes, score_group

    for output in filter(None, (args.predictions, args.html)):
        output.parent.mkdir(parents=True, exist_ok=True)
    unusable: list[Problem] = []
    predictions = _predictions(args, unusable)
    for problem in unusable[:_SHOWN]:
        print(f"florence2: not asked: {problem}", file=sys.stderr)
    if len(unusable) > _SHOWN:
        print(f"florence2: not asked: {len(unusable) - _SHOWN} more", file=sys.stderr)
    if not predictions:
        raise ValueError(f"{args.data} holds nothing to score")
    by_task = groups(predictions, args.iou)
    scores = [score for group in by_task for score in score_group(group)]
    print(_json(scores) if args.json else _table(scores))
    for note in notes(by_task, scores):
        print(note, file=sys.stderr if args.json else sys.stdout)
    if args.html:
        from florence2_evaluation.report import write_report

        write_report(args.html, by_task, scores, args.data.name)
    return 1 if unusable else 0


def _predictions(args: argparse.Namespace, unusable: list["Problem"]) -> list["Prediction"]:
    from florence2_evaluation.prediction import read_predictions, write_predictions
    from florence2_evaluation.question import questions
    from tqdm import tqdm

    if not (args.checkpoint or args.export or args.url):
        if args.predictions:
            raise ValueError("--predictions needs a model to ask: give --checkpoint, --export or --url")
        try:
            return list(read_predictions(args.data))
        except (ValueError, OSError) as error:
            raise ValueError(f"{error}; of a data set, say what to ask: --checkpoint, --export or --url") from error
    answered: list[Prediction] = []

    def answers() -> Iterator["Prediction"]:
        found = _model(args).predict(questions(asked, args.limit), unusable.append)
        for prediction in tqdm(found, total=args.limit, unit="answer", disable=None):
            answered.append(prediction)
            yield prediction

    asked = _examples(args, unusable)
    if args.predictions:
        write_predictions(args.predictions, answers())
    else:
        for _ in answers():
            pass
    return answered


def _examples(args: argparse.Namespace, unusable: list["Problem"]) -> Iterator["Example"]:
    from florence2_data.formats import examples, open_split
    from florence2_data.record import Problem

    split = open_split(args.data, args.format, args.images, args.split)

    def usable() -> Iterator["Example"]:
        for example in examples(split):
            if isinstance(example, Problem):
                unusable.append(example)
            else:
                yield example

    return usable()


def _model(args: argparse.Namespace) -> "Model":
    overrides = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    if args.url:
        from florence2_evaluation.served_model import ServedModel

        return ServedModel(args.url, args.model, in_flight=args.batch_size, **overrides)
    if args.export:
        args.extra = "serve"
        from florence2_evaluation.onnx_model import OnnxModel

        args.extra = EXTRA
        return OnnxModel(args.export, in_flight=args.batch_size, **overrides)
    args.extra = "train"
    import torch
    from florence2_evaluation.torch_model import TorchModel
    from florence2_export.checkpoint import load_checkpoint

    args.extra = EXTRA
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchModel(load_checkpoint(args.checkpoint), args.batch_size, device=device, **overrides)


def _table(scores: list["Score"]) -> str:
    rows = [("task", "metric", "value", "questions")]
    rows += [(one.task, one.metric, f"{one.value:.4f}", str(one.count)) for one in scores]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{task:{widths[0]}}  {metric:{widths[1]}}  {value:>{widths[2]}}  {count:>{widths[3]}}"
        for task, metric, value, count in rows
    )


def _json(scores: list["Score"]) -> str:
    from florence2_evaluation.score import metric_of

    return json.dumps([vars(one) | {"source": metric_of(one).source} for one in scores], indent=2)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is needed, not {text!r}")
    return int(text)
