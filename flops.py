"""Count multiply-adds exactly, and time a model.

    python flops.py --model segformer_b2 --head light_ham         # table by part
    python flops.py --all --baseline segformer_b2                 # every row of MODELS beside a baseline
    python flops.py --model segformer_b2 --latency

1 MAC = one multiply-add of a convolution, a linear layer or a matrix product, attention included; FLOPs = 2 MACs. Taps on
zero padding count; biases, norms, activations, soft-max and resizing do not (under 0.5 % of the FLOPs of SegFormer-B2).
"""
import argparse
import copy
import inspect
import json
import math
import re
import resource
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

import data
import layers
import models
from data import UserError


# ---------------------------------------------------------------------------------------------------------------------
# The cost model: outputs x length of each dot product
# ---------------------------------------------------------------------------------------------------------------------

def conv(m, inputs, out):
    return out.numel() * (m.in_channels // m.groups) * math.prod(m.kernel_size)


MACS = {
    nn.Linear: lambda m, inputs, out: out.numel() * m.in_features,
    nn.Conv1d: conv,
    nn.Conv2d: conv,
    layers.MatMul: lambda m, inputs, out: out.numel() * inputs[0].shape[-1],
    layers.Attend: lambda m, inputs, out: (inputs[0].numel() + out.numel()) * inputs[1].shape[-2],      # q kᵀ, then · v
}
FREE = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.GELU, nn.ReLU, nn.Identity, layers.DropPath,
        nn.modules.dropout._DropoutNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)

PARTS = {"embed": "patch embed", "attn": "attention", "ffn": "FFN", "norm": "stage norms", "head": "decoder",
         # inside Next-ViT's blocks
         "patch_embed": "patch embed", "mhca": "attention", "norm1": "attention", "projection": "attention", "mlp": "FFN",
         "mlp_norm": "FFN", "norm2": "FFN"}


def part_of(name):
    """The part of the table that a module belongs to, from its dotted name; a skip's norm goes with its attention or FFN."""
    word = re.sub(r"^encoder\.stages\.\d+\.(blocks\.\d+\.)?", "", name).split(".")[0]
    return PARTS.get(word, word)


@dataclass
class Count:
    """macs, params: exact totals. rows: one dict per module that multiplies or holds parameters of its own: name, part,
    stage (1..4, None for the head), macs, params, calls."""
    macs: int
    params: int
    rows: list

    @property
    def uncalled(self):
        """Names of the modules whose forward never ran: another one multiplied with their parameters and has the MACs
        (UpsampledSum does), or nothing uses them."""
        return [row["name"] for row in self.rows if row["calls"] == 0]

    def by_part(self):
        """{part: (params, macs)}"""
        table = {}
        for row in self.rows:
            params, macs = table.get(row["part"], (0, 0))
            table[row["part"]] = params + row["params"], macs + row["macs"]
        return table


def count(model, size=(512, 512)):
    """Multiply-adds of one image of size (H, W) in evaluation mode, and the parameters -> Count.

    Runs a copy on the meta device: nothing is computed, and the model keeps its state, modes and hooks, come what may. A
    leaf module of a class without a formula is a UserError, never a silent zero. A module that is used twice, or under
    two names, counts its parameters once and the multiply-adds of every call.
    """
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    rows = {}
    for name, module in model.named_modules():
        formula = next((MACS[c] for c in type(module).__mro__ if c in MACS), None)
        if formula is None and next(module.children(), None) is None and not isinstance(module, FREE):
            raise UserError(f"{name} ({type(module).__name__}): flops.py has no formula for this layer; add it to MACS or FREE")
        stage = re.match(r"encoder\.stages\.(\d)", name)
        rows[name] = {"name": name, "part": part_of(name), "stage": int(stage[1]) + 1 if stage else None, "macs": 0,
                      "params": sum(p.numel() for p in module.parameters(recurse=False)), "calls": 0}
        module.register_forward_hook(partial(record, rows[name], formula), with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 3, *size, device="meta"))
    return Count(sum(row["macs"] for row in rows.values()), sum(p.numel() for p in model.parameters()),
                 [row for row in rows.values() if row["macs"] or row["params"]])


def record(row, formula, module, args, kwargs, out):
    """The hook: add a call, and its multiply-adds, to the module's row."""
    row["calls"] += 1
    if formula:
        inputs = inspect.signature(module.forward).bind(*args, **kwargs).args       # keywords, in the order of forward
        row["macs"] += formula(module, inputs, out)


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory
# ---------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def latency(model, size, device, runs):
    """Time of a forward pass of one image after a warm-up: median and quartiles in milliseconds; peak memory in GiB (on a GPU
    that of tensors, on the CPU what the whole process, torch's code included, held in memory)."""
    model = models.fuse(model).to(device, memory_format=torch.channels_last)
    images = torch.randn(1, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    cuda, seconds = device.type == "cuda", []
    for _ in tqdm(range(runs + max(2, runs // 5)), "timing", leave=False):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(images)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles([1000 * s for s in seconds[-runs:]], n=4)
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return {"median_ms": median, "quartiles_ms": [low, high], "runs": runs, "peak_memory_gib": peak, "device": str(device),
            "memory": "of tensors" if cuda else "resident in the process", "threads": torch.get_num_threads(),
            "dtype": "float32", "form": "fused, channels_last"}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

def figures(spec, args, counted):
    """What --json writes for one model: exact integers."""
    return {"model": str(spec), "task": args.task, "num_classes": args.num_classes, "size": list(args.size),
            "fused": args.fused, "params": counted.params, "macs": counted.macs, "flops": 2 * counted.macs,
            "parts": {part: {"params": p, "macs": m} for part, (p, m) in counted.by_part().items()}}


def print_parts(spec, counted):
    width = max(14, len(str(spec)) + 2)
    print(f"{'part':<{width}}{'params':>14}{'MACs':>20}{'FLOPs':>20}{'% of MACs':>11}")
    for part, (params, macs) in [*counted.by_part().items(), (str(spec), (counted.params, counted.macs))]:
        print(f"{part:<{width}}{params:>14,}{macs:>20,}{2 * macs:>20,}{100 * macs / counted.macs:>11.2f}")
    if counted.uncalled:
        print("not called themselves, as another layer multiplies with their weights (counted there) or none does: "
              + ", ".join(counted.uncalled))


def print_comparison(table, base):
    """One line a model: parameters and MACs, both with their change from the baseline, and the MACs of each part."""
    change = lambda value, reference: f"{100 * (value / reference - 1):+8.1f}%"
    parts = list(dict.fromkeys(part for counted in table.values() for part, (_, macs) in counted.by_part().items() if macs))
    width = max(map(len, table)) + 2
    print(f"{'model':<{width}}{'params M':>10}{'change':>9}{'GMAC':>10}{'change':>9}{'GFLOP':>10}   GMAC by part:"
          + "".join(f"{part:>12}" for part in parts))
    for name, counted in table.items():
        macs = {part: m for part, (_, m) in counted.by_part().items()}
        print(f"{name:<{width}}{counted.params / 1e6:>10.3f}{change(counted.params, base.params)}{counted.macs / 1e9:>10.3f}"
              f"{change(counted.macs, base.macs)}{counted.macs / 5e8:>10.3f}" + " " * 16
              + "".join(f"{macs.get(part, 0) / 1e9:>12.3f}" for part in parts))


# ---------------------------------------------------------------------------------------------------------------------
# python flops.py
# ---------------------------------------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Count multiply-adds and parameters; time a model.")
    models.add_model_arguments(parser)
    parser.add_argument("--task", choices=list(models.CLASSES), default="seg", help="default seg")
    parser.add_argument("--num-classes", type=int, help="default 150 for seg, 1000 for cls")
    parser.add_argument("--size", nargs="+", default=["512"], metavar="SIDE", help="512, 512x1024 or 512 1024: height, width")
    parser.add_argument("--fused", action="store_true", help="count the inference form: BatchNorm folded, decoder merged")
    parser.add_argument("--all", action="store_true", help="every row of `python models.py`, beside --baseline")
    parser.add_argument("--baseline", default="segformer_b2", help="default segformer_b2")
    parser.add_argument("--latency", type=int, nargs="?", const=30, metavar="RUNS", help="time the inference form (default 30 runs)")
    parser.add_argument("--device", help="of --latency: cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write exact integers to FILE, or instead of the table")
    parser.set_defaults(model=None)
    args = parser.parse_args(argv)
    sides = "x".join(args.size).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--size {' '.join(args.size)}: give one side, or height and width, e.g. 512 or 512x1024")
    args.size = int(sides[0]), int(sides[-1])
    if args.all and (args.model or args.latency is not None or models.slots_from(args)):
        raise UserError("--all: counts the rows of MODELS as they are; leave out --model, --latency and the words of slots")
    if args.latency is not None and args.latency < 2:
        raise UserError(f"--latency {args.latency}: a median needs at least 2 runs")
    if args.num_classes is None:
        args.num_classes = models.CLASSES[args.task]
    elif args.num_classes < 1:
        raise UserError(f"--num-classes {args.num_classes}: must be at least 1")
    args.model = args.model or "segformer_b2"
    return args


def main(argv=None):
    args = arguments(argv)
    say = print if args.json != "-" else lambda *_: None

    def counted(name, **slots):
        with torch.device("meta"):
            model = models.build(name, args.task, args.num_classes, **slots)
        return model.spec, count(models.fuse(model) if args.fused else model, args.size)

    say(f"one image of {args.size[0]} x {args.size[1]} (H x W), task {args.task}, {args.num_classes} classes"
        + ", fused for inference" * args.fused + "; 1 MAC = a multiply-add of conv, linear or matmul; FLOPs = 2 MACs")
    if args.all:
        _, base = counted(args.baseline)
        table = dict(counted(name) for name in tqdm(models.MODELS, "counting", leave=False))
        result = [figures(spec, args, c) for spec, c in table.items()]
        if args.json != "-":
            print_comparison({str(spec): c for spec, c in table.items()}, base)
    else:
        slots = models.slots_from(args)
        spec, c = counted(args.model, **slots)
        result = figures(spec, args, c) | {"rows": c.rows}
        if args.json != "-":
            print_parts(spec, c)
        if args.latency:
            model = models.build(args.model, args.task, args.num_classes, **slots)
            result["latency"] = timed = latency(model, args.size, data.start(args.device).device, args.latency)
            say("latency {median_ms:.1f} ms (quartiles {quartiles_ms[0]:.1f}, {quartiles_ms[1]:.1f}) of {runs} runs, batch 1, {form}, "
                "{dtype}, {device}, {threads} threads; peak {memory} {peak_memory_gib:.2f} GiB".format(**timed))
    if args.json == "-":
        print(json.dumps(result, indent=1))
    elif args.json:
        try:
            with open(args.json, "w") as file:
                json.dump(result, file, indent=1)
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written ({error.strerror})")


if __name__ == "__main__":
    data.run(main)
