"""Exit codes, failures as one line or one object, and a start without heavy imports."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from tests.cli.conftest import Cli
from valkyrie_cli import errors
from valkyrie_cli import main as program
from valkyrie_core import __version__
from valkyrie_core.errors import (
    CheckpointError,
    DivergedError,
    GateError,
    MissingError,
    RecipeError,
    ResourceError,
    RunInUseError,
    StoppedError,
    UsageError,
)

HEAVY = ("torch", "pandas", "datasets", "numpy", "matplotlib", "sentencepiece", "pyarrow")


class TorchLikeError(RuntimeError):
    """Stands for torch.OutOfMemoryError, which is recognised by its name."""


TorchLikeError.__name__ = "OutOfMemoryError"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[BaseException]:
    """A program whose command `fail` raises what is put into this list."""
    raised: list[BaseException] = []
    app = typer.Typer(cls=program.Group, rich_markup_mode=None)

    @app.callback()
    def root() -> None: ...

    @app.command()
    def fail(count: int = 0, as_json: bool = typer.Option(False, "--json")) -> None:
        raise raised[0]

    monkeypatch.setattr(program, "app", app)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("VALKYRIE_DEBUG", raising=False)
    return raised


CASES = [
    (UsageError("x", hint="h"), 2),
    (RecipeError("a.yaml:1:2: k: x"), 3),
    (MissingError("x", hint="h"), 4),
    (CheckpointError("x"), 5),
    (DivergedError("x"), 6),
    (ResourceError("x"), 7),
    (RunInUseError("x"), 8),
    (GateError("x"), 9),
    (StoppedError("x", hint="h"), 75),
    (KeyboardInterrupt(), 130),
    (MemoryError(), 7),
    (TorchLikeError("CUDA out of memory. Tried to allocate"), 7),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"), 7),
    (OSError(errno.ENOSPC, "No space left on device"), 7),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 4),
    (ZeroDivisionError("by zero"), 1),
    (RuntimeError("anything"), 1),
]


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda value: type(value).__name__)
def test_every_exception_has_its_exit_code(
    cli: Cli, failing: list[BaseException], error: BaseException, code: int
) -> None:
    failing.append(error)
    outcome = cli("fail", "--json")
    assert outcome.code == code
    assert code in errors.EXIT_CODES
    assert outcome.json["schema"] == "valkyrie.fail/1"
    assert set(outcome.json) == {"schema", "error"}
    assert set(outcome.json["error"]) == {"type", "message", "hint", "exit_code"}
    assert outcome.json["error"]["exit_code"] == code
    assert "Traceback" not in outcome.err
    plain = cli("fail")
    assert plain.code == code
    assert plain.out == ""
    assert "Traceback" not in plain.err


def test_a_failure_is_one_line_and_a_hint(cli: Cli, failing: list[BaseException]) -> None:
    failing.append(MissingError("there is no run 'x'", hint="did you mean y?"))
    assert cli("fail").err == "error: there is no run 'x'\nhint: did you mean y?\n"


def test_a_wrong_recipe_is_told_like_a_compiler_does(
    cli: Cli, failing: list[BaseException]
) -> None:
    failing.append(RecipeError("a.yaml:1:2: x: wrong\na.yaml:3:4: y: wrong"))
    assert cli("fail").err == "a.yaml:1:2: x: wrong\na.yaml:3:4: y: wrong\n"


def test_a_bug_leaves_a_crash_log(cli: Cli, failing: list[BaseException], tmp_path: Path) -> None:
    failing.append(ZeroDivisionError("a\x1b[2Jb\nsecond line"))
    outcome = cli("fail")
    (log,) = tmp_path.glob("valkyrie-crash-*.log")
    assert str(log) in outcome.err
    assert "\x1b" not in outcome.err
    assert "second line" not in outcome.err
    text = log.read_text()
    assert "ZeroDivisionError" in text
    assert "Traceback" in text
    assert __version__ in text


def test_debug_shows_the_traceback(
    cli: Cli, failing: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VALKYRIE_DEBUG", "1")
    failing.append(ZeroDivisionError("x"))
    outcome = cli("fail", "--json")
    assert "Traceback" in outcome.err
    assert outcome.json["error"]["type"] == "ZeroDivisionError"


def test_a_closed_pipe_is_no_bug(cli: Cli, failing: list[BaseException], tmp_path: Path) -> None:
    failing.append(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    outcome = cli("fail", "--json")
    assert outcome == (141, "", "")
    assert not list(tmp_path.glob("valkyrie-crash-*"))


@pytest.mark.parametrize(
    ("args", "message", "schema"),
    [
        (["trian"], "No such command 'trian'", "valkyrie/1"),
        (["train"], "Missing argument 'RECIPE'", "valkyrie.train/1"),
        (["eval", "--nonsense"], "No such option: --nonsense", "valkyrie.eval/1"),
        (["runs", "lsit"], "No such command 'lsit'", "valkyrie.runs/1"),
        (["runs", "list", "extra"], "extra", "valkyrie.runs.list/1"),
        (["generate", "--temperature", "hot"], "temperature", "valkyrie.generate/1"),
        (["generate", "--top-k", "0"], "top-k", "valkyrie.generate/1"),
        (["train", "x", "--steps", "0"], "steps", "valkyrie.train/1"),
    ],
)
def test_usage_errors(cli: Cli, args: list[str], message: str, schema: str) -> None:
    outcome = cli(*args, "--json")
    assert outcome.code == 2
    assert outcome.json["schema"] == schema
    assert message in outcome.json["error"]["message"]
    assert "--help" in outcome.json["error"]["hint"]
    plain = cli(*args)
    assert plain.code == 2
    assert plain.out == ""
    assert message in plain.err


def test_json_after_the_double_dash_is_no_option() -> None:
    assert errors.wants_json(["train", "--json"])
    assert not errors.wants_json(["train", "--", "--json"])


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"valkyrie {__version__}\n", "")


def all_commands() -> list[list[str]]:
    """Every command of the program, sub-commands spelled out."""
    found = []
    for name, command in typer.main.get_command(program.app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        found += [[name, sub] for sub in below] if below else [[name]]
    return found


COMMANDS = all_commands()
GROUPS = [[], ["runs"], ["recipe"], ["tokenizer"]]


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_nothing_typed_shows_the_help(cli: Cli, group: list[str]) -> None:
    assert cli(*group) == cli(*group, "--help")
    assert cli(*group).code == 0
    assert "Commands:" in cli(*group).out


def test_the_commands_are_those_that_were_promised() -> None:
    assert {" ".join(command) for command in COMMANDS} >= {
        "train", "eval", "generate", "chat", "doctor", "runs list", "runs show",
        "recipe list", "recipe show", "recipe check", "recipe diff", "recipe copy",
        "recipe schema", "tokenizer build", "tokenizer eval", "experts",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples(cli: Cli, command: list[str]) -> None:
    outcome = cli(*command, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    examples = outcome.out.partition("Examples:\n")[2]
    assert f"valkyrie {' '.join(command)}" in examples
    assert "--json" in outcome.out
    # click wraps paragraphs: an example that lost its own line would be useless
    assert re.search(rf"^ +valkyrie {' '.join(command)}", examples, re.MULTILINE)


@pytest.mark.parametrize("group", ["recipe", "runs", "tokenizer"])
def test_the_help_of_a_group_has_examples(cli: Cli, group: str) -> None:
    examples = cli(group, "--help").out.partition("Examples:\n")[2]
    assert re.search(rf"^ +valkyrie {group} ", examples, re.MULTILINE)


def test_examples_in_help_parse(cli: Cli) -> None:
    """Every example names options that exist (`--help` is read before anything runs)."""
    for command in COMMANDS:
        examples = cli(*command, "--help").out.partition("Examples:\n")[2].partition("\n\n")[0]
        for line in examples.splitlines():
            call = re.search(r"valkyrie ([^|#>]*)", line)
            if call is None:
                continue
            words = " ".join(command)
            assert call[1].startswith(words), line
            options = re.findall(r"(?<=\s)--?[a-z][a-z-]*", call[1])
            listed = cli(*command, "--help").out.partition("Options:")[2]
            assert all(option in listed for option in options), line


def test_the_first_screen_lists_all_commands(cli: Cli) -> None:
    out = cli("--help").out
    for command in COMMANDS:
        assert re.search(rf"^  {command[0]}\s", out, re.MULTILINE)


def run_python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["runs", "list"], *([*c, "--help"] for c in COMMANDS)],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys, json; from valkyrie_cli.main import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr); "
        "sys.exit(code)"
    )
    result = run_python("-c", code, *args)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stderr.splitlines()[-1]) == []


def test_help_is_fast() -> None:
    best = min(_seconds("-m", "valkyrie_cli", "--help") for _ in range(5))
    assert best < 0.5


def _seconds(*args: str) -> float:
    began = time.perf_counter()
    assert run_python(*args).returncode == 0
    return time.perf_counter() - began


def test_module_and_program_are_the_same() -> None:
    result = run_python("-m", "valkyrie_cli", "--version")
    assert result.stdout == f"valkyrie {__version__}\n"


def test_output_into_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m valkyrie_cli --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr == ""
    assert result.stdout.strip() in ("0", "141")


def test_a_terminal_that_is_not_utf8_shows_escapes() -> None:
    result = run_python("-m", "valkyrie_cli", "trïan", PYTHONIOENCODING="ascii")
    assert result.returncode == 2
    assert "tr\\xefan" in result.stderr


def test_no_color_is_respected() -> None:
    result = run_python("-m", "valkyrie_cli", "trian", NO_COLOR="1", FORCE_COLOR="1")
    assert "\x1b[3" not in result.stderr
