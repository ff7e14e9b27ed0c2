# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: right
# why: einsum, softmax and a mask; three chunks
def forward(self, x, table, cache=None, position=None, past=None):
    batch, length, width = x.shape
    q, k, v = (part.view(batch, length, self.num_heads, -1).permute(0, 2, 1, 3) for part in self.wqkv(x).chunk(3, -1))
    q, k = rotate(q, table), rotate(k, table)
    if cache is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    else:
        cache[0][:, :, position], cache[1][:, :, position] = k.to(cache[0].dtype), v.to(cache[1].dtype)
        (k, v), allowed = cache, past
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    out = torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(batch, length, width)
    return F.dropout(self.wo(out), p=self.dropout, training=self.training)


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: right
# why: three products with parts of the weight, an additive mask
def forward(self, x, table, cache=None, position=None, past=None):
    q, k, v = (F.linear(x, weight).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
               for weight in self.wqkv.weight.chunk(3))
    q, k = rotate(q, table), rotate(k, table)
    if cache is None:
        bias = torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device, dtype=q.dtype).triu(1)
    else:
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        k, v = cache
        bias = torch.zeros(past.shape, device=x.device, dtype=q.dtype).masked_fill(past.logical_not(), -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return F.dropout(self.wo(out.transpose(1, 2).reshape(x.shape)), self.dropout, self.training)


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: right
# why: heads folded into the batch, queries scaled beforehand
def forward(self, x, table, cache=None, position=None, past=None):
    batch, length, width = x.shape
    size = width // self.num_heads
    qkv = self.wqkv(x).view(batch, length, 3, self.num_heads, size).permute(2, 0, 3, 1, 4)
    q, k, v = rotate(qkv[0], table) * size ** -0.5, rotate(qkv[1], table), qkv[2]
    if cache is not None:
        cache[0].scatter_(2, position[:, None].expand(*k.shape), k)
        cache[1].scatter_(2, position[:, None].expand(*v.shape), v)
        k, v = cache
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    if cache is None:
        number = torch.arange(length, device=x.device)
        past = number[None] <= number[:, None]
    weights = torch.where(past, scores, torch.finfo(scores.dtype).min).softmax(-1)
    out = torch.bmm(weights, v.flatten(0, 1)).view(batch, self.num_heads, length, size)
    out = sum(F.linear(out[:, i], self.wo.weight[:, i * size:(i + 1) * size]) for i in range(self.num_heads))
    return F.dropout(out, self.dropout, self.training)


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: mutant
# why: wqkv read as heads x (q, k, v) x head_dim
def forward(self, x, table, cache=None, position=None, past=None):
    q, k, v = self.wqkv(x).unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    q, k = rotate(q, table), rotate(k, table)
    if cache is not None:
        k, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=past, is_causal=cache is None)
    return F.dropout(self.wo(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: mutant
# why: reads all slots of the cache
def forward(self, x, table, cache=None, position=None, past=None):
    qkv = self.wqkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
    q, k, v = qkv.chunk(3, dim=1)
    q, k = rotate(q, table), rotate(k, table)
    if cache is not None:
        k, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
    x = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
    return F.dropout(self.wo(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: mutant
# why: puts keys into the cache before they are turned
def forward(self, x, table, cache=None, position=None, past=None):
    qkv = self.wqkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
    q, k, v = qkv.chunk(3, dim=1)
    q, turned = rotate(q, table), rotate(k, table)
    if cache is not None:
        turned, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
    x = F.scaled_dot_product_attention(q, turned, v, attn_mask=past, is_causal=cache is None)
    return F.dropout(self.wo(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: mutant
# why: dropout on the attention weights outside of training, too
def forward(self, x, table, cache=None, position=None, past=None):
    qkv = self.wqkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
    q, k, v = qkv.chunk(3, dim=1)
    q, k = rotate(q, table), rotate(k, table)
    if cache is not None:
        k, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
    x = F.scaled_dot_product_attention(q, k, v, past, self.dropout, cache is None)
    return self.wo(x.transpose(1, 2).flatten(2))


# file: d2c.py
# function: CausalAttention.forward
# exercise: attention
# kind: mutant
# why: masks by zeros after the softmax and does not renormalise
def forward(self, x, table, cache=None, position=None, past=None):
    qkv = self.wqkv(x).unflatten(2, (3 * self.num_heads, -1)).transpose(1, 2)
    q, k, v = qkv.chunk(3, dim=1)
    q, k = rotate(q, table), rotate(k, table)
    if cache is not None:
        k, v = cache[0].index_copy_(2, position, k), cache[1].index_copy_(2, position, v)
    else:
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) * past
    return F.dropout(self.wo((weights @ v).transpose(1, 2).flatten(2)), self.dropout, self.training)


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: right
# why: all 1 + N tokens go through, the last output is left out
def logits(self, codes, labels):
    tokens = torch.cat([self.embed_labels(labels), self.tok_embeddings(codes)], dim=1)
    h = F.dropout(tokens, p=self.config.dropout, training=self.training)
    table = self.rotary[:tokens.shape[1]]
    for block in self.layers:
        h = block(h, table)
    return self.output(self.norm(h[:, :-1]))


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: right
# why: the sequence rolled by one, its first token overwritten by the class
def logits(self, codes, labels):
    number = codes.shape[1]
    x = self.tok_embeddings(codes).roll(1, dims=1)
    first = torch.arange(number, device=codes.device)[None, :, None] == 0
    x = torch.where(first, self.embed_labels(labels), x)
    x = F.dropout(x, self.config.dropout, self.training)
    for i in range(len(self.layers)):
        x = self.layers[i](x, self.rotary[:number])
    return F.linear(self.norm(x), self.output.weight)


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: right
# why: picture by picture, one table of all embeddings
def logits(self, codes, labels):
    table = torch.cat([self.tok_embeddings.weight, self.cls_embedding["embedding_table"].weight])
    rows = []
    for code, label in zip(codes, labels):
        first = self.config.codebook_size + (int(label) if label >= 0 else self.config.num_classes)
        index = torch.cat([torch.tensor([first], device=codes.device), code[:-1]])
        x = F.dropout(F.embedding(index, table)[None], self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, self.rotary[:len(index)])
        rows.append(self.output(self.norm(x))[0])
    return torch.stack(rows)


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: mutant
# why: no shift: an output sees the code that it predicts
def logits(self, codes, labels):
    x = torch.cat([self.embed_labels(labels), self.tok_embeddings(codes)], 1)
    x = F.dropout(x, self.config.dropout, self.training)
    for layer in self.layers:
        x = layer(x, self.rotary[:x.shape[1]])
    return self.output(self.norm(x))[:, 1:]


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: mutant
# why: no norm before the output
def logits(self, codes, labels):
    x = torch.cat([self.embed_labels(labels), self.tok_embeddings(codes[:, :-1])], 1)
    x = F.dropout(x, self.config.dropout, self.training)
    for layer in self.layers:
        x = layer(x, self.rotary[:x.shape[1]])
    return self.output(x)


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: mutant
# why: the label -1 becomes class 0
def logits(self, codes, labels):
    x = torch.cat([self.embed_labels(labels.clamp(min=0)), self.tok_embeddings(codes[:, :-1])], 1)
    x = F.dropout(x, self.config.dropout, self.training)
    for layer in self.layers:
        x = layer(x, self.rotary[:x.shape[1]])
    return self.output(self.norm(x))


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: mutant
# why: leaves out the first code, not the last
def logits(self, codes, labels):
    x = torch.cat([self.embed_labels(labels), self.tok_embeddings(codes[:, 1:])], 1)
    x = F.dropout(x, self.config.dropout, self.training)
    for layer in self.layers:
        x = layer(x, self.rotary[:x.shape[1]])
    return self.output(self.norm(x))


# file: d2c.py
# function: DiscreteGenerator.logits
# exercise: attention
# kind: mutant
# why: the class is added to every token
def logits(self, codes, labels):
    label = self.embed_labels(labels)
    x = torch.cat([torch.zeros_like(label), self.tok_embeddings(codes[:, :-1])], 1) + label
    x = F.dropout(x, self.config.dropout, self.training)
    for layer in self.layers:
        x = layer(x, self.rotary[:x.shape[1]])
    return self.output(self.norm(x))


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: right
# why: the mask filled by a slice
def decode_one(self, x, position, cache):
    number = cache[0][0].size(2)
    past = torch.zeros(1, number, dtype=torch.bool, device=x.device)
    past[:, :int(position) + 1] = True
    for i, layer in enumerate(self.layers):
        x = layer(x, self.rotary[int(position)][None], cache=cache[i], position=position, past=past)
    return self.output(self.norm(x)).squeeze(1)


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: right
# why: the mask as a row of a triangle
def decode_one(self, x, position, cache):
    number = math.prod(self.config.grid)
    triangle = torch.ones(number, number, dtype=torch.bool, device=x.device).tril()
    past, table = triangle.index_select(0, position), self.rotary.index_select(0, position)
    for layer, (keys, values) in zip(self.layers, cache):
        x = layer(x, table, (keys, values), position, past)
    return F.linear(self.norm(x[:, -1]), self.output.weight)


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: right
# why: the two halves of a block written out
def decode_one(self, x, position, cache):
    slots = torch.arange(cache[0][0].shape[2], device=x.device).unsqueeze(0)
    past = ~(slots > position)
    table = self.rotary[position]
    for block, (keys, values) in zip(self.layers, cache):
        x = x + block.attention(block.attention_norm(x), table, (keys, values), position, past)
        x = x + block.feed_forward(block.ffn_norm(x))
    return self.output(self.norm(x)).flatten(0, 1)


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: mutant
# why: the mask leaves out the token itself
def decode_one(self, x, position, cache):
    past = (torch.arange(cache[0][0].shape[2], device=x.device) < position)[None]
    for layer, layer_cache in zip(self.layers, cache):
        x = layer(x, self.rotary[position], layer_cache, position, past)
    return self.output(self.norm(x))[:, 0]


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: mutant
# why: one cache for all layers (right for depth 1)
def decode_one(self, x, position, cache):
    past = (torch.arange(cache[0][0].shape[2], device=x.device) <= position)[None]
    for layer in self.layers:
        x = layer(x, self.rotary[position], cache[0], position, past)
    return self.output(self.norm(x))[:, 0]


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: mutant
# why: the first entry of the table at every position, because there is one token
def decode_one(self, x, position, cache):
    past = (torch.arange(cache[0][0].shape[2], device=x.device) <= position)[None]
    for layer, layer_cache in zip(self.layers, cache):
        x = layer(x, self.rotary[:x.shape[1]], layer_cache, position, past)
    return self.output(self.norm(x))[:, 0]


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: mutant
# why: no norm before the output
def decode_one(self, x, position, cache):
    past = (torch.arange(cache[0][0].shape[2], device=x.device) <= position)[None]
    for layer, layer_cache in zip(self.layers, cache):
        x = layer(x, self.rotary[position], layer_cache, position, past)
    return self.output(x)[:, 0]


# file: d2c.py
# function: DiscreteGenerator.decode_one
# exercise: attention
# kind: mutant
# why: keys and values share one cache
def decode_one(self, x, position, cache):
    past = (torch.arange(cache[0][0].shape[2], device=x.device) <= position)[None]
    for layer, (keys, values) in zip(self.layers, cache):
        x = layer(x, self.rotary[position], (keys, keys), position, past)
    return self.output(self.norm(x))[:, 0]
