"""python -m fuzz, with tests/ and benchmarks/ on the path: see `make fuzz`."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from conftest import DEMO_CHECKPOINT
from tables import environment

RUNS = {"inputs": 1.0, "cancels": 0.2, "faults": 3.0}
"""One after the other on one server, with at most so much of the inputs; faults come beside the kinds of the first, and
end the run."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--runs", default=",".join(RUNS), help="of %(default)s")
    parser.add_argument(
        "--kinds", default="*", help="patterns with commas between them; those after a minus are left out"
    )
    parser.add_argument("--minutes", type=float, default=60, help="of each run")
    parser.add_argument("--questions", type=int, default=100, help="of honest clients")
    parser.add_argument("--export", type=Path, help="of the demo checkpoint; left out, one is made")
    parser.add_argument("--report", type=Path, help="the page to write")
    parser.add_argument(
        "--again",
        help="KIND:SEED:NUMBER or KIND:SEED:FIRST-LAST, several with commas: sends these instead, one at a time",
    )
    args = parser.parse_args()
    # Not above: the processes that send import this file too, and have no need of torch.
    from fuzz.run import Harness

    heading = environment("nvidia-pytriton", "pillow", "hypothesis")
    with tempfile.TemporaryDirectory(prefix="florence2-fuzz-") as name:
        folder = Path(name)
        export = args.export or _exported(folder / "export")
        harness = Harness(export, folder, args.questions if not args.again else 1, args.seed, _say)
        try:
            if args.again:
                harness.again(numbered(args.again))
                return 0
            return _runs(args, harness, heading)
        finally:
            harness.close()


def numbered(text: str) -> list[tuple[str, int, int]]:
    """KIND:SEED:NUMBER or KIND:SEED:FIRST-LAST, with commas between them -> each kind, seed and number."""
    found = []
    for one in text.split(","):
        kind, seed, numbers = one.split(":")
        first, _, last = numbers.partition("-")
        found += [(kind, int(seed), number) for number in range(int(first), int(last or first) + 1)]
    return found


def _runs(args: argparse.Namespace, harness: Any, heading: str) -> int:
    from fuzz.kinds import chosen, schedule

    done = []
    for name in args.runs.split(","):
        group = "cancels" if name == "cancels" else "inputs"
        names = chosen(args.kinds if group == "inputs" else "*", group)
        order = schedule(names, args.seed, int(args.inputs * RUNS[name]))
        done.append(harness.run(name, order, args.seed, args.minutes, faults=name == "faults"))
        print(done[-1].markdown())
        print("\n".join(done[-1].blamed()), flush=True)
        if args.report:
            args.report.write_text(page(heading, [run.markdown() for run in done]))
    failures = [failure for run in done for failure in run.failures()]
    print("\n".join(("failed:", *failures)) if failures else "nothing failed")
    return 1 if failures else 0


def page(heading: str, runs: list[str]) -> str:
    return f"# Hostile inputs\n\n`make fuzz`, on {heading}\n" + "\n".join(runs)


def _exported(folder: Path) -> Path:
    from florence2_export.export import export

    export(str(DEMO_CHECKPOINT), folder)
    return folder


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
