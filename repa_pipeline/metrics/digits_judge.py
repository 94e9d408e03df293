"""A judge of the class of generated digits that shares nothing with the networks it judges.

A support vector machine on 8x8 grey pixels, fitted on the training digits in under a second, so
no weights are shipped. `fit_judge().predict(images)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from repa_pipeline.data.digits import SIDE, embedded_digits, heldout_indices, train_indices
from repa_pipeline.errors import MismatchError

Int64 = npt.NDArray[np.int64]

# Penalty of a standard RBF machine; its width is scikit-learn's "scale" rule.
PENALTY = 10.0


@dataclass(frozen=True)
class DigitsJudge:
    """A fitted classifier and its accuracy, 0..1, on digits that it was not fitted on."""

    classifier: Any
    held_out_accuracy: float

    def predict(self, images: npt.NDArray[np.uint8]) -> Int64:
        """The class 0..9 of every image.

        images: uint8 [N, 3, R, R] or [N, R, R, 3], R a multiple of 8. Returns int64 [N].
        Raises MismatchError on anything else.
        """
        if len(images) == 0:
            return np.zeros(0, dtype=np.int64)
        predicted: Int64 = self.classifier.predict(_pixels(images)).astype(np.int64)
        return predicted


def fit_judge() -> DigitsJudge:
    """Fits the judge on the training digits as the pipeline prepares them (64x64)."""
    from sklearn.svm import SVC

    images, classes = embedded_digits()
    train, held_out = train_indices(), heldout_indices()
    classifier = SVC(C=PENALTY, kernel="rbf", gamma="scale")
    classifier.fit(_pixels(images[train]), classes[train])
    accuracy = classifier.score(_pixels(images[held_out]), classes[held_out])
    return DigitsJudge(classifier, float(accuracy))


def _pixels(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Area-downsampled grey in 0..1. float64 [N, 64]."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    shape = images.shape
    square = images.ndim == 4 and shape[3] == 3 and shape[1] == shape[2] and shape[1] % SIDE == 0
    if not square or images.dtype != np.uint8:
        raise MismatchError(
            f"images are {images.dtype} of shape {shape}: expected uint8 [N, 3, R, R] or "
            f"[N, R, R, 3] with R a multiple of {SIDE}"
        )
    block = shape[1] // SIDE
    blocks = images.reshape(shape[0], SIDE, block, SIDE, block, 3)
    pixels: npt.NDArray[np.float64] = blocks.mean(axis=(2, 4, 5)).reshape(shape[0], -1) / 255
    return pixels
