"""A whole search with made-up scores, and the recipe it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.allocate.small import SEARCH, tiny
from valkyrie_core import runs
from valkyrie_core.allocate.proxy import Job, Score, proxy_model
from valkyrie_core.allocate.search import (
    SearchConfig,
    expected_steps,
    feasible,
    search,
    search_config,
)
from valkyrie_core.errors import UsageError
from valkyrie_core.plan.parameters import weightless
from valkyrie_core.recipe import Recipe, resolve

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def fake(job: Job) -> Score:
    """Loss nearly flat, recall wherever there is attention, a little noise by seed."""
    noise = 0.001 * (-1) ** (job.seed + job.candidate.count("R"))
    shares = {4: 0.99 - noise, 32: 0.99 - noise} if "A" in job.candidate else {4: 0.3, 32: 0.1}
    if job.task == "language":
        return Score(job=job, parameters=1, bpb=2.0 + noise, seconds=1.0)
    return Score(job=job, parameters=1, recall=shares, seconds=1.0)


def test_halving_keeps_baselines_and_ends_with_more_seeds() -> None:
    recipe = Recipe.load(QUICKSTART)
    config = SearchConfig()
    rungs: list[list[Job]] = []

    def train(jobs: Sequence[Job]) -> list[Score]:
        rungs.append(list(jobs))
        return [fake(job) for job in jobs]

    found = search(recipe, config, train)
    names = [{job.candidate for job in jobs} for jobs in rungs]
    assert len(names[0]) == 8
    assert names[0] > names[1] >= names[2] >= {"RRRR", "AAAA"}
    assert [len({job.seed for job in jobs}) for jobs in rungs] == [1, 2, 3]
    assert [max(job.steps for job in jobs) for jobs in rungs] == sorted(
        max(job.steps for job in jobs) for jobs in rungs
    )
    # attention recalls, one layer of it reads the fewest bytes
    assert found.choice.name in ("RRRA", "RARR")
    assert {one.name for _, one in found.scored} == names[0]
    assert all(len({job.file for job in jobs}) == len(jobs) for jobs in rungs)
    made = sum(job.steps for jobs in rungs for job in jobs)
    assert made <= expected_steps(8, 2, config, 1) < 2 * made


def test_another_recipe_or_another_search_has_another_folder() -> None:
    recipe, config = Recipe.load(QUICKSTART), SearchConfig()
    names = {
        config.folder_name(recipe),
        config.folder_name(Recipe.load(QUICKSTART, ["train.optimizer.lr=0.01"])),
        search_config(steps=7).folder_name(recipe),
        search_config(seeds=7).folder_name(recipe),
    }
    assert len(names) == 4
    assert config.folder_name(recipe) == search_config().folder_name(Recipe.load(QUICKSTART))


def test_proxies_of_one_task_are_equally_large() -> None:
    recipe = Recipe.load(QUICKSTART)
    for task in ("language", "recall"):
        sizes = set()
        for name in ("RRRR", "RRRA", "AAAA"):
            job = Job(
                candidate=name, layers=tuple(name), window=None, task=task, rung=1, seed=0, steps=1
            )
            model = proxy_model(recipe, job, SearchConfig().proxy)
            assert len(model.core.layers) == 4
            sizes.add(weightless(model).num_parameters())
        assert max(sizes) / min(sizes) < 1.01


def test_what_is_beaten_within_its_rung_is_not_marked() -> None:
    recipe = Recipe.load(QUICKSTART)
    found = search(recipe, SearchConfig(), lambda jobs: [fake(job) for job in jobs])
    # attention in half of the layers recalls no more than in a quarter, and reads more
    assert "RARA" in {one.name for rung, one in found.scored if rung == 1}
    assert (1, "RARA") not in found.unbeaten
    assert {name for rung, name in found.unbeaten if rung == 1} & {"RRRA", "RARR", "RRAR"}


SMALL_FFNS = [
    "model.core.blocks.rwkv.ffn.hidden_dim=8",
    "model.core.blocks.attn.ffn.hidden_dim=8",
]


def test_layouts_that_can_t_be_as_large_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe.load(QUICKSTART, SMALL_FFNS)
    # mixers of RWKV-7 are larger than those of attention, and there is no ffn to make up for it
    assert "RRRR" not in {one.name for one in feasible(recipe, SearchConfig())}
    assert caplog.messages[0].startswith("RRRR is left out: without any ffn")
    block = "{mixer: {type: attention, num_heads: 4}, ffn: {type: swiglu, hidden_dim: 8}}"
    one_layer = [f"model.core.blocks={{attn: {block}}}", "model.core.pattern=[attn]"]
    with pytest.raises(UsageError, match="nothing to compare"):
        feasible(Recipe.load("tiny/transformer", one_layer), SearchConfig())
    whole = Recipe.load(QUICKSTART)
    assert len(feasible(whole, SearchConfig())) == 8


def test_scores_of_other_texts_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path / "cache"))
    tiny(tmp_path).save(tmp_path / "small.json")
    resolved = resolve(tmp_path / "small.json")
    runs.allocate_search(resolved, SEARCH, out=tmp_path / "one.yaml")
    (tmp_path / "texts" / "03.txt").write_text("Something else.")
    with pytest.raises(UsageError, match="the texts are not those"):
        runs.allocate_search(resolved, SEARCH, out=tmp_path / "two.yaml")


def test_a_file_in_the_way_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    tiny(tmp_path).save(tmp_path / "small.json")
    (tmp_path / "file").write_text("")
    resolved = resolve(tmp_path / "small.json")
    with pytest.raises(UsageError, match="is no folder"):
        runs.allocate_search(resolved, SEARCH, out=tmp_path / "file" / "new.yaml")
    assert not (tmp_path / "runs").exists()


def test_windows_shrink_with_their_context() -> None:
    recipe = Recipe.load(QUICKSTART.with_name("long_context.yaml"))
    job = Job(
        candidate="RRRW", layers=tuple("RRRA"), window=256, task="recall", rung=1, seed=0, steps=1
    )
    mixer = proxy_model(recipe, job, SearchConfig().proxy).core.blocks["attn"].mixer
    # 256 of 512 tokens are 64 of 128
    assert mixer.type == "attention"
    assert mixer.window == 64


def test_a_search_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path / "cache"))
    tiny(tmp_path).save(tmp_path / "small.json")
    resolved = resolve(tmp_path / "small.json")
    told: list[int] = []
    out = tmp_path / "out.yaml"
    report = runs.allocate_search(
        resolved, SEARCH, out=out, told=lambda _score, done, _eta: told.append(done)
    )
    assert told == list(range(1, report.trainings + 1))
    last = [one for one in report.candidates if one.rung == 2]
    assert {"RR", "AA"} <= {one.candidate for one in last}
    assert all(one.bpb.seeds == 2 and one.bpb.half_width is not None for one in last)
    assert out.exists() == (report.chosen is not None)
    folder = Path(report.folder)
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "search.md").read_text()
    assert "| RR |" in page or "| **RR** |" in page
    # nothing is left to train: the answer is the same, and no file is written over
    out.unlink(missing_ok=True)
    again = runs.allocate_search(resolved, SEARCH, out=out)
    assert again.candidates == report.candidates
    if out.exists():
        with pytest.raises(UsageError, match="exists"):
            runs.allocate_search(resolved, SEARCH, out=out)


def test_the_chosen_recipe_is_written_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkyrie_core.runs import search as runs_search

    monkeypatch.setenv("VALKYRIE_CACHE", str(tmp_path / "cache"))
    tiny(tmp_path).save(tmp_path / "small.json")
    resolved = resolve(tmp_path / "small.json")

    def complete(jobs: Sequence[Job], *_: object, **__: object) -> list[Score]:
        return [fake(job) for job in jobs]

    monkeypatch.setattr(runs_search, "complete", complete)
    report = runs.allocate_search(resolved, SEARCH, out=tmp_path / "new.yaml")
    assert report.chosen == "RA"
    text = (tmp_path / "new.yaml").read_text()
    assert text.startswith("# small, its layers chosen by `valkyrie allocate --search`: RA.")
    loaded = Recipe.load(tmp_path / "new.yaml")
    assert loaded.name == "small-allocated"
    assert [loaded.model.core.blocks[x].mixer.type for x in loaded.model.core.layers] == [
        "rwkv7",
        "attention",
    ]
