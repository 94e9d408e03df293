"""The published table beside a result."""

from __future__ import annotations

from typing import Any

import pytest

from repa_pipeline.metrics.published import (
    PUBLISHED,
    comparison,
    comparison_lines,
    rows_like,
    why_not_comparable,
)

XL = {"model": "SiT-XL/2", "step": 4_000_000, "cfg": 1.8, "interval": [0.0, 0.7]}


def result_of(**changes: Any) -> dict[str, Any]:
    """A result that may be compared."""
    settings = {**XL, "labels": "random", "use_ema": True}
    result = {
        "metrics": {
            **{"frechet_distance": 1.5, "spatial_frechet_distance": 4.6, "precision": 0.79},
            **{"inception_score": 300.0, "recall": None, "kid": 1e-4},
        },
        "num_samples": 50_000,
        "network": {"name": "inception-v3", "published": True},
        "reference": {
            "kind": "adm",
            "adm_file": "VIRTUAL_imagenet256_labeled.npz",
            "resolution": 256,
        },
        "sample_settings": {**settings, "sampler": "sde", "num_steps": 250},
    }
    return {**result, **changes}


def test_the_row_of_the_same_model_step_and_guidance() -> None:
    compared = comparison(result_of())
    assert compared["comparable"] and compared["because"] == []
    (row,) = compared["rows"]
    assert row["title"] == "SiT-XL/2 + REPA, 4M steps, cfg 1.8 on t in [0, 0.7]"
    assert row["numbers"]["frechet_distance"] == 1.42 and row["numbers"]["recall"] == 0.65
    assert row["difference"] == pytest.approx(
        {
            "frechet_distance": 0.08,
            "spatial_frechet_distance": -0.10,
            "inception_score": -5.7,
            "precision": -0.01,
        }
    )
    (line,) = comparison_lines({**result_of(), "compare": compared})
    assert line == (
        "published SiT-XL/2 + REPA, 4M steps, cfg 1.8 on t in [0, 0.7]: FID 1.42 (+0.08), "
        "sFID 4.7 (-0.1), IS 305.7 (-5.7), precision 0.8 (-0.01), recall 0.65"
    )


def test_rows_are_chosen_by_what_is_known() -> None:
    def titles(**settings: Any) -> list[str]:
        return [row.title for row in rows_like(settings)]

    assert titles(model="SiT-B/2", step=400_000, cfg=1.0) == [
        "SiT-B/2, 400K steps",
        "SiT-B/2 + REPA, 400K steps",
    ]
    assert titles(model="SiT-XL/2", step=7_000_000, cfg=1.5) == ["SiT-XL/2, 7M steps, cfg 1.5"]
    # A step that was not published: all of the model at that guidance.
    assert len(titles(model="SiT-XL/2", step=123, cfg=1.35)) == 1
    assert titles(model="SiT-XS/2", step=400_000, cfg=1.0) == []
    assert rows_like(None) == list(PUBLISHED)
    said = comparison_lines({**result_of(), "compare": {**comparison(result_of()), "rows": []}})
    assert said == ["no published row is of this model"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_samples": 10_000}, "10,000 samples, not 50,000"),
        ({"network": {"name": "fd-dinov2", "published": True}}, "another network"),
        ({"network": {"name": "inception-v3", "published": False}}, "another network"),
        ({"reference": {"kind": "own"}}, "another reference than ADM's"),
        (
            {"reference": {"kind": "adm", "adm_file": "mine.npz", "resolution": 256}},
            "reference file mine.npz, not VIRTUAL_imagenet256_labeled.npz",
        ),
        (
            {"sample_settings": {"model": "SiT-B/2", "sampler": "euler", "num_steps": 50}},
            "sampler euler with 50 steps, not sde with 250",
        ),
        ({"sample_settings": {**XL, "labels": "balanced"}}, "labels balanced, not random"),
        ({"sample_settings": {**XL, "guide": {"step": 1}}}, "guided by a weaker checkpoint"),
        ({"sample_settings": {**XL, "use_ema": False}}, "the raw weights, not their average"),
    ],
)
def test_what_cannot_be_compared_is_shown_without_a_difference(
    changes: dict[str, Any], reason: str
) -> None:
    result = result_of(**changes)
    assert [reason in why for why in why_not_comparable(result)] == [True]
    compared = comparison(result)
    assert not compared["comparable"]
    assert compared["rows"] and all("difference" not in row for row in compared["rows"])
    lines = comparison_lines({**result, "compare": compared})
    assert lines[0].startswith("not comparable with published numbers: ") and reason in lines[0]
    assert "(" not in lines[1]


def test_no_difference_to_a_row_of_other_guidance_or_step() -> None:
    settings = result_of()["sample_settings"]
    for changed in ({"interval": [0.0, 1.0]}, {"cfg": 2.0}, {"step": 400_000}):
        compared = comparison(result_of(sample_settings={**settings, **changed}))
        assert compared["comparable"] and compared["rows"]
        assert all("difference" not in row for row in compared["rows"])


def test_a_foreign_file_may_be_compared_with_all_rows() -> None:
    compared = comparison(result_of(sample_settings=None))
    assert compared["comparable"] and len(compared["rows"]) == len(PUBLISHED)
    best = [row["numbers"]["frechet_distance"] for row in compared["rows"]]
    assert min(best) == 1.42 and best[:2] == [33.0, 24.4]
