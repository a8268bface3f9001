"""What of a network's scores is explained: a target, where it is one of a map, and what it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdtd.graph import Array, Shape
from fastdtd.schedule import Through

HIGHEST: Final = "max"

# Which positions of a channel are explained: all, the one with the highest score, one (y, x), or a mask's (H, W).
Place = Literal["max"] | tuple[int, int] | npt.NDArray[np.bool_] | None


class Beginning(NamedTuple):
    """What the backward passes of some images begin with.

    targets : (N,) int64, what is explained: an output, or a channel of outputs that are maps
    start : (N, outputs) float32, the relevance that outputs start with; None where that is the target's score alone
    region : (N, H, W) bool, which positions of the target are explained; None where outputs are no maps
    """

    targets: npt.NDArray[np.int64]
    start: Array | None
    region: npt.NDArray[np.bool_] | None


class Score(NamedTuple):
    """A number of an image's outputs (K, H, W): the target's score, of maps the sum over a region, less the mean of
    those that it is held against.

    region : (H, W) bool
    against : (n, positions) int64, the outputs that it is held against at each position of the region; n may be 0
    """

    target: int
    region: npt.NDArray[np.bool_]
    against: npt.NDArray[np.int64]

    def of(self, scores: Array) -> float:
        """Of an image with these scores."""
        found = scores[self.target][self.region].sum(dtype=np.float64)
        if len(self.against):
            others = np.take_along_axis(scores[:, self.region], self.against, 0)
            found -= others.mean(0, dtype=np.float64).sum()
        return float(found)

    def derivative(self, shape: Shape) -> Array:
        """By each output."""
        found = np.zeros(shape, np.float32)
        found[self.target, self.region] = 1
        for others in self.against:
            found[(others, *np.nonzero(self.region))] -= 1 / len(self.against)
        return found


@dataclass(frozen=True, eq=False)
class Question:
    """What of each image's scores is explained.

    shape : (K, H, W) of the network's output
    targets : (N,) int64, the output (of maps: the channel) to explain, or None, the one with the highest score
    places : of maps, which positions of the targets; None where there are no targets, or the outputs are no maps
    start : (N, outputs) float32, the relevance that each output starts with, in place of a target's; or None
    against : what the target is held against: a name in inputs.AGAINST, or numbers of outputs; or None
    signed : whether negative scores are explained
    through : layers, and the channels that alone pass relevance on
    """

    shape: Shape
    targets: npt.NDArray[np.int64] | None
    places: Sequence[Place] | None
    start: Array | None
    against: str | tuple[int, ...] | None
    signed: bool
    through: Through = ()

    @property
    def is_of_maps(self) -> bool:
        return self.shape[1:] != (1, 1)

    @property
    def mixes_signs(self) -> bool:
        """Whether outputs have negative relevance though the rules decompose positive scores alone."""
        return self.against is not None and not self.signed

    @property
    def is_special(self) -> bool:
        """Whether there is more to check than the score's sum."""
        return self.against is not None or bool(self.through)

    def part(self, which: slice | npt.NDArray[np.int64]) -> Question:
        """Of some images."""
        places = None if self.places is None else [self.places[i] for i in np.arange(len(self.places))[which]]
        return replace(self, targets=None if self.targets is None else self.targets[which], places=places,
                       start=None if self.start is None else self.start[which])

    def of(self, scores: Array) -> Beginning:
        """Of images with these scores, (N, outputs)."""
        if self.is_of_maps:
            return self._of_maps(scores.reshape(-1, *self.shape))
        if self.start is not None:
            return Beginning(np.abs(self.start).argmax(1), self.start, None)
        targets = scores.argmax(1) if self.targets is None else self.targets
        return Beginning(targets, None if self.against is None else self._contrast(scores, targets), None)

    def _of_maps(self, scores: Array) -> Beginning:
        """Each position is a classifier of its own, whose outputs are the channels there."""
        if self.start is not None:
            sizes = np.abs(self.start.reshape(scores.shape))
            return Beginning(sizes.max((2, 3)).argmax(1), self.start, sizes.max(1) > 0)
        targets, region = self._regions(scores)
        count, start = len(scores), np.zeros(scores.shape, np.float32)
        for own, target, all_scores, begin in zip(region, targets, scores, start, strict=True):
            if self.against is None:
                begin[target, own] = all_scores[target, own] if self.signed else np.maximum(all_scores[target, own], 0)
                continue
            there = all_scores[:, own].T
            begin[:, own] = self._contrast(there, np.full(len(there), target)).T
        return Beginning(targets, start.reshape(count, -1), region)

    def _regions(self, scores: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Targets, and which positions of them, of images with these scores, (N, K, H, W)."""
        highest: Sequence[Place] = [HIGHEST] * len(scores)
        places = highest if self.places is None else self.places
        targets = scores.max((2, 3)).argmax(1) if self.targets is None else self.targets
        region = np.zeros((len(scores), *scores.shape[2:]), np.bool_)
        for own, target, place, all_scores in zip(region, targets, places, scores, strict=True):
            if place is None:
                own[:] = True
            elif isinstance(place, np.ndarray):
                own[:] = place
            elif isinstance(place, str):
                own.flat[all_scores[target].argmax()] = True
            else:
                own[place] = True
        return targets, region

    def followed(self, scores: Array) -> list[Score]:
        """What is explained of images with these scores, (N, outputs), as a number that other images have, too: the
        winners are these images'. `against` is None, "runner-up" or numbers of outputs."""
        maps = scores.reshape(-1, *self.shape)
        found = []
        for own, target, region in zip(maps, *self._regions(maps), strict=True):
            there = own[:, region].T
            of_each = np.full(len(there), target)
            held = np.empty((len(there), 0), np.int64) if self.against is None else self._held_against(there, of_each)
            found.append(Score(int(target), region, held.T))
        return found

    def _held_against(self, scores: Array, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(N, n): the runner-up, or the outputs that were named; scores: (N, classes)."""
        if self.against == "runner-up":
            others = scores.astype(np.float64)
            others[np.arange(len(scores)), targets] = -np.inf
            return np.asarray(others.argmax(1)[:, None])
        return np.tile(np.array(self.against, np.int64), (len(scores), 1))

    def _contrast(self, scores: Array, targets: npt.NDArray[np.int64]) -> Array:
        """What the target starts with, less what each output that it is held against does; scores: (N, classes)."""
        rows, exact = np.arange(len(scores)), scores.astype(np.float64)
        own = exact if self.signed else np.maximum(exact, 0)
        of_targets, held = own[rows, targets], np.zeros_like(exact)
        usable = scores != 0  # what has the score 0 cannot be redistributed
        usable[rows, targets] = False
        if self.against == "others":  # Gu et al. 2018, CLRP1
            held += of_targets[:, None] * usable / np.maximum(usable.sum(1, keepdims=True), 1)
        elif self.against == "softmax-gradient":  # Iwana et al. 2019
            likely = np.exp(exact - exact.max(1, keepdims=True))
            likely /= likely.sum(1, keepdims=True)
            held += likely[rows, targets, None] * likely * usable
            of_targets = held.sum(1) * (scores[rows, targets] != 0)  # y (1 - y), also where y is nearly 1
        else:
            against = self._held_against(scores, targets)
            np.add.at(held, (rows[:, None], against), own[rows[:, None], against] / against.shape[1])
        start = -held
        start[rows, targets] += of_targets
        return start.astype(np.float32)
