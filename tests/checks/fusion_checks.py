"""Exercise 8: fusion."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from checking import normal, raises, same, true

TOKENS, SLOTS, PLACES = (("picture", name, "number") for name in ("token", "slot", "place"))
KINDS = ("cross", "qformer", "aligned")


def attend(cross, x, keys_values, scale=None, softmax_over=1, interleaved=False):
    """The expected cross-attention, picture by picture and head by head, in float64. The rest are mistakes."""
    keys, values = (part.double() for part in keys_values)
    heads, pictures = cross.heads, []
    for b in range(len(keys)):
        q = F.linear(x[b if len(x) > 1 else 0].double(), cross.q.weight.double(), cross.q.bias.double())   # (T,D)
        parts = [q[:, h::heads] if interleaved else q.chunk(heads, 1)[h] for h in range(heads)]
        scores = [part @ keys[b, h].T * (scale or part.shape[1] ** -0.5) for h, part in enumerate(parts)]  # (T,N)
        mixed = [score.softmax(softmax_over) @ values[b, h] for h, score in enumerate(scores)]
        mixed = torch.stack(mixed, 2).flatten(1) if interleaved else torch.cat(mixed, 1)                   # (T,D)
        pictures.append(F.linear(mixed, cross.proj.weight.double(), cross.proj.bias.double()))
    return torch.stack(pictures).to(x.dtype)


def keys_values(cross, rows):
    """rows (B,N,D) -> keys and values (B,heads,N,D/heads); a head is the next D/heads numbers."""
    both = F.linear(rows, cross.kv.weight, cross.kv.bias)
    return tuple(torch.stack(part.chunk(cross.heads, 2), 1) for part in both.chunk(2, 2))


def fusion(s, kind, depth=3, dropout=0.3, length=11, own_attention=True):
    """A module of width 24 with all parameters drawn, each block's cross-attention the expected one unless
    own_attention is False."""
    module = s.adapters.draw_parameters(s.fusion.make_fusion(kind, 24, 3, length, depth, dropout), 0)
    if own_attention and kind != "aligned":
        for block in module.blocks:
            def forward(x, given, cross=block.cross):
                return attend(cross, x, given)
            block.cross.forward = forward
    return module


def finished_queries(module, discrete, order=None, first_only=False, bare=False):
    """What the Q-Former's `prepare` should give. The rest are mistakes: the blocks in another order, keys and values
    always those of the first block, codes that are not normalised."""
    x = module.queries.expand(len(discrete), -1, -1)
    rows = discrete if bare else module.norm_discrete(discrete)
    for block in [module.blocks[i] for i in order or range(len(module.blocks))]:
        x = x + block.self_attention(x)
        source = module.blocks[0] if first_only else block
        x = x + attend(block.cross, block.norm_cross(x), keys_values(source.cross, rows))
        x = x + block.mlp(block.norm_mlp(x))
    return module.out(module.norm(x))


class Spy(nn.Module):
    """Stands for a fusion module: shows what its `prepare` is given."""
    def prepare(self, discrete):
        return 2 * discrete + 1


def generator(s, kind="cross", spy=True):
    """A small stage 2 on a 2 x 3 grid, all parameters drawn."""
    config = s.d2c.ContinuousConfig(channels=5, num_classes=7, grid=(2, 3), width=24, encoder_depth=1, decoder_depth=1,
                                    num_heads=3, buffer_size=4, head_depth=1, head_width=16, fusion=kind,
                                    codebook_size=9)
    m = s.adapters.draw_parameters(s.d2c.ContinuousGenerator(config), 1)
    if spy and kind != "none":
        m.fusion = Spy()
    return m


def discrete_of(m, codes, skip=4, table=None, positions_at_null=True, null=None):
    """Embedded codes with positions, place by place. The rest are mistakes."""
    table = (m.decoder_pos_embed_learned if table is None else table)[0]
    null = m.null_code[0, 0] if null is None else null

    def one(code, place):
        if code < 0 and not positions_at_null:
            return null
        return (m.code_embedding.weight[code] if code >= 0 else null) + table[skip + place]
    return torch.stack([torch.stack([one(code, place) for place, code in enumerate(row)]) for row in codes])


CODES = torch.tensor([[3, 0, 8, 8, 1, 5], [7, 2, 0, 4, 6, 1], [0, 0, 5, 1, 2, 3]])


# Checks --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def attention_head_by_head(s):
    """CrossAttention is softmax(q k^T / sqrt(D/heads)) v in each head, then the projection"""
    cross = s.adapters.draw_parameters(s.fusion.CrossAttention(24, 3, 0.3), 0)
    x, keys, values = normal(2, 4, 24, seed=1), 2 * normal(2, 3, 7, 8, seed=2), normal(2, 3, 7, 8, seed=3)
    without_q, without_proj = copy.deepcopy(cross), copy.deepcopy(cross)
    for layer in (without_q.q, without_proj.proj):
        layer.weight.copy_(torch.eye(24)), layer.bias.zero_()

    def causal():
        parts = [(keys[:, :, :i + 1], values[:, :, :i + 1]) for i in range(4)]
        return torch.cat([attend(cross, x[:, i:i + 1], part) for i, part in enumerate(parts)], 1)
    expected = attend(cross, x, (keys, values))
    kept = keys.clone(), values.clone()
    same(cross(x, (keys, values)), expected, "CrossAttention.forward", TOKENS, wrong={
        "equals the result without the 1/sqrt(D/heads)": lambda: attend(cross, x, (keys, values), scale=1),
        "equals the result with 1/sqrt(D) for 1/sqrt(D/heads)": lambda: attend(cross, x, (keys, values), 24 ** -0.5),
        "equals the result with 1/(D/heads) for its root": lambda: attend(cross, x, (keys, values), scale=1 / 8),
        "equals the result with * sqrt(D/heads), should be / sqrt(D/heads)":
            lambda: attend(cross, x, (keys, values), scale=8 ** 0.5),
        "keys and values are exchanged": lambda: attend(cross, x, (values, keys)),
        "keys serve as values": lambda: attend(cross, x, (keys, keys)),
        "values serve as keys": lambda: attend(cross, x, (values, values)),
        "the softmax runs over the sequence, should run over the codes":
            lambda: attend(cross, x, (keys, values), softmax_over=0),
        "heads are cut as every third number, should be consecutive":
            lambda: attend(cross, x, (keys, values), interleaved=True),
        "equals the result without proj": lambda: attend(without_proj, x, (keys, values)),
        "equals the result without q": lambda: attend(without_q, x, (keys, values)),
        "the input is added: the block does that": lambda: x + expected,
        "the first picture's codes serve all":
            lambda: attend(cross, x, (keys[:1].expand_as(keys), values[:1].expand_as(values))),
        "is causal: token i sees codes 0 .. i only, should see all": causal})
    true(torch.equal(keys, kept[0]) and torch.equal(values, kept[1]), "CrossAttention.forward changes keys or values")
    big = 60 * keys
    same(cross(x, (big, values)), attend(cross, x, (big, values)), "CrossAttention.forward with big keys", TOKENS,
         atol=1e-3)
    one = s.adapters.draw_parameters(s.fusion.CrossAttention(24, 1), 0)
    single = tuple(normal(2, 1, 7, 24, seed=seed) for seed in (2, 3))
    same(one(x, single), attend(one, x, single), "CrossAttention.forward with one head", TOKENS)


def one_sequence_for_all(s):
    """CrossAttention takes one sequence (1,T,D) for all pictures, and one picture alone, with gradients"""
    cross = s.adapters.draw_parameters(s.fusion.CrossAttention(24, 3, 0.3), 0)
    x = normal(1, 4, 24, seed=1).requires_grad_()
    given = [normal(3, 3, 7, 8, seed=seed).requires_grad_() for seed in (2, 3)]
    found, expected = cross(x, given), attend(cross, x, given)
    same(found, expected, "CrossAttention.forward of one sequence for 3 pictures", TOKENS, wrong={
        "all pictures get the first one's result": lambda: expected[:1].expand(3, -1, -1)})
    same(cross(x, [part[1:2] for part in given]), expected[1:2], "CrossAttention.forward of one picture", TOKENS)
    leaves = [x, *given, *cross.q.parameters(), *cross.proj.parameters()]
    weights = normal(*expected.shape, seed=5)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    true(found.requires_grad, "CrossAttention.forward: has no gradient")
    grads = torch.autograd.grad((found * weights).sum(), leaves, allow_unused=True)
    names = "x", "keys", "values", "q.weight", "q.bias", "proj.weight", "proj.bias"
    for name, grad, right in zip(names, grads, wanted):
        same(grad, right, f"CrossAttention.forward: the gradient at {name}", atol=1e-4, rtol=1e-3)


@torch.no_grad()
def dropout_in_training(s):
    """In training, dropout acts on the attention weights and on the result; in eval it does nothing"""
    p, what = 0.3, "CrossAttention.forward in training"
    cross = s.fusion.CrossAttention(24, 3, p)
    cross.proj.weight.copy_(torch.eye(24)), cross.proj.bias.zero_()
    x, given = normal(2, 300, 24, seed=1), (normal(2, 3, 1, 8, seed=2), 1 + normal(2, 3, 1, 8, seed=3).abs())
    # One code has all of the attention: the result is its value, or zero where one of the two has dropped it.
    value = given[1].transpose(1, 2).flatten(2).expand(-1, 300, -1)                           # (2,300,24)
    same(cross.eval()(x, given), value, "CrossAttention.forward in eval", TOKENS)
    found = cross.train()(x, given)
    ratio = found / value
    true((found == 0).any(), f"{what}: dropout drops nothing")
    kept, heads = ratio[found != 0], (found == 0).unflatten(2, (3, 8)).all(-1)
    true(not torch.allclose(kept, torch.tensor(1 / (1 - p)), rtol=1e-3),
         f"{what}: dropout acts on the " + ("attention weights" if heads.float().mean() > 0.2 else "result")
         + f" only, should act on the " + ("result" if heads.float().mean() > 0.2 else "attention weights") + ", too")
    same(kept, torch.full_like(kept, (1 - p) ** -2), f"{what}: what is left, as a multiple of what it is in eval")
    same((found == 0).float().mean(), torch.tensor(1 - (1 - p) ** 2), f"{what}: the share of zeros", atol=0.06, rtol=0)
    same(heads.float().mean(), torch.tensor(p), f"{what}: the share of dropped attention weights", atol=0.07, rtol=0)
    true(not torch.equal(cross(x, given), found), f"{what}: drops the same numbers every time")
    drawn = s.adapters.draw_parameters(s.fusion.CrossAttention(24, 3, p), 0).train()(x, given)
    same((drawn == 0).float().mean(), torch.tensor(p), f"{what}: the share of zeros if dropout comes after proj",
         atol=0.04, rtol=0)
    still = s.adapters.draw_parameters(s.fusion.CrossAttention(24, 3, 0.0), 0).train()
    same(still(x, given), attend(still, x, given), f"{what} with dropout 0", TOKENS)


@torch.no_grad()
def keys_and_values_of_each_block(s):
    """CrossAttentionFusion.prepare gives each block its own keys and values of the normalised codes"""
    module, discrete, what = fusion(s, "cross"), 2 + 3 * normal(2, 7, 24, seed=1), "CrossAttentionFusion.prepare"
    kept = discrete.clone()
    context = module.prepare(discrete)
    true(torch.equal(discrete, kept), f"{what} changes its argument")
    first, again = ([tuple(pair) for pair in context] for _ in range(2))
    true(len(first) == 3, f"{what}: gives {len(first)} entries, should give one for each of the 3 blocks")
    true(len(again) == 3, f"{what}: the context can be read only once, but every token step reads it")
    rows = module.norm_discrete(discrete)
    for i, (block, pair) in enumerate(zip(module.blocks, first)):
        true(len(pair) == 2, f"{what}: block {i} should get two arrays, keys and values")
        for which, name in enumerate(("keys", "values")):
            same(pair[which], keys_values(block.cross, rows)[which], f"{what}: block {i}'s {name}",
                 ("picture", "head", "place", "number"), wrong={
                     "are those of codes that are not normalised": lambda: keys_values(block.cross, discrete)[which],
                     "are the other ones: keys and values are exchanged":
                         lambda: keys_values(block.cross, rows)[1 - which],
                     "are normalised twice": lambda: keys_values(block.cross, module.norm_discrete(rows))[which],
                     "are normalised by norm_cross, which belongs to the sequence":
                         lambda: keys_values(block.cross, block.norm_cross(discrete))[which],
                     **{f"are block {j}'s": lambda j=j: keys_values(module.blocks[j].cross, rows)[which]
                        for j in range(3) if j != i}})
    sequence = normal(2, 11, 24, seed=2)
    x = sequence
    for block in module.blocks:
        x = x + attend(block.cross, block.norm_cross(x), keys_values(block.cross, rows))
        x = x + block.mlp(block.norm_mlp(x))
    for time in ("first", "second"):
        same(module(sequence, context), x, f"{what}: fusion by its context, the {time} time", SLOTS)


@torch.no_grad()
def queries_through_all_blocks(s):
    """QFormerFusion.prepare sends the queries through all blocks, each with its own keys and values, and `out`"""
    module, discrete = fusion(s, "qformer"), 2 + 3 * normal(2, 7, 24, seed=1)
    kept, queries = discrete.clone(), module.queries.clone()

    def tampered(name, part=nn.Identity()):
        other = copy.deepcopy(module)
        setattr(other, name, part)
        return finished_queries(other, discrete)
    swapped = copy.deepcopy(module)
    swapped.norm, swapped.out = module.out, module.norm
    expected = finished_queries(module, discrete)
    same(module.prepare(discrete), expected, "QFormerFusion.prepare", SLOTS, wrong={
        "the codes are not normalised": lambda: finished_queries(module, discrete, bare=True),
        "is as without `norm`": lambda: tampered("norm"),
        "is as without `out`": lambda: tampered("out"),
        "`out` comes before `norm`": lambda: finished_queries(swapped, discrete),
        "all blocks get the first one's keys and values": lambda: finished_queries(module, discrete, first_only=True),
        "only the first block is passed": lambda: finished_queries(module, discrete, order=[0]),
        "only the last block is passed": lambda: finished_queries(module, discrete, order=[2]),
        "the blocks are passed in reverse": lambda: finished_queries(module, discrete, order=[2, 1, 0]),
        "no block is passed": lambda: module.out(module.norm(queries)).expand(2, -1, -1),
        "the first picture's codes serve all": lambda: expected[:1].expand(2, -1, -1),
        "the queries are added once more": lambda: expected + queries})
    true(torch.equal(discrete, kept) and torch.equal(module.queries, queries),
         "QFormerFusion.prepare changes its argument or the queries")
    same(module.prepare(discrete[1:]), expected[1:], "QFormerFusion.prepare of one picture", SLOTS)
    small = fusion(s, "qformer", depth=1, length=8)
    same(small.prepare(discrete), finished_queries(small, discrete), "QFormerFusion.prepare with one block", SLOTS)


@torch.no_grad()
def each_code_in_its_slot(s):
    """AlignedFusion.prepare normalises and maps each code, with zeros at the S buffer slots in front"""
    discrete = 2 + 3 * normal(2, 7, 24, seed=1)
    for length in (11, 8, 7):
        module = fusion(s, "aligned", length=length)
        S, mapped = length - 7, module.out(module.norm_discrete(discrete))
        front = torch.zeros(2, S, 24)
        expected = torch.cat([front, mapped], 1)
        same(module.prepare(discrete), expected, f"AlignedFusion.prepare with S = {S}", SLOTS, wrong={
            "the buffer slots come last, should come first": lambda: torch.cat([mapped, front], 1),
            "the buffer slots hold the bias of `out`, should hold zero":
                lambda: torch.cat([front + module.out.bias, mapped], 1),
            "the buffer slots hold what `out` makes of a normalised zero":
                lambda: torch.cat([module.out(module.norm_discrete(front)), mapped], 1),
            "the codes are not normalised": lambda: torch.cat([front, module.out(discrete)], 1),
            "is as without `out`": lambda: torch.cat([front, module.norm_discrete(discrete)], 1),
            "`out` comes before the norm": lambda: torch.cat([front, module.norm_discrete(module.out(discrete))], 1),
            "the codes themselves are added": lambda: torch.cat([front, mapped + discrete], 1)})


@torch.no_grad()
def codes_with_positions(s):
    """prepare embeds the codes and adds the decoder's positions of their places, which follow the buffer slots"""
    m, codes = generator(s), CODES.clone()
    found, encoder_table = m.prepare(codes), m.encoder_pos_embed_learned
    places = m.decoder_pos_embed_learned[:, 4:]
    same(found, 2 * discrete_of(m, CODES) + 1, "prepare: what fusion.prepare gives", PLACES, wrong={
        "is what fusion.prepare is given: that was not called": lambda: discrete_of(m, CODES),
        "the positions are those of the first slots (buffer), not of the places":
            lambda: 2 * discrete_of(m, CODES, skip=0) + 1,
        "the positions are the encoder's": lambda: 2 * discrete_of(m, CODES, table=encoder_table) + 1,
        "the positions are diffusion_pos_embed_learned":
            lambda: 2 * discrete_of(m, CODES, skip=0, table=m.diffusion_pos_embed_learned) + 1,
        "no positions are added": lambda: 2 * (discrete_of(m, CODES) - places) + 1,
        "the positions are added twice": lambda: 2 * (discrete_of(m, CODES) + places) + 1,
        "positions are added after fusion.prepare": lambda: 2 * (discrete_of(m, CODES) - places) + 1 + places,
        "code 0 is taken as no code": lambda: 2 * discrete_of(m, CODES.where(CODES > 0, -1)) + 1,
        "the first picture's codes serve all": lambda: 2 * discrete_of(m, CODES[:1].expand(3, -1)) + 1})
    true(torch.equal(codes, CODES), "prepare changes the codes")


@torch.no_grad()
def missing_codes(s):
    """prepare gives -1 the null code and its place's position: everywhere, in some pictures, in some places"""
    m = generator(s)
    some, place = CODES.clone(), CODES.clone()
    some[1], place[0, 2], place[1, 0], place[1, 5] = -1, -1, -1, -1
    last = m.code_embedding.weight[-1]
    for name, codes in (("of -1 alone", 0 * CODES - 1), ("with one picture of -1", some), ("with -1 in places", place)):
        kept, whole = codes.clone(), (codes < 0).any(1, keepdim=True)

        def expected(codes=kept, **mistake):
            return 2 * discrete_of(m, codes, **mistake) + 1
        same(m.prepare(codes), expected(), f"prepare of codes {name}", PLACES, wrong={
            "-1 is taken as code 0": lambda: expected(kept.clamp(min=0)),
            "-1 is taken as the last code": lambda: expected(null=last),
            "-1 gives zeros, not null_code": lambda: expected(null=0 * last),
            "null_code gets no position": lambda: expected(positions_at_null=False),
            "code 0 is taken as no code, too": lambda: expected(kept.where(kept > 0, -1)),
            "one -1 makes a picture's other codes null, too": lambda: expected(kept.masked_fill(whole, -1)),
            "one -1 makes all pictures' codes null": lambda: expected(0 * kept - 1),
            "only pictures whose codes are all -1 get the null code":
                lambda: expected(kept.where((kept < 0).all(1, keepdim=True), kept.clamp(min=0)))})
        true(torch.equal(codes, kept), "prepare changes the codes")


def codes_needed_or_not(s):
    """prepare gives None without fusion, whatever the codes, and raises ValueError if fusion gets no codes"""
    for codes in (None, CODES):
        true(generator(s, "none").prepare(codes) is None, f"prepare with fusion 'none' and codes "
             f"{'None' if codes is None else 'given'}: should be None")
    for kind in KINDS:
        m = generator(s, kind)
        raises(ValueError, lambda: m.prepare(None), f"prepare(None) with fusion {kind!r}")


def fresh_changes_nothing_and_learns(s):
    """A fresh module changes nothing, bit for bit, and one step along its gradient lets the codes in"""
    for kind in KINDS:
        torch.manual_seed(1)
        module = s.fusion.make_fusion(kind, 24, 3, 11, 2).eval()
        if kind == "qformer":
            module.queries.data = normal(1, 11, 24, seed=6)
        sequence, discrete, target = (normal(2, n, 24, seed=n) for n in (11, 7, 12))
        found = module(sequence, module.prepare(discrete))
        true(found.shape == sequence.shape, f"{kind}: a sequence {tuple(sequence.shape)} becomes {tuple(found.shape)}")
        true(torch.equal(found, sequence), f"{kind}: a fresh module changes the sequence")
        true(found.requires_grad, f"{kind}: a fresh module has no gradient")
        ((found - target[:, :11]) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0 if parameter.grad is None else parameter.grad
            one, other = (module(sequence, module.prepare(x)) for x in (discrete, discrete.roll(1, 2)))
        true((one - sequence).abs().max() > 1e-3, f"{kind}: a step along the gradient changes nothing")
        true((one - other).abs().amax((1, 2)).min() > 1e-5, f"{kind}: after a step along the gradient the codes still "
             "do not count")


@torch.no_grad()
def who_finds_whom(s):
    """Codes moved with their positions change nothing in cross and qformer, and move with their slots in aligned"""
    order = torch.tensor([4, 0, 6, 1, 5, 2, 3])
    sequence, discrete = normal(2, 11, 24, seed=1), normal(2, 7, 24, seed=2)
    for kind in KINDS:
        module = fusion(s, kind, depth=2, own_attention=False)
        context = module.prepare(discrete)
        before = module(sequence, context)
        moved = module(sequence, module.prepare(discrete[:, order]))
        expected = before
        if kind == "aligned":
            expected = sequence + torch.cat([(before - sequence)[:, :4], (before - sequence)[:, 4:][:, order]], 1)
        same(moved, expected, f"{kind}: the sequence after the codes were moved with their positions", SLOTS, atol=1e-4)
        same(module(sequence, context), before, f"{kind}: the sequence, by the same context once more", SLOTS)
        alone = module(sequence[1:], module.prepare(discrete[1:]))
        same(alone, before[1:], f"{kind}: the second picture alone", SLOTS, atol=1e-4)


def gradients(s):
    """Gradients reach the codes, the null code, the positions, the queries and all layers that see the codes"""
    codes = CODES.clone()
    codes[1, 2], codes[2] = -1, -1
    for kind in (*KINDS, "spy"):
        m = generator(s, "cross" if kind == "spy" else kind, spy=kind == "spy")
        if kind == "spy":
            weights = normal(3, 6, 24, seed=7)
            (discrete_of(m, codes) * 2 * weights).sum().backward()
            expected = {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}
            m.zero_grad()
            found = m.prepare(codes)
            true(found.requires_grad, "prepare: has no gradient")
            (found * weights).sum().backward()
            grads = dict(m.named_parameters())
            for name, right in expected.items():
                true(grads[name].grad is not None, f"prepare: no gradient reaches {name}")
                same(grads[name].grad, right, f"prepare: the gradient at {name}")
            continue
        sequence = normal(3, 10, 24, seed=8)
        (m.fusion(sequence, m.prepare(codes)) * normal(3, 10, 24, seed=9)).sum().backward()
        for name, parameter in m.named_parameters():
            if name.startswith(("fusion.", "code_embedding.", "null_code", "decoder_pos_embed_learned")):
                true(parameter.grad is not None and parameter.grad.any(), f"{kind}: no gradient reaches {name}")
    module, leaf = fusion(s, "qformer"), normal(2, 7, 24, seed=1).requires_grad_()
    weights = normal(2, 11, 24, seed=4)
    leaves = [module.queries, leaf, module.blocks[0].cross.kv.weight, module.norm_discrete.weight]
    wanted = torch.autograd.grad((finished_queries(module, leaf) * weights).sum(), leaves)
    grads = torch.autograd.grad((module.prepare(leaf) * weights).sum(), leaves, allow_unused=True)
    for name, grad, right in zip(("queries", "codes", "keys and values", "norm_discrete"), grads, wanted):
        same(grad, right, f"QFormerFusion.prepare: the gradient at the {name}", rtol=1e-3,
             atol=1e-4 * float(right.abs().max()))


CHECKS = [(2, attention_head_by_head), (1, one_sequence_for_all), (1, dropout_in_training),
          (2, keys_and_values_of_each_block), (2, queries_through_all_blocks), (1, each_code_in_its_slot),
          (2, codes_with_positions), (1, missing_codes), (1, codes_needed_or_not),
          (1, fresh_changes_nothing_and_learns), (1, who_finds_whom), (1, gradients)]
