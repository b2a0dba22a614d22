"""Questions with exact answers: every answer by another way, splits that never meet."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from valkyrie_core.data.corpus import read_corpus
from valkyrie_core.data.readers.questions import QuestionsCorpus, TaskConfig
from valkyrie_core.data.tasks.brackets import PAIRS, BracketsConfig
from valkyrie_core.data.tasks.causal import UNCERTAIN, CausalConfig
from valkyrie_core.data.tasks.expression import ExpressionConfig
from valkyrie_core.data.tasks.group import SYMBOLS, GroupConfig
from valkyrie_core.data.tasks.khop import KHopConfig
from valkyrie_core.data.tasks.kinship import Kin, KinshipConfig, named
from valkyrie_core.data.tasks.maze import MOVES, MazeConfig
from valkyrie_core.data.tasks.path import PathConfig
from valkyrie_core.data.tasks.recall import RecallConfig
from valkyrie_core.data.tasks.scene import COLOURS, SceneConfig, read_scene, rendered
from valkyrie_core.data.tasks.sequence import SequenceConfig
from valkyrie_core.data.tasks.sudoku import SudokuConfig, num_solutions
from valkyrie_core.data.tasks.task import Example, constant_answer, correct, examples
from valkyrie_core.data.tasks.variables import VariablesConfig
from valkyrie_core.errors import RecipeError

TASKS: dict[str, Any] = {
    "khop": KHopConfig(),
    "khop of two": KHopConfig(symbols=2, hops=(1,)),
    "expression": ExpressionConfig(),
    "expression modulo 2": ExpressionConfig(modulus=2, depths=(2, 5)),
    "expression in brackets": ExpressionConfig(depths=(1, 2, 4), answer="brackets"),
    "expression as a chain": ExpressionConfig(depths=(1, 3), shape="chain", answer="brackets"),
    "parity": GroupConfig(lengths=(12, 20)),
    "orders of three": GroupConfig(group="s3"),
    "even orders of five": GroupConfig(group="a5", lengths=(9, 40)),
    "a5 of two elements": GroupConfig(group="a5", elements="generators"),
    "sudoku 4x4": SudokuConfig(blanks=(1, 10)),
    "sudoku 6x6": SudokuConfig(size=6, blanks=(18,)),
    "maze": MazeConfig(sizes=(2, 5)),
    "recall": RecallConfig(asked=3),
    "brackets": BracketsConfig(),
    "brackets of one kind": BracketsConfig(kinds=1, length=21, depths=(3, 5)),
    "copy": SequenceConfig(),
    "reverse": SequenceConfig(operation="reverse", symbols=3, lengths=(5, 9)),
    "sort": SequenceConfig(operation="sort"),
    "variables": VariablesConfig(),
    "path": PathConfig(),
    "path in a tree": PathConfig(nodes=6, edges=5, distances=(2, 4)),
    "scene": SceneConfig(),
    "kinship": KinshipConfig(),
    "kinship far away": KinshipConfig(facts=12, hops=(1, 5, 10)),
    "causal": CausalConfig(),
    "seen alone": CausalConfig(coins=3, gates=(2, 5), queries=("see",)),
}


def drawn(task: Any, count: int = 24, *, held_out: bool = False, seed: int = 0) -> list[Example]:
    return list(examples(task, count, seed=seed, held_out=held_out, fraction=0.3))


@pytest.mark.parametrize("name", TASKS)
def test_levels_take_turns_and_draws_repeat(name: str) -> None:
    task = TASKS[name]
    found = drawn(task, 12)
    levels = itertools.cycle(task.difficulties)
    assert [one.difficulty for one in found] == [next(levels) for _ in found]
    assert found == drawn(task, 12)
    # an example does not depend on how many there are
    assert found[:5] == drawn(task, 5)
    assert found != drawn(task, 12, seed=1)
    assert all(
        correct(one, f" {one.answer}\n") and not correct(one, one.answer + "x") for one in found
    )


@pytest.mark.parametrize("name", [name for name in TASKS if name != "khop of two"])
def test_no_held_out_question_is_trained_on_whatever_the_seed(name: str) -> None:
    task = TASKS[name]
    train = {one.canonical for seed in (0, 1, 2) for one in drawn(task, seed=seed)}
    asked = {one.canonical for seed in (0, 1, 2) for one in drawn(task, held_out=True, seed=seed)}
    assert not train & asked


def test_arrows_by_following_them() -> None:
    for one in drawn(TASKS["khop"], 40):
        arrows, question = one.prompt.split(": ")
        target = dict(tuple(arrow) for arrow in arrows.split())
        assert len(target) == 8
        at, hops, sign = question
        assert (int(hops), sign) == (one.difficulty, "=")
        for _ in range(one.difficulty):
            at = target[at]
        assert at == one.answer


def test_one_ring_is_asked_about_several_times_in_training_alone() -> None:
    task = {"type": "khop", "asked": 5}
    tree = {"type": "questions", "task": task, "examples": 8, "validation_examples": 8}
    corpus = QuestionsCorpus.model_validate(tree)
    train, held_out = corpus.read(Path(), {})
    for document in train:
        lines = "".join(piece.text for piece in document.pieces).splitlines()
        assert len(lines) == 5
        target = dict(tuple(arrow) for arrow in lines[0].split(": ")[0].split())
        for line in lines:
            at, hops, _, answer = line.split(": ")[-1]
            for _ in range(int(hops)):
                at = target[at]
            assert at == answer
        assert [piece.scored for piece in document.pieces] == [False, True] * 5
    assert all(len(document.pieces) == 2 for document in held_out)
    # what is asked first does not depend on what is asked besides
    alone = QuestionsCorpus.model_validate({**tree, "task": {"type": "khop"}})
    assert [x.pieces for x in alone.read(Path(), {})[1]] == [x.pieces for x in held_out]


@pytest.mark.parametrize(
    ("group", "size", "things"), [("parity", 2, 2), ("s3", 6, 3), ("a5", 60, 5)]
)
def test_rows_of_a_group_by_matrices(group: Any, size: int, things: int) -> None:
    found = drawn(GroupConfig(group=group, lengths=(30, 50)), 60)
    orders = itertools.permutations(range(things))
    matrices = [np.eye(things, dtype=int)[:, list(order)] for order in orders]
    if group == "a5":
        matrices = [one for one in matrices if round(np.linalg.det(one)) == 1]
    by_symbol = dict(zip(SYMBOLS, matrices, strict=False))
    assert len(matrices) == size
    met: set[str] = set()
    for one in found:
        product = np.eye(things, dtype=int)
        assert (one.prompt[-1], one.labels[-1]) == ("=", " ")
        assert one.answer == one.labels[-2]
        for symbol, said in zip(one.prompt[:-1], one.labels[:-1], strict=True):
            product = product @ by_symbol[symbol]
            assert (by_symbol[said] == product).all()
        met.update(one.labels[:-1])
    assert met == set(SYMBOLS[:size])


@pytest.mark.parametrize(("group", "size"), [("parity", 2), ("s3", 6), ("a5", 60)])
def test_two_elements_make_all_others(group: Any, size: int) -> None:
    found = drawn(GroupConfig(group=group, elements="generators", lengths=(60,)), 60)
    assert len({symbol for one in found for symbol in one.prompt[:-1]}) == 2
    assert {said for one in found for said in one.labels[:-1]} == set(SYMBOLS[:size])


def test_labels_are_trained_on_alone_and_levels_of_validation_are_its_own() -> None:
    tree = {"type": "questions", "task": {"type": "group", "lengths": [8]}, "examples": 9}
    other = {"type": "group", "lengths": [8, 30]}
    more = {"validation_examples": 6, "validation_task": other}
    corpus = QuestionsCorpus.model_validate({**tree, **more})
    train, held_out = corpus.read(Path(), {})
    for document in train:
        question, answer = document.pieces
        assert len(question.labels) == len(question.text) == 9
        assert not question.scored
        assert answer.scored
    assert {len(document.pieces[0].text) for document in held_out} == {9, 31}
    assert not any(piece.labels for document in held_out for piece in document.pieces)
    assert {one.difficulty for one in corpus.held_out()} == {8, 30}
    # what says nothing of validation is the corpus that it was before there was such a key
    plain = QuestionsCorpus.model_validate(tree)
    assert "validation_task" not in plain.model_dump(mode="json")
    assert QuestionsCorpus.model_validate(corpus.model_dump(mode="json")) == corpus
    for wrong, message in (
        ({"type": "khop"}, "only lengths may differ"),
        (
            {"type": "group", "group": "s3", "lengths": [9]},
            "group is s3, and of what",
        ),
        ({"type": "group", "elements": "generators"}, "elements is generators"),
    ):
        with pytest.raises(ValidationError, match=message):
            QuestionsCorpus.model_validate({**tree, "validation_task": wrong})


def test_no_question_of_validation_is_asked_on_the_way_to_a_longer_one() -> None:
    task = {"type": "group", "lengths": [6, 20]}
    tree = {"type": "questions", "task": task, "examples": 300, "validation_examples": 30}
    corpus = QuestionsCorpus.model_validate(tree)
    asked = {one.canonical for one in corpus.held_out()}
    train, _ = corpus.read(Path(), {})
    met, labelled = 0, 0
    for document in train:
        row = document.pieces[0]
        for end, label in enumerate(row.labels):
            labelled += label != " "
            if row.text[: end + 1] in asked:
                met += 1
                assert label == " "
    assert met >= 10
    assert labelled > 0.8 * sum(len(document.pieces[0].text) for document in train)


@pytest.mark.parametrize("name", TASKS)
def test_the_key_of_levels_is_a_key(name: str) -> None:
    task = TASKS[name]
    assert tuple(sorted(set(getattr(task, task.level_key)))) == task.difficulties


def test_pairs_are_recalled() -> None:
    for one in drawn(TASKS["recall"], 60):
        pairs, question = one.prompt.split(": ")
        assert len(pairs.split()) == one.difficulty
        assert len({pair[0] for pair in pairs.split()}) == one.difficulty
        for key, value in ((question, one.answer), *one.more):
            assert pairs.split().count(f"{key[0]}{value}") == 1
        assert len(one.more) == 2


@pytest.mark.parametrize("name", ["brackets", "brackets of one kind"])
def test_brackets_by_a_stack(name: str) -> None:
    task, deepest = TASKS[name], 0
    closing = dict(tuple(pair) for pair in PAIRS)
    for one in drawn(task, 60):
        stack: list[str] = []
        assert task.length - 1 <= len(one.prompt) - 1 <= task.length
        for symbol, label in zip(one.prompt[:-1], one.labels, strict=False):
            if symbol in closing:
                stack.append(closing[symbol])
            else:
                assert stack.pop() == symbol
            assert label == (stack[-1] if stack else " ")
            assert len(stack) <= one.difficulty
        assert "".join(reversed(stack)) == one.answer
        assert len(stack) == one.difficulty
        deepest = max(deepest, len(stack))
    assert deepest == max(task.depths)


def test_rows_of_brackets_are_alike_likely() -> None:
    task = BracketsConfig(length=5, kinds=1, depths=(1,))
    found = [task.sample(np.random.default_rng([3, i]), 1).prompt for i in range(600)]
    assert set(found) == {"()()(="}
    task = BracketsConfig(length=5, kinds=1, depths=(3,))
    found = [task.sample(np.random.default_rng([3, i]), 3).prompt for i in range(1200)]
    # one of five symbols closes: after the first, the second or the third that opens
    counts = {row: found.count(row) for row in set(found)}
    assert set(counts) == {"()(((=", "(()((=", "((()(="}
    assert min(counts.values()) > 330


def test_variables_are_as_far_away_as_they_say() -> None:
    for one in drawn(TASKS["variables"], 60):
        text, asked = one.prompt.removesuffix("=").split(": ")
        given = dict(line.split("=") for line in text.split())
        assert len(given) == 8
        hops = 1
        while not given[asked].isdigit():
            asked, hops = given[asked][0], hops + 1
        assert hops == one.difficulty


@pytest.mark.parametrize("name", ["path", "path in a tree"])
def test_ways_are_shortest_and_the_only_ones(name: str) -> None:
    task = TASKS[name]
    for one in drawn(task, 40):
        edges, asked = one.prompt.removesuffix("=").split(": ")
        assert len(edges.split()) == task.edges
        number = {node: i for i, node in enumerate(sorted({*edges.replace(" ", "")}))}
        assert len(number) == task.nodes
        matrix = np.zeros((task.nodes, task.nodes), dtype=int)
        for a, b in edges.split():
            matrix[number[a], number[b]] = matrix[number[b], number[a]] = 1
        start, end = (number[node] for node in asked.split(">"))
        # a power of the matrix counts the walks of that many edges
        walks = [np.linalg.matrix_power(matrix, n)[start, end] for n in range(one.difficulty + 1)]
        assert walks == [0] * one.difficulty + [1]
        assert len(one.answer) == one.difficulty


def test_kin_by_a_family_that_has_everybody_in_it() -> None:
    """Every person has a mother of their own; who is asked about is found by walking up."""
    for one in [*drawn(TASKS["kinship"], 60), *drawn(TASKS["kinship far away"], 60)]:
        text, asked = one.prompt.removesuffix("=").split(": ")
        facts = [fact.split() for fact in text.split("; ")]
        parent: dict[str, str] = {}

        def one_above(person: str, parent: dict[str, str] = parent) -> str:
            return parent.setdefault(person, f"above {person}")

        # children and parents first, so that siblings share whoever is there
        for who, word, of in facts:
            if word in ("daughter", "son"):
                parent[who] = of
        for who, word, of in facts:
            if word in ("mother", "father"):
                parent[of] = who
        for _ in facts:
            for who, word, of in facts:
                if word in ("sister", "brother"):
                    shared = parent.get(who) or one_above(of)
                    parent[who] = parent[of] = parent.get(of, shared)
        above, lines = asked.split(), []
        for person in above:
            line = [person]
            while line[-1] in parent:
                line.append(parent[line[-1]])
            lines.append(line)
        shared = next((x for x in lines[1] if x in lines[0]), None)
        if shared is not None:
            kin = Kin(lines[1].index(shared), lines[0].index(shared))
            assert one.answer in (named(kin, True), named(kin, False)), one.prompt


def test_scenes_are_drawn_as_they_are_written() -> None:
    for one in drawn(TASKS["scene"], 30):
        scene = read_scene(one.canonical)
        assert scene.text == one.canonical
        picture = rendered(scene, cell=12)
        size = len(scene.cells)
        assert picture.shape == (3, 12 * size, 12 * size)
        for i, row in enumerate(scene.cells):
            for j, thing in enumerate(row):
                part = picture[:, 12 * i : 12 * i + 12, 12 * j : 12 * j + 12]
                inked = (part != 255).any(0)
                colour = (255, 255, 255) if thing == ".." else COLOURS[thing[0]]
                assert tuple(part[:, 6, 6]) == colour
                # cells do not touch; a square has most ink, then a circle, then a triangle
                assert not inked[[0, -1]].any()
                assert not inked[:, [0, -1]].any()
    ink = {
        shape: int((rendered(read_scene(f"r{shape}"), cell=64)[1] != 255).sum()) for shape in "cst"
    }
    assert ink["s"] > ink["c"] > ink["t"] > 0
    with pytest.raises(ValueError, match="is no row of 2 cells"):
        read_scene("rc\n..")


def test_words_for_kin() -> None:
    words = {
        (1, 0): "mother",
        (3, 0): "great-grandmother",
        (0, 2): "granddaughter",
        (1, 1): "sister",
        (2, 1): "aunt",
        (4, 1): "great-great-aunt",
        (1, 3): "great-niece",
        (3, 2): "cousin 1.1",
    }
    assert {kin: named(Kin(*kin), woman=True) for kin in words} == words


def test_causes_are_asked_about_in_every_way() -> None:
    found = drawn(TASKS["causal"], 300)
    answers = [one.answer for one in found]
    assert set(answers) == {"0", "1", UNCERTAIN}
    assert min(map(answers.count, set(answers))) > 60
    told = [one.prompt.split(": ")[1] for one in found]
    kinds = [("see" in one, "do" in one) for one in told]
    assert min(kinds.count(kind) for kind in ((True, False), (False, True), (True, True))) > 60
    # what is done is not what is seen: some questions have another answer that way
    task, differs = TASKS["causal"], 0
    for one in found:
        if "do" in one.prompt and "see" not in one.prompt:
            differs += not task.holds(one.prompt.replace("do", "see"), one.answer)
    assert differs > 40


def test_rows_are_copied_reversed_and_sorted() -> None:
    for name in ("copy", "reverse", "sort"):
        for one in drawn(TASKS[name], 30):
            operation, row = one.prompt.removesuffix("=").split(" ")
            assert operation == name
            row = {"copy": row, "reverse": "".join(reversed(row))}.get(name, row)
            assert one.answer == ("".join(sorted(row)) if name == "sort" else row)
    # what is held out is a row, whatever is done to it
    copied = {one.canonical for one in drawn(SequenceConfig(lengths=(2,)), 200, held_out=True)}
    sorts = SequenceConfig(operation="sort", lengths=(2,))
    assert not copied & {one.canonical for one in drawn(sorts, 200)}


@pytest.mark.parametrize(
    ("task", "question", "right", "wrong"),
    [
        (RecallConfig(), "b7 K2: K=", "2", "7"),
        (RecallConfig(), "b7 K2 K=", "", "2"),
        (BracketsConfig(), "({[]<=", ">})", ">)}"),
        (BracketsConfig(), "(=", ")", "())"),
        (BracketsConfig(), "(]=", "", ")"),
        (SequenceConfig(), "sort cab=", "abc", "abb"),
        (SequenceConfig(), "reverse cab=", "bac", "cab"),
        (SequenceConfig(), "copy cab=", "cab", "cabc"),
        (SequenceConfig(), "turn cab=", "", "cab"),
        (VariablesConfig(), "c=3 a=7 k=c d=k+4: d=", "7", "4"),
        (VariablesConfig(), "c=9 k=c+3: k=", "2", "12"),
        (VariablesConfig(), "c=k k=c: k=", "", "3"),
        (VariablesConfig(), "c=3: k=", "", "3"),
        (PathConfig(), "ab bd ac ce de: a>e=", "ce", "bde"),
        (PathConfig(), "ab bc: a>c=", "bc", "c"),
        (PathConfig(), "ab cd: a>c=", "", "bc"),
        (CausalConfig(), "a? b? c=a&b d=!c: see d=0; a=", "1", "?"),
        (CausalConfig(), "a? b? c=a&b d=!c: do d=0; a=", "?", "1"),
        (CausalConfig(), "a? b? c=a&b d=!c: see d=0; do b=0; d=", "1", "0"),
        (CausalConfig(), "a? b? c=a^b: see c=1; do a=0; c=", "?", "1"),
        (CausalConfig(), "a? b=!a c=!a: see b=1; do b=0; c=", "1", "0"),
        (CausalConfig(), "a? a", "", "1"),
        (KinshipConfig(), "c son b; a mother b; d sister c: d b=", "daughter", "son"),
        (KinshipConfig(), "a mother b; c father a; d brother c: d b=", "great-uncle", "uncle"),
        (KinshipConfig(), "a mother b; c son a: c b=", "", "brother"),
        (SceneConfig(), "rc..\n..gt\n: left gt=", "..", "rc"),
        (SceneConfig(), "rc..\n..gt\n: above rc=", "wall", ".."),
        (SceneConfig(), "rcgt\nrc..\n: count c=", "2", "1"),
        (SceneConfig(), "rcgt\nrc..\n: below gt=", "..", "rc"),
        (SceneConfig(), "rc\n..gt\n: count c=", "", "1"),
        (KinshipConfig(), "a mother b: b a=", "", "daughter"),
    ],
)
def test_answers_are_worked_out_from_the_question(
    task: Any, question: str, right: str, wrong: str
) -> None:
    if right:
        assert task.holds(question, f" {right}\n")
    assert not task.holds(question, wrong)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (RecallConfig, {"pairs": [53]}, "a letter of its own"),
        (RecallConfig, {"pairs": [0]}, "a letter of its own"),
        (BracketsConfig, {"length": 4, "depths": [4]}, "below the length"),
        (BracketsConfig, {"depths": [0]}, "at least 1"),
        (SequenceConfig, {"lengths": [0]}, "between 1 and 4096"),
        (VariablesConfig, {"variables": 3, "hops": [4]}, "no more than variables"),
        (PathConfig, {"nodes": 4, "edges": 4, "distances": [4]}, "below the number of nodes"),
        (PathConfig, {"nodes": 6, "edges": 4}, "enough to join"),
        (CausalConfig, {"gates": [25]}, "at most 26"),
        (KinshipConfig, {"facts": 3, "hops": [4]}, "no more than facts"),
        (SceneConfig, {"sizes": [9]}, "between 2 and 8"),
    ],
)
def test_tasks_that_are_none(kind: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(keys)


def test_arrows_make_one_ring() -> None:
    for one in drawn(TASKS["khop"], 40):
        target = dict(tuple(arrow) for arrow in one.prompt.split(": ")[0].split())
        at, met = "a", set()
        while at not in met:
            met.add(at)
            at = target[at]
        # so that no number of hops leads back to the start more often than another
        assert len(met) == 8


def test_the_order_of_arrows_is_no_other_question() -> None:
    two = KHopConfig(symbols=2, hops=(1,))
    prompts: dict[str, set[str]] = {}
    for index in range(60):
        one = two.sample(np.random.default_rng(index), 1)
        prompts.setdefault(one.canonical, set()).add(one.prompt)
    # one ring, whose arrows can be written in two orders, and two starts
    assert len(prompts) == 1
    assert all(len(ways) == 4 for ways in prompts.values())


@pytest.mark.parametrize("name", ["expression", "expression modulo 2"])
def test_expressions_by_python(name: str) -> None:
    task = TASKS[name]
    for one in drawn(task, 40):
        assert re.fullmatch(r"[-+*%()\d]+ = ", one.prompt)
        assert eval(one.prompt.removesuffix(" = ")) == int(one.answer)
        depth = max(itertools.accumulate((c == "(") - (c == ")") for c in one.prompt))
        assert depth == one.difficulty


def test_every_bracket_s_result_stands_where_it_ends() -> None:
    task = TASKS["expression in brackets"]
    for one in drawn(task, 40):
        text = one.prompt.removesuffix("%7 = ")
        assert len(one.answer) == len(text)
        opened: list[int] = []
        for place, letter in enumerate(text):
            if letter == "(":
                opened.append(place)
            assert (one.answer[place] == ".") == (letter != ")")
            if letter == ")":
                value = eval(text[opened.pop() : place + 1]) % 7
                assert one.answer[place] == str(value)
                other = f"{one.answer[:place]}{(value + 1) % 7}{one.answer[place + 1 :]}"
                assert not task.holds(one.prompt, other)
    assert not task.holds("1+2%7 = ", "..3")


def test_a_chain_has_brackets_on_the_left_alone() -> None:
    for one in drawn(TASKS["expression as a chain"], 20):
        assert re.fullmatch(r"\(+\d([-+*]\d\))+%7 = ", one.prompt)


@pytest.mark.parametrize("name", ["sudoku 4x4", "sudoku 6x6"])
def test_puzzles_have_one_solution_and_it_is_the_answer(name: str) -> None:
    task = TASKS[name]
    size = task.size
    rows, columns = {4: (2, 2), 6: (2, 3)}[size]
    for one in drawn(task, 10):
        puzzle, answer = one.prompt.removesuffix(" = "), one.answer
        assert puzzle.count(".") == one.difficulty
        assert all(p in (".", a) for p, a in zip(puzzle, answer, strict=True))
        grid = np.array([[int(c) for c in row] for row in answer.split("/")])
        numbers = set(range(1, size + 1))
        assert all(set(line) == numbers for line in [*grid.tolist(), *grid.T.tolist()])
        for r, c in itertools.product(range(0, size, rows), range(0, size, columns)):
            assert set(grid[r : r + rows, c : c + columns].flatten().tolist()) == numbers
        cells = [0 if c == "." else int(c) for c in puzzle if c != "/"]
        assert num_solutions(cells, size, limit=3) == 1


def test_solutions_are_counted() -> None:
    assert num_solutions([0] * 16, 4, limit=1000) == 288


def test_ways_lead_there_and_there_is_no_other() -> None:
    for one in drawn(TASKS["maze"], 20):
        picture = one.prompt.removesuffix("\n= ").split("\n")
        cells = {(r, c): x for r, row in enumerate(picture) for c, x in enumerate(row)}
        at = next(place for place, x in cells.items() if x == "S")
        for move in one.answer:
            for _ in range(2):
                at = (at[0] + MOVES[move][0], at[1] + MOVES[move][1])
                assert cells[at] != "#"
        assert cells[at] == "E"
        free = {place for place, x in cells.items() if x != "#"}
        doors = sum((r, c + 1) in free for r, c in free) + sum((r + 1, c) in free for r, c in free)
        # connected by walks above, and a tree: one door fewer than places
        assert doors == len(free) - 1


def test_all_trees_are_as_likely() -> None:
    """A 2 x 2 maze has four spanning trees."""
    draws = [MazeConfig(sizes=(2,)).sample(np.random.default_rng(i), 2) for i in range(2000)]
    walls = [re.sub("[SE]", " ", one.prompt) for one in draws]
    counts = [walls.count(one) for one in set(walls)]
    assert len(counts) == 4
    assert all(400 < count < 600 for count in counts)


def test_one_answer_for_all() -> None:
    def example(answer: str) -> Example:
        return Example("", answer, 1, answer)

    train = [example(answer) for answer in "aab"]
    assert constant_answer(train, [example(answer) for answer in "abab"]) == 0.5
    # of equal ones the first
    assert constant_answer(train[1:], [example("a")]) == 1
    khop = TASKS["khop"]
    # eight symbols, each as likely
    guessed = constant_answer(drawn(khop, 200), drawn(khop, 200, held_out=True))
    assert guessed < 0.25


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "khop", "symbols": 1},
        {"type": "khop", "hops": [0]},
        {"type": "khop", "symbols": 4, "hops": [1, 4]},
        {"type": "expression", "depths": [9]},
        {"type": "sudoku", "size": 5},
        {"type": "sudoku", "blanks": [13]},
        {"type": "maze", "sizes": [1]},
        {"type": "riddle"},
    ],
)
def test_what_can_not_be_asked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TaskConfig).validate_python(wrong)


def test_a_corpus_of_questions(tmp_path: Path) -> None:
    corpus = QuestionsCorpus.model_validate(
        {"type": "questions", "task": {"type": "khop"}, "examples": 50, "validation_examples": 20}
    )
    read = read_corpus("questions", corpus, cache=tmp_path)
    assert len(read.train) + read.dropped.get("duplicate", 0) == 50
    assert len(read.validation) == 20
    first = corpus.held_out()[0]
    document = read.validation[0]
    assert document.text == f"{first.prompt}{first.answer}\n"
    assert document.scored_bytes == len(first.answer) + 1
    assert document.name == f"validation/{first.difficulty}/000000"
    assert corpus.digest(tmp_path) == corpus.model_copy(update={"weight": 3.0}).digest(tmp_path)


def test_a_family_that_is_too_small_says_so(tmp_path: Path) -> None:
    corpus = QuestionsCorpus.model_validate(
        {
            "type": "questions",
            "task": {"type": "khop", "symbols": 2, "hops": [1]},
            "holdout": {"fraction": 1e-9},
        }
    )
    with pytest.raises(RecipeError, match="no question of difficulty 1 is held out"):
        read_corpus("questions", corpus, cache=tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_hold_and_no_others(name: str) -> None:
    task = TASKS[name]
    found = drawn(task, 30)
    for one in found:
        assert task.holds(one.prompt, one.answer)
        assert task.holds(one.prompt, one.answer + "\n")
        for other in found:
            if other.prompt != one.prompt:
                assert task.holds(one.prompt, other.answer) == (other.answer == one.answer)
        for wrong in {"", "?", one.answer + one.answer, one.answer[:-1], "é"} - {one.answer}:
            assert not task.holds(one.prompt, wrong)
        assert not task.holds("", one.answer)
        assert not task.holds("nonsense = ", one.answer)


def test_a_way_through_walls_or_in_circles_does_not_hold() -> None:
    maze = MazeConfig(sizes=(2,))
    question = "#####\n#S  #\n# # #\n#E# #\n#####\n= "
    assert maze.holds(question, "D")
    for wrong in ("RDLD", "RLD", "RD", "UD", "DD", "X"):
        assert not maze.holds(question, wrong)


def test_nothing_of_an_expression_is_run() -> None:
    task = ExpressionConfig()
    for question in ("__import__('os')%7 = ", "(9**9**9)%7 = ", "((1+2)%7 = ", "(1+2)%0 = "):
        assert not task.holds(question, "0")
