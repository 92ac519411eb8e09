"""What re-identification tools call the parts of a model in their checkpoints.

| tool | backbone | neck | where its code says so |
|---|---|---|---|
| DMX | `backbone.` | `neck.` | `dmx/model/embedding_model.py` |
| torchreid | as in timm; OSNets as here | none | `torchreid/models/`, `engine/engine.py` |
| FastReID | `backbone.` | `heads.bottleneck.0.` | `meta_arch/baseline.py`, `heads/embedding_head.py` |
| OpenUnReID | `backbone.` | `head.feat_bn.` | `models/builder.py`, `models/layers/embedding.py` |
| DomainMix, MMT, SpCL | `base.0.` and on | `feat_bn.` | `dg/models/resnet.py`, `mmt/models/resnet.py` |
| Bag of Tricks | `base.` | `bottleneck.` | `modeling/baseline.py` |
| timm, torchvision, IBN-Net | as in timm | none | `timm/models/resnet.py` |
"""

from __future__ import annotations

from collections.abc import Iterable

from dmx.model.osnet import is_osnet, named_as_later

BACKBONE, NECK = "backbone.", "neck."
EXPONENT = "pooling.p"  # of a generalised mean
# What wraps all of a model, outermost first. Of a mean teacher and its student, tools test the teacher.
WRAPPINGS = ("module.", "model.", "mean_net.", "net.")
BACKBONES = ("backbone.", "base.")
EXPONENTS = ("pooling.p", "heads.pool_layer.p")  # of DMX and FastReID
NECKS = ("neck.", "heads.bottleneck.0.", "head.feat_bn.", "feat_bn.", "bottleneck.")


def by_our_names(keys: Iterable[str]) -> dict[str, str]:
    """Names as an `EmbeddingModel` has them, each with the key that bears the same tensor in a file.

    Args:
        keys: of the file. What lies outside a wrapping that any key bears belongs to other parts.

    Returns:
        Also names that no `EmbeddingModel` has, such as `backbone.classifier.weight`.
    """
    inside = {key: key for key in keys}
    for wrapping in WRAPPINGS:
        inside = _beneath(inside, wrapping) or inside
    neck = next((each for each in NECKS if _beneath(inside, each)), None)
    exponent = next((inside.pop(each) for each in EXPONENTS if each in inside), None)
    found = {} if exponent is None else {EXPONENT: exponent}
    if neck is not None:
        found |= {NECK + name: key for name, key in _beneath(inside, neck).items()}
        inside = {name: key for name, key in inside.items() if not name.startswith(neck)}
    for beginning in BACKBONES:
        inside = _beneath(inside, beginning) or inside
    if is_osnet(inside):
        inside = {named_as_later(name): key for name, key in inside.items()}
    return found | {BACKBONE + name: key for name, key in _stages_named(inside).items()}


def _beneath(names: dict[str, str], beginning: str) -> dict[str, str]:
    return {name.removeprefix(beginning): key for name, key in names.items() if name.startswith(beginning)}


def _stages_named(names: dict[str, str]) -> dict[str, str]:
    """A ResNet in an `nn.Sequential`: convolution, norm, what has no weights, and four stages."""
    numbers = sorted({int(first) for name in names if (first := name.split(".")[0]).isdecimal()})
    if len(numbers) != 6 or numbers[:2] != [0, 1]:
        return names
    stages = dict(
        zip(map(str, numbers), ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), strict=True)
    )
    named = {}
    for name, key in names.items():
        first, _, rest = name.partition(".")
        named[f"{stages[first]}.{rest}" if first in stages else name] = key
    return named
