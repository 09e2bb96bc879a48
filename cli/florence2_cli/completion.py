"""Print what a shell needs to complete this command."""

import argparse
from collections.abc import Iterator
from pathlib import Path

_FOLDERS = {"CKPT", "DIR", "EXPORT", "FOLDER", "PICTURES", "REPO", "RUN", "SOURCE"}
"""What arguments that name folders are called; of those that name files most have the type Path."""
_FILES = {"FOLDER|LIST|PARQUET", "IMAGE", "OUT"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(args: argparse.Namespace) -> int:
    import shtab

    from florence2_cli import parser

    made = parser()
    for action in _actions(made):
        if action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(made, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
