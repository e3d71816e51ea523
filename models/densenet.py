"""DenseNets (Huang et al., 2017), bottlenecked and halving the channels between stages; names and layers as
in kuangliu/pytorch-cifar.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .network import Network


class Bottleneck(nn.Module):
    """BN - act - conv1x1 - BN - act - conv3x3; the growth_rate new channels come before the input's."""

    def __init__(self, in_planes, growth_rate, act):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.act = act()

    def forward(self, x):
        out = self.conv1(self.act(self.bn1(x)))
        out = self.conv2(self.act(self.bn2(out)))
        return torch.cat((out, x), 1)


class Transition(nn.Module):
    """BN - act - conv1x1, then 2x2 average pooling."""

    def __init__(self, in_planes, out_planes, act):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_planes)
        self.conv = nn.Conv2d(in_planes, out_planes, 1, bias=False)
        self.act = act()

    def forward(self, x):
        return F.avg_pool2d(self.conv(self.act(self.bn(x))), 2)


class DenseNet(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Four stages of num_blocks[i] bottlenecks."""

    def __init__(self, num_blocks, growth_rate, num_classes, act):
        super().__init__()
        planes = 2 * growth_rate
        self.conv1 = nn.Conv2d(3, planes, 3, padding=1, bias=False)
        for i, n in enumerate(num_blocks, 1):
            if i > 1:
                setattr(self, f"trans{i - 1}", Transition(planes, planes // 2, act))
                planes //= 2
            blocks = [Bottleneck(planes + j * growth_rate, growth_rate, act) for j in range(n)]
            setattr(self, f"dense{i}", nn.Sequential(*blocks))
            planes += n * growth_rate
        self.bn = nn.BatchNorm2d(planes)
        self.act = act()
        self.linear = nn.Linear(planes, num_classes)

    def logits(self, x):
        out = self.conv1(x)
        out = self.trans1(self.dense1(out))
        out = self.trans2(self.dense2(out))
        out = self.trans3(self.dense3(out))
        out = self.act(self.bn(self.dense4(out))).mean((2, 3))
        return self.linear(out)
