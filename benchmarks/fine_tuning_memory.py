"""Memory that fine-tuning takes: LoRA on the text part, on both towers, and full; random weights in true size.

python benchmarks/fine_tuning_memory.py --work DIR --size large

One picture at a time, bf16 where there is a GPU, gradient checkpointing on. ms-swift states 6.6 GB for LoRA and 11 GB
for full fine-tuning of large-ft, on a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from fine_tuning import write_data
from tables import Table, environment

HERE = Path(__file__).resolve().parent
WAYS = {
    "LoRA, text": ["lora.targets=text"],
    "LoRA, both towers": ["lora.targets=all"],
    "full": ["method=full"],
}


def measure(work: Path, checkpoint: Path, data: Path, settings: list[str], steps: int) -> float:
    """GB at the most, in a process of its own."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe = work / "recipe.yaml"
    recipe.write_text(f"model: {checkpoint}\noutput_dir: {run}\ntrain: [{{data: {data}}}]\n")
    fixed = [f"max_steps={steps}", "per_device_train_batch_size=1", "gradient_checkpointing=true", "logging_steps=1"]
    command = [sys.executable, "-m", "florence2_cli", "train", str(recipe), *fixed, "cache_features=false", *settings]
    subprocess.run(command, check=True)
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["memory_gb"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 10 GB for large")
    parser.add_argument("--size", choices=("base", "large"), default="large")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / arguments.size
    if not checkpoint.is_dir():
        subprocess.run([sys.executable, HERE / "random_checkpoint.py", checkpoint, arguments.size], check=True)
    data = write_data(arguments.work / "data", questions=1)
    gpu = torch.cuda.is_available()
    rows = Table(f"Florence-2-{arguments.size}", "GPU memory" if gpu else "resident memory")
    for name, settings in WAYS.items():
        rows.add(name, f"{measure(arguments.work, checkpoint, data, settings, arguments.steps):.1f} GB")
    device = torch.cuda.get_device_name() if gpu else "no GPU: memory of the whole process, fp32"
    (HERE / "fine_tuning_memory.md").write_text(
        "# Memory of fine-tuning\n\n"
        f"The most that was taken; one picture at a time, gradient checkpointing. {device}.\n\n"
        f"{rows}\n{environment('peft', 'accelerate')}"
    )
    print(rows)


if __name__ == "__main__":
    main()
