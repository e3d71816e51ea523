"""Architectures: the names that released checkpoints use, shapes, sizes, initialisation, activations."""

import math

import pytest
import torch
from torch import nn

import models
import utils

# First, last and some inner keys, typed from the naming of kuangliu/pytorch-cifar and yaodongyu/TRADES.
KEYS = {
    "preactresnet-18": {
        "conv1.weight": (64, 3, 3, 3), "layer1.0.bn1.weight": (64,), "layer1.1.conv2.weight": (64, 64, 3, 3),
        "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "layer4.1.bn2.running_var": (512,),
        "bn.num_batches_tracked": (), "linear.weight": (10, 512), "linear.bias": (10,),
    },
    "preactresnet-50": {
        "conv1.weight": (64, 3, 3, 3), "layer1.0.shortcut.0.weight": (256, 64, 1, 1), "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.0.conv3.weight": (2048, 512, 1, 1), "bn.weight": (2048,), "linear.weight": (10, 2048), "linear.bias": (10,),
    },
    "wrn-34-10": {
        "conv1.weight": (16, 3, 3, 3), "block1.layer.0.bn1.weight": (16,), "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
        "block2.layer.4.conv2.weight": (320, 320, 3, 3), "block3.layer.0.conv1.weight": (640, 320, 3, 3),
        "bn1.running_mean": (640,), "fc.weight": (10, 640), "fc.bias": (10,),
    },
    "wrn-34-20": {
        "conv1.weight": (16, 3, 3, 3), "block1.layer.0.convShortcut.weight": (320, 16, 1, 1),
        "block3.layer.4.conv2.weight": (1280, 1280, 3, 3), "bn1.weight": (1280,), "fc.weight": (10, 1280), "fc.bias": (10,),
    },
}
TABLE_11_MB = {"preactresnet-18": 44.70, "preactresnet-50": 94.28}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return models.build(name, **kwargs)


@pytest.mark.parametrize("name", KEYS)
def test_state_dict_names_and_shapes(name):
    state = on_meta(name).state_dict()
    want = KEYS[name]
    assert {k: tuple(state[k].shape) for k in want} == want
    assert list(state)[0] == list(want)[0] and list(state)[-1] == list(want)[-1]
    assert not [k for k in state if "normal" in k or "act" in k]


@pytest.mark.parametrize("name", TABLE_11_MB)
def test_checkpoint_size_is_table_11s(name):
    size = sum(v.numel() * v.element_size() for v in on_meta(name).state_dict().values()) / 1e6
    assert size == pytest.approx(TABLE_11_MB[name], rel=0.005)


def test_wrn_34_10_is_table_11s_with_the_block_that_no_forward_uses():
    model = on_meta("wrn-34-10")
    extra = sum(v.numel() * v.element_size() for k, v in model.state_dict().items() if k.startswith("block1."))
    size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert (size + extra) / 1e6 == pytest.approx(193.20, rel=0.005)


def test_tiny_is_tiny_and_four_times_cheaper_than_without_its_stride():
    assert sum(p.numel() for p in on_meta("tiny").parameters()) < 0.5e6
    assert models.build("tiny").conv1(torch.rand(1, 3, 32, 32)).shape == (1, 16, 16, 16)


@pytest.mark.parametrize("name", ["tiny", "preactresnet-18", "preactresnet-50", "wrn-34-10"])
def test_output_gradients_and_independence_of_the_batch(name):
    torch.manual_seed(0)
    model = models.build(name, num_classes=7, normalize=models.CIFAR_NORMALIZE)
    x = torch.rand(2, 3, 32, 32)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    with torch.no_grad():
        out = model(x)
        assert out.shape == (2, 7)
        torch.testing.assert_close(out, torch.cat([model(x[:1]), model(x[1:])]), rtol=1e-4, atol=1e-4)


def test_a_preactivation_block_is_what_he_et_al_draw():
    """The first block of the second stage, written out: the projection sees the activated input."""
    torch.manual_seed(0)
    block = models.build("preactresnet-18").layer2[0].eval()
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        a = block.bn1(x).clamp(min=0)
        want = block.conv2(block.bn2(block.conv1(a)).clamp(min=0)) + block.shortcut[0](a)
        assert torch.equal(block(x), want)
        block = models.build("wrn-34-10").block2.layer[1].eval()  # and one with an identity
        x = torch.randn(2, 320, 8, 8)
        want = block.conv2(block.bn2(block.conv1(block.bn1(x).clamp(min=0))).clamp(min=0)) + x
        assert torch.equal(block(x.clone()), want)


def test_normalisation_is_inside_and_leaves_no_key():
    plain, normalised = models.build("tiny"), models.build("tiny", normalize=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert list(plain.state_dict()) == list(normalised.state_dict())
    normalised.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(normalised.eval()(x), plain.eval()(by_hand))


def test_initialisation():
    torch.manual_seed(0)
    wrn = models.build("wrn-34-10")
    for name, m in wrn.named_modules():
        if isinstance(m, nn.Conv2d):
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels)), rel=0.1), name
    assert wrn.fc.bias.abs().sum() == 0
    conv = models.build("preactresnet-18").layer3[0].conv1       # torch's default: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    assert conv.weight.abs().max().item() == pytest.approx(1 / math.sqrt(128 * 9), rel=1e-3)


# Values at x = -1 and x = 0.5, from the functions' definitions.
ACTIVATION_VALUES = {
    "relu": (0, 0.5),
    "leakyrelu": (-0.1, 0.5),
    "elu": (math.exp(-1) - 1, 0.5),
    "celu": (1.2 * (math.exp(-1 / 1.2) - 1), 0.5),
    "selu": (1.0507009873554805 * 1.6732632423543772 * (math.exp(-1) - 1), 1.0507009873554805 * 0.5),
    "gelu": (-0.5 * (1 + math.erf(-1 / math.sqrt(2))), 0.25 * (1 + math.erf(0.5 / math.sqrt(2)))),
    "softplus": (math.log(1 + math.exp(-10)) / 10, math.log(1 + math.exp(5)) / 10),
    "tanh": (math.tanh(-1), math.tanh(0.5)),
}


@pytest.mark.parametrize("name", models.ACTIVATIONS)
def test_activations_are_table_6s_and_used_throughout(name):
    got = models.ACTIVATIONS[name]()(torch.tensor([-1.0, 0.5], dtype=torch.float64)).tolist()
    assert got == pytest.approx(ACTIVATION_VALUES[name], abs=1e-7)
    model = models.build("tiny", activation=name)
    acts = [m for m in model.modules() if not list(m.children()) and not isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Identity))]
    assert len(acts) == 5 and {type(a) for a in acts} == {type(models.ACTIVATIONS[name]())}


@pytest.mark.parametrize("kwargs, message", [
    ({"name": "preactresnet18"}, "unknown model 'preactresnet18': did you mean 'preactresnet-18'"),
    ({"name": "tiny", "activation": "swish"}, "unknown activation 'swish'"),
])
def test_unknown_names(kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.build(**kwargs)


def test_a_released_wrn_checkpoint_loads(tmp_path):
    """Keys as TRADES' and the authors' files have them: `module.` in front, and the unused sub_block1."""
    state = {f"module.{k}": v for k, v in models.build("wrn-34-10").state_dict().items()}
    state |= {k.replace("block1", "sub_block1"): v for k, v in state.items() if k.startswith("module.block1.")}
    torch.save({"state_dict": state}, tmp_path / "released.pt")
    loaded = utils.load_checkpoint(tmp_path / "released.pt")["state_dict"]
    model = models.build("wrn-34-10")
    utils.load_weights(model, loaded, "released.pt")
    assert torch.equal(model.fc.weight, state["module.fc.weight"])
