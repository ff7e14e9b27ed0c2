"""Train D2C: the tokenizers (stage 0), the discrete generator (stage 1), the continuous generator (stage 2).

    python train.py                                        demo: built-in pictures, all stages, minutes on a laptop
    python train.py --preset cifar --data cifar10.npz      real pictures, one GPU
    python train.py --stage 0 --preset B --data IMAGENET/train --vq vq_ds16_c2i.pt --kl kl16.ckpt       encode once
    torchrun --nproc_per_node=8 train.py --stage 1 --preset B                                           8 GPUs, one node
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST train.py --stage 2 --preset B     two nodes

Everything goes to one run folder (--out): tokenizers.pt, tokens/, stage0.pt, stage1.pt, stage2.pt and a .csv log per
stage. The same command again resumes. All three stages go through one loop, `fit`: a stage brings a model whose forward
is its loss, and a function that reads one picture as this model wants it.

The random numbers of a picture in a training step come from a generator seeded by (seed, stage, step, row of the
batch), and what a batch shares from (seed, stage, step). So a resumed run equals an uninterrupted one, and the number
of processes changes nothing but rounding. (Dropout, which torch draws itself, differs between processes.)

Reading order: one picture, the step, the loop, the three stages, the command; then token cache, files, processes.
"""
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly
import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import re
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, default_collate

import tokenizers
if not hasattr(tokenizers, "VQTokenizer"):
    raise ImportError(f"found Hugging Face's tokenizers: first put {Path(__file__).parent} in front of sys.path")
from d2c import PRESETS, ContinuousConfig, ContinuousGenerator, DiscreteConfig, DiscreteGenerator, compile_parts
from tokenizers import (SUFFIXES, InputError, KLTokenizer, TokenizerConfig, VQTokenizer, find_files, open_images,
                        reading, to_float, to_tokens)

# One picture of a batch, as each stage wants it (chance: a uniform number that the whole batch shares) ----------------

def read_picture(images, latent_shape, index, generator, chance):
    """Stage 0: picture (3,S,S), mirrored with probability 1/2, and noise (C,h,w) for the KL tokenizer."""
    picture = to_float(torch.as_tensor(images[index][0])[None])[0]                            # (3,S,S)
    if torch.rand((), generator=generator) < 0.5:
        picture = picture.flip(2)
    return picture, torch.randn(latent_shape, generator=generator)

def read_codes(cache, index, generator, chance):
    """Stage 1: codes (N,) int64 of one picture, with probability 1/2 of its mirror image, and its label, an int, which
    is dropped (-1) with probability 0.1, independently."""
    flip, drop = torch.rand(2, generator=generator).tolist()
    codes = torch.from_numpy(cache.codes[int(flip < 0.5), index].astype(np.int64))            # (N,)
    return codes, -1 if drop < 0.1 else int(cache.labels[index])

def read_latents(cache, config, index, generator, chance):
    """Stage 2: one picture's arguments of ContinuousGenerator.forward, for the `config` of that model: latents, a new
    sample times the cache's scale; visible and hidden places; label, codes, t (uniform) and noise.

    The picture is mirrored with probability 1/2. `chance` decides how many places are hidden (count_hidden), the same
    for the whole batch; which ones is the picture's own random order. Independently of that, class and codes are
    dropped together with probability 0.1, for guidance; codes alone with 0.05, so that the class keeps a meaning of its
    own; and, if there is fusion, the class alone with 0.05, for pictures whose class nobody knows (`sample.py --from`).
    Without fusion codes are read all the same."""
    number, channels = cache.moments.shape[2], cache.moments.shape[3] // 2
    flip, drop = torch.rand(2, generator=generator).tolist()
    mirrored = int(flip < 0.5)
    moments = torch.from_numpy(cache.moments[mirrored, index].astype(np.float32))             # (N,2C), see TokenCache
    eps = torch.randn(number, channels, generator=generator)
    latents = KLTokenizer.sample(moments, eps, dim=1) * cache.meta["scale"]                   # (N,C), of variance 1
    label = -1 if drop < 0.1 or (0.15 <= drop < 0.2 and config.fusion != "none") else int(cache.labels[index])
    codes = torch.from_numpy(cache.codes[mirrored, index].astype(np.int64))                   # (N,)
    codes = codes.fill_(-1) if drop < 0.15 else codes

    count, order = count_hidden(number, config, chance), torch.randperm(number, generator=generator)
    t = torch.randint(1000, (count, config.noise_levels), generator=generator)                # (H,R)
    noise = torch.randn(count, config.noise_levels, channels, generator=generator)            # (H,R,C)
    return latents, order[count:], order[:count], label, codes, t, noise

def count_hidden(number, config, chance):
    """How many of `number` places are hidden: `chance` in [0,1) runs through a normal around 1, cut to [smallest share,
    1]. (MAR's smallest share, 0.7, would show four of 16 places at most, too few: the small presets have 0.1.)"""
    deviation, smallest = config.hidden_share
    normal = NormalDist(1, deviation)
    low = normal.cdf(smallest)
    return math.ceil(number * normal.inv_cdf(low + chance * (0.5 - low)))

class Pictures(Dataset):
    """Item (step, row) is the picture in row `row` of the batch of training step `step`: what `read` makes of it, with
    the random numbers of this step and row. Every epoch visits all `indices` in a new order.

    With `held_out` the batch is the same at every step, and `chance` takes QUARTERS values, evenly spread over the
    rows: so the number of hidden places in validation does not depend on the seed."""
    QUARTERS = 4

    def __init__(self, read, indices, batch_size, stage, seed, held_out=False):
        self.read, self.indices, self.batch_size, self.held_out = read, indices, batch_size, held_out
        self.stage, self.seed = stage, seed

    def __getitem__(self, step_and_row):
        step, row = step_and_row
        epoch, position = divmod(row if self.held_out else step * self.batch_size + row, len(self.indices))
        index = int(self.indices[epoch_order(len(self.indices), self.seed, epoch)[position]])
        if self.held_out:
            step, chance = "held out", (self.quarter(row) + 0.5) / self.QUARTERS
        else:
            chance = seed_of(self.seed, self.stage, step) / 2**63  # a seed is as good as a random number
        return self.read(index, torch.Generator().manual_seed(seed_of(self.seed, self.stage, step, row)), chance)

    def quarter(self, row):
        """Which quarter of the batch a row is in."""
        return row * self.QUARTERS // self.batch_size

@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """The order in which an epoch visits `count` pictures."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)

def seed_of(*parts):
    """One 63-bit seed from integers or words: a hash of their text."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

# The step ------------------------------------------------------------------------------------------------------------

def learning_rate(step, steps, peak, warmup, decay):
    """Linear warm-up: step s of the first `warmup` has (s + 1) / warmup of the peak. Then constant, or (decay="cosine")
    a half cosine from the peak to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak if decay == "constant" else peak * 0.5 * (1 + math.cos(math.pi * share))

def ema_decay(step, longest):
    """Decay of the moving average of weights: (1 + step) / (10 + step), at most `longest`. A young average forgets its
    random start quickly."""
    return min(longest, (1 + step) / (10 + step))

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before each step: every direction of a matrix learns equally fast, not only the few in
    which gradients are large (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Elements of a step are
    0.2 of the rate on average, as in AdamW, so one rate suits both (Liu et al. 2025, arXiv 2502.16982).

    torch.optim.Muon(adjust_lr_fn="match_rms_adamw", ns_steps=3) is the same in bfloat16, which takes twenty times as
    long on processors that have no instructions for it (docs/speed.md)."""
    def __init__(self, groups, lr, momentum=0.95):
        super().__init__(groups, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                buffer.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(buffer, group["momentum"]))  # Nesterov's: one step ahead
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))

def orthogonal(matrix, iterations=3):
    """matrix (m,n) -> (m,n): the same singular vectors, with singular values nearer to 1. An iteration takes each value
    s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, by products alone. (Torch makes five; three leave small ones small.)"""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / matrix.norm().clamp(min=1e-7)
    for _ in range(iterations):
        square = x @ x.T                                                         # (m,m), or (n,n) if that is smaller
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x

def make_optimizers(model, settings):
    """[AdamW], or with settings["muon"] [AdamW, Muon]. Muon takes the matrices inside the blocks (their names have a
    number), which map features to features. AdamW keeps the rest: vectors, embeddings, position tables, and first and
    last layers, where a row stands for one code, class or channel.

    Weight decay on parameters of two or more dimensions, and never on the diffusion head (LlamaGen and MAR)."""
    adamw, muon = {}, {}  # weight decay: the group of parameters that has it
    for name, parameter in model.named_parameters():
        decay = settings["weight_decay"] if parameter.ndim >= 2 and not name.startswith("diffloss.") else 0.0
        in_block = parameter.ndim == 2 and re.search(r"\.\d+\.", name)
        groups = muon if settings["muon"] and in_block else adamw
        groups.setdefault(decay, dict(params=[], weight_decay=decay))["params"].append(parameter)
    optimizers = [torch.optim.AdamW(adamw.values(), lr=settings["lr"], betas=(0.9, 0.95), fused=True)]
    return optimizers + [Muon(muon.values(), lr=settings["lr"])] if muon else optimizers

def split(batch, pieces, device):
    """A batch, a tuple of tensors, on the device and cut into `pieces`: a list of tuples."""
    return list(zip(*(x.to(device, non_blocking=True).chunk(pieces) for x in batch)))

def training_step(model, average, optimizers, batch, step, settings, args, processes):
    """One training step: loss and gradient, clipping, update, moving average. Returns the loss, a tensor.

    model: its forward is the loss; among several processes it is wrapped in DistributedDataParallel, which averages the
    gradients. average: an AveragedModel of it. batch: this process's pictures. settings: those of `fit`."""
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    torch.manual_seed(seed_of(args.seed, settings["stage"], step, "dropout", processes.rank))
    rate = learning_rate(step, settings["steps"], settings["lr"], settings["warmup"], settings["decay"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    model.train()
    total, pieces = 0.0, split(batch, args.accumulate, processes.device)
    for k, piece in enumerate(pieces):
        waits = bare is not model and k < len(pieces) - 1  # gradients travel once per step, with the last piece
        with model.no_sync() if waits else contextlib.nullcontext():
            with autocast(processes.device, args.dtype):
                loss = model(*piece) / len(pieces)
            loss.backward()
        total = total + loss.detach()
    for module in bare.children() if isinstance(bare, Tokenizers) else [bare]:  # each tokenizer by its own norm
        nn.utils.clip_grad_norm_(module.parameters(), settings["grad_clip"])
    seen = [processes.gather(torch.cat(x)) for x in zip(*bare.seen)] if isinstance(bare, Tokenizers) else None
    for optimizer in optimizers:  # from here on nothing waits for other processes: a step is made whole or not at all
        optimizer.step()
    model.zero_grad(set_to_none=True)
    if seen:
        bare.revive_codes(*seen, torch.Generator().manual_seed(seed_of(args.seed, step, "revive")))
    average.multi_avg_fn = get_ema_multi_avg_fn(ema_decay(step, settings["ema"]))
    average.update_parameters(bare)
    return total

# The loop ------------------------------------------------------------------------------------------------------------

def fit(stage, model, read, count, defaults, fixed, extra, args, processes):
    """Train `model` (its forward is the loss) from the run's checkpoint, if there is one, to the steps asked for.

    read: one of the functions above, for `count` pictures; 1 % of them, at most 5,000, are held out, and one batch of
    those is measured. defaults: the preset's training settings. fixed: what must stay the same from command to command.
    extra: stored for sample.py. Returns the averaged (EMA) model. Raises InputError, for a loss not finite too."""
    device, path = processes.device, Path(args.out) / f"stage{stage}.pt"
    steps, batch_size = args.steps or defaults["steps"], args.batch_size or defaults["batch_size"]
    settings = defaults | dict(
        stage=stage, steps=steps, warmup=min(defaults["warmup"], steps // 5),  # a trial of few steps should learn, too
        lr=defaults["lr"] * batch_size / defaults["batch_size"] if args.lr is None else args.lr)
    fixed = fixed | dict(batch_size=batch_size)
    if settings["decay"] != "constant":
        fixed["steps"] = steps  # the rate of every step depends on it
    if batch_size % (processes.size * args.accumulate):
        raise InputError(f"--batch-size {batch_size}: must be divisible by the number of processes x --accumulate")
    if count < 2:
        raise InputError("--data: needs at least two pictures, one of which is held out for validation")
    order = np.random.default_rng([args.seed, 1]).permutation(count)
    num_held_out = max(1, min(count // 100, 5000))
    train = Pictures(read, order[num_held_out:], batch_size, stage, args.seed)
    held_out = Pictures(read, order[:num_held_out], batch_size, stage, args.seed, held_out=True)
    model = model.to(device)
    average = AveragedModel(model)
    average.eval().n_averaged.fill_(1)  # else its first update copies the model instead of averaging
    optimizers = make_optimizers(model, settings)
    start, log, seconds_before = 0, [], 0.0
    if path.exists():
        file = read_checkpoint(path)
        with reading(path, "it does not fit this stage; move it away or choose another --out"):
            run, start, log = entries(file, run=dict, step=int, log=list).values()
            seconds_before = float(log[-1][-1]) if log else 0.0
            fixed = check_fixed(path, run, fixed)
            if file.get("config") != extra.get("config"):
                raise ValueError("the preset has other sizes now")
            model.load_state_dict(file["model"])
            average.module.load_state_dict(file["ema"])
            for optimizer, state in zip(optimizers, file["optimizers"], strict=True):
                optimizer.load_state_dict(dict(optimizer.state_dict(), state=state["state"]))
                for parameter, found in optimizer.state.items():  # torch does not look
                    shapes, whole = {name: x.shape for name, x in found.items()}, parameter.shape
                    if shapes not in (dict(step=(), exp_avg=whole, exp_avg_sq=whole), dict(momentum_buffer=whole)):
                        raise ValueError("the optimizer's state does not belong to these weights")
        del file
    if len(set(processes.gather(torch.tensor([start], device=device)).tolist())) > 1:
        raise InputError(f"{path}: is not the same for all processes; --out must lie on storage that all nodes share")
    if start >= steps:
        processes.say(f"stage {stage}: finished ({start} steps)")
        return average.module

    def save(step):
        if processes.rank == 0:  # the log first: where a kill comes between the two, the missing steps are made again
            with writing(path.with_suffix(".csv")) as temporary, open(temporary, "w", newline="") as file:
                columns = "step", "loss", "validation", "learning_rate", "images_per_second", "seconds"
                csv.writer(file).writerows([columns, *log])
            with writing(path) as temporary:
                torch.save(dict(extra, run=fixed, stage=stage, step=step, log=log, model=model.state_dict(),
                                ema=average.module.state_dict(),
                                optimizers=[optimizer.state_dict() for optimizer in optimizers]), temporary)

    size = batch_size // processes.size
    mine = range(processes.rank * size, (processes.rank + 1) * size)  # this process's rows of every batch
    quarters = [default_collate([held_out[0, row] for row in rows]) for _, rows in groupby(mine, held_out.quarter)]
    pieces = [piece for quarter in quarters for piece in split(quarter, args.accumulate, device)]

    if args.compile and stage:  # compiling the convolutions of stage 0 gains nothing (docs/speed.md)
        torch._dynamo.config.optimize_ddp = False  # it would cut each block's small graph; blocks overlap enough
        compile_parts(model)
    wrapped = nn.parallel.DistributedDataParallel(model) if processes.size > 1 else model
    resuming = f"resuming {path} at step {start} of {steps}, " if start else ""
    processes.say(f"stage {stage}: {resuming}{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
                  f"{len(train.indices)} pictures, steps of {batch_size}, on {processes.size} x {device}")
    keys = ([(step, row) for row in mine] for step in range(start, steps))
    loader = DataLoader(train, batch_sampler=keys, num_workers=args.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=leave_signals)
    log_every = max(1, min(100, steps // 20))
    losses = []  # they stay on the device until they are logged
    began = last = time.time()
    done, saved, look, stop, received = start, start, start + 1, 0, []

    def receive(number, frame):
        received.append((number, time.monotonic()))
        if received[-1][1] > received[0][1] + 1:  # a second one does not wait; but some tools send the first one twice
            raise KeyboardInterrupt(number)

    batches = zip(range(start, steps), loader)  # starts the processes that read, and sets a handler for their death,
    on_signals(receive)                         # which this takes away again
    try:
        for step, batch in batches:
            losses.append(training_step(wrapped, average, optimizers, batch, step, settings, args, processes))
            done = step + 1
            if done >= look or done == steps:
                stop, look = agree_to_stop(received, done, (time.time() - began) / (done - start), processes)
            save_now = done % args.save_every == 0 or done == steps or stop
            if done % log_every == 0 or save_now:
                with torch.no_grad(), autocast(device, args.dtype):  # by the averaged weights, a mean over pictures
                    held = sum(average(*piece) * len(piece[0]) for piece in pieces) / size
                history, validation = (processes.gather(x[None]).mean(0).tolist() for x in (torch.stack(losses), held))
                bad = [done + 1 - len(history) + i for i, loss in enumerate(history) if not math.isfinite(loss)]
                if bad or not math.isfinite(validation):
                    saved = done  # nothing worth saving
                    raise InputError(f"stage {stage}: the loss is not finite at step {(bad or [done])[0]}: try a lower "
                                     f"rate, as --lr {settings['lr'] / 3:.1e}. Earlier saves are whole")
                loss, rate, now = sum(history) / len(history), optimizers[0].param_groups[0]["lr"], time.time()
                speed = len(history) * batch_size / max(now - last, 1e-9)  # a clock may stand still for a while
                eta = timedelta(seconds=int((steps - done) * (now - began) / (done - start)))
                log.append([done, round(loss, 5), round(validation, 5), float(f"{rate:.4g}"), round(speed, 1),
                            round(seconds_before + now - began, 1)])
                processes.say(f"stage {stage}  step {done}/{steps}  loss {loss:.4f}  validation {validation:.4f}  "
                              f"rate {rate:.2e}  {speed:.0f} images/s  ETA {eta}")
                losses, last = [], now
            if save_now:
                save(done)
                saved = done
                processes.wait()
            if stop:
                processes.say(f"stopped after step {done} and saved {path}; run the same command again to go on")
                raise SystemExit(128 + stop)
    except Exception:  # a broken picture, a dead reader, a lost peer: what is trained so far is kept
        if done > saved and all(x.isfinite().all() for x in [*losses, *model.parameters()]):
            save(done)
        raise
    finally:
        on_signals(interrupt)
    if received:  # after the loop's last look
        raise KeyboardInterrupt(received[0][0])
    return average.module

def leave_signals(worker):
    """For processes that read data: a signal to the whole group is for the main one, which saves and then ends them."""
    on_signals(signal.SIG_IGN)

def agree_to_stop(received, done, seconds, processes):
    """(the signal to stop on or 0, the step of the next look). Processes must look at the same steps: about every five
    seconds, at `seconds` a step. (After a signal torchrun waits 30 seconds, or its --shutdown-timeout, and kills.)"""
    stop = received[0][0] if received else 0
    if processes.size == 1:
        return stop, done + 1
    told = processes.gather(torch.tensor([[stop, seconds]], device=processes.device))
    return int(told[:, 0].max()), done + max(1, min(100, int(5 / max(told[:, 1].max().item(), 0.01))))

# Stage 0: tokenizers and token cache ---------------------------------------------------------------------------------

class Tokenizers(nn.Module):
    """Both tokenizers under one loss (they share no parameter), with revival of dead codes."""
    PATIENCE = 30  # steps without use before a code counts as dead

    def __init__(self, vq, kl):
        super().__init__()
        self.vq, self.kl = vq, kl
        self.seen = []  # pairs of codes and encoder outputs since the last revival, one for each forward in training
        self.register_buffer("unused", torch.zeros(vq.config.codebook_size, dtype=torch.int64))

    def forward(self, pictures, noise):
        loss, codes, z = self.vq(pictures)
        if self.training:
            self.seen.append((codes.flatten(), z.detach().permute(0, 2, 3, 1).flatten(0, 2)))  # (bhw,), (bhw,code_dim)
        return loss + self.kl(pictures, noise)

    @torch.no_grad()
    def revive_codes(self, codes, z, generator):
        """Move codes that no place chose for PATIENCE steps, this one included (`unused` counts steps, per code), onto
        encoder outputs drawn at random by `generator`, each onto another one; if there are fewer outputs, some wait. A
        code that moved counts from 0. `seen` is emptied. codes (n,) and z (n,code_dim): `seen` of all processes.
        (After the optimizer's step, which would move them again.)"""
        self.seen = []
        self.unused += 1
        self.unused[codes] = 0
        dead = (self.unused >= self.PATIENCE).nonzero()[:len(z), 0]
        chosen = torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)
        self.vq.quantize["embedding"].weight[dead] = z[chosen]
        self.unused[dead] = 0

KL16_SCALE = 0.2325  # of KL-16 on ImageNet; MAR's weights expect latents multiplied by exactly this

def stage0(args, preset, processes):
    """Make the tokenizers and the token cache, each unless it is there. Raises InputError."""
    path, folder = Path(args.out) / "tokenizers.pt", Path(args.out) / "tokens"
    fixed = dict(preset=args.preset, seed=args.seed)
    fixed |= {name: identity(getattr(args, name)) for name in ("data", "vq", "kl")}
    if (folder / "meta.json").exists():
        meta = TokenCache(folder).meta
        (folder / "done.npy").unlink(missing_ok=True)  # of an encoding that was killed at its very end
        check_fixed(folder, meta["run"], fixed)
        if not args.stage:
            processes.say(f"stage 0: finished ({meta['count']} pictures encoded in {folder})")
        return
    if args.stage:
        processes.say(f"{folder} is not there: building it first (stage 0; --steps, --lr and --batch-size count there)")
    there, kinds = path.exists(), (("vq", VQTokenizer), ("kl", KLTokenizer))
    if there:
        vq, kl, file = load_tokenizers(path)
        fixed = check_fixed(path, file["run"], fixed)
    elif args.vq:
        vq, kl = (load_published(cls.from_published, getattr(args, name)) for name, cls in kinds)
    elif preset["vq"]:
        torch.manual_seed(seed_of(args.seed, 0))
        vq, kl = (cls(TokenizerConfig(**preset[name])) for name, cls in kinds)
    else:
        raise InputError(f"preset {args.preset} uses the published tokenizers: give both --vq FILE and --kl FILE")
    if not fixed.get("data"):
        raise InputError(f"preset {args.preset} needs --data: a folder of class folders, an .npz, or shapes")
    if vq.config.codebook_size > 2**16:
        raise InputError(f"--vq: its codebook has {vq.config.codebook_size} rows; codes are stored in 16 bits")
    if vq.config.factor != kl.config.factor:
        raise InputError(f"the grids of --vq and --kl differ: {vq.config.factor} and {kl.config.factor} pixels a place")
    data = args.data or str(fixed["data"]).rsplit(" [", 1)[0]
    if not args.data:  # it must not have changed meanwhile
        check_fixed(path, fixed, dict(data=identity(data)))
    images = open_images(data, preset["size"], args.seed)
    empty = len(images.classes) - np.count_nonzero(np.bincount(images.labels))
    processes.say(f"data: {len(images)} pictures of {len(images.classes) - empty} classes"
                  + f" (and {empty} classes without pictures)" * bool(empty) + images.note)
    processes.wait()  # all have looked before one of them writes
    vq, kl = vq.to(processes.device).eval(), kl.to(processes.device).eval()
    if not there:
        if not args.vq:
            side = preset["size"] // kl.config.factor
            read = functools.partial(read_picture, images, (kl.config.z_channels, side, side))
            trained = fit(0, Tokenizers(vq, kl), read, len(images), preset["train"][0], fixed, {}, args, processes)
            vq, kl = trained.vq, trained.kl
        kl.scale = measure_scale(kl, images, args.seed)
        if args.kl and abs(kl.scale / KL16_SCALE - 1) < 0.05:
            kl.scale = KL16_SCALE  # KL-16 on something like ImageNet: keep what MAR's weights were trained on
        file = save_tokenizers(path, vq, kl, preset["size"], fixed, processes)
    encode_images(images, vq, kl, file["id"], folder, fixed, processes, args.workers)

@torch.no_grad()
def measure_scale(kl, images, seed=0):
    """1 / standard deviation of the latents of up to 2,048 pictures drawn at random. Raises InputError."""
    chosen = np.random.default_rng(seed).permutation(len(images))[:2048].tolist()
    generator, latents = torch.Generator().manual_seed(seed), []
    for pictures, _ in DataLoader(images, batch_size=64, sampler=chosen):
        moments = kl.encode(to_float(pictures.to(kl.quant_conv.weight.device))).cpu()         # (B,2C,h,w)
        latents.append(kl.sample(moments, torch.randn(moments.chunk(2, 1)[0].shape, generator=generator)).double())
    scale = 1 / float(torch.cat(latents).std())
    if not 0 < scale < math.inf:
        raise InputError("the KL tokenizer's latents are constant or not finite: train it longer, or check --kl")
    return scale

# Stages 1 and 2: the generators --------------------------------------------------------------------------------------

def train_generator(stage, args, preset, processes):
    """Stage 1 or 2 on the token cache. Raises InputError."""
    out = Path(args.out)
    cache, (vq, kl, file) = TokenCache(out / "tokens"), load_tokenizers(out / "tokenizers.pt")
    meta = cache.meta
    if meta != meta | token_facts(vq, kl, file["id"], file["size"]):
        raise InputError(f"{cache.folder}: was not made with {out}/tokenizers.pt; delete it and run train.py --stage 0")
    fixed = dict(preset=args.preset, seed=args.seed, tokens=file["id"], init=identity(args.init))
    common = dict(num_classes=len(meta["classes"]), grid=tuple(meta["grid"]), codebook_size=meta["codebook_size"])
    torch.manual_seed(seed_of(args.seed, stage))
    if stage == 1:
        model = DiscreteGenerator(DiscreteConfig(**common, **preset["stage1"]))
        read = functools.partial(read_codes, cache)
    else:
        fixed["fusion"] = args.fusion or preset["fusion"]
        config = ContinuousConfig(**common, **preset["stage2"], channels=meta["channels"], fusion=fixed["fusion"])
        model = ContinuousGenerator(config)
        if config.fusion != "none":
            model.start_fusion(vq.codebook())
        read = functools.partial(read_latents, cache, config)
    if args.init and not (out / f"stage{stage}.pt").exists():
        load_published(model.load_published, args.init)
        processes.say(f"stage {stage}: starting from {args.init}")
    extra = dict(config=asdict(model.config), classes=meta["classes"], scale=meta["scale"], tokenizers=file["id"],
                 sample=preset["sample"], counts=np.bincount(cache.labels, minlength=len(meta["classes"])).tolist())
    fit(stage, model, read, len(cache.labels), preset["train"][stage], fixed, extra, args, processes)

# The command ---------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(prog="train.py", usage=argparse.SUPPRESS, description="Train D2C.")
    parser.register("type", None, word)  # where nothing else is said
    add = parser.add_argument
    add("--stage", type=int, choices=(0, 1, 2), help="0 tokenizers, 1 discrete, 2 continuous generator (default: all)")
    add("--preset", choices=PRESETS, default="demo", help="sizes and training settings (default demo)")
    add("--out", help="run folder (default runs/PRESET)")
    add("--data", help="shapes (built in), a folder of class folders, or an .npz with images and labels")
    add("--vq", metavar="FILE", help="published VQ tokenizer (LlamaGen's vq_ds16_c2i.pt) instead of training one")
    add("--kl", metavar="FILE", help="published KL tokenizer (MAR's kl16.ckpt) instead of training one")
    add("--fusion", choices=("none", "cross", "qformer", "aligned"), help="how codes enter stage 2 (default: preset's)")
    add("--init", metavar="FILE", help="start --stage 1 from LlamaGen's or --stage 2 from MAR's weights")
    add("--steps", type=number(int, 1, 10**9), help="training steps of each stage that runs")
    add("--batch-size", type=number(int, 1), help="pictures per step of all processes; the default rate scales with it")
    add("--accumulate", type=number(int, 1), default=1, help="split each process's share of a step into so many parts")
    add("--lr", type=number(float, 0), help="peak learning rate")
    add("--workers", type=number(int, 0), help="processes that read data (default 4 on CUDA, else 0)")
    add("--save-every", type=number(int, 1), default=500, help="steps between checkpoints")
    add_device_flags(add)
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.preset}"
    new = not Path(args.out, "tokenizers.pt").exists()  # else the run knows its data
    args.data = args.data or ("shapes" if args.preset == "demo" and new else None)
    if args.init and not args.stage:
        parser.error("--init needs --stage 1 or --stage 2")
    if args.data not in (None, "shapes") and Path(args.out).resolve().is_relative_to(Path(args.data).resolve()):
        parser.error(f"--out {args.out}: must not lie inside of --data, whose content must not change")
    if bool(args.vq) != bool(args.kl):
        parser.error("--vq and --kl belong together: give both files")
    return parser, args

def main(argv=None):
    parser, args = parse(argv)
    with user_errors(parser):
        processes = Processes(args.device)
        on_cuda = processes.device.type == "cuda"
        args.workers = (4 if on_cuda else 0) if args.workers is None else args.workers
        args.compile = on_cuda if args.compile is None else args.compile
        torch.set_float32_matmul_precision("high")  # TF32 if not bf16; full_float32 in tokenizers.py keeps both off
        torch.empty(30 * 2**18)  # once such a block is freed, glibc keeps the memory of a step for the next one
        with locked(Path(args.out) / "lock", processes):
            stage0(args, PRESETS[args.preset], processes)
            for stage in (1, 2):
                if args.stage in (None, stage):
                    train_generator(stage, args, PRESETS[args.preset], processes)
        if args.stage is None:
            processes.say(f"done: python sample.py --run {args.out}")

# The token cache: every picture encoded once, original and mirrored --------------------------------------------------

class TokenCache:
    """The encoded data set, memory-mapped: codes (2,count,N) uint16 and moments (2,count,N,2C) float16 (mean and
    log-variance), original and mirrored; labels (count,) int64; `meta`. Raises InputError if unfinished or damaged."""
    def __init__(self, folder):
        self.folder = folder = Path(folder)
        with reading(folder, "the token cache is unfinished or damaged: delete it and run train.py --stage 0"):
            self.meta = meta = json.loads((folder / "meta.json").read_text())
            entries(meta, run=dict, classes=list)
            arrays = open_arrays(folder, cache_layout(meta))
            if not (0 <= arrays["labels"].min() <= arrays["labels"].max() < len(meta["classes"])
                    and arrays["codes"].max() < meta["codebook_size"]):
                raise ValueError("it has labels of no class, or codes of no row")
        self.codes, self.moments, self.labels = map(np.asarray, arrays.values())  # quicker to index than np.memmap

    def __reduce__(self):
        return TokenCache, (self.folder,)  # a worker process opens the files itself instead of receiving their content

@torch.no_grad()
def encode_images(images, vq, kl, tokenizers_id, folder, fixed, processes, workers=0, batch_size=64):
    """Encode a data set and its mirror image into the token cache `folder`; plan.json becomes meta.json at last. The
    processes take turns in batches; an interrupted encoding goes on where it was. Raises InputError."""
    count, folder = len(images), Path(folder)
    meta = dict(run=fixed, count=count, classes=images.classes, **token_facts(vq, kl, tokenizers_id, images.size))
    plan = json.dumps(meta, indent=1)
    shared = SharedArrays(folder, plan, cache_layout(meta), count, batch_size, processes)
    loader = DataLoader(images, batch_sampler=[rows for _, rows in shared.todo], num_workers=workers,
                        worker_init_fn=leave_signals)
    for (_, rows), (pictures, labels) in zip(shared.work("encoding"), loader):  # work first: it marks the last batch
        shared.arrays["labels"][rows] = labels.numpy()
        x = to_float(pictures.to(processes.device))                                           # (B,3,S,S)
        for mirrored, view in enumerate((x, x.flip(3))):
            shared.arrays["codes"][mirrored, rows] = vq.encode(view).flatten(1).cpu().numpy()
            moments = to_tokens(kl.encode(view)).float().half().cpu()                         # (B,N,2C)
            if not moments.isfinite().all():
                raise InputError(f"{folder.parent}/tokenizers.pt: float16 cannot hold its latents; delete it and "
                                 "stage0.pt and train stage 0 at a lower --lr, or give another --kl")
            shared.arrays["moments"][mirrored, rows] = moments.numpy()
    processes.wait()
    if processes.rank == 0:
        (folder / "plan.json").replace(folder / "meta.json")
        (folder / "done.npy").unlink()
    processes.wait()

def token_facts(vq, kl, tokenizers_id, size):
    """What tokens of pictures of `size` pixels have from their tokenizers, as in meta.json."""
    return dict(tokenizers=tokenizers_id, grid=[size // vq.config.factor] * 2, channels=kl.config.z_channels,
                scale=kl.scale, codebook_size=vq.config.codebook_size)

def cache_layout(meta):
    """{name: (dtype, shape)} of the cache's arrays."""
    shape = 2, meta["count"], math.prod(meta["grid"])
    moments = *shape, 2 * meta["channels"]
    return {"codes": (np.uint16, shape), "moments": (np.float16, moments), "labels": (np.int64, shape[1:2])}

def open_arrays(folder, layout, mode="r"):
    """{name: memory-mapped array} of folder/NAME.npy. Raises ValueError for one that is not as `layout` says."""
    for name, kind in layout.items():
        array = np.load(folder / f"{name}.npy", "r", allow_pickle=False)  # "r+" would fill a file cut short with zeros
        if (array.dtype, array.shape) != kind:
            raise ValueError(f"{name}.npy does not belong here")
    return {name: np.load(folder / f"{name}.npy", mode, allow_pickle=False) for name in layout}

class SharedArrays:
    """Arrays on disk that the processes of one node fill together, batch by batch, and that outlive an interruption:
    folder/NAME.npy as `layout` says, {name: (dtype, shape)}; done.npy, a flag per batch; plan.json, the text `plan`, of
    what they are made. With the same plan the work goes on, else it starts again. Raises InputError on a full disk."""
    def __init__(self, folder, plan, layout, count, batch_size, processes):
        if processes.size > processes.size_here:
            raise InputError(f"{folder} is made on one node, whose processes share files: run this command there")
        self.count, self.processes = count, processes
        begun = Path(folder) / "plan.json"
        layout = layout | {"done": (np.bool_, (math.ceil(count / batch_size),))}
        if processes.rank == 0 and not (begun.exists() and begun.read_text() == plan):
            if begun.exists():
                processes.say(f"{folder}: was begun by a command with other settings, and is begun anew")
            with contextlib.ExitStack() as stack:
                for name, (dtype, shape) in layout.items():
                    temporary = stack.enter_context(writing(begun.with_name(f"{name}.npy")))
                    np.lib.format.open_memmap(temporary, "w+", dtype, shape)
                    if hasattr(os, "posix_fallocate"):  # Linux; a full disk under a memory map would kill the process
                        with open(temporary, "rb+") as file:
                            os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
                begun.unlink(missing_ok=True)  # there is room for all: from here on, what was begun counts no more
            with writing(begun) as temporary:
                temporary.write_text(plan)
        processes.wait()
        with reading(folder, "delete it and run the command again"):
            self.arrays = open_arrays(begun.parent, layout, "r+")
            numbers = np.flatnonzero(~self.arrays["done"]).tolist()
        processes.wait()  # nobody marks a batch before all have looked
        left = [(k, range(count)[k * batch_size:(k + 1) * batch_size]) for k in numbers]
        self.finished = count - sum(len(rows) for _, rows in left)  # pictures
        self.todo = left[processes.rank::processes.size]

    def work(self, what):
        """Yields (k, rows), a number and a range, of the batches that are left to this process, and says how far all
        are. What was written between two yields goes to the disk every few seconds, and then counts as done."""
        if self.finished:
            self.processes.say(f"{what}  goes on after {self.finished} of {self.count} pictures")
        began, said, written, made = time.time(), time.time(), [], 0
        for k, rows in self.todo:
            yield k, rows
            written.append(k)
            made += len(rows) * self.processes.size
            if time.time() - said > 2 or k == self.todo[-1][0]:
                for array in self.arrays.values():
                    array.flush()
                self.arrays["done"][written] = True
                written, said = [], time.time()
                done, speed = min(self.finished + made, self.count), made / max(said - began, 1e-9)
                self.processes.say(f"{what}  {done}/{self.count} pictures  {speed:.1f} images/s  "
                                   f"ETA {timedelta(seconds=int((self.count - done) / speed))}")

# Files: tokenizers and checkpoints -----------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """Gives a temporary name to write to, and then renames it: a reader sees the old file or the new one, never half of
    one. Raises InputError, with the old file untouched, when that fails."""
    real = Path(os.path.realpath(path))  # a link stays one
    temporary = real.with_name(f".{real.stem}.tmp{real.suffix}")
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not point to content that a power cut can still lose
        os.replace(temporary, real)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(f"{path}: cannot be written ({error}); free space or choose another --out") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

@contextlib.contextmanager
def locked(path, processes):
    """Inside, `path` is locked, at most as long as this process lives. Raises InputError for a second command."""
    if processes.rank == 0:
        with reading(path, "it cannot be written: choose another --out"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a")  # which leaves alone what somebody else may have there
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another command is at work; wait for it, or choose another --out") from None
        except (ImportError, OSError):  # Windows, and some network disks, have no such locks
            pass
    try:
        yield
    finally:
        if processes.rank == 0 and path.exists() and not path.stat().st_size:
            path.unlink()

def read_checkpoint(path):
    """The dict in a torch file, on the CPU, without running code from it. (An argparse Namespace, which training
    scripts like to store, is harmless.) Raises InputError, for numbers that are not finite too."""
    with reading(path, "not a readable checkpoint: missing, truncated or of another kind"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = dict(torch.load(path, map_location="cpu", weights_only=True))
        check_finite(file)
        return file

def check_finite(part, name=""):
    """Raises ValueError naming the first floating-point tensor in nested dicts and lists that holds inf or NaN."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        if isinstance(value, (dict, list)):
            check_finite(value, f"{name}{key}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name}{key} holds numbers that are not finite")

def entries(file, **kinds):
    """{name: value} of these entries of a dict. Raises KeyError or ValueError for one that is missing, of another kind
    (a float may be an int, a tuple a list), or a number below zero, which no file of ours holds."""
    for name, kind in kinds.items():
        value = file[name]
        if not (isinstance(value, {float: (int, float), tuple: (tuple, list)}.get(kind, kind))
                and (kind not in (int, float) or value >= 0)):
            raise ValueError(f"{name} is {str(value)[:50]}")
    return {name: file[name] for name in kinds}

def load_published(build, path, content=None, raw=False):
    """`build(state)` on the state dict in a published checkpoint file, or in its `content` if that is read already.
    LlamaGen (`model`, `ema`, `module`, `state_dict`, or no name) and MAR (`model_ema`, `model`) may hold several: the
    averaged one comes first unless `raw`. Prefixes of DDP and compile are stripped. Raises InputError."""
    state, averaged, others = content or read_checkpoint(path), ["model_ema", "ema"], ["model", "module", "state_dict"]
    order = others + averaged if raw else averaged + others
    with reading(path, "the weights do not fit"):
        state = next((state[name] for name in order if isinstance(state.get(name), dict)), state)
        state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}
        if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError(f"no state dict under {', '.join(order)} or at the top level")
        return build(state)

def save_tokenizers(path, vq, kl, size, fixed, processes):
    """Both tokenizers in one file, for pictures of `size` pixels; `fixed`: what they were made from. Its `id`, a hash
    of the weights, is noted by tokens and generators, and so says what belongs together. Returns the file's dict."""
    file = dict(id="", size=size, run=fixed, scale=kl.scale, vq_config=asdict(vq.config), vq=vq.state_dict(),
                kl_config=asdict(kl.config), kl=kl.state_dict())
    weights = [value.cpu().numpy().tobytes() for value in [*file["vq"].values(), *file["kl"].values()]]
    file["id"] = hashlib.blake2b(b"".join(weights), digest_size=8).hexdigest()
    if processes.rank == 0:
        with writing(path) as temporary:
            torch.save(file, temporary)
    processes.wait()
    return file

def load_tokenizers(path):
    """(VQTokenizer, KLTokenizer, dict of the file's id, size and run) as saved, in eval mode. Raises InputError."""
    file = read_checkpoint(path)
    with reading(path, "not a tokenizers file of this project"):
        vq, kl = (cls(TokenizerConfig(**entries(file[f"{name}_config"], **TokenizerConfig.__annotations__)))
                  for name, cls in (("vq", VQTokenizer), ("kl", KLTokenizer)))
        vq.load_state_dict(file["vq"])
        kl.load_state_dict(file["kl"])
        kl.scale = float(file["scale"])
        return vq.eval(), kl.eval(), entries(file, id=str, size=int, run=dict, scale=float)

def check_fixed(path, before, fixed):
    """What must stay the same from command to command must be as it was when `path` was made; flags without a default
    that are not given (None) are taken from there. Returns all of it. Raises InputError naming the difference."""
    for name, value in fixed.items():
        old, new = (str(x).rpartition(" [")[2] for x in (before.get(name), value))  # checksums, where there are some
        if value is not None and old != new:
            hint = " (in brackets: a checksum of its content)" if str(value).endswith("]") else ""
            raise InputError(f"{path}: was made with {name} {before.get(name)}, this command has {name} {value}{hint}: "
                             "use the same, or another --out")
    return before

def identity(path):
    """How a run remembers a file or data set: "PATH [CHECKSUM]", of which the checksum counts. A folder's covers names
    and sizes of pictures, a file's its size and last megabyte (where .npz and .pt keep checksums of all parts)."""
    if path in (None, "shapes"):
        return path
    with reading(path, "no such folder or file? Give the path where it is now, or no flag if it has served"):
        if os.path.isdir(path):
            pictures = [file for file in find_files(path) if file.suffix.lower() in SUFFIXES]
            content = [(str(file.relative_to(path)), file.stat().st_size) for file in pictures]
        else:
            content = os.path.getsize(path), np.memmap(path, mode="r")[-2**20:].tobytes()
        return f"{Path(path).resolve()} [{hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()}]"

# Processes, devices and errors ---------------------------------------------------------------------------------------

class Processes:
    """This process among `size`, on `device`. Alone it has no process group. Raises InputError for a missing device."""
    def __init__(self, device):
        self.rank, self.size, self.size_here, local = 0, 1, 1, 0
        remedy = "unset it, or start by torchrun, which sets more than that"
        if os.environ.get("WORLD_SIZE", "1") != "1":
            with reading("WORLD_SIZE", remedy):
                names = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"
                self.rank, self.size, self.size_here, local = (int(os.environ[name]) for name in names)
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind in available if available[kind]) if device == "auto" else device
        if not available[name]:
            raise InputError(f"--device {name}: not available here; use --device cpu, or install a torch build for it")
        self.device = torch.device(name)
        if self.size > 1 and name == "cuda":
            self.device = torch.device("cuda", local)
            if self.device.index >= torch.cuda.device_count():
                raise InputError(f"--nproc_per_node: there are only {torch.cuda.device_count()} GPUs")
            torch.cuda.set_device(self.device)
        if self.size > 1:  # encoding and sampling drift apart for long before they meet again: hence the patience
            self.say(f"waiting for {self.size} processes (WORLD_SIZE)")
            on_signals(signal.SIG_DFL)  # while torch waits, Python's handlers would not be called
            with reading("WORLD_SIZE", remedy):
                dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=12))
            on_signals(interrupt)

    def say(self, text):
        if self.rank == 0:
            try:
                print(text, flush=True)
            except OSError:  # a closed pipe, a full disk under the log: no reason to end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def gather(self, x):
        """Concatenate the processes' equally shaped slices in rank order, which is the order of the whole batch."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

def autocast(device, dtype):
    """bf16 matrix products for `--dtype bf16`, and for `auto` on GPUs that have them. (Never fp16: it makes NaNs.)"""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16" or (dtype == "auto" and has_bf16))

def number(kind, low, high=1e38):
    """argparse type: an int or float (`kind`) from `low` to `high`."""
    def number(text):  # argparse puts this name into its message
        if low <= (value := kind(text)) <= high:
            return value
        raise argparse.ArgumentTypeError(f"must lie between {low} and {high:g}, not {text}")
    return number

def word(text):
    """argparse type: --init "$FILE" must not mean no --init where FILE is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text

def add_device_flags(add):
    """The flags that train.py and sample.py share."""
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "float32"), default="auto", help="of matrix products (auto: bf16 on CUDA)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile what repeats (default on CUDA)")

SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Ctrl-C, kill, a closed terminal

def interrupt(number, frame):
    raise KeyboardInterrupt(number)

def on_signals(handler):
    """From now on SIGNALS go to handler(number, frame), but for SIGHUP under nohup. The handler that torch has for the
    death of a reading process goes: it may raise in the middle of a step. The loader finds out before the next one."""
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

@contextlib.contextmanager
def user_errors(parser):
    """What a user can cause ends in one line and exit status 2; everything else is a bug and keeps its traceback."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout is none
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to end
    try:
        on_signals(interrupt)
        yield
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split("tokenizers.InputError: ")[-1].split()))  # data workers add a traceback
    except KeyboardInterrupt as error:
        parser.exit(128 + (*error.args, signal.SIGINT)[0], "interrupted; the same command again goes on where it can\n")
    except (RuntimeError, MemoryError) as error:  # torch has words, and a kind of RuntimeError, for a full memory
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            parser.error("the memory is full: use a smaller --batch-size (in training also --accumulate)")
        if dist.is_initialized() and "peer" in str(error):
            parser.error("another process of this command has stopped; the reason stands above, or in its own output")
        if "DataLoader worker" in str(error):
            parser.error("a process that reads data was killed, perhaps for want of memory: try fewer --workers")
        raise

if __name__ == "__main__":
    main()
