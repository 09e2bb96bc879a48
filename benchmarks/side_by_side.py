"""Memory of ten fine-tunes on one server: sharing what is the same, and as ten whole models.

python benchmarks/side_by_side.py --work DIR

Florence-2-base in true size with random weights. A fine-tune of the text half has its own beam_search; a whole model
has its own of everything.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import psutil
from florence2_client import Florence2Client
from florence2_release.install import install
from florence2_release.server import TritonServer
from one_request import picture, prepare
from tables import Table, environment

from florence2.manifest import Manifest, sha256_of

HERE = Path(__file__).resolve().parent


def fine_tune(export: Path, folder: Path, number: int, whole: bool) -> Path:
    """The same weights in files of other bytes: of the decoder alone, or of everything."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in export.iterdir():
        (folder / path.name).hardlink_to(path)
    names = ["decoder.onnx", *(("vision_encoder.onnx", "tokenizer.json") if whole else ())]
    for name in names:
        content = (export / name).read_bytes()
        (folder / name).unlink()
        if name.endswith(".onnx"):
            graph = onnx.load_from_string(content)
            graph.doc_string = str(number)
            (folder / name).write_bytes(graph.SerializeToString())
        else:
            (folder / name).write_bytes(content + b" " * number)
    manifest = Manifest.read(export)
    (folder / "manifest.json").unlink()
    replace(manifest, files={name: sha256_of(folder / name) for name in manifest.files}).write(folder)
    return folder


def memory(server: TritonServer) -> float:
    """GB of the server's processes, shared pages counted once."""
    main = psutil.Process(server.pid)
    return sum(process.memory_full_info().pss for process in (main, *main.children(recursive=True))) / 1e9


def measured(work: Path, export: Path, count: int, whole: bool, say: Callable[[str], None]) -> float:
    repository = work / "repository"
    shutil.rmtree(repository, ignore_errors=True)
    names = [f"florence2_{number}" for number in range(count)]
    for number, name in enumerate(names):
        install(fine_tune(export, work / "tuned", number, whole), repository, name)
    with TritonServer(repository) as server:
        server.wait_ready(timeout=1200)
        for name in names:
            with Florence2Client(server.grpc_url, model=name) as client:
                client.run("<CAPTION>", picture(0), max_new_tokens=5)
        found = memory(server)
    say(f"{count} {'whole models' if whole else 'fine-tunes'}: {found:.1f} GB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder; 15 GB")
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    _, export = prepare(arguments.work)
    rows = Table("on one server", "memory")
    values = []
    for count, whole in ((1, False), (arguments.count, False), (arguments.count, True)):
        values.append(measured(arguments.work, export, count, whole, print))
        what = "one model" if count == 1 else f"{count} whole models" if whole else f"{count} fine-tunes that share"
        rows.add(what, f"{values[-1]:.1f} GB")
    (HERE / "side_by_side.md").write_text(
        "# Fine-tunes side by side\n\n"
        "Florence-2-base in true size, fp32 on the CPU; the server's processes after one request to each model. A\n"
        "fine-tune of the text half brings its own encoder and decoder; vision encoder, preprocessing and\n"
        "postprocessing are loaded once.\n\n"
        f"{rows}\nten whole models / ten that share: {values[2] / values[1]:.2f}\n\n{environment('nvidia-pytriton')}"
    )
    print(rows)


if __name__ == "__main__":
    main()
