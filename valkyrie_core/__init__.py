"""Valkyrie: language models that mix recurrence, attention, experts and recursion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import valkyrie_core.runs as runs
    from valkyrie_core.nn.model import HybridLM
    from valkyrie_core.recipe import Recipe

__all__ = ["HybridLM", "Recipe", "__version__", "runs"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import valkyrie_core` stays cheap until a name needs it
    if name == "HybridLM":
        from valkyrie_core.nn.model import HybridLM

        return HybridLM
    if name == "Recipe":
        from valkyrie_core.recipe import Recipe

        return Recipe
    if name == "runs":
        import importlib

        return importlib.import_module("valkyrie_core.runs")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
