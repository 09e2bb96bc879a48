"""Fine-tune a checkpoint as a recipe says."""

import argparse
from pathlib import Path

EXTRA = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file with settings")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings that replace the recipe's")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show one batch in words, what would be trained and the memory it takes, and stop",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _settings()


def _settings() -> str:
    from florence2_training.recipe import settings

    return "settings, with their defaults:\n" + "\n".join(
        f"  {name} [{default}]\n      {text}" for name, default, text in settings()
    )


def run(args: argparse.Namespace) -> int:
    from florence2_training.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.settings)
    if args.dry_run:
        from florence2_training.dry_run import dry_run

        _say(dry_run(recipe))
        return 0
    from florence2_training.train import train

    progress = train(recipe)
    best = "" if progress.best is None else f", best {recipe.metric_for_best_model} {progress.best:.4f} at step "
    _say(f"{recipe.output_dir}: step {progress.step}{best}{progress.best_step if best else ''}")
    _say(f"a checkpoint of it: florence2 merge {recipe.output_dir} --output FOLDER")
    return 0


def _say(text: str) -> None:
    """Once, however many processes."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text)
