"""What speed must not cost: compiled and eager agree, nothing is compiled anew, nothing waits for the device."""
import copy

import pytest
import torch
import torch.utils.mkldnn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import adapters
import d2c
from test_models import batch, continuous, discrete, draw_latents


class Counter:
    """A compiler that compiles nothing and counts the graphs it is handed; no C++ compiler needed."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_stage1_compiles_one_code_once():
    model, labels = discrete(), torch.tensor([3, 5, 7])
    compiled, backend = copy.deepcopy(model), Counter()
    d2c.compile_parts(compiled, backend=backend)

    def codes(model, **settings):
        return model.generate(labels, generator=torch.Generator().manual_seed(0), **settings)

    assert torch.equal(codes(compiled, cfg_scale=2.0), codes(model, cfg_scale=2.0))
    warm = backend.graphs
    assert warm == 1
    for settings in (dict(cfg_scale=3.0), dict(cfg_scale=2.0, temperature=0.5, top_k=3, top_p=0.9),
                     dict(cfg_scale=2.0, cfg_interval=4)):
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(codes(compiled, **settings), codes(model, **settings))
    assert backend.graphs == warm


@pytest.mark.parametrize("kind", ["none", "cross", "qformer"])
def test_stage2_compiles_nothing_after_warm_up(kind):
    """Whatever the number of token steps, and with it of places visible and drawn, of diffusion steps, and the
    guidance."""
    model = continuous(kind, grid=(8, 8))
    compiled, backend = copy.deepcopy(model), Counter()
    d2c.compile_parts(compiled, backend=backend)
    labels, codes = torch.tensor([3, 5, 7]), torch.randint(16, (3, 64))

    def latents(model, steps, cfg, diffusion_steps):
        return draw_latents(model, labels, codes, steps, cfg, diffusion_steps)

    for settings in ((16, 2.0, 3), (5, 2.0, (4, 3))):
        latents(compiled, *settings)
    warm = backend.graphs
    assert 0 < warm <= 10  # of a block: first sizes, then any; of a denoising step: first, any rows, any schedule
    for settings in ((16, 3.0, 4), (9, 2.5, 6), (3, 2.0, (6, 2))):
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(latents(compiled, *settings), latents(model, *settings), atol=1e-5, rtol=1e-5)
    assert backend.graphs == warm


def test_training_compiles_nothing_after_warm_up():
    """The number of hidden places differs from step to step."""
    model = continuous("cross", grid=(8, 8)).train()
    compiled, backend = copy.deepcopy(model), Counter()
    d2c.compile_parts(compiled, backend=backend)
    latents, labels, codes = torch.randn(3, 64, 4), torch.tensor([3, 5, -1]), torch.randint(16, (3, 64))
    order = torch.rand(3, 64).argsort(1)

    def loss(model, hidden):
        generator = torch.Generator().manual_seed(hidden)
        t = torch.randint(1000, (3, hidden, 2), generator=generator)
        noise = torch.randn(3, hidden, 2, 4, generator=generator)
        return model(latents, order[:, hidden:], order[:, :hidden], labels, codes, t, noise)

    for hidden in (45, 50, 64, 63):  # 64 hidden: none visible
        loss(compiled, hidden)
    warm = backend.graphs
    assert 0 < warm <= 12
    for hidden in (46, 47, 53, 60, 61, 62, 64):
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(loss(compiled, hidden), loss(model, hidden))
    assert backend.graphs == warm


def test_wide_generators_sample_the_same_by_onednn():
    """What sample.py does to them on a CPU."""
    first = adapters.draw_parameters(d2c.DiscreteGenerator(d2c.DiscreteConfig(16, 10, (4, 4), 512, 1, 8)), 0)
    second = continuous("cross", width=512, num_heads=8)
    labels, codes = torch.tensor([3, 5, 7]), torch.randint(16, (3, 16))
    with torch.no_grad():
        expected = first.generate(labels, 2.0, temperature=0), draw_latents(second, labels, codes, 4, 2.0)
        quick = [torch.utils.mkldnn.to_mkldnn(model) for model in (first, second)]
        assert torch.equal(quick[0].generate(labels, 2.0, temperature=0), expected[0])
        torch.testing.assert_close(draw_latents(quick[1], labels, codes, 4, 2.0), expected[1], atol=1e-3, rtol=1e-3)


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: a loop that asks for one (.item(), a boolean index) would fail, as this shows
    first."""
    for steps in (4, 5, 6, 1000):
        d2c.schedule_tables(steps, torch.device("cpu"), torch.float32)  # kept for later calls: not to be made of fakes
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(DataDependentOutputException):
            torch.ones(3).sum().item()
        latents, order, labels, codes = batch()
        t, noise = torch.randint(1000, (3, 10, 2)), torch.randn(3, 10, 2, 4)
        assert discrete().generate(labels, 2.0, 0.9, top_k=3, top_p=0.9).shape == (3, 16)
        drawn = d2c.generate(None, continuous("cross"), labels, codes, cfg2=2.0, steps=4, diffusion_steps=(6, 4),
                             clip=5.0)[1]
        assert drawn.shape == (3, 16, 4)
        discrete()(codes, labels).backward()
        continuous("cross")(latents, order[:, :6], order[:, 6:], labels, codes, t, noise).backward()


def test_annealed_diffusion_steps(monkeypatch):
    model, (_, _, labels, codes), taken = continuous("cross"), batch(), []
    original = d2c.diffusion_sample
    monkeypatch.setattr(d2c, "diffusion_sample", lambda *a: taken.append(a[5]) or original(*a))
    for steps, token_steps, expected in (((50, 5), 10, [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]), ((50, 5), 1, [50]),
                                         (7, 3, [7] * 3)):
        taken.clear()
        draw_latents(model, labels, codes, token_steps, 2.0, steps)
        assert taken == expected
    plain, constant, falling = (draw_latents(model, labels, codes, 4, 2.0, steps) for steps in (6, (6, 6), (6, 2)))
    assert torch.equal(plain, constant) and not torch.equal(plain, falling)


@pytest.mark.parametrize("steps, rows", [(4, 1), (4, 5)])
def test_compiled_denoising_agrees(steps, rows):
    """Through the compiler's own decompositions (aot_eager), with one row and with several, whole chains of steps."""
    net = adapters.draw_parameters(d2c.Denoiser(4, 32, 2, 8), 0)
    z, noise = torch.randn(2 * rows, 32), torch.randn(steps + 1, rows, 4)
    step = torch.compile(d2c.denoising_step, backend="aot_eager")
    one, other = (d2c.diffusion_sample(net, z, noise, 0.9, 2.0, steps, 5.0, f) for f in (d2c.denoising_step, step))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
