"""Attention classes without an N x N map over tokens that remedies and analysis could use, with the reasons."""

from timm.layers import AttentionPoolLatent, DiffAttention
from timm.models import (
    cait,
    coat,
    crossvit,
    davit,
    edgenext,
    efficientvit_msra,
    levit,
    mobilevit,
    mvitv2,
    swiftformer,
    vision_transformer,
    volo,
    xcit,
)

from .kinds import refuse

refuse("its maps are between channels, not between tokens", xcit.XCA, davit.ChannelAttention, davit.ChannelAttentionV2)
refuse("its maps are between channels, not between tokens", edgenext.CrossCovarianceAttn)
refuse("class attention has one row, that of the class token", cait.ClassAttn, volo.ClassAttention, xcit.ClassAttn)
refuse("it has one row, that of the other branch's class token", crossvit.CrossAttention)
refuse("it pools the tokens with queries of its own", AttentionPoolLatent)
refuse("it weighs a small neighbourhood and has no map over all tokens", volo.OutlookAttention)
refuse("it is linear in the number of tokens and has no map", mobilevit.LinearSelfAttention)
refuse("it is linear in the number of tokens and has no map", coat.FactorAttnConvRelPosEnc)
refuse("it is linear in the number of tokens and has no map", swiftformer.EfficientAdditiveAttention)
refuse("each head's input is the output of the head before", efficientvit_msra.CascadedGroupAttention)
refuse("its map is a difference of two softmax maps", DiffAttention)
refuse("it adds the queries to its output, which is more than a map on values", mvitv2.MultiScaleAttention)
refuse("it adds the queries to its output, which is more than a map on values", mvitv2.MultiScaleAttentionPoolFirst)
refuse("its projections hold batch norms, and its output an activation", levit.Attention, levit.AttentionDownsample)
refuse(
    "attention and MLP share one projection inside the block",
    vision_transformer.ParallelScalingBlock,
    vision_transformer.DiffParallelScalingBlock,
)
