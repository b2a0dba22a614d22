"""`valkyrie allocate` as a user sees it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import TINY, Cli
from valkyrie_core.recipe import Recipe


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_picture(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    report = cli("allocate", str(TINY), "--json").json
    assert report["schema"] == "valkyrie.allocate/1"
    stack = report["stack"]
    assert sum(row["parameters"] for row in stack["rows"]) == stack["parameters"]
    assert sum(row["flops_share"] for row in stack["rows"]) == pytest.approx(1)
    assert [row["mixer"] for row in stack["rows"]] == ["", "rwkv7", "attention", ""]
    assert report["design"] is None
    monkeypatch.setenv("COLUMNS", "100")
    outcome = cli("allocate", "quickstart")
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 100
    assert "2,347,136" in outcome.out


def test_a_design_is_shown_and_written(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "designs" / "all.yaml"
    args = ("allocate", str(TINY), "--ratio", "0:1", "--match", "params", "--out", str(out))
    report = cli(*args, "--json").json
    assert report["design"]["pattern"] == "attn x2"
    assert abs(report["size"]["difference"]) < 0.005
    assert report["out"] == str(out)
    recipe = Recipe.load(out)
    assert recipe.name == "tiny-hybrid-0to1"
    assert recipe.model.core.layers == ("attn", "attn")
    assert out.read_text().startswith("# tiny-hybrid, its layers rearranged")
    # never over a file
    outcome = cli(*args)
    assert outcome.code == 2
    assert "exists already" in outcome.err
    shown = cli("allocate", str(TINY), "--preset", "alternate")
    assert shown.code == 0
    assert "even layers are recurrent" in shown.out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--ratio", "three"], "is no ratio"),
        (["--ratio", "0:0"], "0:0"),
        (["--pattern", "R Q"], "'Q' is no layer"),
        (["--pattern", "R R R"], "does not make the 2"),
        (["--preset", "9:1"], "no preset"),
        (["--ratio", "1:1", "--preset", "alternate"], "three ways"),
        (["--match", "params"], "belongs to a design"),
        (["--out", "x.yaml"], "--out belongs to"),
        (["--runs-dir", "x", "--search"], "--runs-dir belongs to --importance"),
        (["--steps", "3"], "belongs to --search"),
        (["--window", "3"], "belongs to --importance"),
        (["--search", "--ratio", "1:1"], "does not go with --search"),
        (["--search", "--importance"], "two commands"),
    ],
)
def test_nonsense_is_told_in_one_line(cli: Cli, args: list[str], told: str) -> None:
    outcome = cli("allocate", str(TINY), *args)
    assert outcome.code == 2
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert len(outcome.err.strip().splitlines()) <= 2


def test_a_recipe_that_is_not_there(cli: Cli) -> None:
    outcome = cli("allocate", "quikstart", "--json")
    assert outcome.code == 4
    assert outcome.json["error"]["hint"].startswith("did you mean quickstart?")
    assert outcome.json["schema"] == "valkyrie.allocate/1"


def test_a_search(cli: Cli, cache: Path, tmp_path: Path) -> None:
    args = ["allocate", str(TINY), "--search", "--steps", "2", "--recall-steps", "2"]
    args += ["--width", "16", "--seeds", "1", "--set", f"runs_dir={tmp_path}"]
    taken = tmp_path / "taken.yaml"
    taken.write_text("mine")
    refused = cli(*args, "--out", str(taken))
    assert refused.code == 2
    # said before anything is trained
    assert not list(tmp_path.glob("allocate/*/*.json"))
    outcome = cli(*args, "--json")
    assert outcome.code == 0, outcome.err
    report: Any = outcome.json
    assert report["schema"] == "valkyrie.allocate.search/1"
    assert report["chosen"] is None
    assert "not enough evidence" in report["reason"]
    assert report["out"] is None
    assert {"RR", "AA"} <= {one["candidate"] for one in report["candidates"]}
    assert "rung 1  RR  recall" in outcome.err
    folder = Path(report["folder"])
    assert {"search.json", "search.md", "search.png"} <= {path.name for path in folder.iterdir()}
    assert taken.read_text() == "mine"
    # everything is there: the same again, at once
    again = cli(*args)
    assert again.code == 0
    assert "rung 1" not in again.err
    assert "chosen: -" in again.out


def test_the_importance_of_layers(cli: Cli, runs_dir: Path) -> None:
    for args in (["tiny-hybrid", "--importance"], ["--importance", "tiny-hybrid"]):
        outcome = cli("allocate", *args, "--window", "8", "--runs-dir", str(runs_dir), "--json")
        assert outcome.code == 0, outcome.err
        report = outcome.json
        assert report["schema"] == "valkyrie.allocate.importance/1"
        assert [(x["layer"], x["change"]) for x in report["layers"]] == [
            (0, "removed"),
            (1, "windowed"),
            (1, "removed"),
        ]
        assert report["could_become_recurrent"] == [1]
    shown = cli(
        "allocate", "tiny-hybrid", "--importance", "--window", "8", "--runs-dir", str(runs_dir)
    )
    assert "window 8" in shown.out
    wrong = cli(
        "allocate", "tiny-hybrid", "--importance", "--window", "64", "--runs-dir", str(runs_dir)
    )
    assert wrong.code == 2


def test_a_runs_recipe_has_a_picture(cli: Cli, runs_dir: Path, tmp_path: Path) -> None:
    shutil.copy(runs_dir / "tiny-hybrid" / "recipe.json", tmp_path / "recipe.json")
    assert cli("allocate", str(tmp_path / "recipe.json")).code == 0
