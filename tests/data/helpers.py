"""What the data tests share: documents and small corpora without a network."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from valkyrie_core.data.documents import Document, text_document

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "naps", "now"]


def prose(number: int, words: int = 60) -> str:
    """Text that differs from every other number's."""
    picked = [WORDS[(number * 7 + index * (number + 3)) % len(WORDS)] for index in range(words)]
    return f"Story {number}.\n" + " ".join(picked) + ".\n"


def documents(count: int, words: int = 60) -> list[Document]:
    """Documents of prose."""
    return [text_document(f"story-{number}", prose(number, words)) for number in range(count)]


def write_stories(folder: Path, count: int = 12, words: int = 60) -> Path:
    """A folder of text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"story-{number:02d}.txt").write_text(prose(number, words), encoding="utf-8")
    return folder


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_wheel(
    folder: Path, name: str, version: str, members: dict[str, bytes]
) -> tuple[Path, str]:
    """A wheel that pip accepts, and its sha256."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content = {
        **members,
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": tags.encode(),
        f"{info}/RECORD": b"",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def chitchat_bytes(conversations: dict[str, list[tuple[str, str]]]) -> bytes:
    """The JSON of chitchat-dataset for {id: [(sender, text)]}."""
    content = {
        identifier: {"messages": [[{"sender": s, "text": t, "timestamp": ""}] for s, t in messages]}
        for identifier, messages in conversations.items()
    }
    return json.dumps(content).encode()


def chatterbot_bytes(conversations: list[list[object]]) -> bytes:
    """The YAML of one chatterbot-corpus file."""
    return yaml.safe_dump({"categories": ["x"], "conversations": conversations}).encode()
