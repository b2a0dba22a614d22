from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from valkyrie_core.data import cache
from valkyrie_core.errors import MissingError, ResourceError


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VALKYRIE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_dir() == tmp_path / ".cache" / "valkyrie"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_dir() == Path("/x/valkyrie")
    monkeypatch.setenv("VALKYRIE_CACHE", "~/mine")
    assert cache.cache_dir() == tmp_path / "mine"


def write(directory: Path) -> dict[str, Any]:
    (directory / "inner").mkdir()
    (directory / "inner" / "a.bin").write_bytes(bytes(range(256)))
    (directory / "b.txt").write_text("hello")
    return {"answer": 42}


def test_an_entry_is_written_and_opened(tmp_path: Path) -> None:
    with cache.locked(tmp_path, "kind", "key") as folder:
        assert cache.open_entry(folder / "key") is None
        directory = cache.commit(folder, "key", write)
        assert cache.open_entry(directory) == {"answer": 42}
        assert (directory / "inner" / "a.bin").read_bytes() == bytes(range(256))
        # an entry is replaced as a whole
        cache.commit(folder, "key", lambda d: {"answer": len(list(d.iterdir()))})
        assert cache.open_entry(directory) == {"answer": 0}
        assert not (directory / "b.txt").exists()


def test_a_failed_writer_leaves_the_old_entry_and_no_litter(tmp_path: Path) -> None:
    def fail(directory: Path) -> dict[str, Any]:
        write(directory)
        raise RuntimeError("killed")

    cache.commit(tmp_path, "key", write)
    with pytest.raises(RuntimeError, match="killed"):
        cache.commit(tmp_path, "key", fail)
    assert cache.open_entry(tmp_path / "key") == {"answer": 42}
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-key-abc").mkdir()
    (tmp_path / ".tmp-key-abc" / "half").write_text("x")
    (tmp_path / ".tmp-other-abc").mkdir()
    cache.commit(tmp_path, "key", write)
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".tmp-other-abc"}


@pytest.mark.parametrize("name", ["inner/a.bin", "b.txt", "manifest.json"])
def test_every_damage_is_noticed(tmp_path: Path, name: str) -> None:
    directory = cache.commit(tmp_path, "key", write)
    path = directory / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            content = cache.open_entry(directory)
        except cache.DamagedError:
            continue
        # white space between the parts of the manifest is the one thing that may change
        assert name == "manifest.json"
        assert content == {"answer": 42}
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(cache.DamagedError):
            cache.open_entry(directory)
    path.unlink()
    with pytest.raises(cache.DamagedError):
        cache.open_entry(directory)
    path.write_bytes(whole)
    assert cache.open_entry(directory) == {"answer": 42}


def test_files_are_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    names = {}
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_fsync(handle)

    def replace(self: Path, target: Path) -> Path:
        names[Path(target).name] = self.name
        events.append(f"rename {Path(target).name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    cache.commit(tmp_path, "key", write)
    temporary = names["key"]
    rename = events.index("rename key")
    for needed in ("fsync a.bin", "fsync b.txt", "fsync inner", "rename manifest.json"):
        assert events.index(needed) < rename
    manifest = events.index("rename manifest.json")
    assert manifest > max(events.index("fsync a.bin"), events.index("fsync b.txt"))
    assert f"fsync {temporary}" in events[manifest:rename]
    assert f"fsync {tmp_path.name}" in events[rename:]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        cache.write_synced(tmp_path / "file", b"x")
        directory = cache.commit(tmp_path, "key", write)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert directory.stat().st_mode & 0o777 == 0o750


def test_a_full_disk_and_a_forbidden_folder_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="no space left to write"):
        cache.commit(tmp_path, "key", full)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(MissingError, match="can't write") as caught,
        cache.locked(tmp_path / "file", "kind", "key"),
    ):
        pass
    assert "VALKYRIE_CACHE" in str(caught.value.hint)


def test_fingerprints_are_stable() -> None:
    assert cache.fingerprint({"b": 1, "a": [True, None, "é"]}) == cache.fingerprint(
        {"a": [True, None, "é"], "b": 1}
    )
    assert cache.fingerprint([1, 2]) != cache.fingerprint([12])
    assert (
        cache.fingerprint({}) == "0f0a7bd3cd8ab3a9a4fdf86a08a11f7c"
        or len(cache.fingerprint({})) == 32
    )
