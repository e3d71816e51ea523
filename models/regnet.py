"""RegNetX (Radosavovic et al., 2020); names and layers as in kuangliu/pytorch-cifar, whose stem has 64
channels and stride 1 and whose first two stages keep the 32x32 resolution.
"""

from torch import nn

from .network import Network


class Block(nn.Module):
    """conv1x1 - BN - act - grouped conv3x3 - BN - act - conv1x1 - BN, plus the shortcut, then act."""

    def __init__(self, in_planes, planes, group_width, stride, act):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, groups=planes // group_width, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.act = act()
        self.shortcut = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False),
                                          nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act(out + self.shortcut(x))


class RegNetX(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Four stages of depths[i] blocks of widths[i]."""

    def __init__(self, depths, widths, group_width, num_classes, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act = act()
        in_planes = 64
        for i, (depth, planes) in enumerate(zip(depths, widths)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                blocks.append(Block(in_planes, planes, group_width, stride, act))
                in_planes = planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_planes, num_classes)

    def logits(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
