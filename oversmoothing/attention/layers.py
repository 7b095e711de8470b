"""The attention layers of a model and the residual blocks that hold them."""

from dataclasses import dataclass

from torch import nn

from .kinds import KINDS, REFUSALS, Kind, UnsupportedAttentionError, find_kind, kind_of, refusal

ATTENTION_NAMES = ("attn", "attention", "self_attn")  # attributes by which attention of an unknown class is recognised


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module in its residual block."""

    name: str  # of the block, as in named_modules(), for example "blocks.3"
    block: nn.Module
    attn_name: str  # of the attention module, for example "blocks.3.attn"
    attn: nn.Module

    @property
    def kind(self) -> Kind:
        """What the attention module computes."""
        return kind_of(self.attn)


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention layers of a model, in the order of registration, which is the order of execution.

    Attention of a refused class (class attention, outlook attention) is left out if the model has other attention.

    Args:
        model: A model without compile or data-parallel wrappers.

    Raises:
        UnsupportedAttentionError: If an attention module is of an unknown class, or no attention module has a kind.
    """
    layers, refused = [], {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        block_name, _, own_name = name.rpartition(".")
        if find_kind(module) is not None:
            layers.append(AttentionLayer(block_name, modules[block_name], name, module))
        elif type(module) in REFUSALS or type(module) in KINDS:
            refused.setdefault(type(module), name)
        elif own_name in ATTENTION_NAMES and _is_unknown_attention(module, modules[block_name]):
            raise UnsupportedAttentionError(f"{type(model).__name__}, {name}: {refusal(module)}")
    if layers:
        return layers
    if refused:
        reasons = " ".join(f"{name}: {refusal(modules[name])}" for name in refused.values())
        raise UnsupportedAttentionError(f"{type(model).__name__} has no attention that is supported. {reasons}")
    raise UnsupportedAttentionError(
        f"{type(model).__name__} has no block with a self-attention module, as vision transformers have."
    )


def _is_unknown_attention(module: nn.Module, parent: nn.Module) -> bool:
    is_layer = type(module).__module__.startswith("torch.nn.")  # for example a projection named attn
    return not is_layer and type(parent) not in REFUSALS and not any(find_kind(part) for part in module.modules())
