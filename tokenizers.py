"""Images <-> tokens: the two tokenizers, and the pictures that they work on.

D2C describes one picture twice, on one grid of h x w places:

    image (B,3,H,W) in [-1,1]
     |- VQTokenizer.encode -> codes   (B,h,w) int64, one of K codebook rows per place: the coarse picture
     '- KLTokenizer.encode -> moments (B,2C,h,w), mean and log-variance of C numbers per place; a latent is a sample

Both are convolutional autoencoders of one family (Esser et al. 2021, arXiv 2012.09841, section 3.1). They differ in
what happens to the encoder's output z (x': decoded picture; sg: no gradient; norms are means over elements):

    VQ   z -> nearest row e of a codebook   loss = |x - x'|^2 + |sg(z) - e|^2 + 0.25 |z - sg(e)|^2
    KL   latent ~ N(mean, variance)         loss = |x - x'|^2 + kl_weight * KL( N(mean, variance) || N(0, 1) )

The same classes hold LlamaGen's VQ-16 and MAR's KL-16 (16 pixels a place), and small ones that train in a minute. The
published ones were trained with perceptual and adversarial losses as well, which keep texture crisp; here the squared
error alone stands for the picture. Reading order: tokenizers, convolutional family, pictures, data sets, built-in data.
"""
import contextlib
import math
import os
import unicodedata
import warnings
from collections import OrderedDict
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset

# The two tokenizers --------------------------------------------------------------------------------------------------

@dataclass
class TokenizerConfig:
    """Sizes of a tokenizer. Where nothing else is said, the defaults are those of the published VQ-16 and KL-16."""
    z_channels: int                          # KL: C, 16 in KL-16. VQ: width around the bottleneck, 256 in VQ-16
    width: int = 128                         # channels at full resolution
    multipliers: tuple = (1, 1, 2, 2, 4)     # channels per level / width; the resolution halves between levels
    num_res_blocks: int = 2                  # per level; the decoder has one more
    encoder_attention: bool = True           # in the level at the grid's resolution; the middle always has it
    decoder_attention: bool = False          # the same for the decoder: VQ-16 yes, KL-16 no
    patch: int = 1                           # > 1: stem and head work on patches, far cheaper for small pictures
    linear_skip: bool = False                # one linear map past the encoder, one past the decoder: learns faster
    codebook_size: int = 0                   # VQ only: K, 16384 in VQ-16
    code_dim: int = 8                        # VQ only: width of a codebook row
    kl_weight: float = 1e-3                  # KL only, and ours: weight of the KL (a mean) against the squared error

    @property
    def factor(self):
        """How many pixels wide one place of the grid is."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

class VQTokenizer(nn.Module):
    """Images <-> discrete codes. Encoder vectors z and codebook rows e have length 1: the nearest row is the one at the
    smallest angle, and more rows stay in use (Yu et al. 2021, arXiv 2110.04627; LlamaGen, arXiv 2406.06525)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, config.z_channels)
        self.decoder = Decoder(config)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.code_dim)})  # VQ-16's key
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    def codebook(self):
        """(K,code_dim), rows of unit length."""
        return F.normalize(self.quantize["embedding"].weight, dim=-1)

    def features(self, images):
        """images (B,3,H,W) -> unit vectors z (B,code_dim,h,w), before quantisation."""
        z = self.quant_conv(self.encoder(images))
        return F.normalize(z.to(self.quant_conv.weight.dtype), dim=1)  # autocast made z bf16: normalise in float32

    def nearest(self, z):
        """Unit vectors z (B,code_dim,h,w) -> codes (B,h,w) int64: nearest rows (largest cosine), in full_float32."""
        with full_float32(z.device):
            return torch.einsum("bchw,kc->bhwk", z, self.codebook()).argmax(-1)        # (B,h,w,K) -> (B,h,w)

    def rows(self, codes):
        """codes (B,h,w) -> their codebook rows e (B,code_dim,h,w)."""
        return F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)

    def encode(self, images):
        """images (B,3,H,W) in [-1,1] -> codes (B,h,w) int64."""
        with full_float32(images.device):
            return self.nearest(self.features(images))

    def decode(self, codes):
        """codes (B,h,w) -> images (B,3,H,W) in about [-1,1]: the coarse picture."""
        return self.decoder(self.post_quant_conv(self.rows(codes)))

    def forward(self, images):
        """Training: (loss, codes (B,h,w), z (B,code_dim,h,w)); train.py needs the last two to revive unused rows. The
        decoder sees e, but its gradient goes to z as if z were e (straight-through: van den Oord et al. 2017, arXiv
        1711.00937); e learns by following z, with weight 1, and z is held near e with weight 0.25."""
        z = self.features(images)
        codes = self.nearest(z)
        e = self.rows(codes)
        reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))             # (B,3,H,W)
        codebook_loss = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
        return F.mse_loss(reconstruction, images) + codebook_loss, codes, z

    @classmethod
    def from_published(cls, state):
        """Build from LlamaGen's keys, strictly. Raises KeyError or RuntimeError naming keys."""
        state = {key: value for key, value in state.items() if key != "quantize.codebook_used"}  # training statistics
        codebook_size, code_dim = state["quantize.embedding.weight"].shape
        return build_published(cls, state, codebook_size, code_dim)

class KLTokenizer(nn.Module):
    """Images <-> latents: a diagonal Gaussian per place (Kingma & Welling 2013; KL-16 of MAR, arXiv 2406.11838). Here
    latents are unscaled. Stage 2 has them times `scale`, of variance 1: train.py multiplies, sample.py divides."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scale = 1.0  # 1 / standard deviation of the latents of the data; train.py measures it
        self.encoder = Encoder(config, 2 * config.z_channels)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, images):
        """images (B,3,H,W) in [-1,1] -> moments (B,2C,h,w): mean and log-variance, unscaled."""
        with full_float32(images.device):
            return self.quant_conv(self.encoder(images))

    def decode(self, latents):
        """unscaled latents (B,C,h,w) -> images (B,3,H,W) in about [-1,1]: the fine picture."""
        return self.decoder(self.post_quant_conv(latents))

    @staticmethod
    def sample(moments, noise, dim=1):
        """mean + standard deviation * noise, with the log-variance clamped to [-30, 20]. `dim` is the channel
        dimension: moments have 2C there (C means, then C log-variances), noise and result have C."""
        mean, log_variance = moments.chunk(2, dim)
        return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise

    def forward(self, images, noise):
        """Training loss: squared error of the picture decoded from a sample, plus kl_weight times the KL divergence to
        N(0, 1) in nats, log-variance clamped as in `sample`; both means over elements. noise (B,C,h,w) ~ N(0, 1)."""
        moments = self.quant_conv(self.encoder(images))  # (B,2C,h,w); not by `encode`: training may run in bf16
        mean, log_variance = moments.chunk(2, 1)                                              # (B,C,h,w) each
        log_variance = log_variance.clamp(-30, 20)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return F.mse_loss(self.decode(self.sample(moments, noise)), images) + self.config.kl_weight * kl

    @classmethod
    def from_published(cls, state):
        """Build from MAR's keys, strictly. They name the same layers in another way: the decoder's levels count from
        full resolution there, and in order of execution here. Raises KeyError or RuntimeError naming keys."""
        levels = len({key.split(".")[2] for key in state if key.startswith("decoder.up.")})
        names = {"encoder.down.": "encoder.conv_blocks.", ".block.": ".res.", ".mid.block_1.": ".mid.0.",
                 ".mid.attn_1.": ".mid.1.", ".mid.block_2.": ".mid.2."}
        names |= {f"decoder.up.{i}.": f"decoder.conv_blocks.{levels - 1 - i}." for i in range(levels)}
        for theirs, ours in names.items():
            state = {key.replace(theirs, ours): value for key, value in state.items()}
        return build_published(cls, state)

def build_published(cls, state, codebook_size=0, code_dim=8):
    """A tokenizer of class `cls` with these weights (in LlamaGen's key layout), strictly, on their device. The sizes of
    the convolutional family are read off their shapes."""
    width = state["encoder.conv_in.weight"].shape[0]
    levels = len({key.split(".")[2] for key in state if key.startswith("encoder.conv_blocks.")})
    config = TokenizerConfig(
        z_channels=state["post_quant_conv.weight"].shape[0], width=width,
        multipliers=tuple(len(state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"]) // width for i in range(levels)),
        num_res_blocks=len({key.split(".")[4] for key in state if key.startswith("encoder.conv_blocks.0.res.")}),
        encoder_attention=f"encoder.conv_blocks.{levels - 1}.attn.0.q.weight" in state,
        decoder_attention="decoder.conv_blocks.0.attn.0.q.weight" in state,
        codebook_size=codebook_size, code_dim=code_dim)
    with torch.device(state["post_quant_conv.weight"].device):
        model = cls(config)
    model.load_state_dict(state)
    return model

@contextlib.contextmanager
def full_float32(device):
    """No bf16 and no TF32 inside, whatever the caller has set: their rounding changes codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

def to_tokens(maps):
    """(B,C,h,w) -> (B,h*w,C), row by row."""
    return maps.flatten(2).transpose(1, 2)

def to_map(tokens, grid):
    """(B,h*w,C) -> (B,C,h,w)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))

# The convolutional family --------------------------------------------------------------------------------------------

def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)

class ResBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(x)

class AttentionBlock(nn.Module):
    """Single-head self-attention between all places of a feature map."""
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)                                                                      # (B,C,h,w)
        q, k, v = (to_tokens(layer(y)) for layer in (self.q, self.k, self.v))                 # (B,hw,C)
        return x + self.proj_out(to_map(F.scaled_dot_product_attention(q, k, v), x.shape[2:]))

class Level(nn.Module):
    """The residual blocks at one resolution, each followed by attention if asked for; then, under the published names,
    a layer that halves the resolution (`down`) or doubles it (`up`)."""
    def __init__(self, in_channels, channels, num_blocks, attention, down=False, up=False):
        super().__init__()
        widths = [in_channels] + [channels] * num_blocks
        self.res = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttentionBlock(channels) for _ in range(num_blocks if attention else 0))
        self.downsample, self.upsample = nn.Identity(), nn.Identity()
        if down:  # padded right and bottom only, as in the published nets
            conv = nn.Conv2d(channels, channels, 3, stride=2)
            self.downsample = nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))
        if up:
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            self.upsample = nn.Sequential(OrderedDict(enlarge=nn.Upsample(scale_factor=2.0), conv=conv))

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))

def middle(channels):
    return nn.ModuleList([ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)])

class Encoder(nn.Module):
    """images (B,3,H,W) -> features (B,out_channels,H/f,W/f), f = patch * 2^(levels - 1)."""
    def __init__(self, config, out_channels):
        super().__init__()
        widths, self.patch = [config.width * m for m in config.multipliers], config.patch
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.width, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(before, after, config.num_res_blocks, config.encoder_attention and i == last, down=i < last)
            for i, (before, after) in enumerate(zip([config.width] + widths, widths)))
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        self.skip = nn.Conv2d(3, out_channels, config.factor, config.factor) if config.linear_skip else None

    def forward(self, images):
        x = self.conv_in(F.pixel_unshuffle(images, self.patch))                              # (B,width,H/patch,W/patch)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)                                                                    # at last (B,widths[-1],h,w)
        x = self.conv_out(F.silu(self.norm_out(x)))                                           # (B,out_channels,h,w)
        return x if self.skip is None else x + self.skip(images)

class Decoder(nn.Module):
    """(B,z_channels,h,w) -> images (B,3,h*f,w*f): the encoder run backwards, its levels in order of execution."""
    def __init__(self, config):
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        last, self.patch, self.factor = len(widths) - 1, config.patch, config.factor
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            Level(before, after, config.num_res_blocks + 1, config.decoder_attention and i == 0, up=i < last)
            for i, (before, after) in enumerate(zip(widths[:1] + widths, widths)))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3 * config.patch**2, 3, padding=1)
        self.skip = nn.Conv2d(config.z_channels, 3 * config.factor**2, 1) if config.linear_skip else None

    def forward(self, z):
        x = self.conv_in(z)                                                                   # (B,widths[0],h,w)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)                                                           # at last (B,width,H/patch,W/patch)
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)              # (B,3,H,W)
        return x if self.skip is None else x + F.pixel_shuffle(self.skip(z), self.factor)

# Pictures ------------------------------------------------------------------------------------------------------------

def to_float(images):
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1

def to_uint8(images):
    """float (B,3,H,W) in about [-1,1] -> uint8 (B,H,W,3). Truncating 127.5x + 128 is rounding 127.5x + 127.5."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

def center_crop(image, size):
    """ADM's centre crop, as for all published ImageNet numbers: uint8 (H,W,3) array -> (size,size,3). Halved with a box
    filter while the short side is at least twice `size`, then bicubic to the short side, then cropped; small images are
    enlarged. Source: guided-diffusion, `image_datasets.py` (Dhariwal & Nichol 2021)."""
    image = Image.fromarray(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.array(image)[top:top + size, left:left + size]

FORMATS, SUFFIXES = ("JPEG", "PNG", "WEBP", "BMP"), {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp"}

def read_image(path, size, upright=False):
    """One picture file of whatever kind, centre-cropped: uint8 (size,size,3). As in ADM, transparency is ignored, and
    orientation tags are unless `upright`. Raises InputError naming the file."""
    with reading(path, "repair or remove this picture"), Image.open(path, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip it to white instead of scaling it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return center_crop(np.asarray(image.convert("RGB")), size)

def draw_grid(pictures, columns, rows):
    """pictures (k,n,S,S,3), n pictures in k versions, as one PIL image. Picture i stands in column i % len(columns),
    its versions one below the other. `columns` are the titles at the top, `rows` (k of them) the names at the left.
    Titles are cut to their column, and lose what Pillow's font does not have: it has no letter beyond ASCII."""
    count, size = pictures.shape[1:3]
    tile = size * max(1, round(96 / size))  # small pictures are enlarged, pixel by pixel
    font = ImageFont.load_default(13)
    left, top, gap = 8 + int(max(font.getlength(row) for row in rows)), 20, 6
    block_height, blocks = len(rows) * tile + gap, math.ceil(count / len(columns))
    sheet = Image.new("RGB", (left + len(columns) * tile, top + blocks * block_height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        title = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()  # é is e, and an accent
        while font.getlength(title) > tile - 4:
            title = title[:-3] + ".."
        pen.text((left + (column + 0.5) * tile, top / 2), title, "black", font, anchor="mm")
    for i in range(count):
        block, column = divmod(i, len(columns))
        for k, row in enumerate(rows):
            y = top + block * block_height + k * tile
            picture = Image.fromarray(pictures[k, i]).resize((tile, tile), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + column * tile, y))
            if column == 0:
                pen.text((left - 4, y + tile / 2), row, "black", font, anchor="rm")
    return sheet

# Data sets -----------------------------------------------------------------------------------------------------------

def open_images(data, size, seed=0):
    """The data set named by `--data`: `shapes`, a folder of class folders, or an .npz. Raises InputError."""
    if data == "shapes":
        images = Shapes(size, seed=seed)
        images.note = "; these are built in, for the folder of that name give ./shapes" if os.path.exists(data) else ""
        return images
    return ImageFolder(data, size) if Path(data).is_dir() else ImageArray(data, size)

class Images(Dataset):
    """Items (uint8 (S,S,3), class id). `size` is S, `classes` the names, `labels` (N,) all ids, `note` a remark."""
    note = ""

    def __len__(self):
        return len(self.labels)

class ImageFolder(Images):
    """One folder per class (the ImageNet layout); sorted folder names give the class ids."""
    def __init__(self, root, size):
        root, self.size, self.files, others = Path(root), size, [], []
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        labels = {name: label for label, name in enumerate(self.classes)}
        for path in find_files(root):
            label = labels.get(path.parts[len(root.parts)])
            (others if label is None or path.suffix.lower() not in SUFFIXES else self.files).append((path, label))
        if not self.files:
            raise InputError(f"--data {root}: no images found; expected {root}/CLASS/IMAGE.jpg (or png, webp, bmp)")
        self.labels = np.array([label for _, label in self.files])
        self.note = f"; {len(others)} other files passed over" if others else ""
        if {"train", "val", "test"} & labels.keys():
            self.note += f"; train, val or test count as classes: did you mean --data {root}/train?"

    def __getitem__(self, index):
        path, label = self.files[index]
        return read_image(path, self.size), label

def find_files(root, above=()):
    """Paths of all files below a folder, by name; hidden ones (.name) do not count, linked ones do. Raises OSError."""
    files, here = [], os.path.realpath(root)
    if here not in above:  # a link to a folder above would lead around for ever
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if not entry.name.startswith("."):
                files += find_files(entry.path, (*above, here)) if entry.is_dir() else [Path(entry)]
    return files

class ImageArray(Images):
    """An .npz of `images` uint8 (N,H,W,3), integer `labels` (N,) from 0 upwards and maybe `classes`, a name for each.
    Raises InputError for other arrays."""
    def __init__(self, path, size):
        remedy = ("save images=... uint8 (N,H,W,3), labels=... integers (N,) from 0 upwards and, if any, classes=..., "
                  "a name for each, by numpy.savez")
        with reading(path, remedy), np.load(path, allow_pickle=False) as file:
            images, labels = np.ascontiguousarray(file["images"]), np.asarray(file["labels"])
            if not (images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and images.size
                    and labels.dtype.kind in "iu" and labels.shape == images.shape[:1]):
                raise ValueError(f"images are {images.dtype} {images.shape}, labels {labels.dtype} {labels.shape}")
            most = max(1000, len(labels))  # without names; a label of 1e9 is a mistake
            classes = file["classes"].ravel().tolist() if "classes" in file else range(min(int(labels.max()) + 1, most))
            if labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"labels run from {labels.min()} up to {labels.max()}, {len(classes)} classes at most")
        self.images, self.labels, self.size = images, labels, size
        self.classes = [str(name, "utf-8", "replace") if isinstance(name, bytes) else str(name) for name in classes]

    def __getitem__(self, index):
        return center_crop(self.images[index], self.size), int(self.labels[index])

class InputError(Exception):
    """Something the user gave cannot be used. The message names the file or flag and the remedy."""

@contextlib.contextmanager
def reading(path, remedy):
    """Whatever fails inside (zip, pickle, json, numpy, Pillow, shapes) becomes an InputError with file and remedy."""
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ValueError("no regular file")  # opening a named pipe may never end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries remark on odd files
            yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every format fails in its own way, torch with a page of advice before the reason
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())[:200] or type(error).__name__
        raise InputError(f"{path}: cannot be used ({reason}); {remedy}") from error

# The built-in data ---------------------------------------------------------------------------------------------------

class Shapes(Images):
    """Built-in data, drawn on the fly: ten shapes (what the codes must tell) with a fine texture (what they lose).
    Picture i depends on (seed, i) only. Lengths are shares of `size`."""
    classes = ["circle", "square", "triangle", "star", "cross", "ring", "heart", "moon", "arrow", "hourglass"]
    turn, tip = np.linspace(0, 2 * np.pi, 40), np.arange(10)  # of the heart, of the star
    radius, a, b = np.where(tip % 2, .42, 1.05), .95, .33  # of the star's ten corners; of the cross
    outlines = {  # corners (x, y), y downwards, of about unit radius; circle, ring and moon are made of discs
        1: [(-.75, -.75), (.75, -.75), (.75, .75), (-.75, .75)],
        2: [(0, -1), (.95, .75), (-.95, .75)],
        3: np.stack([radius * np.cos(tip * np.pi / 5 - np.pi / 2), radius * np.sin(tip * np.pi / 5 - np.pi / 2)], 1),
        4: [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)],
        6: np.stack([np.sin(turn)**3, (5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
                                       - 13 * np.cos(turn)) / 15], 1),
        8: [(0, -1), (.85, -.1), (.35, -.1), (.35, .95), (-.35, .95), (-.35, -.1), (-.85, -.1)],
        9: [(-.85, -.95), (.85, -.95), (.15, 0), (.85, .95), (-.85, .95), (-.15, 0)]}

    def __init__(self, size, count=16000, seed=0):
        self.size, self.seed, self.labels = size, seed, np.arange(count) % 10
        self.drawn = {}  # a picture takes 0.4 ms to draw: keep the small ones

    def __getitem__(self, index):
        image = self.drawn.get(index)
        if image is None:
            image = self.draw(index % 10, np.random.default_rng([self.seed, index]))
            if self.size <= 64:
                self.drawn[index] = image
        return image, index % 10

    def coverage(self, label, center, radius, angle):
        """Coverage of each pixel by the shape, float (S,S,1) in [0,1]: drawn four times larger, then averaged."""
        image, center, radius = Image.new("L", (4 * self.size,) * 2), 4 * center, 4 * radius
        pen = ImageDraw.Draw(image)
        if label in self.outlines:
            rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            corners = np.array(self.outlines[label]) @ rotation * radius + center
            pen.polygon([tuple(corner) for corner in corners], fill=255)
        else:
            pen.circle(center, radius * .95, 255)
            if label == 5:  # ring
                pen.circle(center, radius * .5, 0)
            if label == 7:  # moon
                direction = np.array([np.cos(angle - .4), np.sin(angle - .4)])
                pen.circle(center + radius * .5 * direction, radius * .75, 0)
        return np.asarray(image.reduce(4), np.float32)[..., None] / 255

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
        light, dark = np.array([hsv_to_rgb(hue, rng.uniform(.4, .7), 1), hsv_to_rgb(hue, 1, rng.uniform(.5, .6))])
        pattern = self.texture(rng)
        inside = light * pattern + dark * (1 - pattern)                           # (S,S,3)
        slope, back, shade = rng.uniform(0, 2 * np.pi), rng.uniform(), rng.uniform(.1, .25)
        y, x = np.mgrid[:size, :size] / (size - 1) - .5
        ramp = (.5 + (x * np.cos(slope) + y * np.sin(slope)) / math.sqrt(2))[..., None]
        low, high = np.array([hsv_to_rgb(back, .3, shade), hsv_to_rgb(back, .3, shade + .15)])
        outside = low * ramp + high * (1 - ramp)
        radius = size * rng.uniform(.34, .4)
        center = size / 2 + rng.uniform(-.05, .05, 2) * size
        cover = self.coverage(label, center, radius, rng.uniform(-.25, .25))
        return np.uint8(255 * (inside * cover + outside * (1 - cover)) + .5)
