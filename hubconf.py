"""Entry points of torch.hub: ``torch.hub.load("<owner>/<repository>", "attnscale_small_12", num_classes=10)``."""

import timm

import models

dependencies = ["torch", "timm"]
globals().update({name: timm.model_entrypoint(name) for name in models.list_models()})
