"""GoogLeNet (Szegedy et al., 2015); names and layers as in kuangliu/pytorch-cifar.

That is with BN after every convolution (which keeps its bias), two 3x3 convolutions for each 5x5 one, one
layer as the stem, and no auxiliary classifiers.
"""

import torch
from torch import nn

from .network import Network

# Output channels: of the 1x1 branch; (reduction, 3x3); (reduction, 5x5); of the pooling branch.
INCEPTIONS = {
    "a3": (64, (96, 128), (16, 32), 32),
    "b3": (128, (128, 192), (32, 96), 64),
    "a4": (192, (96, 208), (16, 48), 64),
    "b4": (160, (112, 224), (24, 64), 64),
    "c4": (128, (128, 256), (24, 64), 64),
    "d4": (112, (144, 288), (32, 64), 64),
    "e4": (256, (160, 320), (32, 128), 128),
    "a5": (256, (160, 320), (32, 128), 128),
    "b5": (384, (192, 384), (48, 128), 128),
}


def conv_bn_act(in_planes, out_planes, kernel_size, act):
    """The three modules of one layer, which keeps height and width."""
    conv = nn.Conv2d(in_planes, out_planes, kernel_size, padding=kernel_size // 2)
    return conv, nn.BatchNorm2d(out_planes), act()


class Inception(nn.Module):
    """Four branches side by side on the same input; see INCEPTIONS for the arguments."""

    def __init__(self, in_planes, n1x1, n3x3, n5x5, pool, act):
        super().__init__()
        reduce3, n3x3 = n3x3
        reduce5, n5x5 = n5x5
        self.out_planes = n1x1 + n3x3 + n5x5 + pool
        self.b1 = nn.Sequential(*conv_bn_act(in_planes, n1x1, 1, act))
        self.b2 = nn.Sequential(*conv_bn_act(in_planes, reduce3, 1, act), *conv_bn_act(reduce3, n3x3, 3, act))
        self.b3 = nn.Sequential(
            *conv_bn_act(in_planes, reduce5, 1, act),
            *conv_bn_act(reduce5, n5x5, 3, act),
            *conv_bn_act(n5x5, n5x5, 3, act),
        )
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *conv_bn_act(in_planes, pool, 1, act))

    def forward(self, x):
        return torch.cat((self.b1(x), self.b2(x), self.b3(x), self.b4(x)), 1)


class GoogLeNet(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Stages 3 to 5 have 2, 5, 2 inception modules."""

    def __init__(self, num_classes, act):
        super().__init__()
        planes = 192
        self.pre_layers = nn.Sequential(*conv_bn_act(3, planes, 3, act))
        for name, branches in INCEPTIONS.items():
            inception = Inception(planes, *branches, act)
            setattr(self, name, inception)
            planes = inception.out_planes
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.linear = nn.Linear(planes, num_classes)

    def logits(self, x):
        out = self.pre_layers(x)
        out = self.maxpool(self.b3(self.a3(out)))
        out = self.maxpool(self.e4(self.d4(self.c4(self.b4(self.a4(out))))))
        out = self.b5(self.a5(out)).mean((2, 3))
        return self.linear(out)
