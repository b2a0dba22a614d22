"""The shape of the house: which part may import which, and what appears nowhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for package in ("valkyrie_core", "valkyrie_cli") for path in (ROOT / package).rglob("*.py")
)
FRONT_DOOR = ROOT / "valkyrie_core" / "__init__.py"
"""Offers everything, lazily."""
EVERYTHING = SOURCES + sorted((ROOT / "tests").rglob("*.py"))

# part -> the parts that it may import; a part is a package or a module of valkyrie_core
CORE = frozenset(
    {
        "cache",
        "config",
        "errors",
        "paths",
        "recipe",
        "report",
        "inventory",
        "runs",
        "nn",
        "kernels",
        "data",
        "train",
    }
    | {"infer", "evaluate", "machine", "plan"}
    | {"allocate", "experts", "compare"}
)
BASE = frozenset({"cache", "config", "errors"})
ARROWS: dict[str, frozenset[str]] = {
    "cli": frozenset({"runs", "recipe", "report", "errors", "config"}),
    "cache": frozenset(),
    "config": frozenset(),
    "errors": frozenset(),
    "paths": frozenset({"errors"}),
    "report": frozenset({"config"}),
    "inventory": BASE | {"report"},
    "recipe": BASE | {"data", "nn", "train"},
    "runs": CORE - {"runs"},
    "kernels": BASE,
    "nn": BASE | {"kernels"},
    "data": BASE,
    "machine": BASE,
    "plan": BASE | {"machine", "kernels", "nn", "data", "train", "recipe", "report"},
    "allocate": BASE
    | {"nn", "data", "train", "evaluate", "infer", "recipe", "report", "machine", "plan"},
    "experts": BASE | {"nn", "data", "report"},
    "compare": BASE
    | {"nn", "data", "train", "evaluate", "recipe", "report", "machine", "plan", "allocate"}
    | {"inventory"},
    "train": BASE | {"kernels", "nn", "data", "recipe", "report", "machine"},
    "infer": BASE | {"nn", "data", "report"},
    "evaluate": BASE | {"nn", "data", "report", "infer", "machine"},
}


def part_of(path: Path) -> str:
    package, *rest = path.relative_to(ROOT).parts
    if package == "valkyrie_cli":
        return "cli"
    return family(rest[0].removesuffix(".py"))


def family(name: str) -> str:
    """recipe_yaml belongs to recipe."""
    return name.partition("_")[0]


def core_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, part) of everything imported from valkyrie_core, in functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "valkyrie_core":
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "valkyrie_core" and len(parts) > 1:
                    yield node.lineno, parts[1]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if path != FRONT_DOOR], ids=identify)
def test_arrows_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ARROWS, f"{path}: say in ARROWS what {part} may import"
    for line, name in core_imports(parse(path)):
        target = family(name)
        if target == part or name in ("__version__",):
            continue
        assert target in ARROWS[part], f"{identify(path)}:{line}: {part} must not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_core_never_imports_the_command_line(path: Path) -> None:
    if part_of(path) == "cli":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("valkyrie_cli")
            assert node.level == 0, f"{identify(path)}:{node.lineno}: imports are absolute"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("valkyrie_cli") for alias in node.names)


FORBIDDEN_MODULES = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "click",
}  # fmt: skip


@pytest.mark.parametrize("path", EVERYTHING, ids=identify)
def test_no_pickle_and_no_click(path: Path) -> None:
    for node in ast.walk(parse(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{identify(path)}:{node.lineno}"


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as far as it is written as names."""
    parts: list[str] = []
    target: ast.expr = node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    parts.append(target.id if isinstance(target, ast.Name) else "?")
    return ".".join(reversed(parts))


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "os.system", "os.popen",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_nothing_is_executed_or_unpickled(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        name, place = called(node), f"{identify(path)}:{node.lineno}"
        assert name not in FORBIDDEN_CALLS, f"{place}: {name}"
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        for keyword in ("allow_pickle", "trust_remote_code", "shell"):
            value = keywords.get(keyword)
            harmless = isinstance(value, ast.Constant) and value.value is False
            assert value is None or harmless, f"{place}: {keyword}"
        if name in ("yaml.load", "yaml.compose"):
            # a loader must be named, and it must not be one of those that run tags
            loader = keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
            assert loader is not None, f"{place}: {name} without a loader"
            shown = ast.unparse(loader)
            assert not re.search(r"\b(Unsafe|Full)?Loader\b$", shown) or "Safe" in shown, place


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_only_the_command_line_prints(path: Path) -> None:
    if part_of(path) == "cli":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            assert called(node) != "print", f"{identify(path)}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            assert dotted not in ("sys.stdout", "sys.stderr"), f"{identify(path)}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_presence_is_the_switch(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    name = item.target.id
                    is_flag = name in ("enabled", "enable") or name.startswith(("use_", "enable_"))
                    assert not is_flag, f"{identify(path)}:{item.lineno}: {node.name}.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_no_error_is_swallowed_whole(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            shown = ast.unparse(node.type) if node.type else ""
            silent = all(isinstance(item, ast.Pass) for item in node.body)
            broad = node.type is None or shown in ("Exception", "BaseException")
            assert not (silent and broad), f"{identify(path)}:{node.lineno}"


def test_the_checks_can_fail(tmp_path: Path) -> None:
    tree = ast.parse("import valkyrie_core.runs\nfrom valkyrie_core import nn, data\n")
    assert [name for _, name in core_imports(tree)] == ["runs", "nn", "data"]
    call = ast.parse("torch.load('x')").body[0]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    assert called(call.value) in FORBIDDEN_CALLS


def test_no_folder_of_ours_is_ignored() -> None:
    """An ignored folder is neither checked nor packed, and new files in it are never committed."""
    lines = (ROOT / ".gitignore").read_text().split()
    anywhere = {line.rstrip("/") for line in lines if not line.startswith("/")} - {"__pycache__"}
    ours = {folder.name for path in EVERYTHING for folder in path.relative_to(ROOT).parents}
    assert not anywhere & ours
