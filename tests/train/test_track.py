from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from valkyrie_core.errors import MissingError
from valkyrie_core.train.config import TensorBoardConfig, TrackioConfig, WandbConfig
from valkyrie_core.train.track import build_tracker, numbers

CONFIGS: list[Any] = [TensorBoardConfig(), TrackioConfig(), WandbConfig()]
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Recorder:
    """Stands for all three libraries: notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Recorder:
            self.calls.append((name, arguments, keywords))
            return self

        return call


def install(monkeypatch: pytest.MonkeyPatch, kind: str) -> Recorder:
    recorder = Recorder()
    module = ModuleType(MODULES[kind])
    for name in ("SummaryWriter", "init", "log", "finish"):
        setattr(module, name, getattr(recorder, name))
    monkeypatch.setitem(sys.modules, MODULES[kind], module)
    return recorder


def test_rows_become_flat_numbers() -> None:
    row = {"kind": "train", "step": 4, "loss": 2, "lr": {"muon": 0.5}, "mfu": None, "note": "x"}
    assert numbers(row) == {"train/loss": 2.0, "train/lr/muon": 0.5}


def test_no_track_key_no_tracker(tmp_path: Path) -> None:
    assert build_tracker(None, tmp_path, recipe={}, first_step=1) is None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_numbers_reach_the_library(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = install(monkeypatch, config.type)
    tracker = build_tracker(config, tmp_path / "quick", recipe={"seed": 1}, first_step=8)
    assert tracker is not None
    tracker.log(8, {"train/loss": 2.5})
    tracker.close()
    names = [name for name, _, _ in recorder.calls]
    said = repr(recorder.calls)
    assert names[-1] in ("close", "finish")
    assert "2.5" in said
    assert "8" in said
    if config.type == "tensorboard":
        # a resumed run hides what was written after its checkpoint
        assert recorder.calls[0][2] == {"purge_step": 8}
    else:
        assert recorder.calls[0][2]["name"] == "quick"
        assert recorder.calls[0][2]["resume"] == "allow"
        assert recorder.calls[0][2]["config"] == {"seed": 1}
    if config.type == "wandb":
        assert recorder.calls[0][2]["mode"] == "offline"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_a_missing_library_names_the_extra(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[config.type], None)
    with pytest.raises(MissingError, match=config.type) as caught:
        build_tracker(config, tmp_path, recipe={}, first_step=1)
    assert caught.value.hint == "pip install 'valkyrie-lab[track]'"
    assert caught.value.exit_code == 4
