"""How good are the demo's pictures, and what are the codes and the fusion worth?  Makes the figures of the README.

    python tests/benchmark_demo.py demo --weights pt_inception-2015-12-05-6726825d.pth      the run in runs/demo
    python tests/benchmark_demo.py demo --flags --diffusion-steps 50:5                      the same, sampled otherwise
    python tests/benchmark_demo.py cross --steps 4 8 16      a row of the README's table: trains seeds 0 and 1, then measures them
    python tests/benchmark_demo.py codes|none|qformer|aligned                                                  the other rows
    python tests/benchmark_demo.py noise                     --code-noise 0 against 0.1, with codes of stage 1 and of real pictures

Stage 2 trains equally long for every row: a kind that takes more time per step takes fewer steps. The rulers, each
applied to 1,000 sampled pictures:

    accuracy   share whose class a small network names right; it learned from real pictures
    Frechet    distance to 5,000 real pictures in the features of that network
    Inception  the same in the features of the FID Inception (`fid.py`), with --weights. With so few pictures it is no FID
               as papers print it

Real pictures for all of them come from seeds that no training uses. What is made on the way is kept in --folder, and an
interrupted command goes on from there.
"""
import argparse
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
from tokenizers import Parser, Shapes, positive, read_checkpoint, seed_of, to_float, to_map, to_uint8, write_atomically  # noqa: E402

SIZE, REFERENCE_SEED, CLASSIFIER_SEED, TEST_SEED = 32, 1001, 1002, 1003

# ---------------------------------------------------------------------------------------------------------------------
# Two rulers
# ---------------------------------------------------------------------------------------------------------------------


def real_pictures(number, seed):
    """(uint8 (number,S,S,3), class ids (number,)) of the built-in data."""
    shapes = Shapes(SIZE, number, seed)
    return np.stack([shapes[i][0] for i in range(number)]), np.arange(number) % len(shapes.classes)


def make_classifier(path):
    """The network that names shapes: trained on 20,000 real pictures, or read from `path`."""
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),                             # (B,32,16,16)
        nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),                            # (B,64,16,16)
        nn.Conv2d(64, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),                            # (B,64,8,8)
        nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),                          # (B,128,4,4)
        nn.Flatten(), nn.Linear(128 * 16, len(Shapes.classes)))                               # (B,10)
    if path.exists():
        network.load_state_dict(read_checkpoint(path))
        return network.eval()
    torch.manual_seed(0)
    pictures, labels = (torch.from_numpy(x) for x in real_pictures(20_000, CLASSIFIER_SEED))
    epochs, batch_size = 4, 125
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(labels) // batch_size)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(network(to_float(pictures[chosen])), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    write_atomically(path, lambda temporary: torch.save(network.state_dict(), temporary))
    return network.eval()


class Rulers:
    """`measure` gives a dict: accuracy, Frechet and, with Inception's weights, Inception."""

    def __init__(self, folder, weights=None):
        self.classifier = make_classifier(folder / "classifier.pt")
        self.inception = fid.load_inception(weights) if weights else None
        real = real_pictures(5000, REFERENCE_SEED)[0]
        self.reference = self.small_statistics(real)
        if weights:
            path = folder / "inception.npz"  # minutes to make: kept
            if not path.exists():
                mu, sigma = self.inception_statistics(real)
                write_atomically(path, lambda temporary: np.savez(temporary, mu=mu, sigma=sigma))
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
            measured["Inception"] = fid.frechet_distance(*self.inception_statistics(pictures), *self.inception_reference)
        return measured


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

# Steps of stage 2 that take equally long on a CPU: a step of none, cross, qformer and aligned takes 0.83, 1, 1.10 and 0.84.
STEPS = {"none": 1450, "cross": 1200, "qformer": 1090, "aligned": 1420}


def trained(folder, kind, seed, code_noise=0.0):
    """A finished run with fusion `kind`. Runs of one seed share tokenizers, tokens and stage 1."""
    base, run = folder / f"seed{seed}", folder / f"{kind}{f'-noise{code_noise}' if code_noise else ''}-seed{seed}"
    common = ["--seed", str(seed)]
    train.main(["--out", str(base), "--stage", "1", *common])
    if not run.exists():
        partial = folder / f"{run.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(base, partial)
        partial.rename(run)
    train.main(["--out", str(run), "--stage", "2", "--fusion", kind, "--steps", str(STEPS[kind]),
                "--code-noise", str(code_noise), *common])
    return run


@torch.no_grad()
def sample_pictures(run, flags=(), number=1000, real_codes=False):
    """What `sample.py --run RUN FLAGS` draws: coarse and fine pictures, uint8 (number,S,S,3), and their class ids.
    real_codes: stage 2 is told the codes of real pictures instead of stage 1's."""
    args = sample.parse(["--run", str(run), "--device", "cpu", *flags])[1]
    pipeline = sample.Pipeline(args, torch.device("cpu"))
    settings = pipeline.settings
    pictures, labels = real_pictures(number, TEST_SEED)
    made = []
    for k, chunk in enumerate(torch.from_numpy(labels).split(settings["batch_size"])):
        generator = torch.Generator().manual_seed(seed_of(args.seed, 3, k))
        if not real_codes:
            made.append(pipeline.pictures(chunk, generator))
            continue
        start = k * settings["batch_size"]
        codes = pipeline.vq.encode(to_float(torch.from_numpy(pictures[start:start + len(chunk)])))                    # (B,h,w)
        latents = pipeline.continuous.generate(chunk, codes.flatten(1), settings["steps"], settings["cfg2"], settings["temperature2"],
                                               settings["diffusion_steps"], settings["clip"], generator)              # (B,N,C)
        made.append([to_uint8(pipeline.vq.decode(codes)).numpy(),
                     to_uint8(pipeline.kl.decode(to_map(latents, pipeline.grid) / pipeline.kl.scale)).numpy()])
    coarse, fine = (np.concatenate(kind) for kind in zip(*made))
    return coarse, fine, labels


def seconds_of_stage2(run):
    """Training time of stage 2, as its log has it."""
    return float((run / "stage2.csv").read_text().split()[-1].split(",")[-1])


def summary(measured):
    """Of a dict per seed: for each ruler the mean and, of several, half the distance between the smallest and the largest."""
    forms, texts = {"accuracy": ".1%", "Frechet": ".3f", "Inception": ".1f"}, []
    for name, form in forms.items():
        if values := [one[name] for one in measured if name in one]:
            spread = f" +- {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else ""
            texts.append(f"{name} {np.mean(values):{form}}{spread}")
    return "   ".join(texts)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def measure_demo(rulers, run, flags):
    """Real pictures, and what the run draws with the preset's settings and `flags`; coarse and fine."""
    coarse, fine, labels = sample_pictures(run, flags)
    for name, pictures in (("real", real_pictures(len(labels), TEST_SEED)[0]), ("coarse", coarse), ("fine", fine)):
        print(f"{name:6}  {summary([rulers.measure(pictures, labels)])}", flush=True)


def measure_row(rulers, folder, kind, seeds, token_steps, settings):
    """One line per number of token steps; for `codes` one line, since stage 2 plays no part."""
    runs = [trained(folder, "cross" if kind == "codes" else kind, seed) for seed in seeds]
    took = "" if kind == "codes" else f"   stage 2 took {np.mean([seconds_of_stage2(run) for run in runs]):.0f} s"
    for steps in token_steps[:1] if kind == "codes" else token_steps:
        measured = []
        for run in runs:
            coarse, fine, labels = sample_pictures(run, ["--steps", str(steps), *settings])
            measured.append(rulers.measure(coarse if kind == "codes" else fine, labels))
        print(f"{kind:8} {'' if kind == 'codes' else f'{steps:2} token steps':15} {summary(measured)}{took}", flush=True)


def measure_noise(rulers, folder, seeds, settings):
    """--code-noise 0 and 0.1, each sampled with codes of stage 1 and with codes of real pictures."""
    for noise in (0.0, 0.1):
        runs = [trained(folder, "cross", seed, noise) for seed in seeds]
        for real_codes in (False, True):
            measured = []
            for run in runs:
                _, fine, labels = sample_pictures(run, settings, real_codes=real_codes)
                measured.append(rulers.measure(fine, labels))
            print(f"code noise {noise}, codes of {'real pictures' if real_codes else 'stage 1':13}  {summary(measured)}", flush=True)


def main(argv=None):
    parser = Parser(prog="benchmark_demo.py", description="Measure the demo: accuracy and Frechet distance of its pictures.")
    parser.add_argument("what", choices=["demo", "codes", *STEPS, "noise"])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the run that `demo` measures (default runs/demo)")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"), help="where runs and rulers are kept")
    parser.add_argument("--weights", metavar="FILE", help="Inception weights as for fid.py; adds the distance in its features")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=positive, nargs="+", default=[8], help="numbers of token steps to sample with")
    parser.add_argument("--cfg2", default="1.5", help="guidance of stage 2 in rows and noise (default 1.5)")
    parser.add_argument("--temperature2", default="1.0", help="its temperature there (default 1.0)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of `demo`, last: flags of sample.py, as --diffusion-steps 50:5")
    args = parser.parse_args(argv)
    settings = ["--cfg2", args.cfg2, "--temperature2", args.temperature2]
    with parser.plain_errors():
        try:
            rulers = Rulers(args.folder, args.weights)
        except fid.InputError as error:
            parser.error(error)
        if args.what == "demo":
            measure_demo(rulers, args.run, args.flags)
        elif args.what == "noise":
            measure_noise(rulers, args.folder, args.seeds, settings)
        else:
            measure_row(rulers, args.folder, args.what, args.seeds, args.steps, settings)


if __name__ == "__main__":
    main()
