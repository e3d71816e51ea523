"""Pre-activation ResNets (He et al., 2016), as Pang et al. (2021) use them under the name "ResNet".

Names and layers as in kuangliu/pytorch-cifar, plus the final `bn` and activation before the pooling that the
authors' released code has.
"""

from torch import nn

from .network import Network


class PreActBlock(nn.Module):
    """BN - act - conv3x3 - BN - act - conv3x3, plus the shortcut."""

    expansion = 1

    def __init__(self, in_planes, planes, stride, act):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.act = act()
        self.shortcut = projection(in_planes, planes, stride)

    def forward(self, x):
        out = self.act(self.bn1(x))
        # a projection sees the activated input, the identity the raw one
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.bn2(out)))
        return out + shortcut


class PreActBottleneck(nn.Module):
    """BN - act - conv1x1 - BN - act - conv3x3 - BN - act - conv1x1 (four times as wide), plus shortcut."""

    expansion = 4

    def __init__(self, in_planes, planes, stride, act):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.act = act()
        self.shortcut = projection(in_planes, 4 * planes, stride)

    def forward(self, x):
        out = self.act(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.bn2(out)))
        out = self.conv3(self.act(self.bn3(out)))
        return out + shortcut


def projection(in_planes, out_planes, stride):
    """The 1x1 convolution of a shortcut that changes shape, or None where the identity will do."""
    if stride == 1 and in_planes == out_planes:
        return None
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False))


class PreActResNet(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Four stages of width, 2, 4 and 8 times width."""

    def __init__(self, block, num_blocks, num_classes, act, width=64, stem_stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        in_planes = width
        for i, n in enumerate(num_blocks):
            planes = width * 2**i
            blocks = []
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(in_planes, planes, stride, act))
                in_planes = planes * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(in_planes)
        self.act = act()
        self.linear = nn.Linear(in_planes, num_classes)

    def logits(self, x):
        out = self.conv1(x)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        out = self.act(self.bn(out)).mean((2, 3))
        return self.linear(out)
