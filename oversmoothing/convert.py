"""``add_remedy``: adds remedies to any existing vision transformer.

Modules are converted in place by changing their class; their parents, parameters and names stay the same. Where the
zoo has a layer with the remedy built in (for timm's ``VisionTransformer``, ``Cait`` and ``SwinTransformer``), the
module gets that class. Elsewhere it gets a subclass of its own class, made by ``converted.py``: the forward of its
*kind*, with the remedies between the kind's two halves. ``remove_remedy`` restores every module's class.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.layers import use_fused_attn
from timm.models.cait import Cait
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from .attention import UnsupportedAttentionError, attention_layers
from .converted import Conversion, Converted, Remedied, RemediedBlock, RemediedNorm, converted_class
from .fused.blocks import FoldedBlock
from .fused.models import FoldedCait, FoldedVisionTransformer
from .remedies import REMEDIES, AttentionRemedy, BranchRemedy, Layer, LayerShape, NormRemedy, Remedy, RemedyError
from .remedies.base import state_on_meta
from .remedies.featscale import FeatScale
from .remedies.first_values import FirstValues

# timm's class -> the library's, which computes the same and has the fast paths; these do not support other remedies.
FOLDED = {**FeatScale.native_attention, Block: FoldedBlock}
UNFOLDED = {folded: plain for plain, folded in FOLDED.items()}

# timm's model class -> the class it gets when one of its layers has a remedy built in. Subclasses are left as they are.
FOLDED_MODELS = {VisionTransformer: FoldedVisionTransformer, Cait: FoldedCait}

LARGEST = 1e6  # value of an option; larger ones, infinite ones too, give no finite logits

Layers = slice | Sequence[int] | str | None
Options = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------ the calls


def list_remedies() -> list[str]:
    """Names for :func:`add_remedy`."""
    return list(REMEDIES)


def describe(name: str) -> dict[str, Any]:
    """Describes a remedy, as plain data.

    Returns:
        ``name``, ``formula``, ``source``, ``changes`` (attention, branch or norm), ``cost``, ``options`` and their
        defaults, ``published`` (options of the authors' own form), ``parameters`` of a layer and their shapes.

    Raises:
        RemedyError: If there is no such remedy.
    """
    cls = _find_remedy(name)
    state = state_on_meta(cls, LayerShape(0, dim=35, num_heads=5, head_dim=7))
    tensors = {
        f"{key}.{inner}" if inner else key: tensor
        for key, value in state.items()
        for inner, tensor in (value.named_parameters() if isinstance(value, nn.Module) else [("", value)])
    }
    letters = {35: "C", 5: "H", 7: "D", 1: "1"}
    return dict(
        name=name,
        formula=cls.formula,
        source=cls.source,
        changes=cls.changes,
        cost=cls.cost,
        options=dataclasses.asdict(cls()),
        published=dict(cls.published),
        parameters={key: str(tuple(letters[size] for size in t.shape)).replace("'", "") for key, t in tensors.items()},
    )


def add_remedy(
    model: nn.Module, names: str | Sequence[str] | Mapping[str, Options], layers: Layers = None, **options: Any
) -> nn.Module:
    """Converts a model in place: its attention layers, blocks or norms get one remedy, or several.

    At the start values the model computes the same as before, except with ``reattention`` and with some remedies'
    published options. The state dict keeps its names in their order, with the remedies' parameters between them. Of
    several remedies, each wraps the ones named before it: the first name is next to the softmax. ::

        add_remedy(model, "attnscale")
        add_remedy(model, "gfsa", layers=slice(6, None), K=3)
        add_remedy(model, ["attnscale", "featscale"])
        add_remedy(model, {"attnscale": {}, "neutreno": dict(alpha=0.6, learnable=False, layers="6:")})

    Args:
        model: A model of timm or Hugging Face, or any model whose attention classes have a kind; without compile or
            data-parallel wrappers. Build the optimizer and DDP afterwards: the model has new parameters.
        names: One remedy, several, or several with options of their own.
        layers: Which of the self-attention layers, counted in the order of execution: a slice, indices, or a slice as
            text ("6:"). All by default. ``neutreno`` and ``value_residual`` begin with the second layer of the model.
        **options: Options of the remedy, if there is one name only; see :func:`describe`.

    Returns:
        ``model``.

    Raises:
        RemedyError: If a name or option is unknown, the model has a remedy already, or the remedy has no meaning in
            it. The model is then unchanged.
    """
    wanted = _parse(names, layers, options)
    if not isinstance(model, nn.Module):
        raise RemedyError(f"{model!r:.60} is no model: give one, such as timm.create_model(...)")
    found = find_layers(model)
    _refuse_converted(model)
    plan = _Plan(model, found)
    for remedy, spec in wanted:
        remedy = remedy.for_model(model)
        plan.add(remedy, spec, _choose(found, spec))
    plan.carry_out()
    model.remedies = {
        remedy.name: dataclasses.asdict(remedy) | ({} if spec is None else {"layers": spec})
        for remedy, spec in plan.done
    }
    _note_in_config(model)
    return model


def remedies_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What :func:`add_remedy` did: names with all options, as plain data that ``add_remedy(other, ...)`` accepts."""
    return {name: dict(options) for part in _records(model) for name, options in part.remedies.items()}


def remedy_options(names: Sequence[str], options: Options) -> dict[str, dict[str, Any]]:
    """Remedies of a command line, in the form that :func:`add_remedy` takes.

    Args:
        names: The remedies, the first one next to the softmax.
        options: ``{"K": 3}`` for the only remedy, ``{"gfsa.K": 3}`` for one of several; ``{"layers": "6:"}`` for all.

    Raises:
        RemedyError: If an option belongs to none of them, or a remedy is named twice.
    """
    if len(set(names)) < len(names):
        raise RemedyError(f"a remedy is named twice: {' '.join(names)}")
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        name, dot, option = key.partition(".")
        if dot and name in chosen:
            chosen[name][option] = value
        elif not dot and key == "layers" and chosen:
            for own in chosen.values():
                own.setdefault("layers", value)
        elif not dot and len(chosen) == 1:
            chosen[names[0]][key] = value
        else:
            way_out = f"write {names[0]}.{option or key}={value}" if names else "name a remedy"
            raise RemedyError(f"{key}={value}: of which remedy ({' '.join(names) or 'none is named'})? {way_out}")
    return chosen


def remove_remedy(model: nn.Module) -> nn.Module:
    """Undoes :func:`add_remedy`: restores every module's class and removes the remedies' parameters.

    Returns:
        ``model``.

    Raises:
        RemedyError: If there is nothing to undo.
    """
    if not remedies_of(model):
        raise RemedyError(f"{type(model).__name__} has no remedy that was added to it")
    for module in model.modules():
        conversion = module.__dict__.get("conversion")
        if isinstance(conversion, Conversion):
            for name in (*conversion.state, *conversion.attributes, "conversion"):
                delattr(module, name)
            module.__class__ = conversion.original
    for part in _records(model):
        del part.remedies
        _note_in_config(part)
    return model


def _records(model: nn.Module) -> list[nn.Module]:
    """The modules that :func:`add_remedy` was called with: the model itself, or a module inside it."""
    return [part for part in model.modules() if isinstance(part.__dict__.get("remedies"), dict)]


def _note_in_config(model: nn.Module) -> None:
    """Notes the remedies in a Hugging Face model's configuration; as a list, since it is saved with its keys sorted."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        config.remedies = [list(item) for item in remedies_of(model).items()]


def remedies_at(module: nn.Module) -> tuple[Remedy, ...]:
    """The remedies in one module: a converted one, or a layer of the zoo with a remedy built in."""
    conversion = module.__dict__.get("conversion")
    if isinstance(conversion, Conversion):
        return conversion.remedies
    return tuple(remedy() for remedy in REMEDIES.values() if type(module) in remedy.native.values())


def find_layers(model: nn.Module) -> list[Layer]:
    """The self-attention layers of a model, in the order of execution.

    Raises:
        RemedyError: If there are none, or some are of an unknown class.
    """
    try:
        found = attention_layers(model)
    except UnsupportedAttentionError as error:
        raise RemedyError(f"no remedy fits: {error}") from error
    layers = []
    for index, layer in enumerate(found):
        weight = layer.kind.projection(layer.attn).weight  # (C, H D), or a convolution's (C, H D, 1, 1)
        num_heads = layer.kind.num_heads(layer.attn)
        shape = LayerShape(index, weight.shape[0], num_heads, weight.shape[1] // num_heads)
        layers.append(Layer(layer.attn_name, layer.attn, layer.block, layer.kind, shape))
    return layers


# -------------------------------------------------------------------------------------------------------------- parsing


def _find_remedy(name: str) -> type[Remedy]:
    if name not in REMEDIES:
        near = difflib.get_close_matches(str(name), REMEDIES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(REMEDIES)}"
        raise RemedyError(f"there is no remedy {name!r}; {hint}")
    return REMEDIES[name]


def _parse(
    names: str | Sequence[str] | Mapping[str, Options], layers: Layers, options: Options
) -> list[tuple[Remedy, str | list[int] | None]]:
    """Validates the raw arguments, here and nowhere else: each remedy with its layers, in the form that is recorded."""
    if isinstance(names, str):
        names = {names: options}
    elif options:
        raise RemedyError(
            f"options {', '.join(options)} of which remedy? With several, give a mapping: "
            '{"gfsa": {"K": 3}, "neutreno": {}}'
        )
    if not names:
        raise RemedyError(f"no remedy is named; there are {', '.join(REMEDIES)}")
    if not isinstance(names, Mapping):
        if len(set(names)) < len(names):
            raise RemedyError(f"a remedy is named twice: {', '.join(names)}")
        names = {name: {} for name in names}
    wanted = []
    for name, own in names.items():
        if not isinstance(own, Mapping):
            raise RemedyError(f"the options of {name} are {own!r}: give a mapping, such as {{'{name}': {{}}}}")
        cls, own = _find_remedy(name), {"layers": layers} | dict(own)
        spec = _plain_layers(own.pop("layers"))
        known = [option.name for option in dataclasses.fields(cls)]
        if unknown := own.keys() - set(known):
            raise RemedyError(f"{name} has no option {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        for option, value in own.items():
            _check_type(f"{name}: {option}", value, getattr(cls, option))
        wanted.append((cls(**own), spec))
    return wanted


def _check_type(option: str, value: Any, default: Any) -> None:
    is_switch = isinstance(default, bool)
    is_value = isinstance(value, bool | int | float) or value is default is None
    if isinstance(value, bool) != is_switch or not is_value:
        raise RemedyError(f"{option}={value!r} is not {'True or False' if is_switch else 'a number'}")
    if value is not None and not abs(value) <= LARGEST:  # NaN too
        raise RemedyError(f"{option}={value!r}: give a number of at most {LARGEST:.0f}, or of at least {-LARGEST:.0f}")


def _plain_layers(layers: Layers) -> str | list[int] | None:
    if not isinstance(layers, Iterable | slice | int | None) or isinstance(layers, bool):
        raise RemedyError(f"layers={layers!r}: give a slice, indices, or a slice as text, such as '6:'")
    if isinstance(layers, slice):
        parts = [layers.start, layers.stop] + ([] if layers.step is None else [layers.step])
        layers = ":".join("" if part is None else str(part) for part in parts)
    if isinstance(layers, int):
        return [layers]
    return layers if layers is None or isinstance(layers, str) else list(layers)


def _choose(found: list[Layer], spec: str | list[int] | None) -> list[Layer]:
    try:
        if spec is None:
            return found
        if isinstance(spec, str):
            parts = [int(part) if part else None for part in spec.split(":")]
            chosen = found[slice(*parts)] if len(parts) > 1 else [found[parts[0]]]
        else:
            if any(isinstance(index, bool) for index in spec):  # a mask; as numbers it would be layers 0 and 1
                raise TypeError
            chosen = [found[index] for index in sorted({range(len(found))[index] for index in spec})]
    except (ValueError, TypeError, IndexError):
        raise RemedyError(
            f"layers={spec!r}: give a slice, indices below {len(found)}, or a slice as text, such as '6:'"
        ) from None
    if not chosen:
        raise RemedyError(f"layers={spec!r} chooses none of the model's {len(found)} layers")
    return chosen


def _refuse_converted(model: nn.Module) -> None:
    present = {remedy.name for module in model.modules() for remedy in remedies_at(module)}
    if remedies_of(model):
        raise RemedyError(
            f"{type(model).__name__} has been converted already ({', '.join(remedies_of(model))}): call remove_remedy "
            "first, or name all remedies in one call"
        )
    if present:
        raise RemedyError(
            f"{type(model).__name__} has {', '.join(sorted(present))} built in: start from its plain baseline and name "
            "all remedies in one call"
        )


# ----------------------------------------------------------------------------------------------------------- converting


@dataclass
class _Change:
    """The planned change of one module."""

    module: nn.Module
    shape: LayerShape
    mixin: type[Converted]
    remedies: list[Remedy] = field(default_factory=list)
    native: type[nn.Module] | None = None  # the class to become, where the zoo has one
    first_values: FirstValues | None = None


class _Plan:
    """Collects changes, refuses what is impossible, and touches the model only in :meth:`carry_out`."""

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.model = model
        self.layers = layers
        self.changes: dict[nn.Module, _Change] = {}
        self.readers: list[Layer] = []  # layers that read the first layer's values
        self.done: list[tuple[Remedy, str | list[int] | None]] = []
        self.is_zoo_family = isinstance(model, VisionTransformer | Cait | SwinTransformer)

    def add(self, remedy: Remedy, spec: str | list[int] | None, layers: list[Layer]) -> None:
        """Plans one remedy in some layers.

        Raises:
            RemedyError: If it has no meaning there.
        """
        needs_first = isinstance(remedy, AttentionRemedy) and remedy.needs_first_values
        reason = remedy.objection(self.model, self.layers if needs_first else layers)
        if reason is not None:
            raise RemedyError(f"{remedy.name} has no meaning in {type(self.model).__name__}: {reason}")
        if needs_first:
            layers = [layer for layer in layers if layer.shape.index > 0]
            if not layers:
                raise RemedyError(
                    f"{remedy.name} has no meaning in {type(self.model).__name__}: of its layers only the first is "
                    "chosen, whose values later ones take up"
                )
            self.readers += layers
        for layer in layers:
            if isinstance(remedy, AttentionRemedy):
                change = self._change(layer.attn, layer, Remedied)
                self._refuse_order(remedy, change.remedies)
                change.remedies.append(remedy)
            elif isinstance(remedy, BranchRemedy):
                self._add_to_branch(remedy, layer)
        if isinstance(remedy, NormRemedy):
            for layer in layers:
                for norm in remedy.norms(self.model, layer, is_last=layer is self.layers[-1]):
                    self._change(norm, layer, RemediedNorm, dim=norm.weight.numel()).remedies.append(remedy)
        self.done.append((remedy, spec))

    def _refuse_order(self, remedy: AttentionRemedy, earlier: list[Remedy]) -> None:
        no_maps = [r.name for r in earlier if isinstance(r, AttentionRemedy) and not r.has_maps()]
        if remedy.needs_maps and no_maps:
            raise RemedyError(f"{remedy.name} acts on maps, and {no_maps[0]} leaves none: name {remedy.name} first")

    def carry_out(self) -> None:
        """Changes the modules."""
        if self.readers:
            shared = FirstValues(last_index=max(layer.shape.index for layer in self.readers))
            for layer in (self.layers[0], *self.readers):
                self._change(layer.attn, layer, Remedied).first_values = shared
        for change in self.changes.values():
            self._decide_native(change)
        for layer in self.layers:
            if type(layer.block) in FOLDED and layer.attn in self.changes and self.changes[layer.attn].native:
                self._decide_native(self._change(layer.block, layer, RemediedBlock))
        states = [self._new_state(change) for change in self.changes.values()]
        for change, state in zip(self.changes.values(), states, strict=True):
            _convert(change, state)
        original = type(self.model)
        if original in FOLDED_MODELS and any(change.native and change.remedies for change in self.changes.values()):
            self.model.__class__ = FOLDED_MODELS[original]
            self.model.conversion = Conversion(original)

    def _change(self, module: nn.Module, layer: Layer, mixin: type[Converted], dim: int | None = None) -> _Change:
        if module not in self.changes:
            shape = dataclasses.replace(layer.shape, dim=dim or layer.shape.dim)
            self.changes[module] = _Change(module, shape, mixin)
        return self.changes[module]

    def _add_to_branch(self, remedy: BranchRemedy, layer: Layer) -> None:
        if self.is_zoo_family and type(layer.block) in remedy.native:
            self._change(layer.block, layer, RemediedBlock).remedies.append(remedy)
            self._change(layer.attn, layer, Remedied)
            return
        module, _ = layer.kind.branch(layer.attn, layer.block)
        mixin = Remedied if module is layer.attn else RemediedBlock
        self._change(module, layer, mixin).remedies.append(remedy)

    def _decide_native(self, change: _Change) -> None:
        if not self.is_zoo_family or change.first_values is not None:
            return
        if len(change.remedies) == 1 and getattr(change.remedies[0], "learnable", True):
            change.native = change.remedies[0].native.get(type(change.module))
        elif not change.remedies:
            change.native = FOLDED.get(type(change.module), type(change.module))

    def _new_state(self, change: _Change) -> dict[str, nn.Parameter | nn.Module]:
        like = next(p for m in (change.module, self.model) for p in m.parameters() if p.is_floating_point())
        state: dict[str, nn.Parameter | nn.Module] = {}
        for remedy in change.remedies:
            for name, value in remedy.new_state(change.shape).items():
                if name in state or hasattr(change.module, name):
                    raise RemedyError(f"{remedy.name}: {type(change.module).__name__} has an attribute {name} already")
                value = value.to(device=like.device, dtype=like.dtype)
                state[name] = value if isinstance(value, nn.Module) else nn.Parameter(value)
        return state


def _convert(change: _Change, state: Mapping[str, nn.Parameter | nn.Module]) -> None:
    module, original = change.module, type(change.module)
    attributes: dict[str, Any] = {}
    if change.mixin in (Remedied, RemediedNorm) or change.native:
        attributes |= {} if hasattr(module, "fused_attn") else {"fused_attn": use_fused_attn()}
    if change.native:
        attributes |= {k: v for remedy in change.remedies for k, v in remedy.native_attributes().items()}
    module.__class__ = change.native or converted_class(change.mixin, UNFOLDED.get(original, original))
    for name, value in {**attributes, **state}.items():
        setattr(module, name, value)
    module.conversion = Conversion(
        original, change.shape, tuple(change.remedies), change.first_values, tuple(state), tuple(attributes)
    )
