"""Rows of the chat formats and of `image`/`prefix`/`suffix` -> samples.

ms-swift v2 (`query`, `response`, `history`), ms-swift v3 and LLaMA-Factory (`messages`), Qwen-VL (`conversations`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from florence2_data.markup import fill, refuse_foreign, take_images
from florence2_data.objects import read_objects
from florence2_data.record import Problem, Sample, Text
from florence2_data.rows import rows

Turns = list[tuple[str, str]]
"""What the user says, and the answer."""
_USER, _ASSISTANT, _IGNORED = ("user", "human"), ("assistant", "gpt"), ("system",)


def read_prefix(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    def samples(row: dict[str, Any], where: str) -> list[Sample]:
        image, prefix, suffix = (_text(row, key) for key in ("image", "prefix", "suffix"))
        return [Sample(_picture(image, folder), _literal(prefix), _literal(suffix), where)]

    folder = images or path.parent
    return _each(path, samples)


def read_queries(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    return _chats(path, images, _queries)


def read_messages(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    return _chats(path, images, lambda row: _turns(row, "messages", "role", "content"))


def read_conversations(path: Path, images: Path | None) -> Iterator[Sample | Problem]:
    return _chats(path, images, lambda row: _turns(row, "conversations", "from", "value"))


def _each(path: Path, samples: Callable[[dict[str, Any], str], list[Sample]]) -> Iterator[Sample | Problem]:
    for item in rows(path):
        if isinstance(item, Problem):
            yield item
            continue
        where, row = item
        try:
            yield from samples(row, where)
        except ValueError as error:
            yield Problem(where, str(error))


def _chats(path: Path, images: Path | None, turns: Callable[[dict[str, Any]], Turns]) -> Iterator[Sample | Problem]:
    folder = images or path.parent
    return _each(path, lambda row, where: _samples(row, turns(row), folder, where))


def _samples(row: dict[str, Any], turns: Turns, folder: Path, where: str) -> list[Sample]:
    objects = read_objects(row.get("objects"))
    named = _listed_images(row)
    texts: list[tuple[Text, Text]] = []
    for query, response in turns:
        query, tagged = take_images(query)
        response, in_response = take_images(response)
        named += tagged + in_response
        # The query's placeholders come first.
        prompt = fill(query, objects.next_boxes, objects.next_ref)
        texts.append((prompt, fill(response, objects.next_boxes, objects.next_ref)))
    objects.check_used()
    distinct = list(dict.fromkeys(named))
    if not distinct:
        raise ValueError('no picture; name one in `images`: ["PATH"], or as <img>PATH</img>')
    if len(distinct) > 1:
        raise ValueError(f"{len(distinct)} pictures; Florence-2 takes one a sample: split the row")
    image = _picture(distinct[0], folder)
    several = len(texts) > 1
    return [
        Sample(image, prompt, answer, f"{where} (turn {turn})" if several else where)
        for turn, (prompt, answer) in enumerate(texts, 1)
    ]


def _queries(row: dict[str, Any]) -> Turns:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError("`history` is a list of [query, response]")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"a turn of `history` is [query, response], not {str(turn)[:60]}")
    return [*((query, response) for query, response in history), (_text(row, "query"), _text(row, "response"))]


def _turns(row: dict[str, Any], key: str, speaker: str, said: str) -> Turns:
    messages = row.get(key)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'`{key}` is missing or no list of {{"{speaker}": …, "{said}": …}}')
    spoken = []
    for message in messages:
        role, text = _text(message, speaker), _said(message, said)
        if role not in (*_USER, *_ASSISTANT, *_IGNORED):
            raise ValueError(f"unknown {speaker} {role!r} in `{key}`; Florence-2 knows a user and an assistant")
        if role not in _IGNORED:
            spoken.append((role in _USER, text))
    if not spoken or [user for user, _ in spoken] != [True, False] * (len(spoken) // 2):
        raise ValueError(f"`{key}` must go user, assistant, user, assistant, …")
    texts = [text for _, text in spoken]
    return list(zip(texts[0::2], texts[1::2], strict=True))


def _said(message: dict[str, Any], key: str) -> str:
    """Text, or parts {"type": "text", "text"} and {"type": "image"}, the latter as tags."""
    parts = message.get(key)
    return "".join(map(_part, parts)) if isinstance(parts, list) else _text(message, key)


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part, "text")
    if kind != "image":
        raise ValueError(f'a part is {{"type": "text", "text": …}} or {{"type": "image"}}, not {str(part)[:60]}')
    image = part.get("image") or part.get("path")
    return f"<img>{_path(image)}</img>" if image else "<image>"


def _listed_images(row: dict[str, Any]) -> list[str]:
    images = row.get("images") or row.get("image") or []
    return [_path(image) for image in (images if isinstance(images, list) else [images])]


def _path(image: Any) -> str:
    """Of PATH or {"path": PATH}."""
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if not isinstance(path, str):
        raise ValueError('`images` is a list of paths, ["PATH"] or [{"path": "PATH"}]; save other pictures as files')
    return path


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"`{key}` is missing; it has {', '.join(map(str, row)) or 'nothing'}")
    if not isinstance(row[key], str):
        raise ValueError(f"`{key}` is text, not {str(row[key])[:60]}")
    return row[key]


def _literal(text: str) -> Text:
    return (refuse_foreign(text).strip(),) if text.strip() else ()


def _picture(name: str, folder: Path) -> Path:
    if not name.strip():
        raise ValueError("no picture: its path is empty")
    if name.startswith(("http://", "https://", "data:")):
        raise ValueError(f"the picture {name[:60]} is no file; save it as one and name its path")
    return folder / name
