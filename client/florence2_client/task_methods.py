"""What is asked: the model's tasks as methods, for the client that waits and the one that is awaited."""

import operator
from collections.abc import Sequence
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack

import numpy as np

from florence2.images import upright_size
from florence2.locations import to_text
from florence2.prompts import task_of
from florence2.tasks import TASKS, AnswerKind, Takes
from florence2_client.connection import Tensor, tensor
from florence2_client.pictures import Image

Detail = Literal["short", "detailed", "more_detailed"]

CAPTIONS: dict[str, str] = {
    "short": "<CAPTION>",
    "detailed": "<DETAILED_CAPTION>",
    "more_detailed": "<MORE_DETAILED_CAPTION>",
}


class Settings(TypedDict, total=False):
    """HF's, left out the checkpoint's own; and `timeout`, in seconds, for this call instead of the client's."""

    num_beams: int | None
    max_new_tokens: int | None
    no_repeat_ngram_size: int | None
    length_penalty: float | None
    early_stopping: bool | None
    timeout: float | None


# Triton's name of the type, and numpy's.
_OPTIONS: dict[str, tuple[str, Any]] = {
    "num_beams": ("INT32", np.int32),
    "max_new_tokens": ("INT32", np.int32),
    "no_repeat_ngram_size": ("INT32", np.int32),
    "length_penalty": ("FP32", np.float32),
    "early_stopping": ("BOOL", np.bool_),
}

Answered = TypeVar("Answered")
Said = TypeVar("Said")
Found = TypeVar("Found")
Captioned = TypeVar("Captioned")


class Tasks(Generic[Answered, Said, Found, Captioned]):
    """The 15 tasks. Boxes are x1, y1, x2, y2 in pixels of the upright picture; `min_score`, from 0 to 1, leaves out
    instances of a lower score. Every method takes `Settings`, and raises what `run` raises."""

    def run(
        self,
        prompt: str,
        image: Image,
        *,
        region: Sequence[float] | None = None,
        min_score: float | None = None,
        **settings: Unpack[Settings],
    ) -> Answered:
        """Any prompt: a task with its text, as in HF, or another text, which the model gets as it is.

        `region` is the box that `<REGION_TO_…>` tasks ask about.
        Raises ServerRefused; ValueError for arguments that can't be, InvalidRequest, which is one, for a picture that
        can't be read; OSError for a path or URL that can't.
        """
        raise NotImplementedError

    def caption_and_ground(
        self, image: Image, detail: Detail = "short", *, min_score: float | None = None, **settings: Unpack[Settings]
    ) -> Captioned:
        """A caption, and then where its phrases are: two requests, one after the other."""
        raise NotImplementedError

    def detect(
        self, image: Image, what: str | None = None, *, min_score: float | None = None, **settings: Unpack[Settings]
    ) -> Found:
        """Objects the model knows; or those that `what` names, which may come as boxes or as polygons."""
        prompt = "<OD>" if what is None else f"<OPEN_VOCABULARY_DETECTION>{what}"
        return self._ask(prompt, image, min_score=min_score, **settings)

    def caption(self, image: Image, detail: Detail = "short", **settings: Unpack[Settings]) -> Said:
        """What the picture shows: `<CAPTION>`, `<DETAILED_CAPTION>` or `<MORE_DETAILED_CAPTION>`."""
        return self._ask(caption_task(detail), image, **settings)

    def ocr(self, image: Image, region: Sequence[float] | None = None, **settings: Unpack[Settings]) -> Said:
        """The text in the picture, or in a box of it."""
        prompt = "<OCR>" if region is None else "<REGION_TO_OCR>"
        return self._ask(prompt, image, region=region, **settings)

    def ocr_regions(self, image: Image, *, min_score: float | None = None, **settings: Unpack[Settings]) -> Found:
        """Lines of text, each with a quad."""
        return self._ask("<OCR_WITH_REGION>", image, min_score=min_score, **settings)

    def ground(
        self, image: Image, phrase: str, *, min_score: float | None = None, **settings: Unpack[Settings]
    ) -> Found:
        """Where the things are that a phrase or caption speaks of."""
        return self._ask(f"<CAPTION_TO_PHRASE_GROUNDING>{phrase}", image, min_score=min_score, **settings)

    def segment(
        self, image: Image, what: str | Sequence[float], *, min_score: float | None = None, **settings: Unpack[Settings]
    ) -> Found:
        """Outlines of what a phrase names, or of what is in a box."""
        if isinstance(what, str):
            return self._ask(f"<REFERRING_EXPRESSION_SEGMENTATION>{what}", image, min_score=min_score, **settings)
        return self._ask("<REGION_TO_SEGMENTATION>", image, region=what, min_score=min_score, **settings)

    def describe_region(self, image: Image, region: Sequence[float], **settings: Unpack[Settings]) -> Said:
        """What a box shows, in a phrase or sentence."""
        return self._ask("<REGION_TO_DESCRIPTION>", image, region=region, **settings)

    def categorize_region(self, image: Image, region: Sequence[float], **settings: Unpack[Settings]) -> Said:
        """The kind of thing that a box shows."""
        return self._ask("<REGION_TO_CATEGORY>", image, region=region, **settings)

    def propose_regions(self, image: Image, *, min_score: float | None = None, **settings: Unpack[Settings]) -> Found:
        """Boxes of whatever stands out, without labels."""
        return self._ask("<REGION_PROPOSAL>", image, min_score=min_score, **settings)

    def dense_captions(self, image: Image, *, min_score: float | None = None, **settings: Unpack[Settings]) -> Found:
        """Boxes with a description each."""
        return self._ask("<DENSE_REGION_CAPTION>", image, min_score=min_score, **settings)

    def _ask(self, prompt: str, image: Image, **rest: Any) -> Any:
        """`run`, whose answer is of the kind that the task gives."""
        return self.run(prompt, image, **rest)


def caption_task(detail: str) -> str:
    if detail not in CAPTIONS:
        raise ValueError(f"detail is one of {', '.join(CAPTIONS)}, not {detail!r}")
    return CAPTIONS[detail]


def check(prompt: str, region: Sequence[float] | None, min_score: float | None, settings: Settings) -> None:
    """What can be refused before anything is read. Raises ValueError, TypeError for settings that there are not."""
    if not isinstance(prompt, str):
        raise ValueError(f'a prompt is a text such as "<OD>", not {type(prompt).__name__}')
    check_settings(settings)
    task = task_of(prompt)
    if min_score is not None and not 0 <= min_score <= 1:
        raise ValueError(f"min_score is from 0 to 1, not {min_score}")
    if min_score is not None and (task is None or task.answer is AnswerKind.PURE_TEXT):
        raise ValueError(f"{prompt!r} is answered in words, which have no scores: leave min_score out")
    if region is None:
        return
    if task is None or task.takes is not Takes.REGION:
        names = ", ".join(token for token, task in TASKS.items() if task.takes is Takes.REGION)
        raise ValueError(f"{prompt!r} takes no region; these do: {names}")
    if (
        len(region) != 4
        or not np.isfinite(np.asarray(region, np.float64)).all()
        or region[0] >= region[2]
        or region[1] >= region[3]
    ):
        raise ValueError(f"a region is x1, y1, x2, y2 in pixels with x1 < x2 and y1 < y2, not {tuple(region)}")


def check_settings(settings: Settings) -> None:
    """Raises TypeError for those that there are not."""
    unknown = settings.keys() - _OPTIONS.keys() - {"timeout"}
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}; there are {', '.join((*_OPTIONS, 'timeout'))}")


def tensors(prompt: str, data: bytes, region: Sequence[float] | None, settings: Settings) -> dict[str, Tensor]:
    """The ensemble's inputs. Raises ValueError."""
    if region is not None:
        size = upright_size(data)
        x1, y1, x2, y2 = region
        if x1 >= size[0] or y1 >= size[1] or x2 < 1 or y2 < 1:
            raise ValueError(f"the region {tuple(region)} has no pixel of the picture, {size[0]} x {size[1]}")
        prompt += to_text(region, size)
    made = {"image": tensor("BYTES", np.object_, data), "prompt": tensor("BYTES", np.object_, prompt.encode())}
    for name, (datatype, dtype) in _OPTIONS.items():
        value: Any = settings.get(name)
        if value is not None:
            try:
                if dtype is np.int32 and not -(2**31) <= operator.index(value) < 2**31:
                    raise ValueError("it must fit into 32 bits")
                made[name] = tensor(datatype, dtype, value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{name}={value!r}: {error}") from None
    return made
