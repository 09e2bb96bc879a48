"""What the page asks: one request, how it is sent, and the same as Python and as curl."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence2_client import Florence2Client, Instances, Settings, Text
from florence2_client.results import Box

from florence2.images import upright_size
from florence2.locations import to_text
from florence2.prompts import task_of
from florence2.tasks import TASKS, AnswerKind, Takes

OWN = ""
"""In the place of a task's token: the text is the whole prompt."""


@dataclass(frozen=True)
class Server:
    """Whom the page asks, as its users would write it."""

    url: str
    model: str
    http_url: str
    """For curl: SCHEME://HOST:PORT."""


@dataclass(frozen=True)
class Request:
    """One request, its picture aside."""

    task: str
    """A task's token, or OWN."""
    text: str
    region: Box | None
    settings: Settings
    """num_beams, max_new_tokens; what is left out is the checkpoint's."""

    @classmethod
    def read(cls, task: str, text: str, region: str, beams: int, tokens: int | None) -> "Request":
        """From the fields of the page, but those that the task does not take. Raises ValueError for one that is needed
        and empty, in words for who fills it in."""
        takes = takes_of(task)
        if takes is Takes.TEXT and not text.strip():
            raise ValueError("Write a text first: this task needs one." if task else "Write a prompt first.")
        settings: Settings = {}
        if beams:
            settings["num_beams"] = int(beams)
        if tokens:
            settings["max_new_tokens"] = int(tokens)
        box = box_of(region) if takes is Takes.REGION else None
        return cls(task, text if takes is Takes.TEXT else "", box, settings)

    @property
    def prompt(self) -> str:
        """As the client takes it: a region goes beside it."""
        return self.task + self.text

    def send(self, client: Florence2Client, picture: Path) -> Text | Instances:
        """Raises what `Florence2Client.run` raises."""
        return client.run(self.prompt, picture, region=self.region, **self.settings)

    def python(self, server: Server, min_score: float) -> str:
        connection = [json.dumps(server.url)]
        if server.model != "florence2":
            connection.append(f"model={server.model!r}")
        arguments: dict[str, Any] = dict(self.settings)
        if self.region:
            arguments["region"] = self.region
        task = task_of(self.prompt)
        if min_score and task and task.answer is not AnswerKind.PURE_TEXT:
            arguments["min_score"] = min_score
        asked = [json.dumps(self.prompt, ensure_ascii=False), '"photo.jpg"']
        asked += [f"{name}={value}" for name, value in arguments.items()]
        return (
            "from florence2_client import Florence2Client\n\n"
            f"with Florence2Client({', '.join(connection)}) as client:\n"
            f"    answer = client.run({', '.join(asked)})\n"
            "print(answer.to_json())"
        )

    def curl(self, server: Server, picture: Path | None) -> str:
        """A region is written in parts of the picture's size, so this needs the picture. Raises ValueError without it,
        InvalidRequest for a picture that can't be read."""
        prompt = self.prompt
        if self.region:
            if picture is None:
                raise ValueError("Choose a picture first: a region's numbers depend on its size.")
            prompt += to_text(self.region, upright_size(picture.read_bytes()))
        head = json.dumps({"prompt": prompt, **self.settings, "image": ""}, ensure_ascii=False).removesuffix('"}')
        # In a pipe: a picture is longer than an argument may be. curl drops base64's line breaks.
        return (
            f"(printf '%s' {shlex.quote(head)}\n"
            "  base64 < photo.jpg\n"
            "  printf '\"}') |\n"
            f"  curl -s {server.http_url}/v2/models/{server.model}/generate -d @-"
        )


def takes_of(task: str) -> Takes:
    return TASKS[task].takes if task else Takes.TEXT


def box_of(region: str) -> Box:
    """Raises ValueError for what is no four numbers."""
    try:
        x1, y1, x2, y2 = numbers(region)
    except ValueError:
        raise ValueError(
            "Choose a region first: click two corners of it on the picture, or write x1 y1 x2 y2."
        ) from None
    return x1, y1, x2, y2


def numbers(region: str) -> list[float]:
    """Between them spaces or commas. Raises ValueError for other things."""
    return [float(number) if "." in number else int(number) for number in region.replace(",", " ").split()]
