"""Count multiply-adds exactly, and time models.

    python flops.py --model segformer_b2 --head light_ham         # table by part
    python flops.py --all --baseline segformer_b2                 # every row beside a baseline
    python flops.py --rows segformer_b2 lite_final --latency --threads 1
    python flops.py --model lite_final --sizes 256 512 1024 2048 --latency

1 MAC = one multiply-add of a convolution, a linear layer or a matrix product, attention included;
FLOPs = 2 MACs. Taps on zero padding count; biases, norms, activations, soft-max and resizing do not
(under 0.5 % of the FLOPs of SegFormer-B2).
"""
import copy
import fnmatch
import math
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import layers
import models
from layers import UserError


# ---- The cost model: outputs x length of each dot product ---------------------------------------

# A row of the weight, (outputs, inputs / groups, ...), is what an output is a dot product with.
MACS = dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d),
                     lambda m, inputs, out: out.numel() * m.weight[0].numel())
MACS[layers.MatMul] = lambda m, inputs, out: out.numel() * inputs[0].shape[-1]
# q kᵀ, then · v
MACS[layers.Attend] = lambda m, qkv, out: (qkv[0].numel() + out.numel()) * qkv[1].shape[-2]
FREE = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.GELU, nn.ReLU, nn.Identity,
        nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, layers.DropPath)

# The table's part, by the word that follows stage and block in a module's name: a skip's norm goes
# with its attention or FFN.
PARTS = {"embed": "patch embed", "attn": "attention", "ffn": "FFN", "norm": "stage norms",
         "head": "decoder",     # and inside Next-ViT's blocks:
         "patch_embed": "patch embed", "mhca": "attention", "norm1": "attention",
         "projection": "attention", "mlp": "FFN", "mlp_norm": "FFN", "norm2": "FFN"}


@dataclass
class Count:
    """macs, params: exact totals. rows: one dict per module that multiplies or holds parameters of
    its own: name, part, stage (1..4, None for the head), macs, params, calls: 0 where another one
    multiplies with its weights and has the MACs (UpsampledSum does), or nothing uses it."""
    macs: int
    params: int
    rows: list


def count(model, size=(512, 512)):
    """Multiply-adds of one image of size (H, W) in evaluation mode, and the parameters -> Count.
    Runs a copy on the meta device: nothing is computed, and the model stays as it is. A leaf module
    of a class without a formula is a UserError, never a silent zero. A module that is used twice,
    or under two names, counts its parameters once and the multiply-adds of every call."""
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    rows = {}
    for name, module in model.named_modules():
        formula = next((MACS[c] for c in type(module).__mro__ if c in MACS), None)
        if not (formula or list(module.children()) or isinstance(module, FREE)):
            raise UserError(f"{name} ({type(module).__name__}): flops.py has no formula for this "
                            "layer; add it to MACS or FREE")
        place = re.match(r"(?:encoder\.stages\.(\d)\.(?:blocks\.\d+\.)?)?(\w*)", name)
        rows[name] = {"name": name, "part": PARTS.get(place[2], place[2]),
                      "stage": int(place[1]) + 1 if place[1] else None, "macs": 0, "calls": 0,
                      "params": sum(p.numel() for p in module.parameters(recurse=False))}

        def record(module, inputs, out, row=rows[name], formula=formula):
            row["calls"] += 1
            row["macs"] += formula(module, inputs, out) if formula else 0
        module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(1, 3, *size, device="meta"))
    return Count(sum(row["macs"] for row in rows.values()),
                 sum(p.numel() for p in model.parameters()),
                 [row for row in rows.values() if row["macs"] or row["params"]])


# ---- Time and memory -----------------------------------------------------------------------------

@torch.inference_mode()
def run(model, images, amp):
    """Once, and wait for the device."""
    with torch.autocast(images.device.type, models.AMP[amp], enabled=amp != "off"):
        model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def latency(cases, args, device):
    """Of the inference forms, {name: (spec, size)} -> {name: median and quartiles in ms, images/s}.
    The cases take turns, so that a machine that slows down for a while slows down all of them. With
    one model, whose sizes rise, also the peak memory in GiB up to each: of tensors on a GPU, on
    the CPU all that the process held."""
    runs, table, seconds = {}, {}, {name: [] for name in cases}
    for name, (spec, size) in cases.items():
        model = models.build(spec.name, args.task, args.num_classes, **spec.overrides)
        model = models.fuse(model).to(device, memory_format=torch.channels_last)
        images = torch.randn(args.batch_size, *size, 3, device=device).permute(0, 3, 1, 2)
        runs[name] = partial(run, torch.compile(model) if args.compile else model, images, args.amp)
        runs[name]()                # a warm-up
        table[name] = {"peak_gib": None if args.rows else data.peak_memory(device)}
    for _ in data.progress(range(args.latency + max(2, args.latency // 5)), "timing"):
        for name in cases:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(1000 * (time.perf_counter() - start))
    for name, values in seconds.items():
        low, median, high = np.percentile(values[-args.latency:], (25, 50, 75)).tolist()
        table[name] |= {"median_ms": median, "quartiles_ms": [low, high],
                        "images_per_second": 1000 * args.batch_size / median}
    return table


def conditions(args, device):
    """What the times are of."""
    name, dtype = str(device), str(models.AMP[args.amp] or torch.float32).removeprefix("torch.")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        dtype = dtype.replace("float32", "TF32")            # data.start asks for it
    return {"form": "fused, channels_last", "compiled": args.compile, "batch": args.batch_size,
            "dtype": dtype, "device": name, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "median of runs": args.latency}


# ---- Tables --------------------------------------------------------------------------------------

def figures(spec, size, args):
    """What --json writes for one model: exact integers."""
    with torch.device("meta"):
        model = models.build(spec.name, args.task, args.num_classes, **spec.overrides)
    counted, parts = count(models.fuse(model) if args.fused else model, size), {}
    for row in counted.rows:
        part = parts.setdefault(row["part"], {"params": 0, "macs": 0})
        for key in part:
            part[key] += row[key]
    result = {"model": str(spec), "task": args.task, "num_classes": args.num_classes,
              "size": list(size), "fused": args.fused, "params": counted.params,
              "macs": counted.macs, "flops": 2 * counted.macs, "parts": parts}
    return result if args.rows or args.sizes else result | {"rows": counted.rows}


def print_parts(result):
    name = result["model"]
    width = max(14, len(name) + 2)
    print(f"{'part':<{width}}{'params':>14}{'MACs':>20}{'FLOPs':>20}{'% of MACs':>11}")
    for part, line in (result["parts"] | {name: result}).items():
        macs, share = line["macs"], 100 * line["macs"] / result["macs"]
        print(f"{part:<{width}}{line['params']:>14,}{macs:>20,}{2 * macs:>20,}{share:>11.2f}")


TIMES = {"ms": "median_ms", "images/s": "images_per_second", "peak GiB": "peak_gib"}


def print_comparison(results, base):
    """Parameters and MACs, with their change from the baseline; times, if any; GMAC by part."""
    parts = [part for part, line in base["parts"].items() if line["macs"]]
    times = next(iter(results.values())).get("latency", {})
    times = {title: key for title, key in TIMES.items() if times.get(key)}
    titles = ["params M", "change %", "GMAC", "change %", "GFLOP", *times, *parts]
    width = max(map(len, results)) + 2
    print(f"{'model':<{width}}" + "".join(f"{title:>13}" for title in titles))
    for name, result in results.items():
        params, macs = (100 * (result[key] / base[key] - 1) for key in ("params", "macs"))
        cells = [result["params"] / 1e6, params, result["macs"] / 1e9, macs, result["flops"] / 1e9]
        cells += [result["latency"][key] for key in times.values()]
        cells += [result["parts"].get(part, {"macs": 0})["macs"] / 1e9 for part in parts]
        print(f"{name:<{width}}" + "".join(f"{cell:13.3f}" for cell in cells))


def draw(args, results):
    """--plot: GMAC against mIoU, the mean and standard deviation of its seeds, or else against
    parameters. A change of the baseline is labelled with its words alone."""
    series = {}
    for name, result in results.items():
        points = series.setdefault(name.split("_")[0], [])          # a colour for each family
        values = args.accuracy[name] if args.accuracy else [result["params"] / 1e6]
        points.append((result["macs"] / 1e9, np.mean(values),
                       name.removeprefix(f"{args.baseline}-"), np.std(values)))
    with data.naming(f"--plot {args.plot}"):
        data.plot(args.plot, series, "GMAC at {} x {}".format(*args.size),
                  "mIoU (%)" if args.accuracy else "parameters (M)", lines=False)


# ---- python flops.py -----------------------------------------------------------------------------

def height_width(text):
    """"512" or "512x1024" -> (height, width)."""
    height, _, width = text.partition("x")
    return models.positive_int(height), models.positive_int(width or height)


def specs(text):
    """NAME, a shell's pattern of names, or NAME-SLOT=WORD-... as runs are called -> [Spec]."""
    pattern, *words = text.split("-")
    slots = dict(word.replace("+", ",").partition("=")[::2] for word in words)
    names = fnmatch.filter(models.MODELS, pattern) or [pattern]
    return [models.make_spec(name, **slots) for name in names]


def read_accuracy(path):
    """A JSON file {row: mIoU, or a list of them} -> {the row's name in the tables: list}."""
    table, rows = data.read_json(Path(path)), {}
    try:
        for name, figures in table.items():
            [spec] = specs(name)        # one: a pattern is no row
            rows[str(spec)] = [float(value) for value in np.atleast_1d(figures)]
        if not rows or not all(rows.values()):
            raise ValueError("a figure is missing")
    except (ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"--accuracy {path}: must be {{row: mIoU, or a list}} ({error})") from None
    return rows


def arguments(argv=None):
    parser = models.Parser(description="Count multiply-adds and parameters; time models.")
    add, whole = parser.add_argument, models.positive_int
    models.add_model_arguments(parser)
    compare = parser.add_mutually_exclusive_group().add_argument
    compare("--all", dest="rows", action="store_const", const=[[*models.MODELS.values()]],
            help="every row of `python models.py`, beside --baseline")
    compare("--rows", type=specs, nargs="+", metavar="NAME",
            help="these rows, beside --baseline: names, 'lite_*', segformer_b0-attn=lsra-head=fpn")
    compare("--accuracy", type=read_accuracy, metavar="FILE",
            help="the rows of a JSON {row: mIoU, or a list with one for each seed}, for --plot")
    add("--baseline", type=models.make_spec, default="segformer_b2", help="default segformer_b2")
    add("--task", choices=models.CLASSES, default="seg", help="default seg")
    add("--num-classes", type=whole, help="default 150 for seg, 1000 for cls")
    add("--size", type=height_width, default=(512, 512), help="512, or HEIGHTxWIDTH (default 512)")
    add("--sizes", type=height_width, nargs="+", metavar="SIZE", help="several, of one model")
    add("--fused", action="store_true", help="count with BatchNorm folded and decoder merged")
    add("--latency", type=whole, nargs="?", const=30, metavar="RUNS", help="time, 30 runs")
    add("--batch-size", type=whole, default=1, help="of --latency (default 1)")
    add("--amp", choices=models.AMP, default="off", help="of --latency (default off)")
    add("--compile", action="store_true", help="of --latency: torch.compile the models")
    add("--threads", type=whole, help="of --latency, on the CPU (default: PyTorch's choice)")
    add("--device", help="of --latency: cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--plot", metavar="FILE", help="draw parameters, or mIoU, against GMAC, a point a row")
    add("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE too, or instead of text")
    args = parser.parse_args(argv)
    args.defaults = vars(parser.parse_args([]))
    if args.accuracy:
        args.rows = [specs(name) for name in args.accuracy]
    models.no_effect(args, args.rows, "on a comparison", f"sizes model {' '.join(models.SLOTS)}")
    models.no_effect(args, not args.rows, "without --all or --rows", "baseline plot")
    models.no_effect(args, args.sizes, "with --sizes", "size")
    models.no_effect(args, not args.latency, "without --latency",
                     "batch_size amp compile threads device")
    models.no_effect(args, not args.plot, "without --plot", "accuracy")
    args.num_classes = args.num_classes or models.CLASSES[args.task]
    return args


def main(argv=None):
    args = arguments(argv)
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path not in (None, "-"):
            with data.naming(f"{flag} {path}"):     # found out before the work
                open(path, "a").close()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, several = args.rows, args.rows or args.sizes
    rows = rows or [[models.make_spec(args.model, **models.slots_from(args))]]
    cases = {str(spec): (spec, args.size) for spec in sum(rows, [])}    # by name in the tables
    if args.sizes:
        sizes = sorted(args.sizes, key=math.prod)
        cases = {f"{size[0]}x{size[1]}": (rows[0][0], size) for size in sizes}
    results = {name: figures(*case, args)
               for name, case in data.progress(cases.items(), "counting")}
    base = first = next(iter(results.values()))
    if args.latency:
        device = data.start(args.device).device
        ran = conditions(args, device)
        for name, times in latency(cases, args, device).items():
            results[name]["latency"] = times | ran
    if args.json != "-":
        size = "each size" if args.sizes else "{} x {} (H x W)".format(*args.size)
        print(f"one image of {size}, task {args.task}, {args.num_classes} classes; 1 MAC = a "
              "multiply-add of conv, linear or matmul; FLOPs = 2 MACs; columns of parts are GMAC")
        if args.latency:
            print("times:", ", ".join(f"{key} {value}" for key, value in ran.items()))
        if args.rows:
            base = figures(args.baseline, args.size, args)
        if not several:
            print_parts(first)
        if several or args.latency:
            print_comparison(results, base)
    if args.plot:
        draw(args, results)
    if args.json:
        data.write_json(args.json, list(results.values()) if several else first)


if __name__ == "__main__":
    data.run(main)
