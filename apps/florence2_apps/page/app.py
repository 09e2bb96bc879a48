"""The page, and what happens when something on it is touched."""

import time
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from florence2_client import Florence2Client

from florence2.tasks import Takes
from florence2_apps.page.answer import Answered, drawn
from florence2_apps.page.form import Request, Server, box_of, numbers, takes_of
from florence2_apps.page.layout import HINT, KEPT, Code, Form, View

_AT_ONCE = 16
"""Requests of all users that the page has with the server at the same time."""


def build(client: Florence2Client, server: Server) -> gr.Blocks:
    """The page; the client is used by all of its users at once."""
    with gr.Blocks(title="Florence-2", analytics_enabled=False, fill_width=True, delete_cache=(600, KEPT)) as page:
        gr.HTML(
            f"<h1>Florence-2</h1><p>model <b>{escape(server.model)}</b> at <b>{escape(server.url)}</b></p>",
            elem_id="head",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                form = Form()
            with gr.Column(scale=3, min_width=300):
                view = View()
        code = Code()
        _Events(client, server, form, view).connect(code)
    page.queue(default_concurrency_limit=_AT_ONCE)
    return page


class _Events:
    def __init__(self, client: Florence2Client, server: Server, form: Form, view: View) -> None:
        self.client, self.server = client, server
        self.form, self.view = form, view

    def connect(self, code: Code) -> None:
        form, view = self.form, self.view
        asked = [form.picture, view.min_score, *form.fields]
        hidden: dict[str, Any] = {"api_visibility": "private"}
        # Past Gradio's queue: that closes a browser's stream of answers after the last one, and an answer that is asked
        # for at that very moment never comes.
        quiet: dict[str, Any] = {**hidden, "queue": False, "show_progress": "hidden", "trigger_mode": "multiple"}
        last: dict[str, Any] = {**quiet, "trigger_mode": "always_last"}
        gr.on([form.ask.click, form.text.submit], self.ask, asked, view.outputs, show_progress_on=view.status, **hidden)
        view.min_score.change(self.show_above, [view.answered, view.min_score], view.outputs, **last)
        form.task.change(self.task_chosen, form.task, [form.text, form.region], **quiet)
        form.picture.change(self.picture_changed, [form.picture, view.answered], view.outputs, **quiet)
        region = [form.picture, form.task, form.region]
        form.picture.select(self.corner_clicked, region, [form.region, *view.outputs], **quiet)
        form.region.input(self.region_written, [form.picture, form.region], view.outputs, **last)
        # Also when the page is loaded.
        gr.on(None, self.code, asked, code.outputs, **last)

    def ask(self, picture: str | None, min_score: float, *fields: Any) -> dict[Any, Any]:
        try:
            if picture is None:
                raise ValueError("Drop a picture first.")
            request = Request.read(*fields)
            start = time.perf_counter()
            result = request.send(self.client, Path(picture))
            seconds = time.perf_counter() - start
            return self.view.all(Answered(result, Path(picture), request.region, seconds), min_score)
        except (ValueError, RuntimeError, OSError) as error:
            return self.view.nothing(_sentence(error))

    def show_above(self, answered: Answered | None, min_score: float) -> Any:
        try:
            return self.view.above(answered, min_score) if answered else gr.skip()
        except (ValueError, OSError) as error:
            return self.view.nothing(_sentence(error))

    def task_chosen(self, task: str) -> dict[Any, Any]:
        takes = takes_of(task)
        label, example = ("Text", "a green car") if task else ("Prompt", "sent to the model as it stands")
        return {
            self.form.text: gr.update(visible=takes is Takes.TEXT, label=label, placeholder=example),
            self.form.region: gr.update(visible=takes is Takes.REGION),
        }

    def picture_changed(self, picture: str | None, answered: Answered | None) -> Any:
        """An answer is not shown beside another picture."""
        # This may come late, when the new picture's answer is here already.
        if answered and picture and answered.picture == Path(picture):
            return gr.skip()
        return self.view.nothing(HINT)

    def corner_clicked(self, picture: str, task: str, region: str, clicked: gr.SelectData) -> Any:
        """The first click is one corner, the second the opposite one, a third begins anew."""
        if takes_of(task) is not Takes.REGION:
            return gr.skip()
        x, y = clicked.index
        try:
            left, top = numbers(region)
            region = f"{min(left, x)} {min(top, y)} {max(left, x)} {max(top, y)}"
        except ValueError:
            region = f"{x} {y}"
        return {self.form.region: region, **self.region_written(picture, region)}

    def region_written(self, picture: str | None, region: str) -> dict[Any, Any]:
        """The region over the picture, once there is all of it."""
        try:
            box = box_of(region)
        except ValueError:
            return self.view.nothing()
        try:
            return self.view.nothing(drawn=drawn(Path(picture), box, {}) if picture else None)
        except (ValueError, OSError) as error:
            return self.view.nothing(_sentence(error))

    def code(self, picture: str | None, min_score: float, *fields: Any) -> tuple[str, str]:
        try:
            request = Request.read(*fields)
            python = request.python(self.server, min_score)
        except ValueError as error:
            return (f"# {error}",) * 2
        try:
            return python, request.curl(self.server, Path(picture) if picture else None)
        except (ValueError, OSError) as error:
            return python, f"# {error}"


def _sentence(error: Exception) -> str:
    return f'<p class="error" role="alert">{escape(str(error))}</p>'
