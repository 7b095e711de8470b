"""The paper's quantities of attention maps: spectral response, entropy, similarity."""

from torch import Tensor

from .. import probe, spectrum
from ..subject import Subject
from .base import Group


class Maps(Group):
    """The quantities that :func:`probe.map_statistics` computes from the attention maps of each block."""

    name = "maps"
    about = "the attention maps: spectral response, DC gain, entropy, similarity of heads and layers"
    quantities = {
        "spectrum": "spectral response of the attention map over the token axis, all N bins, DC included (gain)",
        "high_frequency_response": "mean of the spectral response over all frequencies but zero (gain)",
        "dc_gain": "DC to DC entry of the attention map (gain); 1 where rows sum to one",
        "attention_entropy": "mean entropy of the softmax rows (nats)",
        "head_similarity": "cosine similarity of the maps of different heads of a layer",
        "layer_similarity": "cosine similarity of the head-averaged map and that of the layer before",
    }

    def __init__(self, subject: Subject, patches_only: bool = False) -> None:
        super().__init__(subject, patches_only)
        self._previous: Tensor | None = None

    def measure(self, view: probe.LayerView) -> dict[str, Tensor]:
        """As :func:`probe.map_statistics`; the previous layer's maps are kept as their average over heads."""
        maps = view.attention_maps()
        statistics = probe.map_statistics(maps, self._previous if view.index > 0 else None)
        self._previous = maps.applied.mean(dim=1)
        self.frequencies[view.index, "spectrum"] = spectrum.frequencies(maps.applied.shape[-1]).tolist()
        return statistics
