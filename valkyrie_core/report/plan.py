"""What planning a recipe answers: counts, bytes and seconds, before anything is built."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from valkyrie_core.report.base import Part, Report


class ParameterCounts(Part):
    """Parameters, exactly; tied ones once."""

    total: int
    """All of them."""
    active: int
    """Those that one token meets."""
    by_part: dict[str, int]
    """Embedding, head (0 where it is tied), norms, and every type of mixer."""


class MixerFlops(Part):
    """Floating-point operations per token of all layers of one type."""

    train: int
    """Forward and backward, as computed."""
    decode: int
    """Of the last token of the context; of a canvas: of a cell, after all steps."""


class DecodeFlops(Part):
    """What one more token costs after so many."""

    tokens: int
    """The context, this token included."""
    flops: int
    """Of the recipe's model."""
    attention: int
    """Of the same model made of attention alone."""


class FlopsPerToken(Part):
    """Floating-point operations per token: matrix products and recurrences, by formula."""

    context_len: int
    """The context that is trained first, and that these numbers are for."""
    train: int
    """Forward and backward, as computed; what activation checkpointing repeats is not in it."""
    recomputed: int
    """What activation checkpointing adds, where the recipe asks for it."""
    decode: int
    """One token, all others of the context read before; of a canvas: a cell, after all steps."""
    by_mixer: dict[str, MixerFlops]
    """By type of mixer, and the head."""
    decode_by_length: list[DecodeFlops]
    """At 1k to 128k tokens; empty for a canvas, which decodes nothing."""


class ActivationBytes(Part):
    """What the forward pass of one micro-batch leaves for its backward pass."""

    recipe: int
    """As the recipe says."""
    kept: int
    """Without activation checkpointing."""
    recomputed: int
    """With it."""


class StateBytes(Part):
    """What is remembered of one sequence, in fp32."""

    tokens: int
    """The context."""
    kv_cache: int
    """Keys and values of attention."""
    recurrent: int
    """States that don't grow."""


class PlanBytes(Part):
    """Bytes: tensors by tracing a step without data, files by their format."""

    weights: int
    """All parameters."""
    gradients: int
    """Of all parameters, at the end of the backward pass."""
    optimizer: int
    """Its state."""
    activations: ActivationBytes
    """Of the stage whose step takes the most."""
    peak: int
    """The most that tensors take at one time in a step."""
    held: int | None
    """What Python and libraries hold in a training process: measured on this machine."""
    process_peak: int | None
    """The most that the training process takes, predicted: tensors, what the heap wastes between
    them, and what is held."""
    states: list[StateBytes]
    """Per sequence, at 1k to 128k tokens; empty for a canvas, which remembers nothing."""
    weights_read: int
    """Weights that one decoded token reads, in fp32."""
    checkpoint: int
    """One checkpoint on the disk, carried states included."""
    checkpoints: int
    """All that there are at one time: the newest, the best, one being written."""


class Crossover(Part):
    """From which length on decoding one sequence is cheaper than with attention alone."""

    twin: str
    """What the model of attention alone is."""
    flops: int | None
    """In tokens, by floating-point operations; 1: from the first on; None: never."""
    bytes: int | None
    """In tokens, by bytes of weights and state that a token reads."""


class DeviceEstimate(Part):
    """How fast the recipe could be on one device: estimates, none of them measured with it."""

    name: str
    """The device."""
    published: bool
    """Whether its rates are published ones (else they were measured here)."""
    precision: str
    """Of the matrix products."""
    flops_per_second: float
    """The peak of matrix products."""
    bytes_per_second: float
    """The bandwidth of memory."""
    step_at_peak: float
    """Seconds of a step whose matrix products run at the peak and all else takes no time: a lower
    bound."""
    step: float
    """Seconds of a step, estimated on `basis`."""
    basis: str
    """What the estimate rests on."""
    recipe: float
    """Seconds of all steps, without validations and checkpoints."""
    decode_tokens_per_second: float | None
    """An upper bound: weights and state read once per token, after a context of the recipe's;
    None for a canvas, which answers as a whole."""
    memory: int | None
    """Bytes that the device has (here: that are free)."""
    needed: int | None
    """Bytes that training needs there, predicted."""
    fits: bool | None
    """Whether it does."""


class ProposedChange(Part):
    """A change of the recipe that takes less memory."""

    changes: list[str]
    """Overrides for --set; none: the recipe as it is."""
    needed: int
    """Memory that is needed, predicted, in bytes."""
    fits: bool
    """Whether that is within the budget."""


class MemoryFit(Part):
    """What fits into a budget of memory."""

    budget: int
    """Bytes."""
    source: Literal["asked", "available"]
    """Whether it was asked for, or is what this machine has free."""
    best: ProposedChange | None
    """The cheapest that fits; None: nothing does."""
    tried: list[ProposedChange]
    """All that was predicted, in that order."""
    short_by: int
    """Bytes that the smallest of them lacks; 0 where one fits."""


class PlanReport(Report):
    """What a recipe costs."""

    schema_: Literal["valkyrie.plan/1"] = Field(default="valkyrie.plan/1", alias="schema")
    recipe: str
    """Its name."""
    layers: int
    """How many blocks."""
    tokens_per_step: int
    """Training tokens of one optimizer step."""
    steps: int
    """Optimizer steps."""
    precision: str
    """What matrix products are computed in on this machine."""
    threads: int
    """Processor threads that rates were measured with."""
    parameters: ParameterCounts
    flops_per_token: FlopsPerToken
    bytes: PlanBytes
    crossover: Crossover | None
    """None for a canvas: the length of its answers is fixed."""
    seconds: list[DeviceEstimate]
    """This machine first, then devices by name."""
    fit: MemoryFit | None
    """None where the budget or the prediction is not known."""
    names_fit: bool = False
    """Whether the recipe names `train.fit`: where it does not fit, training makes it smaller."""
