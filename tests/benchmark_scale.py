"""ImageNet-256 at full model size on stand-in data, and how hard the scripts are to hurt.

    python tests/benchmark_scale.py full      preset B, all stages and sampling, from weight files in the published form
    python tests/benchmark_scale.py costs     parameters, FLOPs and GPU-hours of presets B, L and H
    python tests/benchmark_scale.py kills     SIGKILL at 40 random moments, then compare with an undisturbed run
    python tests/benchmark_scale.py kills --processes 2    the same under torchrun, 10 moments; every other kill hits
                                                           one process alone
    python tests/benchmark_scale.py fuzz --seed 1          300 damaged inputs: one clear line or handled, no traceback

(`python tests/benchmark.py loader` measures how fast batches are read.) The figures stand in docs/imagenet.md.
"""
import argparse
import contextlib
import filecmp
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
import tiny  # noqa: E402  (the preset, and the path to the modules)
import d2c  # noqa: E402
import fid  # noqa: E402
import sample  # noqa: E402
import tokenizers  # noqa: E402
import train  # noqa: E402
from formula import published_file  # noqa: E402

# Sizes and costs -----------------------------------------------------------------------------------------------------

USABLE = 0.4 * 989e12  # FLOP/s: 40 % of the bf16 rate on the data sheet of an H100 or H200


def stage2_config(preset, fusion):
    return d2c.ContinuousConfig(num_classes=1000, grid=(16, 16), codebook_size=16384, channels=16, fusion=fusion,
                                **d2c.PRESETS[preset]["stage2"])


def stage1_flops(preset):
    """(parameters, FLOPs of a training step on one picture), counted on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = d2c.DiscreteGenerator(d2c.DiscreteConfig(**d2c.PRESETS[preset]["stage1"]))
        model(torch.zeros(1, 256, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def stage2_flops(preset, fusion):
    """(parameters that MAR has, parameters that fusion adds, FLOPs of a training step on one picture)."""
    hidden = math.ceil(256 * 0.85)  # about the mean of MAR's distribution
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model, places = d2c.ContinuousGenerator(stage2_config(preset, fusion)), torch.zeros(1, 256, dtype=torch.int64)
        model(torch.zeros(1, 256, 16), places[:, hidden:], places[:, :hidden], places[:, 0], places,
              torch.zeros(1, hidden, 4, dtype=torch.int64), torch.zeros(1, hidden, 4, 16)).backward()
    added = sum(p.numel() for name, p in model.named_parameters() if name.startswith(model.ADDED))
    return sum(p.numel() for p in model.parameters()) - added, added, counter.get_total_flops()


def costs(folder, args):
    def hours(flops, epochs):
        return flops * 1_281_167 * epochs / USABLE / 3600

    for preset in "BLH":
        parameters, flops = stage1_flops(preset)
        print(f"preset {preset}: stage 1 {parameters / 1e6:.1f} M, {flops / 1e9:.0f} GFLOP per picture, "
              f"{hours(flops, 300):.0f} GPU-hours")
        for fusion in ("none", "cross", "qformer"):
            parameters, added, flops = stage2_flops(preset, fusion)
            print(f"    stage 2, {fusion:8} {parameters / 1e6:.1f} M + {added / 1e6:.1f} M of fusion, "
                  f"{flops / 1e9:.0f} GFLOP per picture, {hours(flops, 800):.0f} GPU-hours")


# Full size -----------------------------------------------------------------------------------------------------------

def stand_in_images(root, count, classes=1000):
    """`count` JPEGs of 256 to 500 pixels in `classes` folders named like synsets."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"n{label:08d}").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        w, h = rng.integers(256, 501, 2)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        picture = small.resize((int(w), int(h)), Image.Resampling.BICUBIC)
        picture.save(root / f"n{i * classes // count:08d}" / f"{i}.jpeg")
    return root


def full(folder, args):
    clock = time.time()

    def say(what):
        nonlocal clock
        peak = max(resource.getrusage(who).ru_maxrss
                   for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
        print(f"== {what}: {time.time() - clock:.0f} s, peak memory so far {peak:.1f} GiB", flush=True)
        clock = time.time()

    def script(name, *arguments):  # in a process of its own, as a user starts it
        path = Path(__file__).parent.parent / f"{name}.py"
        subprocess.run([sys.executable, str(path), *map(str, arguments)], check=True)

    images = tokenizers.ImageFolder(stand_in_images(folder / "thousand", 1000), 256)
    assert len(images) == len(images.classes) == 1000
    for pictures, _ in DataLoader(images, batch_size=50, num_workers=2):
        assert pictures.shape == (50, 256, 256, 3)
    say("1,000 JPEGs in 1,000 class folders made and read")
    vq = published_file("llamagen_vq_ds16", folder / "vq.pt", "model")
    kl = published_file("mar_kl16", folder / "kl.ckpt", "model")
    gpt = published_file("llamagen_gpt_b_c2i", folder / "gpt.pt", "model")
    mar = published_file("mar_base", folder / "mar.pth", "model", "model_ema")
    say("weight files in the published containers made")
    run = ["--preset", "B", "--out", folder / "B"]
    script("train", *run, "--stage", "0", "--data", stand_in_images(folder / "few", 32), "--vq", vq, "--kl", kl)
    say("stage 0 on 32 of them")
    steps = ["--steps", "2", "--batch-size", "4"]
    script("train", *run, "--stage", "1", *steps, "--init", gpt)
    say("stage 1, two steps of 4")
    for fusion in ("cross", "qformer"):
        (folder / "B" / "stage2.pt").unlink(missing_ok=True)
        script("train", *run, "--stage", "2", *steps, "--fusion", fusion, "--init", mar)
        say(f"stage 2, two steps of 4, fusion {fusion}")
    script("sample", "--run", folder / "B", "--num", "2", "--steps", "8", "--diffusion-steps", "10",
           "--out", folder / "two.png")
    say("two pictures, 8 token steps of 10 denoising steps")


# Kills ---------------------------------------------------------------------------------------------------------------

def kills(folder, args):
    images = tokenizers.Shapes(16, count=30000)
    np.savez(folder / "shapes.npz", images=np.stack([images[i][0] for i in range(30000)]), labels=np.arange(30000) % 10)
    rng = random.Random(args.seed)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}", "--"]

    def commands(name):
        training = ["train", "--preset", "tiny", "--data", folder / "shapes.npz", "--out", folder / name,
                    "--save-every", "10", "--steps", "600"]
        return training, ["sample", "--run", folder / name, "--num", "20000", "--out", folder / f"{name}.npz"]

    def start(command):
        words = [sys.executable, "-u", *(torchrun if args.processes > 1 else []), str(Path(tiny.__file__)),
                 *map(str, command)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def kill(process):
        """All processes at once, or one of torchrun's, so that torchrun ends the others."""
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        children = sorted(int(child) for task in tasks for child in (task / "children").read_text().split())
        for pid in [process.pid, *children] if args.processes == 1 or count % 2 else [rng.choice(children)]:
            os.kill(pid, signal.SIGKILL)
        return process.communicate()

    for command in commands("undisturbed"):
        start(command).communicate()
    training, sampling = commands("killed")
    count, resuming, plan = 0, ("resuming", "goes on"), folder / "killed" / "tokens" / "plan.json"
    times = dict(zip(("stage 0  step", "encoding", "stage 1  step", "stage 2  step", "sampled"),
                     (9, 6, 8, 8, 9) if args.processes == 1 else (2,) * 5))
    for command, phases in ((training, {phase: n for phase, n in times.items() if phase != "sampled"}),
                            (sampling, {"sampled": times["sampled"]})):
        for phase in [phase for phase, times in phases.items() for _ in range(times)]:
            process, resumed = start(command), "from the start"
            for line in process.stdout:
                if any(word in line for word in resuming):
                    resumed = line.strip().replace(str(folder), "...")
                if line.startswith(phase) or phase == "encoding" and plan.exists():
                    break
            time.sleep(rng.uniform(0, 0.6 if "step" in phase else 3))
            kill(process)
            count += 1
            print(f"kill {count:2} in {phase.split('  ')[0]}, {resumed}", flush=True)
            assert process.returncode, "the work was finished before the kill"
        process = start(command)
        output = process.communicate()[0].splitlines()
        assert process.returncode == 0
        print(next(line for line in output if any(word in line for word in resuming)).replace(str(folder), "..."))
    equal = {name: filecmp.cmp(folder / f"undisturbed{name}", folder / f"killed{name}", shallow=False)
             for name in ("/tokens/codes.npy", "/tokens/moments.npy", "/tokens/labels.npy")}
    a, b = (np.load(folder / f"{name}.npz", allow_pickle=False)["arr_0"] for name in ("undisturbed", "killed"))
    equal["pictures"] = np.array_equal(a, b)  # the files differ in the names of the runs that they were made from
    for stage in (0, 1, 2):
        a, b = (torch.load(folder / name / f"stage{stage}.pt", weights_only=True) for name in ("undisturbed", "killed"))
        for part in ("model", "ema"):
            equal[f"stage {stage} {part}"] = all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    print("identical to an undisturbed run:", equal)
    assert all(equal.values())


# Fuzz ----------------------------------------------------------------------------------------------------------------

class Bomb:
    """What must never run."""
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def damage(path, rng, bomb):
    """Hurt one file in a random way; returns what was done. Of .npy files only the header gets flipped bits: nobody
    looks for those in tokens, and a label or code that does not exist ends in a traceback."""
    content, header = path.read_bytes(), 128 if path.suffix == ".npy" else 400
    kind = rng.choice(["truncate", "flip in front", "garbage", "empty", "bomb", "foreign", "content"]
                      + ["flip", "flip"] * (path.suffix != ".npy"))
    if kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind.startswith("flip"):
        content = bytearray(content)
        place = rng.randrange(len(content) if kind == "flip" else min(header, len(content)))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        kind += f" at {place}"
    elif kind == "garbage":
        path.write_bytes(rng.randbytes(rng.randrange(1, 2000)))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bomb" and path.suffix in (".npy", ".npz"):
        file = io.BytesIO()
        np.save(file, np.array([Bomb(bomb)], dtype=object), allow_pickle=True)
        if path.suffix == ".npy":
            path.write_bytes(file.getvalue())
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name in ("images.npy", "labels.npy", "arr_0.npy", "mu.npy"):
                    archive.writestr(name, file.getvalue())
    elif kind == "bomb" and path.suffix in (".pt", ".pth", ".ckpt"):
        torch.save({"model": Bomb(bomb), "run": Bomb(bomb)}, path)
    elif kind == "bomb":
        path.write_bytes(pickle.dumps(Bomb(bomb)))
    elif kind == "foreign":
        torch.save({"model": {"weight": torch.zeros(3)}}, path)
    elif path.suffix in (".pt", ".pth", ".ckpt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, weights_only=True)
        part = file
        while any(isinstance(value, dict) for value in part.values()) and rng.random() < 0.7:
            part = rng.choice([value for value in part.values() if isinstance(value, dict)])
        key = rng.choice(list(part) or [None])
        kind = f"{rng.choice(['key gone', 'key renamed', 'wrong type', 'wrong shape'])} {key}"
        if key is not None:
            value = part.pop(key)
            if kind.startswith("key renamed"):
                part[f"{key}x"] = value
            elif kind.startswith("wrong type"):
                part[key] = "text"
            elif kind.startswith("wrong shape"):
                part[key] = torch.zeros(7, 3)
        torch.save(file, path)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        name = rng.choice(list(arrays))
        kind = rng.choice(["gone", "float", "short", "renamed"]) + f" {name}"
        value = arrays.pop(name)
        if "float" in kind:
            arrays[name] = value / 3
        elif "short" in kind:
            arrays[name] = value[:1]
        elif "renamed" in kind:
            arrays[f"{name}x"] = value
        np.savez(path, **arrays)
    elif path.suffix == ".json":
        content = json.loads(content)
        del content[key := rng.choice(list(content))]
        path.write_text(json.dumps(content))
        kind = f"key gone {key}"
    else:
        path.write_bytes(content + b"more")
        kind = "longer"
    return kind


def fuzz(folder, args, count=300):
    rng, whole, bomb = random.Random(args.seed), folder / "whole", folder / "bomb"
    whole.mkdir()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of numpy, about numbers that a flipped bit has made
    for settings in d2c.PRESETS["tiny"]["train"].values():
        settings["decay"] = "constant"  # a finished run may be given more steps, and so is read again
    images = np.stack([tokenizers.Shapes(16)[i][0] for i in range(60)])
    np.savez(whole / "data.npz", images=images, labels=np.arange(60) % 10)
    published_file("llamagen_vq_tiny_ch32", whole / "vq.pt", "model")
    published_file("mar_kl_tiny_ch32", whole / "kl.ckpt", "model")
    published_file("llamagen_gpt_tiny", whole / "gpt.pt", "model")
    published_file("mar_tiny", whole / "mar.pth", "model", "model_ema")
    np.savez(whole / "stats.npz", **{name: np.ones(shape) for name, shape in fid.STATISTICS.items()})
    (whole / "folder" / "class").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(images[i]).save(whole / "folder" / "class" / f"{i}.png")
        Image.fromarray(images[i]).save(whole / "folder" / "class" / f"{i}.jpg")
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["--preset", "tiny", "--data", str(whole / "data.npz"), "--out", str(whole / "run"), "--steps", "3"])

    here = folder / "here"
    run, data = ["--preset", "tiny", "--out", here / "run"], here / "data.npz"
    more = [*run, "--steps", "4", "--stage"]
    fresh = ["--preset", "tiny", "--out", here / "new", "--steps", "1", "--data"]
    encoding = [*fresh, data, "--vq", here / "vq.pt", "--kl", here / "kl.ckpt", "--stage", "0"]
    quickly = ["--num", "2", "--steps", "2", "--diffusion-steps", "2", "--out"]
    sampling, photo = ["--run", here / "run", *quickly, here / "out.npz"], here / "folder" / "class" / "1.png"
    cases = [  # (a file, what then reads it)
        ("run/tokenizers.pt", sample.main, sampling),
        ("run/tokenizers.pt", train.main, [*more, "1"]),
        ("run/stage1.pt", train.main, [*more, "1"]),
        ("run/stage2.pt", train.main, [*more, "2"]),
        ("run/stage2.pt", sample.main, sampling),
        ("run/stage1.pt", sample.main, sampling),
        *[(f"run/tokens/{name}", train.main, [*more, stage]) for stage in (1, 2)
          for name in ("codes.npy", "moments.npy", "labels.npy", "meta.json")],
        ("data.npz", train.main, [*fresh, data]),
        ("folder/class/1.png", train.main, [*fresh, here / "folder"]),
        ("folder/class/1.jpg", train.main, [*fresh, here / "folder"]),
        ("folder/class/1.png", sample.main, ["--run", here / "run", *quickly, here / "out.png", "--from", photo]),
        ("vq.pt", train.main, encoding),
        ("kl.ckpt", train.main, encoding),
        ("gpt.pt", sample.main, ["--vq", here / "vq.pt", "--stage1", here / "gpt.pt", *quickly, here / "out.npz"]),
        ("mar.pth", sample.main, ["--kl", here / "kl.ckpt", "--stage2", here / "mar.pth", *quickly, here / "out.npz"]),
        ("stats.npz", fid.main, [here / "stats.npz", "--ref", whole / "stats.npz"]),
        ("gpt.pt", fid.main, [data, "--ref", whole / "stats.npz", "--metrics", "FID", "--weights", here / "gpt.pt"]),
    ]
    refused = handled = 0
    for i in range(count):
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(whole, here)
        name, main, arguments = cases[i % len(cases)]
        kind = damage(here / name, rng, bomb)
        out, err, code = io.StringIO(), io.StringIO(), 0
        signal.alarm(120)  # none may hang
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main([str(word) for word in arguments])
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = traceback.format_exc()
        signal.alarm(0)
        lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning")]
        good = code in (0, 2) and len(lines) == (code == 2) and not bomb.exists()
        refused, handled = refused + (good and code == 2), handled + (good and code == 0)
        said = f"FAILED, status {code}, {lines}" if not good else lines[0] if lines else "handled"
        print(f"{name}, {kind}, {main.__module__}.py: {said.replace(str(folder), '...')[:4000 if not good else 150]}")
        bomb.exists() and bomb.rmdir()
    failed = count - refused - handled
    print(f"{count} damaged inputs: {refused} refused in one line, {handled} handled, {failed} failed")
    return min(failed, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("costs", "full", "kills", "fuzz"))
    parser.add_argument("--seed", type=int, default=0, help="of kills and fuzz")
    parser.add_argument("--processes", type=int, default=1, help="of kills")
    parser.add_argument("--folder", default="runs/scale", help="works in FOLDER/WHAT, which is emptied first")
    args = parser.parse_args()
    folder = Path(args.folder).resolve() / args.what
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sys.exit({"costs": costs, "full": full, "kills": kills, "fuzz": fuzz}[args.what](folder, args))


if __name__ == "__main__":
    main()
