"""`valkyrie recipe`: what recipes there are, what they mean, and what is wrong with them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from valkyrie_cli.render import JsonOption, SetOption, emit, make_table
from valkyrie_core.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Recipes: list, show, check, compare, copy; their JSON Schema for editors.\n"
    "\n\b\nExamples:\n"
    "  valkyrie recipe list                 the recipes that a bare name reaches\n"
    "  valkyrie recipe show quickstart      every value, and where it came from\n"
    "  valkyrie recipe copy quickstart      a copy to change, recipes/quickstart.yaml",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name from `recipe list`.")
]


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the recipes that a bare name reaches.

    Files in recipes/ of the current folder come first and hide packaged ones of the same name.

    \b
    Examples:
      valkyrie recipe list
      valkyrie recipe list --json
    """
    from valkyrie_core.recipe_files import list_recipes

    rows = list_recipes()

    def human(console: Console) -> None:
        table = make_table("recipe", "from", "description")
        for row in rows:
            table.add_row(row.name, row.source, row.description)
        console.print(table)

    report = {"schema": "valkyrie.recipe.list/1", "recipes": [asdict(row) for row in rows]}
    emit(report, as_json=as_json, human=human)


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Put the documentation of every key above it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every value of a recipe and where it came from.

    The output is a complete recipe in YAML. A comment names the origin of each value: a line of
    the file, --set, default, or derived from other values.

    \b
    Examples:
      valkyrie recipe show quickstart
      valkyrie recipe show quickstart --explain
      valkyrie recipe show quickstart --set train.steps=100 > longer.yaml
    """
    from valkyrie_core.recipe import resolve
    from valkyrie_core.recipe_view import to_yaml, value_rows

    resolved = resolve(recipe, overrides or ())
    rows = value_rows(resolved)
    values = [
        {"path": row.path, "value": row.value, "origin": row.origin, "help": row.help}
        for row in rows
    ]
    report: dict[str, Any] = {
        "schema": "valkyrie.recipe.show/1",
        "recipe": resolved.recipe.name,
        "path": resolved.source.name,
        "fingerprint": resolved.recipe.fingerprint(),
        "values": values,
        "resolved": resolved.recipe.model_dump(mode="json"),
    }

    def human(console: Console) -> None:
        text = f"# {resolved.source.name}\n{to_yaml(rows, with_help=explain)}"
        console.print(text, end="", soft_wrap=True)

    emit(report, as_json=as_json, human=human)


@app.command()
def check(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files, or names.")
    ],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check recipes without running them.

    A wrong one is exit code 3 and one line per mistake.

    \b
    Examples:
      valkyrie recipe check mine.yaml
      valkyrie recipe check recipes/*.yaml
      valkyrie recipe check quickstart --set model.dim=192
    """
    from valkyrie_core.recipe import resolve

    rows = []
    mistakes = []
    for name in recipes:
        try:
            resolved = resolve(name, overrides or ())
        except RecipeError as error:
            mistakes.append(error.message)
            continue
        rows.append(
            {
                "recipe": resolved.recipe.name,
                "path": resolved.source.name,
                "fingerprint": resolved.recipe.fingerprint(),
            }
        )
    if mistakes:
        raise RecipeError("\n".join(mistakes))

    def human(console: Console) -> None:
        for row in rows:
            console.print(f"{row['path']}: fine", soft_wrap=True)

    emit({"schema": "valkyrie.recipe.check/1", "recipes": rows}, as_json=as_json, human=human)


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="LEFT", help="A recipe file or a name.")],
    right: Annotated[str, typer.Argument(metavar="RIGHT", help="A recipe file or a name.")],
    as_json: JsonOption = False,
) -> None:
    """Show the values in which two recipes differ, defaults included.

    The recipe.json of a run is a recipe too.

    \b
    Examples:
      valkyrie recipe diff quickstart shakespeare
      valkyrie recipe diff quickstart runs/quickstart/recipe.json
    """
    from valkyrie_core.recipe import resolve
    from valkyrie_core.recipe_view import diff_recipes, to_flow

    lefts, rights = resolve(left), resolve(right)
    rows = diff_recipes(lefts, rights)

    def human(console: Console) -> None:
        if not rows:
            console.print("no difference")
            return
        table = make_table("key", lefts.source.name, rights.source.name)
        for row in rows:
            table.add_row(
                row.path,
                "" if row.side == "right" else to_flow(row.left),
                "" if row.side == "left" else to_flow(row.right),
            )
        console.print(table)

    report = {
        "schema": "valkyrie.recipe.diff/1",
        "left": lefts.source.name,
        "right": rights.source.name,
        "differences": [asdict(row) for row in rows],
    }
    emit(report, as_json=as_json, human=human)


@app.command()
def copy(
    recipe: RecipeArgument,
    destination: Annotated[
        str | None,
        typer.Argument(
            metavar="[DESTINATION]",
            help="A file or a folder; left out, recipes/ in the current folder.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a recipe, comments and all, to change it. Never overwrites.

    \b
    Examples:
      valkyrie recipe copy quickstart
      valkyrie recipe copy quickstart mine.yaml
    """
    from valkyrie_core.recipe_files import copy_recipe, find_recipe

    source = find_recipe(recipe)
    target = copy_recipe(recipe, destination)

    def human(console: Console) -> None:
        console.print(f"{source} -> {target}", soft_wrap=True)

    report = {"schema": "valkyrie.recipe.copy/1", "source": str(source), "destination": str(target)}
    emit(report, as_json=as_json, human=human)


@app.command()
def schema(as_json: JsonOption = False) -> None:
    """Print the JSON Schema of recipes, for editors.

    An editor that has it checks and completes recipes.

    With --json, the schema is the key "json_schema" of the printed object.

    \b
    Examples:
      valkyrie recipe schema > recipe.schema.json
      (then, as the first line of a recipe:  # yaml-language-server: $schema=recipe.schema.json)
    """
    import json

    from valkyrie_core.recipe_view import json_schema

    document = json_schema()

    def human(console: Console) -> None:
        console.print(json.dumps(document, indent=2), soft_wrap=True)

    report = {"schema": "valkyrie.recipe.schema/1", "json_schema": document}
    emit(report, as_json=as_json, human=human)
