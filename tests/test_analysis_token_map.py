"""The attention of a layer over one image."""

import pytest
import torch
from subjects import dense_maps, subject_of

from oversmoothing.analysis import token_map as analysis_token_map
from oversmoothing.analysis.subject import build_subject
from scripts import analyze


def test_token_map_is_the_class_tokens_attention_and_attnscales_change_of_it() -> None:
    subject = subject_of("attnscale_small_12")
    lamb = torch.tensor([-0.2, 0.3, 0.9])
    with torch.no_grad():
        subject.layers[1].attn.lamb.copy_(lamb)
    image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    item = analysis_token_map.token_map(subject, image, -2)
    assert item.block == "blocks.1" and item.query == "class token"
    after = dense_maps(subject.model, image[None])[1][0, :, 0, 1:]  # (num_heads, 16)
    before = (after + lamb[:, None] / 17) / (1 + lamb[:, None])
    torch.testing.assert_close(item.attention.flatten(), 17 * before.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(item.high_pass, item.attention - 1, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(item.change.flatten(), 17 * (after - before).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_token_map_without_class_token_or_attnscale() -> None:
    item = analysis_token_map.token_map(subject_of("cait_S24_224"), torch.zeros(3, 32, 32), 0)
    assert item.query == "mean over all queries" and item.change is None and item.attention.shape == (4, 4)


def test_token_map_of_windows_or_of_a_missing_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--layer 3: .* blocks 0 to 2"):
        analysis_token_map.token_map(subject_of("vit_tiny_patch16_224"), torch.zeros(3, 32, 32), 3)
    args = analyze.get_parser().parse_args(["--model", "swin_tiny_patch4_window7_224"])
    swin = build_subject(args.models[0], "swin", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="windows of 49 tokens"):
        analysis_token_map.token_map(swin, torch.zeros(3, 224, 224), 0)
