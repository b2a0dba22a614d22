"""What every command answers: the shape of its JSON object, and of report.json in a run.

Numbers that could not be measured are None, never NaN. A field is only ever added; what a number
means does not change under the same schema.
"""

from __future__ import annotations

from valkyrie_core.report.allocation import (
    AllocateReport,
    CandidateScore,
    Estimate,
    ImportanceReport,
    LayerImportance,
    LayerPicture,
    MatchedSize,
    SearchReport,
    StackPicture,
)
from valkyrie_core.report.base import KVFormat, Part, RecurrentFormat, Report, Weights
from valkyrie_core.report.evaluation import CorpusScore, EvalReport
from valkyrie_core.report.inference import (
    ChatReport,
    ChatTurn,
    GenerateReport,
    ReadReport,
    Sampling,
)
from valkyrie_core.report.inventory import RunsListReport, RunsShowReport, RunSummary
from valkyrie_core.report.long_context import (
    ContextScore,
    EffectiveContext,
    LengthCost,
    LongContextReport,
    LongReading,
    PositionScore,
    RecallScore,
)
from valkyrie_core.report.machine import Check, DoctorReport
from valkyrie_core.report.plan import PlanReport
from valkyrie_core.report.tokenizers import (
    TokenizerBuildReport,
    TokenizerEvalReport,
    TokenizerScore,
)
from valkyrie_core.report.training import CorpusCounts, SplitCounts, TrainReport

__all__ = [
    "AllocateReport",
    "CandidateScore",
    "ChatReport",
    "ChatTurn",
    "Check",
    "ContextScore",
    "CorpusCounts",
    "CorpusScore",
    "DoctorReport",
    "EffectiveContext",
    "Estimate",
    "EvalReport",
    "GenerateReport",
    "ImportanceReport",
    "KVFormat",
    "LayerImportance",
    "LayerPicture",
    "LengthCost",
    "LongContextReport",
    "LongReading",
    "MatchedSize",
    "Part",
    "PlanReport",
    "PositionScore",
    "ReadReport",
    "RecallScore",
    "RecurrentFormat",
    "Report",
    "RunSummary",
    "RunsListReport",
    "RunsShowReport",
    "Sampling",
    "SearchReport",
    "SplitCounts",
    "StackPicture",
    "TokenizerBuildReport",
    "TokenizerEvalReport",
    "TokenizerScore",
    "TrainReport",
    "Weights",
]
