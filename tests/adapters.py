"""One door for every check: plain functions onto this implementation.

Golden tests, graders and outside checks call only these, so the insides stay free to change, and another implementation
(a student's, say) is tested by editing this one file. Tensors in and out unless stated; `state` is a state dict under
the published key names; everything runs in eval mode, in float32, on the device of its inputs.
"""
import math

import torch

import d2c
import fid
import fusion
import tokenizers

# Tokenizers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def vq_encode(state, images):
    """images (B,3,H,W) -> codes (B,h,w) int64."""
    return tokenizers.VQTokenizer.from_published(state).eval().encode(images)


@torch.no_grad()
def vq_decode(state, codes):
    """codes (B,h,w) -> images (B,3,H,W)."""
    return tokenizers.VQTokenizer.from_published(state).eval().decode(codes)


@torch.no_grad()
def kl_encode(state, images):
    """images (B,3,H,W) -> moments (B,2C,h,w)."""
    return tokenizers.KLTokenizer.from_published(state).eval().encode(images)


@torch.no_grad()
def kl_decode(state, latents):
    """unscaled latents (B,C,h,w) -> images (B,3,H,W)."""
    return tokenizers.KLTokenizer.from_published(state).eval().decode(latents)


def center_crop(image, size):
    """uint8 (H,W,3) numpy -> uint8 (size,size,3) numpy."""
    return tokenizers.center_crop(image, size)


# Stage 1 -------------------------------------------------------------------------------------------------------------


def gpt_grid(state, places):
    """The grid behind a row of codes, which the weights do not tell. The published models (16,384 codes) know 16x16 and
    24x24, of which the row may be the beginning; all others are taken as square."""
    published = state["tok_embeddings.weight"].shape[0] == 16384
    side = (16 if places <= 256 else 24) if published else math.isqrt(places)
    return side, side


@torch.no_grad()
def gpt_logits(state, codes, labels, num_heads):
    """codes (B,N), labels (B,) -> logits (B,N,V); [:, i] predicts codes[:, i]."""
    model = d2c.DiscreteGenerator.from_published(state, num_heads, gpt_grid(state, codes.shape[1])).eval()
    return model.logits(codes, labels)


def gpt_greedy(state, labels, num_tokens, num_heads, cfg_scale, cfg_interval=-1):
    """labels (B,) -> codes (B,num_tokens) by argmax through the cache."""
    model = d2c.DiscreteGenerator.from_published(state, num_heads, gpt_grid(state, num_tokens)).eval()
    return model.generate(labels, cfg_scale, temperature=0, cfg_interval=cfg_interval)[:, :num_tokens]


# Stage 2 -------------------------------------------------------------------------------------------------------------


def split_mask(mask):
    """mask (B,N), True = hidden, equally many per row -> indices visible (B,V) and hidden (B,K)."""
    order = mask.int().argsort(dim=1, stable=True)
    return order.split([int((~mask[0].bool()).sum()), int(mask[0].bool().sum())], dim=1)


def labels_or_none(labels, batch, device):
    return torch.full((batch,), -1, device=device) if labels is None else labels


@torch.no_grad()
def mar_condition(state, latents, mask, labels, num_heads):
    """latents (B,C,h,w), mask (B,N), labels (B,) or None = unconditional -> z (B,N,D)."""
    model = d2c.ContinuousGenerator.from_published(state, num_heads).eval()
    labels = labels_or_none(labels, len(latents), latents.device)
    return model.condition(tokenizers.to_tokens(latents), split_mask(mask)[0], labels)


@torch.no_grad()
def mar_loss(state, latents, mask, labels, num_heads, t, noise):
    """Scalar training loss; t (4BN,) and noise (4BN,C) in MAR's order: noise level outermost, then batch, then
    token."""
    model = d2c.ContinuousGenerator.from_published(state, num_heads).eval()
    (batch, places), (visible, hidden) = mask.shape, split_mask(mask)
    t = t.view(-1, batch, places).permute(1, 2, 0)                                            # (B,N,4)
    noise = noise.view(-1, batch, places, noise.shape[-1]).permute(1, 2, 0, 3)                # (B,N,4,C)
    rows = torch.arange(batch, device=mask.device)[:, None]
    labels = labels_or_none(labels, batch, latents.device)
    return model(tokenizers.to_tokens(latents), visible, hidden, labels, None, t[rows, hidden], noise[rows, hidden])


class OutsideDenoiser(torch.nn.Module):
    """A function (x (M,C), t (M,), z (M,D)) -> (M,2C) in the place of our diffusion network."""

    def __init__(self, function):
        super().__init__()
        self.function, self.cond_embed = function, torch.nn.Identity()

    def forward(self, x, t, z):
        return self.function(x, t.expand(len(x)), z)


def mar_generate(state, labels, orders, noise, num_heads, num_steps, cfg_scale, temperature, diffusion_steps,
                 denoiser=None):
    """labels (B,), orders (B,N), noise an iterator of arrays -> latents (B,C,h,w)."""
    model = d2c.ContinuousGenerator.from_published(state, num_heads).eval()
    noise = iter(noise)
    if denoiser:
        model.diffloss["net"] = OutsideDenoiser(denoiser)
    def draw(rows, channels):
        return torch.as_tensor(next(noise))[:rows].to(labels.device)

    latents = model.generate(labels, None, orders, draw, num_steps, cfg_scale, temperature, diffusion_steps)
    return tokenizers.to_map(latents, model.config.grid)


@torch.no_grad()
def denoise(state, x, t, z):
    """x (M,C), t (M,), z (M,D) -> (M,2C); state holds the keys below diffloss.net."""
    (width, channels), z_width = state["input_proj.weight"].shape, state["cond_embed.weight"].shape[1]
    net = d2c.Denoiser(channels, width, d2c.count(state, "res_blocks."), z_width).to(x.device).eval()
    net.load_state_dict(state)
    return net(x, t, net.cond_embed(z))


@torch.no_grad()
def diffusion_loss(denoiser, x0, t, noise, z):
    """Hybrid loss per row (M,); denoiser(x, t, z)."""
    return d2c.diffusion_loss(denoiser, x0, t, noise, z)


def diffusion_sample(denoiser, z, noise, temperature, cfg_scale, steps):
    """(M,C); noise: the start, then one (M,C) per step; with guidance z is [cond; uncond], 2M rows."""
    return d2c.diffusion_sample(OutsideDenoiser(denoiser), z, noise, temperature, cfg_scale, steps)


def token_schedule(num_tokens, num_steps, cfg_scale):
    """[(tokens revealed, guidance)]."""
    return d2c.token_schedule(num_tokens, num_steps, cfg_scale)


# Fusion --------------------------------------------------------------------------------------------------------------


def draw_parameters(module, seed):
    """Give every parameter, zero-initialised ones too, a random value of the size of its fan-in rule."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2 and "embedding" not in name:
                values = values / math.sqrt(parameter.shape[1])
            elif parameter.ndim == 1:
                values = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(values)
    return module.eval()


@torch.no_grad()
def fuse(kind, sequence, discrete, seed, fresh=True):
    """sequence (B,S+N,D) and discrete (B,N,D), S = 4, -> sequence (B,S+N,D). fresh=False draws every parameter."""
    torch.manual_seed(seed)
    module = fusion.make_fusion(kind, sequence.shape[2], 4, sequence.shape[1]).eval()
    if not fresh:
        draw_parameters(module, seed)
    module = module.to(sequence.device)
    return module(sequence, module.prepare(discrete))


@torch.no_grad()
def d2c_condition(kind, latents, mask, labels, codes, seed):
    """z (B,N,D) of a small model with fusion `kind` and all parameters drawn from `seed`; codes (B,N) or (B,h,w)."""
    config = d2c.ContinuousConfig(channels=latents.shape[1], grid=tuple(latents.shape[2:]), width=64,
                                  encoder_depth=2, decoder_depth=2, num_heads=4, buffer_size=4, head_depth=2,
                                  head_width=64,
                                  fusion=kind, codebook_size=16384)
    model = draw_parameters(d2c.ContinuousGenerator(config), seed).to(latents.device)
    labels = labels_or_none(labels, len(latents), latents.device)
    return model.condition(tokenizers.to_tokens(latents), split_mask(mask)[0], labels, model.prepare(codes.flatten(1)))


# Loading -------------------------------------------------------------------------------------------------------------


def load(kind, state, num_heads=None):
    """Parameter count after a strict load; kind in vq kl gpt mar inception; meta tensors welcome."""
    build = {"vq": tokenizers.VQTokenizer.from_published, "kl": tokenizers.KLTokenizer.from_published,
             "gpt": lambda state: d2c.DiscreteGenerator.from_published(state, num_heads),
             "mar": lambda state: d2c.ContinuousGenerator.from_published(state, num_heads),
             "inception": fid.inception_from_state}[kind]
    return sum(parameter.numel() for parameter in build(state).parameters())


# Metrics -------------------------------------------------------------------------------------------------------------


def inception(state, images, resize="tf1"):
    """images (B,H,W,3) uint8, any size -> pool (B,2048), spatial (B,2023), unbiased logits (B,1008) or None."""
    images = torch.as_tensor(images).to(next(iter(state.values())).device)
    return fid.inception_from_state(state)(fid.preprocess(images, resize))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """numpy float64 in, float out."""
    return fid.frechet_distance(mu1, sigma1, mu2, sigma2)


def precision_recall(reference, samples):
    """Features (N,D) -> (precision, recall), k = 3."""
    return fid.precision_recall(torch.as_tensor(reference), torch.as_tensor(samples), k=3)


def inception_score(probs, split_size=5000):
    """Class probabilities (N,C) -> float, ADM's consecutive splits."""
    return fid.inception_score(torch.as_tensor(probs).cpu(), split_size)
