"""Are the samples as good, and as varied, as real images?  FID, sFID, Inception Score, precision and recall.

    python fid.py samples.npz --ref VIRTUAL_imagenet256_labeled.npz   # ADM's file, as papers use it
    python fid.py my_samples --ref real.npz:images --bootstrap 20     # any two sets, folder or .npz; standard errors
    python fid.py real.npz:images --make-stats real-stats.npz         # measure a reference once, for later --ref

Pixels say little about what is in an image, so a network trained to classify ImageNet describes every image first:

    uint8 image -> resize to 299x299 -> Inception-v3 -> pool    (2048)  what is in the image
                                                     -> spatial (2023)  where it is: 7 channels of a 17x17 map
                                                     -> logits  (1008)  its class: the 1000 of ImageNet, and 8 unused

Two sets of images make two clouds of such points. Four numbers compare the clouds, the fifth looks at samples alone:

    FID        |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of `pool`, whose mean is mu, covariance S   [Heusel 2017]
    sFID       the same of `spatial`, which sees the layout; both are distances: small is good             [Nash 2021]
    precision  share of samples that lie among the real images: quality                            [Kynkaanniemi 2019]
    recall     share of real images that lie among the samples: variety
    IS         exp(mean KL(p(class | image) || mean p)): each image clear, all of them varied          [Salimans 2016]

Two FIDs compare only if all of these agree: the network (TensorFlow's of 2015-12-05; torchvision's is another), the
resize (`tf1` as in ADM, `half_pixel` as in pytorch-fid), the reference (for ImageNet ADM's training-set statistics),
the count (50,000 samples, 50 per class), and lossless files (JPEG changes pixels). All definitions are those of ADM's
evaluator [Dhariwal & Nichol 2021, arXiv 2105.05233], whose float16 may move precision and recall by 0.01.
This file imports none of its neighbours: copy it to where you need it.
"""
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends quietly, from the first import on
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from scipy.linalg.lapack import dpstrf
from scipy.special import rel_entr

# The metrics: from features to numbers -------------------------------------------------------------------------------

def statistics(x):
    """Features (N,D) tensor -> mean (D,) and covariance (D,D), which divides by N - 1; sums and arrays in float64."""
    mu = x.mean(dim=0, dtype=torch.float64)
    centred = (rows.double() - mu for rows in x.split(1000))  # in blocks: a float64 copy of all would be large
    sigma = sum(rows.T @ rows for rows in centred) / (len(x) - 1)  # (D,D)
    return mu.numpy(), sigma.numpy()

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float, of float64 arrays (D,) and (D,D). It
    keeps its digits where a covariance is singular, as it is with fewer images than dimensions."""
    # Say S for sigma, and S = F F^T. S1 S2 = F1 F1^T F2 F2^T has the same eigenvalues, but for zeros, as M M^T with
    # M = F1^T F2. So the trace of its root is the sum of the singular values of M: real, never negative, accurate for
    # singular S too. A square root of S1 S2 itself (scipy's sqrtm) promises none of this: S1 S2 is not symmetric.
    def factor(sigma):  # pivoted Cholesky stops where only rounding is left: (D,D) of rank r -> (D,r)
        lower, pivots, rank, _ = dpstrf(sigma, lower=1)
        return np.tril(lower)[np.argsort(pivots), :rank]  # rows back from the order of the pivots

    trace_of_root = np.linalg.svd(factor(sigma1).T @ factor(sigma2), compute_uv=False).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)

def precision_recall(reference, samples, k=3, block=1000):
    """Features (N,D) and (M,D) -> (share of samples inside the reference, share of the reference inside the samples).
    Around each point of a set lies a ball out to its k-th nearest other point of that set. A point is inside a set if
    any of the set's balls holds it, rim included. Only `block` rows of distances are held: all may be 10 GB."""
    def radii(points):  # k + 1, since a point is its own nearest
        return torch.cat([torch.cdist(rows, points).topk(k + 1, largest=False).values[:, -1]
                          for rows in points.split(block)])  # (len(points),)

    reference_radii, sample_radii = radii(reference), radii(samples)
    good, covered = 0, torch.zeros_like(reference_radii, dtype=torch.bool)  # a mask: two blocks may cover one image
    for rows, radii_of_rows in zip(samples.split(block), sample_radii.split(block)):
        distances = torch.cdist(rows, reference)  # (block,N)
        good += (distances <= reference_radii).any(dim=1).sum().item()
        covered |= (distances <= radii_of_rows[:, None]).any(dim=0)
    return good / len(samples), covered.sum().item() / len(reference)

def inception_score(probs, split_size=5000):
    """Class probabilities (N,C) -> exp(mean over p of KL(p || mean of the p)) in each split, then the plain average of
    the splits: consecutive rows, the last maybe short, as in ADM. 0 log 0 is 0. The caller shuffles, if need be."""
    probs = np.asarray(probs, dtype=np.float64)
    splits = [probs[i : i + split_size] for i in range(0, len(probs), split_size)]
    return float(np.mean([np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()) for p in splits]))

# Inception-v3 [Szegedy 2015, arXiv 1512.00567] as TensorFlow published it; layer names are those of the weight file --

average_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)  # padding does not darken the border
max_pool = nn.MaxPool2d(3, stride=1, padding=1)
halve = nn.MaxPool2d(3, stride=2)  # (B,C,H,W) -> (B,C,(H-1)//2,(W-1)//2)

def conv(channels_in, channels_out, kernel, stride=1, padding=None):
    """Convolution, batch norm, ReLU."""
    padding = padding or ("same" if stride == 1 else "valid")  # TensorFlow's graph, but for two layers
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(channels_out, eps=1e-3), relu=nn.ReLU(inplace=True)))

class Mixed(nn.Module):
    """Branches on one input, outputs concatenated. A branch is a chain of layers (channels, kernel[, stride]), stored
    as NAME_1, NAME_2, ..., a lone one as NAME. The last, branch_pool, starts from a pool; its 1x1 is optional. Kernel
    (1, 7) is one layer. A list of two kernels is two layers on one input, NAME_Na and NAME_Nb, and ends the branch."""
    def __init__(self, channels_in, pool, pool_width=None, **branches):
        super().__init__()
        self.pool, self.branches = pool, []  # a branch: its layers in order; a layer: its name, or the names of a pair
        branches["branch_pool"] = [(pool_width, 1)] if pool_width else []
        for branch, layers in branches.items():
            channels, chain = channels_in, []
            for i, (channels_out, kernel, *stride) in enumerate(layers, start=1):
                name = branch if len(layers) == 1 else f"{branch}_{i}"
                pair = {f"{name}a": kernel[0], f"{name}b": kernel[1]} if isinstance(kernel, list) else {name: kernel}
                for key, size in pair.items():
                    self.add_module(key, conv(channels, channels_out, size, *stride))
                chain.append(list(pair))
                channels = channels_out
            self.branches.append(chain)

    def forward(self, x):
        outputs = []
        for chain in self.branches:
            ends = [self.pool(x) if chain is self.branches[-1] else x]
            for names in chain:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat(outputs, dim=1)

def mixed35(width, pool_width):  # for maps of 35x35
    return Mixed(width, average_pool, pool_width, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)])

def mixed17(inner):  # for maps of 17x17: a 1x7 and a 7x1 see as far as a 7x7, for two sevenths of the work
    return Mixed(768, average_pool, 192, branch1x1=[(192, 1)], branch7x7=[(inner, 1), (inner, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(inner, 1), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))])

def mixed8(width, pool):  # for maps of 8x8
    return Mixed(width, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, [(1, 3), (3, 1)])],
                 branch3x3dbl=[(448, 1), (384, 3), (384, [(1, 3), (3, 1)])])

class InceptionV3(nn.Module):
    """(B,3,299,299) in [-1,1] -> pool (B,2048), spatial (B,2023), logits (B,1008): without the bias, as ADM takes them,
    or None without `classifier`. A measuring instrument: in eval mode and without gradients from the start."""
    def __init__(self, classifier=True):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = conv(32, 64, 3)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, padding="valid")
        self.Mixed_5b = mixed35(192, pool_width=32)
        self.Mixed_5c = mixed35(256, pool_width=64)
        self.Mixed_5d = mixed35(288, pool_width=64)
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)])
        self.Mixed_6b = mixed17(inner=128)
        self.Mixed_6c = mixed17(inner=160)
        self.Mixed_6d = mixed17(inner=160)
        self.Mixed_6e = mixed17(inner=192)
        self.Mixed_7a = Mixed(768, halve, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)])
        self.Mixed_7b = mixed8(1280, average_pool)
        self.Mixed_7c = mixed8(2048, max_pool)  # not the average of the paper: the 2015 graph has it so
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
    """The network with the weights of a flat state dict, on their device; num_batches_tracked and fc may be absent."""
    with torch.device(next(iter(state.values())).device):
        model = InceptionV3(classifier="fc.weight" in state)
        model.load_state_dict(dict(state))  # dict() drops the version; for old ones torch adds num_batches_tracked
    return model

def fold_batch_norms(model):
    """Faster: in eval mode a batch norm is a scale and a shift, and the convolution before it can do both."""
    for layer in model.modules():
        if isinstance(layer, nn.Sequential):
            layer.conv, layer.bn = nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    return model

# From images to features ---------------------------------------------------------------------------------------------

def tf1_resize(x):
    """Bilinear (B,3,H,W) -> (B,3,299,299) as in TensorFlow 1: output i reads from i * in/out, so the picture shifts by
    half a pixel, and shrinking skips pixels. A flaw, but every published ADM number contains it."""
    for dim, shape in ((3, (1, -1)), (2, (-1, 1))):  # along columns, then rows: the other order differs in the last bit
        size = x.shape[dim]
        source = torch.arange(299, device=x.device) * torch.tensor(size / 299)  # (299,), in float32 as in the graph
        lower = source.long()
        upper = (lower + 1).clamp(max=size - 1)
        left, right = x.index_select(dim, lower), x.index_select(dim, upper)  # `dim` becomes 299
        x = left + (right - left) * (source - lower).view(shape)
    return x

def preprocess(images, resize="tf1"):
    """uint8 (B,H,W,3) -> float32 (B,3,299,299) in [-1,1]; `resize` is "tf1" (ADM) or "half_pixel" (pytorch-fid)."""
    x = images.permute(0, 3, 1, 2).contiguous().float()  # (B,3,H,W)
    if resize == "tf1":
        return (tf1_resize(x) - 128) / 128  # 128, not 127.5: as in TensorFlow's graph
    return 2 * nn.functional.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1

@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 is on by default in convolutions: 10 bits of 23
def features(model, images, batch_size=50, resize="tf1", device="cpu"):
    """uint8 images (N,H,W,3) -> pool (N,2048), spatial (N,2023), logits (N,1008) or None; float32, on the CPU.
    `images` is whatever has a length and gives arrays or tensors for slices; `model` lives on `device`."""
    outputs = []
    with ThreadPoolExecutor(1) as reader:  # it reads the next batch while the network runs
        coming = reader.submit(images.__getitem__, slice(0, batch_size))
        for end in range(batch_size, len(images) + batch_size, batch_size):
            batch = torch.as_tensor(coming.result()).to(device)  # (B,H,W,3)
            if end < len(images):
                coming = reader.submit(images.__getitem__, slice(end, end + batch_size))
            x = preprocess(batch, resize).contiguous(memory_format=torch.channels_last)  # (B,3,299,299)
            outputs.append([None if output is None else output.cpu() for output in model(x)])
            print(f"{min(end, len(images))}/{len(images)} images", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*outputs)]

# From files to sets of images ----------------------------------------------------------------------------------------

HASH = "6726825d"  # the SHA-256 of the published weights begins so
WEIGHTS = f"pt_inception-2015-12-05-{HASH}.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
METRICS = ["FID", "sFID", "IS", "precision", "recall"]
GAUSSIANS = {"FID": ("pool", "mu", "sigma"), "sFID": ("spatial", "mu_s", "sigma_s")}  # a feature, its statistics
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}  # as in ADM's files
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp")

class InputError(Exception):
    """A file or flag cannot be used; the message names it and the remedy."""

@contextlib.contextmanager
def reading(source, remedy):
    """Whatever goes wrong inside becomes one InputError that names the source."""
    try:
        if os.path.exists(source) and not (os.path.isfile(source) or os.path.isdir(source)):
            raise ValueError("no regular file")  # opening a named pipe may never end
        yield
    except Exception as error:  # zipfile, zlib, pickle, numpy, Pillow and torch each raise several kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(f"{source}: cannot be used ({reason}); {remedy}") from error

def load_inception(path=None, device="cpu"):
    """The network, made fast, with the weights of a file, or else with pytorch-fid's, downloaded on first use."""
    cached = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
    with reading(path or cached, f"name a copy of {WEIGHTS_URL} with --weights, or put one into {cached.parent}"):
        if not path and not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, cached, hash_prefix=HASH)
        model = inception_from_state(torch.load(path or cached, map_location="cpu", weights_only=True))
    return fold_batch_norms(model).to(device, memory_format=torch.channels_last)

def find_files(root, above=()):
    """Paths of all files below a folder, as in tokenizers.py: hidden ones do not count, linked ones do."""
    files, here = [], os.path.realpath(root)
    if here not in above:  # a link to a folder above would lead around for ever
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if not entry.name.startswith("."):
                files += find_files(entry.path, (*above, here)) if entry.is_dir() else [Path(entry)]
    return files

class Folder:
    """All PNG, JPEG and WebP images below a folder. The headers of all are checked before the first is decoded."""
    def __init__(self, path):
        files = find_files(path)
        self.paths = [file for file in files if file.suffix.lower() in SUFFIXES]
        self.others = len(files) - len(self.paths)
        np.random.default_rng(0).shuffle(self.paths)  # else a split of the Inception Score would hold few classes
        self.threads, self.size = ThreadPoolExecutor(8), None
        for path in self.paths:
            self.read(path, header_only=True)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        return np.stack(list(self.threads.map(self.read, self.paths[rows])))  # (n,H,W,3)

    def read(self, path, header_only=False):
        remedy = "all must be 8-bit RGB and of one size: replace, convert (Pillow: image.convert('RGB')) or remove it"
        with reading(path, remedy), Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            mode = ("16-bit " if "16B" in str(image.tile) else "") + image.mode  # Pillow would quietly drop 8 bits
            self.size = self.size or image.size
            if mode != "RGB" or image.size != self.size:
                raise ValueError(f"{mode} of {image.size} pixels, not RGB of {self.size}")
            return None if header_only else np.asarray(image)  # (H,W,3)

class Archive:
    """The images KEY of an .npz, read slice by slice: numpy would read all, and 50,000 may be 10 GB."""
    def __init__(self, path, key):
        archive = zipfile.ZipFile(path)
        self.path, self.file = path, archive.open(f"{key}.npy")
        np.lib.format.read_magic(self.file)
        self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.file)
        self.start = self.file.tell()
        size, order = archive.getinfo(f"{key}.npy").file_size - self.start, "Fortran" if fortran else "C"
        if dtype != np.uint8 or self.shape[3:] != (3,) or min(self.shape[1:]) < 1 or math.prod(self.shape) != size:
            raise ValueError(f"{key} is a {dtype} array {self.shape} in {order} order, {size} bytes")
        self.whole = np.load(path, allow_pickle=False)[key] if fortran else None  # its slices do not lie together

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if self.whole is not None:
            return self.whole[rows]
        begin, end, _ = rows.indices(len(self))
        size = self.shape[1] * self.shape[2] * 3  # bytes of an image
        with reading(self.path, "the file is damaged: copy it again"):
            self.file.seek(self.start + begin * size)  # cheap from front to back
            data = bytearray(self.file.read((end - begin) * size))  # torch wants writable memory
            return np.frombuffer(data, np.uint8).reshape(end - begin, *self.shape[1:])  # (n,H,W,3)

@dataclass(eq=False)  # a set equals only itself: arrays cannot be compared with a plain ==
class ImageSet:
    """The samples or the reference: what the file holds, and later what the network finds in the images.
    FID and sFID prefer saved statistics: ADM's reference has those of all training images, but only 10,000 images."""
    name: str | None = None
    images: Folder | Archive | tuple = ()
    saved: dict = field(default_factory=dict)  # {"FID": (mu, sigma), "sFID": (mu_s, sigma_s)}, as far as the file goes
    notes: dict = field(default_factory=dict)  # how these were made, as far as known: {"resize": ..., "weights": ...}
    features: dict = field(default_factory=dict)  # pool, spatial, logits

    def gaussian(self, metric):
        """(mu, sigma) for FID or sFID."""
        return self.saved.get(metric) or statistics(self.features[GAUSSIANS[metric][0]])

def read_set(name):
    """The ImageSet of a folder, of FILE.npz, or of FILE.npz:KEY, which is this array alone, as images."""
    found, remedy = ImageSet(name), "give a folder, or an .npz of uint8 (N,H,W,3), or one of --make-stats"
    stem, colon, key = name.partition(".npz:")
    path = f"{stem}.npz" if colon else name
    if os.path.isdir(path):
        found.images = Folder(path)
    else:
        with reading(path, remedy), np.load(path, allow_pickle=False) as file:
            parts = {} if key else {part: file[part] for part in (*STATISTICS, "resize", "weights") if part in file}
            for part, shape in STATISTICS.items():
                if part in parts and (parts[part].shape != shape or not np.isfinite(parts[part]).all()):
                    raise ValueError(f"{part} must be {shape} finite numbers")
            found.saved = {metric: (parts[mu], parts[sigma])
                           for metric, (_, mu, sigma) in GAUSSIANS.items() if mu in parts and sigma in parts}
            found.notes = {"resize": "tf1"} if "mu_s" in parts else {}  # ADM's files have mu_s, and no notes
            found.notes |= {note: str(parts[note]) for note in ("resize", "weights") if note in parts}
            key = key or next((known for known in ("arr_0", "images") if known in file), None)
            found.images = Archive(path, key) if key else ()
    if len(found.images) < 4 and (found.images or not found.saved):  # precision and recall need k + 1
        raise InputError(f"{name}: {len(found.images)} images; give 4 or more, .png, .jpg, .jpeg or .webp in a folder, "
                         "or in an .npz arr_0, images, or another array as FILE.npz:KEY")
    return found

# The command ---------------------------------------------------------------------------------------------------------

def compare(samples, reference, metrics, device):
    """{metric: number}, for sets that have what the metrics need."""
    scores = {metric: frechet_distance(*samples.gaussian(metric), *reference.gaussian(metric))
              for metric in metrics if metric in GAUSSIANS}
    if "IS" in metrics:
        scores["IS"] = inception_score(samples.features["logits"].double().softmax(dim=1))
    if "precision" in metrics or "recall" in metrics:
        clouds = [side.features["pool"].to(device) for side in (reference, samples)]
        scores["precision"], scores["recall"] = precision_recall(*clouds)
    return {metric: scores[metric] for metric in metrics}

def standard_errors(samples, reference, metrics, device, count):
    """{metric: estimated standard error}: the spread over `count` random halves. Saved statistics stay whole."""
    generator, runs = torch.Generator().manual_seed(0), []

    def half(side):  # without replacement: no twins, and a mean of half of these rows varies as one of N fresh rows
        total = len(side.features.get("pool", ()))
        rows = torch.randperm(total, generator=generator)[: total // 2].sort().values  # in order, for the splits of IS
        return replace(side, features={name: x[rows] for name, x in side.features.items()})

    for i in range(count):
        print(f"half {i + 1} of {count}", end="\r", file=sys.stderr, flush=True)
        runs.append(compare(half(samples), half(reference), metrics, device))
    return {metric: float(np.std([run[metric] for run in runs], ddof=1)) for metric in metrics}

def caveats(samples, reference, metrics, weights):
    """What commonly spoils the numbers, a line each."""
    gaussians = "FID" in metrics or "sFID" in metrics
    for side in (samples, reference):
        if others := getattr(side.images, "others", 0):
            yield f"{side.name}: {others} files that do not end in {', '.join(SUFFIXES)} are passed over"
        if gaussians and side.saved and "resize" not in side.notes:
            yield f"{side.name}: does not say how its images were resized (pytorch-fid's statistics are half_pixel)"
        if gaussians and not side.saved and len(side.images) < 2048:
            yield f"{side.name}: {len(side.images)} images cannot fill Inception's 2048 dimensions; FID is far too high"
    usual, whose = (50000, "papers have") if reference.saved else (len(reference.images), "the reference has")
    if samples.images and usual and len(samples.images) != usual:
        yield f"{samples.name}: {len(samples.images)} images, {whose} {usual}; FID falls and recall rises with more"
    if other := {weights, samples.notes.get("weights"), reference.notes.get("weights")} - {None, HASH}:
        yield f"Inception weights {', '.join(sorted(other))}: compare only equal weights; those of papers are {HASH}"
    if any(path.suffix.lower() in (".jpg", ".jpeg") for path in getattr(samples.images, "paths", [])):
        yield f"{samples.name}: JPEG changes pixels, and FID sees it; save samples as PNG or .npz"

def evaluate(args, device):
    """Do what the flags say; returns {metric or setting: value}, the object that --json prints."""
    metrics = args.metrics or (METRICS if args.ref or not args.out else ["IS"])
    if not args.ref and metrics != ["IS"]:
        raise InputError("--ref is missing: name an .npz or a folder, or ask for --metrics IS or --make-stats OUT.npz")
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: must be at least 1")
    samples, reference = sides = read_set(args.samples), read_set(args.ref) if args.ref else ImageSet()
    for side in sides:
        if side.notes.get("resize", args.resize) != args.resize:
            raise InputError(f"{side.name}: its statistics were made with --resize {side.notes['resize']}; use it too")
    if args.out and (samples.saved or args.out.exists() or not args.out.parent.is_dir()):
        raise InputError(f"--make-stats {args.out}: must be a new file; images beside statistics need FILE.npz:KEY")
    # For a metric the network looks at the images of both sets (of the samples, for IS), unless statistics are saved.
    looks = [(metric, side) for metric in metrics for side in (sides if metric != "IS" else [samples])
             if metric not in side.saved]
    unavailable = {metric: f"{side.name} has no images, and no statistics for it"
                   for metric, side in looks if not side.images}
    if args.metrics and unavailable:
        raise InputError("; ".join(f"--metrics {metric}: {reason}" for metric, reason in unavailable.items()))
    looked = [side for side in sides if any(side is other and metric not in unavailable for metric, other in looks)]
    if args.bootstrap and (args.bootstrap < 2 or samples.saved or any(len(side.images) < 8 for side in looked)):
        raise InputError(f"--bootstrap {args.bootstrap}: takes 2 or more, at least 8 images a set, no saved samples")
    weights = None
    if looked:
        model = load_inception(args.weights, device)
        weights = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()[:8] if args.weights else HASH
        if "IS" in metrics and model.fc is None:
            unavailable["IS"] = "the weights have no last layer, fc"
    metrics = [metric for metric in metrics if metric not in unavailable]
    for caveat in caveats(samples, reference, metrics, weights):
        print("warning:", caveat, file=sys.stderr)
    for side in looked:
        found = features(model, side.images, args.batch_size, args.resize, device)
        if not all(x.isfinite().all() for x in found if x is not None):
            raise InputError(f"{args.weights or WEIGHTS}: makes features that are not finite; name other --weights")
        side.features = {name: x for name, x in zip(("pool", "spatial", "logits"), found) if x is not None}
    if args.out:
        arrays = dict(zip(STATISTICS, samples.gaussian("FID") + samples.gaussian("sFID")))
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:  # the file appears whole, or not at all
            np.savez(f"{folder}/whole.npz", **arrays, resize=args.resize, weights=weights, count=len(samples.images))
            os.replace(f"{folder}/whole.npz", args.out)
        print(f"saved {args.out}", file=sys.stderr)
    result = compare(samples, reference, metrics, device)
    if args.bootstrap:
        result["standard_errors"] = standard_errors(samples, reference, metrics, device, args.bootstrap)
    for role, side in zip(("samples", "reference"), sides):
        result |= {role: side.name, f"{role}_images": len(side.images) if side in looked else None,
                   f"{role}_statistics": not side.saved.keys().isdisjoint(metrics)}
    return result | {"unavailable": unavailable, "weights": weights, "resize": args.resize}

def report(result):
    """What `evaluate` found, as text: the numbers, and all that one must know to compare them."""
    errors, rows = result.get("standard_errors", {}), []
    for metric in METRICS:
        if metric in result:
            rows.append((metric, f"{result[metric]:.4f}" + (f" +- {errors[metric]:.4f}" if errors else "")))
        elif metric in result["unavailable"]:
            rows.append((metric, f"unavailable: {result['unavailable'][metric]}"))
    for role in ("samples", "reference"):
        if result[role]:
            used = ", its statistics" if result[f"{role}_statistics"] else ""
            rows.append((role, f"{result[role]}: {result[f'{role}_images'] or 'no'} images{used}"))
    if result["weights"]:
        rows.append(("Inception", f"weights {result['weights']}, resize {result['resize']}"))
    return "\n".join(f"{label:10} {text}" for label, text in rows)

def main(argv=None):
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = argparse.ArgumentParser("fid.py", usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0])
    parser.add_argument("samples", help="FILE.npz, FILE.npz:KEY, a folder of images, or an .npz of statistics")
    parser.add_argument("--ref", help="what to compare with, in the same forms")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all possible; IS alone needs no --ref")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="K", help="standard errors from K random halves")
    parser.add_argument("--weights", help="Inception weights (default: pytorch-fid's, downloaded once)")
    parser.add_argument("--resize", choices=["tf1", "half_pixel"], default="tf1", help="ADM's or pytorch-fid's")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time")
    parser.add_argument("--device", choices=sorted({"auto", "cpu", best}), default="auto", help=f"auto is {best} here")
    parser.add_argument("--make-stats", dest="out", type=Path, metavar="OUT.npz", help="write statistics for --ref")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    try:
        result = evaluate(args, best if args.device == "auto" else args.device)
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except torch.OutOfMemoryError:
        parser.error("the device's memory is full: use a smaller --batch-size")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    try:
        print(json.dumps(result) if args.json else report(result), flush=True)
    except OSError as error:  # a closed pipe, a full disk: Python would try again, and say more, at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.error(error)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to end
    main()
