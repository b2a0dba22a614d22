"""SentencePiece byte-pair encoding with byte fallback: exact for every text.

SentencePiece writes a space as U+2581 and reads U+2581 as a space, so a text that holds U+2581
itself would come back changed. Here that character is always spelled in its three byte tokens,
and the bytes of a token come from our own table, so what is encoded comes back bit by bit.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.documents import NUM_RESERVED, SPECIAL_TOKENS, Document, clean_text
from valkyrie_core.data.tokenizer_files import read_model, save_tokenizer
from valkyrie_core.errors import CheckpointError, RecipeError

_SPACE = "\u2581"
_SEGMENT = 16_384
"""Longer texts are encoded in stretches of at most this many characters."""
_SENTENCE = 2_000
"""Characters per training sentence at most; bounds the trainer's memory and time."""
_COVERAGE = 0.9995
"""The share of training characters that get a token of their own; the rest falls back to bytes."""
_PROBE = "a  b\n\tc\u00e9\ufb01\u2460\u3000 \r\n<|doc|> <0x41>\U0001f469\u200d\U0001f680\ufeff"


class SentencePieceConfig(Config):
    """SentencePiece byte-pair encoding with byte fallback, trained on the recipe's corpora."""

    type: Literal["sentencepiece"] = "sentencepiece"
    vocab_size: int = Field(default=1024, ge=NUM_RESERVED + 256, le=262_144)
    """Number of token ids, with the reserved ones and the 256 bytes."""
    max_training_bytes: int = Field(default=20_000_000, ge=10_000)
    """At most this much text is read to train the tokenizer."""
    split_words: bool = True
    """Off, a token may span the space between two words: fewer tokens, less general ones."""


class TokenizerFileConfig(Config):
    """A SentencePiece model that exists: one built by `valkyrie tokenizer build`."""

    type: Literal["file"] = "file"
    path: str = Field(min_length=1)
    """The `.model` file."""
    vocab_size: int = Field(ge=NUM_RESERVED + 256, le=262_144)
    """Number of token ids; a file that disagrees is refused."""


class BPETokenizer:
    """A SentencePiece model with our reserved ids and all 256 bytes.

    Raises CheckpointError where the bytes are no such model; `source` names them in the message.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, *, source: str = "tokenizer model") -> None:
        from sentencepiece import SentencePieceProcessor

        if not model:
            raise CheckpointError(f"{source} is damaged: it is empty")
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{source} is damaged: not a SentencePiece model") from error
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(b"valkyrie sentencepiece 1\n" + model).hexdigest()
        self._bytes = _token_table(self._processor, source)
        by_byte = {
            self._bytes[token]: token
            for token in range(self.vocab_size)
            if self._processor.is_byte(token)
        }
        self._space = [by_byte[bytes([byte])] for byte in _SPACE.encode()]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise CheckpointError(
                f"{source} changes text (it normalises)",
                hint="use a tokenizer from: valkyrie tokenizer build RECIPE",
            )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, never a special one. Lone surrogates become U+FFFD."""
        tokens: list[int] = []
        for number, part in enumerate(clean_text(text).split(_SPACE)):
            if number:
                tokens += self._space
            for segment in _segments(part, _SEGMENT):
                tokens += self._processor.encode(segment)
        return tokens

    def special_id(self, name: str) -> int:
        """The id of one of SPECIAL_TOKENS."""
        return 1 + SPECIAL_TOKENS.index(name)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; nothing for the reserved ids."""
        return self._bytes[token]

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the text tokens; reserved ids give nothing."""
        table = self._bytes
        return b"".join(table[token] for token in tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Writes tokenizer.model and tokenizer.json."""
        save_tokenizer(directory, kind=self.kind, vocab_size=self.vocab_size, model=self._model)


def _token_table(processor: Any, source: str) -> list[bytes]:
    """The bytes of every token. Raises CheckpointError where the ids are not laid out as ours."""
    specials = [processor.id_to_piece(i) for i in range(min(NUM_RESERVED, processor.vocab_size()))]
    fits = specials[1:] == list(SPECIAL_TOKENS) and processor.is_unknown(0)
    fits = fits and all(processor.is_control(token) for token in range(1, NUM_RESERVED))
    table: list[bytes] = []
    found = set()
    for token in range(processor.vocab_size()):
        piece = processor.id_to_piece(token)
        if token < NUM_RESERVED:
            table.append(b"")
        elif processor.is_byte(token):
            table.append(bytes([int(piece[3:5], 16)]))
            found.add(table[-1])
        else:
            fits = fits and not processor.is_control(token) and not processor.is_unknown(token)
            table.append(piece.replace(_SPACE, " ").encode())
    if not fits or len(found) != 256:
        raise CheckpointError(
            f"{source} lacks the reserved tokens or the bytes that this program needs",
            hint="use a tokenizer from: valkyrie tokenizer build RECIPE",
        )
    return table


def _segments(text: str, size: int) -> Iterator[str]:
    """Cuts a long text, where possible before a space that follows something else.

    No token spans such a place (with `split_words`), so the cut changes no token.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        cut = text.rfind(" ", start + 1, end)
        while cut > start and text[cut - 1] == " ":
            cut -= 1
        if cut <= start:
            cut = end
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def load_bpe_file(config: TokenizerFileConfig) -> BPETokenizer:
    """The tokenizer of a `.model` file. Raises RecipeError where its size is not the recipe's."""
    path = Path(config.path).expanduser()
    tokenizer = BPETokenizer(read_model(path), source=str(path))
    if tokenizer.vocab_size != config.vocab_size:
        raise RecipeError(
            f"data.tokenizer.vocab_size is {config.vocab_size}, but {path} has "
            f"{tokenizer.vocab_size} tokens",
            hint=f"set data.tokenizer.vocab_size: {tokenizer.vocab_size}",
        )
    return tokenizer


def train_bpe(config: SentencePieceConfig, documents: Iterable[Document]) -> BPETokenizer:
    """Trains on the documents' text; the same documents give the same tokenizer, bit for bit.

    Where there is more text than `max_training_bytes`, documents are chosen by a hash of their
    content. Raises RecipeError where the text is too small for so many tokens.
    """
    from sentencepiece import SentencePieceTrainer

    texts = list(_texts(documents, config.max_training_bytes))
    buffer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, config.vocab_size),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=config.vocab_size,
            control_symbols=list(SPECIAL_TOKENS),
            byte_fallback=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            split_by_whitespace=config.split_words,
            split_by_unicode_script=False,
            allow_whitespace_only_pieces=True,
            character_coverage=1.0,
            max_sentence_length=1 << 20,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(config, str(error)) from error
    return BPETokenizer(buffer.getvalue(), source="the trained tokenizer")


def _training_error(config: SentencePieceConfig, reason: str) -> RecipeError:
    where = f"data.tokenizer.vocab_size {config.vocab_size}"
    if high := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", reason):
        return RecipeError(
            f"{where} is too large for this text: it yields {high[1]} tokens",
            hint=f"set data.tokenizer.vocab_size to at most {high[1]}, or use more text",
        )
    if low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return RecipeError(
            f"{where} is too small for the characters of this text",
            hint=f"set data.tokenizer.vocab_size to at least {low[1]}, or use type: bytes",
        )
    return RecipeError(f"data.tokenizer: SentencePiece can't train ({reason.splitlines()[0]})")


def _texts(documents: Iterable[Document], max_bytes: int) -> Iterator[str]:
    """Stretches of at most `_SENTENCE` characters, of at most `max_bytes` in all."""
    for document in sorted(documents, key=lambda document: document.content_hash):
        for piece in document.pieces:
            for text in _segments(piece.text, _SENTENCE):
                max_bytes -= len(text.encode())
                if max_bytes < 0:
                    return
                yield text


def _sentences(texts: list[str], vocab_size: int) -> Iterator[str]:
    """The texts, cut where a character is that gets no token of its own.

    These are the rare ones, what doesn't fit into half of the free ids, and U+2581 and U+2585,
    which mean something to the trainer. (Its own option for this ends at 2 % of the text.)
    """
    counts = Counter[str]()
    for text in texts:
        counts.update(text)
    for character in (_SPACE, "\u2585", " "):
        del counts[character]
    room = max(1, (vocab_size - NUM_RESERVED - 256) // 2)
    kept = [" "]
    left = counts.total() * _COVERAGE
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if left <= 0 or len(kept) == room:
            break
        kept.append(character)
        left -= count
    # without a token of its own a space would fall back to the bytes of U+2581
    yield " "
    stretches = re.compile("[" + re.escape("".join(kept)) + "]+")
    for text in texts:
        yield from stretches.findall(text)
