"""Architectures for 32x32 images, by name.

    model = build("preactresnet-18", num_classes=10, activation="relu", normalize=CIFAR_NORMALIZE)
    logits = model(x)          # x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes)

State-dict names follow kuangliu/pytorch-cifar and yaodongyu/TRADES, those of PreActResNets the authors' code
(with a last `bn`), so that checkpoints which the field has released load with strict=True. Names do not say
which function it was: activation, normalisation or shortcut may differ (eval_aa.misfit). "ResNet-18" in Pang
et al. 2021 is the *pre-activation* one, `preactresnet-18`.
"""

from functools import partial

from torch import nn

from .densenet import DenseNet
from .dpn import DPN
from .googlenet import GoogLeNet
from .network import CIFAR_NORMALIZE, Network, Normalize
from .preactresnet import PreActBlock, PreActBottleneck, PreActResNet
from .regnet import RegNetX
from .resnet import BasicBlock, Bottleneck, ResNet
from .resnext import ResNeXt
from .senet import SENet
from .wideresnet import WideResNet

# Table 6's, with the hyper-parameters that Xie et al. (2020) recommend on ImageNet, and SiLU (Swish).
ACTIVATIONS = {
    # in place: every activation here follows a layer that does not need its output
    "relu": partial(nn.ReLU, inplace=True),
    "leakyrelu": partial(nn.LeakyReLU, 0.1),
    "elu": partial(nn.ELU, 1.0),
    "celu": partial(nn.CELU, 1.2),
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "softplus": partial(nn.Softplus, beta=10),
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}

# Each builder takes (num_classes, act), where act() makes an activation module.
MODELS = {
    "preactresnet-18": partial(PreActResNet, PreActBlock, (2, 2, 2, 2)),
    "preactresnet-50": partial(PreActResNet, PreActBottleneck, (3, 4, 6, 3)),
    "wrn-28-10": partial(WideResNet, 28, 10),
    "wrn-34-10": partial(WideResNet, 34, 10),
    "wrn-34-20": partial(WideResNet, 34, 20),
    # post-activation: for comparison, and for others' checkpoints
    "resnet-18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet-50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "senet-18": partial(SENet, (2, 2, 2, 2)),
    "densenet-121": partial(DenseNet, (6, 12, 24, 16), 32),
    "densenet-201": partial(DenseNet, (6, 12, 48, 32), 32),
    "googlenet": GoogLeNet,
    "dpn-26": partial(DPN, (2, 2, 2, 2)),
    "dpn-92": partial(DPN, (3, 4, 20, 3)),
    "resnext-29": partial(ResNeXt, (3, 3, 3), 2, 64),
    "regnetx-200mf": partial(RegNetX, (1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnetx-400mf": partial(RegNetX, (1, 2, 7, 12), (32, 64, 160, 384), 16),
    # For CPUs and tests: 0.3 M parameters, and a stem of stride 2 that makes every layer four times cheaper.
    "tiny": partial(PreActResNet, PreActBlock, (1, 1, 1, 1), width=16, stem_stride=2),
}


def build(name, num_classes=10, activation="relu", normalize=None, bf16=False):
    """A freshly initialised model that maps x (B, 3, 32, 32) in [0, 1] to logits (B, num_classes).

    name: a key of MODELS; activation: a key of ACTIVATIONS; normalize: None or (mean, std), three floats
    each, applied inside the model so that attacks live in [0, 1] (Pang et al.'s PGD-AT: CIFAR_NORMALIZE;
    TRADES: None); bf16: compute under bfloat16 autocast. Raises ValueError for an unknown name.
    """
    for what, key, known in (("model", name, MODELS), ("activation", activation, ACTIVATIONS)):
        if key not in known:
            raise ValueError(f"unknown {what} {key!r}: there is {', '.join(known)}")
    model = MODELS[name](num_classes=num_classes, act=ACTIVATIONS[activation])
    if normalize is not None:
        model.normalize = Normalize(*normalize)
    model.bf16 = bf16
    return model
