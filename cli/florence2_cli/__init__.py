"""The `florence2` command. One file per subcommand; each imports its room when it runs.

No room imports it, but scripts do; it imports every room but the demo.
"""

import argparse
import importlib
import logging
import sys
import traceback
from collections.abc import Sequence

COMMANDS = (
    *("export", "tensorrt", "release", "rollback", "releases", "serve"),
    *("ask", "label", "ui", "bench", "train", "merge", "eval", "data", "completion"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 only when all was done; errors go to stderr as one line that says what to do."""
    arguments = parser()
    args, rest = arguments.parse_known_args(argv)
    if all("=" in one and not one.startswith("-") for one in rest) and hasattr(args, "settings"):
        # argparse takes positional arguments in one place only.
        args.settings += rest
    elif rest:
        arguments.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        _report(
            args,
            f"{error}; install the extra this command needs: pip install 'florence2-triton[{args.extra}]'",
        )
    except (ValueError, RuntimeError, OSError) as error:
        _report(args, str(error))
    return 1


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    made = argparse.ArgumentParser(prog="florence2", description="Florence-2 on Triton: export, release, serve, ask.")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"florence2_cli.{name}")
        help_text = (module.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument(
            "--verbose", action="store_true", help="show the trace of an error, and the log of a server that is started"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, extra=getattr(module, "EXTRA", "serve"))
    return made


def _report(args: argparse.Namespace, message: str) -> None:
    if args.verbose:
        traceback.print_exc()
    print(f"florence2: {message}", file=sys.stderr)
