"""Published weights: which models have some, and how timm's ``pretrained=True`` gets to them.

timm does the rest as for its own models: it adapts weights to other ``num_classes``, ``in_chans`` or ``img_size``, and
takes another source from ``pretrained_cfg_overlay=dict(file=...)``, ``hf_hub_id`` or ``url``.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from timm.models import PretrainedCfg, resolve_pretrained_cfg
from torch import Tensor, nn

from oversmoothing.remedies import is_remedy_parameter
from oversmoothing.weights import CheckpointError, fetch, problems, read_checkpoint

_logger = logging.getLogger(__name__)

REPOSITORY = "peihaowang/vit-anti-oversmoothing"
# Model -> file of that repository: training checkpoints of the paper's authors. The file names come from the paper's
# code and were not verified against the Hub. A wrong name raises an error that lists the files in the repository;
# pretrained_cfg_overlay=dict(hf_hub_filename=...) takes any of them. Their SHA-256 is not known here either: downloads
# are compared with the SHA-256 that the Hub gives.
FILES = {
    "attnscale_small_12": "attnscale_small_12.pth",
    "featscale_small_12": "featscale_small_12.pth",
    "attnscale_cait_XXS24_224": "attnscale_cait_xxs24_224.pth",
    "featscale_cait_XXS24_224": "featscale_cait_xxs24_224.pth",
}

StateDict = dict[str, Tensor]


def source(name: str) -> dict[str, str]:
    """Entries of timm's pretrained config that say where the weights of a model are; empty if there are none."""
    return {"hf_hub_id": REPOSITORY, "hf_hub_filename": FILES[name]} if name in FILES else {}


def overlay_with_weights(
    name: str, pretrained_cfg: PretrainedCfg | dict | str | None, overlay: dict | None, cache_dir: str | Path | None
) -> dict:
    """``pretrained_cfg_overlay`` with the state dict of a source that timm's loader cannot read, or reads otherwise.

    From a training checkpoint with an EMA, timm would load the EMA; here ``model`` is loaded.
    Models named ``hf-hub:owner/name`` or ``local-dir:folder`` are left to timm.

    Args:
        name: Of the model; the other arguments are timm's.

    Raises:
        CheckpointError: If there are no weights for this model, or they cannot be downloaded or read.
    """
    overlay = dict(overlay or {})
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        return overlay
    on_hub = cfg.hf_hub_id and "/".join(filter(None, [f"{fetch.HUB}{cfg.hf_hub_id}", cfg.hf_hub_filename]))
    address = cfg.file or on_hub or cfg.url  # timm's order
    if not address:
        raise CheckpointError(
            f"pretrained=True: no weights are published for {name}; there are some for {', '.join(FILES)}. To "
            "start from weights of its plain baseline: pretrained_cfg_overlay=dict(file='deit.pth'), or "
            "dict(hf_hub_id='timm/deit_small_patch16_224.fb_in1k'), or main.py --finetune FILE"
        )
    state_dict = read_checkpoint(address, cache_dir)["model"]
    _logger.info(f"{name}: pretrained weights are those of {address}")
    return overlay | {"state_dict": state_dict}


def forget_state_dict(model: nn.Module) -> None:
    """Removes the second copy of the weights that timm keeps in the config of a model built from a state dict."""
    for module in model.modules():  # a features_only wrapper has one too
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)


def strict(checkpoint_filter_fn: Callable[[StateDict, nn.Module], StateDict]) -> Callable:
    """timm's adapter of pretrained state dicts, followed by a check of every name and shape.

    timm loads strictly, except with another ``num_classes``: then it accepts any missing or unexpected name. Here only
    what timm adapts may differ: the classifier, and the first convolution for other ``in_chans``. A state dict without
    remedy parameters is a plain model's; the variant's remedy parameters then keep their initial values.
    """

    def filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
        wanted, cfg = model.state_dict(), model.pretrained_cfg
        try:
            state_dict = checkpoint_filter_fn(state_dict, model)
        except Exception as error:  # timm's adapter does not check shapes
            raise CheckpointError(
                f"pretrained weights do not fit {cfg['architecture']} ({type(error).__name__}: {error}): is it the "
                "file of another model?"
            ) from error
        remedy = {name: tensor for name, tensor in wanted.items() if is_remedy_parameter(name)}
        if remedy and cfg.get("hf_hub_id") != REPOSITORY and not any(map(is_remedy_parameter, state_dict)):
            _logger.info(f"plain weights: the remedy's {len(remedy)} parameters stay at their initial values")
            state_dict = state_dict | remedy
        adapted = () if model.num_classes == cfg["num_classes"] else (f"{cfg['classifier']}.",)
        if model.patch_embed.proj.in_channels != cfg["input_size"][0]:
            adapted += (f"{cfg['first_conv']}.",)
        compared = [{n: t for n, t in tensors.items() if not n.startswith(adapted)} for tensors in (wanted, state_dict)]
        found = problems(*compared)
        if found:
            raise CheckpointError(
                f"pretrained weights do not fit {cfg['architecture']}; {'; '.join(found)}: is it the file of another "
                "model? One with a distillation token can be given to main.py --finetune"
            )
        return state_dict

    return filter_fn
