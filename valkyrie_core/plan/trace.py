"""What a training step holds in memory, found by running one on tensors that have no data.

The model, its optimizer and the step are the real ones; only the tensors are fake (shapes and types
without numbers), so that every mixer is planned as it is written, without a formula of its own. A
`Ledger` stands below them and keeps account of every storage that is alive.

Shapes: B batch, T time.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn import kv_cache
from valkyrie_core.nn.attention import Attention, AttentionConfig
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.canvas_core import Carry
from valkyrie_core.nn.kv_cache import TRIMMED_AT_ONCE
from valkyrie_core.nn.layers import parameter_roles
from valkyrie_core.nn.model import HybridLM
from valkyrie_core.nn.models import build_model
from valkyrie_core.nn.routers import undecided
from valkyrie_core.nn.state import LMState, num_bytes
from valkyrie_core.nn.weights import ROUNDED
from valkyrie_core.plan.counter import operation_flops
from valkyrie_core.plan.workspace import workspace
from valkyrie_core.recipe import Recipe
from valkyrie_core.train import carry
from valkyrie_core.train.average import Average
from valkyrie_core.train.deep_supervision import empty_lanes
from valkyrie_core.train.device import STORED, autocast
from valkyrie_core.train.in_backward import StepInBackward
from valkyrie_core.train.optim import build_optimizers
from valkyrie_core.train.rng import RngState
from valkyrie_core.train.stages import Stage, stages
from valkyrie_core.train.weights import model_tensors

CPU = torch.device("cpu")
ALIKE_FROM = 2
"""So many micro-batches are traced; all that follow hold and do what the last of these does."""


class Work(NamedTuple):
    """What one operation does."""

    flops: int
    """In matrix products and recurrences."""
    moved: int
    """Bytes that it reads and writes."""


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that operations give and that are still alive.

    Fake tensors have no values to ask for. A question about them ("is there no padding?") is
    answered as an ordinary packed batch would: true, or zero; code asks so that this is the usual
    case. A number that is computed with is one.
    """

    def __init__(self, num_found: int = 0) -> None:
        """`num_found`: how many places `nonzero` finds, at most (sinks of windowed attention)."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """The most bytes that were alive at one time, what operations hold inside included."""
        self.work: list[Work] = []
        """Of every operation that computes something; views do not."""
        self._num_found = num_found
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation and sees what it gives."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # numbers that are computed with are one: a norm, a count of steps
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        if func is torch.ops.aten.nonzero.default:
            found = args[0].new_empty(
                (min(self._num_found, args[0].numel()), args[0].dim()), dtype=torch.int64
            )
            self._see(found)
            return found
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in given:
            self._see(tensor)
        if not func.is_view:
            taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            moved = sum(x.numel() * x.element_size() for x in taken + given)
            self.work.append(Work(operation_flops(func, args, kwargs, out), moved))
        self.peak = max(self.peak, self.now + workspace(func, args))
        return out

    def restart(self) -> None:
        """The peak and the work count from here on."""
        self.peak, self.work = self.now, []

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # an address is used again only once its storage is gone, and then it is not here
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class StepMemory(NamedTuple):
    """Bytes of one training step, and the work that it does."""

    stage: Stage
    """The stage of the training that it belongs to."""
    weights: int
    gradients: int
    optimizer: int
    """State of the optimizer, from the first step on."""
    activations: int
    """What one micro-batch's forward pass leaves for its backward pass."""
    peak: int
    """The most that tensors take at one time, all of the above included."""
    work: tuple[Work, ...]
    """Of every operation of the step, in order."""


_Passed = LMState | Carry
"""What goes on from step to step."""


class Training:
    """A training whose tensors have no data; steps of any shape can be asked for."""

    def __init__(self, recipe: Recipe, precision: Precision) -> None:
        """Builds the model and the state of its optimizer; takes seconds for billions of weights.

        Args:
            recipe: what is trained; its optimizer, stages and weights count.
            precision: what matrix products are computed in.
        """
        self.recipe, self.precision = recipe, precision
        sinks = [
            block.mixer.sinks
            for block in recipe.model.core.blocks.values()
            if isinstance(block.mixer, AttentionConfig) and block.mixer.window is not None
        ]
        self._ledger = Ledger(max(sinks, default=0))
        self._fake = FakeTensorMode()
        with self._inside():
            self.model = undecided(build_model(recipe.model, STORED[recipe.train.weights]))
            weights = self._ledger.now
            self._optimizers = build_optimizers(recipe.train.optimizer, self.model)
            self._average = None
            if recipe.train.ema is not None:
                self._average = Average(self.model, recipe.train.ema.decay)
            gradients = self._first_update()
            self._in_backward = recipe.train.update == "in_backward"
            if self._in_backward:
                clip = recipe.train.clip_grad_norm
                StepInBackward(self.model, self._optimizers, clip, ValueError)
        self.update_flops = sum(work.flops for work in self._ledger.work)
        """Floating-point operations of one update in matrix products (Muon has them)."""
        self.weights = weights
        self.gradients = gradients
        self.optimizer = self._ledger.now - weights

    def like(self, recipe: Recipe, precision: Precision) -> Training:
        """The training of another recipe; what is the same is not built again."""
        if _built(self.recipe) != _built(recipe):
            return Training(recipe, precision)
        other = copy.copy(self)
        other.recipe, other.precision = recipe, precision
        return other

    def _first_update(self) -> int:
        """Lets the optimizer make its state; returns the bytes of gradients alive at one time."""
        together = self.recipe.train.update == "after_backward"
        before, gradients = self._ledger.now, 0
        self._ledger.restart()
        for parameter in self.model.parameters():
            held = self._ledger.now
            parameter.grad = torch.zeros_like(parameter)
            if not together:
                gradients = max(gradients, self._ledger.now - held)
                self._optimizers.step_one(parameter)
                parameter.grad = None
        if together:
            gradients = self._ledger.now - before
            self._optimizers.step()
            self._optimizers.zero_grad()
        return gradients

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights, and what training keeps of them, as a checkpoint names them."""
        kept = {f"optimizer/{name}": x for name, x in self._optimizers.state_tensors().items()}
        if self._average is not None:
            kept |= {f"trained/{name}": x for name, x in self._average.tensors.items()}
        if isinstance(self.model, Canvas):
            lanes = empty_lanes(self.model, self.recipe.train.batch_size, CPU)
            kept |= {f"carried/{name}": x for name, x in lanes._asdict().items()}
        return model_tensors(self.model), kept

    def carried_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the states that go on to the next step, at most."""
        if self.recipe.train.state_passing is None:
            return {}
        stage = stages(self.recipe.train)[-1]
        with self._inside():
            count = stage.batch_size // stage.micro_size
            whole = self._carried(stage)
            assert isinstance(whole, LMState)
            state = self._read(whole, stage.context_len)
            return carry.to_tensors([state] * count)

    def sampling_peak(self) -> int:
        """What is held while a sample is drawn: decoding packs a copy of all matrices.

        0 where the recipe asks for none. Validations take no more than a step: they read as many
        tokens at once as a micro-batch has.
        """
        if not self.recipe.train.sample_prompts:
            return 0
        roles = {**parameter_roles(self.model), "head.weight": "head"}
        packed = (self.model.get_parameter(name) for name, role in roles.items() if role in ROUNDED)
        copy_of = sum(matrix.numel() * matrix.element_size() for matrix in packed)
        return self.weights + self.optimizer + copy_of

    def step(self, stage: Stage, *, recomputes: bool | None = None) -> StepMemory:
        """One whole step, as `train.trainer` does it: micro-batches, clipping, update.

        Args:
            recomputes: whether layers are computed again; None: as the recipe says.
        """
        config = self.recipe.train
        again = config.activation_checkpointing if recomputes is None else recomputes
        with self._inside():
            self.model.core.recomputes = again
            count = stage.batch_size // stage.micro_size
            # micro-batches after the second are like it: gradients are there to be added to
            traced = min(count, ALIKE_FROM)
            before = [self._carried(stage) for _ in range(traced)]
            batch = torch.zeros(3, stage.batch_size, stage.context_len, dtype=torch.int64)
            self._ledger.restart()
            after, activations, mark = [], 0, 0
            for index, state in enumerate(before):
                mark = len(self._ledger.work)
                rows = slice(index * stage.micro_size, (index + 1) * stage.micro_size)
                kept, state = self._backward(batch[:, rows], state)
                activations = max(activations, kept)
                after.append(state)
            left = count - traced
            self._ledger.work += left * self._ledger.work[mark:]
            if not self._in_backward:
                given = [p.grad for p in self.model.parameters() if p.grad is not None]
                norm = get_total_norm(given)
                clip_grads_with_norm_(self.model.parameters(), config.clip_grad_norm, norm)
                self._optimizers.step()
                self._optimizers.zero_grad()
            # every micro-batch's last state is kept to the end of the step
            states = left * (num_bytes(after[-1]) + num_bytes(before[-1]))
            return StepMemory(
                stage=stage,
                weights=self.weights,
                gradients=self.gradients,
                optimizer=self.optimizer,
                activations=activations,
                peak=max(self._ledger.peak + states, self.sampling_peak()),
                work=tuple(self._ledger.work),
            )

    def _backward(self, micro: Tensor, state: _Passed) -> tuple[int, _Passed]:
        tokens_BT, targets_BT, doc_BT = micro
        held = self._ledger.now
        with autocast(self.precision, CPU):
            if isinstance(state, Carry):
                assert isinstance(self.model, Canvas)
                loss, *_, state, _ = self.model.loss(tokens_BT, targets_BT, state, doc_BT[:, 0] > 0)
            else:
                assert isinstance(self.model, HybridLM)
                loss, state, _ = self.model.loss(tokens_BT, targets_BT, state, doc_BT)
        kept = self._ledger.now - held
        torch.autograd.backward(loss * 1.0)
        return kept, state if isinstance(state, Carry) else carry.carried(state)

    def _carried(self, stage: Stage) -> _Passed:
        """What a micro-batch begins with: with state passing, all that a stretch has read before
        its last chunk, as if no document ended in it."""
        if isinstance(self.model, Canvas):
            return self.model.begin(stage.micro_size)
        state = self.model.init_state(stage.micro_size)
        passing = self.recipe.train.state_passing
        if passing is None or passing.span == stage.context_len:
            return state
        return self._cut(self._read(state, passing.span - stage.context_len))

    def _cut(self, state: LMState) -> LMState:
        """The past was read at once; windowed layers keep of it what chunk by chunk would leave."""
        layers = []
        for block, (mixer_state, ffn_state) in zip(self.model.blocks(), state.layers, strict=True):
            mixer = block.mixer
            if isinstance(mixer, Attention) and mixer.window is not None:
                most = mixer.window + mixer.sinks + TRIMMED_AT_ONCE - 1
                parts = (
                    part.narrow(dim, 0, min(most, mixer_state.length)).clone()
                    for _, part, dim in kv_cache.growing(mixer_state)
                )
                mixer_state = kv_cache.restored(*parts)
            layers.append((mixer_state, ffn_state))
        return state._replace(layers=tuple(layers))

    def _read(self, state: LMState, num_tokens: int) -> LMState:
        tokens_BT = torch.zeros(len(state.pos_B), num_tokens, dtype=torch.int64)
        with torch.no_grad(), autocast(self.precision, CPU):
            _, state = self.model.token_losses(tokens_BT, tokens_BT, state, tokens_BT)
        return carry.carried(state)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        rng = RngState.capture()
        try:
            with torch.enable_grad(), self._fake, self._ledger:
                yield
        finally:
            rng.restore()


def _built(recipe: Recipe) -> tuple[object, ...]:
    """What a training's model and optimizer are made from."""
    train = recipe.train
    made = (train.optimizer, train.weights, train.update, train.clip_grad_norm, train.ema)
    return recipe.model, *made
