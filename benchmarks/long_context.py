"""What carrying states buys at length: the recipe `long_context`, and what it is compared with.

    python -m benchmarks.long_context                # trains and reads what is still missing
    python -m benchmarks.long_context --tables       # only writes docs/long_context.md anew

A queue that outlives an interruption: every design and seed is one entry, whose training resumes
from its checkpoint and whose readings are written once they are whole. Designs have equal
parameters, tokens, seeds and texts; only what the name says differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import result, tables
from valkyrie_core import Recipe, runs
from valkyrie_core.data.dataset import Dataset, prepare
from valkyrie_core.data.packing import token_lengths
from valkyrie_core.data.tokenizer import Tokenizer
from valkyrie_core.errors import StoppedError, ValkyrieError
from valkyrie_core.evaluate import long_context as reading
from valkyrie_core.evaluate.recall import Answer, measure_recall
from valkyrie_core.evaluate.recall_cases import CANDIDATES, TASKS, make_cases
from valkyrie_core.infer.engine import Engine
from valkyrie_core.inventory import find_run
from valkyrie_core.nn.state_format import stretch_positions
from valkyrie_core.train.load import load_run
from valkyrie_core.train.storage import Storage

log = logging.getLogger("valkyrie")

RECIPE = "long_context"
SEEDS = (0, 1, 2)
LONGEST = 16_384
CONTEXTS = [512, 1024, 2048, 4096, 8192, LONGEST]
STRETCHES = 2
"""Stretches of targets in each play."""
RECALL_LENGTHS = [512, 2048, LONGEST]
PAGE = result.ROOT / "docs" / "long_context.md"
FOLDER = result.RESULTS / "long_context"
Array = npt.NDArray[np.float64]


def _attention(position: str) -> str:
    # 590 channels make the parameters those of the hybrid, to a promille
    mixer = f"{{type: attention, num_heads: 3, position: {{type: {position}}}}}"
    block = f"{{mixer: {mixer}, ffn: {{type: swiglu, hidden_dim: 590}}}}"
    return f"model.core={{type: stack, blocks: {{attn: {block}}}, pattern: [attn], repeat: 4}}"


class Design(NamedTuple):
    """What is trained, and how it is read."""

    title: str
    trained_as: str
    """Designs that share a training share this name."""
    overrides: tuple[str, ...]
    yarn: float | None = None


FRESH = "train.state_passing=null"
DESIGNS = {
    "passing": Design("windowed hybrid, state passing", "passing", ()),
    "fresh": Design("windowed hybrid, no state passing", "fresh", (FRESH,)),
    "rope": Design("attention, RoPE", "rope", (FRESH, _attention("rope"))),
    "yarn": Design(
        "attention, RoPE read with YaRN x32", "rope", (FRESH, _attention("rope")), LONGEST / 512
    ),
    "alibi": Design("attention, ALiBi", "alibi", (FRESH, _attention("alibi"))),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="only these")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(options.threads)
    try:
        if not options.tables:
            for seed in options.seeds:
                for name in options.designs:
                    if not _file(name, seed).exists():
                        _run(name, seed, options.runs_dir)
        _write_page()
    except KeyboardInterrupt:
        log.warning("stopped; go on with: python -m benchmarks.long_context")
        return 130
    except StoppedError as error:
        log.warning("%s; go on with: python -m benchmarks.long_context", error)
        return error.exit_code
    except ValkyrieError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def _file(name: str, seed: int) -> Path:
    return FOLDER / f"{name}-{seed}.json"


def _run(name: str, seed: int, runs_dir: Path) -> None:
    """Trains (or resumes) one design with one seed, reads with it and writes what it found."""
    design = DESIGNS[name]
    run = f"{RECIPE}-{design.trained_as}-{seed}"
    recipe = Recipe.load(
        RECIPE, [f"name={run}", f"seed={seed}", f"runs_dir={runs_dir}", *design.overrides]
    )
    log.info("%s, seed %d", design.title, seed)
    goes_on = (runs_dir / run / "checkpoints").exists()
    trained = runs.train(recipe, resume=goes_on)
    # the last step, not the best: no design may profit from a choice
    model, tokenizer, _, checkpoint = load_run(find_run(run, runs_dir).path, which="newest")
    if design.yarn is not None:
        stretch_positions(model, design.yarn, recipe.train.context_len)
    began = time.perf_counter()
    # in fp32: small differences between contexts are what is asked for
    engine = Engine(model, chunk_len=1024)
    dataset = prepare(recipe.data, tokenizer=tokenizer)
    content = {
        "design": name,
        "title": design.title,
        "seed": seed,
        "step": checkpoint.step,
        "parameters": trained.parameters,
        "tokens_seen": trained.tokens_seen,
        "training_seconds": trained.seconds,
        "precision": trained.precision,
        "origin": result.origin()._asdict(),
        "contexts": CONTEXTS,
        "plays": _read_plays(engine, tokenizer, dataset),
        "recall": [answer._asdict() for answer in _recall(engine, tokenizer, dataset)],
        "reading_seconds": time.perf_counter() - began,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    Storage().replace_json(_file(name, seed), content)


def _plays(dataset: Dataset) -> dict[str, npt.NDArray[np.int64]]:
    """The held-out plays by name, each with its marker first."""
    split = dataset.corpora["plays"].validation
    return {
        Path(name).stem: np.asarray(split.tokens[start:end]).astype(np.int64)
        for name, start, end in zip(
            split.names, split.doc_starts[:-1], split.doc_starts[1:], strict=True
        )
    }


def _read_plays(
    engine: Engine, tokenizer: Tokenizer, dataset: Dataset
) -> dict[str, dict[str, Any]]:
    found = {}
    for name, tokens_T in _plays(dataset).items():
        read = reading.read_by_context(
            engine,
            tokens_T,
            token_lengths(tokenizer),
            contexts=CONTEXTS,
            stretches=STRETCHES,
        )
        found[name] = {"nats": read.nats_CM.tolist(), "bytes": read.bytes_M.tolist()}
    return found


def _recall(engine: Engine, tokenizer: Tokenizer, dataset: Dataset) -> list[Answer]:
    filler = next(iter(_plays(dataset).values()))[1:].tolist()
    cases = make_cases(tokenizer, filler, RECALL_LENGTHS, repeats=1)
    return measure_recall(engine, tokenizer, cases)


def _bits(found: dict[str, Any]) -> Array:
    """[C]: bits per byte by context, all plays together."""
    plays = found["plays"].values()
    nats_C = sum(np.array(play["nats"]).sum(axis=1) for play in plays)
    size = sum(sum(play["bytes"]) for play in plays)
    bits: Array = nats_C / math.log(2) / size
    return bits


def _write_page() -> None:
    """Puts the tables into the page; designs that lack a seed are marked."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in DESIGNS:
        kept = [json.loads(_file(name, s).read_text()) for s in SEEDS if _file(name, s).exists()]
        if kept:
            found[name] = kept
    if not found:
        log.warning("there is no result yet")
        return
    text = PAGE.read_text(encoding="utf-8")
    text = tables.put(text, "bits", _bits_table(found))
    text = tables.put(text, "recall", _recall_table(found))
    PAGE.write_text(text, encoding="utf-8")


def _seeds(kept: list[dict[str, Any]]) -> str:
    missing = len(SEEDS) - len(kept)
    return f"{len(kept)}, **partial**" if missing else str(len(kept))


def _bits_table(found: dict[str, list[dict[str, Any]]]) -> str:
    heads = [f"{context:,}" for context in CONTEXTS]
    lines = [
        f"| design | seeds | {' | '.join(heads)} | 16,384 against 512 |",
        f"|---|---{'|---:' * (len(CONTEXTS) + 1)}|",
    ]
    for name, kept in found.items():
        bits_SC = np.stack([_bits(one) for one in kept])
        cells = [f"{mean:.3f}" for mean in bits_SC.mean(axis=0)]
        change_S = bits_SC[:, -1] - bits_SC[:, 0]
        change = f"{change_S.mean():+.3f} ({change_S.min():+.3f} to {change_S.max():+.3f})"
        lines.append(f"| {DESIGNS[name].title} | {_seeds(kept)} | {' | '.join(cells)} | {change} |")
    first = next(iter(found.values()))[0]
    targets = len(first["plays"]) * STRETCHES * reading.STRETCH
    where = result.Origin(**first["origin"])
    parameters = " to ".join(
        f"{value:,}" for value in sorted({kept[0]["parameters"] for kept in found.values()})
    )
    lines += [
        "",
        f"Bits per byte, mean over the seeds, of the same {targets:,} tokens of the "
        f"{len(first['plays'])} held-out plays ({', '.join(first['plays'])}) predicted from so "
        "many tokens before them. The last column is the mean over the seeds and, in brackets, the "
        f"least and the greatest. {parameters} parameters, {first['tokens_seen']:,} training "
        f"tokens in windows of 512, {first['precision']}; {where.kind}, "
        f"{where.threads} thread, {where.date}.",
    ]
    return "\n".join(lines)


def _recall_table(found: dict[str, list[dict[str, Any]]]) -> str:
    heads = [f"{context:,}" for context in RECALL_LENGTHS]
    lines = [
        f"| task | design | questions | {' | '.join(heads)} |",
        f"|---|---|---{'|---:' * len(RECALL_LENGTHS)}|",
    ]
    for task in TASKS:
        for name, kept in found.items():
            cells, count = [], 0
            for context in RECALL_LENGTHS:
                answers = [
                    answer
                    for one in kept
                    for answer in one["recall"]
                    if answer["task"] == task and answer["length"] == context
                ]
                count = len(answers)
                ranks = [answer["rank"] for answer in answers]
                first = sum(rank == 0 for rank in ranks) / count
                cells.append(f"{np.mean(ranks):.1f} ({first:.0%})")
            lines.append(f"| {task} | {DESIGNS[name].title} | {count} | {' | '.join(cells)} |")
    written = sum(a["written"] for kept in found.values() for one in kept for a in one["recall"])
    asked = sum(len(one["recall"]) for kept in found.values() for one in kept)
    lines += [
        "",
        f"Mean rank of the right answer among {CANDIDATES} candidates (0 is the best, "
        f"{(CANDIDATES - 1) / 2:.1f} is guessing) and, in brackets, how often it is the likeliest "
        f"(guessing: {1 / CANDIDATES:.0%}), by the length of the text; all seeds together. Of "
        f"{asked:,} answers {written:,} were written by the model itself.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
