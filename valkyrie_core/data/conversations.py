"""Conversations as two packages ship them: `chitchat-dataset` and `chatterbot-corpus`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field

from valkyrie_core.config import Config
from valkyrie_core.data.documents import Document, Drops, chat_pieces, merge_turns
from valkyrie_core.data.formats import Source
from valkyrie_core.errors import MissingError

_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_CRUDE = re.compile(
    r"\b(?:(?:mother)?fuck\w*|shit\w*|bullshit|bitch\w*|cunts?|dicks?|assholes?|whores?|sluts?|"
    r"fag(?:got)?s?|nigg\w+|porn\w*|sex(?:y|ier|iest|ual\w*)?|nudes?|boobs?|penis|vagina|pissed|retard\w*)\b",
    re.IGNORECASE,
)


class ChitchatFormat(Config):
    """The JSON file of the `chitchat-dataset` package: two people talk, the second one answers.

    Consecutive messages of one person are one turn. Web addresses and e-mails are masked;
    conversations with crude words are dropped (and counted).
    """

    type: Literal["chitchat"] = "chitchat"
    min_turns: int = Field(default=8, ge=2)
    """Shorter conversations are dropped (and counted)."""

    suffixes: ClassVar[tuple[str, ...]] = (".json",)

    def documents(self, source: Source, drops: Drops) -> Iterator[Document]:
        """The conversations of the file, in the order of their ids."""
        try:
            conversations = json.loads(source.data)
            items = sorted(conversations.items())
        except (ValueError, AttributeError, RecursionError) as error:
            raise MissingError(f"{source.name}: not chitchat's JSON ({error})") from error
        for identifier, conversation in items:
            turns = _by_sender(_messages(conversation, f"{source.name}:{identifier}"))
            if len(turns) < self.min_turns:
                drops[f"fewer than {self.min_turns} turns"] += 1
            elif any(_CRUDE.search(text) for _, text in turns):
                drops["crude words"] += 1
            else:
                yield Document(identifier, chat_pieces([(r, _masked(t)) for r, t in turns]))


def _messages(conversation: Any, where: str) -> list[tuple[str, str]]:
    try:
        groups = conversation["messages"]
        return [(str(m["sender"]), str(m["text"])) for group in groups for m in group]
    except (KeyError, TypeError) as error:
        raise MissingError(f"{where}: not a chitchat conversation (no {error})") from error


def _by_sender(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    merged = merge_turns(messages)
    first = merged[0][0] if merged else ""
    roles = [("user" if sender == first else "assistant", text) for sender, text in merged]
    return merge_turns(roles)


def _masked(text: str) -> str:
    return _EMAIL.sub("[email]", _URL.sub("[link]", text))


class _PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML whose scalars all stay text: an answer `Yes` is no boolean, `7` no number."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


class ChatterbotFormat(Config):
    """The YAML files of the `chatterbot-corpus` package: lists of question and answers."""

    type: Literal["chatterbot"] = "chatterbot"

    suffixes: ClassVar[tuple[str, ...]] = (".yml", ".yaml")

    def documents(self, source: Source, drops: Drops) -> Iterator[Document]:
        """The conversations of one file, in order."""
        try:
            content = yaml.load(source.data, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
            conversations = content["conversations"]
            if not isinstance(conversations, list):
                raise TypeError("conversations is no list")
        except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error).replace("\n", " ") or type(error).__name__
            raise MissingError(f"{source.name}: not chatterbot's YAML ({reason})") from error
        for number, lines in enumerate(conversations, start=1):
            name = f"{source.name}:{number}"
            if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
                drops["not a list of texts"] += 1
                continue
            turns = merge_turns((("user", "assistant")[i % 2], t) for i, t in enumerate(lines))
            if not any(role == "assistant" for role, _ in turns):
                drops["no answer"] += 1
            else:
                yield Document(name, chat_pieces(turns))
