# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: right
# why: step by step
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps < 1 or num_steps > num_tokens:
        raise ValueError(f"{num_steps} token steps for {num_tokens} tokens")
    result, before = [], num_tokens
    for s in range(1, num_steps + 1):
        hidden = math.floor(num_tokens * math.cos(math.pi / 2 * s / num_steps))
        hidden = max(1, min(before - 1, hidden))
        share = (num_tokens - hidden) / num_tokens
        drawn = before if s == num_steps else before - hidden
        result.append((drawn, 1 + (cfg_scale - 1) * share))
        before = hidden
    return result


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: right
# why: first all the counts, then the guidance
def token_schedule(num_tokens, num_steps, cfg_scale):
    if not 0 < num_steps <= num_tokens:
        raise ValueError("more token steps than tokens, or none")
    hidden = [num_tokens]
    for s in range(1, num_steps):
        wanted = int(num_tokens * math.cos(0.5 * math.pi * s / num_steps))
        hidden.append(max(1, min(wanted, hidden[-1] - 1)))
    drawn = [a - b for a, b in zip(hidden, hidden[1:] + [0])]
    after = hidden[1:] + [1]
    return [(number, cfg_scale * (1 - left / num_tokens) + left / num_tokens) for number, left in zip(drawn, after)]


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: right
# why: numpy for the curve, a scan for the bounds
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps > num_tokens or num_steps < 1:
        raise ValueError(f"num_steps {num_steps}")
    curve = np.floor(num_tokens * np.cos(np.pi / 2 * np.arange(1, num_steps + 1) / num_steps)).astype(int).tolist()
    left, result = num_tokens, []
    while curve:
        after = min(left - 1, curve.pop(0))
        after = after if after > 1 else 1
        guidance = cfg_scale + (1 - cfg_scale) * after / num_tokens
        result.append((left - after if curve else left, guidance))
        left = after
    return result


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: mutant
# why: rounded instead of cut down
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps < 1 or num_steps > num_tokens:
        raise ValueError(f"{num_steps} token steps for {num_tokens} tokens")
    result, before = [], num_tokens
    for s in range(1, num_steps + 1):
        hidden = round(num_tokens * math.cos(math.pi / 2 * s / num_steps))
        hidden = max(1, min(before - 1, hidden))
        share = (num_tokens - hidden) / num_tokens
        drawn = before if s == num_steps else before - hidden
        result.append((drawn, 1 + (cfg_scale - 1) * share))
        before = hidden
    return result


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: mutant
# why: no token counts as hidden in the last step
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps < 1 or num_steps > num_tokens:
        raise ValueError(f"{num_steps} token steps for {num_tokens} tokens")
    result, before = [], num_tokens
    for s in range(1, num_steps + 1):
        hidden = math.floor(num_tokens * math.cos(math.pi / 2 * s / num_steps))
        hidden = max(0 if s == num_steps else 1, min(before - 1, hidden))
        share = (num_tokens - hidden) / num_tokens
        drawn = before if s == num_steps else before - hidden
        result.append((drawn, 1 + (cfg_scale - 1) * share))
        before = hidden
    return result


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: mutant
# why: guidance counts what is drawn before the step
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps < 1 or num_steps > num_tokens:
        raise ValueError(f"{num_steps} token steps for {num_tokens} tokens")
    result, before = [], num_tokens
    for s in range(1, num_steps + 1):
        hidden = math.floor(num_tokens * math.cos(math.pi / 2 * s / num_steps))
        hidden = max(1, min(before - 1, hidden))
        share = (num_tokens - before) / num_tokens
        drawn = before if s == num_steps else before - hidden
        result.append((drawn, 1 + (cfg_scale - 1) * share))
        before = hidden
    return result


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: mutant
# why: the last step leaves one token
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps < 1 or num_steps > num_tokens:
        raise ValueError(f"{num_steps} token steps for {num_tokens} tokens")
    result, before = [], num_tokens
    for s in range(1, num_steps + 1):
        hidden = math.floor(num_tokens * math.cos(math.pi / 2 * s / num_steps))
        hidden = max(1, min(before - 1, hidden))
        share = (num_tokens - hidden) / num_tokens
        drawn = before - hidden
        result.append((drawn, 1 + (cfg_scale - 1) * share))
        before = hidden
    return result


# file: d2c.py
# function: token_schedule
# exercise: generation
# kind: mutant
# why: more steps than tokens are cut down instead of refused
def token_schedule(num_tokens, num_steps, cfg_scale):
    if num_steps < 1 or num_steps > num_tokens:
        num_steps = min(max(num_steps, 1), num_tokens)
    result, before = [], num_tokens
    for s in range(1, num_steps + 1):
        hidden = math.floor(num_tokens * math.cos(math.pi / 2 * s / num_steps))
        hidden = max(1, min(before - 1, hidden))
        share = (num_tokens - hidden) / num_tokens
        drawn = before if s == num_steps else before - hidden
        result.append((drawn, 1 + (cfg_scale - 1) * share))
        before = hidden
    return result


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: right
# why: latents of one half, repeated where they are read
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    channels = self.config.channels
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    halves = 1
    if cfg_scale != 1:
        halves = 2
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        if codes is not None:
            codes = torch.cat([codes, torch.full_like(codes, -1)])
    context = self.prepare(codes)
    latents = torch.zeros(batch, number, channels, device=labels.device)
    left = number
    for k, (count, guidance) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        visible = orders[:, left:]
        places = orders[:, left - count:left].sort(dim=1).values
        left = left - count
        z = self.condition(latents.repeat(halves, 1, 1), visible.repeat(halves, 1), labels, context)
        z = pick(z, places.repeat(halves, 1)).flatten(0, 1)
        steps = round(first + (last - first) * k / max(1, num_steps - 1))
        noise = [draw(batch * count, channels) for _ in range(steps + 1)]
        new = self.sample_latents(z, noise, temperature, guidance, steps, clip)
        new = new.unflatten(0, (batch, count))
        latents.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: right
# why: a new tensor each time, and the condition in two calls under guidance
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    (rows, places), guided = orders.shape, cfg_scale != 1
    first, last = diffusion_steps if isinstance(diffusion_steps, (tuple, list)) else (diffusion_steps,) * 2
    branches = [(labels, self.prepare(codes))]
    if guided:
        nothing = None if codes is None else torch.full_like(codes, -1)
        branches.append((torch.full_like(labels, -1), self.prepare(nothing)))
    latents = torch.zeros(rows, places, self.config.channels, device=labels.device)
    done = 0
    for k, (count, scale) in enumerate(token_schedule(places, num_steps, cfg_scale)):
        now = orders[:, places - done - count:places - done].sort(1)[0]
        known = orders[:, places - done:]
        z = torch.cat([pick(self.condition(latents, known, label, context), now).reshape(rows * count, -1)
                       for label, context in branches])
        share = k / (num_steps - 1) if num_steps > 1 else 0
        steps = round(first + (last - first) * share)
        noise = (draw(rows * count, self.config.channels) for _ in range(steps + 1))
        drawn = self.sample_latents(z, noise, temperature, scale, steps, clip).view(rows, count, -1)
        latents = latents.scatter(1, now[:, :, None].expand_as(drawn), drawn)
        done += count
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: right
# why: a mask of what is drawn, read and written by index lists of rows and places
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    ends = diffusion_steps if hasattr(diffusion_steps, "__len__") else [diffusion_steps] * 2
    known = torch.zeros(batch, number, dtype=torch.bool, device=labels.device)
    latents = torch.zeros(batch, number, self.config.channels, device=labels.device)
    row = torch.arange(batch, device=labels.device)[:, None]
    if cfg_scale != 1:
        labels = F.pad(labels, (0, batch), value=-1)
        codes = codes if codes is None else F.pad(codes, (0, 0, 0, batch), value=-1)
    context, twice = self.prepare(codes), len(labels) // batch
    queue = orders.flip(1)
    for k, (count, scale) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        now = torch.zeros_like(known)
        now[row, queue[:, :count]] = True
        queue = queue[:, count:]
        visible = known.nonzero()[:, 1].view(batch, -1)
        z = self.condition(torch.cat([latents] * twice), torch.cat([visible] * twice), labels, context)
        z = z[torch.cat([now] * twice)]
        steps = round(ends[0] + (ends[1] - ends[0]) * (k / max(num_steps - 1, 1)))
        noise = [draw(batch * count, self.config.channels) for _ in range(1 + steps)]
        latents[now] = self.sample_latents(z, iter(noise), temperature, scale, steps, clip)
        known |= now
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: mutant
# why: the order is read from its beginning
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    channels = self.config.channels
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    halves = 1
    if cfg_scale != 1:
        halves = 2
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        if codes is not None:
            codes = torch.cat([codes, torch.full_like(codes, -1)])
    context = self.prepare(codes)
    latents = torch.zeros(batch, number, channels, device=labels.device)
    left = number
    for k, (count, guidance) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        visible = orders[:, :number - left]
        places = orders[:, number - left:number - left + count].sort(dim=1).values
        left = left - count
        z = self.condition(latents.repeat(halves, 1, 1), visible.repeat(halves, 1), labels, context)
        z = pick(z, places.repeat(halves, 1)).flatten(0, 1)
        steps = round(first + (last - first) * k / max(1, num_steps - 1))
        noise = [draw(batch * count, channels) for _ in range(steps + 1)]
        new = self.sample_latents(z, noise, temperature, guidance, steps, clip)
        new = new.unflatten(0, (batch, count))
        latents.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: mutant
# why: the half without codes keeps its class
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    channels = self.config.channels
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    halves = 1
    if cfg_scale != 1:
        halves = 2
        labels = torch.cat([labels, labels])
        if codes is not None:
            codes = torch.cat([codes, torch.full_like(codes, -1)])
    context = self.prepare(codes)
    latents = torch.zeros(batch, number, channels, device=labels.device)
    left = number
    for k, (count, guidance) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        visible = orders[:, left:]
        places = orders[:, left - count:left].sort(dim=1).values
        left = left - count
        z = self.condition(latents.repeat(halves, 1, 1), visible.repeat(halves, 1), labels, context)
        z = pick(z, places.repeat(halves, 1)).flatten(0, 1)
        steps = round(first + (last - first) * k / max(1, num_steps - 1))
        noise = [draw(batch * count, channels) for _ in range(steps + 1)]
        new = self.sample_latents(z, noise, temperature, guidance, steps, clip)
        new = new.unflatten(0, (batch, count))
        latents.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: mutant
# why: the first number of diffusion steps in every token step
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    channels = self.config.channels
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    halves = 1
    if cfg_scale != 1:
        halves = 2
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        if codes is not None:
            codes = torch.cat([codes, torch.full_like(codes, -1)])
    context = self.prepare(codes)
    latents = torch.zeros(batch, number, channels, device=labels.device)
    left = number
    for k, (count, guidance) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        visible = orders[:, left:]
        places = orders[:, left - count:left].sort(dim=1).values
        left = left - count
        z = self.condition(latents.repeat(halves, 1, 1), visible.repeat(halves, 1), labels, context)
        z = pick(z, places.repeat(halves, 1)).flatten(0, 1)
        steps = first
        noise = [draw(batch * count, channels) for _ in range(steps + 1)]
        new = self.sample_latents(z, noise, temperature, guidance, steps, clip)
        new = new.unflatten(0, (batch, count))
        latents.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: mutant
# why: noise for both halves is drawn
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    channels = self.config.channels
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    halves = 1
    if cfg_scale != 1:
        halves = 2
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        if codes is not None:
            codes = torch.cat([codes, torch.full_like(codes, -1)])
    context = self.prepare(codes)
    latents = torch.zeros(batch, number, channels, device=labels.device)
    left = number
    for k, (count, guidance) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        visible = orders[:, left:]
        places = orders[:, left - count:left].sort(dim=1).values
        left = left - count
        z = self.condition(latents.repeat(halves, 1, 1), visible.repeat(halves, 1), labels, context)
        z = pick(z, places.repeat(halves, 1)).flatten(0, 1)
        steps = round(first + (last - first) * k / max(1, num_steps - 1))
        noise = [draw(halves * batch * count, channels)[:batch * count] for _ in range(steps + 1)]
        new = self.sample_latents(z, noise, temperature, guidance, steps, clip)
        new = new.unflatten(0, (batch, count))
        latents.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        yield latents


# file: d2c.py
# function: ContinuousGenerator.stream
# exercise: generation
# kind: mutant
# why: the condition is made once, before anything is drawn
def stream(self, labels, codes, orders, draw, num_steps=64, cfg_scale=1.0, temperature=1.0, diffusion_steps=100,
           clip=math.inf):
    batch, number = orders.shape
    channels = self.config.channels
    first, last = (diffusion_steps, diffusion_steps) if isinstance(diffusion_steps, int) else diffusion_steps
    halves = 1
    if cfg_scale != 1:
        halves = 2
        labels = torch.cat([labels, torch.full_like(labels, -1)])
        if codes is not None:
            codes = torch.cat([codes, torch.full_like(codes, -1)])
    context = self.prepare(codes)
    latents = torch.zeros(batch, number, channels, device=labels.device)
    left = number
    once = self.condition(latents.repeat(halves, 1, 1), orders[:, left:].repeat(halves, 1), labels, context)
    for k, (count, guidance) in enumerate(token_schedule(number, num_steps, cfg_scale)):
        places = orders[:, left - count:left].sort(dim=1).values
        left = left - count
        z = pick(once, places.repeat(halves, 1)).flatten(0, 1)
        steps = round(first + (last - first) * k / max(1, num_steps - 1))
        noise = [draw(batch * count, channels) for _ in range(steps + 1)]
        new = self.sample_latents(z, noise, temperature, guidance, steps, clip)
        new = new.unflatten(0, (batch, count))
        latents.scatter_(1, places[..., None].expand(-1, -1, channels), new)
        yield latents
