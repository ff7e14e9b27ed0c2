"""Exercise 11: a batch and a step."""
import math
import random
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.data import default_collate

from checking import same, seeded, true

COUNT, GRID, CHANNELS, LEVELS, SCALE = 7, (2, 3), 2, 5, 0.4
NUMBER = GRID[0] * GRID[1]
NAMES = ("latents", "visible", "hidden", "label", "codes", "t", "noise")


# learning_rate and ema_decay -----------------------------------------------------------------------------------------

def rates(s, steps, warmup, decay, at, peak=0.03):
    return torch.tensor([float(s.train.learning_rate(step, steps, peak, warmup, decay)) / peak for step in at])


def warm_up(s):
    """The rate rises linearly to the peak within `warmup` steps, from the first step on"""
    for warmup in (8, 5, 1):
        for decay in ("constant", "cosine"):
            at = torch.arange(warmup)
            same(rates(s, 20, warmup, decay, at.tolist()), (at + 1) / warmup,
                 f"rate / peak, warmup {warmup}, decay {decay!r}", ("step",), wrong={
                     "is zero in the first step: step s has (s + 1) / warmup": at / warmup,
                     "is divided by warmup + 1": (at + 1) / (warmup + 1), "has no warm-up": torch.ones(warmup)})


def after_the_warm_up(s):
    """Then the rate stays, or falls on half a cosine from the peak to zero at `steps`"""
    for steps, warmup in ((20, 8), (13, 0), (9, 1), (400, 100)):
        at = torch.arange(warmup, steps + 1)
        share = (at - warmup) / (steps - warmup)
        what = f"steps {steps}, warmup {warmup}: rate / peak after the warm-up"
        same(rates(s, steps, warmup, "constant", at.tolist()), torch.ones(len(at)), f"{what}, decay 'constant'",
             ("step after the warm-up",), wrong={"falls as with decay='cosine'": (1 + torch.cos(math.pi * share)) / 2})
        same(rates(s, steps, warmup, "cosine", at.tolist()), (1 + torch.cos(math.pi * share)) / 2,
             f"{what}, decay 'cosine'", ("step after the warm-up",), wrong={
                 "does not fall": torch.ones(len(at)), "falls linearly": 1 - share,
                 "is a quarter of a period: it should fall by half a period": torch.cos(math.pi / 2 * share),
                 "is a whole period": (1 + torch.cos(2 * math.pi * share)) / 2,
                 "falls from the peak to -peak": torch.cos(math.pi * share),
                 "falls from twice the peak": 1 + torch.cos(math.pi * share),
                 "rises from zero": (1 - torch.cos(math.pi * share)) / 2,
                 "counts the fall from step 0 and not from the end of the warm-up":
                     (1 + torch.cos(math.pi * at / steps)) / 2,
                 "falls over `steps` steps after the warm-up: it should be zero at `steps`":
                     (1 + torch.cos(math.pi * (at - warmup) / steps)) / 2})


def moving_average(s):
    """The decay of the moving average is (1 + step) / (10 + step), and at most `longest`"""
    at = torch.tensor([0, 1, 2, 7, 40, 85, 200, 3000, 10**6])
    for longest in (0.9, 0.9999):
        found = torch.tensor([float(s.train.ema_decay(step, longest)) for step in at.tolist()])
        young = (1 + at) / (10 + at)
        same(found, young.clamp(max=longest), f"ema_decay(step, {longest})", ("place in the list of steps",), rtol=1e-6,
             atol=1e-6, wrong={"grows beyond `longest`": young, "is `longest` for a young average, too":
                               torch.full((9,), longest), "is never below `longest`": young.clamp(min=longest),
                               "counts steps from 1": ((2 + at) / (11 + at)).clamp(max=longest),
                               "counts steps from -1": (at / (9 + at)).clamp(max=longest),
                               "is the share of what is new": 1 - young.clamp(max=longest)})


# One picture of a batch ----------------------------------------------------------------------------------------------

def make_cache(log_variance=-30.0, mean=None):
    """As TokenCache: codes (2,7,6), moments (2,7,6,4), labels (7,); all codes and means are different."""
    rng = np.random.default_rng(0)
    codes = rng.permutation(65536)[:2 * COUNT * NUMBER].reshape(2, COUNT, NUMBER).astype(np.uint16)
    means = rng.standard_normal((2, COUNT, NUMBER, CHANNELS)) if mean is None else np.full(
        (2, COUNT, NUMBER, CHANNELS), mean)
    moments = np.concatenate([means, np.full_like(means, log_variance)], 3).astype(np.float16)
    meta = dict(run={}, count=COUNT, classes=list("abcdefghijk"), tokenizers="", grid=list(GRID), channels=CHANNELS,
                scale=SCALE, codebook_size=65536)
    return SimpleNamespace(codes=codes, moments=moments, labels=np.array([3, 9, 0, 10, 4, 3, 7]), meta=meta)


def make_config(s, fusion, hidden_share=(0.5, 0.3)):
    return s.d2c.ContinuousConfig(channels=CHANNELS, num_classes=11, grid=GRID, width=32, encoder_depth=1,
                                  decoder_depth=1, num_heads=2, noise_levels=LEVELS, hidden_share=hidden_share,
                                  fusion=fusion, codebook_size=65536)


def read_batch(read, cache, count, chance=0.4, names=("codes", "label"), index=None):
    """{name: tensor} of many draws, collated as for the model; picture i % 7, generator i."""
    before = [x.copy() for x in (cache.codes, cache.moments, cache.labels)]
    rows = [read(cache, i % COUNT if index is None else index, seeded(i), chance) for i in range(count)]
    what = read.__name__
    true(isinstance(rows[0], (tuple, list)) and len(rows[0]) == len(names),
         f"{what}: should return ({', '.join(names)})")
    try:
        batch = dict(zip(names, default_collate(rows)))
    except (TypeError, RuntimeError) as error:
        raise AssertionError(f"{what}: pictures do not make a batch: {' '.join(str(error).split())[:150]}") from None
    true(all(np.array_equal(a, b) for a, b in zip(before, (cache.codes, cache.moments, cache.labels))),
         f"{what}: changes the cache, from which other steps read")
    for name, dtype in dict(codes=torch.int64, label=torch.int64, latents=torch.float32, noise=torch.float32).items():
        found = batch[name].dtype if name in batch else dtype
        true(found == dtype, f"{what}: {name} of a batch have dtype {found}, should have {dtype}")
    shapes = dict(codes=(NUMBER,), label=(), latents=(NUMBER, CHANNELS))
    for name in shapes.keys() & batch.keys():
        found = tuple(batch[name].shape[1:])
        true(found == shapes[name], f"{what}: {name} of a picture have shape {found}, should have {shapes[name]}")
    return batch


def reader(s, config):
    """read_latents with the parameters of read_codes."""
    def read_latents(cache, index, generator, chance):
        return s.train.read_latents(cache, config, index, generator, chance)
    return read_latents


def sides(s, cache, batch, what):
    """0 where a picture of the batch has the original's codes, 1 those of the mirrored picture, -1 where dropped."""
    picture, codes = torch.arange(len(batch["codes"])) % COUNT, batch["codes"]
    known = torch.from_numpy(cache.codes.astype(np.int64))[:, picture]                        # (2,B,N)
    dropped, match = (codes == -1).all(1), (codes == known).all(2)                            # (B,), (2,B)
    if not (dropped | match.any(0)).all():
        i = int((~(dropped | match.any(0))).nonzero()[0])
        here, mirror = codes[i], known[:, i].flip(1)
        hint = ("some codes of a picture are dropped and some not" if (here == -1).any() else
                "are the picture's from right to left; the cache has codes of the mirrored picture" if
                (here == mirror).all(1).any() else
                "are those of another picture" if np.isin(here.numpy(), cache.codes).all() else "are not in the cache")
        raise AssertionError(f"{what}: codes: {hint}")
    return torch.where(dropped, -1, match[1].long())


def labels_of(cache, batch, what):
    """True where the class is dropped."""
    label = torch.from_numpy(cache.labels)[torch.arange(len(batch["label"])) % COUNT]
    true(((batch["label"] == label) | (batch["label"] == -1)).all(), f"{what}: a label is neither the picture's nor -1")
    return batch["label"] == -1


def share(events, expected, what):
    """The share of events must be the expected one, within 4.5 standard deviations."""
    found, bound = float(events.double().mean()), 4.5 * math.sqrt(expected * (1 - expected) / len(events))
    true(abs(found - expected) <= bound, f"{what} in {100 * found:.1f} % of {len(events)} draws, should be in "
         f"{100 * expected:.0f} %")


def independent(a, b, what):
    a, b = (x.double() - x.double().mean() for x in (a, b))
    correlation = float((a * b).mean() / (a.std() * b.std()).clamp(min=1e-9))
    true(abs(correlation) < 5 / math.sqrt(len(a)), f"{what} depend on each other (correlation {correlation:.2f})")


def from_the_generator(read, cache, what):
    """Equal generators give equal results, whatever the other sources of random numbers do."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        results.append(read_batch(read, cache, 20, names=NAMES if what == "read_latents" else ("codes", "label")))
    for name in results[0]:
        true(torch.equal(results[0][name], results[1][name]), f"{what}: equal generators give different {name}: what "
             "is random should come from `generator`")


def stage_1(s):
    """read_codes: mirrored with probability 1/2, the class dropped with probability 0.1, by the generator"""
    cache, what = make_cache(), "read_codes"
    batch = read_batch(s.train.read_codes, cache, 2800)
    side, no_class = sides(s, cache, batch, what), labels_of(cache, batch, what)
    true((side >= 0).all(), "read_codes: drops codes; stage 1 drops the class alone")
    share(side == 1, 0.5, "read_codes: mirrored")
    share(no_class, 0.1, "read_codes: class dropped")
    independent(side, no_class, "read_codes: mirroring and dropping")
    from_the_generator(s.train.read_codes, cache, what)
    other = read_batch(s.train.read_codes, cache, 300, chance=0.95)
    share(sides(s, cache, other, what) == 1, 0.5, "read_codes, another `chance`: mirrored")
    share(labels_of(cache, other, what), 0.1, "read_codes, another `chance`: class dropped")


def places(s):
    """read_latents: `chance` decides how many places are hidden, the picture's generator which ones"""
    config = make_config(s, "cross")
    for chance in (0.0, 0.3, 0.6, 0.9):
        expected = s.train.count_hidden(NUMBER, config, chance)
        batch = read_batch(reader(s, config), make_cache(), 30, chance, NAMES)
        visible, hidden = batch["visible"], batch["hidden"]
        what = f"read_latents with chance {chance}"
        true(visible.shape == (30, NUMBER - expected) and hidden.shape == (30, expected), f"{what}: {visible.shape[1]} "
             f"places are visible and {hidden.shape[1]} hidden, count_hidden says that {expected} are hidden")
        true((torch.cat([visible, hidden], 1).sort(1).values == torch.arange(NUMBER)).all(),
             f"{what}: visible and hidden together should be all places, each once")
        for name, shape in dict(t=(expected, LEVELS), noise=(expected, LEVELS, CHANNELS)).items():
            found = tuple(batch[name].shape[1:])
            true(found == shape, f"{what}: {name} has shape {found}, should have {shape}: hidden places first, then "
                 "the config's noise levels")
    chance = next(i / 100 for i in range(100) if s.train.count_hidden(NUMBER, config, i / 100) == 3)
    hidden = read_batch(reader(s, config), make_cache(), 800, chance, NAMES, index=2)["hidden"].sort(1).values
    sets = (hidden[:, None] == torch.tensor(list(combinations(range(NUMBER), 3)))).all(2)     # (B,20)
    true(sets.any(0).all(), f"read_latents: of the 20 sets of 3 hidden places only {int(sets.any(0).sum())} occur in "
         "800 draws for one picture")
    for places in sets.T:
        share(places, 1 / 20, "read_latents: a set of 3 hidden places of 6")


def latents_and_codes(s):
    """read_latents: latents are samples times the cache's scale; latents and codes are mirrored together"""
    cache, what = make_cache(), "read_latents"
    batch = read_batch(reader(s, make_config(s, "cross")), cache, 210, names=NAMES)
    side = sides(s, cache, batch, what)
    means = torch.from_numpy(cache.moments[..., :CHANNELS]).double()[:, torch.arange(210) % COUNT]  # (2,B,N,C)
    match = torch.isclose(batch["latents"].double(), SCALE * means, 1e-4, 1e-5).flatten(2).all(2)
    if not match.any(0).all():
        i = int((~match.any(0)).nonzero()[0])
        for text, others in (("are not multiplied by the scale", means[:, i]),
                             ("are divided by the scale, which should multiply", means[:, i] / SCALE),
                             ("run from the last place to the first", SCALE * means[:, i].flip(1)),
                             ("have their channels in reverse order", SCALE * means[:, i].flip(2)),
                             ("are those of another picture", SCALE * means.flatten(0, 1)),
                             ("are rounded to half precision", SCALE * means[:, i])):
            coarse = 2e-3 if "half" in text else 1e-4
            true(not torch.isclose(batch["latents"][i].double(), others, coarse, 1e-4).flatten(1).all(1).any(),
                 f"read_latents: latents {text}")
        raise AssertionError("read_latents: at log-variance -30 latents are not the means times the scale")
    match = match[1].long()
    true(((side == match) | (side == -1)).all(), "read_latents: latents and codes of one draw are not both of the "
         "mirrored or both of the original picture")
    spread = read_batch(reader(s, make_config(s, "cross")), make_cache(math.log(4), 1.0), 1000, names=NAMES)["latents"]
    spread = (spread.double() / SCALE).flatten(1)                                              # N(1, 4)
    for channel in range(spread.shape[1]):
        mean, deviation = float(spread[:, channel].mean()), float(spread[:, channel].std())
        true(abs(mean - 1) < 4.7 * 2 / math.sqrt(1000), f"read_latents: latents of mean 1 have mean {mean:.2f}")
        true(abs(deviation - 2) < 4.7 * 2 / math.sqrt(2000), "read_latents: latents of standard deviation 2 have "
             f"{deviation:.2f} (over the scale): draw them by KLTokenizer.sample, with standard normal noise")


def drops_with_fusion(s):
    """read_latents with fusion drops both in 0.1, codes alone in 0.05 and the class alone in 0.05 of the draws"""
    cache, what = make_cache(), "read_latents"
    batch = read_batch(reader(s, make_config(s, "qformer")), cache, 2100, names=NAMES)
    no_class, no_codes = labels_of(cache, batch, what), sides(s, cache, batch, what) == -1
    share(no_class & no_codes, 0.1, "read_latents with fusion: class and codes are both dropped")
    share(~no_class & no_codes, 0.05, "read_latents with fusion: codes alone are dropped")
    share(no_class & ~no_codes, 0.05, "read_latents with fusion: the class alone is dropped")
    mirrored = torch.tensor(cache.moments[1, :, 0, 0], dtype=torch.float64)[torch.arange(2100) % COUNT] * SCALE
    mirrored = torch.isclose(batch["latents"][:, 0, 0].double(), mirrored, 1e-4, 1e-5)
    share(mirrored, 0.5, "read_latents: mirrored")
    independent(mirrored, no_class, "read_latents: mirroring and dropping the class")
    independent(mirrored, no_codes, "read_latents: mirroring and dropping the codes")


def drops_without_fusion(s):
    """read_latents without fusion never drops the class alone; the generator and not `chance` decides"""
    cache, what = make_cache(), "read_latents"
    for chance in (0.02, 0.17):
        batch = read_batch(reader(s, make_config(s, "none")), cache, 700, chance, NAMES)
        no_class, no_codes = labels_of(cache, batch, what), sides(s, cache, batch, what) == -1
        true(not (no_class & ~no_codes).any(), "read_latents without fusion: the class alone is dropped")
        share(no_class, 0.1, f"read_latents without fusion, chance {chance}: the class is dropped")
    from_the_generator(reader(s, make_config(s, "cross")), cache, what)


def noise_and_levels(s):
    """read_latents: t is uniform in 0..999, noise standard normal, each number drawn by itself"""
    config, count = make_config(s, "cross"), 1200
    chance = next(i / 100 for i in range(100) if s.train.count_hidden(NUMBER, config, i / 100) == 4)
    batch = read_batch(reader(s, config), make_cache(0.0, 0.0), count, chance, NAMES)
    t, noise, hidden, eps = (batch[name] for name in ("t", "noise", "hidden", "latents"))
    true(not t.is_floating_point(), f"read_latents: t has dtype {t.dtype}, should be whole numbers")
    low, high = int(t.min()), int(t.max())
    true((low, high) == (0, 999), f"read_latents: t runs from {low} to {high}, should run from 0 to 999")
    for third in range(3):
        share((t * 3 // 1000 == third).flatten(), 1 / 3, f"read_latents: t is in the {third + 1}. third of the levels")
    total = noise.numel()
    mean, variance = float(noise.double().mean()), float(noise.double().var())
    true(abs(mean) < 4.7 / math.sqrt(total) and abs(variance - 1) < 4.7 * math.sqrt(2 / total),
         f"read_latents: noise has mean {mean:.2f} and variance {variance:.2f}, should be standard normal")
    tail = float((noise.abs() > 2).double().mean())
    true(abs(tail - 0.0455) < 4.7 * math.sqrt(0.0455 / total), "read_latents: noise is not normal: "
         f"{100 * tail:.1f} % of it are beyond +-2")
    groups = {"t": t.flatten(1), "noise": noise.flatten(1), "noise of the latent": eps.flatten(1),
              "noise of the hidden latent": eps[torch.arange(count)[:, None], hidden].flatten(1)}
    groups = {name: (x.double() - x.double().mean(0)) / x.double().std(0).clamp(min=1e-9) for name, x in groups.items()}
    for one, other in [("t", "t"), ("noise", "noise"), ("noise of the latent",) * 2, ("noise", "t"),
                       ("noise", "noise of the latent"), ("noise", "noise of the hidden latent")]:
        correlation = groups[one].T @ groups[other] / count
        correlation = correlation - correlation.diag().diag() if one == other else correlation
        pair = f"{one} at two places, levels or channels" if one == other else f"{one} and {other}"
        true(correlation.abs().max() < 6.5 / math.sqrt(count), f"read_latents: {pair}: not drawn independently "
             f"(correlation up to {float(correlation.abs().max()):.2f})")


CHECKS = [(1, warm_up), (2, after_the_warm_up), (1, moving_average), (2, stage_1), (1, places), (2, latents_and_codes),
          (2, drops_with_fusion), (1, drops_without_fusion), (1, noise_and_levels)]
