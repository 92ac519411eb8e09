"""Checkpoints as torchreid's engine saves them, and the features that its networks compute.

python torchreid_checkpoints.py OUT NAME ...

OUT/NAME/model.pth.tar-1, images.npy and features.npy.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from torchreid.reid.engine import Engine
from torchreid.reid.models import build_model
from torchreid.reid.optim import build_lr_scheduler, build_optimizer

out, *names = sys.argv[1:]
for name in names:
    torch.manual_seed(0)
    model = build_model(name, num_classes=7, pretrained=False, use_gpu=False)
    images = torch.randn(4, 3, 128, 64)
    pooled = []
    pool = model.avgpool if name == "resnet50_ibn_a" else model.global_avgpool
    pool.register_forward_hook(lambda module, inputs, output, pooled=pooled: pooled.append(output.flatten(1)))
    with torch.no_grad():
        model.train()(images)  # statistics unlike those of a new network
        model.eval()(images)
    optimizer = build_optimizer(model, optim="adam")
    scheduler = build_lr_scheduler(optimizer, lr_scheduler="multi_step", stepsize=[2, 3])
    engine = Engine(SimpleNamespace(train_loader=None, test_loader=None), use_gpu=False)
    engine.register_model(name, model, optimizer, scheduler)
    engine.save_model(0, np.float32(0.5), out)
    np.save(f"{out}/{name}/images.npy", images.numpy())
    np.save(f"{out}/{name}/features.npy", pooled[-1].numpy())
