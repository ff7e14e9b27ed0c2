"""How fast are the hot loops, and how fast could they be?

    python tests/benchmark.py                    hot loops of presets demo and B: eager, compiled, share of the ceiling
    python tests/benchmark.py originals --mar DIR --llamagen DIR         against checkouts of MAR and of LlamaGen
    python tests/benchmark.py fusion             what cross-attention and the Q-Former add to training and sampling
    python tests/benchmark.py scaling            stage 2 as the batch and the number of tokens grow
    python tests/benchmark.py loader             what it costs to read a batch, on one thread
    python tests/benchmark.py muon               a step of the optimizers, with Muon in float32 and torch's in bfloat16
    python tests/benchmark.py precision          the diffusion head in bfloat16 and TF32 against float32, on runs/demo

Weights are random but for the last; no time depends on them. Every time is the median of --rounds calls after one that
warms up, with the smallest and the largest behind it. What is compared runs in turn, so that a slow minute hits all
alike. The figures stand in docs/speed.md.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
import torch.utils.mkldnn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parent.parent))

import benchmark_demo  # noqa: E402
import benchmark_scale  # noqa: E402
import d2c  # noqa: E402
import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from tokenizers import KLTokenizer, Shapes, TokenizerConfig, VQTokenizer, to_map  # noqa: E402
from train import Processes, TokenCache, autocast, number, user_errors, writing  # noqa: E402

# Measuring -----------------------------------------------------------------------------------------------------------

def clock(run, device):
    """Seconds of run()."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turn(runs, args):
    """{name: function} -> {name: seconds of a call, in each round}. A round repeats short calls for a tenth of a
    second."""
    for run in runs.values():
        run()  # warms up
    calls = {name: max(1, round(0.1 / clock(run, args.device))) for name, run in runs.items()}
    taken = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            taken[name].append(clock(lambda: [run() for _ in range(calls[name])], args.device) / calls[name])
    return taken


def spread(values, form=".4g"):
    """Median (smallest to largest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def ratio(one, other):
    """How long `one` takes in units of `other`, round by round."""
    return spread([a / b for a, b in zip(one, other)], ".3f")


def peak_memory(run, device):
    """Bytes at the highest point of a call, with all models that stand there: on a GPU what torch held, on Linux what
    the process held, else None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest point so far
        run()
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    except OSError:
        return None


def flops(run):
    """Multiplications and additions of matrix products, convolutions and attention."""
    def attention(query, key, value, *others, out_shape, **settings):
        return sdpa_flop_count(query, key, value)

    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # torch does not know this one
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops()


def ceilings(args):
    """What the device reaches today: {"float32", "tf32", "bf16": FLOP/s of a matrix product, "copy": bytes/s, read and
    written}."""
    size = 8192 if args.device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=args.device)
    source = torch.randn(2**26, device=args.device)
    target = torch.empty_like(source)
    measured = {"copy": 2 * source.nbytes / min(in_turn({"": lambda: target.copy_(source)}, args)[""])}
    for name in ("float32", "tf32", "bf16"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        x, y = (part.bfloat16() if name == "bf16" else part for part in (a, b))
        measured[name] = 2 * size**3 / min(in_turn({"": lambda: x @ y}, args)[""])
    torch.set_float32_matmul_precision("high")
    return measured


# The hot loops -------------------------------------------------------------------------------------------------------

# VQ-16, KL-16 and sizes of ImageNet, where a preset leaves them to published files.
PUBLISHED = dict(vq=dict(z_channels=256, codebook_size=16384, decoder_attention=True), kl=dict(z_channels=16))


def make_models(preset, kind=None, grid=None):
    """(VQTokenizer, KLTokenizer, DiscreteGenerator, ContinuousGenerator) of the preset so called, with random weights;
    with another fusion `kind` or `grid` if given."""
    preset = d2c.PRESETS[preset]
    vq, kl = (cls(TokenizerConfig(**(preset[name] or PUBLISHED[name])))
              for cls, name in ((VQTokenizer, "vq"), (KLTokenizer, "kl")))
    common = dict(grid=grid or (preset["size"] // kl.config.factor,) * 2, num_classes=1000,
                  codebook_size=vq.config.codebook_size)
    discrete = d2c.DiscreteGenerator(d2c.DiscreteConfig(**common, **preset["stage1"]))
    continuous = d2c.ContinuousGenerator(d2c.ContinuousConfig(
        **common, channels=kl.config.z_channels, fusion=kind or preset["fusion"], **preset["stage2"]))
    for parameter in (*discrete.parameters(), *continuous.parameters()):
        if not parameter.any():  # what starts at zero would hide all that is before it
            torch.nn.init.normal_(parameter, std=0.02)
    return vq, kl, discrete, continuous


def mean_hidden(config):
    """The mean share of hidden places in training."""
    deviation, smallest = config.hidden_share
    return scipy.stats.truncnorm.mean((smallest - 1) / deviation, 0, loc=1, scale=deviation)


def stage2_batch(config, batch, device):
    """Random arguments of ContinuousGenerator.forward, with the mean share of hidden places."""
    places = math.prod(config.grid)
    hidden = math.ceil(mean_hidden(config) * places)
    order = torch.rand(batch, places, device=device).argsort(1)
    return (torch.randn(batch, places, config.channels, device=device), order[:, hidden:], order[:, :hidden],
            torch.randint(1000, (batch,), device=device),
            torch.randint(max(1, config.codebook_size), (batch, places), device=device),
            torch.randint(1000, (batch, hidden, config.noise_levels), device=device),
            torch.randn(batch, hidden, config.noise_levels, config.channels, device=device))


def training_step(model, arguments, args):
    """Forward and backward pass, a function to be timed."""
    def run():
        model.zero_grad(set_to_none=True)
        with autocast(args.device, args.dtype):
            loss = model(*arguments)
        loss.backward()
    return run  # returns nothing: dropout differs between eager and compiled


def inference(function, arguments, args, dtype=None):
    """A call without gradients, a function to be timed."""
    @torch.no_grad()
    def run():
        with autocast(args.device, dtype or args.dtype):
            return function(*arguments)
    return run


def sampling(model, labels, codes, args, **settings):
    """Stage 2's part of sampling, a function to be timed."""
    return inference(lambda: d2c.generate(None, model.eval(), labels, codes, **settings), (), args)


def size_of(modules, matmul):
    """Bytes of their parameters, as matrix products in this precision read them."""
    return (2 if matmul == "bf16" else 4) * sum(p.numel() for part in modules for p in part.parameters())


def training_loops(name, batch, args):
    """Yields (name, pictures per call, precision of its matrix products, bytes of weights and cache that it must read
    where they are not negligible, eager and compiled call)."""
    *_, discrete, continuous = make_models(name)
    codes = torch.randint(discrete.config.codebook_size, (batch, math.prod(discrete.config.grid)), device=args.device)
    first, second = (codes, torch.randint(1000, (batch,), device=args.device)), stage2_batch(
        continuous.config, batch, args.device)
    for stage, model, arguments in ((1, discrete, first), (2, continuous, second)):
        model = model.to(args.device)
        compiled = copy.deepcopy(model)
        d2c.compile_parts(compiled)
        yield (f"stage {stage}, training step", batch, args.matmul, 0,
               *(training_step(m, arguments, args) for m in (model, compiled)))


def sampling_loops(name, batch, args):
    """As training_loops. Guidance is on: 2 * batch rows."""
    settings, full = d2c.PRESETS[name]["sample"], "tf32" if args.device.type == "cuda" else "float32"
    vq, kl, *generators = (model.to(args.device).eval() for model in make_models(name))
    (discrete, continuous), copies = generators, copy.deepcopy(generators)
    for model in copies:
        d2c.compile_parts(model)
    config, places = discrete.config, math.prod(discrete.config.grid)

    with autocast(args.device, args.dtype):  # around all calls, as in sample.py: eager code casts its weights once
        cache, position = discrete.empty_cache(2 * batch), torch.tensor([3 * places // 4 - 1], device=args.device)
        read = size_of((discrete.layers, discrete.output), args.matmul) + sum(x.nbytes for pair in cache for x in pair)
        arguments = torch.randn(2 * batch, 1, config.width, device=args.device), position, cache
        yield ("stage 1, one code", batch / places, args.matmul, read,
               *(inference(model.decode_one, arguments, args) for model in (discrete, copies[0])))

        config, drawn = continuous.config, max(1, places // settings["steps"])
        latents, _, _, labels, codes, _, _ = stage2_batch(config, 2 * batch, args.device)
        visible = torch.rand(2 * batch, places, device=args.device).argsort(1)[:, places // 2:]
        with torch.no_grad():
            arguments = latents, visible, labels, continuous.prepare(codes)
        read = size_of([continuous], args.matmul) - size_of([continuous.diffloss], args.matmul)
        yield ("stage 2, trunk, one token step", batch / settings["steps"], args.matmul, read,
               *(inference(model.condition, arguments, args) for model in (continuous, copies[1])))

    x, noise = torch.randn(2, batch * drawn, config.channels, device=args.device)
    tables = d2c.schedule_tables(settings["diffusion_steps"], x.device, x.dtype)
    scale = torch.tensor(2.0, device=args.device)
    index = torch.tensor([settings["diffusion_steps"] // 2], device=args.device)
    c = torch.randn(2 * batch * drawn, config.head_width, device=args.device)
    arguments = x, c, noise, tables, index, 1.0, scale, settings["clip"]
    yield ("stage 2, one denoising step", batch / settings["steps"] / settings["diffusion_steps"], full,
           size_of([continuous.diffloss], full),
           *(inference(model.denoising_step, (model.diffloss["net"], *arguments), args, "float32")
             for model in (continuous, copies[1])))

    codes = torch.zeros(batch, *config.grid, dtype=torch.int64, device=args.device)
    latents = torch.randn(batch, config.channels, *config.grid, device=args.device)
    for kind, model, tokens in (("VQ", vq, codes), ("KL", kl, latents)):
        yield (f"{kind} decoder", batch, full, 0,
               *(inference(call, (tokens,), args, "float32") for call in (model.decode, torch.compile(model.decode))))


def inception_loop(args):
    """As training_loops, for fid.py's network with random weights."""
    network = fid.fold_batch_norms(fid.InceptionV3()).to(args.device, memory_format=torch.channels_last)
    images = torch.randn(args.inception_batch, 3, 299, 299, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def in_full(call):
        def run(x):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as fid.py
                return call(x)
        return run

    yield ("Inception", len(images), "float32", 0,
           *(inference(in_full(call), (images,), args, "float32") for call in (network, torch.compile(network))))


def measure_loops(args, report):
    limits = ceilings(args)
    report("ceilings: " + ", ".join(f"{name} {value / 1e9:.4g} G{'B' if name == 'copy' else 'FLOP'}/s"
                                    for name, value in limits.items()), ceilings=limits)
    groups = [(name, loops(name, batch, args)) for name, batch in zip(args.presets, args.batch_sizes)
              for loops in (training_loops, sampling_loops)]
    for group, loops in [*groups, ("fid.py", inception_loop(args))]:
        for name, pictures, matmul, read, eager, compiled in loops:
            torch._dynamo.reset()
            counters.clear()
            compilation = clock(compiled, args.device)
            work = flops(eager)
            taken = in_turn({"eager": eager, "compiled": compiled}, args)
            best = min(statistics.median(values) for values in taken.values())
            memory = peak_memory(eager, args.device)
            least, bound = max((work / limits[matmul], matmul), (read / limits["copy"], "copy"))  # s at the ceiling
            graphs = counters["stats"]["unique_graphs"]
            one, other = (value[0] if isinstance(value, tuple) else value for value in (eager(), compiled()))
            gap = None if one is None else ((one - other).abs().max() / one.abs().max()).item()
            report(f"{group:6} {name:32} eager {spread([1e3 * t for t in taken['eager']])} ms, compiled "
                   f"{spread([1e3 * t for t in taken['compiled']])} ms, {ratio(taken['compiled'], taken['eager'])} of "
                   f"it; {pictures / best:.4g} pictures/s, {work / best / 1e9:.4g} GFLOP/s, {read / best / 1e9:.3g} "
                   f"GB/s, {least / best:.0%} of {bound}; peak "
                   f"{'?' if memory is None else f'{memory / 2**30:.2f}'} GiB; {graphs} graphs in {compilation:.0f} s"
                   + (f", equal to {gap:.0e}" if gap is not None else ""),
                   preset=group, loop=name, pictures_per_call=pictures, seconds=taken, flops=work, bytes=read,
                   ceiling=bound, share=least / best, difference=gap, peak_bytes=memory, graphs=graphs,
                   compilation_seconds=compilation)


# The originals -------------------------------------------------------------------------------------------------------

class FixedShare:
    """In the place of MAR's random share of hidden places: its mean."""
    def rvs(self, size):
        return [mean_hidden(d2c.ContinuousConfig())]


def measure_originals(args, report):
    """Preset B against the authors' code, in one process, in turn, on the same weights; all of it eager."""
    batch, device = args.batch_sizes[-1], args.device
    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *where, **how: self  # MAR's sampling asks for CUDA
    if args.mar:
        sys.path.insert(0, str(args.mar))
        from models.mar import mar_base

        theirs = mar_base(vae_embed_dim=16, class_num=1000, diffloss_d=6, diffloss_w=1024, diffusion_batch_mul=4,
                          attn_dropout=0.1, proj_dropout=0.1, num_sampling_steps="100").to(device)
        theirs.mask_ratio_generator = FixedShare()
        ours = d2c.ContinuousGenerator.from_published(theirs.state_dict()).to(device)
        latents, visible, hidden, labels, _, t, noise = stage2_batch(ours.config, 2 * batch, device)
        maps, rows = to_map(latents, ours.config.grid), (latents, visible, hidden, labels, None, t, noise)
        runs = {"MAR": training_step(theirs, (maps, labels), args), "ours": training_step(ours, rows, args)}
        report_race(f"stage 2, training step of {2 * batch}", runs, args, report)

        theirs, ours, labels = theirs.eval(), ours.eval(), labels[:batch]
        runs = {"MAR": inference(lambda: theirs.sample_tokens(bsz=batch, num_iter=8, cfg=2.9, cfg_schedule="linear",
                                                              labels=labels, temperature=1.0), (), args),
                "ours": sampling(ours, labels, None, args, cfg2=2.9, steps=8),
                "ours at 50:5": sampling(ours, labels, None, args, cfg2=2.9, steps=8, diffusion_steps=(50, 5))}
        if device.type == "cpu":
            runs["ours by to_mkldnn"] = sampling(by_mkldnn(ours), labels, None, args, cfg2=2.9, steps=8)
        report_race(f"stage 2, sampling {batch} pictures, 8 token steps of 100 diffusion steps", runs, args, report)
        sys.path.remove(str(args.mar))
    if args.llamagen:
        sys.path.insert(0, str(args.llamagen))
        from autoregressive.models.generate import generate
        from autoregressive.models.gpt import GPT_models

        theirs = GPT_models["GPT-B"](block_size=256, vocab_size=16384, num_classes=1000, cls_token_num=1)
        theirs = theirs.to(device).eval()
        torch.nn.init.normal_(theirs.output.weight, std=0.02)  # they start at zero
        state = {key: value for key, value in theirs.state_dict().items() if "freqs" not in key and "cache" not in key}
        ours = d2c.DiscreteGenerator.from_published(state).to(device).eval()
        if args.matmul == "bf16":  # as it is used: LlamaGen's is in bf16 throughout
            theirs = theirs.bfloat16()
        labels = torch.randint(1000, (batch,), device=device)
        runs = {"LlamaGen": inference(lambda: generate(theirs, labels, 256, cfg_scale=2.0, temperature=1.0, top_k=0,
                                                       top_p=1.0, sample_logits=True), (), args, "float32"),
                "ours": inference(ours.generate, (labels, 2.0), args)}
        if device.type == "cpu":
            runs["ours by to_mkldnn"] = inference(by_mkldnn(ours).generate, (labels, 2.0), args)
        report_race(f"stage 1, sampling {batch} pictures", runs, args, report)


def by_mkldnn(model):
    """A copy whose linear layers are oneDNN's instead of MKL's, with weights in oneDNN's own layout."""
    return torch.utils.mkldnn.to_mkldnn(copy.deepcopy(model))


def report_race(name, runs, args, report):
    taken = in_turn(runs, args)
    theirs, *ours = taken
    for label in ours:
        report(f"{name}: {theirs} {spread(taken[theirs])} s, {label} {spread(taken[label])} s, "
               f"{ratio(taken[label], taken[theirs])} of it",
               race=name, seconds={theirs: taken[theirs], label: taken[label]})


# The price of fusion, and of size ------------------------------------------------------------------------------------

def measure_fusion(args, report):
    """Preset B. 16 token steps of 25 keep the balance of arithmetic in trunk and head of 64 steps of 100, in a quarter
    of the time."""
    batch, settings = args.batch_sizes[-1], dict(cfg2=2.9, steps=16, diffusion_steps=25)
    models = {kind: make_models("B", kind)[3].to(args.device) for kind in ("none", "cross", "qformer", "aligned")}
    arguments = stage2_batch(models["none"].config, 2 * batch, args.device)
    labels, codes = arguments[3][:batch], arguments[4][:batch]
    trained = in_turn({kind: training_step(model, arguments, args) for kind, model in models.items()}, args)
    sampled = in_turn({kind: sampling(model, labels, codes, args, **settings) for kind, model in models.items()}, args)
    for name, taken in ((f"training step of {2 * batch}", trained), (f"sampling {batch} pictures", sampled)):
        for kind, values in taken.items():
            report(f"{name}: {kind:8} {spread(values)} s, {ratio(values, taken['none'])} of none",
                   part=name, fusion=kind, seconds=values)


def measure_scaling(args, report):
    """Seconds per picture of stage 2. The exponent compares with the row above: 0 is a constant time per picture, as
    the batch grows; 1 is a time in proportion to the tokens."""
    name, settings = args.presets[0], dict(cfg2=2.0, steps=8, diffusion_steps=25)
    for what, sizes in (("batch", [(64, batch) for batch in (1, 4, 16, 64, 256)]),
                        ("tokens", [(tokens, 4) for tokens in (64, 256, 1024)])):
        before = None
        for tokens, batch in sizes:
            model = make_models(name, grid=(math.isqrt(tokens),) * 2)[3].to(args.device)
            arguments = stage2_batch(model.config, batch, args.device)
            taken = in_turn({"training": training_step(model, arguments, args)}, args)
            taken |= in_turn({"sampling": sampling(model, *arguments[3:5], args, **settings)}, args)
            now, growth = {part: statistics.median(values) / batch for part, values in taken.items()}, {}
            if before:
                times_larger = tokens / size[0] * batch / size[1]
                growth = {part: math.log(now[part] / before[part]) / math.log(times_larger) for part in now}
            report(f"{what:6} {tokens:4} tokens, batch {batch:3}: " + ", ".join(
                f"{part} {1e3 * now[part]:.4g} ms a picture"
                + (f" (exponent {growth[part]:+.2f})" if growth else "") for part in now),
                preset=name, tokens=tokens, batch=batch, seconds=taken)
            before, size = now, (tokens, batch)


# Reading batches -----------------------------------------------------------------------------------------------------

def random_tokens(folder, count, grid, channels, codebook_size):
    """A token cache of random numbers."""
    rng, places = np.random.default_rng(0), math.prod(grid)
    meta = dict(run={}, tokenizers="", count=count, grid=grid, channels=channels, scale=1.0,
                codebook_size=codebook_size, classes=["one"])
    moments = rng.standard_normal((2, count, places, 2 * channels), np.float32)
    folder.mkdir(parents=True)
    np.save(folder / "codes.npy", rng.integers(codebook_size, size=(2, count, places), dtype=np.uint16))
    np.save(folder / "moments.npy", moments.astype(np.float16))
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenCache(folder)


def reader(read, count, stage, batch_size, processes=1):
    """A function that gives the first process's share of one batch after another, as train.py reads it."""
    pictures, steps = train.Pictures(read, np.arange(count), batch_size, stage, 0), itertools.count()

    def next_batch():
        step = next(steps)
        return default_collate([pictures[step, place] for place in range(batch_size // processes)])
    return next_batch


def whole_steps(model, batches, stage, args):
    """Training steps of the demo on these batches, with optimizer and moving average: a function to be timed."""
    model, settings = model.to(args.device), d2c.PRESETS["demo"]["train"][stage] | dict(stage=stage)
    average, processes = AveragedModel(model), Processes(args.device.type)
    optimizers = train.make_optimizers(model, settings)
    flags = SimpleNamespace(seed=0, accumulate=1, dtype=args.dtype)
    return lambda: [train.training_step(model, average, optimizers, batch, step, settings, flags, processes)
                    for step, batch in enumerate(batches)]


def measure_loader(args, report):
    """Milliseconds of one thread. Stage 2 of preset B on random tokens in memory, beside what a GPU would eat; and the
    batches of the demo, beside its training steps. Only the first epoch of the built-in pictures draws them."""
    torch.set_num_threads(1)

    def milliseconds(values, parts=1):
        return spread([1e3 * t / parts for t in values])

    with tempfile.TemporaryDirectory() as folder:
        config, batch_size = benchmark_scale.stage2_config("B", "qformer"), d2c.PRESETS["B"]["train"][2]["batch_size"]
        cache = random_tokens(Path(folder) / "B", 4096, config.grid, config.channels, config.codebook_size)
        read = functools.partial(train.read_latents, cache, config)
        taken = in_turn({size: reader(read, 4096, 2, batch_size, size) for size in (1, 8)}, args)
        rate = batch_size / statistics.median(taken[1])
        eaten = benchmark_scale.USABLE / benchmark_scale.stage2_flops("B", "qformer")[2]
        report(f"B, stage 2, batch of {batch_size}: 1 of 1 process reads {milliseconds(taken[1])} ms, 1 of 8 "
               f"{milliseconds(taken[8])} ms; {rate:.0f} pictures/s, an H100 at 40 % trains on {eaten:.0f}",
               preset="B", stage=2, seconds=taken, rate=rate, eaten=eaten)

        steps = 8
        vq, kl, discrete, continuous = make_models("demo")
        config, images = continuous.config, Shapes(32, 32 * steps)
        latent_shape = config.channels, *config.grid
        cache = random_tokens(Path(folder) / "demo", 4096, config.grid, config.channels, config.codebook_size)
        models = {0: train.Tokenizers(vq, kl), 1: discrete, 2: continuous}
        reads = {0: functools.partial(train.read_picture, images, latent_shape),
                 1: functools.partial(train.read_codes, cache), 2: functools.partial(train.read_latents, cache, config)}
        for stage, model in models.items():
            batch_size = d2c.PRESETS["demo"]["train"][stage]["batch_size"]
            next_batch = reader(reads[stage], len(cache.labels if stage else images), stage, batch_size)
            runs = {"reading": lambda: [next_batch() for _ in range(steps)],
                    "training": whole_steps(model, [next_batch() for _ in range(steps)], stage, args)}
            if stage == 0:
                runs["drawing and reading"] = lambda: (images.drawn.clear(), runs["reading"]())
            taken = in_turn(runs, args)
            trained = taken.pop("training")
            for what, values in taken.items():
                report(f"demo, stage {stage}, batch of {batch_size}: {what} {milliseconds(values, steps)} ms, training "
                       f"step {milliseconds(trained, steps)} ms, {ratio(values, trained)} of it",
                       preset="demo", stage=stage, what=what, seconds=values, training=trained, batches=steps)


def measure_muon(args, report):
    """Milliseconds of an optimizer's step for the demo's stage 2, on one thread."""
    torch.set_num_threads(1)
    model = make_models("demo")[3]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    settings = d2c.PRESETS["demo"]["train"][2]
    alone, = train.make_optimizers(model, settings | dict(muon=False))
    rest, muon = train.make_optimizers(model, settings)
    matrices = [parameter for group in muon.param_groups for parameter in group["params"]]
    theirs = torch.optim.Muon(matrices, lr=settings["lr"], adjust_lr_fn="match_rms_adamw", ns_steps=3)
    runs = {"AdamW for everything": alone.step, "AdamW and Muon": lambda: (rest.step(), muon.step()),
            "AdamW and torch.optim.Muon": lambda: (rest.step(), theirs.step())}
    for name, values in in_turn(runs, args).items():
        report(f"{name:26}  {spread([1e3 * value for value in values])} ms", name=name, seconds=values)


# Precision of the diffusion head -------------------------------------------------------------------------------------

class TF32(torch.autograd.Function):
    """A linear layer on numbers of 10 mantissa bits, products added up in float32: what TF32 does, on any device."""
    @staticmethod
    def cut(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # 23 - 10 = 13 bits go, rounded

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = TF32.cut(x.contiguous()), TF32.cut(weight)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        cut = TF32.cut(gradient.contiguous())
        return cut @ weight, cut.flatten(0, -2).T @ x.flatten(0, -2), gradient.flatten(0, -2).sum(0)


def in_bf16(x, weight, bias):
    return F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float()


def head_in(net, precision):
    """Give the diffusion network `net` another arithmetic for its matrix products; the rest of the model keeps
    float32."""
    product = {"float32": F.linear, "TF32": TF32.apply, "bf16": in_bf16}[precision]
    for layer in net.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = lambda x, layer=layer: product(x, layer.weight, layer.bias)


def measure_precision(args, report):
    """300 training steps of stage 2 from one start on the run's tokens, and 1,000 pictures of the run's trained
    models."""
    torch.set_float32_matmul_precision("highest")
    pipeline = sample.Pipeline.from_run(args.run, device=args.device, dtype="float32")
    config, cache = pipeline.continuous.config, TokenCache(args.run / "tokens")
    rulers = benchmark_demo.Rulers(args.folder)
    settings = {name: value for name, value in pipeline.settings.items() if name != "batch_size"}
    labels = torch.arange(1000, device=args.device) % len(pipeline.classes)
    read, batch_size = functools.partial(train.read_latents, cache, config), 64
    pictures = train.Pictures(read, np.arange(len(cache.labels)), batch_size, 2, 0)
    keys = [[(step, place) for place in range(batch_size)] for step in range(300)]
    exact = None
    for precision in ("float32", "TF32", "bf16"):
        torch.manual_seed(0)
        model = d2c.ContinuousGenerator(config).to(args.device)
        head_in(model.diffloss["net"], precision)
        rate, losses, norms = d2c.PRESETS["demo"]["train"][2]["lr"], [], []
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95))
        for batch in DataLoader(pictures, batch_sampler=keys):
            loss = model(*(x.to(args.device) for x in batch))
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        trained = copy.deepcopy(pipeline.continuous)
        head_in(trained.diffloss["net"], precision)
        generators = (torch.Generator(args.device).manual_seed(k) for k in itertools.count())
        latents = torch.cat([d2c.generate(pipeline.discrete, trained, part, generator=next(generators), **settings)[1]
                             for part in labels.split(100)])                                  # (1000,N,C)
        exact = latents if exact is None else exact
        with torch.no_grad():
            maps = to_map(latents, config.grid) / pipeline.kl.scale                           # (1000,C,h,w)
            fine = np.concatenate([pipeline.finish(pipeline.kl.decode(part)) for part in maps.split(100)])
        measured = rulers.measure(fine, labels.cpu().numpy())
        difference = ((latents - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
        hundreds = " ".join(f"{np.mean(losses[i:i + 100]):.4f}" for i in (0, 100, 200))
        report(f"{precision:8} loss {hundreds} (hundreds of steps), gradient norm {np.mean(norms[200:]):.3f}; sampled "
               f"latents differ by {difference:.2g} of their size; {benchmark_demo.summary([measured])}",
               precision=precision, losses=losses, norms=norms, difference=difference, **measured)


# The command ---------------------------------------------------------------------------------------------------------

def main(argv=None):
    commands = dict(loops=measure_loops, originals=measure_originals, fusion=measure_fusion, scaling=measure_scaling,
                    loader=measure_loader, muon=measure_muon, precision=measure_precision)
    parser = argparse.ArgumentParser(prog="benchmark.py", usage=argparse.SUPPRESS,
                                     description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", nargs="?", choices=commands, default="loops")
    add("--presets", nargs="+", choices=list(d2c.PRESETS), default=["demo", "B"],
        help="of loops; the first is that of scaling")
    add("--batch-sizes", type=number(int, 1), nargs="+", help="one per preset (default 64 and 2, on CUDA 256 and 64)")
    add("--inception-batch", type=number(int, 1), default=16)
    add("--mar", type=Path, metavar="DIR", help="a checkout of LTH14/mar, whose imports are installed")
    add("--llamagen", type=Path, metavar="DIR", help="a checkout of FoundationVision/LlamaGen, likewise")
    add("--run", type=Path, default=Path("runs/demo"), help="of precision")
    add("--folder", type=Path, default=Path("runs/benchmark"), help="of precision: as in benchmark_demo.py")
    add("--rounds", type=number(int, 1), default=5)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "float32"), default="auto", help="as for train.py and sample.py")
    add("--json", type=Path, metavar="FILE", help="all that was measured")
    args = parser.parse_args(argv)
    rows = []

    def report(line, **row):
        print(line, flush=True)
        rows.append(row)
        if args.json:
            with writing(args.json) as temporary:
                temporary.write_text(json.dumps(rows, indent=1))

    with user_errors(parser):
        cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        args.device = Processes("cuda" if cuda else "cpu").device
        with autocast(args.device, args.dtype):
            bf16 = torch.is_autocast_enabled(args.device.type)
        args.matmul = "bf16" if bf16 else "tf32" if cuda else "float32"
        args.batch_sizes = args.batch_sizes or ([256, 64] if cuda else [64, 2])[-len(args.presets):]
        if len(args.batch_sizes) != len(args.presets):
            parser.error("--batch-sizes: give one per preset")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name(args.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        report(f"{name}, torch {torch.__version__}, {args.what}", device=name, torch=torch.__version__,
               settings={key: str(value) for key, value in vars(args).items()})
        commands[args.what](args, report)


if __name__ == "__main__":
    main()
