"""The file that perf_analyzer reads its requests from, and the answers that it holds the server's against."""

import base64
import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2.images import FORMATS, SUFFIXES
from florence2.prompts import parse
from florence2.tasks import TASKS, Takes

REMEMBERED = 16
"""Pictures whose features vision_encoder keeps: `recent_pictures` in its config.pbtxt, as it is shipped."""
REGION = "<loc_250><loc_250><loc_749><loc_749>"
"""The middle of the picture."""
_WEIGHTED = re.compile(r"(?P<prompt>.*?)(?:=(?P<weight>[1-9][0-9]{0,5}))?", re.DOTALL)


@dataclass(frozen=True)
class Asked:
    picture: Path
    prompt: str


def pictures_in(folder: Path, most: int) -> list[Path]:
    """Its picture files, those in folders of it included, by name; where there are more than `most`, so many, spread
    over all. ValueError if there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"there is no picture in {folder}: name a folder of {', '.join(FORMATS)} files")
    return found if len(found) <= most else [found[place * len(found) // most] for place in range(most)]


def plain_tasks() -> list[str]:
    """The tokens of the tasks that need nothing after them."""
    return [task.token for task in TASKS.values() if task.takes is Takes.NOTHING]


def read_mix(tasks: Iterable[str], text: str) -> dict[str, int]:
    """`PROMPT` or `PROMPT=WEIGHT` -> weight by prompt. A task that takes text or a region and is given none gets
    `text`, or REGION. Raises InvalidRequest, a ValueError, for a prompt that the server would refuse."""
    mix: dict[str, int] = {}
    for one in tasks:
        match = _WEIGHTED.fullmatch(one)
        assert match
        prompt = match["prompt"]
        if prompt in TASKS:
            prompt += {Takes.NOTHING: "", Takes.TEXT: text, Takes.REGION: REGION}[TASKS[prompt].takes]
        parse(prompt)
        if prompt in mix:
            raise ValueError(f"{prompt} is there twice; write {prompt}=2 to ask it twice as often as the others")
        mix[prompt] = int(match["weight"] or 1)
    return mix


def requests(pictures: Sequence[Path], mix: Mapping[str, int]) -> list[Asked]:
    """Every pair once, the prompt with the largest weight on every picture, the others on their share of them. Spread
    so that the prompts are mixed evenly and a picture comes again as late as it can: the server keeps the features of
    the last few."""
    most, placed = max(mix.values()), []
    for number, (prompt, weight) in enumerate(mix.items()):
        share = max(1, round(len(pictures) * weight / most))
        first = number * len(pictures) // len(mix)
        for place in range(share):
            # All prompts go through the pictures at one pace, each from where it starts.
            picture = pictures[(first + place * len(pictures) // share) % len(pictures)]
            placed.append((place / share, number, Asked(picture, prompt)))
    return [asked for *_, asked in sorted(placed, key=lambda one: one[:2])]


def document(asked: Iterable[Asked], answers: Iterable[str] | None, settings: Mapping[str, int]) -> dict[str, Any]:
    """In perf_analyzer's format. `answers`: the text, special tokens kept, that must come back for each; it can't look
    at `token_ids`, whose length varies, but no two lists of them have the same text."""
    made: dict[str, Any] = {"data": [_entry(one, settings) for one in asked]}
    if answers is not None:
        made["validation_data"] = [{"text": _one(text)} for text in answers]
    return made


def read(path: Path) -> dict[str, Any]:
    """What `document` made. ValueError if the file isn't such."""
    try:
        found = json.loads(path.read_text("utf-8"))
        prompts(found)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not what `florence2 bench prepare` writes: {error!r}") from error
    return found


def prompts(made: Mapping[str, Any]) -> list[str]:
    """Of the requests of a document."""
    return [entry["prompt"]["content"][0] for entry in made["data"]]


def only(made: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The document's requests with this prompt."""
    kept = [place for place, found in enumerate(prompts(made)) if found == prompt]
    return {name: [column[place] for place in kept] for name, column in made.items()}


def _entry(asked: Asked, settings: Mapping[str, int]) -> dict[str, Any]:
    data = asked.picture.read_bytes()
    # As on the wire: a string after its length.
    content = base64.b64encode(struct.pack("<I", len(data)) + data).decode()
    return {
        "image": {"content": {"b64": content}, "shape": [1]},
        "prompt": _one(asked.prompt),
        **{name: _one(value) for name, value in settings.items()},
    }


def _one(value: Any) -> dict[str, Any]:
    return {"content": [value], "shape": [1]}
