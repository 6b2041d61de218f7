"""The catalogue: every attention, feed-forward, embedding, skip and decoder block, and the loss. Needs torch only.

Letters: B images, C channels, H x W grid, N = H*W queries, M keys, h heads, d = C/h, K classes.
Every feature map is (B, C, H, W). Models and images are put in channels_last memory once, so a map already lies in
memory as (B, H, W, C): `tokens(x)` and 1x1 convolutions then read it as it is, without a copy.

One interface per slot; a block is added by writing its class and one line in the dict below it:
    EMBED      Embed(in_dim, dim, stride, norm)         (B, Cin, H, W) -> (B, C, ceil(H/s), ceil(W/s)); stride 4 is the stem
    ATTENTION  Mixer(dim, heads, reduction, index)      (B, C, H, W) -> (B, C, H, W); index: position of the block in its stage
    FFN        FFN(dim, ratio)                          (B, C, H, W) -> (B, C, H, W)
    NORM       Norm(dim, eps)                           (B, C, H, W) -> (B, C, H, W)
    SKIP       Skip(branch, norms, drop_path)           wraps one branch (attention or FFN) of a block
    HEAD       Head(dims, num_classes, width, rank)     four maps at strides 4, 8, 16, 32 -> (B, K, h, w)
Residual, outer norm and drop-path belong to the skip, never to a mixer (exceptions are commented where they stand).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class UserError(Exception):
    """A user's mistake: the message names the file or flag, what is wrong and what to do; scripts print it as one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Primitives
# ---------------------------------------------------------------------------------------------------------------------

def tokens(x):
    """(B, C, H, W) -> (B, N, C), a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def grid(x, like):
    """(B, N, C) -> (B, C, H, W) with the H x W of the map `like`, channels_last without a copy."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def heads_first(x, heads):
    """(B, N, C) -> (B, h, N, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class MatMul(nn.Module):
    """`a @ b` of two computed tensors, as a module so that a FLOPs hook sees it."""

    def forward(self, a, b):
        return a @ b


class Attend(nn.Module):
    """softmax(q kᵀ / √d + bias) v on F.scaled_dot_product_attention; q (B, h, N, d), k and v (B, h, M, d) -> (B, h, N, d).

    Cost: 2 N M C multiply-adds, whatever the number of heads.
    """

    def forward(self, q, k, v, bias=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Pointwise(nn.Conv2d):
    """A Linear layer on the channels of a map, held as a 1x1 convolution (public files store either shape)."""

    def __init__(self, in_dim, dim, bias=True):
        super().__init__(in_dim, dim, 1, bias=bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map: Transformers' norm, each pixel by itself."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Sequential):
    """Convolution, padded to keep the size at stride 1, then norm, then activation; children `conv`, `norm` (models.fuse folds it)."""

    def __init__(self, conv, norm, act=None):
        super().__init__()
        self.conv = conv
        self.norm = norm
        if act is not None:
            self.act = act


def conv_bn_relu(in_dim, dim, kernel=1, stride=1):
    """mmcv's ConvModule: convolution without bias, BatchNorm, ReLU; He-normal on the fan-out."""
    conv = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return ConvNorm(conv, BatchNorm2d(dim), nn.ReLU())


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drop a sample's whole branch with probability p, scale the rest by 1/(1-p)."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


def resize(x, size):
    """Bilinear, corners not aligned: the interpolation of every decoder here. Keeps channels_last."""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over (B, H, W), with a clear word where a batch of one 1 x 1 map leaves nothing to estimate a variance from."""

    def forward(self, x):
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise UserError("BatchNorm in training mode got one image whose map is 1 x 1: no variance to estimate; "
                            "use --batch-size 2 or more, or larger images")
        return super().forward(x)


NORM = {
    "ln": LayerNorm2d,
    "bn": BatchNorm2d,
}


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings: between the stages, the only places where the resolution falls
# ---------------------------------------------------------------------------------------------------------------------

class OverlapEmbed(ConvNorm):
    """Overlapping patches: a strided 7x7 (stem) or 3x3 convolution, then a norm (SegFormer §3.1; PVTv2 §3.2).

    Zero padding k//2 gives ceil(H/s) for any H. The norm's eps is 1e-5 here, whatever the blocks use.
    """

    def __init__(self, in_dim, dim, stride, norm):
        kernel = 2 * stride - 1
        super().__init__(nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2), norm(dim, eps=1e-5))


EMBED = {
    "overlap": OverlapEmbed,
}


# ---------------------------------------------------------------------------------------------------------------------
# Attention and other token mixers
# ---------------------------------------------------------------------------------------------------------------------

class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from a grid reduced by R in each direction (PVT §3.3; SegFormer §3.1 "efficient").

    q = Wq x;  k, v = Wkv LN(conv_{RxR, stride R}(x)) for R > 1, else Wkv x;  out = Wo softmax(q kᵀ / √d) v
    As in the released code, the reducing convolution has no padding: rows and columns that do not fill a cell are not
    seen as keys, so a map needs H, W >= R. LN has eps 1e-5. Cost: 2NC² + 2MC² + NC² (R > 1) + 2NMC, M = ⌊H/R⌋⌊W/R⌋.
    """

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        self.heads = heads
        self.q = Pointwise(dim, dim)
        self.kv = Pointwise(dim, 2 * dim)
        self.proj = Pointwise(dim, dim)
        self.attend = Attend()
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = LayerNorm2d(dim)
        self.reduction = reduction

    @staticmethod
    def smallest_grid(reduction):
        return reduction

    def forward(self, x):
        y = self.norm(self.sr(x)) if self.reduction > 1 else x      # (B, C, H/R, W/R)
        q = heads_first(tokens(self.q(x)), self.heads)              # (B, h, N, d)
        k, v = (heads_first(t, self.heads) for t in tokens(self.kv(y)).chunk(2, -1))  # (B, h, M, d)
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)       # (B, N, C)
        return self.proj(grid(out, x))


ATTENTION = {
    "sra": SpatialReductionAttention,
}


# ---------------------------------------------------------------------------------------------------------------------
# Feed-forward networks
# ---------------------------------------------------------------------------------------------------------------------

class MixFFN(nn.Module):
    """fc2(GELU(DW3x3(fc1 x))): the zero-padded depth-wise convolution carries position, so no embedding does (SegFormer Eq. 3).

    Cost: 2 r N C² + 9 r N C. No inner shortcut: the residual of Eq. 3 is the block's.
    """

    def __init__(self, dim, ratio):
        super().__init__()
        hidden = dim * ratio
        self.fc1 = Pointwise(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


FFN = {
    "mix": MixFFN,
}


# ---------------------------------------------------------------------------------------------------------------------
# Skips: how a branch F (attention or FFN) joins its input
# ---------------------------------------------------------------------------------------------------------------------

class PreNorm(nn.Module):
    """x + DropPath(F(norm x)): the pre-norm residual of nearly all Transformers here. `norm` makes one norm, e.g. LN with the row's eps."""

    def __init__(self, branch, dim, norm, drop_path):
        super().__init__()
        self.norm = norm(dim)
        self.branch = branch
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.branch(self.norm(x)))


SKIP = {
    "pre": PreNorm,
}


class Block(nn.Sequential):
    """A stage's block: the token-mixing branch, then the channel-mixing one, each in its skip."""

    def __init__(self, attn, ffn):
        super().__init__()
        self.attn = attn
        self.ffn = ffn


# ---------------------------------------------------------------------------------------------------------------------
# Heads: decoders for segmentation, one classifier
# ---------------------------------------------------------------------------------------------------------------------

class Classifier(nn.Module):
    """Mean over the last map's pixels, then Linear: the classification form of every encoder here. (B, C, H, W) -> (B, K)."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, maps):
        return self.fc(maps[-1].mean((2, 3)))


class UpsampledSum(nn.Module):
    """Convolve a concatenation of up-sampled maps with a 1x1 kernel, without up-sampling or concatenating its inputs.

    F cat_i(up(W_i x_i + b_i)) + f = Σ_i up((F_i W_i) x_i) + Σ_i F_i b_i + f
    holds exactly, because bilinear up-sampling is linear, acts on each channel alone and its weights sum to 1. So each
    level is multiplied at its own resolution, with the merged matrix F_i W_i made anew from the two weights at each call:
    same parameters, same function, same gradients, fewer multiply-adds (E² Σ C_i for the merge).
    """

    def __init__(self):
        super().__init__()
        self.merge = MatMul()
        self.project = MatMul()

    def forward(self, fuse, maps, projections=None):
        """fuse: 1x1 convolution over the concatenation; maps, projections: in its order, finest map last -> (B, E, h, w)."""
        weight, bias = fuse.weight.flatten(1), fuse.bias
        if projections is None:
            levels = weight.split([x.shape[1] for x in maps], 1)
        else:
            levels = weight.split([p.out_channels for p in projections], 1)
            levels = [self.merge(f, p.weight.flatten(1)) for f, p in zip(levels, projections)]
            constant = (weight * torch.cat([p.bias for p in projections])).sum(1)       # Σ F_i b_i
            bias = constant if bias is None else bias + constant
        terms = []
        for x, level in zip(maps, levels):
            y = self.project(x.permute(0, 2, 3, 1), level.T)                            # (B, h_i, w_i, E)
            if bias is not None and x is maps[0]:
                y = y + bias                                # on the coarsest map: a constant passes through up()
            terms.append(y.permute(0, 3, 1, 2))
        finest = terms.pop()
        out = finest + resize(terms.pop(), finest.shape[2:])        # a new tensor: adding in place to a view costs copies
        for y in terms:
            out += resize(y, finest.shape[2:])
        return out


class MlpHead(nn.Module):
    """SegFormer's all-MLP decoder (§3.2, Eq. 4), computed by the identity of UpsampledSum.

    Z = ReLU(BN(F cat(up(W4 x4 + b4), .., W1 x1 + b1)));  logits = V dropout2d(Z) + v, at stride 4
    The released code drops whole channels (Dropout2d) and names the levels deepest first, as here. 62 % of SegFormer-B2's
    multiply-adds are F on the up-sampled concatenation (mlp_concat); this form needs 3.4 + 0.6 instead of 42.1 G.
    """
    uses = (0, 1, 2, 3)

    def __init__(self, dims, num_classes, width, rank=None):
        super().__init__()
        self.projections = nn.ModuleList(Pointwise(dim, width) for dim in dims)
        self.fuse = ConvNorm(nn.Conv2d(4 * width, width, 1, bias=False), BatchNorm2d(width))
        nn.init.kaiming_normal_(self.fuse.conv.weight, mode="fan_out", nonlinearity="relu")
        self.sum = UpsampledSum()
        self.act = nn.ReLU()
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = Pointwise(width, num_classes)

    def forward(self, maps):
        x = self.fuse.norm(self.mix(maps))
        return self.classifier(self.dropout(self.act(x)))

    def mix(self, maps):
        return self.sum(self.fuse.conv, maps[::-1], self.projections[::-1])


class MlpConcatHead(MlpHead):
    """The same decoder as the paper draws it: project, up-sample, concatenate, convolve. Same weights, same output, 10x the cost."""

    def mix(self, maps):
        levels = [resize(p(x), maps[0].shape[2:]) for p, x in zip(self.projections, maps)]
        return self.fuse.conv(torch.cat(levels[::-1], 1))


class MergedMlpHead(nn.Module):
    """What is left of MlpHead at inference: Σ up(W'_i x_i), ReLU, classifier, with W'_i = BN ∘ F_i W_i multiplied once and for all."""

    def __init__(self, head):
        super().__init__()
        fuse = head.fuse.conv                                   # its BatchNorm is folded already
        levels = fuse.weight.flatten(1).chunk(4, 1)[::-1]
        self.levels = nn.ModuleList()
        for p, level in zip(head.projections, levels):
            merged = Pointwise(p.in_channels, fuse.out_channels, bias=p is head.projections[-1])
            merged.weight = nn.Parameter((level @ p.weight.flatten(1))[:, :, None, None], requires_grad=False)
            self.levels.append(merged)
        constant = torch.cat([p.bias for p in head.projections][::-1])
        merged.bias = nn.Parameter((fuse.weight.flatten(1) * constant).sum(1) + fuse.bias, requires_grad=False)
        self.act = nn.ReLU(inplace=True)
        self.classifier = head.classifier

    def forward(self, maps):
        x = self.levels[0](maps[0])
        for level, y in zip(self.levels[1:], maps[1:]):
            x += resize(level(y), x.shape[2:])
        return self.classifier(self.act(x))


HEAD = {
    "mlp": MlpHead,
    "mlp_concat": MlpConcatHead,
}


# ---------------------------------------------------------------------------------------------------------------------
# Loss and prediction at the labels' resolution, without logits of that resolution
# ---------------------------------------------------------------------------------------------------------------------

STRIP = 2 ** 20     # elements of up-sampled logits held at once: small enough for a CPU's cache, large enough for a GPU


def _strips(height, row_size):
    """Split the rows of the output into [start, stop) pairs; a function of shapes alone, so that runs repeat bit for bit."""
    rows = max(1, STRIP // row_size)
    return [(y, min(y + rows, height)) for y in range(0, height, rows)]


def _rows(start, stop, height, like):
    """The vertical half of a bilinear resize to `height`, as a matrix: first and last+1 source row, weights (rows, sources)."""
    h = like.shape[2]
    source = ((torch.arange(start, stop, dtype=torch.float64) + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
    first, last = int(source[0]), min(int(source[-1]) + 2, h)
    weights = (1 - (source[:, None] - torch.arange(first, last)).abs()).clamp(min=0)
    return first, last, weights.to(like)


def _upsample_strip(logits, start, stop, size):
    """Rows [start, stop) of the bilinear resize of logits (B, K, h, w) to `size`, class axis last: (B, rows, W, K)."""
    first, last, vertical = _rows(start, stop, size[0], logits)
    wide = F.interpolate(logits[:, :, first:last], (last - first, size[1]), mode="bilinear", align_corners=False)
    wide = wide.permute(0, 2, 3, 1)                                                     # (B, sources, W, K)
    return (vertical @ wide.flatten(2)).unflatten(2, wide.shape[2:])


def _downsample_strip(grad, start, stop, height, like):
    """Gradient of _upsample_strip: (B, rows, W, K) -> first and last+1 row of the logits, and their gradient (B, K, rows', w)."""
    first, last, vertical = _rows(start, stop, height, like)
    wide = (vertical.T @ grad.flatten(2)).unflatten(2, grad.shape[2:]).permute(0, 3, 1, 2)
    shape = (*like.shape[:2], last - first, like.shape[3])
    return first, last, torch.ops.aten.upsample_bilinear2d_backward(wide, wide.shape[2:], shape, False)


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over the strips: soft-max minus one-hot is at hand where the loss is."""

    @staticmethod
    def forward(ctx, logits, labels, count, ignore_index):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        x = logits.to(dtype, memory_format=torch.channels_last)
        size = labels.shape[1:]
        grad = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        total = x.new_zeros(())
        for start, stop in _strips(size[0], x.shape[0] * x.shape[1] * size[1]):
            z = _upsample_strip(x, start, stop, size)                                   # (B, rows, W, K)
            label = labels[:, start:stop, :, None]
            valid = label != ignore_index
            label = label.long().masked_fill(~valid, 0)
            z -= z.amax(-1, keepdim=True)
            picked = z.gather(-1, label)
            norm = z.exp_().sum(-1, keepdim=True)
            total += ((norm.log() - picked) * valid).sum()
            if grad is not None:
                z *= valid / norm
                z.scatter_add_(-1, label, -valid.to(dtype))                             # soft-max minus one-hot
                first, last, part = _downsample_strip(z, start, stop, size[0], x)
                grad[:, :, first:last] += part
        ctx.save_for_backward(grad, count)
        ctx.dtype = logits.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad_output):
        grad, count = ctx.saved_tensors
        return (grad * (grad_output / count)).to(ctx.dtype), None, None, None


class UpsampledCrossEntropy(nn.Module):
    """Cross entropy of bilinearly up-sampled logits, without the up-sampled logits.

    Equals F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=...), whose mean is
    over the labelled pixels; value and gradient are computed strip by strip in O(strip) memory.
    """

    def __init__(self, ignore_index=255):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits, labels, count=None):
        """logits (B, K, h, w), labels (B, H, W) integers -> scalar. count: divide by this number of pixels instead of the
        labelled ones of this batch (for a mean over several processes or accumulated batches). Nothing labelled: 0, gradient 0."""
        if count is None:
            count = (labels != self.ignore_index).sum()
        count = torch.as_tensor(count, device=logits.device).clamp(min=1)
        return _CrossEntropy.apply(logits, labels, count, self.ignore_index)


def upsampled_argmax(views, size):
    """Class of every pixel at `size` from low-resolution logits, without the up-sampled logits -> (B, H, W) int64.

    views: logits (B, K, h_i, w_i), each of its own resolution. One: arg-max of the bilinear resize; several: arg-max of
    the mean of their soft-maxes (multi-scale and flip testing; hand a flipped view over flipped back).
    """
    views = [v.to(torch.promote_types(v.dtype, torch.float32), memory_format=torch.channels_last) for v in views]
    out = []
    for start, stop in _strips(size[0], views[0].shape[0] * size[1] * views[0].shape[1]):
        scores = [_upsample_strip(v, start, stop, size) for v in views]
        out.append((scores[0] if len(scores) == 1 else sum(z.softmax(-1) for z in scores)).argmax(-1))
    return torch.cat(out, 1)
