"""REPA against its vanilla twin on the embedded digits, over several seeds.

    python benchmarks/demo_seeds.py [--seeds 3] [--workspace DIR]

Runs `repa demo` once a seed (its own workspace each) and gathers distance and label agreement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workspace", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.workspace or temporary)
        results = [run_seed(folder / f"seed{seed}", seed) for seed in range(arguments.seeds)]
    summary = {name: summarise([result[name] for result in results]) for name in results[0]}
    wins = sum(r["repa"]["frechet_distance"] < r["vanilla"]["frechet_distance"] for r in results)
    result = {
        "seeds": results,
        "summary": summary,
        "repa_wins": wins,
        "distance_ratio_repa_over_vanilla": [
            r["repa"]["frechet_distance"] / r["vanilla"]["frechet_distance"] for r in results
        ],
    }
    print(json.dumps(result, indent=1))
    print(f"written: {save('demo_seeds', result)}")


def run_seed(workspace: Path, seed: int) -> dict[str, Any]:
    """One demo; per run its distance, other metrics and label agreement."""
    command = [sys.executable, "-m", "repa_pipeline", "demo", "--workspace", str(workspace)]
    subprocess.run([*command, "--seed", str(seed)], check=True)
    found = {}
    for name in ("repa", "vanilla"):
        folder = max((workspace / "runs" / name / "samples").iterdir(), key=step_of)
        score = json.loads((folder / "result.json").read_text())
        judge = json.loads((folder / "judge.json").read_text())
        found[name] = {**score["metrics"], "label_agreement": judge["agreement"]}
    return found


def step_of(folder: Path) -> int:
    """The checkpoint's step in a sample folder's name."""
    return int(folder.name.removeprefix("step"))


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every number."""
    names = [name for name, value in rows[0].items() if value is not None]
    return {
        name: {
            "mean": mean(row[name] for row in rows),
            "sd": stdev([row[name] for row in rows]) if len(rows) > 1 else None,
        }
        for name in names
    }


if __name__ == "__main__":
    main()
