"""Exercise 6: diffusion backwards. All noise is given, so that every step has one right result."""
import math

import numpy as np
import torch

from checking import golden, normal, same, true
from diffusion_checks import chain, kept, network, reverse, tables

STEPS = 20


# One step ------------------------------------------------------------------------------------------------------------

def inputs(guided, rows=3, channels=4):
    """x, c, noise; with guidance c is [cond; uncond]."""
    return (normal(rows, channels, seed=1), normal(2 * rows if guided else rows, 2 * channels, seed=2),
            normal(rows, channels, seed=3))


def step_of(s, x, c, noise, i, temperature=1.0, cfg_scale=1.0, clip=math.inf, denoiser=network):
    return s.d2c.denoising_step(denoiser, x, c, noise, tables(STEPS), torch.tensor([i]), temperature, cfg_scale, clip)


def said(x, c, i, denoiser=network):
    """eps and fraction of the network at table index i, float64."""
    return denoiser(x.double(), torch.tensor([kept(STEPS)[i]]), c.double()).chunk(2, -1)


def gone(x, eps, fraction, noise, i, temperature=1.0, clip=math.inf, drawn=None):
    """The right result of a step at table index i."""
    mean, log_variance = reverse(x, eps, fraction, STEPS, torch.tensor([i]), clip)
    drawn = (i > 0) if drawn is None else drawn
    return mean + (log_variance / 2).exp() * noise.double() * temperature * drawn


def near(found, right, what, wrong=None):
    """Equal, up to float32's errors of numbers of this size."""
    same(found, right, what, ("row", "channel"), max(1e-5, 3e-5 * float(right.abs().max())), 1e-4, wrong)


def plain_step(s):
    """Without guidance, a step adds noise of the predicted variance to the mean of posterior_step"""
    x, c, noise = inputs(False)
    for i in (12, 3, 19, 1):
        eps, fraction = said(x, c, i)
        mean, log_variance = reverse(x, eps, fraction, STEPS, torch.tensor([i]))
        near(step_of(s, x, c, noise, i), gone(x, eps, fraction, noise, i), f"step at index {i} of {STEPS}",
             {"adds no noise": mean, "multiplies the noise by the variance, not its root":
                 mean + log_variance.exp() * noise, "multiplies the noise by the log-variance":
                 mean + log_variance * noise, "multiplies the noise by the inverse standard deviation":
                 mean + (-log_variance / 2).exp() * noise, "adds noise of standard deviation 1": mean + noise,
              "takes fraction from the first half of the network's output and eps from the second":
                 gone(x, fraction, eps, noise, i), "has the posterior variance, whatever fraction is":
                 gone(x, eps, torch.full_like(eps, -1), noise, i),
              "subtracts the noise": gone(x, eps, fraction, -noise, i),
              "tells the network the table index, not the timestep":
                 lambda: gone(x, *network(x.double(), torch.tensor([i]), c.double()).chunk(2, -1), noise, i)})


def guided_step(s):
    """With guidance, eps is uncond + cfg_scale (cond - uncond), and the variance is the conditional half's"""
    x, c, noise = inputs(True)
    rows, i = len(x), 11
    cond, uncond = (said(x, half, i) for half in c.split(rows))
    for scale in (2.5, 0.4, 0.0):
        def result(eps, fraction=cond[1]):
            return gone(x, eps, fraction, noise, i)

        near(step_of(s, x, c, noise, i, 1.0, scale), result(uncond[0] + scale * (cond[0] - uncond[0])),
             f"step with guidance {scale}",
             {"is the conditional result, without guidance": result(cond[0]),
              "is the unconditional result, without guidance": result(uncond[0]),
              "has the halves exchanged: the conditional one comes first":
                 result(cond[0] + scale * (uncond[0] - cond[0]), uncond[1]),
              "has the halves of eps exchanged: the conditional one comes first":
                 result(cond[0] + scale * (uncond[0] - cond[0])),
              "has guidance too large by one: cond + cfg_scale (cond - uncond)":
                 result(cond[0] + scale * (cond[0] - uncond[0])),
              "has the guided eps, but the unconditional half's variance":
                 result(uncond[0] + scale * (cond[0] - uncond[0]), uncond[1]),
              "has a guided variance; it is the conditional half's":
                 result(uncond[0] + scale * (cond[0] - uncond[0]), uncond[1] + scale * (cond[1] - uncond[1])),
              "has the mean of both halves' fractions":
                 result(uncond[0] + scale * (cond[0] - uncond[0]), (cond[1] + uncond[1]) / 2),
              "guides the result of the step, not eps":
                 result(uncond[0], uncond[1]) + scale * (result(cond[0]) - result(uncond[0], uncond[1]))})


def guidance_of_one(s):
    """With both halves of c, guidance 1 gives what the conditional half alone gives"""
    x, c, noise = inputs(True)
    eps, fraction = said(x, c[:len(x)], 14)
    for what, given in (("the conditional half alone", c[:len(x)]), ("both halves and guidance 1", c)):
        near(step_of(s, x, given, noise, 14, 1.0, 1.0), gone(x, eps, fraction, noise, 14), f"step with {what}",
             {"is that of the unconditional half": lambda: gone(x, *said(x, c[len(x):], 14), noise, 14)})


def clip_is_handed_on(s):
    """clip bounds the estimate of x0, with and without guidance, and not the result"""
    for guided, scale in ((False, 1.0), (True, 1.8)):
        x, c, noise = inputs(guided)
        x, i = 1.5 * x, 15
        eps, fraction = said(x, c[:len(x)], i)
        if guided:
            other = said(x, c[len(x):], i)[0]
            eps = other + scale * (eps - other)
        for clip in (0.5, 1.6):
            free, mean = gone(x, eps, fraction, noise, i), gone(x, eps, fraction, noise, i, 0)
            near(step_of(s, x, c, noise, i, 1.0, scale, clip), gone(x, eps, fraction, noise, i, clip=clip),
                 f"step with clip {clip}, {'guided' if guided else 'not guided'}",
                 {"does not depend on clip": free, "is itself clipped": free.clamp(-clip, clip),
                  "has the mean clipped, not the estimate of x0": free - mean + mean.clamp(-clip, clip),
                  "is clipped, as well as the estimate of x0":
                      gone(x, eps, fraction, noise, i, clip=clip).clamp(-clip, clip),
                  "has eps clipped, as well as the estimate of x0":
                      gone(x, eps.clamp(-clip, clip), fraction, noise, i, clip=clip),
                  "has eps clipped": gone(x, eps.clamp(-clip, clip), fraction, noise, i)})


def last_step(s):
    """The last step (index 0) adds no noise, and the one before it does"""
    x, c, noise = inputs(False)
    for i in (0, 1):
        eps, fraction = said(x, c, i)
        near(step_of(s, x, c, noise, i), gone(x, eps, fraction, noise, i), f"step at index {i}",
             {"adds noise" if i == 0 else "adds no noise": gone(x, eps, fraction, noise, i, drawn=i == 0),
              "is x, unchanged": x})


def temperature_of_the_noise(s):
    """temperature is a factor of the noise's standard deviation; at 0 the result is the mean"""
    x, c, noise = inputs(False)
    eps, fraction = said(x, c, 10)
    for temperature in (0.6, 0.0, 1.7):
        near(step_of(s, x, c, noise, 10, temperature), gone(x, eps, fraction, noise, 10, temperature),
             f"step with temperature {temperature}",
             {"does not depend on the temperature": gone(x, eps, fraction, noise, 10),
              "has the temperature as a factor of the variance": gone(x, eps, fraction, noise, 10, temperature**0.5),
              "has the square of the temperature": gone(x, eps, fraction, noise, 10, temperature**2),
              "has the mean scaled too": temperature * gone(x, eps, fraction, noise, 10)})


def step_changes_nothing(s):
    """denoising_step and diffusion_sample leave their arguments as they are"""
    for guided in (False, True):
        x, c, noise = inputs(guided)
        draws, table = [normal(3, 4, seed=seed) for seed in range(5)], tables(STEPS)
        given = {"x": x, "c": c, "noise": noise, **{f"table {name}": value for name, value in table.items()},
                 **{f"draw {k} of the noise": draw for k, draw in enumerate(draws)}}
        copies = {name: tensor.clone() for name, tensor in given.items()}
        s.d2c.denoising_step(network, x, c, noise, table, torch.tensor([5]), 0.9, 1.0 + guided, 0.8)
        s.d2c.diffusion_sample(network, c, draws, 0.9, 1.0 + guided, 4)
        for name, copy in copies.items():
            true(torch.equal(given[name], copy), f"the argument {name} was changed in place")


# The loop ------------------------------------------------------------------------------------------------------------

def loop_of_steps(s):
    """diffusion_sample calls `step` once per level, from the noisiest down, with the next draw each time"""
    steps = 7
    for guided in (False, True):
        start, c, _ = inputs(guided)
        draws = [start] + [normal(len(c), 4, seed=10 + k) for k in range(steps)]
        calls, taken = [], []

        def step(denoiser, x, c, noise, tables, index, temperature, cfg_scale, clip):
            calls.append((x, c, noise, tables, index, temperature, cfg_scale, clip))
            return 0.5 * x + noise[:len(x)] + 1

        def noise():
            for k, draw in enumerate(draws):
                taken.append(k)
                yield draw.clone()

        found = s.d2c.diffusion_sample(network, c, noise(), 0.7, 1.5, steps, 2.5, step)
        true(calls, "the function given as `step` was never called")
        order = [int(call[4]) for call in calls]
        true(order == list(range(steps))[::-1],
             f"the steps are taken at indices {order[:9]}; they should go from {steps - 1} down to 0")
        true(all(torch.is_tensor(call[4]) and call[4].shape == (1,) for call in calls),
             "`step` should get its index as a tensor of shape (1,)")
        true(len(taken) == len(draws), f"{len(taken)} draws of noise were taken; the start and one per step are "
                                       f"{len(draws)} (that of the last step, too, though it has no effect)")
        x, names = start, ("temperature", "cfg_scale", "clip")
        for k, (given, condition, drawn, table, _, *settings) in enumerate(calls):
            same(given, x, f"x of step {k}", ("row", "channel"),
                 wrong={"is multiplied by the temperature; the start is not": 0.7 * x, "is the start": start,
                        "is the draw of the next step": draws[k + 1][:3]})
            same(drawn[:3], draws[k + 1][:3], f"noise of step {k}", ("row", "channel"),
                 wrong={"is that of the last rows; the first count": draws[k + 1][-3:], "is the start": start,
                        "is the draw of the step before": draws[k][:3], "is multiplied by the temperature already":
                        0.7 * draws[k + 1][:3], "is the first draw of all": draws[1][:3]})
            same(condition, c, f"c of step {k}", ("row", "number"))
            true(table["timesteps"].tolist() == list(kept(steps)), f"`step` should get the tables of {steps} levels")
            for name, value, right in zip(names, settings, (0.7, 1.5, 2.5)):
                true(value == right, f"`step` should get the {name} that diffusion_sample got")
            x = 0.5 * x + draws[k + 1][:3] + 1
        same(found, x, "result", ("row", "channel"), wrong={"is that of the last step but one": calls[-1][0]})


def times_told(s):
    """With 20 steps the network is told the 20 kept timesteps of the 1000, from 999 down to 0"""
    for guided in (False, True):
        x, c, _ = inputs(guided)
        told = []

        def denoiser(x, t, c):
            told.extend(time for time in t.unique().tolist() if told[-1:] != [time])
            return network(x, t, c)

        draws = [x] + [normal(3, 4, seed=k) for k in range(STEPS)]
        s.d2c.diffusion_sample(denoiser, c, draws, 1.0, 1.0 + guided, STEPS)
        true(told != list(range(STEPS))[::-1], "the network is told table indices, not timesteps (tables['timesteps'])")
        true(told == list(kept(STEPS))[::-1],
             f"the network is told {len(told)} times, beginning {told[:3]} and ending {told[-3:]}: not the "
             f"{STEPS} kept timesteps in falling order")


def draws_for_both_halves(s):
    """A few guided and plain steps give the right latents, also where draws have rows for both halves"""
    steps = 5
    for guided, scale in ((True, 1.7), (False, 1.0), (True, 0.3)):
        start, c, _ = inputs(guided)
        draws = [normal(len(c), 4, seed=20 + k) for k in range(steps)]
        for width in {3, len(c)}:
            x = start.double()
            for i in reversed(range(steps)):
                t, index = torch.tensor([kept(steps)[i]]), torch.tensor([i])
                eps, fraction = network(x, t, c[:3].double()).chunk(2, -1)
                if guided:
                    other = network(x, t, c[3:].double())[:, :4]
                    eps = other + scale * (eps - other)
                mean, log_variance = reverse(x, eps, fraction, steps, index, 1.2)
                x = mean + 0.8 * (i > 0) * (log_variance / 2).exp() * draws[steps - 1 - i][:3]
            given = [start] + [draw[:width] for draw in draws]
            found = s.d2c.diffusion_sample(network, c, given, 0.8, scale, steps, 1.2)
            same(found, x, f"latents of {steps} steps, guidance {scale}, {width} rows a draw", ("row", "channel"), 1e-3,
                 1e-3)


def of_normal_latents(channels):
    """The exact denoiser of latents from N(z/2, 1/4), of the original code's test."""
    signal = chain(kept(1000))["signal"].float()
    fraction = -1 + 2 * torch.arange(channels) / (channels - 1)

    def denoiser(x, t, z):
        a = signal[t][:, None]**2
        eps = (x - a.sqrt() * 0.5 * z[:, :channels]) * (1 - a).sqrt() / (0.25 * a + 1 - a)
        return torch.cat([eps, fraction.expand_as(x)], 1)
    return denoiser


def samples_of_the_original(s):
    """100 steps of an analytic denoiser, guided and plain, equal those of the original code"""
    arrays = golden("mar_analytic_sampler")

    def draws(seed, *shapes):
        generator = np.random.Generator(np.random.PCG64(seed))
        return [torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)) for shape in shapes]

    for name, scale, temperature, noise in (
            ("sample_cfg2_t095", 2.0, 0.95, draws(452, (4, 16), *100 * [(8, 16)])),
            ("sample_cfg1_t1", 1.0, 1.0, draws(453, *101 * [(8, 16)]))):
        found = s.adapters.diffusion_sample(of_normal_latents(16), arrays["z"], noise, temperature, scale, 100)
        same(found, arrays[name], f"latents with guidance {scale}", ("row", "channel"), 1e-3, 1e-3)


def samples_have_the_right_distribution(s):
    """With the exact denoiser of N(z/2, 1/4), latents have this mean and variance, after 12 steps already"""
    steps, count = 12, 2000
    levels, tables_of = kept(steps), chain(kept(steps))
    a = tables_of["signal"]**2
    before, beta = torch.cat([torch.ones(1), a[:-1]]), tables_of["log_beta"].exp()
    truth = 1 / (1 / (before / 4 + 1 - before) + (1 - beta) / beta)  # variance of x_(i-1) given x_i, by Bayes' rule
    low, high = tables_of["log_posterior"], tables_of["log_beta"]
    fraction = 2 * (truth.log() - low) / (high - low) - 1

    def denoiser(x, t, z):
        i = levels.index(int(t[0]))
        eps = (x - a[i].sqrt() * z / 2) * (1 - a[i]).sqrt() / (a[i] / 4 + 1 - a[i])
        return torch.cat([eps, fraction[i].expand_as(x)], 1).float()

    z = torch.tensor([[-2.0, 1.0], [3.0, 0.0]]).repeat_interleave(count, 0)
    draws = [normal(2 * count, 2, seed=30 + k) for k in range(steps + 1)]
    found = s.d2c.diffusion_sample(denoiser, z, draws, 1.0, 1.0, steps).unflatten(0, (2, count))
    same(found.mean(1), z.unflatten(0, (2, count))[:, 0] / 2, "mean of the latents", ("kind", "channel"),
         5 * 0.5 / math.sqrt(count), 0)
    same(found.var(1), torch.full((2, 2), 0.25), "variance of the latents", ("kind", "channel"),
         5 * 0.25 * math.sqrt(2 / count), 0)


CHECKS = [(2, plain_step), (3, guided_step), (1, guidance_of_one), (1, clip_is_handed_on), (1, last_step),
          (1, temperature_of_the_noise), (2, loop_of_steps), (1, times_told), (1, draws_for_both_halves),
          (1, samples_of_the_original), (1, samples_have_the_right_distribution), (1, step_changes_nothing)]
