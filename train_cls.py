"""Train a classifier: the pre-training of an encoder (train_seg.py --pretrain takes its best.pt).

    torchrun train_cls.py                  # embedded data: a few minutes on two CPU cores
    torchrun --nproc_per_node=8 train_cls.py --data-path tiny-imagenet-200 --amp fp16

`python train_cls.py` is the same as one process. The run's folder gets last.pt, best.pt, log.jsonl
and curve.png; the same command continues it, on a CPU to the bit as if never stopped.
"""
import argparse
import contextlib
import copy
import math
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

import data
import models
from eval import evaluate_cls
from layers import UserError

# With --data-path: DeiT's recipe, as in the original project. Without: one for the embedded data.
# An --lr of None is 5e-4 x effective batch / 512.
RECIPE = dict(model="segformer_b2", image_size=224, epochs=300, batch_size=128, lr=None,
              weight_decay=0.05, clip=math.inf, rand_augment=True, erase=0.25, mixup=0.8,
              cutmix=1.0, smoothing=0.1, repeats=3)
QUICK = dict(model="segformer_b0", image_size=64, epochs=10, batch_size=16, lr=2e-3,
             weight_decay=0.05, clip=math.inf, rand_augment=False, erase=0.0, mixup=0.0,
             cutmix=0.0, smoothing=0.1, repeats=1, workers=0, drop_path=0.0)


def arguments(argv=None):
    parser, add = models.training_parser("Train a classifier.", RECIPE, QUICK)
    add("--data-path", "Tiny-ImageNet or {train,val}/CLASS/*.jpg (default: shapes of data.py)")
    add("--image-size", "side of the images in pixels", type=models.positive_int)
    add("--rand-augment", "RandAugment", action=argparse.BooleanOptionalAction)
    add("--erase", "probability of random erasing", type=models.share)
    add("--mixup", "alpha, 0 = off", type=models.non_negative)
    add("--cutmix", "alpha, 0 = off", type=models.non_negative)
    add("--smoothing", "of the labels", type=models.share)
    add("--repeats", "views of an image in a batch", type=models.positive_int)
    return parser.parse_args(argv)


def learning_rate(step, steps, warmup, base):
    """Linear warm-up from 1e-6 to base, then half a cosine down to 1e-5 (the recipe of DeiT)."""
    if step < warmup:
        return 1e-6 + (base - 1e-6) * step / warmup
    return 1e-5 + (base - 1e-5) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def mixed(images, labels, num_classes, mixup, cutmix):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899) of a batch, a coin decides; alpha 0: not.
    The images are shuffled before each is mixed with its neighbour, as repeated augmentation puts
    views of one image side by side. -> images (B, 3, H, W); labels (B,), or their shares (B, K)"""
    kinds = (v2.MixUp, mixup), (v2.CutMix, cutmix)
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    if not mixes:
        return images, labels
    order = torch.randperm(len(images), device=images.device)
    return v2.RandomChoice(mixes)(images[order], labels[order])


def load_datasets(args):
    if args.data_path is None:
        if args.rand_augment or args.erase:
            raise UserError("--rand-augment, --erase: no effect without --data-path")
        return data.LargestShape("train", args.image_size, args.seed), data.LargestShape("val")
    train = data.TinyImageNet(args.data_path, "train", args.image_size, seed=args.seed,
                              rand_augment=args.rand_augment, erase=args.erase)
    return train, data.TinyImageNet(args.data_path, "val", args.image_size)


def main(argv=None):
    args = arguments(argv)
    processes = data.start(args.device, args.timeout)
    rank, world, device = processes.rank, processes.world, processes.device
    models.settle_arguments(args, RECIPE, QUICK, processes)
    data.tune(device, args.deterministic)

    # The data, and from its size the length of the run.
    train_set, val_set = load_datasets(args)
    loader = data.train_loader(train_set, args.batch_size, processes, args.seed, args.workers,
                               args.accum, args.repeats)
    batch = args.batch_size * world * args.accum
    steps_per_epoch = len(loader) // args.accum
    steps = args.epochs * steps_per_epoch
    args.warmup = models.warmup_steps(args.warmup, steps, steps_per_epoch)
    args.lr = args.lr or 5e-4 * batch / 512

    # The model starts from the same weights in every process.
    torch.manual_seed(args.seed % 2 ** 64)
    model = models.build(args.model, "cls", train_set.num_classes, args.drop_path,
                         **models.slots_from(args))
    if args.image_size < model.encoder.smallest:
        raise UserError(f"--image-size: {model.spec} needs {model.encoder.smallest} pixels")

    # The run's folder, and the state in it to go on from. Process 0 reads for all, and hands the
    # state on: the others may be on machines that do not see the folder.
    run = models.Run(args, processes, model, train_set, batch, "top1")
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
        models.parameter_groups(model, args.lr, args.weight_decay, head_lr_factor=1.0), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    net = torch.compile(model) if args.compile else model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    average = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    amp_dtype = models.AMP[args.amp]

    # Go on from the state, if there is one, and say what begins.
    run.begin(dict(model=model, ema=average, optimizer=optimizer, scaler=scaler),
              dict(classes=list(val_set.classes)), len(val_set), steps_per_epoch)

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
                # Dropout, drop-path and mixing depend on (seed, step, rank): there is no random
                # state to save.
                torch.manual_seed(data.seed_of(args.seed, step, rank))

                # Set the learning rate of this step.
                lr = learning_rate(step, steps, args.warmup, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_factor"]

                # Forward and backward, pass by pass; the gradients add up in the parameters. The
                # loss is the mean over the images of all passes and processes. A request to stop
                # travels beside it, so that all processes stop after the same step.
                shared = torch.zeros(2, device=device)
                shared[1].fill_(data.STOP.pending)
                for i, (images, labels) in enumerate(passes):
                    images, targets = mixed(images, labels, train_set.num_classes, args.mixup,
                                            args.cutmix)
                    images = images.contiguous(memory_format=torch.channels_last)
                    # The processes exchange gradients once a step, in the last pass.
                    waits = world > 1 and i < args.accum - 1
                    with net.no_sync() if waits else contextlib.nullcontext():
                        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                            logits = net(images)
                        pass_loss = F.cross_entropy(logits.float(), targets,
                                                    label_smoothing=args.smoothing) / args.accum
                        scaler.scale(pass_loss).backward()
                    # DDP averages the gradients over the processes, and this the loss.
                    shared[0] += pass_loss.detach() / world
                if world > 1:
                    dist.all_reduce(shared)
                loss, stop = shared

                # Undo the scaler's factor and limit the norm of the whole gradient.
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)

                # Send the next batches on their way while the device is still at work, then wait
                # for it: these numbers are all that is read back in a step.
                passes = data.take(batches, args.accum, device) if step + 1 < last_step else None
                loss, norm, stop = torch.stack([loss, norm, stop]).tolist()

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
            metrics = evaluate_cls(evaluated, val_set, processes, args.batch_size, args.workers,
                                   amp=args.amp)

        # Write log.jsonl, best.pt and last.pt, and then what is only looked at.
        with data.STOP.postponed():
            lr = learning_rate(run.step - 1, steps, args.warmup, args.lr)
            run.close_epoch(lr, metrics, data.peak_memory(device))
            if rank == 0:
                with models.tolerated(run.output / "curve.png") as path:
                    data.draw_curves(path, run.rows, "top1")

    if rank == 0:
        print(f"complete: best top-1 {run.best['top1']:.2f} % after epoch {run.best['epoch']}; "
              f"{run.output} has the files; a new run needs another --output-dir")


if __name__ == "__main__":
    data.run(main)
