"""Images <-> tokens: the data, the two tokenizers, and the cache of encoded tokens.

D2C describes one picture twice, on one grid of h x w places:

    image (B,3,H,W) in [-1,1]
     |- VQTokenizer.encode -> codes   (B,h,w) int64, one of K codebook rows per place: the coarse picture
     '- KLTokenizer.encode -> moments (B,2C,h,w), mean and log-variance of C numbers per place: the fine picture

Both are convolutional autoencoders of one family (Esser et al. 2021, arXiv 2012.09841, section 3.1) and differ in
what happens at the bottleneck:

    VQ   z -> nearest row of a codebook     loss = |x - x'|^2 + |sg(z) - e|^2 + 0.25 |z - sg(e)|^2     (sg: no gradient)
    KL   z ~ N(mean, variance)              loss = |x - x'|^2 + weight * KL( N(mean, variance) || N(0, 1) )

The same classes hold LlamaGen's VQ-16 and MAR's KL-16 (`from_published`), and small ones that train in a minute.

Reading order: what the scripts share, images, the convolutional family, the two tokenizers, the token cache.
"""
import argparse
import colorsys
import contextlib
import json
import math
import os
import re
import shutil
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, Subset

# ---------------------------------------------------------------------------------------------------------------------
# Shared by the scripts: errors, files, devices and processes
# ---------------------------------------------------------------------------------------------------------------------


class InputError(Exception):
    """Something the user gave cannot be used. The message names the file or flag and the remedy."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line (and exit status 2) without the usage text above it."""

    def error(self, message):
        message = str(message).split("tokenizers.InputError: ")[-1]  # DataLoader workers wrap it in a traceback
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def plain_errors(self):
        """What a user can cause ends in one line and exit status 2; everything else is a bug and keeps its traceback."""
        try:
            yield
        except InputError as error:
            self.error(error)
        except OSError as error:
            self.error(f"{error.filename or 'a file'}: {error.strerror or error}")
        except torch.OutOfMemoryError:
            self.error("the device's memory is full: use a smaller --batch-size (in training also --accumulate, --checkpointing)")
        except KeyboardInterrupt:
            self.exit(130, "interrupted; the same command again goes on where it can\n")
        except RuntimeError as error:
            if not (dist.is_initialized() and "peer" in str(error)):
                raise
            self.exit(2)  # another process of this run has stopped, and has said why


def positive(text):
    """argparse type: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def not_negative(text):
    """argparse type: a finite number of at least 0."""
    if not 0 <= (value := float(text)) < math.inf:
        raise ValueError
    return value


def seed_number(text):
    """argparse type: an integer from 0 to 2^63 - 1."""
    if not 0 <= (value := int(text)) < 2**63:
        raise ValueError
    return value


def write_atomically(path, write):
    """write(temporary path), then rename: a reader sees the old file or the new one, never half of one. The temporary name
    keeps the suffix. Raises InputError, with the old file untouched, when that fails."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not point to content that a power cut can still lose
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); free space or choose another --out") from error


def read_checkpoint(path, mmap=True):
    """The dict in a torch file, on the CPU, without running any code from it. With `mmap` a tensor is read when it is used,
    and the file stays open as long as one is: right for what is copied elsewhere.

    Raises InputError for a file that is missing, truncated, damaged, no torch file, or wants to unpickle arbitrary objects
    (an argparse Namespace, which training scripts like to store, is the one harmless exception).
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        zipped = zipfile.is_zipfile(path)  # all but very old files
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if record := archive.testzip():  # torch itself does not look at the checksums it writes
                    raise ValueError(f"the checksum of {record} is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except Exception as error:  # a damaged file can fail in any layer of zip and pickle
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint ({reason}); it may be truncated or of another kind") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dict of weights")
    return content


def load_published(build, path, prefer_ema=True, content=None):
    """`build(state)` on the state dict inside a published checkpoint file, or inside its `content` if that is read already.

    The containers of LlamaGen (`model`, `ema`, `module`, `state_dict`, or bare) and MAR (`model_ema`, `model`) are
    unwrapped, DDP and compile prefixes stripped. Raises InputError naming the file and the keys that do not fit.
    """
    state = content or read_checkpoint(path)
    order = ["model_ema", "ema", "model", "module", "state_dict"]
    for name in order if prefer_ema else order[2:] + order[:2]:
        if isinstance(state.get(name), dict):
            state = state[name]
            break
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no state dict under {', '.join(order)} or at the top level")
    try:
        return build(state)
    except Exception as error:  # weights of another kind can fail anywhere in building
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)[:400]
        raise InputError(f"{path}: the weights do not fit: {reason}") from error


def crc_of(model):
    """A checksum of a model's weights, to recognise them by."""
    crc = 0
    for name, value in model.state_dict().items():
        crc = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def check_space(folder, size, what):
    """Raises InputError unless `size` bytes are free where `folder` is, or will be."""
    place = next(parent for parent in (Path(folder).resolve(), *Path(folder).resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(f"{folder}: {what} need {size / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; "
                         "free space or choose another --out")


def choose_device(name):
    """torch.device for `--device auto|cuda|mps|cpu`. Raises InputError for one that this machine or torch build lacks."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name}: not available here; use --device cpu, or install a torch build for it")
    return torch.device(name)


class Processes:
    """This process among `size`, on `device`; with one process nothing is ever communicated and no process group made.
    Raises InputError for a device that is not there."""

    def __init__(self, device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))  # among those of this node
        self.device = choose_device(device)
        self.one_node = self.size == int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.size > 1:
            if self.device.type == "cuda":
                if self.local_rank >= torch.cuda.device_count():
                    raise InputError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs")
                self.device = torch.device("cuda", self.local_rank)
                torch.cuda.set_device(self.device)
            # Encoding and sampling drift apart for long before they meet again: hence the patience.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=12))

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def mean(self, value):
        """The mean of a tensor over processes."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value / self.size

    def gather(self, x):
        """Concatenate the processes' equally shaped slices in rank order, which is the order of the whole batch."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def end(self):
        if self.size > 1:
            dist.destroy_process_group()


class SharedArrays:
    """Arrays on disk that the processes of one node fill together, batch by batch, and that outlive an interruption.

    folder/NAME.npy as `layout` says, {name: (dtype, shape)}; plan.json, what they are made from; done.npy, a flag per batch.
    With the same plan the work goes on where it was, with another it starts again: `todo` are the batches left to this
    process. Raises InputError when the disk has no room for them and `extra` bytes; all of it is taken at once, for a full
    disk under a memory map kills the process.
    """

    def __init__(self, folder, plan, layout, batches, processes, extra=0):
        if not processes.one_node:
            raise InputError(f"{folder}: its processes must share files, so they must run on one node")
        layout = layout | {"done": (np.bool_, (batches,))}
        folder, plan = Path(folder), json.dumps(plan, indent=1)
        if processes.rank == 0:
            try:
                before = (folder / "plan.json").read_bytes() if (folder / "plan.json").exists() else None
                if before != plan.encode():
                    if before:
                        processes.say(f"{folder}: was begun with other settings or data; starting again")
                    for name in ("plan.json", *(f"{name}.npy" for name in layout)):
                        (folder / name).unlink(missing_ok=True)
                    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())
                    check_space(folder, size + extra, "its arrays" if not extra else "the samples, as they come and as one file,")
                    folder.mkdir(parents=True, exist_ok=True)
                    for name, (dtype, shape) in layout.items():
                        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
                        if hasattr(os, "posix_fallocate"):  # Linux
                            with open(folder / f"{name}.npy", "rb+") as file:
                                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
                    write_atomically(folder / "plan.json", lambda temporary: temporary.write_text(plan))
            except (OSError, ValueError) as error:
                raise InputError(f"{folder}: cannot be written ({error}); free space or choose another --out") from error
        processes.wait()
        try:
            self.arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "r+") for name in layout}
            for name, (dtype, shape) in layout.items():
                if (self.arrays[name].dtype, self.arrays[name].shape) != (dtype, shape):
                    raise ValueError(f"{name}.npy has another shape")
            left = np.flatnonzero(~self.arrays["done"])
        except Exception as error:  # a damaged header can fail in any way
            raise InputError(f"{folder}: damaged ({error}); delete it and run the command again") from error
        processes.wait()  # nobody marks a batch before all have looked
        self.todo, self.finished = left[processes.rank::processes.size].tolist(), batches - len(left)
        self.written, self.flushed = [], time.time()

    def mark(self, batch):
        """This batch is written. Every few seconds what is written goes to the disk, and then counts as done."""
        self.written.append(batch)
        if time.time() - self.flushed > 2 or batch == self.todo[-1]:
            for name, array in self.arrays.items():
                if name != "done":
                    array.flush()
            self.arrays["done"][self.written] = True
            self.arrays["done"].flush()
            self.written, self.flushed = [], time.time()


def bf16_wanted(device, dtype):
    """Does `--dtype auto|bf16|float32` mean bf16 matrix products on this device? By default on GPUs that have them."""
    return dtype == "bf16" or (dtype == "auto" and device.type == "cuda"
                               and torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(device, dtype):
    """bf16 matrix products where wanted; never fp16, the source of the originals' NaNs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_wanted(device, dtype))


def seed_of(*numbers):
    """One 63-bit seed from several numbers, well mixed. Their count is mixed in: (1, 2) and (1, 2, 0) must differ."""
    return int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def clock(seconds):
    hours, seconds = divmod(int(seconds), 3600)
    return (f"{hours}:" if hours else "") + f"{seconds // 60:02d}:{seconds % 60:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def center_crop(image, size):
    """ADM's centre crop, the preprocessing of all published ImageNet numbers.

    image: uint8 (H,W,3) array -> uint8 (size,size,3) array. Halved with a box filter while it stays larger than
    twice `size`, then bicubic to the short side, then cropped; small images are enlarged.
    Source: guided-diffusion, `image_datasets.py` (Dhariwal & Nichol 2021).
    """
    image = Image.fromarray(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def to_float(images):
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """float (B,3,H,W) in about [-1,1] -> uint8 (B,H,W,3). Truncating 127.5x + 128 (ADM) rounds 127.5x + 127.5 (MAR)."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def read_image(path, size):
    """Decode one picture file of whatever kind and centre-crop it: uint8 (size,size,3). As in ADM, orientation tags and
    transparency are ignored. Raises InputError naming an unreadable file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip it to white instead of scaling it
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return center_crop(np.asarray(image.convert("RGB")), size)
    except Exception as error:  # every format and codec fails in its own way
        raise InputError(f"{path}: not a readable image ({error}); repair or remove it, or let train.py --skip-bad pass it "
                         "over") from error


class ImageFolder(Dataset):
    """One folder per class (the ImageNet layout); sorted folder names give the class ids. Items: (uint8 (S,S,3), id); with
    `skip_bad` an unreadable file is a black picture of class -1 instead of an InputError."""

    SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

    def __init__(self, root, size, skip_bad=False):
        self.size, self.skip_bad = size, skip_bad
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes = [folder.name for folder in folders]
        if not folders:
            raise InputError(f"--data {root}: holds no class folders; expected {root}/CLASS/IMAGE.jpg")
        self.files, empty = [], []
        for label, folder in enumerate(folders):
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.SUFFIXES)
            if not found:
                empty.append(folder.name)
            self.files += [(path, label) for path in found]
        if not self.files:
            raise InputError(f"--data {root}: the class folders hold no images ({' '.join(sorted(self.SUFFIXES))})")
        if empty:
            print(f"warning: --data {root}: class folders without images ({', '.join(empty[:3])}{', ...' * (len(empty) > 3)}; "
                  f"{len(empty)} in all); their class ids stay unused")
        names = "\n".join(str(path.relative_to(root)) for path, _ in self.files)
        self.fingerprint = f"{zlib.crc32(os.fsencode(names)):08x}"

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        try:
            return read_image(path, self.size), label
        except InputError:
            if not self.skip_bad:
                raise
            return np.zeros((self.size, self.size, 3), np.uint8), -1


class ImageArray(Dataset):
    """An .npz with `images` uint8 (N,H,W,3), integer `labels` (N,) and, if one likes, `classes`, their names in the order of
    the labels. Items: (uint8 (S,S,3), label)."""

    def __init__(self, path, size):
        self.size = size
        try:
            with np.load(path, allow_pickle=False) as file:
                if "images" not in file or "labels" not in file:
                    raise InputError(f"--data {path}: needs the arrays images and labels, has {', '.join(file.files)}")
                self.images, self.labels = file["images"], file["labels"]
                names = [str(name) for name in file["classes"]] if "classes" in file else None
        except InputError:
            raise
        except Exception as error:  # zip, zlib and npy headers each fail in their own way
            raise InputError(f"--data {path}: not a readable .npz ({error})") from error
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[-1] != 3:
            raise InputError(f"--data {path}: images must be uint8 (N,H,W,3), not {self.images.dtype} {self.images.shape}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype.kind not in "iu":
            raise InputError(f"--data {path}: labels must be integers of shape ({len(self.images)},), "
                             f"not {self.labels.dtype} {self.labels.shape}")
        if not len(self.labels) or self.labels.min() < 0:
            raise InputError(f"--data {path}: needs at least one image, and labels from 0 upwards")
        self.classes = names or [str(label) for label in range(int(self.labels.max()) + 1)]
        if len(self.classes) <= self.labels.max():
            raise InputError(f"--data {path}: classes holds {len(self.classes)} names and labels go up to {self.labels.max()}; "
                             "name them all, or leave classes out")
        self.fingerprint = f"{zlib.crc32(self.labels.tobytes(), zlib.crc32(self.images)):08x}"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        if image.shape[:2] != (self.size, self.size):
            image = center_crop(image, self.size)
        return image, int(self.labels[index])


class Shapes(Dataset):
    """Built-in data, drawn on the fly: ten shapes (what the codes must tell) filled with a fine texture (what they lose).

    Picture i depends on (seed, i) only; all lengths are shares of `size`, so that 32, 64 and 256 pixels show the same.
    Items: (uint8 (S,S,3), label).
    """

    classes = ["circle", "square", "triangle", "star", "cross", "ring", "heart", "moon", "arrow", "hourglass"]

    def __init__(self, size, count=16000, seed=0):
        self.fingerprint = f"shapes {size} {count} {seed}"
        self.size, self.count, self.seed = size, count, seed
        self.drawn = {}  # a picture takes 0.4 ms to draw: keep the small ones

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index not in self.drawn:
            image = self.draw(index % 10, np.random.default_rng([self.seed, index]))
            if self.size > 64:
                return image, index % 10
            self.drawn[index] = image
        return self.drawn[index], index % 10

    @staticmethod
    def outline(label):
        """Corners of shape `label` in a unit circle, (P,2), y downwards; None where ellipses do it."""
        turn = np.linspace(0, 2 * np.pi, 40)
        if label == 1:
            return np.array([(-.75, -.75), (.75, -.75), (.75, .75), (-.75, .75)])
        if label == 2:
            return np.array([(0, -1), (.95, .75), (-.95, .75)])
        if label == 3:
            angle, radius = np.arange(10) * np.pi / 5 - np.pi / 2, np.where(np.arange(10) % 2, .42, 1.05)
            return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        if label == 4:
            a, b = .95, .33
            return np.array([(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b),
                             (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)])
        if label == 6:
            x, y = 16 * np.sin(turn)**3, 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
            return np.stack([x / 16, -y / 15], 1)
        if label == 8:
            return np.array([(0, -1), (.85, -.1), (.35, -.1), (.35, .95), (-.35, .95), (-.35, -.1), (-.85, -.1)])
        if label == 9:
            return np.array([(-.85, -.95), (.85, -.95), (.15, 0), (.85, .95), (-.85, .95), (-.15, 0)])
        return None

    def mask(self, label, center, radius, angle):
        """Coverage of each pixel by the shape, float (S,S,1) in [0,1]: drawn four times larger, then averaged."""
        over = 4
        image = Image.new("L", (self.size * over,) * 2)
        pen = ImageDraw.Draw(image)
        center, radius = center * over, radius * over

        def disc(x, y, r, fill):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)

        corners = self.outline(label)
        if corners is not None:
            rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            pen.polygon([tuple(corner) for corner in corners @ rotation * radius + center], fill=255)
        else:
            disc(*center, radius * .95, 255)
            if label == 5:
                disc(*center, radius * .5, 0)
            if label == 7:
                disc(center[0] + radius * .5 * np.cos(angle - .4), center[1] + radius * .5 * np.sin(angle - .4), radius * .75, 0)
        return np.asarray(image.reduce(over), np.float32)[..., None] / 255

    def texture(self, rng):
        """A fine two-valued pattern, float (S,S,1) in [0,1]: four waves across the picture, of random phase."""
        y, x = np.mgrid[:self.size, :self.size] * (4 * 2 * np.pi / self.size) + rng.uniform(0, 2 * np.pi, (2, 1, 1))
        kind = rng.integers(4)
        if kind == 0:
            wave = np.sin([x, y, x + y, x - y][rng.integers(4)])                  # stripes, straight or diagonal
        elif kind == 1:
            wave = np.sin(x) * np.sin(y) * 1.5                                    # checks
        elif kind == 2:
            wave = np.cos(x) + np.cos(y) - .6                                     # dots
        else:                                                                     # noise: random cells of half a wave
            cells = rng.standard_normal((8, 8)).astype(np.float32)
            wave = np.asarray(Image.fromarray(cells).resize((self.size,) * 2, Image.Resampling.BICUBIC))
        return (1 / (1 + np.exp(-4 * wave)))[..., None]

    def draw(self, label, rng):
        """One picture of class `label`, uint8 (S,S,3), from numpy generator `rng`."""
        size, hue = self.size, rng.uniform()

        def colour(hue, saturation, value):
            return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))

        light, dark = colour(hue, rng.uniform(.4, .7), 1), colour(hue, 1, rng.uniform(.5, .6))
        pattern = self.texture(rng)
        inside = light * pattern + dark * (1 - pattern)                           # (S,S,3)
        slope, back, shade = rng.uniform(0, 2 * np.pi), rng.uniform(), rng.uniform(.1, .25)
        y, x = np.mgrid[:size, :size] / (size - 1) - .5
        ramp = (.5 + (x * np.cos(slope) + y * np.sin(slope)) / math.sqrt(2))[..., None]
        outside = colour(back, .3, shade) * ramp + colour(back, .3, shade + .15) * (1 - ramp)
        radius = size * rng.uniform(.34, .4)
        center = size / 2 + rng.uniform(-.05, .05, 2) * size
        mask = self.mask(label, center, radius, rng.uniform(-.25, .25))
        return np.uint8(255 * (inside * mask + outside * (1 - mask)) + .5)


def open_images(data, size, seed=0, skip_bad=False):
    """The data set named by `--data`: `shapes`, a folder of class folders, or an .npz. Raises InputError."""
    if data == "shapes":
        return Shapes(size, seed=seed)
    if Path(data).is_dir():
        return ImageFolder(data, size, skip_bad)
    if Path(data).is_file():
        return ImageArray(data, size)
    raise InputError(f"--data {data}: no such folder or file (give shapes, a folder of class folders, or an .npz)")


# ---------------------------------------------------------------------------------------------------------------------
# The convolutional family
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerConfig:
    """Sizes of a tokenizer. The defaults are those of the published VQ-16 and KL-16."""
    z_channels: int                          # channels of the bottleneck: C of the KL latents, LlamaGen's 256 for VQ
    width: int = 128                         # channels at full resolution
    multipliers: tuple = (1, 1, 2, 2, 4)     # channels per level / width; the resolution halves between levels
    num_res_blocks: int = 2                  # per level; the decoder has one more
    encoder_attention: bool = True           # in the lowest level (the middle always has it)
    decoder_attention: bool = False          # published: VQ yes, KL no
    patch: int = 1                           # > 1: stem and head work on patches, far cheaper for small pictures
    linear_skip: bool = False                # add a linear patch embedding around each half: small ones learn faster
    codebook_size: int = 0                   # VQ only
    code_dim: int = 8                        # VQ only: width of a codebook row
    kl_weight: float = 1e-3                  # KL only: mean over latents, against the mean squared error of pixels

    @property
    def factor(self):
        """How many pixels wide one place of the grid is."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention between all places of a feature map."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (to_tokens(layer(h)) for layer in (self.q, self.k, self.v))          # (B,hw,C)
        return x + self.proj_out(to_map(F.scaled_dot_product_attention(q, k, v), x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only, as the published nets do


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks at one resolution, each followed by attention where asked for."""

    def __init__(self, in_channels, out_channels, num_blocks, attention):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):  # set by the encoder and the decoder, under the published names
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def middle(channels):
    return nn.ModuleList([ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)])


class Encoder(nn.Module):
    """images (B,3,H,W) -> features (B,out_channels,H/f,W/f), f = patch * 2^(levels - 1)."""

    def __init__(self, config, out_channels):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip([config.width] + widths, widths)):
            level = Level(before, after, config.num_res_blocks, config.encoder_attention and i == last)
            if i < last:
                level.downsample = Downsample(after)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        if config.linear_skip:
            self.skip = nn.Conv2d(3, out_channels, config.factor, stride=config.factor)

    def forward(self, images):
        x = self.conv_in(F.pixel_unshuffle(images, self.patch))                        # (B,width,H/patch,W/patch)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)                                                               # ends as (B,widths[-1],h,w)
        x = self.conv_out(F.silu(self.norm_out(x)))                                    # (B,out_channels,h,w)
        return x + self.skip(images) if hasattr(self, "skip") else x


class Decoder(nn.Module):
    """latents (B,C,h,w) -> images (B,3,h*f,w*f); the encoder run backwards, levels stored in execution order."""

    def __init__(self, config):
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip(widths[:1] + widths, widths)):
            level = Level(before, after, config.num_res_blocks + 1, config.decoder_attention and i == 0)
            if i < last:
                level.upsample = Upsample(after)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)
        if config.linear_skip:
            self.factor = config.factor
            self.skip = nn.Conv2d(config.z_channels, 3 * self.factor**2, 1)

    def forward(self, latents):
        x = self.conv_in(latents)                                                      # (B,widths[0],h,w)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)                                                               # ends as (B,width,H/patch,W/patch)
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)       # (B,3,H,W)
        return x + F.pixel_shuffle(self.skip(latents), self.factor) if hasattr(self, "skip") else x


def to_tokens(maps):
    """(B,C,h,w) -> (B,h*w,C), row by row."""
    return maps.flatten(2).transpose(1, 2)


def to_map(tokens, grid):
    """(B,h*w,C) -> (B,C,h,w)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


# ---------------------------------------------------------------------------------------------------------------------
# The two tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def published_sizes(state):
    """Read the sizes of the convolutional family off a state dict's shapes (LlamaGen's key layout)."""
    def count(pattern):
        return 1 + max(int(match[1]) for match in (re.match(pattern, key) for key in state) if match)

    width = state["encoder.conv_in.weight"].shape[0]
    levels = count(r"encoder\.conv_blocks\.(\d+)\.")
    return dict(
        z_channels=state["post_quant_conv.weight"].shape[0], width=width,
        multipliers=tuple(state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] // width for i in range(levels)),
        num_res_blocks=count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        encoder_attention=f"encoder.conv_blocks.{levels - 1}.attn.0.q.weight" in state,
        decoder_attention="decoder.conv_blocks.0.attn.0.q.weight" in state)


class VQTokenizer(nn.Module):
    """Images <-> discrete codes. Both sides of the nearest-neighbour search lie on the unit sphere, so that the search
    is by angle and every row can be reached (Yu et al. 2021, arXiv 2110.04627; LlamaGen, arXiv 2406.06525)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.z_channels)
        self.decoder = Decoder(config)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.code_dim)})
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @classmethod
    def from_published(cls, state):
        """Build from LlamaGen's keys, strictly. Raises KeyError or RuntimeError naming keys that are missing or extra."""
        state = {key: value for key, value in state.items() if key != "quantize.codebook_used"}  # training statistics
        codebook_size, code_dim = state["quantize.embedding.weight"].shape
        config = TokenizerConfig(codebook_size=codebook_size, code_dim=code_dim, **published_sizes(state))
        with torch.device(state["quantize.embedding.weight"].device):
            model = cls(config)
        model.load_state_dict(state)
        return model

    def codebook(self):
        """(K, code_dim), rows of unit length."""
        return F.normalize(self.quantize["embedding"].weight, dim=-1)

    def features(self, images):
        """images (B,3,H,W) -> unit vectors (B,code_dim,h,w), before quantisation."""
        z = self.quant_conv(self.encoder(images))
        return F.normalize(z.to(self.quant_conv.weight.dtype), dim=1)  # full precision, also under autocast

    def nearest(self, z):
        """unit vectors (B,code_dim,h,w) -> codes (B,h,w); on the sphere the smallest distance is the largest cosine."""
        with torch.autocast(z.device.type, enabled=False):  # bf16 would confuse near neighbours
            return torch.einsum("bchw,kc->bhwk", z, self.codebook()).argmax(-1)        # (B,h,w,K) -> (B,h,w)

    def encode(self, images):
        """images (B,3,H,W) in [-1,1] -> codes (B,h,w) int64."""
        return self.nearest(self.features(images))

    def decode(self, codes):
        """codes (B,h,w) -> images (B,3,H,W) in about [-1,1]: the coarse picture."""
        rows = F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)                 # (B,code_dim,h,w)
        return self.decoder(self.post_quant_conv(rows))

    def forward(self, images):
        """Training: (loss, codes (B,h,w), features (B,code_dim,h,w)); the gradient skips the quantiser
        (straight-through: van den Oord et al. 2017, arXiv 1711.00937)."""
        z = self.features(images)
        codes = self.nearest(z)
        rows = F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)                 # (B,code_dim,h,w)
        reconstruction = self.decoder(self.post_quant_conv(z + (rows - z).detach()))
        commitment = F.mse_loss(rows, z.detach()) + 0.25 * F.mse_loss(z, rows.detach())
        return F.mse_loss(reconstruction, images) + commitment, codes, z


class KLTokenizer(nn.Module):
    """Images <-> continuous latents: a diagonal Gaussian per place (Kingma & Welling 2013; KL-16 of MAR,
    arXiv 2406.11838). Latents handed to a generator are samples times `scale`, so that their variance is one."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scale = 1.0  # 1 / standard deviation of the latents of the data, measured by `measure_scale`
        self.encoder = Encoder(config, 2 * config.z_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    @classmethod
    def from_published(cls, state):
        """Build from MAR's keys, strictly. They name the same layers in another way: decoder levels count from full
        resolution there, and in order of execution here. Raises KeyError or RuntimeError naming keys."""
        levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up.")})

        def rename(key):
            key = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.conv_blocks.{levels - 1 - int(m[1])}", key)
            key = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", key).replace(".block.", ".res.")
            return re.sub(r"\.mid\.(block_1|attn_1|block_2)\.",
                          lambda m: f".mid.{('block_1', 'attn_1', 'block_2').index(m[1])}.", key)

        state = {rename(key): value for key, value in state.items()}
        config = TokenizerConfig(**published_sizes(state))
        with torch.device(state["quant_conv.weight"].device):
            model = cls(config)
        model.load_state_dict(state)
        return model

    def encode(self, images):
        """images (B,3,H,W) in [-1,1] -> moments (B,2C,h,w): mean and log-variance, unscaled."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        """unscaled latents (B,C,h,w) -> images (B,3,H,W) in about [-1,1]."""
        return self.decoder(self.post_quant_conv(latents))

    @staticmethod
    def sample(moments, noise, dim=1):
        """Reparameterised sample: mean + std * noise. `dim` is the channel dimension of moments (2C there, C in noise)."""
        mean, log_variance = moments.chunk(2, dim)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise

    def forward(self, images, noise):
        """Training loss; noise (B,C,h,w) standard normal."""
        moments = self.encode(images)
        mean, log_variance = moments.chunk(2, 1)                                       # (B,C,h,w) each
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return F.mse_loss(self.decode(self.sample(moments, noise)), images) + self.config.kl_weight * kl


def save_tokenizers(path, vq, kl, size, run):
    """Both tokenizers in one file; `size` is the side in pixels of the pictures they are for, `run` what they were made from."""
    content = {"size": size, "run": run, "vq_config": asdict(vq.config), "vq": vq.state_dict(),
               "kl_config": asdict(kl.config), "kl": kl.state_dict(), "scale": kl.scale}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_tokenizers(path, device="cpu"):
    """(VQTokenizer, KLTokenizer, picture size, run) as saved, in eval mode. Raises InputError."""
    file = read_checkpoint(path)
    try:
        vq, kl = VQTokenizer(TokenizerConfig(**file["vq_config"])), KLTokenizer(TokenizerConfig(**file["kl_config"]))
        vq.load_state_dict(file["vq"])
        kl.load_state_dict(file["kl"])
        kl.scale = float(file["scale"])
        return vq.to(device).eval(), kl.to(device).eval(), int(file["size"]), dict(file["run"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a tokenizers file of this project ({str(error)[:200]})") from error


# ---------------------------------------------------------------------------------------------------------------------
# The token cache: every picture encoded once, original and mirrored
# ---------------------------------------------------------------------------------------------------------------------

KL16_SCALE = 0.2325  # of KL-16 on ImageNet; MAR's weights expect latents multiplied by exactly this


def batches(images, batch_size, workers, numbers):
    """The batches `numbers` of a data set, in that order: (uint8 (B,S,S,3), labels (B,))."""
    indices = [range(k * batch_size, min((k + 1) * batch_size, len(images))) for k in numbers]
    return DataLoader(images, batch_sampler=indices, num_workers=workers)


@torch.no_grad()
def measure_scale(kl, images, device, seed=0):
    """1 / standard deviation of the latents of up to 2,048 pictures drawn at random. Raises InputError."""
    chosen = Subset(images, np.random.default_rng(seed).permutation(len(images))[:2048].tolist())
    total = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares
    generator = torch.Generator().manual_seed(seed)
    for pictures, labels in batches(chosen, 64, 0, range(math.ceil(len(chosen) / 64))):
        if (labels < 0).all():
            continue
        moments = kl.encode(to_float(pictures[labels >= 0].to(device))).cpu()
        noise = torch.randn(moments.chunk(2, 1)[0].shape, generator=generator)
        latents = kl.sample(moments, noise).double()
        total += torch.stack([torch.tensor(latents.numel()), latents.sum(), latents.square().sum()])
    mean = total[1] / total[0]
    scale = float((total[2] / total[0] - mean**2).rsqrt())
    if not total[0]:
        raise InputError("--data: no picture can be read")
    if not math.isfinite(scale):
        raise InputError("the KL tokenizer's latents are constant or not finite: train it longer, or check --kl")
    return scale


def file_crc(path):
    """Checksum of a file that may be larger than memory."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


@torch.no_grad()
def encode_images(images, vq, kl, folder, run, processes, batch_size=64, workers=0):
    """Encode a data set and its mirror image into the token cache `folder`:

        codes.npy   uint16  (2,N,h*w)      moments.npy float16 (2,N,h*w,2C)
        labels.npy  int64   (N,)           meta.json   counts, grid, classes, scale, checksums and `run`; written last

    The processes take turns in batches and write into the same files; an interrupted encoding goes on where it was. A
    picture of class -1 (see ImageFolder) keeps its row, and meta.json its name. Raises InputError when the grids of the two
    tokenizers differ or the folder cannot be written.
    """
    folder, device, size = Path(folder), processes.device, images.size
    probe = torch.zeros(1, 3, size, size, device=device)
    code_grid, latent_grid = vq.encode(probe).shape[1:], kl.encode(probe).shape[2:]
    if code_grid != latent_grid:
        raise InputError(f"the VQ tokenizer's grid {tuple(code_grid)} and the KL tokenizer's grid {tuple(latent_grid)} differ: "
                         "their downsampling factors must be equal (--vq, --kl)")
    if vq.config.codebook_size > 65536:
        raise InputError(f"--vq: {vq.config.codebook_size} codes do not fit the cache's 16 bits")
    number, places, channels = len(images), code_grid.numel(), 2 * kl.config.z_channels
    plan = dict(run=run, data=images.fingerprint, tokenizers=[crc_of(vq), crc_of(kl)], count=number, grid=list(code_grid),
                channels=kl.config.z_channels, scale=kl.scale, codebook_size=vq.config.codebook_size, classes=images.classes,
                size=size)
    layout = {"codes": (np.uint16, (2, number, places)), "moments": (np.float16, (2, number, places, channels)),
              "labels": (np.int64, (number,))}
    shared = SharedArrays(folder, plan | {"batch_size": batch_size}, layout, math.ceil(number / batch_size), processes)
    if shared.finished:
        processes.say(f"encoding  goes on after {min(shared.finished * batch_size, number)} of {number} pictures")
    began = said = time.time()
    for turn, (k, (pictures, labels)) in enumerate(zip(shared.todo, batches(images, batch_size, workers, shared.todo))):
        place = slice(k * batch_size, k * batch_size + len(labels))
        shared.arrays["labels"][place] = labels.numpy()
        x = to_float(pictures.to(device))
        for mirrored, x in enumerate((x, x.flip(3))):
            shared.arrays["codes"][mirrored, place] = vq.encode(x).flatten(1).cpu().numpy()
            shared.arrays["moments"][mirrored, place] = to_tokens(kl.encode(x)).float().cpu().numpy()
        shared.mark(k)
        now, left = time.time(), len(shared.todo) - turn - 1
        if now - said > 5 or not left:
            said, speed = now, (turn + 1) / (now - began)
            processes.say(f"encoding  {number - min(left * processes.size * batch_size, number)}/{number} pictures  "
                          f"{speed * batch_size * processes.size:.0f} images/s  ETA {clock(left / speed)}")
    processes.wait()
    if processes.rank == 0:
        bad = [str(images.files[i][0]) for i in np.flatnonzero(shared.arrays["labels"] < 0)]
        if bad:
            processes.say(f"skipped {len(bad)} unreadable pictures of {number}; {folder / 'meta.json'} lists them")
        meta = plan | dict(skipped=bad, checksums={name: file_crc(folder / f"{name}.npy") for name in layout})
        meta["checksum"] = f"{zlib.crc32(json.dumps(meta).encode()):08x}"  # of all above
        write_atomically(folder / "meta.json", lambda temporary: temporary.write_text(json.dumps(meta, indent=1)))
        for name in ("plan.json", "done.npy"):
            (folder / name).unlink()
    processes.wait()


class TokenCache:
    """The encoded data set, memory-mapped: codes (2,N,n), moments (2,N,n,2C), labels (N,), -1 where a picture was skipped,
    and `meta` as a dict.

    Raises InputError when the cache is unfinished or its meta.json damaged; with `verify` every byte of the arrays is read
    and must give the checksum, too (43 GB in about a minute)."""

    def __init__(self, folder, verify=False):
        self.folder = folder = Path(folder)
        try:
            self.meta = json.loads((folder / "meta.json").read_text())
            rest = {name: value for name, value in self.meta.items() if name != "checksum"}
            wrong = [] if self.meta["checksum"] == f"{zlib.crc32(json.dumps(rest).encode()):08x}" else ["meta.json"]
            if verify:
                wrong += [f"{name}.npy" for name, crc in self.meta["checksums"].items() if file_crc(folder / f"{name}.npy") != crc]
            if wrong:
                raise ValueError(f"the checksum of {', '.join(wrong)} is wrong")
            self.codes, self.moments, self.labels = (
                np.lib.format.open_memmap(folder / f"{name}.npy", "r") for name in ("codes", "moments", "labels"))
            self.usable = np.flatnonzero(self.labels >= 0)
        except Exception as error:  # json, numpy and the disk each fail in their own ways
            raise InputError(f"{folder}: the token cache is unfinished or damaged ({error}); "
                             "delete it and run train.py --stage 0") from error

    def __reduce__(self):
        return TokenCache, (self.folder,)  # a worker process opens the files itself instead of receiving their content

    @property
    def identity(self):
        """A short fingerprint of the cache, kept in checkpoints: weights belong to the tokens they were trained on."""
        return self.meta["checksum"]
