"""Networks that no package of the peers has, as PyTorch modules, written after the code of those who made them."""

import torch
from torch import nn
from torch.nn import functional as f


def conv_bn(inputs, outputs, kernel=3, stride=1, groups=1, act=nn.ReLU, dilation=1):
    padding = dilation * (kernel - 1) // 2
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
                         nn.BatchNorm2d(outputs), act() if act else nn.Identity())


class UNet(nn.Module):
    """Ronneberger, Fischer, Brox 2015, as it is written today: padded, with batch norm and transposed convolutions."""

    def __init__(self, classes=4, width=16, depth=3):
        super().__init__()
        widths = [width << i for i in range(depth + 1)]
        self.down = nn.ModuleList(self._double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
        self.joined = nn.ModuleList(self._double(2 * w, w) for w in widths[-2::-1])
        self.scores = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(inputs, outputs):
        return nn.Sequential(conv_bn(inputs, outputs), conv_bn(outputs, outputs))

    def forward(self, x):
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if not i else f.max_pool2d(x, 2))
            skips.append(x)
        for up, block, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, up(x)], 1))
        return self.scores(x)


class Ghost(nn.Module):
    """Half of the channels by a convolution, the other half of these, each by itself."""

    def __init__(self, inputs, outputs, relu):
        super().__init__()
        self.outputs, half, act = outputs, -(-outputs // 2), nn.ReLU if relu else None
        self.primary, self.cheap = conv_bn(inputs, half, 1, act=act), conv_bn(half, half, 3, groups=half, act=act)

    def forward(self, x):
        first = self.primary(x)
        return torch.cat([first, self.cheap(first)], 1)[:, :self.outputs]


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * f.hardsigmoid(self.expand(f.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class GhostBottleneck(nn.Module):
    def __init__(self, inputs, middle, outputs, kernel, stride, excite):
        super().__init__()
        self.parts = nn.Sequential(
            Ghost(inputs, middle, True),
            *([conv_bn(middle, middle, kernel, stride, middle, None)] if stride > 1 else []),
            *([SqueezeExcite(middle)] if excite else []), Ghost(middle, outputs, False))
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else nn.Sequential(
            conv_bn(inputs, inputs, kernel, stride, inputs, None), conv_bn(inputs, outputs, 1, act=None))

    def forward(self, x):
        return self.parts(x) + self.shortcut(x)


class GhostNet(nn.Module):
    """Han et al. 2020, the network of width 1.0."""

    BLOCKS = (  # kernel, middle, outputs, excite, stride
        (3, 16, 16, 0, 1), (3, 48, 24, 0, 2), (3, 72, 24, 0, 1), (5, 72, 40, 1, 2), (5, 120, 40, 1, 1),
        (3, 240, 80, 0, 2), (3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 1, 1),
        (3, 672, 112, 1, 1), (5, 672, 160, 1, 2), (5, 960, 160, 0, 1), (5, 960, 160, 1, 1), (5, 960, 160, 0, 1),
        (5, 960, 160, 1, 1))

    def __init__(self, classes=1000):
        super().__init__()
        blocks, inputs = [conv_bn(3, 16, stride=2)], 16
        for kernel, middle, outputs, excite, stride in self.BLOCKS:
            blocks.append(GhostBottleneck(inputs, middle, outputs, kernel, stride, excite))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks, conv_bn(inputs, 960, 1))
        self.head, self.classifier = nn.Sequential(nn.Conv2d(960, 1280, 1), nn.ReLU()), nn.Linear(1280, classes)

    def forward(self, x):
        return self.classifier(self.head(self.blocks(x).mean((2, 3), keepdim=True)).flatten(1))


class CrossStage(nn.Module):
    """YOLOv8's C2f: a part goes through bottlenecks, and all of what these make is joined."""

    def __init__(self, inputs, outputs, count, shortcut=True):
        super().__init__()
        half = outputs // 2
        self.half, self.shortcut = half, shortcut
        self.first = conv_bn(inputs, 2 * half, 1, act=nn.SiLU)
        self.parts = nn.ModuleList(nn.Sequential(conv_bn(half, half, act=nn.SiLU), conv_bn(half, half, act=nn.SiLU))
                                   for _ in range(count))
        self.last = conv_bn((2 + count) * half, outputs, 1, act=nn.SiLU)

    def forward(self, x):
        made = list(self.first(x).split(self.half, 1))
        for part in self.parts:
            made.append(part(made[-1]) + made[-1] if self.shortcut else part(made[-1]))
        return self.last(torch.cat(made, 1))


class Detector(nn.Module):
    """As YOLOv8 is made: SiLU, stages of joined bottlenecks, pools of several sizes, a pyramid of features, and at two
    of its scales scores of classes, a map each, and boxes."""

    def __init__(self, classes=5, width=16):
        super().__init__()
        w = width
        self.stem = nn.Sequential(conv_bn(3, w, 3, 2, act=nn.SiLU), conv_bn(w, 2 * w, 3, 2, act=nn.SiLU),
                                  CrossStage(2 * w, 2 * w, 1), conv_bn(2 * w, 4 * w, 3, 2, act=nn.SiLU))
        self.p3 = CrossStage(4 * w, 4 * w, 2)
        self.p4 = nn.Sequential(conv_bn(4 * w, 8 * w, 3, 2, act=nn.SiLU), CrossStage(8 * w, 8 * w, 2))
        self.pooled = conv_bn(8 * w, 4 * w, 1, act=nn.SiLU)
        self.pools_joined = conv_bn(16 * w, 8 * w, 1, act=nn.SiLU)
        self.up3 = CrossStage(12 * w, 4 * w, 1, False)
        self.heads = nn.ModuleList(nn.Sequential(conv_bn(n, n, act=nn.SiLU), nn.Conv2d(n, classes, 1))
                                   for n in (4 * w, 8 * w))
        self.boxes = nn.Conv2d(4 * w, 4, 1)

    def forward(self, x):
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        pools = [self.pooled(p4)]
        for _ in range(3):
            pools.append(f.max_pool2d(pools[-1], 5, 1, 2))
        p4 = self.pools_joined(torch.cat(pools, 1))
        p3 = self.up3(torch.cat([f.interpolate(p4, scale_factor=2.0, mode="nearest"), p3], 1))
        return {"small": self.heads[0](p3), "large": self.heads[1](p4), "boxes": self.boxes(p3)}


class PNet(nn.Module):
    """The first of MTCNN's three (Zhang et al. 2016), as facenet-pytorch has them: a face or none at each position."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1, self.pool1 = nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


class RNet(nn.Module):
    """The second: of a window of 24 x 24."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1, self.pool1 = nn.Conv2d(3, 28, 3), nn.PReLU(28), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2, self.pool2 = nn.Conv2d(28, 48, 3), nn.PReLU(48), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x):
        x = self.pool2(self.prelu2(self.conv2(self.pool1(self.prelu1(self.conv1(x))))))
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).contiguous()
        x = self.prelu4(self.dense4(x.view(x.shape[0], -1)))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)


class ONet(nn.Module):
    """The third: of a window of 48 x 48."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1, self.pool1 = nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2, self.pool2 = nn.Conv2d(32, 64, 3), nn.PReLU(64), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3, self.pool3 = nn.Conv2d(64, 64, 3), nn.PReLU(64), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x):
        x = self.pool2(self.prelu2(self.conv2(self.pool1(self.prelu1(self.conv1(x))))))
        x = self.prelu4(self.conv4(self.pool3(self.prelu3(self.conv3(x))))).permute(0, 3, 2, 1).contiguous()
        x = self.prelu5(self.dense5(x.view(x.shape[0], -1)))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(1)


class UltraFace(nn.Module):
    """The slim network of Ultra-Light-Fast-Generic-Face-Detector-1MB: depthwise blocks, and at four scales scores and
    boxes, all anchors in one row."""

    def __init__(self, width=16):
        super().__init__()
        w = width

        def block(inputs, outputs, stride):
            return nn.Sequential(conv_bn(inputs, inputs, 3, stride, inputs), conv_bn(inputs, outputs, 1))

        plan = [(w, 2 * w, 1), (2 * w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1),
                (4 * w, 4 * w, 1), (4 * w, 4 * w, 1), (4 * w, 8 * w, 2), (8 * w, 8 * w, 1), (8 * w, 8 * w, 1),
                (8 * w, 16 * w, 2), (16 * w, 16 * w, 1)]
        self.base = nn.Sequential(conv_bn(3, w, 3, 2), *(block(*each) for each in plan))
        self.extra = nn.Sequential(nn.Conv2d(16 * w, 4 * w, 1), nn.ReLU(),
                                   nn.Conv2d(4 * w, 4 * w, 3, 2, 1, groups=4 * w), nn.ReLU(),
                                   nn.Conv2d(4 * w, 16 * w, 1), nn.ReLU())
        anchors = (3, 2, 2, 3)
        widths = (4 * w, 8 * w, 16 * w, 16 * w)
        self.scores = nn.ModuleList(self._head(n, 2 * count, i) for i, (n, count) in enumerate(zip(
            widths, anchors, strict=True)))
        self.boxes = nn.ModuleList(self._head(n, 4 * count, i) for i, (n, count) in enumerate(zip(
            widths, anchors, strict=True)))

    @staticmethod
    def _head(inputs, outputs, scale):
        if scale == 3:
            return nn.Conv2d(inputs, outputs, 3, padding=1)
        return nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.ReLU(),
                             nn.Conv2d(inputs, outputs, 1))

    def forward(self, x):
        features, rows = [], []
        for i, layer in enumerate(self.base):
            x = layer(x)
            if i in (7, 10, 12):
                features.append(x)
        features.append(self.extra(x))
        for heads, length in ((self.scores, 2), (self.boxes, 4)):
            rows.append(torch.cat([head(x).permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1, length)
                                   for head, x in zip(heads, features, strict=True)], 1))
        return rows[0].softmax(2), rows[1]


class SelectiveKernel(nn.Module):
    """Li et al. 2019 (SKNet): convolutions of several dilations, weighed by a softmax over them for each channel."""

    def __init__(self, channels, branches=2):
        super().__init__()
        self.convs = nn.ModuleList(conv_bn(channels, channels, dilation=i + 1, groups=2) for i in range(branches))
        self.squeeze = nn.Linear(channels, channels // 2)
        self.expand = nn.ModuleList(nn.Linear(channels // 2, channels) for _ in range(branches))

    def forward(self, x):
        branches = torch.cat([conv(x).unsqueeze(1) for conv in self.convs], 1)
        z = self.squeeze(branches.sum(1).mean(-1).mean(-1))
        gates = torch.cat([expand(z).unsqueeze(1) for expand in self.expand], 1).softmax(1)
        return (branches * gates.unsqueeze(-1).unsqueeze(-1)).sum(1)


class SplitAttention(nn.Module):
    """Zhang et al. 2020 (ResNeSt), as its authors write it or, side by side, as timm does."""

    def __init__(self, channels, radix=2, cardinality=2, side_by_side=False):
        super().__init__()
        self.radix, self.cardinality, self.side_by_side = radix, cardinality, side_by_side
        self.conv = conv_bn(channels, channels * radix, groups=cardinality * radix)
        self.squeeze = conv_bn(channels, 4, 1, groups=cardinality)
        self.expand = nn.Conv2d(4, channels * radix, 1, groups=cardinality)

    def forward(self, x):
        x = self.conv(x)
        batch, channels, height, width = x.shape
        if self.side_by_side:
            splits = x.reshape(batch, self.radix, channels // self.radix, height, width)
            total = splits.sum(1)
        else:
            splits = torch.split(x, channels // self.radix, 1)
            total = sum(splits)
        gates = self.expand(self.squeeze(f.adaptive_avg_pool2d(total, 1)))
        gates = gates.view(batch, self.cardinality, self.radix, -1).transpose(1, 2).softmax(1).reshape(batch, -1)
        if self.side_by_side:
            return (splits * gates.reshape(batch, self.radix, channels // self.radix, 1, 1)).sum(1).contiguous()
        gates = torch.split(gates.view(batch, -1, 1, 1), channels // self.radix, 1)
        return sum(gate * split for gate, split in zip(gates, splits, strict=True)).contiguous()


def with_branches(kind, *options):
    """A small network around one of these."""
    return nn.Sequential(conv_bn(3, 8), kind(8, *options), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))
