"""The plots and numbers that the exercises of docs/course.md ask for, from the run in runs/demo.

    python tests/handins.py 4       prints the numbers of exercise 4, and saves its plot in runs/demo/handins/4.png
    python tests/handins.py         all ten (some minutes on two cores)

Each is a function of a few lines. Read the one you run: what is plotted is part of the question.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from figures import COUNT, attention, draw_codes, draw_latents, fine_pictures, heat, plot, sampled
import fid
import train
from benchmark_demo import REFERENCE_SEED, TEST_SEED, Rulers, real_pictures
from d2c import PRESETS, DiscreteConfig, DiscreteGenerator, diffusion_loss, pick, rotary_table, rotate
from sample import Pipeline
from tokenizers import KLTokenizer, Shapes, TokenizerConfig, VQTokenizer, to_float, to_tokens
from train import number, user_errors, writing

CLASSES = len(Shapes.classes)


def tokens_of_real_pictures(pipeline, count):
    """Latents (count,N,C), scaled, codes (count,N) and labels (count,) of pictures that no training saw."""
    pictures, labels = real_pictures(count, TEST_SEED)
    x = to_float(torch.from_numpy(pictures))
    latents = to_tokens(pipeline.kl.encode(x).chunk(2, 1)[0]) * pipeline.kl.scale
    return latents, pipeline.vq.encode(x).flatten(1), torch.from_numpy(labels)


# The ten -------------------------------------------------------------------------------------------------------------

def codes_in_use(pipeline, run, steps=300):
    """Codes in use, and their entropy, over the first steps of stage 0, with and without the revival of dead codes."""
    preset, images, curves = PRESETS["demo"], Shapes(pipeline.size), {}
    for revive in (True, False):
        torch.manual_seed(0)
        vq, kl = (cls(TokenizerConfig(**preset[name])) for name, cls in (("vq", VQTokenizer), ("kl", KLTokenizer)))
        model, shares = train.Tokenizers(vq, kl), []
        optimizer = torch.optim.AdamW(vq.parameters(), preset["train"][0]["lr"], (0.9, 0.95))
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = preset["train"][0]["lr"] * min(1, (step + 1) / 50)
            rows = torch.randint(len(images), (48,)).tolist()
            with torch.enable_grad():
                loss, codes, z = vq(to_float(torch.from_numpy(np.stack([images[i][0] for i in rows]))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if revive:
                model.revive_codes(codes.flatten(), z.detach().permute(0, 2, 3, 1).flatten(0, 2), torch.Generator())
            share = codes.flatten().bincount(minlength=vq.config.codebook_size) / codes.numel()
            shares.append(share)
        used = [float((torch.stack(shares[max(0, i - 9):i + 1]).sum(0) > 0).float().mean()) for i in range(steps)]
        last = torch.stack(shares[-10:]).mean(0)
        entropy = float(-(last * last.clamp(min=1e-12).log2()).sum())
        print(f"{'with' if revive else 'without'} revival: {used[-1]:.0%} of the codes in use in ten batches, entropy "
              f"{entropy:.2f} of {math.log2(len(last)):.0f} bits")
        curves["with revival" if revive else "without"] = np.arange(steps), used
    return plot(curves, "training steps of stage 0", "share of codes in use (ten batches)")


def scores_of_places(pipeline, run):
    """The attention score between one place of a 16 x 16 grid and all others, all queries and keys being ones."""
    turned = rotate(torch.ones(1, 1, 257, 64), rotary_table((16, 16), 64))[0, 0, 1:]          # (256,64)
    scores = (turned @ turned[8 * 16 + 8] / 8).reshape(16, 16)
    print(f"score with itself {scores[8, 8]:.2f}, one row below {scores[9, 8]:.2f}, one column right "
          f"{scores[8, 9]:.2f}, far corner {scores[0, 0]:.2f}")
    return heat((scores - scores.min()).numpy(), "score", "column", "row")


def seconds_per_picture(pipeline, run):
    """Seconds per picture with and without the cache, for growing grids; exponents of N fitted to the last two."""
    curves = {"with cache": ([], []), "without": ([], [])}
    for side in (4, 8, 16, 24):
        model = DiscreteGenerator(DiscreteConfig(128, CLASSES, (side, side), **PRESETS["demo"]["stage1"])).eval()
        labels, number = torch.zeros(1, dtype=torch.int64), side**2
        codes = torch.zeros(1, number, dtype=torch.int64)
        for name, work in (("with cache", lambda: model.generate(labels)),
                           ("without", lambda: [model.logits(codes[:, :i + 1], labels) for i in range(number)])):
            began = time.time()
            work()
            curves[name][0].append(number)
            curves[name][1].append(time.time() - began)
    for name, (numbers, seconds) in curves.items():
        exponent = math.log(seconds[-1] / seconds[-2]) / math.log(numbers[-1] / numbers[-2])
        times = ", ".join(f"N = {n}: {s:.3f} s" for n, s in zip(numbers, seconds))
        print(f"{name}: {times}; grows like N^{exponent:.1f}")
    return plot(curves, "codes per picture (N)", "seconds per picture", log_x=True, log_y=True, dots=True)


def nucleus(pipeline, run):
    """How many codes the nucleus of 0.9 holds at each place; accuracy and distance of coarse pictures over cfg1."""
    labels, classes, rulers = torch.arange(200) % CLASSES, np.arange(COUNT) % CLASSES, Rulers(run)
    codes = pipeline.discrete.generate(labels, generator=torch.Generator().manual_seed(0))
    ordered = pipeline.discrete.logits(codes, labels).softmax(-1).sort(descending=True).values
    sizes = (ordered.cumsum(-1) - ordered < 0.9).sum(-1).float().mean(0)                      # (N,)
    print("nucleus at each place:", *(f"{size:.1f}" for size in sizes))
    for cfg1 in (1, 2, 4):
        measured = rulers.measure(Pipeline.from_run(run, coarse=True, device="cpu")(classes, cfg1=cfg1)[0], classes)
        print(f"cfg1 {cfg1}: accuracy {measured['accuracy']:.1%}, distance {measured['Frechet']:.3f}")
    return plot({"": (np.arange(len(sizes)), sizes.tolist())}, "place", "codes in the nucleus of 0.9", dots=True)


def loss_per_level(pipeline, run, bins=20):
    """Loss of stage 2 per noise level, with the right codes, those of another picture, and none. All hidden."""
    latents, codes, labels = tokens_of_real_pictures(pipeline, 200)
    model, generator, curves = pipeline.continuous, torch.Generator().manual_seed(0), {}
    given = {"right codes": codes, "codes of another picture": codes.roll(CLASSES, 0),  # of the same class
             "none": torch.full_like(codes, -1)}
    t = torch.randint(1000, latents.shape[:2], generator=generator).flatten()
    noise = torch.randn(latents.shape, generator=generator).flatten(0, 1)
    nothing = torch.zeros(len(labels), 0, dtype=torch.int64)
    for name, some in given.items():
        z = model.condition(latents, nothing, labels, model.prepare(some)).flatten(0, 1)
        net = model.diffloss["net"]
        loss = diffusion_loss(net, latents.flatten(0, 1), t, noise, net.cond_embed(z))
        means = [float(loss[t * bins // 1000 == i].mean()) for i in range(bins)]
        print(f"{name}: loss {means[0]:.3f} at t < 50, {means[bins // 2]:.3f} from t = 500 on, {means[-1]:.3f} at the "
              "end")
        curves[name] = (np.arange(bins) + 0.5) * 1000 / bins, means
    return plot(curves, "noise level t", "loss", log_y=True)


def distance_over_denoising_steps(pipeline, run):
    """Distance over the number of denoising steps, at temperature 0.7 and 1."""
    rulers, steps = Rulers(run), [2, 5, 10, 25, 50, 100]
    curves = {}
    for t in (0.7, 1.0):
        distances = [sampled(pipeline, rulers, diffusion_steps=n, temperature2=t)[0] for n in steps]
        curves[f"temperature {t}"] = steps, distances
    for name, (_, distances) in curves.items():
        print(f"{name}:", ", ".join(f"{n} steps {distance:.3f}" for n, distance in zip(steps, distances)))
    return plot(curves, "denoising steps", "distance", log_x=True, log_y=True, dots=True)


def error_of_the_guess(pipeline, run):
    """Squared error of the guess of hidden latents over the number of visible places, with codes and without."""
    latents, codes, labels = tokens_of_real_pictures(pipeline, 200)
    model, number, curves = pipeline.continuous, latents.shape[1], {}
    order = torch.rand(latents.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(1)
    for name, given in (("with codes", codes), ("without", torch.full_like(codes, -1))):
        context, errors = model.prepare(given), []
        for visible in range(number):
            z = pick(model.condition(latents, order[:, :visible], labels, context), order[:, visible:])
            errors.append(float(F.mse_loss(model.guess(z), pick(latents, order[:, visible:]))))
        print(f"{name}: error {errors[0]:.3f} with nothing visible, {errors[number // 2]:.3f} with half, "
              f"{errors[-1]:.3f} with all but one")
        curves[name] = range(number), errors
    return plot(curves, "visible places", "squared error of the guess")


def attention_map(pipeline, run):
    """Attention of hidden places to codes, a mean over pictures."""
    labels = torch.arange(200) % CLASSES
    weights = attention(pipeline.continuous, labels, draw_codes(pipeline, labels))
    print(f"own code: {weights.diagonal().mean():.1%} of the attention (evenly spread: {1 / len(weights):.1%}); the "
          f"largest share of any code: {weights.max():.1%}")
    return heat(weights, "attention", "place of the code", "hidden place")


def distance_over_token_steps(pipeline, run):
    """Time and distance over token steps, with codes and without (guidance 3, temperature 1, which suit it better)."""
    rulers, labels, curves = Rulers(run), np.arange(COUNT) % CLASSES, {"with codes": [], "without": []}
    places = math.prod(pipeline.grid)
    steps = [n for n in (1, 2, 4, 8, 16) if n <= places]
    for n in steps:
        distance, milliseconds = sampled(pipeline, rulers, steps=n)
        fine = []
        for k, part in enumerate(torch.from_numpy(labels).chunk(5)):
            no_codes = torch.full((len(part), places), -1)
            drawn = draw_latents(pipeline, part, no_codes, k, num_steps=n, cfg_scale=3.0, temperature=1.0)
            fine.append(fine_pictures(pipeline, drawn[-1]))
        curves["with codes"].append(distance)
        curves["without"].append(rulers.measure(np.concatenate(fine), labels)["Frechet"])
        print(f"{n:2} token steps: {milliseconds:.0f} ms per picture; distance with codes {distance:.3f}, without "
              f"{curves['without'][-1]:.3f}")
    return plot({name: (steps, ys) for name, ys in curves.items()}, "token steps", "distance", log_x=True, log_y=True,
                dots=True)


def distance_over_count(pipeline, run):
    """The distance between two sets of N real pictures each, over 1/N."""
    most, rulers = 10 * COUNT, Rulers(run)
    sets = [real_pictures(most, seed)[0] for seed in (TEST_SEED, REFERENCE_SEED)]
    counts = [most // k for k in (100, 50, 25, 10, 5, 2, 1)]
    distances = [fid.frechet_distance(*rulers.small_statistics(sets[0][:n]), *rulers.small_statistics(sets[1][:n]))
                 for n in counts]
    for n, distance in zip(counts, distances):
        print(f"N = {n}: distance {distance:.3f}, times N: {n * distance:.0f}")
    return plot({"two sets of real pictures": ([1 / n for n in counts], distances)}, "1/N", "distance", dots=True)


HANDINS = [codes_in_use, scores_of_places, seconds_per_picture, nucleus, loss_per_level,
           distance_over_denoising_steps, error_of_the_guess, attention_map, distance_over_token_steps,
           distance_over_count]  # of exercises 1 to 10


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(prog="handins.py", usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0])
    parser.add_argument("exercises", nargs="*", type=number(int, 1, 10), metavar="N", help="1 to 10 (default: all)")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder (default runs/demo)")
    args = parser.parse_args(argv)
    with user_errors(parser):
        pipeline = Pipeline.from_run(args.run, device="cpu")
        for n in args.exercises or range(1, 11):
            print(f"exercise {n}: {HANDINS[n - 1].__doc__}", flush=True)
            with writing(args.run / "handins" / f"{n}.png") as temporary:
                HANDINS[n - 1](pipeline, args.run).save(temporary)
            print(f"saved {args.run}/handins/{n}.png", flush=True)


if __name__ == "__main__":
    main()
