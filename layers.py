"""The catalogue: attention, feed-forward, embedding, skip and decoder blocks, and the loss.

Letters: B images, C channels, H x W grid, N = H*W queries, M keys, h heads, d = C/h, K classes,
R the reduction. In heads: C_i channels and N_i pixels of map i (1: stride 4), E the head's width.
Every feature map is (B, C, H, W). Models and images are put in channels_last memory once, so a map
already lies in memory as (B, H, W, C): `tokens(x)` and 1x1 convolutions read it without a copy.

One interface per slot; a block is added by writing its class and one line in the dict below it:
    EMBED      Embed(in_dim, dim, stride, norm)      (B, Cin, H, W) -> (B, C, ceil(H/s), ceil(W/s));
                                                     stride 4 is the stem
    ATTENTION  Mixer(dim, heads, reduction, index)   (B, C, H, W) -> (B, C, H, W); index: place of
                                                     the block in its stage; attribute `reduces`:
                                                     True where it needs a grid of R x R at least
    FFN        FFN(dim, ratio)                       (B, C, H, W) -> (B, C, H, W)
    NORM       Norm(dim, eps)                        (B, C, H, W) -> (B, C, H, W)
    SKIP       Skip(branch, dim, norm, drop_path)    wraps one branch (attention or FFN) of a block
    HEAD       Head(dims, num_classes, width, rank)  maps at strides 4, 8, 16, 32 -> (B, K, h, w);
                                                     attributes `uses`: which of the four it reads,
                                                     `width`: its usual one (None: the row's own)
Residual, outer norm and drop-path belong to the skip, never to a mixer; exceptions are commented.

What the mixers cost for N pixels, and by what they avoid N² products:
    sra, emhsa, dest   quadratic  M = N/R² keys, a cell or a run of pixels each. R is fixed by the
                                  row, so M grows with the image and N M stays N²/R².
    lsra               linear     49 keys, whatever the image: means of a 7x7 division of the map
    ea                 linear     all pixels are keys, but Kᵀ V is multiplied first: a matrix of 64
                                  x 32 channels, whatever N is
    lsrea              linear     ea with lsra's 49 keys: its layers for keys and values act on
                                  49 pixels only
    window, mixer      linear     a pixel sees the 49 of its 7x7 window alone
    msca, mhca         linear     convolutions: a pixel sees its neighbours

LayerNorms have two eps, because the released weights were trained with two: those of blocks and
stages have the row's (1e-6 in MiT), those made inside a mixer or an embedding PyTorch's 1e-5.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class UserError(Exception):
    """A user's mistake. Its message, one line: the file or flag, what is wrong, what to do."""


# ---- Primitives ----------------------------------------------------------------------------------

def tokens(x):
    """(B, C, H, W) -> (B, N, C), a view of a channels_last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def grid(x, like):
    """(B, N, C) -> (B, C, H, W) with the H x W of the map `like`, channels_last without a copy."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def heads_first(x, heads):
    """(B, N, C) -> (B, h, N, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def fill(x, size):
    """Zeros to the right and below, until `size` divides both sides of the map (B, C, H, W)."""
    bottom, right = ((side + size - 1) // size * size - side for side in x.shape[2:])
    if torch.compiler.is_compiling() or bottom or right:        # exported: sizes are unknown
        x = F.pad(x, (0, right, 0, bottom))
    return x


def windows(x, size, stride):
    """(B, C, H, W) -> (P, C, size, size): windows, `stride` pixels apart, P in the whole batch.
    One copy, in channels_last memory."""
    if stride == size:      # the gradient of this view is a view, that of unfold a slow sum
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))     # (B, C, h, size, w, size)
        x = x.transpose(3, 4)                                       # (B, C, h, w, size, size)
    else:
        x = x.unfold(2, size, stride).unfold(3, size, stride)
    return x.permute(0, 2, 3, 4, 5, 1).flatten(0, 2).permute(0, 3, 1, 2)


def join_windows(x, like):
    """(P, C, s, s), windows that touch -> (B, C, H, W) with the B, H and W of the map `like`."""
    size = x.shape[2]
    x = x.permute(0, 2, 3, 1)
    x = x.unflatten(0, (like.shape[0], -1, like.shape[3] // size))      # (B, h, w, s, s, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def roll(x, shift):
    """A map rolled by (rows, columns); stays channels_last, which torch.roll does not on GPUs."""
    if not any(shift):
        return x
    return x.permute(0, 2, 3, 1).roll(shift, (1, 2)).permute(0, 3, 1, 2)


def full_precision(x):
    """A context without autocast on the device of x; autocast knows no "meta": "cpu" stands in."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


class MatMul(nn.Module):
    """`a @ b` of two computed tensors, as a module so that a FLOPs hook sees it."""
    def forward(self, a, b):
        return a @ b


class Attend(nn.Module):
    """softmax(q kᵀ / √d + bias) v in each of h heads, by F.scaled_dot_product_attention.
    q (B, N, C), k and v (B, M, C), bias (B or 1, h or 1, N, M) -> (B, N, C).
    Cost: 2 N M C multiply-adds, whatever the number of heads."""
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, q, k, v, bias=None):
        q, k, v = (heads_first(t, self.heads) for t in (q, k, v))   # (B, h, N or M, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(1, 2).flatten(2)


class Pointwise(nn.Conv2d):
    """A Linear layer on a map's channels, held as a 1x1 convolution (files store either shape).
    On CPUs that is up to a fifth faster than the matrix product; on 7x7 windows the reverse."""
    def __init__(self, in_dim, dim, bias=True):
        super().__init__(in_dim, dim, 1, bias=bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map: Transformers' norm, pixel by pixel."""
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Sequential):
    """Convolution, then norm, then activation. models.fuse folds the norm into the convolution."""
    def __init__(self, conv, norm, act=None):
        super().__init__()
        self.conv = conv
        self.norm = norm
        if act is not None:
            self.act = act


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drop a sample's whole branch with
    probability p and scale the rest by 1/(1-p)."""
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)


class GroupNorm2d(nn.GroupNorm):
    """GroupNorm that stays channels_last, which PyTorch's does not on GPUs."""
    def forward(self, x):
        return super().forward(x).contiguous(memory_format=torch.channels_last)


def conv_norm(norm, in_dim, dim, kernel=1, act=nn.ReLU):
    """mmcv's ConvModule: convolution without bias, norm, activation; He-normal on the fan-out."""
    conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return ConvNorm(conv, norm(dim), act and act())


conv_bn_relu = partial(conv_norm, nn.BatchNorm2d)
conv_gn = partial(conv_norm, partial(GroupNorm2d, 32))

NORM = {"ln": LayerNorm2d, "bn": nn.BatchNorm2d}


# ---- Bilinear up-sampling: of a whole map, and of a strip of its rows ----------------------------

def resize(x, size):
    """Bilinear, corners not aligned: every decoder's interpolation here. Keeps channels_last."""
    if not torch.compiler.is_compiling() and x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


# At most this much of an up-sampled map is held at once: elements (they fit into a CPU's cache, or
# keep a GPU busy), and rows (a matrix interpolates them: the more rows, the more zeros in it).
STRIP = {"cpu": (2 ** 20, 16), "cuda": (2 ** 26, 256)}


def strips(shape, device):
    """Cut an up-sampled map (B, K, H, W) into pieces that fit STRIP: some rows of some images.
    Yields (images, rows), slices; a function of shapes and device alone, so that runs repeat."""
    batch, channels, height, width = shape
    elements, most = STRIP.get(device.type, STRIP["cpu"])
    rows = min(max(1, elements // (channels * width)), most, height)
    images = max(1, elements // (rows * channels * width))
    for b in range(0, batch, images):
        for y in range(0, height, rows):
            yield slice(b, b + images), slice(y, min(y + rows, height))


def bilinear_matrix(size, like):
    """One direction of a bilinear resize from h to `size` pixels, a matrix (size, h), h the height
    of `like`; made on its device, as each copy from the host would make a GPU wait."""
    h = like.shape[2]
    at = torch.arange(size, dtype=torch.float64, device=like.device)
    at = ((at + 0.5) * (h / size) - 0.5).clamp(0, h - 1)
    return (1 - (at[:, None] - torch.arange(h, device=like.device)).abs()).clamp(min=0).to(like)


def source_rows(rows, height, h):
    """The rows, of h, that a bilinear resize to `height` reads for its output's `rows`; slices."""
    first = int(max((rows.start + 0.5) * h / height - 0.5, 0))
    return slice(first, min(int((rows.stop - 0.5) * h / height - 0.5) + 2, h))


def upsample_strip(x, rows, size, vertical):
    """The given rows of the resize of x (B, K, h, w) to `size`: (B, rows, W, K).
    Bilinear weights are products of a vertical and a horizontal one. The vertical half is a matrix
    product with rows of `vertical` = bilinear_matrix(H, x), as F.interpolate cannot choose rows."""
    sources = source_rows(rows, size[0], x.shape[2])
    x = x[:, :, sources]
    wide = resize(x, (x.shape[2], size[1])).permute(0, 2, 3, 1)     # (B, sources, W, K)
    return (vertical[rows, sources] @ wide.flatten(2)).unflatten(2, wide.shape[2:])


def downsample_strip(grad, rows, vertical, like):
    """The gradient of upsample_strip, grad (B, rows, W, K) -> (sources, (B, K, sources, w))."""
    batch, _, width, classes = grad.shape
    sources = source_rows(rows, *vertical.shape)
    wide = (vertical[rows, sources].T @ grad.flatten(2)).unflatten(2, (width, classes))
    if torch.are_deterministic_algorithms_enabled():                # a GPU's operator is not
        horizontal = bilinear_matrix(width, like.mT)
        return sources, (horizontal.T @ wide).permute(0, 3, 1, 2)
    wide = wide.permute(0, 3, 1, 2)
    shape = (batch, classes, wide.shape[2], like.shape[3])
    return sources, torch.ops.aten.upsample_bilinear2d_backward(wide, wide.shape[2:], shape, False)


# ---- Embeddings: between the stages, the only places where the resolution falls ------------------

class OverlapEmbed(ConvNorm):
    """Overlapping patches: a strided 7x7 (stem) or 3x3 convolution, then a norm.
    SegFormer §3.1; PVTv2 §3.3. Zero padding k//2 gives ceil(H/s) for any H."""
    def __init__(self, in_dim, dim, stride, norm):
        kernel = 2 * stride - 1
        conv = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        super().__init__(conv, norm(dim, eps=1e-5))


class PatchEmbed(nn.Module):
    """Patches that do not overlap: 4x4 convolution and norm, then 2x2 merging (Swin §3.1).
    arXiv 2103.14030. Merging: norm, then Linear without bias, of the 2x2 neighbours' channels in
    the order (row, column) 00, 10, 01, 11. Zeros fill the last patch to the right and below, as in
    the released segmentation code."""
    def __init__(self, in_dim, dim, stride, norm):
        super().__init__()
        self.stride = stride
        if stride == 4:
            self.proj = nn.Conv2d(in_dim, dim, stride, stride)
            self.norm = norm(dim, eps=1e-5)
        else:
            self.norm = norm(stride ** 2 * in_dim, eps=1e-5)
            self.reduction = Pointwise(stride ** 2 * in_dim, dim, bias=False)

    def forward(self, x):
        s = self.stride
        x = fill(x, s)
        if s == 4:
            return self.norm(self.proj(x))
        x = x.permute(0, 2, 3, 1)
        x = x.unflatten(1, (-1, s)).unflatten(3, (-1, s))           # (B, H/s, s, W/s, s, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)                  # (B, H/s, W/s, s s C)
        return self.reduction(self.norm(x.permute(0, 3, 1, 2)))


class ConvEmbed(nn.Sequential):
    """3x3 convolution of stride 2, norm; the stem has two, a GELU between them (SegNeXt §3.1)."""
    def __init__(self, in_dim, dim, stride, norm):
        step = lambda a, b, act=None: ConvNorm(nn.Conv2d(a, b, 3, 2, 1), norm(b, eps=1e-5), act)
        if stride == 4:
            super().__init__(step(in_dim, dim // 2, nn.GELU()), step(dim // 2, dim))
        else:
            super().__init__(step(in_dim, dim))


class NextEmbed(nn.Sequential):
    """Next-ViT's down-sampling (arXiv 2207.05501 §3.5): 2x2 mean, 1x1 convolution, norm.
    The stem is four 3x3 ConvNormReLU. Where sides are odd, the last mean is over the pixels that
    are there. The stem's 64 channels go through a 1x1 convolution where the first stage has another
    width: in the released code that one belongs to the stage's first block."""
    def __init__(self, in_dim, dim, stride, norm):
        steps = []
        if stride == 4:
            widths, strides = (in_dim, 64, 32, 64, 64), (2, 1, 1, 2)
            for a, b, s in zip(widths, widths[1:], strides):
                conv = nn.Conv2d(a, b, 3, s, 1, bias=False)
                steps.append(ConvNorm(conv, norm(b, eps=1e-5), nn.ReLU()))
            in_dim = 64
        elif stride == 2:
            steps.append(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False))
        if stride == 2 or in_dim != dim:
            steps.append(ConvNorm(Pointwise(in_dim, dim, bias=False), norm(dim, eps=1e-5)))
        super().__init__(*steps or [nn.Identity()])


EMBED = {"overlap": OverlapEmbed, "patch": PatchEmbed, "conv": ConvEmbed, "next": NextEmbed}


# ---- Attention and other token mixers ------------------------------------------------------------

class SpatialReductionAttention(nn.Module):
    """Attention to a grid that is R times smaller in each direction (PVT §3.3; SegFormer §3.1).
    q = Wq x;  k, v = Wkv LN(conv_{RxR, stride R}(x)) for R > 1, else Wkv x
    out = Wo softmax(q kᵀ / √d) v
    As in the released code, the reducing convolution has no padding: rows and columns that do not
    fill a cell are not seen as keys, so a map needs H, W >= R. R is fixed, not M: the cost is
    quadratic in N, however large R is ("efficient" in the paper means R² times less).
    Cost: 2NC² + 2MC² + M R² C² (R > 1) + 2NMC, M = ⌊H/R⌋⌊W/R⌋."""
    reduces = True

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        self.q = Pointwise(dim, dim)
        self.kv = Pointwise(dim, 2 * dim)
        self.proj = Pointwise(dim, dim)
        self.attend = Attend(heads)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = LayerNorm2d(dim)
        self.reduction = reduction

    def reduce(self, x):
        return self.norm(self.sr(x)) if self.reduction > 1 else x   # (B, C, H/R, W/R)

    def forward(self, x):
        q = tokens(self.q(x))                                       # (B, N, C)
        k, v = tokens(self.kv(self.reduce(x))).chunk(2, -1)         # (B, M, C)
        return self.proj(grid(self.attend(q, k, v), x))


class EfficientAttention(nn.Module):
    """Attention whose soft-maxes come before the product, so that it costs O(N).
    arXiv 1812.01243 §3.2, Eq. 4:  out = Wo (Wr ρq(Q) (ρk(K)ᵀ V) + x)
    ρq: soft-max over a head's channels, ρk: over the positions; no 1/√d. Wr and the inner shortcut
    are the released module (heads are its addition to the paper); Wo is the output projection that
    SegFormer's blocks put behind it. Widths 64 and 32 in every stage, as the original project has
    them; heads: the largest power of two up to the row's, as both must divide by it.
    Cost: 192NC + NC² + 4096 N / h."""
    def __init__(self, dim, heads, reduction, index=0, key_dim=64, value_dim=32):
        super().__init__()
        self.heads = 2 ** int(math.log2(heads))
        self.queries = Pointwise(dim, key_dim)
        self.keys = Pointwise(dim, key_dim)
        self.values = Pointwise(dim, value_dim)
        self.reprojection = Pointwise(value_dim, dim)
        self.proj = Pointwise(dim, dim)
        self.matmul = MatMul()

    def reduce(self, x):
        return x

    def forward(self, x):
        y = self.reduce(x)
        q = tokens(self.queries(x)).unflatten(-1, (self.heads, -1)).softmax(-1)     # (B, N, h, dk)
        q = q.transpose(1, 2)                                       # (B, h, N, dk)
        k = heads_first(tokens(self.keys(y)).softmax(1), self.heads)        # (B, h, M, dk)
        v = heads_first(tokens(self.values(y)), self.heads)         # (B, h, M, dv)
        context = self.matmul(k.mT, v)                              # (B, h, dk, dv)
        out = self.matmul(q, context).transpose(1, 2).flatten(2)    # (B, N, 32)
        return self.proj(self.reprojection(grid(out, x)) + x)


class PooledKeys(nn.Module):
    """To be put before an attention class: its keys come from the map pooled to 7x7.
    y = GELU(LN(W mean_7x7(x))), whatever the image's size (PVTv2, arXiv 2106.13797 §3.2); R is not
    used. A map smaller than 7x7 is repeated, not pooled, as the released code does."""
    reduces = False

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__(dim, heads, 1)
        self.sr = nn.Conv2d(dim, dim, 1)                            # not Pointwise: its init
        self.norm = LayerNorm2d(dim)

    def reduce(self, x):
        return F.gelu(self.norm(self.sr(F.adaptive_avg_pool2d(x, 7))))      # (B, C, 7, 7)


class NoProjection(nn.Module):
    """To be put before an attention class: no output projection. Saves NC² multiply-adds and C² + C
    parameters; in the whole of a SegFormer-B2, 1.300 GMAC and 1,482,816 parameters."""
    def __init__(self, dim, heads, reduction, index=0):
        super().__init__(dim, heads, reduction)
        self.proj = nn.Identity()


class LinearSRA(PooledKeys, SpatialReductionAttention):
    """PVTv2's linear attention: 49 keys, so cost linear in N: 2NC² + 49 (3C² + 2NC)."""


class LinearSRANoProj(NoProjection, LinearSRA):
    """The original project's final block."""


class LinearEfficientAttention(PooledKeys, EfficientAttention):
    """LSREA: efficient attention to the 7x7 map (the original project's own block).
    What it saves comes from the narrow 64 and 32 channels: with 49 keys, soft-max attention is
    linear in N as well."""


class LinearEfficientAttentionNoProj(NoProjection, LinearEfficientAttention):
    """LSREA without the output projection behind its inner shortcut."""


class SimplifiedAttention(nn.Module):
    """DEST's attention without soft-max and without values (arXiv 2204.13791 §3.2).
    out = Wo (mean(x) Σ_heads max_keys q kᵀ / √d);  k from BN(conv_{RxR, stride R}(x)) for R > 1
    A soft-max shares out a weight of 1 among many values. Here is one value, mean(x), and nothing
    to share out: a query needs one number, how well it fits its best key, and a max gives that.
    The heads only add up, so the map before Wo has rank 1, and Wo meets one vector an image: NC² -
    C² multiply-adds less than written. Cost: NC² + MC² + M R² C² (R > 1) + NMC + C²."""
    reduces = True

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        self.heads = heads
        self.q = Pointwise(dim, dim)
        self.k = Pointwise(dim, dim)
        self.proj = Pointwise(dim, dim)
        self.sr = nn.Identity()
        if reduction > 1:
            self.sr = ConvNorm(nn.Conv2d(dim, dim, reduction, reduction), nn.BatchNorm2d(dim))
        self.matmul = MatMul()

    def forward(self, x):
        q = heads_first(tokens(self.q(x)), self.heads)              # (B, h, N, d)
        k = heads_first(tokens(self.k(self.sr(x))), self.heads)     # (B, h, M, d)
        q = q * q.shape[-1] ** -0.5                                 # now: no overflow in float16
        fit = self.matmul(q, k.mT).amax(-1).sum(1)                  # (B, N)
        # Wo (fit · mean) + bo = fit · (Wo mean) + bo: proj is never called on the map; its weight
        # meets the mean, its bias is added where the outer product is formed.
        value = self.matmul(x.mean((2, 3)), self.proj.weight.flatten(1).T)      # (B, C)
        return grid(torch.addcmul(self.proj.bias, fit[..., None], value[:, None]), x)


class WindowAttention(nn.Module):
    """Attention inside 7x7 windows, which odd blocks shift by 3 (Swin, arXiv 2103.14030 §3.2).
    softmax(q kᵀ / √d + B + mask) v;  B: a bias for each of the 13² offsets and each head;  mask:
    -100 between pixels that the cyclic shift made neighbours. Padded pixels are zeros that do act
    as keys. As the released segmentation code: pad right and below to multiples of 7, then roll.
    The seam of the roll then falls into the last window, where the mask expects it; rolled first,
    it would lie anywhere, with the padding behind it. Classification never shifts along a side of
    at most 7 pixels: models.build then sets `shift_small` to False. Cost: 4NC² + 98NC, N padded.
    In one dimension, windows of 3, shift 1, six pixels a..f:
        rolled    b c d | e f a      a and f meet, but are not neighbours
        part      0 0 0 | 0 0 1      the mask is -100 where the parts of query and key differ
        bias      query i, key j -> table[i - j + 2]:   2 1 0
                                                        3 2 1
                                                        4 3 2"""
    SIZE, SHIFT = 7, 3

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        self.shift = self.SHIFT if index % 2 else 0
        self.shift_small = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        offsets = (2 * self.SIZE - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)
        self.attend = Attend(heads)

    def forward(self, x):
        height, width = x.shape[2:]
        y = fill(x, self.SIZE)
        shift = [self.shift if self.shift_small or side > self.SIZE else 0 for side in y.shape[2:]]
        bias = self.bias()                                          # (1, h, 49, 49)
        if any(shift):
            bias = (bias + self.mask(y, shift)).repeat(x.shape[0], 1, 1, 1)     # (P, h, 49, 49)
        p = windows(roll(y, [-s for s in shift]), self.SIZE, self.SIZE)     # (P, C, 7, 7)
        q, k, v = self.qkv(tokens(p)).chunk(3, -1)                  # (P, 49, C)
        out = self.proj(self.attend(q, k, v, bias))
        out = roll(join_windows(grid(out, p), y), shift)
        return out[:, :, :height, :width]

    def bias(self):
        """(1, h, 49, 49): entry (query i, key j) is the table's at offset i - j, both axes + 6."""
        side = 2 * self.SIZE - 1
        table = self.relative_position_bias_table.unflatten(0, (side, side))        # (13, 13, h)
        # Query i reads the entries i .. i + 6 of an axis, backwards: those of keys 0 .. 6.
        by_query = table.unfold(0, self.SIZE, 1).unfold(1, self.SIZE, 1).flip(3, 4)
        by_query = by_query.permute(2, 0, 1, 3, 4)                  # (h, 7, 7, 7, 7): i, then j
        return by_query.flatten(3).flatten(1, 2)[None]

    def mask(self, y, shift):
        """(windows of one image, 1, 49, 49): -100 where query and key are of different parts."""
        rows, columns = (                                           # (windows, 7) of each axis
            (torch.arange(side, device=y.device) >= side - s).int().view(-1, self.SIZE)
            for side, s in zip(y.shape[2:], shift))
        part = 2 * rows[:, None, :, None] + columns[None, :, None, :]       # (h, w, 7, 7)
        part = part.flatten(2).flatten(0, 1)                        # (h w, 49)
        return -100.0 * (part[:, :, None] != part[:, None, :])[:, None].to(y.dtype)


class MSCA(nn.Module):
    """Multi-scale convolutional attention: a gate from large strip convolutions.
    SegNeXt, arXiv 2209.08575 §3.1, Eq. 1:
    g = GELU(W1 x);  z = DW5x5(g);  out = W2 (g ⊙ W3 (z + Σ_k DW_kx1(DW_1xk(z)))) + x, k = 7, 11, 21
    The inner shortcut adds this module's input, that is, the normed map; no sigmoid. The original
    project's copy reads the input in every strip and lacks the shortcut; this is the paper's.
    Cost: 3NC² + 103NC."""
    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        depthwise = partial(nn.Conv2d, dim, dim, padding="same", groups=dim)
        self.proj_1 = Pointwise(dim, dim)
        self.local = depthwise(5)
        self.strips = nn.ModuleList(
            nn.Sequential(depthwise((1, k)), depthwise((k, 1))) for k in (7, 11, 21))
        self.mix = Pointwise(dim, dim)
        self.proj_2 = Pointwise(dim, dim)

    def forward(self, x):
        gate = F.gelu(self.proj_1(x))
        z = self.local(gate)
        small, medium, large = (strip(z) for strip in self.strips)
        return self.proj_2(gate * self.mix(z + small + medium + large)) + x


class TokenMixer(nn.Module):
    """MLP-Mixer's token MLP (arXiv 2105.01601 Eq. 1), shared by the channels and by 7x7 windows.
    y = W4 GELU(W3 x + b3) + b4 along a window's 49 positions, hidden width C/2. Windows serve any
    image size, zeros fill the last ones; what crosses their borders is left to the FFN's 3x3
    convolution and to the embeddings. erf GELU, as in timm; the original has the tanh form.
    Cost: NC², N padded."""
    SIZE = 7

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        self.fc1 = nn.Conv1d(self.SIZE ** 2, dim // 2, 1)           # positions are its channels
        self.fc2 = nn.Conv1d(dim // 2, self.SIZE ** 2, 1)

    def forward(self, x):
        height, width = x.shape[2:]
        y = fill(x, self.SIZE)
        p = windows(y, self.SIZE, self.SIZE)                        # (P, C, 7, 7)
        out = self.fc2(F.gelu(self.fc1(tokens(p))))                 # (P, 49, C)
        return join_windows(grid(out, p), y)[:, :, :height, :width]


class MHCA(nn.Module):
    """Multi-head convolutional attention: W ReLU(BN(3x3 convolution in groups of channels)).
    Next-ViT, arXiv 2207.05501 §3.2. A head is a group; the 1x1 convolution lets them talk. No bias.
    Cost: 9NC²/h + NC²."""
    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=heads, bias=False)
        self.group_conv = ConvNorm(conv, nn.BatchNorm2d(dim), nn.ReLU())
        self.projection = Pointwise(dim, dim, bias=False)

    def forward(self, x):
        return self.projection(self.group_conv(x))


class EMHSA(nn.Module):
    """Attention whose keys are means of R² consecutive tokens (Next-ViT's E-MHSA, §3.3, Eq. 4).
    k, v from BN(mean of R² tokens) for R > 1. As in the released code the tokens are those of the
    flattened map, R² along a row and not R x R, and the last ones that do not fill a mean are not
    seen. Cost: 2NC² + 2MC² + 2NMC, M = ⌊N/R²⌋."""
    reduces = True

    def __init__(self, dim, heads, reduction, index=0):
        super().__init__()
        self.group = reduction ** 2
        self.q, self.k, self.v, self.proj = (Pointwise(dim, dim) for _ in range(4))
        if reduction > 1:
            self.norm = nn.BatchNorm2d(dim)
        self.attend = Attend(heads)

    def reduce(self, x):
        if self.group == 1:
            return x
        t = tokens(x)
        m = t.shape[1] // self.group
        t = t[:, :m * self.group].unflatten(1, (m, self.group)).mean(2)     # (B, M, C)
        return self.norm(t[:, None].permute(0, 3, 1, 2))            # (B, C, 1, M)

    def forward(self, x):
        y = self.reduce(x)
        q, k, v = tokens(self.q(x)), tokens(self.k(y)), tokens(self.v(y))
        return self.proj(grid(self.attend(q, k, v), x))


ATTENTION = {
    "sra": SpatialReductionAttention, "lsra": LinearSRA, "lsra_noproj": LinearSRANoProj,
    "ea": EfficientAttention, "lsrea": LinearEfficientAttention,
    "lsrea_noproj": LinearEfficientAttentionNoProj, "dest": SimplifiedAttention,
    "window": WindowAttention, "msca": MSCA, "emhsa": EMHSA, "mhca": MHCA, "mixer": TokenMixer}


# ---- Feed-forward networks -----------------------------------------------------------------------

class MLP(nn.Module):
    """fc2(act(fc1 x)): the Transformer's own. Cost: 2 r N C²."""
    def __init__(self, dim, ratio, act=nn.GELU):
        super().__init__()
        self.fc1 = Pointwise(dim, dim * ratio)
        self.act = act()
        self.fc2 = Pointwise(dim * ratio, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class MixFFN(nn.Module):
    """fc2(GELU(DW3x3(fc1 x))), SegFormer Eq. 3; the residual of that equation is the block's.
    The zero-padded depth-wise convolution carries position, so no embedding does.
    Cost: 2 r N C² + 9 r N C."""
    def __init__(self, dim, ratio):
        super().__init__()
        hidden = dim * ratio
        self.fc1 = Pointwise(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class MixReLUFFN(MixFFN):
    """MixFFN with a ReLU after fc1, as PVTv2's code has it for linear SRA (the paper does not)."""
    def forward(self, x):
        return self.fc2(F.gelu(self.dwconv(F.relu(self.fc1(x)))))


class DestFFN(nn.Module):
    """fc2(ReLU(BN(DW3x3(BN(fc1 x))))): DEST's Mix-FFN, foldable (§3.3). Cost: that of MixFFN."""
    def __init__(self, dim, ratio):
        super().__init__()
        hidden = dim * ratio
        self.fc1 = ConvNorm(Pointwise(dim, hidden), nn.BatchNorm2d(hidden))
        depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = ConvNorm(depthwise, nn.BatchNorm2d(hidden), nn.ReLU())
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x):
        return self.fc2(self.dwconv(self.fc1(x)))


FFN = {"mlp": MLP, "mix": MixFFN, "mix_relu": MixReLUFFN, "dest": DestFFN}


# ---- Skips: how a branch F (attention or FFN) joins its input ------------------------------------

class PreNorm(nn.Module):
    """x + DropPath(F(norm x)): the pre-norm residual of nearly all Transformers here.
    norm: makes one norm of a width, e.g. LayerNorm2d with the row's eps."""
    def __init__(self, branch, dim, norm, drop_path):
        super().__init__()
        self.norm = norm(dim)
        self.branch = branch
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.branch(self.norm(x)))


class ScaledPreNorm(PreNorm):
    """x + DropPath(s ⊙ F(norm x)), s a scale a channel, first 0.01 (CaiT, arXiv 2103.17239 §2)."""
    def __init__(self, branch, dim, norm, drop_path):
        super().__init__(branch, dim, norm, drop_path)
        self.scale = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x):
        return x + self.drop_path(self.scale[:, None, None] * self.branch(self.norm(x)))


class RecursiveSkip(nn.Module):
    """norm2(DropPath(norm1(F(x) + x)) + x): the shortcut added twice, post-norm.
    arXiv 2105.07205, rSkip+LN of order 2. The branch gets x as it is. With separate norms and the
    drop-path inside, as the original project has it."""
    def __init__(self, branch, dim, norm, drop_path):
        super().__init__()
        self.branch = branch
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return self.norm2(self.drop_path(self.norm1(self.branch(x) + x)) + x)


SKIP = {"pre": PreNorm, "scaled": ScaledPreNorm, "recursive": RecursiveSkip}


class Block(nn.Sequential):
    """A stage's block: the token-mixing branch, then the channel-mixing one, each in its skip."""
    def __init__(self, attn, ffn):
        super().__init__()
        self.attn = attn
        self.ffn = ffn


HEAD_DIM = 32       # channels of a head, or group, in Next-ViT


def attention_width(dim):
    """Channels of an NTB's attention: 3/4 of its output, to a multiple of 32, but >= 0.9 of it."""
    width = max(HEAD_DIM, int(0.75 * dim + HEAD_DIM / 2) // HEAD_DIM * HEAD_DIM)
    return width if width >= 0.9 * int(0.75 * dim) else width + HEAD_DIM


class NextConvBlock(nn.Module):
    """NCB: x + MHCA(x), no norm before it, then x + MLP(BN(x)), ReLU, ratio 3 (Next-ViT §3.2)."""
    def __init__(self, in_dim, dim, drop_path):
        super().__init__()
        self.patch_embed = NextEmbed(in_dim, dim, 1, nn.BatchNorm2d)    # no change of width: none
        self.mhca = MHCA(dim, dim // HEAD_DIM, 1)
        self.mlp_norm = nn.BatchNorm2d(dim)
        self.mlp = MLP(dim, 3, nn.ReLU)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class NextTransformerBlock(nn.Module):
    """NTB: attention on 3/4 of the channels, MHCA on a projection of them, both kept; then an MLP.
    Next-ViT §3.3, Eq. 6:
    y = x + attention(BN(x));  z = p + MHCA(p), p = BN(W y);  out = c + MLP(BN(c)), c = cat(y, z)
    The MLP has ratio 2. Drop-path rates of the three: 0.75, 0.25 and 1 times the block's."""
    def __init__(self, attention, in_dim, dim, reduction, index, drop_path):
        super().__init__()
        wide = attention_width(dim)
        narrow = dim - wide
        self.patch_embed = NextEmbed(in_dim, wide, 1, nn.BatchNorm2d)
        self.norm1 = nn.BatchNorm2d(wide)
        self.attn = attention(wide, wide // HEAD_DIM, reduction, index)
        self.projection = ConvNorm(Pointwise(wide, narrow, bias=False), nn.BatchNorm2d(narrow))
        self.mhca = MHCA(narrow, narrow // HEAD_DIM, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = MLP(dim, 2, nn.ReLU)
        self.drop_attn = DropPath(0.75 * drop_path)
        self.drop_mhca = DropPath(0.25 * drop_path)
        self.drop_mlp = DropPath(drop_path)

    def forward(self, x):
        x = self.patch_embed(x)
        y = x + self.drop_attn(self.attn(self.norm1(x)))            # (B, 3C/4, H, W)
        z = self.projection(y)                                      # (B, C/4, H, W)
        z = z + self.drop_mhca(self.mhca(z))
        c = torch.cat([y, z], 1)
        return c + self.drop_mlp(self.mlp(self.norm2(c)))


# ---- Heads: decoders for segmentation, one classifier --------------------------------------------

class Classifier(nn.Module):
    """Every encoder's classification: mean over the last map's pixels, then Linear -> (B, K)."""
    def __init__(self, dim, num_classes):
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, maps):
        return self.fc(maps[-1].mean((2, 3)))


def logit_layer(dim, num_classes):
    """mmseg's last layer: 1x1 convolution from `dim` channels to the logits, N(0, 0.01)."""
    conv = Pointwise(dim, num_classes)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class UpsampledSum(nn.Module):
    """Convolve a concatenation of up-sampled maps with a 1x1 kernel, without making either.
    F cat_i(up(W_i x_i + b_i)) + f = Σ_i up((F_i W_i) x_i) + Σ_i F_i b_i + f
    holds exactly, because bilinear up-sampling is linear, acts on each channel alone and its
    weights sum to 1. It breaks with a norm or an activation between W and F, with a kernel F larger
    than 1x1 (it mixes pixels, and would do so before up-sampling), and with weights that do not sum
    to 1 (zeros beyond the border: b_i would fade there).
    So each level is multiplied at its own resolution, with F_i W_i made anew at each call: same
    parameters, function and gradients, fewer multiply-adds (P E Σ C_i of them for the merge, P the
    width of the projections)."""
    def __init__(self):
        super().__init__()
        self.merge = MatMul()
        self.project = MatMul()

    def merged(self, fuse, projections):
        """-> [F_i W_i], each (E, C_i), and Σ F_i b_i + f (E,)."""
        weight = fuse.weight.flatten(1)
        levels = weight.split([p.out_channels for p in projections], 1)
        levels = [self.merge(f, p.weight.flatten(1)) for f, p in zip(levels, projections)]
        constant = (weight * torch.cat([p.bias for p in projections])).sum(1)       # Σ F_i b_i
        return levels, constant if fuse.bias is None else fuse.bias + constant

    def forward(self, fuse, maps, projections=None):
        """fuse: 1x1 convolution over the concatenation; maps, projections: in its order
        -> (B, E, h, w), the finest size."""
        if projections:
            levels, bias = self.merged(fuse, projections)
        else:
            levels = fuse.weight.flatten(1).split([x.shape[1] for x in maps], 1)
            bias = fuse.bias
        # Four levels: terms = [y4 + bias, y3, y2, y1]; out = y1 + up(y2) + up(y4 + bias) + up(y3).
        # The bias goes to the coarsest map, the smallest: a constant passes through up().
        terms = []
        pairs = sorted(zip(maps, levels), key=lambda pair: pair[0].shape[2:])       # coarsest first
        for x, level in pairs:
            y = self.project(x.permute(0, 2, 3, 1), level.T)        # (B, h_i, w_i, E)
            if bias is not None and not terms:
                y = y + bias
            terms.append(y.permute(0, 3, 1, 2))
        *coarser, finest = terms
        # A new tensor, then in place: adding in place to a view, as `finest` is one, costs copies.
        out = finest + resize(coarser.pop(), finest.shape[2:])
        for y in coarser:
            out += resize(y, finest.shape[2:])
        return out


class MlpHead(nn.Module):
    """SegFormer's all-MLP decoder (§3.2, Eq. 4), computed by the identity of UpsampledSum.
    Z = ReLU(BN(F cat(up(W4 x4 + b4), .., W1 x1 + b1)));  logits = V dropout2d(Z) + v, at stride 4
    The released code drops whole channels (Dropout2d) and names the levels deepest first, as here.
    Of SegFormer-B2's 62.338 GMAC at 512² as the paper draws it (mlp_concat), 42.10 are this
    decoder, 38.65 of them F on the up-sampled concatenation. Here the decoder takes 4.05, 0.60 of
    them to merge F with the W_i, which models.fuse does once: 24.287 in all, 23.683 fused."""
    uses, width = (0, 1, 2, 3), None

    def __init__(self, dims, num_classes, width, rank=None):
        super().__init__()
        self.projections = nn.ModuleList(Pointwise(dim, width) for dim in dims)
        self.fuse = conv_bn_relu(4 * width, width)
        self.sum = UpsampledSum()
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = Pointwise(width, num_classes)

    def forward(self, maps):
        x = self.dropout(self.fuse.norm(self.mix(maps)))
        return self.classifier(self.fuse.act(x))        # dropout may go first: a map less to keep

    def mix(self, maps):
        return self.sum(self.fuse.conv, maps[::-1], self.projections[::-1])


class MlpConcatHead(MlpHead):
    """The same decoder, weights and output, concatenated as the paper draws it: 10x the cost."""
    def mix(self, maps):
        levels = [resize(p(x), maps[0].shape[2:]) for p, x in zip(self.projections, maps)]
        return self.fuse.conv(torch.cat(levels[::-1], 1))


class MergedMlpHead(nn.Module):
    """What is left of MlpHead at inference: logits = V ReLU(Σ up(W'_i x_i) + b') + v.
    W'_i = BN ∘ F_i W_i, multiplied once and for all. Done in strips of rows, so that what lies
    between the maps and the logits stays in a CPU's cache."""
    def __init__(self, head):
        super().__init__()
        # The norm is folded into head.fuse.conv already. The coarsest level takes the bias.
        weights, bias = head.sum.merged(head.fuse.conv, head.projections[::-1])
        self.levels = nn.ModuleList()
        for weight in weights[::-1]:
            level = Pointwise(weight.shape[1], len(weight), bias=weight is weights[0])
            level.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
            self.levels.append(level)
        level.bias = nn.Parameter(bias, requires_grad=False)
        self.classifier = head.classifier

    def forward(self, maps):
        finest, size = maps[0], maps[0].shape[2:]
        coarse = [level(y) for level, y in zip(self.levels[1:], maps[1:])]
        if torch.compiler.is_compiling():       # strips would fix the sizes of an exported graph
            x = sum((resize(y, size) for y in coarse), self.levels[0](finest))
            return self.classifier(F.relu(x))
        verticals = [bilinear_matrix(size[0], y) for y in coarse]
        out = finest.new_empty(len(finest), self.classifier.out_channels, *size)
        out = out.to(memory_format=torch.channels_last)
        shape = (len(finest), self.classifier.in_channels, *size)
        for images, rows in strips(shape, finest.device):
            x = self.levels[0](finest[images, :, rows])
            for y, vertical in zip(coarse, verticals):
                x += upsample_strip(y[images], rows, size, vertical).permute(0, 3, 1, 2)
            out[images, :, rows] = self.classifier(F.relu(x, inplace=True))
        return out


class NMF(nn.Module):
    """Global context by a low-rank model of the map ("Hamburger", arXiv 2109.04553 §2.2).
    X ≈ C Dᵀ, all >= 0: X (N, d) has a pixel of d channels a row, C (N, R) are its codes, D (d, R)
    the R bases. D random with columns of length 1;  C = softmax(X D);  K times
        C ← C ⊙ X D / (C DᵀD + ε);  D ← D ⊙ XᵀC / (D CᵀC + ε)
    then C once more, and C Dᵀ is the output. steps = (K in training, K at evaluation).
    one_step: the K updates are constants to the backward pass (its "one-step gradient", as in the
    paper's own release); SegNeXt's code differentiates through all of them. Released codes draw new
    bases at evaluation too, which makes their answers random; here all evaluations share one draw.
    Always float32: XᵀC sums over all pixels and overflows float16.
    Cost: (2K + 2) N d R + (2K + 1)(N + d) R², one N d R less than written: X D serves the soft-max
    and the first update."""
    def __init__(self, dim, rank, steps, eps, one_step=False):
        super().__init__()
        self.train_steps, self.eval_steps = steps
        self.eps = eps
        self.one_step = one_step
        self.matmul = MatMul()
        self.register_buffer("bases", self.draw(dim, rank), persistent=False)       # (1, d, R)

    @staticmethod
    def draw(dim, rank):
        generator = torch.Generator().manual_seed(0)
        bases = torch.rand(1, dim, rank, generator=generator, device="cpu")
        return F.normalize(bases, dim=1)

    def _apply(self, fn, recurse=True):
        """.to(), .half(), .to_empty(): the bases change their device, never their values."""
        super()._apply(fn, recurse)
        self.bases = self.draw(*self.bases.shape[1:]).to(self.bases.device)
        return self

    def forward(self, x):
        with full_precision(x):
            t = tokens(x).to(torch.promote_types(x.dtype, torch.float32))       # (B, N, d)
            return grid(self.approximate(t), x).to(x.dtype)

    def approximate(self, X):
        """X (B, N, d) -> C Dᵀ. The bases are held as Dᵀ, so that all products have X's order."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.one_step):
            if self.training:
                shape = (len(X), *self.bases.shape[1:])
                Dt = F.normalize(torch.rand(shape, dtype=X.dtype, device=X.device), dim=1).mT
            else:
                Dt = self.bases.to(X).mT                            # (1, R, d)
            C = None
            for _ in range(self.train_steps if self.training else self.eval_steps):
                C = self.update_codes(X, Dt, C)                     # (B, N, R)
                CtC = self.matmul(C.mT, C)                          # (B, R, R)
                Dt = Dt * self.matmul(C.mT, X) / (self.matmul(CtC, Dt) + self.eps)      # (B, R, d)
        C = self.update_codes(X, Dt, C)
        return self.matmul(C, Dt)                                   # (B, N, d)

    def update_codes(self, X, Dt, C):
        """C ⊙ X D / (C DᵀD + ε); C None: the first, from softmax(X D)."""
        XD = self.matmul(X, Dt.mT)                                  # (B, N, R)
        if C is None:
            C = XD.softmax(-1)
        DtD = self.matmul(Dt, Dt.mT)                                # (B, R, R)
        return C * XD / (self.matmul(C, DtD) + self.eps)


class HamHead(nn.Module):
    """SegNeXt's decoder (§3.2), "LightHam": squeeze three maps, add their global context, align.
    X = ReLU(GN(S cat(x2, up(x3), up(x4))));  Y = ReLU(X + GN(U NMF(ReLU(L X + l))))
    logits = V dropout2d(ReLU(GN(A Y))) + v, at stride 8
    S by UpsampledSum, which saves E (C3 (N2 - N3) + C4 (N2 - N4)) multiply-adds."""
    uses, width = (1, 2, 3), 512

    def __init__(self, dims, num_classes, width, rank):
        super().__init__()
        self.squeeze = conv_gn(sum(dims[1:]), width)
        self.sum = UpsampledSum()
        self.ham_in = Pointwise(width, width)
        nn.init.kaiming_normal_(self.ham_in.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.ham_in.bias)
        self.nmf = NMF(width, rank, steps=(6, 7), eps=1e-6)
        self.ham_out = conv_gn(width, width, act=None)
        self.align = conv_gn(width, width)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = logit_layer(width, num_classes)

    def forward(self, maps):
        x = self.sum(self.squeeze.conv, maps[1:])                   # (B, E, H/8, W/8)
        x = self.squeeze.act(self.squeeze.norm(x))
        context = self.nmf(F.relu(self.ham_in(x)))                  # (B, E, H/8, W/8)
        x = F.relu(x + self.ham_out(context))
        return self.classifier(self.dropout(self.align(x)))         # (B, K, H/8, W/8)


class LightHamHead(nn.Module):
    """The original project's lighter Hamburger: squeeze, NMF, classify, and no norm; stride 8.
    X = ReLU(S cat(x2, up(x3), up(x4)));  logits = V dropout2d(X + NMF(X)) + v
    NMF with the one-step gradient; all weights N(0, 0.02), as in its source; S as in HamHead."""
    uses, width = (1, 2, 3), 512

    def __init__(self, dims, num_classes, width, rank):
        super().__init__()
        self.squeeze = Pointwise(sum(dims[1:]), width, bias=False)
        self.sum = UpsampledSum()
        self.nmf = NMF(width, rank, steps=(6, 6), eps=1e-7, one_step=True)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = Pointwise(width, num_classes)
        for conv in (self.squeeze, self.classifier):
            nn.init.normal_(conv.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps):
        x = F.relu(self.sum(self.squeeze, maps[1:]))                # (B, E, H/8, W/8)
        return self.classifier(self.dropout(x + self.nmf(x)))       # (B, K, H/8, W/8)


WINDOW = 8      # side of Lawin's windows, in pixels at stride 8


class PositionMixing(nn.Module):
    """Lawin's mixing of a window's 64 positions: c + Wᵢᵀ c + bᵢ, i one of h blocks of channels.
    Wᵢ (64, 64) starts at zero, as released (there a Linear's transpose). Cost: 64 C a pixel."""
    def __init__(self, heads):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, WINDOW ** 2, WINDOW ** 2))
        self.bias = nn.Parameter(torch.zeros(1, heads, 1, WINDOW ** 2))
        self.matmul = MatMul()

    def forward(self, x):
        blocks = tokens(x).unflatten(2, (len(self.weight), -1))     # (P, 64, h, C/h)
        # A head's columns of all windows side by side: few large products.
        columns = blocks.permute(2, 1, 0, 3).flatten(2)             # (h, 64, P C/h)
        mixed = self.matmul(self.weight.mT, columns) + self.bias[0].mT      # (h, 64, P C/h)
        mixed = mixed.unflatten(2, (-1, blocks.shape[3])).permute(2, 1, 0, 3)       # as blocks
        return grid((blocks + mixed).flatten(2), x)


class LargeWindowAttention(nn.Module):
    """Each 8x8 window attends to the 8R x 8R pixels around it, pooled to 8x8, with R² heads.
    Lawin, arXiv 2201.01615:
    z = down_R(x);  c = context windows of z, 8/R apart;  with mixing c = mix(LN(c))
    out = x + BN(Wo softmax(θ(x) φ(c)ᵀ / √d) g(c)), where BN starts at zero
    As in the author's full release (the paper pools every window by itself): down_R is one strided
    separable convolution of the whole map, and 0 is what lies outside of z. LN and, without mixing,
    φ and g are computed before the windows overlap: the same numbers from up to R² times fewer
    pixels. Where 8 does not divide a side the released code fails; here zeros continue x to the
    right and to the bottom.
    Cost for N pixels, inner width I, M = (H/R + 8 - 8/R)(W/R + 8 - 8/R) context pixels:
    N C/R² (R² + C) for down_R, 2NCI + 128NI for θ, the attention and Wo, 2NCI + 64NC for φ, g and
    the mixing, or 2MCI for φ and g without it."""
    def __init__(self, dim, ratio, reduction, mixing):
        super().__init__()
        inner = dim // reduction
        heads = ratio ** 2
        self.stride = WINDOW // ratio
        margin = WINDOW - self.stride
        low, high = margin // 2, margin - margin // 2
        self.margin = (low, high, high, low)    # left right top bottom; R = 8: 3 4 4 3, as released
        depthwise = nn.Conv2d(dim, dim, ratio, ratio, groups=dim, bias=False)
        depthwise_norm = ConvNorm(depthwise, nn.BatchNorm2d(dim), nn.ReLU())
        self.down = nn.Sequential(depthwise_norm, conv_bn_relu(dim, dim))
        self.norm = LayerNorm2d(dim) if mixing else None
        self.mixing = PositionMixing(heads) if mixing else None
        self.theta = Pointwise(dim, inner)
        self.phi = Pointwise(dim, inner)
        self.g = Pointwise(dim, inner)
        self.attend = Attend(heads)
        self.out = ConvNorm(Pointwise(inner, dim, bias=False), nn.BatchNorm2d(dim))
        for conv in (depthwise, self.out.conv):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for conv in (self.theta, self.phi, self.g):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.out.norm.weight)

    def forward(self, x):
        height, width = x.shape[2:]
        y = fill(x, WINDOW)                                         # (B, C, 8h, 8w)
        theta = windows(self.theta(y), WINDOW, WINDOW)              # (P, I, 8, 8), P = B h w
        phi, g = self.context(F.pad(self.down(y), self.margin))     # (P, I, 8, 8)
        out = self.attend(tokens(theta), tokens(phi), tokens(g))    # (P, 64, I)
        out = join_windows(grid(out, theta), y)                     # (B, I, 8h, 8w)
        return x + self.out(out[:, :, :height, :width])

    def context(self, z):
        if self.mixing is None:
            return (windows(f(z), WINDOW, self.stride) for f in (self.phi, self.g))
        c = self.mixing(windows(self.norm(z), WINDOW, self.stride))
        return self.phi(c), self.g(c)


class LawinSumHead(nn.Module):
    """Lawin's pyramid of windows as released for B0 and B1: levels and branches are added.
    x = Σ_i up(W_i x_i + b_i), i = 4, 3, 2
    y = short(x) + pool(mean(x)) + Σ_R attention_R(x), R = 8, 4, 2;  short and pool: ConvBNReLU
    logits = V dropout2d(ReLU(BN(F cat(up(y), W1 x1 + b1)))) + v, at stride 4
    No position mixing. F by the identity of UpsampledSum, which saves E² (N1 - N2) multiply-adds.
    BN in pool sees one value an image, hence training takes two images a batch.
    width: E, or (P, E) with P for the projections (B4: 768 and 512)."""
    uses, width = (0, 1, 2, 3), 128
    reduction = 1
    mixing = False

    def __init__(self, dims, num_classes, width, rank=None):
        super().__init__()
        embed, width = (width, width) if isinstance(width, int) else width
        self.projections = nn.ModuleList(Pointwise(dim, embed) for dim in dims[1:])
        self.short_path = conv_bn_relu(width, width)
        self.image_pool = conv_bn_relu(width, width)
        self.attentions = nn.ModuleList(
            LargeWindowAttention(width, ratio, self.reduction, self.mixing) for ratio in (8, 4, 2))
        self.low_level = Pointwise(dims[0], 48)
        self.low_level_fuse = conv_bn_relu(width + 48, width)
        self.sum = UpsampledSum()
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = Pointwise(width, num_classes)

    def forward(self, maps):
        x = self.embed(maps[1:])                                    # (B, E, H/8, W/8)
        mean = x.mean((2, 3), keepdim=True)                         # (B, E, 1, 1)
        branches = [self.short_path(x), self.image_pool(mean)]
        branches += [attention(x) for attention in self.attentions]
        x = self.join(branches)
        fuse = self.low_level_fuse
        x = self.sum(fuse.conv, [x, self.low_level(maps[0])])       # (B, E, H/4, W/4)
        x = fuse.act(fuse.norm(x))
        return self.classifier(self.dropout(x))                     # (B, K, H/4, W/4)

    def embed(self, maps):
        x2, x3, x4 = (p(x) for p, x in zip(self.projections, maps))
        return resize(x4, x2.shape[2:]) + resize(x3, x2.shape[2:]) + x2

    def join(self, branches):
        return sum(branches)


class LawinHead(LawinSumHead):
    """The same as released for B2 to B5: levels and branches are concatenated and convolved.
    x = ReLU(BN(G cat(up(W4 x4 + b4), up(W3 x3 + b3), W2 x2 + b2)))
    y = ReLU(BN(H cat(short(x), pool(mean(x)), attentions)));  the context's positions are mixed
    The identity of UpsampledSum saves, besides LawinSumHead's, 3 P E N2 + (P - E) Σ C_i N_i -
    P E Σ C_i multiply-adds in G (i = 2..4) and E² (N2 - 1) in H."""
    width = 512
    reduction = 2
    mixing = True

    def __init__(self, dims, num_classes, width, rank=None):
        super().__init__(dims, num_classes, width)
        embed, width = (width, width) if isinstance(width, int) else width
        self.fuse = conv_bn_relu(3 * embed, width)
        self.cat = conv_bn_relu(5 * width, width)

    def embed(self, maps):
        x = self.sum(self.fuse.conv, maps[::-1], self.projections[::-1])
        return self.fuse.act(self.fuse.norm(x))

    def join(self, branches):
        return self.cat.act(self.cat.norm(self.sum(self.cat.conv, branches)))


class FpnHead(nn.Module):
    """Semantic FPN (arXiv 1901.02446 §3) as in mmseg, PVT and Next-ViT; logits at stride 4.
    Pyramid of width E, head of width E/2:
    L_i = W_i x_i + b_i + nearest(L_{i+1})
    S_1 = g(f(L_1));  S_i = (i - 1 times: g, then up x2)(f(L_i))
    logits = V dropout2d(Σ up(S_i)) + v;  f: 3x3 convolution with bias, g: 3x3 ConvBNReLU
    Odd sides are doubled as they are: only the sum fits S_i to S_1."""
    uses, width = (0, 1, 2, 3), 256

    def __init__(self, dims, num_classes, width, rank=None):
        super().__init__()
        self.lateral = nn.ModuleList(Pointwise(dim, width) for dim in dims)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in dims)
        for conv in (*self.lateral, *self.smooth):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        half = width // 2
        self.scale = nn.ModuleList()
        for steps in (1, 1, 2, 3):
            widths = [width] + steps * [half]
            convs = (conv_bn_relu(a, b, 3) for a, b in zip(widths, widths[1:]))
            self.scale.append(nn.ModuleList(convs))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = logit_layer(half, num_classes)

    def forward(self, maps):
        pyramid = [lateral(x) for lateral, x in zip(self.lateral, maps)]        # (B, E, h_i, w_i)
        for i in (3, 2, 1):
            above = F.interpolate(pyramid[i], pyramid[i - 1].shape[2:])         # nearest
            pyramid[i - 1] = pyramid[i - 1] + above
        out = None
        for x, smooth, steps in zip(pyramid, self.smooth, self.scale):
            x = smooth(x)
            for step in steps:
                x = step(x)                                         # (B, E/2, 2ʲ h_i, 2ʲ w_i)
                if out is not None:
                    x = resize(x, (2 * x.shape[2], 2 * x.shape[3]))
            out = x if out is None else out + resize(x, out.shape[2:])
        return self.classifier(self.dropout(out))                   # (B, K, H/4, W/4)


HEAD = {"mlp": MlpHead, "mlp_concat": MlpConcatHead, "ham": HamHead, "light_ham": LightHamHead,
        "lawin": LawinHead, "lawin_sum": LawinSumHead, "fpn": FpnHead}


# ---- Loss and prediction at the labels' resolution, without logits of that resolution ------------

class _CrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass: soft-max minus one-hot is at hand where the loss is."""
    @staticmethod
    def forward(ctx, logits, labels, count, weight, ignore_index):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        x = logits.to(dtype, memory_format=torch.channels_last)
        size = labels.shape[1:]
        vertical = bilinear_matrix(size[0], x)
        grad = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        total = x.new_zeros(())
        for images, rows in strips((*x.shape[:2], *size), x.device):
            z = upsample_strip(x[images], rows, size, vertical)     # (b, rows, W, K)
            label = labels[images, rows, :, None].long()
            labelled = label != ignore_index
            label = label.masked_fill(~labelled, 0)
            share = labelled.to(dtype) if weight is None else labelled * weight[label]
            z -= z.amax(-1, keepdim=True)
            picked = z.gather(-1, label)
            norm = z.exp_().sum(-1, keepdim=True)
            total += ((norm.log() - picked) * share).sum()
            if grad is not None:
                z *= share / norm
                z.scatter_add_(-1, label, -share)                   # soft-max minus one-hot
                sources, part = downsample_strip(z, rows, vertical, x)
                grad[images, :, sources] += part
        ctx.save_for_backward(grad, count)
        ctx.dtype = logits.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad_output):
        grad, count = ctx.saved_tensors
        return (grad * (grad_output / count)).to(ctx.dtype), None, None, None, None


class UpsampledCrossEntropy(nn.Module):
    """Cross entropy of bilinearly up-sampled logits, without the up-sampled logits.
    Equals F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, weight,
    ignore_index=...), a mean over the labelled pixels, each with its class's weight (K,); value and
    gradient are computed strip by strip in O(strip) memory. The logits are enlarged rather than the
    labels reduced: ids have no mean, and taking the nearest loses thin objects."""
    def __init__(self, ignore_index=255, weight=None):
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight, persistent=False)

    def count(self, labels):
        """The divisor of the mean: labelled pixels, or the sum of their weights; a scalar on the
        labels' device, to be summed over processes and accumulated batches."""
        labelled = labels != self.ignore_index
        if self.weight is None:
            return labelled.count_nonzero().double()
        weights = self.weight[labels.long().masked_fill(~labelled, 0)]
        return (labelled * weights).sum(dtype=torch.float64)

    def forward(self, logits, labels, count=None):
        """logits (B, K, h, w), integer labels (B, H, W) -> scalar; nothing labelled: 0, gradient 0.
        count: the divisor, where it is not that of these labels alone."""
        count = torch.as_tensor(self.count(labels) if count is None else count)
        count = count.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
        count = count + (count == 0)
        weight = None if self.weight is None else self.weight.to(count)
        with full_precision(logits):
            return _CrossEntropy.apply(logits, labels, count, weight, self.ignore_index)


def upsampled_argmax(views, size):
    """Class of every pixel at `size` from low-resolution logits -> (B, H, W) int64.
    views: logits (B, K, h_i, w_i), each of its own resolution. One: arg-max of the bilinear resize;
    several: arg-max of the mean of their soft-maxes (multi-scale and flip testing; hand a flipped
    view over flipped back)."""
    dtype = torch.promote_types(views[0].dtype, torch.float32)
    views = [v.to(dtype, memory_format=torch.channels_last) for v in views]
    shape = (*views[0].shape[:2], *size)
    verticals = [bilinear_matrix(size[0], v) for v in views]
    out = views[0].new_empty((shape[0], *size), dtype=torch.long)
    for images, rows in strips(shape, out.device):
        with full_precision(out):
            scores = [upsample_strip(v[images], rows, size, m) for v, m in zip(views, verticals)]
        score = scores[0]
        if len(scores) > 1:
            score = sum(z.softmax(-1) for z in scores)
        out[images, rows] = score.argmax(-1)
    return out
