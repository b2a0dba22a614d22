"""Which mixers the tokens of a text go through in a run, with all parts wired together."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from valkyrie_core.data.cache import write_synced
from valkyrie_core.data.documents import clean_text
from valkyrie_core.data.tokenizer import opening
from valkyrie_core.errors import ResourceError, UsageError
from valkyrie_core.evaluate.long_text import read_utf8
from valkyrie_core.evaluate.route_picture import Row, draw_routes
from valkyrie_core.experts.text import shown
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.recursive import Recursive
from valkyrie_core.nn.routed import RoutedMixer
from valkyrie_core.nn.skip import Skip
from valkyrie_core.nn.state import Route
from valkyrie_core.report.routes import PassRoutes, RoutesReport
from valkyrie_core.runs.halting import halting_model
from valkyrie_core.runs.texts import texts_of_training
from valkyrie_core.train.device import autocast, resolve_precision
from valkyrie_core.train.load import LoadedLM, load_language_model

PICTURE = "routes.png"
TOKENS = 256
"""Of the text, if nobody says."""


def routes_of_run(
    place: RunPlace,
    *,
    step: int | None,
    text: Path | None,
    prompt: str | None,
    tokens: int,
    halt: str | None,
    save: bool,
) -> RoutesReport:
    """See `valkyrie_core.runs.routes`."""
    began = time.perf_counter()
    if text is not None and prompt is not None:
        raise UsageError("a text is a file or a prompt, not both")
    run = load_language_model(place.path, step=step)
    model = run.model
    routers = {
        index: layer.mixer
        for index, layer in enumerate(model.core.layers)
        if isinstance(layer.mixer, RoutedMixer)
    }
    if not routers:
        raise UsageError(
            f"the run {place.name} has no routers: no layer's mixer is of type routed",
            hint="`valkyrie train tiny/routed` trains a run that has",
        )
    if halt is not None:
        halting_model(place, run, halt)
        if isinstance(model.core, Recursive) and model.core.halts and not model.core.sure_go_on:
            raise UsageError(
                "tokens that are done leave the loops, and go through no mixer there",
                hint="it is for halting: {type: confidence, then: cheapest}",
            )
    name, ids = _text(run, text, prompt, tokens)
    precision = resolve_precision(run.recipe.train.precision, model.embedding.weight.device)
    read = torch.tensor([ids], device=model.embedding.weight.device)
    with torch.inference_mode(), autocast(precision, read.device):
        told = model(read, model.init_state(1)).told
    passes = [index for index in model.core.passes if index in routers]
    found = []
    for number, (index, route) in enumerate(zip(passes, told.routes, strict=True)):
        loop = passes[: number + 1].count(index) if passes.count(index) > 1 else None
        block = run.recipe.model.core.layers[index]
        found.append(_pass_routes(index, loop, block, routers[index], route))
    report = RoutesReport(
        run=place.name,
        step=run.checkpoint.step,
        text=name,
        tokens=[shown(run.tokenizer, token) for token in ids],
        routers=found,
        seconds=time.perf_counter() - began,
    )
    if save:
        skips = {
            mixer_name
            for router in routers.values()
            for mixer_name, mixer in zip(router.names, router.mixers, strict=True)
            if isinstance(mixer, Skip)
        }
        _keep(report, place, frozenset(skips))
    return report


def _text(
    run: LoadedLM, text: Path | None, prompt: str | None, tokens: int
) -> tuple[str, list[int]]:
    """Where it is from, and its tokens, the marker of a document first."""
    lead = opening(run.tokenizer, run.model.memory_tokens)
    if prompt is not None or text is not None:
        content = read_utf8(text) if text is not None else prompt or ""
        ids = run.tokenizer.encode(clean_text(content))
        name = "the prompt" if text is None else str(text)
        if not ids:
            raise UsageError(f"{name} holds no text")
        return name, [*lead, *ids][: len(lead) + tokens]
    corpora = texts_of_training(run, otherwise="name a text with --text FILE").corpora
    corpus = next(iter(corpora))
    split = corpora[corpus].validation
    ids = [*lead, *split.document_tokens(0).tolist()[len(lead) - 1 :]]
    return f"{corpus}, {split.names[0]}, held out", ids[: len(lead) + tokens]


def _pass_routes(
    index: int, loop: int | None, block: str, router: RoutedMixer, route: Route
) -> PassRoutes:
    share = {name: float(one) for name, one in zip(router.names, route.shares_M, strict=True)}
    return PassRoutes(
        layer=index,
        loop=loop,
        block=block,
        mixers=list(router.names),
        hard=router.hard,
        share=share,
        operations=sum(one * part for one, part in zip(share.values(), router.shares, strict=True)),
        likeliest=route.gates_BTM[0].argmax(-1).tolist(),
        used=[one.nonzero()[:, 0].tolist() for one in route.used_BTM[0]],
    )


def _keep(report: RoutesReport, place: RunPlace, skips: frozenset[str]) -> None:
    rows = [
        Row(one.place, [one.mixers[mixer] for mixer in one.likeliest]) for one in report.routers
    ]
    title = f"{report.run}, step {report.step}: the mixer with the greatest gate"
    try:
        write_synced(place.path / PICTURE, draw_routes(title, report.tokens, rows, skips))
    except OSError as error:
        raise ResourceError(
            f"{place.path} can't be written: {error}",
            hint="--no-save shows the routes without keeping them",
        ) from error
