from __future__ import annotations

import pytest

from tests.data.helpers import chatterbot_bytes, chitchat_bytes
from valkyrie_core.data.conversations import ChatterbotFormat, ChitchatFormat
from valkyrie_core.data.documents import Document, Drops
from valkyrie_core.data.formats import Source
from valkyrie_core.errors import MissingError


def chitchat(
    conversations: dict[str, list[tuple[str, str]]], min_turns: int = 2
) -> tuple[list[Document], Drops]:
    drops = Drops()
    source = Source("dataset.json", chitchat_bytes(conversations))
    return list(ChitchatFormat(min_turns=min_turns).documents(source, drops)), drops


def turns(document: Document) -> list[tuple[str, str]]:
    """(marker, text) of each turn."""
    pieces = document.pieces
    return [(pieces[i].special or "", pieces[i + 1].text) for i in range(0, len(pieces), 3)]


def test_the_second_speaker_answers_and_messages_of_one_merge() -> None:
    talk = [("x", "Hello"), ("x", "there"), ("y", "Hi"), ("x", "Bye"), ("y", " "), ("y", "Bye!")]
    (document,), drops = chitchat({"id-1": talk})
    assert document.name == "id-1"
    assert turns(document) == [
        ("<|user|>", "Hello\nthere"),
        ("<|assistant|>", "Hi"),
        ("<|user|>", "Bye"),
        ("<|assistant|>", "Bye!"),
    ]
    assert not drops


def test_short_and_crude_conversations_are_counted() -> None:
    good = [("x", "a"), ("y", "b")] * 4
    documents, drops = chitchat(
        {
            "b": good,
            "a": good,
            "short": good[:7],
            "monologue": [("x", "a")] * 20,
            "empty": [],
            "crude": [*good, ("x", "Holy SHIT.")],
            "fine": [*good, ("x", "Scunthorpe, a classic, sextant? no: Dickens")],
        },
        min_turns=8,
    )
    assert [d.name for d in documents] == ["a", "b", "fine"]
    assert drops == {"fewer than 8 turns": 3, "crude words": 1}


def test_addresses_are_masked() -> None:
    talk = [
        ("x", "mail me: jo.doe+x@mail.example.org, see https://a.example/b?c=d now"),
        ("y", "ok"),
    ]
    (document,), _ = chitchat({"a": talk})
    assert turns(document)[0][1] == "mail me: [email], see [link] now"


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"a": {}}', b'{"a": {"messages": [[{"text": 1}]]}}', b"\xff"]
)
def test_json_that_is_not_chitchats(data: bytes) -> None:
    with pytest.raises(MissingError, match=r"^dataset\.json"):
        list(ChitchatFormat().documents(Source("dataset.json", data), Drops()))


def test_chatterbot_alternates_and_keeps_scalars_as_text() -> None:
    data = b"conversations:\n- - Is it?\n  - Yes\n- - 6 x 7\n  - 42\n  - so\n  - 1e3\n"
    documents = list(ChatterbotFormat().documents(Source("ai.yml", data), Drops()))
    assert [d.name for d in documents] == ["ai.yml:1", "ai.yml:2"]
    assert turns(documents[0]) == [("<|user|>", "Is it?"), ("<|assistant|>", "Yes")]
    assert [text for _, text in turns(documents[1])] == ["6 x 7", "42", "so", "1e3"]


def test_odd_chatterbot_conversations_are_counted() -> None:
    drops = Drops()
    data = chatterbot_bytes([["q", "a"], ["only a question"], ["q", {"a": "b"}], ["q", " "]])
    documents = list(ChatterbotFormat().documents(Source("ai.yml", data), drops))
    assert [d.name for d in documents] == ["ai.yml:1"]
    assert drops == {"no answer": 2, "not a list of texts": 1}


@pytest.mark.parametrize(
    "data", [b"", b"- a", b"conversations: 1", b"a: [", b"!!python/object:os.system {}"]
)
def test_yaml_that_is_not_chatterbots(data: bytes) -> None:
    with pytest.raises(MissingError, match=r"^ai\.yml: not chatterbot's YAML"):
        list(ChatterbotFormat().documents(Source("ai.yml", data), Drops()))
