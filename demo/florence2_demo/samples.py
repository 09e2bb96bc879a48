"""A picture and its truth as Florence-2 would be asked and would answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from florence2.locations import Size, to_text
from florence2_demo.things import Thing
from florence2_demo.words import counted, joined

TASKS_OF = {
    "scene": (
        "<OD>",
        "<CAPTION>",
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "<REGION_TO_CATEGORY>",
        "<REGION_PROPOSAL>",
    ),
    "page": (
        "<OD>",
        "<CAPTION>",
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "<REGION_TO_CATEGORY>",
        "<REGION_PROPOSAL>",
    ),
    "word": ("<OCR>", "<OCR_WITH_REGION>", "<OD>", "<CAPTION>", "<REGION_PROPOSAL>"),
}


@dataclass(frozen=True)
class Sample:
    task: str
    text: str
    """What stands after the task token: a caption, a region, or nothing."""
    target: str

    @property
    def prompt(self) -> str:
        return self.task + self.text


def answer(task: str, kind: str, things: Sequence[Thing], size: Size, chosen: int = 0) -> Sample | None:
    """None where the picture has nothing the task could be asked about.

    `chosen` picks the thing that is asked about; for grounding, the whole caption where it is past the last.
    """
    if task == "<CAPTION>":
        return Sample(task, "", caption(kind, things))
    if task == "<OCR>":
        return Sample(task, "", " ".join(thing.text for thing in things))
    if task == "<OCR_WITH_REGION>":
        return Sample(task, "", "".join(thing.text + to_text(_quad(thing), size) for thing in things))
    if task == "<OD>":
        return Sample(task, "", "".join(thing.noun + to_text(thing.box, size) for thing in things))
    if task == "<REGION_PROPOSAL>":
        return Sample(task, "", "".join(to_text(thing.box, size) for thing in things))
    if not things:
        return None
    if task == "<REGION_TO_CATEGORY>":
        thing = things[chosen % len(things)]
        return Sample(task, to_text(thing.box, size), thing.noun)
    if task == "<CAPTION_TO_PHRASE_GROUNDING>":
        return _grounding(kind, things, size, chosen)
    raise ValueError(
        f"the demo is not taught {task}; it is taught {sorted({t for ts in TASKS_OF.values() for t in ts})}"
    )


def caption(kind: str, things: Sequence[Thing]) -> str:
    """`two red circles and a blue square`, `a page with a table`, `a page of text`, `a green word`."""
    phrases = joined([counted(len(group), name) for name, group in groups(things).items()])
    if kind == "page":
        return f"a page with {phrases}" if things else "a page of text"
    return phrases


def groups(things: Sequence[Thing]) -> dict[str, list[Thing]]:
    """Things that share a name share a phrase, so that no caption repeats itself."""
    grouped: dict[str, list[Thing]] = {}
    for thing in things:
        grouped.setdefault(f"{thing.colour} {thing.noun}".strip(), []).append(thing)
    return grouped


def _grounding(kind: str, things: Sequence[Thing], size: Size, chosen: int) -> Sample:
    phrases = {counted(len(group), name): group for name, group in groups(things).items()}
    text = caption(kind, things)
    if chosen < len(phrases):
        text = list(phrases)[chosen]
        phrases = {text: phrases[text]}
    target = "".join(phrase + "".join(to_text(thing.box, size) for thing in group) for phrase, group in phrases.items())
    return Sample("<CAPTION_TO_PHRASE_GROUNDING>", text, target)


def _quad(thing: Thing) -> tuple[float, ...]:
    """The corners of the box, clockwise from the top left."""
    x1, y1, x2, y2 = thing.box
    return x1, y1, x2, y1, x2, y2, x1, y2
