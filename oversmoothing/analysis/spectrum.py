"""The paper's analysis (arXiv 2203.05962) as pure functions on tensors: what attention does to a token sequence.

Conventions. Tokens are (B, N, C), maps (B, num_heads, N, N) with queries in rows. ``DC[x]`` is the mean over all N
tokens of the sequence and ``HC[x] = x - DC[x]``: class, distillation and register tokens count as tokens, as in the
paper's code. They are not on the image grid, so "frequency" along the token axis is a property of the sequence, not of
the picture, and one outlying register can dominate HC. To leave the P prefix tokens out, pass ``tokens[:, P:]``. Every
function returns one value per image (or map); the caller averages over images. Inputs in half precision are converted
to float32.

Over-smoothing is asymptotic: A^t tends to its DC part as t grows. Residual branches, MLPs and a new map in every layer
act against it, so these quantities need not change monotonically from layer to layer. ``probe.py`` takes maps and
tokens from models.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def as_tokens(tokens: Tensor) -> Tensor:
    """Features in float32 or float64; ValueError if they are not (B, N, C)."""
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape (B, N, C), got {tuple(tokens.shape)}; flatten a feature map first")
    return _float(tokens)


def as_maps(attn: Tensor) -> Tensor:
    """Maps in float32 or float64; ValueError if they are not (..., N, N)."""
    if attn.dim() < 2 or attn.shape[-1] != attn.shape[-2]:
        raise ValueError(f"attention maps must have shape (..., N, N), got {tuple(attn.shape)}")
    return _float(attn)


def frequencies(num_tokens: int, published: bool = False) -> Tensor:
    """The bins of :func:`attention_spectrum`, as angular frequencies along the token axis.

    Args:
        num_tokens: N.
        published: The bins of the published snippet, see :func:`attention_spectrum`.

    Returns:
        Shape (N,), or (N - 1,) for ``published`` and an odd N; in units of pi rad per token, ascending within [-1, 1].
    """
    bins = 2 * torch.fft.fftshift(torch.fft.fftfreq(num_tokens))
    return bins[: 2 * (num_tokens // 2)] if published else bins


def attention_spectrum(attn: Tensor, published: bool = False) -> Tensor:
    """Spectral response of attention maps, ``s_k = ||(F A F^T)_{k,:}||_2`` with the unitary DFT ``F``.

    The row norm says how strong frequency k is in the map's output, from inputs of all frequencies. As ``F`` is
    unitary, the transform along the keys does not change row norms and is not computed. A real map has
    ``s_k = s_{-k}``. ``s_0 >= 1`` for row-stochastic maps. The uniform map has ``s_0 = 1`` and 0 elsewhere, every
    permutation has 1 everywhere, a circulant map has the modulus of its transfer function. AttnScale multiplies every
    ``s_k`` except ``s_0`` by exactly ``|1 + lamb|``.

    Args:
        attn: Maps of shape (..., N, N), class and register tokens included; signed maps are allowed.
        published: False gives all N bins. The authors' published snippet plots N - 1 of them if N is odd (196 of DeiT's
            197); True gives the same bins, ``-(N // 2) ... N // 2 - 1``. The missing bin mirrors the first one.

    Returns:
        Shape (..., N) or (..., N - 1), dimensionless gains, zero frequency centred: bin 0 is at index ``N // 2``.

    Raises:
        ValueError: If the maps are not square.

    Source: arXiv 2203.05962, figure of the spectral response of attention maps.
    """
    attn = as_maps(attn)
    n = attn.shape[-1]
    half = torch.linalg.vector_norm(torch.fft.rfft(attn, dim=-2, norm="ortho"), dim=-1)  # bins 0 ... N // 2
    mirror = half[..., 1 : (n + 1) // 2].flip(-1)
    spectrum = torch.fft.fftshift(torch.cat([half, mirror], dim=-1), dim=-1)
    return spectrum[..., : 2 * (n // 2)] if published else spectrum


def high_frequency_response(attn: Tensor) -> Tensor:
    """Mean of the spectral response over all frequencies except zero: one number for the high-pass part of a map.

    Args:
        attn: Maps of shape (..., N, N), N >= 2.

    Returns:
        Shape (...), dimensionless gain: 0 for the uniform map, 1 for a permutation; AttnScale multiplies it by
        ``|1 + lamb|``.

    Raises:
        ValueError: If the maps are not square or N < 2.
    """
    if attn.shape[-1] < 2:
        raise ValueError("the high-frequency response needs maps of at least 2 x 2")
    response = attention_spectrum(attn)
    n = response.shape[-1]
    return (response.sum(dim=-1) - response[..., n // 2]) / (n - 1)


def dc_gain(attn: Tensor) -> Tensor:
    """The DC to DC entry ``(F A F^T)_{00}``, which is the mean row sum.

    It is 1 for every row-stochastic map, with or without AttnScale. CaiT mixes heads after the softmax, so neither the
    row sums nor this gain need be 1.

    Args:
        attn: Maps of shape (..., N, N).

    Returns:
        Shape (...), dimensionless.

    Raises:
        ValueError: If the maps are not square.
    """
    return as_maps(attn).sum(dim=-1).mean(dim=-1)


def attention_entropy(attn: Tensor) -> Tensor:
    """Mean entropy of the rows of softmax maps: 0 if each query picks one key, ``log N`` if attention is uniform.

    Args:
        attn: Non-negative maps of shape (..., N, N): the softmax itself, before AttnScale or CaiT's second head mixing.

    Returns:
        Shape (...), in nats.

    Raises:
        ValueError: If the maps are not square or have negative entries.
    """
    attn = as_maps(attn)
    if (attn < 0).any():
        raise ValueError("entropy needs non-negative maps: pass the softmax, before AttnScale and head mixing")
    return torch.special.entr(attn).sum(dim=-1).mean(dim=-1)


def map_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of two maps, each read as one vector of N x N entries.

    Softmax maps are non-negative and share their DC part, so the similarity is far above 0 for any two of them, and
    near 1 if both are close to uniform.

    Args:
        a: Maps of shape (..., N, N), for example of one layer.
        b: Maps of a shape that broadcasts with ``a``, for example of the next layer.

    Returns:
        The broadcast shape without its last two dimensions, dimensionless, in [-1, 1].

    Raises:
        ValueError: If the maps are not square or differ in N.

    Source: the re-attention study (DeepViT, arXiv 2103.11886) compares maps of different layers this way, column by
    column.
    """
    a, b = as_maps(a), as_maps(b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"maps over {a.shape[-1]} and {b.shape[-1]} tokens cannot be compared")
    return F.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)


def head_similarity(attn: Tensor) -> Tensor:
    """Mean cosine similarity of the maps of different heads, over all pairs of distinct heads.

    Args:
        attn: Maps of shape (B, num_heads, N, N), num_heads >= 2.

    Returns:
        Shape (B,), dimensionless, in [-1, 1]; :func:`map_similarity` says why it is never near 0.

    Raises:
        ValueError: If there is only one head, or the maps are not square.
    """
    attn = as_maps(attn)
    if attn.shape[1] < 2:
        raise ValueError("the similarity between heads needs at least two heads")
    return token_similarity(attn.flatten(-2))  # each head's map is one vector


def band_energies(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of the mean token and of the rest; they add up to the energy of the sequence.

    Args:
        tokens: Features of shape (B, N, C).

    Returns:
        ``||DC[x]||_F^2`` and ``||HC[x]||_F^2``, each of shape (B,), in squared feature units.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional.

    Source: arXiv 2203.05962, definition of DC and HC.
    """
    tokens = as_tokens(tokens)
    dc = tokens.mean(dim=1, keepdim=True)
    return tokens.shape[1] * dc.square().sum(dim=(1, 2)), (tokens - dc).square().sum(dim=(1, 2))


def high_frequency_ratio(tokens: Tensor) -> Tensor:
    """Size of the non-constant part of a token sequence, relative to its mean.

    Args:
        tokens: Features of shape (B, N, C).

    Returns:
        Shape (B,), dimensionless, ``||HC[x]||_F / ||DC[x]||_F`` per image (norms, not energies); 0 when all tokens are
        equal, ``inf`` where the mean token is zero.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional.

    Source: arXiv 2203.05962, definition of DC and HC.
    """
    dc, hc = band_energies(tokens)
    return (hc / dc).sqrt()


def token_similarity(tokens: Tensor) -> Tensor:
    """Cosine similarity between tokens: signed, averaged over all pairs of distinct tokens.

    Args:
        tokens: Features of shape (B, N, C), N >= 2. A zero token has similarity 0 to every other.

    Returns:
        Shape (B,), dimensionless, in [-1 / (N - 1), 1]; 1 when all tokens point the same way, about 0 for independent
        tokens around a zero mean.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional or N < 2.
    """
    unit = F.normalize(as_tokens(tokens), dim=-1)
    n = unit.shape[1]
    if n < 2:
        raise ValueError("the similarity between tokens needs at least two of them")
    # The sum over all pairs is |sum of unit tokens|^2: no N x N matrix.
    pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    return pairs / (n * (n - 1))


def token_similarity_published(tokens: Tensor) -> Tensor:
    """Cosine similarity between tokens in the form of the paper's authors: mean of ``|cos|`` over all N x N pairs.

    It includes each token's similarity with itself and drops the sign, so it is never below 1 / N and stays well above
    0 even for random tokens (about ``sqrt(2 / (pi C))``). Use it for comparison with the paper only, and
    :func:`token_similarity` for everything else.

    Args:
        tokens: Features of shape (B, N, C).

    Returns:
        Shape (B,), dimensionless, in [1 / N, 1] if no token is zero.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional.

    Source: the answer of the authors of arXiv 2203.05962 on how they drew the similarity figure.
    """
    unit = F.normalize(as_tokens(tokens), dim=-1)
    return (unit @ unit.transpose(1, 2)).abs().mean(dim=(1, 2))


def singular_values(tokens: Tensor) -> Tensor:
    """Singular values of the token matrix, relative to the largest: the faster they fall, the fewer directions count.

    The features are not centred: if all tokens are equal, only the first value is not zero.

    Args:
        tokens: Features of shape (B, N, C). Computed in float64 through the smaller Gram matrix, so values below about
            1e-8 are rounding.

    Returns:
        Shape (B, min(N, C)), float64, dimensionless, in [0, 1], descending from 1; ``nan`` for a sequence that is all
        zero or not finite.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional.

    Source: Dong et al., "Attention is not all you need", arXiv 2103.03404, on the collapse of token matrices to rank 1.
    """
    tokens = as_tokens(tokens).double()
    if tokens.shape[2] < tokens.shape[1]:
        tokens = tokens.transpose(1, 2)
    gram = tokens @ tokens.transpose(1, 2)
    # The decomposition raises on non-finite input, which must not stop a training run.
    gram = torch.where(gram.isfinite().all(dim=(1, 2), keepdim=True), gram, 0)
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)
    return singular / singular[:, :1]


def effective_rank(tokens: Tensor) -> Tensor:
    """The exponential of the entropy of the normalised singular values: the number of directions that tokens use.

    The features are not centred, so the rank tends to 1 as all tokens become equal.

    Args:
        tokens: Features of shape (B, N, C). Computed in float64, see :func:`singular_values`.

    Returns:
        Shape (B,), float64, dimensionless, in [1, min(N, C)]; ``nan`` for a sequence that is all zero or not finite.

    Raises:
        ValueError: If ``tokens`` is not three-dimensional.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    return rank_of_singular_values(singular_values(tokens))


def rank_of_singular_values(singular: Tensor) -> Tensor:
    """The effective rank from singular values (..., K) of any scale: shape (...)."""
    share = singular / singular.sum(dim=-1, keepdim=True)
    return torch.special.entr(share).sum(dim=-1).exp()


def patch_frequencies(grid: int) -> Tensor:
    """The bins of :func:`delta_log_amplitude`, as angular frequencies along both directions of the image grid.

    Args:
        grid: G, patches along one side.

    Returns:
        Shape (G // 2 + 1,), in units of pi rad per patch, from 0 to 1 (odd G: to (G - 1) / G).
    """
    return 2 * torch.arange(grid // 2 + 1) / grid


def delta_log_amplitude(patch_tokens: Tensor) -> Tensor:
    """Log amplitude of the 2-D Fourier spectrum of the patch tokens, along the diagonal, relative to zero frequency.

    Unlike everything else here it works on the image grid, so prefix tokens must be left out.

    Args:
        patch_tokens: Features of shape (B, G * G, C) in row-major order, prefix tokens removed.

    Returns:
        Shape (B, G // 2 + 1): ``mean_c log|X_c(k, k)| - mean_c log|X_c(0, 0)|`` for k = 0 ... G // 2, in nats, at
        :func:`patch_frequencies`. The first entry is 0; very negative means smooth.

    Raises:
        ValueError: If the tokens do not form a square grid.

    Source: Park and Kim, "How do vision transformers work?", arXiv 2202.06709, figure of the relative log amplitude.
    """
    tokens = as_tokens(patch_tokens)
    b, n, c = tokens.shape
    grid = round(n**0.5)
    if grid * grid != n:
        raise ValueError(f"{n} patch tokens form no square grid; remove class and register tokens first")
    spectrum = torch.fft.fft2(tokens.view(b, grid, grid, c), dim=(1, 2))
    bins = torch.arange(grid // 2 + 1, device=tokens.device)
    # An amplitude of exactly zero (a constant image) must not turn the mean over channels into -inf.
    log_amplitude = spectrum[:, bins, bins].abs().clamp_min(1e-12).log().mean(dim=-1)
    return log_amplitude - log_amplitude[:, :1]
