from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.nn.menu import awake, hybrid_config
from valkyrie_core.data.tokenizer import NUM_RESERVED
from valkyrie_core.infer.engine import Engine
from valkyrie_core.infer.sampling import SamplingConfig, make_generator
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state import num_bytes

END = 4
GREEDY = SamplingConfig(temperature=0)
HOT = SamplingConfig(temperature=1.5, top_p=1.0, repetition_penalty=1.3, seed=7)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return awake(hybrid_config())


def tokens_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(NUM_RESERVED, 23, (length,), generator=generator).tolist()


def alone(
    model: HybridLM, prompt: list[int], sampling: SamplingConfig, row: int, count: int
) -> list[int]:
    """The answer of row `row` of a batch, drawn by itself, from a full forward per token."""
    generator = make_generator(sampling.seed, row)
    engine = Engine(model)
    known = engine.prefill(torch.tensor([prompt]), model.init_state(1))
    assert known is not None
    drawn = engine.continue_from(
        known, sampling, generator, max_tokens=count, stop_ids=(END,), history=prompt
    )
    return [token.id for token in drawn]


@pytest.mark.parametrize("chunk_len", [1, 3, 16, 512])
def test_prefill_in_chunks_equals_one_forward(model: HybridLM, chunk_len: int) -> None:
    tokens_BT = torch.tensor([tokens_of(16), tokens_of(16, 1)])
    with torch.no_grad():
        expected = model(tokens_BT, model.init_state(2)).logits_BTV[:, -1]
    engine = Engine(model, chunk_len=chunk_len)
    known = engine.prefill(tokens_BT, model.init_state(2))
    assert known is not None
    torch.testing.assert_close(known.logits_BV, expected, rtol=0, atol=1e-9)
    assert engine.tokens_read == 32


@pytest.mark.parametrize("chunk_len", [2, 5, 512])
def test_padded_rows_give_the_logits_of_their_last_token(model: HybridLM, chunk_len: int) -> None:
    rows = [tokens_of(length, length) for length in (9, 1, 5)]
    tokens_BT = torch.zeros(3, 9, dtype=torch.int64)
    doc_BT = torch.full((3, 9), -1)
    for row, tokens in enumerate(rows):
        tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
        doc_BT[row, : len(tokens)] = 0
    engine = Engine(model, chunk_len=chunk_len)
    known = engine.prefill(tokens_BT, model.init_state(3), doc_BT)
    assert known is not None
    assert engine.tokens_read == 15
    for row, tokens in enumerate(rows):
        one = engine.prefill(torch.tensor([tokens]), model.init_state(1))
        assert one is not None
        torch.testing.assert_close(known.logits_BV[row], one.logits_BV[0], rtol=0, atol=1e-9)


def test_greedy_generation_equals_full_forwards(model: HybridLM) -> None:
    prompt = tokens_of(6)
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            logits = model(torch.tensor([expected]), model.init_state(1)).logits_BTV[0, -1]
            logits[:NUM_RESERVED] = -torch.inf
            expected.append(int(logits.argmax()))
    drawn = list(
        Engine(model).generate(prompt, model.init_state(1), GREEDY, max_tokens=8, stop_ids=())
    )
    assert [token.id for token in drawn] == expected[6:]
    assert not any(token.is_stop for token in drawn)


def test_a_token_carries_the_state_before_it(model: HybridLM) -> None:
    prompt = tokens_of(4)
    engine = Engine(model)
    drawn = list(engine.generate(prompt, model.init_state(1), HOT, max_tokens=5, stop_ids=()))
    assert engine.tokens_read == 4 + 4  # the last token is drawn, not read
    for count, token in enumerate(drawn):
        assert int(token.state.pos_B) == 4 + count
    # all states stay good: go on from the second one after the later ones were made
    again = engine.decode_one_token(torch.tensor([drawn[1].id]), drawn[1].state)
    ids = [*prompt, drawn[0].id, drawn[1].id]
    full = engine.prefill(torch.tensor([ids]), model.init_state(1))
    assert full is not None
    torch.testing.assert_close(again.logits_BV, full.logits_BV, rtol=0, atol=1e-9)


def test_only_stop_ids_among_the_reserved_are_drawn(model: HybridLM) -> None:
    def draw(stop_ids: tuple[int, ...]) -> list[int]:
        hot = SamplingConfig(temperature=10, top_p=1.0, seed=1)
        tokens = Engine(model).generate(
            tokens_of(3), model.init_state(1), hot, max_tokens=300, stop_ids=stop_ids
        )
        return [token.id for token in tokens]

    assert min(draw(())) >= NUM_RESERVED
    assert len(draw(())) == 300
    stopped = draw((END, 1))
    assert stopped[-1] in (END, 1)
    assert min(stopped[:-1], default=NUM_RESERVED) >= NUM_RESERVED


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_a_batch_answers_as_each_prompt_alone(model: HybridLM, sampling: SamplingConfig) -> None:
    prompts = [tokens_of(length, length) for length in (7, 1, 12, 3)]
    together = Engine(model, chunk_len=5).generate_batch(
        prompts, sampling, max_tokens=40, stop_ids=(END,)
    )
    expected = [alone(model, prompt, sampling, row, 40) for row, prompt in enumerate(prompts)]
    assert together == expected
    if sampling is HOT:
        # rows end at different times, so that finished rows were left out
        assert len({len(answer) for answer in together}) > 1


def test_a_batch_reads_no_token_of_a_finished_row(model: HybridLM) -> None:
    prompts = [tokens_of(length, length) for length in (7, 1, 12, 3)]
    engine = Engine(model)
    answers = engine.generate_batch(prompts, HOT, max_tokens=40, stop_ids=(END,))
    # every answer's last token is drawn and never read
    assert engine.tokens_read == sum(len(prompt) for prompt in prompts) + sum(
        len(answer) - 1 for answer in answers
    )


class Countdown:
    """Says stop from the given poll on."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_stop_is_polled_before_every_chunk_and_token(model: HybridLM) -> None:
    engine = Engine(model, chunk_len=4)
    tokens = torch.tensor([tokens_of(16)])
    assert engine.prefill(tokens, model.init_state(1), stop=Countdown(3)) is None
    assert engine.tokens_read == 12
    assert engine.prefill(tokens, model.init_state(1), stop=Countdown(4)) is not None
    drawn = engine.generate(
        tokens_of(4), model.init_state(1), GREEDY, max_tokens=9, stop_ids=(), stop=Countdown(4)
    )
    assert len(list(drawn)) == 3
    batch = engine.generate_batch(
        [[5], [6, 7]], GREEDY, max_tokens=9, stop_ids=(), stop=Countdown(3)
    )
    assert [len(answer) for answer in batch] == [2, 2]
    assert engine.generate_batch([[5]], GREEDY, max_tokens=9, stop_ids=(), stop=Countdown(0)) == [
        []
    ]


def test_states_hold_no_graph_and_the_mode_is_put_back(model: HybridLM) -> None:
    model.train()
    known = Engine(model).prefill(torch.tensor([tokens_of(4)]), model.init_state(1))
    assert model.training
    assert known is not None
    assert not known.logits_BV.requires_grad
    assert num_bytes(known.state) > 0
    model.eval()


def test_nothing_to_read_is_an_error(model: HybridLM) -> None:
    engine = Engine(model)
    with pytest.raises(ValueError, match="at least one token"):
        engine.prefill(torch.zeros(1, 0, dtype=torch.int64), model.init_state(1))
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate_batch([[5], []], GREEDY, max_tokens=1, stop_ids=())
    with pytest.raises(ValueError, match="no prompt"):
        engine.generate_batch([], GREEDY, max_tokens=1, stop_ids=())


def test_prefill_scores_only_the_last_token(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    model.head.register_forward_hook(lambda _m, given, _out: rows.append(given[0].numel()))
    engine = Engine(model, chunk_len=6)
    engine.prefill(torch.tensor([tokens_of(16)]), model.init_state(1))
    assert rows == [16] * 3
    model.head._forward_hooks.clear()


def changes() -> dict[str, Callable[[HybridLM], None]]:
    """Ways in which a model comes by other weights."""

    def by_optimizer(kind: type[torch.optim.Optimizer], **more: bool) -> Callable[[HybridLM], None]:
        def change(model: HybridLM) -> None:
            optimizer = kind(model.parameters(), lr=0.1, **more)  # type: ignore[call-arg]
            tokens_BT = torch.tensor([tokens_of(9)])
            loss, _, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:], model.init_state(1))
            loss.backward()
            optimizer.step()

        return change

    def by_replacing(model: HybridLM) -> None:
        model.head.weight = torch.nn.Parameter(-model.head.weight.detach())

    def by_loading(model: HybridLM) -> None:
        model.load_state_dict({name: -x for name, x in model.state_dict().items()})

    def by_pointer(model: HybridLM) -> None:
        model.head.weight.data = -model.head.weight.data

    return {
        "adamw-fused": by_optimizer(torch.optim.AdamW, fused=True),
        "adamw-foreach": by_optimizer(torch.optim.AdamW, foreach=True),
        "sgd": by_optimizer(torch.optim.SGD),
        "replaced": by_replacing,
        "loaded": by_loading,
        "data": by_pointer,
    }


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("way", changes())
def test_changed_weights_are_noticed(way: str, weights: Any) -> None:
    model = awake(hybrid_config()).float()
    engine = Engine(model, weights=weights)
    prompt = torch.tensor([tokens_of(5)])

    def answer(engine: Engine) -> torch.Tensor:
        known = engine.prefill(prompt, model.init_state(1))
        assert known is not None
        return engine.decode_one_token(torch.tensor([7]), known.state).logits_BV

    before = answer(engine)
    assert torch.equal(answer(engine), before)
    changes()[way](model)
    after = answer(engine)
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, answer(Engine(model, weights=weights)))


def test_weights_that_change_between_two_tokens_are_noticed() -> None:
    model = awake(hybrid_config()).float()
    engine = Engine(model)
    known = engine.prefill(torch.tensor([tokens_of(5)]), model.init_state(1))
    assert known is not None
    before = engine.decode_one_token(torch.tensor([7]), known.state).logits_BV
    changes()["sgd"](model)
    after = engine.decode_one_token(torch.tensor([7]), known.state).logits_BV
    assert float((after - before).abs().max()) > 1e-3


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_native_steps_answer_batches_as_each_prompt_alone(weights: Any) -> None:
    model = awake(hybrid_config()).float()
    prompts = [tokens_of(length, length) for length in (7, 1, 12, 3)]
    engine = Engine(model, weights=weights)
    together = engine.generate_batch(prompts, HOT, max_tokens=20, stop_ids=(END,))
    for row, prompt in enumerate(prompts):
        known = engine.prefill(torch.tensor([prompt]), model.init_state(1))
        assert known is not None
        drawn = engine.continue_from(
            known,
            HOT,
            make_generator(HOT.seed, row),
            max_tokens=20,
            stop_ids=(END,),
            history=prompt,
        )
        assert [token.id for token in drawn] == together[row]
    assert len({len(answer) for answer in together}) > 1


def test_a_few_tokens_are_read_by_native_steps() -> None:
    model = awake(hybrid_config()).float()
    tokens_BT = torch.tensor([tokens_of(4), tokens_of(4, 1)])
    windows: list[int] = []
    model.core.layers[0].register_forward_hook(lambda *_: windows.append(1))
    engine = Engine(model, chunk_len=2)
    known = engine.prefill(tokens_BT, model.init_state(2))
    assert known is not None
    assert (windows, engine.tokens_read) == ([], 8)
    with torch.no_grad():
        expected = model(tokens_BT, model.init_state(2)).logits_BTV[:, -1]
    torch.testing.assert_close(known.logits_BV, expected, rtol=1e-5, atol=1e-5)
    # two chunks, a poll before each
    assert engine.prefill(tokens_BT, model.init_state(2), stop=Countdown(1)) is None
    assert engine.tokens_read == 12
    assert engine.prefill(tokens_BT, model.init_state(2), stop=Countdown(2)) is not None
