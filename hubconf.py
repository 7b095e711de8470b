"""Entry points of torch.hub: ``torch.hub.load("<owner>/<repository>", "attnscale_small_12", pretrained=True)``."""

import timm

import models

dependencies = ["torch", "timm", "huggingface_hub", "safetensors"]
globals().update({name: timm.model_entrypoint(name) for name in models.list_models()})
