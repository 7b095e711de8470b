"""Eigenvalues of the value-output products: what the weights alone say about smoothing."""

import torch
from torch import Tensor

from ..values import Values
from .base import Group


def value_output_eigenvalues(value: Tensor, output: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``H_h = W_V^h W_O^h`` of every head and of their sum.

    A head maps a token x (row) to ``sum_j a_j x_j H_h``. ``H_h`` is C x C of rank D at most; ``W_O^h W_V^h``, D x D,
    has the same eigenvalues but for C - D zeros. With residual branch and one map A for all layers, a component along
    an eigenvector of A (eigenvalue a) and one of H (eigenvalue h) is multiplied by ``1 + a h`` in each layer. A softmax
    map has a = 1 for DC and less for all else, so positive h amplify DC most, and negative ones can damp it.

    Args:
        value: ``W_V`` as ``nn.Linear`` holds it, (H * D, C), head by head.
        output: ``W_O`` likewise, (C, H * D).
        num_heads: H.

    Returns:
        Complex128 of shape (H, D) and, for the sum of the ``H_h``, (min(C, H * D),); by falling modulus, dimensionless.

    Source: Dovonon, Bronstein and Kusner, "Setting the record straight on transformer oversmoothing", arXiv
    2401.04301. Norms' gains and LayerScale are not part of these products.
    """
    value, output = value.cpu().double(), output.cpu().double()  # no GPU has a fast eigvals
    per_head = value.unflatten(0, (num_heads, -1)) @ output.unflatten(1, (num_heads, -1)).permute(1, 0, 2)
    whole = value @ output if len(value) <= len(output) else output @ value
    return _by_modulus(torch.linalg.eigvals(per_head)), _by_modulus(torch.linalg.eigvals(whole))


def _by_modulus(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.gather(-1, eigenvalues.abs().argsort(dim=-1, descending=True))


def negative_share(eigenvalues: Tensor) -> Tensor:
    """Share of the eigenvalues (last axis) with a negative real part: of n complex ones, 0 to 1."""
    return (eigenvalues.real < 0).double().mean(dim=-1)


class Eigenvalues(Group):
    """Of weights alone, so no images are needed and nothing has a spread over them."""

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
        """The eigenvalues of each layer; none where its kind cannot say what the two weights are."""
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
