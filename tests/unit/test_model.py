"""Backbones, neck, discriminator."""

from __future__ import annotations

import pytest
import timm
import torch
from networks import narrow
from torch import nn

from dmx.config import from_tree, recipe
from dmx.errors import DmxError
from dmx.model import (
    Discriminator,
    SynchronisedBatchNorm,
    build_model,
    domain_balance_loss,
    frozen_statistics,
    synchronise_batchnorm,
)
from dmx.model.ibn import IBN
from dmx.model.osnet import OSNETS
from dmx.model.pooling import GeM
from dmx.sections import ModelConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.manual_seed(0)


def test_forward_gives_features_before_and_after_the_neck() -> None:
    model = narrow()
    f, b = model(torch.randn(4, 3, 64, 32))
    assert f.shape == b.shape == (4, 32)
    assert model.width == 32
    expected = (f - f.mean(0)) / (f.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(b, expected, atol=1e-4, rtol=1e-4)


def test_embeddings_are_unit_rows_of_b() -> None:
    model = narrow().eval()
    images = torch.randn(3, 3, 64, 32)
    _, b = model(images)
    e = model.embed(images)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(e, b / b.norm(dim=1, keepdim=True))


def test_neck_bias_is_frozen_at_zero() -> None:
    model = narrow()
    assert not model.neck.bias.requires_grad
    f, b = model(torch.randn(4, 3, 64, 32))
    (f.square().sum() + b.square().sum()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(model.neck.bias, torch.zeros(32))
    assert torch.equal(narrow().neck.weight, torch.ones(32))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet26d", "resnet18_ibn_a"])
def test_last_stride_one_doubles_the_map_and_keeps_the_weights(name: str) -> None:
    images = torch.randn(2, 3, 64, 32)
    maps = {}
    for stride in (1, 2):
        model = build_model(ModelConfig(backbone=name, last_stride=stride)).eval()
        maps[stride] = model.backbone(images).shape[2:]
    assert maps[1] == (4, 2)
    assert maps[2] == (2, 1)
    strides = {
        m.stride
        for m in build_model(ModelConfig(backbone=name)).backbone.layer4.modules()
        if isinstance(m, nn.Conv2d)
    }  # type: ignore[union-attr, operator]
    assert strides == {(1, 1)}


@pytest.mark.parametrize(
    "name", ["convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"]
)
def test_other_backbones_pool_to_their_width(name: str) -> None:
    arguments = {"img_size": (64, 32), "window_size": 2} if name.startswith("swin") else {}
    if name.startswith("vit"):
        arguments = {"img_size": (64, 32)}
    model = build_model(ModelConfig(backbone=name, backbone_args=arguments)).eval()
    f, _ = model(torch.randn(2, 3, 64, 32))
    assert f.shape == (2, model.width)


def test_ibn_normalises_its_halves_differently() -> None:
    layer = IBN(5).train()
    x = torch.randn(4, 5, 6, 3)
    y = layer(x)
    instance = nn.functional.instance_norm(x[:, :2])
    batch = nn.functional.batch_norm(x[:, 2:], None, None, training=True)
    torch.testing.assert_close(y, torch.cat((instance, batch), 1))


def test_ibn_a_keys_are_those_of_the_published_weights() -> None:
    """The published file: torchvision's ResNet-50 keys, with layer1-3's bn1 split into IN and BN, and fc."""
    plain = timm.create_model("resnet50", num_classes=0).state_dict()
    expected = set()
    for key in plain:
        parts = key.split(".")
        if parts[0] in ("layer1", "layer2", "layer3") and parts[2] == "bn1":
            expected.add(".".join([*parts[:3], "BN", parts[3]]))
            if parts[3] in ("weight", "bias"):
                expected.add(".".join([*parts[:3], "IN", parts[3]]))
        else:
            expected.add(key)
    state = build_model(ModelConfig(backbone="resnet50_ibn_a")).backbone.state_dict()
    assert set(state) == expected
    assert state["layer1.0.bn1.IN.weight"].shape == (32,)
    assert state["layer3.5.bn1.BN.running_mean"].shape == (128,)
    assert "layer4.0.bn1.running_var" in state


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(backbone="resnet5O"), "near it: .*resnet50"),
        (ModelConfig(backbone="resnet50_ibn"), "resnet50_ibn_a"),
        (ModelConfig(backbone="resnet18", backbone_args={"colour": 3}), "colour"),
        (ModelConfig(backbone="convnext_atto_ibn_a"), "layer1"),
        (ModelConfig(backbone="resnet50_ibn_a", pretrained=True), "model.weights"),
        *((from_tree(recipe(f"domainmix{kind}-ibn")).model, "model.weights") for kind in ("", "-cameras")),
    ],
)
def test_unusable_configurations_say_why(config: ModelConfig, message: str) -> None:
    with pytest.raises(DmxError, match=message):
        build_model(config)


def test_discriminator_is_the_papers_by_default() -> None:
    layers = list(Discriminator(2048))
    widths = [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)]
    assert widths == [(2048, 1024), (1024, 512), (512, 256), (256, 2)]
    between = [type(m) for m in layers]
    assert between == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU] * 3 + [nn.Linear]
    assert {m.negative_slope for m in layers if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert Discriminator(8, domains=3, hidden=(6,))(torch.randn(5, 8)).shape == (5, 3)
    assert Discriminator(8, hidden=())(torch.randn(5, 8)).shape == (5, 2)


@pytest.mark.parametrize("width", [256, 2048])
def test_discriminator_begins_undecided(width: int) -> None:
    """Large first logits would leave neither it nor the backbone a gradient for the few steps it trains."""
    torch.manual_seed(0)
    features = torch.randn(64, width)
    logits = Discriminator(width).train()(features)
    assert logits.abs().max() < 2
    assert domain_balance_loss(logits) < 0.2


def test_synchronised_batch_norm_alone_is_batch_norm() -> None:
    plain = narrow(backbone="resnet18_ibn_a")
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    images = torch.randn(4, 3, 64, 32)
    expected = plain(images)[1]
    plain.load_state_dict(state)
    parameters = dict(plain.named_parameters())
    converted = synchronise_batchnorm(plain)
    assert isinstance(converted.neck, SynchronisedBatchNorm)
    assert list(converted.state_dict()) == list(state)
    assert all(parameter is parameters[name] for name, parameter in converted.named_parameters())
    torch.testing.assert_close(converted(images)[1], expected, rtol=0, atol=0)


def test_conversion_keeps_fused_activations() -> None:
    """EfficientNets use timm's BatchNormAct2d."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="efficientnet_lite0"))
    images = torch.randn(2, 3, 64, 32)
    expected = model.eval()(images)[0]
    torch.testing.assert_close(synchronise_batchnorm(model).eval()(images)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("convert", [False, True])
def test_frozen_statistics_use_the_batch_and_leave_the_buffers(convert: bool) -> None:
    discriminator: nn.Module = Discriminator(8, hidden=(6, 5)).train()
    if convert:
        discriminator = synchronise_batchnorm(discriminator)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    x = torch.randn(7, 8)
    with frozen_statistics(discriminator):
        y = discriminator(x)
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(discriminator(x), y)  # training mode: the batch's statistics both times
    assert not torch.equal(discriminator.state_dict()["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize("name", OSNETS)
def test_osnets_give_a_map_and_learn(name: str) -> None:
    """Every parameter has a gradient, and a map is a 16th of the image."""
    model = build_model(ModelConfig(backbone=name))
    assert model.backbone(torch.randn(2, 3, 96, 48)).shape == (2, model.width, 6, 3)
    _, b = model(torch.randn(4, 3, 96, 48))
    b.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_osnet_has_the_published_size() -> None:
    """2.2 M parameters (table 1 of the paper), with the fc of 512 x 512 and its norm, which is not here."""
    backbone = build_model(ModelConfig(backbone="osnet_x1_0")).backbone
    counted = sum(parameter.numel() for parameter in backbone.parameters()) + 512 * 512 + 3 * 512
    assert round(counted / 1e6, 1) == 2.2


def test_osnets_take_no_arguments_and_have_no_weights_of_timm() -> None:
    with pytest.raises(DmxError, match=r"osnet_x1_0': wanted no backbone_args"):
        build_model(ModelConfig(backbone="osnet_x1_0", backbone_args={"depth": 3}))
    with pytest.raises(DmxError, match=r"download torchreid's weights"):
        build_model(ModelConfig(backbone="osnet_x1_0", pretrained=True))
    with pytest.raises(DmxError, match=r"near it: .*osnet_x1_0"):
        build_model(ModelConfig(backbone="osnet_1_0"))


def test_the_generalised_mean_is_the_formula_and_learns() -> None:
    model = narrow(pooling="gem")
    images = torch.randn(4, 3, 64, 32)
    model.backbone.eval()
    maps = model.backbone(images)
    f, _ = model(images)
    torch.testing.assert_close(f, maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))
    f.sum().backward()
    exponent = model.get_parameter("pooling.p")
    assert exponent.grad is not None
    assert exponent.grad != 0
    with torch.no_grad():
        exponent.fill_(1)
    mean, _ = narrow_like(model)(images)
    torch.testing.assert_close(model(images)[0], mean, atol=1e-5, rtol=1e-5)


def narrow_like(model: nn.Module) -> nn.Module:
    """The same weights with the mean as pooling."""
    other = narrow()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pooling.p"})
    other.backbone.eval()
    return other


def test_the_generalised_mean_stays_in_range_in_half_precision() -> None:
    """100 cubed is beyond float16, and 1e-3 cubed below it."""
    pool = GeM()
    for value in (100.0, 1e-2):
        found = pool(torch.full((1, 2, 4, 4), value, dtype=torch.float16))
        torch.testing.assert_close(found, torch.full((1, 2), value, dtype=torch.float16))


def test_the_generalised_mean_wants_a_map() -> None:
    model = build_model(
        ModelConfig(
            backbone="vit_tiny_patch16_224",
            backbone_args={"img_size": (64, 32), "depth": 1},
            pooling="gem",
        )
    )
    with pytest.raises(DmxError, match=r"model\.pooling: gem wants a map"):
        model(torch.randn(2, 3, 64, 32))
