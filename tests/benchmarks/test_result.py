"""Results on disk, the numbers of absent peers, and the tables made of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import result, tables
from benchmarks.menu import MENU
from benchmarks.result import Findings, Gate, Measurement, Ratio, Result, ResultError
from benchmarks.timing import Spread, Timing

OURS, THEIRS = Timing((1.0, 1.1, 0.9), 5.0), Timing((2.0, 2.2, 2.7), 3.0)


def found(*, theirs: bool = True) -> Result:
    """A small result, with or without its peer."""
    findings = Findings()
    timings = {"ours": OURS, **({"llama.cpp bf16": THEIRS} if theirs else {})}
    findings.milliseconds("T=8", timings)
    if theirs:
        pair = (("ours", OURS), ("llama.cpp bf16", THEIRS))
        findings.compare("writing", "T=8", *pair, Gate(1.5, 3))
    else:
        findings.absent["llama.cpp"] = "it is not installed"
    return Result(
        "decode",
        result.origin(),
        60.0,
        0.01,
        tuple(findings.ratios),
        tuple(findings.measurements),
        ("a note",),
        findings.absent,
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    first = found()
    path = result.save(first, tmp_path)
    assert path == result.path_of("decode", first.origin.kind, tmp_path)
    assert result.load("decode", first.origin.kind, tmp_path) == first
    assert result.load("wkv", first.origin.kind, tmp_path) is None


def test_processors_keep_results_apart(tmp_path: Path) -> None:
    here = found()
    names = ("Intel(R) Xeon(R) Processor", "AMD EPYC")
    wide = here.origin._replace(flags=("avx2", "avx512f"))
    both = [replace(here, origin=wide._replace(processor=name)) for name in names]
    paths = [result.save(x, tmp_path).relative_to(tmp_path).as_posix() for x in both]
    assert paths == ["intel-xeon-processor/decode.json", "amd-epyc/decode.json"]
    assert result.kept("decode", tmp_path) == both[::-1]
    # two generations of one name
    older = wide._replace(processor="AMD EPYC", flags=("avx2",))
    path = result.save(replace(here, origin=older), tmp_path)
    assert path == tmp_path / "amd-epyc-avx2" / "decode.json"
    assert result.path_of("wkv", "///", tmp_path) == tmp_path / "unknown" / "wkv.json"


def test_an_absent_peer_keeps_its_numbers_with_their_date() -> None:
    old = found()
    old = replace(old, origin=old.origin._replace(date="2001-02-03"))
    kept = found(theirs=False).keeping(old)
    assert [x.peer for x in kept.measurements] == ["ours", "llama.cpp bf16"]
    assert kept.measurements[0].origin is None
    assert kept.measurements[1].origin == old.origin
    assert kept.ratios[0].origin == old.origin
    # and once more, over a result that had kept them already
    again = found(theirs=False).keeping(replace(kept, origin=result.origin()))
    assert again.measurements[1].origin == old.origin
    shown = tables.tables_of(again)
    assert "| llama.cpp bf16 (kept from 2001-02-03, " in shown
    assert "llama.cpp is left out here: it is not installed" in shown


def test_a_peer_that_is_there_replaces_its_old_numbers() -> None:
    new = found()
    assert new.keeping(found()) == new


@pytest.mark.parametrize(
    ("median", "verdict"),
    [(0.9, "below the floor"), (1.0, "floor holds"), (1.99, "floor holds"), (2.0, "aim reached")],
)
def test_verdicts(median: float, verdict: str) -> None:
    assert Ratio("x", "y", "a", "b", median, 0, 0, floor=1.0, aim=2.0).verdict == verdict
    assert Ratio("x", "y", "a", "b", median, 0, 0).verdict == ""


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 0}', '{"schema": 1}'])
def test_a_damaged_file_is_one_helpful_line(tmp_path: Path, text: str) -> None:
    path = result.path_of("wkv", "some", tmp_path)
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultError, match=r"wkv\.json.*delete it") as caught:
        result.load("wkv", "some", tmp_path)
    assert "\n" not in str(caught.value)


def test_tables_have_ratios_first_and_say_where() -> None:
    shown = tables.tables_of(found())
    ratio = "| writing: ours against llama.cpp bf16 | T=8 | **2.00x** | 2.00-2.80 | 1.5x | 3x |"
    assert shown.index(ratio) < shown.index("| ours | 1,000 (920-1,080) |")
    assert f"2 threads; torch {found().origin.versions['torch']}" in shown.replace(
        f"{found().origin.threads} threads", "2 threads"
    )
    assert "- a note" in shown


def test_only_the_text_between_markers_changes() -> None:
    page = (
        "one\n<!-- begin wkv -->\nold\n<!-- end wkv -->\ntwo <!-- begin train --><!-- end train -->"
    )
    changed = tables.put(page, "wkv", r"new \1")
    assert changed == page.replace("\nold\n", "\n\nnew \\1\n\n")
    with pytest.raises(ResultError, match="<!-- begin block -->"):
        tables.put(page, "block", "new")


def test_the_page_has_a_place_for_every_benchmark(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = tables.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    for name in MENU:
        result.save(replace(found(), name=name), tmp_path)
    tables.write(page, tmp_path)
    assert page.read_text(encoding="utf-8").count("ours against llama.cpp bf16") == len(MENU)


def test_the_tables_of_the_page_are_those_of_the_kept_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = tables.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    tables.write(page)
    assert page.read_text(encoding="utf-8") == text


def test_a_share_is_kept_with_the_peer_that_it_is_of() -> None:
    findings = Findings(absent={"Llama": "it is not installed"})
    findings.share("model FLOPs", "T=8", "Llama bf16", "peak", Spread(40, 39, 41), Gate(60, 72))
    old = replace(found(), ratios=tuple(findings.ratios), absent={})
    kept = replace(found(theirs=False), absent=findings.absent).keeping(old)
    assert [x.ours for x in kept.ratios] == ["Llama bf16"]
    assert "model FLOPs: Llama bf16 of peak (kept from" in tables.tables_of(kept)
    assert "| **40.0%** | 39.0-41.0 | 60% | 72% | below the floor |" in tables.tables_of(kept)


def test_numbers_measured_once_have_no_spread() -> None:
    once = Measurement("T=8", "ours", "MiB", 0.25, 0.25, 0.25, 1)
    assert "| ours | 0.25 |" in tables.tables_of(replace(found(), measurements=(once,)))
