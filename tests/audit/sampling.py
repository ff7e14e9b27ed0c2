# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: right
# why: multinomial on sorted probabilities; exactly k of them stay
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature == 0:
        return logits.max(-1).indices
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    ordered, index = logits.sort(-1, descending=True)
    if top_k > 0:
        ordered = ordered[:, :top_k]
    probabilities = ordered.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p
        keep[:, 0] = True
        probabilities = probabilities * keep
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return index.gather(1, drawn)[:, 0]


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: right
# why: Gumbel noise; the nucleus found by its smallest probability
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature < 1e-4:
        return torch.argmax(logits, dim=1)
    scores = logits.double() / temperature
    if 0 < top_k < logits.shape[1]:
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(top_k).indices, True)
        scores = torch.where(kept, scores, -math.inf)
    if top_p < 1:
        ordered, index = scores.softmax(1).sort(dim=1, descending=True, stable=True)
        count = (ordered.cumsum(1) < top_p).sum(1, keepdim=True) + 1
        rank = index.argsort(1)
        scores = scores.masked_fill(rank >= count, -math.inf)
    uniform = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    return (scores - (-uniform.clamp(min=1e-300).log()).log()).argmax(1)


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: right
# why: row by row, the inverse of the distribution function
def sample_code(logits, temperature, top_k, top_p, generator):
    codes = []
    for row in logits.double():
        if temperature < 1e-4:
            codes.append(row.argmax())
            continue
        weights = ((row - row.max()) / temperature).exp()
        order = weights.argsort(descending=True)
        if top_k > 0:
            order = order[:top_k]
        weights = weights[order] / weights[order].sum()
        if top_p < 1:
            number, total = 0, 0.0
            while number < len(order) and (number == 0 or total < top_p):
                total += float(weights[number])
                number += 1
            order, weights = order[:number], weights[:number]
        ladder = weights.cumsum(0)
        u = torch.rand((), generator=generator, device=row.device, dtype=row.dtype) * ladder[-1]
        codes.append(order[int((ladder <= u).sum().clamp(max=len(order) - 1))])
    return torch.stack(codes)


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: mutant
# why: the nucleus is taken before the temperature
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature < 1e-4:
        return logits.argmax(-1)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    logits = logits / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: mutant
# why: drops the code that makes the sum reach top_p
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) > top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: mutant
# why: multiplies by the temperature
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits * temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: mutant
# why: does not draw by the generator
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# file: d2c.py
# function: sample_code
# exercise: sampling
# kind: mutant
# why: multiplies by the exponential clocks, so the unlikely ones win too often
def sample_code(logits, temperature, top_k, top_p, generator):
    if temperature < 1e-4:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    probabilities = logits.softmax(-1)
    return (probabilities * torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: right
# why: two caches and two calls
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    number = self.config.grid[0] * self.config.grid[1]
    codes = torch.full((len(labels), number), -1, device=labels.device)
    guided = cfg_scale != 1
    cache, x = self.empty_cache(len(labels)), self.embed_labels(labels)
    if guided:
        cache_without, x_without = self.empty_cache(len(labels)), self.embed_labels(torch.full_like(labels, -1))
    for i in range(number):
        position = torch.tensor([i], device=labels.device)
        logits = self.decode_one(x, position, cache).float()
        if guided:
            without = self.decode_one(x_without, position, cache_without).float()
            if cfg_interval < 0 or i < cfg_interval + 2:
                logits = cfg_scale * logits + (1 - cfg_scale) * without
        codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)
        x = x_without = self.tok_embeddings(codes[:, i:i + 1])
        yield codes


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: right
# why: stops the second half where guidance ends; a new tensor each time
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    number, drawn = math.prod(self.config.grid), []
    guided_codes = 0 if cfg_scale == 1 else number if cfg_interval < 0 else min(number, cfg_interval + 2)
    both = torch.cat([torch.full_like(labels, -1), labels]) if guided_codes else labels
    x, cache = self.embed_labels(both), self.empty_cache(len(both))
    for i in range(number):
        if guided_codes and i == guided_codes:
            x = x[len(labels):]
            cache = [tuple(part[len(labels):] for part in pair) for pair in cache]
        logits = self.decode_one(x, torch.full((1,), i, device=labels.device), cache).float()
        if i < guided_codes:
            uncond, cond = logits.split(len(labels))
            logits = torch.lerp(uncond, cond, float(cfg_scale))
        drawn.append(sample_code(logits, temperature, top_k, top_p, generator))
        x = self.tok_embeddings(drawn[-1]).unsqueeze(1).repeat(len(x) // len(labels), 1, 1)
        rest = torch.full((len(labels), number - len(drawn)), -1, device=labels.device)
        yield torch.cat([torch.stack(drawn, 1), rest], 1)


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: right
# why: pairs of neighbours instead of two halves
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    height, width = self.config.grid
    copies = 1 if cfg_scale == 1 else 2
    pairs = labels.repeat_interleave(copies)
    if copies == 2:
        pairs[1::2] = self.config.num_classes
    codes = labels.new_full((len(labels), height * width), -1)
    cache, x = self.empty_cache(len(pairs)), self.embed_labels(pairs)
    i = 0
    while i < height * width:
        logits = self.decode_one(x, torch.arange(i, i + 1, device=labels.device), cache).float()
        cond = logits[::copies]
        if copies == 2 and not 0 <= cfg_interval < i - 1:
            cond = cond + (cfg_scale - 1) * (cond - logits[1::2])
        codes[:, i] = sample_code(cond, temperature, top_k, top_p, generator)
        x = self.tok_embeddings(codes[:, i].repeat_interleave(copies))[:, None]
        i += 1
        yield codes.clone()


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: mutant
# why: conditional and unconditional exchanged
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    guided, number = cfg_scale != 1, math.prod(self.config.grid)
    codes = torch.full((len(labels), number), -1, device=labels.device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, -1)])
    positions, cache = torch.arange(number, device=labels.device), self.empty_cache(len(labels))
    x = self.embed_labels(labels)
    for i in range(number):
        logits = self.decode_one(x, positions[i:i + 1], cache).float()
        if guided:
            uncond, cond = logits.chunk(2)
            here = cfg_interval < 0 or i <= cfg_interval + 1
            logits = uncond + cfg_scale * (cond - uncond) if here else cond
        codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)
        x = self.tok_embeddings(codes[:, i])[:, None].repeat(2 if guided else 1, 1, 1)
        yield codes


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: mutant
# why: an interval of 0 counts as none
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    guided, number = cfg_scale != 1, math.prod(self.config.grid)
    codes = torch.full((len(labels), number), -1, device=labels.device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, -1)])
    positions, cache = torch.arange(number, device=labels.device), self.empty_cache(len(labels))
    x = self.embed_labels(labels)
    for i in range(number):
        logits = self.decode_one(x, positions[i:i + 1], cache).float()
        if guided:
            cond, uncond = logits.chunk(2)
            here = not (cfg_interval > 0 and i > cfg_interval + 1)
            logits = uncond + cfg_scale * (cond - uncond) if here else cond
        codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)
        x = self.tok_embeddings(codes[:, i])[:, None].repeat(2 if guided else 1, 1, 1)
        yield codes


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: mutant
# why: does not hand on top_p
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    guided, number = cfg_scale != 1, math.prod(self.config.grid)
    codes = torch.full((len(labels), number), -1, device=labels.device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, -1)])
    positions, cache = torch.arange(number, device=labels.device), self.empty_cache(len(labels))
    x = self.embed_labels(labels)
    for i in range(number):
        logits = self.decode_one(x, positions[i:i + 1], cache).float()
        if guided:
            cond, uncond = logits.chunk(2)
            here = cfg_interval < 0 or i <= cfg_interval + 1
            logits = uncond + cfg_scale * (cond - uncond) if here else cond
        codes[:, i] = sample_code(logits, temperature, top_k, 1.0, generator)
        x = self.tok_embeddings(codes[:, i])[:, None].repeat(2 if guided else 1, 1, 1)
        yield codes


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: mutant
# why: zero where nothing is written yet
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    guided, number = cfg_scale != 1, math.prod(self.config.grid)
    codes = torch.zeros(len(labels), number, dtype=torch.int64, device=labels.device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, -1)])
    positions, cache = torch.arange(number, device=labels.device), self.empty_cache(len(labels))
    x = self.embed_labels(labels)
    for i in range(number):
        logits = self.decode_one(x, positions[i:i + 1], cache).float()
        if guided:
            cond, uncond = logits.chunk(2)
            here = cfg_interval < 0 or i <= cfg_interval + 1
            logits = uncond + cfg_scale * (cond - uncond) if here else cond
        codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)
        x = self.tok_embeddings(codes[:, i])[:, None].repeat(2 if guided else 1, 1, 1)
        yield codes


# file: d2c.py
# function: DiscreteGenerator.stream
# exercise: sampling
# kind: mutant
# why: class 0 stands for "no class"
def stream(self, labels, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, cfg_interval=-1):
    guided, number = cfg_scale != 1, math.prod(self.config.grid)
    codes = torch.full((len(labels), number), -1, device=labels.device)
    if guided:
        labels = torch.cat([labels, torch.zeros_like(labels)])
    positions, cache = torch.arange(number, device=labels.device), self.empty_cache(len(labels))
    x = self.embed_labels(labels)
    for i in range(number):
        logits = self.decode_one(x, positions[i:i + 1], cache).float()
        if guided:
            cond, uncond = logits.chunk(2)
            here = cfg_interval < 0 or i <= cfg_interval + 1
            logits = uncond + cfg_scale * (cond - uncond) if here else cond
        codes[:, i] = sample_code(logits, temperature, top_k, top_p, generator)
        x = self.tok_embeddings(codes[:, i])[:, None].repeat(2 if guided else 1, 1, 1)
        yield codes
