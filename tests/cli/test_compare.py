"""`valkyrie compare` as a user sees it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
PAIR = ("tiny/hybrid", "tiny/rwkv7")
FILES = {
    "comparison.md",
    "comparison_plots.png",
    "comparison_summary.json",
    "training_curves_tiny-hybrid.png",
    "training_curves_tiny-rwkv7.png",
    "training_results_tiny-hybrid.json",
    "training_results_tiny-rwkv7.json",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with one comparison, `out`, and its runs; tests must leave it as it is."""
    from valkyrie_core import runs

    folder = tmp_path_factory.mktemp("compare")
    runs.compare(PAIR, seeds=2, steps=4, runs_dir=folder / "runs", out=folder / "out")
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "compare"))


def arguments(folder: Path, *more: str) -> tuple[str, ...]:
    places = ("--runs-dir", str(folder / "runs"), "--out", str(folder / "out"))
    return ("compare", *PAIR, "--seeds", "2", "--steps", "4", *places, *more)


def summary(folder: Path) -> dict[str, Any]:
    """The summary without what a clock measured and without folders."""
    found: dict[str, Any] = json.loads((folder / "out" / "comparison_summary.json").read_text())
    found.pop("timing")
    found.pop("directory")
    for one in found["contenders"]:
        one["runs"] = [Path(run).name for run in one["runs"]]
    return found


def test_the_files(whole: Path) -> None:
    assert {path.name for path in (whole / "out").iterdir()} >= FILES
    assert (whole / "out" / "comparison_plots.png").read_bytes().startswith(PNG)
    page = (whole / "out" / "comparison.md").read_text()
    assert "# tiny-rwkv7 against tiny-hybrid" in page
    assert "No difference was found" in page or " than tiny-hybrid " in page
    results = json.loads((whole / "out" / "training_results_tiny-rwkv7.json").read_text())
    assert [one["seed"] for one in results["trainings"]] == [0, 1]
    assert all(Path(one["best_checkpoint"]).is_dir() for one in results["trainings"])


def test_the_object_and_nothing_is_trained_again(
    cli: Cli, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkyrie_core.runs import comparison_trials

    def trained(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("it was trained already")

    before = summary(copied)
    monkeypatch.setattr(comparison_trials, "train_recipe", trained)
    outcome = cli(*arguments(copied, "--json"))
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["schema"] == "valkyrie.compare/1"
    assert report["seeds"] == 2
    assert set(report["views"]) == {"params", "flops", "seconds"}
    assert [one["name"] for one in report["contenders"]] == ["tiny-hybrid", "tiny-rwkv7"]
    first = report["metrics"][0]
    assert first["name"] == "bits per byte"
    assert first["difference"]["low"] < first["difference"]["value"] < first["difference"]["high"]
    means = [sum(one["scores"]) / 2 for one in report["contenders"]]
    assert first["difference"]["value"] == pytest.approx(means[1] - means[0])
    assert report["verdict"].endswith(".")
    assert summary(copied) == before


def test_the_tables(cli: Cli, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    outcome = cli(*arguments(copied, "--resume"))
    assert outcome.code == 0, outcome.err
    for told in ("design", "bits per byte", "equal", "FLOPs", "off the curves", "Holm"):
        assert told in outcome.out, told
    assert "comparison.md" in outcome.err


def test_a_design_against_itself_has_other_seeds(cli: Cli, copied: Path, tmp_path: Path) -> None:
    places = ("--runs-dir", str(copied / "runs"), "--out", str(tmp_path / "same"))
    outcome = cli(
        *("compare", "tiny/hybrid", "tiny/hybrid", "--seeds", "2", "--steps", "4"),
        *places,
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert [one["seeds"] for one in outcome.json["contenders"]] == [[0, 1], [2, 3]]
    assert outcome.json["metrics"][0]["outcome"] == "not enough evidence"
    assert any("what is found between them is chance" in note for note in outcome.json["notes"])
    # its first two trainings were there
    assert "training 2 of 2" in outcome.err


def test_more_seeds_only_train_what_is_missing(cli: Cli, copied: Path) -> None:
    before = {path.name for path in (copied / "runs" / "compare").iterdir()}
    args = [one if one != "2" else "3" for one in arguments(copied, "--json")]
    outcome = cli(*args)
    assert outcome.code == 0, outcome.err
    assert "training 2 of 2" in outcome.err
    assert len(list((copied / "runs" / "compare").iterdir())) == len(before) + 2
    assert outcome.json["seeds"] == 3


@pytest.mark.parametrize("match", ["params", "flops", "seconds"])
def test_every_match(cli: Cli, copied: Path, tmp_path: Path, match: str) -> None:
    places = ("--runs-dir", str(copied / "runs"), "--out", str(tmp_path / match))
    outcome = cli(
        *("compare", *PAIR, "--seeds", "1", "--steps", "4", "--match", match), *places, "--json"
    )
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["match"] == match
    again = cli(
        *("compare", *PAIR, "--seeds", "1", "--steps", "4", "--match", match, "--resume"), *places
    )
    assert again.code == 0, again.err
    assert [view["matched"] for view in report["views"].values()] == [
        key == match for key in ("params", "flops", "seconds")
    ]
    assert "one seed says nothing of others" in report["verdict"]
    sizes = [one["parameters"] for one in report["contenders"]]
    flops = [one["training_flops"] for one in report["contenders"]]
    if match == "params":
        assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    if match == "flops":
        # steps are whole
        assert flops[1] == pytest.approx(flops[0], rel=0.13)


def test_a_quick_experiment(cli: Cli, tmp_path: Path, cache: Path) -> None:
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    outcome = cli("compare", *PAIR, "--experiment", "quick", *places, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["seeds"] == 1
    assert {one["steps"] for one in outcome.json["contenders"]} == {5}


def test_a_run_is_compared_and_its_training_is_used(cli: Cli, tmp_path: Path, cache: Path) -> None:
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    overrides = [f"runs_dir={tmp_path}/runs", "name=mine", "train.steps=4", "train.eval_every=2"]
    runs.train(Recipe.load("tiny/hybrid", overrides))
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    outcome = cli("compare", "run:mine", "tiny/rwkv7", "--seeds", "1", *places, "--json")
    assert outcome.code == 0, outcome.err
    assert "training 1 of 1: tiny-rwkv7" in outcome.err
    assert outcome.json["contenders"][0]["runs"] == [str(tmp_path / "runs" / "mine")]
    # a share of a run's steps
    outcome = cli("compare", "run:mine", "tiny/rwkv7", "--experiment", "quick", *places, "--json")
    assert outcome.code == 0, outcome.err
    assert {one["steps"] for one in outcome.json["contenders"]} == {1}


def test_a_run_that_was_stopped_before_its_first_step(
    cli: Cli, copied: Path, tmp_path: Path
) -> None:
    run = next((copied / "runs" / "compare").glob("tiny-rwkv7-*-seed1"))
    shutil.rmtree(run)
    (run / "checkpoints").mkdir(parents=True)
    outcome = cli(*arguments(copied, "--json"))
    assert outcome.code == 0, outcome.err
    assert "training 1 of 1: tiny-rwkv7, seed 1" in outcome.err


def test_runs_that_can_not_be_read_are_not_used(cli: Cli, copied: Path) -> None:
    place = copied / "runs" / "tiny-hybrid"
    place.mkdir()
    (place / "recipe.json").write_text('{"name": "tiny-hybrid", "old_key": 1}')
    outcome = cli("compare", "recipe:tiny/hybrid", *arguments(copied, "--json")[2:])
    assert outcome.code == 0, outcome.err


def test_mistakes(cli: Cli, tmp_path: Path) -> None:
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    outcome = cli("compare", "tiny/hybrid", *places)
    assert outcome.code == 2
    assert "two designs" in outcome.err
    outcome = cli("compare", "tiny/hybrid", "tiny/hibrid", *places)
    assert outcome.code == 4
    assert "no recipe and no run" in outcome.err
    outcome = cli("compare", *PAIR, *places, "--resume")
    assert outcome.code == 4
    assert "leave out --resume" in outcome.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    outcome = cli("compare", *PAIR, "--runs-dir", str(tmp_path), "--out", str(tmp_path / "file"))
    assert outcome.code == 7
    assert "can't be made" in outcome.err


@pytest.mark.slow
def test_killed_at_any_time_it_says_the_same(whole: Path, tmp_path: Path, cache: Path) -> None:
    """The same summary, bit for bit, but for what a clock measured."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "valkyrie_cli", *arguments(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for seconds in (5, 8, 11):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert summary(folder) == summary(whole)


def test_questions_are_compared_by_right_answers(cli: Cli, tmp_path: Path, cache: Path) -> None:
    other = tmp_path / "other.yaml"
    text = (ROOT / "recipes" / "tiny" / "questions.yaml").read_text()
    other.write_text(
        text.replace("name: tiny-questions", "name: other").replace("dim: 32", "dim: 16")
    )
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    outcome = cli(
        *("compare", "tiny/questions", str(other), "--seeds", "2", "--steps", "3"),
        *places,
        "--json",
    )
    assert outcome.code == 0, outcome.err
    metrics = outcome.json["metrics"]
    assert [one["name"] for one in metrics[:3]] == [
        "accuracy",
        "accuracy: khop",
        "accuracy: expression",
    ]
    assert not metrics[0]["lower_is_better"]
    assert len(metrics[0]["mcnemar"]) == 2
    assert 0 < metrics[1]["constant_answer"] < 1
    assert metrics[5]["name"] == "bits per byte"
    accuracy = outcome.json["contenders"][0]["accuracy"]
    assert set(accuracy) == {"khop", "expression", "sudoku", "maze"}
    assert set(accuracy["khop"]) == {"1", "2"}
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "## Right answers, by difficulty" in page
    outcome = cli(
        *("compare", "tiny/questions", str(other), "--seeds", "2", "--steps", "3"), *places
    )
    assert "level 2" in outcome.out


def test_a_sweep(cli: Cli, tmp_path: Path, cache: Path) -> None:
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    vary = ("--vary", "train.optimizer.lr=0.001,0.02")
    outcome = cli("compare", "tiny/rwkv7", *vary, "--seeds", "1", "--steps", "3", *places, "--json")
    assert outcome.code == 0, outcome.err
    assert [one["name"] for one in outcome.json["contenders"]] == ["lr-0.001", "lr-0.02"]
    assert outcome.json["contenders"][0]["score"] != outcome.json["contenders"][1]["score"]
    assert (
        "--vary train.optimizer.lr=0.001,0.02" in (tmp_path / "out" / "comparison.md").read_text()
    )
    outcome = cli("compare", "tiny/rwkv7", "tiny/hybrid", *vary, *places)
    assert outcome.code == 2
    assert "belongs to one recipe" in outcome.err


LRS = "0.001,0.002,0.005,0.02"


def test_a_budget_drops_designs_by_short_trainings(
    cli: Cli, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkyrie_core.runs import comparison

    # a second for every step: 4 designs, 2 seeds and 40 steps are 320 s
    monkeypatch.setattr(
        comparison, "step_seconds", lambda recipes, told: dict.fromkeys(recipes, 1.0)
    )
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    sweep = ("compare", "tiny/rwkv7", "--vary", f"train.optimizer.lr={LRS}", "--seeds", "2")
    arguments = (*sweep, "--steps", "40", *places)
    outcome = cli(*arguments, "--budget", "5m", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    # the reference stays, and two others have room beside a round of half the steps
    assert report["contenders"][0]["name"] == "lr-0.001"
    assert len(report["contenders"]) == 3
    (dropped,) = report["dropped"]
    kept = {one["name"] for one in report["contenders"]}
    assert kept | {dropped["name"]} == {f"lr-{value}" for value in LRS.split(",")}
    assert dropped["by_score"]
    assert dropped["why"].startswith("round 1 of 1: ")
    assert dropped["why"].endswith(" bits per byte after 20 steps, seed 10")
    # the one that was dropped counts as tested, too
    first = report["metrics"][0]["difference"]
    assert first["p_holm"] > first["p"]
    assert any("p counts them as tested" in note for note in report["notes"])
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "not trained to the end" in page
    assert "--budget 5m" in page
    before = summary(tmp_path)
    outcome = cli(*arguments, "--budget", "5m")
    assert "dropped: lr-" in outcome.out
    assert summary(tmp_path) == before
    # as much as is needed: all are trained
    outcome = cli(*arguments, "--budget", "6m", "--json")
    assert len(outcome.json["contenders"]) == 4
    assert outcome.json["dropped"] == []
    outcome = cli(*arguments, "--budget", "10s")
    assert outcome.code == 2
    assert "a budget of 10s is too little" in outcome.err
    assert "--budget " in outcome.err
    for wrong in ("soon", "0m", "-5m", ""):
        assert cli(*arguments, "--budget", wrong).code == 2, wrong


def test_a_design_that_diverges_is_dropped(cli: Cli, tmp_path: Path, cache: Path) -> None:
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    sweep = ("compare", "tiny/rwkv7", "--seeds", "1", "--steps", "3", *places)
    outcome = cli(*sweep, "--vary", "train.optimizer.lr=0.001,1e30,0.02", "--json")
    assert outcome.code == 0, outcome.err
    assert [one["name"] for one in outcome.json["contenders"]] == ["lr-0.001", "lr-0.02"]
    (dropped,) = outcome.json["dropped"]
    assert dropped["name"] == "lr-1e30"
    assert dropped["why"] == "its training with seed 2 diverged"
    # another sweep was not begun here
    outcome = cli(*sweep, "--vary", "train.optimizer.lr=0.001,0.03", "--resume")
    assert outcome.code == 4
    assert "no such comparison" in outcome.err
    # without the reference, or with nothing else, there is no comparison
    for values in ("1e30,0.001,0.02", "0.001,1e30"):
        outcome = cli(*sweep, "--vary", f"train.optimizer.lr={values}")
        assert outcome.code == 6, outcome.err
        assert "1e30, seed 2" in outcome.err


def test_a_tracker_that_is_not_there_is_told_before_anything_is_trained(
    cli: Cli, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkyrie_core.train import track

    monkeypatch.setattr(track, "find_spec", lambda _name: None)
    other = tmp_path / "other.yaml"
    text = (ROOT / "recipes" / "tiny" / "rwkv7.yaml").read_text()
    other.write_text(text.replace("  steps: 20", "  steps: 20\n  track: {type: wandb}"))
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    outcome = cli("compare", "tiny/hybrid", str(other), "--steps", "3", *places)
    assert outcome.code == 4
    assert "needs wandb" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_loops_are_compared_in_plain_layers(cli: Cli, tmp_path: Path, cache: Path) -> None:
    places = ("--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    outcome = cli(
        *("compare", "tiny/recursive", "--vary", "model.core.loops=1,3", "--seeds", "1"),
        *("--steps", "2"),
        *places,
        "--json",
    )
    assert outcome.code == 0, outcome.err
    once, thrice = outcome.json["contenders"]
    assert once["unrolled_parameters"] == once["parameters"]
    assert thrice["unrolled_parameters"] > 1.3 * thrice["parameters"]
    assert thrice["training_flops"] > 1.3 * once["training_flops"]
    assert "in plain layers" in (tmp_path / "out" / "comparison.md").read_text()
