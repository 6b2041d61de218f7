"""Models: tables of variants, the skeleton that they share, their files.

    python models.py                                        # prints every model and every word
    python models.py --checkpoint best.pt --export FOLDER   # for Hugging Face, or .pth, .pt2
    model = models.build("segformer_b2", attn="lsra", ffn="dest", head="light_ham")
    model = models.load("best.pt")                          # ready to infer, see eval.predict

A model is a row of SIZES and one word for each slot (layers.py has the dicts of words), or four
words, one a stage: attn="lsra,lsra,sra,sra". The first half of this file is the model: tables,
skeleton, build, parameter groups, fuse. The second is its files: checkpoints, a run's folder. The
appendix, public weights, holds the names that other projects give to the same tensors.
"""
import argparse
import contextlib
import copy
import datetime
import fcntl
import io
import itertools
import json
import math
import mmap
import os
import pathlib
import re
import socket
import textwrap
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import layers
from layers import ATTENTION, EMBED, FFN, HEAD, NORM, SKIP, UserError

SLOTS = {"embed": EMBED, "attn": ATTENTION, "ffn": FFN, "norm": NORM, "skip": SKIP, "head": HEAD}
CLASSES = {"seg": 150, "cls": 1000}


# ---- Tables --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Size:
    """One published size: the numbers of its paper's table. Four-tuples run over the stages."""
    dims: tuple
    depths: tuple
    heads: tuple = (1, 2, 5, 8)
    reductions: tuple = (8, 4, 2, 1)        # R of the spatial reduction
    ratios: tuple = (4, 4, 4, 4)            # FFN expansion
    width: int = 768                        # of the all-MLP head
    rank: int = 64                          # bases of an NMF head
    drop_path: tuple = (0.1, 0.1)           # (cls, seg), rising linearly over the blocks
    eps: float = 1e-6                       # LayerNorms of blocks and stages; all others: 1e-5
    # The norm that ends a stage: its class; the tasks that have it ("both" or "seg": a classifier
    # then has one after the last stage only); whether the next stage gets the normed map.
    stage_norm: tuple = (NORM["ln"], "both", True)
    init: tuple = (0.02, "fan_out")         # linear layers, other convolutions: see init_encoder
    groups: tuple | None = None             # Next-ViT: every n-th block is an NTB; 0: none


# The widths of MiT-B0 and of B1 to B5; what the rows of a family share
SMALL, LARGE = (32, 64, 160, 256), (64, 128, 320, 512)
PVT_SIZE = dict(ratios=(8, 8, 4, 4))
MSCAN_SIZE = dict(ratios=(8, 8, 4, 4), eps=1e-5, init=("fan_out", "fan_out"))
SWIN_SIZE = dict(dims=(96, 192, 384, 768), heads=(3, 6, 12, 24), width=256, eps=1e-5,
                 stage_norm=(NORM["ln"], "seg", False), init=(0.02, None))
HYBRID_SIZE = dict(stage_norm=(NORM["bn"], "seg", True), init=(0.02, 0.02))
NEXT_SIZE = HYBRID_SIZE | dict(dims=(96, 256, 512, 1024), heads=(3, 6, 12, 24), groups=(0, 4, 5, 3))
DEST_SIZE = dict(ratios=(8, 8, 4, 4), width=256, stage_norm=(None, "both", True))

SIZES = {
    # SegFormer, Table 6 (arXiv 2105.15203), with the released code's ratios (the table: 8-8-4-4)
    "mit_b0": Size(SMALL, (2, 2, 2, 2), width=256),
    "mit_b1": Size(LARGE, (2, 2, 2, 2), width=256),
    "mit_b2": Size(LARGE, (3, 4, 6, 3)),
    "mit_b3": Size(LARGE, (3, 4, 18, 3)),
    "mit_b4": Size(LARGE, (3, 8, 27, 3)),
    "mit_b5": Size(LARGE, (3, 6, 40, 3)),
    # PVTv2, Tables 1 and 2 (arXiv 2106.13797)
    "pvt_v2_b0": Size(SMALL, (2, 2, 2, 2), width=256, **PVT_SIZE),
    "pvt_v2_b1": Size(LARGE, (2, 2, 2, 2), **PVT_SIZE),
    "pvt_v2_b2": Size(LARGE, (3, 4, 6, 3), **PVT_SIZE),
    "pvt_v2_b3": Size(LARGE, (3, 4, 18, 3), drop_path=(0.3, 0.1), **PVT_SIZE),
    "pvt_v2_b4": Size(LARGE, (3, 8, 27, 3), drop_path=(0.3, 0.1), **PVT_SIZE),
    "pvt_v2_b5": Size(LARGE, (3, 6, 40, 3), drop_path=(0.3, 0.1)),
    # SegNeXt, Table 2 (arXiv 2209.08575); mmsegmentation 1.x runs B, L with 16 bases by oversight
    "mscan_t": Size(SMALL, (3, 3, 5, 2), rank=16, **MSCAN_SIZE),
    "mscan_s": Size(LARGE, (2, 2, 4, 2), rank=16, **MSCAN_SIZE),
    "mscan_b": Size(LARGE, (3, 3, 12, 3), **MSCAN_SIZE),
    "mscan_l": Size(LARGE, (3, 5, 27, 3), drop_path=(0.2, 0.3), **MSCAN_SIZE),
    # Swin, §3.3 (arXiv 2103.14030)
    "swin_t": Size(depths=(2, 2, 6, 2), drop_path=(0.2, 0.3), **SWIN_SIZE),
    "swin_s": Size(depths=(2, 2, 18, 2), drop_path=(0.3, 0.3), **SWIN_SIZE),
    "swin_b": Size(depths=(2, 2, 18, 2), drop_path=(0.5, 0.3),
                   **SWIN_SIZE | dict(dims=(128, 256, 512, 1024), heads=(4, 8, 16, 32))),
    # Next-ViT, Table 3 (arXiv 2207.05501); dims: what the stages give
    "next_vit_s": Size(depths=(3, 4, 10, 3), drop_path=(0.1, 0.2), **NEXT_SIZE),
    "next_vit_b": Size(depths=(3, 4, 20, 3), drop_path=(0.2, 0.2), **NEXT_SIZE),
    "next_vit_l": Size(depths=(3, 4, 30, 3), drop_path=(0.2, 0.2), **NEXT_SIZE),
    # DEST, Table 1 (arXiv 2204.13791), as in its depth code; its segmentation file gives B4 the
    # depths of B3
    "dest_b0": Size(SMALL, (2, 2, 2, 2), **DEST_SIZE),
    "dest_b1": Size((64, 128, 250, 320), (2, 2, 2, 2), **DEST_SIZE),
    "dest_b2": Size((64, 128, 250, 320), (3, 3, 6, 3), **DEST_SIZE),
    "dest_b3": Size((64, 128, 250, 320), (3, 6, 8, 3), **DEST_SIZE),
    "dest_b4": Size((64, 128, 250, 320), (3, 8, 12, 5), **DEST_SIZE),
    "dest_b5": Size((64, 128, 250, 320), (3, 10, 16, 5), **DEST_SIZE),
    # the original project's own shape; its LayerNorms have PyTorch's eps
    "lite_1121": Size((64, 128, 256, 512), (1, 1, 2, 1), (1, 2, 4, 8), eps=1e-5),
    "lite_1221": Size((64, 128, 256, 512), (1, 2, 2, 1), (1, 2, 4, 8), eps=1e-5),
    "lite_hybrid": Size(LARGE, (3, 4, 6, 3), groups=(0, 4, 6, 3), **HYBRID_SIZE),
}


@dataclass(frozen=True)
class Spec:
    """A model: a row of SIZES and a word for each slot; four words give each stage its own."""
    name: str
    size: str
    embed: str | tuple = "overlap"
    attn: str | tuple = "sra"
    ffn: str | tuple = "mix"
    norm: str | tuple = "ln"
    skip: str | tuple = "pre"
    head: str = "mlp"
    decoder: int | tuple | None = None      # width of this head; None: of its class, or the size

    @property
    def overrides(self):
        """{slot: words} where this differs from the named row."""
        row = MODELS[self.name]
        return {slot: getattr(self, slot) for slot in SLOTS
                if getattr(self, slot) != getattr(row, slot)}

    def words(self, slot):
        """The words of the four stages."""
        word = getattr(self, slot)
        return word if isinstance(word, tuple) else (word,) * 4

    def spelt(self, template, separator):
        """The overrides as the user writes them, one string each."""
        return [template.format(slot, words if isinstance(words, str) else separator.join(words))
                for slot, words in self.overrides.items()]

    def __str__(self):
        return "-".join([self.name, *self.spelt("{}={}", "+")])


# Next-ViT's blocks, NCB and NTB, fix ffn, norm and skip: the words only say what they have. Stage 1
# has no attention.
NEXT = dict(embed="next", attn="emhsa", ffn="mlp", norm="bn")
SEGNEXT = dict(embed="conv", attn="msca", norm="bn", skip="scaled", head="ham")
SWIN_WORDS = dict(embed="patch", attn="window", ffn="mlp", head="fpn")
MODELS = {spec.name: spec for spec in [
    *(Spec(f"segformer_b{i}", f"mit_b{i}") for i in range(6)),
    *(Spec(f"pvt_v2_b{i}", f"pvt_v2_b{i}", head="fpn") for i in range(6)),
    Spec("pvt_v2_b2_li", "pvt_v2_b2", attn="lsra", ffn="mix_relu", head="fpn"),
    *(Spec(f"segnext_{x}", f"mscan_{x}", decoder=256, **SEGNEXT) for x in "ts"),
    Spec("segnext_b", "mscan_b", decoder=512, **SEGNEXT),
    Spec("segnext_l", "mscan_l", decoder=1024, **SEGNEXT),
    *(Spec(f"nextvit_{x}", f"next_vit_{x}", head="fpn", **NEXT) for x in "sbl"),
    *(Spec(f"swin_{x}", f"swin_{x}", **SWIN_WORDS) for x in "tsb"),
    *(Spec(f"dest_b{i}", f"dest_b{i}", attn="dest", ffn="dest", norm="bn") for i in range(6)),
    *(Spec(f"lawin_b{i}", f"mit_b{i}", head="lawin_sum", decoder=128) for i in (0, 1)),
    *(Spec(f"lawin_b{i}", f"mit_b{i}", head="lawin", decoder=512) for i in (2, 3)),
    Spec("lawin_b4", "mit_b4", head="lawin", decoder=(768, 512)),   # in the projections, after them
    Spec("lawin_b5", "mit_b5", head="lawin", decoder=512),
    # The original project's experiments, one step after another; lite_hybrid and lite_window are
    # Next-ViT's and Swin's own blocks.
    Spec("lite_lsra", "mit_b2", attn="lsra"),
    Spec("lite_lsra_dest", "mit_b2", attn="lsra", ffn="dest"),
    Spec("lite_rskip", "mit_b2", attn="lsra", ffn="dest", skip="recursive"),
    Spec("lite_ea", "mit_b2", attn="ea"),
    Spec("lite_lsrea", "lite_1121", attn="lsrea", ffn="dest", skip="recursive"),
    Spec("lite_lsrea_ham", "lite_1221", attn="lsrea_noproj", ffn="dest", skip="recursive",
         head="light_ham"),
    Spec("lite_msca", "mit_b2", attn="msca"),
    Spec("lite_window", "mit_b2", attn="window"),
    Spec("lite_hybrid", "lite_hybrid", **NEXT),
    Spec("lite_final", "lite_1221", attn="lsra_noproj", ffn="dest", head="light_ham"),

    # Composed from README's table: four words that raised SegFormer-B0's mIoU there.
    Spec("lite_best", "mit_b0", embed="conv", attn="msca", ffn="dest", norm="bn"),
]}


# ---- The skeleton --------------------------------------------------------------------------------

class Stage(nn.Module):
    """embed -> blocks -> norm. Returns (what the next stage receives, what the head receives).
    checkpointing: training keeps each block's input alone and computes the rest of it again in
    the backward pass: the same gradients, less memory, about a third more time."""
    checkpointing = False

    def __init__(self, embed, blocks, norm, in_trunk):
        super().__init__()
        self.embed, self.blocks, self.norm = embed, blocks, norm
        self.in_trunk = in_trunk

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False,
                               context_fn=lambda: (contextlib.nullcontext(), second_pass(block)))
            else:
                x = block(x)
        out = self.norm(x)
        return (out if self.in_trunk else x), out


@contextlib.contextmanager
def second_pass(block):
    """A pass that has been seen before: BatchNorms leave their running statistics as they are."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class Encoder(nn.Module):
    """Four stages: images (B, 3, H, W) -> maps at strides 4, 8, 16, 32, each side rounded up."""

    def __init__(self, stages, smallest):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.smallest = smallest

    def forward(self, images):
        if min(images.shape[2:]) < self.smallest:
            height, width = images.shape[2:]
            raise UserError(f"{width} x {height}: this model needs {self.smallest} pixels a side")
        x, maps = images, []
        for stage in self.stages:
            x, out = stage(x)
            maps.append(out)
        return maps


class Model(nn.Module):
    """An encoder and a head: images (B, 3, H, W) -> logits, (B, K, h, w) at stride 4 or 8 for task
    "seg" and (B, K) for "cls"."""

    def __init__(self, spec, task, num_classes, encoder, head):
        super().__init__()
        self.spec, self.task, self.num_classes = spec, task, num_classes
        self.encoder = encoder
        self.head = head

    def forward(self, images):
        return self.head(self.encoder(images))


def build_stage(spec, i, task, rates, reads):
    """Stage i; rates: drop-path of its blocks; reads: whether the head uses its map."""
    size = SIZES[spec.size]
    dim, heads, reduction, ratio = (
        row[i] for row in (size.dims, size.heads, size.reductions, size.ratios))
    embed, attn, ffn, norm, skip = (
        SLOTS[slot][spec.words(slot)[i]] for slot in ("embed", "attn", "ffn", "norm", "skip"))
    # the row's eps is a LayerNorm's: a BatchNorm has 1e-5 in every source
    layer_norm = partial(NORM["ln"], eps=size.eps)
    block_norm = layer_norm if norm is NORM["ln"] else norm
    if size.groups is None:
        width = dim
        blocks = [layers.Block(skip(attn(dim, heads, reduction, j), dim, block_norm, rate),
                               skip(ffn(dim, ratio), dim, block_norm, rate))
                  for j, rate in enumerate(rates)]
    else:
        width, blocks = next_vit_blocks(attn, dim, reduction, rates, size.groups[i])
    embed = embed(size.dims[i - 1] if i else 3, width, 2 if i else 4, norm)
    kind, tasks, in_trunk = size.stage_norm
    wanted = in_trunk or reads
    if tasks == "seg" and task == "cls":
        wanted = i == 3
    stage_norm = nn.Identity()
    if kind and wanted:
        stage_norm = layer_norm(dim) if kind is NORM["ln"] else kind(dim)
    return Stage(embed, nn.Sequential(*blocks), stage_norm, in_trunk)


def next_vit_blocks(attn, dim, reduction, rates, group):
    """-> width of the first block, blocks: NCBs, an NTB at the end of each `group` (0: no NTB)."""
    width = layers.attention_width(dim) if group else dim
    blocks, last = [], width
    for j, rate in enumerate(rates):
        if group and (j + 1) % group == 0:
            blocks.append(layers.NextTransformerBlock(attn, last, dim, reduction, j // group, rate))
            last = dim
        else:
            blocks.append(layers.NextConvBlock(last, width, rate))
            last = width
    return width, blocks


def build(name, task="seg", num_classes=None, drop_path=None, **slots):
    """Build a model with fresh weights.
    name: a key of MODELS; task: "seg" | "cls"; num_classes: 150 for seg, 1000 for cls unless given;
    drop_path: the last block's rate, the row's own unless given; slots: embed, attn, ffn, norm,
    skip, head, each a word of layers.py or four words (tuple, or separated by commas) for the four
    stages. Errors: UserError that lists the known words."""
    spec = make_spec(name, **slots)
    if task not in CLASSES:
        raise UserError(f"task {task!r} is not known; choose from: {', '.join(CLASSES)}")
    size = SIZES[spec.size]
    num_classes = CLASSES[task] if num_classes is None else num_classes
    rate = size.drop_path[task == "seg"] if drop_path is None else drop_path
    blocks = sum(size.depths)
    rates = iter([rate * i / max(blocks - 1, 1) for i in range(blocks)])
    uses = HEAD[spec.head].uses if task == "seg" else (3,)
    stages = [build_stage(spec, i, task, list(itertools.islice(rates, depth)), i in uses)
              for i, depth in enumerate(size.depths)]
    if task == "seg":
        width = spec.decoder or HEAD[spec.head].width or size.width
        head = HEAD[spec.head](size.dims, num_classes, width, size.rank)
    else:
        head = layers.Classifier(size.dims[-1], num_classes)
        nn.init.normal_(head.fc.weight, std=0.02)           # as every family has it
        nn.init.zeros_(head.fc.bias)
    model = Model(spec, task, num_classes, Encoder(stages, smallest_image(spec)), head)
    for m in model.modules():
        if isinstance(m, layers.WindowAttention):
            m.shift_small = task == "seg"
    init_encoder(model.encoder, *size.init)
    return model


def make_spec(name, **slots):
    """The Spec of a named row with some slots overridden."""
    if name not in MODELS:
        raise UserError(f"model {name!r} is not known; choose from: {', '.join(MODELS)}")
    chosen = {}
    for slot, words in slots.items():
        if slot not in SLOTS:
            raise UserError(f"slot {slot!r} is not known; choose from: {', '.join(SLOTS)}")
        words = tuple(map(str.strip, words.split(","))) if isinstance(words, str) else tuple(words)
        for word in words:
            if word not in SLOTS[slot]:
                known = ", ".join(SLOTS[slot])
                raise UserError(f"--{slot} {word!r} is not known; choose from: {known}")
        if len(words) not in ((1,) if slot == "head" else (1, 4)):
            raise UserError(f"--{slot} {','.join(words)}: give one word, or four (a head one word)")
        chosen[slot] = words[0] if len(set(words)) == 1 else words
    if chosen.get("head", MODELS[name].head) != MODELS[name].head:
        chosen["decoder"] = None                # it is the width of the row's own head
    spec = replace(MODELS[name], **chosen)
    for slot in spec.overrides:
        if SIZES[spec.size].groups and slot in ("ffn", "norm", "skip"):
            raise UserError(f"--{slot} {slots[slot]} does not go with --model {name}: Next-ViT's "
                            "stages have their own ffn, norm and skip; leave it out")
    return spec


def smallest_image(spec):
    """Smallest side in pixels: at strides 4 to 32, rounded up, no grid is smaller than R x R."""
    size, smallest = SIZES[spec.size], 1
    for i, (word, reduction) in enumerate(zip(spec.words("attn"), size.reductions)):
        attends = size.groups is None or size.groups[i]
        if attends and getattr(ATTENTION[word], "reduces", False):
            smallest = max(smallest, (reduction - 1) * 4 * 2 ** i + 1)
    return smallest


def init_encoder(encoder, linear, conv):
    """Draw the weights of linear layers with std linear, of other convolutions with std conv;
    "fan_out": sqrt(2 / fan-out), None: PyTorch's own. Biases are 0; norms keep 1 and 0. The
    sources' trunc_normal_ cuts at ±2, that is 100 standard deviations: never."""
    for m in encoder.modules():
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            std = linear if isinstance(m, (layers.Pointwise, nn.Linear, nn.Conv1d)) else conv
            if std is None or m.weight.is_meta:         # slow there, and for nothing
                continue
            if std == "fan_out":
                fan_out = m.weight[0, 0].numel() * len(m.weight) // getattr(m, "groups", 1)
                std = (2 / fan_out) ** 0.5
            nn.init.normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ---- Parameter groups, fusing, the command line, the catalogue -----------------------------------

def parameter_groups(model, lr, weight_decay, head_lr_factor=10.0):
    """Groups for AdamW, each with its "lr_factor" for schedules. The head learns `head_lr_factor`
    times as fast (SegFormer's recipe: a new decoder on a trained encoder); norms, biases, layer
    scales and other vectors do not decay."""
    groups = {}
    for name, p in model.named_parameters():
        part = "head" if name.startswith("head.") else "encoder"
        decays = p.ndim > 1 and not name.endswith(("bias", "bias_table"))
        groups.setdefault((part, decays), []).append(p)
    factors = {"head": head_lr_factor, "encoder": 1.0}
    return [{"name": f"{part}, {'decayed' if decays else 'not decayed'}", "params": params,
             "lr_factor": factors[part], "lr": lr * factors[part],
             "weight_decay": weight_decay if decays else 0.0}
            for (part, decays), params in groups.items()]


def fuse(model):
    """An inference copy with the same outputs: BatchNorms folded, the all-MLP head merged."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, layers.ConvNorm) and isinstance(m.norm, nn.modules.batchnorm._BatchNorm):
            m.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(m.conv, m.norm)
            m.norm = nn.Identity()
    if isinstance(model.head, layers.MlpHead):
        model.head = layers.MergedMlpHead(model.head)
    return model


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, without the long list of flags."""

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def bounded(kind, fits, rule):
    """A type for argparse, whose own one-line error then names the flag and says the rule."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: {rule}")
    return parse


positive = bounded(float, lambda v: v > 0, "must be a number above 0")
positive_int = bounded(int, lambda v: v > 0, "must be a whole number above 0")
non_negative = bounded(float, lambda v: 0 <= v < math.inf, "must be a number, at least 0")
count = bounded(int, lambda v: v >= 0, "must be a whole number, at least 0")
share = bounded(float, lambda v: 0 <= v < 1, "must be a number, at least 0 and below 1")

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}       # autocast's type for --amp


def no_effect(args, when, why, names):
    """A flag that would change nothing is an error: its user believes that it does. args.defaults:
    {name: value} of all flags; names: those without effect where `when` holds, between blanks."""
    given = ["--" + name.replace("_", "-") for name in names.split()
             if when and getattr(args, name) != args.defaults[name]]
    if given:
        raise UserError(f"{' '.join(given)}: no effect {why}; leave it out")


def add_model_arguments(parser, default="segformer_b2"):
    """The flags --model, --embed, --attn, --ffn, --norm, --skip, --head."""
    row = f"a row of `python models.py` (default {default})"
    parser.add_argument("--model", default=default, help=row)
    for slot, words in SLOTS.items():
        four = "" if slot == "head" else "; four words, comma-separated, for the four stages"
        parser.add_argument(f"--{slot}", help=f"{' | '.join(words)}{four} (default: the model's)")


def slots_from(args):
    """{slot: words} of the slots given on the command line."""
    return {slot: getattr(args, slot) for slot in SLOTS if getattr(args, slot) is not None}


def print_catalogue():
    """The rows of MODELS with their words and parameters; the words of each slot with sources."""
    print(f"{'model':<18}{'seg M':>9}{'cls M':>9}  words")
    for name, spec in MODELS.items():
        with torch.device("meta"):
            seg, cls = (sum(p.numel() for p in build(name, task).parameters()) for task in CLASSES)
        words = [f"{slot}={'+'.join(dict.fromkeys(spec.words(slot)))}" for slot in SLOTS]
        print(f"{name:<18}{seg / 1e6:9.3f}{cls / 1e6:9.3f}", "", *words)
    for slot, words in SLOTS.items():
        print(f"\n--{slot}")
        for word, block in words.items():
            print(f"  {word:<14}{(block.__doc__ or '').strip().partition(chr(10))[0]}")


# ---- Files: plain tensors and primitives, read without running code, written atomically ----------

def save_checkpoint(path, checkpoint, save=torch.save):
    """Write a dict of tensors and primitives, or what another `save` takes, atomically."""
    # torch.save straight to a full disk fails without saying why; one write() does say
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    write_file(path, [buffer.getbuffer()])


def write_file(path, parts):
    """Write bytes; a reader, or a crash, sees the old file or the whole new one, never a part."""
    path, part = pathlib.Path(path), pathlib.Path(f"{path}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)        # room on a full disk
        raise UserError(f"{path}: cannot be written ({error.strerror}); an older one is untouched")
    with contextlib.suppress(OSError):          # CIFS and others cannot; the file itself is safe
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def map_file(path):
    """A regular file's bytes, mapped from the disk. UserError for others: they may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file, and nothing else is read")
    with open(path, "rb") as file:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if file.read(1) else b""
    if raw[:23] == b"version https://git-lfs":
        raise UserError(f"{path}: a Git-LFS pointer; fetch its weights with `git lfs pull`")
    return raw


def read_checkpoint(path):
    """Read a .pt, .pth, .bin or .safetensors file -> its content, on the CPU. It runs no code; what
    claims more than the file holds is refused. Errors: UserError."""
    try:
        if pathlib.Path(path).suffix == ".safetensors":
            return read_safetensors(path)
        if map_file(path).find(b"bytearray") >= 0:      # the one type that makes n bytes out of "n"
            raise UserError(f"{path}: holds a bytearray, which no weights need; refused")
        if zipfile.is_zipfile(path):
            check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})")
    except Exception as error:      # torch.load reports a broken file by nearly any other exception
        if isinstance(error, (UserError, MemoryError)) or "can't allocate memory" in str(error):
            raise                   # a lack of memory is no fault of the file
        if kind := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{path}: could run {kind[1]}; refused; save its state_dict() alone")
        raise UserError(f"{path}: not a readable checkpoint (truncated, damaged or another format)")
    for _, part in walk(checkpoint):
        if isinstance(part, torch.Tensor):
            odd = part.layout != torch.strided or part.is_nested or part.is_quantized
            if odd or part.is_meta or part.nbytes > part.untyped_storage().nbytes():
                raise UserError(f"{path}: a tensor is sparse, quantised or larger than the file")
    return checkpoint


def check_archive(path):
    """UserError unless a zip archive holds what it claims; torch.load looks at no check sum."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise UserError(f"{path}: parts are compressed or overlap; save its state_dict()")
        if (bad := archive.testzip()) is not None:
            raise UserError(f"{path}: damaged (check sum of {bad}); copy or download it again")


def walk(tree):
    """(name, part) of tables and lists, outermost first, each once: deep, shared or looped."""
    queue, seen = [("", tree)], set()
    for name, item in queue:            # it grows meanwhile
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield name, item
        if isinstance(item, dict):
            queue.extend(item.items())
        elif isinstance(item, (list, tuple, set)):
            queue.extend(("", part) for part in item)


SAFETENSORS = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                   I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8,
                   U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """Read a .safetensors file (8 bytes length, a JSON header, raw tensors) -> {name: tensor};
    nothing is allocated before each number of the header is checked. Errors: UserError."""
    raw = map_file(path)
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors, end = {}, start
    try:
        if start > min(len(raw), 100_000_000):      # the format's own limit
            raise ValueError(f"it has {len(raw)} bytes and claims a header of {start - 8}")
        data = torch.frombuffer(raw, dtype=torch.uint8)
        header = json.loads(raw[8:start].decode("utf-8"))
        if not all(isinstance(text, str) for text in header.pop("__metadata__", {}).values()):
            raise ValueError("its metadata are not texts")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, dtype = entry["shape"], SAFETENSORS[entry["dtype"]]
            numbers = [*shape, *entry["data_offsets"]]
            if len(numbers) > 32 or not all(type(n) is int and 0 <= n <= len(raw) for n in numbers):
                raise ValueError(f"{name}: a size or offset is out of range")
            first, end = end, end + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [first - start, end - start] or end > len(raw):
                raise ValueError(f"{name}: its bytes overlap, leave a hole or do not fit its shape")
            tensors[name] = data[first:end].clone().view(dtype).view(shape)     # clone aligns them
        if end != len(raw):
            raise ValueError(f"{len(raw) - end} bytes behind the last tensor")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no safetensors file, or a damaged one ({error})")
    return tensors


# ---- A run's folder: .lock, last.pt, best.pt, log.jsonl ------------------------------------------

def lock_folder(output):
    """Make a run's folder and hold it alone: keep the open file, the lock ends with it. UserError
    where another process holds it (`.lock` names it), OSError where nothing can be written."""
    if output.is_file():
        raise UserError(f"--output-dir {output}: is a file; choose another")
    output.mkdir(parents=True, exist_ok=True)
    lock = open(output / ".lock", "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):      # what a held lock gives
        lock.seek(0)
        raise UserError(f"{output}: another run is writing here ({lock.read(200).strip()}); "
                        "wait for it or choose another --output-dir")
    except OSError as error:
        print(f"note: {output} cannot be locked ({error.strerror}): let no other run write there")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def find_state(output, resume, settings):
    """The state to go on from, or None; the folder's own last.pt goes before --resume. A state from
    elsewhere is copied here with its best.pt, and the log is made whole. UserError names all
    settings {name: primitive} that differ."""
    path, log = output / "last.pt", output / "log.jsonl"
    if not path.exists():
        if log.exists() and log.stat().st_size:
            raise UserError(f"{output}: log.jsonl, but last.pt is gone; give a new --output-dir")
        if resume is None:
            return None
        path = pathlib.Path(resume)
        path = path / "last.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    kinds = dict(model=dict, optimizer=dict, scaler=dict, args=dict, rows=list, best=dict)
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind)
                                              for key, kind in kinds.items()):
        raise UserError(f"{path}: not the last.pt of a run; --pretrain takes mere weights")
    theirs = state["args"]
    different = [f"{key.replace('_', '-')} was {theirs.get(key)}, now {settings.get(key)}"
                 for key in settings | theirs if theirs.get(key) != settings.get(key)]
    if different:
        raise UserError(f"{path}: is of another run: {'; '.join(different)}. Continue it with the "
                        f"same flags, or begin a new run: --output-dir NEW --pretrain {path}")
    if path.parent != output:           # this folder is complete before it has a last.pt
        for name in ("best.pt", "samples.png", "last.pt"):
            if (file := path.with_name(name)).exists():
                write_file(output / name, [file.read_bytes()])
    try:
        write_log(output, state["rows"])
    except TypeError:
        raise UserError(f"{path}: its rows of the log are damaged")
    return state


def write_log(output, rows):
    """Make log.jsonl equal to a run's rows. They live in last.pt: a torn log mends itself."""
    write_file(output / "log.jsonl", [(json.dumps(row) + "\n").encode() for row in rows])


@contextlib.contextmanager
def tolerated(path):
    """For a file that a run can do without: where it cannot be made, that costs a line."""
    try:
        yield path
    except Exception as error:      # whatever it is, the weights are saved and the run goes on
        reason = str(error).strip().partition("\n")[0]
        print(f"note: {path} is not written ({type(error).__name__}: {reason})")


# ---- What both training scripts do in the same way -----------------------------------------------

# The same run may go on with other values of these, as long as the effective batch stays.
MAY_CHANGE = {"output_dir", "resume", "device", "workers", "compile", "checkpointing", "batch_size",
              "accum", "save_every", "timeout", *SLOTS}

# What last.pt has and best.pt has not.
TO_GO_ON = {"optimizer", "scaler", "step", "rows", "losses", "seconds", "class_weights"}


def training_parser(description, recipe, quick):
    """A parser with the flags of both training scripts -> parser, add(flag, help, ...) for others.
    The values of `recipe` hold with --data-path, those of `quick` without; --help shows both."""
    parser = Parser(description=description, epilog="Defaults in [ ] hold without --data-path.")

    def add(flag, help, **options):
        key = flag[2:].replace("-", "_")
        if key in recipe:
            help = f"{help} (default {recipe[key]} [{quick[key]}])"
        elif "default" in options:
            help = f"{help} (default {options['default']})"
        parser.add_argument(flag, help=help, **options)

    add_model_arguments(parser, f"{recipe['model']} [{quick['model']}]")
    parser.set_defaults(model=None)
    add("--drop-path", "stochastic depth (default: the model's own [0])", type=share)
    add("--pretrain", "weights to start from: a best.pt, a public file, a Hugging Face folder")
    add("--epochs", "passes over the training set", type=positive_int)
    add("--batch-size", "images per process and pass; else these share it", type=positive_int)
    add("--accum", "passes per step; they multiply the batch", type=positive_int, default=1)
    add("--lr", "learning rate of the encoder", type=positive)
    add("--weight-decay", "of matrices and kernels", type=non_negative)
    add("--warmup", "steps, or 5e: epochs (default 1500, at most 5 %%)", type=steps_or_epochs)
    add("--clip", "largest norm of the gradient", type=positive)
    add("--ema", "evaluate and keep a moving average of the weights; without a value: 0.9998",
        type=share, nargs="?", const=0.9998, default=0.0, metavar="DECAY")
    add("--amp", "mixed precision", choices=AMP, default="off")
    add("--sync-bn", "BatchNorm statistics over all processes (CUDA)", action="store_true")
    add("--compile", "torch.compile the model for training", action="store_true")
    add("--checkpointing", "recompute blocks in backward: less memory", action="store_true")
    add("--deterministic", "the same bits at every run on CUDA, slower", action="store_true")
    add("--eval-every", "epochs per validation", type=positive_int, default=1, metavar="EPOCHS")
    add("--save-every", "write last.pt this often", type=positive_int, default=500, metavar="STEPS")
    add("--seed", "of weights, order, augmentation and dropout", type=count, default=0)
    add("--workers", "loader processes per process (default 2 [0], on CUDA up to 8)", type=count)
    add("--timeout", "wait for a silent process", type=positive, default=300, metavar="SECONDS")
    add("--device", "cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--output-dir", "default runs/TASK-MODEL-DATA; a folder with a last.pt is continued")
    add("--resume", "begin a new folder with the last.pt of this one")
    return parser, add


def settle_arguments(args, recipe, quick, processes):
    """Fill in what was not given, and refuse what does not go together."""
    values = recipe if args.data_path else quick
    batch, rest = divmod(values["batch_size"], processes.world * args.accum)
    if args.batch_size is None and rest:
        raise UserError(f"--batch-size: {processes.world} processes x {args.accum} passes cannot "
                        f"share the recipe's {values['batch_size']} images; give a value")
    for key, value in (values | {"batch_size": batch}).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if (args.sync_bn or args.deterministic) and processes.device.type != "cuda":
        raise UserError("--sync-bn, --deterministic: for CUDA only; leave them out on the CPU")
    if (args.sync_bn or args.checkpointing) and args.compile:
        raise UserError("--sync-bn, --checkpointing: not with --compile, PyTorch cannot compile it")


def steps_or_epochs(text):
    """A type for argparse: "500" is 500 steps, (500.0, False); "5e" is 5 epochs, (5.0, True)."""
    return non_negative(text.removesuffix("e")), text.endswith("e")


def warmup_steps(warmup, steps, steps_per_epoch):
    """--warmup in steps; 1500 or 5 % of the run, whichever is less, where it was not given."""
    if warmup is None:
        return min(1500, steps // 20)
    number, in_epochs = warmup
    number = round(number * steps_per_epoch) if in_epochs else int(number)
    if number >= steps:
        raise UserError(f"--warmup: {number} steps do not end within the run's {steps}; use less")
    return number


class Run:
    """A training run: its folder, which process 0 alone locks and writes, and where it stands.
    settings: {name: primitive}, what makes two runs the same; state: to go on from, or None; step:
    finished steps; rows: of the log, one for each finished epoch; losses, seconds: of the epoch
    that has begun; best: {"epoch": number of the best one so far, metric: its result}."""

    def __init__(self, args, processes, model, dataset, batch, metric):
        name = pathlib.Path(args.data_path).resolve().name if args.data_path else "shapes"
        settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
        self.settings = settings | {
            "model": str(model.spec), "data_path": args.data_path and name,
            "data_files": dataset.fingerprint(), "images": len(dataset),
            "classes": dataset.num_classes, "effective_batch": batch,
            "pretrain": args.pretrain and "/".join(os.path.abspath(args.pretrain).split("/")[-2:])}
        self.output = pathlib.Path(args.output_dir or f"runs/{model.task}-{model.spec}-{name}")
        self.args, self.processes, self.batch, self.metric = args, processes, batch, metric
        self.step, self.rows, self.losses, self.seconds = 0, [], [], 0.0
        self.best, self.state = {"epoch": 0, metric: -1.0}, None
        if processes.rank == 0:
            self.lock = lock_folder(self.output)
            self.state = find_state(self.output, args.resume, self.settings)

    def begin(self, parts, facts, images, steps_per_epoch):
        """Go on from the state, if there is one, and print what begins. parts: {name: what has a
        state_dict, or None}; facts: what the files hold besides; images: number to validate on."""
        args, processes, state = self.args, self.processes, self.state
        self.parts, self.facts, self.state = parts, facts, None
        if state:
            for name, part in parts.items():
                if part:
                    part.load_state_dict(state[name])
            for name in ("step", "rows", "losses", "seconds", "best"):
                setattr(self, name, state[name])
        if processes.rank > 0:
            return
        words = [f"{key.replace('_', '-')}={value}" for key, value in sorted(self.settings.items())]
        print(textwrap.fill("  ".join(words), 100, break_on_hyphens=False))
        parameters = sum(p.numel() for p in parts["model"].parameters()) / 1e6
        print(f"{parameters:.2f} M parameters, {images} images to validate on, "
              f"{processes.device.type}; effective batch {self.batch} = {args.batch_size} images x "
              f"{processes.world} processes x {args.accum} passes, {steps_per_epoch} steps an "
              f"epoch; output: {self.output}")
        if self.step and len(self.rows) < args.epochs:
            print(f"continuing after step {self.step} of {args.epochs * steps_per_epoch}")

    def check_finite(self, loss, norm, lr, scaler):
        """UserError before an update by a loss or gradient that is not finite. In fp16 an infinite
        gradient is no error at first: the scaler skips the update and halves its factor."""
        scaler_skips = scaler.is_enabled() and scaler.get_scale() > 1e-4
        if not (math.isfinite(loss) and (math.isfinite(norm) or scaler_skips)):
            last = self.output / "last.pt"
            weights = f" --pretrain {last}" if last.exists() else ""
            raise UserError(f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g} at lr "
                            f"{lr:.3g}; stopped before the update. Begin a new run: --output-dir "
                            f"NEW{weights} with a lower --lr, --clip 1 or --amp bf16")

    def save(self, name="last.pt", without=()):
        """Write last.pt, from which the run goes on with its next step, or less of the same."""
        self.seconds = time.time() - self.start
        if self.processes.rank == 0:
            states = {name: part and part.state_dict() for name, part in self.parts.items()}
            content = states | self.facts | {
                "spec": describe(self.parts["model"]), "args": self.settings, "best": self.best,
                "epoch": len(self.rows), "step": self.step, "rows": self.rows,
                "losses": self.losses, "seconds": self.seconds}
            save_checkpoint(self.output / name, {
                key: value for key, value in content.items() if key not in without})

    def close_epoch(self, lr, metrics, peak_memory):
        """Add a row to the log, print it in a line, and write best.pt, if this is the best so far,
        before last.pt: a run that ends between them validates again, with the same bits.
        -> whether it is the best so far"""
        epoch, metric, epochs = len(self.rows) + 1, self.metric, self.args.epochs
        loss, seconds = math.fsum(self.losses) / len(self.losses), time.time() - self.start
        speed = len(self.losses) * self.batch / self.seconds      # up to the last step's save
        self.rows.append({"epoch": epoch, "step": self.step, "loss": loss, "lr": lr, **metrics,
                          "seconds": seconds, "images_per_second": speed,
                          "peak_memory_gib": peak_memory})
        improved = metrics.get(metric, -1.0) > self.best[metric]
        if improved:
            self.best = {"epoch": epoch, metric: metrics[metric]}
        self.losses, self.seconds = [], 0.0
        if self.processes.rank > 0:
            return improved
        left = round(sum(row["seconds"] for row in self.rows) / epoch * (epochs - epoch))
        result = f", {metric} {metrics[metric]:.2f} %" if metrics else ""
        best = " (best)" if improved else ""
        print(f"epoch {epoch}/{epochs}: loss {loss:.4f}{result}{best}, {seconds:.0f} s, "
              f"{datetime.timedelta(seconds=left)} left")
        if improved:
            self.save("best.pt", without=TO_GO_ON)
        self.start = time.time()        # the next epoch has taken no time so far
        self.save()
        write_log(self.output, self.rows)
        return improved


@torch.no_grad()
def update_average(average, model, decay, step):
    """Move a model's running average, buffers too, one step on: mean = d mean + (1 - d) value. d
    begins small, so that a short run's average is not that of its first, random weights."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values()))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*floats)), None)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


# ---- A model's description and its way back ------------------------------------------------------

def describe(model):
    """What `load` needs to build the model again, in primitives."""
    return {"name": model.spec.name, "slots": model.spec.overrides, "task": model.task,
            "num_classes": model.num_classes}


def load(path, device="cpu", fused=True):
    """The model of a training script's checkpoint, with the moving average's weights where it has
    one, ready to infer; it knows its data, see `know`. Errors: UserError."""
    checkpoint = read_checkpoint(path)
    try:
        weights, d = checkpoint.get("ema") or checkpoint["model"], checkpoint["spec"]
        make = partial(build, d["name"], d["task"], d["num_classes"], **d["slots"])
        with torch.device("meta"):      # names and sizes are compared before any memory is taken
            sketch = make().requires_grad_(False)
        targets = sketch.state_dict()
        sketch.load_state_dict(weights, assign=True)
    except (AttributeError, KeyError, RuntimeError, TypeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the description of a model and its weights, as training "
                        f"writes them ({reason}); give other weights to --pretrain with --model")
    for name, value in weights.items():
        check_numbers(f"{path}: {name}", value, targets[name])
    model = make().eval()
    model.load_state_dict(weights)
    model = know(fuse(model) if fused else model, checkpoint, path)
    return model.to(device, memory_format=torch.channels_last)


def check_numbers(name, value, target):
    """UserError unless a tensor's numbers are of the kind of the target's, and finite there."""
    if value.is_floating_point() != target.is_floating_point():
        raise UserError(f"{name} holds {value.dtype}, expected {target.dtype}")
    if not value.to(target.dtype).isfinite().all():
        raise UserError(f"{name} holds inf or nan: it was spoilt in training or conversion")


def know(model, checkpoint, path):
    """Give a model what its checkpoint says of its data: classes (K names), colors ((K, 3) uint8 or
    None), size (of the short side in training, or None), first_id (of class 0 in masks); and args,
    the flags of its training. path: for the UserError."""
    model.classes = checkpoint.get("classes") or [f"class {k}" for k in range(model.num_classes)]
    model.colors, model.args = checkpoint.get("colors"), checkpoint.get("args", {})
    try:
        model.size = model.args.get("crop") or model.args.get("image_size")
        model.first_id = checkpoint.get("first_id", 0 if model.args.get("zero_is_class") else 1)
        if model.colors is not None:
            colors = torch.tensor(model.colors, dtype=torch.uint8)
            model.colors = colors.view(model.num_classes, 3).numpy()
        named = isinstance(model.classes, list) and len(model.classes) == model.num_classes and all(
            isinstance(name, str) and len(name) < 1000 for name in model.classes)
        sized = model.size is None or type(model.size) is int and 0 < model.size < 20_000
        if not (named and sized and model.first_id in (0, 1)):
            raise ValueError
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path}: its classes, colors, args or first_id are not as training writes "
                        "them; load its weights by --pretrain together with --model")
    return model


# ---- Appendix: public weights. Tables of names, ours on the left and theirs on the right ---------

# A row is "ours theirs", modules or tensors; a last part (.weight, .bias, ...) is the same in both.
# In ours: {i} stage, {j} block or other position, {a|b} one of these words; before a name without
# "head." stands "encoder.stages.". In theirs: the same or sums of it, {first} and {k} the places of
# the stage's first block and of block j among all; {c|d} the word in the place of ours or {x} our
# first, c+d two tensors that we hold as one, stacked along the first axis. The first row that fits
# counts. By MIT's second, our encoder.stages.2.blocks.0.ffn.norm is their block3.0.norm2.
MIT = """
    {i}.embed.{conv|norm}                           patch_embed{i+1}.{proj|norm}
    {i}.blocks.{j}.{attn|ffn}.norm                  block{i+1}.{j}.{norm1|norm2}
    {i}.blocks.{j}.attn.branch.{q|kv|sr|norm|proj}  block{i+1}.{j}.attn.{x}
    {i}.blocks.{j}.ffn.branch.{fc1|dwconv|fc2}      block{i+1}.{j}.mlp.{fc1|dwconv.dwconv|fc2}
    {i}.norm                                        norm{i+1}
"""
LITE = """
    {i}.blocks.{j}.{attn|ffn}.norm{1|2}         block.{i}.{j}.layer_norm_{1|2}{1|2}
    {i}.blocks.{j}.attn.branch.{kv|reprojection} block.{i}.{j}.attention.self.{x}
    {i}.blocks.{j}.attn.branch.{queries|keys|values} block.{i}.{j}.attention.self.{query|key|value}
    {i}.blocks.{j}.ffn.branch.fc1.{conv|norm}   block.{i}.{j}.mlp.{conv1|batch_norm1}
    {i}.blocks.{j}.ffn.branch.dwconv.{conv|norm} block.{i}.{j}.mlp.{dwconv.dwconv|batch_norm2}
    {i}.blocks.{j}.ffn.branch.fc2               block.{i}.{j}.mlp.conv2
""" + MIT
MSCAN = """
    0.embed.{0.conv|0.norm|1.conv|1.norm}       patch_embed1.proj.{0|1|3|4}
    {i}.embed.0.{conv|norm}                     patch_embed{i+1}.{proj|norm}
    {i}.blocks.{j}.{attn|ffn}.scale             block{i+1}.{j}.{layer_scale_1|layer_scale_2}
    {i}.blocks.{j}.attn.branch.{proj_1|proj_2}  block{i+1}.{j}.attn.{x}
    {i}.blocks.{j}.attn.branch.{local|mix}  block{i+1}.{j}.attn.spatial_gating_unit.{conv0|conv3}
    {i}.blocks.{j}.attn.branch.strips.{0|1|2}.0 block{i+1}.{j}.attn.spatial_gating_unit.conv{x}_1
    {i}.blocks.{j}.attn.branch.strips.{0|1|2}.1 block{i+1}.{j}.attn.spatial_gating_unit.conv{x}_2
""" + MIT
NEXT_VIT = """
    0.embed.4.{conv|norm}                       features.{first}.patch_embed.{x}
    0.embed.{j}.{conv|norm}                     stem.{j}.{x}
    {i}.embed.1.{conv|norm}                     features.{first}.patch_embed.{x}
    {i}.blocks.{j}.patch_embed.0.{conv|norm}    features.{k}.patch_embed.{x}
    {i}.blocks.{j}.mhca.group_conv.{conv|norm}  features.{k}.mhca.{group_conv3x3|norm}
    {i}.blocks.{j}.mhca.projection              features.{k}.mhca.projection
    {i}.blocks.{j}.{norm1|norm2|mlp_norm}       features.{k}.{norm1|norm2|norm}
    {i}.blocks.{j}.attn.{q|k|v|proj|norm}       features.{k}.e_mhsa.{x}
    {i}.blocks.{j}.projection.{conv|norm}       features.{k}.projection.{x}
    {i}.blocks.{j}.mlp.{fc1|fc2}                features.{k}.mlp.{conv1|conv2}
    3.norm                                      norm
    {i}.norm                                    extra_norm_list.{i}
"""
SWIN = """
    0.embed.{proj|norm}                     patch_embed.{proj|norm}
    {i}.embed.{norm|reduction}              layers.{i-1}.downsample.{x}
    {i}.blocks.{j}.{attn|ffn}.norm          layers.{i}.blocks.{j}.{norm1|norm2}
    {i}.blocks.{j}.attn.branch.{qkv|proj}   layers.{i}.blocks.{j}.attn.{x}
    {i}.blocks.{j}.attn.branch              layers.{i}.blocks.{j}.attn
    {i}.blocks.{j}.ffn.branch.{fc1|fc2}     layers.{i}.blocks.{j}.mlp.{fc1|fc2}
    {i}.norm                                norm{i}
"""
DEST = """
    {i}.blocks.{j}.attn.branch.k                    block{i+1}.{j}.attn.k
    {i}.blocks.{j}.attn.branch.sr.{conv|norm}       block{i+1}.{j}.attn.{sr|norm}
    {i}.blocks.{j}.ffn.branch.fc1.{conv|norm}       block{i+1}.{j}.mlp.{fc1|norm1}
    {i}.blocks.{j}.ffn.branch.dwconv.{conv|norm}    block{i+1}.{j}.mlp.{dwconv.dwconv|norm2}
""" + MIT
# Dialects of a table: (theirs there, theirs here), one after another
HF_HEAD = (("linear_c{i+1}", "linear_c.{i}"), ("linear_pred", "classifier"),
           ("linear_fuse.{conv|bn}", "{linear_fuse|batch_norm}"))
HF = HF_HEAD + (
    ("patch_embed{i+1}.{proj|norm}", "patch_embeddings.{i}.{proj|layer_norm}"),
    ("attn.{x}", "attention.{self.query|self.key+self.value|self.sr|self.layer_norm|output.dense}"),
    ("block{i+1}", "block.{i}"), ("{norm1|norm2}", "{layer_norm_1|layer_norm_2}"),
    ("fc1", "dense1"), ("fc2", "dense2"), ("norm{i+1}", "layer_norm.{i}"))
# What state_dict() gives since transformers 5; its save_pretrained keeps to the names above
HF_5 = HF_HEAD + (
    ("patch_embed{i+1}.{proj|norm}", "stages.{i}.patch_embeddings.{proj|layer_norm}"),
    ("attn.{x}", "attention.{q_proj|k_proj+v_proj|sequence_reduction.sequence_reduction|"
     "sequence_reduction.layer_norm|o_proj}"), ("norm{i+1}", "stages.{i}.layer_norm"),
    ("block{i+1}", "stages.{i}.blocks"), ("{norm1|norm2}", "{layernorm_before|layernorm_after}"),
    ("linear_c", "linear_projections"))
MIT_MMSEG = (("patch_embed{i+1}.{proj|", "layers.{i}.0.{projection|"),
             ("attn.{x}", "attn.{attn.in_q|attn.in_k+attn.in_v|sr|norm|attn.out_proj}"),
             ("mlp.{fc1|dwconv.dwconv|fc2}", "ffn.layers.{0|1|4}"), ("norm{i+1}", "layers.{i}.2"),
             ("block{i+1}", "layers.{i}.1"))
PVT_V2_TIMM = (("patch_embed{i+1}", "stages.{i}.downsample"), ("block{i+1}", "stages.{i}.blocks"),
               ("norm{i+1}", "stages.{i}.norm"), ("dwconv.dwconv", "dwconv"))
MSCAN_MMSEG = (("dwconv.dwconv", "dwconv"),)
NEXT_VIT_TIMM = (("features.{first}", "stages.{i}.blocks.0"),
                 ("features.{k}", "stages.{i}.blocks.{j}"), ("{conv1|conv2}", "{fc1|fc2}"))
SWIN_TIMM = (("layers.{i-1}", "layers.{i}"),)
SWIN_TORCHVISION = (("patch_embed.{proj|norm}", "features.0.{0|2}"), ("mlp.{fc1|fc2}", "mlp.{0|3}"),
                    ("layers.{i-1}.downsample", "features.{2i}"),
                    ("layers.{i}.blocks", "features.{2i+1}"))
SWIN_MMSEG = (("patch_embed.{proj|", "patch_embed.{projection|"), ("layers", "stages"),
              ("attn", "attn.w_msa"), ("mlp.{fc1|fc2}", "ffn.layers.{0.0|1}"))
DEST_SEG = (("norm1", "bn1"), ("norm2", "bn2"), ("sr|norm", "sr|bn1"), ("proj|norm", "proj|bn1"))
# Heads of mmsegmentation, and of the authors' own releases, most of which are built on it
MLP = """
    head.projections.{i}    decode_head.linear_c{i+1}.proj
    head.fuse.{conv|norm}   decode_head.linear_fuse.{conv|bn}
    head.classifier         decode_head.linear_pred
"""
HAM_FPN = """
    head.{squeeze|align}.{conv|norm}    decode_head.{x}.{conv|gn}
    head.ham_in                         decode_head.hamburger.ham_in.conv
    head.ham_out.{conv|norm}            decode_head.hamburger.ham_out.{conv|gn}
    head.{lateral|smooth}.{i}           neck.{lateral_convs|fpn_convs}.{i}.conv
    head.scale.{i}.{j}.{conv|norm}      decode_head.scale_heads.{i}.{2j}.{conv|bn}
    head.classifier                     decode_head.conv_seg
"""
LAWIN = """
    head.projections.{i}                        decode_head.linear_c{i+2}.proj
    head.low_level                              decode_head.linear_c1.proj
    head.{short_path|cat|low_level_fuse}.{conv|norm} decode_head.{x}.{conv|bn}
    head.image_pool.{conv|norm}                 decode_head.image_pool.1.{conv|bn}
    head.attentions.{i}.down.{0|1}.{conv|norm}
                                decode_head.ds_{8>>i}.0.proj.{depthwise|pointwise}_conv.{conv|bn}
    head.attentions.{i}.{theta|phi|g}           decode_head.lawin_{8>>i}.0.{x}.conv
    head.attentions.{i}.{mixing|norm}           decode_head.lawin_{8>>i}.0.{position_mixing|norm}
    head.attentions.{i}.out.{conv|norm}         decode_head.lawin_{8>>i}.0.conv_out.{conv|bn}
""" + MLP
MMSEG = dict(mlp=MLP, mlp_concat=MLP, ham=HAM_FPN, fpn=HAM_FPN, lawin=LAWIN, lawin_sum=LAWIN)
HF_HEADS = dict(cls="head.fc classifier", mlp=MLP, mlp_concat=MLP)
LITE_HAM = "head.squeeze decode_head.squeeze.conv\n head.classifier decode_head.classifier.1"


@dataclass(frozen=True)
class Format:
    """A way of naming tensors; keys None: our own.
    keys: the encoder's rows; heads: rows for each word of --head and for "cls", which go first;
    prefix: of the encoder's names, where the head's have none; dialect: changes of theirs in keys;
    linear: our 1x1 convolutions that are Linear layers there (conv1d: Conv1d); unfold: whether they
    merge patches in nn.Unfold's order of channels, (C, row, column), ours is (column, row, C)."""
    name: str
    keys: str | None = None
    heads: dict = field(default_factory=dict)
    prefix: str = ""
    dialect: tuple = ()
    linear: str = r"\.(q|kv|proj|fc1|fc2|qkv|reduction|projections\.\d|low_level)$"
    conv1d: bool = False
    unfold: bool = False

    def rows(self, word):
        """With a word's head: (our name, list of theirs), a row for each of the words in {}."""
        choice = re.compile(r"{([^{}]*\|[^{}]*)}")
        row = iter(f"{self.heads.get(word, '')} {self.keys}".split())
        for ours, theirs in zip(row, row):
            for old, new in self.dialect:
                theirs = theirs.replace(old, new)
            if not ours.startswith("head."):
                ours, theirs = "encoder.stages." + ours, self.prefix + theirs
            if first := choice.search(ours):
                theirs = theirs.replace("{x}", first[0])
            spread = [itertools.product(*(words.split("|") for words in choice.findall(name)))
                      for name in (ours, theirs)]
            for words, others in zip(*spread):
                parts = itertools.product(*(other.split("+") for other in others))
                yield choice.sub("%s", ours) % words, [choice.sub("%s", theirs) % p for p in parts]

    def names(self, model):
        """{our name of a tensor: the list of theirs, stacked} for what this format has."""
        if self.keys is None:
            return {key: [key] for key in model.state_dict()}
        rows, names = list(self.rows("cls" if model.task == "cls" else model.spec.head)), {}
        for key in model.state_dict():
            i, j = map(int, re.findall(r"\d+", f"{key}.0.0")[:2])
            first = sum(SIZES[model.spec.size].depths[:i])
            places = {"i": i, "j": j, "i-1": i - 1, "i+1": i + 1, "i+2": i + 2, "8>>i": 8 >> i,
                      "2i": 2 * i, "2i+1": 2 * i + 1, "2j": 2 * j, "first": first, "k": first + j}
            for ours, theirs in rows:
                end = key.removeprefix(ours.format(**places))
                if re.fullmatch(r"(\.\w+)?", end):
                    names[key] = [name.format(**places) + end for name in theirs]
                    break
        return names

    def read(self, key, tensors):
        """Their tensors -> ours, up to axes of size 1."""
        value = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return self.reorder(key, value, (-1, 2, 2))

    def write(self, key, value, count):
        """Our tensor -> `count` of theirs."""
        if re.search(self.linear, key.removesuffix(".weight")) and value.shape[2:] == (1, 1):
            value = value.flatten(2) if self.conv1d else value.flatten(1)
        value = self.reorder(key, value, (2, 2, -1))
        return [part.contiguous() for part in (value.chunk(count) if count > 1 else [value])]

    def reorder(self, key, value, channels):
        """Turn the channels of a merged patch round; another row's norm has no such patch."""
        if self.unfold and re.match(r"encoder.stages.[123].embed", key) and value.numel() % 4 == 0:
            value = value.unflatten(-1, channels).transpose(-3, -1).flatten(-3)
        return value


CLS = {"cls": "head.fc head"}
CLS_SWIN = {"cls": "3.norm norm\n head.fc head"}
TIMM_STEM = "0.embed.conv patch_embed.proj\n 0.embed.norm patch_embed.norm"
MSCAN_KIND = dict(linear=r"$^")
NEXT_KIND = dict(linear=r"attn\.(q|k|v|proj)$")
DEST_KIND = dict(linear=r"\.(q|k|proj|fc1\.conv|fc2)$", conv1d=True)
FORMATS = [     # of two that fit equally well, the first (NVlabs' and PVTv2's share all names)
    Format("own checkpoint"),
    Format("Hugging Face SegFormer", MIT, HF_HEADS, "segformer.encoder.", HF),
    Format("Hugging Face SegFormer encoder", MIT, dialect=HF),
    Format("SegFormer / PVTv2 encoder", MIT, CLS),
    Format("SegFormer / PVTv2 / Lawin segmentor", MIT, MMSEG, "backbone."),
    Format("mmsegmentation SegFormer encoder", MIT, dialect=MIT_MMSEG),
    Format("transformers 5 SegFormer", MIT, HF_HEADS, "segformer.", HF_5),
    Format("transformers 5 SegFormer encoder", MIT, dialect=HF_5),
    Format("original project", LITE, HF_HEADS | {"light_ham": LITE_HAM}, "segformer.encoder.", HF,
           linear=r"\.(q|kv|proj|projections\.\d)$"),
    Format("timm PVTv2", TIMM_STEM + MIT, CLS, dialect=PVT_V2_TIMM),
    Format("MSCAN encoder", MSCAN, CLS, **MSCAN_KIND),
    Format("SegNeXt segmentor", MSCAN, MMSEG, "backbone.", **MSCAN_KIND),
    Format("mmsegmentation MSCAN encoder", MSCAN, CLS, dialect=MSCAN_MMSEG, **MSCAN_KIND),
    Format("mmsegmentation SegNeXt", MSCAN, MMSEG, "backbone.", MSCAN_MMSEG, **MSCAN_KIND),
    Format("Next-ViT encoder", NEXT_VIT, {"cls": "head.fc proj_head.0"}, **NEXT_KIND),
    Format("Next-ViT segmentor", NEXT_VIT, MMSEG, "backbone.", **NEXT_KIND),
    Format("timm Next-ViT", NEXT_VIT, {"cls": "head.fc head.fc"}, "", NEXT_VIT_TIMM, **NEXT_KIND),
    Format("Swin encoder", SWIN, CLS_SWIN),
    Format("Swin segmentor", SWIN, MMSEG, "backbone."),
    Format("timm Swin", SWIN, {"cls": "3.norm norm\n head.fc head.fc"}, "", SWIN_TIMM),
    Format("torchvision Swin", SWIN, CLS_SWIN, dialect=SWIN_TORCHVISION),
    Format("mmsegmentation Swin encoder", SWIN, CLS_SWIN, dialect=SWIN_MMSEG, unfold=True),
    Format("mmsegmentation Swin segmentor", SWIN, MMSEG, "backbone.", SWIN_MMSEG, unfold=True),
    Format("DEST depth encoder", DEST, CLS, **DEST_KIND),
    Format("DEST encoder", DEST, CLS, dialect=DEST_SEG, **DEST_KIND),
    Format("DEST segmentor", DEST, MMSEG, "backbone.", DEST_SEG, **DEST_KIND),
]
HEADS = re.compile(r"(head|classifier|decode_head|auxiliary_head|neck|proj_head)\.")
# What no forward pass reads; and norms that Swin and Next-ViT have for one of the two tasks alone
DEAD = re.compile(r".*\.(relative_position_index|attn_mask)$|decode_head\.conv_seg\."
                  r"|(criterion|loss)\w*\.|encoder\.stages\.[012]\.norm\."
                  r"|(backbone\.)?(norm\d?|extra_norm_list\.3|proj_head)\.")
# A BatchNorm's or an average's: older files lack them, and nothing here reads them
COUNTERS = ("num_batches_tracked", "n_averaged")
AVERAGED = re.compile(r"(?i)(?<![a-z])(ema|teacher)")     # a moving average's table or prefix


# ---- Reading and writing them --------------------------------------------------------------------

@dataclass
class Report:
    """What load_pretrained did; fresh: new by design; unexpected: the file's, not used."""
    format: str
    loaded: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    fresh: list = field(default_factory=list)

    def __str__(self):
        return (f"{self.format}: loaded {len(self.loaded)} tensors; new by design, freshly "
                f"initialised: {some(self.fresh)}; in the file, not used: {some(self.unexpected)}")


def some(names, shown=4):
    """How many, and the first of them."""
    more = ", ..." if len(names) > shown else ""
    return f"{len(names)} ({', '.join(names[:shown])[:200]}{more})" if names else "0"


def load_pretrained(model, source):
    """Load weights from our checkpoints, a family's original files, or Hugging Face's -> Report.
    source: path (.pt, .pth, .bin, .safetensors), Hugging Face directory or dict of tensors, in any
    envelope and under any prefix; its names tell the format. What is new by design, a head above
    all, keeps its fresh weights and is listed; anything else that is missing or does not fit is a
    UserError, and then the model is as it was."""
    path, state, content = read_weights(source)
    form, prefix = recognise(model, state)
    outside = [n for n in state if not (n.startswith(prefix) or n.endswith(COUNTERS))]
    state = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    targets, found, misfits = model.state_dict(), {}, {}
    for key, names in form.names(model).items():
        if state.keys() >= set(names):
            # without axes of size 1: a Linear and a 1x1 convolution hold the same matrix
            shapes = [part.squeeze().shape for part in form.write(key, targets[key], len(names))]
            fits = shapes == [state[name].squeeze().shape for name in names]
            (found if fits else misfits)[key] = names
    needed = [key for key in targets if not key.endswith(COUNTERS)]
    fresh = new_by_design(model, form, state, needed, found, misfits)
    left = unused(state, found | misfits)
    wrong = [key for key in misfits if key not in fresh]
    missing = [key for key in needed if not (key in found or key in misfits or key in fresh)]
    foreign = [name for name in left if not HEADS.match(name)]
    if wrong or missing or foreign:
        remedy = "give the --model and the words that it was trained with"
        with contextlib.suppress(KeyError, TypeError, UserError):       # it may say that itself
            trained = make_spec(content["spec"]["name"], **content["spec"]["slots"])
            if trained != model.spec:
                words = [f"--model {trained.name}", *trained.spelt("--{} {}", ",")]
                remedy = f"it looks like {trained.name}: give {' '.join(words)}"
        raise UserError(f"{path}: does not fit {model.spec} ({form.name}; of another shape: "
                        f"{some(wrong, 1)}; missing: {some(missing, 1)}; unexpected: "
                        f"{some(foreign, 1)}); {remedy}")
    values = {key: form.read(key, [state[n] for n in names]) for key, names in found.items()}
    for key, value in values.items():
        check_numbers(f"{path}: {prefix}{' + '.join(found[key])}", value, targets[key])
    for key, value in values.items():
        targets[key].copy_(value.reshape(targets[key].shape))
    return Report(form.name, list(found), [], outside + left, fresh)


def new_by_design(model, form, state, needed, found, misfits):
    """-> our names that stay fresh: a classifier of another class count; or a head that the file
    lacks, or has of another kind, as a whole (both tables lose it, although single tensors may
    fit), and then the norms that the file had no use for."""
    head = [key for key in needed if key.startswith("head.")]
    fresh = [key for key in misfits if key.startswith(("head.classifier.", "head.fc."))]
    lacking = [key for key in head if not (key in found or key in fresh)]
    another = any(HEADS.match(name) for name in unused(state, found | misfits))
    if not lacking or not (another or lacking == head or misfits.keys() & lacking):
        return fresh
    for table in (found, misfits):
        for key in [key for key in table if key.startswith("head.")]:
            del table[key]
    _, tasks, in_trunk = SIZES[model.spec.size].stage_norm
    if model.task == tasks == "seg":
        last = 3 if form.keys and not in_trunk else 2       # Swin's is not its classifier's
        norms = re.compile(rf"encoder\.stages\.[0-{last}]\.norm\.")
        head += [key for key in needed if norms.match(key) and key not in found | misfits]
    return head


def read_weights(source):
    """Path or dict -> (name for messages, {name: tensor}, all that the file holds)."""
    path, content = "the given dict", source
    if not isinstance(source, dict):
        if not os.path.exists(source):
            raise UserError(f"{source}: no such file; nothing is downloaded here, fetch it first")
        read = read_folder if os.path.isdir(source) else read_checkpoint
        path, content = source, read(source)
    state = largest_table(content)
    if not state:
        raise UserError(f"{path}: holds no state dict (a table of named tensors)")
    for name in [name for name in state if name.endswith(("in_proj_weight", "in_proj_bias"))]:
        parts = torch.atleast_1d(state.pop(name)).chunk(3)      # mmsegmentation has them in one
        state |= {name.replace("in_proj_", f"in_{k}."): part for k, part in zip("qkv", parts)}
    return path, state, content


def read_folder(folder):
    """A hub's folder -> {name: tensor}; its weights may lie in several files."""
    folder, state = pathlib.Path(folder), {}
    files = sorted(folder.glob("model[.-]*safetensors"))
    files = files or sorted(folder.glob("pytorch_model[.-]*bin"))
    if not files:
        raise UserError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")
    for parts in re.findall(r"-of-(\d+)", files[0].name):
        if len(files) < int(parts):
            raise UserError(f"{folder}: holds {len(files)} of {parts} files of weights; fetch all")
    for file in files:      # model.safetensors is the last, behind its variants (model.fp16...)
        state |= largest_table(read_checkpoint(file))
    return state


def largest_table(content):
    """The largest table of named tensors in nested tables; of two, a moving average's."""
    ranked = [((0, False), {})]
    for name, table in walk(content):
        if isinstance(table, dict):
            tensors = {key: value for key, value in table.items()
                       if isinstance(key, str) and isinstance(value, torch.Tensor)}
            ranked.append(((len(tensors), bool(AVERAGED.search(str(name)))), tensors))
    return max(ranked, key=lambda entry: entry[0])[1]


def recognise(model, state):
    """-> (format, prefix) under which most names are this model's. A prefix (module., ...) is
    whatever stands before such a name; of two, a moving average's is taken."""
    ends = []
    for name in state:
        starts = [dot.end() for dot in re.finditer(r"^|\.", name)]
        ends += [(name[:start], name[start:]) for start in starts[:9]]
    ranked = []
    for form in FORMATS:
        names = set(itertools.chain(*form.names(model).values()))
        hits = Counter(prefix for prefix, end in ends if end in names)
        ranked += [((hit, bool(AVERAGED.search(prefix)), prefix == ""), form, prefix)
                   for prefix, hit in hits.items()]
    return max(ranked, key=lambda entry: entry[0], default=(0, FORMATS[0], ""))[1:]


def unused(state, used):
    """The file's names that mean anything and are not in {our name: their names}."""
    used = set(itertools.chain(*used.values()))
    return [name for name in state
            if not (name in used or DEAD.match(name) or name.endswith(COUNTERS))]


def export_pretrained(model, path):
    """Write a model's weights as load_pretrained reads them: a folder for Hugging Face, else a .pth
    file, in the first of the other FORMATS that name most of the tensors. Errors: UserError."""
    path = pathlib.Path(path)
    forms = FORMATS[2:] if path.suffix else FORMATS[1:2]
    names, form = max(((f.names(model), f) for f in forms), key=lambda pair: len(pair[0]))
    if nameless := [key for key in model.state_dict() if key not in names]:
        raise UserError(f"{form.name} has no name for tensors of {model.spec}: "
                        f"{some(nameless, 1)}; models.save_checkpoint keeps any model")
    state = {}
    for key, value in model.state_dict().items():
        state |= zip(names[key], form.write(key, value.cpu(), len(names[key])))
    if not path.suffix:
        write_hub_configs(path, model)
        path = path / "pytorch_model.bin"
    save_checkpoint(path, state)


def write_hub_configs(folder, model):
    """config.json and preprocessor_config.json of transformers, with what `know` gave the model."""
    if (folder / "model.safetensors").exists():
        raise UserError(f"{folder}: has other weights, in model.safetensors; give a new folder")
    if {*zip(*map(model.spec.words, ("embed", "attn", "ffn")))} != {("overlap", "sra", "mix")}:
        raise UserError(f"{folder}: transformers knows the names in {model.spec}, but not its "
                        "blocks; give a .pth file")
    size, for_seg = SIZES[model.spec.size], model.task == "seg"
    classes = getattr(model, "classes", [f"LABEL_{i}" for i in range(model.num_classes)])
    side = getattr(model, "size", None) or (512 if for_seg else 224)
    kind = "SemanticSegmentation" if for_seg else "ImageClassification"
    config = {      # the rest is as SegformerConfig has it
        "model_type": "segformer", "architectures": [f"SegformerFor{kind}"],
        "depths": size.depths, "hidden_sizes": size.dims, "decoder_hidden_size": size.width,
        "mlp_ratios": size.ratios, "drop_path_rate": size.drop_path[for_seg],
        "id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    processor = {"image_processor_type": "SegformerImageProcessor",
                 "size": {"height": side, "width": side},
                 "do_reduce_labels": getattr(model, "first_id", 0) == 1}
    for name, content in (("config", config), ("preprocessor_config", processor)):
        write_file(folder / f"{name}.json", [json.dumps(content, indent=2).encode()])


def export(model, target):
    """Write a model for other programs, read it again, compare -> {(height, width): the largest
    difference of the logits, relative to their root mean square}.
    target: a folder (Hugging Face), FILE.pth (its family's own names) or FILE.pt2 (torch.export of
    the fused model, for any batch, height and width). Errors: UserError."""
    suffix = pathlib.Path(target).suffix
    if suffix == ".pt2":
        model = fuse(model)
        free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
        program = torch.export.export(model, (torch.zeros(2, 3, 224, 288),), dynamic_shapes=(free,))
        save_checkpoint(target, program, torch.export.save)
        again = torch.export.load(target).module()
    elif suffix in ("", ".pth"):
        export_pretrained(model, target)
        again = build(model.spec.name, model.task, model.num_classes, **model.spec.overrides)
        load_pretrained(again.eval(), target)
    else:
        raise UserError(f"--export {target}: give a folder, FILE.pth or FILE.pt2; for ONNX give "
                        "the model of models.load to torch.onnx.export")
    differences = {}
    for size in ((224, 224), (97, 130)):
        images = torch.randn(1, 3, *size)
        try:
            with torch.inference_mode():
                ours, theirs = model(images), again(images)
        except AssertionError:      # a guard of torch.export
            raise UserError(f"{target}: its windows serve one image size alone; use models.load")
        differences[size] = ((theirs - ours).abs().max() / ours.square().mean().sqrt()).item()
    return differences


def main(argv=None):
    parser = Parser(description="Print every model and every word; or export a trained model.")
    parser.add_argument("--checkpoint", help="best.pt or last.pt of train_seg.py or train_cls.py")
    parser.add_argument("--export", metavar="TARGET", help="a folder: for Hugging Face; FILE.pth: "
                        "the family's own names; FILE.pt2: torch.export, for any size")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) != (args.export is None):
        raise UserError("--checkpoint and --export go together")
    if args.export is None:
        return print_catalogue()
    model = load(args.checkpoint, fused=False)
    for (height, width), difference in export(model, args.export).items():
        print(f"{args.export}: {model.spec}, read again, differs at {width} x {height} pixels by "
              f"{difference:.1e} of the logits' size")


if __name__ == "__main__":
    import data         # here alone: its run() prints a user's mistake as one line
    data.run(main)
