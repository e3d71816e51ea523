"""Architectures: the names that released checkpoints use, shapes, sizes, initialisation, activations."""

import math

import pytest
import torch
from torch import nn

import models
import models.__main__ as table
import utils

# Some keys, typed from the naming of kuangliu/pytorch-cifar and yaodongyu/TRADES.
KEYS = {
    "preactresnet-18": {"conv1.weight": (64, 3, 3, 3), "layer2.0.shortcut.0.weight": (128, 64, 1, 1),
                        "layer4.1.bn2.running_var": (512,), "bn.num_batches_tracked": ()},
    "preactresnet-50": {"layer1.0.shortcut.0.weight": (256, 64, 1, 1),
                        "layer4.0.conv3.weight": (2048, 512, 1, 1)},
    "wrn-34-10": {"conv1.weight": (16, 3, 3, 3), "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
                  "block2.layer.4.conv2.weight": (320, 320, 3, 3), "bn1.running_mean": (640,),
                  "block3.layer.0.conv1.weight": (640, 320, 3, 3), "fc.weight": (10, 640)},
    "resnet-18": {"conv1.weight": (64, 3, 3, 3), "bn1.weight": (64,), "linear.weight": (10, 512),
                  "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "layer3.0.shortcut.1.running_var": (256,)},
    "senet-18": {"layer1.0.fc1.weight": (4, 64, 1, 1), "layer4.1.fc2.bias": (512,)},
    "densenet-121": {"dense1.5.conv1.weight": (128, 224, 1, 1), "trans2.conv.weight": (256, 512, 1, 1)},
    "googlenet": {"pre_layers.0.weight": (192, 3, 3, 3), "a3.b2.3.weight": (128, 96, 3, 3),
                  "b4.b3.6.bias": (64,), "e4.b4.2.running_var": (128,)},
    "dpn-92": {"layer3.19.conv1.weight": (384, 1504, 1, 1), "layer4.2.bn3.running_var": (2176,)},
    "resnext-29": {"conv1.weight": (64, 3, 1, 1), "layer2.1.conv2.weight": (256, 128, 3, 3)},
    "regnetx-200mf": {"layer3.3.bn3.bias": (152,), "layer4.6.conv2.weight": (368, 8, 3, 3)},
}
# Keys of a whole state dict: a layer too many or too few shows.
NUMBER_OF_KEYS = {
    "preactresnet-18": 107, "preactresnet-50": 300, "wrn-28-10": 155, "wrn-34-10": 191, "wrn-34-20": 191,
    "resnet-18": 122, "resnet-50": 320, "senet-18": 139, "densenet-121": 722, "densenet-201": 1202,
    "googlenet": 450, "dpn-26": 176, "dpn-92": 572, "resnext-29": 188, "regnetx-200mf": 266,
    "regnetx-400mf": 428, "tiny": 59,
}


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return models.build(name, **kwargs)


@pytest.mark.parametrize("name", NUMBER_OF_KEYS)
def test_state_dict_names_and_shapes(name):
    state = on_meta(name, normalize=models.CIFAR_NORMALIZE, bf16=True).state_dict()
    assert {k: tuple(state[k].shape) for k in KEYS.get(name, ())} == KEYS.get(name, {})
    assert list(state)[-1] == ("fc.bias" if "wrn" in name else "linear.bias")
    assert not [k for k in state if "normal" in k or "act" in k]
    assert len(state) == NUMBER_OF_KEYS[name]


@pytest.mark.parametrize("name", table.TABLE_11)
def test_checkpoint_size_is_table_11s(name):
    """Of the file that torch.save writes; wrn-34-10's has the sub_block1 of the field's checkpoints."""
    assert table.checkpoint_mb(name) == pytest.approx(table.TABLE_11[name], rel=0.005)


def test_multiply_adds():
    """Tiny's stem has a stride of 2, so that its first stage has 16x16 pixels."""
    stem, first, linear = 3 * 16 * 9 * 16**2, 2 * 16 * 16 * 9 * 16**2, 128 * 10
    # half the size, twice the width: the same thrice
    later = 16 * 32 * 9 * 8**2 + 32 * 32 * 9 * 8**2 + 16 * 32 * 8**2
    assert table.multiply_adds("tiny") == stem + first + 3 * later + linear


# Without the larger ones of two that share their code.
@pytest.mark.parametrize("name", [n for n in models.MODELS if n not in (
    "wrn-28-10", "wrn-34-10", "wrn-34-20", "densenet-201", "dpn-92", "preactresnet-50", "regnetx-400mf")])
def test_output_gradients_and_independence_of_the_batch(name):
    torch.manual_seed(0)
    model = models.build(name, num_classes=7, normalize=models.CIFAR_NORMALIZE)
    x = torch.rand(2, 3, 32, 32)
    model.eval()
    out = model(x)
    assert out.shape == (2, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
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


def test_normalisation_is_inside():
    plain = models.build("tiny").eval()
    normalised = models.build("tiny", normalize=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))).eval()
    normalised.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    by_hand = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(normalised(x), plain(by_hand))


def gradients(model, logits, x):
    return torch.autograd.grad(nn.functional.cross_entropy(logits, torch.arange(len(x))),
                               [x, *model.parameters()])


def test_bf16_is_autocast_around_the_plain_model_bit_for_bit():
    torch.manual_seed(0)
    plain = models.build("tiny", normalize=models.CIFAR_NORMALIZE)
    model = models.build("tiny", normalize=models.CIFAR_NORMALIZE, bf16=True)
    model.load_state_dict(plain.state_dict())
    x = torch.rand(4, 3, 32, 32).requires_grad_()
    logits = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        want = plain(x)
    assert want.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, want.float()) and not torch.equal(logits, plain(x))
    assert all(map(torch.equal, gradients(model, logits, x), gradients(plain, want.float(), x)))
    assert all(v.dtype in (torch.float32, torch.int64) for v in model.state_dict().values())


def test_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert utils.set_precision(None, cpu) == "fp32" and utils.set_precision(None, cuda) == "tf32"
    assert torch.backends.cudnn.allow_tf32
    assert utils.set_precision("fp32", cuda) == "fp32" and not torch.backends.cudnn.allow_tf32
    with pytest.raises(utils.InputError):
        utils.set_precision("tf32", cpu)
    monkeypatch.setattr(utils, "cpu_info", lambda: "flags\t: fpu avx2 avx512_bf16")
    assert utils.set_precision("bf16", cpu) == "bf16"
    monkeypatch.setattr(utils, "cpu_info", lambda: "flags\t: fpu avx2 avx512_vnni")
    with pytest.raises(utils.InputError):
        utils.set_precision("bf16", cpu)


class Small(models.Network):
    """Quick to compile."""

    def __init__(self, num_classes=10, act=nn.ReLU):
        super().__init__()
        self.conv1, self.bn, self.act = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), act()
        self.linear = nn.Linear(512, num_classes)

    def logits(self, x):
        return self.linear(self.act(self.bn(self.conv1(x))).flatten(1))


def test_an_epoch_compiles_all_that_later_ones_need(train, tmp_path, monkeypatch):
    """Whatever toggles between train and eval, frozen and not. The last, smaller batch runs uncompiled."""
    monkeypatch.setitem(models.MODELS, "tiny", Small)
    graphs, seen, compile, save = [], [], torch.compile, utils.save
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    monkeypatch.setattr(utils, "save", lambda *a: seen.append(len(graphs)) or save(*a))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):  # 8: torch's own
        status, _, err = train("--batch-size", 40, "--steps", 2, "--compile")
    torch._dynamo.reset()
    assert status == 0, err
    # attack, update, clean passes, and, in BN train mode, the attack's last forward, which needs no gradient
    assert seen == [4, 4]
    saved = utils.load_checkpoint(tmp_path / "run" / "last.pt")["state_dict"]
    assert saved.keys() == Small().state_dict().keys()  # it is compiled in place


def test_initialisation():
    torch.manual_seed(0)
    wrn = models.build("wrn-34-10")
    for name, m in wrn.named_modules():
        if isinstance(m, nn.Conv2d):
            want = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
            assert m.weight.std().item() == pytest.approx(want, rel=0.1), name
    assert wrn.fc.bias.abs().sum() == 0
    # torch's default: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    conv = models.build("preactresnet-18").layer3[0].conv1
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
    "silu": (-1 / (1 + math.exp(1)), 0.5 / (1 + math.exp(-0.5))),
}


@pytest.mark.parametrize("name", ACTIVATION_VALUES)
def test_activations_are_what_they_are_called_and_used_throughout(name):
    got = models.ACTIVATIONS[name]()(torch.tensor([-1.0, 0.5], dtype=torch.float64)).tolist()
    assert got == pytest.approx(ACTIVATION_VALUES[name], abs=1e-7)
    model = models.build("tiny", activation=name)
    others = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.Identity)
    acts = [m for m in model.modules() if not list(m.children()) and not isinstance(m, others)]
    assert len(acts) == 5 and {type(a) for a in acts} == {type(models.ACTIVATIONS[name]())}


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="preactresnet18.*preactresnet-18"):
        models.build("preactresnet18")
