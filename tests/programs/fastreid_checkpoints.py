"""Checkpoints as FastReID saves them, and the features that its networks compute.

python fastreid_checkpoints.py OUT NAME:SETTING=VALUE,... ...

OUT/NAME/model.pth; images.npy; what the backbone gives, pooled, in features.npy, and with torchvision's stem
in aligned.npy; after the neck in embeddings.npy.
"""

import sys
from ast import literal_eval
from pathlib import Path

import numpy as np
import torch
from fastreid.config import get_cfg
from fastreid.modeling.meta_arch import build_model
from fastreid.utils.checkpoint import Checkpointer
from torch import nn

out, *wanted = sys.argv[1:]
for each in wanted:
    name, _, settings = each.partition(":")
    options = ["MODEL.DEVICE", "cpu", "MODEL.HEADS.NUM_CLASSES", 7, "MODEL.HEADS.WITH_BNNECK", True]
    for setting in settings.split(","):
        option, _, value = setting.partition("=")
        options += [f"MODEL.{option}", literal_eval(value)]
    config = get_cfg()
    config.merge_from_list(options)
    torch.manual_seed(0)
    model = build_model(config)
    if hasattr(model.heads.pool_layer, "p"):
        nn.init.constant_(model.heads.pool_layer.p, 2.5)  # an exponent that was learned
    images = torch.randn(4, 3, 128, 64)
    with torch.no_grad():
        model.train()
        model.heads.bottleneck(model.heads.pool_layer(model.backbone(images)))  # statistics of images
        model.eval()
        features = model.backbone(images).mean((2, 3))
        # FastReID's pool covers other windows than torchvision's and timm's: no padding, and one window more.
        model.backbone.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        maps = model.backbone(images)
        embeddings = model.heads(maps)
    folder = Path(out, name)
    folder.mkdir()
    Checkpointer(model, str(folder)).save("model", epoch=3, metric=np.float64(0.5))
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "features.npy", features.numpy())
    np.save(folder / "aligned.npy", maps.mean((2, 3)).numpy())
    np.save(folder / "embeddings.npy", embeddings.numpy())
