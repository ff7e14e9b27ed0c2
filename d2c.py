"""The two generators of D2C, and the way from a class label to tokens (arXiv 2503.17155).

    p(codes, latents | class)  =  p(codes | class)  *  p(latents | class, codes)          picture = KL decoder(latents)
                                  stage 1              stage 2

DiscreteGenerator (stage 1) is LlamaGen's decoder-only transformer (arXiv 2406.06525): it writes the picture as a row of
codes, after a class token. ContinuousGenerator (stage 2) is MAR (arXiv 2406.11838): a masked autoencoder sees the
class, the codes and the latents drawn so far, and makes a condition z_i for every place i; a small network, the
diffusion head, turns z_i and noise into the latent there. Places are drawn in random order, several per token step.
Both have the parameter names of the originals. Codes enter by `fusion.py`; with fusion="none" stage 2 is MAR itself.

    stage 1    p(codes | class) = prod_i p(code_i | class, code_1 .. code_i-1)
    stage 2    loss per hidden place = | eps - eps_theta(sqrt(a_t) x + sqrt(1 - a_t) eps, t, z_i) |^2  + a variance term

A label of -1 stands for "no class", codes of -1 for "no codes". Some training samples get them: the generators learn
to predict without. Classifier-free guidance (arXiv 2207.12598) extrapolates: uncond + cfg_scale * (cond - uncond).

Shapes: B pictures, N = h*w places, D width, K codes, C latent channels; M rows in the diffusion part (a row is one
latent at one noise level). Reading order: stage 1, diffusion, stage 2, the whole pipeline, presets.
"""
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from fusion import Block, FusionBlock, init_linear, layer_norm, make_fusion, zero

# Stage 1: the discrete generator -------------------------------------------------------------------------------------

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
    """Angles of the 2-D rotary positions as (cos, sin): (1 + h*w, head_dim/2, 2). A head is head_dim/2 pairs of
    numbers. The first half of the pairs turns with the row of a place, the second half with its column: pair i of a
    half by the angle n / 10000^(2i / (head_dim/2)), where n is the number of the row or column, from 0. The first entry
    is the class token's and all zero: its key and query vanish, and every code gives it the same attention score, 0.
    (An oddity of LlamaGen's code that its weights need.)"""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))   # (head_dim/4,)
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in grid))             # (h*w,2) row, column
    angles = (places[..., None] * frequencies).flatten(1)                                     # (h*w,head_dim/2)
    table = torch.stack([angles.cos(), angles.sin()], -1)                                     # (h*w,head_dim/2,2)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])                               # (1+h*w,head_dim/2,2)

def rotate(x, table):
    """Turn the pairs of x (B,heads,T,head_dim) by the angles of `table` (T,head_dim/2,2). Numbers 2i and 2i+1 of a head
    are a pair, and stay where they are. The result is a new tensor of x's dtype."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                                                # (B,heads,T,head_dim/2)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)    # (B,heads,T,head_dim)

class CausalAttention(nn.Module):
    """Causal self-attention with rotary positions. `wqkv` makes (q, k, v) x heads x head_dim, in this order."""
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, table, cache=None, position=None, past=None):
        """x (B,T,D) -> (B,T,D), `table` the angles of its T tokens. Without `cache` all attend causally. With it T = 1:
        x is the token at `position` (1,) in the sequence class, code 0 .. code N-2 (N slots: the last code predicts
        nothing). Its key and value are written into `cache`, (B,heads,N,head_dim) each, and `past` (1,N) is True at
        slots 0 .. position, the only ones read. (Fixed sizes and a mask: one compiled graph serves all positions.)
        Scores are divided by sqrt(head_dim); in training dropout acts on the result of `wo`."""
        qkv = self.wqkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)             # (B,3*heads,T,head_dim)
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=1)
        q, k = rotate(qk, table).chunk(2, dim=1)                                              # (B,heads,T,head_dim)
        if cache is not None:
            k, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)  # (B,heads,N,head_dim)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=past, is_causal=cache is None)
        x = self.wo(x.transpose(1, 2).flatten(2))                                             # (B,T,D)
        return F.dropout(x, self.dropout, self.training)

class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): w2(silu(w1 x) * w3 x), width 8/3 D rounded up to a multiple of 256."""
    def __init__(self, config):
        super().__init__()
        hidden = 256 * math.ceil(8 * config.width / 3 / 256)
        self.dropout = config.dropout
        self.w1, self.w3 = (nn.Linear(config.width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, config.width, bias=False)

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

def sample_code(logits, temperature, top_k, top_p, generator):
    """Draw one code per row of logits (B,K) -> (B,). First the logits are divided by the temperature; temperature 0
    takes the likeliest code. Then only the top_k likeliest stay (0, or more than K: all of them). Of what is left,
    renormalised, only the fewest likeliest codes stay whose sum reaches top_p (1: all of them). Which of equally likely
    codes stay is free. Rows are drawn independently, all by `generator` (None: torch's own)."""
    if temperature < 1e-4:  # as good as 0, and safe to divide by from here on
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]              # (B,1)
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)                             # (B,K)
        beyond = ordered.cumsum(-1) - ordered > top_p  # what comes before is enough without this one
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)  # back in the order of the codes
    # Of K exponential clocks with rates p_k, clock k rings first with probability p_k. torch.multinomial draws so, too,
    # but first it checks the probabilities, and the CPU would wait for the GPU at every code.
    probabilities = logits.softmax(-1)                                                        # (B,K)
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)

class DiscreteGenerator(nn.Module):
    """p(codes | class): an autoregressive transformer over the N = h*w codes of a picture, row by row."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.width % (4 * config.num_heads):
            raise ValueError(f"num_heads {config.num_heads}: width must be a multiple of four times that")
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, config.width)})
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.layers = nn.ModuleList(DiscreteBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        table = rotary_table(config.grid, config.width // config.num_heads)
        self.register_buffer("rotary", table, persistent=False)                               # (1+N,head_dim/2,2)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)  # all codes start equally likely

    @classmethod
    def from_published(cls, state, num_heads=None, grid=(16, 16)):
        """Build from LlamaGen's class-conditional weights, which tell all sizes but the heads (64 wide, but 32 of 100
        in 3B) and the grid (16x16 for 256 pixels, 24x24 for 384). Raises KeyError or RuntimeError naming keys."""
        codebook_size, width = state["tok_embeddings.weight"].shape
        config = DiscreteConfig(
            codebook_size=codebook_size, width=width, num_heads=num_heads or {3200: 32}.get(width, width // 64),
            grid=tuple(grid), num_classes=state["cls_embedding.embedding_table.weight"].shape[0] - 1,
            depth=count(state, "layers."))
        with torch.device(state["output.weight"].device):
            model = cls(config)
        model.load_published(state)
        return model

    def load_published(self, state):
        """Load LlamaGen's weights, strictly, into a model of the same sizes. Raises RuntimeError naming keys."""
        self.load_state_dict({key: value for key, value in state.items() if key != "freqs_cis"})  # that one is a table

    def embed_labels(self, labels):
        """labels (B,), -1 for no class -> (B,1,D); the null class is the last row of the table."""
        return self.cls_embedding["embedding_table"](labels.where(labels >= 0, self.config.num_classes))[:, None]

    def logits(self, codes, labels):
        """codes (B,N), labels (B,) -> (B,N,K); [:, i] predicts codes[:, i] and sees the class and the codes before. Or
        the first n < N codes: then n takes the place of N. In training dropout acts on the embedded tokens."""
        x = torch.cat([self.embed_labels(labels), self.tok_embeddings(codes[:, :-1])], 1)     # (B,N,D)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, self.rotary[:x.shape[1]])
        return self.output(self.norm(x))                                                      # (B,N,K)

    def forward(self, codes, labels):
        """Training loss: mean cross-entropy per code, in nats. codes (B,N), labels (B,) with -1 where dropped."""
        return F.cross_entropy(self.logits(codes, labels).flatten(0, 1), codes.flatten())

    def empty_cache(self, rows):
        """Room for the keys and values of `rows` pictures: per layer a pair of (rows,heads,N,head_dim), in the dtype
        that linear layers give, which under autocast is not that of their weights."""
        heads, device, dtype = self.config.num_heads, self.rotary.device, self.tok_embeddings.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = 2, rows, heads, math.prod(self.config.grid), self.config.width // heads
        return [torch.zeros(shape, device=device, dtype=dtype).unbind() for _ in self.layers]

    def decode_one(self, x, position, cache):
        """The embedded token x (B,1,D) at `position` (1,) -> logits (B,K) of the next code. Its keys and values are
        added to `cache`, of which only slots 0 .. position are read."""
        past = (torch.arange(cache[0][0].shape[2], device=x.device) <= position)[None]        # (1,N)
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, self.rotary[position], layer_cache, position, past)
        return self.output(self.norm(x))[:, 0]                                                # (B,K)

    @torch.no_grad()
    def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
        """labels (B,) -> codes (B,N), sampled one by one through a cache of keys and values. Yields them after each one
        (one tensor, that changes: copy what you keep), -1 where nothing is written yet. Guided logits are uncond +
        cfg_scale * (cond - uncond), each from its own cache; cfg_scale 1 is no guidance. With cfg_interval = k >= 0
        only the first k + 2 codes are guided, and then cond alone counts: LlamaGen counts from the second code, and
        includes k. For temperature, top_k and top_p see sample_code."""
        guided, number = cfg_scale != 1, math.prod(self.config.grid)
        codes = torch.full((len(labels), number), -1, device=labels.device)                   # (B,N)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, -1)])                         # (2B,)
        positions, cache = torch.arange(number, device=labels.device), self.empty_cache(len(labels))
        x = self.embed_labels(labels)                                                         # (B or 2B,1,D)
        for i in range(number):
            logits = self.decode_one(x, positions[i:i + 1], cache).float()                    # (B or 2B,K)
            if guided:
                cond, uncond = logits.chunk(2)                                                # (B,K) each
                here = cfg_interval < 0 or i <= cfg_interval + 1
                logits = uncond + cfg_scale * (cond - uncond) if here else cond
            codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)           # (B,)
            x = self.tok_embeddings(codes[:, i])[:, None].repeat(2 if guided else 1, 1, 1)    # (B or 2B,1,D)
            yield codes

    def generate(self, *inputs, **settings):
        """The finished codes (B,N); arguments of `stream`."""
        return list(self.stream(*inputs, **settings))[-1]

def count(state, prefix):
    """How many blocks PREFIX0, PREFIX1, ... a state dict has."""
    return len({key[len(prefix):].partition(".")[0] for key in state if key.startswith(prefix)})

# Diffusion of one latent (Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672) ----------------
#
# Drown a latent x0 in noise over 1000 levels t: 0 (hardly any; x0 itself, clean, is x_(-1)) to 999 (nothing but noise):
#
#     x_t = sqrt(1 - beta_t) x_(t-1) + sqrt(beta_t) noise_t      one step of the forward process; all t of them at once:
#     x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps,  eps ~ N(0, 1)     a_t = prod_(s <= t) (1 - beta_s) falls from 1 to 0
#
# A network sees x_t, t and the condition z, and predicts eps. That tells x0 too: (x_t - sqrt(1 - a_t) eps) / sqrt(a_t).
# But eps has the same size at every level, so one squared error suits all levels. To sample, start from noise and go
# back level by level. One reverse step: the predicted eps gives an estimate of x0. Were it exact, x_(t-1) would be
# Gaussian, by Bayes' rule on the two lines above: its mean a weighted sum of x0 and x_t, its variance the "posterior"
# one. If x0 were only known to be N(0, 1), the variance would be beta_t. The truth lies between, and the network
# predicts where; the second term of the loss trains that. Draw x_(t-1); the next estimate of x0 is a little sharper.
#
# Sampling need not visit all levels. Respacing keeps some, say 100, and computes the tables of this shorter chain. A
# table *index* counts the kept levels (0 .. 99). The *timestep* of an index is its level among the 1000; the network is
# told the timestep, since it was trained on it. (In training all levels are kept, and the two are the same.)

def diffusion_schedule(steps=1000):
    """Tables over the `steps` kept of 1000 noise levels, arrays (steps,), float64 but for the integer timesteps; index
    0 has the least noise.

    beta_s = 1 - f(s + 1) / f(s), at most 0.999, where f(s) = cos^2(pi/2 (s/1000 + 0.008) / 1.008). Kept are the
    timesteps round(i 999 / (steps - 1)). In the chain of these, beta_i = 1 - a_i / a_(i-1) with a_(-1) = 1, and x_(i-1)
    given x_i and x0 is N(x0_weight x0 + xt_weight x_i, exp(log_posterior)): x0_weight = beta_i sqrt(a_(i-1)) / (1 -
    a_i), xt_weight = sqrt(1 - beta_i) (1 - a_(i-1)) / (1 - a_i), posterior variance = beta_i (1 - a_(i-1)) / (1 - a_i).
    (That is zero at index 0: there log_posterior repeats index 1's.)

    Names: timesteps; signal sqrt(a), noise sqrt(1 - a); recip_signal sqrt(1/a), recip_noise sqrt(1/a - 1), so that x0 =
    recip_signal x - recip_noise eps; x0_weight, xt_weight; log_posterior and log_beta, the logs of the variance of a
    step if x0 is known exactly, and if only x0 ~ N(0, 1) is known. Raises ValueError for steps outside 2..1000."""
    if not 2 <= steps <= 1000:
        raise ValueError(f"diffusion steps must lie in 2..1000, not {steps}")
    cosine = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    timesteps = np.array([round(i * 999 / (steps - 1)) for i in range(steps)])
    a = np.cumprod(1 - np.minimum(1 - cosine[1:] / cosine[:-1], 0.999))[timesteps]
    before = np.append(1.0, a[:-1])
    beta = 1 - a / before
    posterior = beta * (1 - before) / (1 - a)
    posterior[0] = posterior[1]
    return dict(timesteps=timesteps, signal=np.sqrt(a), noise=np.sqrt(1 - a), recip_signal=np.sqrt(1 / a),
                recip_noise=np.sqrt(1 / a - 1), log_beta=np.log(beta), log_posterior=np.log(posterior),
                x0_weight=beta * np.sqrt(before) / (1 - a), xt_weight=(1 - before) * np.sqrt(1 - beta) / (1 - a))

@torch.compiler.disable  # traced, the float64 arithmetic of diffusion_schedule would come out in float32
@functools.lru_cache(maxsize=256)
def schedule_tables(steps, device, dtype):
    """diffusion_schedule(steps) as tensors, kept so that a sampling loop finds them on its device."""
    tables = {name: torch.from_numpy(table) for name, table in diffusion_schedule(steps).items()}
    return {name: table.to(device, dtype if table.is_floating_point() else None) for name, table in tables.items()}

def timestep_embedding(t, channels=256):
    """Integer t (M,) -> (M,channels): cosines, then sines, of t / 10000^(i / n), i = 0 .. n-1, n = channels/2."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(channels // 2, device=t.device) / (channels // 2))
    angles = t[:, None].float() * frequencies                                                 # (M,channels/2)
    return torch.cat([angles.cos(), angles.sin()], -1)                                        # (M,channels)

class DenoiserBlock(nn.Module):
    """Residual MLP with adaLN (DiT, arXiv 2212.09748): x + gate * mlp(norm(x) * (1 + scale) + shift). y (M,width), time
    plus condition, sets the three."""
    def __init__(self, width):
        super().__init__()
        self.in_ln = layer_norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)                        # (M,width) each
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)

class DenoiserOutput(nn.Module):
    """The same norm without a gate, then a linear layer to `channels`."""
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)                              # (M,width) each
        return self.linear(self.norm_final(x) * (1 + scale) + shift)                          # (M,channels)

class Denoiser(nn.Module):
    """The diffusion head: (x (M,C), t (M,) or (1,), c (M,width)) -> (M,2C), the noise eps in x, and `fraction`, which
    sets the variance of the reverse step (posterior_step). c = cond_embed(z) is the projected condition z (M,D), made
    outside, so that loops over noise levels project it once; with the time embedding added it steers every block."""
    def __init__(self, channels, width, depth, z_width):
        super().__init__()
        time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embed = nn.ModuleDict({"mlp": time_mlp})
        self.cond_embed = nn.Linear(z_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.final_layer = DenoiserOutput(width, 2 * channels)
        self.apply(init_linear)
        for layer in (time_mlp[0], time_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # As in DiT, every block starts as the identity and the output at zero.
        zero(self.final_layer.linear, *(part.adaLN_modulation[1] for part in [*self.res_blocks, self.final_layer]))

    def forward(self, x, t, c):
        y = self.time_embed["mlp"](timestep_embedding(t).to(x.dtype)) + c                     # (M,width)
        x = self.input_proj(x)                                                                # (M,width)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)                                                         # (M,2C)

def posterior_step(x, eps, fraction, tables, index, clip=math.inf):
    """Mean and log-variance (M,C) of the reverse step from x (M,C) at table index `index`, (M,1) or (1,), given the
    noise eps in it. The estimate of x0 that eps implies is kept within +-clip. fraction (M,C), not clamped, says where
    the log-variance lies between log_posterior (-1) and log_beta (1) (Nichol & Dhariwal, eq. 15)."""
    x0 = (tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps).clamp(-clip, clip)
    share = (fraction + 1) / 2
    log_variance = share * tables["log_beta"][index] + (1 - share) * tables["log_posterior"][index]
    return tables["x0_weight"][index] * x0 + tables["xt_weight"][index] * x, log_variance

def diffusion_loss(denoiser, x0, t, noise, c):
    """Hybrid loss per row (M,): the squared error of the noise, plus the variational bound in bits, each a mean over
    channels. The bound trains the variance alone: eps enters it without gradient. At t > 0 it is KL(q || p) of two
    Gaussians of x_(t-1): q is the posterior_step with the true noise and fraction -1, p the one with the prediction. At
    t = 0 it is the negative log-likelihood of x0 under p, `discretised_nll`. Rows may have any mixture of t.

    x0, noise (M,C); t (M,) in 0..999; denoiser(x_t, t, c) -> (M,2C) with its condition c (M,*). (L_hybrid of Nichol &
    Dhariwal, eq. 16: their weight of 0.001 on the sum of 1000 terms is a weight of 1 on one of them.)"""
    tables, index = schedule_tables(1000, x0.device, x0.dtype), t[:, None]                    # (M,1)
    x = tables["signal"][index] * x0 + tables["noise"][index] * noise                         # (M,C)
    predicted, fraction = denoiser(x, t, c).to(x0.dtype).chunk(2, dim=-1)                     # (M,C) each
    mean_q, log_variance_q = posterior_step(x, noise, torch.full_like(noise, -1), tables, index)
    mean_p, log_variance_p = posterior_step(x, predicted.detach(), fraction, tables, index)
    kl = 0.5 * (log_variance_p - log_variance_q - 1 + (log_variance_q - log_variance_p).exp()
                + (mean_q - mean_p)**2 * (-log_variance_p).exp())                             # KL(q || p)
    bound = torch.where(index == 0, discretised_nll(x0, mean_p, 0.5 * log_variance_p), kl)    # (M,C)
    return ((predicted - noise)**2).mean(-1) + bound.mean(-1) / math.log(2)                         # (M,)

def discretised_nll(x, mean, log_std):
    """Negative log-probability, in nats, of x in the bin x +- 1/255 under a Gaussian, at most -log 1e-12. The bins of x
    below -0.999 and above 0.999 are open outwards. The cdf is GELU's tanh approximation. All this is meant for
    pixels in [-1,1]; the published models apply it to latents as they are."""
    edges = ((x - mean + side / 255) * (-log_std).exp() for side in (1, -1))
    upper, lower = (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (edge + 0.044715 * edge**3))) for edge in edges)
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))  # edge bins are open
    return -inside.clamp(min=1e-12).log()

def denoising_step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
    """x (M,C) at the noise level of table index `index` -> x (M,C) at the next lower one. noise (M,C), before the
    temperature; none is added at index 0. The denoiser is told the timestep, not the index. The rest as in
    diffusion_sample. `index` (1,) is a tensor so that one compiled graph serves all steps."""
    guided = len(c) != len(x)
    eps, fraction = denoiser(torch.cat([x, x]) if guided else x, tables["timesteps"][index], c).chunk(2, dim=-1)
    if guided:
        cond, uncond = eps.chunk(2)                                                           # (M,C) each
        eps, fraction = uncond + cfg_scale * (cond - uncond), fraction[:len(x)]
    mean, log_variance = posterior_step(x, eps, fraction, tables, index, clip)
    return mean + (0.5 * log_variance).exp() * noise * temperature * (index > 0)  # none is added after the last step

@torch.no_grad()
def diffusion_sample(denoiser, c, noise, temperature=1.0, cfg_scale=1.0, steps=100, clip=math.inf, step=denoising_step):
    """Sampling level by level, as in the primer ("ancestral"): one latent per condition, (M,C).

    denoiser(x (M,C), t (1,), c) -> (M,2C), a Denoiser for instance, with its condition c (M,*). noise: an iterable of
    (M,C) draws, first the start, then one per step (the last is drawn and not used, as in MAR). With guidance c is
    [cond; uncond] of 2M rows (which tells that there is guidance, also where cfg_scale is 1), eps = uncond + cfg_scale
    (cond - uncond), the variance is that of the conditional half, and the steps' draws may have 2M rows, of which the
    first M count. temperature scales these draws, not the start. clip bounds the estimate of x0, in which the first
    step multiplies errors of eps by 20,000 (1/sqrt(a_999)): a network of few training steps would throw x far off.
    step: denoising_step, maybe compiled."""
    noise = iter(noise)
    x = next(noise)                                                                           # (M,C)
    tables = schedule_tables(steps, x.device, x.dtype)
    for index in torch.arange(steps, device=x.device).flip(0).split(1):
        step_noise = next(noise)[:len(x)]
        x = step(denoiser, x, c, step_noise, tables, index, temperature, cfg_scale, clip)
    return x

# Stage 2: the continuous generator -----------------------------------------------------------------------------------

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
    head_depth: int = 6          # of the diffusion head
    head_width: int = 1024
    noise_levels: int = 4        # per hidden latent and training step: z costs much, the head little
    hidden_share: tuple = (0.25, 0.7)  # (s, least): in training a share ~ N(1, s^2), truncated to [least, 1], is hidden
    guess_weight: float = 0.0    # > 0: in training a linear layer also guesses each latent from z (ContinuousGenerator)
    dropout: float = 0.1
    fusion: str = "none"         # none, cross, qformer, aligned
    fusion_depth: int = 2
    codebook_size: int = 0       # with fusion

class ContinuousGenerator(nn.Module):
    """p(latents | class, codes): a masked autoencoder with a diffusion head over the N = h*w latents of a picture.
    Places are named by index: visible (B,V) are those whose latents may be read.

    The diffusion loss teaches the autoencoder slowly: at most noise levels eps is predicted almost as well without z. A
    run of minutes would end before z uses the visible latents at all, so small presets add to the loss the error of a
    guess of each latent from z by one linear layer (`guess_weight`). MAR has nothing like it."""
    ADDED = ("fusion.", "code_embedding.", "null_code", "guess.")  # the parameters that MAR does not have
    denoising_step = staticmethod(denoising_step)  # compile_parts puts a compiled one in its place

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, heads, places = config.width, config.num_heads, math.prod(config.grid)
        slots = config.buffer_size + places
        if width % heads:
            raise ValueError(f"num_heads {heads}: width must be a multiple of that")

        def table(rows):
            return nn.Parameter(torch.randn(1, rows, width) * 0.02)

        def blocks(depth):
            return nn.ModuleList(Block(width, heads, config.dropout) for _ in range(depth))

        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.randn(1, width) * 0.02)  # MAR's name for "no class"
        self.z_proj = nn.Linear(config.channels, width)  # MAR's name: it embeds latents, and has nothing to do with z
        self.z_proj_ln = layer_norm(width)
        self.encoder_pos_embed_learned, self.decoder_pos_embed_learned = table(slots), table(slots)
        self.encoder_blocks, self.decoder_blocks = blocks(config.encoder_depth), blocks(config.decoder_depth)
        self.encoder_norm, self.decoder_norm = layer_norm(width), layer_norm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token, self.diffusion_pos_embed_learned = table(1), table(places)
        self.apply(init_linear)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.diffloss = nn.ModuleDict({"net": Denoiser(config.channels, config.head_width, config.head_depth, width)})
        if config.guess_weight:
            self.guess = nn.Linear(width, config.channels)
        if config.fusion != "none":
            self.code_embedding = nn.Embedding(config.codebook_size, width)
            nn.init.normal_(self.code_embedding.weight, std=0.02)
            self.null_code = table(1)
            self.fusion = make_fusion(config.fusion, width, heads, slots, config.fusion_depth, config.dropout)
            self.start_fusion()

    @classmethod
    def from_published(cls, state, num_heads=None):
        """Build from MAR's weights, strictly; sizes are read off the tensors, the grid is taken as square. The heads
        cannot be read off: they are 64 wide, but MAR-H has 16 of 80. Raises KeyError or RuntimeError naming keys."""
        (width, channels), slots = state["z_proj.weight"].shape, state["encoder_pos_embed_learned"].shape[1]
        places = state["diffusion_pos_embed_learned"].shape[1]
        config = ContinuousConfig(
            channels=channels, width=width, num_heads=num_heads or {1280: 16}.get(width, width // 64),
            grid=(math.isqrt(places),) * 2, buffer_size=slots - places, num_classes=state["class_emb.weight"].shape[0],
            encoder_depth=count(state, "encoder_blocks."), decoder_depth=count(state, "decoder_blocks."),
            head_width=state["diffloss.net.input_proj.weight"].shape[0],
            head_depth=count(state, "diffloss.net.res_blocks."))
        with torch.device(state["z_proj.weight"].device):
            model = cls(config)
        model.load_published(state)
        return model

    def load_published(self, state):
        """Load MAR's weights, or those of this class, into a model of the same sizes. What MAR does not have (ADDED)
        may be missing as a whole, and then stays fresh. Raises RuntimeError naming keys."""
        missing, extra = self.load_state_dict(state, strict=False)
        added = {key for key in self.state_dict() if key.startswith(self.ADDED)}
        if extra or set(missing) not in (set(), added):
            raise RuntimeError(f"missing keys {sorted(set(missing) - added) or missing}, extra keys {extra}")
        if missing:
            self.start_fusion()  # the queries start on the position table, which has just changed

    @torch.no_grad()
    def start_fusion(self, codebook=None):
        """Start what fusion adds so that the code and the latent of one place find each other early: queries on the
        decoder's position table, and, given the tokenizer's codebook (K,code_dim) of unit rows, the embedding of the
        codes as a random linear map of it (std 0.02), so that near codes start near."""
        if self.config.fusion == "qformer":
            self.fusion.queries.copy_(self.decoder_pos_embed_learned)
        if codebook is not None:
            spread = torch.randn(codebook.shape[1], self.config.width, device=codebook.device) * 0.02
            self.code_embedding.weight.copy_(codebook @ spread)                               # (K,D)

    def prepare(self, codes):
        """codes (B,N) -> what fusion needs of them, the same for every token step: self.fusion.prepare of the embedded
        codes. A code of -1 becomes `null_code`; then all add their places' rows of the decoder's position table. None
        without fusion, whatever the codes; with it, ValueError if codes are None."""
        if self.config.fusion == "none":
            return None
        if codes is None:
            raise ValueError(f"fusion {self.config.fusion!r} needs codes")
        discrete = self.code_embedding(codes.clamp(min=0))                                    # (B,N,D)
        discrete = torch.where((codes >= 0)[..., None], discrete, self.null_code)
        return self.fusion.prepare(discrete + self.decoder_pos_embed_learned[:, self.config.buffer_size:])

    def encode(self, latents, visible, labels):
        """The encoder: latents (B,N,C) at the places `visible` (B,V), and labels (B,), -1 for no class -> (B,S+V,D).
        Its sequence is S buffer slots that all hold the class embedding (or `fake_latent`), then the visible latents
        through z_proj, in the order of `visible`. All add their rows of the position table (S + index for a place), and
        pass z_proj_ln, the blocks, and encoder_norm."""
        buffer, positions = self.config.buffer_size, self.encoder_pos_embed_learned
        label = torch.where(labels[:, None] >= 0, self.class_emb(labels.clamp(min=0)), self.fake_latent)  # (B,D)
        tokens = self.z_proj(pick(latents, visible)) + pick(positions[:, buffer:], visible)   # (B,V,D)
        x = self.z_proj_ln(torch.cat([label[:, None] + positions[:, :buffer], tokens], 1))    # (B,S+V,D)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded, visible, context=None):
        """The decoder: encoded (B,S+V,D), the places `visible` (B,V) of its tokens, and the prepared codes -> the
        condition z (B,N,D) of all places. Its sequence is decoder_embed of what is encoded: the buffer slots, then the
        tokens back in their places, with `mask_token` at all others. It adds its position table; then the codes come
        in; then it passes the blocks and decoder_norm. z is its places plus diffusion_pos_embed_learned."""
        buffer, x = self.config.buffer_size, self.decoder_embed(encoded)                      # (B,S+V,D)
        tokens = self.mask_token.to(x.dtype).expand(len(x), math.prod(self.config.grid), -1)  # (B,N,D)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, buffer:])
        x = torch.cat([x[:, :buffer], tokens], 1) + self.decoder_pos_embed_learned            # (B,S+N,D)
        if context is not None:
            x = self.fusion(x, context)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x[:, buffer:]) + self.diffusion_pos_embed_learned            # (B,N,D)

    def condition(self, latents, visible, labels, context=None):
        """latents (B,N,C) at the places `visible` (B,V), labels (B,), prepared codes -> the condition z (B,N,D)."""
        return self.decode(self.encode(latents, visible, labels), visible, context)

    def forward(self, latents, visible, hidden, labels, codes, t, noise):
        """Training loss, the mean diffusion loss of the hidden places, each at R noise levels, plus guess_weight times
        the mean squared error of their guess from z, if any. latents (B,N,C); visible (B,V) and hidden (B,H) places, V
        + H = N; labels (B,), codes (B,N), -1 where dropped; t (B,H,R) in 0..999; noise (B,H,R,C) standard normal."""
        z = pick(self.condition(latents, visible, labels, self.prepare(codes)), hidden).flatten(0, 1)  # (B*H,D)
        x0, net = pick(latents, hidden).flatten(0, 1), self.diffloss["net"]                   # (B*H,C)
        x, c = (rows.repeat_interleave(t.shape[2], 0) for rows in (x0, net.cond_embed(z)))    # (B*H*R,*)
        loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean()
        if self.config.guess_weight:
            loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
        return loss

    def sample_latents(self, z, noise, temperature, cfg_scale, steps, clip):
        """A latent for each condition: z (M,D) -> (M,C), or with guidance z [cond; uncond] (2M,D) -> (M,C). In full
        precision: the first of 100 steps puts errors of eps 300 times as large into x (20,000 times x0_weight)."""
        net = self.diffloss["net"]
        with torch.autocast(z.device.type, enabled=False):
            c = net.cond_embed(z.to(self.mask_token.dtype))                                   # (M or 2M,width)
            return diffusion_sample(net, c, noise, temperature, cfg_scale, steps, clip, self.denoising_step)

    @torch.no_grad()
    def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
               clip=math.inf):
        """labels (B,), codes (B,N) (None without fusion) -> latents (B,N,C), scaled as in training. Yields them after
        each token step (one tensor, that changes: copy what you keep), zero where nothing is drawn yet.

        orders (B,N): for each picture a permutation of the places, drawn from its end to its beginning, as in MAR.
        draw(rows, C): standard normal noise, called steps + 1 times in each token step; rows are the B pictures' places
        of this step, picture by picture, ascending (places and noise pair as in MAR). Guidance (see token_schedule)
        gives every batch a second half without class and codes. diffusion_steps: a number, or (first, last), linear
        over the token steps, rounded: the more is known, the less is left to chance (DiSA, arXiv 2505.20297).
        temperature, clip: see diffusion_sample."""
        (batch, number), channels, device = orders.shape, self.config.channels, labels.device
        schedule = token_schedule(number, num_steps, cfg_scale)
        guidance = torch.tensor([scale for _, scale in schedule], device=device)  # one graph serves all scales
        if cfg_scale != 1:
            labels = torch.cat([labels, torch.full_like(labels, -1)])                         # (2B,)
            codes = None if codes is None else torch.cat([codes, torch.full_like(codes, -1)])
            orders = torch.cat([orders, orders])                                              # (2B,N)
        context = self.prepare(codes)
        first, last = (diffusion_steps,) * 2 if isinstance(diffusion_steps, int) else diffusion_steps
        latents = torch.zeros(len(labels), number, channels, device=device)                   # (B or 2B,N,C)
        remaining = number
        for k, (revealed, _) in enumerate(schedule):
            visible = orders[:, remaining:]                                                   # (B or 2B,V)
            places = orders[:, remaining - revealed:remaining].sort(1).values                 # (B or 2B,r)
            remaining -= revealed
            z = pick(self.condition(latents, visible, labels, context), places).flatten(0, 1)  # (B*r or 2B*r,D)
            steps = round(first + (last - first) * k / max(1, num_steps - 1))
            noise = (draw(batch * revealed, channels) for _ in range(steps + 1))
            drawn = self.sample_latents(z, noise, temperature, guidance[k], steps, clip)      # (B*r,C)
            drawn = drawn.unflatten(0, (batch, revealed)).repeat(len(labels) // batch, 1, 1)  # (B or 2B,r,C)
            latents.scatter_(1, places[..., None].expand(-1, -1, channels), drawn)
            yield latents[:batch]

    def generate(self, *inputs, **settings):
        """The finished latents (B,N,C); arguments of `stream`."""
        return list(self.stream(*inputs, **settings))[-1]

def pick(x, places):
    """The rows `places` (B,P) of x (B or 1,T,D) -> (B,P,D)."""
    return x.expand(len(places), -1, -1).gather(1, places[..., None].expand(-1, -1, x.shape[-1]))

def token_schedule(num_tokens, num_steps, cfg_scale):
    """[(tokens drawn, guidance)] per token step: few tokens first, while little is known (MaskGIT, arXiv 2202.04200).
    After step s of S (from 1) floor(N cos(pi/2 s/S)) tokens are still hidden, but at least 1, and at least one fewer
    than before. Guidance is 1 + (cfg_scale - 1) * (share drawn by the end of the step). The last step draws all that is
    left; for its guidance one token counts as still hidden. Raises ValueError for more steps than tokens."""
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"token steps must lie in 1..{num_tokens} (the number of tokens), not {num_steps}")
    schedule, hidden = [], num_tokens
    for step in range(1, num_steps + 1):
        after = max(1, min(hidden - 1, math.floor(num_tokens * math.cos(math.pi / 2 * step / num_steps))))
        guidance = 1 + (cfg_scale - 1) * (num_tokens - after) / num_tokens
        schedule.append((hidden - after if step < num_steps else hidden, guidance))
        hidden = after
    return schedule

# The whole pipeline --------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(discrete, continuous, labels, codes=None, cfg1=1.0, temperature1=1.0, top_k=0, top_p=1.0,
             cfg2=1.0, temperature2=1.0, steps=64, diffusion_steps=100, clip=math.inf, generator=None):
    """labels (B,) -> codes (B,N) of stage 1, unless they are given, and latents (B,N,C) of stage 2, which sees them.
    Stage 1 takes cfg1, temperature1, top_k, top_p; stage 2 takes cfg2, temperature2, steps (token steps),
    diffusion_steps (in each: a number, or first and last) and clip. `discrete` or `continuous` may be None, and what it
    would make is then None too. generator: a torch.Generator, the source of all random numbers."""
    latents = None
    if discrete is not None and codes is None:
        codes = discrete.generate(labels, cfg1, temperature1, top_k, top_p, generator)
    if continuous is not None:
        random = dict(generator=generator, device=labels.device)
        orders = torch.rand(len(labels), math.prod(continuous.config.grid), **random).argsort(1)  # (B,N)
        draw = functools.partial(torch.randn, **random)
        latents = continuous.generate(labels, codes, orders, draw, steps, cfg2, temperature2, diffusion_steps, clip)
    return codes, latents

def compile_parts(model, **options):
    """torch.compile, in place, what repeats in a generator: blocks, the decoding of one code, the denoising step. Sizes
    that change between calls become symbols when they first do, so nothing is padded and no size compiles anew."""
    for module in model.modules():
        if isinstance(module, (DiscreteBlock, Block, FusionBlock, Denoiser)):
            module.compile(**options)
    if isinstance(model, DiscreteGenerator):
        model.decode_one = torch.compile(model.decode_one, **options)
    else:
        model.denoising_step = torch.compile(denoising_step, **options)

# Presets: sizes and settings of a run; grid, channels, codebook and classes come from tokenizers and data ------------

def training(steps, batch_size, lr, warmup, ema, weight_decay=0.0, decay="cosine", grad_clip=1.0, muon=False):
    """Settings of one stage's training; the learning rate is tuned for `batch_size`. muon: see make_optimizers."""
    return dict(steps=steps, batch_size=batch_size, lr=lr, warmup=warmup, ema=ema, weight_decay=weight_decay,
                decay=decay, grad_clip=grad_clip, muon=muon)

def imagenet_preset(stage1, cfg2, width, depth, heads, head_depth, head_width):
    """ImageNet-256 as published: tokenizers, sizes, training (LlamaGen 300 epochs; MAR 800, the first 100 warm-up)."""
    return dict(
        size=256, vq=None, kl=None, fusion="qformer", stage1=stage1,
        stage2=dict(width=width, encoder_depth=depth, decoder_depth=depth, num_heads=heads, head_depth=head_depth,
                    head_width=head_width),
        train={1: training(1_500_000, 256, 1e-4, warmup=0, ema=0.9999, weight_decay=0.05, decay="constant"),
               2: training(500_000, 2048, 8e-4, warmup=62_500, ema=0.9999, weight_decay=0.02, decay="constant",
                           grad_clip=3.0)},
        sample=dict(cfg1=2.0, temperature1=1.0, cfg2=cfg2, temperature2=1.0, steps=64, diffusion_steps=100,
                    clip=math.inf, batch_size=32))

# Small tokenizers work on patches, with a linear skip around the network: at 32 pixels that is far cheaper than
# convolutions at full resolution. Small runs take few steps, hence high rates that decay, a short average, and `clip`.
# Of 4 x 4 pixels (48 numbers) cifar keeps 24: with 16, photographs lose detail that FID sees. A kl_weight of 1e-3 would
# bring all channels to one variance; stage 2 then learns more slowly than with channels that matter more or less.
SMALL = dict(encoder_attention=False, num_res_blocks=1, linear_skip=True)
LLAMAGEN_B, LLAMAGEN_L = dict(width=768, depth=12, num_heads=12), dict(width=1024, depth=24, num_heads=16)
PRESETS = {
    "demo": dict(
        size=32, fusion="cross",
        vq=dict(z_channels=64, width=32, multipliers=(1, 2), patch=4, codebook_size=128, code_dim=8, **SMALL),
        kl=dict(z_channels=48, width=32, multipliers=(1,), patch=8, kl_weight=2e-4, **SMALL),
        stage1=dict(width=128, depth=4, num_heads=4, dropout=0.0),
        stage2=dict(width=128, encoder_depth=2, decoder_depth=2, num_heads=4, buffer_size=4, head_depth=3,
                    head_width=192, dropout=0.0, fusion_depth=1, noise_levels=1, hidden_share=(1.0, 0.1),
                    guess_weight=2.0),
        train={0: training(1050, 48, 8e-3, warmup=50, ema=0.99),
               1: training(800, 64, 6e-3, warmup=100, ema=0.99, weight_decay=0.05, muon=True),
               2: training(800, 64, 6e-3, warmup=100, ema=0.99, weight_decay=0.02, muon=True)},
        sample=dict(cfg1=2.0, temperature1=0.9, cfg2=1.5, temperature2=0.7, steps=8, diffusion_steps=25, clip=5.0,
                    batch_size=100)),
    "cifar": dict(
        size=32, fusion="qformer",
        vq=dict(z_channels=64, width=64, multipliers=(1,), patch=4, codebook_size=1024, code_dim=8, **SMALL),
        kl=dict(z_channels=24, width=64, multipliers=(1,), patch=4, kl_weight=1e-4, **SMALL),
        stage1=dict(width=256, depth=6, num_heads=4, dropout=0.1),
        stage2=dict(width=256, encoder_depth=4, decoder_depth=4, num_heads=4, buffer_size=16, head_depth=3,
                    head_width=384, dropout=0.1, noise_levels=1, hidden_share=(1.0, 0.1), guess_weight=2.0),
        train={0: training(20_000, 64, 3e-3, warmup=200, ema=0.999),
               1: training(20_000, 256, 1e-3, warmup=500, ema=0.9995, weight_decay=0.05, muon=True),
               2: training(50_000, 256, 1e-3, warmup=500, ema=0.9995, weight_decay=0.02, muon=True)},
        sample=dict(cfg1=1.5, temperature1=1.0, cfg2=1.5, temperature2=1.0, steps=16, diffusion_steps=50, clip=5.0,
                    batch_size=500)),
    "B": imagenet_preset(LLAMAGEN_B, cfg2=2.9, width=768, depth=12, heads=12, head_depth=6, head_width=1024),
    "L": imagenet_preset(LLAMAGEN_L, cfg2=3.0, width=1024, depth=16, heads=16, head_depth=8, head_width=1280),
    "H": imagenet_preset(LLAMAGEN_L, cfg2=3.2, width=1280, depth=20, heads=16, head_depth=12, head_width=1536),
}
