"""Which rule ends thought in a run, and whether its model has such depths."""

from __future__ import annotations

from valkyrie_core.errors import MissingError, UsageError
from valkyrie_core.evaluate.rules import (
    Rule,
    full_depth,
    has_depths,
    let_halt,
    own_rule,
    rule_of,
)
from valkyrie_core.inventory import RunPlace
from valkyrie_core.nn.models import Model
from valkyrie_core.runs.calibrated import Calibrated, read_calibrated
from valkyrie_core.train.load import LoadedLM, LoadedRun


def asked_rule(
    place: RunPlace, loaded: LoadedRun | LoadedLM, halt: str | None, min_depth: int | None
) -> tuple[Rule | None, Calibrated | None]:
    """What ends thought early: what is asked for, else what was calibrated, else the recipe's.

    And the promise that goes with it: of the calibrated rule as it is, and of no other.
    """
    if halt == "none":
        return None, None
    if halt is not None and halt != "calibrated":
        return rule_of(halt, min_depth=min_depth or 1), None
    calibrated = read_calibrated(place.path, loaded.checkpoint)
    if calibrated is None and halt == "calibrated":
        raise MissingError(
            f"the run {place.name} is not calibrated", hint=f"valkyrie calibrate {place.path}"
        )
    rule = own_rule(loaded.model) if calibrated is None else calibrated.rule
    if rule is not None and min_depth is not None:
        return rule.model_copy(update={"min_loops": min_depth}), None
    return rule, calibrated


def check_depths(
    model: Model, halt: str | None, min_depth: int | None, max_depth: int | None
) -> None:
    """Raises UsageError where depths are asked for that can't be."""
    asked = halt not in (None, "none") or min_depth is not None
    if not has_depths(model):
        if asked or max_depth is not None:
            raise UsageError(
                "the run's model has no depths: every token runs through all of its layers once",
                hint="cores of the types recursive and canvas have them",
            )
        return
    most = max_depth or full_depth(model)
    if (min_depth or 1) > most:
        raise UsageError(f"--min-depth {min_depth} is more than the {most} there are")
    if most == 1 and asked:
        raise UsageError(
            "what thinks once can't end earlier",
            hint="leave out --halt and --min-depth, or say --max-depth 2 or more",
        )
    if halt == "none" and min_depth is not None:
        raise UsageError("with --halt none nothing ends early: leave out --min-depth")


def halting_model(place: RunPlace, loaded: LoadedLM, halt: str | None) -> None:
    """Lets the tokens of a run's model halt by the rule that is asked for; None: by none.

    Raises UsageError where it can't, MissingError where it is not calibrated.
    """
    if halt is None:
        return
    check_depths(loaded.model, halt, None, None)
    rule, _ = asked_rule(place, loaded, halt, None)
    if rule is not None:
        let_halt(loaded.model, rule)
