"""Exercise 5: diffusion forwards. The tables and the loss are computed anew here, in float64, from Bayes' rule."""
import functools
import itertools
import math
import operator

import numpy as np
import torch

from checking import golden, normal, raises, same, shapes, true

LN2 = math.log(2)


# The oracle: tables, reverse step, loss ------------------------------------------------------------------------------

def kept(steps):
    return tuple(round(i * 999 / (steps - 1)) for i in range(steps))


@functools.cache
def chain(timesteps, longest=0.999):
    """{name: float64 tensor} of the chain of these levels. x_(i-1) given x_i and x0 by Bayes' rule: what x0 says of it,
    N(sqrt(a_(i-1)) x0, 1 - a_(i-1)), times what x_i says, each with its precision."""
    f = [math.cos(math.pi / 2 * (s / 1000 + 0.008) / 1.008)**2 for s in range(1001)]
    a = list(itertools.accumulate((1 - min(1 - f[s + 1] / f[s], longest) for s in range(1000)), operator.mul))
    rows, before = [], 1.0
    for t in timesteps:
        beta = 1 - a[t] / before
        variance = 1 / (1 / (1 - before) + (1 - beta) / beta) if before < 1 else 0.0
        from_x0 = variance * math.sqrt(before) / (1 - before) if before < 1 else 1.0
        rows.append((t, math.sqrt(a[t]), math.sqrt(1 - a[t]), 1 / math.sqrt(a[t]), math.sqrt(1 / a[t] - 1), beta,
                     variance, from_x0, variance * math.sqrt(1 - beta) / beta))
        before = a[t]
    names = "timesteps signal noise recip_signal recip_noise log_beta log_posterior x0_weight xt_weight".split()
    out = {name: torch.tensor(column) if name == "timesteps" else torch.tensor(column, dtype=torch.float64)
           for name, column in zip(names, zip(*rows))}
    out["log_posterior"][0] = out["log_posterior"][1]
    return out | {name: out[name].log() for name in ("log_beta", "log_posterior")}


def tables(steps):
    """The right tables, as posterior_step gets them."""
    return {name: table.float() if table.is_floating_point() else table for name, table in chain(kept(steps)).items()}


def reverse(x, eps, fraction, steps, index, clip=math.inf):
    """Mean and log-variance of the reverse step, float64; index (M,1) or (1,)."""
    at = {name: table[index] for name, table in chain(kept(steps)).items()}
    x, eps, fraction = (tensor.double() for tensor in (x, eps, fraction))
    x0 = ((x - at["noise"] * eps) / at["signal"]).clamp(-clip, clip)
    log_variance = at["log_posterior"] + (at["log_beta"] - at["log_posterior"]) * (fraction + 1) / 2
    return at["x0_weight"] * x0 + at["xt_weight"] * x, log_variance


def likelihood(x, mean, log_std):
    """discretised_nll, in float64."""
    def cdf(edge):
        edge = edge / log_std.exp()
        return 0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (edge + 0.044715 * edge**3))
    upper = torch.where(x > 0.999, torch.ones_like(x), cdf(x - mean + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), cdf(x - mean - 1 / 255))
    return -(upper - lower).clamp(min=1e-12).log()


def divergence(mean_q, log_q, mean_p, log_p):
    """KL(q || p), in nats."""
    return 0.5 * (log_p - log_q - 1 + (log_q.exp() + (mean_q - mean_p)**2) / log_p.exp())


def noisy(x0, t, noise):
    at = chain(kept(1000))
    return at["signal"][t][:, None] * x0 + at["noise"][t][:, None] * noise


def parts(x0, t, noise, out, frozen=True, kl=divergence, share=-1, clip=math.inf, start=likelihood):
    """Squared error and bound (in nats), (M,C) each, for what the network said. `frozen`: the bound does not train eps;
    share: the fraction of q; start: the bound at t = 0, a function of x0, mean and log of the standard deviation."""
    x0, noise, out, index = x0.double(), noise.double(), out.double(), t[:, None]
    x, (eps, fraction) = noisy(x0, t, noise), out.chunk(2, -1)
    q = reverse(x, noise, torch.full_like(noise, share), 1000, index, clip)
    p = reverse(x, eps.detach() if frozen else eps, fraction, 1000, index, clip)
    bound = kl(*q, *p)
    if start:
        bound = torch.where(index == 0, start(x0, p[0], p[1] / 2), bound)
    return (eps - noise)**2, bound


def loss_of(*inputs, **mistake):
    square, bound = parts(*inputs, **mistake)
    return square.mean(1) + bound.mean(1) / LN2


# What the checks share -----------------------------------------------------------------------------------------------

def network(x, t, c):
    """A denoiser (x (M,C), t (M,) or (1,), c (M,2C)) -> (M,2C) that takes notice of all it is given, row by row."""
    true(len(x) == len(c), f"the denoiser was called with {len(x)} rows of x and {len(c)} rows of c")
    true(t.ndim == 1 and len(t) in (1, len(x)), f"the denoiser was called with t of shape {tuple(t.shape)}")
    time, (one, other) = t.to(x.dtype)[:, None] / 999, c.chunk(2, -1)
    return torch.cat([0.4 * x + one * (1 - 0.8 * time), 1.5 * other + 0.5 * time + 0.2 * x.sin()], -1)


ROWS = torch.tensor([0, 37, 999, 1, 500, 0, 820])


def rows(t=ROWS, channels=3):
    """x0, t, noise, c: rows of many levels, some latents beyond the edges at +-1."""
    x0, noise, c = (0.5 * normal(len(t), n, seed=seed) for n, seed in ((channels, 1), (channels, 2), (2 * channels, 3)))
    x0[0, 1], x0[-1, 0], x0[-2, 2] = 1.2, -1.4, -1.1
    return x0, t, noise, c


def agree(s, x0, t, noise, c, what, wrong=None):
    """The loss is right; `wrong` as in `same`, beside what every loss can have wrong."""
    def said(x):
        return network(x, t, c.double())

    out = said(noisy(x0, t, noise))
    square, bound = (part.mean(1) for part in parts(x0, t, noise, out))

    def whole(**mistake):
        return lambda: loss_of(x0, t, noise, out, **mistake)

    looks = {"lacks the bound": square, "lacks the squared error": bound / LN2,
             "has the bound in nats, not in bits": square + bound,
             "has a bound multiplied by log 2, not divided": square + bound * LN2,
             "is the sum over the channels, not the mean": x0.shape[1] * (square + bound / LN2),
             "has a bound that is the sum over the channels, not the mean": square + bound * x0.shape[1] / LN2,
             "has a squared error that is the sum over the channels, not the mean": x0.shape[1] * square + bound / LN2,
             "has a bound with weight 0.001": square + 0.001 * bound / LN2,
             "has KL(p || q) for KL(q || p)": whole(kl=lambda *qp: divergence(*qp[2:], *qp[:2])),
             "has a KL without its factor 1/2": whole(kl=lambda *qp: 2 * divergence(*qp)),
             "has a KL without its -1": whole(kl=lambda *qp: divergence(*qp) + 0.5),
             "has a KL that divides the squared distance of the means by q's variance, not p's":
                 whole(kl=lambda mean_q, log_q, mean_p, log_p: divergence(mean_q, log_q, mean_q, log_p)
                       + 0.5 * (mean_q - mean_p)**2 / log_q.exp()),
             "has fraction 1 in q, not -1": whole(share=1), "clips the estimate of x0 to +-1": whole(clip=1),
             "clamps fraction": lambda: loss_of(x0, t, noise, torch.cat([out[:, :3], out[:, 3:].clamp(-1, 1)], 1)),
             "takes fraction from the first half of the network's output and eps from the second":
                 lambda: loss_of(x0, t, noise, out.roll(x0.shape[1], 1)),
             "has signal and noise exchanged in x_t": lambda: loss_of(x0, t, noise, said(noisy(noise, t, x0.double()))),
             "gives the denoiser the clean x0": lambda: loss_of(x0, t, noise, said(x0.double())),
             **(wrong or {})}
    found = s.d2c.diffusion_loss(network, x0, t, noise, c)
    same(found, square + bound / LN2, what, ("row",), 2e-4, 5e-4, looks)


# The schedule --------------------------------------------------------------------------------------------------------

def table_mistakes(name, right, found):
    """{what it looks like: a wrong table}, for the table `name` of a right chain."""
    a, other = right["signal"]**2, {"x0_weight": "xt_weight", "xt_weight": "x0_weight", "signal": "noise",
                                    "noise": "signal", "recip_signal": "recip_noise", "recip_noise": "recip_signal",
                                    "log_beta": "log_posterior", "log_posterior": "log_beta"}[name]
    long = chain(kept(1000))[name][right["timesteps"]]
    looks = {"is right to some digits only: compute all of it in float64": right[name],
             "is right but for index 0": lambda: torch.cat([torch.as_tensor(found)[:1], right[name][1:]]),
             "is that of betas without the bound of 0.999":
                 lambda: chain(tuple(right["timesteps"].tolist()), 1 - 1e-15)[name],
             f"is {other}": right[other], "is that of the chain of all 1000 levels, at the kept ones": long,
             "is the variance, not its log": right[name].exp(), "is the square of it": right[name]**2}
    unclipped = {"signal": a, "noise": 1 - a, "recip_signal": 1 / a, "recip_noise": 1 / a - 1}.get(name)
    return looks | ({"lacks the square root": unclipped} if unclipped is not None else {})


def compare_tables(found, right, what):
    for name in [name for name in right if name != "timesteps"]:
        true(name in found, f"{what}: has no table {name!r}")
        true(isinstance(found[name], np.ndarray) and found[name].dtype == np.float64,
             f"{what}, {name}: is not a numpy array of dtype float64")
        same(found[name], right[name], f"{what}, {name}", ("index",), 1e-10, 1e-6,
             table_mistakes(name, right, found[name]))


def tables_of_the_original(s):
    """The tables of 100 and of 1000 levels equal those of the original code"""
    names = {"x0_weight": "posterior_mean_coef1", "xt_weight": "posterior_mean_coef2", "log_beta": "log_betas",
             "log_posterior": "posterior_log_variance_clipped", "recip_signal": "sqrt_recip_alphas_cumprod",
             "recip_noise": "sqrt_recipm1_alphas_cumprod"}
    for steps, prefix in ((1000, "train1000"), (100, "gen100")):
        arrays, ours = golden("mar_diffusion_tables"), chain(kept(steps))
        right = ours | {name: arrays[f"{prefix}_{theirs}_f64"] for name, theirs in names.items()}
        found = s.d2c.diffusion_schedule(steps)
        true(list(found["timesteps"]) == list(kept(steps)), f"diffusion_schedule({steps}): keeps the wrong timesteps")
        compare_tables(found, right, f"diffusion_schedule({steps})")


def kept_levels(s):
    """2 to 1000 steps keep whole timesteps, evenly spaced from 0 to 999; other numbers of steps raise ValueError"""
    for steps in (1000, 100, 20, 11, 7, 2):
        what, exact = f"diffusion_schedule({steps}), timesteps", torch.arange(steps) * 999 / (steps - 1)
        found = s.d2c.diffusion_schedule(steps)["timesteps"]
        true(isinstance(found, np.ndarray) and found.dtype.kind in "iu", f"{what}: are no numpy array of integers")
        found = torch.from_numpy(found.astype(np.int64))
        if found.shape != exact.shape or not bool(((found - exact).abs() <= 0.501).all()):  # halves may go either way
            same(found, torch.tensor(kept(steps)), what, ("index",), 0, 0,
                 {"are rounded down, not to the nearest": exact.floor().long(), "are rounded up": exact.ceil().long(),
                  "do not reach 999": torch.arange(steps) * 1000 // steps, "begin with the most noise": found.flip(0),
                  "are the indices, not the levels": torch.arange(steps)})
    for steps in (1, 1001, 0, -3):
        raises(ValueError, lambda: s.d2c.diffusion_schedule(steps), f"diffusion_schedule({steps})")


def shortened_chains(s):
    """The tables of 2, 7, 11 and 250 levels follow from Bayes' rule in the chain of these levels"""
    for steps in (11, 250, 7, 2):
        found, exact = s.d2c.diffusion_schedule(steps), np.arange(steps) * 999 / (steps - 1)
        times = np.asarray(found["timesteps"])
        rounded = times.shape == exact.shape and (abs(times - exact) <= 0.501).all()
        right = chain(tuple(int(t) for t in times) if rounded else kept(steps))
        compare_tables(found, right, f"diffusion_schedule({steps})")


# One reverse step ----------------------------------------------------------------------------------------------------

def estimates(steps=40):
    """x, eps, fraction (5,3) at unequal table indices (5,1)."""
    return (*(normal(5, 3, seed=seed) for seed in (4, 5)), 0.7 * normal(5, 3, seed=6),
            torch.tensor([[0], [30], [1], [17], [9]]))


def mean_by_bayes_rule(s):
    """posterior_step gives the mean of x_(i-1) that Bayes' rule gives, for one index and for one per row"""
    x, eps, fraction, indices = estimates()
    for index in (indices, indices[3], indices[0]):
        at = {name: table[index] for name, table in chain(kept(40)).items()}
        x0 = at["recip_signal"] * x - at["recip_noise"] * eps
        found = s.d2c.posterior_step(x, eps, fraction, tables(40), index)
        true(isinstance(found, (tuple, list)) and len(found) == 2, "posterior_step: should return mean, log-variance")
        same(found[0], reverse(x, eps, fraction, 40, index)[0],
             f"mean, index of shape {tuple(index.shape)}", ("row", "channel"), 1e-4, 1e-4,
             {"is the estimate of x0 itself": x0, "is the log-variance; the mean comes first":
                 reverse(x, eps, fraction, 40, index)[1], "takes the first row's index for all rows":
                 reverse(x, eps, fraction, 40, index[:1])[0],
              "has x0_weight and xt_weight exchanged": at["xt_weight"] * x0 + at["x0_weight"] * x,
              "takes eps as the estimate of x0": at["x0_weight"] * eps + at["xt_weight"] * x,
              "adds eps where it should be subtracted": at["x0_weight"] * (2 * at["recip_signal"] * x - x0)
                 + at["xt_weight"] * x,
              "has signal and noise where their inverses belong": at["x0_weight"] * (at["signal"] * x - at["noise"]
                 * eps) + at["xt_weight"] * x,
              "takes noise for recip_noise": at["x0_weight"] * (at["recip_signal"] * x - at["noise"] * eps)
                 + at["xt_weight"] * x,
              "has recip_signal and recip_noise exchanged": at["x0_weight"] * (at["recip_noise"] * x
                 - at["recip_signal"] * eps) + at["xt_weight"] * x})


def variance_between_two(s):
    """The log-variance goes linearly from log_posterior at fraction -1 to log_beta at 1, and on beyond"""
    x, eps, _, indices = estimates()
    fraction = torch.tensor([[-1.0, 0.3, 2.5], [1.0, -3.0, 0.0], [-0.4, 1.0, -1.0], [0.8, 0.0, 3.0], [-1.5, -1, 1.5]])
    for index in (indices, indices[1]):
        at = {name: table[index] for name, table in chain(kept(40)).items()}
        low, high, share = at["log_posterior"], at["log_beta"], (fraction.double() + 1) / 2
        right = reverse(x, eps, fraction, 40, index)[1]
        same(s.d2c.posterior_step(x, eps, fraction, tables(40), index)[1], right,
             f"log-variance, index of shape {tuple(index.shape)}", ("row", "channel"), 1e-5, 1e-5,
             {"goes the wrong way: log_beta belongs to fraction 1": share * low + (1 - share) * high,
              "takes fraction as 0 .. 1": low + fraction * (high - low), "clamps fraction":
                 low + share.clamp(0, 1) * (high - low), "is the variance, not its log": right.exp(),
              "is the log of the standard deviation": right / 2, "mixes the variances, not their logs":
                 lambda: (share * high.exp() + (1 - share) * low.exp()).log(),
              "squashes fraction through a sigmoid": low + fraction.double().sigmoid() * (high - low)})


def clip_keeps_the_estimate(s):
    """clip bounds the estimate of x0 on both sides, and neither the mean nor the noise"""
    x, eps, fraction, index = estimates()
    x, eps = 2 * x, 2 * eps
    at = {name: table[index] for name, table in chain(kept(40)).items()}
    for clip in (0.6, 1.7):
        x0 = at["recip_signal"] * x - at["recip_noise"] * eps

        def mean(x0, x=x):
            return at["x0_weight"] * x0 + at["xt_weight"] * x

        found = s.d2c.posterior_step(x, eps, fraction, tables(40), index, clip)
        same(found[0], mean(x0.clamp(-clip, clip)), f"mean, clip {clip}", ("row", "channel"), 1e-5, 1e-4,
             {"does not depend on clip": mean(x0), "is itself clipped, instead of the estimate of x0":
                 mean(x0).clamp(-clip, clip), "is clipped, and the estimate of x0 too":
                 mean(x0.clamp(-clip, clip)).clamp(-clip, clip), "is bounded above only": mean(x0.clamp(max=clip)),
              "is bounded to +-1, whatever clip is": mean(x0.clamp(-1, 1)), "has eps clipped, not the estimate of x0":
                 lambda: reverse(x, eps.clamp(-clip, clip), fraction, 40, index)[0],
              "has x clipped, not only the estimate of x0": mean(x0.clamp(-clip, clip), x.clamp(-clip, clip))})
        same(found[1], reverse(x, eps, fraction, 40, index)[1], f"log-variance, clip {clip}", ("row", "channel"))


# The loss ------------------------------------------------------------------------------------------------------------

def loss_of_the_original(s):
    """The loss per row equals that of the original code and network"""
    arrays, prefix = golden("mar_tiny"), "diffloss.net."
    state = s.formula.formula_state({key: shape for key, shape in shapes("mar_tiny").items() if key.startswith(prefix)})
    state = {key[len(prefix):]: value for key, value in state.items()}
    found = s.adapters.diffusion_loss(lambda x, t, z: s.adapters.denoise(state, x, t, z), arrays["net_x"],
                                      arrays["net_t"], arrays["loss_noise"], arrays["net_c"])
    square, bound = arrays["loss_mse"], arrays["loss_vb"]
    same(found, arrays["loss"], "loss", ("row",), 1e-4, 3e-4,
         {"lacks the bound": square, "lacks the squared error": bound, "has the bound in nats, not in bits":
             square + bound * LN2, "is the sum over the channels, not the mean": 16 * arrays["loss"],
          "has a bound that is the sum over the channels": square + 16 * bound})


def loss_above_zero(s):
    """At t > 0 the loss is the squared error plus KL(q || p) in bits, means over the channels"""
    t = torch.tensor([1, 37, 999, 500, 820])
    agree(s, *rows(t), "loss of rows at t > 0")


def rows_at_zero(s):
    """Rows at t = 0, and only these, have the discretised likelihood of x0 as their bound"""
    x0, t, noise, c = rows()
    out = network(noisy(x0, t, noise), t, c.double())

    def whole(**mistake):
        return lambda: loss_of(x0, t, noise, out, **mistake)

    wrong = {"has the KL at t = 0 too": whole(start=None),
             "gives discretised_nll the log-variance at t = 0, where it takes the log of the standard deviation":
                 whole(start=lambda x, mean, log_std: likelihood(x, mean, 2 * log_std)),
             "gives discretised_nll the standard deviation, where it takes its log":
                 whole(start=lambda x, mean, log_std: likelihood(x, mean, log_std.exp())),
             "has the likelihood at t = 0 with the wrong sign":
                 whole(start=lambda *inputs: -likelihood(*inputs)),
             "has the likelihood of x_t, not that of x0, at t = 0":
                 whole(start=lambda x, *rest: likelihood(noisy(x, t, noise), *rest)),
             "has x0 and the mean exchanged at t = 0":
                 whole(start=lambda x, mean, log_std: likelihood(mean, x, log_std))}
    agree(s, x0, t, noise, c, "loss of rows at many levels, two of them at t = 0", wrong)
    agree(s, *rows(torch.zeros(3, dtype=torch.long)), "loss of rows that all are at t = 0")


def known_cases(s):
    """The loss is zero for the true noise and fraction -1 at t > 0, and repeating the channels changes no loss"""
    x0, t, noise, _ = rows(torch.tensor([1, 37, 999, 500, 820]))

    def loss(x0, t, noise, *out):
        return s.d2c.diffusion_loss(lambda x, t, c: c * 1, x0, t, noise, torch.cat(out, 1))

    same(loss(x0, t, noise, noise, torch.full_like(noise, -1)), torch.zeros(5), "loss of a perfect prediction",
         ("row",), 1e-4)
    x0, t, noise, c = rows()
    x0_twice, noise_twice, *out_twice = (tensor.repeat(1, 2) for tensor in (x0, noise, *c.chunk(2, 1)))
    right = loss_of(x0, t, noise, c.double())
    same(loss(x0, t, noise, c), right, "loss", ("row",), 2e-4, 5e-4)
    same(loss(x0_twice, t, noise_twice, *out_twice), right, "loss with all channels repeated", ("row",), 2e-4, 5e-4)


def what_trains_what(s):
    """The squared error trains eps alone, and the bound trains fraction alone"""
    x0, t, noise, c = rows()
    ours, theirs = c.double().requires_grad_(), c.clone().requires_grad_()
    s.d2c.diffusion_loss(lambda x, t, c: c * 1, x0, t, noise, theirs).sum().backward()
    true(theirs.grad is not None, "no gradient reaches the network's output")

    def gradient(function):
        return torch.autograd.grad(function().sum(), ours)[0]

    right = gradient(lambda: loss_of(x0, t, noise, ours))
    half = x0.shape[1]
    same(theirs.grad[:, :half], right[:, :half], "gradient at eps", ("row", "channel"), 1e-4, 1e-3,
         {"has that of the bound in it": lambda: gradient(lambda: loss_of(x0, t, noise, ours, frozen=False))[:, :half],
          "is that of the bound alone": lambda: gradient(lambda: parts(x0, t, noise, ours, frozen=False)[1]
                                                         .mean(1) / LN2)[:, :half]})
    same(theirs.grad[:, half:], right[:, half:], "gradient at fraction", ("row", "channel"), 1e-4, 1e-3,
         {"is that of a bound in nats": right[:, half:] * LN2})


def nothing_is_changed(s):
    """posterior_step and diffusion_loss leave their arguments as they are"""
    x, eps, fraction, index = estimates()
    x0, t, noise, c = rows()
    given, step = dict(x=x, eps=eps, fraction=fraction, index=index, x0=x0, t=t, noise=noise, c=c), tables(40)
    everything = given | {f"table {name}": table for name, table in step.items()}
    copies = {name: tensor.clone() for name, tensor in everything.items()}
    s.d2c.posterior_step(x, eps, fraction, step, index, 0.5)
    s.d2c.diffusion_loss(network, x0, t, noise, c)
    for name, copy in copies.items():
        true(torch.equal(everything[name], copy), f"the argument {name} was changed in place")


CHECKS = [(1, kept_levels), (2, tables_of_the_original), (2, shortened_chains), (3, mean_by_bayes_rule),
          (2, variance_between_two), (2, clip_keeps_the_estimate), (3, loss_above_zero), (2, rows_at_zero),
          (3, what_trains_what), (2, known_cases), (2, loss_of_the_original), (1, nothing_is_changed)]
