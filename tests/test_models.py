"""What the generators promise: guidance, caches, fusion, and that every parameter learns."""
import math

import pytest
import torch

import adapters
import d2c
import fusion

KINDS = ["cross", "qformer", "aligned"]
SIZES = dict(channels=4, num_classes=10, grid=(4, 4), width=32, encoder_depth=1, decoder_depth=1, num_heads=2,
             buffer_size=3,
             head_depth=1, head_width=32, dropout=0.0)


def continuous(kind, seed=0, **changes):
    """A small stage 2 with every parameter drawn at random."""
    model = d2c.ContinuousGenerator(d2c.ContinuousConfig(**{**SIZES, "fusion": kind, "codebook_size": 16, **changes}))
    return adapters.draw_parameters(model, seed)


def batch(seed=0, batch_size=3):
    """(latents, order, labels, codes) for `continuous`; the first 6 of the order visible, say."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch_size, 16, 4, generator=generator),
            torch.rand(batch_size, 16, generator=generator).argsort(1),
            torch.randint(10, (batch_size,), generator=generator),
            torch.randint(16, (batch_size, 16), generator=generator))


def draw_latents(model, labels, codes, steps, cfg, diffusion_steps=5, **settings):
    """Latents (B,N,C), always from the same random numbers."""
    return d2c.generate(None, model, labels, codes, cfg2=cfg, steps=steps, diffusion_steps=diffusion_steps,
                        generator=torch.Generator().manual_seed(0), **settings)[1]


# Fusion --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_fusion_changes_nothing(kind):
    sequence, discrete = torch.randn(2, 20, 32), torch.randn(2, 16, 32)
    torch.testing.assert_close(adapters.fuse(kind, sequence, discrete, seed=1), sequence, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fusion_from_mar_weights_begins_as_mar(kind):
    mar = continuous("none")
    config = d2c.ContinuousConfig(**{**SIZES, "fusion": kind, "codebook_size": 16})
    model = d2c.ContinuousGenerator(config).eval()
    model.load_published(mar.state_dict())
    latents, order, labels, codes = batch()
    z = model.condition(latents, order[:, :6], labels, model.prepare(codes))
    torch.testing.assert_close(z, mar.condition(latents, order[:, :6], labels), atol=1e-6, rtol=0)


def test_only_fusion_may_be_missing_from_mar_weights():
    state = continuous("none").state_dict()
    model = d2c.ContinuousGenerator(d2c.ContinuousConfig(**{**SIZES, "fusion": "cross", "codebook_size": 16}))
    for wrong in ({key: value for key, value in state.items() if key != "z_proj.bias"},
                  dict(state, extra=torch.ones(1))):
        with pytest.raises(RuntimeError, match="z_proj.bias|extra"):
            model.load_published(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_random_fusion_depends_on_the_codes(kind):
    sequence, discrete = torch.randn(2, 20, 32), torch.randn(2, 16, 32)
    changed = discrete.clone()
    changed[:, 5] = torch.randn(32)  # not a shift by a constant: norms remove it
    before, after = (adapters.fuse(kind, sequence, x, seed=1, fresh=False) for x in (discrete, changed))
    assert (before - after).abs().max() > 1e-3
    elsewhere = (before - after).abs().amax((0, 2))
    if kind == "aligned":  # slot 4 + 5 and no other
        assert elsewhere.nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("kind, depends", [("cross", True), ("qformer", False), ("aligned", False)])
def test_what_is_added_depends_on_the_sequence_only_in_cross(kind, depends):
    discrete, one, other = torch.randn(2, 16, 32), torch.randn(2, 20, 32), torch.randn(2, 20, 32)
    added = [adapters.fuse(kind, x, discrete, seed=1, fresh=False) - x for x in (one, other)]
    assert ((added[0] - added[1]).abs().max() > 1e-2) == depends


@pytest.mark.parametrize("kind", KINDS)
def test_z_sees_codes_and_visible_latents_and_no_hidden_ones(kind):
    model = continuous(kind)
    latents, order, labels, codes = batch()
    visible, hidden = order[:, :6], order[:, 6:]

    def z(latents, codes):
        return model.condition(latents, visible, labels, model.prepare(codes))

    before = z(latents, codes)
    rows = torch.arange(3)[:, None]
    changed = latents.clone()
    changed[rows, hidden] += 1
    assert torch.equal(z(changed, codes), before)
    changed[rows, visible[:, :1]] += 1
    assert (z(changed, codes) - before).abs().amax((1, 2)).min() > 1e-4
    other = codes.clone()
    other[rows, hidden[:, :1]] = (other[rows, hidden[:, :1]] + 1) % 16
    assert (z(latents, other) - before).abs().amax((1, 2)).min() > 1e-4


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_every_parameter_learns(kind):
    """From the real initialisation, with class and codes dropped in one sample and codes alone in another."""
    torch.manual_seed(0)
    model = d2c.ContinuousGenerator(d2c.ContinuousConfig(**{**SIZES, "fusion": kind, "codebook_size": 16}))
    latents, order, labels, codes = batch()
    labels[0], codes[0], codes[1] = -1, -1, -1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(6):
        noise = torch.randn(3, 10, 4, 4)
        loss = model(latents, order[:, :6], order[:, 6:], labels, codes, torch.randint(1000, (3, 10, 4)), noise)
        optimizer.zero_grad()
        loss.backward()
        if step < 5:
            optimizer.step()
    silent = [name for name, parameter in model.named_parameters()
              if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_near_codes_start_near():
    model = d2c.ContinuousGenerator(d2c.ContinuousConfig(**{**SIZES, "fusion": "cross", "codebook_size": 16}))
    codebook = torch.nn.functional.normalize(torch.randn(16, 4), dim=1)
    codebook[1] = codebook[0]
    model.start_fusion(codebook)
    rows = model.code_embedding.weight
    assert torch.equal(rows[0], rows[1]) and 0.01 < float(rows.std().detach()) < 0.04


# Sampling ------------------------------------------------------------------------------------------------------------


def discrete():
    config = d2c.DiscreteConfig(codebook_size=16, num_classes=10, grid=(4, 4), width=32, depth=2, num_heads=2)
    return adapters.draw_parameters(d2c.DiscreteGenerator(config), 0)


@torch.no_grad()
def test_cached_logits_equal_full_ones():
    model, codes, labels = discrete(), torch.randint(16, (2, 16)), torch.tensor([3, -1])
    cache, x, step_logits = torch.zeros(2, 2, 2, 2, 16, 16), model.embed_labels(labels), []
    for i in range(16):
        step_logits.append(model.decode_one(x, torch.tensor([i]), cache))
        x = model.tok_embeddings(codes[:, i:i + 1])
    torch.testing.assert_close(torch.stack(step_logits, 1), model.logits(codes, labels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_codes_once_equals_preparing_them_at_every_step(kind, monkeypatch):
    model, (_, _, labels, codes) = continuous(kind), batch()

    def sample():
        return draw_latents(model, labels, codes, 4, 2.0)

    once = sample()
    condition = d2c.ContinuousGenerator.condition

    def anew(self, latents, visible, labels, context):
        given = codes.repeat(len(labels) // len(codes), 1)  # guidance: rows without class have no codes
        return condition(self, latents, visible, labels, self.prepare(given.where(labels[:, None] >= 0, -1)))

    monkeypatch.setattr(d2c.ContinuousGenerator, "condition", anew)
    torch.testing.assert_close(sample(), once, atol=1e-6, rtol=1e-6)


def test_guidance_needs_class_and_codes():
    """Codes and class both steer; with guidance 1 the unconditional branch is not even computed."""
    model, (_, _, labels, codes) = continuous("cross"), batch()

    def sample(cfg, codes):
        return draw_latents(model, labels, codes, 4, cfg)

    assert not torch.allclose(sample(1.0, codes), sample(3.0, codes))
    assert not torch.allclose(sample(1.0, codes), sample(1.0, (codes + 1) % 16))


def test_top_k_and_top_p():
    logits, generator = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(4000, 4), torch.Generator().manual_seed(0)
    assert set(d2c.sample_code(logits, 1.0, 2, 1.0, generator).tolist()) == {0, 1}
    assert set(d2c.sample_code(logits, 1.0, 0, 0.7, generator).tolist()) == {0, 1}  # 0.64, then 0.24
    assert set(d2c.sample_code(logits, 1.0, 0, 0.6, generator).tolist()) == {0}
    drawn = d2c.sample_code(logits, 1.0, 0, 1.0, generator).bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, logits[0].softmax(0), atol=0.03, rtol=0)


def test_top_k_of_everything_keeps_everything():
    logits = torch.randn(5, 8)
    one, other = (d2c.sample_code(logits, 1.0, k, 1.0, torch.Generator().manual_seed(1)) for k in (0, 99))
    assert torch.equal(one, other)


def test_every_token_is_drawn_exactly_once():
    for places in (1, 9, 16, 64):
        for steps in (1, 2, places // 2, places):
            if 1 <= steps <= places:
                schedule = d2c.token_schedule(places, steps, 2.0)
                drawn = [revealed for revealed, _ in schedule]
                assert sum(drawn) == places and min(drawn) >= 1
    with pytest.raises(ValueError, match="16"):
        d2c.token_schedule(16, 17, 1.0)


def test_the_guess_adds_its_squared_error_and_changes_no_sample():
    model, plain = continuous("cross", guess_weight=3.0), continuous("cross")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("guess.")})
    latents, order, labels, codes = batch()
    hidden, t, noise = order[:, 6:], torch.full((3, 10, 2), 500), torch.ones(3, 10, 2, 4)
    z = model.condition(latents, order[:, :6], labels, model.prepare(codes))
    error = ((model.guess(z) - latents) ** 2).mean(-1).gather(1, hidden).mean()
    losses = [m(latents, order[:, :6], hidden, labels, codes, t, noise) for m in (model, plain)]
    torch.testing.assert_close(losses[0], losses[1] + 3.0 * error)
    one, other = (draw_latents(m, labels, codes, 4, 2.0) for m in (model, plain))
    assert torch.equal(one, other)


def test_imagenet_presets_are_the_published_trunks():
    """B, L, H count as MAR (207.9 / 478.3 / 942.4 M) and as LlamaGen B, L, L (110.9 / 342.9 M)."""
    with torch.device("meta"):
        for name, stage1, stage2 in (("B", 110.9, 207.9), ("L", 342.9, 478.3), ("H", 342.9, 942.4)):
            preset = d2c.PRESETS[name]
            for model, expected in ((d2c.DiscreteGenerator(d2c.DiscreteConfig(**preset["stage1"])), stage1),
                                    (d2c.ContinuousGenerator(d2c.ContinuousConfig(**preset["stage2"])), stage2)):
                assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == expected


def test_compiled_training_uses_the_same_tables():
    """The schedule is float64 arithmetic, which a compiler would redo in float32."""
    denoiser, x = adapters.draw_parameters(d2c.Denoiser(4, 32, 1, 8), 0), torch.randn(64, 4)
    arguments = (x, torch.arange(64) * 15, torch.randn(64, 4), torch.randn(64, 32))
    compiled = torch.compile(d2c.diffusion_loss, backend="aot_eager")
    torch.testing.assert_close(compiled(denoiser, *arguments), d2c.diffusion_loss(denoiser, *arguments), rtol=1e-6,
                               atol=1e-6)


def test_trained_fusion_survives_loading():
    """A whole checkpoint, queries included, is loaded as it is; one with half of its fusion is refused."""
    state = continuous("qformer", seed=1).state_dict()
    model = continuous("qformer", seed=2)
    model.load_published(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="fusion.queries"):
        model.load_published({key: value for key, value in state.items() if key != "fusion.queries"})


def test_unknown_fusion():
    with pytest.raises(ValueError, match="cross, qformer or aligned"):
        fusion.make_fusion("mixed", 32, 2, 20)


def test_diffusion_can_be_learned_and_sampled():
    """The loss and the sampler agree with each other: a denoiser trained on one is right in the other."""
    torch.manual_seed(0)
    net = d2c.Denoiser(2, 64, 2, 1)

    def denoiser(x, t, z):
        return net(x, t, net.cond_embed(z))

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    mean = torch.tensor([[-1.0, 1.0], [1.5, 0.5]])  # two clusters, told apart by z
    for _ in range(400):
        which = torch.randint(2, (256,))
        x0 = mean[which] + 0.2 * torch.randn(256, 2)
        loss = d2c.diffusion_loss(denoiser, x0, torch.randint(1000, (256,)), torch.randn(256, 2),
                                  which[:, None].float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = torch.arange(2).repeat_interleave(500)[:, None].float()
    samples = d2c.diffusion_sample(denoiser, z, (torch.randn(1000, 2) for _ in range(51)), steps=50, clip=4.0)
    for cluster in (0, 1):
        torch.testing.assert_close(samples[500 * cluster:500 * (cluster + 1)].mean(0), mean[cluster], atol=0.15, rtol=0)
        assert math.isclose(float(samples[500 * cluster:500 * (cluster + 1)].std(0).mean()), 0.2, abs_tol=0.12)
