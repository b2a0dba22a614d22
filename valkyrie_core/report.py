"""What every command answers: the shape of its JSON object, and of report.json in a run.

Numbers that could not be measured are None, never NaN. A field is only ever added; what a number
means does not change under the same schema.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Report(BaseModel):
    """The result of one command; `schema` names the command and the version of its shape."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        serialize_by_alias=True,
        ser_json_inf_nan="null",
    )


class Part(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="null"
    )


Weights = Literal["fp32", "bf16", "int8"]
"""The format of a model's matrices; fp32 is what was trained."""


KVFormat = Literal["computed", "int8"]
"""How keys and values are kept."""
RecurrentFormat = Literal["computed", "bf16", "int8"]
"""How recurrent states are kept."""


class SplitCounts(Part):
    """How much text one split of a corpus holds."""

    documents: int
    """Documents."""
    tokens: int
    """Tokens, with one document marker per document."""
    bytes: int
    """UTF-8 bytes of the text."""
    bytes_per_token: float | None
    """How much text one token stands for."""


class CorpusCounts(Part):
    """What became of one corpus."""

    train: SplitCounts
    """What is trained on."""
    validation: SplitCounts
    """What is held out."""
    dropped: dict[str, int] = {}
    """Documents that were left out, by reason."""
    truncated: int = 0
    """Documents that were cut."""


class TrainReport(Report):
    """What a training run did; also report.json in its directory."""

    schema_: Literal["valkyrie.train/1"] = Field(default="valkyrie.train/1", alias="schema")
    run: str
    """The run's name."""
    directory: str
    """The run's directory."""
    steps: int
    """Optimizer steps done, all sittings together."""
    total_steps: int
    """The horizon of the schedule."""
    finished: bool
    """Whether all steps are done."""
    tokens_seen: int
    """Training tokens read, all sittings together."""
    seconds: float
    """Seconds of training (validation and checkpoints left out), all sittings together."""
    tokens_per_second: float | None
    """Training tokens per second of training."""
    train_loss: float | None
    """Mean loss of the last logged steps, in nats per token."""
    val_bpb: float | None
    """Validation bits per byte at the end, all corpora's bytes together."""
    val_bpb_by_corpus: dict[str, float] = {}
    """Validation bits per byte at the end, by corpus."""
    best_val_bpb: float | None = None
    """The best validation of the run."""
    best_step: int | None = None
    """The step of the best validation."""
    parameters: int
    """Trainable parameters."""
    device: str
    """Where it ran."""
    precision: str
    """What the matrix products were computed in."""
    threads: int
    """Processor threads."""
    kernels: dict[str, str] = {}
    """Which implementation computed what."""
    mfu: float | None = None
    """Model FLOPs per second as a share of this machine's measured matmul peak."""
    peak_flops: float | None = None
    """The measured matmul peak, in FLOP per second."""
    checkpoint: str | None = None
    """The newest checkpoint."""
    data_fingerprint: str | None = None
    """Identifies the packed data."""
    corpora: dict[str, CorpusCounts] = {}
    """Counts of the data, by corpus."""


class CorpusScore(Part):
    """How well a model predicts one validation corpus."""

    bpb: float
    """Bits per UTF-8 byte of the scored text; lower is better."""
    tokens: int
    """Scored tokens."""
    bytes: int
    """UTF-8 bytes of the scored text."""
    documents: int
    """Validation documents."""
    baselines: dict[str, float | None]
    """Bits per byte of what needs no model: uniform, unigram, xz, xz_given_training."""
    fp32_bpb: float | None = None
    """Bits per byte of the weights as trained, computed in fp32; where others were asked for."""
    weights_cost_bpb: float | None = None
    """What the format of the weights and its arithmetic cost: bpb - fp32_bpb."""
    notes: list[str] = []
    """What limits a number, such as a baseline that read only a part of the training text."""


class EvalReport(Report):
    """Bits per byte on every validation corpus, with baselines."""

    schema_: Literal["valkyrie.eval/1"] = Field(default="valkyrie.eval/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint that was read."""
    parameters: int
    """Parameters of the model."""
    context: Literal["window", "carried"]
    """What a token was predicted from: a window of context_len, or all of its document so far."""
    context_len: int
    """Tokens per window."""
    precision: str
    """What the matrix products were computed in."""
    weights: Weights = "fp32"
    """The format of the matrices."""
    seconds: float
    """How long the evaluation took."""
    corpora: dict[str, CorpusScore]
    """The scores, by corpus."""


class PositionScore(Part):
    """The loss of the tokens at some positions of a text that was read from its beginning."""

    start: int
    """The first of the positions; that of the text's first token is 0."""
    end: int
    """The position after the last."""
    bpb: float | None
    """Bits per byte; None where the tokens stand for no text."""


class ContextScore(Part):
    """The loss of the targets, which are the same for every context."""

    context: int
    """Tokens that were read before the first target of a stretch."""
    bpb: float
    """Bits per byte."""


class LengthCost(Part):
    """What reading cost up to a length."""

    length: int
    """Tokens read."""
    tokens_per_second: float
    """Since the length before."""
    peak_bytes: int | None
    """The most memory that the process held so far; None where the system does not tell."""
    state_bytes: int
    """Of the recurrent layers' states."""
    cache_bytes: int
    """Of attention's keys and values."""
    snapshot_bytes: int
    """Of a state that is kept by itself: what a state file holds."""


class RecallScore(Part):
    """Whether facts in a text of some length are found."""

    task: Literal["passkey", "needles", "mqar", "variables"]
    """What was asked; see `valkyrie_core.evaluate.recall`."""
    length: int
    """Tokens of the text, the question not counted."""
    depth: float | None
    """Where the fact stands, from 0 (first) to 1 (last); None: all depths together."""
    questions: int
    """How many were asked."""
    first: float
    """The share of questions whose right answer is the likeliest candidate."""
    mean_rank: float
    """Of the right answer among the candidates; 0 is the best."""
    written: float
    """The share of right answers that the model writes by itself."""
    chance: float
    """The share that guessing among the candidates gets."""
    constant: float
    """The share that one word gets, the best one for all lengths of the task."""


class EffectiveContext(Part):
    """The longest context at which more context still lowered the loss."""

    tokens: int
    """Longer contexts are not surely better than this one; this one is than shorter ones."""
    low: int
    """In 90 % of the resamples the best context is between this one ..."""
    high: int
    """... and this one."""


class LongReading(Part):
    """What a model made of one long text."""

    by_position: list[PositionScore]
    """Read once from the beginning, the state carried."""
    by_context: list[ContextScore]
    """The same targets from contexts of several lengths."""
    targets: int
    """Tokens that every context is scored on."""
    stretches: int
    """Places of the text that they come from."""
    effective_length: EffectiveContext
    """How much context helps."""
    recall: list[RecallScore]
    """Facts that were found, by task, length and depth."""
    memory: list[LengthCost]
    """Speed and memory by length."""


class LongContextReport(LongReading):
    """One long text: losses by position and by context, recall, speed and memory by length."""

    model_config = Report.model_config

    schema_: Literal["valkyrie.long_context/1"] = Field(
        default="valkyrie.long_context/1", alias="schema"
    )
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint that was read."""
    parameters: int
    """Parameters of the model."""
    text: str
    """What was read."""
    text_tokens: int
    """Tokens of the whole text."""
    seen_in_training: bool = False
    """Whether the run was trained on parts of this text."""
    context: int
    """The longest context, and how many tokens were read from the beginning."""
    trained_context: int
    """Tokens of the longest training window up to the step that was read."""
    chunk: int
    """Tokens that were read at once."""
    precision: str
    """What the matrix products were computed in."""
    weights: Weights
    """The format of the matrices."""
    changes: dict[str, int | float | str] = {}
    """What was changed in the run's model: kv_window, kv_dtype, state_dtype, yarn."""
    as_trained: LongReading | None = None
    """The same without these changes: their price; None without changes."""
    seconds: float
    """How long all of it took."""


class Sampling(Part):
    """How tokens were drawn."""

    temperature: float
    """0: always the most likely token."""
    top_p: float
    """Only the most likely tokens that together have this probability."""
    top_k: int | None
    """Only this many of the most likely tokens."""
    repetition_penalty: float
    """Divides the logits of tokens that occurred; 1: off."""
    seed: int
    """Fixes the draw."""
    max_tokens: int
    """The longest answer."""


class GenerateReport(Report):
    """One continuation."""

    schema_: Literal["valkyrie.generate/1"] = Field(default="valkyrie.generate/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint."""
    prompt: str
    """What was continued."""
    text: str
    """The continuation."""
    prompt_tokens: int
    """Tokens of the prompt."""
    tokens: int
    """Tokens of the continuation."""
    stopped_by: Literal["end", "max_tokens"]
    """end: the model ended the document."""
    seconds: float
    """Seconds for prompt and continuation."""
    tokens_per_second: float | None
    """Speed after the first token, which waits for the prompt."""
    weights: Weights = "fp32"
    """The format of the matrices."""
    sampling: Sampling
    """How tokens were drawn."""


class ChatTurn(Part):
    """One message and its answer."""

    message: str
    """What was said."""
    answer: str
    """What the model answered."""
    prompt_tokens: int
    """New tokens that the turn fed to the model: the message, not the history."""
    tokens: int
    """Tokens of the answer."""
    seconds: float
    """How long the turn took."""


class ChatReport(Report):
    """A conversation from piped input."""

    schema_: Literal["valkyrie.chat/1"] = Field(default="valkyrie.chat/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint."""
    answer: str
    """The last answer."""
    tokens: int
    """Tokens of all answers."""
    prompt_tokens: int
    """Tokens of all messages."""
    seconds: float
    """How long all turns took."""
    turns: list[ChatTurn]
    """All turns."""
    weights: Weights = "fp32"
    """The format of the matrices."""
    sampling: Sampling
    """How tokens were drawn."""


class ReadReport(Report):
    """A text that was read, and the state that was kept after it."""

    schema_: Literal["valkyrie.read/1"] = Field(default="valkyrie.read/1", alias="schema")
    run: str
    """The run's name."""
    step: int
    """The step of the checkpoint."""
    text: str
    """The file that was read."""
    tokens: int
    """Its tokens, with the marker that begins a document."""
    total_tokens: int
    """Tokens that the state has read."""
    seconds: float
    """How long the reading took."""
    tokens_per_second: float
    """Tokens read per second."""
    state_bytes: int
    """Memory of the state."""
    file: str
    """Where the state is."""
    file_bytes: int
    """Size of that file."""
    weights: Weights
    """The format of the matrices."""


class Check(Part):
    """One line of `valkyrie doctor`."""

    status: Literal["ok", "warn", "fail"]
    """warn: it works, with less; fail: something will not work."""
    what: str
    """What was looked at."""
    detail: str
    """What was found."""
    fix: str | None = None
    """What to do about it."""


class DoctorReport(Report):
    """What this machine can do and what is missing for what."""

    schema_: Literal["valkyrie.doctor/1"] = Field(default="valkyrie.doctor/1", alias="schema")
    ok: bool
    """No check failed."""
    environment: dict[str, Any]
    """Versions, device, threads, precision, measured peaks."""
    checks: list[Check]
    """All checks."""


class RunSummary(Part):
    """One run in a list."""

    run: str
    """The run's name."""
    directory: str
    """Its directory."""
    state: Literal["finished", "stopped", "running", "broken"]
    """stopped: it can be resumed; broken: no checkpoint or no readable recipe."""
    steps: int | None
    """The step of the newest checkpoint."""
    total_steps: int | None
    """The horizon of the schedule."""
    val_bpb: float | None
    """Validation bits per byte of the newest validation."""
    train_loss: float | None
    """The newest training loss, in nats per token."""
    modified: str
    """When its newest checkpoint was written (ISO 8601, local time)."""
    bytes: int
    """Size on disk."""
    description: str = ""
    """The recipe's description."""


class RunsListReport(Report):
    """All runs of a folder, newest first."""

    schema_: Literal["valkyrie.runs.list/1"] = Field(default="valkyrie.runs.list/1", alias="schema")
    runs_dir: str
    """The folder that was read."""
    runs: list[RunSummary]
    """Its runs."""


class RunsShowReport(Report):
    """Everything a run's directory says."""

    schema_: Literal["valkyrie.runs.show/1"] = Field(default="valkyrie.runs.show/1", alias="schema")
    summary: RunSummary
    """The line of `runs list`."""
    checkpoints: list[int]
    """The steps of its checkpoints."""
    files: dict[str, int]
    """Its other files, with their sizes in bytes."""
    recipe: dict[str, Any] | None
    """The resolved recipe."""
    environment: dict[str, Any] | None
    """Versions and machine of the training."""
    report: dict[str, Any] | None
    """report.json, once training ended."""
    validations: list[dict[str, Any]]
    """The validation rows of metrics.jsonl."""


class TokenizerBuildReport(Report):
    """A tokenizer that was built."""

    schema_: Literal["valkyrie.tokenizer.build/1"] = Field(
        default="valkyrie.tokenizer.build/1", alias="schema"
    )
    directory: str
    """Where it was written."""
    kind: str
    """Its type."""
    vocab_size: int
    """Number of token ids."""
    fingerprint: str
    """sha256 of what it is."""
    documents: int
    """Training documents that were there to read; 0 where nothing is trained."""
    seconds: float
    """How long it took."""


class TokenizerScore(Part):
    """How a tokenizer does on one corpus."""

    documents: int
    """Documents."""
    bytes: int
    """UTF-8 bytes."""
    tokens: int
    """Tokens."""
    bytes_per_token: float | None
    """How much text one token stands for."""
    train_bytes_per_token: float | None
    """The same in the training text."""
    validation_bytes_per_token: float | None
    """The same in the validation text, which the tokenizer has not seen."""
    round_trips: int
    """Documents that come back exactly."""


class TokenizerEvalReport(Report):
    """What a tokenizer does to text, and what it costs."""

    schema_: Literal["valkyrie.tokenizer.eval/1"] = Field(
        default="valkyrie.tokenizer.eval/1", alias="schema"
    )
    kind: str
    """Its type."""
    vocab_size: int
    """Number of token ids."""
    fingerprint: str
    """sha256 of what it is."""
    corpora: dict[str, TokenizerScore]
    """Scores by corpus, training and validation text together."""
    hostile: dict[str, bool]
    """Exact round trip of hostile texts, by name."""
    exact: bool
    """Everything came back exactly."""
    embedding_parameters: int
    """Parameters of embedding and head in the recipe's model."""
    parameters_share: float | None
    """Their share of all parameters."""
