"""Evaluate a model, or draw what it sees.

    python eval.py --checkpoint runs/NAME/best.pt --data-path PATH/ADEChallengeData2016        # torchrun works as well
    python eval.py --model segformer_b2 --pretrain segformer.b2.512x512.ade.160k.pth --data-path PATH/ADEChallengeData2016
    python eval.py --checkpoint runs/NAME/best.pt --images photo.jpg --save-dir out

Segmentation follows ADE20K's protocol: short side 512, ratio kept (long side <= 2048); logits up-sampled once, to the size
of the label as it is stored; arg-max; 255 ignored; one confusion matrix for the whole set. Classifiers get top-1 and top-5.
The figures depend neither on the number of processes nor on the batch size. A checkpoint brings its training's defaults:
--size is its crop, --zero-is-class its own, and pictures get its class names and colours.
"""
import argparse
import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import data
import layers
import models
from data import UserError

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def naming(path):
    """Put the file's name before the message of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{data.shown(path)}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

class ConfusionMatrix:
    """Pixels of each (label, prediction) of a whole set, exact int64 counts: float32 stops counting at 2^24."""

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)      # row: label, column: prediction

    def update(self, pred, label):
        """Add maps of one shape with classes 0..K-1; labels of 255 are left out."""
        known = label != data.IGNORED
        pair = label[known].long() * self.num_classes + pred[known].long()
        self.counts += torch.bincount(pair, minlength=self.num_classes ** 2).view_as(self.counts).cpu()

    def all_reduce(self, device="cpu"):
        """Sum over all processes; `device`: where the process group communicates."""
        if dist.is_initialized():
            counts = self.counts.to(device)
            dist.all_reduce(counts)
            self.counts = counts.cpu()
        return self

    def iou(self):
        """Intersection over union of each class (K,), nan for a class in neither labels nor predictions."""
        hit = self.counts.diag().double()
        return hit / (self.counts.sum(0) + self.counts.sum(1) - hit)

    def accuracy(self):
        """Share of each class's pixels that are found (K,), nan for a class that no label has."""
        return self.counts.diag().double() / self.counts.sum(1)

    def summary(self):
        """{"aAcc", "mIoU", "mAcc"} in percent; the means leave out classes that do not occur."""
        if not self.counts.any():
            raise UserError("the masks of the validation split hold no labelled pixel, all are ignored: nothing to measure")
        all_pixels = self.counts.diag().sum().double() / self.counts.sum()
        return {name: 100 * value.item() for name, value in
                (("aAcc", all_pixels), ("mIoU", self.iou().nanmean()), ("mAcc", self.accuracy().nanmean()))}


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation
# ---------------------------------------------------------------------------------------------------------------------

def input_size(size, short_side, scale=1.0, divisor=None):
    """(H, W) of an image -> what the network sees: fitted into (4 short, short) with its ratio kept, as stored for None.

    divisor: then each side up to the next multiple, which changes the ratio a little ("AlignedResize").
    """
    factor = scale * (1.0 if short_side is None else min(4 * short_side / max(size), short_side / min(size)))
    size = [max(1, int(side * factor + 0.5)) for side in size]
    return size if divisor is None else [math.ceil(side / divisor) * divisor for side in size]


def sliding(model, images, crop, stride):
    """Mean of the logits of overlapping windows, at the resolution of the images: (B, 3, H, W) -> (B, K, H, W)."""
    batch, _, height, width = images.shape
    total = images.new_zeros(batch, height, width, model.num_classes).permute(0, 3, 1, 2)       # channels_last
    times = images.new_zeros(height, width)
    rows, columns = ([min(i * stride, max(side - crop, 0)) for i in range(max(math.ceil((side - crop) / stride), 0) + 1)]
                     for side in (height, width))           # the last window ends where the image does
    for y in rows:
        for x in columns:
            window = images[:, :, y:y + crop, x:x + crop]
            total[:, :, y:y + crop, x:x + crop] += layers.resize(model(window).float(), window.shape[2:])
            times[y:y + crop, x:x + crop] += 1
    return total.div_(times)


@torch.inference_mode()
def predict(model, images, size, device, short_side=None, scales=(1.0,), flip=False, slide=None, size_divisor=None, amp="off"):
    """Classes of uint8 images (B, 3, H, W) or (3, H, W) at `size` -> (B, *size) or (*size) int64, on the device.

    The image is resized bilinearly with antialiasing, as the training views are (a smaller image is what it would look
    like; cv2's bilinear, in the original pipelines, skips pixels). Several scales, or a flip: mean of the soft-maxes.
    """
    batch = images if images.ndim == 4 else images[None]
    views = []
    for scale in scales:
        x = TF.resize(batch.to(device), input_size(batch.shape[2:], short_side, scale, size_divisor), antialias=True)
        x = data.normalise(x).contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, AMP[amp], enabled=AMP[amp] is not None):
            for flipped in (False, True)[:1 + flip]:
                v = x.flip(-1) if flipped else x
                logits = model(v) if slide is None else sliding(model, v, *slide)
                views.append(logits.flip(-1) if flipped else logits)
    classes = layers.upsampled_argmax(views, size)
    return classes if images.ndim == 4 else classes[0]


def evaluate_seg(model, dataset, processes, batch_size, workers, **protocol):
    """Confusion matrix of the whole set over all processes; the keywords are those of `predict`. Leaves the model's mode."""
    matrix, training = ConfusionMatrix(model.num_classes), model.training
    model.eval()
    loader = data.eval_loader(dataset, batch_size, processes, workers)
    for items in tqdm(loader, "evaluating", leave=False, disable=processes.rank > 0):
        groups = {}                     # images of one size go together: padding them to a common one would change the result
        for image, label, path in items:
            groups.setdefault(image.shape, []).append((image, label, path))
        for group in groups.values():
            *pair, paths = zip(*group)
            images, labels = (torch.stack(part) for part in pair)
            with naming(paths[0]):
                pred = predict(model, images, labels.shape[1:], processes.device, **protocol)
            matrix.update(pred, labels.to(processes.device))
    model.train(training)
    return matrix.all_reduce(processes.device)


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate_cls(model, dataset, processes, batch_size, workers, amp="off"):
    """{"top1", "top5"} in percent, over all processes. Leaves the model's mode."""
    hits, training, device = torch.zeros(3, dtype=torch.int64), model.training, processes.device
    model.eval()
    loader = data.eval_loader(dataset, batch_size, processes, workers)
    for items in tqdm(loader, "evaluating", leave=False, disable=processes.rank > 0):
        images, labels = torch.stack([i for i, _ in items]).to(device), torch.tensor([l for _, l in items], device=device)
        with torch.autocast(device.type, AMP[amp], enabled=AMP[amp] is not None):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits += torch.stack([found[:, 0].sum(), found.any(1).sum(), torch.tensor(len(items), device=device)]).cpu()
    if dist.is_initialized():
        hits = hits.to(device)
        dist.all_reduce(hits)
    model.train(training)
    top1, top5, count = hits.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

def picture_files(source, folder):
    """The images that --images names -> {stem: path}. The pictures get the stems, hence another folder than the images'."""
    found, problems = data.scan(source, data.IMAGE_FILES) if source.is_dir() else ({source.stem: source}, [])
    if not found:
        problems = [f"--images {data.shown(source)}: no images in this folder"]
    elif folder.resolve() == next(iter(found.values())).resolve().parent:
        problems = [f"--save-dir {data.shown(folder)}: holds the images, which could be overwritten; choose another folder"]
    if problems:
        raise UserError(problems[0])
    return found


def save_pictures(model, source, folder, names, colors, first_id, processes, protocol):
    """For each image NAME.png with the label ids (k + first_id, drawn in the classes' colours) and NAME_overlay.png: the image
    under the colours, and a legend, largest class first. An image's EXIF rotation is carried out."""
    folder = Path(folder)
    files = list(picture_files(Path(source), folder).items())
    with data.writing("--save-dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
    palette = np.zeros((256, 3), np.uint8)
    palette[first_id:first_id + len(colors)] = colors
    bad = []
    for stem, path in tqdm(files[processes.rank::processes.world], "drawing", disable=processes.rank > 0):
        try:
            with data.opened(path) as image:
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except UserError as error:          # said at the end: the others are drawn first
            bad.append(str(error))
            continue
        with naming(path):
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            classes = predict(model, image, pixels.shape[:2], processes.device, **protocol).cpu().numpy()
        label = Image.fromarray((classes + first_id).astype(np.uint8))
        label.putpalette(palette.tobytes())
        overlay = (pixels // 2 + data.colorize(classes, colors) // 2).astype(np.uint8)
        areas = np.bincount(classes.ravel(), minlength=len(names))
        order = [k for k in np.argsort(-areas, kind="stable") if areas[k]]
        legend = data.legend([names[k] for k in order], [colors[k] for k in order], max(overlay.shape[1], 200))
        with data.writing("--save-dir", folder):
            label.save(folder / f"{stem}.png")
            data.contact_sheet([[overlay]], folder / f"{stem}_overlay.png", legend)
    if bad:
        raise UserError(f"{bad[0]} ({len(bad)} of {len(files)} files could not be drawn, the others are in {folder})")
    if processes.rank == 0:
        print(f"{len(files)} label maps (ids {first_id}..{len(names) - 1 + first_id}) and overlays: {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# python eval.py
# ---------------------------------------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate a model, or draw what it sees.")
    add = parser.add_argument
    add("--checkpoint", help="best.pt or last.pt of train_seg.py or train_cls.py; it knows its model")
    models.add_model_arguments(parser)
    parser.set_defaults(model=None)
    add("--pretrain", help="public weights for --model: a file or a Hugging Face directory")
    add("--num-classes", type=int, help="of --pretrain (default: those of --data-path, else 150 for seg, 1000 for cls)")
    add("--task", choices=list(models.CLASSES), default="seg", help="of --model (default seg)")
    add("--data-path", help="data set, see data.py (default: the embedded shapes)")
    add("--split", choices=["train", "val"], default="val", help="default val")
    add("--zero-is-class", action="store_true", help="id 0 of the masks is a class; else it is ignored, and k is class k-1")
    add("--size", type=int, help="short side that the network sees, 0: images as they are stored (default: the checkpoint's "
        "training crop, else 512; classifiers: the checkpoint's image size, else 224)")
    add("--size-divisor", type=int, help="resize each side up to a multiple of this (32 is worth +0.5 mIoU or more)")
    add("--scales", type=float, nargs="+", default=[1.0], help="multi-scale test, e.g. 0.5 0.75 1 1.25 1.5 1.75")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--slide", type=int, nargs=2, metavar=("CROP", "STRIDE"), help="sliding window instead of the whole image")
    add("--images", help="draw this image, or every image of this folder, instead of measuring")
    add("--save-dir", default="pictures", help="where --images writes (default pictures)")
    add("--json", help="write the figures to this file as well")
    add("--batch-size", type=int, default=1, help="images per process and pass (default 1)")
    add("--amp", choices=list(AMP), default="off", help="mixed precision (default off)")
    add("--workers", type=int, default=2, help="loader processes (default 2)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = parser.parse_args(argv)
    if (args.checkpoint is None) == (args.pretrain is None):
        raise UserError("give either --checkpoint FILE, or --model NAME with --pretrain FILE")
    chosen = [f"--{key}" for key in ("model", *models.SLOTS) if getattr(args, key)]
    if args.checkpoint and (chosen or args.num_classes):
        raise UserError(f"{' '.join(chosen) or '--num-classes'}: a checkpoint knows its model; leave this out")
    if args.pretrain and not args.model:
        raise UserError("--pretrain: needs --model NAME (`python models.py` lists the names)")
    for name, least in (("size", 0), ("size_divisor", 1), ("batch_size", 1), ("workers", 0), ("num_classes", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if min(args.scales) <= 0 or args.slide and not args.slide[0] >= args.slide[1] >= 1:
        raise UserError("--scales must be above 0, and --slide needs CROP >= STRIDE >= 1")
    return args


def load_model(args, dataset, say):
    """-> model, and what its training said: {"args": .., "classes": .., "colors": ..} or {}."""
    if args.checkpoint:
        trained = models.read_checkpoint(args.checkpoint)
        with naming(args.checkpoint):
            return models.restore(trained), trained
    num_classes = args.num_classes or (dataset.num_classes if dataset else None)
    model = models.build(args.model, args.task, num_classes, **models.slots_from(args))
    report = models.load_pretrained(model, args.pretrain)
    say(report)
    if report.fresh:
        raise UserError(f"{args.pretrain}: has no trained {report.fresh[0]} for {model.num_classes} classes; "
                        "evaluate it on the data set that it was trained for, or fine-tune it first")
    return model, {}


def open_dataset(args, task, said):
    """The set to measure on; said: the arguments of the checkpoint's training."""
    if args.data_path is None and (task == "cls" or said.get("data_path")):
        raise UserError("--data-path: needed; " + ("the embedded shapes are for segmentation" if task == "cls" else
                                                   "this model was not trained on the embedded shapes"))
    if task == "cls":
        return data.TinyImageNet(args.data_path, args.split, args.size or said.get("image_size", 224), train=False)
    if args.data_path is None:
        return data.Shapes(args.split)
    return data.FolderSegmentation(args.data_path, args.split, zero_is_class=args.zero_is_class)


def rounded(percent):
    """The two decimals that are printed; None for nan, a class that does not occur."""
    return None if math.isnan(percent) else round(percent, 2)


def print_table(classes):
    print(f"{'class':<28}{'IoU':>8}{'Acc':>8}")
    for name, figures in classes.items():
        print(f"{name[:27]:<28}" + "".join("       -" if value is None else f"{value:8.2f}" for value in figures.values()))


def measure(args, model, trained, dataset, processes, protocol):
    """Evaluate on the whole set, print the table and the summary on rank 0, write them as JSON."""
    result = {"model": str(model.spec), "weights": args.checkpoint or args.pretrain, "data": args.data_path or "shapes",
              "split": args.split, "images": len(dataset)}
    if model.task == "cls":
        figures = evaluate_cls(model, dataset, processes, args.batch_size, args.workers, args.amp)
    else:
        matrix = evaluate_seg(model, dataset, processes, args.batch_size, args.workers, **protocol)
        figures = matrix.summary()
        names = [name if dataset.classes.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(dataset.classes)]
        result |= protocol | {"classes": {
            name: {"IoU": rounded(100 * iou), "Acc": rounded(100 * acc)}
            for name, iou, acc in zip(names, matrix.iou().tolist(), matrix.accuracy().tolist())}}
    if processes.rank > 0:
        return
    how = ""
    if model.task == "seg":         # a figure means little without the protocol
        how = "".join(f", {key.replace('_', ' ')} {value}" for key, value in protocol.items()
                      if value not in (None, False, "off", [1.0]))
        print_table(result["classes"])
        renamed = [f"{k} ({old!r}, here {new!r})" for k, (old, new) in enumerate(zip(trained.get("classes", []), dataset.classes))
                   if old != new]
        if renamed:
            print(f"note: the checkpoint has other names for {len(renamed)} classes, the first is {renamed[0]}")
    print(f"{result['model']} on {result['data']} {args.split}, {len(dataset)} images{how}: "
          + ", ".join(f"{name} {value:.2f} %" for name, value in figures.items()))
    if args.json:
        with data.writing("--json", args.json):
            Path(args.json).write_text(json.dumps(result | {k: rounded(v) for k, v in figures.items()}, indent=1) + "\n")


def main(argv=None):
    args = arguments(argv)
    processes = data.start(args.device)
    dataset = open_dataset(args, args.task, {}) if args.pretrain and args.data_path else None
    model, trained = load_model(args, dataset, print if processes.rank == 0 else lambda *_: None)
    said = trained.get("args", {})
    args.zero_is_class |= said.get("zero_is_class", False)
    model = models.fuse(model).to(processes.device, memory_format=torch.channels_last)
    protocol = dict(short_side=said.get("crop", 512) if args.size is None else args.size or None, scales=args.scales,
                    flip=args.flip, slide=args.slide, size_divisor=args.size_divisor, amp=args.amp)
    if model.task == "cls" and (args.images or args.flip or args.slide or args.size_divisor or args.scales != [1.0]):
        raise UserError("--images, --scales, --flip, --slide and --size-divisor are for segmentation; this is a classifier")
    if args.images:
        names = trained.get("classes") or (dataset.classes if dataset else [f"class {k}" for k in range(model.num_classes)])
        colors = np.array(trained["colors"] if "colors" in trained else dataset.colors if dataset else
                          data.ADE20K_COLORS if model.num_classes == 150 else data.distinct_colors(model.num_classes), np.uint8)
        from_zero = args.zero_is_class or "data_path" in said and said["data_path"] is None     # as the shapes' labels are
        return save_pictures(model, args.images, args.save_dir, names, colors, 1 - from_zero, processes, protocol)
    dataset = dataset or open_dataset(args, model.task, said)
    if dataset.num_classes != model.num_classes:
        raise UserError(f"{args.data_path or 'the embedded shapes'}: {dataset.num_classes} classes, but the model knows "
                        f"{model.num_classes}; give the data set that it was trained for to --data-path")
    measure(args, model, trained, dataset, processes, protocol)


if __name__ == "__main__":
    data.run(main)
