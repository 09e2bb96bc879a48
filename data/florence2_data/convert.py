"""Any format in; `image`/`prefix`/`suffix` lines or COCO detection out."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from florence2.coco_writer import Coco
from florence2.errors import InvalidRequest
from florence2_data.formats import SizeOf, Split, examples
from florence2_data.parsing import LOCATION, has_shapes, parse_answer, shapes, task_of
from florence2_data.record import Example, Problem


def convert(split: Split, output: Path, report: Callable[[Problem], None]) -> int:
    """Write the split to `output` and return the number of samples written; what is left out goes to `report`.

    .jsonl: one line a sample. .json: COCO detection, one image a picture, boxes at the centres of their bins; prompts
    are not in it. `output` is replaced when all is written. Raises ValueError for an output of another kind.
    """
    write = _WRITERS.get(output.suffix)
    if not write:
        raise ValueError(f"{output}: name the output .jsonl (image, prefix, suffix) or .json (COCO detection)")
    folder = output.absolute().parent
    with _replaced(output) as file:
        return write(examples(split), file, folder, report)


def _write_lines(
    items: Iterable[Example | Problem], file: IO[str], folder: Path, report: Callable[[Problem], None]
) -> int:
    count = 0
    for item in items:
        if isinstance(item, Problem):
            report(item)
            continue
        line = {"image": _name(item.image, folder), "prefix": item.prefix, "suffix": item.suffix}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        count += 1
    return count


def _write_coco(
    items: Iterable[Example | Problem], file: IO[str], folder: Path, report: Callable[[Problem], None]
) -> int:
    coco, sizes, count = Coco(), SizeOf(), 0
    for item in items:
        try:
            boxes = item if isinstance(item, Problem) else _boxes(item, sizes)
        except ValueError as error:
            boxes = Problem(item.where, str(error))
        if isinstance(boxes, Problem):
            report(boxes)
            continue
        assert isinstance(item, Example)
        coco.add(_name(item.image, folder), sizes(item.image), boxes)
        count += 1
    json.dump(coco.to_dict(), file, ensure_ascii=False)
    return count


_WRITERS = {".jsonl": _write_lines, ".json": _write_coco}


@dataclass(frozen=True)
class _Box:
    """As `florence2.coco_writer.Found`."""

    box: tuple[float, float, float, float]
    label: str
    score: None = None
    quad: None = None
    polygons: None = None


def _boxes(found: Example, sizes: SizeOf) -> list[_Box]:
    """Raises ValueError for an answer that is not boxes, or not only."""
    try:
        task = task_of(found.prefix, found.suffix)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    rows = shapes(parse_answer(task, found.suffix, sizes(found.image)))
    boxes = [_Box(tuple(box), label) for kind, box, label in rows if kind == "bboxes"]
    whole = 4 * len(boxes) == len(LOCATION.findall(found.suffix)) and bool(boxes) == bool(found.suffix)
    if not has_shapes(task) or not whole or not all(box.label for box in boxes):
        raise ValueError("its answer is not boxes with labels, and COCO detection holds nothing else; write .jsonl")
    return boxes


def _name(image: Path, folder: Path) -> str:
    image = Path(os.path.normpath(image))
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else str(image)


@contextmanager
def _replaced(output: Path) -> Iterator[IO[str]]:
    """A new file beside `output`, which takes its place when all was written."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=output.absolute().parent, prefix=f".{output.name}.", delete=False
    ) as file:
        try:
            yield file
            file.close()
            # Temporary files are for their owner alone.
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, output)
        except BaseException:
            Path(file.name).unlink()
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
