"""`valkyrie routes` as a shell sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Cli

ROUTED = str(TINY.with_name("routed.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with routers, hard since its third step."""
    from valkyrie_core import Recipe, runs

    folder = tmp_path_factory.mktemp("routes")
    overrides = ["train.steps=20", "train.sample_prompts=[]", f"runs_dir={folder}"]
    runs.train(Recipe.load(ROUTED, overrides))
    return folder / "tiny-routed"


def test_a_prompt_is_told_token_by_token(cli: Cli, trained: Path) -> None:
    outcome = cli("routes", str(trained), "--prompt", "def f(x):\n", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["schema"] == "valkyrie.routes/1"
    assert report["tokens"] == ["<|doc|>", *"def f(x):", "\\n"]
    first, second = report["routers"]
    assert (first["mixers"], second["mixers"]) == (["rwkv", "attn", "skip"], ["rwkv", "attn"])
    assert first["hard"]
    for one in (first, second):
        assert len(one["likeliest"]) == len(one["used"]) == len(report["tokens"])
        for best, used in zip(one["likeliest"], one["used"], strict=True):
            assert best in used or not one["hard"]
        counts = [sum(m in used for used in one["used"]) for m in range(len(one["mixers"]))]
        if one["hard"]:
            shares = [count / len(report["tokens"]) for count in counts]
            assert list(one["share"].values()) == pytest.approx(shares)
    assert (trained / "routes.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_text_and_a_file_are_drawn(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (trained / "routes.png").unlink(missing_ok=True)
    outcome = cli("routes", str(trained), "--tokens", "90", "--no-save")
    assert outcome.code == 0, outcome.err
    assert "91 tokens of python" in outcome.out
    for word in ("layer 0 (chosen), hard: rwkv, attn, skip", "operations", "skip"):
        assert word in outcome.out
    assert not (trained / "routes.png").exists()
    story = tmp_path / "story.txt"
    story.write_text("Once upon a [bold]time[/bold] there was $x$.\x1b[31m", encoding="utf-8")
    outcome = cli("routes", str(trained), "--text", str(story))
    assert outcome.code == 0, outcome.err
    assert "[bold]time[/bold]" in outcome.out
    assert "\x1b[31m" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--text", "nowhere.txt"), 4, "nowhere.txt"),
        (("--prompt", ""), 2, "no text"),
        (("--prompt", "a", "--text", "b"), 2, "not both"),
        (("--tokens", "0"), 2, "tokens"),
        (("--step", "7"), 4, "7"),
    ],
)
def test_mistakes_are_told(
    cli: Cli, trained: Path, arguments: tuple[str, ...], code: int, word: str
) -> None:
    outcome = cli("routes", str(trained), *arguments)
    assert outcome.code == code
    assert outcome.out == ""
    assert word in outcome.err
    assert "Traceback" not in outcome.err


def test_a_run_without_routers_is_told(cli: Cli, tmp_path: Path) -> None:
    from valkyrie_core import Recipe, runs

    overrides = ["train.steps=1", "train.sample_prompts=[]", f"runs_dir={tmp_path}"]
    runs.train(Recipe.load(TINY, overrides))
    outcome = cli("routes", str(next(tmp_path.iterdir())))
    assert outcome.code == 2
    assert "tiny/routed" in outcome.err
