from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from valkyrie_core.data.corpus import PythonCorpus, read_corpus
from valkyrie_core.errors import MissingError


def test_documentation_topics(tmp_path: Path) -> None:
    train, validation, _ = read_corpus("p", PythonCorpus(parts=("documentation",)), cache=tmp_path)
    names = {d.name for d in (*train, *validation)}
    assert "documentation/assert" in names
    assert len(names) > 50
    (text,) = [d.text for d in (*train, *validation) if d.name == "documentation/assert"]
    assert "assert_stmt" in text


def test_source_without_tests_and_packages(tmp_path: Path) -> None:
    train, validation, _ = read_corpus("p", PythonCorpus(parts=("source",)), cache=tmp_path)
    names = {d.name for d in (*train, *validation)}
    assert "source/os.py" in names
    assert "source/json/decoder.py" in names
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
    }
    assert len(names) > 300


def test_max_documents_takes_the_first_and_counts_the_rest(tmp_path: Path) -> None:
    everything = read_corpus("p", PythonCorpus(parts=("documentation",)), cache=tmp_path)
    few = read_corpus("p", PythonCorpus(parts=("documentation",), max_documents=10), cache=tmp_path)
    names = sorted(d.name for d in (*everything.train, *everything.validation))
    assert sorted(d.name for d in (*few.train, *few.validation)) == names[:10]
    total = len(names) + sum(everything.dropped.values())
    assert few.dropped == {"over max_documents": total - 10}


def test_the_digest_depends_on_what_is_read(tmp_path: Path) -> None:
    digests = {
        PythonCorpus(parts=("documentation",), max_documents=n).digest(tmp_path) for n in (5, 6, 6)
    }
    assert len(digests) == 2


def test_a_python_without_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(MissingError, match="without the source of its standard library"):
        read_corpus("p", PythonCorpus(parts=("source",)), cache=tmp_path)


def test_parts_must_name_something() -> None:
    with pytest.raises(ValueError, match="parts"):
        PythonCorpus(parts=())
