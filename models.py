"""Models: tables of variants, the one skeleton that they share, and building, loading, saving and fusing them.

    python models.py                                    # prints the catalogue: every model and every word of every slot
    model = models.build("segformer_b2", attn="lsra", ffn="dest", head="light_ham")

A published size is a row of SIZES; a model is such a row plus one word for each slot (layers.py has the dicts of words);
everything else is an override by keyword or flag, also stage by stage: attn="lsra,lsra,sra,sra".
"""
import argparse
import contextlib
import copy
import fcntl
import io
import json
import math
import mmap
import os
import pathlib
import re
import socket
import zipfile
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import layers
from layers import ATTENTION, EMBED, FFN, HEAD, NORM, SKIP, UserError

SLOTS = {"embed": EMBED, "attn": ATTENTION, "ffn": FFN, "norm": NORM, "skip": SKIP, "head": HEAD}
CLASSES = {"seg": 150, "cls": 1000}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Size:
    """One published size: the numbers of its paper's table. Four-tuples run over the stages."""
    dims: tuple
    depths: tuple
    heads: tuple = (1, 2, 5, 8)
    reductions: tuple = (8, 4, 2, 1)        # R of the spatial reduction
    ratios: tuple = (4, 4, 4, 4)            # FFN expansion
    width: int = 768                        # of the all-MLP head
    decoder: int | tuple | None = None      # width of the row's own head, where that is not the all-MLP one
    rank: int = 64                          # bases of an NMF head
    drop_path: tuple = (0.1, 0.1)           # (cls, seg), rising linearly over the blocks
    eps: float = 1e-6                       # of the LayerNorms of blocks and stages; inner and embed norms are 1e-5 always
    stage_norm: str = "trunk"               # a key of STAGE_NORM
    init: str = "mit"                       # a key of INIT
    groups: tuple | None = None             # Next-ViT: a transformer block closes each group of so many; 0 = none


def mit(dims, *depths, **more):
    """A row of MiT's shape: only the first width set and the depths differ."""
    return Size({32: (32, 64, 160, 256), 64: (64, 128, 320, 512)}[dims], depths, **more)


def lite(*depths):
    return Size((64, 128, 256, 512), depths, (1, 2, 4, 8), eps=1e-5)


def dest(*dims):
    return lambda *depths: Size(dims, depths, ratios=(8, 8, 4, 4), width=256, stage_norm="none")


def pvt_v2(dims, *depths, **more):
    """PVTv2, Tables 1 and 2 (arXiv 2106.13797): MiT with expansion 8-8-4-4."""
    return mit(dims, *depths, **{"ratios": (8, 8, 4, 4), "width": 256 if dims == 32 else 768} | more)


def swin(dim, depth, cls):
    """Swin, §3.3 (arXiv 2103.14030): width C, depth of stage 3, drop-path of classification."""
    return Size(tuple(dim * 2 ** i for i in range(4)), (2, 2, depth, 2), tuple(dim // 32 * 2 ** i for i in range(4)), width=256,
                drop_path=(cls, 0.3), eps=1e-5, stage_norm="tap", init="swin")


def next_vit(depth, cls):
    """Next-ViT, Table 3 (arXiv 2207.05501): depth of stage 3. dims: what the stages give; 3/4 of it inside."""
    return Size((96, 256, 512, 1024), (3, 4, depth, 3), (3, 6, 12, 24), drop_path=(cls, 0.2), stage_norm="bn", init="normal",
                groups=(0, 4, 5, 3))


SIZES = {   # SegFormer, Table 6 (arXiv 2105.15203); the ratios are the released code's 4, not the ImageNet table's 8-8-4-4
    "mit_b0": mit(32, 2, 2, 2, 2, width=256),
    "mit_b1": mit(64, 2, 2, 2, 2, width=256),
    "mit_b2": mit(64, 3, 4, 6, 3),
    "mit_b3": mit(64, 3, 4, 18, 3),
    "mit_b4": mit(64, 3, 8, 27, 3),
    "mit_b5": mit(64, 3, 6, 40, 3),

    "pvt_v2_b0": pvt_v2(32, 2, 2, 2, 2),
    "pvt_v2_b1": pvt_v2(64, 2, 2, 2, 2),
    "pvt_v2_b2": pvt_v2(64, 3, 4, 6, 3),
    "pvt_v2_b3": pvt_v2(64, 3, 4, 18, 3, drop_path=(0.3, 0.1)),
    "pvt_v2_b4": pvt_v2(64, 3, 8, 27, 3, drop_path=(0.3, 0.1)),
    "pvt_v2_b5": pvt_v2(64, 3, 6, 40, 3, drop_path=(0.3, 0.1), ratios=(4, 4, 4, 4)),

    # SegNeXt, Table 2 (arXiv 2209.08575); mmsegmentation 1.x runs B and L with 16 bases by oversight
    "mscan_t": mit(32, 3, 3, 5, 2, ratios=(8, 8, 4, 4), decoder=256, rank=16, eps=1e-5, init="mscan"),
    "mscan_s": mit(64, 2, 2, 4, 2, ratios=(8, 8, 4, 4), decoder=256, rank=16, eps=1e-5, init="mscan"),
    "mscan_b": mit(64, 3, 3, 12, 3, ratios=(8, 8, 4, 4), decoder=512, eps=1e-5, init="mscan"),
    "mscan_l": mit(64, 3, 5, 27, 3, ratios=(8, 8, 4, 4), decoder=1024, eps=1e-5, init="mscan", drop_path=(0.2, 0.3)),

    "swin_t": swin(96, 6, 0.2),
    "swin_s": swin(96, 18, 0.3),
    "swin_b": swin(128, 18, 0.5),

    "next_vit_s": next_vit(10, 0.1),
    "next_vit_b": next_vit(20, 0.2),
    "next_vit_l": next_vit(30, 0.2),

    # DEST, Table 1 (arXiv 2204.13791), as in its depth code; its segmentation file gives B4 the depths of B3
    "dest_b0": dest(32, 64, 160, 256)(2, 2, 2, 2),
    "dest_b1": dest(64, 128, 250, 320)(2, 2, 2, 2),
    "dest_b2": dest(64, 128, 250, 320)(3, 3, 6, 3),
    "dest_b3": dest(64, 128, 250, 320)(3, 6, 8, 3),
    "dest_b4": dest(64, 128, 250, 320)(3, 8, 12, 5),
    "dest_b5": dest(64, 128, 250, 320)(3, 10, 16, 5),

    # Lawin's B4 has 768 channels in its projections and 512 after them
    **{f"lawin_b{i}": mit(32 if i == 0 else 64, *depths, width=256 if i < 2 else 768, decoder=(128, 128, 512, 512, (768, 512), 512)[i])
       for i, depths in enumerate([(2, 2, 2, 2), (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3), (3, 6, 40, 3)])},

    # The original project's own shapes; its LayerNorms have PyTorch's eps
    "lite_1121": lite(1, 1, 2, 1),
    "lite_1221": lite(1, 2, 2, 1),
    "lite_hybrid": mit(64, 3, 4, 6, 3, stage_norm="bn", init="normal", groups=(0, 4, 6, 3)),
}


@dataclass(frozen=True)
class Spec:
    """A model: a row of SIZES and a word for each slot; a tuple of four words gives the stages different blocks."""
    name: str
    size: str
    embed: str | tuple = "overlap"
    attn: str | tuple = "sra"
    ffn: str | tuple = "mix"
    norm: str | tuple = "ln"
    skip: str | tuple = "pre"
    head: str = "mlp"

    @property
    def overrides(self):
        """{slot: words} where this differs from the named row."""
        row = MODELS[self.name]
        return {slot: getattr(self, slot) for slot in SLOTS if getattr(self, slot) != getattr(row, slot)}

    def words(self, slot):
        """The words of the four stages."""
        word = getattr(self, slot)
        return word if isinstance(word, tuple) else (word,) * 4

    def __str__(self):
        join = lambda word: word if isinstance(word, str) else "+".join(word)
        return "-".join([self.name] + [f"{slot}={join(word)}" for slot, word in self.overrides.items()])


NEXT = dict(embed="next", attn="emhsa", ffn="mlp", norm="bn")       # ffn, norm, skip: the stages' own; stage 1 has no attention
MODELS = {spec.name: spec for spec in [
    *(Spec(f"segformer_b{i}", f"mit_b{i}") for i in range(6)),
    *(Spec(f"pvt_v2_b{i}", f"pvt_v2_b{i}", head="fpn") for i in range(6)),
    Spec("pvt_v2_b2_li", "pvt_v2_b2", attn="lsra", ffn="mix_relu", head="fpn"),
    *(Spec(f"segnext_{x}", f"mscan_{x}", embed="conv", attn="msca", norm="bn", skip="scaled", head="ham") for x in "tsbl"),
    *(Spec(f"nextvit_{x}", f"next_vit_{x}", head="fpn", **NEXT) for x in "sbl"),
    *(Spec(f"swin_{x}", f"swin_{x}", embed="patch", attn="window", ffn="mlp", head="fpn") for x in "tsb"),
    *(Spec(f"dest_b{i}", f"dest_b{i}", attn="dest", ffn="dest", norm="bn") for i in range(6)),
    *(Spec(f"lawin_b{i}", f"lawin_b{i}", head="lawin" if i > 1 else "lawin_sum") for i in range(6)),

    # the original project's experiments, one step after another
    Spec("lite_lsra", "mit_b2", attn="lsra"),
    Spec("lite_lsra_dest", "mit_b2", attn="lsra", ffn="dest"),
    Spec("lite_rskip", "mit_b2", attn="lsra", ffn="dest", skip="recursive"),
    Spec("lite_ea", "mit_b2", attn="ea"),
    Spec("lite_lsrea", "lite_1121", attn="lsrea", ffn="dest", skip="recursive"),
    Spec("lite_lsrea_ham", "lite_1221", attn="lsrea_noproj", ffn="dest", skip="recursive", head="light_ham"),
    Spec("lite_msca", "mit_b2", attn="msca"),
    Spec("lite_window", "mit_b2", attn="window"),
    Spec("lite_hybrid", "lite_hybrid", **NEXT),
    Spec("lite_final", "lite_1221", attn="lsra_noproj", ffn="dest", head="light_ham"),
]}

DECODER_WIDTH = {"ham": 512, "light_ham": 512, "lawin": 512, "lawin_sum": 128, "fpn": 256}   # where the row names none

# stage_norm: (norm class, stages that have one: all of them / the last for cls, does the next stage see the normed map?)
STAGE_NORM = {
    "trunk": (NORM["ln"], "all", True),         # SegFormer, PVTv2, SegNeXt
    "none": (None, "none", True),               # DEST
    "tap": (NORM["ln"], "seg", False),          # Swin: on the maps that the head reads; cls: one, at the end
    "bn": (NORM["bn"], "seg", True),            # Next-ViT: segmentation puts one after each stage; cls: one, at the end
}


# ---------------------------------------------------------------------------------------------------------------------
# The skeleton
# ---------------------------------------------------------------------------------------------------------------------

class Stage(nn.Module):
    """embed -> blocks -> norm. Returns (what the next stage receives, what the head receives)."""

    def __init__(self, embed, blocks, norm, in_trunk):
        super().__init__()
        self.embed = embed
        self.blocks = blocks
        self.norm = norm
        self.in_trunk = in_trunk

    def forward(self, x):
        x = self.blocks(self.embed(x))
        out = self.norm(x)
        return (out if self.in_trunk else x), out


class Encoder(nn.Module):
    """Four stages: images (B, 3, H, W) -> maps at strides 4, 8, 16, 32, each side rounded up."""

    def __init__(self, stages, smallest):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.smallest = smallest

    def forward(self, images):
        if min(images.shape[2:]) < self.smallest:
            raise UserError(f"image of {images.shape[3]} x {images.shape[2]} pixels: this model's blocks need at least "
                            f"{self.smallest} pixels a side; resize it or choose other attention words")
        x, maps = images, []
        for stage in self.stages:
            x, out = stage(x)
            maps.append(out)
        return maps


class Model(nn.Module):
    """An encoder and a head. task "seg": (B, 3, H, W) -> logits (B, K, h, w) at stride 4 or 8; "cls": -> (B, K)."""

    def __init__(self, spec, task, num_classes, encoder, head):
        super().__init__()
        self.spec, self.task, self.num_classes = spec, task, num_classes
        self.encoder = encoder
        self.head = head

    def forward(self, images):
        return self.head(self.encoder(images))


def build_stage(spec, i, task, rates, reads):
    """Stage i with its embed, blocks and norm; `reads`: whether the head uses its map."""
    size = SIZES[spec.size]
    dim, heads, reduction, ratio = (t[i] for t in (size.dims, size.heads, size.reductions, size.ratios))
    words = {slot: SLOTS[slot][spec.words(slot)[i]] for slot in ("embed", "attn", "ffn", "norm", "skip")}
    layer_norm = partial(NORM["ln"], eps=size.eps)          # the row's eps is a LayerNorm's; a BatchNorm has 1e-5 in every source
    norm = layer_norm if words["norm"] is NORM["ln"] else words["norm"]
    first = dim
    if size.groups is None:
        blocks = [layers.Block(words["skip"](words["attn"](dim, heads, reduction, j), dim, norm, rate),
                               words["skip"](words["ffn"](dim, ratio), dim, norm, rate)) for j, rate in enumerate(rates)]
    else:
        first, blocks = next_vit_blocks(words["attn"], dim, reduction, rates, size.groups[i])
    embed = words["embed"](size.dims[i - 1] if i else 3, first, 2 if i else 4, words["norm"])
    kind, where, in_trunk = STAGE_NORM[size.stage_norm]
    wanted = where == "all" or where == "seg" and (reads or in_trunk if task == "seg" else i == 3)
    stage_norm = (layer_norm if kind is NORM["ln"] else kind)(dim) if wanted else nn.Identity()
    return Stage(embed, nn.Sequential(*blocks), stage_norm, in_trunk)


def next_vit_blocks(attention, dim, reduction, rates, group):
    """-> width of the first block, blocks: NCBs, with an NTB at the end of every `group` of them (0: NCBs alone)."""
    width = layers.attention_width(dim) if group else dim
    blocks, last = [], width
    for j, rate in enumerate(rates):
        if group and (j + 1) % group == 0:
            blocks.append(layers.NextTransformerBlock(attention, last, dim, reduction, j // group, rate))
            last = dim
        else:
            blocks.append(layers.NextConvBlock(last, width, rate))
            last = width
    return width, blocks


def build(name, task="seg", num_classes=None, drop_path=None, **slots):
    """Build a model with fresh weights.

    name: a key of MODELS; task: "seg" | "cls"; num_classes: 150 for seg, 1000 for cls unless given; drop_path: the last
    block's rate, the row's own unless given; slots: embed, attn, ffn, norm, skip, head, each a word of layers.py or four
    words (tuple, or separated by commas) for the four stages. Errors: UserError that lists the known words.
    """
    spec = make_spec(name, **slots)
    if task not in CLASSES:
        raise UserError(f"task {task!r} is not known; choose from: {', '.join(CLASSES)}")
    size = SIZES[spec.size]
    num_classes = CLASSES[task] if num_classes is None else num_classes
    rate = size.drop_path[task == "seg"] if drop_path is None else drop_path
    if not 0 <= rate < 1:
        raise UserError(f"drop_path {rate}: must be at least 0 and below 1")
    last = max(sum(size.depths) - 1, 1)
    rates = [rate * i / last for i in range(sum(size.depths))]
    head = HEAD[spec.head]
    uses = head.uses if task == "seg" else (3,)
    stages = []
    for i, depth in enumerate(size.depths):
        start = sum(size.depths[:i])
        stages.append(build_stage(spec, i, task, rates[start:start + depth], i in uses))
    if task == "seg":
        head = head(size.dims, num_classes, head_width(spec), size.rank)
    else:
        head = layers.Classifier(size.dims[-1], num_classes)
        nn.init.normal_(head.fc.weight, std=0.02)           # as every family has it
        nn.init.zeros_(head.fc.bias)
    model = Model(spec, task, num_classes, Encoder(stages, smallest_image(spec)), head)
    for m in model.modules():
        if isinstance(m, layers.WindowAttention):
            m.shift_small = task == "seg"
    init_encoder(model.encoder, *INIT[size.init])
    return model


def make_spec(name, **slots):
    """The Spec of a named row with some slots overridden; None leaves the row's word."""
    if name not in MODELS:
        raise UserError(f"model {name!r} is not known; choose from: {', '.join(MODELS)}")
    chosen = {}
    for slot, words in slots.items():
        if slot not in SLOTS:
            raise UserError(f"slot {slot!r} is not known; choose from: {', '.join(SLOTS)}")
        if words is None:
            continue
        words = tuple(word.strip() for word in words.split(",")) if isinstance(words, str) else tuple(words)
        for word in words:
            if word not in SLOTS[slot]:
                raise UserError(f"--{slot} {word!r} is not known; choose from: {', '.join(SLOTS[slot])}")
        if len(words) not in ((1,) if slot == "head" else (1, 4)):
            raise UserError(f"--{slot} {','.join(words)}: give one word" + (", or four, one for each stage" * (slot != "head")))
        chosen[slot] = words[0] if len(set(words)) == 1 else words
    row = MODELS[name]
    for slot in ("ffn", "norm", "skip"):
        if SIZES[row.size].groups and chosen.get(slot, getattr(row, slot)) != getattr(row, slot):
            raise UserError(f"--{slot} {slots[slot]} does not go with --model {name}: Next-ViT's stages have their own ffn, norm "
                            "and skip; change its embed, attn or head, or choose a model of plain blocks")
    return replace(row, **chosen)


def head_width(spec):
    """Width of the decoder: the row's, where the row is about this head, else the head's usual one."""
    size = SIZES[spec.size]
    if spec.head in ("mlp", "mlp_concat"):
        return size.width
    own = size.decoder if spec.head == MODELS[spec.name].head else None
    return DECODER_WIDTH[spec.head] if own is None else own


def smallest_image(spec):
    """Smallest side in pixels: each stage's grid, the side divided by 4, 8, 16, 32 and rounded up, must hold its reduction."""
    size = SIZES[spec.size]
    need = [r if getattr(ATTENTION[word], "reduces", False) and (size.groups is None or size.groups[i]) else 1
            for i, (word, r) in enumerate(zip(spec.words("attn"), size.reductions))]
    return max((n - 1) * 4 * 2 ** i + 1 for i, n in enumerate(need))


def init_encoder(encoder, linear, conv):
    """Draw the weights of linear layers with std(layer) = linear, of other convolutions with conv; None: PyTorch's own.
    Biases are 0; norms keep 1 and 0. The sources' trunc_normal_ cuts at ±2, that is 100 standard deviations: never."""
    for m in encoder.modules():
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            std = linear if isinstance(m, (layers.Pointwise, nn.Linear, nn.Conv1d)) else conv
            if std is not None and not m.weight.is_meta:        # slow there, and for nothing
                nn.init.normal_(m.weight, std=std(m))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


def by_fan_out(layer):
    return (2 / (layer.weight[0, 0].numel() * len(layer.weight) // getattr(layer, "groups", 1))) ** 0.5


small = lambda layer: 0.02
INIT = {    # (linear layers, other convolutions)
    "mit": (small, by_fan_out),             # MiT, PVTv2, DEST
    "mscan": (by_fan_out, by_fan_out),
    "swin": (small, None),
    "normal": (small, small),               # Next-ViT
}


# ---------------------------------------------------------------------------------------------------------------------
# Command line, descriptions, parameter groups
# ---------------------------------------------------------------------------------------------------------------------

def bounded(kind, fits, rule):
    """A type for argparse, whose own one-line error then names the flag and says the rule."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r}: {rule}")
        return value
    return parse


positive = bounded(float, lambda v: v > 0, "must be a number above 0")
positive_int = bounded(int, lambda v: v > 0, "must be a whole number above 0")
non_negative = bounded(float, lambda v: v >= 0, "must be a number, at least 0")
count = bounded(int, lambda v: v >= 0, "must be a whole number, at least 0")
share = bounded(float, lambda v: 0 <= v < 1, "must be a number, at least 0 and below 1")


def no_effect(args, why, names):
    """A flag that would change nothing is an error: its user believes that it does.

    args.defaults: {name: value} of all flags; names: those without effect, separated by blanks.
    """
    given = ["--" + name.replace("_", "-") for name in names.split()
             if getattr(args, name) != args.defaults[name]]
    if given:
        raise UserError(f"{' '.join(given)}: no effect {why}; leave it out")


def add_model_arguments(parser, default="segformer_b2"):
    """The flags --model, --embed, --attn, --ffn, --norm, --skip, --head."""
    parser.add_argument("--model", default=default, help=f"a row of `python models.py` (default {default})")
    for slot, words in SLOTS.items():
        per_stage = "" if slot == "head" else "; four words, comma-separated, for the four stages"
        parser.add_argument(f"--{slot}", help=f"{' | '.join(words)}{per_stage} (default: the model's own)")


def slots_from(args):
    """{slot: words} of the slots given on the command line."""
    return {slot: getattr(args, slot) for slot in SLOTS if getattr(args, slot) is not None}


def describe(model):
    """What `restore` needs to build the model again, in primitives."""
    slots = {slot: word if isinstance(word, str) else list(word) for slot, word in model.spec.overrides.items()}
    return {"name": model.spec.name, "slots": slots, "task": model.task, "num_classes": model.num_classes}


def parameter_groups(model, lr, weight_decay, head_lr_factor=10.0):
    """Groups for AdamW: the head learns `head_lr_factor` times as fast (SegFormer's recipe, a new decoder on a trained
    encoder); norms, biases, layer scales and other vectors do not decay. Each group keeps its "lr_factor" for schedules."""
    groups = {}
    for name, p in model.named_parameters():
        part = "head" if name.startswith("head.") else "encoder"
        decays = p.ndim > 1 and not name.endswith(("bias", "bias_table"))
        groups.setdefault((part, decays), []).append(p)
    return [{"name": f"{part}, {'decayed' if decays else 'not decayed'}", "params": params,
             "lr_factor": (factor := head_lr_factor if part == "head" else 1.0), "lr": lr * factor,
             "weight_decay": weight_decay if decays else 0.0}
            for (part, decays), params in groups.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Files: plain tensors and primitives, read without running code, written atomically
# ---------------------------------------------------------------------------------------------------------------------

def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and primitives, atomically."""
    buffer = io.BytesIO()           # torch.save straight to a full disk fails without saying why; one write() does say
    torch.save(checkpoint, buffer)
    write_file(path, [buffer.getbuffer()])


def write_file(path, parts):
    """Write bytes; a reader, or a crash, sees the old file or the whole new one, never a part."""
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)            # room on a full disk
        raise UserError(f"{path}: cannot be written ({error.strerror}); "
                        "the previous one, if any, is untouched")
    with contextlib.suppress(OSError):          # CIFS and others cannot; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_checkpoint(path):
    """Read a .pt / .pth / .bin file -> its content, on the CPU. Runs no code: weights_only, and archives that claim more
    than the file holds are refused before any of it is read. Errors: UserError with the file's name and the reason."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
                if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or \
                        sum(e.file_size for e in entries) > os.path.getsize(path):
                    raise UserError(f"{path}: not a checkpoint as torch.save writes it (compressed or overlapping parts); refused")
                if (bad := archive.testzip()) is not None:      # torch.load does not look at the check sums
                    raise UserError(f"{path}: damaged (check sum of {bad}); copy or download the file again")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a checkpoint file")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})")
    except UserError:
        raise
    except Exception as error:      # torch.load reports a broken file by nearly any type of exception
        if "weights_only" in str(error) and "Unsupported operand" not in str(error):        # operand: no pickle at all
            raise UserError(f"{path}: holds Python objects that would run code when loaded, not only tensors; refused. "
                            "If you trust its source, save its state_dict() alone")
        raise UserError(f"{path}: not a readable checkpoint (truncated, damaged or another format)")
    for tensor in _tensors(checkpoint):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: a tensor of shape {tuple(tensor.shape)} claims more elements than the file holds; refused")
    return checkpoint


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
               "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def write_safetensors(path, state):
    """The same format the other way round: large elements first, so that each lies at a multiple of its size."""
    state = dict(sorted(state.items(), key=lambda entry: -entry[1].element_size()))
    words, header, end = {dtype: word for word, dtype in SAFETENSORS.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": words[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    write_file(path, [len(header).to_bytes(8, "little"), header,
                      *(tensor.flatten().view(torch.uint8).numpy() for tensor in state.values())])


def read_safetensors(path):
    """Read a .safetensors file -> {name: tensor}, mapped from the disk: 8 bytes length, a JSON header, the raw tensors.

    Every number in the header is checked against the file before it is used. Errors: UserError.
    """
    def refuse(reason):
        raise UserError(f"{path}: not a valid safetensors file ({reason})")
    try:
        total = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, 100_000_000):       # the format's own limit for a header
                refuse(f"it has {total} bytes and claims a header of {length}")
            header = json.loads(file.read(length).decode("utf-8"))
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})")
    except (ValueError, RecursionError):
        refuse("its header is not JSON")
    if not isinstance(header, dict):
        refuse("its header is not a table")
    header.pop("__metadata__", None)
    entries, end, start = {}, 0, 8 + length
    try:
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            shape, dtype = entry["shape"], SAFETENSORS[entry["dtype"]]
            if not all(type(n) is int and 0 <= n <= total for n in (*shape, first, last)):
                refuse(f"{name}: a size or offset is out of range")
            entries[name] = first, last, shape, dtype
    except (KeyError, TypeError, ValueError):
        refuse("an entry lacks a known dtype, a shape or two offsets")
    tensors = {}
    for name, (first, last, shape, dtype) in sorted(entries.items(), key=lambda e: e[1][:2]):
        count = math.prod(shape)
        if first != end or last - first != count * dtype.itemsize or start + last > total:
            refuse(f"{name}: its bytes {first}:{last} overlap, leave a hole, or do not fit its shape {shape} or the file")
        end = last
        tensors[name] = torch.frombuffer(raw, dtype=dtype, count=count, offset=start + first).view(shape) if count else \
            torch.empty(shape, dtype=dtype)
    if start + end != total:
        refuse(f"{total - start - end} bytes behind the last tensor")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder: .lock, last.pt, best.pt, log.jsonl
# ---------------------------------------------------------------------------------------------------------------------

def lock_folder(output):
    """Make a run's folder and hold it alone: keep the open file, the lock ends with it.

    `.lock` names the process that holds the folder. Errors: UserError, where another process
    does or nothing can be written; a file system that has no locks costs a note.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):      # what a held lock gives
            lock.seek(0)
            holder = lock.read(200).strip() or "a process without a name"
            raise UserError(f"{output}: another run is writing here ({holder}); "
                            "wait for it or choose another --output-dir")
        except OSError as error:
            print(f"note: {output} cannot be locked ({error.strerror}); "
                  "see to it that no other run writes there")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
    except OSError as error:
        raise UserError(f"{output}: cannot write here ({error.strerror}); "
                        "choose another --output-dir")
    return lock


def find_state(output, resume, settings):
    """The state to go on from, or None; the folder's own last.pt goes before --resume.

    settings: {name: primitive}, what makes two runs the same; all that differ are named in one
    UserError. A state from elsewhere is copied here with its best.pt, and the log is made whole.
    """
    path = output / "last.pt"
    log = output / "log.jsonl"
    if not path.exists():
        if log.exists() and log.stat().st_size:
            raise UserError(f"{output}: log.jsonl has the epochs of a run whose last.pt is gone; "
                            "move it away or choose another --output-dir")
        if resume is None:
            return None
        path = pathlib.Path(resume)
        path = path / "last.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not {"optimizer", "args", "rows"} <= state.keys():
        raise UserError(f"{path}: not the last.pt of a run, and only that can be continued; "
                        "--pretrain takes weights")
    theirs = state["args"]
    different = [f"{key.replace('_', '-')} was {theirs.get(key)}, now {settings.get(key)}"
                 for key in settings | theirs if theirs.get(key) != settings.get(key)]
    if different:
        raise UserError(f"{path}: is of another run: {'; '.join(different)}. Give the same flags "
                        "to continue it; for a new run choose another --output-dir, and begin it "
                        f"with --pretrain {path} to keep the weights")
    if path.parent != output:           # this folder is complete before it has a last.pt
        for name in ("best.pt", "samples.png", "last.pt"):
            if (file := path.with_name(name)).exists():
                write_file(output / name, [file.read_bytes()])
    write_log(output, state["rows"])
    return state


def write_log(output, rows):
    """Make log.jsonl equal to a run's rows. They live in last.pt: a torn log mends itself."""
    write_file(output / "log.jsonl", [(json.dumps(row) + "\n").encode() for row in rows])


@contextlib.contextmanager
def tolerated(path):
    """For a file that a run can do without: where it cannot be made, that costs a line."""
    try:
        yield
    except Exception as error:
        print(f"note: {path} is not written ({str(error).strip().partition(chr(10))[0]})")


@torch.no_grad()
def update_average(average, model, decay, step):
    """Move a model's running average, buffers too, one step on: mean = d mean + (1 - d) value.

    d = min(decay, (1 + step) / (10 + step)) begins small, so that a short run's average is not
    that of its first, random weights.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*floats)), None)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


# ---------------------------------------------------------------------------------------------------------------------
# Public weights: key maps, ours on the left and theirs on the right, read both ways
# ---------------------------------------------------------------------------------------------------------------------

# A row is "ours theirs", modules or tensors; a last part (.weight, .bias, ...) is the same in both. In our names: {i} stage, {j}
# block or other position, {n} any number, {a|b} one of these words. In theirs: the same, {x} the word, and {h} = i - 1, {I} = i + 1,
# {II} = i + 2, {E} = 2i, {O} = 2i + 1, {J2} = 2j, {R} = 8, 4, 2, {k}: position of the block over all stages (without j: of the
# stage's first). "a + b": two tensors that we hold as one, stacked along the first axis. The first row that fits counts.
MIT = """
    encoder.stages.{i}.embed.conv                                   patch_embed{I}.proj
    encoder.stages.{i}.embed.norm                                   patch_embed{I}.norm
    encoder.stages.{i}.blocks.{j}.attn.norm                         block{I}.{j}.norm1
    encoder.stages.{i}.blocks.{j}.attn.branch.{q|kv|sr|norm|proj}   block{I}.{j}.attn.{x}
    encoder.stages.{i}.blocks.{j}.ffn.norm                          block{I}.{j}.norm2
    encoder.stages.{i}.blocks.{j}.ffn.branch.{fc1|fc2}              block{I}.{j}.mlp.{x}
    encoder.stages.{i}.blocks.{j}.ffn.branch.dwconv                 block{I}.{j}.mlp.dwconv.dwconv
    encoder.stages.{i}.norm                                         norm{I}
"""
HF_SEGFORMER = """
    encoder.stages.{i}.embed.conv                   segformer.encoder.patch_embeddings.{i}.proj
    encoder.stages.{i}.embed.norm                   segformer.encoder.patch_embeddings.{i}.layer_norm
    encoder.stages.{i}.blocks.{j}.attn.norm         segformer.encoder.block.{i}.{j}.layer_norm_1
    encoder.stages.{i}.blocks.{j}.attn.branch.q     segformer.encoder.block.{i}.{j}.attention.self.query
    encoder.stages.{i}.blocks.{j}.attn.branch.kv    segformer.encoder.block.{i}.{j}.attention.self.key + segformer.encoder.block.{i}.{j}.attention.self.value
    encoder.stages.{i}.blocks.{j}.attn.branch.sr    segformer.encoder.block.{i}.{j}.attention.self.sr
    encoder.stages.{i}.blocks.{j}.attn.branch.norm  segformer.encoder.block.{i}.{j}.attention.self.layer_norm
    encoder.stages.{i}.blocks.{j}.attn.branch.proj  segformer.encoder.block.{i}.{j}.attention.output.dense
    encoder.stages.{i}.blocks.{j}.ffn.norm          segformer.encoder.block.{i}.{j}.layer_norm_2
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc1    segformer.encoder.block.{i}.{j}.mlp.dense1
    encoder.stages.{i}.blocks.{j}.ffn.branch.dwconv segformer.encoder.block.{i}.{j}.mlp.dwconv.dwconv
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc2    segformer.encoder.block.{i}.{j}.mlp.dense2
    encoder.stages.{i}.norm                         segformer.encoder.layer_norm.{i}
"""
LITE = """
    encoder.stages.{i}.blocks.{j}.attn.norm{n}              segformer.encoder.block.{i}.{j}.layer_norm_1{n}
    encoder.stages.{i}.blocks.{j}.ffn.norm{n}               segformer.encoder.block.{i}.{j}.layer_norm_2{n}
    encoder.stages.{i}.blocks.{j}.attn.branch.kv            segformer.encoder.block.{i}.{j}.attention.self.kv
    encoder.stages.{i}.blocks.{j}.attn.branch.queries       segformer.encoder.block.{i}.{j}.attention.self.query
    encoder.stages.{i}.blocks.{j}.attn.branch.keys          segformer.encoder.block.{i}.{j}.attention.self.key
    encoder.stages.{i}.blocks.{j}.attn.branch.values        segformer.encoder.block.{i}.{j}.attention.self.value
    encoder.stages.{i}.blocks.{j}.attn.branch.reprojection  segformer.encoder.block.{i}.{j}.attention.self.reprojection
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc1.conv       segformer.encoder.block.{i}.{j}.mlp.conv1
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc1.norm       segformer.encoder.block.{i}.{j}.mlp.batch_norm1
    encoder.stages.{i}.blocks.{j}.ffn.branch.dwconv.conv    segformer.encoder.block.{i}.{j}.mlp.dwconv.dwconv
    encoder.stages.{i}.blocks.{j}.ffn.branch.dwconv.norm    segformer.encoder.block.{i}.{j}.mlp.batch_norm2
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc2            segformer.encoder.block.{i}.{j}.mlp.conv2
""" + HF_SEGFORMER
MSCAN = """
    encoder.stages.0.embed.0.conv                               patch_embed1.proj.0
    encoder.stages.0.embed.0.norm                               patch_embed1.proj.1
    encoder.stages.0.embed.1.conv                               patch_embed1.proj.3
    encoder.stages.0.embed.1.norm                               patch_embed1.proj.4
    encoder.stages.{i}.embed.0.conv                             patch_embed{I}.proj
    encoder.stages.{i}.embed.0.norm                             patch_embed{I}.norm
    encoder.stages.{i}.blocks.{j}.attn.scale                    block{I}.{j}.layer_scale_1
    encoder.stages.{i}.blocks.{j}.attn.branch.{proj_1|proj_2}   block{I}.{j}.attn.{x}
    encoder.stages.{i}.blocks.{j}.attn.branch.local             block{I}.{j}.attn.spatial_gating_unit.conv0
    encoder.stages.{i}.blocks.{j}.attn.branch.strips.{n}.0      block{I}.{j}.attn.spatial_gating_unit.conv{n}_1
    encoder.stages.{i}.blocks.{j}.attn.branch.strips.{n}.1      block{I}.{j}.attn.spatial_gating_unit.conv{n}_2
    encoder.stages.{i}.blocks.{j}.attn.branch.mix               block{I}.{j}.attn.spatial_gating_unit.conv3
    encoder.stages.{i}.blocks.{j}.ffn.scale                     block{I}.{j}.layer_scale_2
""" + MIT
NEXT_VIT = """
    encoder.stages.0.embed.4.{conv|norm}                        features.{k}.patch_embed.{x}
    encoder.stages.0.embed.{n}.{conv|norm}                      stem.{n}.{x}
    encoder.stages.{i}.embed.1.{conv|norm}                      features.{k}.patch_embed.{x}
    encoder.stages.{i}.blocks.{j}.patch_embed.0.{conv|norm}     features.{k}.patch_embed.{x}
    encoder.stages.{i}.blocks.{j}.mhca.group_conv.conv          features.{k}.mhca.group_conv3x3
    encoder.stages.{i}.blocks.{j}.mhca.group_conv.norm          features.{k}.mhca.norm
    encoder.stages.{i}.blocks.{j}.mhca.projection               features.{k}.mhca.projection
    encoder.stages.{i}.blocks.{j}.{norm1|norm2}                 features.{k}.{x}
    encoder.stages.{i}.blocks.{j}.attn.{q|k|v|proj|norm}        features.{k}.e_mhsa.{x}
    encoder.stages.{i}.blocks.{j}.projection.{conv|norm}        features.{k}.projection.{x}
    encoder.stages.{i}.blocks.{j}.mlp_norm                      features.{k}.norm
    encoder.stages.{i}.blocks.{j}.mlp.fc1                       features.{k}.mlp.conv1
    encoder.stages.{i}.blocks.{j}.mlp.fc2                       features.{k}.mlp.conv2
    encoder.stages.3.norm                                       norm
    encoder.stages.{i}.norm                                     extra_norm_list.{i}
"""
SWIN = """
    encoder.stages.0.embed.proj                                 patch_embed.proj
    encoder.stages.0.embed.norm                                 patch_embed.norm
    encoder.stages.{i}.embed.{norm|reduction}                   layers.{h}.downsample.{x}
    encoder.stages.{i}.blocks.{j}.attn.norm                     layers.{i}.blocks.{j}.norm1
    encoder.stages.{i}.blocks.{j}.attn.branch.{qkv|proj|relative_position_bias_table}   layers.{i}.blocks.{j}.attn.{x}
    encoder.stages.{i}.blocks.{j}.ffn.norm                      layers.{i}.blocks.{j}.norm2
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc1                layers.{i}.blocks.{j}.mlp.fc1
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc2                layers.{i}.blocks.{j}.mlp.fc2
    encoder.stages.{i}.norm                                     norm{i}
"""
DEST = """
    encoder.stages.{i}.blocks.{j}.attn.branch.k                 block{I}.{j}.attn.k
    encoder.stages.{i}.blocks.{j}.attn.branch.sr.conv           block{I}.{j}.attn.sr
    encoder.stages.{i}.blocks.{j}.attn.branch.sr.norm           block{I}.{j}.attn.norm
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc1.conv           block{I}.{j}.mlp.fc1
    encoder.stages.{i}.blocks.{j}.ffn.branch.fc1.norm           block{I}.{j}.mlp.norm1
    encoder.stages.{i}.blocks.{j}.ffn.branch.dwconv.conv        block{I}.{j}.mlp.dwconv.dwconv
    encoder.stages.{i}.blocks.{j}.ffn.branch.dwconv.norm        block{I}.{j}.mlp.norm2
""" + MIT
# Dialects of a table: (theirs there, theirs here), one after another
PVT_V2_TIMM = (("patch_embed{I}", "stages.{i}.downsample"), ("block{I}", "stages.{i}.blocks"), ("norm{I}", "stages.{i}.norm"),
               ("dwconv.dwconv", "dwconv"))
MSCAN_MMSEG = (("dwconv.dwconv", "dwconv"),)
NEXT_VIT_TIMM = (("features.{k}", "stages.{i}.blocks.{j}"), ("mlp.conv", "mlp.fc"))
SWIN_TIMM = (("layers.{h}", "layers.{i}"),)
SWIN_TORCHVISION = (("patch_embed.proj", "features.0.0"), ("patch_embed.norm", "features.0.2"),
                    ("layers.{h}.downsample", "features.{E}"), ("layers.{i}.blocks", "features.{O}"),
                    ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"))
SWIN_MMSEG = (("patch_embed.proj", "patch_embed.projection"), ("layers", "stages"), ("attn.", "attn.w_msa."),
              ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"))
DEST_SEG = (("norm1", "bn1"), ("norm2", "bn2"), ("norm", "bn1"))
MMSEG_HEADS = {      # also the names of the authors' own releases, most of which are built on mmsegmentation
    "mlp": """
        head.projections.{i}        decode_head.linear_c{I}.proj
        head.fuse.conv              decode_head.linear_fuse.conv
        head.fuse.norm              decode_head.linear_fuse.bn
        head.classifier             decode_head.linear_pred
    """,
    "ham": """
        head.squeeze.conv           decode_head.squeeze.conv
        head.squeeze.norm           decode_head.squeeze.gn
        head.ham_in                 decode_head.hamburger.ham_in.conv
        head.ham_out.conv           decode_head.hamburger.ham_out.conv
        head.ham_out.norm           decode_head.hamburger.ham_out.gn
        head.align.conv             decode_head.align.conv
        head.align.norm             decode_head.align.gn
        head.classifier             decode_head.conv_seg
    """,
    "fpn": """
        head.lateral.{i}            neck.lateral_convs.{i}.conv
        head.smooth.{i}             neck.fpn_convs.{i}.conv
        head.scale.{i}.{j}.conv     decode_head.scale_heads.{i}.{J2}.conv
        head.scale.{i}.{j}.norm     decode_head.scale_heads.{i}.{J2}.bn
        head.classifier             decode_head.conv_seg
    """,
    "lawin": """
        head.projections.{i}                            decode_head.linear_c{II}.proj
        head.fuse.conv                                  decode_head.linear_fuse.conv
        head.fuse.norm                                  decode_head.linear_fuse.bn
        head.{short_path|cat|low_level_fuse}.conv       decode_head.{x}.conv
        head.{short_path|cat|low_level_fuse}.norm       decode_head.{x}.bn
        head.image_pool.conv                            decode_head.image_pool.1.conv
        head.image_pool.norm                            decode_head.image_pool.1.bn
        head.attentions.{i}.down.0.conv                 decode_head.ds_{R}.0.proj.depthwise_conv.conv
        head.attentions.{i}.down.0.norm                 decode_head.ds_{R}.0.proj.depthwise_conv.bn
        head.attentions.{i}.down.1.conv                 decode_head.ds_{R}.0.proj.pointwise_conv.conv
        head.attentions.{i}.down.1.norm                 decode_head.ds_{R}.0.proj.pointwise_conv.bn
        head.attentions.{i}.mixing                      decode_head.lawin_{R}.0.position_mixing
        head.attentions.{i}.{theta|phi|g}               decode_head.lawin_{R}.0.{x}.conv
        head.attentions.{i}.out.conv                    decode_head.lawin_{R}.0.conv_out.conv
        head.attentions.{i}.out.norm                    decode_head.lawin_{R}.0.conv_out.bn
        head.attentions.{i}.norm                        decode_head.lawin_{R}.0.norm
        head.low_level                                  decode_head.linear_c1.proj
        head.classifier                                 decode_head.linear_pred
    """,
}
MMSEG_HEADS |= {"mlp_concat": MMSEG_HEADS["mlp"], "lawin_sum": MMSEG_HEADS["lawin"]}
HF_HEADS = {
    "mlp": """
        head.projections.{i}        decode_head.linear_c.{i}.proj
        head.fuse.conv              decode_head.linear_fuse
        head.fuse.norm              decode_head.batch_norm
        head.classifier             decode_head.classifier
    """,
    "cls": "head.fc classifier",
}
HF_HEADS["mlp_concat"] = HF_HEADS["mlp"]
LITE_HEADS = HF_HEADS | {"light_ham": "head.squeeze decode_head.squeeze.conv\n head.classifier decode_head.classifier.1"}


@dataclass(frozen=True)
class Format:
    """A way of naming tensors; keys None: our own.

    keys: the encoder's rows; heads: rows for each word of --head and for "cls", which go first; prefix: of the encoder in a
    segmentor's file; dialect: changes of theirs in keys; rows: the names of the models that it is for; dead: names that the
    files carry and no forward pass uses; fresh: ours that such files never have; linear: our 1x1 convolutions that are
    Linear layers there (conv1d: Conv1d); unfold: ours whose channels they have in nn.Unfold's order.
    """
    name: str
    keys: str | None = None
    heads: dict = field(default_factory=dict)
    prefix: str = ""
    dialect: tuple = ()
    rows: str = ""
    dead: str = r"$^"
    fresh: str = r"$^"
    linear: str = r"\.(q|kv|proj|fc1|fc2|qkv|reduction|projections\.\d|low_level)$"
    conv1d: bool = False
    unfold: str = r"$^"

    def names(self, model):
        """{our name of a tensor: the list of theirs} (more than one: stacked) for what this format has of the model."""
        if self.keys is None:
            return {key: [key] for key in model.state_dict()}
        head = self.heads.get("cls" if model.task == "cls" else model.spec.head, "")
        rows = key_rows(head) + key_rows(self.keys, self.dialect)
        depths = SIZES[model.spec.size].depths
        names = {}
        for key in model.state_dict():
            for ours, theirs in rows:
                if match := ours.match(key):
                    names[key] = [self.finish(key, part, match, depths) for part in theirs]
                    break
        return names

    def finish(self, key, part, match, depths):
        n = {name: value if name == "x" else int(value) for name, value in match.groupdict().items()}
        i, j = n.get("i", 0), n.get("j", 0)
        n = {"i": i, "j": j, "h": i - 1, "I": i + 1, "II": i + 2, "E": 2 * i, "O": 2 * i + 1, "J2": 2 * j,
             "k": sum(depths[:i]) + j, "R": 8 >> i} | n
        return (self.prefix if key.startswith("encoder.") else "") + part.format(**n) + key[match.end():]

    def recognised(self, state):
        """How many of a file's names are this format's, of any encoder."""
        pattern = re.escape(self.prefix) + their_names(self.keys, self.dialect) if self.keys else r"encoder\.stages\.\d\."
        return sum(re.match(pattern, name) is not None for name in state)

    def read(self, key, tensors):
        """Their tensors -> ours, up to axes of size 1."""
        value = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if re.search(self.unfold, key):                             # (C, row, column) -> (column, row, C)
            value = value.reshape(*value.shape[:-1], -1, 2, 2).transpose(-3, -1).flatten(-3)
        return value

    def write(self, key, value, count):
        """Our tensor -> `count` of theirs."""
        if re.search(self.linear, key.removesuffix(".weight")) and value.shape[2:] == (1, 1):
            value = value.flatten(2) if self.conv1d else value.flatten(1)
        if re.search(self.unfold, key):
            value = value.reshape(*value.shape[:-1], 2, 2, -1).transpose(-3, -1).flatten(-3)
        return [part.contiguous() for part in (value.chunk(count) if count > 1 else [value])]


LEAF = r"(?=(\.[a-z_]+)?$)"         # what may follow a row: weight, running_mean, ..., or nothing


@lru_cache
def key_rows(table, dialect=()):
    """The rows of a key map: (pattern of our name, their parts)."""
    rows = []
    for line in filter(str.strip, table.splitlines()):
        ours, theirs = line.split(maxsplit=1)
        for old, new in dialect:
            theirs = theirs.replace(old, new)
        pattern = re.sub(r"{(\w+)}", r"(?P<\1>\\d+)", ours.replace(".", r"\."))
        rows.append((re.compile(re.sub(r"{(.*?)}", r"(?P<x>\1)", pattern) + LEAF), theirs.split(" + ")))
    return rows


@lru_cache
def their_names(table, dialect):
    """A pattern of all their names in a key map."""
    names = []
    for ours, theirs in key_rows(table, dialect):
        words = re.search(r"<x>(.*?)\)", ours.pattern)
        for part in theirs:
            part = part.replace(".", r"\.").replace("{x}", f"({words and words[1]})").replace("{h}", "[0-2]")
            names.append(re.sub(r"{\w+}", r"\\d+", part))
    return f"({'|'.join(names)}){LEAF}"


TASK_NORMS = r"encoder\.stages\.[012]\.norm\."      # of Swin and Next-ViT: segmentation's alone
CLS = {"cls": "head.fc head"}
TIMM_STEM = "encoder.stages.0.embed.conv patch_embed.proj\n encoder.stages.0.embed.norm patch_embed.norm"
CLS_SWIN = {"cls": "encoder.stages.3.norm norm\n head.fc head"}
MIT_ROWS = dict(rows="segformer|pvt_v2|lawin")
MSCAN_KIND = dict(rows="segnext", linear=r"$^")
NEXT_KIND = dict(rows="nextvit|lite_hybrid", linear=r"attn\.(q|k|v|proj)$")
NEXT_FRESH = dict(fresh=TASK_NORMS, dead=r"extra_norm_list\.3\.|proj_head\.")
DEST_KIND = dict(rows="dest", linear=r"\.(q|k|proj|fc1\.conv|fc2)$", conv1d=True)
SWIN_INDEX = r".*\.(relative_position_index|attn_mask)$"
# classification has one norm at the end, segmentation one on each map: a file of one task has no norms for the other
SWIN_CLS = dict(rows="swin", fresh=r"encoder\.stages\.\d\.norm\.", dead=SWIN_INDEX + r"|norm\.")
SWIN_SEG = dict(rows="swin", dead=SWIN_INDEX + r"|backbone\.norm[012]\.")
UNFOLD = dict(unfold=r"stages\.[123]\.embed\.")
FORMATS = [     # of two that fit equally well, the first
    Format("own checkpoint", fresh=TASK_NORMS, dead=TASK_NORMS),
    Format("Hugging Face SegFormer", HF_SEGFORMER, HF_HEADS, rows="segformer"),
    Format("original project", LITE, LITE_HEADS, rows="lite|segformer", linear=r"\.(q|kv|proj|projections\.\d)$"),
    Format("SegFormer / PVTv2 encoder", MIT, CLS, **MIT_ROWS),         # NVlabs' and PVTv2's files have the same names
    Format("SegFormer / PVTv2 / Lawin segmentor", MIT, MMSEG_HEADS, "backbone.", dead=r"decode_head\.conv_seg\.", **MIT_ROWS),
    Format("timm PVTv2", TIMM_STEM + MIT, CLS, dialect=PVT_V2_TIMM, rows="pvt_v2"),
    Format("MSCAN encoder", MSCAN, CLS, **MSCAN_KIND),
    Format("SegNeXt segmentor", MSCAN, MMSEG_HEADS, "backbone.", **MSCAN_KIND),
    Format("mmsegmentation MSCAN encoder", MSCAN, CLS, dialect=MSCAN_MMSEG, **MSCAN_KIND),
    Format("mmsegmentation SegNeXt", MSCAN, MMSEG_HEADS, "backbone.", MSCAN_MMSEG, **MSCAN_KIND),
    Format("Next-ViT encoder", NEXT_VIT, {"cls": "head.fc proj_head.0"}, **NEXT_KIND, **NEXT_FRESH),
    Format("Next-ViT segmentor", NEXT_VIT, MMSEG_HEADS, "backbone.", **NEXT_KIND, dead=r"backbone\.(extra_norm_list\.3|proj_head)\."),
    Format("timm Next-ViT", NEXT_VIT, {"cls": "head.fc head.fc"}, dialect=NEXT_VIT_TIMM, **NEXT_KIND, **NEXT_FRESH),
    Format("Swin encoder", SWIN, CLS_SWIN, **SWIN_CLS),
    Format("Swin segmentor", SWIN, MMSEG_HEADS, "backbone.", **SWIN_SEG),
    Format("timm Swin", SWIN, {"cls": "encoder.stages.3.norm norm\n head.fc head.fc"}, dialect=SWIN_TIMM, **SWIN_CLS),
    Format("torchvision Swin", SWIN, CLS_SWIN, dialect=SWIN_TORCHVISION, **SWIN_CLS),
    Format("mmsegmentation Swin encoder", SWIN, CLS_SWIN, dialect=SWIN_MMSEG, **SWIN_CLS, **UNFOLD),
    Format("mmsegmentation Swin segmentor", SWIN, MMSEG_HEADS, "backbone.", SWIN_MMSEG, **SWIN_SEG, **UNFOLD),
    Format("DEST depth encoder", DEST, CLS, **DEST_KIND),
    Format("DEST encoder", DEST, CLS, dialect=DEST_SEG, **DEST_KIND),
    Format("DEST segmentor", DEST, MMSEG_HEADS, "backbone.", DEST_SEG, **DEST_KIND),
]
HEADS = re.compile(r"(head|classifier|decode_head|auxiliary_head|neck|proj_head)\.")      # of any file: may be left unread


@dataclass
class Report:
    """What load_pretrained did: the format it saw, our names that were loaded / are missing / are new by design (fresh),
    and the file's names that found no place (unexpected)."""
    format: str
    loaded: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    fresh: list = field(default_factory=list)

    def __str__(self):
        def some(names):
            return f"{len(names)}" + (f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "")
        return (f"{self.format}: loaded {len(self.loaded)} tensors; new by design, freshly initialised: {some(self.fresh)}; "
                f"missing: {some(self.missing)}; unexpected in the file, not used: {some(self.unexpected)}")


def read_weights(source):
    """Path, Hugging Face directory or dict -> (name for messages, flat {name: tensor})."""
    if isinstance(source, dict):
        return "the given dict", flat_state(source, "the given dict")
    path = pathlib.Path(source)
    if path.is_dir():
        found = [path / n for n in ("model.safetensors", "pytorch_model.bin") if (path / n).exists()]
        if not found:
            raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin; give a checkpoint file or a hub directory")
        path = found[0]
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    return str(path), flat_state(content, path)


def flat_state(content, path):
    """Unwrap the usual envelopes: our own (EMA weights if there are any), {"state_dict": ..}, {"model": ..}, DDP's "module."."""
    if isinstance(content, dict) and "spec" in content and content.get("ema"):
        content = content["ema"]
    for envelope in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(envelope), dict):
            content = content[envelope]
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise UserError(f"{path}: holds no state dict (a table of named tensors)")
    state = {k.removeprefix("module."): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path}: holds no tensors")
    return state


def fits(names, state, target):
    """Same shape, up to trailing ones: a Linear, a Conv1d and a 1x1 convolution hold the same matrix."""
    shapes = [list(state[n].shape) for n in names]
    shape = [sum(s[0] for s in shapes), *shapes[0][1:]] if shapes[0] else []
    return strip_ones(shape) == strip_ones(target.shape)


def strip_ones(shape):
    shape = list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return shape


def load_pretrained(model, source):
    """Load weights from our checkpoints, a family's original files, or Hugging Face's -> Report.

    source: path (.pt, .pth, .bin, .safetensors), Hugging Face directory (nothing is downloaded), or dict of tensors.
    The format is recognised by its key names. A head that the file does not have, or has of another kind, and a
    classifier of another class count, keep their fresh weights and are listed; anything else that is missing or does not
    fit is a UserError, and then the model is as it was.
    """
    path, state = read_weights(source)
    form = max(FORMATS, key=lambda form: form.recognised(state))
    if not form.recognised(state):
        raise UserError(f"{path}: none of its {len(state)} tensors ({', '.join(list(state)[:3])}, ...) has a name of a known "
                        f"format; these are: {', '.join(f.name for f in FORMATS)}")
    report, values, misfits, names_of, found = Report(form.name), {}, [], form.names(model), {}
    for key, target in model.state_dict().items():
        names = names_of.get(key)
        if not names or not all(n in state for n in names):
            if not counter(key):
                report.missing.append(key)
            continue
        found[key] = names
        if fits(names, state, target):
            values[key] = form.read(key, [state[n] for n in names])
        elif key.startswith(("head.classifier.", "head.fc.")) and state[names[0]].shape[1:].numel() == target.shape[1:].numel():
            report.fresh.append(key)                            # another class count
        else:
            misfits.append(key)

    def left():
        used = {n for names in found.values() for n in names}
        return [n for n in state if n not in used and not re.match(form.dead, n) and not counter(n)]

    in_head = lambda keys: [key for key in keys if key.startswith("head.")]
    if in_head(misfits) or not in_head([*values, *report.fresh]) or in_head(report.missing) and any(map(HEADS.match, left())):
        # no head in the file, or another one, of which single tensors may happen to fit: ours stays fresh as a whole
        report.fresh = [key for key in in_head(model.state_dict()) if not counter(key)]
        values, found = ({key: value for key, value in d.items() if not in_head([key])} for d in (values, found))
    if model.task == "seg" and STAGE_NORM[SIZES[model.spec.size].stage_norm][1] == "seg":
        report.fresh += [key for key in report.missing if re.match(form.fresh, key)]
    misfits, report.missing = ([key for key in keys if key not in report.fresh] for keys in (misfits, report.missing))
    report.unexpected = left()
    foreign = [n for n in report.unexpected if not HEADS.match(n)]
    if misfits or report.missing or foreign:
        raise UserError(f"{path}: does not fit {model.spec} ({form.name}; {len(misfits)} tensors of another shape{example(misfits)}, "
                        f"{len(report.missing)} missing{example(report.missing)}, {len(foreign)} unexpected{example(foreign)})"
                        + looks_like(model, state, form))
    with torch.no_grad():
        for key, target in model.state_dict().items():
            if key in values:
                target.copy_(values[key].reshape(target.shape))
    report.loaded = list(values)
    return report


def counter(name):
    """A BatchNorm's count of its batches: older files lack it, and nothing here reads it."""
    return name.endswith("num_batches_tracked")


def example(names):
    return f", e.g. {names[0]}" if names else ""


def looks_like(model, state, form):
    """"; it looks like NAME" for the row of MODELS whose encoder fits best, if that is better than the model's own."""
    def score(other):
        names = form.names(other)
        wanted = [(k, v) for k, v in other.state_dict().items() if k.startswith("encoder.")]
        hits = sum(k in names and all(n in state for n in names[k]) and fits(names[k], state, v) for k, v in wanted)
        return 2 * hits - len(wanted)                           # the row that explains most and lacks least
    rows = [name for name in MODELS if re.match(form.rows, name)]
    if form.keys is None:           # any row may be meant; its blocks are easily counted
        blocks = {m[0] for m in map(re.compile(r"encoder\.stages\.\d\.blocks\.\d+").match, state) if m}
        depths = tuple(sum(b.startswith(f"encoder.stages.{i}") for b in blocks) for i in range(4))
        rows = [name for name in rows if SIZES[MODELS[name].size].depths == depths]
    with torch.device("meta"):
        scores = {name: score(build(name, model.task)) for name in rows} or {"": 0}
    best = max(scores, key=scores.get)
    return f"; it looks like {best}" if scores[best] > max(0, score(model)) else ""


def export_pretrained(model, path, format=None, classes=None):
    """Write a model's weights under the names of a public format; load_pretrained reads them back.

    path: a folder for "Hugging Face SegFormer" (config.json and model.safetensors, for transformers' from_pretrained), else
    a .pth file with a flat dict; format: the name of one of FORMATS, by default the first that is for such a row
    and has a name for each of its tensors; classes: names for the hub's config. Errors: UserError.
    """
    forms = [f for f in FORMATS if (f.keys and re.match(f.rows, model.spec.name) if format is None else f.name == format)]
    if not forms:
        raise UserError(f"format {format!r} is not known; choose from: {', '.join(f.name for f in FORMATS)}")
    names_of, form = max(((f.names(model), f) for f in forms), key=lambda pair: len(pair[0]))       # of equals the first
    if nameless := [key for key in model.state_dict() if key not in names_of]:
        raise UserError(f"{form.name} has no name for {len(nameless)} tensors of {model.spec}{example(nameless)}; "
                        "models.save_checkpoint keeps any model")
    state = {}
    for key, value in model.state_dict().items():
        state |= zip(names_of[key], form.write(key, value.cpu(), len(names_of[key])))
    if form.name == "Hugging Face SegFormer":
        write_hub_directory(pathlib.Path(path), model, state, classes)
    else:
        save_checkpoint(path, state)


def write_hub_directory(folder, model, state, classes):
    """config.json and model.safetensors as transformers' SegFormer has them."""
    size = SIZES[model.spec.size]
    classes = classes or [f"LABEL_{i}" for i in range(model.num_classes)]
    config = {
        "model_type": "segformer",
        "architectures": ["SegformerForSemanticSegmentation" if model.task == "seg" else "SegformerForImageClassification"],
        "num_channels": 3, "num_encoder_blocks": 4, "depths": size.depths, "hidden_sizes": size.dims,
        "num_attention_heads": size.heads, "sr_ratios": size.reductions, "mlp_ratios": size.ratios, "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2], "decoder_hidden_size": size.width, "hidden_act": "gelu", "layer_norm_eps": size.eps,
        "drop_path_rate": size.drop_path[model.task == "seg"], "classifier_dropout_prob": 0.1, "reshape_last_stage": True,
        "semantic_loss_ignore_index": 255, "torch_dtype": "float32",
        "id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror})")
    write_safetensors(folder / "model.safetensors", state)
    write_file(folder / "config.json", [json.dumps(config, indent=2).encode()])


def restore(checkpoint):
    """The model that a training script's checkpoint describes, with its weights (the EMA's, where there are any)."""
    if not isinstance(checkpoint, dict) or not {"spec", "model"} <= checkpoint.keys():
        raise UserError("not a checkpoint of train_seg.py or train_cls.py; public weights go to --pretrain together with --model")
    try:
        d = checkpoint["spec"]
        model = build(d["name"], d["task"], d["num_classes"], **d["slots"])
    except (KeyError, TypeError):
        raise UserError("its description of the model is not one of train_seg.py or train_cls.py; load its weights by --pretrain "
                        "together with --model")
    try:
        model.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its own model {model.spec}: {str(error).splitlines()[1].strip()}")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Inference
# ---------------------------------------------------------------------------------------------------------------------

def fuse(model):
    """An inference copy with the same outputs: BatchNorm folded into the convolution of its ConvNorm, the all-MLP head merged."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, layers.ConvNorm) and isinstance(m.norm, nn.BatchNorm2d):
            m.conv, m.norm = torch.nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.norm), nn.Identity()
    if isinstance(model.head, layers.MlpHead):
        model.head = layers.MergedMlpHead(model.head)
    return model


def main():
    """Print the catalogue: the rows of MODELS with their words and parameters, the words of each slot with their sources."""
    argparse.ArgumentParser(description="Print every model and every word of every slot.").parse_args()
    print(f"{'model':<18}{'seg M':>9}{'cls M':>9}  words")
    for name, spec in MODELS.items():
        with torch.device("meta"):
            counts = [sum(p.numel() for p in build(name, task).parameters()) / 1e6 for task in CLASSES]
        words = " ".join(f"{slot}={'+'.join(dict.fromkeys(spec.words(slot)))}" for slot in SLOTS)
        print(f"{name:<18}{counts[0]:9.3f}{counts[1]:9.3f}  {words}")
    for slot, words in SLOTS.items():
        print(f"\n--{slot}")
        for word, block in words.items():
            print(f"  {word:<14}{(block.__doc__ or '').strip().splitlines()[0]}")


if __name__ == "__main__":
    main()
