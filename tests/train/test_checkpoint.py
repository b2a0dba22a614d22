from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from valkyrie_core.errors import CheckpointError, ResourceError
from valkyrie_core.train import checkpoint as module
from valkyrie_core.train.checkpoint import (
    FILES,
    list_checkpoints,
    newest_valid,
    prune,
    remove_leftovers,
    save_checkpoint,
    set_aside,
    step_directory,
    verify,
)
from valkyrie_core.train.manifest import MANIFEST
from valkyrie_core.train.storage import Storage

ALL_FILES = sorted([*FILES, MANIFEST])


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 5, generator=generator),
        "turned": torch.randn(4, 6, generator=generator).T,  # not contiguous
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0),
        "half": torch.randn(3, generator=generator).bfloat16(),
    }


def save(directory: Path, step: int, storage: Storage | None = None, **meta: Any) -> Path:
    return save_checkpoint(
        directory,
        step,
        model=tensors(step),
        training={"rng": torch.arange(9)},
        meta={"position": {"step": step}, **meta},
        storage=storage or Storage(),
    )


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].contiguous().reshape(-1).view(torch.uint8).tolist()
        == other[name].contiguous().reshape(-1).view(torch.uint8).tolist()
        for name in one
    )


def test_what_is_saved_comes_back(folder: Path) -> None:
    path = save(folder, 500, note="Grüße")
    assert path == folder / "step-000500"
    found = newest_valid(folder).checkpoint
    assert found is not None
    assert found.step == 500
    assert found.meta == {"position": {"step": 500}, "note": "Grüße"}
    assert same(found.model_tensors(), tensors(500))
    assert same(found.training_tensors(), {"rng": torch.arange(9)})
    assert sorted(file.name for file in path.iterdir()) == ALL_FILES
    assert list(folder.iterdir()) == [path]


def test_saving_again_replaces(folder: Path) -> None:
    save(folder, 3, note="old")
    save(folder, 3, note="new")
    assert verify(step_directory(folder, 3)).meta["note"] == "new"
    assert [entry.name for entry in folder.iterdir()] == ["step-000003"]


def test_nan_is_no_json(folder: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(folder, 1, loss=float("nan"))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(folder: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        path = save(folder, 1)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert modes == dict.fromkeys(ALL_FILES, mode)


def test_every_file_is_on_the_disk_before_it_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut: files, manifest last, directory, rename, parent."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    events: list[tuple[str, str]] = []
    storage = Storage(lambda event, path: events.append((event, path.name)))
    final = save(folder, 1, storage)
    operations = [(e.removeprefix("after "), name) for e, name in events if e.startswith("after")]
    temporary = operations[0][1]
    rename = operations.index(("rename", final.name))
    for name in ALL_FILES:
        written = max(i for i, op in enumerate(operations) if op[1] == name and op[0] != "fsync")
        assert written < operations.index(("fsync", name)) < rename
    manifest_written = operations.index(("write", MANIFEST))
    assert all(operations.index(("fsync", name)) < manifest_written for name in FILES)
    assert operations[rename - 1] == ("fsync", temporary)
    assert operations[rename + 1] == ("fsync", folder.name)
    # and each of those was one call of the system, on the right file
    expected = [*(final / name for name in ALL_FILES), final, folder]
    assert sorted(synced) == sorted(path.stat().st_ino for path in expected)


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_truncation_is_detected(folder: Path, name: str) -> None:
    path = save(folder, 1)
    file = path / name
    data = file.read_bytes()
    for part in range(64):
        file.write_bytes(data[: len(data) * part // 64])
        with pytest.raises(CheckpointError, match=name):
            verify(path)
    for added in (b"\0", b"\n", b" "):  # JSON would not mind the last two
        file.write_bytes(data + added)
        with pytest.raises(CheckpointError, match=name):
            verify(path)


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_flipped_bit_is_detected(folder: Path, name: str) -> None:
    path = save(folder, 1)
    file = path / name
    data = bytearray(file.read_bytes())
    rng = random.Random(name)
    for _ in range(250):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"step-000001|MANIFEST"):
            verify(path)
        data[place] ^= bit
    file.write_bytes(data)
    verify(path)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_detected(folder: Path, name: str) -> None:
    path = save(folder, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify(path)


def test_files_of_another_checkpoint_are_detected(folder: Path) -> None:
    one, two = save(folder, 1), save(folder, 2)
    for name in ALL_FILES:
        kept = (two / name).read_bytes()
        if kept == (one / name).read_bytes():
            continue
        shutil.copy(one / name, two / name)
        with pytest.raises(CheckpointError):
            verify(two)
        (two / name).write_bytes(kept)
    verify(two)
    shutil.rmtree(two)
    shutil.copytree(one, two)  # a whole checkpoint under another step's name
    with pytest.raises(CheckpointError, match="step 1"):
        verify(two)


def test_links_are_refused(folder: Path) -> None:
    path = save(folder, 1)
    real = folder / "elsewhere"
    path.rename(real)
    path.symlink_to(real)
    with pytest.raises(CheckpointError, match="directory of its own"):
        verify(path)
    path.unlink()
    real.rename(path)
    for name in ALL_FILES:
        (path / name).rename(folder / "moved")
        (path / name).symlink_to(folder / "moved")
        with pytest.raises(CheckpointError, match="regular file"):
            verify(path)
        (path / name).unlink()
        (folder / "moved").rename(path / name)
    verify(path)


@pytest.mark.parametrize("evil", ["../meta.json", "/etc/passwd", "a/b", "meta.json\0", ""])
def test_a_manifest_can_name_no_other_file(folder: Path, evil: str) -> None:
    path = save(folder, 1)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"][evil] = manifest["files"].pop("meta.json")
    # sealed again, as somebody would who wants to be believed
    forged = module.Manifest.model_validate_json(json.dumps(manifest)).sealed()
    (path / MANIFEST).write_bytes(forged.to_bytes())
    with pytest.raises(CheckpointError, match="names other files"):
        verify(path)


def test_a_manifest_of_a_later_layout_says_so(folder: Path) -> None:
    path = save(folder, 1)
    manifest = module.Manifest.model_validate_json((path / MANIFEST).read_bytes())
    later = manifest.model_copy(update={"schema_version": 99}).sealed()
    (path / MANIFEST).write_bytes(later.to_bytes())
    with pytest.raises(CheckpointError, match="layout 99"):
        verify(path)


JUNK = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 50_000,
    b"9" * 10_000,
    b"x" * 100_000,
    b'{"schema_version":1,"step":-1,"files":{},"checksum":""}',
    b'{"a":"\\ud800"}',
)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_manifests_are_refused(folder: Path, junk: bytes) -> None:
    path = save(folder, 1)
    (path / MANIFEST).write_bytes(junk)
    with pytest.raises(CheckpointError, match="MANIFEST"):
        verify(path)


def test_only_real_checkpoint_names_are_listed(folder: Path) -> None:
    save(folder, 7)
    save(folder, 1_234_567)
    for name in (
        "step-7",
        "step-xyz",
        "step-000007.bak",
        "step-0000009",
        "step-" + "9" * 40,
        "step-",
    ):
        (folder / name).mkdir()
    (folder / ".tmp-step-000009-1").mkdir()
    assert [step for step, _ in list_checkpoints(folder)] == [1_234_567, 7]
    assert list_checkpoints(folder / "nowhere") == []


def test_a_damaged_one_falls_back_loudly(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(folder, 1)
    (save(folder, 2) / "model.safetensors").write_bytes(b"gone")
    (folder / "step-000003").mkdir()
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        found = newest_valid(folder)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert [path.name for path in found.damaged] == ["step-000003", "step-000002"]
    assert "step-000003" in caplog.text
    assert "model.safetensors has 4 bytes" in caplog.text
    assert "falling back to the older checkpoint" in caplog.text


def test_no_valid_one_is_an_error_and_none_at_all_is_not(folder: Path) -> None:
    assert newest_valid(folder) == (None, ())
    for step in (1, 2):
        (save(folder, step) / "meta.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as caught:
        newest_valid(folder)
    assert caught.value.exit_code == 5


def test_damaged_ones_are_set_aside(folder: Path) -> None:
    save(folder, 1)
    for _ in range(2):  # twice: the second one replaces the first
        (save(folder, 2) / "meta.json").write_bytes(b"{}")
        set_aside(newest_valid(folder).damaged, Storage())
        assert {entry.name for entry in folder.iterdir()} == {"step-000001", "damaged-step-000002"}


def test_pruning_keeps_the_newest_and_the_best(folder: Path) -> None:
    for step in range(6):
        save(folder, step)
    prune(folder, keep_last=2, keep_steps=[1], storage=Storage())
    assert [step for step, _ in list_checkpoints(folder)] == [5, 4, 1]


def test_leftovers_go_and_a_half_replaced_checkpoint_comes_back(folder: Path) -> None:
    save(folder, 1).rename(folder / ".old-step-000001")
    save(folder, 2)
    shutil.copytree(folder / "step-000002", folder / ".old-step-000002")
    shutil.copytree(folder / "step-000002", folder / ".tmp-step-000003-77")
    (folder / ".del-step-000000-77").mkdir()
    (folder / ".tmp-recipe.json-77").write_text("x")
    remove_leftovers(folder, Storage())
    assert {entry.name for entry in folder.iterdir()} == {"step-000001", "step-000002"}
    assert verify(folder / "step-000001").step == 1


class Failing:
    """Fails the n-th operation with an error number, `times` times from there on."""

    def __init__(self, at: int, number: int, times: int = 10**9) -> None:
        self.count, self.at, self.number, self.times = 0, at, number, times

    def __call__(self, event: str, path: Path) -> None:
        self.count += 1
        if self.count >= self.at and self.times > 0:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number), str(path))


def count_operations(folder: Path) -> int:
    counter = Failing(10**9, errno.EIO)
    save(folder / "count", 1, Storage(counter))
    return counter.count


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", 0.0)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_failing_disk_costs_no_older_checkpoint(folder: Path, number: int) -> None:
    (folder / "count").mkdir()
    total = count_operations(folder)
    assert total > 20
    runs = folder / "runs"
    runs.mkdir()
    save(runs, 1)
    for at in range(1, total + 1):
        with pytest.raises(ResourceError, match=os.strerror(number)) as caught:
            save(runs, 2, Storage(Failing(at, number)))
        assert caught.value.exit_code == 7
        assert verify(step_directory(runs, 1)).step == 1
        # what is there under the name of a checkpoint is a checkpoint
        for _, path in list_checkpoints(runs):
            verify(path)
        shutil.rmtree(step_directory(runs, 2), ignore_errors=True)
        remove_leftovers(runs, Storage())


@pytest.mark.usefixtures("_no_waiting")
def test_temporary_files_of_a_failed_save_are_removed(folder: Path) -> None:
    with pytest.raises(ResourceError):
        save(folder, 1, Storage(Failing(8, errno.ENOSPC, times=1)))
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("_no_waiting")
def test_a_passing_error_is_tried_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        save(folder, 1, Storage(Failing(5, errno.EIO, times=1)))
    assert verify(step_directory(folder, 1)).step == 1
    assert "trying again" in caplog.text


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_disk_that_writes_something_else_is_noticed(folder: Path, name: str) -> None:
    """A bit that flips on its way to the disk: only comparing with memory can tell."""

    def corrupt(event: str, path: Path) -> None:
        if event == "after write" and path.name == name:
            data = bytearray(path.read_bytes())
            data[-3] ^= 4
            path.write_bytes(data)

    with pytest.raises(ResourceError, match="reads back differently"):
        save(folder, 1, Storage(corrupt))
    assert list(folder.iterdir()) == []


FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from pathlib import Path
from valkyrie_core.errors import ResourceError
from valkyrie_core.train.checkpoint import save_checkpoint
from valkyrie_core.train.storage import Storage
directory = Path({folder!r})
def save(step, storage=Storage()):
    save_checkpoint(directory, step, model={{"w": torch.zeros(20_000)}}, training={{}}, meta={{}},
                    storage=storage)
save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    save(2)
except ResourceError as error:
    print("refused:", error)
"""


def test_a_file_size_limit_is_a_full_disk(folder: Path) -> None:
    assert resource.RLIMIT_FSIZE is not None
    code = FULL_DISK.format(root=str(Path(__file__).parents[2]), folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "refused: the checkpoint of step 2 could not be written" in done.stdout
    assert [entry.name for entry in folder.iterdir()] == ["step-000001"]
    assert verify(folder / "step-000001").step == 1
