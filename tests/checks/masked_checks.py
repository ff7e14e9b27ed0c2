"""Exercise 7: the masked autoencoder."""
import copy
import functools

import numpy as np
import torch
from torch import nn

from checking import golden, normal, same, seeded, shapes, true

TOKENS, PLACES = ("picture", "slot", "number"), ("picture", "place", "number")


class Mix(nn.Module):
    """Stands for a fusion module. What it adds depends on the slot and, not linearly, on the sequence."""
    def forward(self, sequence, context):
        true(len(sequence.shape) == 3 and sequence.shape[1:] == context.shape[1:],
             f"decode: fusion is given a sequence of shape {tuple(sequence.shape)}, should be (B,S+N,D)")
        return sequence + context * sequence.cos()


def model(s, **changes):
    """A small stage 2 on a 3 x 5 grid with all parameters drawn. Its `prepare`, which exercise 8 writes, hands on what
    it is given."""
    config = dict(channels=5, num_classes=7, grid=(3, 5), width=24, encoder_depth=2, decoder_depth=3, num_heads=3,
                  buffer_size=4, head_depth=1, head_width=20, dropout=0.1)
    m = s.adapters.draw_parameters(s.d2c.ContinuousGenerator(s.d2c.ContinuousConfig(**{**config, **changes})), 0)
    if m.config.fusion != "none":
        m.fusion = Mix()
    m.prepare = lambda codes: codes
    return m


def other(m, **parts):
    """A copy of the model with other parts."""
    m = copy.deepcopy(m)
    for name, part in parts.items():
        setattr(m, name, part if isinstance(part, nn.Module) else nn.Parameter(part.detach().clone()))
    return m


def batch(seen=6, seed=0):
    """latents (3,15,5), visible (3,seen), hidden, labels with -1 and 0; places differ between pictures, unsorted."""
    order = torch.rand(3, 15, generator=seeded(seed + 7)).argsort(1)
    return normal(3, 15, 5, seed=seed), order[:, :seen], order[:, seen:], torch.tensor([0, -1, 5])


def encoder(m, latents, visible, labels):
    """The expected `encode`, row by row."""
    slots, table, pictures = m.config.buffer_size, m.encoder_pos_embed_learned[0], []
    for b in range(len(latents)):
        label = m.class_emb.weight[labels[b]] if labels[b] >= 0 else m.fake_latent[0]
        rows = [label + table[i] for i in range(slots)]
        rows += [m.z_proj.weight @ latents[b, place] + m.z_proj.bias + table[slots + place] for place in visible[b]]
        x = m.z_proj_ln(torch.stack(rows))[None]
        for block in m.encoder_blocks:
            x = block(x)
        pictures.append(m.encoder_norm(x)[0])
    return torch.stack(pictures)


def decoder(m, encoded, visible, context=None, late=False):
    """The expected `decode`, row by row. late: fusion after the blocks, a mistake."""
    slots, places, pictures = m.config.buffer_size, m.diffusion_pos_embed_learned.shape[1], []
    for b in range(len(encoded)):
        x = m.decoder_embed(encoded[b])
        rows = list(x[:slots]) + [m.mask_token[0, 0]] * places
        for i, place in enumerate(visible[b]):
            rows[slots + place] = x[slots + i]
        x = (torch.stack(rows) + m.decoder_pos_embed_learned[0])[None]
        if context is not None and not late:
            x = m.fusion(x, context[b:b + 1])
        for block in m.decoder_blocks:
            x = block(x)
        if late:
            x = m.fusion(x, context[b:b + 1])
        pictures.append(m.decoder_norm(x)[0, slots:] + m.diffusion_pos_embed_learned[0])
    return torch.stack(pictures)


def by_hand(m):
    """A model whose trunk is the expected one, to grade `forward` alone."""
    m.encode, m.decode = functools.partial(encoder, m), functools.partial(decoder, m)
    return m


def loss(s, m, latents, visible, hidden, labels, context, t, noise, blockwise=False, everywhere=False, add=torch.mean):
    """The expected training loss, from rows (picture, hidden place, level). The rest are mistakes: levels paired with
    other places, a guess of all places, another sum."""
    z = decoder(m, encoder(m, latents, visible, labels), visible, context)
    count, net = t.shape[2], m.diffloss["net"]
    pairs = [(b, int(place)) for b in range(len(hidden)) for place in hidden[b]]
    rows = pairs * count if blockwise else [pair for pair in pairs for _ in range(count)]
    x0, c = (torch.stack([x[row] for row in rows]) for x in (latents, z))
    terms = s.d2c.diffusion_loss(net, x0, t.reshape(-1), noise.reshape(-1, noise.shape[-1]), net.cond_embed(c))
    if not m.config.guess_weight:
        return add(terms)
    if everywhere:
        pairs = [(b, place) for b in range(len(z)) for place in range(z.shape[1])]
    errors = torch.stack([(m.guess(z[pair]) - latents[pair])**2 for pair in pairs])
    return add(terms) + m.config.guess_weight * errors.mean()


def training(seen=6, levels=3):
    """What `forward` is given, of a batch: with R = 3 noise levels, and a context of the Mix for codes."""
    latents, visible, hidden, labels = batch(seen)
    t = torch.randint(1000, (3, 15 - seen, levels), generator=seeded(3))
    return latents, visible, hidden, labels, normal(3, 19, 24, seed=4), t, normal(3, 15 - seen, levels, 5, seed=5)


# Checks --------------------------------------------------------------------------------------------------------------

def pick_takes_each_pictures_rows(s):
    """pick takes each picture's own places, in their order, also from one x for all, with gradients"""
    x, places = normal(3, 7, 5, seed=1), torch.tensor([[6, 0, 3, 3], [1, 5, 2, 0], [4, 2, 6, 1]])

    def taken(rows, places):
        return torch.stack([torch.stack([rows[b % len(rows), place] for place in places[b]]) for b in range(3)])
    for name, rows in (("pick", x), ("pick of one x (1,T,D) for 3 pictures", x[:1])):
        same(s.d2c.pick(rows, places), taken(rows, places), name, PLACES, wrong={
            "takes the first picture's places for all": lambda: taken(rows, places[:1].expand(3, -1)),
            "takes the first picture's rows for all": lambda: taken(rows[:1], places),
            "puts the places into ascending order": lambda: taken(rows, places.sort(1).values)})
    same(s.d2c.pick(x, places[:, :0]), x[:, :0], "pick of no places", PLACES)
    same(s.d2c.pick(x[:, :, :1], places[:, :1]), x[torch.arange(3), places[:, 0], :1][:, None], "pick with D = P = 1")
    leaf = x.clone().requires_grad_()
    found = s.d2c.pick(leaf, places)
    true(found.requires_grad, "pick: no gradient comes back to x")
    found.sum().backward()
    counts = torch.stack([places[b].bincount(minlength=7) for b in range(3)])[..., None].expand(-1, -1, 5)
    same(leaf.grad, counts.float(), "pick: its gradient (places taken twice count twice)", PLACES)


@torch.no_grad()
def encode_row_by_row(s):
    """encode makes buffer slots and visible latents, adds positions, and passes norm, blocks and norm"""
    m, (latents, visible, _, _) = model(s), batch()
    labels, table, slots = torch.tensor([4, 1, 5]), m.encoder_pos_embed_learned, 4
    shifted, bare = torch.cat([table[:, :slots], table[:, :15]], 1), table.clone()
    bare[:, :slots] = 0
    in_a_row = torch.arange(6).expand(3, -1)
    wrong = {
        "the buffer slots come last, should come first": lambda: encoder(m, latents, visible, labels).roll(-slots, 1),
        "is as without encoder_norm": lambda: encoder(other(m, encoder_norm=nn.Identity()), latents, visible, labels),
        "is as without z_proj_ln": lambda: encoder(other(m, z_proj_ln=nn.Identity()), latents, visible, labels),
        "a visible place p has row p of the position table, not row S + p":
            lambda: encoder(other(m, encoder_pos_embed_learned=shifted), latents, visible, labels),
        "the positions are the decoder's":
            lambda: encoder(other(m, encoder_pos_embed_learned=m.decoder_pos_embed_learned), latents, visible, labels),
        "no positions are added":
            lambda: encoder(other(m, encoder_pos_embed_learned=0 * table), latents, visible, labels),
        "the buffer slots have no positions":
            lambda: encoder(other(m, encoder_pos_embed_learned=bare), latents, visible, labels),
        "the visible places are taken in ascending order, not in that of `visible`":
            lambda: encoder(m, latents, visible.sort(1).values, labels),
        "takes the first picture's places for all": lambda: encoder(m, latents, visible[:1].expand(3, -1), labels),
        "takes the first V places, whatever `visible` says": lambda: encoder(m, latents, in_a_row, labels),
        "the class is ignored": lambda: encoder(m, latents, visible, labels - 9),
        "not all blocks are passed":
            lambda: encoder(other(m, encoder_blocks=m.encoder_blocks[:1]), latents, visible, labels),
        "passes no block": lambda: encoder(other(m, encoder_blocks=m.encoder_blocks[:0]), latents, visible, labels)}
    kept = [x.clone() for x in (latents, visible, labels)]
    same(m.encode(latents, visible, labels), encoder(m, latents, visible, labels), "encode", TOKENS, wrong=wrong)
    true(all(map(torch.equal, kept, (latents, visible, labels))), "encode changes its arguments")


@torch.no_grad()
def labels_class_by_class(s):
    """encode gives label 0 its class and label -1 `fake_latent`, each in the pictures that have it"""
    m, (latents, visible, _, mixed) = model(s), batch()
    last, zeros = (other(m, fake_latent=row) for row in (m.class_emb.weight[-1:], torch.zeros(1, 24)))

    def expected(labels, m=m):
        return encoder(m, latents, visible, labels)
    for name, labels in (("0, -1, 5", mixed), ("-1, -1, -1", 0 * mixed - 1), ("6, 0, 0", torch.tensor([6, 0, 0]))):
        same(m.encode(latents, visible, labels), expected(labels), f"encode with labels {name}", TOKENS, wrong={
            "label 0 is taken as no class": lambda: expected(labels.where(labels > 0, -1)),
            "label -1 is taken as class 0": lambda: expected(labels.clamp(min=0)),
            "label -1 is taken as the last class": lambda: expected(labels, last),
            "label -1 gives zeros, not fake_latent": lambda: expected(labels, zeros),
            "the first picture's label serves all": lambda: expected(labels[:1].expand(3)),
            "one label of -1 takes the class from all": lambda: expected(0 * labels - 1)})


@torch.no_grad()
def as_the_original(s):
    """encode, decode and the loss equal MAR's own numbers, with a class and without"""
    arrays = golden("mar_tiny")
    m = s.d2c.ContinuousGenerator.from_published(s.formula.formula_state(shapes("mar_tiny")), 4).eval()
    m.prepare = lambda codes: None
    latents = arrays["latents"].flatten(2).transpose(1, 2)
    order = arrays["mask"].int().argsort(dim=1, stable=True)
    visible, hidden = order[:, :6], order[:, 6:]
    for name, labels, ending in (("with a class", arrays["labels"], ""), ("without", torch.full((2,), -1), "_uncond")):
        same(m.encode(latents, visible, labels), arrays["encoder_out" + ending], f"encode {name}", TOKENS, atol=1e-4)
        z = m.decode(arrays["encoder_out" + ending], visible)
        same(z, arrays["z" + ending], f"decode of what was encoded {name}", PLACES, atol=1e-4)
    noise = np.random.Generator(np.random.PCG64(432)).standard_normal((128, 16), dtype=np.float32)
    noise = torch.from_numpy(noise).view(4, 2, 16, 16).permute(1, 2, 0, 3)  # MAR's order: level, picture, place
    t, rows = arrays["forward_t"].view(4, 2, 16).permute(1, 2, 0), torch.arange(2)[:, None]
    mask = torch.zeros(2, 16).scatter(1, arrays["orders"][:, :12], 1)
    order = mask.int().argsort(dim=1, stable=True)
    visible, hidden = order[:, :4], order[:, 4:]
    found = m(latents, visible, hidden, arrays["labels"], None, t[rows, hidden], noise[rows, hidden])
    same(found, arrays["forward_loss"][0], "forward", rtol=1e-4)


@torch.no_grad()
def hidden_latents_and_the_order_of_visible(s):
    """The condition knows nothing of hidden latents, and does not depend on the order of `visible`"""
    m, (latents, visible, hidden, labels) = model(s), batch()
    before = m.condition(latents, visible, labels)
    same(before.shape, (3, 15, 24), "the shape of the condition")
    rows = torch.arange(3)[:, None]
    changed = latents.clone()
    changed[rows, hidden] += 5 * normal(3, 9, 5, seed=8)
    same(m.condition(changed, visible, labels), before, "the condition after a change of the hidden latents", PLACES)
    mixed = visible[:, torch.tensor([3, 0, 5, 1, 4, 2])]
    same(m.condition(latents, mixed, labels), before, "the condition after `visible` was put in another order", PLACES)
    changed = latents.clone()
    changed[rows, visible[:, 2:3]] += 1
    after = m.condition(changed, visible, labels)
    true((after - before).abs().amax((1, 2)).min() > 1e-4, "a change of a visible latent does not change the condition")
    alone = m.condition(latents[1:2], visible[1:2], labels[1:2])
    same(alone, before[1:2], "the condition of one picture alone", PLACES)


@torch.no_grad()
def nothing_one_and_all_visible(s):
    """encode and decode work with nothing, one place and everything visible, and on other grids and depths"""
    m = model(s)
    for seen, name in ((0, "nothing"), (1, "one place"), (15, "everything")):
        latents, visible, _, labels = batch(seen)
        encoded = encoder(m, latents, visible, labels)
        same(m.encode(latents, visible, labels), encoded, f"encode, {name} visible", TOKENS)
        same(m.decode(encoded, visible), decoder(m, encoded, visible), f"decode, {name} visible", PLACES)
    m = model(s, grid=(2, 3), encoder_depth=3, decoder_depth=1, buffer_size=1, num_heads=2)
    latents, visible = normal(2, 6, 5, seed=2), torch.tensor([[5, 1], [0, 4]])
    encoded = encoder(m, latents, visible, torch.tensor([-1, 3]))
    where = "on a 2 x 3 grid with one buffer slot"
    same(m.encode(latents, visible, torch.tensor([-1, 3])), encoded, f"encode {where}", TOKENS)
    same(m.decode(encoded, visible), decoder(m, encoded, visible), f"decode {where}", PLACES)


@torch.no_grad()
def decode_row_by_row(s):
    """decode puts the tokens back in their places, mask tokens elsewhere, and adds both position tables"""
    m, (_, visible, _, _) = model(s), batch()
    encoded, table = normal(3, 10, 24, seed=9), m.decoder_pos_embed_learned
    bare = table.clone()
    bare[:, :4] = 0
    embedded_mask = m.decoder_embed(m.mask_token)
    wrong = {
        "is as without decoder_embed": lambda: decoder(other(m, decoder_embed=nn.Identity()), encoded, visible),
        "mask tokens pass decoder_embed, too": lambda: decoder(other(m, mask_token=embedded_mask), encoded, visible),
        "hidden places hold zeros, not mask_token":
            lambda: decoder(other(m, mask_token=0 * m.mask_token), encoded, visible),
        "is as without decoder_norm": lambda: decoder(other(m, decoder_norm=nn.Identity()), encoded, visible),
        "diffusion_pos_embed_learned is not added":
            lambda: decoder(m, encoded, visible) - m.diffusion_pos_embed_learned,
        "the decoder's positions are not added":
            lambda: decoder(other(m, decoder_pos_embed_learned=0 * table), encoded, visible),
        "the positions are the encoder's":
            lambda: decoder(other(m, decoder_pos_embed_learned=m.encoder_pos_embed_learned), encoded, visible),
        "the buffer slots have no positions":
            lambda: decoder(other(m, decoder_pos_embed_learned=bare), encoded, visible),
        "takes the first picture's places for all": lambda: decoder(m, encoded, visible[:1].expand(3, -1)),
        "the tokens are put in ascending places, not in those that `visible` names":
            lambda: decoder(m, encoded, visible.sort(1).values),
        "the tokens are put in the first places": lambda: decoder(m, encoded, torch.arange(6).expand(3, -1)),
        "not all blocks are passed": lambda: decoder(other(m, decoder_blocks=m.decoder_blocks[:-1]), encoded, visible),
        "the blocks are passed in reverse":
            lambda: decoder(other(m, decoder_blocks=m.decoder_blocks[::-1]), encoded, visible)}
    kept = [x.clone() for x in (encoded, visible, m.mask_token, table)]
    same(m.decode(encoded, visible), decoder(m, encoded, visible), "decode", PLACES, wrong=wrong)
    true(all(map(torch.equal, kept, (encoded, visible, m.mask_token, table))),
         "decode changes its arguments or the model")


@torch.no_grad()
def codes_come_in_at_the_decoders_input(s):
    """decode calls fusion on the sequence with its positions, before the first block, and only given codes"""
    m, (_, visible, _, _) = model(s, fusion="aligned", codebook_size=9), batch()
    encoded, context, table = normal(3, 10, 24, seed=9), normal(3, 19, 24, seed=4), m.decoder_pos_embed_learned

    class Early(nn.Module):  # as if the codes came in before the positions
        def forward(self, sequence, context):
            return Mix()(sequence - table, context) + table
    expected = decoder(m, encoded, visible, context)
    same(m.decode(encoded, visible, context), expected, "decode with codes", PLACES, wrong={
        "the codes are ignored": lambda: decoder(m, encoded, visible),
        "fusion comes before the positions are added":
            lambda: decoder(other(m, fusion=Early()), encoded, visible, context),
        "fusion comes after the blocks": lambda: decoder(m, encoded, visible, context, late=True),
        "the first picture's codes serve all": lambda: decoder(m, encoded, visible, context[:1].expand(3, -1, -1))})
    plain = model(s)
    same(plain.decode(encoded, visible, None), decoder(plain, encoded, visible), "decode without fusion", PLACES)


@torch.no_grad()
def mixed_precision(s):
    """encode and decode also run under autocast, where linear layers give bfloat16 (training on a GPU does so)"""
    m, (latents, visible, _, labels) = model(s), batch()
    encoded = encoder(m, latents, visible, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = m.encode(latents, visible, labels), m.decode(encoded, visible)
    for name, one, expected in zip(("encode", "decode"), found, (encoded, decoder(m, encoded, visible))):
        same(one.float(), expected, f"{name} under autocast", TOKENS, atol=0.15, rtol=0.05)


@torch.no_grad()
def loss_of_the_hidden_places(s):
    """forward is the mean diffusion loss of the hidden places, each paired with its own R noise levels"""
    for settings in (training(), training(seen=14, levels=1), training(seen=0, levels=2)):
        latents, visible, hidden, labels, context, t, noise = settings
        m = by_hand(model(s, fusion="aligned", codebook_size=9))
        H, R = t.shape[1:]
        found = m(*settings)
        true(found.dim() == 0, f"forward: has shape {tuple(found.shape)}, should be one number")
        same(found, loss(s, m, *settings), f"forward with {H} hidden places and R = {R}", wrong={
            "pairs a place's noise levels with other places (rows run over picture, place, level: the level fastest)":
                lambda: loss(s, m, *settings, blockwise=True),
            "is a sum, should be a mean": lambda: loss(s, m, *settings, add=torch.sum),
            "uses only the first noise level":
                lambda: loss(s, m, *settings[:5], t[..., :1], noise[:, :, :1]),
            "the trunk does not get the codes": lambda: loss(s, m, *settings[:4], None, t, noise),
            "the trunk does not get the labels": lambda: loss(s, m, *settings[:3], 0 * labels - 1, *settings[4:]),
            "the trunk sees the hidden latents, not the visible ones":
                lambda: loss(s, m, latents, hidden, hidden, labels, context, t, noise)})


@torch.no_grad()
def the_guess(s):
    """forward adds guess_weight times the mean squared error of the guess at the hidden places"""
    settings = training()
    m = by_hand(model(s, fusion="aligned", codebook_size=9, guess_weight=2.5))
    plain, found, expected = by_hand(model(s, fusion="aligned", codebook_size=9)), m(*settings), loss(s, m, *settings)
    plain.load_state_dict(m.state_dict(), strict=False)
    base = loss(s, plain, *settings)
    same(found, expected, "forward with guess_weight 2.5", wrong={
        "the guess is missing": base,
        "guess_weight is not used": base + (expected - base) / 2.5,
        "guess_weight multiplies the diffusion loss, too": base * 2.5 + (expected - base),
        "the guess counts visible places, too": lambda: loss(s, m, *settings, everywhere=True),
        "the squared error is summed over channels": base + 5 * (expected - base),
        "the squared error is summed, should be a mean": base + 5 * 27 * (expected - base)})
    same(plain(*settings), base, "forward with guess_weight 0")


def gradients(s):
    """Gradients reach the whole trunk: mask token, null class, classes, positions, codes, head and guess"""
    settings = list(training())
    found, expected = ({}, {})
    for grads, graded in ((found, True), (expected, False)):
        m = model(s, fusion="aligned", codebook_size=9, guess_weight=2.5)
        settings[4] = context = settings[4].detach().clone().requires_grad_()
        value = m(*settings) if graded else loss(s, m, *settings)
        true(value.requires_grad, "forward: the loss has no gradient")
        value.backward()
        grads.update({name: p.grad for name, p in m.named_parameters()}, codes=context.grad)
    for name, grad in expected.items():
        if grad is not None:
            true(found[name] is not None, f"forward: no gradient reaches {name}")
            same(found[name], grad, f"forward: the gradient at {name}", atol=1e-5 + 1e-4 * float(grad.abs().max()),
                 rtol=1e-3)


CHECKS = [(1, pick_takes_each_pictures_rows), (2, encode_row_by_row), (1, labels_class_by_class), (2, as_the_original),
          (1, hidden_latents_and_the_order_of_visible), (1, nothing_one_and_all_visible), (2, decode_row_by_row),
          (1, codes_come_in_at_the_decoders_input), (1, mixed_precision), (2, loss_of_the_hidden_places),
          (1, the_guess), (1, gradients)]
