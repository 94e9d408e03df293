"""Images of a trained model from Python; runs on what `make demo` leaves.

python examples/sample_pipeline.py                          # digits of the demo's REPA run
python examples/sample_pipeline.py --model exports/big --labels 207 360 --steps 250
"""

from __future__ import annotations

import argparse
from pathlib import Path

from repa_pipeline import REPAPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of `repa export --to safetensors`, or a checkpoint")
    parser.add_argument("--workspace", default="repa-demo", help="where runs are, without --model")
    parser.add_argument("--run", default="repa")
    parser.add_argument("--labels", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("pipeline-samples"))
    given = parser.parse_args()

    if given.model:
        pipe = REPAPipeline.from_pretrained(given.model, device=given.device)
    else:
        pipe = REPAPipeline.from_run(given.run, workspace=given.workspace, device=given.device)
        pipe.save_pretrained(given.output / "model")  # safetensors and JSON, for others
    images = pipe(
        class_labels=given.labels,
        num_inference_steps=given.steps,
        guidance_scale=1.8,
        guidance_interval=(0.0, 0.7),
        generator=given.seed,
    ).images
    given.output.mkdir(parents=True, exist_ok=True)
    for k, (label, image) in enumerate(zip(given.labels, images, strict=True)):
        image.save(given.output / f"{k:02d}-class-{label}.png")
    print(f"{len(images)} images in {given.output}")


if __name__ == "__main__":
    main()
