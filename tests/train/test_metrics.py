from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from valkyrie_core.train.curves import draw_curves
from valkyrie_core.train.metrics import MetricsLog, read_metrics, samples_markdown
from valkyrie_core.train.storage import Storage

ROWS: list[dict[str, Any]] = [
    {"kind": "train", "step": 1, "loss": 2.25, "lr_scale": 0.5},
    {"kind": "val", "step": 1, "bpb": 3.5, "bpb_by_corpus": {"a": 3.5, r"$\b$": 4.0}},
    {"kind": "sample", "step": 1, "prompt": "Où", "text": "\x1b[31m\u202e été\nnext"},
    {"kind": "train", "step": 2, "loss": 2.125, "lr_scale": 1.0},
    {"kind": "val", "step": 2, "bpb": 3.25, "bpb_by_corpus": {"a": 3.25, r"$\b$": 3.75}},
]


def written(path: Path) -> MetricsLog:
    log = MetricsLog(path, Storage())
    log.start(lambda _row: False)
    for row in ROWS:
        log.write(row)
    return log


def test_rows_come_back(tmp_path: Path) -> None:
    log = written(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS == log.rows
    assert log.last("val") == ROWS[4]
    assert log.of_kind("train") == [ROWS[0], ROWS[3]]
    assert log.last("nothing") is None


def test_a_file_cut_anywhere_keeps_its_whole_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)  # a row without its newline may be whole too
        with caplog.at_level(logging.WARNING, logger="valkyrie"):
            rows = read_metrics(path)
            assert rows == ROWS[:whole]
            # the log goes on with a clean line, and what it read is what is in the file
            log = MetricsLog(path, Storage())
            log.start(lambda _row: True)
            log.write({"kind": "train", "step": 9})
        assert read_metrics(path) == [*rows, {"kind": "train", "step": 9}]
    assert caplog.text == ""


def test_a_damaged_row_in_the_middle_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind":"train","step":1}\nnonsense\n7\n{"kind":"train","step":2}\n')
    with caplog.at_level(logging.WARNING, logger="valkyrie"):
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert "metrics.jsonl:2" in caplog.text
    assert "metrics.jsonl:3" in caplog.text


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path)
    log = MetricsLog(path, Storage())
    log.start(lambda row: row["step"] <= 1)
    log.write(ROWS[3])
    assert read_metrics(path) == ROWS[:4]


def test_nan_is_refused(tmp_path: Path) -> None:
    log = written(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write({"kind": "train", "step": 3, "loss": float("nan")})
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS


def test_samples_can_not_control_a_terminal() -> None:
    text = samples_markdown([ROWS[2]])
    assert "## Step 1" in text
    assert "    Où▸\\x1b[31m\\u202e été\n    next\n" in text
    assert all(char == "\n" or char.isprintable() for char in text)


@pytest.mark.parametrize("rows", [ROWS, [ROWS[2]]])
def test_curves_are_a_picture_of_the_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    picture = draw_curves(rows, title="small_run $x_1$")
    (tmp_path / "curves.png").write_bytes(picture)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1080, 960)
    assert picture == draw_curves(rows, title="small_run $x_1$")
    assert picture != draw_curves([*rows, ROWS[0] | {"step": 50, "loss": 9.0}], title="small_run")


def test_lines_are_json(tmp_path: Path) -> None:
    written(tmp_path / "metrics.jsonl")
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS
