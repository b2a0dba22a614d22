"""Designs are made comparable, and what was changed is said."""

from __future__ import annotations

import pytest

from valkyrie_core.compare.contenders import Contender
from valkyrie_core.compare.matching import at_equal, flops_of, on_one_text, trials
from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.plan.parameters import weightless
from valkyrie_core.recipe import Recipe


def designs(*changes: str, second: str = "tiny/rwkv7") -> list[Contender]:
    first, other = Recipe.load("tiny/hybrid"), Recipe.load(second, list(changes))
    return [Contender("a", "tiny/hybrid", first), Contender("b", second, other)]


def test_all_read_the_first_one_s_text() -> None:
    both = designs("train.batch_size=2", "train.context_len=32", "train.steps=9", second="moe")
    recipes, notes = on_one_text(both, None)
    a, b = recipes["a"], recipes["b"]
    assert b.data == a.data
    assert b.model.vocab_size == a.model.vocab_size == a.data.tokenizer.vocab_size
    assert (b.train.batch_size, b.train.context_len) == (a.train.batch_size, a.train.context_len)
    assert (b.train.steps, b.train.eval_every) == (a.train.steps, a.train.eval_every)
    # its own are its model, its optimizer and its schedule
    assert b.model.core == both[1].recipe.model.core
    assert b.train.optimizer == both[1].recipe.train.optimizer
    assert notes[0] == "b reads a's text, with its tokenizer"
    assert "batch_size 2 -> " in notes[1]
    assert "steps 9 -> 20" in notes[1]


def test_what_stays_unequal_is_said() -> None:
    recipes, notes = on_one_text(designs("train.precision=fp32", "train.grad_accum_steps=2"), None)
    assert any("b trains on auto in fp32" in note for note in notes)
    assert recipes["b"].train.grad_accum_steps == 2
    # parts that do not divide the batch are no part of a design
    recipes, notes = on_one_text(designs("train.batch_size=6", "train.grad_accum_steps=3"), None)
    assert recipes["b"].train.grad_accum_steps == 1
    assert any("grad_accum_steps 3 -> 1" in note for note in notes)
    _, notes = at_equal(on_one_text(designs(), 10)[0], "tokens", {})
    assert any("warms up for" in note for note in notes) == (
        designs()[0].recipe.train.schedule.warmup_steps > 2
    )


def test_what_can_not_be_compared() -> None:
    with pytest.raises(UsageError, match=r"b has train\.fit"):
        on_one_text(designs("train.fit={}"), None)
    with pytest.raises(MissingError, match="nowhere"):
        on_one_text(designs("train.init_from=nowhere"), None)


def test_flops_are_those_of_every_stage() -> None:
    stretched = Recipe.load(
        "tiny/hybrid",
        ["train.steps=10", "train.context_schedule=[{from_fraction: 0.5, context_len: 128}]"],
    )
    short = Recipe.load("tiny/hybrid", ["train.steps=10"])
    assert flops_of(stretched) > 1.02 * flops_of(short)


def test_short_trainings_have_a_curve() -> None:
    first = Contender("a", "x", Recipe.load("tiny/hybrid", ["train.eval_every=500"]))
    both = [first, *designs()[1:]]
    recipes, _ = on_one_text(both, 100)
    assert {one.train.eval_every for one in recipes.values()} == {10}


def test_equal_recipes_need_no_notes() -> None:
    recipes, notes = on_one_text(designs(second="tiny/hybrid"), None)
    assert notes == []
    assert recipes["a"] == recipes["b"]
    recipes, _ = on_one_text(designs(), 7)
    assert {one.train.steps for one in recipes.values()} == {7}


def test_equal_flops_and_equal_seconds_are_steps() -> None:
    recipes, _ = on_one_text(designs(), 100)
    equal, notes = at_equal(recipes, "flops", {})
    ratio = flops_of(recipes["a"]) / flops_of(recipes["b"])
    assert equal["a"] == recipes["a"]
    assert equal["b"].train.steps == round(100 * ratio)
    assert "equal FLOPs" in notes[0]
    equal, notes = at_equal(recipes, "seconds", {"a": 0.3, "b": 0.1})
    assert equal["b"].train.steps == 300
    assert "equal seconds" in notes[0]
    assert at_equal(recipes, "tokens", {}) == (recipes, [])


def test_equal_parameters_are_another_width() -> None:
    recipes, _ = on_one_text(designs(), None)
    equal, notes = at_equal(recipes, "params", {})
    sizes = [weightless(one.model).num_parameters() for one in equal.values()]
    assert abs(sizes[1] / sizes[0] - 1) < 0.01
    assert equal["b"].train.steps == recipes["b"].train.steps
    assert "hidden_dim resized" in notes[0]


def test_trials_come_seed_by_seed() -> None:
    both = designs("seed=40")
    recipes, _ = on_one_text(both, None)
    todo = trials(recipes, both, range(2), "elsewhere", "text")
    # the reference's seeds: a pair reads the same in the same order
    assert [(one.contender, one.seed) for one in todo] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert all(one.recipe.runs_dir == "elsewhere/compare" for one in todo)
    assert all(one.recipe.seed == one.seed for one in todo)
    assert len({one.recipe.name for one in todo}) == 4
    # another budget is another run
    shorter, _ = on_one_text(both, 3)
    assert not {one.recipe.name for one in todo} & {
        one.recipe.name for one in trials(shorter, both, range(2), "runs", "text")
    }
    # and another text is another one, too
    assert not {one.recipe.name for one in todo} & {
        one.recipe.name for one in trials(recipes, both, range(2), "elsewhere", "another")
    }


def test_a_design_against_itself_has_seeds_of_its_own() -> None:
    both = designs("seed=7", second="tiny/hybrid")
    recipes, _ = on_one_text(both, None)
    todo = trials(recipes, both, range(3), "runs", "text")
    assert [one.seed for one in todo if one.contender == "a"] == [0, 1, 2]
    assert [one.seed for one in todo if one.contender == "b"] == [3, 4, 5]


def test_routers_are_matched_by_what_their_budget_will_be() -> None:
    found = {}
    for budget, soft in ((1.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.5, 0.5)):
        mixer = "model.core.blocks.layer.mixer"
        overrides = [f"{mixer}.budget.flops={budget}", f"{mixer}.soft_share={soft}"]
        found[budget, soft] = flops_of(Recipe.load("routing", overrides))
    assert found[0.5, 0.0] < found[1.0, 0.0] < found[0.5, 1.0]
    assert found[0.5, 0.0] < found[0.5, 0.5] < found[0.5, 1.0]
