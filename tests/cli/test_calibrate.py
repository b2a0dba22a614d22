"""`valkyrie calibrate`, and `valkyrie eval` of models with depths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from valkyrie_cli.thinking_tables import shown

CANVAS = """\
name: {name}
runs_dir: {runs}
data:
  corpora:
    khop:
      type: questions
      task: {{type: khop, symbols: 4, hops: [1]}}
      examples: 40
      validation_examples: 40
      holdout: {{type: questions, fraction: 0.5}}
  tokenizer: {{type: bytes}}
model:
  dim: 8
  core:
    type: {core}
    blocks: {{attn: {{mixer: {{type: attention, num_heads: 2}}, ffn: {{type: swiglu}}}}}}
    pattern: [attn]
    {more}
train: {{steps: 4, batch_size: 4, {length}log_every: 1, eval_tokens: 256}}
"""
KINDS = {
    "canvas": ("canvas", "{cells: 18, h_cycles: 1, l_cycles: 1, halt_max_steps: 3}", ""),
    "loops": ("recursive", "{loops: 3, halting: {type: confidence}}", "context_len: 32, "),
    "plain": ("stack", "{}", "context_len: 32, "),
}


@pytest.fixture(scope="module", params=["canvas", "loops"])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a model with depths."""
    return trained(request.param, tmp_path_factory.mktemp("deep"))


def written(kind: str, folder: Path, name: str = "small") -> Path:
    """A small recipe of that kind."""
    core, settings, length = KINDS[kind]
    more = (
        "\n    ".join(settings.strip("{}").split(", "))
        if kind != "loops"
        else ("loops: 3\n    halting: {type: confidence}")
    )
    path = folder / f"{kind}.yaml"
    path.write_text(
        CANVAS.format(name=name, runs=folder / "runs", core=core, more=more, length=length)
    )
    return path


def trained(kind: str, folder: Path) -> Path:
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    runs.train(Recipe.load(written(kind, folder)))
    return folder / "runs" / "small"


def test_no_threshold_holds_with_few_questions(cli: Cli, deep: Path) -> None:
    outcome = cli("calibrate", str(deep))
    assert outcome.code == 0
    assert "No threshold holds a risk of 2.0%, so full depth is kept: it takes 149 questions" in (
        " ".join(outcome.out.split())
    )
    kept = json.loads((deep / "calibration.json").read_text())
    assert kept["rule"] is None
    # and eval goes by it: nothing ends early
    scores = json.loads(cli("eval", str(deep), "--json").out)
    assert scores["corpora"]["khop"]["thinking"]["halting"] is None


def test_a_threshold_is_kept_and_gone_by(cli: Cli, deep: Path) -> None:
    report = json.loads(cli("calibrate", str(deep), "--risk", "0.5", "--json").out)
    assert report["schema"] == "valkyrie.calibrate/1"
    # questions that come twice are dropped
    assert 15 <= report["test"]["rows"] <= report["rows"] <= 20
    assert report["tried"][0]["holds"]
    assert 0 < report["threshold"] < 1
    assert report["test"]["full_score"] is not None
    scores = json.loads(cli("eval", str(deep), "--json").out)
    halting = scores["corpora"]["khop"]["thinking"]["halting"]
    assert halting["calibrated_risk"] == 0.5
    assert halting["rule"].startswith("confidence=")
    assert sum(halting["steps"].values()) == pytest.approx(1)
    human = cli("eval", str(deep)).out
    assert "calibrated: risk at most 50.0%" in " ".join(human.split())
    # the promise is about the rule as it was calibrated, and about no other weights
    for options in (("--min-depth", "2"), ("--max-depth", "2"), ("--weights", "int8")):
        told = json.loads(cli("eval", str(deep), *options, "--json").out)
        halting = told["corpora"]["khop"]["thinking"]["halting"]
        assert halting["rule"].startswith("confidence=")
        assert halting["calibrated_risk"] is None
        if options[0] == "--min-depth":
            assert halting["steps"]["1"] == 0


def test_nothing_is_kept_where_nothing_is_asked_for(cli: Cli, deep: Path) -> None:
    (deep / "calibration.json").unlink(missing_ok=True)
    assert cli("calibrate", str(deep), "--no-save").code == 0
    assert not (deep / "calibration.json").exists()
    outcome = cli("eval", str(deep), "--halt", "calibrated")
    assert outcome.code == 4
    assert f"valkyrie calibrate {deep}" in outcome.err


def test_other_weights_are_not_what_was_calibrated(cli: Cli, deep: Path) -> None:
    cli("calibrate", str(deep), "--risk", "0.5")
    kept = json.loads((deep / "calibration.json").read_text())
    (deep / "calibration.json").write_text(json.dumps({**kept, "checkpoint": "another"}))
    outcome = cli("eval", str(deep), "--json")
    assert "was calibrated for other weights" in outcome.err
    assert (
        json.loads(outcome.out)["corpora"]["khop"]["thinking"]["halting"]["rule"] != (kept["rule"])
    )
    (deep / "calibration.json").write_text("{")
    assert "can't be read: the recipe's own rule" in cli("eval", str(deep)).err
    (deep / "calibration.json").unlink()


def test_depths_are_scored_one_by_one(cli: Cli, deep: Path) -> None:
    args = ("eval", str(deep), "--halt", "kl=0.01", "--min-depth", "2", "--max-depth", "5")
    thinking = json.loads(cli(*args, "--json").out)["corpora"]["khop"]["thinking"]
    assert list(thinking["by_depth"]) == ["1", "2", "3", "4", "5"]
    assert thinking["full_depth"] == 3
    assert thinking["halting"]["steps"]["1"] == 0
    assert thinking["halting"]["reasoning_steps"] >= 2
    assert thinking["calibration_error"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--halt", "entropy"), "there is no rule of halting 'entropy'"),
        (("--halt", "argmax=1"), "'argmax=1' is no rule of halting"),
        (("--halt", "kl="), "'kl=' is no rule of halting"),
        (("--halt", "kl", "--max-depth", "1"), "what thinks once can't end earlier"),
        (("--halt", "none", "--min-depth", "2"), "nothing ends early: leave out --min-depth"),
        (("--min-depth", "9"), "--min-depth 9 is more than the 3 there are"),
        (("--min-depth", "3", "--max-depth", "2"), "--min-depth 3 is more than the 2 there are"),
    ],
)
def test_wrong_depths_are_told(
    cli: Cli, deep: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = cli("eval", str(deep), *options)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())


def test_a_model_without_depths_has_none(
    cli: Cli, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = trained("plain", tmp_path_factory.mktemp("plain"))
    assert json.loads(cli("eval", str(plain), "--json").out)["corpora"]["khop"]["thinking"] is None
    for args in (("eval", str(plain), "--halt", "kl"), ("eval", str(plain), "--max-depth", "2")):
        outcome = cli(*args)
        assert outcome.code == 2
        assert "has no depths" in " ".join(outcome.err.split())
    outcome = cli("calibrate", str(plain))
    assert outcome.code == 2
    assert "no confidence" in " ".join(outcome.err.split())


def test_the_headline_is_that_of_the_depth(cli: Cli, deep: Path) -> None:
    def asked(*options: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            cli("eval", str(deep), "--halt", "none", *options, "--json").out
        )["corpora"]["khop"]
        return found

    full = asked()
    for depth in (1, 2, 3):
        own = asked("--max-depth", str(depth))
        assert own["accuracy"]["share"] == full["thinking"]["by_depth"][str(depth)]
        assert (own["thinking"] is None) == (depth == 1)
    assert asked("--max-depth", "1")["bpb"] != full["bpb"]


def test_thinking_once_leaves_nothing_to_end(
    cli: Cli, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    folder = tmp_path_factory.mktemp("once")
    runs.train(Recipe.load(written("canvas", folder), ["model.core.halt_max_steps=1"]))
    once = str(folder / "runs" / "small")
    outcome = cli("calibrate", once)
    assert outcome.code == 2
    assert "thinks once" in " ".join(outcome.err.split())
    assert cli("eval", once, "--halt", "q_halt").code == 2
    longer = json.loads(cli("eval", once, "--max-depth", "3", "--json").out)
    assert list(longer["corpora"]["khop"]["thinking"]["by_depth"]) == ["1", "2", "3"]


@pytest.mark.parametrize("option", ["--risk", "--delta"])
def test_a_risk_is_a_share(cli: Cli, deep: Path, option: str) -> None:
    outcome = cli("calibrate", str(deep), option, "1.5")
    assert outcome.code == 2
    assert "is a share between 0 and 1, not 1.5" in " ".join(outcome.err.split())


def test_designs_with_depths_are_compared(cli: Cli, tmp_path: Path) -> None:
    paths = [str(written(kind, tmp_path, name=kind)) for kind in KINDS]
    out = tmp_path / "out"
    command = ("compare", *reversed(paths), "--seeds", "2", "--out", str(out), "--json")
    outcome = cli(*command, "--runs-dir", str(tmp_path / "runs"))
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    plain, loops, canvas = report["contenders"]
    assert plain["depths"] == {}
    assert list(loops["depths"]["khop"]["by_depth"]) == ["1", "2", "3"]
    assert sum(canvas["depths"]["khop"]["ended"].values()) == pytest.approx(1)
    assert canvas["depths"]["khop"]["early"] is not None
    # a canvas keeps its own rows: cells instead of a context
    assert canvas["tokens"] == pytest.approx(plain["tokens"], rel=0.2)
    page = (out / "comparison.md").read_text()
    assert "## Right answers, by depth" in page
    assert "By its own rule `canvas` ends after" in page
    again = cli(*command, "--runs-dir", str(tmp_path / "runs"))
    kept = [json.loads(one.out) for one in (outcome, again)]
    assert kept[0]["contenders"] == kept[1]["contenders"]


def test_tokens_halt_while_text_is_written(
    cli: Cli, tmp_path_factory: pytest.TempPathFactory
) -> None:
    loops = trained("loops", tmp_path_factory.mktemp("loops"))
    ask = ("generate", str(loops), "--prompt", "ab bc: a1=", "--max-tokens", "8", "--temperature")
    full = json.loads(cli(*ask, "0", "--json").out)["text"]
    never = cli(*ask, "0", "--halt", "latent=0.0000001", "--json")
    assert json.loads(never.out)["text"] == full
    assert cli(*ask, "0", "--halt", "latent=1000", "--json").code == 0
    assert cli(*ask, "0", "--halt", "q_halt").code == 2
    assert cli(*ask, "0", "--halt", "calibrated").code == 4
    spoken = cli("chat", str(loops), "--halt", "kl=0.1", "--max-tokens", "4", stdin="hi\n")
    assert spoken.code == 0, spoken.err


def test_a_canvas_answers_a_question(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> None:
    canvas = trained("canvas", tmp_path_factory.mktemp("canvas"))
    answered = json.loads(cli("generate", str(canvas), "--prompt", "ab ba: a1=", "--json").out)
    assert answered["sampling"]["temperature"] == 0
    assert "\n" not in answered["text"]
    long = cli("generate", str(canvas), "--prompt", "a" * 40)
    assert long.code == 2
    assert "the question has 40 tokens, and the canvas 18 cells" in " ".join(long.err.split())
    for options in (("--temperature", "0.5"), ("--halt", "kl"), ("--max-tokens", "3")):
        outcome = cli("generate", str(canvas), "--prompt", "ab", *options)
        assert outcome.code == 2
        assert "a canvas gives its likeliest answer" in " ".join(outcome.err.split())
    for command in (("chat", str(canvas)), ("experts", str(canvas)), ("read", str(canvas), "x")):
        outcome = cli(*command, stdin="hi\n")
        assert outcome.code in (2, 4), outcome.err
    outcome = cli("eval", str(canvas), "--long-context", "512")
    assert outcome.code == 2
    assert "answer canvas" in " ".join(outcome.err.split())


def test_of_many_depths_some_are_shown() -> None:
    assert shown([1, 2, 3]) == [1, 2, 3]
    many = shown(list(range(1, 41)))
    assert len(many) == 10
    assert (many[0], many[-1]) == (1, 40)
    assert many == sorted(set(many))


def test_a_confidence_that_drives_routers_is_calibrated_as_well(cli: Cli, tmp_path: Path) -> None:
    from valkyrie_core import runs
    from valkyrie_core.recipe import Recipe

    recipe = Path(__file__).parents[2] / "recipes" / "tiny" / "sure.yaml"
    runs.train(Recipe.load(str(recipe), [f"runs_dir={tmp_path}"]))
    run = str(tmp_path / "tiny-sure")
    report = cli("calibrate", run, "--risk", "0.5", "--json").json
    assert report["then"] == "cheapest"
    assert report["threshold"] is not None
    assert json.loads((Path(run) / "calibration.json").read_text())["rule"]["then"] == "cheapest"
    halting = cli("eval", run, "--json").json["corpora"]["khop"]["thinking"]["halting"]
    assert (halting["then"], halting["calibrated_risk"]) == ("cheapest", 0.5)
    assert "go on through the cheapest mixers" in " ".join(cli("eval", run).out.split())
    assert "tokens take the cheapest mixers" in " ".join(
        cli("calibrate", run, "--risk", "0.5").out.split()
    )
    # what is sure skips: fewer operations in every loop after the first
    prompt = ("--prompt", "ab bc ca: a1=", "--no-save", "--json")
    plain = cli("routes", run, *prompt).json["routers"]
    driven = cli("routes", run, *prompt, "--halt", "confidence=0.0001").json["routers"]
    assert [one["share"] for one in plain[:1]] == [one["share"] for one in driven[:1]]
    for one in driven[1:]:
        # but for the first token
        assert one["share"]["skip"] == 1
        assert one["share"]["attn"] == pytest.approx(1 / 14)
    ends = cli("routes", run, *prompt, "--halt", "latent=0.1")
    assert ends.code == 2
    assert "leave the loops" in ends.json["error"]["message"]
