"""Eigenvalues of the value-output products: smoothing as seen in the weights alone."""

import torch
from torch import Tensor

from ..values import Values
from .base import Group


def value_output_eigenvalues(value: Tensor, output: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``H_h = W_V^h W_O^h`` of every head and of their sum.

    The output of a head for one token is ``sum_j a_j x_j H_h``, over tokens x_j (rows) with attention a_j. ``H_h`` is
    C x C with rank at most D; ``W_O^h W_V^h``, D x D, has the same eigenvalues except for C - D zeros. With a residual
    branch and the same map A in all layers, each layer multiplies the component along an eigenvector of A (eigenvalue
    a) and one of H (eigenvalue h) by ``1 + a h``. A softmax map has a = 1 for DC and smaller |a| for all else, so
    positive h amplify DC most, and negative h can damp it.

    Args:
        value: ``W_V`` as ``nn.Linear`` holds it, (H * D, C), head by head.
        output: ``W_O`` likewise, (C, H * D).
        num_heads: H.

    Returns:
        Complex128 of shape (H, D) and, for the sum of the ``H_h``, (min(C, H * D),); by falling modulus, dimensionless.
        The gains of norms and LayerScale are not part of these products.

    Source: Dovonon, Bronstein and Kusner, "Setting the record straight on transformer oversmoothing", arXiv
    2401.04301.
    """
    value, output = value.cpu().double(), output.cpu().double()  # eigvals is not faster on a GPU
    per_head = value.unflatten(0, (num_heads, -1)) @ output.unflatten(1, (num_heads, -1)).permute(1, 0, 2)
    whole = value @ output if len(value) <= len(output) else output @ value
    return _by_modulus(torch.linalg.eigvals(per_head)), _by_modulus(torch.linalg.eigvals(whole))


def _by_modulus(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.gather(-1, eigenvalues.abs().argsort(dim=-1, descending=True))


def negative_share(eigenvalues: Tensor) -> Tensor:
    """Share of the eigenvalues (complex, last axis) with a negative real part, 0 to 1."""
    return (eigenvalues.real < 0).double().mean(dim=-1)


class Eigenvalues(Group):
    """Computed from weights alone: no images are needed, and the values have no spread over images."""

    name = "eigenvalues"
    about = "eigenvalues of the value-output product of each head; of weights only"
    quantities = {
        "vo_real": "real parts of the eigenvalues of W_V W_O of each head, by falling modulus (dimensionless)",
        "vo_imag": "their imaginary parts (dimensionless)",
        "vo_radius": "largest modulus of an eigenvalue of the head's W_V W_O (dimensionless)",
        "vo_negative": "share of the head's eigenvalues with a negative real part (0 to 1)",
        "vo_sum_real": "real parts of the eigenvalues of the sum of W_V W_O over the heads (dimensionless)",
        "vo_sum_imag": "their imaginary parts (dimensionless)",
        "vo_sum_radius": "largest modulus of an eigenvalue of that sum (dimensionless)",
        "vo_sum_negative": "share of the eigenvalues of that sum with a negative real part (0 to 1)",
    }
    profiles = frozenset({"vo_real", "vo_imag", "vo_sum_real", "vo_sum_imag"})
    needs_images = False

    def finish(self) -> list[dict[str, Values]]:
        """The eigenvalues of each layer; none where its kind does not know the two weights."""
        layers: list[dict[str, Values]] = []
        for layer in self.subject.layers:
            weights = layer.kind.value_weights(layer.attn)
            if weights is None:
                self.left_out[layer.name] = "no two weights make its values and take them to the output, alone"
                layers.append({})
                continue
            heads, whole = value_output_eigenvalues(*weights, layer.kind.num_heads(layer.attn))
            measured = {"vo_radius": heads.abs().amax(dim=-1), "vo_negative": negative_share(heads)}
            measured |= {"vo_sum_radius": whole.abs().amax(dim=-1), "vo_sum_negative": negative_share(whole)}
            measured |= {"vo_real": heads.real, "vo_imag": heads.imag}
            measured |= {"vo_sum_real": whole.real, "vo_sum_imag": whole.imag}
            layers.append({name: Values(measured[name], is_profile=name in self.profiles) for name in self.quantities})
        return layers
