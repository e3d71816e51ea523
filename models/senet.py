"""Squeeze-and-excitation networks (Hu et al., 2018) of pre-activation blocks; names and layers as in
kuangliu/pytorch-cifar, so with BN and activation after the stem and, unlike preactresnet.py, none before the
pooling.
"""

from torch import nn

from .network import Network


class PreActBlock(nn.Module):
    """BN - act - conv3x3 - BN - act - conv3x3, scaled per channel by a gate in (0, 1), plus the shortcut."""

    def __init__(self, in_planes, planes, stride, act):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.act = act()
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))
        self.fc1 = nn.Conv2d(planes, planes // 16, 1)
        self.fc2 = nn.Conv2d(planes // 16, planes, 1)

    def forward(self, x):
        out = self.act(self.bn1(x))
        # a projection sees the activated input, the identity the raw one
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.bn2(out)))
        gate = self.act(self.fc1(out.mean((2, 3), keepdim=True)))
        gate = self.fc2(gate).sigmoid()  # (B, planes, 1, 1)
        return out * gate + shortcut


class SENet(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Four stages of 64, 128, 256 and 512 planes."""

    def __init__(self, num_blocks, num_classes, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act = act()
        in_planes = 64
        for i, n in enumerate(num_blocks):
            planes = 64 * 2**i
            blocks = []
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(PreActBlock(in_planes, planes, stride, act))
                in_planes = planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_planes, num_classes)

    def logits(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
