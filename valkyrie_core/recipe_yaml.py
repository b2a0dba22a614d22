"""Reads YAML by the rules of the YAML 1.2 core schema, every value with its place.

PyYAML follows YAML 1.1: it turns `3:1` into 181, `1e-4` into a string and `on` into a boolean,
and keeps the last of two equal keys. Here PyYAML only splits the text into events; what they mean
is decided below. A recipe is plain data: tags, anchors, aliases and merge keys are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from valkyrie_core.recipe_scalar import TOO_LONG, resolve_plain
from valkyrie_core.recipe_source import At, KeyPath, Problem, Source, fail, printable, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_NODES = 10_000
# what YAML forbids, and the line breaks of YAML 1.1 that an editor does not count as lines
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
_LINE_BREAK = re.compile("\r\n|\r|\n")

# PyYAML's wording, and what it means to someone who writes a recipe
_MEANINGS = (
    (r"found character '\\t' that cannot start", "a tab can't stand here - use spaces"),
    (
        r"found character '(.)' that cannot start",
        "a value can't start with {0} - put it in quotes",
    ),
    (
        r"mapping values are not allowed here",
        "a ':' can't stand here - is the indentation right, or a space missing after a ':' above?",
    ),
    (r"could not find expected ':'", "this line is not `key: value` - is a ':' missing?"),
    (
        r"expected <block end>, but found '-'",
        "a list item can't stand here - is the indentation right?",
    ),
    (
        r"expected <block end>",
        "this does not fit the lines above - is its indentation right, and theirs?",
    ),
    (r"expected ',' or '\}'", "the '{{' is not closed - ',' or '}}' is missing"),
    (r"expected ',' or '\]'", "the '[' is not closed - ',' or ']' is missing"),
    (r"unexpected end of stream", "the quote that opens here is not closed"),
    (r"unknown escape character '(.)'", "unknown escape \\{0} - in single quotes \\ is a \\"),
    (
        r"expected alphabetic or numeric character",
        "'*' and '&' have a meaning in YAML - use quotes",
    ),
    (r"expected the node content", "a value is missing here"),
    (r"sequence entries are not allowed", "a list can't start here - put it on a line of its own"),
)


class StopReadingError(Exception):
    """What follows can't be read."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem


def read_yaml(data: bytes, name: str) -> Source:
    """Reads a recipe's text; `name` is the file in error messages. Raises RecipeError.

    Repeated keys, tags and the like go to `problems` of what is returned, so that they can be told
    together with what validation finds.
    """
    try:
        text = _decode(data, name)
        tree, reader = _read(text, name, None)
    except StopReadingError as stop:
        raise fail([stop.problem]) from None
    start = reader.values.get((), At(name, 1, 1))
    if tree is None:
        problem = "the recipe is empty - it needs name, data, model and train"
    elif not isinstance(tree, dict):
        problem = f"a recipe is a mapping of keys to values (got {shown(tree)})"
    else:
        return Source(name, tree, reader.keys, reader.values, reader.problems)
    raise fail([*reader.problems, Problem(start, (), problem)])


def read_value(text: str, at: At) -> tuple[Any, list[Problem]]:
    """The value of the override `at`, by the same rules. Raises StopReadingError."""
    value, reader = _read(_checked(text, "", at), "", at)
    return value, reader.problems


def _decode(data: bytes, name: str) -> str:
    start = At(name, 1, 1)
    if len(data) > MAX_BYTES:
        raise StopReadingError(Problem(start, (), f"larger than {MAX_BYTES >> 20} MiB"))
    if data.startswith(b"\xef\xbb\xbf"):
        problem = "starts with a byte order mark - save it as UTF-8 without one"
        raise StopReadingError(Problem(start, (), problem))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise StopReadingError(Problem(start, (), "this is UTF-16 - save it as UTF-8"))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = _place(data[: error.start].decode("utf-8"), name)
        problem = f"byte 0x{data[error.start]:02x} is not UTF-8 - save it as UTF-8"
        raise StopReadingError(Problem(at, (), problem)) from None
    return _checked(text, name, None)


def _checked(text: str, name: str, override: At | None) -> str:
    """Refuses characters that PyYAML would refuse without a place, or count as line breaks."""
    match = _FORBIDDEN.search(text)
    if match is not None:
        at = override or _place(text[: match.start()], name)
        problem = f"the character U+{ord(match[0]):04X} can't stand in a recipe - use an escape"
        raise StopReadingError(Problem(at, (), problem))
    return text


def _place(before: str, name: str) -> At:
    lines = _LINE_BREAK.split(before)
    return At(name, len(lines), len(lines[-1]) + 1)


def _read(text: str, name: str, override: At | None) -> tuple[Any, _Reader]:
    reader = _Reader(text, name, override)
    try:
        return reader.document(), reader
    except yaml.MarkedYAMLError as error:
        raise StopReadingError(reader.syntax_problem(error)) from None
    except (ValueError, OverflowError):
        # PyYAML builds the character of an escape such as "\UFFFFFFFF" without a look
        at = reader.place(reader.loader.get_mark())
        problem = "an escape names a character that does not exist"
        raise StopReadingError(Problem(at, (), problem)) from None
    finally:
        reader.loader.dispose()


class _Reader:
    def __init__(self, text: str, name: str, override: At | None) -> None:
        self.loader: Any = yaml.SafeLoader(text)
        self.name = name
        self.override = override
        self.num_nodes = 0
        self.keys: dict[KeyPath, At] = {}
        self.values: dict[KeyPath, At] = {}
        self.problems: list[Problem] = []

    def place(self, mark: Any) -> At:
        return self.override or At(self.name, mark.line + 1, mark.column + 1)

    def syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        text = error.problem or ""
        mark = error.problem_mark or error.context_mark
        begun = ("could not find expected ':'", "unexpected end of stream", "expected ','")
        if any(words in text for words in begun):
            # the mistake is where the key, the quote or the bracket began
            mark = error.context_mark or mark
        message = f"this is not YAML: {printable(text)}"
        for pattern, meaning in _MEANINGS:
            match = re.search(pattern, text)
            if match is not None:
                message = meaning.format(*(printable(group) for group in match.groups()))
                break
        return Problem(self.place(mark), (), message)

    def note(self, mark: Any, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(self.place(mark), path, message))

    def document(self) -> Any:
        loader = self.loader
        loader.get_event()
        if loader.check_event(yaml.StreamEndEvent):
            return None
        start = loader.get_event()
        if start.version not in (None, (1, 2)):
            self.note(start.start_mark, (), "recipes are YAML 1.2")
        value = self.node((), loader.get_event())
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            mark = loader.peek_event().start_mark
            raise StopReadingError(
                Problem(
                    self.place(mark), (), "a second document starts here - a file is one recipe"
                )
            )
        return value

    def node(self, path: KeyPath, event: Any) -> Any:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            problem = f"more than {MAX_NODES} values"
            raise StopReadingError(Problem(self.place(event.start_mark), (), problem))
        if len(path) > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
            raise StopReadingError(Problem(self.place(event.start_mark), (), problem))
        self.values[path] = self.place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            problem = (
                f"*{event.anchor} is an alias: write the value out (or in quotes, if it is text)"
            )
            self.note(event.start_mark, path, problem)
            return None
        if event.anchor is not None:
            problem = f"&{event.anchor} is an anchor: recipes have none (text goes in quotes)"
            self.note(event.start_mark, path, problem)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.note(event.start_mark, path, f"tags such as {printable(tag)} are not read")
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        return self.scalar(path, event)

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        loader = self.loader
        result: dict[str, Any] = {}
        while not loader.check_event(yaml.MappingEndEvent):
            event = loader.get_event()
            mark = event.start_mark
            key = self.key(path, event)
            child = (*path, key)
            if key not in result:
                self.keys[child] = self.place(mark)
                result[key] = self.node(child, loader.get_event())
                continue
            first = self.keys[child]
            at = "" if self.override else f" (first on line {first.line})"
            self.note(mark, child, f"this key is given twice{at}")
            self.skip(loader.get_event(), child)
        loader.get_event()
        return result

    def key(self, path: KeyPath, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            problem = "a key must be a name"
            raise StopReadingError(Problem(self.place(event.start_mark), path, problem))
        text: str = event.value
        if event.anchor is not None or event.tag is not None:
            self.note(event.start_mark, path, "a key must be a plain name, without anchor or tag")
        if not event.implicit[0] or event.style is not None:
            return self.text(path, event)
        if text == "<<":
            self.note(event.start_mark, (*path, text), "merge keys are not read: write them out")
        elif not isinstance(self.plain(path, event), str):
            self.note(event.start_mark, (*path, text), "a key must be text - put it in quotes")
        return text

    def skip(self, event: Any, path: KeyPath) -> None:
        """Reads a value for its own mistakes and forgets it."""
        keys, values = self.keys, self.values
        self.keys, self.values = {}, {}
        self.node(path, event)
        self.keys, self.values = keys, values

    def sequence(self, path: KeyPath) -> list[Any]:
        result: list[Any] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            result.append(self.node((*path, len(result)), self.loader.get_event()))
        self.loader.get_event()
        return result

    def scalar(self, path: KeyPath, event: Any) -> Any:
        if event.style is None and event.implicit[0]:
            return self.plain(path, event)
        return self.text(path, event)

    def text(self, path: KeyPath, event: Any) -> str:
        value: str = event.value
        if value.isascii():
            return value
        try:
            # JSON writes a character beyond U+FFFF as two escapes
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.note(event.start_mark, path, "an escape is half of a character")
            return ""

    def plain(self, path: KeyPath, event: Any) -> Any:
        """The value of a scalar without quotes, by the YAML 1.2 core schema."""
        text: str = event.value
        value = resolve_plain(text)
        if value is TOO_LONG:
            self.note(event.start_mark, path, f"a number of {len(text)} digits")
            return 0
        return value
