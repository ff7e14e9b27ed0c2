"""CIFAR-10 with the real FID: what one wants to know of such a run, a command each.

    python tests/benchmark_cifar.py reconstruction            stage 0, and the FID of both tokenizers' reconstructions
    python tests/benchmark_cifar.py row codes|none|cross|qformer|aligned    trains what it needs, then FID over guidance
    python tests/benchmark_cifar.py steps qformer             FID over the number of token steps and of denoising steps
    python tests/benchmark_cifar.py progress qformer          FID of raw and averaged weights as they are now
    python tests/benchmark_cifar.py picture qformer           ten classes: coarse, fine, the middle of both, real

All of them need --data cifar10.npz and --weights FILE (or download Inception's). FID is against the statistics of the
training pictures, by `fid.py` with the half-pixel resize of pytorch-fid, as CIFAR-10 papers measure it. Any command may
be cut off (`timeout 590 python ...`: training saves when it is told to stop) and given again: it goes on, and no
picture file is measured twice. `--preset laptop` is the same in miniature, for a CPU. The figures stand in
docs/results.md.
"""
import argparse
import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from d2c import PRESETS, training  # noqa: E402
from tokenizers import InputError, draw_grid, to_float, to_uint8  # noqa: E402
from train import Processes, load_tokenizers, number, read_checkpoint, user_errors, writing  # noqa: E402

# Preset "laptop": the tokens of preset cifar, and models that two CPU cores train in minutes.
PRESETS["laptop"] = PRESETS["cifar"] | dict(
    stage1=PRESETS["demo"]["stage1"], stage2=PRESETS["demo"]["stage2"],
    train={0: training(3000, 32, 6e-3, warmup=50, ema=0.99),
           1: training(1080, 64, 6e-3, warmup=100, ema=0.99, weight_decay=0.05, muon=True),
           2: training(1800, 64, 5e-3, warmup=100, ema=0.995, weight_decay=0.02, muon=True)},
    sample=PRESETS["cifar"]["sample"] | dict(cfg1=3.0, cfg2=1.5, temperature2=0.7, steps=8, diffusion_steps=25))

KINDS = ["codes", "none", "cross", "qformer", "aligned"]


def once(path, name, measure):
    """The value `name` in a .json file, measured unless it is there."""
    def read():
        return json.loads(path.read_text()) if path.exists() else {}

    if name not in read():
        value = measure()
        values = read() | {name: value}  # read again: another process may have added to it
        with writing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1))
    return read()[name]


def read_pictures(args, count):
    with np.load(args.data, allow_pickle=False) as file:
        return file["images"][:count]


def pictures_of(args, count):
    """The first `count` training pictures as an .npz for fid.py."""
    path = args.folder / f"real-{count}.npz"
    if not path.exists():
        pictures = read_pictures(args, count)
        with writing(path) as temporary:
            np.savez(temporary, arr_0=pictures)
    return path


def statistics_of(args):
    """Statistics of the training pictures, made once."""
    path = args.folder / f"statistics-{args.reference}.npz"
    if not path.exists():
        pictures = pictures_of(args, args.reference)
        fid.main([str(pictures), "--make-stats", str(path), "--metrics", "IS", *fid_flags(args)])
    return path


def fid_flags(args):
    size = "250" if args.device.type == "cuda" else "50"
    return ["--resize", "half_pixel", "--device", args.device.type, "--batch-size", size,
            *(["--weights", args.weights] if args.weights else [])]


def measure(args, path, *metrics):
    """{metric: value} of the pictures in an .npz; FID unless named."""
    def run():
        torch.set_float32_matmul_precision("highest")  # train.py and sample.py have set another
        reference, wanted = pictures_of(args, args.neighbours) if metrics else statistics_of(args), metrics or ["FID"]
        with contextlib.redirect_stdout(io.StringIO()) as answer:
            fid.main([str(path), "--ref", str(reference), "--metrics", *wanted, "--json", *fid_flags(args)])
        return {metric: json.loads(answer.getvalue())[metric] for metric in wanted}

    content = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    weights = Path(args.weights).name if args.weights else "published"
    settings = f"{metrics} {args.neighbours if metrics else args.reference} {weights}"
    return once(args.folder / "results.json", f"{path.name} {content} {settings}", run)


# What is measured ----------------------------------------------------------------------------------------------------

def base(args, seed=0):
    return args.folder / f"seed{seed}"


def train_stage(args, run, stage, seed, *flags):
    """Train a stage, or what is left of it; says how long it took in all, and the peak of the GPU's memory in this
    call."""
    steps = {0: args.steps0, 1: args.steps1, 2: args.steps2}[stage]
    torch._dynamo.reset()  # its limit of graphs counts all that a process has compiled
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train.main(["--preset", args.preset, "--data", str(args.data), "--out", str(run), "--stage", str(stage),
                "--seed", str(seed), "--device", args.device.type, "--save-every", "5000",
                *(["--steps", str(steps)] if steps else []), *flags])
    log = (run / f"stage{stage}.csv").read_text().split()[-1].split(",")
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device.type == "cuda" else ""
    print(f"{run.name}: stage {stage} has {log[0]} steps, {float(log[5]) / 60:.1f} minutes, {log[4]} pictures/s"
          f"{memory}", flush=True)


def trained(args, kind, seed):
    """The run folder of a fusion `kind`; runs of one seed share tokenizers, tokens and stage 1 (by links)."""
    first = base(args, seed)
    train_stage(args, first, 0, seed)
    train_stage(args, first, 1, seed)
    if kind == "codes":
        return first
    run = args.folder / f"{kind}-seed{seed}"
    run.mkdir(exist_ok=True)
    for name in ("tokenizers.pt", "stage0.pt", "stage1.pt", "tokens"):
        if not (run / name).is_symlink():
            (run / name).symlink_to(Path("..") / first.name / name)
    return run


def samples(args, run, name, *flags):
    """--num pictures as an .npz beside the run."""
    words = [run.name, name, *(flag.strip("-").replace(":", "to") for flag in args.flags)]
    path = args.folder / f"{'-'.join(words)}.npz"
    torch._dynamo.reset()
    sample.main(["--run", str(run), "--num", str(args.num), "--out", str(path), "--device", args.device.type, *flags,
                 *args.flags])
    return path


def reconstruction(args):
    run = base(args)
    train_stage(args, run, 0, 0)
    vq, kl, file = load_tokenizers(run / "tokenizers.pt")
    vq, kl = vq.to(args.device), kl.to(args.device)
    pictures = read_pictures(args, args.reference)
    for name, decode in (("vq", lambda x: vq.decode(vq.encode(x))),
                         ("kl", lambda x: kl.decode(kl.encode(x).chunk(2, 1)[0]))):
        path = args.folder / f"reconstruction-{name}-{file['id']}-{len(pictures)}.npz"
        if not path.exists():
            with torch.no_grad():
                made = torch.cat([to_uint8(decode(to_float(part.to(args.device)))).cpu()
                                  for part in torch.from_numpy(pictures).split(500)])
            with writing(path) as temporary:
                np.savez(temporary, arr_0=made.numpy())
        with np.load(path, allow_pickle=False) as made:
            error = float(np.square(made["arr_0"].astype(np.float32) - pictures).mean())
        print(f"{name}: {10 * np.log10(255**2 / error):.2f} dB, FID {measure(args, path)['FID']:.3f} "
              f"({len(pictures)} pictures)", flush=True)


def row(args):
    """FID at every guidance, and of the best one precision and recall too."""
    for seed in args.seeds:
        run = trained(args, args.kind, seed)
        if args.kind != "codes":
            train_stage(args, run, 2, seed, "--fusion", args.kind)
        found = {}
        for scale in args.guidance:
            flags = ["--coarse", "--cfg1"] if args.kind == "codes" else ["--cfg2"]
            path = samples(args, run, f"guidance-{scale:g}", *flags, str(scale))
            found[path] = measure(args, path)["FID"]
            print(f"{args.kind} seed {seed}, guidance {scale:g}: FID {found[path]:.2f}", flush=True)
        best = min(found, key=found.get)
        others = measure(args, best, "precision", "recall") if args.neighbours else {}
        print(f"{args.kind} seed {seed}: best FID {found[best]:.2f} ({best.name})"
              + "".join(f", {name} {value:.3f}" for name, value in others.items()), flush=True)


def steps(args):
    run = trained(args, args.kind, 0)
    default = PRESETS[args.preset]["sample"]
    for token_steps, diffusion_steps in ([(count, default["diffusion_steps"]) for count in (8, 16, 32, 64)]
                                         + [(default["steps"], count) for count in (25, 50, 100, "50:5")]):
        path = samples(args, run, f"steps-{token_steps}-{diffusion_steps}",
                       "--steps", str(token_steps), "--diffusion-steps", str(diffusion_steps))
        print(f"{token_steps} token steps of {diffusion_steps}: FID {measure(args, path)['FID']:.2f}", flush=True)


def progress(args):
    run = trained(args, args.kind, 0)
    file = read_checkpoint(run / "stage2.pt")
    step, loss, validation, _, _, seconds = file["log"][-1]
    for weights, flags in (("raw", ["--raw"]), ("averaged", [])):
        path = samples(args, run, f"step{step}-{weights}", *flags)
        print(f"step {step}, {seconds / 60:.1f} minutes, loss {loss}, validation {validation}, {weights}: "
              f"FID {measure(args, path)['FID']:.2f}", flush=True)


def picture(args):
    run = trained(args, args.kind, 0)
    flags = sample.parse(["--run", str(run), *args.flags])[1]
    pipeline = sample.open_pipeline(flags, args.device)
    with np.load(args.data, allow_pickle=False) as file:
        first = np.unique(file["labels"], return_index=True)[1]                               # a picture per class
        real = file["images"][first]
    coarse, fine = pipeline(range(len(first)), flags.seed)                                    # (10,32,32,3) each
    rows = {"coarse": coarse, "fine": fine}
    for name, pictures in (("coarse, middle", coarse), ("fine, middle", fine)):  # enlarged, to see what stage 2 adds
        rows[name] = pictures[:, 8:24, 8:24].repeat(2, axis=1).repeat(2, axis=2)              # (10,32,32,3)
    with writing(args.folder / "cifar.png") as temporary:
        draw_grid(np.stack([*rows.values(), real]), pipeline.classes, [*rows, "real"]).save(temporary)
    print(f"saved {args.folder / 'cifar.png'}")


# The command ---------------------------------------------------------------------------------------------------------

def main(argv=None):
    commands = dict(reconstruction=reconstruction, row=row, steps=steps, progress=progress, picture=picture)
    parser = argparse.ArgumentParser(prog="benchmark_cifar.py", usage=argparse.SUPPRESS,
                                     description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=commands)
    add("kind", nargs="?", choices=KINDS, default="qformer")
    add("--data", type=Path, default=Path("cifar10.npz"))
    add("--weights", metavar="FILE", help="Inception weights (default: downloaded once)")
    add("--folder", type=Path, default=Path("runs/cifar10"), help="where runs, samples and results are kept")
    add("--preset", default="cifar", help="preset of train.py")
    add("--steps0", type=number(int, 1), help="training steps (default: the preset's)")
    add("--steps1", type=number(int, 1))
    add("--steps2", type=number(int, 1))
    add("--seeds", type=int, nargs="+", default=[0])
    add("--guidance", type=number(float, 0), nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    add("--num", type=number(int, 1), default=50_000, help="pictures sampled")
    add("--reference", type=number(int, 1), default=50_000, help="training pictures to compare with, from the front")
    add("--neighbours", type=number(int, 0), default=10_000,
        help="training pictures for precision and recall (10,000 as ADM; 0: neither)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags of sample.py, as --temperature2 0.9")
    args = parser.parse_args(argv)
    with user_errors(parser):
        if args.kind == "codes" and args.what in ("steps", "progress", "picture"):
            raise InputError(f"{args.what} codes: is about stage 2; name a kind of fusion")
        if args.what == "row" and args.neighbours and min(args.neighbours, args.num) < 4:
            raise InputError("--neighbours: precision and recall need four pictures on either side; give more, or 0")
        args.device = Processes(args.device).device
        args.folder.mkdir(parents=True, exist_ok=True)
        commands[args.what](args)


if __name__ == "__main__":
    main()
