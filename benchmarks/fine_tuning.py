"""Fine-tuning through `florence2 train` against a plain transformers Trainer that does the same correct work.

python benchmarks/fine_tuning.py --work DIR

Florence-2-base with random weights, the same LoRA, samples, batch size and fp32 on both sides, in turns. Correct means
what the usual Trainer scripts for Florence-2 leave out: padding ignored in the labels, the attention mask passed,
frozen parts in evaluation mode. Before anything is timed both sides must give the same loss for the same batch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from florence2_data.record import Example
from florence2_export.checkpoint import load_checkpoint
from florence2_export.export import sizes_of
from florence2_export.pixel_values import normalised
from florence2_training.corpus import Tokens
from florence2_training.features import PictureGroups, computer, open_cache
from florence2_training.objective import Batches, Florence2Learner
from florence2_training.pixels import read_pixels
from florence2_training.recipe import Lora, Recipe, Source
from florence2_training.sampler import Batch
from florence2_training.train import train
from florence2_training.trainable import targets
from one_request import picture
from peft import LoraConfig, get_peft_model
from tables import Table, environment
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments

from florence2.prompts import PromptEncoder

HERE = Path(__file__).resolve().parent
BATCH, RATE = 3, 1e-4
PICTURES = 8
EPOCHS = 3


@dataclass(frozen=True)
class Case:
    name: str
    preset: str
    questions: int
    """On each picture."""


CASES = (
    Case("vision trained, 3 questions a picture", "all", 3),
    Case("vision trained, 1 question a picture", "all", 1),
    Case("vision frozen, 1 question a picture", "text", 1),
)


def write_data(folder: Path, questions: int) -> Path:
    """Detections of 1 to 20 boxes, then captions and proposals, about pictures of 1280 x 960."""
    rng = np.random.default_rng(0)
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(PICTURES):
        (folder / f"{index}.jpg").write_bytes(picture(index))
        boxes = "".join(
            f"thing<loc_{a}><loc_{b}><loc_{a + 99}><loc_{b + 99}>" for a, b in rng.integers(0, 900, (20, 2))
        )
        answers = [
            ("<OD>", boxes[: boxes.replace("thing", "#thing", int(rng.integers(1, 21)) + 1).rfind("#")]),
            ("<CAPTION>", " ".join(["word"] * int(rng.integers(8, 20)))),
            ("<REGION_PROPOSAL>", boxes.replace("thing", "")[: 36 * 3]),
        ]
        for prefix, suffix in answers[:questions]:
            lines.append({"image": f"{index}.jpg", "prefix": prefix, "suffix": suffix})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Plain(torch.utils.data.Dataset):
    """What a Trainer script reads: one sample at a time."""

    def __init__(self, data: Path, tokens: Tokens, preprocessor: dict[str, Any]) -> None:
        self.lines = [json.loads(line) for line in data.read_text().splitlines()]
        self.folder, self.tokens, self.preprocessor = data.parent, tokens, preprocessor

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        line = self.lines[index]
        pixels = read_pixels([str(self.folder / line["image"])], self.preprocessor)
        return {
            "pixel_values": normalised(torch.from_numpy(pixels), self.preprocessor)[0],
            "prompt": torch.tensor(self.tokens.prompt(line["prefix"])),
            "labels": torch.tensor(self.tokens.answer(line["suffix"])),
        }


def collator(image: int, image_tokens: int, pad: int) -> Any:
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        prompts = pad_sequence([row["prompt"] for row in rows], batch_first=True, padding_value=pad)
        ids = torch.cat([torch.full((len(rows), image_tokens), image), prompts], dim=1)
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "input_ids": ids,
            "attention_mask": (ids != pad).long(),
            "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        }

    return collate


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


class Theirs:
    def __init__(self, checkpoint: Path, data: Path, preset: str) -> None:
        self.loaded = load_checkpoint(str(checkpoint))
        self.tokens = Tokens(PromptEncoder(self.loaded.tokenizer, sizes_of(self.loaded)))
        model: Any = self.loaded.model
        torch.manual_seed(0)
        self.model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets(model, preset))
        )
        if preset == "text":
            vision = model.model.vision_tower
            vision.train = lambda mode=True: vision
        self.data = Plain(data, self.tokens, self.loaded.preprocessor)
        pad = self.loaded.tokenizer.token_to_id("<pad>")
        self.collate = collator(model.config.image_token_id, self.loaded.preprocessor["image_seq_length"], pad)

    def seconds(self, work: Path, steps: int) -> list[float]:
        """Of each step, the first left out."""
        clock = Clock()
        arguments = TrainingArguments(
            output_dir=str(work / "trainer"),
            per_device_train_batch_size=BATCH,
            max_steps=steps + 1,
            learning_rate=RATE,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
            label_names=["labels"],
        )
        trainer = Trainer(self.model, arguments, data_collator=self.collate, train_dataset=self.data, callbacks=[clock])
        trainer.train()
        return np.diff(clock.times)[1:].tolist()

    @torch.no_grad()
    def check(self) -> None:
        """The two losses of one batch, dropout off."""
        self.model.eval()
        chosen = list(range(min(BATCH, len(self.data))))
        theirs = self.model(**self.collate([self.data[index] for index in chosen])).loss
        lines = [self.data.lines[index] for index in chosen]
        corpus: Any = [Example(self.data.folder / line["image"], line["prefix"], line["suffix"], "") for line in lines]
        batch = Batches([corpus], self.tokens, self.loaded.preprocessor)[Batch(chosen)]
        ours = Florence2Learner(self.loaded.model, self.loaded.preprocessor)(batch) / batch["weight"]
        if not torch.allclose(ours, theirs, rtol=1e-4):
            raise SystemExit(f"the losses differ: {ours} and {theirs}")


def seconds_of_features(checkpoint: Path, data: Path, work: Path) -> float:
    """Of each picture, into the folder that the run then reads."""
    shutil.rmtree(work / "features", ignore_errors=True)
    loaded = load_checkpoint(str(checkpoint))
    vision = loaded.model.model.vision_tower
    cache = open_cache(work / "features", vision, loaded.preprocessor, torch.float32)
    pictures = [str(path.resolve()) for path in sorted(data.parent.glob("*.jpg"))]
    compute = computer(vision, loaded.preprocessor, torch.device("cpu"), nullcontext)
    started = time.perf_counter()
    starts = range(0, len(pictures), BATCH)
    groups = PictureGroups([pictures[start : start + BATCH] for start in starts], loaded.preprocessor)
    cache.fill((stamped, compute(pixels)) for stamped, pixels in (groups[index] for index in range(len(starts))))
    return (time.perf_counter() - started) / len(pictures)


def ours(checkpoint: Path, data: Path, preset: str, work: Path, steps: int) -> list[float]:
    """Seconds of each step, the first left out."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe = Recipe(
        model=str(checkpoint),
        output_dir=str(run),
        train=[Source(data=str(data))],
        lora=Lora(targets=preset),
        max_steps=steps + 1,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        mixed_precision="no",
        logging_steps=1,
        save_steps=10**6,
        features_dir=str(work / "features"),
        dataloader_num_workers=0,
    )
    train(recipe)
    # The last step's checkpoint is written after its line.
    return [json.loads(line)["seconds"] for line in (run / "log.jsonl").read_text().splitlines()][1:]


def prepare(work: Path) -> Path:
    checkpoint = work / "base"
    if not checkpoint.is_dir():
        subprocess.run([sys.executable, HERE / "random_checkpoint.py", checkpoint, "base"], check=True)
    return checkpoint


def measured(case: Case, work: Path, rounds: int, steps: int) -> Iterator[str]:
    checkpoint, data = prepare(work), write_data(work / f"data-{case.questions}", case.questions)
    theirs = Theirs(checkpoint, data, case.preset)
    theirs.check()
    times: tuple[list[float], list[float]] = ([], [])
    features = seconds_of_features(checkpoint, data, work) if case.preset == "text" else 0.0
    for _ in range(rounds):
        times[0].extend(theirs.seconds(work, steps))
        times[1].extend(ours(checkpoint, data, case.preset, work, steps))
    their_sample, our_sample = (median(side) / BATCH for side in times)
    yield case.name
    yield from (f"{value:.2f}" for value in (their_sample, our_sample, their_sample / our_sample))
    whole = (EPOCHS * their_sample) / (EPOCHS * our_sample + features / case.questions)
    yield f"{whole:.2f}"
    print(f"{case.name}: Trainer {median(times[0]):.1f} s a step, ours {median(times[1]):.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 2 GB")
    parser.add_argument("--rounds", type=int, default=2, help="of both sides (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of a round (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    warnings.simplefilter("ignore")
    rows = Table("", "Trainer", "florence2 train", "ratio", f"ratio over {EPOCHS} epochs")
    for case in CASES:
        rows.add(*measured(case, arguments.work, arguments.rounds, arguments.steps))
    (HERE / "fine_tuning.md").write_text(
        "# Fine-tuning\n\n"
        "Seconds per sample of an optimizer step, the median, through `florence2 train` and through a transformers\n"
        "Trainer that does the same correct work: Florence-2-base with random weights, LoRA of rank 16, fp32, batches\n"
        f"of {BATCH}, answers of 7 to 120 tokens; {arguments.steps} steps a side in turns, {arguments.rounds} times,\n"
        "after a first step each that is not counted; the same loss on both sides for the same batch. The last column\n"
        "counts the pass that computes the features of a frozen tower, too.\n\n"
        f"{rows}\n{environment('peft', 'accelerate')}"
    )
    print(rows)


if __name__ == "__main__":
    main()
