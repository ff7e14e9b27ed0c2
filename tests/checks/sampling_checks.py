"""Exercise 4: drawing codes."""
import math

import torch

from checking import golden, same, seeded, shapes, true

DRAWS = 3000  # enough to tell mistakes, few enough for a solution that goes row by row
ROWS = torch.tensor([[0.4, 2.0, -1.0, 1.3, 0.9, -0.2, 1.7],     # unsorted, and each row in another order
                     [1.5, -0.5, 0.8, 2.6, -2.0, 1.1, 0.2],
                     [0.3, 0.1, 1.0, -0.4, 0.6, 0.9, 0.8]])


def shares(row, temperature, top_k, top_p, mistake=""):
    """The probabilities of a row's codes, by loops; `mistake`: one of MISTAKES."""
    logits = [float(value) for value in row]
    number = len(logits)
    if mistake == "the nucleus is chosen before the temperature":
        nucleus = {i for i, share in enumerate(shares(row, 1.0, top_k, top_p)) if share}
    if mistake == "the temperature multiplies the logits":
        logits = [value * temperature for value in logits]
    elif mistake != "the temperature is ignored":
        logits = [value / temperature for value in logits]
    weights = [math.exp(value - max(logits)) for value in logits]
    if mistake == "the temperature acts on the probabilities, not on the logits":
        weights = [math.exp(float(value)) / temperature for value in row]
    order = sorted(range(number), key=lambda i: -weights[i])
    count = number if top_k == 0 or mistake == "top_k is ignored" else top_k + {
        "top_k keeps one code too many": 1, "top_k keeps one code too few": -1}.get(mistake, 0)
    first = order[::-1][:count] if mistake == "the least likely codes are kept, not the likeliest" else order[:count]
    total = sum(weights[i] for i in (range(number) if mistake in (
        "the sum for top_p is not renormalised after top_k", "top_p is applied before top_k") else first))
    kept, mass = [], 0.0
    for i in first:
        if mass / total >= top_p and mistake != "top_p is ignored":
            if mistake == "top_p keeps one code too many":
                kept.append(i)
            break
        if mass / total + weights[i] / total > top_p and kept and mistake == "top_p keeps one code too few":
            break
        kept.append(i)
        mass += weights[i]
    if mistake == "the nucleus is chosen before the temperature":
        kept = [i for i in first if i in nucleus]
    if mistake == "the nucleus's places in the sorted order are taken for the codes themselves":
        kept = range(len(kept))
    if mistake == "what stays is drawn evenly":
        weights = [1.0] * number
    rest = sum(weights[i] for i in kept)
    return torch.tensor([weights[i] / rest if i in kept else 0.0 for i in range(number)], dtype=torch.float64)


MISTAKES = ("the temperature is ignored", "the temperature multiplies the logits",
            "the temperature acts on the probabilities, not on the logits", "top_k is ignored", "top_p is ignored",
            "top_k keeps one code too many", "top_k keeps one code too few", "top_p keeps one code too many",
            "top_p keeps one code too few", "the sum for top_p is not renormalised after top_k",
            "the nucleus is chosen before the temperature", "the least likely codes are kept, not the likeliest",
            "the nucleus's places in the sorted order are taken for the codes themselves", "what stays is drawn evenly")


def fits(codes, expected):
    """Are there as many of each code as its probability says, within 5 sigma (and 3 draws, as the numbers of rare ones
    are not normally distributed), and none of probability 0?"""
    number, found = len(codes), codes.bincount(minlength=len(expected))
    sigma = (number * expected * (1 - expected)).sqrt()
    return len(found) == len(expected) and bool(
        ((found - number * expected).abs() <= (5 * sigma + 3) * (expected > 0)).all())


def draw(s, rows, temperature, top_k, top_p, seed=0):
    """(kinds of rows, draws): each row DRAWS / 2 times, the kinds taking turns."""
    logits = rows.repeat(DRAWS // 2, 1)
    codes = s.d2c.sample_code(logits, temperature, top_k, top_p, seeded(seed))
    true(codes.shape == logits.shape[:1], f"sample_code: has shape {tuple(codes.shape)}, should have one code per row, "
         f"{tuple(logits.shape[:1])}")
    true(not codes.is_floating_point() and codes.dtype != torch.bool, f"sample_code: codes have dtype {codes.dtype}")
    true(int(codes.min()) >= 0 and int(codes.max()) < rows.shape[1], "sample_code: there are codes that do not exist")
    return codes.view(-1, len(rows)).T


def right_shares(s, rows, *settings):
    """Draw, and compare with the probabilities by loops."""
    codes = draw(s, rows, *settings)
    for kind, (row, mine) in enumerate(zip(rows, codes)):
        expected = shares(row, *settings)
        if fits(mine, expected):
            continue
        what = "sample_code, temperature {}, top_k {}, top_p {}".format(*settings) + f", row {kind} of {len(rows)}"
        for name in MISTAKES:
            other = shares(row, *settings, name) if not (settings[1] == 1 and "few" in name) else expected
            if "sorted order" in name and int((other > 0).sum()) == 1:
                continue  # draws of code 0 only have many reasons
            if not torch.allclose(other, expected, atol=0.02) and fits(mine, other):
                raise AssertionError(f"{what}: looks as if {name}")
        for other in range(len(rows)):
            if other != kind and fits(mine, shares(rows[other], *settings)):
                raise AssertionError(f"{what}: the draws are those of row {other}")
        found = mine.bincount(minlength=len(row))
        true(found.max() < len(mine), f"{what}: all {len(mine)} draws are the same code")
        true(found[expected == 0].sum() == 0, f"{what}: draws codes that are not among the likeliest ones that stay")
        true(found[expected > 0.01].min() > 0, f"{what}: never draws some code that should stay")
        raise AssertionError(f"{what}: the codes that stay are right, but not how often each is drawn")


def temperature_alone(s):
    """Codes are drawn with the softmax of the logits over the temperature"""
    for temperature in (1.0, 0.5, 2.5):
        right_shares(s, ROWS, temperature, 0, 1.0)


def top_k_alone(s):
    """top_k keeps the likeliest codes of each row, wherever they are; 0, or more than there are, keeps all"""
    for top_k in (1, 2, 3, 6, 7, 8, 99, 0):
        right_shares(s, ROWS, 1.0, top_k, 1.0)
    right_shares(s, ROWS, 2.0, 3, 1.0)
    right_shares(s, ROWS[:1], 0.7, 4, 1.0)


def top_p_alone(s):
    """top_p keeps the fewest likeliest codes of each row that reach it, wherever they are"""
    for top_p in (0.001, 0.3, 0.45, 0.62, 0.8, 0.96):  # none within 0.005 of a sum of the rows
        right_shares(s, ROWS, 1.0, 0, top_p)
    right_shares(s, ROWS[:1], 1.0, 0, 0.8)


def all_three_together(s):
    """First the temperature, then top_k, then top_p on what is left, renormalised"""
    for settings in ((0.6, 0, 0.75), (2.0, 0, 0.75), (1.0, 3, 0.68), (2.0, 4, 0.66), (0.7, 99, 0.62), (1.5, 5, 0.88)):
        right_shares(s, ROWS, *settings)


def sharp_and_flat_rows(s):
    """Rows of a batch have nuclei of their own sizes, and only differences of logits matter"""
    rows = torch.tensor([[0.0, 9.0, 1.0, 0.5, -1.0], [0.0, 0.3, 0.1, -0.1, 0.2], [1.0, 0.0, 2.5, -9.0, 2.4]])
    for shift in (0.0, 120.0, -120.0):
        right_shares(s, rows + shift, 1.0, 0, 0.85)
        right_shares(s, rows + shift, 0.8, 4, 0.85)


def temperature_zero(s):
    """Temperature 0 takes the likeliest code, as does top_k 1, and the logits stay as they are"""
    logits = torch.randn(50, 9, generator=seeded(5)) * torch.linspace(0.1, 30, 50)[:, None]
    for settings in ((0, 0, 1.0), (0.0, 3, 0.5), (0, 99, 0.9), (1.0, 1, 1.0), (2.0, 1, 0.4), (1.0, 0, 1e-6)):
        given = logits.clone()
        codes = s.d2c.sample_code(given, *settings, seeded(1))
        same(codes, logits.argmax(-1), "sample_code, temperature {}, top_k {}, top_p {}".format(*settings), ("row",),
             wrong={"takes the unlikeliest code": logits.argmin(-1)})
        true(torch.equal(given, logits), "sample_code has changed its argument logits")
    given = logits.clone()
    s.d2c.sample_code(given, 0.7, 4, 0.8, seeded(1))
    true(torch.equal(given, logits), "sample_code has changed its argument logits")


def generator_decides(s):
    """The generator alone decides the draws, and rows are drawn independently"""
    logits = ROWS[:1].expand(4000, 7) * 0.5

    def codes(generator, world):
        torch.manual_seed(world)
        return s.d2c.sample_code(logits, 1.0, 5, 0.9, generator)

    one = seeded(7)
    first, second = codes(one, 1), codes(one, 1)
    true(torch.equal(codes(seeded(7), 2), first), "sample_code: the same generator, and other draws: is it used?")
    true(not torch.equal(second, first), "sample_code: a generator that has gone on gives the same codes")
    true(not torch.equal(codes(seeded(8), 1), first), "sample_code: another generator, and the same draws")
    true(not torch.equal(codes(None, 1), codes(None, 2)), "sample_code: without a generator, draws never change")
    expected = shares(logits[0], 1.0, 5, 0.9)
    for apart in (1, 2, 2000):
        pairs = (7 * first + first.roll(apart)).bincount(minlength=49).view(7, 7).double() / 4000
        both = expected[:, None] * expected
        true(((pairs - both).abs() <= 6 * (both / 4000).sqrt() + 3 / 4000).all(),
             f"sample_code: rows {apart} apart are not independent")


# The loop ------------------------------------------------------------------------------------------------------------

def small_model(s, grid, depth=2, heads=3, codes=11, seed=4):
    """A small stage 1 with every weight drawn at random."""
    config = s.d2c.DiscreteConfig(codebook_size=codes, num_classes=5, grid=grid, width=8 * heads, depth=depth,
                                  num_heads=heads)
    return s.adapters.draw_parameters(s.d2c.DiscreteGenerator(config), seed)


@torch.no_grad()
def greedy(model, labels, steer=lambda i, cond, uncond: cond):
    """The likeliest codes one by one, each from the logits of the whole row. steer makes logits from both kinds."""
    codes, nobody = torch.zeros(len(labels), math.prod(model.config.grid)).long(), torch.full_like(labels, -1)
    for i in range(codes.shape[1]):
        cond, uncond = (model.logits(codes, each)[:, i].double() for each in (labels, nobody))
        codes[:, i] = steer(i, cond, uncond).argmax(-1)
    return codes


def steered(scale, until=math.inf, after=lambda cond, uncond: cond):
    """Guidance for the codes before `until`."""
    return lambda i, cond, uncond: uncond + scale * (cond - uncond) if i < until else after(cond, uncond)


def likely_greedy(model, labels, scale, until):
    """{what a mistake looks like: its codes}."""
    wrong = {
        "looks as if there were no guidance": lambda i, cond, uncond: cond,
        "looks as if the class were ignored": lambda i, cond, uncond: uncond,
        "looks like cond + scale * (cond - uncond)": lambda i, c, u: c + scale * (c - u) if i < until else c,
        "looks like cond + scale * (uncond - cond): the halves are exchanged":
            lambda i, cond, uncond: cond + scale * (uncond - cond) if i < until else cond,
        "looks like scale * cond - uncond": lambda i, c, u: scale * c - u if i < until else c,
        "the guidance ends one code too early": steered(scale, until - 1),
        "the guidance ends two codes too early": steered(scale, until - 2),
        "the guidance ends one code too late": steered(scale, until + 1),
        "the guidance never ends": steered(scale),
        "after the interval the class is ignored": steered(scale, until, lambda cond, uncond: uncond),
        "after the interval the halves are exchanged": steered(scale, until, lambda cond, uncond: cond + scale * (
            uncond - cond)),
        "is guided after the interval only": lambda i, c, u: u + scale * (c - u) if i >= until else c}
    return {name: lambda steer=steer: greedy(model, labels, steer) for name, steer in wrong.items()} | {
        "all pictures have the first one's class": lambda: greedy(model, labels[:1].expand_as(labels),
                                                                  steered(scale, until)),
        "the pictures are in another order": lambda: greedy(model, labels.flip(0), steered(scale, until))}


def greedy_of_the_original(s):
    """The likeliest codes are LlamaGen's, with guidance 1, 2, and 2 in an interval"""
    arrays, state = golden("gpt_tiny"), s.formula.formula_state(shapes("llamagen_gpt_tiny"))
    for name, scale, interval in (("greedy_cfg1", 1.0, -1), ("greedy_cfg2", 2.0, -1), ("greedy_cfg2_interval", 2.0, 4)):
        model = s.d2c.DiscreteGenerator.from_published(state, 4, (4, 4)).eval()
        until = interval + 2 if interval >= 0 else math.inf
        same(model.generate(arrays["cond"], scale, temperature=0, cfg_interval=interval), arrays[name],
             f"generate, cfg_scale {scale}, cfg_interval {interval}", ("picture", "place"),
             wrong=likely_greedy(model, arrays["cond"], scale, until))


def guidance(s):
    """Guidance is uncond + scale * (cond - uncond) below 1 and above, for rows with a class and without"""
    for grid, depth, labels in (((3, 3), 2, [4, -1, 0]), ((1, 5), 3, [2, 1]), ((3, 2), 1, [3])):
        model, labels = small_model(s, grid, depth), torch.tensor(labels)
        given = labels.clone()
        for scale in (1.0, 0.0, 0.5, 3.0):
            same(model.generate(labels, scale, temperature=0), greedy(model, labels, steered(scale)),
                 f"generate, cfg_scale {scale}, grid {grid}", ("picture", "place"),
                 wrong=likely_greedy(model, labels, scale, math.inf))
        true(torch.equal(labels, given), "generate has changed its argument labels")
        if len(labels) == 3:
            same(model.generate(labels, 4.0, temperature=0)[1], model.generate(labels[1:2], 1.0, temperature=0)[0],
                 "generate, label -1 with guidance 4 and 1", ("place",))


def interval(s):
    """With cfg_interval k the first k + 2 codes are guided, and all others as with guidance 1"""
    model, labels = small_model(s, (2, 4), depth=1, seed=12), torch.tensor([4, 0, 2, 1])
    for scale in (4.0, 0.0):
        for k in (0, 1, 4, 5, 6, 30, -1) if scale else (0, 3):
            until = k + 2 if k >= 0 else math.inf
            same(model.generate(labels, scale, temperature=0, cfg_interval=k),
                 greedy(model, labels, steered(scale, until)), f"generate, cfg_scale {scale}, cfg_interval {k}",
                 ("picture", "place"), wrong=likely_greedy(model, labels, scale, until))
    same(model.generate(labels, 1.0, temperature=0, cfg_interval=2), greedy(model, labels),
         "generate, cfg_scale 1, cfg_interval 2", ("picture", "place"))


def streamed(s):
    """stream gives the codes so far after each code, -1 where nothing is written, through the cache"""
    model, labels = small_model(s, (2, 3)), torch.tensor([1, -1, 4, 2])
    for scale in (1.0, 2.5):
        expected, tokens = greedy(model, labels, steered(scale)), []
        hook = model.norm.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0][..., 0].numel()))
        values = []
        for value in model.stream(labels, scale, temperature=0):
            values.append((value.clone(), sum(tokens)))
        hook.remove()
        true(len(values) == 6, f"stream yields {len(values)} times for 6 codes")
        for i, (value, _) in enumerate(values):
            so_far = expected.clone()
            so_far[:, i + 1:] = -1
            same(value, so_far, f"stream, cfg_scale {scale}, after code {i}", ("picture", "place"), wrong={
                "is the finished picture: nothing else was yielded before the end": expected,
                "the codes not yet drawn are not -1": so_far.where(so_far >= 0, 0),
                "is one code late": so_far.index_fill(1, torch.tensor([i]), -1)})
        true(values[0][1] < values[-1][1], "stream draws all codes before it yields the first: yield after each one")
        true(values[-1][1] <= 60, "the network sees more tokens than there are: with the cache, each comes once")
    same(model.generate(labels, 2.5, temperature=0), expected, "generate, called again", ("picture", "place"))


def two_streams(s):
    """Two streams at a time do not disturb each other, and seeds decide what is drawn"""
    model, labels = small_model(s, (3, 2)), torch.tensor([0, 3])
    pairs = [(one.clone(), other.clone()) for one, other in zip(
        model.stream(labels, 2.0, temperature=0), model.stream(labels.flip(0), 0.5, temperature=0))]
    for found, expected, name in zip(pairs[-1], (greedy(model, labels, steered(2.0)), greedy(
            model, labels.flip(0), steered(0.5))), ("first", "second")):
        same(found, expected, f"the {name} of two streams in turn", ("picture", "place"))

    def drawn(generator, world):
        torch.manual_seed(world)
        return model.generate(labels.repeat(20), 2.0, 1.0, 5, 0.9, generator)

    one = seeded(3)
    first, second = drawn(one, 1), drawn(one, 1)
    true(torch.equal(first, drawn(seeded(3), 2)), "generate: the same generator, and other codes: is it handed on?")
    true(not torch.equal(first, second), "generate: a generator that has gone on gives the same codes")
    true(not torch.equal(first, drawn(seeded(4), 1)), "generate: another generator, and the same codes")


@torch.no_grad()
def drawn_rows(s):
    """Whole rows are drawn with the right probabilities: temperature, top_k, top_p and guidance act at every code"""
    model, number = small_model(s, (1, 2), depth=1, heads=2, codes=4, seed=6), 2000
    beginnings = torch.arange(4)[:, None].repeat(1, 2)                             # the second code does not matter
    for scale, temperature, top_k, top_p, k in ((1.0, 1.0, 0, 1.0, -1), (2.0, 0.7, 0, 1.0, -1), (0.5, 1.5, 3, 1.0, -1),
                                                (1.5, 1.3, 0, 0.75, 0), (1.0, 2.0, 3, 0.8, -1)):
        for label in (1, -1) if scale == 1.5 else (1,):
            cond, uncond = (model.logits(beginnings, torch.full((4,), each)) for each in (label, -1))
            logits = uncond + scale * (cond - uncond)                              # (first code, place, code)

            def joint(mistake):  # the probabilities of all 16 rows
                first = shares(logits[0, 0], temperature, top_k, top_p, mistake)
                return torch.cat([p * shares(row, temperature, top_k, top_p, mistake)
                                  for p, row in zip(first, logits[:, 1])])

            found = model.generate(torch.full((number,), label), scale, temperature, top_k, top_p, seeded(1), k)
            if fits(4 * found[:, 0] + found[:, 1], joint("")):
                continue
            what = (f"generate, label {label}, cfg_scale {scale}, temperature {temperature}, top_k {top_k}, "
                    f"top_p {top_p}")
            for mistake in ("the temperature is ignored", "top_k is ignored", "top_p is ignored"):
                true(not fits(4 * found[:, 0] + found[:, 1], joint(mistake)), f"{what}: looks as if {mistake}")
            true((found != found[0]).any(), f"{what}: all {number} pictures are the same")
            right = fits(found[:, 0], shares(logits[0, 0], temperature, top_k, top_p))
            raise AssertionError(f"{what}: the {'second' if right else 'first'} code is drawn wrongly")


CHECKS = [(2, temperature_alone), (2, top_k_alone), (2, top_p_alone), (2, all_three_together), (1, sharp_and_flat_rows),
          (1, temperature_zero), (1, generator_decides), (2, greedy_of_the_original), (2, guidance), (2, interval),
          (2, streamed), (1, two_streams), (2, drawn_rows)]
