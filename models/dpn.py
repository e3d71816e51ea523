"""Dual path networks (Chen et al., 2017); names and layers as in kuangliu/pytorch-cifar."""

import torch
from torch import nn

from .network import Network


class Bottleneck(nn.Module):
    """conv1x1 - BN - act - conv3x3 in 32 groups - BN - act - conv1x1 - BN, joined to the shortcut, then act.

    The first out_planes channels are added to those of the shortcut, as in a ResNet; the other `dense` ones
    are appended after the shortcut's, as in a DenseNet. A stage's first block has a projection as shortcut.
    """

    def __init__(self, in_planes, planes, out_planes, dense, stride, first, act):
        super().__init__()
        self.out_planes = out_planes
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_planes + dense, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes + dense)
        self.act = act()
        self.shortcut = nn.Identity()
        if first:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, out_planes + dense, 1, stride, bias=False),
                nn.BatchNorm2d(out_planes + dense),
            )

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = self.shortcut(x)
        d = self.out_planes
        return self.act(torch.cat((shortcut[:, :d] + out[:, :d], shortcut[:, d:], out[:, d:]), 1))


class DPN(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Four stages of 256 to 2048 residual channels."""

    def __init__(self, num_blocks, num_classes, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act = act()
        in_planes = 64
        for i, (n, dense) in enumerate(zip(num_blocks, (16, 32, 24, 128))):
            planes, out_planes = 96 * 2**i, 256 * 2**i
            blocks = []
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Bottleneck(in_planes, planes, out_planes, dense, stride, j == 0, act))
                in_planes = out_planes + (j + 2) * dense
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_planes, num_classes)

    def logits(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
