"""How a run uses its experts, with all parts wired together."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from valkyrie_core.data.cache import write_synced
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import CheckpointError, ResourceError, UsageError
from valkyrie_core.evaluate.long_text import read_utf8, tokenised
from valkyrie_core.experts import measures
from valkyrie_core.experts.figures import draw_experts, draw_over_time
from valkyrie_core.experts.history import History, load_history
from valkyrie_core.experts.knockout import knock_out as knock_out_experts
from valkyrie_core.experts.observe import AT_ONCE, Progress, Trace, moe_layers, observe
from valkyrie_core.experts.page import experts_page
from valkyrie_core.experts.summary import Setting, describe
from valkyrie_core.experts.text import Source, Text, cut, of_document, of_split, part, shown
from valkyrie_core.experts.text import window_length as length_of_windows
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.model import IGNORED, HybridLM
from valkyrie_core.nn.weights import Precision
from valkyrie_core.report import (
    DomainText,
    EarlierRouting,
    ExpertsReport,
    LayerExperts,
    RouterSaturation,
)
from valkyrie_core.runs.texts import texts_of_training
from valkyrie_core.train.checkpoint import list_checkpoints, verify
from valkyrie_core.train.device import resolve_precision
from valkyrie_core.train.load import LoadedLM, load_language_model
from valkyrie_core.train.metrics import read_metrics
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.weights import load_model_tensors

log = logging.getLogger("valkyrie")

REPORT, PAGE, PICTURE = "experts.json", "experts.html", "experts.png"
OVER_TIME = "experts_over_time.png"
TOKENS = 16_384
"""Of each domain, if nobody says."""
KNOCK_OUT_TOKENS, KNOCK_OUT_WINDOWS = 4096, 8
"""Of each domain, for the knock-outs: so many tokens, or windows if those are more."""
SHUFFLES = 200
FEW_DOCUMENTS = 5
"""Documents of a domain below which it is hardly told from them."""
CAVEAT = (
    "routing statistics do not predict what an expert is worth (arXiv 2606.10703): only the "
    "knock-outs measure that"
)


class Reading(NamedTuple):
    """What is read, and by what."""

    run: LoadedLM
    texts: list[Text]
    less: list[Text]
    """Some windows of each, for what takes many passes."""
    precision: Precision
    told: Progress | None


def experts_of_run(
    place: RunPlace,
    *,
    step: int | None,
    texts: Sequence[Path],
    tokens: int,
    knock_out: bool,
    save: bool,
    seed: int,
    told: Progress | None,
) -> ExpertsReport:
    """See `valkyrie_core.runs.experts`."""
    began = time.perf_counter()
    if save:
        _check_writable(place.path)
    run = load_language_model(place.path, step=step)
    model, checkpoint = run.model, run.checkpoint
    layers = moe_layers(model)
    if not layers:
        raise UsageError(
            f"the run {place.name} has no experts: no layer's ffn is of type moe",
            hint="`valkyrie train tiny/moe` trains a run that has",
        )
    read = _reading(run, texts, tokens, told)
    trace = observe(model, read.texts, precision=read.precision, told=told)
    removed = None
    if knock_out:
        removed = knock_out_experts(model, read.less, precision=read.precision, told=told)
    history = load_history(
        read_metrics(RunDir(place.path).metrics_file),
        {index: moe.config.num_experts for index, moe in layers.items()},
        checkpoint.step,
    )
    setting = Setting(
        [text.name for text in read.texts],
        lambda token: shown(run.tokenizer, token),
        seed,
        SHUFFLES,
    )
    names = run.recipe.model.core.layers
    described = [
        describe(index, names[index], moe.config, trace, history.get(index), removed, setting)
        for index, moe in layers.items()
    ]
    # last: it puts other weights into the model
    saturation = _saturation(place, read)
    report = ExpertsReport(
        run=place.name,
        step=checkpoint.step,
        parameters=model.num_parameters(),
        context_len=read.texts[0].tokens_WT.shape[1],
        batch_windows=AT_ONCE,
        precision=read.precision,
        seed=seed,
        shuffles=SHUFFLES,
        domains=[
            DomainText(
                name=text.name,
                tokens=text.num_tokens,
                windows=len(text.tokens_WT),
                documents=text.num_documents,
                knock_out_tokens=int((less.targets_WT != IGNORED).sum()) if knock_out else 0,
            )
            for text, less in zip(read.texts, read.less, strict=True)
        ],
        layers=described,
        saturation=saturation,
        notes=_notes(described, read.texts, history, saturation, knock_out=knock_out),
        seconds=time.perf_counter() - began,
    )
    if save:
        _keep(report, place, history, _command(place, step, texts, tokens, knock_out=knock_out))
    return report


def _reading(run: LoadedLM, files: Sequence[Path], tokens: int, told: Progress | None) -> Reading:
    train = run.recipe.train
    length = length_of_windows(train.longest_context, tokens)
    sources = _files(files, run.tokenizer, run.model.memory_tokens) if files else _validation(run)
    texts = [cut(source, length, tokens) for source in sources]
    count = max(KNOCK_OUT_WINDOWS, KNOCK_OUT_TOKENS // length)
    precision = resolve_precision(train.precision, run.model.embedding.weight.device)
    return Reading(run, texts, [part(text, count) for text in texts], precision, told)


def _validation(run: LoadedLM) -> list[Source]:
    dataset = texts_of_training(run, otherwise="name others with --text FILE")
    return [of_split(name, corpus.validation) for name, corpus in dataset.corpora.items()]


def _files(files: Sequence[Path], tokenizer: Tokenizer, memory_tokens: int) -> list[Source]:
    """Every file as a domain, by its name; where two have the same, by the path."""
    places = [file.resolve() for file in files]
    for file, place in zip(files, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{file} is named twice: a domain is a file of its own")
        if place.exists() and not place.is_file():
            raise UsageError(f"{file} is no file")
    names = [file.name for file in files]
    return [
        of_document(
            _printable(file.name if names.count(file.name) == 1 else str(file)),
            tokenised(str(file), read_utf8(file), tokenizer, memory_tokens).tokens_T,
        )
        for file in files
    ]


def _printable(name: str) -> str:
    """A name that is no UTF-8 with escapes: pictures and JSON can't hold it."""
    return name.encode(errors="backslashreplace").decode()


def _saturation(place: RunPlace, read: Reading) -> RouterSaturation | None:
    """Routing of every checkpoint on disk beside the newest one's; damaged ones are passed over."""
    checkpoints = []
    for _, path in list_checkpoints(RunDir(place.path).checkpoints):
        try:
            checkpoints.append(verify(path))
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
    if len(checkpoints) < 2:
        return None
    model: HybridLM = read.run.model
    traces = []
    for checkpoint in checkpoints:
        load_model_tensors(model, checkpoint.model_tensors(), str(checkpoint.path))
        what = f"step {checkpoint.step}"
        traces.append(
            observe(model, read.less, precision=read.precision, what=what, told=read.told)
        )
    newest = traces[0]
    return RouterSaturation(
        newest=checkpoints[0].step,
        tokens=len(newest.tokens_R),
        earlier=[
            EarlierRouting(step=checkpoint.step, share=_agreement(newest, trace))
            for checkpoint, trace in zip(checkpoints[1:], traces[1:], strict=True)
        ],
    )


def _agreement(newest: Trace, earlier: Trace) -> list[float | None]:
    """By layer, the mean over its rounds."""
    shares: list[float | None] = []
    for index, layer in newest.layers.items():
        rounds = zip(layer.experts_CRK, earlier.layers[index].experts_CRK, strict=True)
        found = [measures.agreement(now, before) for now, before in rounds]
        known = [share for share in found if share is not None]
        shares.append(sum(known) / len(known) if known else None)
    return shares


def _notes(
    layers: Sequence[LayerExperts],
    texts: Sequence[Text],
    history: dict[int, History],
    saturation: RouterSaturation | None,
    *,
    knock_out: bool,
) -> list[str]:
    notes = [CAVEAT + ("" if knock_out else ", and they were not asked for")]
    information = [layer.mutual_information for layer in layers]
    if not any(information):
        notes.append("one domain: there is no information about domains to be measured")
    elif any(one is not None and one.null_95 is None for one in information):
        windows = sum(len(text.tokens_WT) for text in texts)
        notes.append(f"{windows} windows are too few to say what mutual information is chance")
    few = [text.name for text in texts if text.num_documents < FEW_DOCUMENTS]
    if few and any(information):
        notes.append(
            f"fewer than {FEW_DOCUMENTS} documents in {', '.join(few)}: what looks like a domain's "
            "may be that of a few documents, and shuffled windows do not show it"
        )
    if not history:
        notes.append("the training logged no loads: how long experts have been dead is not known")
    if saturation is None:
        notes.append("one checkpoint on disk: when routing was decided can't be told")
    limits: dict[str, list[str]] = {}
    for layer in layers:
        if layer.knock_out_note is not None:
            limits.setdefault(layer.knock_out_note, []).append(str(layer.layer))
    notes += [f"knock-outs, layer {', '.join(where)}: {why}" for why, where in limits.items()]
    return notes


def _check_writable(folder: Path) -> None:
    """Before minutes of work. Raises ResourceError where the report could not be kept."""
    for name in (REPORT, PAGE, PICTURE, OVER_TIME):
        if (folder / name).is_dir():
            raise ResourceError(f"{folder / name} is a folder: the report can't be kept there")
    if not os.access(folder, os.W_OK):
        raise ResourceError(
            f"{folder} can't be written", hint="--no-save shows the report without keeping it"
        )


def _keep(
    report: ExpertsReport, place: RunPlace, history: dict[int, History], command: str
) -> None:
    """Writes the report, its page and its pictures into the run's directory."""
    picture, over_time = draw_experts(report), draw_over_time(report.run, history)
    pictures = [("Loads and knock-outs", picture)]
    if over_time is not None:
        pictures.append(("Loads in training", over_time))
    page = experts_page(report, pictures, command)
    try:
        write_synced(place.path / PICTURE, picture)
        if over_time is not None:
            write_synced(place.path / OVER_TIME, over_time)
        else:
            # that of another step would lie beside this report
            (place.path / OVER_TIME).unlink(missing_ok=True)
        write_synced(place.path / PAGE, page.encode(errors="backslashreplace"))
        write_synced(place.path / REPORT, report.model_dump_json(indent=1).encode())
    except OSError as error:
        raise ResourceError(f"{place.path} can't be written: {error}") from error


def _command(
    place: RunPlace, step: int | None, texts: Sequence[Path], tokens: int, *, knock_out: bool
) -> str:
    """What makes the report again."""
    # the page is passed on: no folder of this machine
    parts = ["valkyrie", "experts", place.name]
    parts += [] if step is None else ["--step", str(step)]
    for text in texts:
        parts += ["--text", str(text)]
    parts += [] if tokens == TOKENS else ["--tokens", str(tokens)]
    parts += [] if knock_out else ["--no-knock-out"]
    return shlex.join(parts)
