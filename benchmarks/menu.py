"""The benchmarks there are: what each measures, and at which sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.result import Findings
from benchmarks.timing import Announce


class Benchmark(NamedTuple):
    """One entry of the menu; its module has `run`, `FULL` and `QUICK`."""

    name: str
    title: str
    packages: tuple[str, ...] = ()
    """The peers' packages, whose versions are kept with the numbers."""

    def sizes(self, which: str) -> Any:
        """The sizes called FULL or QUICK."""
        return getattr(self._module, which)

    @property
    def run(self) -> Callable[[Any, Announce], Findings]:
        """Measures at some sizes."""
        function: Callable[[Any, Announce], Findings] = self._module.run
        return function

    @property
    def _module(self) -> Any:
        # modules are imported one by one: a peer of one may be slow to import
        return importlib.import_module(f"benchmarks.{self.name}")


MENU: dict[str, Benchmark] = {
    entry.name: entry
    for entry in (
        Benchmark("wkv", "the WKV-7 kernel against SDPA and its own forms in PyTorch"),
        Benchmark("block", "a whole RWKV-7 block against attention blocks", ("transformers",)),
        Benchmark("train", "training a 12M hybrid against a Llama of its size", ("transformers",)),
        Benchmark("profile", "where the time of a training step goes", ("transformers",)),
        Benchmark("mfu", "what share of the matmul peak training a 50M reaches", ("transformers",)),
        Benchmark(
            "decode",
            "writing and reading tokens with a 50M RWKV-7",
            ("llama-cpp-python", "rwkv", "transformers"),
        ),
        Benchmark("prefill", "reading 16384 tokens, and its memory", ("transformers",)),
        Benchmark("long_step", "a training step over 16384 tokens, and its memory"),
        Benchmark("moe_layer", "a mixture of experts against a dense layer of equal FLOPs"),
    )
}
