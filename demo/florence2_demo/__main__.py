"""`python -m florence2_demo`: makes, measures and illustrates the checkpoint in demo/checkpoint."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m florence2_demo", description=__doc__)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="draw pictures, train on them, save the checkpoint")
    train.add_argument("--output", type=Path, required=True, help="the checkpoint's folder")
    train.add_argument("--work", type=Path, help="pictures and stages, for a run to go on from (default: OUTPUT-work)")
    train.add_argument("--seed", type=int, help="default: that of the checkpoint in demo/checkpoint")
    train.set_defaults(run=_train)
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on held-out pictures")
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--pictures", type=int, default=400, help="of each kind (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=1, help="of the held-out pictures (default: %(default)s)")
    evaluate.add_argument("--greedy", action="store_true", help="one beam instead of the checkpoint's own")
    evaluate.add_argument("--output", type=Path, help="write the table here, too")
    evaluate.set_defaults(run=_evaluate)
    pictures = commands.add_parser("pictures", help="write example pictures and truth.json")
    pictures.add_argument("folder", type=Path)
    pictures.set_defaults(run=_pictures)
    stamps = commands.add_parser("stamps", help="draw a task that the checkpoint does not know, in ms-swift's format")
    stamps.add_argument("folder", type=Path)
    stamps.add_argument("--scale", type=float, default=1, help="times as many samples (default: %(default)s)")
    stamps.set_defaults(run=_stamps)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from florence2_demo.build import Recipe, train

    recipe = Recipe() if arguments.seed is None else replace(Recipe(), seed=arguments.seed)
    work = arguments.work or arguments.output.with_name(arguments.output.name + "-work")
    start = time.monotonic()
    train(recipe, arguments.output, work)
    print(f"{arguments.output}: seed {recipe.seed}, {(time.monotonic() - start) / 60:.0f} minutes")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from florence2_evaluation.torch_model import TorchModel
    from florence2_export.checkpoint import load_checkpoint

    from florence2_demo.evaluate import evaluate, markdown

    checkpoint = load_checkpoint(str(arguments.checkpoint))
    model = TorchModel(checkpoint, batch_size=50, num_beams=1 if arguments.greedy else None)
    table = markdown(evaluate(model, arguments.pictures, arguments.seed))
    print(table, end="")
    if arguments.output:
        arguments.output.write_text(table)
    return 0


def _pictures(arguments: argparse.Namespace) -> int:
    from florence2_demo.examples import write_examples

    for path in write_examples(arguments.folder):
        print(path)
    return 0


def _stamps(arguments: argparse.Namespace) -> int:
    from florence2_demo.stamps import write_all

    for path, count in write_all(arguments.folder, arguments.scale):
        print(f"{path}: {count} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
