"""Train a segmentation model.

    torchrun train_seg.py                  # embedded data: a few minutes on two CPU cores
    torchrun --nproc_per_node=8 train_seg.py --data-path ADEChallengeData2016 --pretrain FILE

`python train_seg.py` is the same as one process. The run's folder gets last.pt, best.pt, log.jsonl
and samples.png; the same command started again continues there, on a CPU with the same bits as
if the run had never stopped.
"""
import argparse
import contextlib
import copy
import math
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import data
import models
from eval import evaluate_seg, save_samples
from layers import UpsampledCrossEntropy, UserError

# With --data-path: the original project's recipe. Without: one for the embedded data.
RECIPE = dict(model="segformer_b2", crop=512, epochs=60, batch_size=16, lr=6e-5, workers=2)
QUICK = dict(model="segformer_b0", crop=64, epochs=11, batch_size=8, lr=3e-3, workers=0,
             drop_path=0.0)

# The same run may go on with other values of these, as long as the effective batch stays.
MAY_CHANGE = {"output_dir", "resume", "device", "workers", "compile", "batch_size", "accum"}


def arguments(argv=None):
    def default(key):
        return f"(default {RECIPE[key]} [{QUICK[key]}])"

    parser = argparse.ArgumentParser(description="Train a segmentation model.",
                                     epilog="Defaults in [ ] hold without --data-path.")
    add = parser.add_argument
    add("--data-path",
        help="a data set like ADE20K, see data.py (default: shapes drawn by data.py)")
    add("--zero-is-class", action="store_true",
        help="id 0 of the masks is a class; else it is ignored, and k is class k-1")
    models.add_model_arguments(parser)
    add("--drop-path", type=models.share,
        help="stochastic depth of the last block (default: the model's own [0])")
    add("--pretrain", help="weights to start from: train_cls.py's best.pt, a public file, "
        "a Hugging Face folder")
    add("--crop", type=models.positive_int,
        help=f"side of the training crops in pixels {default('crop')}")
    add("--epochs", type=models.positive_int, help=default("epochs"))
    add("--batch-size", type=models.positive_int,
        help=f"images per process and pass {default('batch_size')}")
    add("--accum", type=models.positive_int, default=1,
        help="passes per step: effective batch = batch size x processes x passes")
    add("--lr", type=models.positive,
        help=f"of the encoder; the head's is 10 times as high {default('lr')}")
    add("--weight-decay", type=models.non_negative, default=0.01, help="(default 0.01)")
    add("--warmup", type=models.count,
        help="steps of linear warm-up (default 1500, at most 5 %% of all)")
    add("--clip", type=models.positive, default=math.inf,
        help="largest norm of the gradient (default: no limit)")
    add("--ema", type=models.share, nargs="?", const=0.9998, default=0.0, metavar="DECAY",
        help="evaluate and keep a moving average of the weights (0.9998 unless given)")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes (CUDA)")
    add("--compile", action="store_true", help="torch.compile the model for training")
    add("--seed", type=models.count, default=0,
        help="of weights, order, augmentation and dropout (default 0)")
    add("--workers", type=models.count,
        help=f"loader processes per training process {default('workers')}")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--output-dir", help="default runs/seg-MODEL-DATA; a folder with a last.pt is continued")
    add("--resume", help="begin a new folder with the last.pt of this one")
    parser.set_defaults(model=None)
    args = parser.parse_args(argv)
    for key, value in (RECIPE if args.data_path else QUICK).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def learning_rate(step, steps, warmup, base):
    """Linear from base to 0 over the run, times a linear warm-up from 1e-6 to 1, as SegFormer's."""
    ramp = 1e-6 + (1 - 1e-6) * step / warmup if step < warmup else 1.0
    return base * (1 - step / steps) * ramp


def load_datasets(args):
    if args.data_path is None:
        return data.Shapes("train", args.crop, args.seed), data.Shapes("val")
    train = data.FolderSegmentation(args.data_path, "train", args.crop, args.seed,
                                    args.zero_is_class)
    val = data.FolderSegmentation(args.data_path, "val", zero_is_class=args.zero_is_class,
                                  classes=train.classes)
    return train, val


def main(argv=None):
    args = arguments(argv)
    processes = data.start(args.device)
    rank, world, device = processes.rank, processes.world, processes.device
    report = print if rank == 0 else lambda *_: None
    if args.sync_bn and device.type != "cuda":
        raise UserError("--sync-bn: PyTorch has it for CUDA only; leave it out on the CPU")

    # The data, and from its size the length of the run.
    train_set, val_set = load_datasets(args)
    loader = data.train_loader(train_set, args.batch_size, processes, args.seed, args.workers)
    batch = args.batch_size * world * args.accum
    steps_per_epoch = len(loader) // args.accum
    if steps_per_epoch == 0:
        raise UserError(f"--accum {args.accum}: {len(train_set)} images do not fill one effective "
                        f"batch of {batch}; use less")
    steps = args.epochs * steps_per_epoch
    warmup = min(1500, steps // 20) if args.warmup is None else args.warmup

    # The model starts from the same weights in every process.
    torch.manual_seed(args.seed)
    model = models.build(args.model, "seg", train_set.num_classes, args.drop_path,
                         **models.slots_from(args))

    # The run's folder, and the state in it to go on from. Process 0 reads for all:
    # the others may be on machines that do not see the folder.
    name = Path(args.data_path).resolve().name if args.data_path else "shapes"
    output = Path(args.output_dir or f"runs/seg-{model.spec}-{name}")
    settings = {key: value for key, value in vars(args).items()
                if key not in MAY_CHANGE | models.SLOTS.keys()}
    settings |= dict(data_path=args.data_path and name,
                     pretrain=args.pretrain and Path(args.pretrain).name,
                     model=str(model.spec), effective_batch=batch, warmup=warmup,
                     images=len(train_set), classes=train_set.num_classes)
    state = None
    if rank == 0:
        lock = models.lock_folder(output)       # held for as long as this variable lives
        state = models.find_state(output, args.resume, settings)
    state = data.broadcast(state)

    # Weights, optimizer, scaler and moving average: fresh, or as the state has them.
    if state is None and args.pretrain:
        report(models.load_pretrained(model, args.pretrain))
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model) if args.ema else None
    optimizer = torch.optim.AdamW(models.parameter_groups(model, args.lr, args.weight_decay),
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    rows, best, seconds = [], {"epoch": 0, "mIoU": -1.0}, 0.0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if average:
            average.load_state_dict(state["ema"])
        rows, best, seconds = state["rows"], state["best"], state["seconds"]
    del state
    net = torch.compile(model) if args.compile else model
    if world > 1:
        # A 1x1 kernel can be described by several strides, which DDP warns of for no reason.
        warnings.filterwarnings("ignore", "Grad strides do not match")
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    criterion = UpsampledCrossEntropy(data.IGNORED)
    amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    report(f"{model.spec}, {parameters:.2f} M parameters, {train_set.num_classes} classes; "
           f"{len(train_set)} images to train on, {len(val_set)} to validate on; {device.type}\n"
           f"effective batch {batch} = {args.batch_size} images x {world} processes x "
           f"{args.accum} passes; {args.epochs} epochs of {steps_per_epoch} steps, "
           f"{warmup} of warm-up; output: {output}")
    first_epoch = len(rows)
    if 0 < first_epoch < args.epochs:
        report(f"continuing after epoch {first_epoch}; best mIoU so far {best['mIoU']:.2f} %")

    for epoch in range(first_epoch, args.epochs):
        # Order and augmentation depend on (seed, epoch) alone, dropout, drop-path and the NMF's
        # bases on (seed, epoch, rank): there is no random state to save.
        torch.manual_seed((args.seed * 10_000 + epoch) * 10_000 + rank)
        data.set_epoch(loader, epoch)
        batches = iter(loader)
        model.train()
        start, losses = time.time(), []
        bar = data.progress(range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch),
                            f"epoch {epoch + 1}/{args.epochs}", rank)
        for step in bar:
            # Set the learning rate of this step; the head's is a multiple of the encoder's.
            lr = learning_rate(step, steps, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]

            # Take the batches of all passes and count their labelled pixels over all processes:
            # the loss is the mean over all of them, however they are spread.
            passes = [next(batches) for _ in range(args.accum)]
            labelled = sum((labels != data.IGNORED).sum() for _, labels in passes).to(device)
            if world > 1:
                dist.all_reduce(labelled)

            # Forward and backward, pass by pass; the gradients add up in the parameters.
            loss = torch.zeros((), device=device)
            for i, (images, labels) in enumerate(passes):
                images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                # The processes exchange gradients once a step, in the last pass.
                waits = world > 1 and i < args.accum - 1
                with net.no_sync() if waits else contextlib.nullcontext():
                    with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                        logits = net(images)
                    pass_loss = criterion(logits, labels, labelled)
                    # DDP averages the gradients over the processes; ours are a sum.
                    scaler.scale(pass_loss * world).backward()
                loss += pass_loss.detach()
            if world > 1:
                dist.all_reduce(loss)

            # Undo the scaler's factor and limit the norm of the whole gradient.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)

            # Stop before the update if something is not finite. All processes see the same two
            # numbers, so all of them stop. In fp16 an infinite gradient is no error at first:
            # the scaler skips the update and halves its factor.
            scaler_skips = scaler.is_enabled() and scaler.get_scale() > 1e-4
            if not (loss.isfinite() and (norm.isfinite() or scaler_skips)):
                raise UserError(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g} at lr "
                                f"{lr:.3g}; stopped before the update, {output} keeps epoch "
                                f"{epoch}. Try a lower --lr, --clip 1 or --amp bf16")

            # Update the weights, and the moving average of them.
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if average:
                models.update_average(average, model, args.ema, step)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lr:.1e}", refresh=False)
        speed = len(losses) * batch / (time.time() - start)

        # Validate on all processes, each on its share of the images. Each process has updated
        # its BatchNorm statistics by its own batches: all take those of process 0.
        evaluated = (average if average else model).eval()
        data.share_buffers(model)
        data.share_buffers(evaluated)
        metrics = evaluate_seg(evaluated, val_set, processes, args.batch_size, args.workers,
                               short_side=args.crop).summary()
        improved = metrics["mIoU"] > best["mIoU"]
        if improved:
            best = {"epoch": epoch + 1, "mIoU": metrics["mIoU"]}
        duration = time.time() - start
        seconds += duration
        rows.append({"epoch": epoch + 1, "step": step + 1, "lr": lr,
                     "loss": math.fsum(losses) / len(losses), **metrics, "seconds": duration,
                     "images_per_second": speed, "peak_memory_gib": data.peak_memory(device)})
        note = " (best)" if improved else ""
        report(f"epoch {epoch + 1}/{args.epochs}: loss {rows[-1]['loss']:.4f}, "
               f"mIoU {metrics['mIoU']:.2f} %{note}, {duration:.0f} s")

        # Write the files. last.pt closes the epoch, so it comes after best.pt and before what is
        # only looked at; an epoch that was cut short is run again, with the same bits.
        if rank == 0:
            weights = {"spec": models.describe(model), "model": model.state_dict(),
                       "ema": average and average.state_dict(),
                       "classes": list(val_set.classes), "colors": val_set.colors.tolist(),
                       "args": settings, "epoch": epoch + 1, "best": best}
            if improved:
                models.save_checkpoint(output / "best.pt", weights)
            models.save_checkpoint(output / "last.pt", weights | {
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step + 1, "seconds": seconds, "rows": rows})
            models.write_log(output, rows)
            if improved:
                with models.tolerated(output / "samples.png"):
                    save_samples(evaluated, val_set, args.crop, device, output / "samples.png")

    done = "complete"
    if first_epoch == args.epochs:
        done = "complete already (a new run needs another --output-dir)"
    report(f"{done}: best mIoU {best['mIoU']:.2f} % after epoch {best['epoch']} of {args.epochs}, "
           f"{seconds:.0f} s; {output}: last.pt best.pt log.jsonl samples.png")


if __name__ == "__main__":
    data.run(main)
