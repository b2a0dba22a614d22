"""experts.html: the report as one file that needs no other, to be passed on."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from valkyrie_core.report.experts import ExpertsReport

TEMPLATE = "experts.html.j2"
MOST_PAIRS = 16
"""Experts of a layer whose pairs are shown."""


def experts_page(report: ExpertsReport, pictures: Sequence[tuple[str, bytes]], command: str) -> str:
    """The page. All text in it is escaped: tokens and names come from anywhere.

    Args:
        pictures: what each one shows, and its PNG; they are put into the page.
        command: what makes the page again.
    """
    # imported here: the template engine is needed for this page alone
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("valkyrie_core.experts", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["visible"] = visible
    embedded = [
        (title, "data:image/png;base64," + base64.b64encode(data).decode())
        for title, data in pictures
    ]
    page: str = environment.get_template(TEMPLATE).render(
        report=report, pictures=embedded, command=command, most_pairs=MOST_PAIRS
    )
    return page


def visible(text: str) -> str:
    """A token with spaces that can be seen."""
    return text.replace(" ", "␣")


def _number(value: float | None, form: str = ".3f") -> str:
    """A dash for what could not be told."""
    return "-" if value is None else format(value, form)
