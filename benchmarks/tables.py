"""The tables of docs/performance.md, made from the kept results.

Between `<!-- begin NAME -->` and `<!-- end NAME -->` everything is written here; the text around
the markers is written by hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import result
from benchmarks.menu import MENU
from benchmarks.result import Measurement, Origin, Ratio, Result, ResultError

log = logging.getLogger("valkyrie")
PAGE = result.ROOT / "docs" / "performance.md"


def write(page: Path = PAGE, folder: Path = result.RESULTS) -> None:
    """Puts the tables of all kept results into the page.

    Raises:
        ResultError: the page has no place for a result, or one can't be read.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{page} can't be read: {error}") from None
    for name in MENU:
        found = result.kept(name, folder)
        if not found:
            log.warning("no result of %s: python -m benchmarks --only %s", name, name)
            continue
        text = put(text, name, "\n\n".join(f"{_heading(x)}\n\n{tables_of(x)}" for x in found))
    page.write_text(text, encoding="utf-8")


def _heading(found: Result) -> str:
    """The processor, and whether it has matrix tiles: no other property moves ratios as much."""
    tiles = "with" if "amx_bf16" in found.origin.flags else "without"
    return f"**{found.origin.kind}, {tiles} matrix tiles**"


def put(page: str, name: str, body: str) -> str:
    """The page with what stands between a benchmark's markers replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(rf"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ResultError(f"the page has no {begin} ... {end}: add both lines where it belongs")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", page, count=1)


def text(found: Result) -> str:
    """Everything about one result, for a terminal."""
    return f"## {found.name}: {MENU[found.name].title}\n\n{tables_of(found)}\n"


def tables_of(found: Result) -> str:
    """Ratios first, then what they are made of, then where it was measured."""
    parts = [_ratios(found.ratios)] if found.ratios else []
    for unit in dict.fromkeys(x.unit for x in found.measurements):
        parts.append(_measurements([x for x in found.measurements if x.unit == unit], unit))
    first_calls = _first_calls(found.measurements)
    parts += [first_calls] if first_calls else []
    parts += [f"- {note}" for note in found.notes]
    parts += [f"- {peer} is left out here: {why}." for peer, why in found.absent.items()]
    parts.append(_where(found))
    return "\n\n".join(parts)


def _ratios(ratios: Sequence[Ratio]) -> str:
    """One line per ratio, with its floor and aim."""
    shares = all(x.unit == "%" for x in ratios)
    title, between = ("share", "of") if shares else ("how many times better", "against")
    lines = [f"| {title} | case | | 10-90 % | floor | aim | |", "|" + "---|" * 7]
    for x in ratios:
        what = f"{x.what}: {x.ours} {between} {x.theirs}{_dated(x.origin)}"
        gate = [f"{value:g}{x.unit}" if value is not None else "" for value in (x.floor, x.aim)]
        cells = [what, x.case, f"**{_number(x.median)}{x.unit}**"]
        cells += [f"{_number(x.p10)}-{_number(x.p90)}", *gate, x.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measurements(measurements: Sequence[Measurement], unit: str) -> str:
    """Peers down, cases across."""
    cases = list(dict.fromkeys(x.case for x in measurements))
    lines = [f"| {unit}, median (10-90 %) | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    peers = list(dict.fromkeys((x.peer, _dated(x.origin)) for x in measurements))
    for peer, dated in peers:
        by_case = {x.case: x for x in measurements if (x.peer, _dated(x.origin)) == (peer, dated)}
        cells = [_cell(by_case[case]) if case in by_case else "" for case in cases]
        lines.append(f"| {peer}{dated} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(x: Measurement) -> str:
    if x.repeats == 1:
        return _number(x.median)
    return f"{_number(x.median)} ({_number(x.p10)}-{_number(x.p90)})"


def _first_calls(measurements: Sequence[Measurement]) -> str:
    """What a first call costs, of those that compile."""
    compiled = [x for x in measurements if "compiled" in x.peer and x.first_call_seconds]
    if not compiled:
        return ""
    costs = ", ".join(f"{x.peer} {x.case} {x.first_call_seconds:.0f} s" for x in compiled)
    return f"The first call of what is compiled: {costs}."


def _where(found: Result) -> str:
    x = found.origin
    versions = ", ".join(f"{name} {version}" for name, version in x.versions.items())
    counts = sorted({m.repeats for m in found.measurements if m.repeats > 1 and m.origin is None})
    repeats = " or ".join(str(count) for count in counts) or "1"
    others = "unknown" if found.others_share is None else f"{found.others_share:.1%}"
    return (
        f"{x.processor} ({', '.join(x.flags)}), {x.threads} threads; {versions}; {x.date}, "
        f"commit {x.commit}; {repeats} rounds, {found.seconds / 60:.1f} minutes; other processes "
        f"used {others} of the cores."
    )


def _dated(origin: Origin | None) -> str:
    """Says of a kept number that it is not from this run."""
    if origin is None:
        return ""
    return f" (kept from {origin.date}, {origin.processor}, commit {origin.commit})"


def _number(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
