"""A conversation at a prompt: messages, and the commands that a line may hold."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from valkyrie_cli.render import human_count, safe_text, say
from valkyrie_core.errors import UsageError

if TYPE_CHECKING:
    from valkyrie_core.report import ChatTurn
    from valkyrie_core.runs import OpenedChat

HELP = {
    "/help": "this list",
    "/reset": "forget the conversation; a loaded state stays",
    "/undo": "forget the last turn",
    "/retry": "answer the last message again, differently",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a conversation from a file",
    "/fork": "a second conversation that begins here; the first stays as it is",
    "/branch [N]": "go on with another one of them; without N, the list",
    "/save-state FILE": "write the model's state to a file: what it has read, in its own form",
    "/load-state FILE": "begin with such a file, at once",
    "/stats": "tokens and time of the last turn, size of the conversation",
    "/quit": "end (so does Ctrl-D)",
}
HELP_FOOTER = (
    'A line that ends with \\ goes on in the next; """ opens and closes a longer text; '
    "// at the start sends a /. Ctrl-C stops an answer."
)


class Conversation:
    """The session, the turns as they stand, and the commands that a line may hold."""

    def __init__(self, opened: OpenedChat, write: Callable[[str], None]) -> None:
        self.session = opened.session
        self.turns: list[ChatTurn] = []
        self._costs: dict[object, ChatTurn] = {}
        """What turns cost that were answered here, for when a branch comes back to them."""
        self._write = write

    def take(self, message: str) -> bool:
        """Answers a message or carries out a command; False ends the conversation.

        Raises:
            UsageError: no such command, or one that can't be carried out now.
        """
        if message.startswith("/") and not message.startswith("//"):
            return self._command(message)
        text = message[1:] if message.startswith("//") else message
        self._say_answer(text, self.session.send(text))
        return True

    def _say_answer(self, message: str, chunks: Iterator[str]) -> None:
        began = time.perf_counter()
        before = self.session.turns
        parts = []
        for chunk in chunks:
            parts.append(chunk)
            self._write(safe_text(chunk))
        self._write("\n")
        if self.session.turns == before:
            # stopped before there was anything to keep
            return
        from valkyrie_core.report import ChatTurn

        stats = self.session.stats()
        turn = ChatTurn(
            message=message,
            answer="".join(parts),
            prompt_tokens=stats.prefilled_tokens,
            tokens=stats.drawn_tokens,
            seconds=round(time.perf_counter() - began, 3),
        )
        # a retry replaces the last turn; everything else adds one
        self.turns = [*self.turns[: len(self.session.turns) - 1], turn]
        self._costs[self.session.turns[-1]] = turn

    def _command(self, message: str) -> bool:
        name, _, argument = message.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/fork": self._fork,
            "/branch": self._branch,
            "/save-state": self._save_state,
            "/load-state": self._load_state,
            "/stats": self._stats,
        }
        if name not in commands:
            nearest = difflib.get_close_matches(name, [*commands, "/quit"], n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else "/help lists the commands"
            raise UsageError(f"there is no command {name}", hint=hint)
        commands[name](argument)
        return True

    def _help(self, _argument: str) -> None:
        width = max(map(len, HELP))
        for name, meaning in HELP.items():
            say(f"  {name:<{width}}  {meaning}")
        say(HELP_FOOTER)

    def _reset(self, _argument: str) -> None:
        self.session.reset()
        self.turns = []
        say("forgotten", style="dim")

    def _undo(self, _argument: str) -> None:
        self.session.undo()
        self.turns = self.turns[: len(self.session.turns)]
        say(f"forgot the last turn; {len(self.session.turns)} left", style="dim")

    def _retry(self, _argument: str) -> None:
        message = self.session.turns[-1].user if self.session.turns else ""
        self._say_answer(message, self.session.retry())

    def _save(self, argument: str) -> None:
        from valkyrie_core import runs

        path = _file_of("/save", argument)
        if path.exists() and not runs.is_transcript(path):
            raise UsageError(f"{path} exists and is no conversation", hint="choose another name")
        self.session.save(path)
        say(f"{len(self.session.turns)} turns written to {path}", style="dim")

    def _load(self, argument: str) -> None:
        path = _file_of("/load", argument)
        self.session.load(path)
        self._take_turns()
        say(f"{len(self.turns)} turns read from {path}", style="dim")

    def _fork(self, _argument: str) -> None:
        before = next(branch for branch in self.session.branches if branch.is_present)
        number = self.session.fork()
        say(
            f"branch {number} begins here, after {before.turns} turns; "
            f"/branch {before.number} goes back",
            style="dim",
        )

    def _branch(self, argument: str) -> None:
        if argument:
            if not argument.isdecimal() or len(argument) > 9:
                raise UsageError(f"a branch has a number, not {argument[:40]!r}", hint="/branch 1")
            self.session.switch(int(argument))
            self._take_turns()
        for branch in self.session.branches:
            mark = "*" if branch.is_present else " "
            asked = " ".join(branch.last.split())[:40]
            last = f", last asked: {asked}" if asked else ""
            say(f"{mark} {branch.number}  {branch.turns} turns, {branch.tokens:,} tokens{last}")

    def _save_state(self, argument: str) -> None:
        path = _file_of("/save-state", argument, "talk.state")
        size = self.session.save_state(path)
        tokens = self.session.stats().conversation_tokens
        say(
            f"the state after {tokens:,} tokens: {human_count(float(size))}B in {path}", style="dim"
        )

    def _load_state(self, argument: str) -> None:
        path = _file_of("/load-state", argument, "talk.state")
        tokens = self.session.load_state(path)
        self.turns = []
        say(f"the state in {path} has read {tokens:,} tokens", style="dim")

    def _take_turns(self) -> None:
        """The turns of the session; those that were not answered here cost nothing."""
        from valkyrie_core.report import ChatTurn

        self.turns = [
            self._costs.get(turn)
            or ChatTurn(
                message=turn.user,
                answer=turn.assistant,
                prompt_tokens=0,
                tokens=len(turn.tokens),
                seconds=0.0,
            )
            for turn in self.session.turns
        ]

    def _stats(self, _argument: str) -> None:
        stats = self.session.stats()
        say(
            f"last turn: read {stats.prefilled_tokens} new tokens in {stats.prefill_seconds:.2f} s,"
            f" wrote {stats.drawn_tokens} in {stats.decode_seconds:.2f} s"
            f" ({stats.tokens_per_second:.0f} tokens/s)"
        )
        say(
            f"conversation: {stats.turns} turns, {stats.conversation_tokens} tokens, "
            f"state {human_count(float(stats.state_bytes))}B"
        )


def _file_of(command: str, argument: str, example: str = "talk.json") -> Path:
    if not argument:
        raise UsageError(f"{command} needs the name of a file", hint=f"{command} {example}")
    from valkyrie_core import runs

    return runs.typed_path(argument)
