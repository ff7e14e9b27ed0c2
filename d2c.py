"""The two generators of D2C and the way from a class label to tokens (arXiv 2503.17155).

    p(codes, latents | class)  =  p(codes | class)  *  p(latents | class, codes)          picture = KL decoder(latents)
                                  stage 1              stage 2

What is told of the D2C paper in the text known to us is only this and the two fusion modules; both stages are built on the
public systems that it extends.

DiscreteGenerator (stage 1) is LlamaGen's decoder-only transformer (arXiv 2406.06525). It writes the picture as a row of
codes, after a class token:

    p(codes | class) = prod_i p(code_i | class, code_1 .. code_i-1)

ContinuousGenerator (stage 2) is MAR (Li et al. 2024, arXiv 2406.11838): a masked autoencoder sees the class, the codes
and the latents drawn so far, and makes a condition z_i for every hidden place; a small diffusion network turns z_i and
noise into the latent at that place. Places are drawn in random order, several at a time:

    p(latents | class, codes) = prod_steps prod_(i drawn in this step) p(latent_i | z_i(class, codes, latents drawn before))
    loss per hidden place     = | eps - eps_theta(sqrt(a_t) x + sqrt(1 - a_t) eps, t, z) |^2  (+ a term for the variance)

With fusion="none" it is MAR itself, under MAR's parameter names; codes come in through `fusion.py`.

A label of -1 stands for "no class", codes of -1 for "no codes". Stage 1 trains on some samples without class, stage 2 on some
without class and codes; classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) extrapolates from that
unconditional prediction through the conditional one: uncond + cfg_scale * (cond - uncond).

Shapes: B pictures, N = h*w places, D width, C latent channels; M rows in the diffusion part (one per token and noise level).

Reading order: stage 1, diffusion, stage 2, the whole pipeline, presets.
"""
import functools
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fusion import Block, CrossBlock, Linear, init_linear, layer_norm, make_fusion, pick, zero

# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the discrete generator
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DiscreteConfig:
    """Sizes of stage 1; the defaults are LlamaGen-B on ImageNet-256."""
    codebook_size: int = 16384
    num_classes: int = 1000
    grid: tuple = (16, 16)       # rows and columns of codes
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    dropout: float = 0.1


def rotary_table(grid, head_dim):
    """Angles of the 2-D rotary positions as (cos, sin): (1 + h*w, head_dim/2, 2).

    A head is head_dim/2 pairs of numbers. The first half of the pairs turns with the row, the second with the column
    (LlamaGen's `precompute_freqs_cis_2d`). Row 0 belongs to the class token and is all zero: its key and query vanish,
    so every code gives it the same attention score, 0. An oddity of the published models that must be kept to match them.
    """
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))      # (head_dim/4,)
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * frequencies for place in (rows, columns)], 1)  # (h*w, head_dim/2)
    table = torch.stack([angles.cos(), angles.sin()], -1)                                     # (h*w, head_dim/2, 2)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])                               # (1+h*w, head_dim/2, 2)


def rotate(x, table):
    """Turn pairs of x (B,heads,T,head_dim) by the angles of `table` (T,head_dim/2,2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                                                # (B,heads,T,head_dim/2)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)    # (B,heads,T,head_dim)


class CausalAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.wqkv = Linear(config.width, 3 * config.width, bias=False)
        self.wo = Linear(config.width, config.width, bias=False)

    def forward(self, x, table, cache=None, position=None, past=None):
        """x (B,T,D). Without `cache` all T tokens attend causally. With it, x is the one token at `position` (a tensor of one
        element), `cache` the keys and values of all before, (B,heads,N,head_dim) each, and `past` (1,N) says which are filled."""
        qkv = self.wqkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)             # (B,3*heads,T,head_dim)
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=1)
        q, k = rotate(qk, table).chunk(2, dim=1)                                              # (B,heads,T,head_dim)
        if cache is None:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keys, values = cache
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            x = F.scaled_dot_product_attention(q, keys, values, attn_mask=past)
        x = self.wo(x.transpose(1, 2).flatten(2))                                             # (B,T,D)
        return F.dropout(x, self.dropout, self.training)


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): w2(silu(w1 x) * w3 x), width 8/3 D rounded up to a multiple of 256."""

    def __init__(self, config):
        super().__init__()
        hidden = -(-int(8 * config.width / 3) // 256) * 256
        self.dropout = config.dropout
        self.w1 = Linear(config.width, hidden, bias=False)
        self.w3 = Linear(config.width, hidden, bias=False)
        self.w2 = Linear(hidden, config.width, bias=False)

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class DiscreteBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = CausalAttention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = SwiGLU(config)

    def forward(self, x, table, cache=None, position=None, past=None):
        x = x + self.attention(self.attention_norm(x), table, cache, position, past)
        return x + self.feed_forward(self.ffn_norm(x))


class DiscreteGenerator(nn.Module):
    """p(codes | class), an autoregressive transformer over the N = h*w codes of a picture, row by row."""

    checkpointing = False  # recompute the blocks in the backward pass: a third more time, far less memory

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, config.width)})
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.layers = nn.ModuleList(DiscreteBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = Linear(config.width, config.codebook_size, bias=False)
        self.register_buffer("rotary", rotary_table(config.grid, config.width // config.num_heads), persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # all codes start equally likely

    @classmethod
    def from_published(cls, state, num_heads=None, grid=None):
        """Build from LlamaGen's class-conditional weights; all sizes but the heads (default: 64 wide) are read off the
        tensors. The grid is not stored with the weights; 16x16 unless given. Raises KeyError or RuntimeError."""
        codebook_size, width = state["tok_embeddings.weight"].shape
        config = DiscreteConfig(
            codebook_size=codebook_size, width=width, num_heads=num_heads or width // 64, grid=tuple(grid or (16, 16)),
            num_classes=state["cls_embedding.embedding_table.weight"].shape[0] - 1, depth=count_blocks(state, "layers"))
        with torch.device(state["output.weight"].device):
            model = cls(config)
        model.load_published(state)
        return model

    def load_published(self, state):
        """Load LlamaGen's weights, strictly, into a model of the same sizes. Raises RuntimeError naming keys."""
        self.load_state_dict({key: value for key, value in state.items() if key != "freqs_cis"})  # a table, not a weight

    def compile(self, **options):
        """torch.compile what repeats, in place: the block (all layers share its graph) for training, a code for sampling."""
        for layer in self.layers:
            layer.compile(**options)
        self.decode_one = torch.compile(self.decode_one, **options)

    def embed_labels(self, labels):
        """labels (B,), -1 for no class -> (B,1,D); the null class is the last row of the table."""
        return self.cls_embedding["embedding_table"](labels.where(labels >= 0, self.config.num_classes))[:, None]

    def logits(self, codes, labels):
        """codes (B,N), labels (B,) -> (B,N,K); [:, i] predicts codes[:, i] and sees the class and the codes before."""
        x = torch.cat([self.embed_labels(labels), self.tok_embeddings(codes[:, :-1])], 1)     # (B,N,D)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer in self.layers:
            x = run_block(layer, x, self.rotary[:x.shape[1]], checkpointing=self.checkpointing)
        return self.output(self.norm(x))                                                      # (B,N,K)

    def forward(self, codes, labels):
        """Training loss: mean cross-entropy per code, in nats. codes (B,N), labels (B,) with -1 where dropped."""
        return F.cross_entropy(self.logits(codes, labels).flatten(0, 1), codes.flatten())

    def decode_one(self, x, position, cache):
        """The embedded token x (B,1,D) at `position` (1,) -> logits (B,K) of the next code; extends the cache, per layer
        keys and values (B,heads,N,head_dim), or of N as many as are needed."""
        past = (torch.arange(cache[0][0].shape[2], device=x.device) <= position)[None]        # (1,N)
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, self.rotary[position], layer_cache, position, past)
        return self.output(self.norm(x))[:, 0]                                                # (B,K)

    @torch.no_grad()
    def generate(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
        """labels (B,) -> codes (B,N), sampled one by one through a cache of keys and values.

        cfg_scale 1 is no guidance; with cfg_interval = k >= 0 only the first k + 2 codes are guided (LlamaGen counts from
        the second code, and includes k). temperature 0 takes the likeliest code. top_k 0 and top_p 1 keep all codes.
        """
        guided, batch, device = cfg_scale != 1, len(labels), labels.device
        number = math.prod(self.config.grid)
        quarter = -(-number // 4)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, -1)])                         # (2B,)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.output.weight.dtype
        head_dim = self.config.width // self.config.num_heads
        cache = [torch.zeros(2, len(labels), self.config.num_heads, number, head_dim, device=device, dtype=dtype).unbind()
                 for _ in self.layers]
        positions = torch.arange(number, device=device)
        codes = torch.empty(batch, number, dtype=torch.int64, device=device)
        x = self.embed_labels(labels)                                                         # (B or 2B,1,D)
        for i in range(number):
            if i % quarter == 0:  # attention reads no more of the cache than it must, in four sizes
                part = [(keys[:, :, :i + quarter], values[:, :, :i + quarter]) for keys, values in cache]
            logits = self.decode_one(x, positions[i:i + 1], part).float()                     # (B or 2B,K)
            if guided:
                cond, uncond = logits.chunk(2)                                                # (B,K) each
                logits = uncond + cfg_scale * (cond - uncond) if cfg_interval < 0 or i <= cfg_interval + 1 else cond
            codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)
            x = self.tok_embeddings(codes[:, i:i + 1])                                        # (B,1,D)
            x = torch.cat([x, x]) if guided else x
        return codes


def sample_code(logits, temperature, top_k, top_p, generator):
    """Draw one code per row of logits (B,K) -> (B,)."""
    if temperature < 1e-4:  # dividing by less would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]              # (B,1)
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:  # nucleus: the fewest likeliest codes that hold top_p of the probability
        ordered, index = logits.softmax(-1).sort(descending=True)                             # (B,K)
        beyond = ordered.cumsum(-1) - ordered > top_p  # what came before is enough without this one
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    # What torch.multinomial does, without its check of the probabilities, for which the CPU would wait for the GPU at every code.
    probabilities = logits.softmax(-1)                                                        # (B,K)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


def count_blocks(state, name):
    """How many blocks `name`.0, `name`.1, ... a state dict has. Raises KeyError when there are none."""
    found = [int(match[1]) for match in (re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in state) if match]
    if not found:
        raise KeyError(f"{name}.0")
    return max(found) + 1


def run_block(block, x, *others, checkpointing):
    """block(x, *others); with `checkpointing` only its input is kept, and the rest computed again in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, *others, use_reentrant=False)
    return block(x, *others)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion of one token: schedule, denoiser, loss, sampler (Ho et al. 2020; Nichol & Dhariwal 2021, as in MAR)
# ---------------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # traced, its float64 arithmetic would come out in float32
@functools.lru_cache(maxsize=256)
def diffusion_schedule(steps=1000, device=torch.device("cpu"), dtype=torch.float32):
    """Tables over the `steps` kept of 1000 noise levels (index 0: least noise), computed in float64.

    a_t is the signal's share of the variance (alpha-bar, cosine schedule); the reverse step from x_t has the posterior
    q(x_t-1 | x_t, x_0) = N(x0_weight x_0 + xt_weight x_t, exp(log_posterior)); index 0,
    whose variance is zero, repeats the log of index 1. Cached, so that a sampling loop finds them on its device.
    Raises ValueError for steps outside 2..1000.
    """
    if not 2 <= steps <= 1000:
        raise ValueError(f"diffusion steps must lie in 2..1000, not {steps}")
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    a = np.cumprod(1 - np.minimum(1 - cosine[1:] / cosine[:-1], 0.999))
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = a[timesteps]
    before = np.append(1.0, a[:-1])
    beta = 1 - a / before
    posterior = beta * (1 - before) / (1 - a)
    posterior[0] = posterior[1]
    tables = dict(signal=np.sqrt(a), noise=np.sqrt(1 - a), recip_signal=np.sqrt(1 / a), recip_noise=np.sqrt(1 / a - 1),
                  x0_weight=beta * np.sqrt(before) / (1 - a), xt_weight=(1 - before) * np.sqrt(1 - beta) / (1 - a),
                  log_beta=np.log(beta), log_posterior=np.log(posterior))
    tables = {name: torch.from_numpy(table).to(device, dtype) for name, table in tables.items()}
    return dict(tables, timesteps=torch.from_numpy(timesteps).to(device))


def timestep_embedding(t, channels=256):
    """Integer t (M,) -> (M,channels): cosines, then sines, of t at geometric frequencies."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(channels // 2, device=t.device) / (channels // 2))
    angles = t[:, None].float() * frequencies                                                 # (M,channels/2)
    return torch.cat([angles.cos(), angles.sin()], -1)


class DenoiserBlock(nn.Module):
    """Residual MLP; time and condition set shift, scale and gate of the norm (adaLN, Peebles & Xie 2022)."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = layer_norm(width)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class DenoiserOutput(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Denoiser(nn.Module):
    """(x (M,C), t (M,) or (1,), z (M,D)) -> (M,2C): the noise eps in x, and where the variance lies between its two bounds.

    Loops call the two halves: `cond_embed(z)` once, `denoise` for each of many noise levels.
    """

    def __init__(self, channels, width, depth, z_width):
        super().__init__()
        self.time_embed = nn.ModuleDict({"mlp": nn.Sequential(Linear(256, width), nn.SiLU(), Linear(width, width))})
        self.cond_embed = Linear(z_width, width)
        self.input_proj = Linear(channels, width)
        self.res_blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.final_layer = DenoiserOutput(width, 2 * channels)
        self.apply(init_linear)
        for layer in (self.time_embed["mlp"][0], self.time_embed["mlp"][2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero(self.final_layer.linear, *(part.adaLN_modulation[1] for part in [*self.res_blocks, self.final_layer]))

    @classmethod
    def from_published(cls, state):
        """Build from the keys below `diffloss.net.` of a MAR checkpoint, sizes read off the tensors."""
        (width, channels), z_width = state["input_proj.weight"].shape, state["cond_embed.weight"].shape[1]
        with torch.device(state["input_proj.weight"].device):
            model = cls(channels, width, count_blocks(state, "res_blocks"), z_width)
        model.load_state_dict(state)
        return model

    def forward(self, x, t, z):
        return self.denoise(x, t, self.cond_embed(z))

    def denoise(self, x, t, c):
        """The same, given c = cond_embed(z) (M,width)."""
        y = self.time_embed["mlp"](timestep_embedding(t).to(x.dtype)) + c                     # (M,width)
        x = self.input_proj(x)                                                                # (M,width)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)                                                         # (M,2C)


def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    """Mean and log-variance (M,C) of the reverse step from x at table index `index`, given the noise eps in it; the
    estimate of x0 that eps implies is kept within +-clip.

    fraction in about [-1,1] interpolates the log-variance between its lower and upper bound (Nichol & Dhariwal, eq. 15).
    """
    x0 = (tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps).clamp(-clip, clip)
    share = (fraction + 1) / 2
    log_variance = share * tables["log_beta"][index] + (1 - share) * tables["log_posterior"][index]
    return tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x, log_variance


def diffusion_loss(denoiser, x0, t, noise, c):
    """Hybrid loss per row (M,): squared error of the noise, plus the variational bound in bits, which trains the variance
    alone (the mean enters it without gradient). x0, noise (M,C); t (M,) in 0..999; c (M,*) the condition that
    `denoiser` takes, Denoiser.denoise's (M,width) say. L_hybrid of Nichol & Dhariwal, eq. 16: weight 1 on one of 1000 terms of
    the bound is their 0.001 on the sum.
    """
    tables = diffusion_schedule(1000, x0.device, x0.dtype)
    t = t[:, None]                                                                            # (M,1)
    x = tables["signal"][t] * x0 + tables["noise"][t] * noise
    eps, fraction = denoiser(x, t[:, 0], c).to(x0.dtype).chunk(2, dim=-1)                     # (M,C) each
    mean, log_variance = posterior_step(x, eps.detach(), fraction, tables, t)
    # The same step with the true noise, and the variance at its lower bound, is the true posterior.
    true_mean, true_log_variance = posterior_step(x, noise, torch.full_like(noise, -1), tables, t)
    kl = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                + (true_mean - mean)**2 * (-log_variance).exp())
    bound = torch.where(t == 0, discretised_nll(x0, mean, 0.5 * log_variance), kl)            # (M,C)
    return ((eps - noise)**2).mean(-1) + bound.mean(-1) / math.log(2)


def discretised_nll(x, mean, log_std):
    """Negative log-probability of x in a bin of half-width 1/255 under a Gaussian: the last step's bound, written for
    pixels in [-1,1] and applied to latents as they are, as the published models do."""
    def cdf(value):  # tanh approximation of the normal distribution function
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    upper, lower = (cdf((x - mean + side / 255) * (-log_std).exp()) for side in (1, -1))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))  # edge bins are open
    return -inside.clamp(min=1e-12).log()


def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    """x (M,C) at the noise level of table index `index` -> x (M,C) at the next lower one. noise (M,C); the rest as in
    diffusion_sample. `index` (1,) is a tensor so that one compiled graph serves all steps, and tables stay on the device."""
    guided = len(c) != len(x)
    with torch.autocast(x.device.type, enabled=False):  # the first step multiplies errors of eps by 300: no bf16 here
        eps, fraction = denoiser(torch.cat([x, x]) if guided else x, tables["timesteps"][index], c).chunk(2, dim=-1)  # (M or 2M,C)
    if guided:
        cond, uncond = eps.chunk(2)                                                           # (M,C) each
        eps, fraction = uncond + cfg_scale * (cond - uncond), fraction[:len(x)]
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    return mean + (0.5 * log_variance).exp() * noise * temperature * (index > 0)  # none is added after the last step


@torch.no_grad()
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    """Ancestral sampling of one latent per condition: (M,C).

    denoiser(x (M,C), t (1,), c) -> (M,2C), Denoiser.denoise say, on the condition c (M,*).
    noise: an iterable of (M,C) draws, first the start, then one per step (the last is drawn and not used, as in MAR).
    With guidance c is [cond; uncond] of 2M rows, eps = uncond + cfg_scale (cond - uncond), and the variance is the
    conditional half's. temperature scales the noise of every step. clip bounds the estimate of x0: the cosine schedule's
    first step divides by 5e-5, where a network of few training steps would throw x far off (MAR does not clip).
    step: denoising_step, or a compiled one.
    """
    noise = iter(noise)
    x = next(noise)                                                                           # (M,C)
    tables = diffusion_schedule(steps, x.device, x.dtype)
    for index in torch.arange(steps, device=x.device).flip(0).split(1):
        step_noise = next(noise)[:len(x)]  # MAR draws for both halves of a guided batch and uses the first
        x = step(denoiser, x, c, step_noise, tables, index, temperature, cfg_scale, clip)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the continuous generator
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ContinuousConfig:
    """Sizes of stage 2; the defaults are MAR-B on ImageNet-256 without fusion."""
    channels: int = 16           # C of the latents
    num_classes: int = 1000
    grid: tuple = (16, 16)       # rows and columns of latents, the same as of codes
    width: int = 768
    encoder_depth: int = 12
    decoder_depth: int = 12
    num_heads: int = 12
    buffer_size: int = 64        # S slots that carry the class and give the encoder room when all else is hidden
    head_depth: int = 6          # of the diffusion network
    head_width: int = 1024
    noise_levels: int = 4        # per hidden token and training step: z is dear, the head is cheap
    hidden_share: tuple = (0.25, 0.7)  # of places in training: normal around 1 of this deviation, cut to [this, 1]
    guess_weight: float = 0.0    # > 0: a linear layer guesses each latent from z, in training (see ContinuousGenerator)
    dropout: float = 0.1
    fusion: str = "none"         # none, cross, qformer, aligned
    fusion_depth: int = 2
    codebook_size: int = 0       # with fusion


class ContinuousGenerator(nn.Module):
    """p(latents | class, codes), a masked autoencoder with a diffusion head over the N = h*w latents of a picture.

    Which places are known is told by index: visible (B,V), the places whose latents may be read.

    The diffusion loss teaches the trunk slowly: most noise levels say little about z. Runs of minutes end before z uses the
    visible latents at all, so small presets add a guess of the latent from z by one linear layer (`guess_weight`). It is
    not used in sampling; MAR has nothing like it.
    """

    checkpointing = False  # recompute the blocks in the backward pass: a third more time, far less memory

    denoising_step = staticmethod(denoising_step)  # `compile` puts a compiled one in its place

    ADDED = ("fusion.", "code_embedding.", "null_code", "guess.")  # the parameters that MAR does not have

    def __init__(self, config):
        super().__init__()
        if config.fusion != "none" and config.codebook_size < 1:
            raise ValueError("with fusion, codebook_size must be given")
        self.config = config
        width, places = config.width, math.prod(config.grid)
        slots = config.buffer_size + places

        def table(rows):
            return nn.Parameter(torch.randn(1, rows, width) * 0.02)

        def blocks(depth):
            return nn.ModuleList(Block(width, config.num_heads, config.dropout) for _ in range(depth))

        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.randn(1, width) * 0.02)  # MAR's name for "no class"
        self.z_proj = nn.Linear(config.channels, width)
        self.z_proj_ln = layer_norm(width)
        self.encoder_pos_embed_learned = table(slots)
        self.encoder_blocks = blocks(config.encoder_depth)
        self.encoder_norm = layer_norm(width)
        self.decoder_embed = Linear(width, width)
        self.mask_token = table(1)
        self.decoder_pos_embed_learned = table(slots)
        self.decoder_blocks = blocks(config.decoder_depth)
        self.decoder_norm = layer_norm(width)
        self.diffusion_pos_embed_learned = table(places)
        self.apply(init_linear)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = nn.ModuleDict({"net": Denoiser(config.channels, config.head_width, config.head_depth, width)})
        if config.guess_weight:
            self.guess = nn.Linear(width, config.channels)
        if config.fusion != "none":
            self.code_embedding = nn.Embedding(config.codebook_size, width)
            nn.init.normal_(self.code_embedding.weight, std=0.02)
            self.null_code = table(1)
            self.fusion = make_fusion(config.fusion, width, config.num_heads, slots, config.fusion_depth, config.dropout)
            self.start_fusion()

    @classmethod
    def from_published(cls, state, num_heads=None):
        """Build from MAR's weights, strictly; all sizes but the heads are read off the tensors, the grid taken as square.
        Heads are 64 wide unless given, as in MAR-B and MAR-L; MAR-H has 16 of 80. Raises KeyError or RuntimeError naming
        keys that are missing or extra."""
        (width, channels), slots = state["z_proj.weight"].shape, state["encoder_pos_embed_learned"].shape[1]
        places = state["diffusion_pos_embed_learned"].shape[1]
        config = ContinuousConfig(
            channels=channels, width=width, num_heads=num_heads or width // 64, grid=(math.isqrt(places),) * 2,
            buffer_size=slots - places, num_classes=state["class_emb.weight"].shape[0],
            encoder_depth=count_blocks(state, "encoder_blocks"), decoder_depth=count_blocks(state, "decoder_blocks"),
            head_width=state["diffloss.net.input_proj.weight"].shape[0],
            head_depth=count_blocks(state, "diffloss.net.res_blocks"))
        with torch.device(state["z_proj.weight"].device):
            model = cls(config)
        model.load_published(state)
        return model

    def load_published(self, state):
        """Load MAR's weights into a model of the same sizes; all that MAR lacks may be missing, and then stays fresh.
        Raises RuntimeError naming keys."""
        added = {key for key in self.state_dict() if key.startswith(self.ADDED)}
        fresh = added if added.isdisjoint(state) else set()
        missing, extra = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if key not in fresh]
        if missing or extra:
            raise RuntimeError(f"missing keys {missing[:4]}, unexpected keys {extra[:4]}")
        if self.config.fusion != "none" and fresh:
            self.start_fusion()  # the queries start on the position table, which has just changed

    def compile(self, **options):
        """torch.compile what repeats, in place: the blocks, which share a few graphs, and the diffusion network. Sizes that
        change between calls (of places visible, hidden, drawn) become symbols when they first do: no size is padded, and none
        compiles anew."""
        for module in self.modules():
            if isinstance(module, (Block, CrossBlock)):
                module.compile(**options)
        self.denoising_step = torch.compile(denoising_step, **options)
        self.diffloss["net"].denoise = torch.compile(self.diffloss["net"].denoise, **options)

    @torch.no_grad()
    def start_fusion(self, codebook=None):
        """Start what fusion adds so that codes and latents of one place find each other early: queries on the decoder's
        position table, and, given the tokenizer's codebook (K,code_dim) of unit rows, the embedding of the codes as a
        random linear map of it, so that near codes start near."""
        if self.config.fusion == "qformer":
            self.fusion.queries.copy_(self.decoder_pos_embed_learned)
        if codebook is not None:
            spread = torch.randn(codebook.shape[1], self.config.width, device=codebook.device) * 0.02
            self.code_embedding.weight.copy_(codebook @ spread)                               # (K,D)

    def prepare(self, codes):
        """codes (B,N), -1 for no codes -> what the fusion module needs of them; the same for every step of sampling.
        Raises ValueError when there is fusion and there are no codes."""
        if self.config.fusion == "none":
            return None
        if codes is None:
            raise ValueError(f"fusion {self.config.fusion!r} needs codes")
        discrete = self.code_embedding(codes.clamp(min=0))                                    # (B,N,D)
        discrete = torch.where((codes >= 0)[..., None], discrete, self.null_code)
        return self.fusion.prepare(discrete + self.decoder_pos_embed_learned[:, self.config.buffer_size:])

    def condition(self, latents, visible, labels, context=None, wanted=None):
        """The condition z (B,R,D) of the places `wanted` (B,R), all N unless given, from the latents (B,N,C) at the places
        `visible` (B,V), the labels (B,), -1 for no class, and the prepared codes."""
        (batch, number), buffer = latents.shape[:2], self.config.buffer_size
        if wanted is None:
            wanted = torch.arange(number, device=latents.device).expand(batch, -1)                          # (B,N)

        # Encoder: S slots that all hold the class, then the visible tokens, each with its position.
        label = torch.where(labels[:, None] >= 0, self.class_emb(labels.clamp(min=0)), self.fake_latent)   # (B,D)
        positions = self.encoder_pos_embed_learned
        x = torch.cat([label[:, None] + positions[:, :buffer],
                       self.z_proj(pick(latents, visible)) + pick(positions[:, buffer:], visible)], 1)     # (B,S+V,D)
        x = self.z_proj_ln(x)
        for block in self.encoder_blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        x = self.decoder_embed(self.encoder_norm(x))

        # Decoder: the same tokens back in their places, mask tokens elsewhere; here the codes come in. Attention needs all
        # slots to the end, but the last block's output only where it is wanted.
        tokens = self.mask_token.to(x.dtype).expand(batch, number, -1)                                      # (B,N,D)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, buffer:])
        x = torch.cat([x[:, :buffer], tokens], 1) + self.decoder_pos_embed_learned                          # (B,S+N,D)
        if context is not None:
            x = self.fusion(x, context)
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        x = run_block(last, x, None, buffer + wanted, checkpointing=self.checkpointing)                     # (B,R,D)
        return self.decoder_norm(x) + pick(self.diffusion_pos_embed_learned, wanted)                        # (B,R,D)

    def forward(self, latents, visible, hidden, labels, codes, t, noise):
        """Training loss, a scalar: the diffusion loss of the hidden places, each at R noise levels, and the guess's error.

        latents (B,N,C); visible (B,V) and hidden (B,K) places, V + K = N; labels (B,), codes (B,N), -1 where dropped;
        t (B,K,R) in 0..999; noise (B,K,R,C) standard normal.
        """
        z = self.condition(latents, visible, labels, self.prepare(codes), hidden)             # (B,K,D)
        latents, net = pick(latents, hidden), self.diffloss["net"]                            # (B,K,C)

        def rows(x):                                                                          # (B,K,*) -> (B*K*R,*)
            return x[:, :, None].expand(-1, -1, t.shape[2], -1).flatten(0, 2)

        loss = diffusion_loss(net.denoise, rows(latents), t.flatten(), noise.flatten(0, 2), rows(net.cond_embed(z))).mean()
        if self.config.guess_weight:
            loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(latents.dtype), latents)
        return loss

    @torch.no_grad()
    def generate(self, labels, codes=None, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
                 clip=math.inf, generator=None, orders=None, draw=None):
        """labels (B,), codes (B,N) unless fusion is "none" -> latents (B,N,C), scaled as in training.

        diffusion_steps: a number, or (first, last): annealed linearly from the first token step to the last, since the more latents
        are known the less is left to chance (DiSA, arXiv 2505.20297). clip: see diffusion_sample. orders (B,N), permutations; drawn
        unless given. draw(rows, C) supplies the noise; standard normal unless given.
        """
        number, channels, device = math.prod(self.config.grid), self.config.channels, labels.device
        draw = draw or (lambda *shape: torch.randn(shape, generator=generator, device=device))
        net = self.diffloss["net"]
        batch, guided = len(labels), cfg_scale != 1.0
        if orders is None:
            orders = torch.rand(batch, number, generator=generator, device=device).argsort(1)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, -1)])                         # (2B,)
            codes = None if codes is None else torch.cat([codes, torch.full_like(codes, -1)])
        context = self.prepare(codes)
        latents = torch.zeros(batch, number, channels, device=device)
        schedule = token_schedule(number, num_steps, cfg_scale)
        guidance = torch.tensor([scale for _, scale in schedule], device=device)              # (num_steps,)
        remaining = number
        for k, (revealed, _) in enumerate(schedule):
            places = orders[:, remaining - revealed:remaining].sort(1).values                 # (B,r): MAR's order of rows
            visible = orders[:, remaining:]                                                   # (B,V)
            remaining -= revealed
            known, seen = (torch.cat([x, x]) if guided else x for x in (latents, visible))
            wanted = torch.cat([places, places]) if guided else places
            z = self.condition(known, seen, labels, context, wanted).flatten(0, 1)            # (B*r or 2B*r,D)
            with torch.autocast(device.type, enabled=False):  # see denoising_step
                c = net.cond_embed(z.to(latents.dtype))                                       # (B*r or 2B*r,width)
            steps = annealed(diffusion_steps, k, num_steps)
            noise = (draw(batch * revealed, channels) for _ in range(steps + 1))
            tokens = diffusion_sample(net.denoise, c, noise, temperature, guidance[k], steps, clip, self.denoising_step)    # (B*r,C)
            latents.scatter_(1, places[..., None].expand(-1, -1, channels), tokens.unflatten(0, (batch, revealed)))
        return latents


def token_schedule(num_tokens, num_steps, cfg_scale):
    """[(tokens drawn, guidance)] per step: few tokens first, while little is known (MaskGIT's cosine, arXiv 2202.04200),
    and guidance that grows linearly with what is drawn (MAR). Raises ValueError for more steps than tokens."""
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"token steps must lie in 1..{num_tokens} (the number of tokens), not {num_steps}")
    schedule, hidden = [], num_tokens
    for step in range(num_steps):
        after = math.floor(num_tokens * math.cos(math.pi / 2 * (step + 1) / num_steps))
        after = max(1, min(hidden - 1, after))  # at least one token now, and one for the last step
        guidance = 1 + (cfg_scale - 1) * (num_tokens - after) / num_tokens  # the last step counts as one still hidden
        revealed = hidden - after if step < num_steps - 1 else hidden
        schedule.append((revealed, guidance))
        hidden -= revealed
    return schedule


def annealed(diffusion_steps, k, num_steps):
    """Diffusion steps in token step k of `num_steps`: the number given, or of (first, last) the value on the line between."""
    if isinstance(diffusion_steps, int):
        return diffusion_steps
    first, last = diffusion_steps
    return round(first + (last - first) * k / max(1, num_steps - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The whole pipeline
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(discrete, continuous, labels, cfg1=1.0, temperature1=1.0, top_k=0, top_p=1.0,
             cfg2=1.0, temperature2=1.0, steps=64, diffusion_steps=100, clip=math.inf, generator=None):
    """labels (B,) -> codes (B,N) of stage 1 and latents (B,N,C) of stage 2, which is told those codes.

    Stage 1 takes cfg1, temperature1, top_k, top_p; stage 2 takes cfg2, temperature2, steps (of tokens), diffusion_steps (of
    each, or first and last) and clip. Either generator may be None (LlamaGen or MAR alone); what it would have made is then
    None too.
    """
    codes = latents = None
    if discrete is not None:
        codes = discrete.generate(labels, cfg1, temperature1, top_k, top_p, generator)
    if continuous is not None:
        latents = continuous.generate(labels, codes, steps, cfg2, temperature2, diffusion_steps, clip, generator)
    return codes, latents


# ---------------------------------------------------------------------------------------------------------------------
# Presets: sizes and settings of a run in one place
# ---------------------------------------------------------------------------------------------------------------------


def training(steps, batch_size, lr, warmup, ema, weight_decay=0.0, decay="cosine", grad_clip=1.0):
    """Settings of one stage's training; the learning rate is that of `batch_size`."""
    return dict(steps=steps, batch_size=batch_size, lr=lr, warmup=warmup, ema=ema, weight_decay=weight_decay, decay=decay,
                grad_clip=grad_clip)


def imagenet_preset(stage1, stage2, cfg2):
    """ImageNet-256: published tokenizers, the published trunks, the training settings of LlamaGen (300 epochs) and MAR (800
    epochs, the first 100 of them warm-up)."""
    return dict(
        size=256, vq=None, kl=None, fusion="qformer", stage1=stage1, stage2=stage2,
        train={1: training(1_500_000, 256, 1e-4, warmup=0, ema=0.9999, weight_decay=0.05, decay="constant"),
               2: training(500_000, 2048, 8e-4, warmup=62_500, ema=0.9999, weight_decay=0.02, decay="constant", grad_clip=3.0)},
        sample=dict(cfg1=2.0, temperature1=1.0, cfg2=cfg2, temperature2=1.0, steps=64, diffusion_steps=100, clip=math.inf,
                    batch_size=32))


# Small tokenizers work on patches, with a linear skip around the network: at 32 pixels that is far cheaper than
# convolutions at full resolution. Small runs take few steps, hence high rates that decay, a short average, and `clip`.
# The demo's 64 codes are enough for shape and colour; more of them, or longer training, begin to draw the texture.
# Of 4 x 4 pixels (48 numbers) cifar keeps 24: with 16, or with the demo's pull on the latents, photographs lose detail that FID sees.
SMALL = dict(encoder_attention=False, num_res_blocks=1, linear_skip=True)
PRESETS = {
    "demo": dict(
        size=32, fusion="cross",
        vq=dict(z_channels=64, width=32, multipliers=(1, 2), patch=4, codebook_size=64, code_dim=8, **SMALL),
        kl=dict(z_channels=32, width=32, multipliers=(1,), patch=8, **SMALL),
        stage1=dict(width=128, depth=4, num_heads=4, dropout=0.0),
        stage2=dict(width=128, encoder_depth=2, decoder_depth=2, num_heads=4, buffer_size=4, head_depth=3, head_width=192,
                    dropout=0.0, fusion_depth=1, noise_levels=1, hidden_share=(1.0, 0.1), guess_weight=2.0),
        train={0: training(800, 32, 8e-3, warmup=50, ema=0.99),
               1: training(1200, 64, 3e-3, warmup=100, ema=0.99, weight_decay=0.05),
               2: training(1200, 64, 2e-3, warmup=100, ema=0.99, weight_decay=0.02)},
        sample=dict(cfg1=2.0, temperature1=0.9, cfg2=1.0, temperature2=0.7, steps=8, diffusion_steps=50, clip=5.0,
                    batch_size=100)),
    "cifar": dict(
        size=32, fusion="qformer",
        vq=dict(z_channels=64, width=64, multipliers=(1,), patch=4, codebook_size=1024, code_dim=8, **SMALL),
        kl=dict(z_channels=24, width=64, multipliers=(1,), patch=4, kl_weight=1e-4, **SMALL),
        stage1=dict(width=256, depth=6, num_heads=4, dropout=0.1),
        stage2=dict(width=256, encoder_depth=4, decoder_depth=4, num_heads=4, buffer_size=16, head_depth=3, head_width=384,
                    dropout=0.1, noise_levels=1, hidden_share=(1.0, 0.1), guess_weight=2.0),
        train={0: training(20_000, 64, 3e-3, warmup=200, ema=0.999),
               1: training(20_000, 256, 1e-3, warmup=500, ema=0.9995, weight_decay=0.05),
               2: training(50_000, 256, 1e-3, warmup=500, ema=0.9995, weight_decay=0.02)},
        sample=dict(cfg1=1.5, temperature1=1.0, cfg2=1.5, temperature2=1.0, steps=16, diffusion_steps=50, clip=5.0,
                    batch_size=500)),
    "B": imagenet_preset(dict(width=768, depth=12, num_heads=12),
                         dict(width=768, encoder_depth=12, decoder_depth=12, num_heads=12, head_depth=6, head_width=1024), 2.9),
    "L": imagenet_preset(dict(width=1024, depth=24, num_heads=16),
                         dict(width=1024, encoder_depth=16, decoder_depth=16, num_heads=16, head_depth=8, head_width=1280), 3.0),
    "H": imagenet_preset(dict(width=1024, depth=24, num_heads=16),
                         dict(width=1280, encoder_depth=20, decoder_depth=20, num_heads=16, head_depth=12, head_width=1536), 3.2),
}
