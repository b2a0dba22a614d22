import json
import logging

import pytest
import torch

from valkyrie_core.machine import hardware
from valkyrie_core.machine.hardware import MatmulPeak

X86 = """processor\t: 0
model name\t: Example CPU 9000
flags\t\t: fpu avx avx2 avx512f avx512_bf16 avx512_vnni avx512bw
processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor : 0\nFeatures : fp asimd bf16 i8mm\nCPU part : 0xd40\n"


def test_x86_cpuinfo() -> None:
    cpu = hardware.parse_cpuinfo(X86)
    assert cpu.model == "Example CPU 9000"
    assert set(cpu.flags) == {"avx2", "avx512f", "avx512_bf16", "avx512_vnni"}


def test_arm_cpuinfo_has_bf16_and_no_avx() -> None:
    assert set(hardware.parse_cpuinfo(ARM).flags) == {"neon", "bf16"}


def test_a_flag_is_a_whole_word() -> None:
    assert hardware.parse_cpuinfo("flags : avx512_bf16x xavx2\n").flags == ()


@pytest.mark.parametrize(
    ("flags", "expected"), [(("avx2",), False), (("avx512_bf16",), True), (("amx_bf16",), True)]
)
def test_bf16_needs_an_instruction(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], expected: bool
) -> None:
    monkeypatch.setattr(hardware, "cpu", lambda: hardware.Cpu("x", flags))
    assert hardware.supports_bf16() is expected


def test_environment_is_json_and_complete() -> None:
    env = json.loads(json.dumps(hardware.environment()))
    assert env["torch"] == str(torch.__version__)
    assert env["threads"] == torch.get_num_threads()
    assert env["devices"][0]["device"] == "cpu"
    assert set(env["extras"]) == {"gpu", "bench", "track"}


def test_an_absent_module_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "EXTRAS", {"x": {"numpy": "", "no_such_module_here": ""}})
    found = hardware.extras()["x"]
    assert found["no_such_module_here"] is None
    assert found["numpy"]


def test_measured_rate_is_that_of_a_real_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (256,))
    peak = hardware.measure_matmul("fp32")
    assert peak.size == 256
    assert 1e7 < peak.flops_per_second < 1e16


def test_a_size_over_the_budget_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (64, 1024))
    monkeypatch.setattr(hardware, "_time_matmul", lambda operand: 10.0)
    assert hardware.measure_matmul("fp32", budget_seconds=1).size == 64


class TestCache:
    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []

        def measure(precision: str, *, device: str) -> MatmulPeak:
            calls.append(precision)
            return MatmulPeak(100.0 * len(calls), 2048, precision, device)  # type: ignore[arg-type]

        monkeypatch.setattr(hardware, "measure_matmul", measure)
        return calls

    def test_is_measured_once_per_precision(self, tmp_path, measured) -> None:
        first = hardware.matmul_peak("fp32", cache_dir=tmp_path / "new")
        assert hardware.matmul_peak("fp32", cache_dir=tmp_path / "new") == first
        assert hardware.matmul_peak("bf16", cache_dir=tmp_path / "new").flops_per_second == 200.0
        assert hardware.matmul_peak("fp32", cache_dir=tmp_path / "new") == first
        assert measured == ["fp32", "bf16"]
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["machine.json"]

    def test_refresh_measures_again(self, tmp_path, measured) -> None:
        hardware.matmul_peak("fp32", cache_dir=tmp_path)
        assert hardware.matmul_peak("fp32", cache_dir=tmp_path, refresh=True)[0] == 200.0
        assert hardware.matmul_peak("fp32", cache_dir=tmp_path)[0] == 200.0

    def test_another_thread_count_is_another_entry(self, tmp_path, measured, monkeypatch) -> None:
        hardware.matmul_peak("fp32", cache_dir=tmp_path)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        hardware.matmul_peak("fp32", cache_dir=tmp_path)
        assert len(measured) == 2

    @pytest.mark.parametrize("content", ["", "[1]", "{", '{"k": 3}', "\x00"])
    def test_a_damaged_file_costs_a_measurement(
        self, tmp_path, measured, content, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "machine.json").write_text(content)
        with caplog.at_level(logging.WARNING, "valkyrie"):
            assert hardware.matmul_peak("fp32", cache_dir=tmp_path)[0] == 100.0
        assert hardware.matmul_peak("fp32", cache_dir=tmp_path)[0] == 100.0
        assert measured == ["fp32"]

    def test_an_entry_with_wrong_values_is_not_used(self, tmp_path, measured) -> None:
        hardware.matmul_peak("fp32", cache_dir=tmp_path)
        path = tmp_path / "machine.json"
        content = json.loads(path.read_text())
        for entry in content.values():
            entry["flops_per_second"] = -1
        path.write_text(json.dumps(content))
        assert hardware.matmul_peak("fp32", cache_dir=tmp_path)[0] == 200.0

    def test_a_folder_that_cannot_be_made_is_no_error(self, tmp_path, measured, caplog) -> None:
        (tmp_path / "file").write_text("")
        with caplog.at_level(logging.WARNING, "valkyrie"):
            assert hardware.matmul_peak("fp32", cache_dir=tmp_path / "file" / "x")[0] == 100.0
        assert "not kept" in caplog.text
