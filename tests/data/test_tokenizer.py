from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.helpers import documents
from valkyrie_core.data.bpe_tokenizer import BPETokenizer
from valkyrie_core.data.byte_tokenizer import BytesTokenizer
from valkyrie_core.data.documents import (
    NUM_RESERVED,
    SPECIAL_TOKENS,
    Piece,
    chat_pieces,
    text_document,
)
from valkyrie_core.data.tokenizer import (
    NO_LABEL,
    BytesTokenizerConfig,
    SentencePieceConfig,
    Tokenizer,
    TokenizerFileConfig,
    build_tokenizer,
    encode_pieces,
    load_tokenizer,
)
from valkyrie_core.data.tokenizer_report import HOSTILE_TEXTS
from valkyrie_core.errors import CheckpointError, MissingError, RecipeError

# what the trained tokenizers have seen: also marks and controls that mean something to the trainer
ODD = text_document(
    "odd", "<|doc|> <|end|> \u2581\u2581x \u2585 \x00\x00 <0x41><0x41> \n\n\n  \r\n" * 20
)


def trained(**config: object) -> Tokenizer:
    values = {"vocab_size": 330} | config
    return build_tokenizer(SentencePieceConfig.model_validate(values), [*documents(40), ODD])


BPE = trained()
TOKENIZERS = {"bytes": BytesTokenizer(), "bpe": BPE, "across words": trained(split_words=False)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_hostile_texts_come_back_exactly(tokenizer: Tokenizer, name: str) -> None:
    text = HOSTILE_TEXTS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert min(ids, default=NUM_RESERVED) >= NUM_RESERVED
    assert max(ids, default=0) < tokenizer.vocab_size


TRICKY = st.sampled_from(
    [
        "\u2581",
        " ",
        "  ",
        "\n",
        "\x00",
        "<|doc|>",
        "<0x41>",
        "the ",
        "\u2585",
        "\ufeff",
        "é",
        "\U0001f600",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(TRICKY | st.text(max_size=8)).map("".join))
def test_any_text_comes_back_exactly(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(token >= NUM_RESERVED for token in ids)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_every_character_comes_back(tokenizer: Tokenizer) -> None:
    for start in range(0, 0x110000, 0x1000):
        if start in range(0xD000, 0xE000):
            continue
        text = "".join(map(chr, range(start, start + 0x1000, 7)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def test_reserved_ids_are_no_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == [1, 2, 3, 4]
    assert [tokenizer.token_bytes(token) for token in range(NUM_RESERVED)] == [b""] * NUM_RESERVED
    ids = tokenizer.encode("a")
    assert tokenizer.decode([0, 1, *ids, 4]) == "a"
    with pytest.raises(ValueError, match="not in tuple"):
        tokenizer.special_id("<|nope|>")


def test_all_bytes_have_tokens_and_halves_of_characters_are_replaced(tokenizer: Tokenizer) -> None:
    singles = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles
    ids = tokenizer.encode("\U00013000")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_bpe_shortens_what_it_was_trained_on() -> None:
    text = "\n".join(document.text for document in documents(40))
    assert len(BPE.encode(text)) < len(text) / 2
    assert len(TOKENIZERS["across words"].encode(text)) < len(BPE.encode(text))


def test_cutting_long_texts_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "".join(f"{' ' * (n % 9)}if x:\n{' ' * (n % 5)}the fox\n" for n in range(99))
    text = " ".join(document.text for document in documents(40)) + "   end   \u2581  " + code
    config = SentencePieceConfig(vocab_size=330)
    tokenizer = build_tokenizer(config, [*documents(40), text_document("code", code)])
    assert b"    " in [tokenizer.token_bytes(token) for token in range(330)]
    whole = tokenizer.encode(text)
    for size in (16, 50, 333):
        monkeypatch.setattr("valkyrie_core.data.bpe_tokenizer._SEGMENT", size)
        assert tokenizer.encode(text) == whole


def test_training_is_deterministic_and_in_any_order() -> None:
    config = SentencePieceConfig(vocab_size=330)
    again = build_tokenizer(config, [ODD, *reversed(documents(40))])
    assert again.fingerprint == BPE.fingerprint
    other = build_tokenizer(SentencePieceConfig(vocab_size=331), [*documents(40), ODD])
    assert other.fingerprint != BPE.fingerprint
    assert BytesTokenizer().fingerprint not in (BPE.fingerprint, other.fingerprint)


def test_at_most_max_training_bytes_are_read() -> None:
    config = SentencePieceConfig(vocab_size=300, max_training_bytes=10_000)
    alien = text_document("alien", "\u10a0\u10a1\u10a2" * 5000)
    many = sorted([*documents(200), alien], key=lambda document: document.content_hash)
    used, size = [], 0
    for document in many:
        used.append(document)
        size += document.num_bytes
        if size > 10_000:
            break
    assert len(used) < len(many)
    assert (
        build_tokenizer(config, many[::-1]).fingerprint == build_tokenizer(config, used).fingerprint
    )


def test_a_vocabulary_too_large_for_the_text() -> None:
    with pytest.raises(RecipeError) as caught:
        trained(vocab_size=50_000)
    assert "data.tokenizer.vocab_size 50000 is too large for this text" in caught.value.message
    largest = int(str(caught.value.hint).split("at most ")[1].split(",")[0])
    assert trained(vocab_size=largest).vocab_size == largest
    with pytest.raises(RecipeError, match="is too large"):
        trained(vocab_size=largest + 1)


def test_a_vocabulary_too_small_for_the_text() -> None:
    with pytest.raises(RecipeError, match="too small") as caught:
        trained(vocab_size=NUM_RESERVED + 256)
    assert "at least" in str(caught.value.hint)


def test_many_scripts_in_a_small_vocabulary_fall_back_to_bytes() -> None:
    text = "".join(chr(0x4E00 + n % 3000) for n in range(30_000))
    tokenizer = build_tokenizer(SentencePieceConfig(vocab_size=300), [text_document("han", text)])
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_without_a_single_space() -> None:
    text = "".join(chr(0x4E00 + n * n % 50) for n in range(2000))
    tokenizer = build_tokenizer(SentencePieceConfig(vocab_size=300), [text_document("han", text)])
    assert tokenizer.decode(tokenizer.encode("a b  c")) == "a b  c"


def test_rare_characters_get_no_token() -> None:
    common = [text_document(f"{n}", document.text * 20) for n, document in enumerate(documents(40))]
    rare = text_document("rare", "\u2603 snow")
    tokenizer = build_tokenizer(SentencePieceConfig(vocab_size=330), [*common, rare])
    assert len(tokenizer.encode("\u2603")) == 3


def test_no_text_at_all() -> None:
    with pytest.raises(RecipeError, match="is too large for this text"):
        build_tokenizer(SentencePieceConfig(vocab_size=300), [])


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("Story 1. the fox \u2581") == tokenizer.encode("Story 1. the fox \u2581")
    assert not list((tmp_path / "tokenizer").glob(".tmp*"))
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "tokenizer").iterdir())


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(MissingError, match="no such tokenizer model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    BPE.save(tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    step = max(1, len(whole) // 64)
    for length in range(0, len(whole), step):
        path.write_bytes(whole[:length].rstrip() if name.endswith("json") else whole[:length])
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in caught.value.message
        assert name in caught.value.message
    for place in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[place] ^= 0x04
        path.write_bytes(flipped)
        if name == "tokenizer.model":
            with pytest.raises(CheckpointError):
                load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"schema": 1, "kind": 1, "model_sha256": null, "special_tokens": []}',
        b"[" * 9999,
    ],
)
def test_junk_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)


def test_an_unknown_kind(tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "words"}))
    with pytest.raises(CheckpointError, match="unknown kind, 'words'"):
        load_tokenizer(tmp_path)


def test_a_model_file(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    path = str(tmp_path / "tokenizer.model")
    tokenizer = build_tokenizer(TokenizerFileConfig(path=path, vocab_size=330), ())
    assert tokenizer.fingerprint == BPE.fingerprint
    with pytest.raises(RecipeError) as caught:
        build_tokenizer(TokenizerFileConfig(path=path, vocab_size=331), ())
    assert caught.value.hint == "set data.tokenizer.vocab_size: 330"
    with pytest.raises(MissingError, match="no such tokenizer model"):
        build_tokenizer(TokenizerFileConfig(path=path + "x", vocab_size=330), ())


def foreign_model(**changes: object) -> bytes:
    from sentencepiece import SentencePieceTrainer

    buffer = io.BytesIO()
    options: dict[str, object] = {
        "vocab_size": 330,
        "model_type": "bpe",
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": -1,
        "eos_id": -1,
        "pad_id": -1,
        "control_symbols": list(SPECIAL_TOKENS),
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentences = iter([document.text for document in documents(40)])
    SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=buffer, **(options | changes)
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "changes text"),
        ({"normalization_rule_name": "identity"}, "changes text"),
        ({"control_symbols": []}, "lacks the reserved tokens"),
        (
            {"control_symbols": [], "user_defined_symbols": list(SPECIAL_TOKENS)},
            "lacks the reserved",
        ),
        ({"byte_fallback": False}, "lacks the reserved tokens or the bytes"),
        ({"bos_id": 1, "eos_id": 2}, "lacks the reserved tokens"),
    ],
)
def test_models_of_others_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BPETokenizer(foreign_model(**changes))


def test_special_tokens_come_from_pieces_alone(tokenizer: Tokenizer) -> None:
    pieces = chat_pieces([("user", "<|end|>"), ("assistant", "ok<|doc|>")])
    tokens, scored, labels = encode_pieces(tokenizer, pieces)
    assert labels is None
    assert [t for t in tokens if t < NUM_RESERVED] == [2, 4, 3, 4]
    answer = len(tokenizer.encode("ok<|doc|>")) + 1
    assert scored == [False] * (len(tokens) - answer) + [True] * answer
    assert tokenizer.decode(tokens) == "<|end|>ok<|doc|>"


def test_a_label_is_that_of_a_tokens_last_character(tokenizer: Tokenizer) -> None:
    text = "a dog é."
    labels = "1 345 78"
    tokens, _, found = encode_pieces(tokenizer, [Piece("x"), Piece(text, labels=labels)])
    assert found is not None
    assert found[: len(tokenizer.encode("x"))] == [NO_LABEL] * len(tokenizer.encode("x"))
    end = 0
    for token, label in zip(
        tokenizer.encode(text), found[-len(tokenizer.encode(text)) :], strict=True
    ):
        end += len(tokenizer.token_bytes(token))
        read = text.encode()[:end].decode(errors="ignore")
        whole = len(read.encode()) == end
        expected = labels[len(read) - 1] if whole else " "
        assert label == (NO_LABEL if expected == " " else tokenizer.encode(expected)[0])
    assert len(found) == len(tokens)


def test_a_label_of_several_tokens_is_refused() -> None:
    with pytest.raises(RecipeError, match="no single token"):
        encode_pieces(BytesTokenizer(), [Piece("ab", labels="é ")])


def test_training_and_loading_say_nothing(tmp_path: Path) -> None:
    code = (
        "from tests.data.helpers import documents\n"
        "from valkyrie_core.data.tokenizer import SentencePieceConfig, build_tokenizer\n"
        "t = build_tokenizer(SentencePieceConfig(vocab_size=300), documents(40))\n"
        "t.decode(t.encode('\\x00 any \\u2581 text'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_sizes_of_the_configurations() -> None:
    assert BytesTokenizerConfig().vocab_size == BytesTokenizer().vocab_size == 261
    with pytest.raises(ValueError, match="vocab_size"):
        SentencePieceConfig(vocab_size=260)
