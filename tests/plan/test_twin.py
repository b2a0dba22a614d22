"""The crossover against brute force, and what the twin is made of."""

from __future__ import annotations

import pytest

from tests.nn.menu import CONFIGS, hybrid_config, model_config
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.plan import flops
from valkyrie_core.plan.parameters import weightless
from valkyrie_core.plan.twin import LONGEST, attention_twin, first_win


def brute_force(config: ModelConfig, most: int) -> int | None:
    ours, theirs = weightless(config), weightless(attention_twin(config).config)
    wins = [
        sum(flops.decoding_flops(ours, n).values()) < sum(flops.decoding_flops(theirs, n).values())
        for n in range(1, most + 1)
    ]
    if not wins[-1]:
        return None
    return 1 + max((n for n, won in enumerate(wins, 1) if not won), default=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_crossover_is_that_of_brute_force(config: ModelConfig) -> None:
    ours, theirs = weightless(config), weightless(attention_twin(config).config)
    found = first_win(
        lambda n: sum(flops.decoding_flops(ours, n).values()),
        lambda n: sum(flops.decoding_flops(theirs, n).values()),
    )
    expected = brute_force(config, 120)
    assert found == expected or (expected is None and (found is None or found > 120))


def test_never_from_the_first_token_and_later() -> None:
    assert first_win(lambda n: n, lambda n: n) is None
    assert first_win(lambda n: 1, lambda n: 1 + n) == 1
    assert first_win(lambda n: 1000, lambda n: 10 * n) == 101
    assert first_win(lambda n: LONGEST, lambda n: n) is None


def test_the_twin_takes_the_recipes_own_attention() -> None:
    twin = attention_twin(hybrid_config("rra"))
    assert twin.replaced == 2
    blocks = twin.config.core.blocks
    assert blocks["r"] == blocks["a"] == hybrid_config("rra").core.blocks["a"]
    assert "'a'" in twin.description


def test_windows_fall_away() -> None:
    twin = attention_twin(model_config("attention-window"))
    assert twin.replaced == 2
    assert twin.config.core.blocks["block"].mixer.window is None  # type: ignore[union-attr]
    assert attention_twin(model_config("attention")).replaced == 0


@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (192, 3), (2560, 40), (96, 2), (7, 1)])
def test_heads_are_as_near_to_64_as_they_can(dim: int, heads: int) -> None:
    config = model_config("rwkv7").model_copy(update={"dim": dim})
    mixer = attention_twin(config).config.core.blocks["block"].mixer
    assert mixer.num_heads == heads  # type: ignore[union-attr]
