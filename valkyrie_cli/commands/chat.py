"""`valkyrie chat`: a conversation with a trained model."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from valkyrie_cli.commands.generate import (
    HaltOption,
    MaxTokensOption,
    PenaltyOption,
    SeedOption,
    StateOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    WeightsOption,
)
from valkyrie_cli.conversation import Conversation
from valkyrie_cli.prompts import ReadLine, messages, piped_lines, terminal_lines
from valkyrie_cli.render import (
    JsonOption,
    RunArgument,
    RunsDirOption,
    emit,
    say,
)
from valkyrie_core.errors import UsageError, ValkyrieError

if TYPE_CHECKING:
    from valkyrie_core.runs import OpenedChat


def chat(
    run: RunArgument = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    repetition_penalty: PenaltyOption = None,
    seed: SeedOption = None,
    state: StateOption = None,
    weights: WeightsOption = "fp32",
    halt: HaltOption = None,
    runs_dir: RunsDirOption = "runs",
    as_json: JsonOption = False,
) -> None:
    """Talk to a trained model; answers appear as they are written.

    The model's state is kept after every turn: a turn costs only its new tokens, and /undo costs
    nothing. /help lists the commands. Piped input works as well: every line is a message, answers
    go to stdout, and --json prints one object at the end.

    \b
    Examples:
      valkyrie chat
      valkyrie chat chat --temperature 0.5 --top-k 20
      valkyrie chat --weights int8
      valkyrie chat recursive --halt confidence=0.95
      valkyrie chat quickstart --state book.state
      echo "How are you?" | valkyrie chat --json
    """
    from valkyrie_core import runs

    place = runs.find_run(run, runs_dir)
    say(f"run {place.name} ({place.path})")
    opened = runs.open_chat(
        place.path,
        max_tokens=max_tokens,
        state=state,
        weights=weights,
        halt=halt,
        sampling=runs.sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
    )
    if not opened.knows_conversations:
        say(
            "warning: this run has seen no conversations; `valkyrie generate` continues text",
            style="yellow",
        )
    if as_json or not sys.stdin.isatty():
        _answer_pipe(opened, as_json=as_json)
    else:
        _converse(opened, terminal_lines())


def _write_out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer_pipe(opened: OpenedChat, *, as_json: bool) -> None:
    """Every message of stdin in turn; a wrong command ends it, as in any script."""
    from valkyrie_core import runs

    conversation = Conversation(opened, (lambda text: None) if as_json else _write_out)
    count = 0
    for message in messages(piped_lines()):
        count += 1
        if not conversation.take(message):
            break
    if count == 0:
        raise UsageError("there is no message on stdin", hint='echo "Hello" | valkyrie chat')
    if as_json:
        report = runs.chat_report(opened, conversation.turns)
        emit(report, as_json=True, human=lambda console: None)


def _converse(opened: OpenedChat, read_line: ReadLine) -> None:
    """The conversation at a terminal; a mistake costs a line, never the conversation."""
    conversation = Conversation(opened, _write_out)
    say("/help lists the commands, Ctrl-D ends", style="dim")
    while True:
        try:
            message = next(messages(read_line), None)
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /quit ends)", style="dim")
            continue
        if message is None:
            say("")
            return
        try:
            with _StopKey() as key:
                opened.session.stop = key.is_pressed
                if not conversation.take(message):
                    return
            if key.pressed:
                say("(stopped)", style="dim")
        except KeyboardInterrupt:
            say("\n(the turn is forgotten)", style="dim")
        except ValkyrieError as error:
            hint = f" - {error.hint}" if error.hint else ""
            say(f"{error.message}{hint}", style="yellow")


class _StopKey:
    """While entered, the first Ctrl-C stops the answer between two tokens; the second breaks."""

    def __init__(self) -> None:
        self.pressed = False

    def is_pressed(self) -> bool:
        return self.pressed

    def __enter__(self) -> _StopKey:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
