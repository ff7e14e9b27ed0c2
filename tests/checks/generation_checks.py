"""Exercise 9: the token schedule and the loop that draws latents."""
import math

import numpy as np
import torch

from checking import golden, normal, raises, same, shapes, true

AXES = "picture", "place", "channel"

# The schedule --------------------------------------------------------------------------------------------------------


def plan(number, steps, cfg=1.0, mistake=""):
    """[(tokens drawn, guidance)] from the formula. (Steps that are no multiple of 3 keep cos(pi/2 s/S) from 1/2, where
    rounding would decide on the floor.)"""
    whole = {"ceil": math.ceil, "round": round}.get(mistake, math.floor)
    hidden = [number]
    for step in range(1, steps + 1):
        share = 1 - step / steps if mistake == "linear" else math.cos(math.pi * step / (2 * steps))
        share = 1 - math.sin(math.pi * step / (2 * steps)) if mistake == "sine" else share
        least = hidden[-1] - (mistake != "no least")
        hidden.append(max(mistake != "no least", min(whole(number * share), least)))
    drawn = [before - after for before, after in zip(hidden, hidden[1:])]
    drawn[-1] = hidden[-2]
    shares = [1 - after / number for after in hidden[1:]]
    if mistake == "share before":
        shares = [1 - before / number for before in hidden[:-1]]
    if mistake == "steps":
        shares = [step / steps for step in range(1, steps + 1)]
    if mistake == "full":
        shares[-1] = 1.0
    if mistake == "constant":
        shares = [1.0] * steps
    if mistake == "sum":
        return [(count, 1 + cfg * share) for count, share in zip(drawn, shares)]
    if mistake == "from 0":
        return [(count, cfg * share) for count, share in zip(drawn, shares)]
    return [(count, 1 + (cfg - 1) * share) for count, share in zip(drawn, shares)]


def counts_and_guidance(schedule):
    schedule = [tuple(pair) for pair in schedule]
    return torch.tensor([int(pair[0]) for pair in schedule]), torch.tensor([float(pair[1]) for pair in schedule])


def same_counts(found, number, steps):
    count = counts_and_guidance(found)[0]
    what = f"tokens drawn of {number} in {steps} steps"
    true(len(count) == steps, f"{what}: there are {len(count)} entries, not {steps}")
    true(int(count.sum()) == number, f"{what}: their sum is {int(count.sum())}, not {number}")
    true(count.min() >= 1, f"{what}: step {int(count.argmin()) + 1} draws {int(count.min())}")
    wrong = {"equals the numbers of a linear schedule": "linear",
             "equals the numbers with 1 - sine for the cosine": "sine",
             "equals the numbers rounded up, not down": "ceil", "equals the numbers rounded, not rounded down": "round"}
    same(count, [pair[0] for pair in plan(number, steps)], what, ("step",), wrong={
        text: [pair[0] for pair in plan(number, steps, mistake=mistake)] for text, mistake in wrong.items()}
        | {"are in reverse: few tokens come first": [pair[0] for pair in plan(number, steps)][::-1]})


def same_guidance(found, number, steps, cfg):
    wrong = {"equals cfg_scale in every step": "constant",
             "counts what is drawn before the step, not after": "share before",
             "grows with the number of steps, not with the share that is drawn": "steps",
             "counts nothing as hidden after the last step": "full", "equals 1 + cfg_scale * share": "sum",
             "equals cfg_scale * share": "from 0"}
    expected = torch.tensor([pair[1] for pair in plan(number, steps, cfg)])
    same(counts_and_guidance(found)[1], expected, f"guidance for cfg_scale {cfg}, {number} tokens, {steps} steps",
         ("step",), wrong={text: torch.tensor([float(pair[1]) for pair in plan(number, steps, cfg, mistake)])
                           for text, mistake in wrong.items()})


def schedule_of_the_original(s):
    """The token schedule draws as many tokens per step as MAR's"""
    for steps in (4, 8, 32, 64, 128, 256, 1):
        found, arrays = s.d2c.token_schedule(256, steps, 3.0), golden("mar_schedule")
        same_counts(found, 256, steps)
        same_guidance(found, 256, steps, 3.0)
        same(counts_and_guidance(found)[0], arrays[f"n_pred_iter{steps}"], f"tokens drawn in {steps} steps", ("step",))
        same(counts_and_guidance(found)[1], arrays[f"cfg_iter{steps}"], f"guidance in {steps} steps", ("step",))


def schedule_of_few_tokens(s):
    """Every step draws at least one token, all together draw each once, and more steps than tokens raise ValueError"""
    for number, steps in ((15, 4), (15, 5), (17, 7), (10, 10), (23, 20), (7, 7), (13, 2), (2, 1), (1, 1)):
        same_counts(s.d2c.token_schedule(number, steps, 2.0), number, steps)
    raises(ValueError, lambda: s.d2c.token_schedule(15, 16, 2.0), "token_schedule(15, 16, 2.0)")


def guidance_grows(s):
    """Guidance grows from 1 with the share that is drawn by the end of the step; cfg_scale may lie below 1"""
    for number, steps in ((15, 4), (16, 16), (10, 1), (17, 7)):
        for cfg in (1.0, 3.0, 0.4, 0.0):
            same_guidance(s.d2c.token_schedule(number, steps, cfg), number, steps, cfg)


# The loop: a small network, a denoiser whose samples are known to be N(z/2, 1/4), and an oracle ----------------------


def denoiser_of(s):
    def denoiser(x, t, z):
        a = s.d2c.schedule_tables(1000, x.device, x.dtype)["signal"][t][:, None] ** 2
        eps = (x - a.sqrt() * 0.5 * z[:, :x.shape[1]]) * (1 - a).sqrt() / (0.25 * a + 1 - a)
        return torch.cat([eps, torch.linspace(-1, 1, x.shape[1]).expand_as(x)], 1)
    return denoiser


def small(s, fusion, kind=None):
    """A stage 2 with 3 channels on 3 x 5 places, all parameters drawn."""
    config = s.d2c.ContinuousConfig(channels=3, num_classes=7, grid=(3, 5), width=24, encoder_depth=1, decoder_depth=1,
                                    num_heads=3, buffer_size=2, head_depth=1, head_width=8, fusion=fusion,
                                    fusion_depth=1, codebook_size=11)
    model = s.adapters.draw_parameters((kind or s.d2c.ContinuousGenerator)(config), 3)
    with torch.no_grad():  # the condition must depend on the class
        for table in (model.class_emb.weight, model.fake_latent):
            table.mul_(2)
    model.diffloss["net"] = s.adapters.OutsideDenoiser(denoiser_of(s))
    return model


def codebook(model):
    return hasattr(model, "code_embedding")


def inputs(model):
    """labels (3,), one of them -1; codes (3,15), some -1, or None; orders (3,15)."""
    labels, orders = torch.tensor([4, -1, 2]), normal(3, 15, seed=5).argsort(1)
    codes = (normal(3, 15, seed=6) * 1e3).long() % 12 - 1
    return labels, codes if codebook(model) else None, orders


def noise(n, rows, channels=3):
    """The n-th draw."""
    return normal(int(rows), int(channels), seed=100 + n)


def play(model, labels, codes, orders, **settings):
    """(copies of what `stream` yields, the arguments of all draws)."""
    calls = []

    def draw(rows, channels):
        calls.append((int(rows), int(channels)))
        return noise(len(calls) - 1, rows, channels)

    return [latents.clone() for latents in model.stream(labels, codes, orders, draw, **settings)], calls


@torch.no_grad()
def oracle(model, labels, codes, orders, num_steps=4, cfg_scale=1.0, temperature=1.0, diffusion_steps=(5, 5),
           clip=math.inf, mistake=""):
    """The latents after the last token step, picture by picture. `mistake` makes a wrong variant."""
    (batch, number), latents, drawn, draws = orders.shape, torch.zeros(*orders.shape, 3), 0, 0
    counts = plan(number, num_steps, cfg_scale, mistake if mistake in ("constant", "share before") else "")
    for k, (count, guidance) in enumerate(counts):
        first, last = diffusion_steps
        steps = round(first + (last - first) * k / max(1, num_steps - 1))
        noises = [noise(draws + i, batch * count) for i in range(steps + 1)]
        new = latents.clone()
        for b in range(batch):
            order = orders[0 if mistake == "one order" else b].tolist()
            order = order if mistake == "beginning" else order[::-1]  # now from front to back
            visible, places = order[:drawn], order[drawn:drawn + count]
            places = places if mistake == "unsorted" else places[::-1] if mistake == "reversed" else sorted(places)
            visible = {"blind": [], "this step": order[:drawn + count]}.get(mistake, visible)
            rows = range(b, batch * count, batch) if mistake == "by place" else range(b * count, (b + 1) * count)

            def condition(label, code):
                context, index = None if codes is None else model.prepare(code), torch.tensor([visible]).long()
                return model.condition(latents[b:b + 1], index, label, context)[0, places]

            label, code = labels[b:b + 1], None if codes is None else codes[b:b + 1]
            z = condition(label, code)
            if cfg_scale != 1:
                nothing = None if codes is None else torch.full_like(code, -1)
                other = condition(label if mistake == "keeps class" else torch.full_like(label, -1),
                                  code if mistake == "keeps codes" else nothing)
                z = torch.cat([other, z] if mistake == "halves" else [z, other])
            mine = [x[list(rows)] for x in noises]
            new[b, places] = model.sample_latents(z, mine, temperature, guidance, steps, clip)
        latents, drawn, draws = new, drawn + count, draws + steps + 1
    return latents


MISTAKES = {"equals the result with the orders read from their beginning": "beginning",
            "equals the result with the noise for the places in the order of drawing, not ascending": "unsorted",
            "equals the result with the noise for the places in reverse": "reversed",
            "equals the result with rows of noise place by place, not picture by picture": "by place",
            "equals the result with the first picture's order for all": "one order",
            "equals the result of a network that never sees what has been drawn": "blind",
            "equals the result of a network that sees zeros at the places of this step as known": "this step"}
GUIDED = {"equals the result with the class kept in guidance's second half": "keeps class",
          "equals the result with the codes kept in guidance's second half": "keeps codes",
          "equals the result with cfg_scale in every step: see token_schedule": "constant",
          "equals the result with the halves of guidance exchanged": "halves",
          "equals the result with guidance one step late": "share before"}


def same_latents(found, given, what, guided=False, other=(), **settings):
    """Compare with the oracle. (Errors of 1e-7 in the noise become 1e-3 in the first step; mistakes are far larger.)
    other: (what it looks like, settings) of further wrong variants."""
    wrong = {text: lambda mistake=mistake: oracle(*given, **settings, mistake=mistake)
             for text, mistake in (GUIDED | MISTAKES if guided else MISTAKES).items()}
    wrong |= {text: lambda change=change: oracle(*given, **settings | change) for text, change in other}
    if guided:
        wrong["equals the result without guidance"] = lambda: oracle(*given, **settings | dict(cfg_scale=1.0))
    same(found, oracle(*given, **settings), what, AXES, atol=5e-3, rtol=0, wrong=wrong)


def last(model, labels, codes, orders, **settings):
    yielded, _ = play(model, labels, codes, orders, **settings)
    true(len(yielded) > 0, "stream yields nothing")
    return yielded[-1]


def latents_of_the_original(s):
    """The latents equal MAR's, guided and not"""
    state, arrays = s.formula.formula_state(shapes("mar_tiny")), golden("mar_tiny_generate_analytic")
    for name, cfg, temperature in (("it4_cfg1", 1.0, 1.0), ("it4_cfg2", 2.0, 0.95)):
        random = np.random.Generator(np.random.PCG64(561))

        def numbers():
            for count, _ in plan(16, 4):
                for i in range(101):  # two pictures; MAR draws a second half that does not count
                    rows = 2 * count * (2 if cfg != 1 and i else 1)
                    yield random.standard_normal((rows, 16), dtype=np.float32)

        found = s.adapters.mar_generate(state, arrays["labels"], arrays["orders"], numbers(), 4, 4, cfg, temperature,
                                        100, denoiser_of(s))
        same(found, arrays[f"out_{name}"], f"latents with guidance {cfg}", ("picture", "channel", "row", "column"),
             atol=2e-3, rtol=0)


def orders_and_noise(s):
    """Places are drawn from the end of each picture's order; rows of noise are picture by picture, places ascending"""
    model = small(s, "none")
    given = model, *inputs(model)
    same_latents(last(*given, num_steps=4, diffusion_steps=5), given, "latents of a model without fusion")


def guidance(s):
    """The network sees class and codes; guidance adds a second half with neither; cfg_scale may lie below 1"""
    for fusion, cfg in (("cross", 1.0), ("cross", 2.5), ("aligned", 0.3), ("none", 3.0)):
        model = small(s, fusion)
        given, settings = (model, *inputs(model)), dict(num_steps=4, cfg_scale=cfg)
        same_latents(last(*given, **settings, diffusion_steps=5), given,
                     f"latents with fusion {fusion} and cfg_scale {cfg}", guided=cfg != 1, **settings)


def settings_reach_the_sampler(s):
    """temperature and clip reach the sampler"""
    model = small(s, "qformer")
    given, settings = (model, *inputs(model)), dict(num_steps=2, cfg_scale=1.6, temperature=0.4, clip=0.7)
    other = [("equals the result with temperature 1", dict(temperature=1.0)),
             ("equals the result without clip", dict(clip=math.inf)),
             ("equals the result with neither temperature nor clip", dict(temperature=1.0, clip=math.inf))]
    same_latents(last(*given, **settings, diffusion_steps=6), given, "latents with temperature and clip",
                 guided=True, other=other, **settings | dict(diffusion_steps=(6, 6)))


def annealed_steps(s):
    """diffusion_steps (first, last) is linear over the token steps; one number holds for all"""
    model = small(s, "none")
    labels, codes, orders = inputs(model)
    for pair in ((8, 4), (3, 11)):
        _, calls = play(model, labels, codes, orders, num_steps=5, diffusion_steps=pair)
        what, total = f"diffusion_steps {pair} in 5 token steps", sum(pair) * 5 // 2 + 5
        for k, (count, _) in enumerate(plan(15, 5)):
            steps = pair[0] + (pair[1] - pair[0]) * k // 4
            here, calls = calls[:steps + 1], calls[steps + 1:]
            true(len(here) == steps + 1 and all(rows == 3 * count for rows, _ in here),
                 f"{what}: step {k + 1} should have {steps} diffusion steps, which is {steps + 1} draws")
        true(not calls, f"{what}: {len(calls)} draws more than {total}")
        given, settings = (model, labels, codes, orders), dict(num_steps=5, diffusion_steps=pair)
        same_latents(last(*given, **settings), given, f"latents with diffusion_steps {pair}", **settings)
    for steps in (4, (4, 4)):
        _, calls = play(model, labels, codes, orders, num_steps=1, diffusion_steps=steps)
        true(len(calls) == 5, f"diffusion_steps {steps} in one token step: {len(calls)} draws, should be 5")


def draws(s):
    """draw is called with (rows, C), steps + 1 times in each token step, guided or not; arguments are not changed"""
    for cfg in (1.0, 2.0):
        model = small(s, "cross")
        labels, codes, orders = inputs(model)
        given = labels[:2], codes[:2], orders[:2]
        before = [x.clone() for x in given]
        _, calls = play(model, *given, num_steps=4, diffusion_steps=5, cfg_scale=cfg)
        expected = [(2 * count, 3) for count, _ in plan(15, 4) for _ in range(6)]
        what = f"draw, cfg_scale {cfg}"
        true(len(calls) == len(expected), f"{what}: called {len(calls)} times in 4 token steps of 5 diffusion steps, "
             f"should be {len(expected)} times")
        true({channels for _, channels in calls} == {3}, f"{what}: asked for {calls[0][1]} numbers in a row; C is 3")
        if [rows for rows, _ in calls] == [2 * rows for rows, _ in expected]:
            raise AssertionError(f"{what}: asked for twice the rows: noise is for B pictures, not for both halves")
        same(torch.tensor(calls)[:, 0], [rows for rows, _ in expected], f"{what}: numbers of rows", ("draw",))
        for name, now, then in zip(("labels", "codes", "orders"), given, before):
            true(now.shape == then.shape and torch.equal(now, then), f"stream changes the {name} it is given")


def what_comes_out(s):
    """The latents so far come out after each token step, zero where nothing is drawn; what is drawn never changes"""
    for cfg in (1.0, 2.0):
        model = small(s, "cross")
        labels, codes, orders = inputs(model)
        count = [pair[0] for pair in plan(15, 5)]
        yielded, _ = play(model, labels, codes, orders, num_steps=5, diffusion_steps=3, cfg_scale=cfg)
        true(len(yielded) == 5, f"5 token steps: yields {len(yielded)} times, should yield 5 times")
        for k, latents in enumerate(yielded):
            true(latents.shape == (3, 15, 3), f"yields shape {tuple(latents.shape)}, should be (B,N,C) = (3, 15, 3)")
            known = torch.zeros(3, 15, dtype=torch.bool)
            for b in range(3):
                known[b, orders[b].flip(0)[:sum(count[:k + 1])]] = True
            true((latents[~known] == 0).all(), f"after token step {k + 1}: not zero where nothing is drawn yet")
            true((latents[known] != 0).all(), f"after token step {k + 1}: places that should be drawn are zero")
            if k:
                same(torch.where(before[..., None], latents, 0), torch.where(before[..., None], yielded[k - 1], 0),
                     f"token step {k + 1} changes what was drawn before", AXES, atol=0, rtol=0)
            before = known
        calls = []
        stream = iter(model.stream(labels, codes, orders, lambda rows, channels: calls.append(0) or
                                   noise(len(calls), rows, channels), 5, cfg, 1.0, 3))
        next(stream)
        true(len(calls) == 4, f"before the first latents come out draw is called {len(calls)} times, should be 4 "
             "(3 diffusion steps and the start): later token steps must wait")


def what_the_network_sees(s):
    """In each token step the network sees the latents drawn before, at the right places, and no others"""
    seen, draws = [], []

    class Spy(s.d2c.ContinuousGenerator):
        def encode(self, latents, visible, labels):
            seen.extend((set(row.tolist()), x.clone(), int(label))
                        for row, x, label in zip(visible, latents.expand(len(visible), -1, -1), labels))
            return super().encode(latents, visible, labels)

    model = small(s, "cross", Spy)
    labels, codes, orders = inputs(model)
    labels, counts, done = torch.tensor([4, 0, 2]), [pair[0] for pair in plan(15, 4)], torch.zeros(3, 15, 3)
    stream = iter(model.stream(labels, codes, orders, lambda rows, channels: draws.append(0) or
                               noise(len(draws), rows, channels), 4, 2.0, 1.0, 3))
    for k in range(4):
        seen.clear()
        drawn = next(stream).clone()
        known = [set(orders[b].flip(0)[:sum(counts[:k])].tolist()) for b in range(3)]
        true({label for _, _, label in seen} == {-1, 0, 2, 4}, f"token step {k + 1}: the network is called for other "
             "labels than those of the pictures, and -1")
        for places, x, label in seen:
            pictures = [b for b in range(3) if label in (-1, labels[b])]
            what = f"token step {k + 1}, " + ("the half without class" if label < 0 else f"picture {pictures[0]}")
            true(any(places == known[b] for b in pictures), f"{what}: the network is told {len(places)} visible "
                 f"places, {len(known[0])} have been drawn" + "; they are others" * (len(places) == len(known[0])))
            index = torch.tensor(sorted(places), dtype=torch.long)
            true(any(places == known[b] and torch.allclose(x[index], done[b, index], atol=1e-5) for b in pictures),
                 f"{what}: the latents at the visible places are not those that were drawn")
        done = drawn


def one_and_all_steps(s):
    """One token step draws all places at once, N token steps one by one; generate gives the last latents"""
    model = small(s, "aligned")
    given = model, *inputs(model)
    for num_steps in (1, 15):
        settings = dict(num_steps=num_steps, cfg_scale=1.5, diffusion_steps=(3, 3))
        calls = []

        def draw(rows, channels):
            calls.append(rows)
            return noise(len(calls) - 1, rows, channels)

        found = model.generate(*given[1:], draw, **settings | dict(diffusion_steps=3))
        same_latents(found, given, f"latents in {num_steps} token step(s)", guided=True, **settings)


CHECKS = [(1, schedule_of_the_original), (1, schedule_of_few_tokens), (2, guidance_grows), (2, what_comes_out),
          (2, orders_and_noise), (2, guidance), (1, settings_reach_the_sampler), (1, annealed_steps), (1, draws),
          (1, what_the_network_sees), (1, one_and_all_steps), (2, latents_of_the_original)]
