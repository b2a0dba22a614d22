"""The plan of a recipe: all that can be said about its cost before anything is built."""

from __future__ import annotations

from typing import NamedTuple

import torch

from valkyrie_core.machine.hardware import Precision
from valkyrie_core.nn.canvas import Canvas
from valkyrie_core.nn.models import Model
from valkyrie_core.plan import disk, fit, flops
from valkyrie_core.plan.depth import Depths, StepEstimator
from valkyrie_core.plan.devices import ASSUMED_MFU, ASSUMED_START, PUBLISHED, Device
from valkyrie_core.plan.parameters import count_parameters, weightless
from valkyrie_core.plan.seconds import Rates, least_seconds, step_seconds
from valkyrie_core.plan.trace import StepMemory
from valkyrie_core.plan.twin import attention_twin, first_win
from valkyrie_core.recipe import Recipe
from valkyrie_core.report.plan import (
    ActivationBytes,
    Crossover,
    DecodeFlops,
    DeviceEstimate,
    FlopsPerToken,
    MemoryFit,
    MixerFlops,
    ParameterCounts,
    PlanBytes,
    PlanReport,
    ProposedChange,
    StateBytes,
)
from valkyrie_core.train.stages import Stage

LENGTHS = tuple(1024 << power for power in range(8))
"""1k to 128k tokens."""
FRAGMENTATION = 0.1
"""Of the tensors' peak, on a CPU: what lies idle between blocks of the heap, since memory that is
freed stays with the process. Measured at 0.1 to 0.2 with 40 million parameters."""


class Here(NamedTuple):
    """What is known of this machine."""

    device: str
    name: str
    precision: Precision
    rates: Rates
    memory: int | None
    """Bytes that are free; None where the system does not tell."""
    held: int | None
    """Bytes that a training process holds beside its tensors; None where that is not known."""


class Budget(NamedTuple):
    """Bytes that training may take."""

    size: int
    asked: bool
    """Whether somebody said so; else it is what this machine has free."""


def process_peak(tensors: int, here: Here) -> int | None:
    """Bytes of the training process at its peak, where its tensors take so many."""
    if torch.device(here.device).type != "cpu":
        return tensors
    return None if here.held is None else here.held + round((1 + FRAGMENTATION) * tensors)


def make_plan(recipe: Recipe, here: Here, budget: Budget | None, *, threads: int) -> PlanReport:
    """Counts, traces and estimates; seconds for small models, half a minute at three billion."""
    model = weightless(recipe.model)
    training = Depths(recipe, here.precision)
    again = recipe.train.activation_checkpointing
    steps = training.steps()
    step = max(steps, key=lambda one: one.peak)
    other = training.step(step.stage, recomputes=not again)
    size = _bytes(recipe, model, training, (step, other), here)
    parameters = count_parameters(model)
    return PlanReport(
        recipe=recipe.name,
        layers=len(recipe.model.core.layers),
        tokens_per_step=_tokens_per_step(recipe),
        steps=recipe.train.steps,
        precision=here.precision,
        threads=threads,
        parameters=ParameterCounts(**parameters._asdict()),
        flops_per_token=_flops(recipe, model, _repeated(recipe, (step, other))),
        bytes=size,
        crossover=_crossover(recipe, model),
        seconds=_seconds(recipe, model, training, steps, (step, other), size, here),
        fit=None if budget is None else _fit(training, here, budget, size),
        names_fit=recipe.train.fit is not None,
    )


def _tokens_per_step(recipe: Recipe) -> int:
    return recipe.train.batch_size * recipe.train.context_len


def _repeated(recipe: Recipe, steps: tuple[StepMemory, StepMemory]) -> int:
    """What activation checkpointing computes again, per token: the last products of a layer, whose
    results nothing needs, are left out of it, so that no formula of a mixer tells."""
    if not recipe.train.activation_checkpointing:
        return 0
    mine, other = (sum(work.flops for work in step.work) for step in steps)
    return (mine - other) // _tokens_per_step(recipe)


def _flops(recipe: Recipe, model: Model, repeated: int) -> FlopsPerToken:
    length = recipe.train.context_len
    train, decode = flops.training_flops(model, length), flops.decoding_flops(model, length)
    twin = weightless(attention_twin(recipe.model).config)
    return FlopsPerToken(
        context_len=length,
        train=sum(train.values()),
        recomputed=repeated,
        decode=sum(decode.values()),
        by_mixer={kind: MixerFlops(train=train[kind], decode=decode[kind]) for kind in train},
        decode_by_length=[
            DecodeFlops(
                tokens=tokens,
                flops=sum(flops.decoding_flops(model, tokens).values()),
                attention=sum(flops.decoding_flops(twin, tokens).values()),
            )
            for tokens in _lengths(model)
        ],
    )


def _lengths(model: Model) -> tuple[int, ...]:
    """At which decoding is told of; a canvas's answers have one length."""
    return () if isinstance(model, Canvas) else LENGTHS


def _bytes(
    recipe: Recipe,
    model: Model,
    training: Depths,
    steps: tuple[StepMemory, StepMemory],
    here: Here,
) -> PlanBytes:
    step, other = steps
    kept, recomputed = step.activations, other.activations
    if recipe.train.activation_checkpointing:
        kept, recomputed = recomputed, kept
    checkpoints = disk.Disk(
        checkpoint=training.number(lambda one: disk.checkpoint_size(one).checkpoint),
        carried=training.number(lambda one: disk.checkpoint_size(one).carried),
        kept=disk.kept(recipe),
    )
    states = []
    for tokens in _lengths(model):
        cache, recurrent = flops.state_bytes(model, tokens)
        states.append(StateBytes(tokens=tokens, kv_cache=cache, recurrent=recurrent))
    return PlanBytes(
        weights=step.weights,
        gradients=step.gradients,
        optimizer=step.optimizer,
        activations=ActivationBytes(recipe=step.activations, kept=kept, recomputed=recomputed),
        peak=step.peak,
        held=here.held,
        process_peak=process_peak(step.peak, here),
        states=states,
        weights_read=flops.weights_read(model),
        checkpoint=checkpoints.checkpoint + checkpoints.carried,
        checkpoints=checkpoints.total,
    )


def _crossover(recipe: Recipe, model: Model) -> Crossover | None:
    if isinstance(model, Canvas):
        return None
    twin = attention_twin(recipe.model)
    if not twin.replaced:
        return Crossover(twin="itself: every layer is full attention", flops=None, bytes=None)
    other = weightless(twin.config)

    def operations(one: Model, tokens: int) -> int:
        return sum(flops.decoding_flops(one, tokens).values())

    def moved(one: Model, tokens: int) -> int:
        return flops.weights_read(one) + sum(flops.state_bytes(one, tokens))

    return Crossover(
        twin=twin.description,
        flops=first_win(lambda n: operations(model, n), lambda n: operations(other, n)),
        bytes=first_win(lambda n: moved(model, n), lambda n: moved(other, n)),
    )


def _seconds(
    recipe: Recipe,
    model: Model,
    training: Depths,
    steps: list[StepMemory],
    largest: tuple[StepMemory, StepMemory],
    size: PlanBytes,
    here: Here,
) -> list[DeviceEstimate]:
    step = largest[0]
    moved = flops.weights_read(model) + sum(flops.state_bytes(model, recipe.train.context_len))
    repeated, update = _repeated(recipe, largest), training.number(lambda one: one.update_flops)

    def work(stage: Stage) -> int:
        per_token = sum(flops.training_flops(model, stage.context_len).values()) + repeated
        return per_token * _tokens_per_step(recipe) + update

    def estimate(
        device: Device,
        rates: Rates,
        precision: str,
        seconds: dict[Stage, float],
        basis: str,
        taken: int | None,
    ) -> DeviceEstimate:
        known = taken is not None and device.memory is not None
        return DeviceEstimate(
            name=device.name,
            published=device in PUBLISHED,
            precision=precision,
            flops_per_second=rates.flops_per_second,
            bytes_per_second=rates.bytes_per_second,
            step_at_peak=least_seconds(work(step.stage), rates),
            step=seconds[step.stage],
            basis=basis,
            recipe=_whole(seconds, recipe.train.steps),
            # no format is read here but fp32; a GPU would decode in bf16
            decode_tokens_per_second=None
            if isinstance(model, Canvas)
            else rates.bytes_per_second / (moved / 2 if device in PUBLISHED else moved),
            memory=device.memory,
            needed=taken,
            fits=taken <= device.memory if known and taken and device.memory else None,
        )

    rates = here.rates
    mine = Device(here.name, rates.flops_per_second, rates.bytes_per_second, here.memory)
    basis = "every operation of a traced step at the measured rates, one after the other"
    took = {one.stage: step_seconds(one.work, rates) for one in steps}
    found = [estimate(mine, rates, here.precision, took, basis, size.process_peak)]
    if here.precision != "bf16":
        step = training.like(recipe, "bf16").step(step.stage)
    # what an update reads and writes: weights, gradients, and the state twice
    updated = 2 * step.weights + step.gradients + 2 * step.optimizer
    for device in PUBLISHED:
        published = Rates(device.flops_per_second, device.bytes_per_second, ASSUMED_START)
        beside = updated / published.bytes_per_second + len(step.work) * ASSUMED_START
        seconds = {
            one.stage: least_seconds(work(one.stage), published) / ASSUMED_MFU + beside
            for one in steps
        }
        basis = (
            f"{ASSUMED_MFU:.0%} of published peaks (assumed), the update's traffic, "
            f"{1e6 * ASSUMED_START:.0f} us to start an operation"
        )
        found.append(estimate(device, published, "bf16", seconds, basis, step.peak))
    return found


def _whole(seconds: dict[Stage, float], num_steps: int) -> float:
    """A whole training: every stage's steps, each as long as its own."""
    begins = [stage.first_step for stage in seconds]
    ends = [*begins[1:], num_steps]
    return sum(
        one * (end - begin) for one, begin, end in zip(seconds.values(), begins, ends, strict=True)
    )


def _fit(training: Depths, here: Here, budget: Budget, size: PlanBytes) -> MemoryFit:
    recipe, first = training.recipe, size.process_peak or size.peak
    estimate = StepEstimator(here.precision, here.rates)

    def peak(other: Recipe) -> int:
        if other == recipe:
            return first
        tensors = estimate(other).tensors
        return process_peak(tensors, here) or tensors

    found = fit.fit(recipe, budget.size, peak, list(fit.ladders(recipe)))
    tried = [_change(one) for one in found.tried]
    least = min(one.peak for one in found.tried)
    return MemoryFit(
        budget=budget.size,
        source="asked" if budget.asked else "available",
        best=None if found.best is None else _change(found.best),
        tried=tried,
        short_by=max(0, least - budget.size) if found.best is None else 0,
    )


def _change(one: fit.Proposal) -> ProposedChange:
    return ProposedChange(changes=list(one.changes), needed=one.peak, fits=one.fits)
