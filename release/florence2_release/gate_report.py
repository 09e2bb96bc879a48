"""What a release was held against, beside its record: JSON for programs, HTML for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from jinja2 import Environment

from florence2.files import write_whole
from florence2_release.gate import Compared
from florence2_release.release_record import Release
from florence2_release.repository import Repository

_PAGE = """<!doctype html><meta charset="utf-8"><title>{{ release.name }} {{ release.number }}</title>
<style>body{font:15px sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:left}.no{background:#fdd}</style>
<h1>{{ release.name }}, release {{ release.number }}</h1>
<p>{{ release.manifest.source }}, {{ release.manifest.precision }}, checkpoint {{ release.manifest.sha256[:12] }}</p>
<table><tr><th><th>running<th>new<th>asked</tr>
{% for one in compared %}<tr{% if not one.holds %} class="no"{% endif %}><td>{{ one.name }}
<td>{{ "%.4g"|format(one.running) if one.running is not none else "-" }}
<td>{{ "%.4g"|format(one.new) if one.new is not none else "-" }}<td>{{ one.bound }}</tr>
{% endfor %}</table>
<table><tr><th>step<th>seconds<th>at</tr>
{% for step in release.steps %}<tr><td>{{ step.step }}<td>{{ step.seconds }}<td>{{ step.at }}</tr>
{% endfor %}</table>
{% if release.scores %}<p><a href="release-{{ release.number }}.scores.html">Curves and pictures</a></p>{% endif %}
"""


def write_reports(repository: Repository, release: Release, compared: Sequence[Compared]) -> None:
    content = {"release": release.number, "name": release.name, "compared": [asdict(one) for one in compared]}
    write_whole(repository.file_of(release.number, "report.json"), json.dumps(content, indent=2) + "\n")
    page = Environment(autoescape=True).from_string(_PAGE).render(release=release, compared=compared)
    write_whole(repository.file_of(release.number, "report.html"), page)
