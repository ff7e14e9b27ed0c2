"""Are the samples as good, and as varied, as real images?  FID, sFID, Inception Score, precision and recall.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz   # ADM's reference file: the numbers of the papers
    python fid.py my_samples --ref real.npz:images --bootstrap 20     # any two sets, folder or .npz; with standard errors
    python fid.py real.npz:images --make-stats real-stats.npz         # measure a reference once, for later --ref
    torchrun --nproc_per_node=8 -- fid.py samples.npz --ref ...       # the same numbers, sooner

Pixels are a poor ruler, so every image is first described by a network trained to classify ImageNet:

    uint8 image -> resize to 299x299 -> Inception-v3 -> pool    (2048)  what is in the image
                                                     -> spatial (2023)  where it is: 7 channels of a 17x17 map
                                                     -> logits  (1008)  how sure the network is (of 1000 classes; the
                                                                        published graph has 8 more outputs)

Two sets of images make two clouds of such points, and four numbers compare them; the fifth looks at the samples alone:

    FID        |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of `pool`: the distance of two Gaussians    [Heusel 2017]
    sFID       the same of `spatial`, which sees the layout                                                [Nash 2021]
    precision  share of samples that lie among the real images: quality                            [Kynkaanniemi 2019]
    recall     share of real images that lie among the samples: variety
    IS         exp(mean KL(p(class | image) || p(class))): sure of each image, varied over all         [Salimans 2016]

Two FIDs compare only if all of these agree, and each has spoiled published numbers (README, "FID, and what moves it", has
how much): the network (TensorFlow's of 2015-12-05; torchvision's is another), the resize (`tf1` as in ADM, `half_pixel` as
in pytorch-fid), the reference (for ImageNet generation ADM's training-set statistics), the count (50,000 samples, 50 per
class), and lossless files (JPEG changes pixels).  All definitions are those of ADM's evaluator [Dhariwal & Nichol 2021,
arXiv 2105.05233]; it computes the distances of precision and recall in half precision, which may move them by 0.01.

This file imports none of its neighbours: copy it to where you need it.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg.lapack import dpstrf
from scipy.special import rel_entr
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 299  # Inception's input size
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}  # ADM's names


class InputError(Exception):
    """A file or flag cannot be used; the message names it and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3 [Szegedy 2015, arXiv 1512.00567] as TensorFlow published it; layers are named as in the weight file
# ---------------------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels_in, channels_out, kernel, stride=1, padding=None):
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


def average_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # padding does not darken the border


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    return F.max_pool2d(x, 3, stride=2)  # (B,C,H,W) -> (B,C,(H-1)//2,(W-1)//2)


class Mixed(nn.Module):
    """Rows of convolutions side by side on one input, outputs concatenated; the last row starts from a pool.

    A row is a list of (channels, kernel[, stride]).  Its layers are stored as ROW_1, ROW_2, ..., a lone one as ROW.
    """

    def __init__(self, width, pool, **rows):
        super().__init__()
        self.pool, self.rows = pool, []
        for name, layers in rows.items():
            names = [name] if len(layers) == 1 else [f"{name}_{i + 1}" for i in range(len(layers))]
            widths = [width] + [layer[0] for layer in layers]
            for key, channels_in, layer in zip(names, widths, layers):
                self.add_module(key, Conv(channels_in, *layer))
            self.rows.append(names)

    def forward(self, x):
        outputs = [x] * (len(self.rows) - 1) + [self.pool(x)]
        for i, names in enumerate(self.rows):
            for name in names:
                outputs[i] = self.get_submodule(name)(outputs[i])
        return torch.cat(outputs, dim=1)


def mixed35(width, pool_width):
    """For maps of 35x35."""
    return Mixed(width, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool_width, 1)])


def mixed17(inner):
    """For maps of 17x17: strips of 1x7 and 7x1 see as far as a 7x7, for two sevenths of the work."""
    return Mixed(768, average_pool, branch1x1=[(192, 1)], branch7x7=[(inner, 1), (inner, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(inner, 1), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))],
                 branch_pool=[(192, 1)])


class Mixed8(nn.Module):
    """For maps of 8x8: two of the rows fork at their ends into a 1x3 and a 3x1."""

    def __init__(self, width, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(width, 320, 1)
        self.branch3x3_1 = Conv(width, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(width, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(width, 192, 1)

    def forward(self, x):
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once),
                          self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice),
                          self.branch_pool(self.pool(x))], dim=1)  # (B,2048,8,8)


class InceptionV3(nn.Module):
    """(B,3,299,299) in [-1,1] -> pool (B,2048), spatial (B,2023), logits (B,1008).

    A measuring instrument: in eval mode and without gradients from the start.  Logits are without the bias, as ADM's
    Inception Score takes them, and None if the network is built without its last layer (`classifier=False`).
    """

    def __init__(self, classifier=True):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = mixed35(192, pool_width=32)
        self.Mixed_5c = mixed35(256, pool_width=64)
        self.Mixed_5d = mixed35(288, pool_width=64)
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3, 2)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])
        self.Mixed_6b = mixed17(inner=128)
        self.Mixed_6c = mixed17(inner=160)
        self.Mixed_6d = mixed17(inner=160)
        self.Mixed_6e = mixed17(inner=192)
        self.Mixed_7a = Mixed(768, halve, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])
        self.Mixed_7b = Mixed8(1280, average_pool)
        self.Mixed_7c = Mixed8(2048, max_pool)  # not the average of the paper: the 2015 graph has it so
        self.fc = nn.Linear(2048, 1008) if classifier else None
        self.eval().requires_grad_(False)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B,64,147,147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))  # (B,192,71,71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))  # (B,288,35,35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B,768,17,17)
        # sFID looks inside a block, at its first branch; doing that 1x1 convolution twice is simpler than a hook.
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]  # (B,7,17,17)
        spatial = spatial.permute(0, 2, 3, 1).flatten(1)  # (B,2023), channels last as in TensorFlow
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (B,1280,8,8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))  # (B,2048)
        logits = None if self.fc is None else pool @ self.fc.weight.T  # (B,1008)
        return pool, spatial, logits


def inception_from_state(state):
    """The network with the weights of a flat state dict, on the device of its tensors ("meta" too).

    Keys must match, with two liberties: all `num_batches_tracked` may be absent, and so may the last layer.
    """
    with torch.device(next(iter(state.values())).device):
        model = InceptionV3(classifier="fc.weight" in state)
        model.load_state_dict(dict(state))  # dict() drops the version note, and torch fills in num_batches_tracked
    return model


def fold_batch_norms(model):
    """In eval mode a batch norm is a scale and a shift: let the convolution before it do both."""
    for layer in model.modules():
        if isinstance(layer, Conv):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    return model


def published_weights():
    """The path of pytorch-fid's weight file in torch's cache, downloaded on first use."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.exists():
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it announces itself on stdout, where --json goes
                torch.hub.load_state_dict_from_url(WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as error:  # no network, a proxy, a broken file: the remedy is the same
            raise InputError(f"cannot download the Inception weights ({error}): put {WEIGHTS_URL} into {path.parent}, "
                             "or name a copy with --weights") from error
    return path


def load_inception(path, device="cpu"):
    """The network with the weights of a file, made fast.  Raises InputError if they are not those of the FID Inception."""
    try:
        model = inception_from_state(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # not a torch file, not a dict of tensors, other keys, other shapes
        raise InputError(f"{path}: damaged, or not the weights of {WEIGHTS} ({str(error)[:150]}); name another file with "
                         "--weights, or delete it and without the flag a new one is downloaded") from error
    return fold_batch_norms(model).to(device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# From images to features
# ---------------------------------------------------------------------------------------------------------------------


def tf1_resize(x):
    """Bilinear (B,3,H,W) -> (B,3,299,299) as in TensorFlow 1: output i reads from i * in/out, so the picture shifts by
    half a pixel, and shrinking skips pixels.  A flaw, but every published ADM number contains it."""
    for dim, shape in ((3, (1, -1)), (2, (-1, 1))):  # along columns, then rows: the other order differs in the last bit
        size = x.shape[dim]
        source = torch.arange(SIDE, device=x.device) * torch.tensor(size / SIDE)  # (299,), in float32 as in the graph
        lower = source.long()
        upper = (lower + 1).clamp(max=size - 1)
        weight = (source - lower).view(shape)
        low, high = x.index_select(dim, lower), x.index_select(dim, upper)  # `dim` becomes 299
        x = low + (high - low) * weight
    return x


def preprocess(images, resize="tf1"):
    """uint8 (B,H,W,3) -> float32 (B,3,299,299) in [-1,1]; `resize` is "tf1" (ADM) or "half_pixel" (pytorch-fid)."""
    x = images.permute(0, 3, 1, 2).contiguous().float()  # (B,3,H,W)
    if resize == "tf1":
        return (tf1_resize(x) - 128) / 128
    return 2 * F.interpolate(x / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def ahead(function, items):
    """map(function, items), with the next item already under way in a thread: files are read while the network runs."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in items:
            waiting, ready = thread.submit(function, item), waiting
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 is on by default in convolutions: 10 bits, not 23
def features(model, images, batch_size=50, resize="tf1", device="cpu"):
    """uint8 images (N,H,W,3) -> pool (N,2048), spatial (N,2023), logits (N,1008) or None; float32, on the CPU.

    `images` is whatever has a length and gives arrays or tensors for slices; `model` lives on `device`.  Among several
    processes each takes every so-many-th batch, and the first one returns all.  Progress goes to stderr.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = [torch.zeros(len(images), width) for width in ([2048, 2023] if model.fc is None else [2048, 2023, 1008])]
    starts = range(rank * batch_size, len(images), size * batch_size)
    begun, shown = time.time(), 0
    try:
        for i, batch in zip(starts, ahead(lambda i: torch.as_tensor(images[i : i + batch_size]), starts)):
            x = preprocess(batch.to(device), resize)  # (B,3,299,299)
            for whole, part in zip(found, model(x.contiguous(memory_format=torch.channels_last))):  # as the weights lie
                whole[i : i + len(part)] = part
            now, done = time.time(), min(i + size * batch_size, len(images))
            if rank == 0 and (now - shown > 1 or done == len(images)):
                shown, rate = now, done / (now - begun)
                print(f"\r{done}/{len(images)} images, {rate:.1f}/s, {(len(images) - done) / rate:.0f} s left    ",
                      end="", file=sys.stderr, flush=True)
    finally:
        if shown:
            print(file=sys.stderr)  # whatever comes next, an error too, begins a line
    for whole in found if size > 1 else []:
        dist.reduce(whole, 0)  # every row is zero in all processes but one, so the sum is the whole
    return found if len(found) == 3 else [*found, None]


# ---------------------------------------------------------------------------------------------------------------------
# From features to numbers
# ---------------------------------------------------------------------------------------------------------------------


def statistics(x):
    """Mean (D,) and covariance (D,D) of features (N,D), in float64: a sum over 50,000 images needs the digits."""
    mu = x.mean(dim=0, dtype=torch.float64)
    sigma = sum(rows.T @ rows for rows in (block.double() - mu for block in x.split(1000))) / (len(x) - 1)
    return mu.numpy(), sigma.numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); mu (D,), sigma (D,D) float64.

    Write S = F F^T.  Then S1 S2 has the eigenvalues of M M^T with M = F1^T F2, so the trace of its root is the sum of
    the singular values of M.  Those are real and never negative, and they keep their digits where fewer images than
    dimensions make S singular; a square root of the unsymmetric S1 S2 itself (scipy's sqrtm) promises none of this.
    """
    def factor(sigma):  # pivoted Cholesky stops where only rounding is left: (D,D) of rank r -> (D,r)
        lower, pivots, rank, _ = dpstrf(sigma, lower=1)
        rows = np.empty((len(sigma), rank))
        rows[pivots - 1] = np.tril(lower)[:, :rank]  # LAPACK counts from 1
        return rows

    trace_of_root = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def inception_score(probs, split_size=5000):
    """exp(mean KL(p || mean p)) of class probabilities (N,C), averaged over consecutive splits of the rows: ADM's choice.
    The score grows with the size of a split, and falls where one holds few classes: rows must not be in order of class."""
    probs = np.asarray(probs, dtype=np.float64)
    splits = [probs[i : i + split_size] for i in range(0, len(probs), split_size)]
    return float(np.mean([np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()) for p in splits]))


def precision_recall(reference, samples, k=3, block=1000):
    """(share of samples inside the reference manifold, share of reference inside the sample manifold); (N,D) tensors.

    The manifold of a set is a union of balls: around each point, out to its k-th nearest neighbour.  Distances are
    taken `block` rows at a time: among 50,000 images all of them would fill 10 GB.
    """
    def squared_distances(a, b):
        a2, b2 = (torch.linalg.vector_norm(x, dim=1).square() for x in (a, b))
        return torch.addmm(b2, a, b.T, alpha=-2).add_(a2[:, None])  # (len(a),len(b))

    def squared_radii(points):  # k + 1, for the nearest point is the point itself
        return torch.cat([squared_distances(rows, points).topk(k + 1, largest=False).values[:, -1]
                          for rows in points.split(block)])  # (N,)

    reference_reach, sample_reach = squared_radii(reference), squared_radii(samples)
    good, covered = 0, torch.zeros_like(reference_reach, dtype=torch.bool)
    for rows, reach in zip(samples.split(block), sample_reach.split(block)):
        distances = squared_distances(rows, reference)
        good += (distances <= reference_reach).any(dim=1).sum().item()
        covered |= (distances <= reach[:, None]).any(dim=0)
    return good / len(samples), covered.sum().item() / len(reference)


# ---------------------------------------------------------------------------------------------------------------------
# From files to images: both kinds give slices as uint8 (n,H,W,3) and never hold all images at once
# ---------------------------------------------------------------------------------------------------------------------


class Folder:
    """All PNG, JPEG and WebP images below a folder.  The headers of all are checked before the first is decoded."""

    def __init__(self, folder):
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        np.random.default_rng(0).shuffle(self.paths)  # in order of classes the splits of the Inception Score would hold few
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count()))
        first = None
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    (w, h), kind = image.size, image.mode
                    if "16B" in str(image.tile):  # Pillow would quietly drop the lower half of each number
                        kind = "16-bit " + kind
            except Exception as error:  # Pillow raises many kinds
                raise InputError(f"{path}: cannot be read as an image; replace or remove it") from error
            if kind != "RGB":
                raise InputError(f"{path}: {kind} pixels, not 8-bit RGB; convert it (Pillow: image.convert('RGB')) in the "
                                 "way you want it judged")
            first = first or (w, h)
            if (w, h) != first:
                raise InputError(f"{path}: {w}x{h} pixels, but {self.paths[0]} has {first[0]}x{first[1]}; "
                                 "bring all to one size")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        return np.stack(list(self.threads.map(self.read, self.paths[rows])))  # (n,H,W,3)

    def read(self, path):
        try:
            with Image.open(path) as image:
                return np.asarray(image)  # (H,W,3)
        except Exception as error:
            raise InputError(f"{path}: damaged image; replace or remove it") from error


class Archive:
    """The array KEY of an .npz, uint8 (N,H,W,3).  Slices are cheap from front to back: 50,000 images may be 10 GB."""

    def __init__(self, path, key):
        self.path, self.file = path, zipfile.ZipFile(path).open(f"{key}.npy")
        version = np.lib.format.read_magic(self.file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        self.shape, self.columns_first, self.dtype = header(self.file)
        self.start = self.file.tell()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        begin, end, _ = rows.indices(len(self))
        size = math.prod(self.shape[1:])  # bytes of an image
        try:
            self.file.seek(self.start + begin * size)
            data = bytearray(self.file.read((end - begin) * size))  # torch wants writable memory
            return np.frombuffer(data, np.uint8).reshape(end - begin, *self.shape[1:])
        except Exception as error:  # zipfile, zlib and reshape each have their own kind
            raise InputError(f"{self.path}: damaged ({error}); copy it again") from error


def read_npz(path, key):
    """{"images", "mu", "sigma", "mu_s", "sigma_s", "resize", "weights"}, as far as an .npz holds them; with a key, that array
    as images and nothing else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {} if key else {name: archive[name].astype(np.float64) for name in STATISTICS if name in archive}
            if found:  # what --make-stats notes; files of ADM's evaluator have mu_s, and no notes
                notes = {"resize": "tf1"} if "mu_s" in found else {}
                found |= notes | {name: str(archive[name]) for name in ("resize", "weights") if name in archive}
            if not key and len(archive.files) == 1:
                key = archive.files[0]
            key = key or next((name for name in ("arr_0", "images") if name in archive), None)
        return found | {"images": Archive(path, key)} if key else found
    except Exception as error:  # numpy and zipfile raise many kinds
        raise InputError(f"{path}: no readable .npz of plain arrays ({error}); save it with numpy.savez") from error


def read_set(name):
    """What a folder, FILE.npz or FILE.npz:KEY holds, checked: a dict as of `read_npz`."""
    path, key = Path(name), None
    if not path.exists() and ".npz:" in name:
        stem, _, key = name.rpartition(".npz:")
        path = Path(stem + ".npz")
    if not path.exists():
        raise InputError(f"{path}: no such file; give an .npz or a folder of images")
    if path.is_dir():
        found = {"images": Folder(path)}
        if len(found["images"]) < 2:
            raise InputError(f"{path}: holds {len(found['images'])} .png, .jpg, .jpeg or .webp, and two are the least")
        return found | {"name": name}
    found = read_npz(path, key) | {"name": name}
    for part, shape in STATISTICS.items():
        if part in found and (found[part].shape != shape or not np.isfinite(found[part]).all()):
            raise InputError(f"{path}: {part} must be {shape} finite numbers; make a new file with --make-stats")
    images = found.get("images")
    if images is None and not {"mu", "sigma"} <= found.keys():
        raise InputError(f"{path}: has no arr_0, no images, no mu and sigma; name its array of images as {path}:KEY")
    if images is not None and (images.dtype != np.uint8 or images.columns_first or len(images.shape) != 4
                               or images.shape[3] != 3 or 0 in images.shape or len(images) < 2):
        raise InputError(f"{name}: {images.dtype} array {images.shape}; images must be uint8 (N,H,W,3), values 0..255 in "
                         "C order, at least two")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

# From here on a set is a dict with some of: name, images, mu, sigma, mu_s, sigma_s, resize, weights (as read from its files),
# pool, spatial, logits (once its images have been through the network).

METRICS = ["FID", "sFID", "IS", "precision", "recall"]
FITS, BALLS = {"FID", "sFID"}, {"precision", "recall"}  # what compares Gaussians, what looks for neighbours


def has_statistics(side):
    return not STATISTICS.keys().isdisjoint(side)


def obstacle(metric, samples, reference):
    """Why a metric cannot be had of two sets, or None.  Statistics of a file count before its images: ADM's reference has
    those of the whole training set, and only 10,000 of its images."""
    if metric == "IS":
        return None if "images" in samples else "the samples have no images"
    if not reference:
        return "there is no --ref"
    for side in (samples, reference):
        needed = {"FID": {"mu", "sigma"}, "sFID": {"mu_s", "sigma_s"}}.get(metric, set())
        if needed and has_statistics(side) and not needed <= side.keys():
            return f"{side['name']} has statistics without {' and '.join(sorted(needed))}"
        if metric in BALLS and ("images" not in side or len(side["images"]) < 4):
            return f"{side['name']} has no images, or fewer than 4"
    return None


def gaussian(side, metric):
    """(mean, covariance) of a set for FID or sFID: its own statistics, or those of its features."""
    feature, mu, sigma = {"FID": ("pool", "mu", "sigma"), "sFID": ("spatial", "mu_s", "sigma_s")}[metric]
    return (side[mu], side[sigma]) if has_statistics(side) else statistics(side[feature])


def compare(samples, reference, metrics, device):
    """{metric: number} for metrics that meet no obstacle."""
    scores = {metric: frechet_distance(*gaussian(samples, metric), *gaussian(reference, metric))
              for metric in metrics if metric in FITS}
    if "IS" in metrics:
        scores["IS"] = inception_score(samples["logits"].double().softmax(dim=1))
    if not BALLS.isdisjoint(metrics):
        both = precision_recall(reference["pool"].to(device), samples["pool"].to(device))
        scores |= dict(zip(("precision", "recall"), both))
    return {metric: scores[metric] for metric in metrics}


def standard_errors(samples, reference, metrics, device, count):
    """{metric: its standard error}: the spread over `count` random halves of the features of each set.

    The spread of a mean over halves drawn without replacement equals the standard error of the mean over all, and so it
    does, nearly, for whatever depends smoothly on means.  (The textbook bootstrap draws with replacement; but a point
    and its double are neighbours at distance 0, and the balls of precision and recall would collapse.)
    """
    generator, runs = torch.Generator().manual_seed(0), []

    def half(side):  # a set that is known by its statistics alone stays as it is
        rows = torch.randperm(len(side.get("pool", ())), generator=generator)
        rows = rows[: len(rows) // 2].sort().values  # in order, for the consecutive splits of the Inception Score
        return {name: value[rows] if torch.is_tensor(value) else value for name, value in side.items()}

    for i in range(count):
        print(f"\rresample {i + 1}/{count}", end="" if i + 1 < count else "\n", file=sys.stderr, flush=True)
        runs.append(compare(half(samples), half(reference), metrics, device))
    return {metric: float(np.std([run[metric] for run in runs], ddof=1)) for metric in metrics}


def warn(samples, reference, metrics, digest):
    """Say on stderr what commonly spoils the numbers."""
    def say(text):
        print("warning:", text, file=sys.stderr)

    fits, balls = (not group.isdisjoint(metrics) for group in (FITS, BALLS))
    count, reference_count = (len(side["images"]) if "images" in side else None for side in (samples, reference))
    published = has_statistics(reference) and count == 50000
    used = {digest, *(side.get("weights") for side in (samples, reference))} - {None}
    if fits and len(used) > 1:
        say(f"features made with different weights ({', '.join(sorted(used))}) do not compare")
    for side in (samples, reference):
        if fits and has_statistics(side) and "resize" not in side:
            say(f"{side['name']}: does not say how its images were resized (pytorch-fid's statistics are half_pixel)")
        if fits and "images" in side and not has_statistics(side) and len(side["images"]) < 2048:
            say(f"{side['name']}: {len(side['images'])} images cannot fill Inception's 2048 dimensions, so FID and sFID come out "
                "far too high; compare only at equal counts")
    if fits and count and has_statistics(reference) and not published:
        say(f"{samples['name']}: {count} images; FID falls as their number grows, and published ones have 50000")
    if count and reference_count and count != reference_count and not published and (fits or balls):
        say(f"{count} images against {reference_count}: FID falls as either count grows, recall rises with the first and "
            "precision with the second; compare only at these two counts")
    if any(path.suffix.lower() in (".jpg", ".jpeg") for path in getattr(samples.get("images"), "paths", [])):
        say(f"{samples['name']}: JPEG changes pixels, and FID sees it; save samples as PNG or .npz")


def choose_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in available if available[kind]) if name == "auto" else name
    if not available[name]:
        raise InputError(f"--device {name}: there is none on this machine; use --device auto")
    if name == "cuda" and dist.is_torchelastic_launched():  # one GPU for each process of torchrun
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs")
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def check_flags(args):
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: must be at least 1")
    if args.bootstrap < 0 or args.bootstrap == 1:
        raise InputError(f"--bootstrap {args.bootstrap}: a spread needs at least 2 resamples; take 20")
    if not args.ref and not args.make_stats and args.metrics != ["IS"]:
        raise InputError("--ref is missing: name an .npz or a folder to compare with, or --make-stats OUT.npz")
    if args.make_stats:
        path = Path(args.make_stats)
        if path.exists() or not os.access(path.parent, os.W_OK):
            raise InputError(f"--make-stats {path}: exists already, or its folder cannot be written to; name a new file")


def check_sets(samples, reference, args):
    """Raises InputError for what cannot be compared as the command asks, before any image is looked at."""
    for side in (samples, reference):
        if side.get("resize", args.resize) != args.resize:
            raise InputError(f"{side['name']}: its statistics were made with --resize {side['resize']}; use that here too")
    for metric in args.metrics or []:
        if reason := obstacle(metric, samples, reference):
            raise InputError(f"--metrics {metric}: {reason}; name images as FOLDER or FILE.npz:KEY")
    if args.make_stats and has_statistics(samples):
        raise InputError(f"{args.samples}: holds statistics already; name its images, if any, as FILE.npz:KEY")
    if args.bootstrap and "images" not in samples:
        raise InputError("--bootstrap: the samples are statistics, which cannot be resampled; give their images")
    for side in (samples, reference):
        if args.bootstrap and len(side.get("images", range(8))) < 8:
            raise InputError(f"--bootstrap: {side['name']} has {len(side['images'])} images, and halves need at least 8")


def look(sides, weights, args, device):
    """Send the images of some sets through the network; among several processes only the first has the result."""
    rank = int(os.environ.get("RANK", 0))
    model = load_inception(weights, device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=timedelta(hours=12))  # readers of one disk may drift far apart
    for side in sides:
        if rank == 0:
            print(f"{side['name']}: {len(side['images'])} images", file=sys.stderr)
        side |= dict(zip(("pool", "spatial", "logits"),
                         features(model, side["images"], args.batch_size, args.resize, device)))
        if not side["pool"].isfinite().all():
            raise InputError(f"{weights}: makes features that are not finite numbers; the file is damaged")
    if dist.is_initialized():
        dist.destroy_process_group()


def save_statistics(path, samples, args, digest):
    arrays = dict(zip(STATISTICS, gaussian(samples, "FID") + gaussian(samples, "sFID")))
    notes = dict(resize=args.resize, weights=digest, count=len(samples["pool"]))
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, **notes)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--make-stats {path}: cannot be written ({error.strerror}); free space or name another") from error
    print(f"saved {path}", file=sys.stderr)


def evaluate(args):
    """Run the command: {metric or setting: value}, or None in all processes but the first."""
    check_flags(args)
    device = choose_device(args.device)
    samples, reference = read_set(args.samples), read_set(args.ref) if args.ref else {}
    check_sets(samples, reference, args)
    metrics = args.metrics or (METRICS if args.ref else ["IS"])
    obstacles = {metric: obstacle(metric, samples, reference) for metric in metrics}
    metrics = [metric for metric in metrics if not obstacles[metric]]

    def needed(side):  # only images that some number needs go through the network
        if side is samples and ("IS" in metrics or args.make_stats):
            return True
        fits = not FITS.isdisjoint(metrics) and not has_statistics(side)
        return "images" in side and (fits or not BALLS.isdisjoint(metrics))

    sides, digest = [side for side in (samples, reference) if needed(side)], None
    if sides:
        weights = args.weights or published_weights()
        if not Path(weights).is_file():
            raise InputError(f"--weights {weights}: no such file; without the flag {WEIGHTS} is downloaded")
        digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]
    if int(os.environ.get("RANK", 0)) == 0:
        warn(samples, reference, metrics, digest)
    if sides:
        look(sides, weights, args, device)
    if int(os.environ.get("RANK", 0)) > 0:
        return None
    if "IS" in metrics and samples["logits"] is None:
        metrics.remove("IS")
        obstacles["IS"] = "the weights have no last layer, fc"
    if args.make_stats:
        save_statistics(args.make_stats, samples, args, digest)
    result = compare(samples, reference, metrics, device)
    if args.bootstrap:
        result["standard_errors"] = standard_errors(samples, reference, metrics, device, args.bootstrap)
    for role, side in (("samples", samples), ("reference", reference)):
        result |= {role: side.get("name"), f"{role}_images": len(side["pool"]) if "pool" in side else None,
                   f"{role}_statistics": has_statistics(side) and not FITS.isdisjoint(metrics)}
    unavailable = {metric: reason for metric, reason in obstacles.items() if reason}
    return result | {"unavailable": unavailable, "weights": digest, "resize": args.resize}


def report(result):
    """Print what `evaluate` found: the numbers, and all that one must know to compare them."""
    errors = result.get("standard_errors", {})
    for metric in METRICS:
        if metric in result:
            value = round(result[metric], 4) + 0.0  # not -0.0000
            print(f"{metric:10} {value:.4f}" + (f" +- {errors[metric]:.4f}" if metric in errors else ""))
        elif metric in result["unavailable"]:
            print(f"{metric:10} unavailable: {result['unavailable'][metric]}")
    for role in ("samples", "reference"):
        parts = ["its statistics"] if result[f"{role}_statistics"] else []
        parts += [f"{result[f'{role}_images']} images"] if result[f"{role}_images"] else []
        if parts:
            print(f"{role:10} {result[role]}: {', '.join(parts)}")
    if result["weights"]:
        published = "" if result["weights"] in WEIGHTS else " (not the published file)"
        print(f"{'Inception':10} weights {result['weights']}{published}, resize {result['resize']}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(str(message).split())}\n")  # one line, even if a library's message has more


def metric_name(text):
    """argparse type: a metric in its usual spelling, however it is typed."""
    return next((name for name in METRICS if name.lower() == text.lower()), text)


def main(argv=None):
    parser = Parser(prog="fid.py", description=__doc__.partition("\n")[0])
    parser.add_argument("samples", help="FILE.npz, FILE.npz:KEY, a folder of images, or an .npz of statistics")
    parser.add_argument("--ref", help="what to compare with, in the same forms")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, type=metric_name, help="default: all that there is data for")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="K", help="standard errors, from K resamples (20, say)")
    parser.add_argument("--weights", help="Inception weights (default: pytorch-fid's, downloaded once)")
    parser.add_argument("--resize", choices=["tf1", "half_pixel"], default="tf1", help="ADM's or pytorch-fid's")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time, in each process")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--make-stats", metavar="OUT.npz", help="write the statistics of SAMPLES, for use as --ref")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        result = evaluate(args)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) > 0 and not dist.is_initialized():
            parser.exit(2)  # the first process meets the same error and says so
        parser.error(error)
    except OSError as error:
        parser.error(f"{error.filename or 'a file'}: {error.strerror or error}")
    except torch.OutOfMemoryError:
        parser.error("the device's memory is full: use a smaller --batch-size")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    except RuntimeError as error:
        if not (dist.is_initialized() and "peer" in str(error)):
            raise
        parser.exit(2)  # another process has stopped, and has said why
    if result and args.json:
        print(json.dumps(result))
    elif result:
        report(result)


if __name__ == "__main__":
    main()
