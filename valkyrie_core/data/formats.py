"""How the content of a file or the columns of a row become documents: plain text and chat."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, NamedTuple

from valkyrie_core.config import Config
from valkyrie_core.data.documents import (
    Document,
    Drops,
    chat_pieces,
    merge_turns,
    text_document,
)
from valkyrie_core.errors import MissingError, RecipeError

log = logging.getLogger("valkyrie")

Row = Mapping[str, Any]


class Source(NamedTuple):
    """A file, or a member of an archive, before it is parsed."""

    name: str
    data: bytes

    @property
    def suffix(self) -> str:
        """The ending of the name, in lower case, with its dot."""
        return PurePosixPath(self.name).suffix.lower()

    def decode(self, drops: Drops) -> str | None:
        """The content as text (a byte order mark is removed); None, and counted, if not UTF-8."""
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError:
            drops["not UTF-8"] += 1
            log.warning("%s is not UTF-8: left out", self.name)
            return None


class TextFormat(Config):
    """Plain text: a whole file is one document; a jsonl or parquet row is one document."""

    type: Literal["text"] = "text"
    field: str = "text"
    """The column that holds the text, in jsonl, parquet and hub rows."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md", ".py", ".jsonl", ".parquet")

    def documents(self, source: Source, drops: Drops) -> Iterator[Document]:
        """The documents of one file."""
        if source.suffix in ROW_SUFFIXES:
            yield from self.rows(rows_of(source), drops)
        elif (text := source.decode(drops)) is not None:
            yield text_document(source.name, text)

    def rows(self, rows: Iterable[tuple[str, Row]], drops: Drops) -> Iterator[Document]:
        """One document per named row. Raises RecipeError where a row has no such column."""
        for name, row in rows:
            text = column(row, self.field, name)
            if text is None:
                drops["no text"] += 1
                continue
            if not isinstance(text, str):
                raise RecipeError(
                    f"{name}: column {self.field!r} holds {type(text).__name__}, not text",
                    hint="name the text column with format.field",
                )
            yield text_document(name, text)


class ChatFormat(Config):
    """Conversations: rows with a list of {role, content} messages; only answers are scored.

    A system message is put before the first user message. Conversations with other roles, or
    without an answer, are dropped and counted.
    """

    type: Literal["chat"] = "chat"
    field: str = "messages"
    """The column that holds the list of messages."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".parquet")

    def documents(self, source: Source, drops: Drops) -> Iterator[Document]:
        """The conversations of one jsonl or parquet file."""
        if source.suffix not in ROW_SUFFIXES:
            raise RecipeError(
                f"{source.name}: the format 'chat' reads rows, this is no jsonl or parquet file",
                hint="use format: {type: text} for plain text",
            )
        yield from self.rows(rows_of(source), drops)

    def rows(self, rows: Iterable[tuple[str, Row]], drops: Drops) -> Iterator[Document]:
        """One conversation per named row. Raises RecipeError where a row holds no messages."""
        for name, row in rows:
            messages = column(row, self.field, name)
            turns = _turns(messages, name, self.field)
            if turns is None:
                drops["unknown role"] += 1
            elif not any(role == "assistant" for role, _ in turns):
                drops["no answer"] += 1
            else:
                yield Document(name, chat_pieces(turns))


def _turns(messages: Any, name: str, field: str) -> list[tuple[str, str]] | None:
    wrong = RecipeError(
        f"{name}: column {field!r} is no list of messages like "
        '{"role": "user", "content": "Hello"}',
        hint="name the column with format.field",
    )
    if not isinstance(messages, list):
        raise wrong
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise wrong
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise wrong
        if role == "system" and all(earlier == "user" for earlier, _ in turns):
            role = "user"
        if role not in ("user", "assistant"):
            return None
        turns.append((role, content))
    return merge_turns(turns)


ROW_SUFFIXES = (".jsonl", ".parquet")


def column(row: Row, field: str, name: str) -> Any:
    """One column of a row. Raises RecipeError with the nearest column's name."""
    if field in row:
        return row[field]
    near = difflib.get_close_matches(field, [str(key) for key in row], n=1)
    raise RecipeError(
        f"{name}: no column {field!r}; there are {', '.join(sorted(map(str, row))) or 'none'}",
        hint=f"did you mean format.field: {near[0]}?"
        if near
        else "name the column with format.field",
    )


def rows_of(source: Source) -> Iterator[tuple[str, Row]]:
    """The named rows of a jsonl or parquet file. Raises MissingError where it can't be read."""
    return _parquet_rows(source) if source.suffix == ".parquet" else _jsonl_rows(source)


def _jsonl_rows(source: Source) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(source.data.split(b"\n"), start=1):
        if not line.strip():
            continue
        name = f"{source.name}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise MissingError(
                f"{name}:{error.start + 1}: not UTF-8", hint="save the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:
            column_number = getattr(error, "colno", 1)
            # what is no JSONDecodeError comes from Python's limits: on depth, on digits of a number
            deep = isinstance(error, RecursionError)
            limit = "nested too deeply" if deep else "a number with too many digits"
            reason = getattr(error, "msg", limit)
            raise MissingError(
                f"{name}:{column_number}: not JSON ({reason})",
                hint="every line of a jsonl file is one JSON object",
            ) from error
        if not isinstance(row, dict):
            raise MissingError(f"{name}: not a JSON object but {type(row).__name__}")
        yield name, row


def _parquet_rows(source: Source) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(source.data))
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{source.name}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingError(f"{source.name}: not a readable parquet file ({reason})") from error
