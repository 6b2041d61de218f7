"""Processes, data sets, augmentation and pictures: all between the disk and the first convolution.

    python data.py PATH [--zero-is-class] [--out sheet.png]

checks a folder of images and masks before hours are spent on it: sizes, classes and their share of
the pixels, every unreadable or mismatched file by name (exit status 1 if there is one), and a
contact sheet. Without PATH it shows the embedded `Shapes`.

Conventions. Images are RGB; labels are 0..K-1, and 255 is ignored. Augmentation is a pure function
of (seed, epoch, view, index): it does not depend on the number of workers, on the order of requests
or on any global random state.
"""
import argparse
import colorsys
import ctypes
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
import traceback
import unicodedata
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2
from tqdm import tqdm

from layers import UserError

IGNORED = 255
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)    # ImageNet, on the 0..1 scale
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


# ---- Processes -----------------------------------------------------------------------------------

class Processes(NamedTuple):
    """This process among all: rank of world, and the device that it works on."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


_store = None    # where the processes leave notes for each other, beside the group's exchanges


def start(device=None, timeout=300):
    """Join the group that torchrun describes in the environment; alone under plain `python`.
    device: "cpu", "cuda" or "cuda:N"; CUDA where there is one, if None. timeout: the seconds after
    which a process that does not answer is an error. -> Processes"""
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        place = {name: os.environ.get(name, alone) for name, alone in place.items()}
    elif "WORLD_SIZE" in os.environ:
        print("note: WORLD_SIZE is set, but not by torchrun: working alone", file=sys.stderr)
    try:
        rank, world, local_rank, local_world = map(int, place.values())
        range(world)[rank]
    except (ValueError, IndexError):
        raise UserError("RANK, WORLD_SIZE: not as torchrun sets them; unset them") from None
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: no such device; use cpu, cuda or cuda:N")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        here = torch.cuda.device_count()
        if device.index >= here or (name != "cuda" and local_world > 1):
            raise UserError(f"--device {name}: {here} GPUs for {local_world} processes, each needs "
                            "its own; use --device cuda or cpu, or start fewer")
        torch.cuda.set_device(device)
        # One precision for matrix products and convolutions: TF32, float32's range in 19 bits.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    elif world > 1:
        torch.set_num_threads(max(1, cores() // local_world))    # torchrun would leave 1
    if world > 1:
        _join(rank, world, device, timeout)
    return Processes(rank, world, device)


def _join(rank, world, device, timeout):
    """Wait for all processes, for 10 minutes at least, then form the group."""
    global _store
    address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    wait, attempt = max(timeout, 600), "0"
    # Python's handlers do not run while C++ waits: until it is done, signals just end the process.
    handlers = handle(signal.SIG_DFL)
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives a restart: without keys of their own, the processes of the
            # second attempt would read the addresses of the first one's dead processes.
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            socket.create_connection(address, timeout=30).close()    # or torchrun has died already
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=wait)))
        _store = dist.PrefixStore(f"attempt {attempt}", store)
        if silent := _silent("here", rank, world, wait):
            raise ValueError(f"no sign of {silent}")
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout),
                                store=_store, rank=rank, world_size=world, device_id=gpu)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"process {rank} of {world} cannot join the others: {reason}; are all of "
                        f"them started, and can they reach {':'.join(address)}?") from None
    handle(*handlers)


def _silent(note, rank, world, seconds):
    """Leave a note for the others and wait for theirs. -> who has left none, as text, or ''"""
    keys = [f"{note} {other}" for other in range(world)]
    _store.set(keys[rank], "")
    end = time.monotonic() + seconds
    while not _store.check(keys) and time.monotonic() < end:    # its wait() would log the time-out
        time.sleep(0.1)
    silent = [str(other) for other in range(world) if not _store.check([keys[other]])]
    return f"process {', '.join(silent)}" if silent else ""


def broadcast(value):
    """Process 0's value (anything that can be pickled) on every process."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0)
    return box[0]


def share_buffers(model):
    """Give all processes the buffers of process 0: each has BatchNorm statistics of its own."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def seed_of(seed, step, rank):
    """The number for torch.manual_seed before a step: with it no random state has to be saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def cores():
    """Number of processor cores that this process may use; on macOS, that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_memory(device):
    """GiB at most so far: held by tensors on a GPU, else resident in this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 30, 2)
    unit = 1 if sys.platform == "darwin" else 2 ** 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30, 2)


def keep_memory(keep=True):
    """Tell glibc to keep freed memory for later, or to behave as usual again: the page faults of
    the large pieces that a step asks for again and again cost up to a fifth of its time."""
    with suppress(OSError, AttributeError):    # another C library: everything stays as it is
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0 if keep else 65536)        # M_MMAP_MAX of malloc.h
        mallopt(-1, -1 if keep else 2 ** 17)     # M_TRIM_THRESHOLD; -1 is the largest


def tune(device, deterministic):
    """Settings of a training script. deterministic: CUDA repeats its sums exactly, at some cost."""
    # A 1x1 kernel can be described by several strides, which DDP warns of for no reason.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    if device.type == "cpu":
        keep_memory()
    elif deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True      # tries all algorithms on the first batch


# ---- Stopping and failing ------------------------------------------------------------------------

def handle(first, second=None):
    """Set what SIGTERM and SIGINT do, the same if only one is given. -> what they did"""
    return signal.signal(signal.SIGTERM, first), signal.signal(signal.SIGINT, second or first)


class Stopped(BaseException):    # not an Exception: nothing may take it for an error
    """A signal asked this process (0: another one of its group, by SIGTERM) to end."""

    def __init__(self, signum, advice="a training run goes on with the same command"):
        self.signum = signum or signal.SIGTERM
        super().__init__(f"stopped by {signal.Signals(self.signum).name}: {advice}")


class Stop:
    """What SIGTERM and SIGINT do while `run` runs a script.
    The first one raises Stopped at once. Inside `with STOP.postponed():` it is remembered instead,
    for a loop to ask STOP.pending after each step, and raises Stopped where the block ends. The
    second one ends the process at once."""
    pending, time = 0, 0.0      # number of the first signal, and when it came
    is_postponed = False

    @contextmanager
    def postponed(self):
        self.is_postponed = True
        yield
        self.is_postponed = False
        if self.pending:
            raise Stopped(self.pending)

    def __call__(self, signum, _):
        if not self.pending:
            self.pending, self.time = signum, time.monotonic()
            if not self.is_postponed:
                raise Stopped(signum)
        # Ctrl-C reaches a process of torchrun twice, from the terminal and from torchrun.
        elif not dist.is_torchelastic_launched() or time.monotonic() - self.time > 1:
            os._exit(128 + signum)


STOP = Stop()


def run(main):
    """Call a script's main(). What a user or the machine can cause ends in one line, no traceback.
    The exit status is 1 after an error, 128 + N after signal N. Nothing is tidied up after one: the
    other processes of a group may be inside an exchange that this one will not join."""
    handle(STOP)
    os.register_at_fork(after_in_child=partial(handle, signal.SIG_IGN))    # the loaders' processes
    # Class names that stdout cannot print are escaped; in a file each line is there at once.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    warnings.filterwarnings("ignore", module="PIL")    # they name no file; what is bad raises
    if dist.is_torchelastic_launched():
        # Where torchrun dies, and nobody would see or end this process, Linux sends SIGTERM.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, Stopped) as error:
        handle(signal.SIG_DFL)    # from here on a signal just ends the process
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # the loaders' ends are no crash
        for child in multiprocessing.active_children():
            child.kill()
        if isinstance(error, BrokenPipeError):    # `| head` has read enough
            os._exit(128 + signal.SIGPIPE)
        # Mostly all meet the same mistake: torchrun ends the others before they say it too.
        time.sleep(min(1, int(os.environ.get("LOCAL_RANK", 0))))
        with suppress(OSError):    # the same Ctrl-C may have ended what reads stderr
            if not isinstance(error, Stopped):
                print(_explained(error) or traceback.format_exc(), file=sys.stderr)
            elif os.environ.get("RANK", "0") == "0":    # all processes stop: one of them says so
                print(error, file=sys.stderr)
        os._exit(128 + error.signum if isinstance(error, Stopped) else 1)


FAULTS = {    # what the type and message of a library's error contain: what is said in its place
    "out of memory|ALLOC_FAILED|^MemoryError|can't allocate memory|not enough memory":
        "out of memory; try a lower --batch-size, --amp bf16, in training --accum, --checkpointing",
    "DataLoader worker .*(exited|killed)|shared memory|Too many open files|ancdata":
        "a loader's process died (memory, /dev/shm, open files?); try a lower --workers, or 0",
    "more than 1 value per channel": "BatchNorm of one 1 x 1 map; use --batch-size 2 or more",
    "deterministic implementation": "--deterministic: a block cannot be so on CUDA; leave it out",
    "CxxCompiler|CppCompileError|find C compiler|TritonMissing|working triton":
        "--compile: needs a working C++ compiler (CXX names it), and on CUDA Triton"}


def _explained(error):
    """One line on an error that a user or the machine can cause; None for one of the program."""
    text = f"{type(error).__name__}: {error}".strip()
    if isinstance(error, UserError):    # a loader's process sends it inside a traceback
        return "error: " + text.rpartition("UserError: ")[2]
    for pattern, line in FAULTS.items():
        if re.search(pattern, text):
            return f"error: {line}"
    if isinstance(error, OSError):
        file = f"{shown(error.filename)}: " if error.filename else ""
        return f"error: {file}{error.strerror or shown(text.splitlines()[-1])}"
    if not (dist.is_initialized() and isinstance(error, RuntimeError)):
        return None
    rank, silent = dist.get_rank(), ""
    with suppress(RuntimeError):    # the store may have gone as well
        silent = _silent("failed", rank, dist.get_world_size(), seconds=2)
    if re.search("Timed out|timeout", text):
        return f"error: process {rank} waited too long for {silent or 'another one'}"
    if "NCCL" in text:
        return f"error: process {rank}: {text.splitlines()[-1]}; NCCL_DEBUG=INFO tells more"
    if isinstance(error, dist.DistError) or re.search("gloo|by peer", text):
        return f"process {rank} stops because another one has; its message says why"
    return None


# ---- Loaders -------------------------------------------------------------------------------------

class EpochSampler(Sampler):
    """This rank's share of a shuffle that is a pure function of (seed, epoch).
    Yields keys (epoch, view, index): with the epoch in the key the workers hold no state.
    `repeats` > 1 is repeated augmentation (Hoffer et al., "Augment your batch", CVPR 2020; DeiT's
    RASampler): an image is drawn `repeats` times in a row, in different views that go to
    neighbouring ranks, and an epoch of the same length shows 1/repeats of the images."""

    def __init__(self, size, processes, seed, repeats):
        self.size, self.seed, self.repeats = size, seed, repeats
        self.rank, self.world = processes.rank, processes.world
        self.epoch = self.start = 0      # start: how many of the epoch's keys have been used before

    def __len__(self):
        # The remainder is dropped: every rank must take the same number of steps.
        return self.size // self.world

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for number in range(self.start, len(self)):
            position = number * self.world + self.rank
            yield self.epoch, position % self.repeats, int(order[position // self.repeats])


def train_loader(dataset, batch_size, processes, seed, workers, accum=1, repeats=1):
    """Shuffled, sharded, whole batches only; call set_epoch before each epoch."""
    sampler = EpochSampler(len(dataset), processes, seed, repeats)
    if len(sampler) < batch_size * accum:
        raise UserError(f"--batch-size {batch_size}, --accum {accum}: the {len(dataset)} images do "
                        f"not fill a step of {processes.world} processes; use less")
    return _loader(dataset, batch_size, processes, workers, sampler=sampler, drop_last=True)


def eval_loader(dataset, batch_size, processes, workers, collate=list):
    """Every index once over all ranks, without padding; collate: a list of items -> a batch."""
    shard = range(processes.rank, len(dataset), processes.world)
    return _loader(dataset, batch_size, processes, workers, sampler=shard, collate_fn=collate)


def _loader(dataset, batch_size, processes, workers, **options):
    """workers None: a GPU's share of the cores, at most 8; 2 on the CPU."""
    on_gpu = processes.device.type == "cuda"
    if workers is None:
        share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, share) if on_gpu else 2
    # The loader draws its workers' seeds from `generator`: its own leaves the run's stream alone.
    return DataLoader(dataset, batch_size, num_workers=workers, worker_init_fn=_start_worker,
                      persistent_workers=workers > 0, pin_memory=on_gpu,
                      generator=torch.Generator().manual_seed(0), **options)


def _start_worker(_):
    """The training process ends its loaders: a cluster's SIGTERM to all must not do it."""
    keep_memory(False)
    handle(signal.SIG_IGN)


def set_epoch(loader, epoch, start=0):
    """Let the next pass over a train_loader draw `epoch`, from its batch number `start` on."""
    loader.sampler.epoch, loader.sampler.start = epoch, start * loader.batch_size


def take(batches, count, device):
    """The next `count` batches, on their way to the device. -> list of lists of tensors"""
    return [[part.to(device, non_blocking=True) for part in next(batches)] for _ in range(count)]


def progress(iterable, title, rank=0, total=None, pause=30):
    """A tqdm bar in the terminal of process 0; in a file, such as a cluster's log, a line each
    `pause` seconds (if its set_postfix is given refresh=False: else it would draw each time)."""
    def write(text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    options = {}
    if not sys.stderr.isatty():
        lines = SimpleNamespace(write=write)
        options = dict(file=lines, mininterval=pause, maxinterval=pause, delay=pause)
    return tqdm(iterable, title, total, leave=False, disable=rank > 0, **options)


class EpochDataset(Dataset):
    """Takes keys (epoch, view, index), or a plain index for view 0 of epoch 0."""
    first_id = 0     # of class 0 in a stored mask
    ids = None       # or {id in a mask: class}
    problems = []    # messages on files that were left out

    def __len__(self):
        return len(self.paths)

    def draw(self, key):
        """-> the index in a key, and the random generator of its view"""
        epoch, view, index = key if isinstance(key, tuple) else (0, 0, key)
        # + 1: (seed, epoch) alone is the order's.
        return index, np.random.default_rng((self.seed, epoch, view + 1, index))

    def fingerprint(self):
        """Short text that tells this data set from others; "" where it is drawn by this file."""
        return ""

    def check(self, counts=None):
        """-> notes on what is odd, a line each; UserError if nothing can be learned from it."""
        return []


# ---- Reading files -------------------------------------------------------------------------------

def shown(path):
    """A path for a message: always one line, and printable on any terminal."""
    return ascii(str(path))[1:-1]


@contextmanager
def opened(path, any_depth=False):
    """A file as a Pillow image of a sane size, not yet decoded.
    Whatever Pillow raises inside, and any ValueError, becomes a UserError that names the file. Raw
    pixels: an EXIF rotation is ignored, as the masks ignore it."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):    # reading a pipe would never end
            raise ValueError("is not a regular file")
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:    # 89 M: Pillow only warns
                raise ValueError(f"{image.width}x{image.height} pixels, a decompression bomb?")
            # convert("RGB") would clip everything above 255 to white.
            if image.mode.startswith(("I", "F")) and not any_depth:
                raise ValueError(f"16-bit or float (mode {image.mode}), and 8 bits are needed")
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:
        reason = shown(getattr(error, "strerror", None) or error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "is not an image"
        raise UserError(f"{shown(path)}: {reason}; repair, convert or remove the file") from None


@contextmanager
def naming(place, *faults):
    """Errors of the disk and faults become UserErrors; all begin with the name of the file."""
    try:
        yield
    except (UserError, OSError, *faults) as error:
        raise UserError(f"{shown(place)}: {getattr(error, 'strerror', None) or error}") from None


def write_json(path, value):
    """Write to the file of --json, or print for "-"."""
    text = json.dumps(value, indent=1)
    if path == "-":
        return print(text)
    with naming(f"--json {path}"):
        Path(path).write_text(text + "\n")


def read_text(path, parse):
    """parse(text of a small UTF-8 file, with or without a byte-order mark)."""
    with naming(path, ValueError, RecursionError):
        if path.stat().st_size > 2 ** 22 or not path.is_file():
            raise ValueError("not a file of at most 4 MiB")
        return parse(path.read_text("utf-8-sig"))


def read_json(path):
    """A small JSON file; a key that stands there twice is an error."""
    def table(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    return read_text(path, partial(json.loads, object_pairs_hook=table))


def read_mask(path):
    """A mask's ids as they are stored: (H, W) uint8 or int32. Palette masks give indices."""
    with opened(path, any_depth=True) as image:
        lossy = image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
        if lossy or image.format not in ("PNG", "BMP", "TIFF"):
            raise ValueError(f"{image.format} may change the ids of a mask; export it anew as PNG")
        refuse_turned(image)
        mode, stored = image.mode, str([tile[3] for tile in image.tile])
        mask = np.array(image)
        if mode == "RGB" and ";16" not in stored and (mask == mask[..., :1]).all():
            return mask[..., 0]
        if mode.startswith("I"):
            return mask.astype(np.int32)
        if mode not in ("L", "P", "1"):
            raise ValueError(f"mode {mode}, and a mask has one id per pixel (modes L, P, I, 1)")
    mask = mask.astype(np.uint8, copy=False)
    # Pillow inverts a TIFF in which 0 is white, and spreads 2 and 4 bits of grey over 0..255.
    if gray := re.search(r"'[1L];([24]?)(I?)", stored):
        if gray[2]:
            mask = (255 if mode == "L" else 1) - mask
        mask = mask // {"": 1, "2": 85, "4": 17}[gray[1]]
    return mask


def refuse_turned(image):
    """Pillow turns a TIFF, and nothing else, as its header says: off its partner's pixels."""
    if getattr(image, "tag_v2", {}).get(274, 1) != 1:
        raise ValueError("its header turns or mirrors it; save it as it is seen")


def contents(folder):
    """What a folder holds, for a message; of one that does not exist, what its parent does."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    paths = sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name))
    names = [shown(path.name) + ("/" if path.is_dir() else "") for path in paths[:8]]
    if len(paths) > 8:
        names.append(f"... ({len(paths)} in all)")
    return f"{shown(folder)} holds {', '.join(names) or 'nothing'}"


def files_below(folder):
    """Names from there of all files below a folder; links to folders are followed, each once."""
    def fail(error):
        raise error

    top = Path(folder).resolve()
    seen = {top, *top.parents}    # a link to one of them would lead round and round
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in files)
        real = {name: Path(place, name).resolve() for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]
        seen.update(real.values())


def scan(folder, suffixes, end="", twins=False):
    """Files of some suffixes, by what their names are before `end`, below a folder.
    -> {stem: path}, sorted, where a stem has its sub-folders before it and a letter with an accent
    is one character (a Mac writes two). Hidden files are skipped; two of one stem are an error.
    twins: -> {name: path}, and they are none."""
    if not folder.is_dir():
        raise UserError(f"{shown(folder)}: no such folder; {contents(folder)}")
    found = {}
    for name in sorted(files_below(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes or not stem.endswith(end) or "/." in "/" + name:
            continue
        key = name if twins else unicodedata.normalize("NFC", stem.removesuffix(end))
        if key in found:
            raise UserError(f"{shown(found[key])}, {shown(name)}: the same stem; remove one")
        found[key] = folder / name
    if not found:
        what = "images" if suffixes is IMAGE_FILES else "masks (JPEG would change their ids)"
        types = " ".join(f"*{end}{suffix}" for suffix in sorted(suffixes))
        raise UserError(f"{shown(folder)}: no {what} like {types}; {contents(folder)}")
    return found


def fingerprint(root, paths, *texts):
    """16 characters that depend on names below root, on sizes of files, and on texts."""
    files = [f"{os.path.relpath(path, root)}\n{os.stat(path).st_size}\n" for path in sorted(paths)]
    text = "".join(files) + json.dumps(texts)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


# ---- Training views for segmentation -------------------------------------------------------------

YIQ = np.array([[0.299, 0.587, 0.114],
                [0.595716, -0.274453, -0.321263],
                [0.211456, -0.522591, 0.311135]])
RGB = np.linalg.inv(YIQ)
TRIES, LARGEST = 10, 0.75    # crops drawn in search of one with at most 3/4 of a single class


def random_color(rng):
    """Arguments of color_matrix, each with probability 1/2, in PhotoMetricDistortion's ranges."""
    apply = rng.random(4) < 0.5
    hue = math.pi / 5               # 18 of OpenCV's 180 steps are 36 degrees
    value = rng.uniform([-32, 0.5, 0.5, -hue], [32, 1.5, 1.5, hue])
    return np.where(apply, value, [0, 1, 1, 0])


def color_matrix(brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0):
    """A distortion of colours and ImageNet's normalisation, of RGB in 0..255. -> float32 (3, 4)
    x -> A (x + brightness) with A = contrast * Y^-1 diag(1, saturation * rotation(hue, radians)) Y
    and Y = RGB -> YIQ (the NTSC matrix). mmseg's PhotoMetricDistortion computes in HSV; in YIQ all
    is linear: the contrast may come before or after (mmseg tosses a coin for the order)."""
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    matrix = contrast * RGB @ [[1, 0, 0], [0, cos, -sin], [0, sin, cos]] @ YIQ
    offset = matrix.sum(1, keepdims=True) * brightness
    mean, std = MEAN.numpy()[:, 0], STD.numpy()[:, 0]    # (3, 1)
    weight, bias = matrix / (255 * std), (offset / 255 - mean) / std
    return torch.from_numpy(np.concatenate([weight, bias], 1).astype(np.float32))


def normalise(images, colour=None):
    """uint8 images -> float32 with ImageNet's statistics, on the same device.
    images (..., 3, H, W) alone are normalised only. Training views (B, 4, H, W) with their colour
    (B, 3, 4) are distorted as well, by one affine map: the fourth plane of a view is 1 where the
    image is, so that its padding becomes 0. Colours are clipped once, at the end.
    -> (B, 3, H, W), channels_last"""
    images = images.float()
    if colour is None:
        for c, (scale, shift) in enumerate(zip(1 / (255 * STD), MEAN / STD)):
            images[..., c, :, :].mul_(scale.item()).sub_(shift.item())    # on a GPU no upload
        return images
    colour = colour[..., None, None]
    out = colour[:, :, 3] * images[:, 3:]
    for k in range(3):
        out.addcmul_(colour[:, :, k], images[:, k:k + 1])
    for c, (mean, std) in enumerate(zip(MEAN.flatten().tolist(), STD.flatten().tolist())):
        out[:, c].clamp_(-mean / std, (1 - mean) / std)
    return out.contiguous(memory_format=torch.channels_last)


def training_view(image, labels, crop, rng, scale=(0.5, 2.0), base=None):
    """An opened PIL image and its labels (h, w) uint8 -> view, labels, colour for a training step.
    Resize to scale * (4 base, base) = (long, short side) keeping the ratio, base = crop if None;
    crop, flip, pad right and below. The view is uint8 (4, crop, crop): RGB, and 1 where the image
    is; labels uint8 (crop, crop), padded with 255; colour float32 (3, 4), for `normalise`.
    Only what the crop shows is cut out and resized: the corner is drawn on source pixels, so the
    sampling grid is that of resizing the whole image (antialiased bilinear; the labels nearest), up
    to the taps beyond the cut at the corner's two edges. libjpeg decodes a JPEG that shrinks by 2
    or more at 1/2, 1/4 or 1/8 (`draft`), within about one grey level of the filter it replaces."""
    w, h = image.size
    base = base or crop
    factor = rng.uniform(*scale) * min(4 * base / max(w, h), base / min(w, h))
    size = max(1, int(h * factor + 0.5)), max(1, int(w * factor + 0.5))
    image.draft(None, size[::-1])
    unit = round(w / image.size[0])    # source pixels per decoded pixel
    step = h / size[0], w / size[1]    # source pixels per pixel of the view
    shape = min(crop, size[0]), min(crop, size[1])
    span = [int((full - part) * s) // unit for full, part, s in zip(size, shape, step)]
    grid = [((np.arange(n) + 0.5) * s).astype(np.int64) for n, s in zip(shape, step)]
    for _ in range(TRIES + 1):
        corner = [int(rng.integers(n + 1)) * unit for n in span]
        rows, columns = corner[0] + grid[0], corner[1] + grid[1]
        # A sixteenth of the pixels is enough to see whether one class covers the crop.
        counts = np.bincount(labels[rows[::4]][:, columns[::4]].ravel(), minlength=256)[:IGNORED]
        if counts.max() < LARGEST * counts.sum():
            break
    part = _resized_part(image, corner, shape, step, unit)
    patch = torch.from_numpy(labels.take(rows, 0).take(columns, 1))
    if rng.random() < 0.5:
        part, patch = part.flip(-1), patch.flip(-1)
    padding = 0, crop - shape[1], 0, crop - shape[0]
    view = F.pad(part, (*padding, 0, 1))
    view[3, :shape[0], :shape[1]] = 1
    return view, F.pad(patch, padding, value=IGNORED), color_matrix(*random_color(rng))


def _resized_part(image, corner, shape, step, unit):
    """Cut out and resize what the view shows. -> (3, h, w) uint8"""
    y, x = (c // unit for c in corner)
    step = [s / unit for s in step]
    taps = [math.ceil((n + 1) * s + max(1, s)) for n, s in zip(shape, step)]    # pixels to be read
    box = x, y, min(image.width, x + taps[1]), min(image.height, y + taps[0])
    part = np.array(image.crop(box).convert("RGB"))
    # torch's uint8 kernel is 4 times as fast as Pillow's resize. It wants channels_last, which this
    # order of views gives; the factor, not the size, fixes its grid, and 1e-9 keeps
    # floor(pixels * factor) from losing the last pixel to rounding.
    part = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    factor = [1 / s * (1 + 1e-9) for s in step]
    part = F.interpolate(part, scale_factor=factor, mode="bilinear", antialias=True)
    return part[0, :, :shape[0], :shape[1]]


# ---- Segmentation data in folders ----------------------------------------------------------------

IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
MASK_FILES = {".png", ".bmp", ".tif", ".tiff"}
UNNAMED = re.compile("unlabell?ed|unknown|background|void|ignored?|other|none", re.IGNORECASE)


class Layout(NamedTuple):
    """Where a data set has its files: {} is the split's folder, * what image and mask share."""
    images: str
    masks: str
    splits: tuple = ("train", "val")    # names of the folders for training and validation
    ids: dict | None = None             # {id in a mask: class}, if the usual rule does not hold
    classes: list | None = None         # the names of these classes


CITY = [row for row in Cityscapes.classes if 0 <= row.train_id < IGNORED]    # the 19 to be learned
CITY_NAMES = [row.name for row in CITY]

LAYOUTS = {
    "ADE20K": Layout("images/{}/*", "annotations/{}/*", ("training", "validation")),
    "ADE20K, short names": Layout("images/{}/*", "annotations/{}/*"),
    "the original project's": Layout("image/{}/*", "mask/{}/*"),
    "images beside masks": Layout("images/{}/*", "masks/{}/*"),
    "a folder for each split": Layout("{}/images/*", "{}/masks/*"),
    "Cityscapes with labelTrainIds": Layout(
        "leftImg8bit/{}/*_leftImg8bit", "gtFine/{}/*_gtFine_labelTrainIds",
        ids={row.train_id: row.train_id for row in CITY}, classes=CITY_NAMES),
    "Cityscapes": Layout("leftImg8bit/{}/*_leftImg8bit", "gtFine/{}/*_gtFine_labelIds",
                         ids={row.id: row.train_id for row in CITY}, classes=CITY_NAMES),
}


class FolderSegmentation(EpochDataset):
    """A folder of images and of masks with the same stems, in one of the LAYOUTS.
    split: "train" or "val". By default id 0 of a mask is "unlabelled" and id k is class k-1;
    zero_is_class=True keeps the ids; 255 is ignored either way. A label_map.json {id: class} beside
    the folders replaces this rule: all ids that it does not name are ignored. The classes are
    `read_classes`'s, else there are as many as the masks' largest id says; `classes` gives those
    that another split has found. Item without crop: (image uint8 (3, H, W), label uint8 (H, W),
    path of the image); with crop: `training_view`, whose `base` is scale_base. A bad file is a
    UserError; strict=False collects files without a partner in .problems instead."""

    def __init__(self, root, split, crop=None, seed=0, zero_is_class=False, strict=True,
                 classes=None, scale_base=None):
        self.root, self.split, self.crop, self.seed = Path(root), split, crop, seed
        self.scale_base = scale_base
        self.layout = find_layout(self.root)
        layout = LAYOUTS[self.layout]
        self.paths, self.problems = pair(self.root, layout, split)
        if self.problems and strict:
            raise UserError(f"{self.problems[0]} (one of {len(self.problems)}; data.py lists them)")
        self.all_paths = list(self.paths)
        with suppress(UserError):      # a split that is not there, or is not asked for
            self.all_paths += pair(self.root, layout, "val" if split == "train" else "train")[0]
        self._set_labels(layout, zero_is_class, classes)
        self.colors = distinct_colors(self.num_classes)
        if self.classes == CITY_NAMES:
            self.colors = np.array([row.color for row in CITY], np.uint8)

    def _set_labels(self, layout, zero_is_class, classes):
        """The classes, and the label of each id in a mask."""
        self.ids = ids = label_ids(self.root, self.layout)
        if ids and zero_is_class:
            raise UserError("--zero-is-class: the label map says it for id 0 too; leave it out")
        self.first_id = 0 if ids or zero_is_class else 1
        self.rule = "id k of a mask is class k-1, 0 and 255 are ignored"
        if ids:
            self.rule = "a label map says which class an id of a mask is, other ids are ignored"
        elif zero_is_class:
            self.rule = "id k of a mask is class k, 255 is ignored"
        names = classes or read_classes(self.root, zero_is_class)
        if not names and ids == layout.ids:
            names = layout.classes
        count = max(ids.values()) + 1 if ids else 1
        if not names and not ids:
            # The masks of both splits, which must agree on the classes.
            for _, path in progress(self.all_paths, "looking for class ids"):
                with suppress(UserError):    # it is reported when it is read for its pixels
                    mask = read_mask(path)
                    largest = int(mask.max(initial=0, where=mask < IGNORED))
                    count = max(count, largest + 1 - self.first_id)
        names = names or [f"class {k}" for k in range(count)]
        if count > len(names):
            raise UserError(f"{shown(self.root)}: class {count - 1} of the label map is beyond the "
                            f"{len(names)} classes (0 is the first); correct one of them")
        self.classes, self.num_classes = names, len(names)
        # -1 is an error; ids that do not fit into 16 bits are looked up in the last place.
        self.table = np.full(2 ** 16 + 1, IGNORED if ids else -1, np.int16)
        self.table[[0, IGNORED]] = IGNORED
        ids = ids or {k + self.first_id: k for k in range(self.num_classes)}
        self.table[list(ids)] = list(ids.values())

    def __getitem__(self, key):
        index, rng = self.draw(key)
        path, mask_path = self.paths[index]
        labels = self.labels(mask_path)
        with opened(path) as image:
            check_pair(path, image, mask_path, labels.shape[::-1])
            if self.crop:
                return training_view(image, labels, self.crop, rng, base=self.scale_base)
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return pixels, torch.from_numpy(labels), str(path)

    def labels(self, path):
        """A mask file as labels: (H, W) uint8, 0..K-1 and 255."""
        mask = read_mask(path)
        labels = self.table.take(mask if mask.dtype == np.uint8 else mask.clip(-1, 2 ** 16))
        if labels.min() < 0:
            raise UserError(f"{shown(path)}: id {mask[labels < 0][0]} is beyond {self.num_classes} "
                            f"classes ({self.rule}); correct it, or add a label_map.json")
        return labels.astype(np.uint8)

    def fingerprint(self):
        """Of both splits, wherever they lie, and of classes and ids."""
        pairs = sorted(self.all_paths)
        # Some masks are read: an edited one may have its old size.
        sums = [zlib.crc32(mask.read_bytes()) for _, mask in some(pairs, 100)]
        rule = self.classes, self.first_id, self.ids
        return fingerprint(self.root, itertools.chain(*pairs), sums, rule)

    def count_pixels(self, limit=None):
        """Pixels of each label, (256,), in all masks of this split, or in some, evenly spread."""
        masks = [mask for _, mask in some(self.paths, limit or len(self))]
        with ThreadPoolExecutor() as pool:
            labels = progress(pool.map(self.labels, masks), "masks", total=len(masks))
            return sum(np.bincount(part.ravel(), minlength=256) for part in labels)

    def check(self, counts=None, limit=100):
        """-> notes on what is odd about the labels of this split, a line each.
        counts: of pixels of each label, (256,); without them, those of `limit` masks, evenly
        spread, and every file to validate on is looked at: a bad one would end a run after its
        first epoch. UserError for such a file, and for labels from which nothing can be learned."""
        where = ""
        if counts is None:
            for path, mask_path in self.paths if self.split == "val" else ():
                with opened(mask_path, any_depth=True) as mask, opened(path) as image:
                    check_pair(path, image, mask_path, mask.size)
            for number in (min(limit, len(self)), len(self)):    # some may lack a rare class
                counts, where = self.count_pixels(number), f" in {number} masks"
                if np.count_nonzero(counts[:IGNORED]) > 1:
                    break
        names = [shown(name) for name in self.classes]
        missing = [name for name, count in zip(names, counts) if not count]
        seen = [name for name in names if name not in missing]
        if len(seen) < (2 if self.split == "train" else 1):
            advice = "correct the map"
            if not self.ids:
                advice = 'masks of 0 and 255 need a label_map.json {"0": 0, "255": 1}'
            if self.first_id:
                advice += "; --zero-is-class makes a class of id 0"
            found = f"only '{seen[0]}'" if seen else "no class"
            raise UserError(f"{shown(self.root)}: {found} in the masks of {self.split} "
                            f"({self.rule}); {advice}")
        notes = []
        if (share := counts[IGNORED] / counts.sum()) > 0.5:
            notes.append(f"{100 * share:.0f} % of the pixels{where} are ignored")
        if missing:
            notes.append(f"{len(missing)} of {self.num_classes} classes do not occur{where}: "
                         + ", ".join(missing[:5]))
        if missing and names[0] == "class 0" and not self.ids:
            notes.append("the ids in the masks skip; a label_map.json {id: class} makes them dense")
        if self.first_id and names[-1] in missing and UNNAMED.fullmatch(names[0]):
            notes.append(f"the first class is '{names[0]}', the last does not occur: if that is id "
                         "0 of the masks, leave it out of the names, or pass --zero-is-class")
        return [f"{self.split}: {note}" for note in notes]


def check_pair(path, image, mask_path, mask_size):
    refuse_turned(image)
    if image.size != mask_size:
        raise UserError(f"{shown(mask_path)}: the mask is {mask_size[0]}x{mask_size[1]}, its image "
                        f"{shown(path)} is {image.width}x{image.height}; they must be equal")


def find_layout(root):
    """The name of the layout of which a folder has most: images and masks, of both splits."""
    if not root.is_dir():
        raise UserError(f"{shown(root)}: no such folder")
    found = {}    # of each layout: how many of its folders have files of it, and how many are there
    for name, layout in LAYOUTS.items():
        places = [root / pattern.format(split)
                  for pattern, split in itertools.product(layout[:2], layout.splits)]
        there = [place for place in places if place.parent.is_dir()]
        full = [place for place in there if any(Path(file).match(f"{place.name}.*")
                                                for file in files_below(place.parent))]
        found[name] = len(full), len(there)
    best = max(found, key=found.get)
    if not any(found[best]):
        known = "; ".join(sorted({f"{row.images}, {row.masks}" for row in LAYOUTS.values()}))
        raise UserError(f"{contents(root)}: none of the layouts {known} ({{}}: a split's folder)")
    return best


def pair(root, layout, split):
    """-> [(image, mask)] by stem, sorted; messages on files without a partner."""
    problems, split = [], layout.splits[split == "val"]
    image, mask = (root / pattern.format(split) for pattern in (layout.images, layout.masks))
    images = scan(image.parent, IMAGE_FILES, image.name[1:])
    masks = scan(mask.parent, MASK_FILES, mask.name[1:])
    end = ""    # what the masks' stems have after their images', as in IMG_1_mask.png of IMG_1.jpg
    if not images.keys() & masks.keys():
        first = next(iter(masks))
        ends = [first[len(stem):] for stem in images if first.startswith(stem)]
        end = max(ends, key=lambda end: sum(stem + end in masks for stem in images), default="")
    masks = {stem.removesuffix(end): path for stem, path in masks.items()}
    for files, others, wanted in ((images, masks, f"mask {layout.masks.format(split)}{end}.png"),
                                  (masks, images, f"image {layout.images.format(split)}.*")):
        problems += [f"{shown(path)}: no {shown(wanted.replace('*', stem, 1))}; add it, or remove "
                     "this file" for stem, path in files.items() if stem not in others]
    return [(images[stem], masks[stem]) for stem in images if stem in masks], problems


def read_classes(root, zero_is_class):
    """Class names of id2label.json or else of ADE20K's objectInfo150.txt; [] without either.
    id2label.json: {"0": "wall", ...}, ["wall", ...], {"wall": 0, ...} or a config.json of the
    Hugging Face hub, with the classes' numbers and not the masks' ids."""
    path, info = root / "id2label.json", root / "objectInfo150.txt"
    if not path.exists():
        if not info.is_file():
            return []
        lines = read_text(info, str.splitlines)[1:151]    # Idx  Ratio  Train  Val  [Stuff]  Name
        names = [line.split("\t")[-1].strip() for line in lines if line.strip()]
        return ["other", *names] if zero_is_class else names
    table, names = read_json(path), {}
    with suppress(ValueError, TypeError, AttributeError):
        table = dict(enumerate(table)) if isinstance(table, list) else table.get("id2label", table)
        for key, name in table.items():
            if type(name) is int:
                key, name = name, key
            names[int(key)] = name.strip()
    if (not 0 < len(names) < IGNORED or sorted(names) != list(range(len(table)))
            or any(len(name.splitlines()) != 1 or len(name) > 200 for name in names.values())):
        raise UserError(f'{shown(path)}: must be {{"0": "name", "1": "name", ...}} without a gap, '
                        "for at most 254 classes; a name has one line, of 1 to 200 characters")
    return [names[k] for k in range(len(names))]


def label_ids(root, layout):
    """{id in the masks: class} of label_map.json, {"7": 0, "8": 1, ...}, else the layout's."""
    path, ids = root / "label_map.json", {}
    if not path.exists():
        return LAYOUTS[layout].ids
    with suppress(ValueError, TypeError, AttributeError):
        ids = {int(key): value for key, value in read_json(path).items()}
    if not ids or not all(type(k) is int and 0 <= k < IGNORED and 0 <= i < 2 ** 16
                          for i, k in ids.items()):
        raise UserError(f'{shown(path)}: must be {{"7": 0, "8": 1, ...}}: id in the masks (up to '
                        "65535), class (up to 254); ids that it does not name are ignored")
    return ids


def class_weights(dataset, source):
    """Weights of the classes for the loss, float32 (K,).
    source: "balanced" for the inverse square root of a class's share of the labelled pixels of a
    training set, scaled to a mean of 1 over these pixels, a class that does not occur as the rarest
    one; or a JSON file {class: weight}, where classes that it does not name have the weight 1."""
    if source == "balanced":
        counts = dataset.count_pixels()[:dataset.num_classes]
        weights = np.maximum(counts, counts[counts > 0].min()) ** -0.5
        return torch.tensor(weights * counts.sum() / (weights * counts).sum()).float()
    table, weights = read_json(Path(source)), []
    if isinstance(table, dict) and table.keys() <= set(dataset.classes):
        weights = [table.get(name, 1) for name in dataset.classes]
    if not any(weights) or not all(type(w) in (int, float) and 0 <= w < 1e6 for w in weights):
        raise UserError(f"--class-weights {shown(source)}: must be {{class: weight, ...}}, with "
                        "names of classes and numbers from 0 on that are not all 0")
    return torch.tensor(weights, dtype=torch.float32)


# ---- The embedded segmentation data --------------------------------------------------------------

class Shapes(EpochDataset):
    """Textured shapes on two textured grounds, drawn and not stored.
    Image i of a split is a pure function of (split, i). Colour narrows a shape down to two classes
    and no further: disc and pearl (a disc inside a square) share a family of hues, square and star,
    ring and cross; only the triangle has its own. The grounds have any greyish colour and differ in
    texture. Items as those of FolderSegmentation; in training the scale is drawn from 0.8..1.25."""
    classes = ["plain ground", "striped ground", "disc", "square", "triangle", "star", "ring",
               "cross", "pearl"]
    num_classes = len(classes)
    colors = np.array([[150, 150, 160], [95, 105, 130], [230, 60, 60], [250, 170, 40],
                       [245, 235, 90], [80, 190, 90], [60, 200, 220], [70, 100, 235],
                       [215, 110, 230]], np.uint8)
    HUES = {2: 0.0, 8: 0.0, 3: 0.33, 5: 0.33, 6: 0.62, 7: 0.62, 4: 0.83}    # of the shapes
    SIZE = 64
    COUNT = {"train": 1000, "val": 100}

    def __init__(self, split, crop=None, seed=0):
        self.split, self.crop, self.seed = split, crop, seed
        number = ("train", "val").index(split)
        drawn = [draw_shapes(number, index, self.SIZE) for index in range(self.COUNT[split])]
        # Tensors, not arrays: workers started by spawn or forkserver then share the memory.
        self.images, self.labels = (torch.from_numpy(np.stack(part)) for part in zip(*drawn))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, rng = self.draw(key)
        image, labels = self.images[index], self.labels[index]
        if self.crop:
            return training_view(Image.fromarray(image.numpy()), labels.numpy(), self.crop, rng,
                                 scale=(0.8, 1.25))
        return image.permute(2, 0, 1), labels, f"shapes/{self.split}/{index:05d}"

    def count_pixels(self):
        return self.labels.flatten().bincount(minlength=256).numpy()


def draw_shapes(split, index, size):
    """-> image (size, size, 3) uint8, labels (size, size) uint8."""
    rng = np.random.default_rng((0, split, index))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size * 2 - 1    # -1..1
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.2)
    u, v = _turned(x, y, angle)
    wave = u + bend * np.sin(4 * v + rng.uniform(0, 6))
    labels = (wave > rng.uniform(-0.5, 0.5)).astype(np.uint8)
    plain, striped = _texture(rng, x, y, "plain"), _texture(rng, x, y, "striped")
    image = np.where(labels[..., None] == 0, plain, striped)
    for _ in range(rng.integers(3, 5)):
        kind = int(rng.integers(2, 9))
        radius = rng.uniform(0.32, 0.46)
        center, turn = rng.uniform(-0.8, 0.8, 2), rng.uniform(0, 2 * np.pi)
        if kind == 8:    # a pearl comes with its square around it
            _paint(rng, image, labels, x, y, 3, center, 1.2 * radius, turn)
            radius *= 0.55
        _paint(rng, image, labels, x, y, kind, center, radius, turn)
    image += rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels


def _turned(x, y, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _paint(rng, image, labels, x, y, kind, center, radius, turn):
    """Draw a shape (a class from 2 on) of the given circumradius over what is there."""
    x, y = (x - center[0]) / radius, (y - center[1]) / radius
    u, v = _turned(x, y, turn)
    r, around = np.hypot(u, v), np.arctan2(v, u)
    sector = 2 * np.pi / (3 if kind == 4 else 5)
    wedge = np.abs(around / sector % 1 - 0.5) * sector    # the angle to the nearest edge's normal
    inside = {
        2: lambda: r < 0.8,
        3: lambda: np.maximum(abs(u), abs(v)) < 0.72,
        4: lambda: r * np.cos(wedge) < 0.5,
        5: lambda: r * np.cos(np.pi / 5 - wedge + 0.63) < 0.40,
        6: lambda: abs(r - 0.68) < 0.24,
        7: lambda: (np.minimum(abs(u), abs(v)) < 0.26) & (np.maximum(abs(u), abs(v)) < 0.9),
        8: lambda: r < 0.9,
    }[kind]()
    hue = Shapes.HUES[kind] + rng.uniform(-0.06, 0.06)
    color = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.5, 0.9)))
    texture = _texture(rng, x, y, rng.choice(["plain", "striped", "speckled"]), color)
    image[inside] = texture[inside]
    labels[inside] = kind


def _texture(rng, x, y, kind, color=None):
    """A colour, any greyish one if None, with a gentle slope, under a wave or in flecks."""
    if color is None:
        color = rng.uniform(60, 180) + rng.uniform(-25, 25, 3)
    other = color * rng.uniform(0.4, 1.6)
    along, _ = _turned(x, y, rng.uniform(0, np.pi))
    if kind == "plain":
        mix = 0.15 * along
    elif kind == "striped":    # the stripes always show
        other = color + np.sign(128 - color.mean()) * rng.uniform(50, 90)
        mix = 0.5 + 0.5 * np.sin(rng.uniform(22, 30) * along)
    else:
        mix = 0.6 * (rng.random(x.shape) < 0.25)
    return color + (other - color) * mix[..., None]


class LargestShape(Shapes):
    """Shapes for classification: which kind of shape covers the most pixels?"""
    classes = Shapes.classes[2:]       # without the two grounds
    num_classes = len(classes)

    def __getitem__(self, key):
        image, labels, *rest = super().__getitem__(key)
        counts = labels.flatten().bincount(minlength=256)[2:2 + self.num_classes]
        colour = rest[0][None] if self.crop else None
        return normalise(image[None], colour)[0], int(counts.argmax())


# ---- Classification data -------------------------------------------------------------------------

class TinyImageNet(EpochDataset):
    """Tiny-ImageNet-200, or any tree train/CLASS/*.jpg + val/CLASS/*.jpg.
    Item: (float32 (3, S, S), class). val/ may be the official one (val/images and
    val_annotations.txt) or restructured. The class is the position in the sorted folder names of
    train/, always. Grey images become RGB.
    Training is DeiT's recipe (Touvron et al. 2021, table 9), part by part; jitter acts only without
    rand_augment, as in timm and the published runs. RandAugment is torchvision's at the magnitude,
    fill and bicubic sampling of the recipe's rand-m9-mstd0.5-inc1. Unlike timm's, its 2 operations
    always act (timm: each with probability 1/2), at 9 of 10 (timm: normal, deviation 0.5);
    posterize keeps 4 bits (timm: 1); the list has Identity, but neither Invert nor SolarizeAdd.
    Evaluation: short side to S / 0.875 (bicubic), centre S x S. At S = 64 the border of a 64 x 64
    image is not seen, which matches the magnification of the training crops."""

    def __init__(self, root, split, image_size=224, train=None, seed=0, rand_augment=True,
                 jitter=0.4, erase=0.25):
        self.root, self.seed = Path(root), seed
        files = class_folders(self.root / "train")
        self.classes, self.num_classes = list(files), len(files)
        if split != "train":
            files = validation_files(self.root / "val", self.classes)
        self.paths = [(path, k) for k, name in enumerate(self.classes) for path in files[name]]
        train = split == "train" if train is None else train
        how = v2.InterpolationMode.BICUBIC
        steps = [v2.Resize(int(image_size / 0.875), how), v2.CenterCrop(image_size)]
        if train:
            steps = [v2.RandomResizedCrop(image_size, interpolation=how), v2.RandomHorizontalFlip()]
            if rand_augment:    # 11 bins put torchvision's magnitudes on timm's scale of 0..10
                steps.append(v2.RandAugment(2, 9, 11, how, fill=[124, 116, 104]))
            elif jitter:
                steps.append(v2.ColorJitter(jitter, jitter, jitter))
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                  v2.Normalize(MEAN.flatten().tolist(), STD.flatten().tolist())]
        if train and erase:
            steps.append(v2.RandomErasing(erase, scale=(0.02, 1 / 3), value="random"))
        self.transform = v2.Compose(steps)

    def fingerprint(self):
        """Names and sizes of the files of both splits, wherever they lie."""
        files = [*class_folders(self.root / "train").values(),
                 *validation_files(self.root / "val", self.classes).values()]
        return fingerprint(self.root, itertools.chain(*files))

    def __getitem__(self, key):
        index, rng = self.draw(key)
        path, label = self.paths[index]
        with opened(path) as image:
            image = image.convert("RGB")
        with torch.random.fork_rng(devices=()):    # torchvision draws from the CPU's global stream
            torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
            return self.transform(image).as_subclass(torch.Tensor), label


def class_folders(folder):
    """{class: [paths]} of FOLDER/CLASS/*.jpg, or in sub-folders of CLASS, sorted by class."""
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    files = {place.name: list(scan(place, IMAGE_FILES, twins=True).values()) for place in places
             if place.is_dir() and not place.name.startswith(".")}
    if not files or set(files) == {"images", "masks"}:    # those are of segmentation
        raise UserError(f"{shown(folder)}: no class folders here; {contents(folder)}")
    return files


def validation_files(folder, classes):
    """{class: [paths]} of val/, flat as the official one or in folders; classes: train/'s."""
    annotations, files = folder / "val_annotations.txt", {}
    if annotations.exists() and (folder / "images").is_dir():
        for line in filter(str.strip, read_text(annotations, str.splitlines)):
            name, label, *_ = [*line.split("\t"), ""]
            files.setdefault(label, []).append(folder / "images" / name)
    else:
        files = class_folders(folder)
    for name in sorted(files.keys() ^ set(classes)):
        raise UserError(f"{shown(folder)}: class {shown(name)} is in train/ or val/ only; give both"
                        " the same classes (in val_annotations.txt: FILE, a tab, CLASS)")
    return files


# ---- Pictures ------------------------------------------------------------------------------------

GAP, LINE = 8, 22                # of a contact sheet
INKS = ("#1f5fbf", "#d0442f", "#2f8f4f", "#8a4fb0", "#b07800", "#555555", "#1798a6", "#c2378f")
# Where the label of a point may stand in a plot: the text's anchor, the direction from the point.
AROUND = (("lm", 1, 0), ("rm", -1, 0), ("ms", 0, -1), ("mt", 0, 1),
          ("lm", 1, -1), ("lm", 1, 1), ("rm", -1, -1), ("rm", -1, 1))
ROUND = [k * 10.0 ** n for n, k in itertools.product(range(-30, 300), (1, 2, 5))]


def distinct_colors(count):
    """(count, 3) uint8, none of them dark or light: each as far as possible, in nearly CIELAB's
    distances, from those before it and from black (ignored)."""
    grid = np.indices((12, 12, 12)).reshape(3, -1).T / 11
    to_xyz = np.array([[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]])
    x, y, z = np.cbrt(to_xyz @ (grid ** 2.2).T)
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    usable = (30 < lab[:, 0]) & (lab[:, 0] < 90)
    chosen, distances = [], np.linalg.norm(lab, axis=1) * usable
    for _ in range(count):
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return (255 * grid[chosen]).round().astype(np.uint8)


def colorize(labels, colors):
    """Labels (H, W) -> uint8 (H, W, 3); ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[:len(colors)] = colors
    return table[np.asarray(labels)]


def fitted(picture, side=320):
    """An image (H, W, 3) or labels (H, W), uint8, scaled to a longer side of `side` pixels."""
    picture = Image.fromarray(np.asarray(picture))
    size = [max(1, round(n * side / max(picture.size))) for n in picture.size]
    how = Image.Resampling.BICUBIC if picture.mode == "RGB" else Image.Resampling.NEAREST
    return np.array(picture.resize(size, how, reducing_gap=3.0))


def contact_sheet(rows, path, titles, classes, colors, side=320):
    """Write rows of pictures, each `fitted`, under the titles of the columns, as a PNG on white.
    classes, colors: of the legend at the bottom; if pictures are labels, of those that occur."""
    rows = [[fitted(picture, side) for picture in row] for row in rows]
    pictures, font = sum(rows, []), ImageFont.load_default(14)
    labels = [picture.ravel() for picture in pictures if picture.ndim == 2]
    seen = np.unique(np.concatenate(labels)) if labels else range(len(classes))
    legend = [(classes[k], tuple(colors[k])) for k in seen if k < len(classes)]
    legend.append(("ignored", (0, 0, 0)))
    step = max(picture.shape[1] for picture in pictures) + GAP
    width = max(200, GAP + step * max(len(row) for row in rows))
    columns = width // 190    # of the legend
    tops = np.cumsum([LINE, *(max(map(len, row)) + GAP for row in rows)]).tolist()
    height = tops[-1] + LINE * math.ceil(len(legend) / columns)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, title in enumerate(titles):
        draw.text((GAP + k * step, 2), title, "black", font)
    for row, top in zip(rows, tops):
        for k, picture in enumerate(row):
            picture = colorize(picture, colors) if picture.ndim == 2 else picture
            sheet.paste(Image.fromarray(picture), (GAP + k * step, top))
    for k, (name, color) in enumerate(legend):
        x, y = GAP + k % columns * (width // columns), tops[-1] + k // columns * LINE
        draw.rectangle((x, y, x + 22, y + 15), color, "black")
        draw.text((x + 28, y - 1), drawable(name, font, width // columns - 40), "black", font)
    sheet.save(path, "PNG")


def drawable(text, font, width):
    """A name as a font can draw it: one line of printable characters, cut to a width in pixels."""
    text = "".join(c if c.isprintable() else "?" for c in str(text)[:200])
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "\u2026"
    return text


def ticks(low, high, log=False):
    """Round numbers that enclose a range: multiples of one, or, for a logarithmic axis, several."""
    marks = ROUND
    if not log:
        step = ROUND[np.searchsorted(ROUND, (high - low or abs(high) or 1) / 5)]
        marks = [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 2)]
    first, last = np.searchsorted(marks, low, "right") - 1, np.searchsorted(marks, high)
    return marks[first:max(last, first + 1) + 1]


def plot(path, series, x_label, y_label, lines=True):
    """Draw series, {name: [(x, y) or (x, y, label, spread), ...]}, as lines or else, over a
    logarithmic x, as points, each with its label and a bar from y - spread to y + spread.
    path: where the PNG goes, or None. Points that are not finite are left out. -> Pillow's image"""
    left, top, right, bottom, font = 120, 80, 1390, 850, ImageFont.load_default(26)
    sheet = Image.new("RGB", (1440, 960), "white")
    draw = ImageDraw.Draw(sheet)
    series = {name: [(*p, "", 0)[:4] for p in points if math.isfinite(p[0] + p[1])]
              for name, points in series.items()}
    points = sum(series.values(), []) or [(1, 0, "", 0)]
    x, y, spread = np.array([(x, y, spread) for x, y, _, spread in points]).T
    xs, ys = ticks(x.min(), x.max(), not lines), ticks((y - spread).min(), (y + spread).max())
    scale = np.asarray if lines else np.log10

    def place(x, y):
        return (np.interp(scale(x), scale((xs[0], xs[-1])), (left, right)),
                np.interp(y, (ys[0], ys[-1]), (bottom, top)))

    for x in xs:
        at, _ = place(x, ys[0])
        draw.line((at, top, at, bottom), "#e4e4e4", 2)
        draw.text((at, bottom + 14), f"{x:.6g}", "black", font, "mt")
    for y in ys:
        _, at = place(xs[0], y)
        draw.line((left, at, right, at), "#e4e4e4", 2)
        draw.text((left - 14, at), f"{y:.6g}", "black", font, "rm")
    draw.line((left, top, left, bottom, right, bottom), "black", 3)
    draw.text(((left + right) / 2, 940), x_label, "black", font, "ms")
    draw.text((20, top - 24), y_label, "black", font, "ls")
    end, labels = right, []
    for (name, points), ink in zip(series.items(), itertools.cycle(INKS)):
        name = drawable(name, font, 300)
        draw.text((end, top - 24), name, ink, font, "rs")
        end -= font.getlength(name) + 40
        if lines and len(points) > 1:
            draw.line([place(x, y) for x, y, *_ in points], ink, 5, "curve")
            continue
        for x, y, label, spread in points:
            draw.line((*place(x, y - spread), *place(x, y + spread)), ink, 4)
            x, y = place(x, y)
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), ink)
            if label:
                labels.append((x, y, drawable(label, font, 400), ink))
    for x, y, text, ink in labels:
        # The nearest place where there is nothing so far, or the last; a line leads there.
        for far, (anchor, dx, dy) in itertools.product(range(20, 240, 20), AROUND):
            spot = x + far * dx, y + far * dy
            box = draw.textbbox(spot, text, font, anchor, stroke_width=8)
            if np.min(sheet.crop(box)) >= 228:
                break
        draw.line((x, y, *spot), ink, 2)
        draw.text(spot, text, ink, font, anchor)
    sheet = sheet.reduce(2)      # drawn at twice the size, as Pillow's edges are hard
    if path:
        sheet.save(path, "PNG")
    return sheet


def draw_curves(path, rows, metric):
    """Draw the loss and a metric over the epochs of a run's log; a row may lack the metric."""
    def curve(key):
        return [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]

    losses = {"training": curve("loss"), "validation": curve("val_loss")}
    panels = [plot(None, losses, "epoch", "loss"),
              plot(None, {"validation": curve(metric)}, "epoch", f"{metric} (%)")]
    Image.fromarray(np.concatenate(panels)).save(path, "PNG")


# ---- python data.py: check a data set ------------------------------------------------------------

def some(items, count):
    """At most `count` of the items, evenly spread."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def open_splits(root, zero_is_class):
    """{split: dataset} of a folder, whose layout and label rule it prints, or of Shapes."""
    if not root and zero_is_class:
        raise UserError("--zero-is-class: no effect without a folder of masks; leave it out")
    if not root:
        return {split: Shapes(split) for split in ("train", "val")}
    layout, datasets, classes = LAYOUTS[find_layout(root)], {}, None
    splits = [split for split, name in zip(("train", "val"), layout.splits)
              if (root / layout.images.format(name)).parent.is_dir()]
    for split in splits or ["train"]:
        dataset = FolderSegmentation(root, split, zero_is_class=zero_is_class, strict=False,
                                     classes=classes)
        datasets[split], classes = dataset, dataset.classes
    print(f"layout: {dataset.layout} ({layout.images}, {layout.masks}); {dataset.rule}")
    return datasets


def read_all(split, dataset, problems):
    """Print what the items of a split hold; add to problems. -> indices of good items"""
    def measure(index):
        try:
            image, labels, _ = dataset[index]
        except UserError as error:
            return str(error)
        return image.shape[2], image.shape[1], index, np.bincount(labels.flatten(), minlength=256)

    with ThreadPoolExecutor() as pool:    # Pillow frees the interpreter while it decodes
        results = pool.map(measure, range(len(dataset)))
        results = list(progress(results, split, total=len(dataset)))
    problems += dataset.problems + [result for result in results if isinstance(result, str)]
    good = [result for result in results if not isinstance(result, str)]
    print(f"{split}: {len(dataset)} images, {len(good)} of them good")
    if not good:
        return []
    widths, heights, indices, counts = zip(*good)
    print(f"  width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)} pixels")
    print("  id in masks  class  pixels %  images")
    counts = np.stack(counts)    # (images, 256)
    ids = dataset.ids or {k + dataset.first_id: k for k in range(dataset.num_classes)}
    for k, name in [*enumerate(dataset.classes), (IGNORED, "(ignored)")]:
        stored = ",".join(str(id_) for id_, label in ids.items() if label == k)
        share, images = 100 * counts[:, k].sum() / counts.sum(), (counts[:, k] > 0).sum()
        print(f"  {stored:>11} {k:>6} {share:9.3f} {images:7}  {shown(name)}")
    try:
        for note in dataset.check(counts.sum(0)):
            print(f"note: {note}")
    except UserError as error:
        problems.append(str(error))
    return indices


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Check a data set: read every file, list the bad ones, draw a contact sheet.")
    add = parser.add_argument
    add("path", nargs="?", type=Path, help="the data set's folder; without it, the embedded shapes")
    add("--zero-is-class", action="store_true", help="id 0 of a mask is a class, not 'unlabelled'")
    add("--out", default="sheet.png", help="where the contact sheet goes (default: %(default)s)")
    args = parser.parse_args(argv)
    problems, rows = [], []
    for split, dataset in open_splits(args.path, args.zero_is_class).items():
        for index in some(read_all(split, dataset, problems), 4):
            image, labels, _ = dataset[index]
            rows.append([fitted(image.permute(1, 2, 0)), fitted(labels)])
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if rows:
        with naming(f"--out {args.out}"):
            contact_sheet(rows, args.out, ["image", "labels"], dataset.classes, dataset.colors)
    if problems:
        raise UserError(f"{shown(args.path)}: faults: {len(problems)}, listed above")
    print(f"every file is good; some of them are drawn in {args.out}")


if __name__ == "__main__":
    run(main)
