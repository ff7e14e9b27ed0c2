# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: right
# why: matrix products and softmax
def forward(self, x, keys_values):
    k, v = keys_values
    q = split_heads(self.q(x), self.heads)
    scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
    weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return F.dropout(self.proj(y), self.dropout, self.training)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: right
# why: torch's attention head by head
def forward(self, x, keys_values):
    q = self.q(x).expand(len(keys_values[0]), -1, -1).chunk(self.heads, dim=-1)
    rate = self.dropout if self.training else 0.0
    heads = [F.scaled_dot_product_attention(one, k, v, dropout_p=rate)
             for one, k, v in zip(q, keys_values[0].unbind(1), keys_values[1].unbind(1))]
    return F.dropout(self.proj(torch.cat(heads, -1)), self.dropout, self.training)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: right
# why: picture by picture
def forward(self, x, keys_values):
    outputs = []
    for i, (k, v) in enumerate(zip(*keys_values)):
        q = self.q(x[i if len(x) > 1 else 0]).unflatten(-1, (self.heads, -1)).movedim(1, 0)
        log_weights = torch.log_softmax(torch.bmm(q, k.mT) * k.shape[-1] ** -0.5, -1)
        y = torch.bmm(F.dropout(log_weights.exp(), self.dropout, self.training), v)
        outputs.append(self.proj(y.movedim(0, 1).flatten(1)))
    return F.dropout(torch.stack(outputs), self.dropout, self.training)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: mutant
# why: the scores are not divided
def forward(self, x, keys_values):
    k, v = keys_values
    q = split_heads(self.q(x), self.heads)
    scores = q @ k.transpose(-2, -1)
    weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return F.dropout(self.proj(y), self.dropout, self.training)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: mutant
# why: heads and tokens are not put back before they are joined
def forward(self, x, keys_values):
    k, v = keys_values
    q = split_heads(self.q(x), self.heads)
    scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
    weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    y = (weights @ v).reshape(len(v), x.shape[1], -1)
    return F.dropout(self.proj(y), self.dropout, self.training)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: mutant
# why: the output projection is left out
def forward(self, x, keys_values):
    k, v = keys_values
    q = split_heads(self.q(x), self.heads)
    scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
    weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return F.dropout(y, self.dropout, self.training)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: mutant
# why: drops out in eval mode too
def forward(self, x, keys_values):
    k, v = keys_values
    q = split_heads(self.q(x), self.heads)
    scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
    weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return F.dropout(self.proj(y), self.dropout)


# file: fusion.py
# function: CrossAttention.forward
# exercise: fusion
# kind: mutant
# why: causal: slot i sees the codes up to i only
def forward(self, x, keys_values):
    k, v = keys_values
    q = split_heads(self.q(x), self.heads)
    scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return F.dropout(self.proj(y), self.dropout, self.training)


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: right
# why: a list filled block by block
def prepare(self, discrete):
    normal = self.norm_discrete(discrete)
    context = []
    for block in self.blocks:
        context.append(block.cross.keys_values(normal))
    return context


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: right
# why: a tuple, keys and values made by hand
def prepare(self, discrete):
    x, result = self.norm_discrete(discrete), ()
    for block in self.blocks:
        keys, values = block.cross.kv(x).chunk(2, -1)
        result += ((split_heads(keys, block.cross.heads), split_heads(values, block.cross.heads)),)
    return result


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: right
# why: normalised anew for each block, from the codes
def prepare(self, discrete):
    return [block.cross.keys_values(F.layer_norm(discrete, discrete.shape[-1:], self.norm_discrete.weight,
                                                 self.norm_discrete.bias, self.norm_discrete.eps))
            for block in self.blocks]


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: mutant
# why: the codes are not normalised
def prepare(self, discrete):
    normal = discrete
    context = []
    for block in self.blocks:
        context.append(block.cross.keys_values(normal))
    return context


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: mutant
# why: all blocks get the first block's keys and values
def prepare(self, discrete):
    normal = self.norm_discrete(discrete)
    context = []
    for block in self.blocks:
        context.append(self.blocks[0].cross.keys_values(normal))
    return context


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: mutant
# why: the blocks in reverse order
def prepare(self, discrete):
    normal = self.norm_discrete(discrete)
    context = []
    for block in self.blocks:
        context.append(block.cross.keys_values(normal))
    return context[::-1]


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: mutant
# why: the block's norm for the sequence is used for the codes
def prepare(self, discrete):
    normal = discrete
    context = []
    for block in self.blocks:
        context.append(block.cross.keys_values(block.norm_cross(normal)))
    return context


# file: fusion.py
# function: CrossAttentionFusion.prepare
# exercise: fusion
# kind: mutant
# why: prepared without gradients, since it runs once
def prepare(self, discrete):
    discrete = discrete.detach()
    normal = self.norm_discrete(discrete)
    context = []
    for block in self.blocks:
        context.append(block.cross.keys_values(normal))
    return context


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: right
# why: one queue of queries for all, given out by the first block
def prepare(self, discrete):
    codes = self.norm_discrete(discrete)
    queries = self.queries
    for block in self.blocks:
        keys_values = block.cross.keys_values(codes)
        queries = block(queries, keys_values)
    queries = self.norm(queries)
    return self.out(queries)


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: right
# why: the steps of a block written out
def prepare(self, discrete):
    codes, x = self.norm_discrete(discrete), self.queries.repeat(len(discrete), 1, 1)
    contexts = [block.cross.keys_values(codes) for block in self.blocks]
    for block, context in zip(self.blocks, contexts):
        x = x + block.self_attention(x)
        x = x + block.cross(block.norm_cross(x), context)
        x = x + block.mlp(block.norm_mlp(x))
    return self.out(self.norm(x))


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: right
# why: picture by picture
def prepare(self, discrete):
    finished = []
    for one in self.norm_discrete(discrete).split(1):
        queries = self.queries
        for block in self.blocks:
            queries = block(queries, block.cross.keys_values(one))
        finished.append(queries)
    return self.out(self.norm(torch.cat(finished)))


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: mutant
# why: the codes are not normalised
def prepare(self, discrete):
    codes = discrete
    queries = self.queries
    for block in self.blocks:
        keys_values = block.cross.keys_values(codes)
        queries = block(queries, keys_values)
    queries = self.norm(queries)
    return self.out(queries)


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: mutant
# why: the finished queries are not projected
def prepare(self, discrete):
    codes = self.norm_discrete(discrete)
    queries = self.queries
    for block in self.blocks:
        keys_values = block.cross.keys_values(codes)
        queries = block(queries, keys_values)
    queries = self.norm(queries)
    return queries


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: mutant
# why: every block starts from the learned queries again
def prepare(self, discrete):
    codes = self.norm_discrete(discrete)
    queries = self.queries
    for block in self.blocks:
        keys_values = block.cross.keys_values(codes)
        queries = block(self.queries, keys_values)
    queries = self.norm(queries)
    return self.out(queries)


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: mutant
# why: normalised once more for each block
def prepare(self, discrete):
    codes = self.norm_discrete(discrete)
    queries = self.queries
    for block in self.blocks:
        keys_values = block.cross.keys_values(codes)
        codes = self.norm_discrete(codes)
        queries = block(queries, keys_values)
    queries = self.norm(queries)
    return self.out(queries)


# file: fusion.py
# function: QFormerFusion.prepare
# exercise: fusion
# kind: mutant
# why: only the first block runs
def prepare(self, discrete):
    codes = self.norm_discrete(discrete)
    queries = self.queries
    for block in self.blocks[:1]:
        keys_values = block.cross.keys_values(codes)
        queries = block(queries, keys_values)
    queries = self.norm(queries)
    return self.out(queries)


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: right
# why: zeros in front by cat
def prepare(self, discrete):
    mapped = self.out(self.norm_discrete(discrete))
    slots = self.length - mapped.shape[1]
    zeros = mapped.new_zeros(len(mapped), slots, mapped.shape[2])
    return torch.cat([zeros, mapped], dim=1)


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: right
# why: written into a tensor of zeros
def prepare(self, discrete):
    mapped = F.linear(self.norm_discrete(discrete), self.out.weight, self.out.bias)
    context = torch.zeros(len(mapped), self.length, mapped.shape[-1], dtype=mapped.dtype, device=mapped.device)
    context[:, -mapped.shape[1]:] = mapped
    return context


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: right
# why: a constant pad of the transposed
def prepare(self, discrete):
    mapped = self.out(self.norm_discrete(discrete)).transpose(1, 2)
    return nn.ConstantPad1d((self.length - discrete.size(1), 0), 0.0)(mapped).transpose(1, 2)


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: mutant
# why: the zeros come after the codes
def prepare(self, discrete):
    mapped = self.out(self.norm_discrete(discrete))
    slots = self.length - mapped.shape[1]
    zeros = mapped.new_zeros(len(mapped), slots, mapped.shape[2])
    return torch.cat([mapped, zeros], dim=1)


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: mutant
# why: mapped, then normalised
def prepare(self, discrete):
    mapped = self.norm_discrete(self.out(discrete))
    slots = self.length - mapped.shape[1]
    zeros = mapped.new_zeros(len(mapped), slots, mapped.shape[2])
    return torch.cat([zeros, mapped], dim=1)


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: mutant
# why: mapped after the zeros are put in front: the bias gets into the buffer slots
def prepare(self, discrete):
    mapped = self.norm_discrete(discrete)
    slots = self.length - mapped.shape[1]
    zeros = mapped.new_zeros(len(mapped), slots, mapped.shape[2])
    return self.out(torch.cat([zeros, mapped], dim=1))


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: mutant
# why: the code itself is added to what is mapped: a fresh module would not be the identity
def prepare(self, discrete):
    mapped = discrete + self.out(self.norm_discrete(discrete))
    slots = self.length - mapped.shape[1]
    zeros = mapped.new_zeros(len(mapped), slots, mapped.shape[2])
    return torch.cat([zeros, mapped], dim=1)


# file: fusion.py
# function: AlignedFusion.prepare
# exercise: fusion
# kind: mutant
# why: the buffer slots repeat the first code
def prepare(self, discrete):
    mapped = self.out(self.norm_discrete(discrete))
    slots = self.length - mapped.shape[1]
    zeros = mapped[:, :1].expand(-1, slots, -1)
    return torch.cat([zeros, mapped], dim=1)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: right
# why: where, then the positions of the places
def prepare(self, codes):
    if self.config.fusion == "none":
        return None
    if codes is None:
        raise ValueError(f"fusion {self.config.fusion!r}: codes are missing")
    there = (codes >= 0).unsqueeze(-1)
    embedded = self.code_embedding(codes.clamp(min=0))
    embedded = torch.where(there, embedded, self.null_code)
    positions = self.decoder_pos_embed_learned[:, self.config.buffer_size:]
    return self.fusion.prepare(embedded + positions)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: right
# why: the null code as one more row of the table
def prepare(self, codes):
    if self.config.fusion != "none" and codes is None:
        raise ValueError("this model needs codes")
    if self.config.fusion == "none":
        return None
    table = torch.cat([self.code_embedding.weight, self.null_code[0]])
    discrete = F.embedding(codes.where(codes != -1, len(table) - 1), table)
    return self.fusion.prepare(discrete + self.decoder_pos_embed_learned[:, -codes.shape[1]:])


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: right
# why: only the codes that are there are looked up
def prepare(self, codes):
    if self.config.fusion == "none":
        return None
    if codes is None:
        raise ValueError("no codes")
    discrete = self.null_code.repeat(*codes.shape, 1)
    known = codes > -1
    discrete[known] = self.code_embedding(codes[known])
    _, positions = self.decoder_pos_embed_learned.split([self.config.buffer_size, codes.shape[1]], dim=1)
    return self.fusion.prepare(positions + discrete)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: mutant
# why: code 0 counts as no code
def prepare(self, codes):
    if self.config.fusion == "none":
        return None
    if codes is None:
        raise ValueError(f"fusion {self.config.fusion!r}: codes are missing")
    there = (codes > 0).unsqueeze(-1)
    embedded = self.code_embedding(codes.clamp(min=0))
    embedded = torch.where(there, embedded, self.null_code)
    positions = self.decoder_pos_embed_learned[:, self.config.buffer_size:]
    return self.fusion.prepare(embedded + positions)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: mutant
# why: a picture counts as without codes if its first is -1
def prepare(self, codes):
    if self.config.fusion == "none":
        return None
    if codes is None:
        raise ValueError(f"fusion {self.config.fusion!r}: codes are missing")
    there = (codes[:, :1] >= 0).unsqueeze(-1)
    embedded = self.code_embedding(codes.clamp(min=0))
    embedded = torch.where(there, embedded, self.null_code)
    positions = self.decoder_pos_embed_learned[:, self.config.buffer_size:]
    return self.fusion.prepare(embedded + positions)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: mutant
# why: positions of the encoder's table
def prepare(self, codes):
    if self.config.fusion == "none":
        return None
    if codes is None:
        raise ValueError(f"fusion {self.config.fusion!r}: codes are missing")
    there = (codes >= 0).unsqueeze(-1)
    embedded = self.code_embedding(codes.clamp(min=0))
    embedded = torch.where(there, embedded, self.null_code)
    positions = self.encoder_pos_embed_learned[:, self.config.buffer_size:]
    return self.fusion.prepare(embedded + positions)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: mutant
# why: raises without fusion, too
def prepare(self, codes):
    if codes is None:
        raise ValueError(f"fusion {self.config.fusion!r}: codes are missing")
    if self.config.fusion == "none":
        return None
    there = (codes >= 0).unsqueeze(-1)
    embedded = self.code_embedding(codes.clamp(min=0))
    embedded = torch.where(there, embedded, self.null_code)
    positions = self.decoder_pos_embed_learned[:, self.config.buffer_size:]
    return self.fusion.prepare(embedded + positions)


# file: d2c.py
# function: ContinuousGenerator.prepare
# exercise: fusion
# kind: mutant
# why: writes zeros into the caller's codes
def prepare(self, codes):
    if self.config.fusion == "none":
        return None
    if codes is None:
        raise ValueError(f"fusion {self.config.fusion!r}: codes are missing")
    there = (codes >= 0).unsqueeze(-1)
    codes[codes < 0] = 0
    embedded = self.code_embedding(codes)
    embedded = torch.where(there, embedded, self.null_code)
    positions = self.decoder_pos_embed_learned[:, self.config.buffer_size:]
    return self.fusion.prepare(embedded + positions)
