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
    add("--scale-base", "short side that views have 0.5 to 2 times (default: the crop)",
        type=models.positive_int, metavar="SIDE")
    add("--class-weights", "'balanced' (by shares of the pixels) or JSON {class: weight}",
        metavar="FILE")
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
    models.settle_arguments(args, RECIPE, QUICK, processes)
    data.tune(device, args.deterministic)

    # The data, and from its size the length of the run.
    train_set, val_set = load_datasets(args)
    loader = data.train_loader(train_set, args.batch_size, processes, args.seed, args.workers,
                               args.accum)
    batch = args.batch_size * world * args.accum
    steps_per_epoch = len(loader) // args.accum
    steps = args.epochs * steps_per_epoch
    args.warmup = models.warmup_steps(args.warmup, steps, steps_per_epoch)

    # The model starts from the same weights in every process.
    torch.manual_seed(args.seed % 2 ** 64)
    model = models.build(args.model, "seg", train_set.num_classes, args.drop_path,
                         **models.slots_from(args))
    if args.crop < model.encoder.smallest:
        raise UserError(f"--crop {args.crop}: {model.spec} needs {model.encoder.smallest} pixels")

    # The run's folder, and the state in it to go on from. Process 0 reads for all, and hands the
    # state on: the others may be on machines that do not see the folder.
    run = models.Run(args, processes, model, train_set, batch, "mIoU")
    if rank == 0:
        for note in train_set.check() + val_set.check():
            print(f"note: {note}")
    run.state = data.broadcast(run.state)

    # Weights, optimizer, scaler and moving average: fresh, or as the state has them. With several
    # processes DDP gives process 0's weights to all, so that the others need not read --pretrain.
    if args.pretrain and rank == 0 and not run.state:
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

    # The loss, whose class weights are counted once, by process 0, and stay in the state.
    class_weights = run.state["class_weights"] if run.state else None
    if args.class_weights and rank == 0 and not run.state:
        class_weights = data.class_weights(train_set, args.class_weights)
    criterion = UpsampledCrossEntropy(data.IGNORED, data.broadcast(class_weights)).to(device)
    amp_dtype = models.AMP[args.amp]

    # Go on from the state, if there is one, and say what begins.
    run.begin(dict(model=model, ema=average, optimizer=optimizer, scaler=scaler),
              dict(classes=list(val_set.classes), colors=val_set.colors.tolist(),
                   first_id=val_set.first_id, class_weights=class_weights),
              len(val_set), steps_per_epoch)

    for epoch in range(len(run.rows), args.epochs):
        # The order of the images is a function of (seed, epoch), so that the loader can begin at
        # any step of it; workers, if there are any, start to read ahead.
        last_step = (epoch + 1) * steps_per_epoch
        data.set_epoch(loader, epoch, start=(run.step - epoch * steps_per_epoch) * args.accum)
        batches = iter(loader)
        model.train()
        run.start = time.time() - run.seconds
        bar = data.progress(range(run.step, last_step), f"epoch {epoch + 1}/{args.epochs}", rank)

        # A request to stop (SIGTERM, Ctrl-C) waits for the end of the step.
        with data.STOP.postponed():
            passes = data.take(batches, args.accum, device) if run.step < last_step else None
            for step in bar:
                # Dropout, drop-path and the NMF's bases depend on (seed, step, rank): there is
                # no random state to save.
                torch.manual_seed(data.seed_of(args.seed, step, rank))

                # Set the learning rate of this step; the head's is a multiple of the encoder's.
                lr = learning_rate(step, steps, args.warmup, args)
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
                passes = data.take(batches, args.accum, device) if step + 1 < last_step else None
                loss, norm, stop = torch.stack([loss, norm, stop.float()]).tolist()

                # Stop before the update if something is not finite. All processes see the same
                # two numbers, so all of them stop.
                run.check_finite(loss, norm, lr, scaler)

                # Update the weights, and the moving average of them.
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if average:
                    models.update_average(average, model, args.ema, step)
                run.step = step + 1
                run.losses.append(loss)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)

                # Save now and then, at a request to stop, and before the validation.
                if stop or run.step % args.save_every == 0 or run.step == last_step:
                    run.save()
                if stop:
                    if world > 1:
                        dist.barrier()          # nobody leaves before the state is saved
                    raise data.Stopped(data.STOP.pending, "saved; the same command goes on")

        # Validate on all processes, each on its share of the images. Each process has updated
        # its BatchNorm statistics by its own batches: all take those of process 0.
        evaluated = (average or model).eval()
        data.share_buffers(model)
        data.share_buffers(evaluated)
        metrics = {}
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            matrix = evaluate_seg(evaluated, val_set, processes, args.batch_size, args.workers,
                                  amp=args.amp, short_side=args.crop)
            table = class_table(matrix, val_set.classes)
            metrics = matrix.summary() | {"iou": {name: row["IoU"] for name, row in table.items()}}

        # Write log.jsonl, best.pt and last.pt, and then what is only looked at.
        with data.STOP.postponed():
            lr = learning_rate(run.step - 1, steps, args.warmup, args)
            improved = run.close_epoch(lr, metrics, data.peak_memory(device))
            if rank == 0:
                with models.tolerated(run.output / "curve.png") as path:
                    data.draw_curves(path, run.rows, "mIoU")
            if rank == 0 and improved:
                with models.tolerated(run.output / "samples.png") as path:
                    save_samples(evaluated, val_set, args.crop, path)

    if rank == 0:
        print(f"complete: best mIoU {run.best['mIoU']:.2f} % after epoch {run.best['epoch']}; "
              f"{run.output} has the files; a new run needs another --output-dir")


if __name__ == "__main__":
    data.run(main)
