"""The analysis against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from oversmoothing.analysis import spectrum
from oversmoothing.remedies.attnscale import attn_scale

SIZES = (9, 10, 197)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)).softmax(dim=-1)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dft_matrix(n: int) -> Tensor:
    return torch.fft.fft(torch.eye(n, dtype=torch.complex128), norm="ortho")


@pytest.mark.parametrize("n", SIZES)
def test_spectrum_is_the_row_norm_of_the_map_between_unitary_dfts(n: int) -> None:
    attn = random_maps(2, n)
    dft = dft_matrix(n)
    dense = torch.linalg.vector_norm(dft @ attn.to(dft.dtype) @ dft.T, dim=-1)
    torch.testing.assert_close(spectrum.attention_spectrum(attn), torch.fft.fftshift(dense, dim=-1))


@pytest.mark.parametrize("n", SIZES)
def test_spectrum_of_uniform_identity_and_permutation(n: int) -> None:
    uniform = spectrum.attention_spectrum(torch.full((n, n), 1 / n, dtype=torch.float64))
    peak = torch.zeros(n, dtype=torch.float64)
    peak[n // 2] = 1
    torch.testing.assert_close(uniform, peak)
    identity = torch.eye(n, dtype=torch.float64)
    flat = torch.ones(n, dtype=torch.float64)
    torch.testing.assert_close(spectrum.attention_spectrum(identity), flat)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(spectrum.attention_spectrum(identity[order]), flat)


@pytest.mark.parametrize("n", SIZES)
def test_spectrum_of_a_circulant_map_is_its_transfer_function(n: int) -> None:
    kernel = random_maps(n)[0]
    circulant = torch.stack([kernel.roll(shift) for shift in range(n)], dim=1)
    transfer = torch.fft.fftshift(torch.fft.fft(kernel).abs())
    torch.testing.assert_close(spectrum.attention_spectrum(circulant), transfer)


@pytest.mark.parametrize("n", SIZES)
def test_published_bins_leave_out_one_mirrored_bin_of_an_odd_count(n: int) -> None:
    attn = random_maps(2, n)
    full, published = spectrum.attention_spectrum(attn), spectrum.attention_spectrum(attn, published=True)
    assert published.shape[-1] == len(spectrum.frequencies(n, published=True)) == (n - 1 if n % 2 else n)
    torch.testing.assert_close(published, full[..., : published.shape[-1]])
    if n % 2:
        torch.testing.assert_close(full[..., -1], published[..., 0])


@pytest.mark.parametrize("n", SIZES)
def test_frequencies_are_centred_and_in_units_of_pi(n: int) -> None:
    bins = spectrum.frequencies(n)
    assert bins[n // 2] == 0 and bins.min() >= -1 and bins.max() <= 1
    torch.testing.assert_close(bins.diff(), torch.full((n - 1,), 2 / n))


def test_a_row_stochastic_map_passes_dc_with_gain_one() -> None:
    attn = random_maps(2, 3, 11)
    torch.testing.assert_close(spectrum.dc_gain(attn), torch.ones(2, 3, dtype=torch.float64))
    assert (spectrum.attention_spectrum(attn)[..., 11 // 2] >= 1).all()
    dft = dft_matrix(11)
    entry = (dft @ attn.to(dft.dtype) @ dft.T)[..., 0, 0]
    torch.testing.assert_close(spectrum.dc_gain(attn), entry.real)


@pytest.mark.parametrize("n", SIZES)
def test_attnscale_multiplies_every_frequency_but_zero(n: int) -> None:
    attn = random_maps(2, 3, n)
    lamb = torch.tensor([-0.5, 0.25, 3.0], dtype=torch.float64)
    scaled = attn_scale(attn, lamb)
    before, after = spectrum.attention_spectrum(attn), spectrum.attention_spectrum(scaled)
    nonzero = torch.arange(n) != n // 2
    torch.testing.assert_close(after[..., nonzero], ((1 + lamb)[:, None] * before)[..., nonzero])
    torch.testing.assert_close(spectrum.dc_gain(scaled), torch.ones(2, 3, dtype=torch.float64))
    high_before, high_after = spectrum.high_frequency_response(attn), spectrum.high_frequency_response(scaled)
    torch.testing.assert_close(high_before, before[..., nonzero].mean(dim=-1))
    torch.testing.assert_close(high_after, (1 + lamb) * high_before)


def test_powers_of_a_softmax_map_become_low_pass_at_the_rate_of_the_second_eigenvalue() -> None:
    scores = random_tokens(12, 12, seed=2)
    kernel = (scores + scores.T).exp()  # a normalised symmetric kernel has real eigenvalues: no oscillation
    attn = kernel / kernel.sum(dim=-1, keepdim=True)
    tokens, ratios = random_tokens(1, 12, 4, seed=2) + 1, []
    for _ in range(60):
        tokens = attn @ tokens
        ratios.append(spectrum.high_frequency_ratio(tokens).item())
    rate = torch.linalg.eigvals(attn).abs().topk(2).values[1].item()
    assert ratios[-1] < 1e-8
    assert ratios[30] / ratios[29] == pytest.approx(rate, rel=1e-3)


def test_entropy_of_uniform_and_identity_and_refusal_of_signed_maps() -> None:
    maps = torch.stack([torch.full((8, 8), 1 / 8), torch.eye(8)])
    torch.testing.assert_close(spectrum.attention_entropy(maps), torch.tensor([math.log(8), 0.0]))
    with pytest.raises(ValueError, match="non-negative"):
        spectrum.attention_entropy(attn_scale(maps[:, None], torch.ones(1)))


def test_map_and_head_similarity() -> None:
    maps = torch.stack([torch.eye(8), torch.eye(8).roll(1, dims=0), torch.full((8, 8), 1 / 8)])
    torch.testing.assert_close(spectrum.map_similarity(maps[0], maps), torch.tensor([1.0, 0.0, 8**-0.5]))
    torch.testing.assert_close(spectrum.head_similarity(maps[None]), torch.tensor([2 * 8**-0.5 / 3]))
    with pytest.raises(ValueError, match="at least two heads"):
        spectrum.head_similarity(maps[None, :1])
    with pytest.raises(ValueError, match="8 and 4 tokens"):
        spectrum.map_similarity(maps, torch.eye(4))


def test_band_energies_add_up_and_agree_with_the_dft() -> None:
    tokens = random_tokens(3, 10, 4)
    dc, hc = spectrum.band_energies(tokens)
    bins = torch.fft.fft(tokens, dim=1, norm="ortho").abs().square().sum(dim=-1)
    torch.testing.assert_close(dc, bins[:, 0])
    torch.testing.assert_close(hc, bins[:, 1:].sum(dim=1))
    torch.testing.assert_close(spectrum.high_frequency_ratio(tokens), (hc / dc).sqrt())


def test_ratio_of_constant_and_of_zero_mean_tokens() -> None:
    constant, alternating = torch.ones(1, 6, 2), torch.tensor([1.0, -1.0]).repeat(3)[None, :, None]
    assert spectrum.high_frequency_ratio(constant).item() == 0
    assert spectrum.high_frequency_ratio(alternating).item() == math.inf


def test_token_similarity_is_the_mean_over_pairs() -> None:
    tokens = random_tokens(2, 7, 5)
    cosines = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    pairs = cosines[:, ~torch.eye(7, dtype=torch.bool)]
    torch.testing.assert_close(spectrum.token_similarity(tokens), pairs.mean(dim=-1))
    torch.testing.assert_close(spectrum.token_similarity_published(tokens), cosines.abs().mean(dim=(1, 2)))


def test_token_similarity_closed_forms() -> None:
    opposite = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])
    assert spectrum.token_similarity(opposite).item() == pytest.approx(-1)
    assert spectrum.token_similarity_published(opposite).item() == pytest.approx(1)  # drops the sign
    orthogonal = torch.eye(5)[None]
    assert spectrum.token_similarity(orthogonal).item() == pytest.approx(0)
    assert spectrum.token_similarity_published(orthogonal).item() == pytest.approx(1 / 5)  # the diagonal
    assert spectrum.token_similarity(torch.ones(1, 5, 3)).item() == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_counts_equal_directions(rank: int) -> None:
    left, right = torch.linalg.qr(random_tokens(9, 9))[0], torch.linalg.qr(random_tokens(6, 6, seed=1))[0]
    tokens = (left[:, :rank] @ right[:rank])[None]
    for oriented in (tokens, tokens.transpose(1, 2)):
        assert spectrum.effective_rank(oriented).item() == pytest.approx(rank, abs=1e-5)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_singular_values_are_those_of_the_token_matrix_relative_to_the_largest(shape: tuple[int, int]) -> None:
    tokens = random_tokens(2, *shape)
    exact = torch.linalg.svdvals(tokens)
    torch.testing.assert_close(spectrum.singular_values(tokens), exact / exact[:, :1])
    left, right = torch.linalg.qr(random_tokens(*shape))[0], torch.linalg.qr(random_tokens(*shape, seed=1).T)[0]
    decay = 7 * 0.5 ** torch.arange(6, dtype=torch.float64)
    halved = spectrum.singular_values((left[:, :6] * decay @ right.T[:6])[None])
    torch.testing.assert_close(halved[0], decay / 7)
    one = spectrum.singular_values(random_tokens(1, 1, 6).expand(1, 9, 6))
    torch.testing.assert_close(one, torch.eye(1, 6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_image_that_is_not_finite_leaves_the_others_their_rank() -> None:
    tokens = random_tokens(2, 9, 6)
    rank = spectrum.effective_rank(tokens)[1]
    tokens[0, 3, 3] = math.inf
    assert spectrum.effective_rank(tokens)[0].isnan() and spectrum.effective_rank(tokens)[1] == rank


@pytest.mark.parametrize("grid", [7, 8])
def test_delta_log_amplitude_of_a_plane_wave_and_of_an_impulse(grid: int) -> None:
    impulse = torch.zeros(1, grid * grid, 2)
    impulse[:, 0] = 3
    flat = spectrum.delta_log_amplitude(impulse)
    torch.testing.assert_close(flat, torch.zeros(1, grid // 2 + 1))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    wave = 1 + 0.5 * torch.cos(2 * math.pi * 2 * (rows + columns) / grid)  # amplitude 1/4 at k = 2
    delta = spectrum.delta_log_amplitude(wave.reshape(1, -1, 1))
    assert delta[0, 2].item() == pytest.approx(math.log(0.25), abs=1e-4)
    assert delta[0, 1] < -10
    with pytest.raises(ValueError, match="no square grid"):
        spectrum.delta_log_amplitude(torch.zeros(1, grid * grid + 1, 2))


@pytest.mark.parametrize(
    "quantity",
    [
        spectrum.high_frequency_ratio,
        spectrum.token_similarity,
        spectrum.token_similarity_published,
        spectrum.singular_values,
        spectrum.effective_rank,
        spectrum.delta_log_amplitude,
    ],
)
def test_features_of_another_shape_are_refused(quantity) -> None:
    with pytest.raises(ValueError, match=r"\(B, N, C\)"):
        quantity(torch.zeros(4, 4))


def test_half_precision_is_computed_in_float32() -> None:
    tokens = random_tokens(2, 9, 4).bfloat16()
    assert spectrum.high_frequency_ratio(tokens).dtype == torch.float32
    assert spectrum.attention_spectrum(random_maps(2, 9).half()).dtype == torch.float32
