"""A client's prompt -> the task it asks for and the token ids that the encoder reads after the image."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from florence2.errors import InvalidRequest
from florence2.manifest import Sizes
from florence2.tasks import TASKS, Takes, Task

_LEADING_TOKEN = re.compile(r"\s*<(\w+)>")
# As the tokens are written: <loc_007> would be read as text.
_LOCATION = re.compile(r"<loc_(0|[1-9][0-9]{0,5})>")
_IMAGE = "<image>"
BYTES_PER_POSITION = 16
"""A token is four bytes or so of text; the longest of the task's own have twenty."""


@dataclass(frozen=True)
class Prompt:
    """A prompt understood: `task` is None for text that is no task of Florence-2's."""

    task: Task | None
    text: str
    """What the encoder reads."""
    key: str
    """The key of the answer: the task token, or the prompt as it was sent."""


def parse(prompt: str, location_bins: int = 1000) -> Prompt:
    """Read a prompt as `Florence2Processor._construct_prompts` does. Raises InvalidRequest with what to change."""
    if not prompt.strip():
        raise InvalidRequest("the prompt is empty; send a task such as <OD>, or text")
    if task := task_of(prompt):
        rest = prompt.replace(task.token, "").strip()
        return Prompt(task, task.prompt.format(input=_checked(task, rest, location_bins)), task.token)
    _refuse_misspelt(prompt)
    return Prompt(None, prompt, prompt)


def read_prompt(raw: bytes, positions: int) -> str:
    """A prompt as it was sent, for a model with so many `positions`. Raises InvalidRequest for one that is too long to
    be looked into, or not UTF-8."""
    if len(raw) > BYTES_PER_POSITION * positions:
        raise InvalidRequest(
            f"the prompt has {len(raw)} bytes; this model takes at most {BYTES_PER_POSITION * positions}; shorten it"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the prompt is not UTF-8") from None


def task_of(prompt: str) -> Task | None:
    """The task that a prompt asks for: the first of the table whose token it holds, anywhere."""
    return next((task for task in TASKS.values() if task.token in prompt), None)


class PromptEncoder:
    """Prompts -> token ids with one checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, sizes: Sizes) -> None:
        self.tokenizer = tokenizer
        self.sizes = sizes

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """[S] token ids, `<s>` and `</s>` included. Raises InvalidRequest if the prompt can't be used."""
        text = parse(prompt, self.sizes.location_bins).text
        ids = self.tokenizer.encode(f"<s>{text}</s>", add_special_tokens=False).ids
        image = self.tokenizer.token_to_id(_IMAGE)
        for token_id in ids:
            if token_id == image or token_id >= self.sizes.vocab_size:
                raise InvalidRequest(f"the prompt holds {self.tokenizer.id_to_token(token_id)}; leave it out")
        room = self.sizes.max_position_embeddings - self.sizes.image_tokens
        if len(ids) > room:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; this model takes {room} beside its {self.sizes.image_tokens} "
                "image tokens; shorten it"
            )
        return np.array(ids, np.int64)


def _checked(task: Task, rest: str, location_bins: int) -> str:
    if task.takes is Takes.NOTHING and rest:
        raise InvalidRequest(f"{task.token} takes no text; send {task.token} alone, without {_short(rest)}")
    if task.takes is Takes.TEXT and not rest:
        raise InvalidRequest(f"{task.token} needs text after it, such as {task.token}a green car")
    if task.takes is Takes.REGION:
        bins = [int(number) for number in _LOCATION.findall(rest)]
        if _LOCATION.sub("", rest).strip() or len(bins) < 4 or len(bins) % 2 or max(bins) >= location_bins:
            raise InvalidRequest(
                f"{task.token} needs a region after it, <loc_x1><loc_y1><loc_x2><loc_y2> with numbers from 0 to "
                f"{location_bins - 1}, not {_short(rest)}"
            )
    return rest


def _refuse_misspelt(prompt: str) -> None:
    found = _LEADING_TOKEN.match(prompt)
    if not found or found.group(1).startswith("loc_"):
        return
    name = found.group(1).upper()
    for token in TASKS:
        known = token.strip("<>")
        if name == known or (len(known) >= 6 and _one_letter_off(name, known)):
            raise InvalidRequest(f"unknown task <{found.group(1)}>; did you mean {token}?")


def _one_letter_off(a: str, b: str) -> bool:
    """Whether one letter replaced, added or left out makes `a` of `b`, or two neighbours that change places."""
    if len(a) > len(b):
        a, b = b, a
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    swapped = a[:same] + a[same : same + 2][::-1] + a[same + 2 :]
    return a[same + (len(a) == len(b)) :] == b[same + 1 :] or swapped == b


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
