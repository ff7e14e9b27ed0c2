# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: right
# why: a matrix product of tokens and rows
def nearest(self, z):
    with full_float32(z.device):
        cosines = to_tokens(z) @ self.codebook().T
        return cosines.max(-1).indices.unflatten(1, z.shape[2:])


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: right
# why: the codebook as a 1 x 1 convolution
def nearest(self, z):
    with full_float32(z.device):
        return F.conv2d(z, self.codebook()[:, :, None, None]).argmax(1)


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: right
# why: cdist, without the shortcut by a matrix product
def nearest(self, z):
    rows, codes = self.codebook(), []
    for picture in z:
        points = picture.flatten(1).T.contiguous()
        distances = torch.cdist(points, rows, compute_mode="donot_use_mm_for_euclid_dist")
        codes.append(distances.argmin(1).view(picture.shape[1:]))
    return torch.stack(codes)


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: mutant
# why: compares with rows that are not of unit length, by the dot product
def nearest(self, z):
    rows = self.quantize["embedding"].weight
    return torch.einsum("bchw,kc->bhwk", z, rows).argmax(-1)


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: mutant
# why: distances to the raw rows of the embedding
def nearest(self, z):
    tokens = to_tokens(z)
    return torch.cdist(tokens, self.quantize["embedding"].weight.expand(len(z), -1, -1)).argmin(-1).view(
        len(z), *z.shape[2:])


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: mutant
# why: reshapes without moving the channels to the end
def nearest(self, z):
    b, c, h, w = z.shape
    return (z.reshape(-1, c) @ self.codebook().T).argmax(-1).view(b, h, w)


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: mutant
# why: counts the places column by column and folds them row by row
def nearest(self, z):
    b, c, h, w = z.shape
    tokens = z.permute(0, 3, 2, 1).reshape(-1, c)
    return (tokens @ self.codebook().T).argmax(-1).view(b, h, w)


# file: tokenizers.py
# function: VQTokenizer.nearest
# exercise: vq
# kind: mutant
# why: takes opposite vectors as near
def nearest(self, z):
    return torch.einsum("bchw,kc->bhwk", z, self.codebook()).square().argmax(-1)


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: right
# why: straight-through the other way round, means written out
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z.detach())
    e = self.rows(codes)
    seen = e.detach() + z - z.detach()
    picture = self.decoder(self.post_quant_conv(seen))
    loss = (images - picture).pow(2).mean() + (e - z.detach()).pow(2).mean() + (z - e.detach()).pow(2).mean() / 4
    return loss, codes, z


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: right
# why: codes in a pass of their own; the loss as a mean over pictures
def forward(self, images):
    codes = self.encode(images)
    z, e = self.features(images), self.rows(codes)
    quantised = z - (z - e).detach()
    losses = []
    for picture, place, image, row in zip(quantised, z, images, e):
        x = self.decoder(self.post_quant_conv(picture[None]))[0]
        losses.append(((x - image)**2).mean() + ((row - place.detach())**2).mean()
                      + 0.25 * ((place - row.detach())**2).mean())
    return torch.stack(losses).mean(), codes, z


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: right
# why: one squared difference whose two gradients are weighed by hooks in disguise
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z)
    e = self.rows(codes)

    def scaled(x, share):  # the value of x, `share` of its gradient
        return share * x + (1 - share) * x.detach()

    pull = (e - z.detach()).square().sum() / z.numel()
    hold = (scaled(z, 0.25) - e.detach()).square().sum() / z.numel()
    value = 0.25 * (z.detach() - e.detach()).square().mean()
    hold = hold - hold.detach() + value
    reconstruction = self.decoder(self.post_quant_conv(scaled(z, 1.0) + e.detach() - z.detach()))
    return F.mse_loss(reconstruction, images) + pull + hold, codes, z


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: mutant
# why: no straight-through: the encoder learns nothing from the picture
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z)
    e = self.rows(codes)
    reconstruction = self.decoder(self.post_quant_conv(e))
    return (F.mse_loss(reconstruction, images) + F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach()),
            codes, z)


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: mutant
# why: the weights 1 and 0.25 exchanged (gradients only)
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z)
    e = self.rows(codes)
    reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))
    return (F.mse_loss(reconstruction, images) + 0.25 * F.mse_loss(e, z.detach()) + F.mse_loss(z, e.detach()),
            codes, z)


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: mutant
# why: z is not detached in the first term, so it is held with weight 1.25 (gradients only)
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z)
    e = self.rows(codes)
    reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))
    return F.mse_loss(reconstruction, images) + F.mse_loss(e, z) + 0.25 * F.mse_loss(z, e.detach()), codes, z


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: mutant
# why: codebook terms summed over channels
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z)
    e = self.rows(codes)
    reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))
    codebook_loss = ((e - z.detach())**2).sum(1).mean() + 0.25 * ((z - e.detach())**2).sum(1).mean()
    return F.mse_loss(reconstruction, images) + codebook_loss, codes, z


# file: tokenizers.py
# function: VQTokenizer.forward
# exercise: vq
# kind: mutant
# why: absolute error of the picture
def forward(self, images):
    z = self.features(images)
    codes = self.nearest(z)
    e = self.rows(codes)
    reconstruction = self.decoder(self.post_quant_conv(z + (e - z).detach()))
    codebook_loss = F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach())
    return F.l1_loss(reconstruction, images) + codebook_loss, codes, z


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: right
# why: narrow, and the root of the variance
def sample(moments, noise, dim=1):
    channels = moments.shape[dim] // 2
    mean, log_variance = moments.narrow(dim, 0, channels), moments.narrow(dim, channels, channels)
    return noise * log_variance.clamp(min=-30, max=20).exp().sqrt() + mean


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: right
# why: the channel dimension moved to the front and back
def sample(moments, noise, dim=1):
    moved, drawn = moments.movedim(dim, 0), noise.movedim(dim, 0)
    c = len(drawn)
    deviation = torch.exp(torch.clamp(moved[c:] / 2, -15, 10))
    return torch.addcmul(moved[:c], deviation, drawn).movedim(0, dim)


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: right
# why: both bounds by minimum and maximum, halves by index_select, a power of e
def sample(moments, noise, dim=1):
    places = torch.arange(noise.shape[dim], device=moments.device)
    mean = moments.index_select(dim, places)
    log_variance = moments.index_select(dim, places + len(places))
    low, high = torch.full_like(log_variance, -30.0), torch.full_like(log_variance, 20.0)
    deviation = math.e ** (0.5 * torch.minimum(torch.maximum(log_variance, low), high))
    return mean + deviation * noise


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: mutant
# why: the variance where the standard deviation belongs
def sample(moments, noise, dim=1):
    mean, log_variance = moments.chunk(2, dim)
    return mean + log_variance.clamp(-30, 20).exp() * noise


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: mutant
# why: clamps half the log-variance
def sample(moments, noise, dim=1):
    mean, log_variance = moments.chunk(2, dim)
    return mean + (0.5 * log_variance).clamp(-30, 20).exp() * noise


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: mutant
# why: cuts the last axis for every `dim` but 1
def sample(moments, noise, dim=1):
    mean, log_variance = moments.chunk(2, 1 if dim == 1 else -1)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: mutant
# why: the log-variances come first
def sample(moments, noise, dim=1):
    log_variance, mean = moments.chunk(2, dim)
    return mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise


# file: tokenizers.py
# function: KLTokenizer.sample
# exercise: vq
# kind: mutant
# why: clamps the mean as well
def sample(moments, noise, dim=1):
    mean, log_variance = moments.clamp(-30, 20).chunk(2, dim)
    return mean + (0.5 * log_variance).exp() * noise


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: right
# why: torch.distributions for the divergence
def forward(self, images, noise):
    mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, 1)
    deviation = (0.5 * log_variance.clamp(-30, 20)).exp()
    q = torch.distributions.Normal(mean, deviation)
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    x = self.decode(mean + deviation * noise)
    return ((x - images)**2).mean() + self.config.kl_weight * torch.distributions.kl_divergence(q, p).mean()


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: right
# why: encode, and a sum of three means
def forward(self, images, noise):
    moments = self.encode(images)
    c = self.config.z_channels
    mean, log_variance = moments[:, :c], moments[:, c:].clamp(-30, 20)
    kl = (mean.square().mean() + torch.expm1(log_variance).mean() - log_variance.mean()) / 2
    picture = self.decoder(self.post_quant_conv(self.sample(moments, noise)))
    return self.config.kl_weight * kl + F.mse_loss(images, picture)


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: right
# why: picture by picture, variance written out
def forward(self, images, noise):
    total = 0.0
    for image, draw in zip(images, noise):
        mean, log_variance = self.quant_conv(self.encoder(image[None]))[0].split(len(draw))
        log_variance = log_variance.clamp(-30, 20)
        variance = torch.exp(log_variance)
        decoded = self.decode((mean + variance.sqrt() * draw)[None])[0]
        divergence = -0.5 * (1 + log_variance - mean.pow(2) - variance)
        total = total + (image - decoded).pow(2).mean() + self.config.kl_weight * divergence.mean()
    return total / len(images)


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: mutant
# why: log-variance clamped in the sample only
def forward(self, images, noise):
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = moments.chunk(2, 1)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return F.mse_loss(self.decode(self.sample(moments, noise)), images) + self.config.kl_weight * kl


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: mutant
# why: without the half
def forward(self, images, noise):
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = moments.chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    kl = (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return F.mse_loss(self.decode(self.sample(moments, noise)), images) + self.config.kl_weight * kl


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: mutant
# why: decodes the mean, not a sample
def forward(self, images, noise):
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = moments.chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return F.mse_loss(self.decode(mean), images) + self.config.kl_weight * kl


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: mutant
# why: draws the noise itself
def forward(self, images, noise):
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = moments.chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    latents = self.sample(moments, torch.randn_like(mean))
    return F.mse_loss(self.decode(latents), images) + self.config.kl_weight * kl


# file: tokenizers.py
# function: KLTokenizer.forward
# exercise: vq
# kind: mutant
# why: the divergence the other way round, KL(N(0, 1) || N(mean, variance))
def forward(self, images, noise):
    moments = self.quant_conv(self.encoder(images))
    mean, log_variance = moments.chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    kl = 0.5 * ((1 + mean**2) / log_variance.exp() - 1 + log_variance).mean()
    return F.mse_loss(self.decode(self.sample(moments, noise)), images) + self.config.kl_weight * kl


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: right
# why: plain loops
def revive_codes(self, codes, z, generator):
    self.seen = []
    used = set(codes.tolist())
    for k in range(len(self.unused)):
        self.unused[k] = 0 if k in used else self.unused[k] + 1
    dead = [k for k in range(len(self.unused)) if self.unused[k] >= self.PATIENCE]
    places = torch.randperm(len(z), generator=generator).tolist()
    for k, place in zip(dead, places):
        self.vq.quantize["embedding"].weight[k] = z[place]
        self.unused[k] = 0


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: right
# why: counts by bincount, draws by multinomial, the longest unused first
def revive_codes(self, codes, z, generator):
    counts = torch.bincount(codes, minlength=len(self.unused))
    self.unused.copy_(torch.where(counts > 0, 0, self.unused + 1))
    order = self.unused.argsort(descending=True)
    dead = order[self.unused[order] >= self.PATIENCE][:len(z)]
    if len(dead):
        chosen = torch.multinomial(torch.ones(len(z)), len(dead), generator=generator).to(z.device)
        self.vq.quantize["embedding"].weight.index_copy_(0, dead, z[chosen])
        self.unused.index_fill_(0, dead, 0)
    self.seen = []


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: right
# why: sorts random numbers; a mask over all rows
def revive_codes(self, codes, z, generator):
    used = torch.zeros_like(self.unused, dtype=torch.bool)
    used[codes] = True
    self.unused.add_(1).masked_fill_(used, 0)
    dead = self.unused.ge(self.PATIENCE)
    dead &= dead.cumsum(0) <= len(z)
    chosen = torch.rand(len(z), generator=generator).argsort().to(z.device)
    number = (dead.cumsum(0) - 1).clamp(min=0)
    weight = self.vq.quantize["embedding"].weight
    weight.copy_(torch.where(dead[:, None], z[chosen[number.clamp(max=len(z) - 1)]].to(weight.dtype), weight))
    self.unused.masked_fill_(dead, 0)
    self.seen.clear()


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: mutant
# why: waits one step too long
def revive_codes(self, codes, z, generator):
    self.seen = []
    self.unused += 1
    self.unused[codes] = 0
    dead = (self.unused > self.PATIENCE).nonzero()[:len(z), 0]
    chosen = torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)
    self.vq.quantize["embedding"].weight[dead] = z[chosen]
    self.unused[dead] = 0


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: mutant
# why: counts after it clears, so the step of use counts as a step without use
def revive_codes(self, codes, z, generator):
    self.seen = []
    self.unused[codes] = 0
    self.unused += 1
    dead = (self.unused >= self.PATIENCE).nonzero()[:len(z), 0]
    chosen = torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)
    self.vq.quantize["embedding"].weight[dead] = z[chosen]
    self.unused[dead] = 0


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: mutant
# why: one output for all dead codes
def revive_codes(self, codes, z, generator):
    self.seen = []
    self.unused += 1
    self.unused[codes] = 0
    dead = (self.unused >= self.PATIENCE).nonzero()[:len(z), 0]
    chosen = torch.randint(len(z), (1,), generator=generator).to(z.device)
    self.vq.quantize["embedding"].weight[dead] = z[chosen]
    self.unused[dead] = 0


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: mutant
# why: does not draw by the generator that it was given
def revive_codes(self, codes, z, generator):
    self.seen = []
    self.unused += 1
    self.unused[codes] = 0
    dead = (self.unused >= self.PATIENCE).nonzero()[:len(z), 0]
    chosen = torch.randperm(len(z))[:len(dead)].to(z.device)
    self.vq.quantize["embedding"].weight[dead] = z[chosen]
    self.unused[dead] = 0


# file: train.py
# function: Tokenizers.revive_codes
# exercise: vq
# kind: mutant
# why: a code that is used again keeps its count (it only pauses)
def revive_codes(self, codes, z, generator):
    self.seen = []
    self.unused += 1
    self.unused[codes.unique()] -= 1
    dead = (self.unused >= self.PATIENCE).nonzero()[:len(z), 0]
    chosen = torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)
    self.vq.quantize["embedding"].weight[dead] = z[chosen]
    self.unused[dead] = 0
