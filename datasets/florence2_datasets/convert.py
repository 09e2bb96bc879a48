"""Any format in; `image`/`prefix`/`suffix` lines or COCO detection out."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from florence2.errors import InvalidRequest
from florence2_datasets.formats import SizeOf, Split, examples
from florence2_datasets.parsing import LOCATION, has_shapes, parse_answer, shapes, task_of
from florence2_datasets.record import Example, Problem


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
    images: dict[str, dict[str, Any]] = {}
    categories: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    sizes, count = SizeOf(), 0
    for item in items:
        try:
            boxes = item if isinstance(item, Problem) else _boxes(item, sizes)
        except ValueError as error:
            boxes = Problem(item.where, str(error))
        if isinstance(boxes, Problem):
            report(boxes)
            continue
        assert isinstance(item, Example)
        width, height = sizes(item.image)
        name = _name(item.image, folder)
        image = images.setdefault(name, {"id": len(images) + 1, "file_name": name, "width": width, "height": height})
        for (x1, y1, x2, y2), label in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": categories.setdefault(label, len(categories) + 1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
        count += 1
    named = [{"id": number, "name": label} for label, number in categories.items()]
    json.dump(
        {"images": list(images.values()), "annotations": annotations, "categories": named}, file, ensure_ascii=False
    )
    return count


_WRITERS = {".jsonl": _write_lines, ".json": _write_coco}


def _boxes(found: Example, sizes: SizeOf) -> list[tuple[list[float], str]]:
    """Raises ValueError for an answer that is not boxes, or not only."""
    try:
        task = task_of(found.prefix, found.suffix)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    rows = shapes(parse_answer(task, found.suffix, sizes(found.image)))
    boxes = [(box, label) for kind, box, label in rows if kind == "bboxes"]
    whole = 4 * len(boxes) == len(LOCATION.findall(found.suffix)) and bool(boxes) == bool(found.suffix)
    if not has_shapes(task) or not whole or not all(label for _, label in boxes):
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
