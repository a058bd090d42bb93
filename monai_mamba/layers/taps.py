"""Named points of a network at which its feature maps can be read."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Taps(nn.ModuleDict):
    """Identity modules that lie on the path of the computation, one per named feature map.

    Maps are channels-last inside the networks; what passes a tap is channels-first, as Grad-CAM and other tools with
    forward hooks expect. A tap has no parameters and no entry in the state dict.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__({name: nn.Identity() for name in names})


def extract_features(network: nn.Module, *inputs: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Run a network once and return some of its feature maps by name.

    Args:
        network: one of this package's networks; its ``feature_layers`` maps names to module paths.
        inputs: what the network is called with.
        names: names out of ``network.feature_layers`` or paths of submodules; None for all of ``feature_layers``.

    Returns:
        For each name the output of that point, channels first, still attached to the graph.

    Raises:
        ValueError: if a name is unknown, or its layer is not reached by the forward pass.

    Example:
        >>> features = extract_features(network, image, names=["stage4", "embedding"])
    """
    known: dict[str, str] = getattr(network, "feature_layers", {})
    modules = dict(network.named_modules())
    wanted = list(known) if names is None else list(names)
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for name in wanted:
            path = known.get(name, name)
            if path not in modules:
                raise ValueError(f"`names` must be out of {', '.join(known)} or module paths, got {name!r}")

            def keep(_module, _inputs, output, name=name):
                found[name] = output

            handles.append(modules[path].register_forward_hook(keep))
        network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"`names`: the forward pass does not reach {', '.join(missing)}")
    return found
