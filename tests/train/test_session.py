from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import small
from tests.train.forks import fork, wait
from tests.train.test_resume import outcome, send_at, stopped_after
from valkyrie_core.errors import (
    CheckpointError,
    MissingError,
    RecipeError,
    ResourceError,
    RunInUseError,
    StoppedError,
    UsageError,
    ValkyrieError,
)
from valkyrie_core.train import journal
from valkyrie_core.train.checkpoint import list_checkpoints, verify
from valkyrie_core.train.load import find_checkpoint, load_run
from valkyrie_core.train.run_dir import RunDir
from valkyrie_core.train.storage import Storage


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "draw_curves", lambda rows, title: b"")


def run_of(recipe: Any) -> RunDir:
    return RunDir(Path(recipe.runs_dir) / recipe.name)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Starting ----------------------------------------------------------------------------------------


def test_a_run_leaves_everything_that_describes_it(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder, sample_prompts=["So"])
    result = small.train(recipe, cache=cache)
    names = {entry.name for entry in result.run.path.iterdir()}
    assert names == {
        "recipe.json", "environment.json", "metrics.jsonl", "curves.png", "samples.md",
        "tokenizer", "checkpoints", "lock",
    }  # fmt: skip
    environment = json.loads(result.run.environment_file.read_bytes())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1
    (sitting,) = environment["sittings"]
    assert sitting["data_fingerprint"] == result.dataset.fingerprint
    assert sitting["tokenizer_fingerprint"] == result.dataset.tokenizer.fingerprint
    assert (result.step, result.tokens_seen) == (6, 6 * 4 * 16)
    assert result.tokens_per_second is not None
    assert result.tokens_per_second > 0
    assert result.validation is not None
    assert result.best_bpb == pytest.approx(min(
        row["bpb"] for row in small.rows(result.run) if row["kind"] == "val"
    ))  # fmt: skip
    assert result.train_loss == small.rows(result.run)[-3]["loss"]
    assert verify(result.checkpoint).step == 6


def test_a_finished_run_is_not_started_again(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    result = small.train(recipe, cache=cache)
    before = outcome(result.run)
    with pytest.raises(UsageError, match=r"exists already in .*, finished at step 6") as caught:
        small.train(recipe, cache=cache)
    assert caught.value.exit_code == 2
    assert caught.value.hint == (
        "continue it with --extend-steps N, or start another with --set name=NEW"
    )
    assert outcome(result.run) == before


def test_an_interrupted_run_is_not_started_again(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    stopped_after(recipe, 2, cache)
    for recipe_file, where in ((None, ", at step 2 of 6"), ("broken", "")):
        if recipe_file:
            run_of(recipe).recipe_file.write_text(recipe_file)
        with pytest.raises(UsageError, match=f"exists already in .*small{where}$") as caught:
            small.train(recipe, cache=cache)
        assert caught.value.hint == (
            "go on with it: valkyrie train small --resume; or start another with --set name=NEW"
        )


def test_a_damaged_run_is_not_started_again_either(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    for _, path in list_checkpoints(small.train(recipe, cache=cache).run.checkpoints):
        damage(path / "model.safetensors")
    with pytest.raises(UsageError):
        small.train(recipe, cache=cache)


def test_there_is_nothing_to_resume(folder: Path, cache: Path) -> None:
    for keywords in ({"resume": True}, {"extend_steps": 4}):
        with pytest.raises(MissingError, match="no run") as caught:
            small.train(small.recipe(folder), cache=cache, **keywords)
        assert caught.value.exit_code == 4
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_an_interruption_before_the_first_step_costs_nothing(
    resume: bool, folder: Path, cache: Path
) -> None:
    recipe = small.recipe(folder)
    expected = outcome(small.train(small.recipe(folder, runs="whole"), cache=cache).run)

    def interrupted(_tokenizer: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("data are prepared as if nothing had happened")

    with pytest.raises(StoppedError, match="before the first step") as caught:
        small.train(recipe, cache=cache, prepare=interrupted)
    assert caught.value.exit_code == 75
    assert caught.value.hint == "valkyrie train small"
    assert outcome(small.train(recipe, cache=cache, resume=resume).run) == expected


def test_two_sittings_at_once_are_refused(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    run = run_of(recipe)
    run.create()
    run.save_recipe(recipe)
    with run.lock("the other one"):
        for keywords in ({}, {"resume": True}, {"extend_steps": 1}):
            with pytest.raises(RunInUseError, match="the other one") as caught:
                small.train(recipe, cache=cache, **keywords)
            assert caught.value.exit_code == 8


# Resuming ----------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outcome(small.train(small.recipe(folder, runs="whole"), cache=cache).run)
    recipe = small.recipe(folder)
    stopped_after(recipe, 5, cache)
    damage(run_of(recipe).checkpoints / "step-000005" / "training.safetensors")
    result = small.train(recipe, cache=cache, resume=True)
    assert outcome(result.run) == expected
    assert "training.safetensors is damaged" in caplog.text
    assert "falling back to the older checkpoint" in caplog.text
    assert (run_of(recipe).checkpoints / "damaged-step-000005").is_dir()


def test_without_any_valid_checkpoint_nothing_is_restarted(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    stopped_after(recipe, 5, cache)
    run = run_of(recipe)
    for _, path in list_checkpoints(run.checkpoints):
        damage(path / "meta.json")
    before = sorted(path.name for path in run.checkpoints.iterdir())
    for keywords in ({"resume": True}, {"extend_steps": 2}):
        with pytest.raises(CheckpointError, match="none of the") as caught:
            small.train(recipe, cache=cache, **keywords)
        assert caught.value.exit_code == 5
    with pytest.raises(CheckpointError):
        load_run(run.path)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": {"type": "adamw", "lr": 0.5}}, "train.optimizer.lr was 0.001 and is 0.5"),
        ({"batch_size": 8}, "train.batch_size was 4 and is 8"),
        ({"model": {"norm": "rms_norm"}}, 'model.norm was "layer_norm" and is "rms_norm"'),
        ({"optimizer": small.MUON}, 'train.optimizer.type was "adamw" and is "muon"'),
    ],
)
def test_another_recipe_is_refused_by_key(
    change: dict[str, Any], key: str, folder: Path, cache: Path
) -> None:
    stopped_after(small.recipe(folder), 2, cache)
    with pytest.raises(UsageError, match="not the one the run was started with") as caught:
        small.train(small.recipe(folder, **change), cache=cache, resume=True)
    assert key in str(caught.value)


def test_harmless_keys_may_change(folder: Path, cache: Path) -> None:
    expected = small.train(small.recipe(folder, runs="whole"), cache=cache)
    stopped_after(small.recipe(folder), 2, cache)
    changed = small.recipe(folder, log_every=1, save_every=1, keep_last=3, sample_prompts=["So"])
    result = small.train(changed, cache=cache, resume=True)
    one, other = small.weights(result.run), small.weights(expected.run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(list_checkpoints(result.run.checkpoints)) == 3
    assert result.run.samples_file.exists()


def test_an_edited_recipe_file_is_noticed(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    stopped_after(recipe, 2, cache)
    edited = small.recipe(folder, batch_size=2)
    run_of(recipe).save_recipe(edited)
    with pytest.raises(CheckpointError, match="another recipe"):
        small.train(edited, cache=cache, resume=True)


def test_other_texts_are_noticed(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    stopped_after(recipe, 2, cache)
    (folder / "texts" / "00.txt").write_text("Tomorrow, and tomorrow, and tomorrow.")
    with pytest.raises(CheckpointError, match="texts are not those"):
        small.train(recipe, cache=cache, resume=True)


def test_another_tokenizer_is_noticed(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder)
    stopped_after(recipe, 2, cache)
    run = run_of(recipe)

    class Other:
        fingerprint = "0" * 64

    def prepare(tokenizer: Any) -> Any:
        from dataclasses import replace

        from valkyrie_core.data.dataset import prepare as prepare_data

        assert tokenizer is not None  # a resumed run brings its own
        return replace(prepare_data(recipe.data, cache=cache), tokenizer=Other())

    with pytest.raises(CheckpointError, match="another tokenizer"):
        small.train(recipe, cache=cache, resume=True, prepare=prepare)
    shutil.rmtree(run.tokenizer_directory)
    with pytest.raises(ValkyrieError, match="tokenizer"):
        small.train(recipe, cache=cache, resume=True)


def test_another_number_of_threads_is_announced(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = small.recipe(folder)
    stopped_after(recipe, 2, cache)
    torch.set_num_threads(2)
    small.train(recipe, cache=cache, resume=True)
    assert "threads was 1 and is 2" in caplog.text
    assert "not bit for bit" in caplog.text


# Stopping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_validation_or_sampling_loses_nothing(
    number: int, folder: Path, cache: Path
) -> None:
    settings: dict[str, Any] = {"sample_prompts": ["So", "When"], "steps": 6}
    expected = outcome(small.train(small.recipe(folder, runs="whole", **settings), cache=cache).run)

    def then_send(work: Callable[..., Any], at: int) -> Callable[..., Any]:
        calls = []

        def wrapped(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            return work(*arguments)

        return wrapped

    for case, (evaluated, sampled, step) in enumerate([(1, 0, 3), (2, 0, 6), (0, 2, 3), (0, 4, 6)]):
        recipe = small.recipe(folder, runs=f"case{case}", **settings)
        with pytest.raises(StoppedError, match=signal.Signals(number).name):
            small.train(
                recipe,
                cache=cache,
                evaluate=then_send(small.evaluate, evaluated),
                sample=then_send(small.sample, sampled),
            )
        assert list_checkpoints(run_of(recipe).checkpoints)[0][0] == step
        result = small.train(recipe, cache=cache, resume=True)
        assert outcome(result.run) == expected
        # the validation that was interrupted is in the newest checkpoint now
        assert find_checkpoint(result.run, "newest").meta["position"]["validated"] == 6


def test_a_stop_that_comes_with_the_last_step_is_a_finish(folder: Path, cache: Path) -> None:
    recipe = small.recipe(folder, steps=4, eval_every=9)
    result = small.train(
        recipe, cache=cache, progress=send_at(4), evaluate=lambda model, dataset, poll: None
    )
    assert result.finished


class TermAt:
    """A storage hook that sends SIGTERM to its process at each of the given events."""

    def __init__(self, *moments: int) -> None:
        self.count, self.moments = 0, moments

    def __call__(self, event: str, path: Path) -> None:
        self.count += 1
        if self.count in self.moments:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_at_any_moment_ends_with_75_and_loses_nothing(folder: Path, cache: Path) -> None:
    """Moments all over a sitting, in the middle of saving too."""
    settings: dict[str, Any] = {"save_every": 1, "steps": 8, "sample_prompts": ["So"]}
    hook = TermAt()
    whole = small.train(
        small.recipe(folder, runs="whole", **settings), cache=cache, storage=Storage(hook)
    )
    expected = outcome(whole.run)
    codes = []
    for at in range(1, hook.count, hook.count // 20):
        recipe = small.recipe(folder, runs=f"at{at}", **settings)
        child = fork(lambda: exit_as_the_command_line_does(recipe, cache, Storage(TermAt(at))))  # noqa: B023
        codes.append(wait(child))
        result = small.train(recipe, cache=cache, resume=True)
        assert outcome(result.run) == expected, f"SIGTERM at event {at}"
    # the last moments come after the last step: there the sitting just ends
    assert codes.count(75) >= 18
    assert set(codes) <= {75, 0}


def test_a_second_signal_leaves_at_once_with_130(folder: Path, cache: Path) -> None:
    settings: dict[str, Any] = {"save_every": 1, "steps": 4}
    expected = outcome(small.train(small.recipe(folder, runs="whole", **settings), cache=cache).run)
    for at in (120, 131, 142):
        recipe = small.recipe(folder, runs=f"at{at}", **settings)
        storage = Storage(TermAt(at, at + 3))  # the second one in the same save
        child = fork(lambda: exit_as_the_command_line_does(recipe, cache, storage))  # noqa: B023
        assert wait(child) == 130
        assert outcome(small.train(recipe, cache=cache, resume=True).run) == expected


def exit_as_the_command_line_does(recipe: Any, cache: Path, storage: Storage) -> None:
    try:
        small.train(recipe, cache=cache, storage=storage)
    except StoppedError as error:
        os._exit(error.exit_code)


def test_a_validation_that_was_made_up_for_and_lost_again_is_no_second_row(
    folder: Path, cache: Path
) -> None:
    """Stopped in the validation, resumed, killed between its row and its checkpoint."""
    expected = outcome(small.train(small.recipe(folder, runs="whole"), cache=cache).run)
    recipe = small.recipe(folder)

    def stop(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return small.evaluate(*arguments)

    with pytest.raises(StoppedError):
        small.train(recipe, cache=cache, evaluate=stop)

    def kill(event: str, path: Path) -> None:
        if event == "before mkdir":
            os.kill(os.getpid(), signal.SIGKILL)

    code = wait(
        fork(lambda: small.train(recipe, cache=cache, resume=True, storage=Storage(kill)) and None)
    )
    assert code == -signal.SIGKILL
    assert [row["kind"] for row in small.rows(run_of(recipe))] == ["train", "val"]
    assert outcome(small.train(recipe, cache=cache, resume=True).run) == expected


# Faults of the disk ------------------------------------------------------------------------------


def test_a_full_disk_ends_with_7_and_a_run_that_resumes(folder: Path, cache: Path) -> None:
    settings: dict[str, Any] = {"save_every": 1, "log_every": 1}
    expected = outcome(small.train(small.recipe(folder, runs="whole", **settings), cache=cache).run)
    for at in range(3, 40, 6):
        recipe = small.recipe(folder, runs=f"at{at}", **settings)
        written = []

        def full(event: str, path: Path, written: list[Path] = written, at: int = at) -> None:
            if event in ("before write", "before append"):
                written.append(path)
                if len(written) >= at:
                    raise OSError(28, "No space left on device", str(path))

        with pytest.raises(ResourceError, match="No space left") as caught:
            small.train(recipe, cache=cache, storage=Storage(full))
        assert caught.value.exit_code == 7
        resumes = run_of(recipe).recipe_file.exists()
        assert outcome(small.train(recipe, cache=cache, resume=resumes).run) == expected


# Using a run -------------------------------------------------------------------------------------


def test_a_run_is_loaded_from_its_best_checkpoint(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from valkyrie_core.train.progress import Validation

    scores = iter([2.0, 3.0])
    result = small.train(
        small.recipe(folder),
        cache=cache,
        evaluate=lambda model, dataset, poll: Validation(next(scores), {"plays": 0.0}),
    )
    best, newest = load_run(result.run.path), load_run(result.run.path, which="newest")
    assert (best.checkpoint.step, newest.checkpoint.step) == (3, 6)
    assert not best.model.training
    assert best.tokenizer.fingerprint == result.dataset.tokenizer.fingerprint
    assert best.recipe == result.recipe
    stored = best.checkpoint.model_tensors()
    assert all(torch.equal(p, stored[name]) for name, p in best.model.named_parameters())
    assert not torch.equal(best.model.head.weight, newest.model.head.weight)
    damage(best.checkpoint.path / "model.safetensors")
    assert load_run(result.run.path).checkpoint.step == 6
    assert "using the newest instead" in caplog.text


def test_no_run_no_checkpoint_no_tokenizer(folder: Path, cache: Path) -> None:
    with pytest.raises(MissingError, match=r"no recipe\.json"):
        load_run(folder)
    recipe = small.recipe(folder)
    run = run_of(recipe)
    run.create()
    run.save_recipe(recipe)
    with pytest.raises(MissingError, match="no checkpoint yet"):
        load_run(run.path)
    small.train(recipe, cache=cache)
    shutil.rmtree(run.tokenizer_directory)
    with pytest.raises(ValkyrieError, match="tokenizer"):
        load_run(run.path)


def test_weights_of_another_run_are_the_start(folder: Path, cache: Path) -> None:
    first = small.train(small.recipe(folder, name="first"), cache=cache)
    for source in ("first", str(first.run.path)):
        recipe = small.recipe(folder, name="second", init_from=source)
        assert small.train(recipe, cache=cache).finished
        shutil.rmtree(run_of(recipe).path)

    def stop(_event: Any) -> None:
        raise KeyboardInterrupt

    recipe = small.recipe(folder, name="third", init_from="first")
    with pytest.raises(KeyboardInterrupt):
        small.train(recipe, cache=cache, progress=stop)
    started = find_checkpoint(run_of(recipe))
    assert started.step == 0
    assert started.meta["position"]["tokens_seen"] == 0
    one, other = started.model_tensors(), small.weights(first.run)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # only weights: no optimizer state, and the generators are those of a fresh run
    assert not [name for name in started.training_tensors() if name.startswith("optimizer/")]


def test_weights_of_another_type_are_rounded_at_the_start(folder: Path, cache: Path) -> None:
    first = small.train(small.recipe(folder, name="first"), cache=cache)
    narrow = {"weights": "bf16", "optimizer": {"type": "adafactor"}, "init_from": "first"}
    second = small.train(small.recipe(folder, name="second", steps=1, **narrow), cache=cache)
    begun = verify(list_checkpoints(second.run.checkpoints)[-1][1]).model_tensors()
    for name, tensor in small.weights(first.run).items():
        assert begun[name].dtype in (torch.bfloat16, torch.float32)
        assert torch.equal(begun[name], tensor.to(begun[name].dtype)), name


def test_a_start_that_does_not_fit_says_what_does_not(folder: Path, cache: Path) -> None:
    with pytest.raises(MissingError, match="no such run") as caught:
        small.train(small.recipe(folder, init_from="nobody"), cache=cache)
    assert "runs" in str(caught.value.hint)
    small.train(small.recipe(folder, name="first"), cache=cache)
    wide = small.recipe(folder, name="wide", init_from="first", model={"dim": 32})
    with pytest.raises(RecipeError, match=r"train\.init_from: .* of shape \[24, 16\], the model"):
        small.train(wide, cache=cache)
    first = RunDir(folder / "runs" / "first")
    newest = list_checkpoints(first.checkpoints)[0]
    meta = verify(newest[1]).meta | {"tokenizer_fingerprint": "f" * 64}
    from valkyrie_core.train.checkpoint import save_checkpoint

    save_checkpoint(
        first.checkpoints,
        newest[0],
        model=small.weights(first),
        training={},
        meta=meta,
        storage=Storage(),
    )
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_run(first.path)
    with pytest.raises(RecipeError, match="another tokenizer"):
        small.train(small.recipe(folder, name="fourth", init_from="first"), cache=cache)


def test_a_stopped_run_starts_from_its_own_weights_on_resume(folder: Path, cache: Path) -> None:
    """init_from counts at the start alone, even if the other run is gone by then."""
    first = small.train(small.recipe(folder, name="first"), cache=cache)
    recipe = small.recipe(folder, init_from="first")
    stopped_after(recipe, 2, cache)
    shutil.rmtree(first.run.path)
    assert small.train(recipe, cache=cache, resume=True).finished
