"""Exercise 3: causal attention and its cache."""
import copy

import torch

from checking import golden, normal, same, seeded, shapes, true

OUT, LOGITS = ("picture", "token", "number"), ("picture", "place", "code")
CACHE = ("picture", "head", "slot", "number")


def small_model(s, grid=(2, 3), depth=2, heads=3, **changes):
    """A small stage 1 with every weight drawn at random."""
    config = s.d2c.DiscreteConfig(codebook_size=11, num_classes=5, grid=grid, width=8 * heads, depth=depth,
                                  num_heads=heads, **{"dropout": 0.0, **changes})
    return s.adapters.draw_parameters(s.d2c.DiscreteGenerator(config), 1)


def some_codes(batch, number):
    return torch.randint(11, (batch, number), generator=seeded(3))


def turn(x, table):
    """x (B,T,heads,size), its neighbours as complex numbers, times the table (T,size/2,2)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(table.to(x).contiguous())[:, None]).flatten(-2)


def attend(module, x, table, before=None, mistake=""):
    """(attention's output, keys, values) in float64. before: keys and values (B,T,heads,size) of the tokens before x.
    `mistake`: one of MISTAKES."""
    wqkv, wo, x = module.wqkv.weight.double(), module.wo.weight.double(), x.double()
    parts, heads = (x @ wqkv.T), module.num_heads
    if mistake == "wqkv's output is cut as heads x (q, k, v), not as (q, k, v) x heads":
        q, k, v = parts.unflatten(2, (heads, 3, -1)).unbind(3)
    elif mistake == "each of q, k, v is cut as head_dim x heads, not as heads x head_dim":
        q, k, v = (part.unflatten(2, (-1, heads)).transpose(2, 3) for part in parts.chunk(3, -1))
    elif mistake == "q, k and v have only one head":
        q, k, v = (part[:, :, None] for part in parts.chunk(3, -1))
        table = table.repeat(1, heads, 1)
    else:
        q, k, v = parts.unflatten(2, (3, heads, -1)).unbind(2)                    # (B,T,heads,size) each
    q, k = (q, k) if mistake == "q and k are not turned" else (turn(q, table), turn(k, table))
    if mistake == "v is turned too":
        v = turn(v, table)
    if mistake == "q and k are exchanged":
        q, k = k, q
    if mistake == "v and k are exchanged":
        k, v = v, k
    if before is not None:
        k, v = (torch.cat([old, new], 1) for old, new in zip(before, (k, v)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if mistake != "there is no 1/sqrt(head_dim)":
        size = x.shape[-1] if mistake == "the scores are divided by sqrt(width), not by sqrt(head_dim)" else q.shape[-1]
        scores = scores / size ** 0.5
    late = torch.ones(scores.shape[-2:]).triu(1 + k.shape[1] - q.shape[1]).bool()
    if mistake == "a token does not see itself":
        late = torch.ones(scores.shape[-2:]).triu(k.shape[1] - q.shape[1]).bool()
        late[0, 0] = False
    if mistake == "tokens see those after them":
        late[:] = False
    weights = scores.masked_fill(late, -torch.inf).softmax(1 if mistake == "the softmax is over the heads" else -1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights.nan_to_num(), v)
    if mistake == "the heads are put together in the wrong order of axes":
        out = out.transpose(1, 2).reshape(out.shape)
    out = out.flatten(2)
    return (out if mistake == "wo is left out" else out @ wo.T), k, v


MISTAKES = ("there is no 1/sqrt(head_dim)", "the scores are divided by sqrt(width), not by sqrt(head_dim)",
            "tokens see those after them", "a token does not see itself", "q and k are not turned", "v is turned too",
            "wqkv's output is cut as heads x (q, k, v), not as (q, k, v) x heads", "q and k are exchanged",
            "each of q, k, v is cut as head_dim x heads, not as heads x head_dim", "v and k are exchanged",
            "q, k and v have only one head", "the softmax is over the heads", "wo is left out",
            "the heads are put together in the wrong order of axes")


def likely(module, x, table, before=None):
    return {f"looks as if {name}": lambda name=name: attend(module, x, table, before, name)[0].float()
            for name in MISTAKES if before is None or name != "q, k and v have only one head"}


def network(model, codes, labels, shift=0, norm=True, late=0, labels_last=False, layers=slice(None)):
    """(logits, [(keys, values) of a layer]) by our own attention, in float64. The arguments make likely mistakes."""
    model, cache = copy.deepcopy(model).double().eval(), []
    parts = [model.embed_labels(labels), model.tok_embeddings(codes[:, late:late - 1 or None])]
    x = torch.cat(parts[::-1] if labels_last else parts, 1)
    table = model.rotary[shift:][:x.shape[1]]
    for layer in model.layers[layers]:
        out, *both = attend(layer.attention, layer.attention_norm(x), table)
        cache.append(both)
        x = x + out
        x = x + layer.feed_forward(layer.ffn_norm(x))
    return model.output(model.norm(x) if norm else x).float(), cache


def likely_logits(model, codes, labels):
    return {name: lambda settings=settings: network(model, codes, labels, **settings)[0] for name, settings in {
        "the places' angles begin one too late: the table's first entry belongs to the class token": dict(shift=1),
        "the last norm is left out": dict(norm=False),
        "the codes after the class token are not code 0, code 1, ... (the last one is left out, not the first)":
            dict(late=1),
        "the class token comes last": dict(labels_last=True),
        "the last layer is left out": dict(layers=slice(-1)), "only the first layer acts": dict(layers=slice(1)),
        "the layers act in reverse order": dict(layers=slice(None, None, -1))}.items()} | {
        "the label is not used": lambda: network(model, codes, torch.full_like(labels, -1))[0]}


@torch.no_grad()
def logits_of_the_original(s):
    """The logits equal LlamaGen's, with a class and without"""
    arrays = golden("gpt_tiny")
    state = s.formula.formula_state(shapes("llamagen_gpt_tiny"))
    model = s.d2c.DiscreteGenerator.from_published(state, 4, (4, 4)).eval()
    for labels, name in ((arrays["cond"], "logits_sub"), (torch.full((3,), -1), "logits_null_sub")):
        same(model.logits(arrays["idx"], labels), arrays[name][:, :16], f"logits, labels {labels.tolist()}", LOGITS,
             atol=1e-4, wrong=likely_logits(model, arrays["idx"], labels))


@torch.no_grad()
def attention_without_a_cache(s):
    """Attention without a cache is right for any batch, number of heads and table"""
    for heads, batch, length in ((3, 2, 5), (1, 3, 4), (2, 1, 7)):
        module = small_model(s, heads=heads).layers[0].attention
        x, angles = 2 * normal(batch, length, 8 * heads, seed=1), 2 * normal(length, 4, seed=2)
        table = torch.stack([angles.cos(), angles.sin()], -1)
        before = x.clone()
        same(module(x, table), attend(module, x, table)[0].float(), f"attention, {heads} heads, x {tuple(x.shape)}",
             OUT, wrong=likely(module, x, table))
        true(torch.equal(x, before), "attention has changed its argument x")


@torch.no_grad()
def attention_with_a_cache(s):
    """One step of attention reads the slots up to its position, and no junk beyond, and writes its own"""
    module = small_model(s).layers[0].attention
    slots, sequence, angles = 6, 2 * normal(2, 6, 24, seed=1), 2 * normal(6, 4, seed=2)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    for at in (0, 3, 5):
        _, *all_before = attend(module, sequence[:, :at], table[:at])
        before = [part.transpose(1, 2).float() for part in all_before]             # (B,heads,at,size)
        junk = [3 * normal(2, 3, slots, 8, seed=5 + i) for i in range(2)]
        for part, known in zip(junk, before):
            part[:, :, :at] = known
        cache, past = tuple(part.clone() for part in junk), (torch.arange(slots) <= at)[None]
        x, here = sequence[:, at:at + 1], table[at:at + 1]
        found = module(x, here, cache, torch.tensor([at]), past)
        what = f"attention at position {at} of {slots} slots"
        wrong = likely(module, x, here, all_before) | {
            "the token sees only itself": lambda: attend(module, x, here)[0].float(),
            "looks as if all slots were read, those after the position too": lambda: attend(
                module, x, here, [torch.cat([part[:, :, :at], part[:, :, at + 1:]], 2).double().transpose(1, 2)
                                  for part in junk])[0].float()}
        out, keys, values = attend(module, x, here, all_before)
        same(found, out.float(), what, OUT, wrong=wrong)
        for name, part, old, new in zip(("keys", "values"), cache, junk, (keys, values)):
            expected, unturned = old.clone(), old.clone()
            expected[:, :, at] = new[:, at].float()
            unturned[:, :, at] = attend(module, x, here, mistake="q and k are not turned")[1][:, 0].float()
            same(part, expected, f"{name} in the cache after position {at}", CACHE, wrong={
                "nothing is written": old, "holds the key before it is turned": unturned})


@torch.no_grad()
def logits_of_a_whole_row(s):
    """The logits of a whole row are right for depth 1, 2 and 3, grids that are not square, and label -1"""
    for depth, grid, heads in ((1, (2, 3), 3), (2, (3, 2), 2), (3, (1, 5), 3)):
        model, number = small_model(s, grid, depth, heads), grid[0] * grid[1]
        codes, labels = some_codes(3, number), torch.tensor([4, -1, 0])
        given = codes.clone(), labels.clone()
        same(model.logits(codes, labels), network(model, codes, labels)[0], f"logits, depth {depth}, grid {grid}",
             LOGITS, wrong=likely_logits(model, codes, labels))
        true(torch.equal(codes, given[0]) and torch.equal(labels, given[1]), "logits has changed its arguments")


@torch.no_grad()
def logits_of_the_beginning_of_a_row(s):
    """The logits of the beginning of a row are the beginning of the row's logits"""
    model, codes, labels = small_model(s, (3, 4)), some_codes(2, 12), torch.tensor([1, 3])
    whole = network(model, codes, labels)[0]
    for number in (1, 7, 11):
        same(model.logits(codes[:, :number], labels), whole[:, :number], f"logits of the first {number} of 12 codes",
             LOGITS)


@torch.no_grad()
def nobody_sees_the_future(s):
    """A code changes the logits of the codes after it only, and of its own picture only"""
    model, codes, labels = small_model(s, (2, 4), 2), some_codes(3, 8), torch.tensor([1, -1, 3])
    before = model.logits(codes, labels)
    for j in range(8):
        other = codes.clone()
        other[1, j] = (other[1, j] + 1) % 11
        changed = (model.logits(other, labels) - before).abs().amax(-1) > 1e-6     # (picture, place)
        true(not changed[[0, 2]].any(), "another picture's code changes the logits: pictures must not see each other")
        true(not changed[1, :j + 1].any(), f"code {j} changes the logits of place {int(changed[1].int().argmax())}, "
             "which only see the codes before that place")
        true(changed[1, j + 1:].all(), f"code {j} does not change the logits of some place after it")
    changed = (model.logits(codes, torch.tensor([2, -1, 3])) - before).abs().amax(-1) > 1e-6
    true(changed[0].all(), "the label does not change the logits of all of its places")
    true(not changed[1:].any(), "another picture's label changes the logits")


def step_by_step(model, codes, labels, cache):
    """The logits (B,N,K) of decode_one at all positions in turn."""
    found, x = [], model.embed_labels(labels)
    for i in range(codes.shape[1]):
        found.append(model.decode_one(x, torch.tensor([i]), cache))
        true(found[-1].shape == (len(codes), 11), f"decode_one: has shape {tuple(found[-1].shape)}, should have "
             f"{(len(codes), 11)} (picture, code)")
        x = model.tok_embeddings(codes[:, i:i + 1])
    return torch.stack(found, 1)


@torch.no_grad()
def cached_equals_uncached(s):
    """Token by token through the cache, whatever is in its unfilled slots, gives the logits of the whole row"""
    for depth, grid, labels in ((1, (2, 3), [-1, 2]), (2, (3, 2), [1, -1, 2]), (3, (1, 5), [2])):
        model, number = small_model(s, grid, depth), grid[0] * grid[1]
        codes, labels = some_codes(len(labels), number), torch.tensor(labels)
        expected = network(model, codes, labels)[0]
        for kind in ("zeros", "junk"):
            cache = model.empty_cache(len(labels))
            if kind == "junk":
                for i, part in enumerate(part for layer in cache for part in layer):
                    part.copy_(3 * normal(*part.shape, seed=i))
            same(step_by_step(model, codes, labels, cache), expected, f"decode_one, depth {depth}, grid {grid}, "
                 f"unfilled slots hold {kind}", LOGITS, atol=2e-5, wrong=likely_logits(model, codes, labels))


@torch.no_grad()
def half_filled_cache(s):
    """decode_one goes on from a cache that is half filled, and fills the next slot of every layer"""
    model, codes, labels = small_model(s, (2, 3), 3), some_codes(2, 6), torch.tensor([4, -1])
    expected, filled = network(model, codes, labels)
    for at in (1, 3, 5):
        cache = model.empty_cache(2)
        for i, (layer, known) in enumerate(zip(cache, filled)):
            for j, (part, numbers) in enumerate(zip(layer, known)):
                part.copy_(3 * normal(*part.shape, seed=2 * i + j))
                part[:, :, :at] = numbers[:, :at].transpose(1, 2).float()
        untouched = [[part.clone() for part in layer] for layer in cache]
        x = model.tok_embeddings(codes[:, at - 1:at])
        found = model.decode_one(x, torch.tensor([at]), cache)
        wrong = {name: lambda make=make: make()[:, at] for name, make in likely_logits(model, codes, labels).items()}
        same(found, expected[:, at], f"decode_one at position {at} of 6, with a cache filled before it",
             ("picture", "code"), wrong=wrong)
        for i, (layer, known, old) in enumerate(zip(cache, filled, untouched)):
            for name, part, numbers, before in zip(("keys", "values"), layer, known, old):
                before[:, :, at] = numbers[:, at].float()
                same(part, before, f"{name} of layer {i} after decode_one at position {at}", CACHE)


@torch.no_grad()
def dropout_rests_in_eval(s):
    """Dropout changes nothing in eval mode"""
    codes, labels, x = some_codes(2, 6), torch.tensor([1, -1]), normal(2, 6, 24, seed=1)
    plain, model = small_model(s), small_model(s, dropout=0.5)
    module, table = model.layers[0].attention, model.rotary[:6]
    same(module(x, table), attend(module, x, table)[0].float(), "attention in eval mode, dropout 0.5", OUT)
    expected = network(plain, codes, labels)[0]
    same(model.logits(codes, labels), expected, "logits in eval mode, dropout 0.5", LOGITS)
    same(step_by_step(model, codes, labels, model.empty_cache(2)), expected, "decode_one in eval mode, dropout 0.5",
         LOGITS, atol=2e-5)


def dropped(found, kept, what):
    """The draws (R, ...) of a thing in training differ, and their mean is the thing itself, within 5 sigma."""
    true(found.std(0).max() > 1e-4, f"{what}: dropout does nothing in training")
    off = (found.mean(0) - kept).abs() / (found.std(0) / len(found) ** 0.5 + 1e-4)
    true(off.max() < 5, f"{what}: dropout in training changes the mean (are the kept numbers divided by 1 - dropout?)")


@torch.no_grad()
def dropout_acts_on_attention(s):
    """In training, dropout acts on attention and keeps the mean"""
    module = small_model(s, dropout=0.3).layers[0].attention.train()
    x, angles = normal(1, 4, 24, seed=1), normal(4, 4, seed=2)
    table = torch.stack([angles.cos(), angles.sin()], -1)
    many = module(x.expand(4000, 4, 24), table)
    dropped(many, attend(module, x, table)[0].float()[0], "attention")
    module.dropout = 0.0
    same(module(x, table), attend(module, x, table)[0].float(), "attention in training, dropout 0", OUT)


@torch.no_grad()
def dropout_acts_on_embeddings(s):
    """In training, dropout acts on the embedded class and codes and keeps the mean"""
    model = small_model(s, dropout=0.3).train()
    model.layers, model.norm, model.output = torch.nn.ModuleList(), torch.nn.Identity(), torch.nn.Linear(24, 24, False)
    model.output.weight.copy_(torch.eye(24))
    codes, labels = some_codes(1, 6), torch.tensor([2])
    found = model.logits(codes.expand(1500, 6), labels.expand(1500))  # what the layers would see
    kept = torch.cat([model.embed_labels(labels), model.tok_embeddings(codes[:, :-1])], 1)
    true(found.shape == (1500, 6, 24), "logits: without layers, norm and output, not the class and 5 codes come out")
    dropped(found, kept[0], "what the first layer sees")
    model = small_model(s).train()
    same(model.logits(codes, labels), network(model, codes, labels)[0], "logits in training, dropout 0", LOGITS)


def everything_learns(s):
    """The loss's gradient reaches every weight, and is that of the same network in plain arithmetic"""
    model = small_model(s, depth=2)
    codes, labels, weight = some_codes(3, 6), torch.tensor([0, -1, 3]), normal(3, 6, 11, seed=4)
    logits = model.logits(codes, labels)
    true(logits.requires_grad, "the logits have no gradient")
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((logits * weight).sum(), list(parameters.values()), allow_unused=True)
    twin = copy.deepcopy(model).double()
    x = torch.cat([twin.embed_labels(labels), twin.tok_embeddings(codes[:, :-1])], 1)
    for layer in twin.layers:
        x = x + attend(layer.attention, layer.attention_norm(x), twin.rotary[:6])[0]
        x = x + layer.feed_forward(layer.ffn_norm(x))
    total = (twin.output(twin.norm(x)) * weight).sum()
    for (name, _), one, other in zip(parameters.items(), found, torch.autograd.grad(total, list(twin.parameters()))):
        true(one is not None, f"no gradient reaches {name}")
        same(one, other.float(), f"gradient at {name}", atol=1e-4, rtol=1e-3)


CHECKS = [(2, logits_of_the_original), (3, attention_without_a_cache), (2, attention_with_a_cache),
          (2, logits_of_a_whole_row), (1, logits_of_the_beginning_of_a_row), (2, nobody_sees_the_future),
          (3, cached_equals_uncached), (2, half_filled_cache), (1, dropout_rests_in_eval),
          (1, dropout_acts_on_attention), (1, dropout_acts_on_embeddings), (1, everything_learns)]
