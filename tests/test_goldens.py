"""Every published module, reproduced: outputs of the original code under formula-made weights (goldens/README.md)."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import adapters
import d2c
import tokenizers
from formula import formula_state

GOLDENS = Path(__file__).parent / "goldens"


def golden(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / f"{name}.npz", allow_pickle=False).items()}


def manifest(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


def weights(name):
    return formula_state({key: shape for key, (shape, _) in manifest(name)["tensors"].items()})


def close(value, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(value, expected, atol=atol, rtol=rtol)


def normal(seed, *draws):
    """The noise of a golden: (shape, count) pairs from one generator."""
    generator = np.random.Generator(np.random.PCG64(seed))
    for shape, count in draws:
        for _ in range(count):
            yield torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


# Tokenizers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, keys",
                         [("vq_tiny_ch32", "llamagen_vq_tiny_ch32"), ("vq16_published", "llamagen_vq_ds16")])
def test_vq(name, keys):
    arrays, state = golden(name), weights(keys)
    codes = adapters.vq_encode(state, arrays["x"])
    assert torch.equal(codes.flatten(), arrays["indices"])
    given = arrays["given_indices"].view(codes.shape)
    close(adapters.vq_decode(state, given), arrays["image_from_given"], atol=1e-4)
    close(adapters.vq_decode(state, codes), arrays["image_from_own_codes"], atol=1e-4)


def test_kl():
    arrays, state = golden("kl_tiny_ch32"), weights("mar_kl_tiny_ch32")
    close(adapters.kl_encode(state, arrays["x"]), arrays["moments"], atol=2e-5)
    close(adapters.kl_decode(state, arrays["z"]), arrays["decoded"], atol=1e-4)
    close(tokenizers.KLTokenizer.sample(arrays["moments"], arrays["sample_noise"]), arrays["sample"], atol=1e-6)


@pytest.mark.parametrize("width, height, seed", [(200, 150, 804), (375, 500, 802), (1100, 600, 805)])
def test_center_crop(width, height, seed):
    image = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(adapters.center_crop(image, 256), golden(f"center_crop_w{width}h{height}")["out"].numpy())


# Stage 1 -------------------------------------------------------------------------------------------------------------


def test_gpt_logits_and_loss():
    arrays, state = golden("gpt_tiny"), weights("llamagen_gpt_tiny")
    logits = adapters.gpt_logits(state, arrays["idx"], arrays["cond"], num_heads=4)
    close(logits, arrays["logits_sub"][:, :16], atol=1e-4)
    close(adapters.gpt_logits(state, arrays["idx"], torch.full((3,), 10), 4), arrays["logits_null_sub"][:, :16],
          atol=1e-4)
    model = d2c.DiscreteGenerator.from_published(state, 4, (4, 4)).eval()
    close(model(arrays["idx"], arrays["cond"])[None], arrays["train_loss"], atol=1e-5)
    close(model.rotary, arrays["freqs_cis"], atol=1e-6)
    assert torch.equal(model.logits(arrays["idx"], torch.full((3,), -1)),
                       model.logits(arrays["idx"], torch.full((3,), 10)))


@pytest.mark.parametrize("name, settings", [("greedy_cfg1", dict(cfg_scale=1.0)), ("greedy_cfg2", dict(cfg_scale=2.0)),
                                            ("greedy_cfg2_interval", dict(cfg_scale=2.0, cfg_interval=4))])
def test_gpt_greedy(name, settings):
    arrays = golden("gpt_tiny")
    codes = adapters.gpt_greedy(weights("llamagen_gpt_tiny"), arrays["cond"], num_tokens=16, num_heads=4, **settings)
    assert torch.equal(codes, arrays[name])


# Diffusion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, prefix", [(100, "gen100"), (1000, "train1000")])
def test_diffusion_tables(steps, prefix):
    arrays, ours = golden("mar_diffusion_tables"), d2c.diffusion_schedule(steps)
    names = {"timesteps": "timestep_map", "x0_weight": "posterior_mean_coef1_f64",
             "xt_weight": "posterior_mean_coef2_f64",
             "log_beta": "log_betas_f64", "log_posterior": "posterior_log_variance_clipped_f64",
             "recip_signal": "sqrt_recip_alphas_cumprod_f64", "recip_noise": "sqrt_recipm1_alphas_cumprod_f64"}
    for name, theirs in names.items():
        close(torch.from_numpy(ours[name]), arrays[f"{prefix}_{theirs}"], rtol=1e-6)


def test_denoiser_and_loss_per_row():
    arrays, state = golden("mar_tiny"), weights("mar_tiny")
    prefix = "diffloss.net."
    net_state = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
    close(adapters.denoise(net_state, arrays["net_x"], arrays["net_t"], arrays["net_c"]), arrays["net_out"], atol=5e-5)
    loss = adapters.diffusion_loss(lambda x, t, z: adapters.denoise(net_state, x, t, z),
                                   arrays["net_x"], arrays["net_t"], arrays["loss_noise"], arrays["net_c"])
    close(loss, arrays["loss"], rtol=1e-4)


def analytic_denoiser(x, t, z):
    """The exact denoiser of x0 ~ N(z/2, 1/4): a chain with it stays small, so that every detail shows."""
    channels = x.shape[1]
    a = d2c.schedule_tables(1000, x.device, x.dtype)["signal"][t][:, None] ** 2
    eps = (x - a.sqrt() * 0.5 * z[:, :channels]) * (1 - a).sqrt() / (0.25 * a + 1 - a)
    return torch.cat([eps, (-1 + 2 * torch.arange(channels) / (channels - 1)).expand_as(x)], 1)


@pytest.mark.parametrize("name, seed, tolerance",
                         [("mar_analytic_sampler", 452, 2e-4), ("mar_tiny_sampler", 442, None)])
def test_diffusion_sampler(name, seed, tolerance):
    arrays = golden(name)
    denoiser = analytic_denoiser
    if name == "mar_tiny_sampler":
        net = d2c.ContinuousGenerator.from_published(weights("mar_tiny"), 4).diffloss["net"]

        def denoiser(x, t, z):
            return net(x, t, net.cond_embed(z))

    guided = adapters.diffusion_sample(denoiser, arrays["z"], normal(seed, ((4, 16), 1), ((8, 16), 100)), 0.95, 2.0,
                                       100)
    plain = adapters.diffusion_sample(denoiser, arrays["z"], normal(seed + 1, ((8, 16), 101)), 1.0, 1.0, 100)
    for value, expected in ((guided, arrays["sample_cfg2_t095"]), (plain, arrays["sample_cfg1_t1"])):
        close(value, expected, atol=tolerance or 1e-3 * float(expected.abs().max()))


# Stage 2 -------------------------------------------------------------------------------------------------------------


def test_mar_condition():
    arrays, state = golden("mar_tiny"), weights("mar_tiny")
    mask = arrays["mask"].bool()
    close(adapters.mar_condition(state, arrays["latents"], mask, arrays["labels"], 4), arrays["z"], atol=2e-5)
    close(adapters.mar_condition(state, arrays["latents"], mask, None, 4), arrays["z_uncond"], atol=2e-5)


def test_mar_training_loss():
    arrays = golden("mar_tiny")
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, arrays["orders"][:, :12], True)
    noise = next(normal(432, ((128, 16), 1)))
    loss = adapters.mar_loss(weights("mar_tiny"), arrays["latents"], mask, arrays["labels"], 4, arrays["forward_t"],
                             noise)
    close(loss[None], arrays["forward_loss"], rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 8, 16, 32, 64, 128, 256])
def test_token_schedule(steps):
    arrays, schedule = golden("mar_schedule"), adapters.token_schedule(256, steps, 3.0)
    assert [revealed for revealed, _ in schedule] == arrays[f"n_pred_iter{steps}"].tolist()
    np.testing.assert_allclose([cfg for _, cfg in schedule], arrays[f"cfg_iter{steps}"], atol=1e-6)


@pytest.mark.parametrize("name, steps, cfg, temperature", [("it4_cfg2", 4, 2.0, 0.95), ("it4_cfg1", 4, 1.0, 1.0),
                                                           ("it16_cfg3", 16, 3.0, 1.0)])
def test_mar_generate(name, steps, cfg, temperature):
    arrays, draws = golden("mar_tiny_generate_analytic"), []
    for revealed, _ in d2c.token_schedule(16, steps, cfg):
        rows = 2 * revealed
        draws += [((rows, 16), 1), ((2 * rows, 16), 100)] if cfg != 1 else [((rows, 16), 101)]
    latents = adapters.mar_generate(weights("mar_tiny"), arrays["labels"], arrays["orders"], normal(561, *draws), 4,
                                    steps,
                                    cfg, temperature, 100, analytic_denoiser)
    close(latents, arrays[f"out_{name}"], atol=5e-4)


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDENS.glob("*.json")
                                        if re.match("llamagen|mar_|inception_v3", path.stem)))
def test_published_manifests_load_strictly(name):
    """Every published state dict, on the meta device: parameter counts equal, a key too few or too many refused."""
    facts = manifest(name)
    kind = next(kind for kind in ("vq", "kl", "gpt", "inception", "mar") if kind in name)
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in facts["tensors"].items()}
    heads = facts.get("heads") or facts.get("kwargs", {}).get("encoder_num_heads") if kind == "mar" else None
    assert adapters.load(kind, state, heads) == facts["n_params"]
    one = next(key for key in state if key.endswith("bias") or key.endswith("norm.weight"))
    for wrong in ({key: value for key, value in state.items() if key != one}, dict(state, surprise=state[one])):
        with pytest.raises((KeyError, RuntimeError)):
            adapters.load(kind, wrong, heads)
