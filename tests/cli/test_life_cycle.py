"""The main job through the command line: train, resume, extend, evaluate, generate, list."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Cli

STEPS = ("--set", "train.steps=6", "--set", "train.eval_every=3", "--set", "train.log_every=2")


def no_traceback(text: str) -> bool:
    return "Traceback" not in text and "crash" not in text


def test_train_to_the_end_and_beyond(cli: Cli, tmp_path: Path, cache: Path) -> None:
    args = ("train", str(TINY), *STEPS, "--set", f"runs_dir={tmp_path}", "--set", "name=one")

    first = cli(*args, "--json")
    assert first.code == 0, first.err
    report = first.json
    assert report["schema"] == "valkyrie.train/1"
    assert report["run"] == "one"
    assert report["steps"] == report["total_steps"] == 6
    assert report["finished"] is True
    assert report["tokens_seen"] == 6 * 4 * 64
    assert report["seconds"] > 0
    assert report["tokens_per_second"] > 0
    assert 0 < report["train_loss"] < math.log(261) + 1
    assert 0 < report["val_bpb"] < 9
    assert report["val_bpb_by_corpus"] == {"python": report["val_bpb"]}
    assert report["parameters"] > 10_000
    assert report["kernels"]["attention"] == "scaled_dot_product_attention"
    assert report["corpora"]["python"]["train"]["documents"] == 39
    for told in ("parameters", "training on cpu", "bytes per token", "dropped", "step 6/6"):
        assert told in first.err
    directory = tmp_path / "one"
    for name in ("recipe.json", "metrics.jsonl", "report.json", "curves.png", "environment.json"):
        assert (directory / name).is_file(), name
    assert json.loads((directory / "report.json").read_text()) == report

    again = cli(*args, "--json")
    assert again.code == 2
    assert again.json["schema"] == "valkyrie.train/1"
    assert "exists already" in again.json["error"]["message"]
    assert "--extend-steps N" in again.json["error"]["hint"]

    resumed = cli(*args, "--resume", "--json")
    assert resumed.code == 0
    assert resumed.json["steps"] == 6
    assert resumed.json["val_bpb"] == report["val_bpb"]
    assert "finished" in resumed.err

    beyond = cli(*args, "--resume", "--steps", "9", "--json")
    assert beyond.code == 2
    assert "--extend-steps 3" in beyond.json["error"]["hint"]

    longer = cli(*args, "--extend-steps", "3")
    assert longer.code == 0
    assert re.search(r"steps +9 of 9", longer.out)
    assert "schedule" in longer.err
    assert "step 8/9" in longer.err


def test_steps_set_the_horizon_of_a_fresh_run(cli: Cli, tmp_path: Path, cache: Path) -> None:
    outcome = cli(
        "train", str(TINY), *STEPS, "--set", f"runs_dir={tmp_path}", "--steps", "3", "--json"
    )
    assert outcome.code == 0
    assert outcome.json["steps"] == outcome.json["total_steps"] == 3


def test_eval_asks_questions(cli: Cli, tmp_path: Path, cache: Path) -> None:
    trained = cli("train", "tiny/questions", "--steps", "2", "--set", f"runs_dir={tmp_path}")
    assert trained.code == 0, trained.err
    outcome = cli("eval", "--runs-dir", str(tmp_path), "--json")
    assert outcome.code == 0, outcome.err
    scores = outcome.json["corpora"]
    assert set(scores) == {"khop", "expression", "sudoku", "maze"}
    for name, score in scores.items():
        found = score["accuracy"]
        assert found["questions"] == score["documents"], name
        assert 0 <= found["share"] <= 1
        assert 0 < found["constant_answer"] < 1 or name in ("sudoku", "maze")
        levels = found["by_difficulty"].values()
        assert min(levels) <= found["share"] <= max(levels)
    plain = cli("eval", "--runs-dir", str(tmp_path))
    assert "khop: right answers" in plain.out
    assert "one answer for all" in plain.out


def test_eval_says_what_the_score_is_worth(cli: Cli, runs_dir: Path) -> None:
    outcome = cli("eval", "tiny-hybrid", "--runs-dir", str(runs_dir), "--json")
    assert outcome.code == 0
    report = outcome.json
    assert report["schema"] == "valkyrie.eval/1"
    assert report["run"] == "tiny-hybrid"
    (score,) = report["corpora"].values()
    assert score["baselines"]["uniform"] == 8
    assert set(score["baselines"]) == {"uniform", "unigram", "xz", "xz_given_training"}
    # every byte but none of the markers: the tokenizer is `bytes`
    assert score["tokens"] == score["bytes"] > 10_000
    assert 0 < score["bpb"] < 9
    plain = cli("eval", "--runs-dir", str(runs_dir))
    assert plain.code == 0
    assert f"{score['bpb']:.4f}" in plain.out
    assert "run tiny-hybrid" in plain.err
    assert "tiny-hybrid" in plain.out


def test_eval_reads_a_long_text(cli: Cli, runs_dir: Path, tmp_path: Path) -> None:
    args = ("eval", "tiny-hybrid", "--runs-dir", str(runs_dir), "--long-context", "512")
    outcome = cli(*args, "--chunk", "100", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json
    assert report["schema"] == "valkyrie.long_context/1"
    assert [x["context"] for x in report["by_context"]] == [256, 512]
    assert [x["end"] for x in report["by_position"]] == [256, 512]
    assert [x["length"] for x in report["memory"]] == [256, 512]
    assert report["memory"][0]["cache_bytes"] < report["memory"][1]["cache_bytes"]
    assert {x["task"] for x in report["recall"]} == {"passkey", "needles", "mqar", "variables"}
    assert {x["depth"] for x in report["recall"]} == {None, 0.0, 0.25, 0.5, 0.75, 1.0}
    run = runs_dir / "tiny-hybrid"
    kept = json.loads((run / "long_context.json").read_text(encoding="utf-8"))
    assert kept["by_context"] == report["by_context"]
    assert (run / "long_context.png").read_bytes().startswith(b"\x89PNG")

    switches = ("--kv-window", "32", "--kv-dtype", "int8", "--state-dtype", "int8", "--yarn", "4")
    quick = cli(*args, *switches, "--no-recall", "--report")
    assert quick.code == 0, quick.err
    assert "facts found" not in quick.out
    assert "Facts found" not in (run / "long_context.md").read_text(encoding="utf-8")
    (run / "long_context.md").unlink()
    squeezed = cli(*args, *switches, "--json").json
    assert squeezed["changes"] == {
        "kv_window": 32, "kv_dtype": "int8", "state_dtype": "int8", "yarn": 4
    }  # fmt: skip
    before = squeezed["as_trained"]
    assert before["by_context"] == report["by_context"]
    assert squeezed["by_context"] != before["by_context"]
    for kind in ("state_bytes", "cache_bytes", "snapshot_bytes"):
        assert squeezed["memory"][-1][kind] < before["memory"][-1][kind]
    assert not (run / "long_context.md").exists()
    assert "as trained" in cli(*args, *switches, "--report").out
    page = (run / "long_context.md").read_text(encoding="utf-8")
    assert f"valkyrie eval {run} --long-context 512" in page
    assert "--kv-window 32 --kv-dtype int8 --state-dtype int8 --yarn 4.0 --report" in page
    assert f"{squeezed['by_context'][1]['bpb']:.4f}" in page
    assert "## The price of kv_window 32" in page
    assert "](long_context.png)" in page

    book = tmp_path / "book.txt"
    book.write_text("A short sentence, again and again. " * 40, encoding="utf-8")
    own = cli(*args, "--text", str(book))
    assert own.code == 0, own.err
    assert str(book.name) in own.out
    book.write_bytes(b"\xff\xfe")
    for wrong, code in (
        (("--text", str(book)), 2),
        (("--text", str(tmp_path / "none")), 4),
        (("--chunk", "0"), 2),
        (("--kv-window", "0"), 2),
        (("--yarn", "0.5"), 2),
        (("--yarn", "1"), 2),
        (("--yarn", "inf"), 2),
        (("--kv-window", "512"), 2),
        (("--kv-dtype", "int4"), 2),
    ):
        assert cli(*args, *wrong).code == code
    assert cli(*args[:-1], "100").code == 2
    for switch in (
        ("--report",),
        ("--no-recall",),
        ("--text", str(book)),
        ("--yarn", "2"),
        ("--kv-dtype", "int8"),
    ):
        alone = cli("eval", "--runs-dir", str(runs_dir), *switch)
        assert alone.code == 2
        assert "--long-context" in alone.err


def test_a_text_that_is_too_short_is_replaced_and_said(cli: Cli, runs_dir: Path) -> None:
    args = ("eval", "--runs-dir", str(runs_dir), "--long-context", "16384", "--json")
    outcome = cli(*args)
    assert outcome.code == 0, outcome.err
    assert outcome.json["text"] == "the Python documentation"
    assert outcome.json["seen_in_training"] is True
    assert "trained on parts of it" in outcome.err
    assert "longest validation document has" in outcome.err


def test_generate_is_a_function_of_seed_and_prompt(cli: Cli, runs_dir: Path) -> None:
    def generate(*args: str, stdin: str = "") -> str:
        common = ("--runs-dir", str(runs_dir), "--max-tokens", "12", "--json")
        outcome = cli("generate", *args, *common, stdin=stdin)
        assert outcome.code == 0, outcome.err
        report = outcome.json
        assert report["schema"] == "valkyrie.generate/1"
        assert report["tokens"] <= 12
        assert report["stopped_by"] == ("max_tokens" if report["tokens"] == 12 else "end")
        text: str = report["text"]
        return text

    answer = generate("--prompt", "To be")
    assert generate("tiny-hybrid", "--prompt", "To be") == answer
    assert generate(stdin="To be\n") == answer
    assert generate("--prompt", "-", stdin="To be") == answer
    assert generate("--prompt", "To be", "--seed", "1") != answer
    assert generate("-p", "To be", "--temperature", "0", "--seed", "1") == generate(
        "-p", "To be", "--temperature", "0", "--top-k", "3", "--top-p", "0.5"
    )


def test_generate_prints_the_answer_alone(cli: Cli, runs_dir: Path) -> None:
    common = ("generate", "--runs-dir", str(runs_dir), "--prompt", "x", "--max-tokens", "30")
    report = cli(*common, "--json").json
    outcome = cli(*common)
    from valkyrie_cli.render import safe_text

    assert outcome.out == safe_text(report["text"]) + "\n"
    assert f"{report['tokens']} tokens" in outcome.err


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_wrong_sampling_is_a_usage_error(cli: Cli, runs_dir: Path, value: str) -> None:
    common = ("generate", "--runs-dir", str(runs_dir), "--prompt", "x", "--json")
    outcome = cli(*common, "--temperature", value)
    assert outcome.code == 2, outcome.err
    assert "temperature" in outcome.json["error"]["message"]


def test_help_tells_the_true_defaults(cli: Cli) -> None:
    from valkyrie_core.infer.sampling import SamplingConfig

    out = " ".join(cli("generate", "--help").out.split())
    default = SamplingConfig()
    assert f"likeliest token (default {default.temperature})" in out
    assert f"this much probability (default {default.top_p})" in out
    assert f"become less likely (default {default.repetition_penalty:g})" in out
    assert f"same answer (default {default.seed})" in out
    assert default.top_k is None


def test_runs_are_listed_and_shown(cli: Cli, runs_dir: Path) -> None:
    listed = cli("runs", "list", "--runs-dir", str(runs_dir), "--json")
    assert listed.code == 0
    assert listed.json["schema"] == "valkyrie.runs.list/1"
    (summary,) = listed.json["runs"]
    assert summary["run"] == "tiny-hybrid"
    assert summary["state"] == "finished"
    assert summary["steps"] == summary["total_steps"] == 6
    assert summary["val_bpb"] > 0
    shown = cli("runs", "show", "tiny-hybrid", "--runs-dir", str(runs_dir), "--json")
    assert shown.json["schema"] == "valkyrie.runs.show/1"
    assert shown.json["summary"] == summary
    assert shown.json["checkpoints"][0] == 6
    assert shown.json["recipe"]["name"] == "tiny-hybrid"
    assert shown.json["report"]["schema"] == "valkyrie.train/1"
    assert [row["step"] for row in shown.json["validations"]] == [3, 6]
    assert "tiny-hybrid" in cli("runs", "list", "--runs-dir", str(runs_dir)).out
    assert "finished" in cli("runs", "show", "--runs-dir", str(runs_dir)).out


@pytest.mark.parametrize("command", ["eval", "generate", "chat"])
def test_an_unknown_run_names_the_nearest(cli: Cli, runs_dir: Path, command: str) -> None:
    extra = ("--prompt", "x") if command == "generate" else ()
    outcome = cli(
        command, "tiny-hibrid", *extra, "--runs-dir", str(runs_dir), "--json", stdin="x\n"
    )
    assert outcome.code == 4
    assert outcome.json["schema"] == f"valkyrie.{command}/1"
    assert outcome.json["error"]["hint"] == "did you mean tiny-hybrid?"
    assert no_traceback(outcome.err)


@pytest.mark.parametrize("command", [["eval"], ["generate", "-p", "x"], ["chat"], ["runs", "show"]])
def test_no_runs_at_all(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    outcome = cli(*command, "--runs-dir", str(tmp_path / "none"), "--json", stdin="x\n")
    assert outcome.code == 4
    assert "valkyrie train" in outcome.json["error"]["hint"]
    assert no_traceback(outcome.err)


def test_an_empty_list_is_no_error(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("runs", "list", "--runs-dir", str(tmp_path), "--json")
    assert outcome.code == 0
    assert outcome.json["runs"] == []
    assert "no runs in" in cli("runs", "list", "--runs-dir", str(tmp_path)).out


def test_wrong_and_missing_recipes(cli: Cli, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TINY.read_text().replace("pattern:", "patern:"))
    outcome = cli("train", str(wrong), "--json")
    assert outcome.code == 3
    assert outcome.json["schema"] == "valkyrie.train/1"
    assert "did you mean 'pattern'?" in outcome.json["error"]["message"]
    assert outcome.err.startswith(f"{wrong}:")
    missing = cli("train", "no-such-recipe", "--json")
    assert missing.code == 4
    assert missing.json["error"]["type"] == "MissingError"


def copy_of(runs_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs_dir / "tiny-hybrid", tmp_path / "tiny-hybrid")
    return tmp_path / "tiny-hybrid"


def test_a_damaged_checkpoint_falls_back_loudly(cli: Cli, runs_dir: Path, tmp_path: Path) -> None:
    run = copy_of(runs_dir, tmp_path)
    newest = run / "checkpoints" / "step-000006" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    outcome = cli("eval", "--runs-dir", str(tmp_path), "--json")
    assert outcome.code == 0
    assert outcome.json["step"] < 6
    assert "falling back" in outcome.err


@pytest.mark.parametrize("command", [["eval"], ["generate", "-p", "x"], ["chat"]])
def test_no_valid_checkpoint(cli: Cli, runs_dir: Path, tmp_path: Path, command: list[str]) -> None:
    run = copy_of(runs_dir, tmp_path)
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    outcome = cli(*command, "--runs-dir", str(tmp_path), "--json", stdin="x\n")
    assert outcome.code == 5, outcome.err
    assert outcome.json["error"]["type"] == "CheckpointError"
    assert no_traceback(outcome.err)


def test_a_run_in_use(cli: Cli, runs_dir: Path, tmp_path: Path) -> None:
    from valkyrie_core.train.run_dir import RunDir

    run = copy_of(runs_dir, tmp_path)
    args = ("train", str(TINY), *STEPS, "--set", f"runs_dir={tmp_path}", "--resume", "--json")
    with RunDir(run).lock("the other command"):
        outcome = cli(*args)
        assert (
            cli("runs", "list", "--runs-dir", str(tmp_path), "--json").json["runs"][0]["state"]
            == "running"
        )
    assert outcome.code == 8
    assert "the other command" in outcome.json["error"]["message"]
    assert str(os.getpid()) in outcome.json["error"]["message"]


def start(*args: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "valkyrie_cli", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "VALKYRIE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"the process ended without {text!r}: {seen}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    cli: Cli, tmp_path: Path, cache: Path, number: signal.Signals
) -> None:
    args = ("train", str(TINY), "--set", f"runs_dir={tmp_path}", "--set", "train.log_every=1")
    args = (*args, "--steps", "100000", "--set", "train.eval_every=50000")
    process = start(*args, "--json", cache=cache)
    wait_for(process, "step 3/")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    error = json.loads(out)["error"]
    assert json.loads(out)["schema"] == "valkyrie.train/1"
    assert error["type"] == "StoppedError"
    assert "--resume" in error["hint"]
    assert no_traceback(err)
    (saved,) = cli("runs", "list", "--runs-dir", str(tmp_path), "--json").json["runs"]
    assert saved["state"] == "stopped"
    assert saved["steps"] >= 3
    words = shlex.split(error["hint"])
    assert words[:2] == ["valkyrie", "train"]
    going_on = cli(*words[1:], "--steps", str(saved["steps"] + 2), "--json")
    assert going_on.code == 0, going_on.err
    assert going_on.json["steps"] == saved["steps"] + 2
    assert going_on.json["finished"] is False


def test_a_second_signal_ends_at_once(tmp_path: Path, cache: Path) -> None:
    args = ("train", str(TINY), "--set", f"runs_dir={tmp_path}", "--steps", "100000")
    process = start(*args, "--set", "train.log_every=1", cache=cache)
    wait_for(process, "step 2/")
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 20:
        process.send_signal(signal.SIGINT)
    assert process.wait() in (75, 130)


def test_doctor(cli: Cli, runs_dir: Path) -> None:
    outcome = cli("doctor", "--runs-dir", str(runs_dir), "--json")
    assert outcome.json["schema"] == "valkyrie.doctor/1"
    failed = [check for check in outcome.json["checks"] if check["status"] == "fail"]
    assert outcome.json["ok"] is (not failed)
    assert outcome.code == (4 if failed else 0)
    assert ("error" in outcome.json) is bool(failed)
    names = {check["what"] for check in outcome.json["checks"]}
    assert {"torch", "threads", "bf16", "kernels", "matmul peak", "self test"} <= names
    assert outcome.json["environment"]["torch"]
    plain = cli("doctor", "--runs-dir", str(runs_dir))
    assert "self test" in plain.out


def test_a_failing_check_fails_the_command(
    cli: Cli, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from valkyrie_core.runs import machine

    monkeypatch.setattr(machine, "train_one_step", lambda: (1.0, 2.0))
    outcome = cli("doctor", "--runs-dir", str(runs_dir), "--json")
    assert outcome.code == 4
    assert outcome.json["error"]["exit_code"] == 4
    assert "self test" in outcome.json["error"]["message"]


def test_a_training_that_diverges(cli: Cli, tmp_path: Path, cache: Path) -> None:
    outcome = cli(
        "train", str(TINY), *STEPS, "--set", f"runs_dir={tmp_path}",
        "--set", "train.optimizer.lr=1.0e20", "--json",
    )  # fmt: skip
    assert outcome.code == 6, outcome.err
    assert outcome.json["error"]["type"] == "DivergedError"
    assert "--set" in outcome.json["error"]["hint"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk(runs_dir: Path, tmp_path: Path, cache: Path) -> None:
    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    result = subprocess.run(
        [sys.executable, "-m", "valkyrie_cli", "train", str(TINY), "--json",
         "--set", f"runs_dir={tmp_path}"],
        capture_output=True,
        text=True,
        env={**os.environ, "VALKYRIE_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert result.returncode == 7, result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == 7
    assert no_traceback(result.stderr)


def test_eval_repeats_the_last_validation(cli: Cli, tmp_path: Path, cache: Path) -> None:
    trained = cli(
        "train", str(TINY), "--steps", "2", "--set", f"runs_dir={tmp_path}",
        "--set", "train.eval_tokens=100000", "--json",
    ).json  # fmt: skip
    score = cli("eval", "--runs-dir", str(tmp_path), "--json").json["corpora"]["python"]
    assert trained["best_step"] == 2
    assert score["bpb"] == pytest.approx(trained["val_bpb"], rel=1e-9)
