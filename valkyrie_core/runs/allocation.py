"""Allocating layers, with all parts wired together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from valkyrie_core.allocate import layout as layouts
from valkyrie_core.allocate.design import Design, rearranged
from valkyrie_core.allocate.importance import measure, text_windows
from valkyrie_core.allocate.layout import Layout
from valkyrie_core.allocate.match import Match
from valkyrie_core.allocate.picture import picture
from valkyrie_core.allocate.write import check_free, recipe_text, write_new
from valkyrie_core.data.dataset import prepare
from valkyrie_core.errors import UsageError
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.backbone import ModelConfig
from valkyrie_core.nn.block import StackConfig
from valkyrie_core.recipe import Recipe, Resolved
from valkyrie_core.report import (
    AllocateReport,
    ImportanceReport,
    LayerImportance,
    LayerPicture,
    MatchedSize,
    StackPicture,
)
from valkyrie_core.runs.training import tell_now_and_then
from valkyrie_core.train.load import load_language_model


def show_or_design(
    resolved: Resolved,
    *,
    ratio: str | None,
    pattern: str | None,
    preset: str | None,
    match: Match | None,
    out: Path | None,
) -> AllocateReport:
    """See `valkyrie_core.runs.allocate`."""
    recipe = resolved.recipe
    layout = _layout(recipe.model, ratio, pattern, preset)
    if layout is not None:
        require_stack(recipe)
    context_len = recipe.train.longest_context
    stack = _picture(recipe.model, context_len)
    if layout is None:
        if match is not None:
            raise UsageError("--match belongs to a design: --ratio, --pattern or --preset")
        if out is not None:
            raise UsageError("--out belongs to --ratio, --pattern, --preset or --search")
        return AllocateReport(recipe=recipe.name, context_len=context_len, stack=stack)
    if out is not None:
        check_free(out)
    design = rearranged(recipe.model, layout, match=match, context_len=context_len)
    if out is not None:
        text, _ = recipe_text(
            resolved, design.model, suffix=_suffix(layout), reasons=_design_reasons(recipe, design)
        )
        write_new(out, text)
    return AllocateReport(
        recipe=recipe.name,
        context_len=context_len,
        stack=stack,
        asked=layout.asked,
        design=_picture(design.model, context_len),
        notes=list(design.notes),
        size=None if design.sizes is None else _size(design),
        out=None if out is None else str(out),
    )


def require_stack(recipe: Recipe) -> None:
    """Raises UsageError where layers are looped: they can't be laid anew one by one."""
    if not isinstance(recipe.model.core, StackConfig):
        raise UsageError(
            f"{recipe.name} has a core of type {recipe.model.core.type}; layouts are for a stack"
        )


def _layout(
    model: ModelConfig, ratio: str | None, pattern: str | None, preset: str | None
) -> Layout | None:
    asked = [value for value in (ratio, pattern, preset) if value is not None]
    if len(asked) > 1:
        raise UsageError("--ratio, --pattern and --preset are three ways to say one thing")
    num_layers = len(model.core.layers)
    if ratio is not None:
        return layouts.from_ratio(ratio, num_layers)
    if pattern is not None:
        return layouts.from_pattern(pattern, num_layers, tuple(model.core.blocks))
    return None if preset is None else layouts.from_preset(preset, num_layers)


def _suffix(layout: Layout) -> str:
    kind, _, rest = layout.asked.partition(" ")
    return rest.replace(":", "to") if kind in ("ratio", "preset") else kind


def _design_reasons(recipe: Recipe, design: Design) -> list[str]:
    return [
        f"{recipe.name}, its layers rearranged by `valkyrie allocate`: {design.layout.asked}, "
        f"which is {design.pattern}.",
        *(f"- {note}." for note in design.notes),
        *([] if design.sizes else ["- sizes are not matched: other layers, other costs."]),
    ]


def _picture(model: ModelConfig, context_len: int) -> StackPicture:
    rows = picture(model, context_len)
    flops = sum(row.flops for row in rows)
    return StackPicture(
        pattern=layouts.brief(model.core.layers),
        parameters=sum(row.parameters for row in rows),
        flops_per_token=flops,
        state_bytes=sum(row.state_bytes for row in rows),
        rows=[LayerPicture(**row._asdict(), flops_share=row.flops / flops) for row in rows],
    )


def _size(design: Design) -> MatchedSize:
    assert design.sizes is not None
    sizes = design.sizes
    return MatchedSize(
        match=sizes.match,
        wanted=sizes.wanted,
        before=sizes.before,
        after=sizes.after,
        difference=sizes.difference,
        hidden_dims=sizes.widths,
    )


def layer_importance(
    place: RunPlace, *, window: int, told: Callable[[str, int, int], None] | None
) -> ImportanceReport:
    """See `valkyrie_core.runs.allocate_importance`."""
    began = time.perf_counter()
    model, tokenizer, recipe, checkpoint = load_language_model(place.path)
    dataset = prepare(recipe.data, tokenizer=tokenizer, progress=tell_now_and_then())
    text = text_windows(dataset, recipe.train.longest_context)
    found = measure(model, text, window=window, told=told)
    names, blocks = recipe.model.core.layers, recipe.model.core.blocks
    by_window = sorted((x for x in found if x.change == "windowed"), key=lambda x: x.kl)
    windows, context_len = text.tokens_WT.shape
    return ImportanceReport(
        run=place.name,
        step=checkpoint.step,
        window=window,
        context_len=context_len,
        windows=windows,
        tokens=windows * context_len,
        layers=[
            LayerImportance(
                block=names[one.layer],
                mixer=blocks[names[one.layer]].mixer.type,
                **one._asdict(),
            )
            for one in found
        ],
        could_become_recurrent=[one.layer for one in by_window],
        seconds=time.perf_counter() - began,
    )
