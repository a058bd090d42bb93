"""May activation maps be believed: do they depend on what was learned, and do they show what matters?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import trapezoid
from scipy.stats import spearmanr
from torch import Tensor, nn

from monai_mamba.evaluation.bootstrap import Interval, bootstrap
from monai_mamba.explain.cams import ActivationMaps, enlarge, normalized

#: Parts of the parameters that are shuffled, from the output backwards.
SHUFFLED_SHARES = (0.1, 0.5, 1.0)
#: Maps of a network without knowledge may be this similar to those of the trained one, as a rank correlation.
MAX_SIMILARITY = 0.5
DELETED_SHARES = tuple(float(s) for s in np.linspace(0, 1, 21))
NUM_RANDOM_MAPS = 5
Score = Callable[[Sequence[Tensor]], np.ndarray]


@dataclass(frozen=True)
class Subject:
    """What one map explains: an output of the network for one input.

    Attributes:
        image: input ``(C, *spatial)``.
        index: number of the class, structure or landmark.
        patient: of the image.
        score: inputs to the score of that output, ``(inputs,)``: 1 or less at the image itself.
        region: mask ``(*spatial)`` of the outputs that are meant; None for a classifier, or all of them.
    """

    image: Tensor
    index: int
    patient: str
    score: Score
    region: Tensor | None = None


@dataclass(frozen=True)
class SanityChecks:
    """What the checks found.

    Attributes:
        similarity: shuffled share of the parameters to the mean rank correlation of the maps.
        deletion: area under the deletion curve: with random maps - with the maps; above 0 the maps are better.
        curves: name to mean score over ``DELETED_SHARES``, for ``"map"`` and ``"random"``.
        num_maps: maps that were looked at.
    """

    similarity: dict[float, Interval]
    deletion: Interval
    curves: dict[str, list[float]]
    num_maps: int

    @property
    def depends_on_weights(self) -> bool:
        """True if maps of the fully shuffled network differ from those of the trained one."""
        return bool(abs(self.similarity[1.0].value) < MAX_SIMILARITY)

    @property
    def shows_what_matters(self) -> bool:
        """True if deleting by the maps hurts more than deleting at random, beyond chance."""
        return bool(self.deletion.low > 0)

    def as_list(self) -> list[dict[str, object]]:
        """The checks as the report shows them."""
        shuffled, area = self.similarity[1.0], self.deletion
        maps = f"{self.num_maps} map{'s' if self.num_maps > 1 else ''}"
        return [
            {
                "name": "Maps depend on the weights",
                "figure": f"rank correlation with the maps of a shuffled network {shuffled.value:.2f} "
                f"({shuffled.low:.2f} to {shuffled.high:.2f}), must be within -{MAX_SIMILARITY} and {MAX_SIMILARITY}; "
                f"{maps}",
                "passed": self.depends_on_weights,
            },
            {
                "name": "Maps show what matters",
                "figure": f"deletion by the map lowers the area under the curve by {area.value:.3f} "
                f"({area.low:.3f} to {area.high:.3f}) more than by random maps, must be above 0; "
                f"{maps}",
                "passed": self.shows_what_matters,
            },
        ]


def shuffle_weights(network: nn.Module, share: float, seed: int) -> nn.Module:
    """Return a copy whose last parameters are shuffled, each within itself.

    Shuffling forgets what was learned and keeps the scale of every layer, so that the network does not saturate.

    Args:
        network: the network.
        share: of the parameter tensors, counted from the output.
        seed: of the shuffle.

    References:
        Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, section 3 (cascading randomization).
    """
    shuffled = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(shuffled.parameters())[::-1]
    with torch.no_grad():
        for parameter in parameters[: max(1, round(share * len(parameters)))]:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def delete(image: Tensor, maps: Tensor, share: float) -> Tensor:
    """Return the image with the pixels of the highest values replaced by the mean of their channel.

    Args:
        image: ``(views * C, *spatial)``.
        maps: ``(views, *spatial)``; the order is over all views together.
        share: of the pixels.
    """
    views = image.unflatten(0, (len(maps), -1))  # (views, C, *spatial)
    number = round(share * maps.numel())
    chosen = torch.zeros(maps.numel(), dtype=torch.bool)
    chosen[torch.argsort(maps.flatten(), descending=True, stable=True)[:number]] = True
    mean = views.flatten(2).mean(2).reshape(*views.shape[:2], *[1] * (views.ndim - 2))
    return torch.where(chosen.view_as(maps)[:, None], mean, views).flatten(0, 1)


def deletion_curve(score: Score, image: Tensor, maps: Tensor, batch_size: int = 16) -> np.ndarray:
    """Return the score while more and more of the image is deleted, over ``DELETED_SHARES``.

    References:
        Petsiuk et al., RISE, BMVC 2018, section 4.2.
    """
    images = [delete(image, maps, share) for share in DELETED_SHARES]
    return np.concatenate([score(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


def check_maps(
    network: nn.Module,
    subjects: Sequence[Subject],
    explainer: ActivationMaps,
    *,
    seed: int = 0,
    num_draws: int = 1000,
    batch_size: int = 16,
    on_map: Callable[[], None] = lambda: None,
) -> SanityChecks:
    """Check some maps.

    Args:
        network: the network.
        subjects: what is explained.
        explainer: gives the maps.
        seed: of shuffles, random maps and draws.
        num_draws: of the bootstrap over patients.
        batch_size: images per pass.
        on_map: called after every map.
    """
    first = subjects[0].image
    others = {
        share: ActivationMaps(shuffle_weights(network, share, seed), first, explainer.method, explainer.layer)
        for share in SHUFFLED_SHARES
    }
    generator = torch.Generator().manual_seed(seed)
    similarity: dict[float, list[float]] = {share: [] for share in others}
    curves: dict[str, list[np.ndarray]] = {"map": [], "random": []}
    for subject in subjects:
        image, what = subject.image, (subject.image, subject.index, subject.region)
        maps = explainer(*what)
        for share, other in others.items():
            similarity[share].append(_rank_correlation(maps, other(*what)))
        curves["map"].append(deletion_curve(subject.score, image, maps, batch_size))
        drawn = []
        for _ in range(NUM_RANDOM_MAPS):
            # As coarse as the maps: single pixels at random would be another kind of damage.
            noise = torch.rand(len(maps), 1, *explainer.map_size, generator=generator)
            random_maps = normalized(enlarge(noise, image.shape[1:]))
            drawn.append(deletion_curve(subject.score, image, random_maps, batch_size))
        curves["random"].append(np.mean(drawn, axis=0))
        on_map()
    areas = {name: trapezoid(np.array(rows), DELETED_SHARES, axis=1) for name, rows in curves.items()}
    gain = areas["random"] - areas["map"]
    correlations: Mapping[float, np.ndarray] = {share: np.array(values) for share, values in similarity.items()}

    def figures(rows: np.ndarray) -> dict[str, float]:
        return {"deletion": gain[rows].mean(), **{str(s): v[rows].mean() for s, v in correlations.items()}}

    intervals = bootstrap(figures, [subject.patient for subject in subjects], num_draws, seed=seed)
    return SanityChecks(
        {share: intervals[str(share)] for share in correlations},
        intervals["deletion"],
        {name: np.mean(rows, axis=0).tolist() for name, rows in curves.items()},
        len(subjects),
    )


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    a, b = first.flatten().numpy(), second.flatten().numpy()
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 1.0 if np.ptp(a) == np.ptp(b) else 0.0  # an empty map is like another empty one only
    return float(spearmanr(a, b).statistic)
