# file: d2c.py
# function: pick
# exercise: masked
# kind: right
# why: indices of rows and places
def pick(x, places):
    if len(x) == 1:
        return x[0][places]
    return x[torch.arange(len(places), device=places.device)[:, None], places]


# file: d2c.py
# function: pick
# exercise: masked
# kind: right
# why: take_along_dim, which broadcasts
def pick(x, places):
    return torch.take_along_dim(x, places.unsqueeze(-1), dim=1)


# file: d2c.py
# function: pick
# exercise: masked
# kind: right
# why: one embedding look-up in all rows laid end to end
def pick(x, places):
    offsets = torch.arange(len(places), device=places.device) * (x.shape[1] if len(x) > 1 else 0)
    return F.embedding(places + offsets[:, None], x.reshape(-1, x.shape[-1]))


# file: d2c.py
# function: pick
# exercise: masked
# kind: mutant
# why: the first picture's places for all
def pick(x, places):
    index = places[:, :, None].expand(-1, -1, x.shape[2])
    index = index[:1].expand(len(places), -1, -1)
    return x.expand(len(places), -1, -1).gather(1, index)


# file: d2c.py
# function: pick
# exercise: masked
# kind: mutant
# why: not for an x that all pictures share
def pick(x, places):
    index = places[:, :, None].expand(-1, -1, x.shape[2])
    return x.gather(1, index)


# file: d2c.py
# function: pick
# exercise: masked
# kind: mutant
# why: the rows come in ascending order of places
def pick(x, places):
    index = places.sort(1).values[:, :, None].expand(-1, -1, x.shape[2])
    return x.expand(len(places), -1, -1).gather(1, index)


# file: d2c.py
# function: pick
# exercise: masked
# kind: mutant
# why: pictures laid end to end, but the places not moved on: all rows are the first picture's
def pick(x, places):
    return x.flatten(0, 1)[places]


# file: d2c.py
# function: pick
# exercise: masked
# kind: mutant
# why: a mask of the places: ascending order, and each place once
def pick(x, places):
    x = x.expand(len(places), -1, -1)
    mask = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, places, True)
    return x[mask].view(len(places), -1, x.shape[2])


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: right
# why: buffer and tokens computed apart and joined
def encode(self, latents, visible, labels):
    size, positions = self.config.buffer_size, self.encoder_pos_embed_learned
    known = (labels >= 0)[:, None]
    label = torch.where(known, self.class_emb(labels.clamp(min=0)), self.fake_latent)
    buffer = label[:, None] + positions[:, :size]
    tokens = self.z_proj(pick(latents, visible)) + pick(positions[:, size:], visible)
    x = torch.cat([buffer, tokens], dim=1)
    x = self.z_proj_ln(x)
    for block in self.encoder_blocks:
        x = block(x)
    return self.encoder_norm(x)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: right
# why: picture by picture: each sequence is made and encoded alone
def encode(self, latents, visible, labels):
    outputs, size = [], self.config.buffer_size
    for latent, places, label in zip(latents, visible, labels):
        vector = self.fake_latent[0] if label < 0 else self.class_emb(label)
        content = torch.cat([vector.expand(size, -1), self.z_proj(latent[places])])
        slots = torch.cat([torch.arange(size, device=places.device), size + places])
        x = self.z_proj_ln(content + self.encoder_pos_embed_learned[0, slots])[None]
        for block in self.encoder_blocks:
            x = block(x)
        outputs.append(self.encoder_norm(x))
    return torch.cat(outputs)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: right
# why: positions of all slots picked at once, arithmetic mix of class and null
def encode(self, latents, visible, labels):
    buffer = torch.arange(self.config.buffer_size, device=visible.device).expand(len(visible), -1)
    positions = pick(self.encoder_pos_embed_learned, torch.cat([buffer, visible + self.config.buffer_size], 1))
    label = self.class_emb(labels.abs() % self.config.num_classes)
    label[labels == -1] = self.fake_latent
    x = positions + torch.cat([label[:, None].expand(-1, buffer.shape[1], -1), self.z_proj(pick(latents, visible))], 1)
    x = self.z_proj_ln(x)
    for i in range(len(self.encoder_blocks)):
        x = self.encoder_blocks[i](x)
    return self.encoder_norm(x)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: mutant
# why: the visible latents get the first rows of the position table, whatever their places
def encode(self, latents, visible, labels):
    size, positions = self.config.buffer_size, self.encoder_pos_embed_learned
    known = (labels >= 0)[:, None]
    label = torch.where(known, self.class_emb(labels.clamp(min=0)), self.fake_latent)
    buffer = label[:, None] + positions[:, :size]
    tokens = self.z_proj(pick(latents, visible)) + positions[:, size:size + visible.shape[1]]
    x = torch.cat([buffer, tokens], dim=1)
    x = self.z_proj_ln(x)
    for block in self.encoder_blocks:
        x = block(x)
    return self.encoder_norm(x)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: mutant
# why: positions are added after z_proj_ln
def encode(self, latents, visible, labels):
    size, positions = self.config.buffer_size, self.encoder_pos_embed_learned
    known = (labels >= 0)[:, None]
    label = torch.where(known, self.class_emb(labels.clamp(min=0)), self.fake_latent)
    buffer = label[:, None].expand(-1, size, -1)
    tokens = self.z_proj(pick(latents, visible))
    x = torch.cat([buffer, tokens], dim=1)
    table = positions.expand(len(x), -1, -1)
    x = self.z_proj_ln(x) + torch.cat([table[:, :size], pick(positions[:, size:], visible)], 1)
    for block in self.encoder_blocks:
        x = block(x)
    return self.encoder_norm(x)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: mutant
# why: class 0 counts as no class
def encode(self, latents, visible, labels):
    size, positions = self.config.buffer_size, self.encoder_pos_embed_learned
    known = (labels > 0)[:, None]
    label = torch.where(known, self.class_emb(labels.clamp(min=0)), self.fake_latent)
    buffer = label[:, None] + positions[:, :size]
    tokens = self.z_proj(pick(latents, visible)) + pick(positions[:, size:], visible)
    x = torch.cat([buffer, tokens], dim=1)
    x = self.z_proj_ln(x)
    for block in self.encoder_blocks:
        x = block(x)
    return self.encoder_norm(x)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: mutant
# why: the tokens come before the buffer
def encode(self, latents, visible, labels):
    size, positions = self.config.buffer_size, self.encoder_pos_embed_learned
    known = (labels >= 0)[:, None]
    label = torch.where(known, self.class_emb(labels.clamp(min=0)), self.fake_latent)
    buffer = label[:, None] + positions[:, :size]
    tokens = self.z_proj(pick(latents, visible)) + pick(positions[:, size:], visible)
    x = torch.cat([tokens, buffer], dim=1)
    x = self.z_proj_ln(x)
    for block in self.encoder_blocks:
        x = block(x)
    return self.encoder_norm(x)


# file: d2c.py
# function: ContinuousGenerator.encode
# exercise: masked
# kind: mutant
# why: each block reads the embedded sequence anew: only the last one counts
def encode(self, latents, visible, labels):
    size, positions = self.config.buffer_size, self.encoder_pos_embed_learned
    known = (labels >= 0)[:, None]
    label = torch.where(known, self.class_emb(labels.clamp(min=0)), self.fake_latent)
    buffer = label[:, None] + positions[:, :size]
    tokens = self.z_proj(pick(latents, visible)) + pick(positions[:, size:], visible)
    x = torch.cat([buffer, tokens], dim=1)
    x = self.z_proj_ln(x)
    for block in self.encoder_blocks:
        y = block(x)
    return self.encoder_norm(y)


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: right
# why: tokens put in by an assignment to rows and places
def decode(self, encoded, visible, context=None):
    size = self.config.buffer_size
    x = self.decoder_embed(encoded)
    rows = torch.arange(len(x), device=x.device)[:, None]
    tokens = self.mask_token.to(x.dtype).repeat(len(x), math.prod(self.config.grid), 1)
    tokens[rows, visible] = x[:, size:]
    x = torch.cat([x[:, :size], tokens], dim=1)
    x = x + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    z = self.decoder_norm(x)[:, size:]
    return z + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: right
# why: one-hot matrix product, mask token where the row of the matrix is empty
def decode(self, encoded, visible, context=None):
    size, number = self.config.buffer_size, math.prod(self.config.grid)
    buffer, drawn = self.decoder_embed(encoded).split([size, visible.shape[1]], 1)
    where = F.one_hot(visible, number).to(drawn.dtype)
    tokens = torch.einsum("bvn,bvd->bnd", where, drawn)
    tokens = tokens + (1 - where.sum(1))[..., None] * self.mask_token
    positions = self.decoder_pos_embed_learned
    x = torch.cat([buffer + positions[:, :size], tokens + positions[:, size:]], 1)
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    return self.decoder_norm(x)[:, size:] + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: right
# why: a boolean mask and the tokens sorted by place
def decode(self, encoded, visible, context=None):
    order = visible.argsort(1)
    known = torch.zeros(len(visible), math.prod(self.config.grid), dtype=torch.bool, device=visible.device)
    known.scatter_(1, visible, True)
    x = self.decoder_embed(encoded)
    buffer, tokens = x[:, :self.config.buffer_size], pick(x[:, self.config.buffer_size:], order)
    places = self.mask_token.to(x.dtype).expand(*known.shape, -1).masked_scatter(known[..., None], tokens)
    x = torch.cat([buffer, places], 1) + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    return self.decoder_norm(x[:, self.config.buffer_size:]) + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: mutant
# why: the tokens are put into the first places, in their order
def decode(self, encoded, visible, context=None):
    size = self.config.buffer_size
    x = self.decoder_embed(encoded)
    rows = torch.arange(len(x), device=x.device)[:, None]
    tokens = self.mask_token.to(x.dtype).repeat(len(x), math.prod(self.config.grid), 1)
    tokens[:, :visible.shape[1]] = x[:, size:]
    x = torch.cat([x[:, :size], tokens], dim=1)
    x = x + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    z = self.decoder_norm(x)[:, size:]
    return z + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: mutant
# why: the mask token goes through decoder_embed
def decode(self, encoded, visible, context=None):
    size = self.config.buffer_size
    x = self.decoder_embed(encoded)
    rows = torch.arange(len(x), device=x.device)[:, None]
    tokens = self.decoder_embed(self.mask_token).repeat(len(x), math.prod(self.config.grid), 1)
    tokens[rows, visible] = x[:, size:]
    x = torch.cat([x[:, :size], tokens], dim=1)
    x = x + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    z = self.decoder_norm(x)[:, size:]
    return z + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: mutant
# why: the buffer slots skip decoder_embed
def decode(self, encoded, visible, context=None):
    size = self.config.buffer_size
    x = self.decoder_embed(encoded)
    rows = torch.arange(len(x), device=x.device)[:, None]
    tokens = self.mask_token.to(x.dtype).repeat(len(x), math.prod(self.config.grid), 1)
    tokens[rows, visible] = x[:, size:]
    x = torch.cat([encoded[:, :size], tokens], dim=1)
    x = x + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    z = self.decoder_norm(x)[:, size:]
    return z + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: mutant
# why: the last positions are added before the norm
def decode(self, encoded, visible, context=None):
    size = self.config.buffer_size
    x = self.decoder_embed(encoded)
    rows = torch.arange(len(x), device=x.device)[:, None]
    tokens = self.mask_token.to(x.dtype).repeat(len(x), math.prod(self.config.grid), 1)
    tokens[rows, visible] = x[:, size:]
    x = torch.cat([x[:, :size], tokens], dim=1)
    x = x + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    return self.decoder_norm(x[:, size:] + self.diffusion_pos_embed_learned)


# file: d2c.py
# function: ContinuousGenerator.decode
# exercise: masked
# kind: mutant
# why: the grid is taken as square
def decode(self, encoded, visible, context=None):
    size = self.config.buffer_size
    x = self.decoder_embed(encoded)
    rows = torch.arange(len(x), device=x.device)[:, None]
    tokens = self.mask_token.to(x.dtype).repeat(len(x), self.config.grid[0] ** 2, 1)
    tokens[rows, visible] = x[:, size:]
    x = torch.cat([x[:, :size], tokens], dim=1)
    x = x + self.decoder_pos_embed_learned
    if context is not None:
        x = self.fusion(x, context)
    for block in self.decoder_blocks:
        x = block(x)
    z = self.decoder_norm(x)[:, size:]
    return z + self.diffusion_pos_embed_learned


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: right
# why: rows repeated one by one
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    net, levels = self.diffloss["net"], t.shape[2]
    z = self.condition(latents, visible, labels, self.prepare(codes))
    z = pick(z, hidden).flatten(0, 1)
    x0 = pick(latents, hidden).flatten(0, 1)
    c = net.cond_embed(z).repeat_interleave(levels, 0)
    x = x0.repeat_interleave(levels, 0)
    loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean()
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
    return loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: right
# why: broadcast to (B,H,R,*), flattened at the end
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    batch, number, levels = t.shape
    z = pick(self.condition(latents, visible, labels, self.prepare(codes)), hidden)
    x0 = pick(latents, hidden)
    wide = x0[:, :, None].expand(-1, -1, levels, -1).reshape(-1, x0.shape[-1])
    c = self.diffloss["net"].cond_embed(z[:, :, None].expand(-1, -1, levels, -1).reshape(-1, z.shape[-1]))
    rows = diffusion_loss(self.diffloss["net"], wide, t.reshape(-1), noise.reshape(-1, noise.shape[-1]), c)
    loss = rows.sum() / (batch * number * levels)
    weight = self.config.guess_weight
    return loss + weight * ((self.guess(z) - x0) ** 2).mean() if weight else loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: right
# why: noise level outermost, as in MAR: conditions repeated as blocks, t and noise moved to match
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    z = self.condition(latents, visible, labels, self.prepare(codes))
    z, x0 = (pick(rows, hidden).reshape(-1, rows.shape[-1]) for rows in (z, latents))
    net, levels = self.diffloss["net"], t.shape[-1]
    loss = diffusion_loss(net, x0.repeat(levels, 1), t.movedim(2, 0).flatten(), noise.movedim(2, 0).flatten(0, 2),
                          net.cond_embed(z).repeat(levels, 1)).mean()
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z), x0)
    return loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: mutant
# why: conditions repeated as a block, t and noise row by row
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    net, levels = self.diffloss["net"], t.shape[2]
    z = self.condition(latents, visible, labels, self.prepare(codes))
    z = pick(z, hidden).flatten(0, 1)
    x0 = pick(latents, hidden).flatten(0, 1)
    c = net.cond_embed(z).repeat(levels, 1)
    x = x0.repeat_interleave(levels, 0)
    loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean()
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
    return loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: mutant
# why: the codes never reach the condition
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    net, levels = self.diffloss["net"], t.shape[2]
    z = self.condition(latents, visible, labels)
    z = pick(z, hidden).flatten(0, 1)
    x0 = pick(latents, hidden).flatten(0, 1)
    c = net.cond_embed(z).repeat_interleave(levels, 0)
    x = x0.repeat_interleave(levels, 0)
    loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean()
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
    return loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: mutant
# why: the diffusion loss does not train the trunk
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    net, levels = self.diffloss["net"], t.shape[2]
    z = self.condition(latents, visible, labels, self.prepare(codes))
    z = pick(z, hidden).flatten(0, 1)
    x0 = pick(latents, hidden).flatten(0, 1)
    c = net.cond_embed(z.detach()).repeat_interleave(levels, 0)
    x = x0.repeat_interleave(levels, 0)
    loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean()
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
    return loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: mutant
# why: the losses of the noise levels are added up
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    net, levels = self.diffloss["net"], t.shape[2]
    z = self.condition(latents, visible, labels, self.prepare(codes))
    z = pick(z, hidden).flatten(0, 1)
    x0 = pick(latents, hidden).flatten(0, 1)
    c = net.cond_embed(z).repeat_interleave(levels, 0)
    x = x0.repeat_interleave(levels, 0)
    loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean() * levels
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
    return loss


# file: d2c.py
# function: ContinuousGenerator.forward
# exercise: masked
# kind: mutant
# why: the condition sees all latents, hidden ones included
def forward(self, latents, visible, hidden, labels, codes, t, noise):
    net, levels = self.diffloss["net"], t.shape[2]
    z = self.condition(latents, torch.cat([visible, hidden], 1), labels, self.prepare(codes))
    z = pick(z, hidden).flatten(0, 1)
    x0 = pick(latents, hidden).flatten(0, 1)
    c = net.cond_embed(z).repeat_interleave(levels, 0)
    x = x0.repeat_interleave(levels, 0)
    loss = diffusion_loss(net, x, t.flatten(), noise.flatten(0, 2), c).mean()
    if self.config.guess_weight:
        loss = loss + self.config.guess_weight * F.mse_loss(self.guess(z).to(x0.dtype), x0)
    return loss
