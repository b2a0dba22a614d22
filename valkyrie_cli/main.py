"""The program: one wiring of all commands, one way from an exception to an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from valkyrie_cli import errors, render
from valkyrie_cli.commands import (
    allocate,
    calibrate,
    chat,
    compare,
    doctor,
    evaluate,
    experts,
    generate,
    plan,
    read,
    recipe,
    routes,
    runs,
    tokenizer,
    train,
)
from valkyrie_core import __version__
from valkyrie_core.errors import RecipeError


class Group(TyperGroup):
    """Commands in the order of their registration; nothing of Typer's own exception handling."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands as registered."""
        return list(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Nothing typed asks for help."""
        return super().parse_args(ctx, args or ["--help"])

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parses; --help and --version print here."""
        with _our_exceptions():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with _our_exceptions():
            return super().invoke(ctx)


@contextmanager
def _our_exceptions() -> Iterator[None]:
    """Typer would turn these exceptions into codes that say less than ours."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise errors.InterruptedHardError("stopped") from error
    except BrokenPipeError as error:
        raise errors.OutputClosedError("the reader of the output went away") from error


app = typer.Typer(
    name="valkyrie",
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A laboratory for language models that mix recurrence, attention, experts and recursion.\n"
    "\n\b\nExamples:\n"
    "  valkyrie train quickstart        train the quickstart recipe\n"
    "  valkyrie eval                    bits per byte of the newest run, with baselines\n"
    "  valkyrie chat                    talk to it\n"
    "  valkyrie recipe list             what else there is\n"
    "  valkyrie doctor                  what this machine can do",
)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"valkyrie {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("experts")(experts.experts)
app.command("routes")(routes.routes)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("read")(read.read)
app.command("allocate")(allocate.allocate)
app.add_typer(runs.app, name="runs", cls=Group)
app.add_typer(recipe.app, name="recipe", cls=Group)
app.add_typer(tokenizer.app, name="tokenizer", cls=Group)
app.command("doctor")(doctor.doctor)


def _command_names(command: Any) -> dict[str, set[str]]:
    commands: dict[str, Any] = command.commands
    return {name: set(getattr(sub, "commands", ())) for name, sub in commands.items()}


def _prepare_streams() -> None:
    # a stream that the caller closed is None: what is said there is lost, and no bug
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    # a terminal or pipe that is not UTF-8 shows escapes instead of raising
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence_closed_streams() -> None:
    """Python flushes stdout and stderr at its end; into a closed pipe that prints a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError):
                continue


def _tell(failure: errors.Failure, schema: str, *, as_json: bool) -> None:
    try:
        if as_json:
            # where stdout is full, people are still told
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.write(render.to_json(failure.to_dict(schema)) + "\n")
                sys.stdout.flush()
        # a wrong recipe is told like a compiler does: located lines, nothing before them
        prefix = "" if failure.exit_code == RecipeError.exit_code else "error: "
        render.say(f"{prefix}{failure.message}", style="red")
        if failure.hint:
            render.say(f"hint: {failure.hint}")
    except (OSError, ValueError):
        return


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (see valkyrie_cli.errors.EXIT_CODES)."""
    args = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    render.configure_logging()
    command = typer.main.get_command(app)
    try:
        code = command.main(args=args, prog_name="valkyrie", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):
            error = errors.OutputClosedError("the reader of the output went away")
        if os.environ.get("VALKYRIE_DEBUG"):
            render.say("".join(traceback.format_exception(error)))
        failure = errors.describe(error)
        if failure.exit_code != errors.OutputClosedError.exit_code:
            schema = errors.schema_of(args, _command_names(command))
            _tell(failure, schema, as_json=errors.wants_json(args))
        code = failure.exit_code
    _silence_closed_streams()
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
