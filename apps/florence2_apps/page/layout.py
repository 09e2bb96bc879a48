"""What is where on the page."""

from typing import Any

import gradio as gr
from florence2_client import Instances
from gradio.data_classes import ImageData

from florence2_apps.page import answer as shown
from florence2_apps.page.answer import Answered
from florence2_apps.page.form import OWN

NAMES = {
    "<OD>": "Objects",
    "<DENSE_REGION_CAPTION>": "Objects, described",
    "<REGION_PROPOSAL>": "Regions, unnamed",
    "<OPEN_VOCABULARY_DETECTION>": "Find by name",
    "<CAPTION_TO_PHRASE_GROUNDING>": "Find the phrases of a caption",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "Outline by name",
    "<CAPTION>": "Caption",
    "<DETAILED_CAPTION>": "Caption, detailed",
    "<MORE_DETAILED_CAPTION>": "Caption, a paragraph",
    "<OCR>": "Read text",
    "<OCR_WITH_REGION>": "Read text and where it stands",
    "<REGION_TO_CATEGORY>": "Name a region",
    "<REGION_TO_DESCRIPTION>": "Describe a region",
    "<REGION_TO_SEGMENTATION>": "Outline a region",
    "<REGION_TO_OCR>": "Read a region",
}
KEPT = 3600
"""Seconds that pictures stay on disk and answers in memory."""
HINT = '<p class="hint">The answer will be here.</p>'
_PLAIN: dict[str, Any] = {"show_label": False, "show_line_numbers": False, "wrap_lines": True, "buttons": ["copy"]}


class Form:
    """What is asked."""

    def __init__(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            sources=["upload", "clipboard"],
            height=340,
            buttons=["fullscreen"],
            placeholder="Drop a picture here, paste one, or click to choose a file",
            elem_id="picture",
        )
        # Gradio would open the file, turn it and write it anew.
        self.picture.preprocess = _as_dropped  # type: ignore[method-assign, assignment]
        tasks = [(f"{name}  {token}", token) for token, name in NAMES.items()]
        self.task = gr.Dropdown([*tasks, ("A prompt of your own", OWN)], value="<OD>", label="Task", elem_id="task")
        self.text = gr.Textbox("", label="Text", visible=False, elem_id="text")
        self.region = gr.Textbox(
            "",
            label="Region",
            info="In pixels: click two opposite corners on the picture, or write x1 y1 x2 y2",
            visible=False,
            elem_id="region",
        )
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            self.beams = gr.Slider(0, 8, 0, step=1, label="Beams", info="0: the checkpoint's own", elem_id="beams")
            self.tokens = gr.Number(
                0, label="New tokens at most", info="0: the checkpoint's own", precision=0, minimum=0, elem_id="tokens"
            )
        self.ask = gr.Button("Ask", variant="primary", size="lg", elem_id="ask")

    @property
    def fields(self) -> list[Any]:
        """What a Request is read from."""
        return [self.task, self.text, self.region, self.beams, self.tokens]


class View:
    """What came back."""

    def __init__(self) -> None:
        self.answered = gr.State(time_to_live=KEPT)
        self.status = gr.HTML(HINT, elem_id="status")
        self.text = gr.Textbox(label="Answer", max_lines=20, visible=False, buttons=["copy"], elem_id="answer")
        self.drawn = gr.Image(
            show_label=False,
            interactive=False,
            visible=False,
            format="webp",
            buttons=["download", "fullscreen"],
            elem_id="drawn",
        )
        self.min_score = gr.Slider(0, 1, 0, step=0.01, label="Lowest score shown", visible=False, elem_id="min-score")
        self.table = gr.HTML(visible=False, elem_id="found")
        # Hidden, not left out: Gradio forgets whether it is open otherwise.
        with gr.Accordion("The whole answer", open=False, visible="hidden", elem_id="whole") as self.whole:
            self.json = gr.JSON(show_label=False, elem_id="json")

    @property
    def outputs(self) -> list[Any]:
        return [self.answered, self.status, self.text, self.drawn, self.min_score, self.table, self.whole, self.json]

    def nothing(self, status: str = "", drawn: Any = None) -> dict[Any, Any]:
        """No answer: only a line, and a picture, if there is one."""
        return {
            self.answered: None,
            self.status: gr.update(value=status, visible=bool(status)),
            self.drawn: gr.update(value=drawn, visible=drawn is not None),
            **dict.fromkeys([self.text, self.min_score, self.table], gr.update(visible=False)),
            self.whole: gr.update(visible="hidden"),
        }

    def all(self, answered: Answered, min_score: float) -> dict[Any, Any]:
        result = answered.result
        several = isinstance(result, Instances)
        return {
            self.answered: answered,
            self.status: gr.update(value=shown.status(answered), visible=True),
            self.text: gr.update(value="" if several else str(result), visible=not several),
            self.min_score: gr.update(visible=several),
            self.whole: gr.update(visible=True),
            **self.above(answered, min_score),
        }

    def above(self, answered: Answered, min_score: float) -> dict[Any, Any]:
        """What depends on the lowest score shown; the server is not asked again."""
        result, region = answered.result, answered.region
        table = ""
        if isinstance(result, Instances):
            found = result.at_least(min_score)
            table, result = shown.table(found, len(result)), found
        pictured = bool(table) or region is not None
        return {
            self.drawn: gr.update(
                value=shown.drawn(answered.picture, region, result.answer) if pictured else None, visible=pictured
            ),
            self.table: gr.update(value=table, visible=bool(table)),
            self.json: result.to_dict(),
        }


class Code:
    """The request, to take along."""

    def __init__(self) -> None:
        with gr.Accordion("The same request in your own program", open=True, elem_id="code"), gr.Tabs():
            with gr.Tab("Python"):
                self.python = gr.Code(language="python", interactive=False, **_PLAIN, elem_id="python")
            with gr.Tab("curl"):
                self.curl = gr.Code(language="shell", interactive=False, **_PLAIN, elem_id="curl")

    @property
    def outputs(self) -> list[Any]:
        return [self.python, self.curl]


def _as_dropped(picture: ImageData | None) -> str | None:
    return picture.path if picture else None
