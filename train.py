"""Train D2C: the tokenizers (stage 0), the discrete generator (stage 1), the continuous generator (stage 2).

    python train.py                                        demo: built-in pictures, all stages, minutes on a laptop
    python train.py --preset cifar --data cifar10.npz      real pictures, one GPU
    python train.py --stage 0 --preset B --data IMAGENET/train --vq vq_ds16_c2i.pt --kl kl16.ckpt       encode once
    torchrun --nproc_per_node=8 train.py --stage 1 --preset B                                           8 GPUs, one node
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=HOST train.py --stage 2 --preset B     two nodes

Everything goes to one run folder (--out): tokenizers.pt, tokens/, stage0.pt, stage1.pt, stage2.pt and a .csv log per stage.
The same command again resumes. All three stages run through one loop (`fit`); a stage brings a model whose forward is
its loss, and a function that reads a batch.

Every random number of step k but dropout's is drawn for the whole batch from a generator seeded by (seed, stage, k), and each
process takes its slice: a resumed run equals an uninterrupted one, and the number of processes changes nothing but
rounding (and dropout).

Reading order: batches of the three stages, parts of the loop, the loop, the stages, the command.
"""
import contextlib
import csv
import functools
import math
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from d2c import PRESETS, ContinuousConfig, ContinuousGenerator, DiscreteConfig, DiscreteGenerator
from sample import draw_grid
from tokenizers import (KL16_SCALE, InputError, KLTokenizer, Parser, Processes, TokenCache, TokenizerConfig, VQTokenizer,
                        autocast, check_space, clock, crc_of, encode_images, load_published, load_tokenizers, measure_scale, not_negative,
                        open_images, positive, read_checkpoint, save_tokenizers, seed_number, seed_of, to_float,
                        to_map, to_uint8, write_atomically)

# ---------------------------------------------------------------------------------------------------------------------
# Batches: what a step needs, read and drawn
# ---------------------------------------------------------------------------------------------------------------------


def split_held_out(count, seed):
    """(training, validation) indices of a data set: 1 % of the pictures, at most 5,000, are held out. Raises InputError."""
    if count < 2:
        raise InputError("--data: needs at least two pictures, one of which is held out for validation")
    order = np.random.default_rng([seed, 1]).permutation(count)
    held_out = max(1, min(count // 100, 5000))
    return order[held_out:], order[:held_out]


@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    """The order in which an epoch visits `count` pictures."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


class Batches(Dataset):
    """Item k is the batch of step k: `read(chosen, part, generator)` of the pictures `chosen`, where the generator draws for
    the whole batch and `part` is this process's slice of it. Pictures come in a new random order every epoch."""

    VALIDATION_STEP = 2**32 - 1  # the validation batch: always the same pictures and draws

    def __init__(self, read, indices, batch_size, stage, seed, processes):
        self.read, self.indices, self.batch_size, self.stage, self.seed = read, indices, batch_size, stage, seed
        share = batch_size // processes.size
        self.part = slice(processes.rank * share, (processes.rank + 1) * share)

    def __getitem__(self, step):
        count = len(self.indices)
        places = np.arange(self.batch_size) + (0 if step == self.VALIDATION_STEP else step * self.batch_size)
        chosen = [self.indices[epoch_order(count, self.seed, place // count)[place % count]] for place in places.tolist()]
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.stage, step))
        return self.read(np.array(chosen), self.part, generator)


def read_pictures(images, latent_shape, chosen, part, generator):
    """Stage 0: pictures (b,3,S,S), half of them mirrored, and the KL tokenizer's noise (b,C,h,w)."""
    mirrored = torch.rand(len(chosen), generator=generator)[part] < 0.5
    noise = torch.randn(len(chosen), *latent_shape, generator=generator)[part].clone()  # see read_latents
    pictures = to_float(torch.stack([torch.as_tensor(images[int(i)][0]) for i in chosen[part]]))
    return torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures), noise


def read_codes(cache, chosen, part, generator):
    """Stage 1: codes (b,N) and labels (b,); the class is dropped in 10 % of samples, for guidance."""
    mirrored = torch.randint(2, (len(chosen),), generator=generator)[part].numpy()
    dropped = torch.rand(len(chosen), generator=generator)[part] < 0.1
    codes = torch.from_numpy(cache.codes[mirrored, chosen[part]].astype(np.int64))
    return codes, torch.from_numpy(cache.labels[chosen[part]]).masked_fill(dropped, -1)


def read_latents(cache, config, code_noise, chosen, part, generator):
    """Stage 2: the arguments of ContinuousGenerator.forward, for its `config`. The share of hidden places is drawn once for
    the batch (MAR: around 1, cut to [0.7, 1]; of 16 places that would show four at most, too few to learn from, hence the
    demo's wider one). Class and codes are dropped together in 10 % of samples, for guidance; codes alone in 5 %, so that
    the class keeps its own meaning; and a share `code_noise` of all codes is replaced by random ones."""
    batch, (places, double) = len(chosen), cache.moments.shape[2:]
    channels = double // 2

    # A slice keeps the whole batch's memory alive, and a worker process would send all of it: hence the clones.
    def uniform(*shape):
        return torch.rand(*shape, generator=generator)[part].clone()

    def normal(*shape):
        return torch.randn(*shape, generator=generator)[part].clone()

    mirrored = torch.randint(2, (batch,), generator=generator)[part].numpy()
    deviation, smallest = config.hidden_share
    share = nn.init.trunc_normal_(torch.empty(1), mean=1.0, std=deviation, a=smallest, b=1.0, generator=generator)
    hidden = math.ceil(places * float(share))
    order = uniform(batch, places).argsort(1)
    moments = torch.from_numpy(cache.moments[mirrored, chosen[part]].astype(np.float32))      # (b,N,2C)
    latents = KLTokenizer.sample(moments, normal(batch, places, channels), dim=2) * cache.meta["scale"]
    codes = torch.from_numpy(cache.codes[mirrored, chosen[part]].astype(np.int64))            # (b,N)
    wrong = torch.randint(cache.meta["codebook_size"], (batch, places), generator=generator)[part]
    codes = torch.where(uniform(batch, places) < code_noise, wrong, codes)
    dropped = uniform(batch)
    labels = torch.from_numpy(cache.labels[chosen[part]]).masked_fill(dropped < 0.1, -1)
    codes = codes.masked_fill(dropped[:, None] < 0.15, -1)
    t = torch.randint(1000, (batch, hidden, config.noise_levels), generator=generator)[part].clone()
    noise = normal(batch, hidden, config.noise_levels, channels)
    return latents, order[:, hidden:], order[:, :hidden], labels, codes, t, noise


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the loop
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_signals():
    """A list that receives SIGINT or SIGTERM, so that the loop can finish its step and save; one more after a second kills
    (`timeout` and job schedulers send the first one twice)."""
    received, before, times = [], {}, []

    def receive(number, frame):
        received.append(number)
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals(worker):
    """For processes that read data: a signal to the whole group is for the main one, which saves and then ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def agree_to_stop(received, step, processes):
    """The signal to stop on, or 0. All processes must stop after the same step, so they ask each other at every tenth."""
    if processes.size == 1:
        return received[0] if received else 0
    if step % 10:
        return 0
    told = torch.tensor(max(received, default=0), device=processes.device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def learning_rate(step, steps, peak, warmup, decay):
    """Linear warm-up, then constant, or a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak if decay == "constant" else peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, weight_decay, fusion_lr):
    """Weight decay on matrices only, and never on the diffusion head (LlamaGen and MAR); what is not MAR's learns at
    `fusion_lr` times the rate. (groups for the optimizer, the factor of each group)."""
    groups = {(decays, added): [] for decays in (True, False) for added in (False, True)}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and not name.startswith("diffloss.")
        groups[decays, name.startswith(ContinuousGenerator.ADDED)].append(parameter)
    return ([dict(params=group, weight_decay=weight_decay * decays) for (decays, _), group in groups.items()],
            [fusion_lr if added else 1.0 for _, added in groups])


def check_run(path, before, run):
    """What changes the meaning of a run must be as it was; None in `run` stands for whatever it was. Returns the run in
    full. Raises InputError naming the difference."""
    if not isinstance(before, dict):
        raise InputError(f"{path}: not made by this project; move it away or choose another --out")
    for name, value in run.items():
        if value is not None and before.get(name) != value:
            raise InputError(f"{path}: was made with {name} {before.get(name)}, this command has {name} {value}; "
                             "use the same, or choose another --out")
    return before


LOG_COLUMNS = ["step", "loss", "validation", "learning_rate", "images_per_second", "seconds"]


def write_log(path, log):
    """The log as .csv, written whole: no row stands there twice after a resume."""
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([LOG_COLUMNS, *log])

    write_atomically(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def fit(stage, model, train, validation, defaults, run, extra, args, processes, preview=None):
    """Train `model` (its forward is the loss) from the run's checkpoint, if there is one, up to the number of steps asked for.

    train, validation: Batches. defaults: the preset's training settings. run: what must not change between sessions.
    extra: stored in the checkpoint for sample.py. preview(model) -> a PIL picture of what the averaged model can do.
    Returns the averaged (EMA) model. Raises InputError when a checkpoint does not fit the command, when there is no room for
    it, or when the loss is not finite.
    """
    device, path = processes.device, Path(args.out) / f"stage{stage}.pt"
    steps = args.steps or defaults["steps"]
    warmup = min(defaults["warmup"], steps // 5)  # a trial of few steps should learn something too
    peak = defaults["lr"] * train.batch_size / defaults["batch_size"] if args.lr is None else args.lr
    if train.batch_size % (processes.size * args.accumulate):
        raise InputError(f"--batch-size {train.batch_size}: must be divisible by processes x --accumulate = "
                         f"{processes.size} x {args.accumulate}")
    model = model.to(device)
    average = AveragedModel(model)
    average.n_averaged.fill_(1)  # else its first update copies the model instead of averaging
    groups, factors = parameter_groups(model, defaults["weight_decay"], args.fusion_lr)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device.type == "cuda")
    start, log = 0, []
    if path.exists():
        file = read_checkpoint(path, mmap=device.type != "cpu")  # on the CPU the optimizer keeps the tensors it is given
        run = check_run(path, file.get("run"), run)
        try:
            model.load_state_dict(file["model"])
            average.module.load_state_dict(file["ema"])
            optimizer.load_state_dict(file["optimizer"])
            start, log = int(file["step"]), list(file["log"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(f"{path}: does not fit this stage ({str(error)[:300]})") from error
        del file
    if len(set(processes.gather(torch.tensor([start], device=device)).tolist())) > 1:
        raise InputError(f"{path}: is not the same for all processes; --out must lie on storage that all nodes share")
    if start:
        if start >= steps:
            processes.say(f"stage {stage}: finished ({start} steps); a larger --steps continues")
            return average.module
        processes.say(f"stage {stage}: resuming {path} at step {start} of {steps}")

    size = 4 * sum(value.numel() * value.element_size() for value in model.state_dict().values())  # weights, average, two moments
    if processes.rank == 0:  # a new checkpoint is whole before the old one goes
        check_space(path.parent, size if path.exists() else 2 * size, "its checkpoints")

    def save(step):
        if processes.rank == 0:
            content = dict(extra, run=run, stage=stage, step=step, log=log, model=model.state_dict(),
                           ema=average.module.state_dict(), optimizer=optimizer.state_dict())
            write_atomically(path, lambda temporary: torch.save(content, temporary))
            write_log(path.with_suffix(".csv"), log)
        processes.wait()

    def parts(batch):
        """A batch on the device, split for accumulation: a list of argument tuples."""
        return list(zip(*(x.to(device, non_blocking=True).chunk(args.accumulate) for x in batch)))

    held_out = parts(validation[Batches.VALIDATION_STEP])

    @torch.no_grad()
    def validate():
        """Loss of the averaged weights on held-out pictures."""
        average.module.eval()
        with autocast(device, args.dtype):
            losses = torch.stack([average.module(*part) for part in held_out])
        return processes.mean(losses.mean()).item()

    model.checkpointing = args.checkpointing
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut each block's small graph to pieces; blocks are overlap enough
        model.compile()
    trained = model
    if processes.size > 1:
        trained = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    processes.say(f"stage {stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train.indices)} pictures, "
                  f"steps of {train.batch_size}, {processes.size} process{'es' if processes.size > 1 else ''} on {device}")
    loader = DataLoader(train, batch_size=None, sampler=range(start, steps), num_workers=args.workers,
                        pin_memory=device.type == "cuda", worker_init_fn=leave_signals)
    log_every = args.log_every or max(1, min(100, steps // 20))
    losses, saved = [], start  # losses stay on the device until they are logged
    began = last = time.time()
    earlier = log[-1][-1] if log else 0.0
    with stop_signals() as received:
        for step, batch in zip(range(start, steps), loader):
            torch.manual_seed(seed_of(args.seed, stage, step, processes.rank))  # dropout
            rate = learning_rate(step, steps, peak, warmup, defaults["decay"])
            for group, factor in zip(optimizer.param_groups, factors):
                group["lr"] = rate * factor
            model.train()
            micro_batches = parts(batch)
            for k, micro_batch in enumerate(micro_batches):
                waits = processes.size > 1 and k < len(micro_batches) - 1  # gradients travel once per step
                with trained.no_sync() if waits else contextlib.nullcontext():
                    with autocast(device, args.dtype):
                        loss = trained(*micro_batch) / args.accumulate
                    loss.backward()
                losses.append(loss.detach())
            nn.utils.clip_grad_norm_(model.parameters(), defaults["grad_clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(model, "after_step"):  # stage 0: dead codes
                model.after_step(processes, torch.Generator().manual_seed(seed_of(args.seed, stage, step, 0, 0)))
            decay = min(defaults["ema"], (1 + step) / (10 + step))  # a young average forgets its random start quickly
            average.multi_avg_fn = get_ema_multi_avg_fn(decay)
            average.update_parameters(model)

            done = step + 1
            stop = agree_to_stop(received, done, processes)
            save_now = done % args.save_every == 0 or done == steps or stop
            if done % log_every == 0 or save_now:
                history = processes.mean(torch.stack(losses).view(-1, args.accumulate).sum(1)).cpu()   # a loss per step
                losses, held_out_loss = [], validate()
                if not (history.isfinite().all() and math.isfinite(held_out_loss)):
                    at = done - len(history) + (history.isfinite().tolist() + [False]).index(False)
                    kept = f"{path} (step {saved}) is as it was" if saved else "Nothing was saved yet"
                    raise InputError(f"stage {stage}: the loss is not finite at step {at} (learning rate {rate:.2e}); most likely "
                                     f"the rate is too high: try --lr {peak / 3:.1e}. {kept}")
                now = time.time()
                speed = len(history) * train.batch_size / (now - last)
                last = now
                log.append([done, round(float(history.mean()), 5), round(held_out_loss, 5), float(f"{rate:.4g}"),
                            round(speed, 1), round(earlier + now - began, 1)])
                processes.say(f"stage {stage}  step {done}/{steps}  loss {log[-1][1]:.4f}  validation {held_out_loss:.4f}  "
                              f"rate {rate:.2e}  {speed:.0f} images/s  ETA {clock((steps - done) * (now - began) / (done - start))}")
            if save_now:
                save(done)
                saved = done
            if preview and done % args.sample_every == 0:
                if processes.rank == 0:
                    write_atomically(path.with_suffix(".png"), preview(average.module.eval()).save)
                processes.wait()
            if stop:
                processes.say(f"stopped after step {done} and saved {path}; run the same command again to go on")
                raise SystemExit(128 + stop)
    return average.module


# ---------------------------------------------------------------------------------------------------------------------
# Stage 0: tokenizers and token cache
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizers(nn.Module):
    """Both tokenizers under one loss (they share no parameter), with revival of dead codes."""

    PATIENCE = 30  # steps without use before a code counts as dead

    def __init__(self, vq, kl):
        super().__init__()
        self.vq, self.kl = vq, kl
        self.seen = []  # codes and encoder outputs of the current step, for after_step
        self.register_buffer("unused", torch.zeros(vq.config.codebook_size, dtype=torch.int64))

    def forward(self, pictures, noise):
        loss, codes, z = self.vq(pictures)
        if self.training:
            self.seen.append((codes.detach().flatten(), z.detach().permute(0, 2, 3, 1).flatten(0, 2)))  # (bhw,), (bhw,code_dim)
        return loss + self.kl(pictures, noise)

    @torch.no_grad()
    def after_step(self, processes, generator):
        """Move codes that no place chose for some time onto encoder outputs of this batch (after the optimizer's step,
        which would move them again)."""
        codes, z = (processes.gather(torch.cat(x)) for x in zip(*self.seen))
        self.seen = []
        self.unused += 1
        self.unused[codes] = 0
        dead = (self.unused >= self.PATIENCE).nonzero()[:len(z), 0]
        chosen = torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)
        self.vq.quantize["embedding"].weight[dead] = z[chosen]
        self.unused[dead] = 0


def file_name(path):
    """How a run remembers a file or data set: by its full path (None: not given)."""
    return path if path in (None, "shapes") else str(Path(path).resolve())


def retrain_wanted(args):
    """`--stage 0 --steps MORE` trains existing tokenizers further. Raises InputError when weights already build on them."""
    out = Path(args.out)
    if args.stage != 0 or not args.steps or not (out / "stage0.pt").exists():
        return False
    if args.steps <= read_checkpoint(out / "stage0.pt").get("step", 0):
        return False
    for name in ("stage1.pt", "stage2.pt"):
        if (out / name).exists():
            raise InputError(f"--steps: training the tokenizers further would make {out / name} useless; remove it first")
    return True


def make_tokenizers(args, preset, images, run, processes):
    """(VQTokenizer, KLTokenizer) of the run: those it has, published ones (--vq, --kl), or trained here; in tokenizers.pt."""
    path, device = Path(args.out) / "tokenizers.pt", processes.device
    there, retrain = path.exists(), retrain_wanted(args)
    processes.wait()  # all look before one of them changes what there is
    if there and not retrain:
        vq, kl, _, before = load_tokenizers(path, device)
        run.update(check_run(path, before, run))
        return vq, kl
    if processes.rank == 0:  # from here on the old ones count no longer, nor a cache that they made; stage0.pt has their weights
        (Path(args.out) / "tokens" / "meta.json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if args.vq:
        vq = load_published(VQTokenizer.from_published, args.vq).to(device).eval()
        kl = load_published(KLTokenizer.from_published, args.kl).to(device).eval()
    else:
        torch.manual_seed(seed_of(args.seed, 0))
        vq, kl = VQTokenizer(TokenizerConfig(**preset["vq"])), KLTokenizer(TokenizerConfig(**preset["kl"]))
        defaults = preset["train"][0]
        batch_size = args.batch_size or defaults["batch_size"]
        side = preset["size"] // kl.config.factor
        latent_shape = (kl.config.z_channels, side, side)
        read = functools.partial(read_pictures, images, latent_shape)
        train, held_out = split_held_out(len(images), args.seed)
        batches = [Batches(read, indices, batch_size, 0, args.seed, processes) for indices in (train, held_out)]
        trained = fit(0, Tokenizers(vq, kl), *batches, defaults, dict(run, batch_size=batch_size), {}, args, processes)
        vq, kl = trained.vq.eval(), trained.kl.eval()
    kl.scale = measure_scale(kl, images, device, args.seed)
    if args.kl and abs(kl.scale / KL16_SCALE - 1) < 0.05:
        kl.scale = KL16_SCALE  # KL-16 on something like ImageNet: keep what MAR's weights were trained on, to the digit
    if processes.rank == 0:
        save_tokenizers(path, vq, kl, preset["size"], run)
    processes.wait()
    return vq, kl


def stage0(args, preset, processes):
    """Tokenizers and token cache, each unless it is there. Raises InputError."""
    cache = Path(args.out) / "tokens"
    run = dict(preset=args.preset, data=file_name(args.data), seed=args.seed, vq=file_name(args.vq), kl=file_name(args.kl))
    if (cache / "meta.json").exists() and not retrain_wanted(args):
        meta = TokenCache(cache).meta
        check_run(cache, meta.get("run"), run)
        if args.stage in (None, 0):
            processes.say(f"stage 0: finished ({meta['count']} pictures encoded in {cache})")
        return
    if args.stage in (1, 2):
        processes.say(f"stage {args.stage} needs the token cache {cache}, which is not there yet: building it (stage 0)")
    data = args.data or ("shapes" if args.preset == "demo" else None)
    if data is None:
        raise InputError(f"preset {args.preset} needs --data: a folder of class folders, an .npz, or shapes")
    if preset["vq"] is None and not args.vq and not (Path(args.out) / "tokenizers.pt").exists():
        raise InputError(f"preset {args.preset} uses the published tokenizers: give both --vq FILE and --kl FILE")
    if not processes.one_node:
        raise InputError("the token cache must be built on one node (its processes share files): run --stage 0 there first")
    run["data"] = file_name(data)
    images = open_images(data, preset["size"], args.seed, args.skip_bad)
    vq, kl = make_tokenizers(args, preset, images, run, processes)
    encode_images(images, vq, kl, cache, run, processes, workers=args.workers)


# ---------------------------------------------------------------------------------------------------------------------
# Stages 1 and 2: the generators
# ---------------------------------------------------------------------------------------------------------------------


def train_generator(stage, args, preset, processes):
    """Stage 1 or 2 on the token cache. Raises InputError."""
    out = Path(args.out)
    cache = TokenCache(out / "tokens", verify=processes.local_rank == 0)
    processes.wait()
    meta, defaults = cache.meta, preset["train"][stage]
    batch_size = args.batch_size or defaults["batch_size"]
    run = dict(preset=args.preset, seed=args.seed, batch_size=batch_size, tokens=cache.identity, init=file_name(args.init))
    common = dict(num_classes=len(meta["classes"]), grid=tuple(meta["grid"]), codebook_size=meta["codebook_size"])
    torch.manual_seed(seed_of(args.seed, stage))
    if stage == 1:
        model = DiscreteGenerator(DiscreteConfig(**common, **preset["stage1"]))
        read = functools.partial(read_codes, cache)
    else:
        fusion = args.fusion or preset["fusion"]
        run.update(fusion=fusion, code_noise=args.code_noise)
        model = ContinuousGenerator(ContinuousConfig(**common, **preset["stage2"], channels=meta["channels"], fusion=fusion))
        read = functools.partial(read_latents, cache, model.config, args.code_noise)
    vq, kl, *_ = load_tokenizers(out / "tokenizers.pt")
    if [crc_of(vq), crc_of(kl)] != meta["tokenizers"]:
        raise InputError(f"{out / 'tokens'}: was not made with {out / 'tokenizers.pt'}; delete the folder and run train.py --stage 0")
    if stage == 2 and fusion != "none":
        model.start_fusion(vq.codebook())
    if args.init and not (out / f"stage{stage}.pt").exists():
        load_published(model.load_published, args.init, prefer_ema=args.init_ema)
        processes.say(f"stage {stage}: starting from {args.init}")
    train, held_out = (cache.usable[part] for part in split_held_out(len(cache.usable), args.seed))
    batches = [Batches(read, indices, batch_size, stage, args.seed, processes) for indices in (train, held_out)]
    extra = dict(config=asdict(model.config), classes=meta["classes"], scale=meta["scale"], tokenizers=meta["tokenizers"])
    vq, kl, shown, settings = vq.to(processes.device), kl.to(processes.device), held_out[:10], preset["sample"]

    @torch.no_grad()
    def preview(model):
        """What the averaged model samples for the classes (stage 2: and codes) of held-out pictures, beside those pictures."""
        generator = torch.Generator(processes.device).manual_seed(args.seed)
        labels = torch.from_numpy(cache.labels[shown]).to(processes.device)
        codes = torch.from_numpy(cache.codes[0, shown].astype(np.int64)).to(processes.device)
        rows = {"data, VQ": vq.decode(codes.unflatten(1, model.config.grid))}
        with autocast(processes.device, args.dtype):
            if stage == 1:
                sampled = model.generate(labels, settings["cfg1"], settings["temperature1"], generator=generator)
            else:
                sampled = model.generate(labels, codes, settings["steps"], settings["cfg2"], settings["temperature2"],
                                         settings["diffusion_steps"], settings["clip"], generator)
        if stage == 1:
            rows["sampled"] = vq.decode(sampled.unflatten(1, model.config.grid))
        else:
            moments = torch.from_numpy(cache.moments[0, shown].astype(np.float32)).to(processes.device)
            rows["sampled"] = kl.decode(to_map(sampled, model.config.grid) / meta["scale"])
            rows["data, KL"] = kl.decode(to_map(moments.chunk(2, 2)[0], model.config.grid))
        pictures = np.stack([to_uint8(images).cpu().numpy() for images in rows.values()])
        return draw_grid(pictures, [meta["classes"][label] for label in labels], list(rows))

    fit(stage, model, *batches, defaults, run, extra, args, processes, preview)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser(prog="train.py", description="Train D2C; without --stage, every stage that is not finished.")
    add = parser.add_argument
    add("--stage", type=int, choices=(0, 1, 2), help="0 tokenizers and token cache, 1 discrete, 2 continuous generator")
    add("--preset", choices=PRESETS, default="demo", help="sizes and training settings (default demo)")
    add("--out", help="run folder (default runs/PRESET)")
    add("--data", help="shapes (built in), a folder of class folders, or an .npz with images and labels")
    add("--vq", metavar="FILE", help="published VQ tokenizer (LlamaGen's vq_ds16_c2i.pt) instead of training one")
    add("--kl", metavar="FILE", help="published KL tokenizer (MAR's kl16.ckpt) instead of training one")
    add("--fusion", choices=("none", "cross", "qformer", "aligned"), help="how codes enter stage 2 (default: the preset's)")
    add("--init", metavar="FILE", help="start --stage 1 from LlamaGen's or --stage 2 from MAR's weights")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--init-ema", action="store_true", default=True, help="the averaged weights of --init (default)")
    choice.add_argument("--init-raw", action="store_false", dest="init_ema", help="the raw weights of --init")
    add("--steps", type=positive, help="training steps of each stage that runs")
    add("--batch-size", type=positive, help="pictures per step, over all processes; the default rate scales with it")
    add("--accumulate", type=positive, default=1, help="split each process's share of a step into so many parts")
    add("--lr", type=not_negative, help="peak learning rate")
    add("--fusion-lr", type=not_negative, default=1.0, help="stage 2: what MAR does not have learns so many times as fast")
    add("--code-noise", type=not_negative, default=0.0, help="stage 2: share of codes replaced by random ones")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, about a third slower")
    add("--workers", type=int, help="processes that read data (default 4 on CUDA, else 0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "float32"), default="auto", help="of matrix products (auto: bf16 on CUDA)")
    add("--compile", action="store_true", default=None, help="torch.compile (default on CUDA)")
    add("--no-compile", action="store_false", dest="compile")
    add("--seed", type=seed_number, default=0)
    add("--log-every", type=positive, help="steps between progress lines (default a twentieth, at most 100)")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--sample-every", type=positive, default=5000, help="steps between sample grids, stage1.png and stage2.png")
    add("--skip-bad", action="store_true", help="stage 0: pass over picture files that cannot be read, and list them")
    args = parser.parse_args(argv)
    args.out = args.out or f"runs/{args.preset}"
    if args.init and args.stage not in (1, 2):
        parser.error("--init needs --stage 1 or --stage 2")
    if bool(args.vq) != bool(args.kl):
        parser.error("--vq and --kl belong together: give both files")
    if args.code_noise > 1:
        parser.error(f"--code-noise is a share, between 0 and 1, not {args.code_noise}")
    if args.workers is not None and args.workers < 0:
        parser.error(f"--workers must not be negative, not {args.workers}")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    with parser.plain_errors():
        processes = Processes(args.device)
        on_cuda = processes.device.type == "cuda"
        args.workers = (4 if on_cuda else 0) if args.workers is None else args.workers
        args.compile = on_cuda if args.compile is None else args.compile
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {args.out}: cannot be made a folder ({error}); choose another") from error
        stage0(args, PRESETS[args.preset], processes)
        for stage in (1, 2):
            if args.stage in (None, stage):
                train_generator(stage, args, PRESETS[args.preset], processes)
        if args.stage is None:
            processes.say(f"done: python sample.py --run {args.out}")
        processes.end()


if __name__ == "__main__":
    main()
