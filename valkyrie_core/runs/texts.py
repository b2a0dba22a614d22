"""The texts that a run was trained on, for what is asked of it afterwards."""

from __future__ import annotations

from valkyrie_core.data.dataset import Dataset, prepare
from valkyrie_core.errors import CheckpointError
from valkyrie_core.runs.training import tell_now_and_then
from valkyrie_core.train.load import LoadedLM, LoadedRun


def texts_of_training(run: LoadedRun | LoadedLM, *, otherwise: str = "train again") -> Dataset:
    """The run's texts; those that are held out were not trained on.

    Args:
        otherwise: what to do where the texts can't be put back.

    Raises:
        CheckpointError: they are not those of the training.
    """
    dataset = prepare(run.recipe.data, tokenizer=run.tokenizer, progress=tell_now_and_then())
    if dataset.fingerprint != run.checkpoint.meta["data_fingerprint"]:
        raise CheckpointError(
            "the texts are not those that the run was trained on: it may have read what it is "
            "asked about",
            hint=f"put the texts back as they were, or {otherwise}",
        )
    return dataset
