"""The builder of native code: torn files, odd compilers, and what it says of them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from valkyrie_core.kernels import build
from valkyrie_core.kernels.build import BuildError

SOURCE = "relu_squared"
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing loaded, nothing kept, no compiler asked for its version."""
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    build._machine.cache_clear()


def kept(tmp_path: Path, ending: str = ".so") -> Path:
    (path,) = (tmp_path / "kernels").glob(f"*{ending}")
    return path


@pytest.mark.parametrize("damage", ["truncated", "garbage", "no sum", "other sum"])
def test_a_torn_library_is_built_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    caplog.set_level(logging.WARNING)
    build.library(SOURCE)
    path = kept(tmp_path)
    content = path.read_bytes()
    # another file in its place: the one that is loaded must not change under us
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:8000])
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "no sum":
        path.write_bytes(content)
        kept(tmp_path, ".sha256").unlink()
    else:
        path.write_bytes(content)
        kept(tmp_path, ".sha256").write_text("0" * 64)
    monkeypatch.setattr(build, "_loaded", {})
    assert build.library(SOURCE).relu_squared_forward
    assert kept(tmp_path).stat().st_size == len(content)
    assert not caplog.records


def test_a_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{shutil.which('c++')} -O1 -DANYTHING='a b'")
    assert build.library(SOURCE).relu_squared_forward


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("nonsense", "CXX=nonsense: there is no nonsense"),
        ("'", "is no command"),
        ("FILE", "can't be run"),
    ],
)
def test_an_odd_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, told: str
) -> None:
    if compiler == "FILE":
        program = tmp_path / "compiler"
        program.write_text("not a program")
        program.chmod(0o755)
        compiler = str(program)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(BuildError, match=told):
        build.library(SOURCE)


def test_a_compiler_that_hangs_is_left_after_one_try(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "compiler"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(BuildError, match="took more than"):
        build.library(SOURCE)
    assert time.monotonic() - began < 5


def test_what_killed_builds_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    old, new = folder / ".build-old", folder / ".build-new"
    for left in (old, new):
        left.mkdir(parents=True)
    long_ago = time.time() - 2 * build.KEPT_SECONDS
    os.utime(old, (long_ago, long_ago))
    build.library(SOURCE)
    assert not old.exists()
    assert new.exists()


def test_flags_that_are_refused_are_not_the_last_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    real = subprocess.run

    def run(command: list[str], **keywords: object) -> object:
        if "-fopenmp" in command:
            return subprocess.CompletedProcess(command, 1, "", "error: no such option -fopenmp")
        return real(command, **keywords)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", run)
    assert build.library(SOURCE).relu_squared_forward
    assert "runs on one core" in caplog.text
    assert "-fopenmp" in caplog.text
