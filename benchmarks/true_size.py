"""Export of Florence-2-base and -large at their true sizes, with random weights: time, memory, parity.

python benchmarks/true_size.py --work DIR
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tables import Table, environment

from florence2.manifest import Manifest

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measured:
    name: str
    manifest: Manifest
    weights_gb: float
    seconds: float
    peak_gb: float


def measure(name: str, work: Path) -> Measured:
    checkpoint, export = work / name, work / f"{name}-export"
    # In processes of their own: a child's peak memory starts from its parent's (getrusage(2), execve keeps it).
    subprocess.run([sys.executable, HERE / "random_checkpoint.py", checkpoint, name], check=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "florence2_cli", "export", str(checkpoint), "--output", str(export)]
    _, status, usage = os.wait4(os.posix_spawn(sys.executable, command, os.environ), 0)
    if status:
        raise SystemExit(f"the export of {name} failed")
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    seconds = time.monotonic() - started
    return Measured(name, Manifest.read(export), weights / 1e9, seconds, usage.ru_maxrss * 1024 / 1e9)


def table(results: list[Measured]) -> str:
    rows = Table("model", "parameters", "export", "peak memory", "vision_encoder", "encoder", "decoder", "generations")
    for result in results:
        parity = result.manifest.parity
        rows.add(
            f"Florence-2-{result.name}",
            f"{result.weights_gb / 4 * 1e3:.0f} M",
            f"{result.seconds:.0f} s",
            f"{result.peak_gb:.1f} GB",
            *(f"{figures['relative']:.1e}" for figures in parity["graphs"].values()),
            f"{parity['generations_equal']} of {parity['generations']} equal",
        )
    return str(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 10 GB")
    parser.add_argument("--models", nargs="+", default=["base", "large"], choices=["base", "large"])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = table([measure(name, arguments.work) for name in arguments.models])
    print(found)
    (HERE / "true_size.md").write_text(
        "# Export at the true sizes\n\n"
        "Random weights in the sizes of Florence-2-base and -large; `florence2 export` with its comparison against\n"
        "transformers. Differences are the largest of a graph's output, relative to the output's largest value;\n"
        "generations are whole, greedy and with 3 beams.\n\n"
        f"{found}\n{environment('onnx')}"
    )


if __name__ == "__main__":
    main()
