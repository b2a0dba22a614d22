"""`valkyrie experts` as a user sees it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli

TINY_MOE = Path(__file__).parents[2] / "recipes" / "tiny" / "moe.yaml"
FILES = {"experts.json", "experts.html", "experts.png", "experts_over_time.png"}
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--tokens", "1024")


@pytest.fixture(scope="session")
def moe_runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with one trained run, `tiny-moe`; tests must leave it as it is."""
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    folder = tmp_path_factory.mktemp("moe-runs")
    overrides = [f"runs_dir={folder}", "train.steps=8", "train.eval_every=4", "train.log_every=2"]
    runs.train(Recipe.load(TINY_MOE, overrides))
    return folder


@pytest.fixture
def copied(moe_runs: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be changed."""
    return Path(shutil.copytree(moe_runs / "tiny-moe", tmp_path / "tiny-moe"))


@pytest.fixture
def domains(tmp_path: Path) -> list[str]:
    """Two files of very different text."""
    (tmp_path / "prose.txt").write_text("so foul and fair a day I have not seen. " * 60)
    (tmp_path / "<b>.txt").write_text("<script>0123456789+-*/</script>\n" * 60)
    return ["--text", str(tmp_path / "prose.txt"), "--text", str(tmp_path / "<b>.txt")]


def bias(run: Path, layer: int, expert: int) -> int:
    """Makes a router avoid an expert, in the newest checkpoint; returns its step."""
    from valkyrie_core.train.checkpoint import list_checkpoints, save_checkpoint, verify
    from valkyrie_core.train.storage import Storage

    checkpoint = verify(list_checkpoints(run / "checkpoints")[0][1])
    weights = dict(checkpoint.model_tensors())
    weights[f"core.layers.{layer}.ffn.routers.0.bias_E"][expert] = -100
    save_checkpoint(
        run / "checkpoints",
        checkpoint.step,
        model=weights,
        training=dict(checkpoint.training_tensors()),
        meta=checkpoint.meta,
        storage=Storage(),
    )
    return checkpoint.step


def test_the_report_of_a_run(cli: Cli, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a narrow terminal breaks words in two
    monkeypatch.setenv("COLUMNS", "160")
    outcome = cli("experts", str(copied), *SMALL)
    assert outcome.code == 0, outcome.err
    for told in ("layer", "sigmoid_topk", "top_p", "MaxVio", "I(expert; domain)", "Knock-outs"):
        assert told in outcome.out, told
    assert "do not predict" in outcome.out
    assert "one domain" in outcome.out
    assert "experts.html" in outcome.err
    assert {path.name for path in copied.iterdir()} >= FILES
    assert (copied / "experts.png").read_bytes().startswith(PNG)
    assert (copied / "experts_over_time.png").read_bytes().startswith(PNG)
    assert not list(copied.glob(".tmp*"))
    kept = json.loads((copied / "experts.json").read_text())
    assert kept["schema"] == "valkyrie.experts/1"
    page = (copied / "experts.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 2
    # to be passed on: it says nothing of this machine's folders
    assert str(copied.parent) not in page


def test_the_object(cli: Cli, copied: Path, domains: list[str]) -> None:
    before = {path.name for path in copied.iterdir()}
    args = ("experts", str(copied), *domains, *SMALL, "--json", "--no-save")
    outcome = cli(*args)
    assert outcome.code == 0, outcome.err
    assert {path.name for path in copied.iterdir()} == before
    report: Any = outcome.json
    assert report["schema"] == "valkyrie.experts/1"
    assert [one["name"] for one in report["domains"]] == ["prose.txt", "<b>.txt"]
    assert all(one["tokens"] == 1024 for one in report["domains"])
    assert all(one["documents"] == 1 for one in report["domains"])
    assert any("fewer than 5 documents" in note for note in report["notes"])
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    for layer in report["layers"]:
        assert layer["num_experts"] == 4
        assert sum(layer["load"]) == pytest.approx(4)
        assert layer["max_vio"] == pytest.approx(max(layer["load"]) - 1)
        assert layer["max_vio_per_batch"] >= 0
        assert 1 <= layer["effective_experts"] <= 4
        assert layer["load_entropy"] == pytest.approx(
            math.log(layer["effective_experts"]) / math.log(4)
        )
        assert 0 <= layer["routing_entropy"] <= math.log(4) + 1e-9
        assert 0 <= layer["top1_margin"] <= 1
        found = layer["mutual_information"]
        assert 0 <= found["null_mean"] <= found["null_95"] < 1
        assert 0 <= found["value"] <= 1
        assert [row["domain"] for row in layer["knock_out"]] == ["prose.txt", "<b>.txt"]
        for row in layer["knock_out"]:
            assert len(row["change"]) == 4
            ranges = zip(row["low"], row["change"], row["high"], strict=True)
            assert all(low <= x <= high for low, x, high in ranges)
        assert len(layer["top_tokens"]) == 4
        assert all(one["count"] >= 5 for lifts in layer["top_tokens"] for one in lifts)
        assert {one["expert"] for one in layer["dead"]} == {
            expert for expert, load in enumerate(layer["load"]) if load < 0.1
        }
        assert all(one["steps"] is not None for one in layer["dead"])
    # two of a group of two meet every token of theirs, and none of the other group
    pairs = report["layers"][0]["co_activation"]
    assert pairs[0][2] in (0, None)
    assert "group" in report["layers"][0]["knock_out_note"]
    assert report["saturation"]["newest"] == 8
    assert [one["step"] for one in report["saturation"]["earlier"]] == [4]
    assert all(0 <= x <= 1 for one in report["saturation"]["earlier"] for x in one["share"])
    assert cli(*args).json | {"seconds": 0} == report | {"seconds": 0}


def test_a_page_of_hostile_text(cli: Cli, copied: Path, domains: list[str]) -> None:
    outcome = cli("experts", str(copied), *domains, *SMALL, "--no-knock-out")
    assert outcome.code == 0, outcome.err
    page = (copied / "experts.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;.txt" in page
    assert "Knock-outs" not in outcome.out
    report = json.loads((copied / "experts.json").read_text())
    assert all(layer["knock_out"] is None for layer in report["layers"])


def test_a_step_and_a_dead_expert(cli: Cli, copied: Path) -> None:
    step = bias(copied, layer=1, expert=2)
    args = ("experts", str(copied), "--step", str(step), *SMALL, "--no-save")
    outcome = cli(*args, "--fail-on", "dead", "--json")
    assert outcome.code == 9
    report: Any = outcome.json
    assert report["step"] == step
    assert report["error"]["type"] == "GateError"
    assert report["error"]["exit_code"] == 9
    assert "layer 1: 2" in report["error"]["message"]
    layer = report["layers"][1]
    assert layer["load"][2] == 0
    assert 2 in [one["expert"] for one in layer["dead"]]
    # nobody misses who was never there
    assert [row["change"][2] for row in layer["knock_out"]] == [0.0]
    assert layer["top_tokens"][2] == []
    plain = cli(*args, "--fail-on", "dead")
    assert plain.code == 9
    assert "expert 2 is dead" in plain.out
    assert "error: dead experts" in plain.err
    # it is a gate only if one asks for it
    assert cli(*args).code == 0
    wrong = cli("experts", str(copied), "--step", "7")
    assert wrong.code == 4
    assert "there is: 8, 4" in wrong.err


def test_a_run_without_experts(cli: Cli, runs_dir: Path) -> None:
    outcome = cli("experts", "tiny-hybrid", "--runs-dir", str(runs_dir))
    assert outcome.code == 2
    assert outcome.out == ""
    assert "has no experts" in outcome.err
    assert "tiny/moe" in outcome.err
    assert not (runs_dir / "tiny-hybrid" / "experts.json").exists()


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["nothing-there"], 4, "there is no run"),
        (["tiny-moe", "--text", "nothing.txt"], 4, "can't be read"),
        (["tiny-moe", "--tokens", "1"], 2, "--tokens"),
        (["tiny-moe", "--fail-on", "boredom"], 2, "--fail-on"),
    ],
)
def test_nonsense_is_told(cli: Cli, moe_runs: Path, args: list[str], code: int, told: str) -> None:
    outcome = cli("experts", *args, "--runs-dir", str(moe_runs), "--json")
    assert outcome.code == code
    assert outcome.json["error"]["exit_code"] == code
    assert told in outcome.json["error"]["message"]
    assert "Traceback" not in outcome.err


def test_a_text_that_is_named_twice(cli: Cli, moe_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("text")
    args = ("experts", "tiny-moe", "--runs-dir", str(moe_runs), "--no-save", "--json")
    one, other = str(tmp_path / "a.txt"), str(tmp_path / "b" / "a.txt")
    twice = cli(*args, "--text", one, "--text", one)
    assert twice.code == 2
    assert "named twice" in twice.err
    # files of one name are told apart by their paths; a text of four tokens says next to nothing
    report: Any = cli(*args, "--text", one, "--text", other).json
    assert [domain["name"] for domain in report["domains"]] == [one, other]
    for layer in report["layers"]:
        assert layer["mutual_information"]["null_mean"] is None
        assert all(low is None for row in layer["knock_out"] for low in row["low"])
    assert any("too few" in note for note in report["notes"])


def test_an_empty_text(cli: Cli, moe_runs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    outcome = cli(
        "experts", "tiny-moe", "--runs-dir", str(moe_runs), "--text", str(tmp_path / "empty.txt")
    )
    assert outcome.code == 2
    assert "no token" in outcome.err


def test_a_text_too_short_to_tell_is_no_gate(cli: Cli, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("so foul")
    args = ("experts", str(copied), "--text", str(tmp_path / "short.txt"), "--no-save")
    assert cli(*args).code == 0
    outcome = cli(*args, "--fail-on", "dead", "--json")
    assert outcome.code == 2
    report: Any = outcome.json
    assert all(layer["dead"] is None for layer in report["layers"])
    assert "too short" in report["error"]["message"]


def test_a_file_s_name_may_be_anything(cli: Cli, copied: Path, tmp_path: Path) -> None:
    import os

    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff $x$\n.txt")
    Path(odd).write_text("so foul and fair a day I have not seen. " * 60)
    outcome = cli("experts", str(copied), "--text", odd, *SMALL, "--no-knock-out")
    assert outcome.code == 0, outcome.err
    kept = json.loads((copied / "experts.json").read_text())
    assert kept["domains"][0]["name"] == "\\udcff $x$\n.txt"


def test_what_can_not_be_kept_is_told_before_the_work(cli: Cli, copied: Path) -> None:
    (copied / "experts.html").mkdir()
    before = {path.name for path in copied.iterdir()}
    outcome = cli("experts", str(copied), *SMALL)
    assert outcome.code == 7
    assert "experts.html is a folder" in outcome.err
    assert {path.name for path in copied.iterdir()} == before


def test_only_files_are_read(cli: Cli, copied: Path, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        outcome = cli("experts", str(copied), "--text", str(place), *SMALL)
        assert outcome.code == 2
        assert "is no file" in outcome.err


def test_one_file_by_two_names_is_one_domain(
    cli: Cli, copied: Path, domains: list[str], tmp_path: Path
) -> None:
    again = str(tmp_path / "a" / ".." / "prose.txt")
    (tmp_path / "a").mkdir()
    outcome = cli("experts", str(copied), *domains[:2], "--text", again, *SMALL)
    assert outcome.code == 2
    assert "named twice" in outcome.err


def test_no_picture_of_another_step_stays(cli: Cli, copied: Path) -> None:
    assert cli("experts", str(copied), *SMALL, "--no-knock-out").code == 0
    assert (copied / "experts_over_time.png").exists()
    metrics = copied / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] >= 8]
    metrics.write_text("\n".join(rows) + "\n")
    assert cli("experts", str(copied), *SMALL, "--no-knock-out").code == 0
    assert not (copied / "experts_over_time.png").exists()
