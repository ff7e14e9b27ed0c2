"""Exercise 1: two bottlenecks.

Expected gradients are put together by hand: that of the reconstruction where the decoder stands, carried to where it
belongs, plus that of the codebook's two terms.
"""
import functools

import torch

from checking import golden, normal, same, seeded, shapes, true

PLACES = ("picture", "row", "column")
LARGE = 0.3  # kl_weight, large enough to be seen


def tokenizer(s, kind, **changes):
    """A small VQTokenizer or KLTokenizer whose encoder says something; codebook rows of unequal lengths."""
    torch.manual_seed(1)
    config = dict(z_channels=6, width=32, multipliers=(1, 2), num_res_blocks=1, encoder_attention=False,
                  codebook_size=11 if kind == "VQ" else 0, code_dim=4, kl_weight=LARGE)
    model = getattr(s.tokenizers, f"{kind}Tokenizer")(s.tokenizers.TokenizerConfig(**config | changes))
    with torch.no_grad():
        model.encoder.conv_out.weight *= 5
        if kind == "VQ":
            weight = model.quantize["embedding"].weight
            weight *= torch.linspace(0.2, 3, len(weight))[:, None]
    return model


def images():
    """Two pictures of 6 x 10 pixels: 3 x 5 places."""
    return normal(2, 3, 6, 10, seed=2).tanh()


def unit(x, dim=-1):
    return x / (x * x).sum(dim, keepdim=True).sqrt()


def nearest_rows(z, rows, score):
    """For each place the row with the highest score(vector, row), one place after the other."""
    codes = torch.zeros(len(z), *z.shape[2:], dtype=torch.int64)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, codes.shape)).tolist():
        codes[b, i, j] = max(range(len(rows)), key=lambda k: float(score(z[b, :, i, j], rows[k])))
    return codes


def quantised(model, x):
    """(z, e, codes) without the functions of this exercise; both still carry gradients."""
    z, rows = model.features(x), unit(model.quantize["embedding"].weight)
    codes = nearest_rows(z.detach(), rows.detach(), torch.dot)
    return z, rows[codes].permute(0, 3, 1, 2), codes


def squared(a, b):
    return ((a - b) ** 2).mean()


def decoded(model, z):
    return model.decoder(model.post_quant_conv(z))


# VQTokenizer ---------------------------------------------------------------------------------------------------------

def codes_of_the_original(s):
    """nearest gives the codes of LlamaGen's tokenizer"""
    arrays = golden("vq_tiny_ch32")
    state = s.formula.formula_state(shapes("llamagen_vq_tiny_ch32"))
    codes = s.adapters.vq_encode(state, arrays["x"])
    clear = (arrays["code_top2_gap"] > 1e-4).view(2, 16, 16)  # two rows are nearly as close: rounding decides
    expected = arrays["indices"].view(2, 16, 16)
    true(codes.shape == expected.shape, f"nearest: has shape {tuple(codes.shape)}, should be (picture, row, column)")
    same(codes.where(clear, torch.zeros_like(codes)), expected * clear, "codes", PLACES)


def nearest_row_by_angle(s):
    """nearest finds the row at the smallest angle, whatever the lengths of the rows in the embedding"""
    model, z = tokenizer(s, "VQ"), unit(normal(2, 4, 3, 5, seed=3), 1)
    raw = model.quantize["embedding"].weight.detach().clone()
    rows = unit(raw)
    by = functools.partial(nearest_rows, z)
    expected = by(rows, torch.dot)
    codes = model.nearest(z)
    same(codes, expected, "codes", PLACES, wrong={
        "are those of the largest product with rows that do not have length 1 (see codebook)":
            lambda: by(raw, torch.dot),
        "are those of the smallest distance to rows that do not have length 1 (see codebook)":
            lambda: by(raw, lambda a, b: -((a - b) ** 2).sum()),
        "are those of the farthest row": lambda: by(rows, lambda a, b: -a.dot(b)),
        "are those of the largest cosine without its sign": lambda: by(rows, lambda a, b: a.dot(b).abs()),
        "have rows and columns of the grid mixed up": lambda: expected.mT.reshape(expected.shape)})
    true(codes.dtype == torch.int64, f"codes: have dtype {codes.dtype}, should have int64")
    each = torch.arange(10).view(2, 1, 5)
    same(model.nearest(rows[each].permute(0, 3, 1, 2)), each, "codes of the codebook's own rows", PLACES)
    with torch.no_grad():
        model.quantize["embedding"].weight.copy_(raw.flip(1) * torch.linspace(2, 0.1, 11)[:, None])
    same(model.nearest(z.flip(1)), expected, "codes after the embedding has changed", PLACES)


def vq_loss(s):
    """VQTokenizer.forward gives loss, codes and the encoder's z; the loss has all three terms"""
    model, x = tokenizer(s, "VQ"), images()
    with torch.no_grad():
        z, e, codes = quantised(model, x)
        picture, gap = squared(decoded(model, e), x), squared(z, e)
    found = model(x)
    true(isinstance(found, (tuple, list)) and len(found) == 3, "forward: should return (loss, codes, z)")
    same(found[1], codes, "codes (second result)", PLACES)
    same(found[2], z, "z (third result)", ("picture", "channel", "row", "column"),
         wrong={"is e: should be the encoder's output before quantisation": e})
    n = z.numel()
    same(found[0], picture + 1.25 * gap, "loss (first result)", wrong={
        "equals the squared error of the picture alone": picture, "equals the codebook's terms alone": 1.25 * gap,
        "equals the loss in which the codebook's terms have weight 1 in all: one of them is missing": picture + gap,
        "equals the loss in which the codebook's terms have weight 0.25 in all: one is missing": picture + 0.25 * gap,
        "equals the loss in which both of the codebook's terms have weight 1": picture + 2 * gap,
        "equals the loss in which both of the codebook's terms have weight 0.25": picture + 0.5 * gap,
        "has the codebook's terms as sums over the channels; all norms are means over elements":
            picture + 1.25 * gap * z.shape[1],
        "has the codebook's terms as sums; all norms are means over elements": picture + 1.25 * gap * n,
        "has the picture's squared error as a sum; all norms are means": picture * x.numel() + 1.25 * gap,
        "has the picture's absolute error instead of the squared one":
            lambda: (decoded(model, e) - x).abs().mean() + 1.25 * gap,
        "lets the decoder see z instead of e": lambda: squared(decoded(model, z), x) + 1.25 * gap})


def gradient_of_the_encoder(s):
    """The encoder's gradient is that of the reconstruction at e, as if z were e, plus the pull of weight 0.25 to e"""
    model, x = tokenizer(s, "VQ"), images()
    weights = [model.quant_conv.weight, model.quant_conv.bias, model.encoder.conv_in.weight]
    z, e, _ = quantised(model, x)
    e = e.detach().requires_grad_()
    at_e, = torch.autograd.grad(squared(decoded(model, e), x), e)
    here = z.detach().requires_grad_()
    at_z, = torch.autograd.grad(squared(decoded(model, here), x), here)
    pull = (2 * (z - e) / z.numel()).detach()

    def gradient(at):
        return flat(torch.autograd.grad(z, weights, at, retain_graph=True))

    model(x)[0].backward()
    found = flat([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
    size = float(gradient(at_e + 0.25 * pull).abs().max())
    same(found, gradient(at_e + 0.25 * pull), "gradient at the encoder", atol=1e-4 * size, rtol=1e-3, wrong={
        "only has the pull towards e: nothing comes through from the picture (straight-through)": gradient(0.25 * pull),
        "only has a pull towards e of weight 1, and nothing comes from the picture": gradient(pull),
        "only has what comes from the picture: z is not held near e": gradient(at_e),
        "has the pull towards e with weight 1 instead of 0.25": gradient(at_e + pull),
        "has the pull towards e with weight 1.25: the codebook's term should not reach z": gradient(at_e + 1.25 * pull),
        "pushes z away from e": gradient(at_e - 0.25 * pull),
        "is that of a decoder that sees z instead of e": gradient(at_z + 0.25 * pull)})


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient_of_the_codebook(s):
    """The codebook follows z with weight 1 and hears nothing from the decoder"""
    model, x = tokenizer(s, "VQ"), images()
    weight = model.quantize["embedding"].weight
    z, e, _ = quantised(model, x)
    pull = (2 * (e - z) / z.numel()).detach()
    leaf = e.detach().requires_grad_()
    at_e, = torch.autograd.grad(squared(decoded(model, leaf), x), leaf)

    def gradient(at):
        return torch.autograd.grad(e, weight, at, retain_graph=True)[0]

    expected = gradient(pull)
    model(x)[0].backward()
    same(torch.zeros_like(weight) if weight.grad is None else weight.grad, expected,
         "gradient at the codebook", ("code", "number"), atol=1e-4 * float(expected.abs().max()), rtol=1e-3, wrong={
             "has weight 0.25 where z's pull to the codebook has 1": gradient(0.25 * pull),
             "has weight 1.25: the term that holds z near e should not move e": gradient(1.25 * pull),
             "hears from the decoder: its gradient should go to z alone": gradient(pull + at_e),
             "only hears from the decoder, and does not follow z": gradient(at_e),
             "has weight 0.25, and hears from the decoder": gradient(0.25 * pull + at_e),
             "moves the rows away from z": gradient(-pull)})


# KLTokenizer ---------------------------------------------------------------------------------------------------------

def sample_on_any_dimension(s):
    """sample is MAR's, with the channels in any dimension, and leaves its arguments alone"""
    arrays, sample = golden("kl_tiny_ch32"), s.tokenizers.KLTokenizer.sample
    mean, log_variance, noise = (normal(2, 3, 5, 4, seed=seed) for seed in (4, 5, 6))
    for dim in range(4):
        moments = torch.cat([mean, log_variance], dim)
        before = moments.clone(), noise.clone()
        same(sample(moments, noise, dim=dim), mean + (log_variance.double() / 2).exp() * noise,
             f"sample(..., dim={dim})", wrong={
                 "equals mean + variance * noise; the standard deviation is its root":
                     mean + log_variance.exp() * noise,
                 "equals mean + log-variance * noise": mean + log_variance * noise,
                 "equals mean + exp(log-variance / 4) * noise": mean + (log_variance / 4).exp() * noise,
                 "equals mean - deviation * noise": mean - (log_variance / 2).exp() * noise,
                 "takes the first half of the channels as log-variances": log_variance + (mean / 2).exp() * noise,
                 "is the mean: the noise is not used": mean})
        true(torch.equal(moments, before[0]) and torch.equal(noise, before[1]), "sample: changes its arguments")
    same(sample(torch.cat([mean, log_variance], 1), 0 * noise), mean, "sample without noise")
    same(sample(arrays["moments"], arrays["sample_noise"]), arrays["sample"], "sample",
         ("picture", "channel", "row", "column"))


def sample_clamps(s):
    """sample clamps the log-variance to [-30, 20] and the mean not at all"""
    log_variance = torch.tensor([-60.0, -40, -30, -29, 0, 19, 20, 21, 40, 60]).view(1, 10, 1).expand(-1, -1, 3)
    noise = normal(1, 10, 3, seed=7).abs() + 0.1
    moments = torch.cat([torch.zeros(1, 10, 3), log_variance], 1)
    found = s.tokenizers.KLTokenizer.sample(moments, noise)
    true(torch.equal(moments[:, 10:], log_variance), "sample: changes its arguments")
    true(found.shape == noise.shape, f"sample: has shape {tuple(found.shape)} for noise {tuple(noise.shape)}")

    def clamped(low, high):
        return log_variance.double().clamp(low, high) / 2

    same((found.double() / noise).log(), clamped(-30, 20), "sample at mean 0, log of the deviation",
         ("picture", "channel", "place"), atol=1e-3, wrong={
             "is not clamped below": clamped(-99, 20), "is not clamped above": clamped(-30, 99),
             "is not clamped": clamped(-99, 99), "is clamped to [-20, 30] instead of [-30, 20]": clamped(-20, 30),
             "is clamped to [-30, 20] itself; clamp the log-variance, which is twice as much": clamped(-60, 40)})
    moments = torch.cat([torch.full((1, 2, 3), mean) for mean in (100.0, -100.0, -40.0, -40.0)], 1).view(1, 8, 3)
    same(s.tokenizers.KLTokenizer.sample(moments, noise[:, :4]), moments[:, :4], "sample at log-variance -40, the mean",
         ("picture", "channel", "place"))


def kl_parts(model, x, noise, low=-30, high=20):
    """(squared error, mean, clamped log-variance), without the functions of this exercise."""
    mean, log_variance = model.quant_conv(model.encoder(x)).split(model.config.z_channels, 1)
    log_variance = log_variance.clamp(low, high)
    return squared(decoded(model, mean + (log_variance / 2).exp() * noise), x), mean, log_variance


def kl_elements(mean, log_variance):
    return (mean**2 + log_variance.exp() - 1 - log_variance) / 2


def kl_loss(s):
    """KLTokenizer.forward is the squared error of the decoded sample plus kl_weight times the mean KL"""
    model, x, noise = tokenizer(s, "KL"), images(), normal(2, 6, 3, 5, seed=8)
    model.scale = 3.0  # latents here are unscaled
    with torch.no_grad():
        picture, mean, log_variance = kl_parts(model, x, noise)
        kl = kl_elements(mean, log_variance)
        same(model(x, noise), picture + LARGE * kl.mean(), "loss", wrong={
            "has no KL": picture, "has the KL without kl_weight": picture + kl.mean(),
            "has a fixed kl_weight of 0.001": picture + 1e-3 * kl.mean(),
            "has the KL without its factor 1/2": picture + 2 * LARGE * kl.mean(),
            "has the KL with the wrong sign": picture - LARGE * kl.mean(),
            "has the KL as a sum over all elements; it is a mean": picture + LARGE * kl.sum(),
            "has the KL summed over the channels; it is a mean over elements": picture + LARGE * 6 * kl.mean(),
            "has the KL summed over each picture; it is a mean over elements":
                picture + LARGE * kl[0].numel() * kl.mean(),
            "has the KL in bits; it is in nats": picture + LARGE / torch.tensor(2.0).log() * kl.mean(),
            "has a KL without the square of the mean": picture + LARGE * (kl - mean**2 / 2).mean(),
            "has a KL without the -1": picture + LARGE * (kl + 0.5).mean(),
            "has the KL in the other direction, KL(N(0, 1) || N(mean, variance))":
                picture + LARGE * 0.5 * ((mean**2 + 1) / log_variance.exp() - 1 + log_variance).mean(),
            "has the absolute error of the picture":
                lambda: (decoded(model, mean + (log_variance / 2).exp() * noise) - x).abs().mean() + LARGE * kl.mean(),
            "has the picture's squared error as a sum": picture * x.numel() + LARGE * kl.mean(),
            "decodes the mean: the noise is not used": lambda: squared(decoded(model, mean), x) + LARGE * kl.mean(),
            "decodes scaled latents; here they are unscaled": lambda: squared(
                decoded(model, 3 * (mean + (log_variance / 2).exp() * noise)), x) + LARGE * kl.mean()})


def kl_of_extremes(s):
    """The KL is zero for N(0, 1), and takes the clamped log-variance"""
    x, noise = images(), torch.zeros(2, 6, 3, 5)
    for value, what in ((0.0, "0"), (-100.0, "-100"), (100.0, "100"), (-29.0, "-29"), (19.0, "19")):
        model = tokenizer(s, "KL")
        with torch.no_grad():
            model.quant_conv.weight.zero_()
            model.quant_conv.bias.copy_(torch.tensor([0.0] * 6 + [value] * 6))
            picture, mean, log_variance = kl_parts(model, x, noise)
            expected = picture + LARGE * kl_elements(mean, log_variance).mean()
            same(model(x, noise), expected, f"loss at mean 0 and log-variance {what}", wrong={
                "has a KL whose log-variance is not clamped to [-30, 20] everywhere":
                    picture + LARGE * kl_elements(mean, torch.full_like(mean, value)).mean()})


def gradient_of_kl(s):
    """Mean and log-variance hear both from the picture, through the sample, and from the KL"""
    model, x, noise = tokenizer(s, "KL"), images(), normal(2, 6, 3, 5, seed=9)
    weights = [model.quant_conv.bias, model.encoder.conv_in.weight]
    picture, mean, log_variance = kl_parts(model, x, noise)
    kl = LARGE * kl_elements(mean, log_variance).mean()
    deaf = squared(decoded(model, mean + (log_variance.detach() / 2).exp() * noise), x)

    def gradient(loss):
        return flat(torch.autograd.grad(loss, weights, retain_graph=True))

    expected = gradient(picture + kl)
    model(x, noise).backward()
    found = flat([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
    same(found, expected, "gradient at the encoder", atol=1e-4 * float(expected.abs().max()), rtol=1e-3, wrong={
        "has nothing from the picture": gradient(kl), "has nothing from the KL": gradient(picture),
        "has nothing from the picture for the log-variance": gradient(deaf + kl)})


# Tokenizers.revive_codes ---------------------------------------------------------------------------------------------

def reviver(s, patience):
    """Tokenizers with a codebook of 7 rows, and few steps of patience."""
    s.train.Tokenizers.PATIENCE = patience
    return s.train.Tokenizers(tokenizer(s, "VQ", codebook_size=7), torch.nn.Identity())


def revived(model, codes, z, seed=0):
    """Call revive_codes: {code: the row of z onto which it was moved}."""
    weight, codes = model.vq.quantize["embedding"].weight, torch.tensor(codes)
    before, arguments = weight.detach().clone(), (codes.clone(), z.clone())
    model.seen = [(codes, z)]
    model.revive_codes(codes, z, seeded(seed))
    now = model.vq.quantize["embedding"].weight
    true(now is weight and now.requires_grad, "revive_codes: puts another parameter in the place of the embedding's "
         "weight, which the optimizer does not know; write into it")
    true(len(model.seen) == 0, "revive_codes: should empty `seen`, which holds what came since the last revival")
    true(torch.equal(codes, arguments[0]) and torch.equal(z, arguments[1]), "revive_codes: changes its arguments")
    moved = (now.detach() != before).any(1).nonzero().flatten().tolist()
    distance = torch.cdist(unit(now.detach()[moved]), z)                                      # (moved,n)
    true((distance < 1e-3).any(1).all(), "revive_codes: moves a code to where none of the encoder's outputs is")
    return dict(zip(moved, distance.argmin(1).tolist())) if moved else {}


def patience(s):
    """A code is moved when no place has chosen it for PATIENCE calls, and its count then starts anew"""
    model, idle = reviver(s, 4), [0] * 7
    for call, chosen in enumerate(([], [3], [], [4], [], [], [], [], [5], [], [], [])):
        if call == 2:  # a run that was stopped and goes on
            model, state = reviver(s, 4), model.state_dict()
            model.load_state_dict(state)
        codes = [2, 0, 0, 1, 2, *chosen]
        idle = [0 if code in codes else count + 1 for code, count in enumerate(idle)]
        moved = revived(model, codes, unit(normal(len(codes), 4, seed=call)), seed=call)
        for code, count in enumerate(idle):
            since = f"code {code}, which no place has chosen since its last use or move for {count} calls, is"
            if count >= 4:
                true(code in moved, f"PATIENCE 4: {since} not moved")
                idle[code] = 0
            elif count:
                true(code not in moved, f"PATIENCE 4: {since} moved")
            else:
                true(code not in moved, f"PATIENCE 4: code {code} is moved although a place has chosen it in this call")


def onto_which_outputs(s):
    """Dead codes move onto encoder outputs drawn at random, from the generator; there may be few outputs"""
    model = reviver(s, 1)
    weight = model.vq.quantize["embedding"].weight
    start = weight.detach().clone()

    def again(codes, seed, global_seed=0):
        with torch.no_grad():
            weight.copy_(start)
        torch.manual_seed(global_seed)
        return revived(model, codes, unit(normal(len(codes), 4, seed=3)), seed)

    draws = [again([0, 1, 2, 3, 4, 5, 5], seed) for seed in range(420)]
    true(all(list(moved) == [6] for moved in draws), "one dead code: not exactly that one is moved")
    counts = torch.tensor([moved[6] for moved in draws]).bincount(minlength=7)
    true((counts - 60).abs().max() < 33, f"one dead code and 7 outputs, drawn anew 420 times: it is moved onto them "
         f"{counts.tolist()} times, should be about equally often")
    several = [again([0, 2, 5, 0, 2, 5, 5, 5, 0], seed) for seed in range(8)]
    true(all(sorted(moved) == [1, 3, 4, 6] for moved in several), "four dead codes and 9 outputs: not all are moved")
    true(any(len(set(moved.values())) > 1 for moved in several), "all dead codes are moved onto one output")
    true(again([0, 2, 5, 0, 2, 5, 5, 5, 0], 0, global_seed=1) == several[0],
         "equal generators give different draws: what is random should come from `generator`")
    few = again([5, 5], 0)
    true(len(few) >= 2 and 5 not in few, f"6 dead codes and 2 outputs: {len(few)} are moved, should be at least 2")


CHECKS = [(1, codes_of_the_original), (2, nearest_row_by_angle), (2, vq_loss), (2, gradient_of_the_encoder),
          (2, gradient_of_the_codebook), (1, sample_on_any_dimension), (1, sample_clamps), (2, kl_loss),
          (1, kl_of_extremes), (1, gradient_of_kl), (1, patience), (1, onto_which_outputs)]
