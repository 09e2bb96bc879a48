"""One warm request through Triton against transformers' `generate`, in turns, on the same random base-size weights.

python benchmarks/one_request.py --work DIR

Both get the same JPEG and prompt and give the parsed answer; both decode 100 tokens with 3 beams in fp32 on all cores.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch
from florence2_client import Florence2Client
from florence2_release.install import install
from florence2_release.server import TritonServer
from PIL import Image
from tables import Table, environment
from transformers import Florence2ForConditionalGeneration, Florence2Processor

HERE = Path(__file__).resolve().parent
TASK = "<DENSE_REGION_CAPTION>"
NUM_BEAMS, NEW_TOKENS = 3, 100

SEEDS = count()

Ask = Callable[[bytes], list[int]]


def picture(seed: int) -> bytes:
    """A JPEG of 1280 x 960 that no other seed gives."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1280, 960), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def transformers_side(checkpoint: Path) -> Ask:
    processor = Florence2Processor.from_pretrained(checkpoint)
    model = Florence2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def ask(file: bytes) -> list[int]:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        inputs = processor(images=image, text=TASK, return_tensors="pt")
        ids = model.generate(**inputs, num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS)
        text = processor.batch_decode(ids, skip_special_tokens=False)[0]
        processor.post_process_generation(text, task=TASK, image_size=image.size)
        return ids[0].tolist()

    return ask


def triton_side(server: TritonServer) -> Ask:
    client = Florence2Client(server.grpc_url)
    return lambda file: client.run(TASK, file, num_beams=NUM_BEAMS, max_new_tokens=NEW_TOKENS).token_ids.tolist()


def timed(ask: Ask, file: bytes) -> tuple[float, list[int]]:
    started = time.perf_counter()
    ids = ask(file)
    return time.perf_counter() - started, ids


def compare(ours: Ask, theirs: Ask, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each request, ours and theirs in turns. Stops if the token ids differ."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        # A new one each time: the server remembers the features of recent pictures.
        file = picture(next(SEEDS))
        (our_time, our_ids), (their_time, their_ids) = timed(ours, file), timed(theirs, file)
        if our_ids != their_ids or len(our_ids) != NEW_TOKENS + 1:
            raise SystemExit(f"token ids differ:\n{our_ids}\n{their_ids}")
        print(f"Triton {our_time:.2f} s, transformers {their_time:.2f} s", flush=True)
        times[0].append(our_time)
        times[1].append(their_time)
    return times


def prepare(work: Path) -> tuple[Path, Path]:
    """The checkpoint and its export."""
    checkpoint, export = work / "base", work / "base-export"
    if not checkpoint.is_dir():
        subprocess.run([sys.executable, HERE / "random_checkpoint.py", checkpoint, "base"], check=True)
    subprocess.run([sys.executable, "-m", "florence2_cli", "export", checkpoint, "--output", export], check=True)
    return checkpoint, export


def measure(checkpoint: Path, repository: Path, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each request, ours and theirs."""
    with TritonServer(repository) as server:
        server.wait_ready()
        ours, theirs = triton_side(server), transformers_side(checkpoint)
        compare(ours, theirs, 1)
        return compare(ours, theirs, pairs)


def table(ours: list[float], theirs: list[float]) -> str:
    rows = Table("one request, seconds", "median", "min", "max")
    for name, times in (("Triton", ours), ("transformers", theirs)):
        rows.add(name, *(f"{figure(times):.2f}" for figure in (median, min, max)))
    return f"{rows}\ntransformers / Triton: {median(theirs) / median(ours):.2f}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 3 GB")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    checkpoint, export = prepare(arguments.work)
    with tempfile.TemporaryDirectory(dir=arguments.work) as repository:
        install(export, Path(repository))
        our_times, their_times = measure(checkpoint, Path(repository), arguments.pairs)
    found = table(our_times, their_times)
    print(found)
    (HERE / "one_request.md").write_text(
        "# One request\n\n"
        "From a JPEG of 1280 x 960 and a prompt to the parsed answer: through the server, and by transformers' own\n"
        f"processor and `generate`. Florence-2-base with random weights, fp32, {NUM_BEAMS} beams, {NEW_TOKENS} new\n"
        f"tokens, all cores for both; {arguments.pairs} pairs in turns after a warm-up; token ids equal every time.\n\n"
        f"{found}\n{environment('nvidia-pytriton')}"
    )


if __name__ == "__main__":
    main()
