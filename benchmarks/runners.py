"""Who reads and writes tokens: our engine, llama.cpp, the rwkv package, transformers.

All do the same work: `read` takes a prompt from an empty state to the scores of the next token;
`write` draws so many tokens greedily, one by one, from an empty state. Batch 1.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from benchmarks import gguf_file, peers
from benchmarks.gguf_file import Format
from benchmarks.models import Size
from benchmarks.peers import AbsentError, module
from valkyrie_core.infer.engine import Engine
from valkyrie_core.machine import hardware
from valkyrie_core.nn.model import HybridLM

FIRST_TOKEN = 1
CONTEXT = 4096
"""Places that llama.cpp counts tokens in; RWKV-7 needs none."""


class Runner(NamedTuple):
    """One peer's two abilities."""

    write: Callable[[int], object]
    """Draws so many tokens."""
    read: Callable[[Sequence[int]], Tensor]
    """The scores [V] after a prompt, in fp32."""


def ours(engine: Engine) -> Runner:
    """Our engine, whatever its model and weights."""

    def write(count: int) -> None:
        state, token_B = engine.model.init_state(1), torch.tensor([FIRST_TOKEN])
        for _ in range(count):
            logits_BV, state = engine.decode_one_token(token_B, state)
            token_B = logits_BV.argmax(-1)

    def read(prompt: Sequence[int]) -> Tensor:
        known = engine.prefill(torch.tensor([list(prompt)]), engine.model.init_state(1))
        assert known is not None
        return known.logits_BV[0].float()

    return Runner(write, read)


def generate(size: Size, dtype: torch.dtype) -> Runner:
    """A Llama of our size with transformers' generate: greedy, with its cache of keys and values.

    Raises:
        AbsentError: transformers is not installed.
    """
    model = peers.llama(size, dtype).eval()

    def write(count: int) -> None:
        start = torch.tensor([[FIRST_TOKEN]])
        model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )

    @torch.inference_mode()
    def read(prompt: Sequence[int]) -> Tensor:
        logits: Tensor = model(
            torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1
        ).logits
        return logits[0, -1].float()

    return Runner(write, read)


def rwkv_package(model: HybridLM, precision: str) -> Runner:
    """The author's own runtime with our weights; `precision` is fp32 or bf16.

    Raises:
        AbsentError: the package is not installed.
    """
    # what it does at its import depends on these
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        found = module("rwkv.model", "rwkv")
        path = Path(folder) / "model"
        # it reads nothing but its author's pickled form
        torch.save(gguf_file.authors_tensors(model), path.with_suffix(".pth"))
        theirs: Any = found.RWKV(model=str(path), strategy=f"cpu {precision}")

    def write(count: int) -> None:
        token, state = FIRST_TOKEN, None
        for _ in range(count):
            logits_V, state = theirs.forward([token], state)
            token = int(logits_V.argmax())

    def read(prompt: Sequence[int]) -> Tensor:
        logits_V: Tensor = theirs.forward(list(prompt), None)[0]
        return logits_V.float()

    return Runner(write, read)


def llama_cpp(model: HybridLM, format: Format, *, repack: bool = True) -> Runner:
    """llama.cpp with our weights, through llama-cpp-python.

    Args:
        model: a pure RWKV-7 model.
        format: how matrices are stored.
        repack: lets it turn matrices round for the processor's tiles.

    Raises:
        AbsentError: llama-cpp-python or gguf is not installed.
    """
    found = module("llama_cpp", "llama-cpp-python gguf")
    module("gguf", "gguf")
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, _repacking(repack):
        path = Path(folder) / "model.gguf"
        gguf_file.write(model, path, format)
        theirs = found.Llama(
            str(path),
            n_ctx=CONTEXT,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=False,
            verbose=False,
        )
    # left to the interpreter's last moments, it fails noisily
    atexit.register(theirs.close)

    def logits() -> numpy.ndarray[Any, Any]:
        pointer = found.llama_get_logits_ith(theirs.ctx, -1)
        return numpy.ctypeslib.as_array(pointer, shape=(theirs.n_vocab(),))

    def write(count: int) -> None:
        theirs.reset()
        token = FIRST_TOKEN
        for _ in range(count):
            theirs.eval([token])
            token = int(logits().argmax())

    def read(prompt: Sequence[int]) -> Tensor:
        theirs.reset()
        theirs.eval(list(prompt))
        return torch.from_numpy(logits().copy())

    return Runner(write, read)


def llama_cpp_reads_tiles(format: Format) -> bool:
    """Whether llama.cpp survives a prompt with matrices turned round for AMX tiles.

    It does not: q8_0 crashes there (ggml-org/llama.cpp issue 20824). Single tokens are fine.
    """
    return format != "q8_0" or "amx" not in hardware.cpu().flags


@contextmanager
def _repacking(wanted: bool) -> Iterator[None]:
    """llama-cpp-python has no argument for it: what it takes its settings from is changed."""
    binding: Any = importlib.import_module("llama_cpp.llama_cpp")
    original = binding.llama_model_default_params

    def settings() -> Any:
        parameters = original()
        parameters.use_extra_bufts = wanted
        return parameters

    binding.llama_model_default_params = settings
    try:
        yield
    finally:
        binding.llama_model_default_params = original


__all__ = ["AbsentError", "Runner", "generate", "llama_cpp", "ours", "rwkv_package"]
