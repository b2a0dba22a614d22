"""`valkyrie plan` as a shell sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Cli

LONG = str(TINY.with_name("long.yaml"))


def test_json_has_everything_that_was_promised(cli: Cli, cache: Path) -> None:
    outcome = cli("plan", str(TINY), "--json", "--memory", "24GiB")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["schema"] == "valkyrie.plan/1"
    assert set(report["parameters"]) == {"total", "active", "by_part"}
    flops = report["flops_per_token"]
    assert {"train", "decode", "by_mixer"} <= set(flops)
    assert flops["train"] == sum(one["train"] for one in flops["by_mixer"].values())
    assert [one["tokens"] for one in flops["decode_by_length"]] == [1024 << i for i in range(8)]
    size = report["bytes"]
    assert size["weights"] == 4 * report["parameters"]["total"]
    assert size["activations"]["kept"] > size["activations"]["recomputed"]
    assert size["peak"] >= size["weights"] + size["optimizer"]
    assert size["process_peak"] > size["peak"]
    here, *others = report["seconds"]
    assert not here["published"]
    assert here["step"] > here["step_at_peak"] > 0
    assert [one["name"] for one in others] == ["RTX 4090", "A100 80GB", "H100 SXM"]
    assert all(one["published"] and one["fits"] for one in others)
    assert report["fit"]["best"]["changes"] == []


def test_tables_fit_a_hundred_columns(
    cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    outcome = cli("plan", LONG)
    assert outcome.code == 0, outcome.err
    assert max(len(line.rstrip()) for line in outcome.out.splitlines()) <= 100
    for word in ("rwkv7", "channel_mix", "KV cache", "recomputed besides", "H100 SXM", "fits"):
        assert word in outcome.out
    assert "Traceback" not in outcome.err


def test_overrides_and_proposals(cli: Cli, cache: Path) -> None:
    whole = cli("plan", str(TINY), "--json", "--memory", "1GiB", "--set", "train.context_len=4096")
    assert whole.code == 0, whole.err
    needed = whole.json["bytes"]["process_peak"]
    assert whole.json["fit"]["best"]["changes"] == []
    less = cli(
        *("plan", str(TINY), "--json", "--set", "train.context_len=4096"),
        *("--memory", str(needed - 1)),
    )
    change = less.json["fit"]["best"]
    assert change["changes"] == ["train.grad_accum_steps=2"]
    assert change["needed"] < needed
    again = cli(
        *("plan", str(TINY), "--json", "--set", "train.context_len=4096"),
        *("--set", change["changes"][0]),
    )
    assert again.json["bytes"]["process_peak"] == change["needed"]


def test_nothing_fits(cli: Cli, cache: Path) -> None:
    outcome = cli("plan", str(TINY), "--memory", "1MiB")
    assert outcome.code == 0
    assert "Nothing fits" in outcome.out
    assert "MiB too" in outcome.out


@pytest.mark.parametrize("size", ["much", "-3GiB", "0", "24XB", "1e9", "GiB", ""])
def test_a_wrong_amount_of_memory_is_told(cli: Cli, size: str) -> None:
    outcome = cli("plan", str(TINY), f"--memory={size}")
    assert outcome.code == 2
    assert outcome.out == ""
    assert "memory" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_wrong_recipe_and_a_missing_one(cli: Cli) -> None:
    assert cli("plan", str(TINY), "--set", "model.dim=33").code == 3
    missing = cli("plan", "nowhere.yaml", "--json")
    assert missing.code == 4
    assert missing.json["schema"] == "valkyrie.plan/1"


def test_help_has_examples(cli: Cli) -> None:
    outcome = cli("plan", "--help")
    assert outcome.code == 0
    assert "valkyrie plan quickstart --memory" in outcome.out


def test_a_canvas_decodes_nothing(cli: Cli, cache: Path) -> None:
    canvas = str(TINY.with_name("canvas.yaml"))
    report = cli("plan", canvas, "--json").json
    assert report["crossover"] is None
    assert report["bytes"]["states"] == report["flops_per_token"]["decode_by_length"] == []
    assert {one["decode_tokens_per_second"] for one in report["seconds"]} == {None}
    drawn = cli("plan", canvas).out
    assert "answering FLOPs" in drawn
    for word in ("KV cache", "decod", "tok/s", "1 layers"):
        assert word not in drawn
