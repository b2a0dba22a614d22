"""`valkyrie recipe ...` as a user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.wrong_recipes import RIGHT
from valkyrie_cli.main import main
from valkyrie_core.recipe import resolve_bytes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text(RIGHT, encoding="utf-8")
    return tmp_path


def run_json(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    assert main(["recipe", *args, "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == f"valkyrie.recipe.{args[0]}/1"
    return report


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in run_json(capsys, "list")["recipes"]}
    assert rows["mine"]["source"] == "here"
    assert rows["tiny/hybrid"]["source"] == "packaged"
    assert main(["recipe", "list"]) == 0
    assert "Two corpora" in capsys.readouterr().out


def test_show_prints_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "mine", "--set", "train.steps=7", "--explain"]) == 0
    shown = capsys.readouterr().out
    assert resolve_bytes(shown.encode(), "shown.yaml").recipe.train.steps == 7
    assert "# --set" in shown
    assert "# line 16" in shown
    assert "# Width of the residual stream." in shown
    report = run_json(capsys, "show", "mine")
    values = {row["path"]: row for row in report["values"]}
    assert values["model.dim"]["value"] == 64
    assert values["model.dim"]["origin"] == "recipes/mine.yaml:16"
    assert report["resolved"]["model"]["vocab_size"] == 512


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "check", "mine", "recipes/mine.yaml"]) == 0
    assert capsys.readouterr().out == "recipes/mine.yaml: fine\n" * 2
    assert len(run_json(capsys, "check", "mine", "hybrid")["recipes"]) == 2


def test_check_tells_the_mistakes_of_all_files(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.yaml").write_text(RIGHT.replace("    pattern:", "    patern:"), encoding="utf-8")
    Path("two.yaml").write_text("[]", encoding="utf-8")
    assert main(["recipe", "check", "one.yaml", "mine", "two.yaml"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[:2] == [
        "one.yaml:26:5: model.core.patern: unknown key - did you mean 'pattern'?",
        "two.yaml:1:1: a recipe is a mapping of keys to values (got a list)",
    ]
    assert "Traceback" not in captured.err
    report = run_json(capsys, "check", "one.yaml", code=3)
    assert report["error"]["exit_code"] == 3
    assert "did you mean 'pattern'?" in report["error"]["message"]


def test_a_missing_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", "mien"]) == 4
    assert "did you mean mine?" in capsys.readouterr().err


def test_diff(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text(RIGHT.replace("dim: 64", "dim: 128", 1), encoding="utf-8")
    assert main(["recipe", "diff", "mine", "other.yaml"]) == 0
    out = capsys.readouterr().out
    assert "model.dim" in out
    assert "128" in out
    assert run_json(capsys, "diff", "mine", "other.yaml")["differences"] == [
        {"path": "model.dim", "left": 64, "right": 128, "side": "both"}
    ]
    assert main(["recipe", "diff", "mine", "mine"]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_copy_refuses_to_overwrite(capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "copy", "tiny/hybrid", "new.yaml")
    assert Path(report["destination"]).read_bytes() == Path(report["source"]).read_bytes()
    assert main(["recipe", "copy", "mine", "new.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["recipe", "check", "new.yaml"]) == 0


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "schema"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["$schema"].endswith("2020-12/schema")
    assert run_json(capsys, "schema")["json_schema"] == document


@pytest.mark.parametrize("command", ["list", "show", "check", "diff", "copy", "schema"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"valkyrie recipe {command}" in out
    assert "Examples:" in out


@pytest.mark.parametrize("command", [["list"], ["copy", "mine", "new.yaml"], ["--help"]])
def test_what_needs_no_model_imports_no_torch(command: list[str]) -> None:
    code = (
        "import sys; from valkyrie_cli.main import main; "
        f"code = main({['recipe', *command]!r}); sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
