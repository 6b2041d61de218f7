"""Evaluate a model, or draw what it sees.

    python eval.py --checkpoint runs/NAME/best.pt --data-path PATH/ADEChallengeData2016
    python eval.py --model segformer_b2 --pretrain FILE --data-path PATH/ADEChallengeData2016
    python eval.py --checkpoint runs/NAME/best.pt --images photo.jpg --save-dir out

(torchrun works as well.) Segmentation follows ADE20K's protocol: short side 512, ratio kept (long
side <= 2048); logits up-sampled once, to the size of the label as it is stored; arg-max; 255
ignored; one confusion matrix for the whole set. Classifiers get top-1 and top-5. The figures depend
neither on the number of processes nor on the batch size. A checkpoint brings its training's
defaults: --size is its crop, --zero-is-class its own, and pictures get its class names and colours.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as TF

import data
import layers
import models
from layers import UserError


def by_size(items):
    """Items -> batches, one for each size of images: padding would change the result."""
    groups = {}
    for item in items:
        groups.setdefault(item[0].shape, []).append(item)
    return [default_collate(group) for group in groups.values()]


def batches(dataset, processes, batch_size, workers):
    """This process's share of a data set, `by_size`; images and labels are on the device."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False      # images of many sizes: each would be a trial
    loader = data.eval_loader(dataset, batch_size, processes, workers, by_size)
    for groups in data.progress(loader, "evaluating", processes.rank):
        for images, labels, *names in groups:
            yield (images.to(processes.device, non_blocking=True),
                   labels.to(processes.device, non_blocking=True), *names)
    torch.backends.cudnn.benchmark = benchmark


def refuse_not_finite(flags, names):
    """flags: whether the outputs for each image are finite, a tensor (B,) a batch, read at once."""
    finite = torch.cat(flags).tolist() if flags else []
    bad = [name for name, good in zip(names, finite) if not good]
    if bad:
        raise UserError(f"image {data.shown(bad[0])}: the model's output is not finite "
                        f"({len(bad)} such images); damaged weights, or too large for fp16?")


# ---- Metrics -------------------------------------------------------------------------------------

class ConfusionMatrix:
    """Pixels of each (label, prediction) of a whole set, exact: float32 stops counting at 2^24. The
    sums stay on the device, so that the host waits for nothing until the figures are wanted."""
    def __init__(self, num_classes, device="cpu"):
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, pred, label, loss_sum=0.0):
        """Add maps of one shape, classes 0..K-1, labels of 255 left out, and their summed loss."""
        known = label != data.IGNORED
        # Ignored pixels add 0 to the first cell; to drop them, the host would have to count them.
        pair = torch.where(known, label.long() * self.num_classes + pred, 0)
        self.counts.view(-1).scatter_add_(0, pair.flatten(), known.flatten().long())
        self.loss_sum += loss_sum

    def all_reduce(self):
        """Sum over all processes, and bring the sums to the host."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)
            dist.all_reduce(self.loss_sum)
        self.counts, self.loss_sum = self.counts.cpu(), self.loss_sum.cpu()
        return self

    def figures(self):
        """Of each class (K,), nan where there is none to count. F1 is also the Dice coefficient."""
        hits = self.counts.diag().double()
        labelled, predicted = self.counts.sum(1), self.counts.sum(0)
        return {"IoU": hits / (labelled + predicted - hits), "Acc": hits / labelled,
                "precision": hits / predicted, "F1": 2 * hits / (labelled + predicted)}

    def iou(self):
        """Intersection over union (K,), nan for a class in neither labels nor predictions."""
        return self.figures()["IoU"]

    def accuracy(self):
        """Share of each class's pixels that are found (K,), nan for a class that no label has."""
        return self.figures()["Acc"]

    def summary(self):
        """{"aAcc", "mIoU", "mAcc"} in percent, of the classes that occur, and the "val_loss", the
        mean cross entropy of the labelled pixels."""
        total = self.counts.sum()
        if not total:
            raise UserError("the masks of this split hold no labelled pixel: nothing to measure")
        right = self.counts.diag().sum().double() / total
        return {"aAcc": 100 * right.item(), "mIoU": 100 * self.iou().nanmean().item(),
                "mAcc": 100 * self.accuracy().nanmean().item(),
                "val_loss": (self.loss_sum / total).item()}


# ---- Segmentation --------------------------------------------------------------------------------

def input_size(size, short_side, scale=1.0, divisor=None):
    """(H, W) of an image -> what the network sees: fitted into (4 short, short), its ratio kept.
    short_side: None for images as they are stored. divisor: each side then goes up to the next
    multiple, which changes the ratio a little ("AlignedResize")."""
    factor = scale
    if short_side:
        factor *= min(4 * short_side / max(size), short_side / min(size))
    size = [max(1, int(side * factor + 0.5)) for side in size]
    return [math.ceil(side / divisor) * divisor for side in size] if divisor else size


def sliding(model, images, crop, stride):
    """Mean of overlapping windows' logits, at the images' size: (B, 3, H, W) -> (B, K, H, W)."""
    batch, _, height, width = images.shape
    bottom, right = max(height - crop, 0), max(width - crop, 0)     # the last begin there
    total = images.new_zeros(batch, model.num_classes, height, width)
    total = total.contiguous(memory_format=torch.channels_last)     # as the logits are
    times = images.new_zeros(height, width)
    for y in [*range(0, bottom, stride), bottom]:
        for x in [*range(0, right, stride), right]:
            window = images[:, :, y:y + crop, x:x + crop]
            logits = layers.resize(model(window).float(), window.shape[2:])
            total[:, :, y:y + crop, x:x + crop] += logits
            times[y:y + crop, x:x + crop] += 1
    return total.div_(times)


@torch.inference_mode()
def segment(model, images, size, short_side=None, scales=(1.0,), flip=False, slide=None,
            size_divisor=None, amp="off"):
    """uint8 images (B, 3, H, W), on the model's device -> logits, classes, finite.
    logits: a (B, K, h, w) for each scale and side. classes (B, *size): of the largest logit, and
    with several views of the largest mean of soft-maxes. finite (B,): whether all logits are.
    The image is resized bilinearly with antialiasing, as the training views are (a smaller image is
    what it would look like; cv2's bilinear, in the original pipelines, skips pixels)."""
    views = []
    for scale in scales:
        seen = input_size(images.shape[2:], short_side, scale, size_divisor)
        x = data.normalise(TF.resize(images, seen, antialias=True))
        x = x.contiguous(memory_format=torch.channels_last)
        for mirrored in (False, True) if flip else (False,):
            view = x.flip(-1) if mirrored else x
            with torch.autocast(x.device.type, models.AMP[amp], enabled=amp != "off"):
                logits = sliding(model, view, *slide) if slide else model(view)
            views.append(logits.flip(-1) if mirrored else logits)
    finite = torch.stack([logits.isfinite().flatten(1).all(1) for logits in views]).all(0)
    return views, layers.upsampled_argmax(views, size), finite


def predict(model, image, size=None, **protocol):
    """Class of each pixel of an image, at its size or `size` -> int64 (H, W) on the model's device.
    image: PIL image (ImageOps.exif_transpose turns a photograph upright) or uint8 (3, H, W); uint8
    (B, 3, H, W) gives (B, H, W). protocol: the keywords of `segment`; short_side is the model's
    .size by default, which models.load sets. Errors: UserError."""
    if model.training or model.task != "seg":
        raise UserError("predict takes a model for segmentation, in evaluation mode: model.eval()")
    if isinstance(image, Image.Image) and image.mode[0] not in "IF":    # 16 bits would be clipped
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if getattr(image, "dtype", None) != torch.uint8 or image.shape[-3] != 3:
        raise UserError("predict takes a PIL image of 8 bits, or uint8 (3, H, W) or (B, 3, H, W)")
    protocol.setdefault("short_side", getattr(model, "size", None))
    batch = image.to(next(model.parameters()).device).reshape(-1, *image.shape[-3:])
    _, classes, finite = segment(model, batch, size or image.shape[-2:], **protocol)
    refuse_not_finite([finite], range(len(finite)))
    return classes.reshape(*image.shape[:-3], *classes.shape[1:])


@torch.inference_mode()
def evaluate_seg(model, dataset, processes, batch_size, workers, **protocol):
    """The whole set, over all processes -> ConfusionMatrix; the loss is that of the first view.
    model: in evaluation mode. protocol: the keywords of `segment`. Errors: UserError, which names
    the image."""
    device, flags, paths = processes.device, [], []
    matrix = ConfusionMatrix(model.num_classes, device)
    criterion = layers.UpsampledCrossEntropy(data.IGNORED)
    one = torch.ones((), device=device)     # the loss of a batch is its sum; no upload for each
    for images, labels, names in batches(dataset, processes, batch_size, workers):
        with data.naming(names[0]):
            logits, classes, finite = segment(model, images, labels.shape[1:], **protocol)
        matrix.update(classes, labels, criterion(logits[0], labels, one))
        flags.append(finite)
        paths += names
    refuse_not_finite(flags, paths)
    return matrix.all_reduce()


# ---- Classification ------------------------------------------------------------------------------

@torch.inference_mode()
def evaluate_cls(model, dataset, processes, batch_size, workers, amp="off"):
    """The whole set, over all processes -> {"top1", "top5"} in percent and the mean "val_loss".
    model: in evaluation mode. Errors: as evaluate_seg's."""
    device, flags = processes.device, []
    sums = torch.zeros(3, dtype=torch.float64, device=device)       # hits, hits in five, loss
    for images, labels in batches(dataset, processes, batch_size, workers):
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, models.AMP[amp], enabled=amp != "off"):
            logits = model(images).float()
        found = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([found[:, 0].sum(), found.any(1).sum(), loss])
        flags.append(logits.isfinite().all(1))
    names = [path for path, _ in getattr(dataset, "paths", [])] or range(len(dataset))
    refuse_not_finite(flags, names[processes.rank::processes.world])
    if dist.is_initialized():
        dist.all_reduce(sums)
    (top1, top5, loss), count = sums.tolist(), len(dataset)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "val_loss": loss / count}


# ---- Pictures ------------------------------------------------------------------------------------

def save_samples(model, dataset, size, path):
    """A sheet of image | truth | prediction of six images; size: the short side for the model."""
    rows = []
    for index in torch.linspace(0, len(dataset) - 1, min(6, len(dataset))).long().tolist():
        image, labels, _ = dataset[index]
        # Large photographs are reduced first: all else is done at the size of the sheet's pictures.
        picture = data.fitted(image.permute(1, 2, 0))
        classes = predict(model, image, picture.shape[:2], short_side=size)
        rows.append([picture, labels, classes.cpu().byte()])
    titles = ["image", "truth", "prediction"]
    data.contact_sheet(rows, path, titles, dataset.classes, dataset.colors)


def picture_files(source, folder):
    """What --images names, also in sub-folders -> {path from there, no suffix: path}, in order.
    What an earlier call drew into the folder is left out, and may be overwritten."""
    def drawn(path):
        return path.with_name(path.stem.removesuffix("_overlay") + "_overlay.png").exists()

    if not source.exists():
        raise UserError(f"--images {data.shown(source)}: no such file or folder")
    files = data.scan(source, data.IMAGE_FILES) if source.is_dir() else {source.stem: source}
    place, target = (source if source.is_dir() else source.parent).resolve(), folder.resolve()
    files = {name: path for name, path in files.items()
             if target not in path.resolve().parents or not drawn(path)}
    if not files:
        raise UserError(f"--images {data.shown(source)}: no images in this folder")
    results = [folder / f"{name}.png" for name in files]
    if place == target or any(path.exists() and not drawn(path) for path in results):
        raise UserError(f"--save-dir {data.shown(folder)}: the images here could be overwritten; "
                        "choose another folder")
    return files


def save_pictures(model, args, processes, protocol):
    """For each image, its EXIF rotation carried out: `draw`'s two pictures, and for --probabilities
    NAME.npz, soft-maxes float16 (K, h, w) at the network's resolution."""
    folder, bad = Path(args.save_dir), []
    files = picture_files(Path(args.images), folder)
    share = list(files.items())[processes.rank::processes.world]
    for name, path in data.progress(share, "drawing", processes.rank):
        try:
            with data.opened(path) as image:
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except UserError as error:          # said at the end: the others are drawn first
            bad.append(str(error))
            continue
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(processes.device)
        with data.naming(path):
            logits, classes, finite = segment(model, image, pixels.shape[:2], **protocol)
        refuse_not_finite([finite], [path])
        with data.naming(f"--save-dir {folder}"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            draw(model, pixels, classes[0].cpu().numpy(), folder / name)
            if args.probabilities:
                size = logits[0].shape[2:]
                shares = [layers.resize(view.float(), size).softmax(1) for view in logits]
                mean = torch.cat(shares).mean(0).half().cpu().numpy()
                np.savez_compressed(folder / f"{name}.npz", probabilities=mean)
    if bad:
        raise UserError(f"{bad[0]} ({len(bad)} of {len(files)} files could not be drawn)")
    if processes.rank == 0:
        last_id = model.first_id + model.num_classes - 1
        print(f"{len(files)} label maps (ids {model.first_id}..{last_id}) and overlays: {folder}")


def draw(model, pixels, classes, target):
    """TARGET.png: the ids of classes (H, W) as a mask stores them, in the classes' colours.
    TARGET_overlay.png: the image (H, W, 3) under the colours, and a legend."""
    colors = data.distinct_colors(model.num_classes) if model.colors is None else model.colors
    seen = np.unique(classes)
    overlay = pixels // 2 + data.colorize(classes, colors) // 2
    data.contact_sheet([[overlay]], f"{target}_overlay.png", (), [model.classes[k] for k in seen],
                       colors[seen], max(overlay.shape))
    label = Image.fromarray((classes + model.first_id).astype(np.uint8))
    label.putpalette(bytes(3 * model.first_id) + colors.tobytes())
    label.save(f"{target}.png")         # last: `picture_files` knows it by its overlay


# ---- python eval.py ------------------------------------------------------------------------------

def arguments(argv=None):
    parser = models.Parser(description="Evaluate a model, or draw what it sees.")
    add, whole = parser.add_argument, models.positive_int
    add("--checkpoint", help="best.pt or last.pt of train_seg.py or train_cls.py")
    models.add_model_arguments(parser)
    parser.set_defaults(model=None)
    add("--pretrain", help="public weights for --model: a file or a Hugging Face directory")
    add("--num-classes", type=whole, help="default: as --data-path, else 150; cls 1000")
    add("--task", choices=list(models.CLASSES), default="seg", help="of --model (default seg)")
    add("--data-path", help="data set, see data.py (default: the embedded shapes)")
    add("--split", choices=["train", "val"], default="val", help="default val")
    add("--zero-is-class", action="store_true", help="id k of a mask is class k, not class k-1")
    add("--size", type=models.count, help="short side, 0 as stored (else as trained; 512, cls 224)")
    add("--size-divisor", type=whole, help="sides up to a multiple of this (32: +0.5 mIoU or more)")
    add("--scales", type=models.positive, nargs="+", default=[1.0], help="multi-scale: 0.5 1 1.5")
    add("--flip", action="store_true", help="average with the mirrored image")
    add("--slide", type=whole, nargs=2, metavar=("CROP", "STRIDE"), help="average over windows")
    add("--images", help="draw this image, or all of this folder, instead of measuring")
    add("--save-dir", default="pictures", help="where --images writes (default pictures)")
    add("--probabilities", action="store_true", help="--images adds NAME.npz, float16 soft-maxes")
    add("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE too, or instead of text")
    add("--batch-size", type=whole, default=1, help="of each process (default 1)")
    add("--amp", choices=models.AMP, default="off", help="mixed precision (default off)")
    add("--workers", type=models.count, help="loader processes (default 2, on CUDA up to 8)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = parser.parse_args(argv)
    args.defaults = vars(parser.parse_args([]))

    if not args.checkpoint and not (args.model and args.pretrain):
        raise UserError("give either --checkpoint FILE, or --model NAME with --pretrain FILE")
    models.no_effect(args, args.checkpoint, "with --checkpoint, which knows it",
                     f"model pretrain task num_classes {' '.join(models.SLOTS)}")
    models.no_effect(args, args.checkpoint and args.images, "on a checkpoint's pictures",
                     "data_path zero_is_class")
    models.no_effect(args, args.images, "with --images", "json split batch_size workers")
    models.no_effect(args, not args.images, "without --images", "save_dir probabilities")
    if args.slide and args.slide[0] < args.slide[1]:
        raise UserError("--slide: needs CROP >= STRIDE, else there would be gaps")
    return args


def load_public(args, dataset, quiet):
    """The model of --pretrain, which knows the data set's classes, colours and ids."""
    num_classes = args.num_classes or (dataset.num_classes if dataset else None)
    model = models.build(args.model, args.task, num_classes, **models.slots_from(args))
    report = models.load_pretrained(model, args.pretrain)
    if not quiet:
        print(report)
    if report.fresh:
        raise UserError(f"{args.pretrain}: has no trained {report.fresh[0]} for "
                        f"{model.num_classes} classes; fine-tune it first")
    known = {"args": {"zero_is_class": args.zero_is_class}}
    if dataset:
        known |= {key: getattr(dataset, key, None) for key in ("classes", "colors", "first_id")}
    return models.know(models.fuse(model), known, args.pretrain)


def open_dataset(args, task, trained):
    """The set to measure on; trained: the flags of the model's training."""
    if args.data_path is None:
        if trained.get("data_path", "unknown") is not None:
            raise UserError("--data-path: needed; the model was not trained on the embedded shapes")
        return data.Shapes(args.split) if task == "seg" else data.LargestShape(args.split)
    if task == "cls":
        size = args.size or trained.get("image_size", 224)
        return data.TinyImageNet(args.data_path, args.split, size, train=False)
    root = Path(args.data_path)
    mapped = data.label_ids(root, data.find_layout(root))       # goes before the training's rule
    zero_is_class = args.zero_is_class or not mapped and trained.get("zero_is_class", False)
    return data.FolderSegmentation(root, args.split, zero_is_class=zero_is_class)


def class_table(matrix, classes):
    """{class: {"IoU": .., ...}} in percent, None where there is none to count; a name that occurs
    twice gets the class's number."""
    columns, table = matrix.figures(), {}
    for k, name in enumerate(classes):
        name = name if classes.count(name) == 1 else f"{name} ({k})"
        row = {key: round(100 * column[k].item(), 2) for key, column in columns.items()}
        table[name] = {key: None if math.isnan(value) else value for key, value in row.items()}
    return table


def print_classes(matrix, table, classes):
    """The table, and the three largest mistakes."""
    print(f"{'class':<28}{'IoU':>8}{'Acc':>8}{'precision':>11}{'F1':>8}")
    for name, figures in table.items():
        iou, acc, precision, f1 = ["-" if x is None else f"{x:.2f}" for x in figures.values()]
        print(f"{name[:27]:<28}{iou:>8}{acc:>8}{precision:>11}{f1:>8}")
    wrong = (matrix.counts - matrix.counts.diag().diag()).flatten()
    counts, cells = wrong.topk(min(3, len(wrong)))
    worst = [f"{classes[cell // len(classes)]} taken for {classes[cell % len(classes)]} "
             f"{100 * count / matrix.counts.sum():.2f} %"
             for count, cell in zip(counts, cells) if count]
    print(f"worst confusions, of all labelled pixels: {', '.join(worst) or 'none'}")


def measure(args, model, dataset, processes, protocol):
    """Evaluate on the whole set; rank 0 writes the figures as JSON and prints them."""
    result = {"model": str(model.spec), "weights": args.checkpoint or args.pretrain,
              "data": args.data_path or "shapes", "split": args.split, "images": len(dataset)}
    common = model, dataset, processes, args.batch_size, args.workers
    if model.task == "cls":
        figures = evaluate_cls(*common, args.amp)
    else:
        matrix = evaluate_seg(*common, **protocol)
        figures, table = matrix.summary(), class_table(matrix, dataset.classes)
        result |= protocol | {"classes": table, "confusion": matrix.counts.tolist()}
    loss = figures.pop("val_loss")
    result |= {name: round(value, 2) for name, value in figures.items()} | {"loss": round(loss, 4)}
    if args.json and processes.rank == 0:       # first: no trouble with printing loses the figures
        data.write_json(args.json, result)
    if args.json == "-" or processes.rank > 0:
        return
    words = [f"{result['model']} on {result['data']} {args.split}, {len(dataset)} images"]
    if model.task == "seg":         # a figure means little without the protocol
        print_classes(matrix, table, dataset.classes)
        words += [f"{key.replace('_', ' ')} {value}" for key, value in protocol.items()
                  if value not in (None, False, "off", [1.0])]
    for old, new in [pair for pair in zip(model.classes, dataset.classes) if len({*pair}) == 2][:1]:
        print(f"note: classes had other names in training, one {old!r}, here {new!r}")
    figures = ", ".join(f"{name} {value:.2f} %" for name, value in figures.items())
    print(f"{', '.join(words)}: {figures}, loss {loss:.4f}")


def main(argv=None):
    args = arguments(argv)
    processes = data.start(args.device)
    quiet = processes.rank > 0 or args.json == "-"
    if args.json and not quiet:
        with data.naming(f"--json {args.json}"):        # found out before the work
            open(args.json, "a").close()
    model, task, trained = None, args.task, {}
    if args.checkpoint:
        model = models.load(args.checkpoint)
        task, trained = model.task, model.args
    models.no_effect(args, task == "cls", "on a classifier",
                     "images scales flip slide size_divisor zero_is_class")
    models.no_effect(args, task == "cls" and args.size == 0, "on a classifier", "size")
    dataset = open_dataset(args, task, trained) if args.data_path or not args.images else None
    model = model or load_public(args, dataset, quiet)
    model.to(processes.device, memory_format=torch.channels_last)
    short_side = (model.size or 512) if args.size is None else args.size or None
    protocol = {"short_side": short_side, "scales": args.scales, "flip": args.flip,
                "slide": args.slide, "size_divisor": args.size_divisor, "amp": args.amp}
    if args.images:
        return save_pictures(model, args, processes, protocol)
    if dataset.num_classes != model.num_classes:
        raise UserError(f"--data-path {args.data_path}: {dataset.num_classes} classes, the model "
                        f"has {model.num_classes}; give its data, or all names in id2label.json")
    measure(args, model, dataset, processes, protocol)


if __name__ == "__main__":
    data.run(main)
