"""Train a segmentation model.

    torchrun train_seg.py                                   # embedded data: a few minutes on two CPU cores
    torchrun --nproc_per_node=8 train_seg.py --data-path ADEChallengeData2016 --batch-size 2 --pretrain FILE

`python train_seg.py` is the same as one process. The run's folder gets last.pt, best.pt, log.jsonl and samples.png; the
same command started again continues there, with the same bits as if the run had never stopped.
"""
import argparse
import contextlib
import fcntl
import json
import math
import resource
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import models
from data import UserError
from eval import evaluate_seg, predict
from layers import UpsampledCrossEntropy

RECIPE = dict(model="segformer_b2", crop=512, epochs=60, batch_size=16, lr=6e-5, weight_decay=0.01, workers=2)   # on --data-path
QUICK = dict(model="segformer_b0", crop=64, epochs=11, batch_size=8, lr=3e-3, weight_decay=0.01, drop_path=0.0,
             workers=0)

# The same run may go on with other values of these, as long as the effective batch stays.
MAY_CHANGE = {"output_dir", "resume", "device", "workers", "compile", "batch_size", "accum"}


def arguments(argv=None):
    default = lambda key: f"(default {RECIPE[key]} [{QUICK[key]}])"
    parser = argparse.ArgumentParser(description="Train a segmentation model.",
                                     epilog="Defaults in [ ] hold without --data-path.")
    add = parser.add_argument
    add("--data-path", help="a data set like ADE20K, see data.py (default: shapes drawn by data.py)")
    add("--zero-is-class", action="store_true", help="id 0 of the masks is a class; else it is ignored, and k is class k-1")
    models.add_model_arguments(parser)
    add("--drop-path", type=float, help="stochastic depth of the last block (default: the model's own [0])")
    add("--pretrain", help="weights to start from: train_cls.py's best.pt, a public file, a Hugging Face folder")
    add("--crop", type=int, help=f"side of the training crops in pixels {default('crop')}")
    add("--epochs", type=int, help=default("epochs"))
    add("--batch-size", type=int, help=f"images per process and pass {default('batch_size')}")
    add("--accum", type=int, default=1, help="passes per step: effective batch = batch size x processes x passes")
    add("--lr", type=float, help=f"of the encoder; the head's is 10 times as high {default('lr')}")
    add("--weight-decay", type=float, help=default("weight_decay"))
    add("--warmup", type=int, help="steps of linear warm-up (default 1500, at most 5 %% of all)")
    add("--clip", type=float, default=math.inf, help="largest norm of the gradient (default: no limit)")
    add("--ema", type=float, nargs="?", const=0.9998, default=0.0, metavar="DECAY",
        help="evaluate and keep a moving average of the weights (0.9998 unless given)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision (default off)")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (CUDA)")
    add("--compile", action="store_true", help="torch.compile the model for training")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (default 0)")
    add("--workers", type=int, help=f"loader processes per training process {default('workers')}")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--output-dir", help="default runs/seg-MODEL-DATA; a folder that holds a last.pt is continued")
    add("--resume", help="begin a new folder with the last.pt of this one")
    parser.set_defaults(model=None)
    args = parser.parse_args(argv)
    for key, value in (RECIPE if args.data_path else QUICK).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for keys, fits, words in (("crop epochs batch_size accum lr clip", lambda v: v > 0, "must be above 0"),
                              ("weight_decay warmup workers seed", lambda v: v >= 0, "must be at least 0"),
                              ("drop_path ema", lambda v: 0 <= v < 1, "must be at least 0 and below 1")):
        for key in keys.split():
            if (value := getattr(args, key)) is not None and not fits(value):
                raise UserError(f"--{key.replace('_', '-')} {value}: {words}")
    return args


def learning_rate(step, steps, warmup, base):
    """Linear from base to 0 over the run, times a linear warm-up from 1e-6 to 1 (as in SegFormer's code)."""
    ramp = 1e-6 + (1 - 1e-6) * step / warmup if step < warmup else 1.0
    return base * (1 - step / steps) * ramp


def load_datasets(args):
    if args.data_path is None:
        return data.Shapes("train", args.crop, args.seed), data.Shapes("val")
    train = data.FolderSegmentation(args.data_path, "train", args.crop, args.seed, args.zero_is_class)
    return train, data.FolderSegmentation(args.data_path, "val", zero_is_class=args.zero_is_class, classes=train.classes)


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder
# ---------------------------------------------------------------------------------------------------------------------

def open_log(output):
    """Open log.jsonl for appending, as the only run in this folder. The lock ends with the process, however that ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = open(output / "log.jsonl", "a+")
    except OSError as error:
        raise UserError(f"{output}: cannot write here ({error.strerror}); choose another --output-dir")
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{output}: another run is writing here; wait for it or choose another --output-dir")
    return log


def append(log, row):
    """Add an epoch's row, once: a run may have been killed after saving last.pt, which holds the row, and before this."""
    log.seek(0)
    if f'"epoch": {row["epoch"]},' not in log.read():
        with data.writing("--output-dir", log.name):
            log.write(json.dumps(row) + "\n")
            log.flush()


def find_state(output, resume, settings):
    """The state to go on from, or None; the folder's own last.pt goes before --resume. It must be of the same run."""
    path = output / "last.pt"
    if not path.exists():
        if (output / "log.jsonl").stat().st_size:
            raise UserError(f"{output}: log.jsonl has the epochs of a run whose last.pt is gone; move it away or choose another "
                            "--output-dir")
        if resume is None:
            return None
        path = Path(resume)
        path = path / "last.pt" if path.is_dir() else path
    state = models.read_checkpoint(path)
    if not isinstance(state, dict) or not {"optimizer", "args", "row"} <= state.keys():
        raise UserError(f"{path}: not the last.pt of a run, and only that can be continued; --pretrain takes weights")
    theirs = state["args"]
    different = [f"{key.replace('_', '-')} was {theirs.get(key)}, now {settings.get(key)}"
                 for key in settings | theirs if theirs.get(key) != settings.get(key)]
    if different:
        raise UserError(f"{path}: is of another run: {'; '.join(different)}. Choose another --output-dir for a new run, "
                        "or give the same flags to continue")
    if path.parent != output:           # --resume: the run goes on here, and this folder is complete before it has a last.pt
        for file in (path.with_name(name) for name in ("samples.png", "best.pt")):
            if file.exists():
                models.write_file(output / file.name, [file.read_bytes()])
        models.write_file(output / "last.pt", [path.read_bytes()])
    return state


def share_buffers(model):
    """Each process updated its BatchNorm statistics in its last pass: all take those of process 0, which saves its own."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def peak_memory(device):
    """GiB: held by tensors on the GPU, else resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2)


def save_samples(model, dataset, crop, device, path):
    """image | truth | prediction, for six images of the validation split."""
    rows = []
    for i in torch.linspace(0, len(dataset) - 1, min(6, len(dataset))).long().tolist():
        image, labels, _ = dataset[i]
        prediction = predict(model, image, labels.shape, device, short_side=crop)
        rows.append([image.permute(1, 2, 0).numpy(), *(data.colorize(x, dataset.colors) for x in (labels, prediction.cpu()))])
    data.contact_sheet(rows, path, data.legend(dataset.classes, dataset.colors))


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args = arguments(argv)
    processes = data.start(args.device)
    rank, world, device = processes.rank, processes.world, processes.device
    say = print if rank == 0 else lambda *_: None
    if args.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn: PyTorch has it for CUDA only; leave it out on the CPU")

    # data and model
    train_set, val_set = load_datasets(args)
    loader = data.train_loader(train_set, args.batch_size, processes, args.seed, args.workers)
    batch, steps_per_epoch = args.batch_size * world * args.accum, len(loader) // args.accum
    if steps_per_epoch == 0:
        raise UserError(f"--accum {args.accum}: {len(train_set)} images do not fill one effective batch of {batch}; use less")
    steps = args.epochs * steps_per_epoch
    warmup = min(1500, steps // 20) if args.warmup is None else args.warmup
    torch.manual_seed(args.seed)
    model = models.build(args.model, "seg", train_set.num_classes, args.drop_path, **models.slots_from(args))

    # the folder, and what it holds already: process 0 reads for all, which may be on machines that do not see the folder
    name = Path(args.data_path).resolve().name if args.data_path else "shapes"
    output = Path(args.output_dir or f"runs/seg-{model.spec}-{name}")
    settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE | models.SLOTS.keys()}
    settings |= dict(data_path=args.data_path and name, pretrain=args.pretrain and Path(args.pretrain).name,    # may have moved
                     model=str(model.spec), effective_batch=batch, warmup=warmup, images=len(train_set),
                     classes=train_set.num_classes)
    log = open_log(output) if rank == 0 else None
    found = [find_state(output, args.resume, settings) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    state = found[0]

    # training state
    if state is None and args.pretrain:
        say(models.load_pretrained(model, args.pretrain))
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
    optimizer = torch.optim.AdamW(models.parameter_groups(model, args.lr, args.weight_decay), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    first_epoch, best, seconds = 0, {"epoch": 0, "mIoU": -1.0}, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.module.load_state_dict(state["ema"])
            ema.n_averaged.fill_(state["step"])
        first_epoch, best, seconds = state["epoch"], state["best"], state["seconds"]
        if rank == 0:
            append(log, state["row"])
    net = torch.compile(model) if args.compile else model
    if world > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 kernels, where several strides say the same
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    criterion = UpsampledCrossEntropy(data.IGNORED)
    amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    say(f"{model.spec}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {train_set.num_classes} classes; "
        f"{len(train_set)} images to train on, {len(val_set)} to validate on; {device.type}\n"
        f"effective batch {batch} = {args.batch_size} images x {world} processes x {args.accum} passes; {args.epochs} epochs "
        f"of {steps_per_epoch} steps, {warmup} of warm-up; output: {output}")
    if 0 < first_epoch < args.epochs:
        say(f"continuing after epoch {first_epoch}; best mIoU so far {best['mIoU']:.2f} %")

    for epoch in range(first_epoch, args.epochs):
        # Dropout, drop-path etc. of an epoch depend on (seed, epoch, rank) alone: there is no random state to save.
        torch.manual_seed((args.seed * 10_000 + epoch) * 10_000 + rank)
        data.set_epoch(loader, epoch)
        model.train()
        start, losses, batches = time.time(), [], iter(loader)
        bar = tqdm(range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch), f"epoch {epoch + 1}/{args.epochs}",
                   disable=rank > 0, leave=False)
        for step in bar:
            lr = learning_rate(step, steps, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]

            # forward, backward: the loss is the mean over the labelled pixels of all passes of all processes
            passes = [next(batches) for _ in range(args.accum)]
            count = sum((labels != data.IGNORED).sum() for _, labels in passes).to(device)
            if world > 1:
                dist.all_reduce(count)
            loss = torch.zeros((), device=device)
            for i, (images, labels) in enumerate(passes):
                images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                last = world == 1 or i == args.accum - 1        # gradients are exchanged once a step
                with contextlib.nullcontext() if last else net.no_sync():
                    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                        logits = net(images)
                    part = criterion(logits, labels, count)
                    scaler.scale(part * world).backward()       # DDP divides by world
                loss += part.detach()
            if world > 1:
                dist.all_reduce(loss)

            # update, unless something is not finite: all processes see the same two numbers, so all of them stop
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            skip = scaler.is_enabled() and scaler.get_scale() > 1e-4    # fp16: the scaler skips a step, halves its scale
            if not (loss.isfinite() and (norm.isfinite() or skip)):
                raise UserError(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g} at lr {lr:.3g}; stopped before the "
                                f"update, {output} keeps epoch {epoch}. Try a lower --lr, --clip 1 or --amp bf16")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(model)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lr:.1e}")
        speed = len(losses) * batch / (time.time() - start)

        # validation, on all processes
        evaluated = (ema.module if ema else model).eval()
        share_buffers(model)
        share_buffers(evaluated)
        metrics = evaluate_seg(evaluated, val_set, processes, args.batch_size, args.workers, short_side=args.crop).summary()
        improved = metrics["mIoU"] > best["mIoU"]
        if improved:
            best = {"epoch": epoch + 1, "mIoU": metrics["mIoU"]}
        seconds += time.time() - start
        row = {"epoch": epoch + 1, "step": step + 1, "lr": lr, "loss": math.fsum(losses) / len(losses), **metrics,
               "seconds": time.time() - start, "images_per_second": speed, "peak_memory_gib": peak_memory(device)}
        say(f"epoch {epoch + 1}/{args.epochs}: loss {row['loss']:.4f}, mIoU {metrics['mIoU']:.2f} %{' (best)' * improved}, "
            f"{row['seconds']:.0f} s")

        # files: last.pt closes the epoch, so it comes after best.pt; an epoch cut short is run again, with the same bits
        if rank == 0:
            weights = {"spec": models.describe(model), "model": model.state_dict(), "ema": ema and ema.module.state_dict(),
                       "classes": list(val_set.classes), "colors": val_set.colors.tolist(), "args": settings,
                       "epoch": epoch + 1, "best": best}
            if improved:
                models.save_checkpoint(output / "best.pt", weights)
                with data.writing("--output-dir", output / "samples.png"):
                    save_samples(evaluated, val_set, args.crop, device, output / "samples.png")
            models.save_checkpoint(output / "last.pt", weights | {
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step + 1, "seconds": seconds,
                "row": row})
            append(log, row)

    done = "complete" if first_epoch < args.epochs else "complete already (a new run needs another --output-dir)"
    say(f"{done}: best mIoU {best['mIoU']:.2f} % after epoch {best['epoch']} of {args.epochs}, {seconds:.0f} s; "
        f"{output}: last.pt best.pt log.jsonl samples.png")


if __name__ == "__main__":
    data.run(main)
