"""Sweeps: every combination once, with names that files can have."""

from __future__ import annotations

import pytest

from valkyrie_core.compare.matching import at_equal, on_one_text
from valkyrie_core.compare.vary import split_values, varied
from valkyrie_core.errors import RecipeError, UsageError


def test_a_grid() -> None:
    designs, keys = varied(
        "tiny/hybrid",
        ["train.clip_grad_norm=1,2", "model.core.pattern=[rwkv, attn],[rwkv, rwkv, attn]"],
    )
    assert keys == {"train.clip_grad_norm", "model.core.pattern"}
    assert [one.recipe.train.clip_grad_norm for one in designs] == [1, 1, 2, 2]
    assert [len(one.recipe.model.core.pattern) for one in designs] == [2, 3, 2, 3]
    assert designs[0].name == "clip_grad_norm-1-pattern-rwkv-attn"
    assert designs[1].source == (
        "tiny/hybrid --set train.clip_grad_norm=1 --set model.core.pattern=[rwkv, rwkv, attn]"
    )
    assert len({one.name for one in designs}) == 4


def test_names_are_told_apart() -> None:
    # by as much of a key as it takes
    designs, _ = varied(
        "tiny/hybrid", ["train.optimizer.lr=0.01,0.02", "train.optimizer.adamw.lr=0.01,0.02"]
    )
    assert designs[1].name == "optimizer.lr-0.01-adamw.lr-0.02"
    # and one design is not two
    with pytest.raises(UsageError, match="the same design as pattern-rwkv-attn"):
        varied("tiny/hybrid", ["model.core.pattern=[rwkv, attn],[rwkv,  'attn']"])
    with pytest.raises(UsageError, match="the same design"):
        varied("tiny/hybrid", ["train.optimizer.lr=0.01,1e-2"])


def test_commas_inside_brackets_and_quotes_are_no_ends() -> None:
    assert split_values("[a, b],[c]") == ["[a, b]", "[c]"]
    assert split_values('{x: 1, y: 2}, "a,b" ,3') == ["{x: 1, y: 2}", '"a,b"', "3"]
    assert split_values(",,") == []


@pytest.mark.parametrize(
    "vary",
    [
        ["train.optimizer.lr"],
        ["train.optimizer.lr=0.1"],
        ["=1,2"],
        ["seed=1,2"],
        ["data.tokenizer.vocab_size=300,400"],
        ["model.dim=32,32"],
        ["model.dim=32,64", "model.dim=16,8"],
        [f"model.dim={','.join(str(32 * n) for n in range(1, 40))}"],
    ],
)
def test_what_is_no_sweep(vary: list[str]) -> None:
    with pytest.raises(UsageError):
        varied("tiny/hybrid", vary)


def test_a_wrong_value_is_located() -> None:
    with pytest.raises(RecipeError, match=r"train\.stepz"):
        varied("tiny/hybrid", ["train.stepz=1,2"])


def test_a_varied_key_stays_and_tokens_stay_equal() -> None:
    designs, keys = varied("tiny/hybrid", ["train.batch_size=4,8"])
    recipes, notes = on_one_text(designs, 20, keys)
    assert [one.train.batch_size for one in recipes.values()] == [4, 8]
    assert notes == []
    equal, notes = at_equal(recipes, "tokens", {})
    assert [one.train.steps for one in equal.values()] == [20, 10]
    assert "equal tokens" in notes[0]


@pytest.mark.parametrize("key", ["train.steps", "train.eval_tokens", "train.track.type", "seed"])
def test_what_all_share_is_not_varied(key: str) -> None:
    with pytest.raises(UsageError, match="all designs of a comparison share it"):
        varied("tiny/hybrid", [f"{key}=4,8"])


def test_a_wrong_value_is_told_as_it_was_typed() -> None:
    with pytest.raises(RecipeError, match=r"--vary model\.nope=1"):
        varied("tiny/hybrid", ["model.nope=1,2"])
    with pytest.raises(RecipeError, match=r"with model\.dim=33"):
        varied("tiny/hybrid", ["model.dim=33,34"])
