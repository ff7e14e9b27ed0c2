"""How good are the demo's pictures, and what are the codes and the fusion worth?  Makes figures of docs/results.md.

    python tests/benchmark_demo.py demo --weights pt_inception-2015-12-05-6726825d.pth      the run in runs/demo
    python tests/benchmark_demo.py demo --flags --diffusion-steps 50:5                      the same, sampled otherwise
    python tests/benchmark_demo.py cross --steps 4 8 16   a row of the table: trains seeds 0 and 1, then measures them
    python tests/benchmark_demo.py codes|none|qformer|aligned                                            the other rows
    python tests/benchmark_demo.py lengths                all kinds after trainings of several lengths: docs/fusion.csv
    python tests/benchmark_demo.py picture                real pictures, their reconstructions, and samples, in one grid
    python tests/benchmark_demo.py ruler                  trains the small network of tests/ruler.pt anew

Stage 2 trains equally long for every row: a kind that takes more time per step takes fewer steps. The rulers, each
applied to 1,000 sampled pictures:

    accuracy   share whose class a small network names right; it learned from real pictures (tests/ruler.pt)
    Frechet    distance to 5,000 real pictures in the features of that network
    Inception  the same in the features of the FID Inception (`fid.py`), with --weights. With so few pictures it is no
               FID as papers print it

Real pictures for all of them come from seeds that no training uses. What is made on the way is kept in --folder, and an
interrupted command goes on from there.
"""
import argparse
import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import fid  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from tokenizers import Shapes, draw_grid, to_float, to_uint8  # noqa: E402
from train import load_tokenizers, number, read_checkpoint, user_errors, writing  # noqa: E402

RULER = Path(__file__).with_name("ruler.pt")
SIZE, REFERENCE_COUNT, REFERENCE_SEED, CLASSIFIER_SEED, TEST_SEED = 32, 5000, 1001, 1002, 1003

# Rulers --------------------------------------------------------------------------------------------------------------

def real_pictures(count, seed):
    """(uint8 (count,S,S,3), class ids (count,)) of the built-in data, every second picture of a class mirrored: so the
    generators, which learn from pictures and their mirror images, are to make them."""
    shapes = Shapes(SIZE, count, seed)
    pictures, kinds = np.stack([shapes[i][0] for i in range(count)]), len(shapes.classes)
    mirrored = np.arange(count) // kinds % 2 == 1
    pictures[mirrored] = pictures[mirrored, :, ::-1]
    return pictures, np.arange(count) % kinds


def small_network():
    """pictures (B,3,32,32) in [-1,1] -> logits of the ten shapes (B,10)."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),                             # (B,32,16,16)
        nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),                            # (B,64,16,16)
        nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),                            # (B,64,8,8)
        nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),                          # (B,128,4,4)
        nn.Flatten(), nn.Linear(128 * 16, len(Shapes.classes)))                               # (B,10)


def make_ruler():
    """Train the small network on 20,000 real pictures and keep it, in float16. Trained elsewhere it is another ruler,
    by which no figure of the pages was measured."""
    torch.manual_seed(0)
    network, epochs, batch_size = small_network(), 4, 125
    pictures, labels = (torch.from_numpy(x) for x in real_pictures(20_000, CLASSIFIER_SEED))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(labels) // batch_size)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(to_float(pictures[chosen])), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    with writing(RULER) as temporary:
        torch.save(network.half().state_dict(), temporary)
    print(f"saved {RULER}")


class Rulers:
    """`measure` gives a dict: accuracy, Frechet and, with Inception's weights, Inception."""
    def __init__(self, folder, weights=None):
        self.classifier = small_network().eval()
        self.classifier.load_state_dict(read_checkpoint(RULER))
        self.inception = fid.load_inception(weights) if weights else None
        real = real_pictures(REFERENCE_COUNT, REFERENCE_SEED)[0]
        self.reference = self.small_statistics(real)
        if weights:
            path = folder / "inception.npz"  # minutes to make: kept
            if not path.exists():
                mu, sigma = self.inception_statistics(real)
                with writing(path) as temporary:
                    np.savez(temporary, mu=mu, sigma=sigma)
            with np.load(path, allow_pickle=False) as file:
                self.inception_reference = file["mu"], file["sigma"]

    @torch.no_grad()
    def small_statistics(self, pictures):
        features = self.classifier[:-2](to_float(torch.from_numpy(pictures))).mean((2, 3))    # (N,128)
        return fid.statistics(features)

    def inception_statistics(self, pictures):
        return fid.statistics(fid.features(self.inception, pictures)[0])

    @torch.no_grad()
    def measure(self, pictures, labels):
        """pictures uint8 (N,S,S,3), class ids (N,)."""
        named = self.classifier(to_float(torch.from_numpy(pictures))).argmax(1).numpy()
        measured = {"accuracy": float((named == labels).mean()),
                    "Frechet": fid.frechet_distance(*self.small_statistics(pictures), *self.reference)}
        if self.inception:
            statistics = self.inception_statistics(pictures)
            measured["Inception"] = fid.frechet_distance(*statistics, *self.inception_reference)
        return measured


# Runs ----------------------------------------------------------------------------------------------------------------

# Steps of stage 2 that take equally long on a CPU: one of none, cross, qformer, aligned takes 0.86, 1, 1.01, 0.87.
STEPS = {"none": 930, "cross": 800, "qformer": 790, "aligned": 920}
WITHOUT_CODES = ["--cfg2", "3", "--temperature2", "1"]  # sampling that suits `none` best


def trained(folder, kind, seed, share=1):
    """A finished run with fusion `kind`, trained for a share of its STEPS. Runs of one seed share tokenizers, tokens
    and stage 1."""
    steps, base, common = round(STEPS[kind] * share), folder / f"seed{seed}", ["--seed", str(seed)]
    run = folder / (f"{kind}-seed{seed}" + (f"-{steps}" if share < 1 else ""))
    train.main(["--out", str(base), "--stage", "1", *common])
    if not run.exists():
        partial = folder / f"{run.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(base, partial)
        partial.rename(run)
    train.main(["--out", str(run), "--stage", "2", "--fusion", kind, "--steps", str(steps), *common])
    return run


def sample_pictures(run, flags=(), count=1000):
    """What `sample.py --run RUN FLAGS` draws: coarse and fine pictures, uint8 (count,S,S,3), and their class ids."""
    args = sample.parse(["--run", str(run), "--device", "cpu", *flags])[1]
    labels = np.arange(count) % len(Shapes.classes)
    return *sample.open_pipeline(args, torch.device("cpu"))(labels, args.seed), labels


def seconds_of_stage2(run):
    """Training time of stage 2, as its log has it."""
    return float((run / "stage2.csv").read_text().split()[-1].split(",")[-1])


def summary(measured):
    """Of a dict per seed: for each ruler the mean and, of several, half the distance between the smallest and the
    largest."""
    forms, texts = {"accuracy": ".1%", "Frechet": ".3f", "Inception": ".1f"}, []
    for name, form in forms.items():
        if values := [one[name] for one in measured if name in one]:
            spread = f" +- {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
            texts.append(f"{name} {np.mean(values):{form}}{spread}")
    return "   ".join(texts)


# The command ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def with_reconstructions(run, count):
    """{name: uint8 (count,S,S,3)}: real pictures, and what the run's tokenizers keep of them."""
    real, (vq, kl, _) = real_pictures(count, TEST_SEED)[0], load_tokenizers(run / "tokenizers.pt")
    x = to_float(torch.from_numpy(real))                                                      # (count,3,S,S)
    kept = vq.decode(vq.encode(x)), kl.decode(kl.encode(x).chunk(2, 1)[0])
    return {"real": real, "real, VQ": to_uint8(kept[0]).numpy(), "real, KL": to_uint8(kept[1]).numpy()}


@torch.no_grad()
def redrawn(run, count):
    """{name: uint8 (count,S,S,3)}: fine pictures from the codes of real ones, for their class and for none."""
    pipeline, (real, labels) = sample.Pipeline.from_run(run, device="cpu"), real_pictures(count, TEST_SEED)
    codes = pipeline.vq.encode(to_float(torch.from_numpy(real))).flatten(1)                   # (count,N)
    parts = [slice(start, start + 100) for start in range(0, count, 100)]
    return {name: np.concatenate([pipeline.batch(given[part], 0, k, codes[part])[1] for k, part in enumerate(parts)])
            for name, given in {"redrawn": labels, "redrawn, no class": np.full(count, -1)}.items()}


def measure_demo(rulers, run, flags):
    """Real pictures, their reconstructions, what stage 2 makes of their codes, and what the run draws with the preset's
    settings and `flags`."""
    coarse, fine, labels = sample_pictures(run, flags)
    rows = with_reconstructions(run, len(labels)) | redrawn(run, len(labels)) | {"coarse": coarse, "fine": fine}
    for name, pictures in rows.items():
        print(f"{name:17}  {summary([rulers.measure(pictures, labels)])}", flush=True)


def picture(run):
    """RUN/beside.png: two real pictures of each class, what the tokenizers keep of them, and pictures drawn by the run
    (the first ones of a seed). None of them is chosen by hand."""
    count = 2 * len(Shapes.classes)
    coarse, fine, _ = sample_pictures(run, count=count)
    rows = with_reconstructions(run, count) | {"coarse": coarse, "fine": fine}
    with writing(run / "beside.png") as temporary:
        draw_grid(np.stack([*rows.values()]), Shapes.classes, [*rows]).save(temporary)
    print(f"saved {run / 'beside.png'}")


def measure_row(rulers, folder, kind, seeds, token_steps, flags):
    """One line per number of token steps; for `codes` one line, since stage 2 plays no part."""
    runs = [trained(folder, "cross" if kind == "codes" else kind, seed) for seed in seeds]
    took = f"   stage 2 took {np.mean([seconds_of_stage2(run) for run in runs]):.0f} s" if kind != "codes" else ""
    for steps in token_steps[:1] if kind == "codes" else token_steps:
        measured = []
        for run in runs:
            coarse, fine, labels = sample_pictures(run, ["--steps", str(steps), *flags])
            measured.append(rulers.measure(coarse if kind == "codes" else fine, labels))
        what = "" if kind == "codes" else f"{steps:2} token steps"
        print(f"{kind:8} {what:15} {summary(measured)}{took}", flush=True)


def lengths(rulers, folder, seed=0):
    """docs/fusion.csv: for every kind, after an eighth, a quarter, a half and all of its steps (each a training of its
    own, whose rate decays to zero), the validation loss and the distance of fine pictures at 8 token steps."""
    path = Path(__file__).parent.parent / "docs" / "fusion.csv"
    with writing(path) as temporary, open(temporary, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["fusion", "share", "steps", "validation loss", "distance"])
        for kind, whole in STEPS.items():
            for share in (1 / 8, 1 / 4, 1 / 2, 1):
                run = trained(folder, kind, seed, share)
                loss = (run / "stage2.csv").read_text().split()[-1].split(",")[2]
                _, fine, labels = sample_pictures(run, WITHOUT_CODES if kind == "none" else ())
                distance = rulers.measure(fine, labels)["Frechet"]
                rows.writerow([kind, share, round(whole * share), loss, f"{distance:.4f}"])
    print(f"saved {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmark_demo.py", usage=argparse.SUPPRESS,
                                     description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=["ruler", "picture", "lengths", "demo", "codes", *STEPS])
    add("--run", type=Path, default=Path("runs/demo"), help="the run of `demo` and `picture` (default runs/demo)")
    add("--folder", type=Path, default=Path("runs/benchmark"), help="where runs and rulers are kept")
    add("--weights", metavar="FILE", help="Inception weights as for fid.py; adds the distance in its features")
    add("--seeds", type=int, nargs="+", default=[0, 1])
    add("--steps", type=number(int, 1), nargs="+", default=[8], help="numbers of token steps to sample with")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags of sample.py, as --temperature2 1")
    args = parser.parse_args(argv)
    with user_errors(parser):
        if args.what == "ruler":
            return make_ruler()
        if args.what == "picture":
            return picture(args.run)
        try:
            rulers = Rulers(args.folder, args.weights)
        except fid.InputError as error:
            parser.error(error)
        if args.what == "lengths":
            lengths(rulers, args.folder)
        elif args.what == "demo":
            measure_demo(rulers, args.run, args.flags)
        else:
            measure_row(rulers, args.folder, args.what, args.seeds, args.steps, args.flags)


if __name__ == "__main__":
    main()
