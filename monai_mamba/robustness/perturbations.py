"""Perturbations of images at five stated severities, in two and three dimensions.

Severities are stated in physical or relative units, so that they mean the same at every image size. Directions and
noise are drawn per case and kept over the severities, so that a curve shows the severity and nothing else. Label
maps and landmarks move with an image that is turned or shifted.

References:
    MedMamba, arXiv:2403.03849, section 5.3 and figure 7 (rotation, translation, color temperature; no parameters are
    given there); Hendrycks and Dietterich, ICLR 2019 (five severities).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import Affine, AffineGrid, GaussianSmooth, Resize
from torch import Tensor

NUM_SEVERITIES = 5
#: Correlated color temperature of the white point D65 in kelvin.
WHITE_KELVIN = 6504.0
#: Bradford's cone responses (Lam 1985), from CIE XYZ.
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

Apply = Callable[[Tensor, float, np.random.Generator], Tensor]
Move = Callable[[Sequence[int], float, np.random.Generator], "Motion"]


@dataclass(frozen=True)
class Motion:
    """A rotation and a shift about the center of an image, as MONAI's `Affine` takes them."""

    rotate: Sequence[float] | float | None = None
    translate: Sequence[float] | None = None

    def apply(self, image: Tensor, mode: str) -> Tensor:
        """Return the moved image ``(C, *spatial)``, interpolated by ``mode``, zero where nothing was."""
        move = Affine(
            rotate_params=self.rotate,
            translate_params=self.translate,
            mode=mode,
            padding_mode="zeros",
            image_only=True,
        )
        return torch.as_tensor(move(image)).as_subclass(Tensor)

    def apply_to_points(self, voxels: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """Return where points ``(points, dims)`` of an image of that size come to lie."""
        _, matrix = AffineGrid(rotate_params=self.rotate, translate_params=self.translate)(tuple(size))
        backwards = np.asarray(matrix, dtype=np.float64)  # from the moved image to the one before, about the center
        center = (np.asarray(size) - 1) / 2
        return (np.asarray(voxels) - center - backwards[:-1, -1]) @ np.linalg.inv(backwards[:-1, :-1]).T + center


@dataclass(frozen=True)
class Perturbation:
    """One kind of perturbation.

    Attributes:
        name: as in tables.
        unit: of the levels.
        levels: what the severities 1 to 5 mean.
        apply: from image ``(C, *spatial)`` in [0, 1], level and generator to the changed image, not yet clipped; None
            if it moves.
        motion: from the size of an image, level and generator to how it moves; None if it does not.
        needs_color: True if gray images stay as they are.
    """

    name: str
    unit: str
    levels: tuple[float, float, float, float, float]
    apply: Apply | None = None
    motion: Move | None = None
    needs_color: bool = False


def perturb(image: Tensor, perturbation: Perturbation, severity: int, seed: int, *, is_picture: bool) -> Tensor:
    """Return a perturbed copy of an image.

    Args:
        image: ``(C, *spatial)``; a picture in [0, 1], or a volume with any intensities.
        perturbation: what to do.
        severity: 1 to ``NUM_SEVERITIES``.
        seed: of directions and noise; the same for all severities of a case.
        is_picture: the range is [0, 1] and nothing leaves it; else it is that of each channel, from the 0.5th to the
            99.5th percentile.

    Raises:
        ValueError: if the severity is none.
    """
    level, generator = _drawn(perturbation, severity, seed)
    values = torch.as_tensor(image).as_subclass(Tensor).float()
    low, high = (torch.tensor(0.0), torch.tensor(1.0)) if is_picture else _range(values)
    scaled = (values - low) / (high - low)
    if perturbation.motion is not None:
        changed = perturbation.motion(values.shape[1:], level, generator).apply(scaled, "bilinear")
    else:
        assert perturbation.apply is not None
        changed = perturbation.apply(scaled, level, generator)
    if is_picture:
        changed = changed.clamp(0, 1)
    return (changed * (high - low) + low).to(values.dtype)


def move_label_map(label: Tensor, perturbation: Perturbation, severity: int, seed: int) -> Tensor:
    """Return a label map ``(1, *spatial)`` as it belongs to the image that :func:`perturb` makes with the same seed.

    Perturbations that do not move leave it as it is. Voxels that come from outside are 0.
    """
    if perturbation.motion is None:
        return label
    level, generator = _drawn(perturbation, severity, seed)
    motion = perturbation.motion(label.shape[1:], level, generator)
    return motion.apply(label.as_subclass(Tensor).float(), "nearest").to(label.dtype)


def move_points(
    voxels: np.ndarray, size: Sequence[int], perturbation: Perturbation, severity: int, seed: int
) -> np.ndarray:
    """Return where points ``(points, dims)`` lie in the image that :func:`perturb` makes with the same seed.

    Points that leave an image of that size are NaN.
    """
    if perturbation.motion is None:
        return voxels
    level, generator = _drawn(perturbation, severity, seed)
    moved = perturbation.motion(size, level, generator).apply_to_points(voxels, size)
    is_inside = np.all((moved >= 0) & (moved <= np.asarray(size) - 1), axis=1)
    return np.where(is_inside[:, None], moved, np.nan)


def _drawn(perturbation: Perturbation, severity: int, seed: int) -> tuple[float, np.random.Generator]:
    """What the severity means, and the generator of directions and noise."""
    if not 1 <= severity <= NUM_SEVERITIES:
        raise ValueError(f"`severity` must be from 1 to {NUM_SEVERITIES}, got {severity}")
    return perturbation.levels[severity - 1], np.random.default_rng([seed, *perturbation.name.encode()])


def is_colored(image: Tensor) -> bool:
    """True for an image with three channels that differ."""
    return len(image) == 3 and not bool((image[:1] == image).all())


def _range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each channel, ``(C, 1, ...)``: channels may be sequences with scales of their own."""
    low, high = np.percentile(values.flatten(1).numpy(), (0.5, 99.5), axis=1)
    shape = (-1, *[1] * (values.ndim - 1))
    low, high = (torch.from_numpy(np.asarray(v, dtype=np.float32)).view(shape) for v in (low, high))
    return low, torch.where(high > low, high, low + 1)


def _direction(generator: np.random.Generator) -> float:
    return 1.0 if generator.random() < 0.5 else -1.0


def _rotation(size: Sequence[int], degrees: float, generator: np.random.Generator) -> Motion:
    angle = math.radians(degrees) * _direction(generator)
    return Motion(rotate=angle if len(size) == 2 else [0.0, 0.0, angle])  # volumes about the slice axis


def _translation(size: Sequence[int], percent: float, generator: np.random.Generator) -> Motion:
    angle = generator.uniform(0, 2 * math.pi)
    shift = [percent / 100 * size[0] * math.sin(angle), percent / 100 * size[1] * math.cos(angle), 0.0]
    return Motion(translate=shift[: len(size)])


def _color_temperature(image: Tensor, mired: float, generator: np.random.Generator) -> Tensor:
    from skimage.color import rgb2xyz, xyz2rgb

    if not is_colored(image):
        return image
    kelvin = 1e6 / (1e6 / WHITE_KELVIN + mired * _direction(generator))
    cones = _BRADFORD @ _black_body_xyz(kelvin) / (_BRADFORD @ _black_body_xyz(WHITE_KELVIN))
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD
    xyz = rgb2xyz(np.moveaxis(image.double().numpy().clip(0, 1), 0, -1)) @ adapt.T
    return torch.from_numpy(np.moveaxis(xyz2rgb(xyz), -1, 0).astype(np.float32).copy())


def _black_body_xyz(kelvin: float) -> np.ndarray:
    """CIE XYZ (Y = 1) of a black body from 1667 to 25000 K (Kim et al., US patent 7024034, cubic splines)."""
    t = 1e3 / kelvin
    if kelvin <= 4000:
        x = -0.2661239 * t**3 - 0.2343589 * t**2 + 0.8776956 * t + 0.179910
    else:
        x = -3.0258469 * t**3 + 2.1070379 * t**2 + 0.2226347 * t + 0.240390
    if kelvin <= 2222:
        y = -1.1063814 * x**3 - 1.34811020 * x**2 + 2.18555832 * x - 0.20219683
    elif kelvin <= 4000:
        y = -0.9549476 * x**3 - 1.37418593 * x**2 + 2.09137015 * x - 0.16748867
    else:
        y = 3.0817580 * x**3 - 5.87338670 * x**2 + 3.75112997 * x - 0.37001483
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _brightness(image: Tensor, percent: float, generator: np.random.Generator) -> Tensor:
    return image + percent / 100 * _direction(generator)


def _contrast(image: Tensor, percent: float, generator: np.random.Generator) -> Tensor:
    factor = (1 - percent / 100) ** _direction(generator)
    return (image - image.mean()) * factor + image.mean()


def _noise(image: Tensor, percent: float, generator: np.random.Generator) -> Tensor:
    # A gray picture that was repeated for three channels gets the same noise in all of them.
    channels = len(image) if is_colored(image) or len(image) != 3 else 1
    noise = generator.standard_normal((channels, *image.shape[1:]), dtype=np.float32)
    return image + percent / 100 * torch.from_numpy(noise)


def _blur(image: Tensor, percent: float, generator: np.random.Generator) -> Tensor:
    sigma = percent / 100 * min(image.shape[1:3])
    return torch.as_tensor(GaussianSmooth(sigma)(image)).as_subclass(Tensor)


def _resolution(image: Tensor, factor: float, generator: np.random.Generator) -> Tensor:
    size = tuple(image.shape[1:])
    mode = "bilinear" if len(size) == 2 else "trilinear"
    coarse = Resize([max(1, round(s / factor)) for s in size], mode=mode, anti_aliasing=True)(image)
    return torch.as_tensor(Resize(size, mode=mode)(coarse)).as_subclass(Tensor)


PERTURBATIONS: dict[str, Perturbation] = {
    entry.name: entry
    for entry in (
        Perturbation("rotation", "degrees", (5, 10, 15, 20, 30), motion=_rotation),
        Perturbation("translation", "% of the side", (2.5, 5, 10, 15, 20), motion=_translation),
        Perturbation("color_temperature", "mired", (20, 40, 60, 80, 100), _color_temperature, needs_color=True),
        Perturbation("brightness", "% of the range", (5, 10, 15, 20, 30), _brightness),
        Perturbation("contrast", "%", (10, 20, 35, 50, 65), _contrast),
        Perturbation("noise", "% of the range", (2, 4, 7, 10, 15), _noise),
        Perturbation("blur", "sigma in % of the side", (0.5, 1, 1.5, 2, 3), _blur),
        Perturbation("resolution", "times coarser", (1.25, 1.5, 2, 3, 4), _resolution),
    )
}
