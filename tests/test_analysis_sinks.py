"""Attention sinks on maps and values whose answer is known."""

import torch
from subjects import dense_maps, subject_of

from oversmoothing.analysis.measurement import measure
from oversmoothing.analysis.quantities.sinks import received_mass, relative_value_norm


def test_mass_of_uniform_attention_and_of_a_sink() -> None:
    torch.testing.assert_close(received_mass(torch.full((4, 4), 0.25)), torch.full((4,), 0.25))
    sink = torch.tensor([[0.8, 0.2, 0, 0], [0.6, 0, 0.4, 0], [0.6, 0, 0, 0.4], [1, 0, 0, 0]])
    torch.testing.assert_close(received_mass(sink), torch.tensor([0.75, 0.05, 0.1, 0.1]))


def test_value_norms_are_relative_to_their_mean() -> None:
    values = torch.tensor([[0.3, 0.4], [1, 0], [0, 1.5]])
    torch.testing.assert_close(relative_value_norm(values), torch.tensor([0.5, 1, 1.5]))


def test_the_layers_own_maps_and_values() -> None:
    subject = subject_of("vit_tiny_patch16_224")
    attn, images, values = subject.layers[0].attn, torch.randn(2, 3, 32, 32), []
    with torch.no_grad():
        attn.qkv.weight[: 2 * 24].mul_(20)  # sharp maps
    attn.qkv.register_forward_hook(lambda qkv, args, out: values.append(out.unflatten(-1, (3, 3, 8))[:, :, 2]))
    (result,) = measure([subject], [[images]], quantities=["sinks"])
    attention = dense_maps(subject.model, images)[0].mean(dim=2)  # (B, heads, keys)
    norms = values[0].transpose(1, 2).norm(dim=-1)
    norms = norms / norms.mean(dim=-1, keepdim=True)
    expected = {"sink_first": attention[..., 0], "sink_first_value": norms[..., 0]}
    expected["sink_largest"], position = attention.max(dim=-1)
    expected["sink_largest_value"] = torch.stack(
        [torch.stack([norms[b, h, position[b, h]] for h in range(3)]) for b in range(2)]
    )
    assert position.unique().numel() > 1  # not one token for all heads, which a wrong index could find too
    for name, value in expected.items():
        torch.testing.assert_close(result.layers[0][name].mean, value.mean(dim=0).double(), rtol=1e-4, atol=1e-6)


def test_a_patch_is_no_first_token() -> None:
    (result,) = measure([subject_of("cait_xxs24_224")], [[torch.randn(1, 3, 32, 32)]], quantities=["sinks"])
    assert set(result.layers[0]) == {"sink_largest", "sink_largest_value"}
    assert result.left_out == {
        "sinks": dict.fromkeys(result.layer_names, "the first token: it is no class token or register")
    }
