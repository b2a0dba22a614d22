from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from valkyrie_core import kernels
from valkyrie_core.machine import doctor, hardware


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (64,))


def examine(tmp_path: Path, **changes: object) -> dict[str, doctor.Check]:
    arguments: dict[str, object] = {
        "runs_dir": tmp_path / "runs",
        "cache_dir": tmp_path / "cache",
        "kernels": SimpleNamespace(),
        "self_test": lambda: (2.0, 1.0),
    }
    checks = doctor.examine(**{**arguments, **changes})  # type: ignore[arg-type]
    return {check.what: check for check in checks}


def test_this_machine_is_healthy(tmp_path: Path) -> None:
    checks = examine(tmp_path)
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert checks["self test"].status == "ok"
    assert {"python", "torch", "kernels", "matmul peak", "disk", "cache", "pip"} <= set(checks)
    assert {"extra gpu", "extra bench", "extra track"} <= set(checks)


def test_a_step_that_does_not_learn_fails(tmp_path: Path) -> None:
    assert examine(tmp_path, self_test=lambda: (1.0, 1.0))["self test"].status == "fail"
    assert examine(tmp_path, self_test=lambda: (1.0, float("nan")))["self test"].status == "fail"


def test_a_step_that_differs_is_a_warning(tmp_path: Path) -> None:
    losses = iter([(2.0, 1.0), (2.0, 1.5)])
    assert examine(tmp_path, self_test=lambda: next(losses))["self test"].status == "warn"


def test_a_crash_is_reported_and_ends_nothing(tmp_path: Path) -> None:
    def broken() -> tuple[float, float]:
        raise RuntimeError("no kernel image\nmore")

    checks = examine(tmp_path, self_test=broken)
    assert checks["self test"].status == "fail"
    assert checks["self test"].detail == "RuntimeError: no kernel image"
    assert list(checks)[-1] == "self test"


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.9.1+cpu", "fail"), ("2.10.0", "ok"), ("2.13.0+cpu", "ok"), ("2.14.0a0+git1", "ok")],
)
def test_torch_has_a_floor(version: str, status: str) -> None:
    assert doctor.check_torch(version).status == status


def test_the_form_of_the_kernel_and_why() -> None:
    def check(*answer: str | None) -> doctor.Check:
        return doctor.check_kernels(SimpleNamespace(available=lambda: answer))

    assert (check("native", None).status, check("native", None).detail) == ("ok", "wkv7: native")
    slow = check("chunked", "no C++ compiler")
    assert slow.status == "warn"
    assert "chunked" in slow.detail
    assert "no C++ compiler" in slow.detail
    assert "chunked" in doctor.check_kernels(SimpleNamespace()).detail


def test_the_real_kernels_answer() -> None:
    assert doctor.check_kernels(kernels).status in ("ok", "warn")


def test_folders_that_are_files_or_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    checks = examine(tmp_path, runs_dir=tmp_path / "file", cache_dir=tmp_path / "file")
    assert checks["disk"].status == "fail"
    assert checks["cache"].status == "fail"
    assert "VALKYRIE_CACHE" in str(checks["cache"].fix)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    assert examine(tmp_path)["disk"].status == "warn"


def test_looking_makes_no_folder(tmp_path: Path) -> None:
    doctor.check_disk(tmp_path / "a" / "runs")
    doctor.check_cache(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_no_bf16_no_pip_and_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu", lambda: hardware.Cpu("old", ("avx2",)))
    assert doctor.check_bf16("cpu").status == "warn"
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 0)
    assert doctor.check_threads().fix == "export OMP_NUM_THREADS=0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.check_pip().status == "warn"


def test_an_extra_says_what_it_is_missing_for(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = {"x": {"numpy": "counting", "no_such_module_here": "flying"}}
    monkeypatch.setattr(hardware, "EXTRAS", extras)
    (check,) = doctor.check_extras()
    assert "numpy" in check.detail
    assert "no_such_module_here (for flying)" in check.detail
    assert check.fix == "pip install 'valkyrie-lab[x]'"
