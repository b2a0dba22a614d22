"""Kills a training with SIGKILL at random moments until it finishes, and compares the weights.

    python -m benchmarks.kill_resume quickstart --steps 60 --mean-seconds 12

trains a recipe once undisturbed and once killed and resumed over and over, in a temporary folder,
and exits with 1 unless the final weights are equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def command(recipe: str, folder: Path, steps: int, *extra: str) -> list[str]:
    """The command line that trains `recipe` in `folder`."""
    return [
        *(sys.executable, "-m", "valkyrie_cli", "train", recipe, "--json"),
        *("--set", f"runs_dir={folder}", "--set", f"train.steps={steps}"),
        *("--set", f"train.save_every={max(1, steps // 12)}"),
        *extra,
    ]


def undisturbed(recipe: str, folder: Path, steps: int) -> None:
    """Trains to the end."""
    subprocess.run(command(recipe, folder, steps), check=True, capture_output=True)


def killed(recipe: str, folder: Path, steps: int, mean_seconds: float, seed: int) -> int:
    """Trains to the end through SIGKILLs; returns how many there were."""
    rng = random.Random(seed)
    kills = 0
    extra: list[str] = []
    while True:
        process = subprocess.Popen(
            command(recipe, folder, steps, *extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # at least as long as it takes to start and reach the next checkpoint, or it never ends
        try:
            _, errors = process.communicate(timeout=mean_seconds * rng.uniform(0.5, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            extra = ["--resume"] if any(folder.glob("*/checkpoints/step-*")) else []
            continue
        if process.returncode:
            raise SystemExit(errors.decode(errors="replace"))
        return kills


def final_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint of the only run in a folder."""
    newest = max(folder.glob("*/checkpoints/step-*"), key=lambda p: int(p.name.split("-")[1]))
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def main() -> int:
    """Prints one JSON object; 0 where every bit is equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--mean-seconds", type=float, default=12.0, help="between two kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole, parts = Path(name) / "whole", Path(name) / "parts"
        began = time.perf_counter()
        undisturbed(options.recipe, whole, options.steps)
        kills = killed(options.recipe, parts, options.steps, options.mean_seconds, options.seed)
        first, second = final_weights(whole), final_weights(parts)
        different = [n for n in first if not first[n].equal(second[n])]
        same_names = first.keys() == second.keys()
    result = {
        "recipe": options.recipe,
        "steps": options.steps,
        "kills": kills,
        "tensors": len(first),
        "different": len(different),
        "equal": same_names and not different,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(result))
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
