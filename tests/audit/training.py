# file: train.py
# function: learning_rate
# exercise: training
# kind: right
# why: a factor times the peak
def learning_rate(step, steps, peak, warmup, decay):
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    elif decay == "cosine" and steps > warmup:
        factor = math.cos(0.5 * math.pi * (step - warmup) / (steps - warmup)) ** 2
    return factor * peak


# file: train.py
# function: learning_rate
# exercise: training
# kind: right
# why: interpolation for the warm-up, an angle for the rest
def learning_rate(step, steps, peak, warmup, decay):
    if step < warmup:
        return float(np.interp(step + 1, [0, warmup], [0.0, peak]))
    if decay == "constant":
        return peak
    angle = np.interp(step, [warmup, max(steps, warmup + 1)], [0.0, np.pi])
    return float(peak / 2 + peak / 2 * np.cos(angle))


# file: train.py
# function: learning_rate
# exercise: training
# kind: right
# why: the real part of a turning number; both parts always made
def learning_rate(step, steps, peak, warmup, decay):
    rise = (step + 1) / max(warmup, 1)
    turned = complex(math.cos(math.pi / max(steps - warmup, 1)), math.sin(math.pi / max(steps - warmup, 1)))
    fall = {"constant": 1.0, "cosine": (1 + (turned ** max(step - warmup, 0)).real) / 2}[decay]
    return peak * (rise if step < warmup else fall)


# file: train.py
# function: learning_rate
# exercise: training
# kind: mutant
# why: step s has s / warmup: the first one learns nothing
def learning_rate(step, steps, peak, warmup, decay):
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak if decay == "constant" else peak * 0.5 * (1 + math.cos(math.pi * share))


# file: train.py
# function: learning_rate
# exercise: training
# kind: mutant
# why: a quarter of a cosine
def learning_rate(step, steps, peak, warmup, decay):
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak if decay == "constant" else peak * math.cos(0.5 * math.pi * share)


# file: train.py
# function: learning_rate
# exercise: training
# kind: mutant
# why: divides by zero without a warm-up
def learning_rate(step, steps, peak, warmup, decay):
    rise = min(1.0, (step + 1) / warmup)
    share = max(0, step - warmup) / max(1, steps - warmup)
    return peak * rise * (1.0 if decay == "constant" else 0.5 * (1 + math.cos(math.pi * share)))


# file: train.py
# function: learning_rate
# exercise: training
# kind: mutant
# why: the warm-up has one step too many, with more than the peak
def learning_rate(step, steps, peak, warmup, decay):
    if step <= warmup and warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak if decay == "constant" else peak * 0.5 * (1 + math.cos(math.pi * share))


# file: train.py
# function: learning_rate
# exercise: training
# kind: mutant
# why: forgets the peak after the warm-up
def learning_rate(step, steps, peak, warmup, decay):
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak if decay == "constant" else 0.5 * (1 + math.cos(math.pi * share))


# file: train.py
# function: ema_decay
# exercise: training
# kind: right
# why: the complement
def ema_decay(step, longest):
    return 1 - max(1 - longest, 9 / (step + 10))


# file: train.py
# function: ema_decay
# exercise: training
# kind: right
# why: a condition
def ema_decay(step, longest):
    young = (step + 1) / (step + 10)
    return young if young < longest else longest


# file: train.py
# function: ema_decay
# exercise: training
# kind: right
# why: sorted
def ema_decay(step, longest):
    return sorted([longest, 1.0 / (1.0 + 9.0 / (step + 1))])[0]


# file: train.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: the larger of the two
def ema_decay(step, longest):
    return max(longest, (1 + step) / (10 + step))


# file: train.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: the longest from the start
def ema_decay(step, longest):
    return longest


# file: train.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: grows without bound
def ema_decay(step, longest):
    return (1 + step) / (10 + step)


# file: train.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: the share of the new weights instead of that of the old ones
def ema_decay(step, longest):
    return max(1 - longest, 9 / (10 + step))


# file: train.py
# function: ema_decay
# exercise: training
# kind: mutant
# why: the longest times the warm-up, which never gets there
def ema_decay(step, longest):
    return longest * (1 + step) / (10 + step)


# file: train.py
# function: read_codes
# exercise: training
# kind: right
# why: two draws of one number each; the coins the other way round
def read_codes(cache, index, generator, chance):
    dropped = torch.rand(1, generator=generator).item() > 0.9
    mirrored = int(torch.randint(2, (1,), generator=generator))
    codes = torch.tensor(cache.codes[mirrored][index].tolist())
    return codes, -1 if dropped else int(cache.labels[index])


# file: train.py
# function: read_codes
# exercise: training
# kind: right
# why: one number below twenty decides both
def read_codes(cache, index, generator, chance):
    side, which = divmod(int(torch.randint(20, (), generator=generator)), 10)
    both = torch.as_tensor(np.asarray(cache.codes[:, index]).astype("int64"))
    return both[side].clone(), int(cache.labels[index]) if which else -1


# file: train.py
# function: read_codes
# exercise: training
# kind: right
# why: bernoulli
def read_codes(cache, index, generator, chance):
    flip, drop = torch.bernoulli(torch.tensor([0.5, 0.1]), generator=generator).bool()
    original, mirrored = (torch.from_numpy(side[index].astype(np.int64)) for side in cache.codes)
    codes = mirrored if flip else original
    label = cache.labels[index].item()
    if drop:
        label = -1
    return codes, label


# file: train.py
# function: read_codes
# exercise: training
# kind: mutant
# why: never mirrored
def read_codes(cache, index, generator, chance):
    drop = torch.rand((), generator=generator)
    codes = torch.from_numpy(cache.codes[0, index].astype(np.int64))
    return codes, -1 if drop < 0.1 else int(cache.labels[index])


# file: train.py
# function: read_codes
# exercise: training
# kind: mutant
# why: one random number for both: what loses its class is always mirrored
def read_codes(cache, index, generator, chance):
    flip = float(torch.rand((), generator=generator))
    codes = torch.from_numpy(cache.codes[int(flip < 0.5), index].astype(np.int64))
    return codes, -1 if flip < 0.1 else int(cache.labels[index])


# file: train.py
# function: read_codes
# exercise: training
# kind: mutant
# why: the batch's number decides about the class
def read_codes(cache, index, generator, chance):
    flip = float(torch.rand((), generator=generator))
    codes = torch.from_numpy(cache.codes[int(flip < 0.5), index].astype(np.int64))
    return codes, -1 if chance < 0.1 else int(cache.labels[index])


# file: train.py
# function: read_codes
# exercise: training
# kind: mutant
# why: random numbers of torch, not of the generator
def read_codes(cache, index, generator, chance):
    flip, drop = torch.rand(2).tolist()
    codes = torch.from_numpy(cache.codes[int(flip < 0.5), index].astype(np.int64))
    return codes, -1 if drop < 0.1 else int(cache.labels[index])


# file: train.py
# function: read_codes
# exercise: training
# kind: mutant
# why: class 0 for a dropped class
def read_codes(cache, index, generator, chance):
    flip, drop = torch.rand(2, generator=generator).tolist()
    codes = torch.from_numpy(cache.codes[int(flip < 0.5), index].astype(np.int64))
    return codes, 0 if drop < 0.1 else int(cache.labels[index])


# file: train.py
# function: read_latents
# exercise: training
# kind: right
# why: the order first; the four cases by a table
def read_latents(cache, config, index, generator, chance):
    number, double = cache.moments.shape[2:]
    order = torch.randperm(number, generator=generator)
    hidden, visible = order.tensor_split([count_hidden(number, config, chance)])
    case = int(torch.multinomial(torch.tensor([0.1, 0.05, 0.05, 0.8]), 1, generator=generator))
    side = int(torch.randint(2, (), generator=generator))
    keep_label = case == 3 or case == 1 or (case == 2 and config.fusion == "none")
    codes = torch.as_tensor(cache.codes[side, index].astype("int64"))
    if case < 2:
        codes = torch.full_like(codes, -1)
    moments = torch.as_tensor(cache.moments[side, index].astype("float32"))
    mean, log_variance = moments[:, :double // 2], moments[:, double // 2:].clamp(-30, 20)
    latents = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
    shape = len(hidden), config.noise_levels
    noise = torch.randn(*shape, double // 2, generator=generator)
    t = torch.randint(0, 1000, shape, generator=generator)
    label = int(cache.labels[index]) if keep_label else -1
    return latents * cache.meta["scale"], visible, hidden, label, codes, t, noise


# file: train.py
# function: read_latents
# exercise: training
# kind: right
# why: places sorted; nested coins for what is dropped
def read_latents(cache, config, index, generator, chance):
    def coin(probability):
        return bool(torch.rand((), generator=generator) < probability)

    number, channels = cache.codes.shape[2], cache.moments.shape[3] // 2
    side, label = (1, 0)[coin(0.5)], int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[side][index].astype(np.int64))
    both = coin(0.1)
    codes_alone = not both and coin(0.05 / 0.9)
    class_alone = not both and not codes_alone and coin(0.05 / 0.85) and config.fusion != "none"
    if both or class_alone:
        label = -1
    if both or codes_alone:
        codes.fill_(-1)
    mask = torch.zeros(number, dtype=torch.bool)
    mask[torch.rand(number, generator=generator).argsort()[:count_hidden(number, config, chance)]] = True
    hidden, visible = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
    moments = torch.from_numpy(np.array(cache.moments[side, index], dtype=np.float32))
    latents = KLTokenizer.sample(moments, torch.randn(number, channels, generator=generator), 1)
    t = torch.randint(1000, (len(hidden), config.noise_levels), generator=generator)
    noise = torch.randn(*t.shape, channels, generator=generator)
    return cache.meta["scale"] * latents, visible, hidden, label, codes, t, noise


# file: train.py
# function: read_latents
# exercise: training
# kind: right
# why: numpy's generator, seeded by the one given
def read_latents(cache, config, index, generator, chance):
    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    side = int(draw.integers(2))
    moments, codes = cache.moments[side, index].astype(np.float64), cache.codes[side, index].astype(np.int64)
    mean, log_variance = np.split(moments, 2, axis=1)
    latents = mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * draw.standard_normal(mean.shape)
    chances = np.array([0.1, 0.05, 0.05 if config.fusion != "none" else 0.0])
    case = int((chances.cumsum() <= draw.random()).sum())
    label = -1 if case in (0, 2) else int(cache.labels[index])
    codes = np.full_like(codes, -1) if case in (0, 1) else codes
    order = draw.permutation(len(mean))
    count = count_hidden(len(mean), config, chance)
    t = draw.integers(1000, size=(count, config.noise_levels))
    noise = draw.standard_normal((count, config.noise_levels, mean.shape[1]))
    return (torch.from_numpy(latents).float() * cache.meta["scale"], torch.from_numpy(order[count:]),
            torch.from_numpy(order[:count]), label, torch.from_numpy(codes), torch.from_numpy(t),
            torch.from_numpy(noise).float())


# file: train.py
# function: read_latents
# exercise: training
# kind: mutant
# why: the latents are not scaled
def read_latents(cache, config, index, generator, chance):
    number, channels = cache.moments.shape[2], cache.moments.shape[3] // 2
    flip, drop = torch.rand(2, generator=generator).tolist()
    mirrored = int(flip < 0.5)
    moments = torch.from_numpy(cache.moments[mirrored, index].astype(np.float32))
    eps = torch.randn(number, channels, generator=generator)
    latents = KLTokenizer.sample(moments, eps, dim=1)
    no_class = drop < 0.1 or (0.15 <= drop < 0.2 and config.fusion != "none")
    label = -1 if no_class else int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[mirrored, index].astype(np.int64))
    codes = codes.fill_(-1) if drop < 0.15 else codes
    count, order = count_hidden(number, config, chance), torch.randperm(number, generator=generator)
    t = torch.randint(1000, (count, config.noise_levels), generator=generator)
    noise = torch.randn(count, config.noise_levels, channels, generator=generator)
    return latents, order[count:], order[:count], label, codes, t, noise


# file: train.py
# function: read_latents
# exercise: training
# kind: mutant
# why: codes of the original with latents of the mirrored picture
def read_latents(cache, config, index, generator, chance):
    number, channels = cache.moments.shape[2], cache.moments.shape[3] // 2
    flip, drop = torch.rand(2, generator=generator).tolist()
    mirrored = int(flip < 0.5)
    moments = torch.from_numpy(cache.moments[mirrored, index].astype(np.float32))
    eps = torch.randn(number, channels, generator=generator)
    latents = KLTokenizer.sample(moments, eps, dim=1) * cache.meta["scale"]
    no_class = drop < 0.1 or (0.15 <= drop < 0.2 and config.fusion != "none")
    label = -1 if no_class else int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[0, index].astype(np.int64))
    codes = codes.fill_(-1) if drop < 0.15 else codes
    count, order = count_hidden(number, config, chance), torch.randperm(number, generator=generator)
    t = torch.randint(1000, (count, config.noise_levels), generator=generator)
    noise = torch.randn(count, config.noise_levels, channels, generator=generator)
    return latents, order[count:], order[:count], label, codes, t, noise


# file: train.py
# function: read_latents
# exercise: training
# kind: mutant
# why: the class alone is dropped without fusion, too
def read_latents(cache, config, index, generator, chance):
    number, channels = cache.moments.shape[2], cache.moments.shape[3] // 2
    flip, drop = torch.rand(2, generator=generator).tolist()
    mirrored = int(flip < 0.5)
    moments = torch.from_numpy(cache.moments[mirrored, index].astype(np.float32))
    eps = torch.randn(number, channels, generator=generator)
    latents = KLTokenizer.sample(moments, eps, dim=1) * cache.meta["scale"]
    no_class = drop < 0.1 or 0.15 <= drop < 0.2
    label = -1 if no_class else int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[mirrored, index].astype(np.int64))
    codes = codes.fill_(-1) if drop < 0.15 else codes
    count, order = count_hidden(number, config, chance), torch.randperm(number, generator=generator)
    t = torch.randint(1000, (count, config.noise_levels), generator=generator)
    noise = torch.randn(count, config.noise_levels, channels, generator=generator)
    return latents, order[count:], order[:count], label, codes, t, noise


# file: train.py
# function: read_latents
# exercise: training
# kind: mutant
# why: the same places are hidden in every picture
def read_latents(cache, config, index, generator, chance):
    number, channels = cache.moments.shape[2], cache.moments.shape[3] // 2
    flip, drop = torch.rand(2, generator=generator).tolist()
    mirrored = int(flip < 0.5)
    moments = torch.from_numpy(cache.moments[mirrored, index].astype(np.float32))
    eps = torch.randn(number, channels, generator=generator)
    latents = KLTokenizer.sample(moments, eps, dim=1) * cache.meta["scale"]
    no_class = drop < 0.1 or (0.15 <= drop < 0.2 and config.fusion != "none")
    label = -1 if no_class else int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[mirrored, index].astype(np.int64))
    codes = codes.fill_(-1) if drop < 0.15 else codes
    count, order = count_hidden(number, config, chance), torch.arange(number)
    t = torch.randint(1000, (count, config.noise_levels), generator=generator)
    noise = torch.randn(count, config.noise_levels, channels, generator=generator)
    return latents, order[count:], order[:count], label, codes, t, noise


# file: train.py
# function: read_latents
# exercise: training
# kind: mutant
# why: only one noise level, whatever the config says
def read_latents(cache, config, index, generator, chance):
    number, channels = cache.moments.shape[2], cache.moments.shape[3] // 2
    flip, drop = torch.rand(2, generator=generator).tolist()
    mirrored = int(flip < 0.5)
    moments = torch.from_numpy(cache.moments[mirrored, index].astype(np.float32))
    eps = torch.randn(number, channels, generator=generator)
    latents = KLTokenizer.sample(moments, eps, dim=1) * cache.meta["scale"]
    no_class = drop < 0.1 or (0.15 <= drop < 0.2 and config.fusion != "none")
    label = -1 if no_class else int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[mirrored, index].astype(np.int64))
    codes = codes.fill_(-1) if drop < 0.15 else codes
    count, order = count_hidden(number, config, chance), torch.randperm(number, generator=generator)
    t = torch.randint(1000, (count, 1), generator=generator)
    noise = torch.randn(count, 1, channels, generator=generator)
    return latents, order[count:], order[:count], label, codes, t, noise
