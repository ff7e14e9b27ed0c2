"""The figures of docs/tutorial.md, made from the run in runs/demo.

    python tests/figures.py                         all of them, into runs/demo/figures (three minutes on two cores)
    python tests/figures.py codes masked            some of them
    python tests/figures.py --out docs/figures      where the tutorial looks for them
    python tests/figures.py curves --run RUN        the losses of any run from its .csv files, also while it trains

Same run, same machine: same pixels. What is measured in them (distances, as in tests/benchmark_demo.py) is printed
too. `fusion` trains a Q-Former for half of the demo's steps, in a folder beside the run, and it plots
docs/fusion.csv, which `python tests/benchmark_demo.py lengths` made. Reading order: the figures, chapter by chapter;
below them how to plot with Pillow.
"""
import argparse
import csv
import io
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import fid  # noqa: E402
import train  # noqa: E402
from benchmark_demo import TEST_SEED, Rulers, real_pictures  # noqa: E402
from d2c import (denoising_step, diffusion_sample, diffusion_schedule, pick, schedule_tables,  # noqa: E402
                 token_schedule)
from fusion import split_heads  # noqa: E402
from sample import Pipeline, main as sample_main  # noqa: E402
from tokenizers import InputError, Shapes, draw_grid, reading, to_float, to_map, to_tokens  # noqa: E402
from train import read_checkpoint, user_errors, writing  # noqa: E402

COUNT = 500  # pictures behind each measured point
CHOSEN = [3, 7, 8, 5]  # the classes that are shown: star, moon, arrow, ring


# The pictures that the figures share ---------------------------------------------------------------------------------

def real(pipeline, count=4):
    """One real picture of each of the CHOSEN classes (count of them), that no training saw: uint8 (count,S,S,3), and
    the same as float (count,3,S,S)."""
    shapes = Shapes(pipeline.size, 100, TEST_SEED)
    pictures = np.stack([shapes[10 + label][0] for label in CHOSEN[:count]])
    return pictures, to_float(torch.from_numpy(pictures))


def seeded(pipeline, seed=0):
    return torch.Generator(pipeline.device).manual_seed(seed)


def coarse_pictures(pipeline, codes):
    """codes (B,N) -> what the VQ decoder makes of them, uint8 (B,S,S,3)."""
    return pipeline.finish(pipeline.vq.decode(codes.unflatten(1, pipeline.grid)))


def fine_pictures(pipeline, latents):
    """Latents (B,N,C), scaled, -> what the KL decoder makes of them, uint8 (B,S,S,3)."""
    return pipeline.finish(pipeline.kl.decode(to_map(latents, pipeline.grid) / pipeline.kl.scale))


def settings_of_stage1(pipeline):
    """Of the run's settings those that stage 1's `stream` has, under its names."""
    return dict(cfg_scale=pipeline.settings["cfg1"], temperature=pipeline.settings["temperature1"])


def draw_codes(pipeline, labels):
    """codes (B,N) as the run's settings draw them, from a fixed seed."""
    return pipeline.discrete.generate(labels, **settings_of_stage1(pipeline), generator=seeded(pipeline))


def draw_latents(pipeline, labels, codes, seed=0, **settings):
    """Latents (B,N,C) after each token step, a list of copies; from random numbers as d2c.generate has them, and the
    run's settings where no others are given."""
    generator, own = seeded(pipeline, seed), pipeline.settings
    orders = torch.rand(len(labels), math.prod(pipeline.grid), generator=generator).argsort(1)

    def draw(rows, channels):
        return torch.randn(rows, channels, generator=generator)

    settings = dict(num_steps=own["steps"], cfg_scale=own["cfg2"], temperature=own["temperature2"], clip=own["clip"],
                    diffusion_steps=own["diffusion_steps"]) | settings
    return [latents.clone() for latents in pipeline.continuous.stream(labels, codes, orders, draw, **settings)]


def sampled(pipeline, rulers, **settings):
    """(distance, milliseconds per picture) of COUNT fine pictures of all classes in turn."""
    labels, began = np.arange(COUNT) % len(Shapes.classes), time.time()
    fine = pipeline(labels, **settings)[1]
    milliseconds = 1000 * (time.time() - began) / COUNT
    return rulers.measure(fine, labels)["Frechet"], milliseconds


def cells(values, size):
    """values (B,h,w) or (B,h,w,3) -> (B,size,size,...): every place of the grid as a square."""
    side = size // values.shape[1]
    return values.repeat(side, 1).repeat(side, 2)


def blank(pictures, known, grid):
    """pictures uint8 (B,S,S,3) with light grey at all places but the `known` (B,N) ones."""
    shown = cells(known.unflatten(1, grid).numpy(), pictures.shape[1])                        # (B,S,S)
    return np.where(shown[..., None], pictures, np.uint8(225))


# Chapter 1 -----------------------------------------------------------------------------------------------------------

def two_descriptions(pipeline, run):
    """Original, codes, both reconstructions, and what each of them lost."""
    pictures, x = real(pipeline)
    vq, kl, size = pipeline.vq, pipeline.kl, pipeline.size
    codes, moments = vq.encode(x), kl.encode(x)                                               # (4,h,w), (4,2C,h,w)
    kept = [coarse_pictures(pipeline, codes.flatten(1)), pipeline.finish(kl.decode(moments.chunk(2, 1)[0]))]
    lost = [np.uint8(np.clip(127.5 + pictures.astype(float) - one, 0, 255)) for one in kept]
    bits = code_bits(vq, codes[0].numel()), latent_bits(kl, real_pictures(COUNT, TEST_SEED)[0])
    print(f"a picture: {24 * size**2} bits; its codes: {bits[0]:.0f} bits; its latents: {bits[1]:.0f} bits")
    rows = {"original": pictures, "VQ decoder": kept[0], "VQ lost": lost[0], "KL decoder": kept[1], "KL lost": lost[1]}
    rows = {name: cells(row, 96) for name, row in rows.items()}
    rows = {"original": rows.pop("original"), "codes": numbered(codes), **rows}
    return draw_grid(np.stack([*rows.values()]), [Shapes.classes[label] for label in CHOSEN], [*rows])


def numbered(codes, size=96):
    """codes (B,h,w) -> uint8 (B,size,size,3): the grid with each code's number in its place."""
    sheets, side = [], size // codes.shape[1]
    for picture in codes.tolist():
        sheet = Image.new("RGB", (size, size), "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(side / 2.2)
        for row, line in enumerate(picture):
            for column, code in enumerate(line):
                pen.rectangle((column * side, row * side, (column + 1) * side, (row + 1) * side), outline="#bbbbbb")
                pen.text(((column + .5) * side, (row + .5) * side), str(code), "black", font, anchor="mm")
        sheets.append(np.asarray(sheet))
    return np.stack(sheets)


def code_bits(vq, places):
    return places * math.log2(vq.config.codebook_size)


def latent_bits(kl, pictures):
    """KL divergence between the latents' Gaussians, scaled as for stage 2, and N(0, 1): the bits that a picture's
    latents cost a sender who knows how to use them all (mean over pictures)."""
    mean, log_variance = kl.encode(to_float(torch.from_numpy(pictures))).chunk(2, 1)
    mean, log_variance = mean * kl.scale, log_variance + 2 * math.log(kl.scale)
    return float(0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean() / math.log(2))


# Chapter 2 -----------------------------------------------------------------------------------------------------------

def writing_codes(pipeline, run):
    """Pictures as their codes are written; how sure stage 1 is at each place; guidance."""
    model, size, labels, number = pipeline.discrete, pipeline.size, torch.tensor(CHOSEN), math.prod(pipeline.grid)
    own = settings_of_stage1(pipeline)
    steps = [codes.clone() for codes in model.stream(labels, generator=seeded(pipeline), **own)]
    finished, rows = coarse_pictures(pipeline, steps[-1]), {}
    for share in (1, 2, 3, 4):
        written = steps[number * share // 4 - 1] >= 0
        rows[f"{number * share // 4} codes"] = blank(finished, written, pipeline.grid)
    log_p = model.logits(steps[-1], labels).log_softmax(-1)                                   # (4,N,K)
    entropy = -(log_p.exp() * log_p).sum(-1) / math.log(2)                                    # (4,N) bits
    print("entropy of each code in bits, mean of these pictures:", *(f"{bits:.1f}" for bits in entropy.mean(0)))
    grey = entropy.unflatten(1, pipeline.grid) / math.log2(model.config.codebook_size) * 255
    rows["entropy"] = cells(np.uint8(grey)[..., None].repeat(3, -1), size)
    for scale in (0, 1, 2, 4):
        made = model.generate(labels, **own | dict(cfg_scale=scale), generator=seeded(pipeline, 1))
        rows[f"guidance {scale}"] = coarse_pictures(pipeline, made)
    return draw_grid(np.stack([*rows.values()]), [Shapes.classes[label] for label in CHOSEN], [*rows])


# Chapter 3 -----------------------------------------------------------------------------------------------------------

def one_token(pipeline, run):
    """One token of a real picture on its way into noise, and a token on its way back."""
    x, labels = real(pipeline, 1)[1], torch.tensor(CHOSEN[:1])
    model, kl, place = pipeline.continuous, pipeline.kl, math.prod(pipeline.grid) // 2 + pipeline.grid[1] // 2
    latents = to_tokens(kl.encode(x).chunk(2, 1)[0]) * kl.scale                               # (1,N,C)
    generator, channels = seeded(pipeline, 3), latents.shape[2]
    tables, levels = schedule_tables(1000, x.device, x.dtype), [0, 200, 400, 600, 800, 999]

    def with_token(token):
        changed = latents.clone()
        changed[0, place] = token
        return framed(fine_pictures(pipeline, changed)[0], place, pipeline.grid)

    noise = torch.randn(channels, generator=generator)
    drowned = [with_token(tables["signal"][t] * latents[0, place] + tables["noise"][t] * noise) for t in levels]

    # The way back: z of this one hidden place, from all others, the class and the codes.
    others = torch.tensor([[i for i in range(latents.shape[1]) if i != place]])
    context = model.prepare(pipeline.vq.encode(x).flatten(1))
    z = pick(model.condition(latents, others, labels, context), torch.tensor([[place]])).flatten(0, 1)  # (1,D)
    seen, net = [], model.diffloss["net"]

    def watch(denoiser, x, c, noise, tables, index, *rest):
        eps = denoiser(x, tables["timesteps"][index], c).chunk(2, -1)[0]
        seen.append((x, tables["recip_signal"][index] * x - tables["recip_noise"][index] * eps))
        return denoising_step(denoiser, x, c, noise, tables, index, *rest)

    steps, temperature, clip = 100, pipeline.settings["temperature2"], pipeline.settings["clip"]
    draws = [torch.randn(1, channels, generator=generator) for _ in range(steps + 1)]
    diffusion_sample(net, net.cond_embed(z), draws, temperature, 1.0, steps, clip, watch)
    kept = [seen[steps - 1 - round(t * (steps - 1) / 999)] for t in levels]  # the last level comes first
    back = [with_token(x[0]) for x, _ in kept]
    estimate = [with_token(x0[0].clamp(-clip, clip)) for _, x0 in kept]
    sheet = draw_grid(np.stack([np.stack(row) for row in (drowned, back, estimate)]), [f"t = {t}" for t in levels],
                      ["noise in ->", "<- noise out", "<- guess of x0"])
    table, t = diffusion_schedule(), np.arange(1000)
    schedule = plot({"signal: sqrt(a_t)": (t, table["signal"]), "noise: sqrt(1 - a_t)": (t, table["noise"])},
                    "noise level t", "weight in x_t", width=sheet.width)
    return stack([sheet, schedule])


def framed(picture, place, grid):
    """uint8 (S,S,3) -> (3S,3S,3) with a white frame around one place."""
    image = Image.fromarray(picture.repeat(3, 0).repeat(3, 1))
    side, (row, column) = len(picture) * 3 // grid[0], divmod(place, grid[1])
    box = column * side - 1, row * side - 1, (column + 1) * side, (row + 1) * side
    ImageDraw.Draw(image).rectangle(box, outline="white")
    return np.asarray(image)


# Chapter 4 -----------------------------------------------------------------------------------------------------------

def token_steps(pipeline, run):
    """The latents of a picture as they are drawn, and how many places a token step draws."""
    labels, number, steps = torch.tensor(CHOSEN), math.prod(pipeline.grid), pipeline.settings["steps"]
    codes = draw_codes(pipeline, labels)
    drawn, rows = draw_latents(pipeline, labels, codes), {"codes (VQ)": coarse_pictures(pipeline, codes)}
    finished = fine_pictures(pipeline, drawn[-1])
    for k in sorted({1, 2, steps // 2, steps}):
        rows[f"{k} steps" if k > 1 else "1 step"] = blank(finished, (drawn[k - 1] != 0).any(-1), pipeline.grid)
    sheet = draw_grid(np.stack([*rows.values()]), [Shapes.classes[label] for label in CHOSEN], [*rows])
    curves = {}
    for places, count in ((number, steps), (256, 64)):
        hidden = places - np.cumsum([0] + [drawn for drawn, _ in token_schedule(places, count, 1.0)])
        curves[f"{places} places, {count} token steps"] = np.arange(count + 1) / count, hidden / places
    return stack([sheet, plot(curves, "share of the token steps", "share still hidden", width=sheet.width)])


# Chapter 5 -----------------------------------------------------------------------------------------------------------

def who_looks_where(pipeline, run):
    """Which codes a hidden place looks at; loss and distance of all kinds of fusion over the length of training."""
    labels = torch.arange(COUNT) % 10
    codes = draw_codes(pipeline, labels)
    maps = {"cross-attention": attention(pipeline.continuous, labels, codes),
            "Q-Former": attention(trained_qformer(run).continuous, labels, codes)}
    images = []
    for name, weights in maps.items():
        print(f"{name}: a hidden place gives {weights.diagonal().mean():.0%} of its attention to its own code (evenly "
              f"spread: {1 / len(weights):.0%})")
        images.append(heat(weights, name, "place of the code", "hidden place that looks"))
    logs = read_csv(ROOT / "docs" / "fusion.csv")
    for column in ("validation loss", "distance"):
        series = {}
        for row in logs:
            xs, ys = series.setdefault(row["fusion"], ([], []))
            xs.append(float(row["share"]))
            ys.append(float(row[column]))
        images.append(plot(series, "share of the training time", column, log_x=True, log_y=True, dots=True, width=330))
    return stack([beside(images[:2]), beside(images[2:])])


def trained_qformer(run):
    """The run with a Q-Former, of which stage 2 trains for half of the steps. It is made once, beside the run."""
    stage2 = read_checkpoint(run / "stage2.pt")
    folder, flags = run.with_name(run.name + "-qformer"), stage2["run"]
    for name in ("tokenizers.pt", "stage1.pt"):
        if not (folder / name).exists():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(run / name, folder / name)
    shutil.copytree(run / "tokens", folder / "tokens", dirs_exist_ok=True)
    with torch.enable_grad():
        train.main(["--out", str(folder), "--stage", "2", "--fusion", "qformer", "--preset", flags["preset"],
                    "--seed", str(flags["seed"]), "--batch-size", str(flags["batch_size"]),
                    "--steps", str(max(1, stage2["step"] // 2)), "--device", "cpu"])
    return Pipeline.from_run(folder, device="cpu")


def attention(model, labels, codes):
    """(N,N): how much of its cross-attention each place gives to each code when nothing is drawn yet; a mean over
    pictures, heads and blocks."""
    maps, number = [], codes.shape[1]

    def keep(module, inputs, output):
        x, (keys, _) = inputs
        q = split_heads(module.q(x), module.heads).expand(len(keys), -1, -1, -1)              # (B,heads,S+N,D/heads)
        maps.append((q @ keys.mT / math.sqrt(keys.shape[-1])).softmax(-1).mean((0, 1))[-number:])  # (N,N)

    hooks = [block.cross.register_forward_hook(keep) for block in model.fusion.blocks]
    nothing = torch.zeros(len(labels), number, model.config.channels), torch.zeros(len(labels), 0, dtype=torch.int64)
    model.condition(*nothing, labels, model.prepare(codes))
    for hook in hooks:
        hook.remove()
    return torch.stack(maps).mean(0).numpy()


# Chapter 6 -----------------------------------------------------------------------------------------------------------

def same_codes(pipeline, run):
    """The same codes, six draws of stage 2."""
    labels = torch.tensor(CHOSEN)
    codes = draw_codes(pipeline, labels)
    rows = [coarse_pictures(pipeline, codes)]
    rows += [fine_pictures(pipeline, draw_latents(pipeline, labels, codes, seed)[-1]) for seed in range(6)]
    pictures = np.stack(rows, 1)                                                              # (4,7,S,S,3)
    return draw_grid(pictures, ["codes (VQ)"] + [f"draw {i}" for i in range(1, 7)],
                     [Shapes.classes[label] for label in CHOSEN])


def from_photos(pipeline, run):
    """What `sample.py --from` makes of picture files: three of the built-in data, drawn at 256 pixels."""
    shapes = Shapes(256, 100, TEST_SEED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{Shapes.classes[label]}.png") for label in CHOSEN[:3]]
        for file, label in zip(files, CHOSEN):
            Image.fromarray(shapes[20 + label][0]).save(file)
        sample_main(["--run", str(run), "--from", *map(str, files), "--classes", *map(str, CHOSEN[:3]), "--device",
                     "cpu", "--out", str(Path(folder, "photos.png"))])
        with Image.open(Path(folder, "photos.png")) as image:
            return image.copy()


# Chapter 7 -----------------------------------------------------------------------------------------------------------

def turning_knobs(pipeline, run):
    """Guidance and temperature of stage 2 as a grid; distance over token steps and denoising steps."""
    labels = torch.tensor(CHOSEN[:1])
    codes = draw_codes(pipeline, labels)
    guidance, temperature = [0, 1, 1.5, 3, 6], [0, 0.7, 1, 1.3]
    drawn = [[fine_pictures(pipeline, draw_latents(pipeline, labels, codes, cfg_scale=g, temperature=t)[-1])[0]
              for g in guidance] for t in temperature]
    grid = draw_grid(np.array(drawn), [f"guidance {g:g}" for g in guidance],
                     [f"temperature {t:g}" for t in temperature])

    rulers, places = Rulers(run), math.prod(pipeline.grid)
    print(f"distance of {COUNT} fine pictures, and time with stage 1 and decoders:")

    def measure(**settings):
        distance, milliseconds = sampled(pipeline, rulers, **settings)
        print("  ", *(f"{name} {value}" for name, value in settings.items()),
              f"  {distance:.3f}   {milliseconds:.0f} ms per picture")
        return distance

    token_steps = [n for n in (1, 2, 4, 8, 16) if n <= places]
    denoising = [2, 5, 10, 25, 50, 100]
    plots = [plot({"": (token_steps, [measure(steps=n) for n in token_steps])},
                  f"token steps (of {pipeline.settings['diffusion_steps']} denoising steps)", "distance", log_x=True,
                  dots=True, width=330),
             plot({"": (denoising, [measure(diffusion_steps=n) for n in denoising])},
                  f"denoising steps (in each of {pipeline.settings['steps']} token steps)", "distance", log_x=True,
                  log_y=True, dots=True, width=330)]
    return stack([grid, beside(plots)])


# Chapter 8 -----------------------------------------------------------------------------------------------------------

def real_against_real(pipeline, run):
    """The distance of real pictures to real pictures over 1/N; what resizing and JPEG do to a picture."""
    rulers, size = Rulers(run), 10 * COUNT
    pictures = real_pictures(size, TEST_SEED)[0]
    rng, counts, distances = np.random.default_rng(0), [size // n for n in (100, 50, 25, 10, 5, 2, 1)], []
    for count in counts:
        chosen = [rng.permutation(size)[:count] for _ in range(5 if count < size else 1)]
        distances.append(np.mean([fid.frechet_distance(*rulers.small_statistics(pictures[rows]), *rulers.reference)
                                  for rows in chosen]))
        print(f"{count:5} real pictures against 5000 others: distance {distances[-1]:.3f}")
    count = plot({"real against real": ([1 / count for count in counts], distances)}, "1 / number of pictures",
                 "distance", dots=True)

    picture = torch.from_numpy(real(pipeline, 1)[0])                                          # (1,S,S,3)
    ways = [fid.preprocess(picture, way)[0].permute(1, 2, 0).numpy() * 127.5 + 127.5 for way in ("tf1", "half_pixel")]
    jpeg = io.BytesIO()
    Image.fromarray(picture[0].numpy()).save(jpeg, "JPEG", quality=75)
    packed = np.asarray(Image.open(jpeg))
    part = slice(130, 226)
    tiles = {"TF1's resize": ways[0][part, part], "half-pixel": ways[1][part, part],
             "difference x 2": 128 + 2 * (ways[0] - ways[1])[part, part],
             "PNG": enlarge(picture[0].numpy()), "JPEG 75": enlarge(packed),
             "difference x 2 ": 128 + 2 * (enlarge(picture[0].numpy()).astype(float) - enlarge(packed))}
    tiles = {name: np.uint8(np.clip(tile, 0, 255)) for name, tile in tiles.items()}
    traps = draw_grid(np.stack([*tiles.values()])[None], [*tiles], [""])
    return stack([count, traps])


def enlarge(picture):
    """uint8 (S,S,3) -> (96,96,3)."""
    return np.asarray(Image.fromarray(picture).resize((96, 96), Image.Resampling.NEAREST))


# Watching training ---------------------------------------------------------------------------------------------------

def curves(run):
    """Loss and validation loss of each stage that has a log."""
    plots = []
    for path in sorted(run.glob("stage?.csv")):
        rows = read_csv(path)
        with reading(path, "it is no log of train.py"):
            steps, *losses = ([float(row[name]) for row in rows] for name in ("step", "loss", "validation"))
            series = {"training": (steps, losses[0]), "validation (EMA)": (steps, losses[1])}
            plots.append(plot(series, f"training steps of {path.stem}", "loss", width=330))
    if not plots:
        raise InputError(f"{run}: no stage0.csv, stage1.csv or stage2.csv there; train.py writes them when it saves")
    return beside(plots)


def read_csv(path):
    """The rows of a .csv file with a header, as dicts of text. Raises InputError."""
    with reading(path, "not a readable .csv file"), open(path, newline="") as file:
        return list(csv.DictReader(file))


# Plots ---------------------------------------------------------------------------------------------------------------

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # Okabe and Ito's: told apart by colour-blind readers, too
FINER = 3  # drawn so many times larger, then reduced: Pillow's lines have no smooth edges


def ticks(low, high, log):
    """About four round numbers between low and high; on a logarithmic axis 1, 2, 5, 10, ..."""
    if log:
        marks = [(m, m * 10**e) for e in range(-4, 5) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10**e <= high]
        round_ones = [value for m, value in marks if m in (1, 2, 5)]
        return round_ones if len(round_ones) > 2 else [value for _, value in marks]
    step = 10.0**math.floor(math.log10((high - low) / 2))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(series, x_label, y_label, log_x=False, log_y=False, dots=False, width=660, height=260):
    """{name: (xs, ys)} as lines, with axes, ticks and a legend: a PIL image. The axis of y begins at 0 unless log_y."""
    image = Image.new("RGB", (width * FINER, height * FINER), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * FINER)
    left, right, top, bottom = (n * FINER for n in (54, width - 16, 30, height - 44))
    every = [[float(value) for points in series.values() for value in points[axis]] for axis in (0, 1)]
    lows = [min(every[0]), min(every[1]) if log_y else min(0, *every[1])]
    highs = [max(values) if max(values) > low else low + 1 for values, low in zip(every, lows)]

    def along(value, axis):
        """Where a number lies on an axis, 0 to 1."""
        scale = math.log if (log_x, log_y)[axis] else float
        return (scale(value) - scale(lows[axis])) / (scale(highs[axis]) - scale(lows[axis]))

    def at(x, y):
        return left + along(x, 0) * (right - left), bottom - along(y, 1) * (bottom - top)

    for value in sorted(set(every[0])) if log_x else ticks(lows[0], highs[0], False):  # log_x: what was measured
        x, _ = at(value, highs[1])
        pen.line((x, top, x, bottom), "#dddddd", FINER)
        pen.text((x, bottom + 5 * FINER), f"{value:g}", "black", font, anchor="mt")
    for value in ticks(lows[1], highs[1], log_y):
        _, y = at(highs[0], value)
        pen.line((left, y, right, y), "#dddddd", FINER)
        pen.text((left - 5 * FINER, y), f"{value:g}", "black", font, anchor="rm")
    pen.line((left, top, left, bottom, right, bottom), "black", FINER)
    pen.text(((left + right) / 2, (height - 6) * FINER), x_label, "black", font, anchor="mb")
    pen.text((4 * FINER, 4 * FINER), y_label, "black", font, anchor="lt")
    legend = right
    for (name, (xs, ys)), colour in reversed([*zip(series.items(), COLOURS)]):
        points = [at(x, y) for x, y in zip(xs, ys)]
        pen.line(points, colour, 2 * FINER, joint="curve")
        for x, y in points if dots else []:
            pen.circle((x, y), 3.5 * FINER, colour)
        pen.text((legend, 4 * FINER), name, colour, font, anchor="rt")
        legend -= font.getlength(name) + 14 * FINER
    return image.reduce(FINER)


def heat(values, title, x_label, y_label, side=13):
    """values (h,w) from 0 (white) to their largest (dark blue), a square each: a PIL image."""
    shade = (values / values.max())[..., None]
    colour = np.uint8(255 * (1 - shade) + np.array([8, 48, 107]) * shade)
    image = Image.fromarray(colour).resize((values.shape[1] * side, values.shape[0] * side), Image.Resampling.NEAREST)
    canvas, font = Image.new("RGB", (330, image.height + 74), "white"), ImageFont.load_default(12)
    pen, left, top = ImageDraw.Draw(canvas), 54, 34
    canvas.paste(image, (left, top))
    pen.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline="black")
    for i in {0, len(values) - 1}:
        pen.text((left + (i + 0.5) * side, top + image.height + 4), str(i), "black", font, anchor="mt")
        pen.text((left - 5, top + (i + 0.5) * side), str(i), "black", font, anchor="rm")
    pen.text((left, top - 6), f"{title} (white 0, dark {values.max():.2f})", "black", font, anchor="ls")
    pen.text((left + image.width / 2, canvas.height - 8), x_label, "black", font, anchor="mb")
    aside = Image.new("RGB", (int(font.getlength(y_label)) + 2, 16), "white")
    ImageDraw.Draw(aside).text((0, 0), y_label, "black", font)
    canvas.paste(aside.rotate(90, expand=True), (12, top + (image.height - aside.width) // 2))
    return canvas


def stack(images):
    """Images one below the other."""
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (0, sum(before.height for before in images[:i])))
    return sheet


def beside(images):
    """Images side by side."""
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (sum(before.width for before in images[:i]), 0))
    return sheet


# The command ---------------------------------------------------------------------------------------------------------

FIGURES = dict(tokenizers=two_descriptions, codes=writing_codes, diffusion=one_token, masked=token_steps,
               fusion=who_looks_where, variations=same_codes, photos=from_photos, knobs=turning_knobs,
               judge=real_against_real)


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(prog="figures.py", usage=argparse.SUPPRESS, description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)}, curves (default: all)")
    add("--run", type=Path, default=Path("runs/demo"), help="a run of the demo; curves: any run (default runs/demo)")
    add("--out", type=Path, help="folder of the figures (default RUN/figures)")
    args = parser.parse_args(argv)
    out, names = args.out or args.run / "figures", args.names or [*FIGURES, "curves"]
    with user_errors(parser):
        if unknown := set(names) - {*FIGURES, "curves"}:
            raise InputError(f"{', '.join(sorted(unknown))}: no figure; choose among {', '.join(FIGURES)}, curves")
        pipeline = Pipeline.from_run(args.run, device="cpu") if set(names) - {"curves"} else None
        for name in names:
            image = curves(args.run) if name == "curves" else FIGURES[name](pipeline, args.run)
            with writing(out / f"{name}.png") as temporary:
                image.save(temporary, optimize=True)
            print(f"saved {out / name}.png", flush=True)


if __name__ == "__main__":
    main()
