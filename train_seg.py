"""Train a segmentation model.

    torchrun train_seg.py                  # embedded data: a few minutes on two CPU cores
    torchrun --nproc_per_node=8 train_seg.py --data-path ADEChallengeData2016 --pretrain FILE

`python train_seg.py` is the same as one process. The run's folder gets last.pt, best.pt, log.jsonl,
curve.png and samples.png; the same command continues it, on a CPU to the bit as if never stopped.
"""
import contextlib
import copy
import math
import time

import torch
import torch.distributed as dist
from torch import nn

import data
import models
from eval import class_table, evaluate_seg, save_samples
from layers import UpsampledCrossEntropy, UserError

# With --data-path: the original project's recipe. Without: one for the embedded data.
RECIPE = dict(model="segformer_b2", crop=512, epochs=60, batch_size=16, lr=6e-5, head_lr=10.0,
              weight_decay=0.01, clip=math.inf)
QUICK = dict(model="segformer_b0", crop=64, epochs=11, batch_size=8, lr=1.5e-3, head_lr=1.0,
             weight_decay=0.01, clip=1.0, workers=0, drop_path=0.0)


def arguments(argv=None):
    parser, add = models.training_parser("Train a segmentation model.", RECIPE, QUICK)
    add("--data-path", "a data set like ADE20K, see data.py (default: shapes drawn by data.py)")
    add("--zero-is-class", "id k of a mask is class k, not class k-1", action="store_true")
    add("--crop", "side of the training crops in pixels", type=models.positive_int)
    add("--scale-base", "views are 0.5 to 2 times as large as what fits into (4 SIDE, SIDE) "
        "(default: the crop)", type=models.positive_int, metavar="SIDE")
    add("--class-weights", "of the loss: 'balanced', the inverse square root of a class's share of "
        "the pixels, or a JSON file {class: weight}", metavar="FILE")
    add("--head-lr", "the head learns this many times as fast as the encoder", type=models.positive)
    add("--power", "of the schedule", type=models.positive, default=1.0)
    add("--min-lr", "where the schedule ends", type=models.non_negative, default=0.0)
    return parser.parse_args(argv)


def learning_rate(step, steps, warmup, args):
    """From --lr to --min-lr by a power of the steps left, times a linear warm-up, as SegFormer."""
    ramp = 1e-6 + (1 - 1e-6) * step / warmup if step < warmup else 1.0
    return ramp * (args.min_lr + (args.lr - args.min_lr) * (1 - step / steps) ** args.power)


def load_datasets(args):
    if args.data_path is None:
        if args.zero_is_class or args.scale_base:
            raise UserError("--zero-is-class, --scale-base: no effect without --data-path")
        return data.Shapes("train", args.crop, args.seed), data.Shapes("val")
    train = data.FolderSegmentation(args.data_path, "train", args.crop, args.seed,
                                    args.zero_is_class, scale_base=args.scale_base)
    val = data.FolderSegmentation(args.data_path, "val", zero_is_class=args.zero_is_class,
                                  classes=train.classes)
    return train, val


def main(argv=None):
    args = arguments(argv)
    processes = data.start(args.device, args.timeout)
    rank, world, device = processes.rank, processes.world, processes.device
    report = print if rank == 0 else lambda *_: None
    models.settle_arguments(args, RECIPE, QUICK, processes)
    data.tune(device, args.deterministic)

    # The data, and from its size the length of the run.
    train_set, val_set = load_datasets(args)
    loader = data.train_loader(train_set, args.batch_size, processes, args.seed, args.workers,
                               args.accum)
    batch = args.batch_size * world * args.accum
    steps_per_epoch = len(loader) // args.accum
    steps = args.epochs * steps_per_epoch
    warmup = models.warmup_steps(args.warmup, steps, steps_per_epoch)

    # The model starts from the same weights in every process.
    torch.manual_seed(args.seed % 2 ** 64)
    model = models.build(args.model, "seg", train_set.num_classes, args.drop_path,
                         **models.slots_from(args))
    if args.crop < model.encoder.smallest:
        raise UserError(f"--crop {args.crop}: {model.spec} needs {model.encoder.smallest} pixels")

    # The run's folder, and the state in it to go on from. Process 0 reads for all, and hands the
    # state on: the others may be on machines that do not see the folder.
    output, settings = models.describe_run(args, model, train_set, batch, warmup)
    state = None
    if rank == 0:
        lock = models.lock_folder(output)       # held for as long as this variable lives
        state = models.find_state(output, args.resume, settings)
        for note in train_set.check() + val_set.check():
            print(f"note: {note}")
    state = data.broadcast(state)

    # Weights, optimizer, scaler and moving average: fresh, or as the state has them. With several
    # processes DDP gives process 0's weights to all, so that the others need not read --pretrain.
    if state:
        model.load_state_dict(state["model"])
    elif args.pretrain and rank == 0:
        print(models.load_pretrained(model, args.pretrain))
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)
    for stage in model.encoder.stages:
        stage.checkpointing = args.checkpointing
    optimizer = torch.optim.AdamW(
        models.parameter_groups(model, args.lr, args.weight_decay, args.head_lr), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    net = torch.compile(model) if args.compile else model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else None

    # Where the run stands: finished steps, a row for each finished epoch, the losses and the
    # seconds of the epoch that has begun.
    done, rows, losses, seconds = 0, [], [], 0.0
    best, class_weights = {"epoch": 0, "mIoU": -1.0}, None
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if average:
            average.load_state_dict(state["ema"])
        done, rows, losses, seconds = (state[key] for key in ("step", "rows", "losses", "seconds"))
        best, class_weights = state["best"], state["class_weights"]
    elif args.class_weights:
        class_weights = data.class_weights(train_set, args.class_weights) if rank == 0 else None
        class_weights = data.broadcast(class_weights)
    state = None
    criterion = UpsampledCrossEntropy(data.IGNORED, class_weights).to(device)
    amp_dtype = models.AMP[args.amp]

    def checkpoint():
        """What is needed to use the weights: the content of best.pt, and a part of last.pt."""
        return {"spec": models.describe(model), "model": model.state_dict(),
                "ema": average and average.state_dict(), "classes": list(val_set.classes),
                "colors": val_set.colors.tolist(), "first_id": val_set.first_id,
                "args": settings, "epoch": len(rows), "best": best}

    def save(seconds):
        """Write last.pt, from which the run goes on with its next step."""
        if rank == 0:
            models.save_checkpoint(output / "last.pt", checkpoint() | {
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": done,
                "rows": rows, "losses": losses, "seconds": seconds,
                "class_weights": class_weights})

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    report(models.settings_block(settings))
    report(f"{parameters:.2f} M parameters, {len(val_set)} images to validate on, {device.type}; "
           f"effective batch {batch} = {args.batch_size} images x {world} processes x {args.accum} "
           f"passes, {steps_per_epoch} steps an epoch; output: {output}")
    if len(rows) == args.epochs:
        report("complete already; a new run needs another --output-dir")
    elif done:
        report(f"continuing after step {done} of {steps}")

    for epoch in range(len(rows), args.epochs):
        # The order of the images is a function of (seed, epoch), so that the loader can begin at
        # any step of it; workers, if there are any, start to read ahead.
        last_step = (epoch + 1) * steps_per_epoch
        data.set_epoch(loader, epoch, start=(done - epoch * steps_per_epoch) * args.accum)
        batches = iter(loader)
        model.train()
        start = time.time() - seconds
        bar = data.progress(range(done, last_step), f"epoch {epoch + 1}/{args.epochs}", rank)

        # A request to stop (SIGTERM, Ctrl-C) waits for the end of the step.
        with data.STOP.postponed():
            passes = data.take(batches, args.accum, device) if done < last_step else None
            for step in bar:
                # Dropout, drop-path and the NMF's bases depend on (seed, step, rank): there is
                # no random state to save.
                torch.manual_seed(data.seed_of(args.seed, step, rank))

                # Set the learning rate of this step; the head's is a multiple of the encoder's.
                lr = learning_rate(step, steps, warmup, args)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_factor"]

                # Count the labelled pixels of all passes over all processes: the loss is the mean
                # over all of them, however they are spread. A request to stop travels with the
                # count, so that all processes stop after the same step.
                labelled = sum(criterion.count(labels) for _, labels, _ in passes)
                shared = torch.stack([labelled, labelled.new_full((), data.STOP.pending)])
                if world > 1:
                    dist.all_reduce(shared)
                labelled, stop = shared

                # Forward and backward, pass by pass; the gradients add up in the parameters.
                loss = torch.zeros((), device=device)
                for i, (views, labels, colour) in enumerate(passes):
                    images = data.normalise(views, colour)
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

                # Send the next batches on their way while the device is still at work, then wait
                # for it: these numbers are all that is read back in a step.
                passes = None
                if step + 1 < last_step:
                    passes = data.take(batches, args.accum, device)
                loss, norm, stop = torch.stack([loss, norm, stop.float()]).tolist()

                # Stop before the update if something is not finite. All processes see the same
                # two numbers, so all of them stop. In fp16 an infinite gradient is no error at
                # first: the scaler skips the update and halves its factor.
                scaler_skips = scaler.is_enabled() and scaler.get_scale() > 1e-4
                if not (math.isfinite(loss) and (math.isfinite(norm) or scaler_skips)):
                    raise models.not_finite(step, loss, norm, lr, output)

                # Update the weights, and the moving average of them.
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if average:
                    models.update_average(average, model, args.ema, step)
                done = step + 1
                losses.append(loss)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)

                # Save now and then, at a request to stop, and before the validation.
                if stop or done % args.save_every == 0 or done == last_step:
                    save(time.time() - start)
                if stop:
                    if world > 1:
                        dist.barrier()          # nobody leaves before the state is saved
                    raise data.Stopped(data.STOP.pending, f"step {done} of {steps} is saved, "
                                       "the same command goes on from there")
        seconds = time.time() - start
        speed = len(losses) * batch / seconds

        # Validate on all processes, each on its share of the images. Each process has updated
        # its BatchNorm statistics by its own batches: all take those of process 0.
        evaluated = (average if average else model).eval()
        data.share_buffers(model)
        data.share_buffers(evaluated)
        metrics, improved = {}, False
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            matrix = evaluate_seg(evaluated, val_set, processes, args.batch_size, args.workers,
                                  amp=args.amp, short_side=args.crop)
            table = class_table(matrix, val_set.classes)
            metrics = matrix.summary() | {"iou": {name: row["IoU"] for name, row in table.items()}}
            improved = metrics["mIoU"] > best["mIoU"]
        if improved:
            best = {"epoch": epoch + 1, "mIoU": metrics["mIoU"]}
        rows.append({"epoch": epoch + 1, "step": done, "loss": math.fsum(losses) / len(losses),
                     "lr": learning_rate(done - 1, steps, warmup, args), **metrics,
                     "seconds": time.time() - start, "images_per_second": speed,
                     "peak_memory_gib": data.peak_memory(device)})
        report(models.epoch_line(rows, args.epochs, "mIoU", improved))
        losses, seconds = [], 0.0

        # Write the files: best.pt before last.pt, which closes the epoch, and then what is only
        # looked at. A run that ends before this is validated again, with the same bits.
        with data.STOP.postponed():
            if rank == 0 and improved:
                models.save_checkpoint(output / "best.pt", checkpoint())
            save(seconds)
            if rank == 0:
                models.write_log(output, rows)
                with models.tolerated(output / "curve.png"):
                    data.draw_curves(output / "curve.png", rows, "mIoU")
            if rank == 0 and improved:
                with models.tolerated(output / "samples.png"):
                    save_samples(evaluated, val_set, args.crop, output / "samples.png")

    report(f"complete: best mIoU {best['mIoU']:.2f} % after epoch {best['epoch']}; "
           f"{output}: last.pt best.pt log.jsonl and pictures")


if __name__ == "__main__":
    data.run(main)
