"""ResNeXts (Xie et al., 2017); names and layers as in kuangliu/pytorch-cifar, with a 1x1 stem."""

from torch import nn

from .network import Network


class Block(nn.Module):
    """conv1x1 - BN - act - grouped conv3x3 - BN - act - conv1x1 (twice as wide) - BN, plus shortcut, act."""

    def __init__(self, in_planes, planes, groups, stride, act):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 2 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * planes)
        self.act = act()
        self.shortcut = nn.Identity()
        if stride != 1 or in_planes != 2 * planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, 2 * planes, 1, stride, bias=False), nn.BatchNorm2d(2 * planes)
            )

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act(out + self.shortcut(x))


class ResNeXt(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Three stages of cardinality groups, each group
    group_width, 2 and 4 times group_width channels wide."""

    def __init__(self, num_blocks, cardinality, group_width, num_classes, act):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act = act()
        in_planes = 64
        for i, n in enumerate(num_blocks):
            planes = cardinality * group_width * 2**i
            blocks = []
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Block(in_planes, planes, cardinality, stride, act))
                in_planes = 2 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_planes, num_classes)

    def logits(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))
