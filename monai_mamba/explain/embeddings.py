"""The features before the last layer in the plane: PCA and t-SNE."""

from __future__ import annotations

import numpy as np

#: t-SNE of fewer cases is an arrangement by chance.
MIN_CASES_TSNE = 10
#: A plane through fewer points says nothing.
MIN_CASES = 3
_PERPLEXITY = 30.0


def project(features: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the features ``(cases, C)`` in the plane, ``(cases, 2)``, by method: ``"PCA"`` and ``"t-SNE"``.

    The features are centered, not scaled. t-SNE starts from the PCA; it is left out below ``MIN_CASES_TSNE`` cases.

    Args:
        features: pooled features before the head.
        seed: of t-SNE.

    Raises:
        ValueError: if there are fewer than ``MIN_CASES``.

    References:
        MedMamba, arXiv:2403.03849, section 5 (t-SNE; layer and parameters are not given there).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(features) < MIN_CASES:
        raise ValueError(f"`features` of {MIN_CASES} cases at least are needed for a plane, got {len(features)}")
    result = {"PCA": PCA(2, random_state=seed).fit_transform(features)}
    if len(features) >= MIN_CASES_TSNE:
        perplexity = min(_PERPLEXITY, (len(features) - 1) / 3)
        result["t-SNE"] = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return result
