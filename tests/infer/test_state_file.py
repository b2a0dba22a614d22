"""States in files and in branches: what was read is gone on from, whatever the mixers are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.infer.test_chat import DOC, END, SAMPLING, TOKENIZER, USER, fresh, leaves, probe, say
from tests.nn.menu import CONFIGS, HALTING, awake
from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.infer.chat import ChatSession
from valkyrie_core.infer.continuation import Continuation
from valkyrie_core.infer.engine import Engine
from valkyrie_core.infer.state_file import SavedState, is_state_file, read_state, write_state
from valkyrie_core.infer.transcript import tensors_fingerprint
from valkyrie_core.nn import kv_cache, masked_attention
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.state_format import kept_bytes
from valkyrie_core.nn.weights import Weights

ALL = {**CONFIGS, **HALTING}


def model_of(name: str, seed: int = 0) -> HybridLM:
    config = ALL[name].model_copy(update={"vocab_size": TOKENIZER.vocab_size})
    model = awake(config, seed)
    if name not in HALTING:
        # in fp64 no token is done in one reading and not in the other
        model = model.float()
    with torch.no_grad():
        model.head.weight[END] *= 2
    return model


@pytest.fixture
def model() -> HybridLM:
    return model_of("hybrid")


@pytest.fixture
def session(model: HybridLM) -> ChatSession:
    return ChatSession(model, TOKENIZER, SAMPLING, max_tokens=12)


@pytest.mark.parametrize("name", ALL)
def test_every_turn_knows_what_a_fresh_reading_knows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turn n's logits equal those after the whole conversation at once, through files and forks."""
    monkeypatch.setattr(kv_cache, "TRIMMED_AT_ONCE", 1)
    monkeypatch.setattr(masked_attention, "QUERIES_AT_ONCE", 8)
    model = model_of(name)
    session = ChatSession(model, TOKENIZER, SAMPLING, max_tokens=12)
    for number, text in enumerate(("How do you do?", "and now?", "x")):
        say(session, text)
        path = tmp_path / f"{number}.state"
        session.save_state(path)
        other = ChatSession(model, TOKENIZER, SAMPLING, max_tokens=12)
        assert other.load_state(path) == len(session.tokens)
        if number == 1:
            session.fork()
        expected = fresh(model, [*session.tokens, DOC])
        for state in (session.state, other.state):
            known = Engine(model).decode_one_token(torch.tensor([DOC]), state)
            torch.testing.assert_close(known.logits_BV, expected, rtol=1e-4, atol=2e-5)


def test_a_kept_state_of_a_windowed_layer_is_a_window() -> None:
    model = model_of("attention-window+swiglu")
    session = ChatSession(model, TOKENIZER, SAMPLING, max_tokens=12)
    say(session, "How do you do? " * 20)
    caches = [layer[0] for layer in session.state.layers]
    assert [cache.length for cache in caches] == [7, 7]  # the window of 5 and 2 sinks
    assert kept_bytes(session.state) < 7 * 2 * 16 * 2 * 4 * 1.5


def test_a_conversation_goes_on_from_a_file_as_if_it_had_not_stopped(
    session: ChatSession, model: HybridLM, tmp_path: Path
) -> None:
    say(session, "one")
    session.save_state(tmp_path / "s")
    other = ChatSession(model, TOKENIZER, SAMPLING, max_tokens=12)
    other.load_state(tmp_path / "s")
    assert other.turns == ()
    assert other.tokens == session.tokens
    say(other, "two")
    # the second turn of one is the first of the other, which draws from another generator
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    session.sampling = other.sampling = greedy
    other.reset()
    assert say(other, "two") == say(session, "two")
    assert other.tokens == session.tokens


def test_branches_do_not_disturb_each_other(session: ChatSession, model: HybridLM) -> None:
    say(session, "one")
    assert session.fork() == 2
    say(session, "two")
    say(session, "three")
    assert [(b.number, b.turns, b.last, b.is_present) for b in session.branches] == [
        (1, 1, "one", False),
        (2, 3, "three", True),
    ]
    session.switch(1)
    assert [turn.user for turn in session.turns] == ["one"]
    say(session, "else")
    session.undo()
    session.switch(2)
    assert [turn.user for turn in session.turns] == ["one", "two", "three"]
    for number in (1, 2):
        session.switch(number)
        known = probe(model, session.state)
        torch.testing.assert_close(
            known, fresh(model, [*session.tokens, USER]), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_branch_that_is_not_there(session: ChatSession, number: int) -> None:
    with pytest.raises(UsageError, match=f"there is no branch {number}"):
        session.switch(number)
    session.fork()
    session.switch(2)
    with pytest.raises(UsageError, match="there are 1 to 2"):
        session.switch(3)


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), list(itertools.product(("fp32", "bf16", "int8"), repeat=2))
)
def test_formats_of_weights_share_states(
    saved_by: Weights, loaded_by: Weights, model: HybridLM, tmp_path: Path
) -> None:
    first = ChatSession(model, TOKENIZER, SAMPLING, max_tokens=6, weights=saved_by)
    say(first, "one")
    first.save_state(tmp_path / "s")
    second = ChatSession(model, TOKENIZER, SAMPLING, max_tokens=6, weights=loaded_by)
    second.load_state(tmp_path / "s")
    for one, other in zip(leaves(first.state), leaves(second.state), strict=False):
        assert one.dtype == other.dtype
    say(second, "two")
    assert len(second.turns) == 1


def test_what_began_with_a_state_is_no_transcript(session: ChatSession, tmp_path: Path) -> None:
    say(session, "one")
    session.save(tmp_path / "talk.json")
    session.save_state(tmp_path / "s")
    session.load_state(tmp_path / "s")
    with pytest.raises(UsageError, match="began with a saved state") as caught:
        session.save(tmp_path / "other.json")
    assert "/save-state" in str(caught.value.hint)
    assert not (tmp_path / "other.json").exists()
    session.load(tmp_path / "talk.json")
    assert session.tokens[0] == DOC
    assert [turn.user for turn in session.turns] == ["one"]


def test_nothing_is_no_state(session: ChatSession, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was read"):
        session.save_state(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def written(model: HybridLM, path: Path) -> SavedState:
    known = Engine(model).prefill(torch.tensor([[DOC, 65, 66, 67]]), model.init_state(1))
    assert known is not None
    saved = SavedState((DOC, 65, 66, 67), known.state)
    assert write_state(path, saved, model, TOKENIZER) == path.stat().st_size
    return saved


def test_a_state_comes_back_bit_for_bit(model: HybridLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    saved = written(model, path)
    found = read_state(path, model, TOKENIZER)
    assert found.tokens == saved.tokens
    assert is_state_file(path)
    # spare room is not written
    assert path.stat().st_size < 3 * sum(t.numel() for t in leaves(saved.state)) * 4
    one, other = (
        Engine(model).decode_one_token(torch.tensor([70]), x.state).logits_BV
        for x in (saved, found)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9, 0.999])
def test_a_flipped_bit_is_found(at: float, model: HybridLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    written(model, path)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"damaged|is no state|written with"):
        read_state(path, model, TOKENIZER)


@pytest.mark.parametrize("size", [0, 5, 8, 40, 300, -1])
def test_a_torn_file_is_found(size: int, model: HybridLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    written(model, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"damaged|is no state"):
        read_state(path, model, TOKENIZER)


def test_states_of_others_are_refused(model: HybridLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    written(model, path)
    with pytest.raises(UsageError, match="written with other weights"):
        read_state(path, model_of("hybrid", seed=1), TOKENIZER)
    with pytest.raises(MissingError, match="there is no state"):
        read_state(tmp_path / "none", model, TOKENIZER)
    with pytest.raises(MissingError):
        read_state(tmp_path, model, TOKENIZER)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(UsageError, match="no state that valkyrie wrote"):
        read_state(path, model, TOKENIZER)
    with pytest.raises(UsageError, match="exists and is no state"):
        written(model, path)
    assert list(load_file(path)) == ["x"]


def test_a_text_goes_on_from_a_state(model: HybridLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    written(model, path)
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    whole = Continuation(model, TOKENIZER, "ABCD", greedy, max_tokens=8)
    after = Continuation(
        model, TOKENIZER, "D", greedy, max_tokens=8, saved=SavedState(*saved_abc(model))
    )
    assert "".join(whole) == "".join(after)


def saved_abc(model: HybridLM) -> SavedState:
    ids = [DOC, *TOKENIZER.encode("ABC")]
    known = Engine(model).prefill(torch.tensor([ids]), model.init_state(1))
    assert known is not None
    return SavedState(tuple(ids), known.state)


def test_what_a_state_has_read_counts_as_repeated(model: HybridLM) -> None:
    penalised = SAMPLING.model_copy(update={"temperature": 0.0, "repetition_penalty": 1.8})
    whole = Continuation(model, TOKENIZER, "ABCD", penalised, max_tokens=8)
    after = Continuation(model, TOKENIZER, "D", penalised, max_tokens=8, saved=saved_abc(model))
    assert "".join(whole) == "".join(after)


def forged(path: Path, change: str) -> None:
    """A file whose hash agrees with what it holds, and which no model has written."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change == "no list":
        tensors["tokens"] = torch.tensor(3)
    elif change == "table":
        tensors["tokens"] = tensors["tokens"][None]
    elif change == "empty":
        tensors["tokens"] = tensors["tokens"][:0]
    elif change == "floats":
        tensors["tokens"] = tensors["tokens"].float()
    elif change == "negative":
        tensors["tokens"] = tensors["tokens"] - 1000
    elif change == "unknown":
        tensors["tokens"] = tensors["tokens"] + 10**9
    elif change == "position":
        tensors["state/pos_B"] = tensors["state/pos_B"] - 10**6
    else:
        tensors["state/layers/0/0/wkv_BNHH"][0, 0, 0, 0] = float("nan")
    metadata["content"] = tensors_fingerprint(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change",
    ["no list", "table", "empty", "floats", "negative", "unknown", "position", "nan"],
)
def test_a_forged_state_is_refused(change: str, model: HybridLM, tmp_path: Path) -> None:
    path = tmp_path / "s"
    written(model, path)
    forged(path, change)
    with pytest.raises(UsageError, match="is damaged"):
        read_state(path, model, TOKENIZER)


def test_a_folder_that_is_not_there(model: HybridLM, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no folder"):
        written(model, tmp_path / "none" / "s")
