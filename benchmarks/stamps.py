"""The demo checkpoint learns stamps: what it gains, what it forgets with and without replay.

python benchmarks/stamps.py --work DIR
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tables import Table, environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEMO = ROOT / "demo" / "checkpoint"
RECIPE = ROOT / "training" / "recipes" / "stamps.yaml"
SHOWN = ("AP50", "found@0.5", "exact", "recall@0.5", "read_in_place@0.5", "CER")
"""Of the old tasks."""


def florence2(*arguments: object) -> str:
    command = [sys.executable, "-m", "florence2_cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def scores(checkpoint: Path, data: Path) -> dict[str, dict[str, float]]:
    """By task and metric."""
    found: dict[str, dict[str, float]] = {}
    for one in json.loads(florence2("eval", data, "--checkpoint", checkpoint, "--batch-size", 32, "--json")):
        found.setdefault(one["task"], {})[one["metric"]] = one["value"]
    return found


def trained(work: Path, name: str, *settings: str) -> tuple[Path, float]:
    """The merged checkpoint, and the minutes that its steps took."""
    data = work / "data"
    sources = [
        f"{split}=[{{data: {data / file}.jsonl}}]" for split, file in (("train", "train"), ("validation", "valid"))
    ]
    florence2("train", RECIPE, f"output_dir={work / name}", *sources, *settings)
    seconds = [json.loads(line).get("seconds", 0) for line in (work / name / "log.jsonl").read_text().splitlines()]
    if not (work / f"{name}-merged").exists():
        florence2("merge", work / name, "--output", work / f"{name}-merged")
    return work / f"{name}-merged", sum(seconds) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 8 GB")
    work = parser.parse_args().work
    data = work / "data"
    if not data.exists():
        subprocess.run([sys.executable, "-m", "florence2_demo", "stamps", data], check=True)
    replayed, minutes = trained(work, "replay", f"replay=[{{data: {data / 'replay.jsonl'}}}]")
    alone, _ = trained(work, "no-replay", "replay=[]")
    new, old = data / "test.jsonl", data / "known.jsonl"
    checkpoints = (DEMO, replayed, alone)
    gained = [scores(checkpoint, new)["<OD>"] for checkpoint in checkpoints]
    kept = [scores(checkpoint, old) for checkpoint in checkpoints]
    rows = Table("", "figure", "before", "with replay", "without")
    for metric in ("AP50[stamp]", "AP50[table]", "AP50[figure]"):
        rows.add("`<OD>`, pages with stamps", metric, *(f"{found[metric]:.3f}" for found in gained))
    for task, before in kept[0].items():
        for metric in (name for name in SHOWN if name in before):
            rows.add(f"`{task}`, as before", metric, *(f"{found[task][metric]:.3f}" for found in kept))
    (HERE / "stamps.md").write_text(
        "# A new class for the demo checkpoint\n\n"
        "[stamps.yaml](../training/recipes/stamps.yaml): LoRA of rank 32 on text half and projector,\n"
        f"4,000 pages with stamps in ms-swift's format, {minutes:.0f} minutes of steps with replay. 300 unseen pages,\n"
        "1,455 unseen samples of the old tasks, free-running answers with the checkpoint's own 3 beams.\n\n"
        f"{rows}\n{environment('peft')}"
    )
    print(rows)


if __name__ == "__main__":
    main()
