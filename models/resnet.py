"""Post-activation ResNets (He et al., 2016, "Deep residual learning"); names and layers as in
kuangliu/pytorch-cifar.

Not the "ResNet" of Pang et al. (2021): that is in preactresnet.py.
"""

from torch import nn

from .network import Network


class BasicBlock(nn.Module):
    """conv3x3 - BN - act - conv3x3 - BN, plus the shortcut, then act."""

    expansion = 1

    def __init__(self, in_planes, planes, stride, act):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act = act()
        self.shortcut = projection(in_planes, planes, stride)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """conv1x1 - BN - act - conv3x3 - BN - act - conv1x1 (four times as wide) - BN, plus shortcut, act."""

    expansion = 4

    def __init__(self, in_planes, planes, stride, act):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.act = act()
        self.shortcut = projection(in_planes, 4 * planes, stride)

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act(out + self.shortcut(x))


def projection(in_planes, out_planes, stride):
    """The shortcut: 1x1 convolution and BN where the shape changes, else the identity."""
    if stride == 1 and in_planes == out_planes:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes))


class ResNet(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Four stages of 64, 128, 256 and 512 planes."""

    def __init__(self, block, num_blocks, num_classes, act):
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
                blocks.append(block(in_planes, planes, stride, act))
                in_planes = planes * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_planes, num_classes)

    def logits(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
