"""What the methods of a client return."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import PIL.Image
import PIL.ImageDraw
from numpy.typing import NDArray

from florence2.answers import at_least, instances
from florence2.coco_writer import Coco
from florence2.drawing import draw
from florence2.images import decode, upright_size
from florence2_client.connection import Reply
from florence2_client.pictures import Image, encoded

if TYPE_CHECKING:
    import supervision

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the upright picture."""


@dataclass(frozen=True)
class Instance:
    """A thing in the picture."""

    label: str
    """Empty where the task gives none."""
    score: float
    """0 to 1: exp of the mean log-probability of its location tokens."""
    box: Box
    """Around it."""
    quad: tuple[float, ...] | None = None
    """x, y of four corners, of text that was read."""
    polygons: tuple[tuple[float, ...], ...] | None = None
    """Outlines x, y, x, y, …, of a segmentation."""


@dataclass(frozen=True, eq=False)
class Result:
    """What the model says of one picture."""

    prompt: str
    """As it was sent."""
    answer: dict[str, Any]
    """`{task: value}` as HF's `post_process_generation`, with `scores`; coordinates in pixels, the picture upright."""
    text: str
    """The generated text, special tokens kept."""
    token_ids: NDArray[np.int64]
    """[L], decoder start included."""
    token_logprobs: NDArray[np.float32]
    """[L - 1], one per generated token."""
    sequence_score: float
    """HF's."""
    finish_reason: str
    """"stop", or "length" if the limit on new tokens ended it."""
    model_version: str
    """The release that answered."""
    image: Image = field(repr=False)
    """The picture that was sent, as it was given."""

    @property
    def value(self) -> Any:
        """The answer without its key."""
        return next(iter(self.answer.values()))

    def draw(self, image: Image | None = None) -> PIL.Image.Image:
        """The upright picture with the answer over it. The picture is read again, from where it came from, unless it is
        given."""
        return draw(decode(encoded(self.image if image is None else image)), self.answer)

    def to_dict(self) -> dict[str, Any]:
        """All but the picture, ready for JSON."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "text": self.text,
            "token_ids": self.token_ids.tolist(),
            "token_logprobs": [round(float(value), 6) for value in self.token_logprobs],
            "sequence_score": self.sequence_score,
            "finish_reason": self.finish_reason,
            "model_version": self.model_version,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


@dataclass(frozen=True, eq=False)
class Text(Result):
    """An answer in words: `str()` of it."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, eq=False)
class Instances(Result, Sequence[Instance]):
    """An answer of boxes, quads or polygons: a sequence of them, in the model's order, without polygons that the model
    gave no point."""

    _rows: tuple[Instance, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", tuple(read_instances(self.value)))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Instance: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Instance, ...]: ...
    def __getitem__(self, index: int | slice) -> Instance | tuple[Instance, ...]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Instance]:
        return iter(self._rows)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """[N, 4]: x1, y1, x2, y2."""
        return np.array([row.box for row in self], np.float32).reshape(-1, 4)

    @property
    def labels(self) -> list[str]:
        return [row.label for row in self]

    @property
    def scores(self) -> NDArray[np.float32]:
        """[N]"""
        return np.array([row.score for row in self], np.float32)

    def at_least(self, min_score: float) -> Self:
        """The same without instances of a lower score; text and tokens stay what the model wrote."""
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score is from 0 to 1, not {min_score}")
        return replace(self, answer={key: at_least(value, min_score) for key, value in self.answer.items()})

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, which is read for it."""
        return upright_size(encoded(self.image))

    def to_coco(self, file_name: str = "") -> dict[str, list[dict[str, Any]]]:
        """images, annotations with scores, and categories, numbered from 1 in the order of their coming."""
        coco = Coco()
        coco.add(file_name, self.image_size, self)
        return coco.to_dict()

    def to_supervision(self) -> "supervision.Detections":
        """With masks of polygons; quads are under "xyxyxyxy", where supervision looks for oriented boxes."""
        try:
            import supervision
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("supervision is not installed: pip install supervision") from error
        names = list(dict.fromkeys(self.labels))
        data: dict[str, Any] = {"class_name": np.array(self.labels, dtype=str)}
        if self and all(row.quad is not None for row in self):
            data["xyxyxyxy"] = np.array([row.quad for row in self], np.float32).reshape(-1, 4, 2)
        masks = None
        if self and all(row.polygons is not None for row in self):
            size = self.image_size
            masks = np.array([_mask(row.polygons or (), size) for row in self])
        return supervision.Detections(
            xyxy=self.boxes,
            mask=masks,
            confidence=self.scores,
            class_id=np.array([names.index(label) for label in self.labels], int),
            data=data,
        )


@dataclass(frozen=True, eq=False)
class CaptionedInstances(Instances):
    """A caption, and where its phrases are."""

    caption: Text

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"caption": self.caption.to_dict()}


def read(reply: Reply, prompt: str, image: Image) -> Text | Instances:
    """The server's tensors."""
    outputs = reply.outputs
    answer = json.loads(outputs["answer"][0])
    kind = Text if isinstance(next(iter(answer.values())), str) else Instances
    return kind(
        prompt=prompt,
        answer=answer,
        text=outputs["text"][0].decode(),
        token_ids=outputs["token_ids"],
        token_logprobs=outputs["token_logprobs"],
        sequence_score=float(outputs["sequence_score"][0]),
        finish_reason=outputs["finish_reason"][0].decode(),
        model_version=reply.model_version,
        image=image,
    )


def read_instances(value: dict[str, Any]) -> Iterator[Instance]:
    """Of an answer without its key."""
    rows = (_instance(*row) for row in instances(value))
    return (row for row in rows if row is not None)


def _instance(kind: str, shape: list[Any], label: str, score: float) -> Instance | None:
    if kind == "bboxes":
        x1, y1, x2, y2 = shape
        return Instance(label, score, (x1, y1, x2, y2))
    if kind == "quad_boxes":
        return Instance(label, score, _around([shape]), quad=tuple(shape))
    outlines = tuple(tuple(outline) for outline in shape if outline)
    return Instance(label, score, _around(outlines), polygons=outlines) if outlines else None


def _around(outlines: Sequence[Sequence[float]]) -> Box:
    points = np.array([number for outline in outlines for number in outline], np.float64).reshape(-1, 2)
    (x1, y1), (x2, y2) = points.min(0).tolist(), points.max(0).tolist()
    return (x1, y1, x2, y2)


def _mask(outlines: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = PIL.Image.new("1", size)
    pen = PIL.ImageDraw.Draw(mask)
    for outline in outlines:
        if len(outline) >= 6:
            pen.polygon([float(number) for number in outline], fill=1)
    return np.asarray(mask)
