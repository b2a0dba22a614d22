"""The page and the pictures: one file, nothing from elsewhere, nothing that runs."""

from __future__ import annotations

import html.parser
import re

import numpy as np
import pytest

from valkyrie_core.experts.figures import draw_experts, draw_over_time
from valkyrie_core.experts.history import History
from valkyrie_core.experts.page import experts_page
from valkyrie_core.report import (
    DeadExpert,
    DomainText,
    EarlierRouting,
    ExpertsReport,
    KnockOut,
    LayerExperts,
    MutualInformation,
    RouterSaturation,
    TokenLift,
)

HOSTILE = "<script>alert('x')</script>"
PNG = b"\x89PNG\r\n\x1a\n"


def layer(index: int, experts: int = 3, **changes: object) -> LayerExperts:
    values: dict[str, object] = {
        "layer": index,
        "block": "rwkv",
        "gate": "softmax_topk",
        "num_experts": experts,
        "top_k": 2,
        "rounds": 1,
        "load": [3.0 * e / experts for e in range(experts)],
        "load_min": 0.0,
        "load_max": 2.0,
        "load_cv": 0.8,
        "max_vio": 1.0,
        "max_vio_per_batch": 1.1,
        "load_entropy": 0.58,
        "effective_experts": 1.9,
        "dead": [DeadExpert(expert=0, load=0.0, steps=7)],
        "routing_entropy": 0.9,
        "top1_margin": 0.2,
        "mutual_information": MutualInformation(value=0.3, null_mean=0.1, null_95=None),
        "experts_per_token": 2.0,
        "co_activation": [[None, 1.0, 0.5], [1.0, None, None], [0.5, None, None]],
        "top_tokens": [
            [TokenLift(token=9, text=HOSTILE, count=5, lift=2.5)],
            [TokenLift(token=8, text=" the", count=6, lift=1.5)],
            [],
        ],
        "knock_out": [
            KnockOut(
                domain=HOSTILE,
                change=[0.0, 0.01, -0.001],
                low=[None, 0.005, None],
                high=[None, 0.02, None],
                specialisation=0.9,
            )
        ],
    }
    return LayerExperts.model_validate(values | changes)


def report(*layers: LayerExperts, **changes: object) -> ExpertsReport:
    values: dict[str, object] = {
        "run": "a & b",
        "step": 20,
        "parameters": 1234,
        "context_len": 64,
        "batch_windows": 4,
        "precision": "fp32",
        "seed": 0,
        "shuffles": 200,
        "domains": [
            DomainText(name=HOSTILE, tokens=640, windows=10, documents=2, knock_out_tokens=500)
        ],
        "layers": list(layers) or [layer(0), layer(3)],
        "saturation": RouterSaturation(
            newest=20, tokens=99, earlier=[EarlierRouting(step=10, share=[0.5, None])]
        ),
        "notes": ["careful"],
        "seconds": 1.0,
    }
    return ExpertsReport.model_validate(values | changes)


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_and_runs_nothing() -> None:
    page = experts_page(report(), [("Loads", PNG)], f"valkyrie experts '{HOSTILE}'")
    assert HOSTILE not in page
    assert "<script" not in page.lower()
    assert "&lt;script&gt;" in page
    read = Tags()
    read.feed(page)
    assert HOSTILE in read.text
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        source = attributes.get("src") or attributes.get("href")
        assert source is None or source.startswith("data:image/png;base64,"), tag
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert "␣the" in read.text
    assert "a & b" in read.text


def test_the_page_has_what_the_report_has() -> None:
    page = experts_page(report(), [], "valkyrie experts")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    for told in ("careful", "0.3000", "0.1000", "+0.0100", "+0.0050 to +0.0200", "for 7 steps"):
        assert told in text, told
    # what could not be told is a dash
    assert "50.0% -" in text


def test_a_page_of_little() -> None:
    bare = layer(
        0,
        load=None, load_min=None, load_max=None, load_cv=None, max_vio=None,
        max_vio_per_batch=None, load_entropy=None, effective_experts=None, dead=[],
        mutual_information=None, co_activation=None, knock_out=None, knock_out_note="why",
    )  # fmt: skip
    little = report(bare, saturation=None)
    page = experts_page(little, [], "valkyrie experts")
    assert "Knock-outs: why." in page
    assert draw_experts(little).startswith(PNG)


def test_the_pictures() -> None:
    assert draw_experts(report(layer(0), layer(1, experts=2))).startswith(PNG)
    many = [
        KnockOut(domain=f"d{i}", change=[0.1, 0.2, 0.3], low=[None] * 3, high=[None] * 3,
                 specialisation=None)
        for i in range(7)
    ]  # fmt: skip
    domains = [
        DomainText(name=f"d{i}", tokens=9, windows=1, documents=1, knock_out_tokens=9)
        for i in range(7)
    ]
    assert draw_experts(report(layer(0, knock_out=many), domains=domains)).startswith(PNG)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_picture_over_time(layers: int) -> None:
    history = {
        index: History(np.array([5, 10, 15]), np.array([[1.0, 1.0], [2.0, 0.0], [1.5, 0.5]]))
        for index in range(layers)
    }
    picture = draw_over_time("a$b$", history)
    assert picture is not None
    assert picture.startswith(PNG)


def test_one_logged_step_is_no_picture() -> None:
    assert draw_over_time("a", {}) is None
    assert draw_over_time("a", {0: History(np.array([5]), np.array([[1.0, 1.0]]))}) is None
