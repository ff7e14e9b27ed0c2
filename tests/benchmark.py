"""How fast are the hot loops, and how fast could they be?

    python tests/benchmark.py                    every hot loop of presets demo and B: eager, compiled, share of the ceiling
    python tests/benchmark.py originals --mar DIR --llamagen DIR         against checkouts of MAR and of LlamaGen
    python tests/benchmark.py fusion             what cross-attention and the Q-Former add to training and sampling
    python tests/benchmark.py scaling            stage 2 as the batch and the number of tokens grow
    python tests/benchmark.py precision          the diffusion head in bfloat16 and TF32 against float32, on the run in runs/demo

Weights are random but for the last; no time depends on them. Every time is the median of --rounds calls after one that
warms up, with the smallest and the largest behind it. What is compared runs in turn, so that a slow minute hits all alike.
"""
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parent.parent))

import benchmark_demo  # noqa: E402
import d2c  # noqa: E402
import fid  # noqa: E402
import fusion  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from tokenizers import (KLTokenizer, Parser, Processes, TokenCache, TokenizerConfig, VQTokenizer, autocast,  # noqa: E402
                        bf16_wanted, choose_device, positive, to_map, to_uint8, write_atomically)

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


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
    """{name: function} -> {name: seconds of a call, in each round}. A round repeats short calls for a tenth of a second."""
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
    """Bytes at the highest point of a call, with all models that stand there: on a GPU what torch held, on Linux what the
    process held, else None."""
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
    def linear(x, weight, bias, out_shape):
        return 2 * math.prod(x) * weight[0]

    def attention(query, key, value, *others, out_shape, **settings):
        return sdpa_flop_count(query, key, value)

    counted = {torch.ops.d2c.onednn_linear: linear, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        run()
    return counter.get_total_flops()


def ceilings(args):
    """What the device reaches today: {"float32", "tf32", "bf16": FLOP/s of a matrix product, "copy": bytes/s read + written}."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The hot loops
# ---------------------------------------------------------------------------------------------------------------------

# VQ-16, KL-16 and sizes of ImageNet, where a preset leaves them to published files.
PUBLISHED = dict(vq=dict(z_channels=256, codebook_size=16384, decoder_attention=True), kl=dict(z_channels=16))


def make_models(preset, kind=None, grid=None):
    """(VQTokenizer, KLTokenizer, DiscreteGenerator, ContinuousGenerator) of the preset so called, with random weights; with
    another fusion `kind` or `grid` if given."""
    preset = d2c.PRESETS[preset]
    vq, kl = (cls(TokenizerConfig(**(preset[name] or PUBLISHED[name]))) for cls, name in ((VQTokenizer, "vq"), (KLTokenizer, "kl")))
    common = dict(grid=grid or (preset["size"] // kl.config.factor,) * 2, num_classes=1000, codebook_size=vq.config.codebook_size)
    discrete = d2c.DiscreteGenerator(d2c.DiscreteConfig(**common, **preset["stage1"]))
    continuous = d2c.ContinuousGenerator(d2c.ContinuousConfig(**common, channels=kl.config.z_channels,
                                                              fusion=kind or preset["fusion"], **preset["stage2"]))
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
            torch.randint(1000, (batch,), device=device), torch.randint(max(1, config.codebook_size), (batch, places), device=device),
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


def size_of(module):
    """Bytes of its parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def training_loops(name, batch, args):
    """Yields (name, pictures per call, precision of its matrix products, bytes of weights and cache that it must read where
    they are not negligible, eager and compiled call)."""
    *_, discrete, continuous = make_models(name)
    codes = torch.randint(discrete.config.codebook_size, (batch, math.prod(discrete.config.grid)), device=args.device)
    first = codes, torch.randint(1000, (batch,), device=args.device)
    for stage, model, arguments in ((1, discrete, first), (2, continuous, stage2_batch(continuous.config, batch, args.device))):
        model = model.to(args.device)
        compiled = copy.deepcopy(model)
        compiled.compile()
        yield (f"stage {stage}, training step", batch, args.matmul, 0,
               *(training_step(m, arguments, args) for m in (model, compiled)))


def sampling_loops(name, batch, args):
    """As training_loops. Guidance is on: 2 * batch rows."""
    settings, full = d2c.PRESETS[name]["sample"], "tf32" if args.device.type == "cuda" else "float32"
    vq, kl, *generators = (model.to(args.device).eval() for model in make_models(name))
    if args.matmul == "bf16":
        for model in generators:
            sample.cast_weights(model)
    copies = [copy.deepcopy(model) for model in generators]
    for model in copies:
        model.compile()
    (discrete, continuous), config, places = generators, generators[0].config, math.prod(generators[0].config.grid)

    filled, position = 3 * places // 4, torch.tensor([3 * places // 4 - 1], device=args.device)
    cache = [torch.zeros(2, 2 * batch, config.num_heads, filled, config.width // config.num_heads, device=args.device,
                         dtype=torch.bfloat16 if args.matmul == "bf16" else torch.float32).unbind() for _ in discrete.layers]
    read = size_of(discrete.layers) + size_of(discrete.output) + sum(part.nbytes for pair in cache for part in pair)
    arguments = torch.randn(2 * batch, 1, config.width, device=args.device), position, cache
    yield ("stage 1, one code", batch / places, args.matmul, read,
           *(inference(model.decode_one, arguments, args) for model in (discrete, copies[0])))

    config, drawn = continuous.config, max(1, places // settings["steps"])
    latents, _, _, labels, codes, _, _ = stage2_batch(config, 2 * batch, args.device)
    order = torch.rand(2 * batch, places, device=args.device).argsort(1)
    with torch.no_grad():
        arguments = latents, order[:, places // 2:], labels, continuous.prepare(codes), order[:, :drawn]
    yield ("stage 2, trunk, one token step", batch / settings["steps"], args.matmul, size_of(continuous) - size_of(continuous.diffloss),
           *(inference(model.condition, arguments, args) for model in (continuous, copies[1])))

    x, noise = torch.randn(2, batch * drawn, config.channels, device=args.device)
    tables = d2c.diffusion_schedule(settings["diffusion_steps"], x.device, x.dtype)
    scale, index = torch.tensor(2.0, device=args.device), torch.tensor([7], device=args.device)
    c = torch.randn(2 * batch * drawn, config.head_width, device=args.device)
    yield ("stage 2, one denoising step", batch / settings["steps"] / settings["diffusion_steps"], full, size_of(continuous.diffloss),
           *(inference(model.denoising_step, (model.diffloss["net"].denoise, x, c, noise, tables, index, 1.0, scale, settings["clip"]),
                       args) for model in (continuous, copies[1])))

    codes = torch.zeros(batch, *config.grid, dtype=torch.int64, device=args.device)
    latents = torch.randn(batch, config.channels, *config.grid, device=args.device)
    for kind, model, tokens in (("VQ", vq, codes), ("KL", kl, latents)):
        yield (f"{kind} decoder", batch, full, 0,
               *(inference(call, (tokens,), args, "float32") for call in (model.decode, torch.compile(model.decode))))


def inception_loop(args):
    """As training_loops, for fid.py's network with random weights."""
    network = fid.fold_batch_norms(fid.InceptionV3()).to(args.device, memory_format=torch.channels_last)
    images = torch.randn(args.inception_batch, 3, 299, 299, device=args.device).contiguous(memory_format=torch.channels_last)

    def in_full(call):
        def run(x):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as fid.py
                return call(x)
        return run

    yield ("Inception", len(images), "float32", 0,
           *(inference(in_full(call), (images,), args, "float32") for call in (network, torch.compile(network))))


def measure_loops(args, report):
    limits = ceilings(args)
    report("ceilings: " + ", ".join(f"{name} {value / 1e9:.4g} G{'B' if name == 'copy' else 'FLOP'}/s" for name, value in limits.items()),
           ceilings=limits)
    batches = dict(zip(args.presets, args.batch_sizes))
    for group, loops in [*((name, loop(name, batches[name], args)) for name in args.presets for loop in (training_loops, sampling_loops)),
                         ("fid.py", inception_loop(args))]:
        for name, pictures, matmul, read, eager, compiled in loops:
            torch._dynamo.reset()
            counters.clear()
            compilation = clock(compiled, args.device)
            work = flops(eager)
            taken = in_turn({"eager": eager, "compiled": compiled}, args)
            best = min(statistics.median(values) for values in taken.values())
            memory = peak_memory(eager, args.device)
            least, bound = max((work / limits[matmul], matmul), (read / limits["copy"], "copy"))  # seconds at the ceiling
            graphs = counters["stats"]["unique_graphs"]
            one, other = (value[0] if isinstance(value, tuple) else value for value in (eager(), compiled()))
            gap = None if one is None else ((one - other).abs().max() / one.abs().max()).item()
            report(f"{group:6} {name:32} eager {spread([1e3 * t for t in taken['eager']])} ms, compiled "
                   f"{spread([1e3 * t for t in taken['compiled']])} ms, {ratio(taken['compiled'], taken['eager'])} of it; "
                   f"{pictures / best:.4g} pictures/s, {work / best / 1e9:.4g} GFLOP/s, {read / best / 1e9:.3g} GB/s, {least / best:.0%} "
                   f"of {bound}; peak {'?' if memory is None else f'{memory / 2**30:.2f}'} GiB; {graphs} graphs in {compilation:.0f} s"
                   + (f", equal to {gap:.0e}" if gap is not None else ""),
                   preset=group, loop=name, pictures_per_call=pictures, seconds=taken, flops=work, bytes=read, ceiling=bound,
                   share=least / best, difference=gap, peak_bytes=memory, graphs=graphs, compilation_seconds=compilation)


# ---------------------------------------------------------------------------------------------------------------------
# The originals
# ---------------------------------------------------------------------------------------------------------------------


class FixedShare:
    """In the place of MAR's random share of hidden places: its mean."""

    def rvs(self, size):
        return [mean_hidden(d2c.ContinuousConfig())]


def measure_originals(args, report):
    """Preset B against the authors' code, in one process, in turn, on the same weights; all of it eager. "by MKL" is ours
    without `fusion.Linear`'s choice of another library on CPUs."""
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
        runs = {"MAR": inference(lambda: theirs.sample_tokens(bsz=batch, num_iter=8, cfg=2.9, cfg_schedule="linear", labels=labels,
                                                              temperature=1.0), (), args),
                "ours": inference(lambda: ours.generate(labels, None, 8, 2.9), (), args),
                "ours at 50:5": inference(lambda: ours.generate(labels, None, 8, 2.9, diffusion_steps=(50, 5)), (), args)}
        report_race(f"stage 2, sampling {batch} pictures, 8 token steps of 100 diffusion steps", runs, args, report)
        sys.path.remove(str(args.mar))
    if args.llamagen:
        sys.path.insert(0, str(args.llamagen))
        from autoregressive.models.generate import generate
        from autoregressive.models.gpt import GPT_models

        theirs = GPT_models["GPT-B"](block_size=256, vocab_size=16384, num_classes=1000, cls_token_num=1).to(device).eval()
        torch.nn.init.normal_(theirs.output.weight, std=0.02)  # they start at zero
        state = {key: value for key, value in theirs.state_dict().items() if "freqs" not in key and "cache" not in key}
        ours = d2c.DiscreteGenerator.from_published(state).to(device).eval()
        if args.matmul == "bf16":  # both as they are used: LlamaGen's is in bf16 throughout
            theirs = theirs.bfloat16()
            sample.cast_weights(ours)
        labels = torch.randint(1000, (batch,), device=device)
        runs = {"LlamaGen": inference(lambda: generate(theirs, labels, 256, cfg_scale=2.0, temperature=1.0, top_k=0, top_p=1.0,
                                                       sample_logits=True), (), args, "float32"),
                "ours": inference(lambda: ours.generate(labels, 2.0), (), args)}
        if device.type == "cpu":
            runs["ours by MKL"] = without_onednn(runs["ours"])
        report_race(f"stage 1, sampling {batch} pictures", runs, args, report)


def without_onednn(run):
    """run() with all linear layers torch's own."""
    def by_mkl():
        known, fusion.Linear.KNOWN = fusion.Linear.KNOWN, False
        run()
        fusion.Linear.KNOWN = known
    return by_mkl


def report_race(name, runs, args, report):
    taken = in_turn(runs, args)
    theirs, *ours = taken
    for label in ours:
        report(f"{name}: {theirs} {spread(taken[theirs])} s, {label} {spread(taken[label])} s, {ratio(taken[label], taken[theirs])} of it",
               race=name, seconds={theirs: taken[theirs], label: taken[label]})


# ---------------------------------------------------------------------------------------------------------------------
# The price of fusion, and of size
# ---------------------------------------------------------------------------------------------------------------------


def measure_fusion(args, report):
    """Preset B. 16 token steps of 25 keep the balance of arithmetic in trunk and head of 64 steps of 100, in a quarter of the time."""
    batch, models = args.batch_sizes[-1], {}
    for kind in ("none", "cross", "qformer", "aligned"):
        models[kind] = make_models("B", kind)[3].to(args.device)
    arguments = stage2_batch(models["none"].config, 2 * batch, args.device)
    labels, codes = arguments[3][:batch], arguments[4][:batch]
    trained = in_turn({kind: training_step(model, arguments, args) for kind, model in models.items()}, args)
    sampled = in_turn({kind: inference(model.eval().generate, (labels, codes, 16, 2.9, 1.0, 25), args) for kind, model in models.items()}, args)
    for name, taken in ((f"training step of {2 * batch}", trained), (f"sampling {batch} pictures", sampled)):
        for kind, values in taken.items():
            report(f"{name}: {kind:8} {spread(values)} s, {ratio(values, taken['none'])} of none", part=name, fusion=kind, seconds=values)


def measure_scaling(args, report):
    """Seconds per picture of stage 2. The exponent compares with the row above: 0 is a constant time per picture, as the
    batch grows; 1 is a time in proportion to the tokens."""
    name = args.presets[0]
    for what, sizes in (("batch", [(64, batch) for batch in (1, 4, 16, 64, 256)]), ("tokens", [(tokens, 4) for tokens in (64, 256, 1024)])):
        before = None
        for tokens, batch in sizes:
            model = make_models(name, grid=(math.isqrt(tokens),) * 2)[3].to(args.device)
            arguments = stage2_batch(model.config, batch, args.device)
            taken = in_turn({"training": training_step(model, arguments, args),
                             "sampling": inference(model.eval().generate, (arguments[3], arguments[4], 8, 2.0, 1.0, 25), args)}, args)
            now = {part: statistics.median(values) / batch for part, values in taken.items()}
            growth = {part: math.log(now[part] / before[part]) / math.log(tokens / size[0] * batch / size[1]) for part in now} if before else {}
            report(f"{what:6} {tokens:4} tokens, batch {batch:3}: " + ", ".join(
                f"{part} {1e3 * now[part]:.4g} ms a picture" + (f" (exponent {growth[part]:+.2f})" if growth else "") for part in now),
                preset=name, tokens=tokens, batch=batch, seconds=taken)
            before, size = now, (tokens, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Precision of the diffusion head
# ---------------------------------------------------------------------------------------------------------------------


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


def head_in(net, precision):
    """Give the diffusion network `net` another arithmetic for its matrix products; the rest of the model keeps float32."""
    products = {"bf16": lambda x, weight, bias: F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).float(), "TF32": TF32.apply}
    if precision != "float32":
        for layer in net.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.forward = lambda x, layer=layer: products[precision](x, layer.weight, layer.bias)


def measure_precision(args, report):
    """300 training steps of stage 2 from one start on the run's tokens, and 1,000 pictures of the run's trained models."""
    torch.set_float32_matmul_precision("highest")
    preset, processes = d2c.PRESETS["demo"], Processes(str(args.device))
    cache = TokenCache(args.run / "tokens")
    pipeline = sample.Pipeline(sample.parse(["--run", str(args.run), "--dtype", "float32"])[1], args.device)
    config, settings = pipeline.continuous.config, pipeline.settings
    rulers = benchmark_demo.Rulers(args.folder)
    pictures, labels = benchmark_demo.real_pictures(1000, benchmark_demo.TEST_SEED)
    labels = torch.from_numpy(labels).to(args.device)
    codes = torch.cat([pipeline.discrete.generate(part, settings["cfg1"], settings["temperature1"],
                                                  generator=torch.Generator(args.device).manual_seed(k))
                       for k, part in enumerate(labels.split(100))])                          # (1000,N)
    exact = None
    for precision in ("float32", "TF32", "bf16"):
        torch.manual_seed(0)
        model = d2c.ContinuousGenerator(config).to(args.device)
        head_in(model.diffloss["net"], precision)
        batches = train.Batches(lambda *chosen: train.read_latents(cache, config, 0.0, *chosen), cache.usable, 64, 2, 0, processes)
        optimizer, losses, norms = torch.optim.AdamW(model.parameters(), preset["train"][2]["lr"], betas=(0.9, 0.95)), [], []
        for step in range(300):
            loss = model(*(x.to(args.device) for x in batches[step]))
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        trained = copy.deepcopy(pipeline.continuous)
        head_in(trained.diffloss["net"], precision)
        latents = torch.cat([trained.generate(part, codes[100 * k:100 * k + 100], settings["steps"], settings["cfg2"], settings["temperature2"],
                                              settings["diffusion_steps"], settings["clip"], torch.Generator(args.device).manual_seed(k))
                             for k, part in enumerate(labels.split(100))])                    # (1000,N,C)
        exact = latents if exact is None else exact
        with torch.no_grad():
            fine = torch.cat([to_uint8(pipeline.kl.decode(to_map(part, config.grid) / pipeline.kl.scale)) for part in latents.split(100)])
        measured = rulers.measure(fine.cpu().numpy(), labels.cpu().numpy())
        difference = ((latents - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
        report(f"{precision:8} loss {np.mean(losses[:100]):.4f} {np.mean(losses[100:200]):.4f} {np.mean(losses[200:]):.4f} (hundreds of steps), "
               f"gradient norm {np.mean(norms[200:]):.3f}; sampled latents differ by {difference:.2g} of their size; {benchmark_demo.summary([measured])}",
               precision=precision, losses=losses, norms=norms, difference=difference, **measured)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    commands = dict(loops=measure_loops, originals=measure_originals, fusion=measure_fusion, scaling=measure_scaling,
                    precision=measure_precision)
    parser = Parser(prog="benchmark.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", nargs="?", choices=commands, default="loops")
    add("--presets", nargs="+", choices=list(d2c.PRESETS), default=["demo", "B"], help="of loops; the first is that of scaling")
    add("--batch-sizes", type=positive, nargs="+", help="one per preset (default 64 and 2, on CUDA 256 and 64)")
    add("--inception-batch", type=positive, default=16)
    add("--mar", type=Path, metavar="DIR", help="a checkout of LTH14/mar, whose imports are installed")
    add("--llamagen", type=Path, metavar="DIR", help="a checkout of FoundationVision/LlamaGen, whose imports are installed")
    add("--run", type=Path, default=Path("runs/demo"), help="of precision")
    add("--folder", type=Path, default=Path("runs/benchmark"), help="of precision: where benchmark_demo.py keeps its rulers")
    add("--rounds", type=positive, default=5)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "float32"), default="auto", help="as for train.py and sample.py")
    add("--json", type=Path, metavar="FILE", help="all that was measured")
    args = parser.parse_args(argv)
    rows = []

    def report(line, **row):
        print(line, flush=True)
        rows.append(row)
        if args.json:
            write_atomically(args.json, lambda temporary: temporary.write_text(json.dumps(rows, indent=1)))

    with parser.plain_errors():
        cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        args.device = choose_device("cuda" if cuda else "cpu")
        args.matmul = "bf16" if bf16_wanted(args.device, args.dtype) else "tf32" if cuda else "float32"
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
