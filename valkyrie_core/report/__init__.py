"""What every command answers: the shape of its JSON object, and of report.json in a run.

Numbers that could not be measured are None, never NaN. A field is only ever added; what a number
means does not change under the same schema.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from valkyrie_core.report.base import Part, Report
    from valkyrie_core.report.calibration import (
        CalibrateReport,
        CalibrationTest,
        TriedThreshold,
    )
    from valkyrie_core.report.comparison import (
        ComparedDepths,
        ComparedDesign,
        ComparedMetric,
        ComparedView,
        CompareReport,
        ComparisonTiming,
        Difference,
        DroppedDesign,
    )
    from valkyrie_core.report.evaluation import (
        Accuracy,
        CorpusScore,
        EvalReport,
        HaltingScore,
        MemoryScore,
        ThinkingScore,
    )
    from valkyrie_core.report.experts import (
        DeadExpert,
        DomainText,
        EarlierRouting,
        ExpertsReport,
        KnockOut,
        LayerExperts,
        MutualInformation,
        RouterSaturation,
        TokenLift,
    )
    from valkyrie_core.report.formats import KVFormat, RecurrentFormat, Weights
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
    from valkyrie_core.report.routes import PassRoutes, RoutesReport
    from valkyrie_core.report.tokenizers import (
        TokenizerBuildReport,
        TokenizerEvalReport,
        TokenizerScore,
    )
    from valkyrie_core.report.training import CorpusCounts, SplitCounts, TrainReport

__all__ = [
    "Accuracy",
    "AllocateReport",
    "CalibrateReport",
    "CalibrationTest",
    "CandidateScore",
    "ChatReport",
    "ChatTurn",
    "Check",
    "CompareReport",
    "ComparedDepths",
    "ComparedDesign",
    "ComparedMetric",
    "ComparedView",
    "ComparisonTiming",
    "ContextScore",
    "CorpusCounts",
    "CorpusScore",
    "DeadExpert",
    "Difference",
    "DoctorReport",
    "DomainText",
    "DroppedDesign",
    "EarlierRouting",
    "EffectiveContext",
    "Estimate",
    "EvalReport",
    "ExpertsReport",
    "GenerateReport",
    "HaltingScore",
    "ImportanceReport",
    "KVFormat",
    "KnockOut",
    "LayerExperts",
    "LayerImportance",
    "LayerPicture",
    "LengthCost",
    "LongContextReport",
    "LongReading",
    "MatchedSize",
    "MemoryScore",
    "MutualInformation",
    "Part",
    "PassRoutes",
    "PlanReport",
    "PositionScore",
    "ReadReport",
    "RecallScore",
    "RecurrentFormat",
    "Report",
    "RouterSaturation",
    "RoutesReport",
    "RunSummary",
    "RunsListReport",
    "RunsShowReport",
    "Sampling",
    "SearchReport",
    "SplitCounts",
    "StackPicture",
    "ThinkingScore",
    "TokenLift",
    "TokenizerBuildReport",
    "TokenizerEvalReport",
    "TokenizerScore",
    "TrainReport",
    "TriedThreshold",
    "Weights",
]

_PLACES = {
    "Accuracy": "evaluation",
    "AllocateReport": "allocation",
    "CalibrateReport": "calibration",
    "CalibrationTest": "calibration",
    "CandidateScore": "allocation",
    "ChatReport": "inference",
    "ChatTurn": "inference",
    "Check": "machine",
    "CompareReport": "comparison",
    "ComparedDepths": "comparison",
    "ComparedDesign": "comparison",
    "ComparedMetric": "comparison",
    "ComparedView": "comparison",
    "ComparisonTiming": "comparison",
    "ContextScore": "long_context",
    "CorpusCounts": "training",
    "CorpusScore": "evaluation",
    "DeadExpert": "experts",
    "Difference": "comparison",
    "DoctorReport": "machine",
    "DomainText": "experts",
    "DroppedDesign": "comparison",
    "EarlierRouting": "experts",
    "EffectiveContext": "long_context",
    "Estimate": "allocation",
    "EvalReport": "evaluation",
    "ExpertsReport": "experts",
    "GenerateReport": "inference",
    "HaltingScore": "evaluation",
    "ImportanceReport": "allocation",
    "KVFormat": "formats",
    "KnockOut": "experts",
    "LayerExperts": "experts",
    "LayerImportance": "allocation",
    "LayerPicture": "allocation",
    "LengthCost": "long_context",
    "LongContextReport": "long_context",
    "LongReading": "long_context",
    "MatchedSize": "allocation",
    "MemoryScore": "evaluation",
    "MutualInformation": "experts",
    "Part": "base",
    "PassRoutes": "routes",
    "PlanReport": "plan",
    "PositionScore": "long_context",
    "ReadReport": "inference",
    "RecallScore": "long_context",
    "RecurrentFormat": "formats",
    "Report": "base",
    "RouterSaturation": "experts",
    "RoutesReport": "routes",
    "RunSummary": "inventory",
    "RunsListReport": "inventory",
    "RunsShowReport": "inventory",
    "Sampling": "inference",
    "SearchReport": "allocation",
    "SplitCounts": "training",
    "StackPicture": "allocation",
    "ThinkingScore": "evaluation",
    "TokenLift": "experts",
    "TokenizerBuildReport": "tokenizers",
    "TokenizerEvalReport": "tokenizers",
    "TokenizerScore": "tokenizers",
    "TrainReport": "training",
    "TriedThreshold": "calibration",
    "Weights": "formats",
}
"""Which module of this package holds a name."""


def __getattr__(name: str) -> Any:
    # building every report's class takes a quarter of a second, and a command needs one or two
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
