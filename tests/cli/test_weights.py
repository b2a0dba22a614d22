"""--weights: fewer bits for speed, and their cost measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_eval_measures_what_the_weights_cost(cli: Cli, runs_dir: Path, weights: str) -> None:
    common = ("eval", "--runs-dir", str(runs_dir))
    report = cli(*common, "--weights", weights, "--json").json
    assert report["weights"] == weights
    (score,) = report["corpora"].values()
    assert score["weights_cost_bpb"] == pytest.approx(score["bpb"] - score["fp32_bpb"], abs=1e-12)
    # it was measured with other weights, which cost little
    assert 0 < abs(score["weights_cost_bpb"]) < 0.05
    plain = cli(*common, "--weights", weights)
    assert f"{weights} costs {score['weights_cost_bpb']:+.5f}" in plain.out
    assert f"{score['fp32_bpb']:.4f}" in plain.out


def test_the_weights_as_trained_are_not_scored_twice(cli: Cli, runs_dir: Path) -> None:
    report = cli("eval", "--runs-dir", str(runs_dir), "--json").json
    assert report["weights"] == "fp32"
    (score,) = report["corpora"].values()
    assert score["fp32_bpb"] is None
    assert score["weights_cost_bpb"] is None


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_generate_and_chat_take_weights(cli: Cli, runs_dir: Path, weights: str) -> None:
    common = ("--runs-dir", str(runs_dir), "--weights", weights, "--max-tokens", "8", "--json")
    outcome = cli("generate", "--prompt", "x", *common)
    assert outcome.code == 0, outcome.err
    assert outcome.json["weights"] == weights
    assert 0 < outcome.json["tokens"] <= 8
    outcome = cli("chat", *common, stdin="Hello\nAgain\n")
    assert outcome.code == 0, outcome.err
    assert outcome.json["weights"] == weights
    assert len(outcome.json["turns"]) == 2


def test_other_weights_are_a_usage_error(cli: Cli, runs_dir: Path) -> None:
    outcome = cli("generate", "-p", "x", "--weights", "int4", "--runs-dir", str(runs_dir), "--json")
    assert outcome.code == 2
    assert "int4" in outcome.json["error"]["message"]
    assert "'fp32', 'bf16', 'int8'" in outcome.json["error"]["message"]
