"""What a run says of itself while it goes: a bar, a line of JSON now and then, TensorBoard's files on request."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from florence2.files import write_whole


class Reporter:
    """On the first process; on others it does nothing."""

    def __init__(self, run: Path, name: str, steps: int, done: int, speaks: bool, tensorboard: bool = False) -> None:
        self._file = None
        self._board = None
        self._pictures, self._since = 0, time.monotonic()
        # In a log, where no bar can move, lines say as much.
        self._speaks = speaks
        self._bar = tqdm(
            total=steps, initial=done, desc=name, unit="step", disable=None if speaks else True, dynamic_ncols=True
        )
        if not speaks:
            return
        path = run / "log.jsonl"
        run.mkdir(parents=True, exist_ok=True)
        _forget_after(path, done)
        self._file = path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)

    def step(self, pictures: int) -> None:
        self._pictures += pictures
        self._bar.update()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Values of the steps since the last time, with how fast they went."""
        seconds = time.monotonic() - self._since
        speed = {"seconds": seconds, "pictures_per_second": self._pictures / max(seconds, 1e-9)}
        values = {**values, **speed, "memory_gb": memory() / 1e9}
        self._pictures, self._since = 0, time.monotonic()
        shown = {"loss": f"{values['loss']:.4f}", "pictures/s": f"{values['pictures_per_second']:.1f}"}
        shown["GB"] = f"{values['memory_gb']:.1f}"
        if self._bar.disable:
            self.say(
                f"step {step} of {self._bar.total}: " + ", ".join(f"{name} {value}" for name, value in shown.items())
            )
        self._bar.set_postfix(shown, refresh=False)
        self._write(step, values)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self._write(step, scores)
        # The time that it took is none of training's.
        self._pictures, self._since = 0, time.monotonic()

    def say(self, line: str) -> None:
        if self._speaks:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name.replace("<", "").replace(">", ""), value, step)


def memory() -> int:
    """Bytes: the most that was taken on the GPU, or by this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _forget_after(path: Path, step: int) -> None:
    """Lines of steps that are done again; a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    write_whole(path, "".join(kept))
