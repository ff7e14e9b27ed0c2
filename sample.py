"""Sample D2C: class -> codes -> latents -> picture.

    python sample.py                                       demo: a labelled grid, coarse row above fine row
    python sample.py --classes star heart --num 20 --cfg2 3 --steps 16
    torchrun --nproc_per_node=8 -- sample.py --run runs/B --num 50000 --out samples.npz       for fid.py: arr_0, uint8 NHWC
    python sample.py --vq vq_ds16_c2i.pt --stage1 c2i_B_256.pt --out llamagen.png          published weights alone:
    python sample.py --kl kl16.ckpt --stage2 mar_base/checkpoint-last.pth --out mar.png    LlamaGen, and MAR
    python sample.py --reconstruct photo.jpg               what each tokenizer keeps: original, VQ, KL

The coarse picture is the VQ decoder's view of stage 1's codes; the fine one is the KL decoder's view of stage 2's latents.
Samples are cut into whole batches; batch k draws from a generator seeded by (seed, k), and processes take batches in turn:
the pictures depend on --seed and --batch-size, and not on the number of processes.
"""
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from d2c import PRESETS, ContinuousConfig, ContinuousGenerator, DiscreteConfig, DiscreteGenerator, generate
from tokenizers import (KL16_SCALE, InputError, KLTokenizer, Parser, Processes, VQTokenizer, autocast, clock, load_published,
                        load_tokenizers, read_checkpoint, read_image, seed_of, to_float, to_map, to_uint8)

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def load_generator(path, stage, raw=False):
    """(generator, classes or None, run or None) from a checkpoint of this project, or from a published one (LlamaGen for
    stage 1, MAR for stage 2), which knows neither class names nor a run. Raises InputError."""
    cls, config_cls = {1: (DiscreteGenerator, DiscreteConfig), 2: (ContinuousGenerator, ContinuousConfig)}[stage]
    file = read_checkpoint(path)
    if "run" not in file or "config" not in file:
        # MAR-H has heads of width 80; all others are 64 wide.
        heads = {PRESETS["H"]["stage2"]["width"]: PRESETS["H"]["stage2"]["num_heads"]} if stage == 2 else {}
        width = "z_proj.weight" if stage == 2 else "norm.weight"
        return load_published(lambda state: cls.from_published(state, heads.get(state[width].shape[0])), path, not raw), None, None
    if file["stage"] != stage:
        raise InputError(f"{path}: holds stage {file['stage']}, expected stage {stage}")
    try:
        model = cls(config_cls(**file["config"]))
        model.load_state_dict(file["model" if raw else "ema"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit this version ({' '.join(str(error).split())[:300]})") from error
    return model, file["classes"], file["run"]


class Pipeline:
    """The loaded models and their sampling settings. `vq` and `discrete` make codes and the coarse picture, `kl` and
    `continuous` the fine one; with published files either pair may be missing (None)."""

    def __init__(self, args, device):
        self.vq = self.kl = self.discrete = self.continuous = self.classes = run1 = run2 = None
        stage1, stage2 = args.stage1, args.stage2
        if args.published:
            if not (args.vq and args.stage1) and not (args.kl and args.stage2):
                raise InputError("published weights come in pairs: --vq with --stage1 (coarse), --kl with --stage2 (fine), or all")
            self.vq = args.vq and load_published(VQTokenizer.from_published, args.vq)
            self.kl = args.kl and load_published(KLTokenizer.from_published, args.kl)
            if self.kl:
                self.kl.scale = KL16_SCALE
        else:
            self.vq, self.kl, _ = load_tokenizers(run_file(args.run, "tokenizers.pt", 0))
            stage1, stage2 = run_file(args.run, "stage1.pt", 1), run_file(args.run, "stage2.pt", 2)
        if stage1 and self.vq:
            self.discrete, self.classes, run1 = load_generator(stage1, 1, args.raw)
        if stage2 and self.kl:
            self.continuous, self.classes, run2 = load_generator(stage2, 2, args.raw)
        if run1 and run2 and run1["tokens"] != run2["tokens"]:
            raise InputError(f"{stage1} and {stage2} were trained on different tokens: train one of them again")
        if self.continuous and self.continuous.config.fusion != "none" and not self.discrete:
            raise InputError(f"{stage2} is conditioned on codes: give --vq and --stage1 too")
        for part in (self.vq, self.kl, self.discrete, self.continuous):
            if part:
                part.to(device).eval()
        self.device, self.grid = device, (self.continuous or self.discrete).config.grid
        if self.discrete and self.continuous and tuple(self.discrete.config.grid) != tuple(self.continuous.config.grid):
            raise InputError(f"stage 1 has a grid of {self.discrete.config.grid} tokens, stage 2 of {self.continuous.config.grid}")
        self.num_classes = (self.continuous or self.discrete).config.num_classes
        self.classes = self.classes or [str(label) for label in range(self.num_classes)]
        preset = (run2 or run1 or {}).get("preset", "B")
        self.settings = dict(PRESETS[preset]["sample"])
        for name in ("cfg1", "temperature1", "top_k", "top_p", "cfg2", "temperature2", "steps", "diffusion_steps", "batch_size"):
            if getattr(args, name) is not None:
                self.settings[name] = getattr(args, name)
        places = math.prod(self.grid)
        if self.continuous and not 1 <= self.settings["steps"] <= places:
            raise InputError(f"--steps {self.settings['steps']}: must lie between 1 and {places}, the number of tokens")
        if not 2 <= self.settings["diffusion_steps"] <= 1000:
            raise InputError(f"--diffusion-steps {self.settings['diffusion_steps']}: must lie between 2 and 1000")

    @torch.no_grad()
    def pictures(self, labels, generator, dtype):
        """labels (B,) -> [coarse and fine pictures, as far as there are models], each uint8 (B,S,S,3)."""
        settings = {name: value for name, value in self.settings.items() if name != "batch_size"}
        made = []
        with autocast(self.device, dtype):
            codes, latents = generate(self.discrete, self.continuous, labels, generator=generator, **settings)
            if codes is not None:
                made.append(self.vq.decode(codes.unflatten(1, tuple(self.grid))))             # (B,3,S,S)
            if latents is not None:
                made.append(self.kl.decode(to_map(latents, self.grid) / self.kl.scale))       # (B,3,S,S)
        return [to_uint8(images).cpu().numpy() for images in made]


def run_file(run, name, stage):
    """The path of a run's file. Raises InputError that says which stage makes it."""
    path = Path(run) / name
    if not path.is_file():
        raise InputError(f"{path}: not there; make it with: python train.py --stage {stage} --out {run} (and the run's --preset)")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def choose_classes(wanted, classes):
    """Class ids from ids or names (a list of words, which may hold commas), all classes when none are given."""
    chosen = []
    for word in ",".join(wanted or []).split(","):
        if word in classes:
            chosen.append(classes.index(word))
        elif word.isdigit() and int(word) < len(classes):
            chosen.append(int(word))
        elif word:
            known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise InputError(f"--classes {word}: unknown; give a name ({known}) or an id from 0 to {len(classes) - 1}")
    return chosen or list(range(len(classes)))


def make_pictures(pipeline, labels, batch_size, seed, dtype, processes, partial):
    """Sample labels (n,) batch by batch, into the memory-mapped file `partial`, uint8 (kinds,n,S,S,3); returns it.

    The processes take turns in batches and write into the same file."""
    starts = range(0, len(labels), batch_size)
    began, made = time.time(), None
    turns = math.ceil(len(starts) / processes.size)
    for turn in range(turns):
        k = turn * processes.size + processes.rank
        if k < len(starts):
            generator = torch.Generator(pipeline.device).manual_seed(seed_of(seed, k))
            chunk = torch.tensor(labels[starts[k]:starts[k] + batch_size], device=pipeline.device)
            kinds = pipeline.pictures(chunk, generator, dtype)
        if turn == 0:  # only now the size of the pictures is known
            if processes.rank == 0:
                np.lib.format.open_memmap(partial, "w+", np.uint8, (len(kinds), len(labels), *kinds[0].shape[1:]))
            processes.wait()
            made = np.load(partial, mmap_mode="r+")
        if k < len(starts):
            for kind, pictures in enumerate(kinds):
                made[kind, starts[k]:starts[k] + batch_size] = pictures
        done = min((turn + 1) * processes.size * batch_size, len(labels))
        speed = done / (time.time() - began)
        processes.say(f"sampled {done}/{len(labels)}  {speed:.1f} images/s  ETA {clock((len(labels) - done) / speed)}")
    made.flush()
    processes.wait()
    return made


def draw_grid(kinds, titles, rows, path):
    """Save pictures kinds (k,n,S,S,3) as a PNG, one column per title: above all a line of titles, then for every
    len(titles) pictures one line per kind, named by `rows` at its left."""
    count, size, columns = kinds.shape[1], kinds.shape[2], len(titles)
    tile = size * max(1, round(96 / size))  # small pictures are enlarged, pixel by pixel
    font = ImageFont.load_default(13)
    left, top, gap = 8 + int(max(font.getlength(row) for row in rows)), 20, 6
    blocks = math.ceil(count / columns)
    height = top + blocks * (len(kinds) * tile + gap)
    sheet = Image.new("RGB", (left + columns * tile, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((left + (column + 0.5) * tile, top / 2), title, "black", font, anchor="mm")
    for i in range(count):
        block, column = divmod(i, columns)
        for kind, row in enumerate(rows):
            y = top + block * (len(kinds) * tile + gap) + kind * tile
            sheet.paste(Image.fromarray(kinds[kind, i]).resize((tile, tile), Image.Resampling.NEAREST), (left + column * tile, y))
            if column == 0:
                pen.text((left - 4, y + tile / 2), row, "black", font, anchor="rm")
    sheet.save(path)


@torch.no_grad()
def reconstruct(args, device):
    """Original, VQ and KL reconstruction of picture files as uint8 (3,n,S,S,3)."""
    if args.vq and args.kl:
        vq, kl = load_published(VQTokenizer.from_published, args.vq), load_published(KLTokenizer.from_published, args.kl)
        size = 256
    else:
        vq, kl, size = load_tokenizers(run_file(args.run, "tokenizers.pt", 0))
    originals = torch.from_numpy(np.stack([read_image(path, size) for path in args.reconstruct]))
    made = [originals.numpy()]
    vq, kl, x = vq.to(device).eval(), kl.to(device).eval(), to_float(originals).to(device)
    for images in (vq.decode(vq.encode(x)), kl.decode(kl.encode(x).chunk(2, 1)[0])):
        made.append(to_uint8(images).cpu().numpy())
    return np.stack(made)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser(prog="sample.py", description="Sample class-conditional pictures in two stages.")
    add = parser.add_argument
    add("--run", default="runs/demo", help="run folder of train.py (default runs/demo)")
    add("--vq", metavar="FILE", help="published weights instead of a run: LlamaGen's VQ tokenizer,")
    add("--stage1", metavar="FILE", help="  its generator (or a stage1.pt),")
    add("--kl", metavar="FILE", help="  MAR's KL tokenizer,")
    add("--stage2", metavar="FILE", help="  and its generator (or a stage2.pt)")
    add("--classes", nargs="+", help="class names or ids (default: all; ten at most in a grid)")
    add("--num", type=int, help="pictures in all, dealt out evenly to the classes (default: three per class)")
    add("--out", metavar="FILE", help=".png: labelled grid; .npz: arr_0 uint8 NHWC (default RUN/samples.png)")
    add("--batch-size", type=int, dest="batch_size", help="pictures at a time; part of what determines the pictures")
    add("--seed", type=int, default=0)
    add("--cfg1", type=float, help="guidance of stage 1 (1: none)")
    add("--cfg2", type=float, help="guidance of stage 2 (1: none)")
    add("--temperature1", type=float, help="of stage 1 (0: likeliest code)")
    add("--temperature2", type=float, help="of stage 2: scales the noise of the diffusion steps")
    add("--top-k", type=int, help="stage 1: keep the k likeliest codes (0: all)")
    add("--top-p", type=float, help="stage 1: keep the likeliest codes of total probability p (1: all)")
    add("--steps", type=int, help="token steps of stage 2")
    add("--diffusion-steps", type=int, help="denoising steps per token")
    add("--raw", action="store_true", help="the raw weights instead of their average (EMA)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "float32"), default="auto", help="of matrix products (auto: bf16 on CUDA)")
    add("--compile", action="store_true", default=None, help="torch.compile the diffusion network (default on CUDA)")
    add("--no-compile", action="store_false", dest="compile")
    add("--reconstruct", nargs="+", metavar="IMAGE", help="show what the tokenizers keep of these pictures, and stop")
    args = parser.parse_args(argv)
    for name in ("num", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("temperature1", "temperature2", "top_k", "cfg1", "cfg2", "seed"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top-p must lie above 0 and at most at 1")
    args.published = bool(args.vq or args.kl or args.stage1 or args.stage2)
    return parser, args


def prepare_output(args):
    """The output path; its folder is made and tried now, before the work. Raises InputError."""
    folder = "." if args.published else args.run
    out = Path(args.out or Path(folder) / ("reconstruct.png" if args.reconstruct else "samples.png"))
    if out.suffix not in (".png", ".npz") or (args.reconstruct and out.suffix != ".png"):
        raise InputError(f"--out {out}: must end in .png (a labelled grid)" + (" or .npz" if not args.reconstruct else ""))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial.npy")
        partial.touch()
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}); choose another") from error
    return out, partial


def main(argv=None):
    parser, args = parse(argv)
    processes = partial = None
    try:
        processes = Processes(args.device)
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used
        if args.reconstruct:
            pictures = reconstruct(args, processes.device)
            out, partial = prepare_output(args)
            draw_grid(pictures, [Path(path).stem[:14] for path in args.reconstruct], ["original", "VQ", "KL"], out)
            processes.say(f"saved {out}")
            return
        pipeline = Pipeline(args, processes.device)
        chosen = choose_classes(args.classes, pipeline.classes)
        out, partial = prepare_output(args)
        if out.suffix == ".png":
            chosen = chosen[:10]
        number = args.num or 3 * len(chosen)
        labels = [chosen[i % len(chosen)] for i in range(number)]
        settings = pipeline.settings
        processes.say(f"{number} pictures, " + "  ".join(f"{name} {value}" for name, value in settings.items()))
        if args.compile if args.compile is not None else processes.device.type == "cuda":
            pipeline.continuous and pipeline.continuous.diffloss["net"].compile(dynamic=True)
        made = make_pictures(pipeline, labels, settings["batch_size"], args.seed, args.dtype, processes, partial)
        if processes.rank == 0:
            finished = out.with_name(out.name + ".tmp" + out.suffix)
            if out.suffix == ".png":
                rows = ["coarse"] * bool(pipeline.discrete) + ["fine"] * bool(pipeline.continuous)
                draw_grid(made, [pipeline.classes[label] for label in chosen], rows, finished)
            else:
                np.savez(finished, arr_0=made[-1])
            os.replace(finished, out)
            processes.say(f"saved {out}")
    except InputError as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    finally:
        if partial and processes.rank == 0:
            partial.unlink(missing_ok=True)
        if processes:
            processes.end()


if __name__ == "__main__":
    main()
