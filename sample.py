"""Sample D2C: class -> codes -> latents -> picture.

    python sample.py                                       demo: a labelled grid, coarse row above fine row
    python sample.py --classes star heart --num 20 --cfg2 3 --steps 16
    torchrun --nproc_per_node=8 -- sample.py --run runs/B --num 50000 --out samples.npz    for fid.py: arr_0, uint8 NHWC
    python sample.py --diffusion-steps 50:5                fewer denoising steps as tokens fill in: twice as fast
    python sample.py --coarse                              stage 1 alone
    python sample.py --vq vq_ds16_c2i.pt --stage1 c2i_B_256.pt --out llamagen.png          published weights alone:
    python sample.py --kl kl16.ckpt --stage2 mar_base/checkpoint-last.pth --out mar.png    LlamaGen, and MAR
    python sample.py --reconstruct photo.jpg               what each tokenizer keeps: original, VQ, KL

The coarse picture is the VQ decoder's view of stage 1's codes; the fine one is the KL decoder's view of stage 2's latents.
Samples are cut into whole batches; batch k draws from a generator seeded by (seed, k), and processes take batches in turn:
the pictures depend on --seed and --batch-size, and not on the number of processes.

Reading order: models, pictures, the command.
"""
import json
import math
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from d2c import PRESETS, ContinuousConfig, ContinuousGenerator, DiscreteConfig, DiscreteGenerator, generate
from tokenizers import (KL16_SCALE, InputError, KLTokenizer, Parser, Processes, SharedArrays, VQTokenizer, autocast,
                        bf16_wanted, clock, crc_of, load_published, load_tokenizers, not_negative, positive, read_checkpoint,
                        read_image, seed_number, seed_of, to_float, to_map, to_uint8, write_atomically)

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def run_file(run, name, stage):
    """The path of a run's file. Raises InputError that says which stage makes it."""
    path = Path(run) / name
    if not path.is_file():
        raise InputError(f"{path}: not there; make it with: python train.py --stage {stage} --out {run} (and the run's --preset)")
    return path


def load_generator(path, stage, raw=False):
    """(generator, file) from a checkpoint of this project, or from a published one (LlamaGen for stage 1, MAR for stage 2),
    whose `file` is empty: it knows neither class names nor a run. Raises InputError."""
    cls, config_cls = {1: (DiscreteGenerator, DiscreteConfig), 2: (ContinuousGenerator, ContinuousConfig)}[stage]
    file = read_checkpoint(path)
    if "run" not in file or "config" not in file:
        def build(state):
            huge = PRESETS["H"]["stage2"]  # its heads are 80 wide, all others 64
            heads = huge["num_heads"] if stage == 2 and len(state["z_proj.bias"]) == huge["width"] else None
            return cls.from_published(state, heads)

        return load_published(build, path, not raw, file), {}
    if file["stage"] != stage:
        raise InputError(f"{path}: holds stage {file['stage']}, expected stage {stage}")
    try:
        model = cls(config_cls(**file["config"]))
        model.load_state_dict(file["model" if raw else "ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit this version ({str(error)[:300]})") from error
    return model, file


def cast_weights(model):
    """Keep in bf16 what autocast would cast to it at every call (compiled; eager, once per batch): the weights of linear
    layers, but for the diffusion network's, which samples in float32."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not name.startswith("diffloss."):
            layer.bfloat16()


class Pipeline:
    """The loaded models and their sampling settings. `vq` and `discrete` make codes and the coarse picture, `kl` and
    `continuous` the fine one; with published files either pair may be missing (None). Raises InputError."""

    def __init__(self, args, device):
        self.device, self.dtype, self.vq, self.kl, self.discrete, self.continuous = device, args.dtype, None, None, None, None
        stage1, stage2, file1, file2 = args.stage1, None if args.coarse else args.stage2, {}, {}
        if args.published:
            if args.coarse and not (args.vq and stage1):
                raise InputError("--coarse: of published weights needs --vq and --stage1")
            if not (args.vq and stage1) and not (args.kl and stage2):
                raise InputError("published weights come in pairs: --vq with --stage1 (coarse), --kl with --stage2 (fine), or all")
            if args.vq:
                self.vq = load_published(VQTokenizer.from_published, args.vq)
            if args.kl:
                self.kl = load_published(KLTokenizer.from_published, args.kl)
        else:
            self.vq, self.kl, _, _ = load_tokenizers(run_file(args.run, "tokenizers.pt", 0))
            stage1 = run_file(args.run, "stage1.pt", 1)
            stage2 = None if args.coarse else run_file(args.run, "stage2.pt", 2)
        if stage1 and self.vq:
            self.discrete, file1 = load_generator(stage1, 1, args.raw)
        if stage2 and self.kl:
            self.continuous, file2 = load_generator(stage2, 2, args.raw)
            self.kl.scale = file2.get("scale", KL16_SCALE)
        if file1 and file2 and file1["run"]["tokens"] != file2["run"]["tokens"]:
            raise InputError(f"{stage1} and {stage2} were trained on different tokens: train one of them again")
        self.check_parts(stage1, stage2)
        parts = [part for part in (self.vq, self.kl, self.discrete, self.continuous) if part]
        self.weights = [crc_of(part) for part in parts]
        for path, file in ((stage1, file1), (stage2, file2)):
            if file and self.vq and self.kl and self.weights[:2] != file.get("tokenizers"):
                raise InputError(f"{path}: was trained on tokens of other tokenizers; train it again, or give back the old ones")
        for part in parts:
            part.to(device).eval()
        for part in (self.discrete, self.continuous):
            if part and bf16_wanted(device, args.dtype):
                cast_weights(part)
        config, file = (self.continuous or self.discrete).config, file2 or file1
        self.grid = tuple(config.grid)
        self.size = self.grid[0] * (self.vq if self.discrete else self.kl).config.factor  # side of a picture in pixels
        self.classes = file["classes"] if file else [str(label) for label in range(config.num_classes)]
        self.settings = dict(PRESETS[file["run"]["preset"] if file else "B"]["sample"])
        for name in ("cfg1", "temperature1", "top_k", "top_p", "cfg2", "temperature2", "steps", "diffusion_steps", "batch_size"):
            if getattr(args, name) is not None:
                self.settings[name] = getattr(args, name)
        if self.continuous and self.settings["steps"] > math.prod(self.grid):
            raise InputError(f"--steps {self.settings['steps']}: must lie between 1 and {math.prod(self.grid)}, the number of tokens")
        for steps in np.atleast_1d(self.settings["diffusion_steps"]):
            if not 2 <= steps <= 1000:
                raise InputError(f"--diffusion-steps {steps}: must lie between 2 and 1000")

    def check_parts(self, stage1, stage2):
        """Do the parts fit each other? Raises InputError naming the files."""
        first, second = self.discrete and self.discrete.config, self.continuous and self.continuous.config
        if second and second.fusion != "none" and not first:
            raise InputError(f"{stage2} is conditioned on codes: give --vq and --stage1 too")
        pairs = []
        if first:
            pairs += [("codebook size", "--vq", self.vq.config.codebook_size, stage1, first.codebook_size)]
        if second:
            pairs += [("latent channels", "--kl", self.kl.config.z_channels, stage2, second.channels)]
        if first and second:
            pairs += [("token grid", stage1, tuple(first.grid), stage2, tuple(second.grid)),
                      ("class count", stage1, first.num_classes, stage2, second.num_classes),
                      ("downsampling factor", "--vq", self.vq.config.factor, "--kl", self.kl.config.factor)]
            if second.fusion != "none":
                pairs += [("codebook size", stage1, first.codebook_size, stage2, second.codebook_size)]
        for what, one, value, other, expected in pairs:
            if value != expected:
                raise InputError(f"{what}: {one} has {value}, {other} has {expected}; these do not belong together")

    @torch.no_grad()
    def pictures(self, labels, generator, only_last=False):
        """labels (B,) -> coarse and fine pictures, as far as there are models (only the last with `only_last`): a list of
        uint8 (B,S,S,3)."""
        settings = {name: value for name, value in self.settings.items() if name != "batch_size"}
        with autocast(self.device, self.dtype):
            codes, latents = generate(self.discrete, self.continuous, labels, generator=generator, **settings)
        made = []  # decoded in full precision
        if codes is not None and not (only_last and latents is not None):
            made.append(self.vq.decode(codes.unflatten(1, self.grid)))                        # (B,3,S,S)
        if latents is not None:
            made.append(self.kl.decode(to_map(latents, self.grid) / self.kl.scale))           # (B,3,S,S)
        return [to_uint8(images).cpu().numpy() for images in made]


@torch.no_grad()
def reconstruct(args, device):
    """Original, VQ and KL reconstruction of picture files: uint8 (3,n,S,S,3). Raises InputError."""
    if args.published:
        if not (args.vq and args.kl):
            raise InputError("--reconstruct needs both tokenizers: --vq with --kl, or a run's")
        vq, kl = load_published(VQTokenizer.from_published, args.vq), load_published(KLTokenizer.from_published, args.kl)
        size = 256
    else:
        vq, kl, size, _ = load_tokenizers(run_file(args.run, "tokenizers.pt", 0))
    vq, kl = vq.to(device).eval(), kl.to(device).eval()
    originals = torch.from_numpy(np.stack([read_image(path, size) for path in args.reconstruct]))
    x = to_float(originals).to(device)
    decoded = [vq.decode(vq.encode(x)), kl.decode(kl.encode(x).chunk(2, 1)[0])]
    return np.stack([originals.numpy()] + [to_uint8(images).cpu().numpy() for images in decoded])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def choose_classes(wanted, classes):
    """Class ids from ids or names (a list of words, which may hold commas), all classes when none are given."""
    chosen = []
    for word in ",".join(wanted or []).split(","):
        if word in classes:
            chosen.append(classes.index(word))
        elif word.isdecimal() and int(word) < len(classes):
            chosen.append(int(word))
        elif word:
            known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise InputError(f"--classes {word}: unknown; give a name ({known}) or an id from 0 to {len(classes) - 1}")
    return chosen or list(range(len(classes)))


def make_pictures(pipeline, labels, plan, args, processes, folder):
    """Sample labels (n,) batch by batch into `folder`: memory-mapped uint8 (kinds,n,S,S,3). The processes take turns in
    batches; an interrupted command goes on where it was when it is given again. Raises InputError when the disk is full."""
    batch_size, number, size = pipeline.settings["batch_size"], len(labels), pipeline.size
    kinds = 1 if args.out.suffix == ".npz" else bool(pipeline.discrete) + bool(pipeline.continuous)
    layout = {"pictures": (np.uint8, (kinds, number, size, size, 3))}
    shared = SharedArrays(folder, plan, layout, math.ceil(number / batch_size), processes, extra=kinds * number * size * size * 3)
    if shared.finished:
        processes.say(f"going on after {min(shared.finished * batch_size, number)} of {number} pictures")
    began = time.time()
    for turn, k in enumerate(shared.todo):
        generator = torch.Generator(pipeline.device).manual_seed(seed_of(args.seed, 3, k))  # 3: not a stage's number
        place = slice(k * batch_size, (k + 1) * batch_size)
        chunk = torch.tensor(labels[place], device=pipeline.device)
        for kind, pictures in enumerate(pipeline.pictures(chunk, generator, only_last=args.out.suffix == ".npz")):
            shared.arrays["pictures"][kind, place] = pictures
        shared.mark(k)
        left = min((len(shared.todo) - turn - 1) * processes.size * batch_size, number - batch_size)
        speed = (turn + 1) * processes.size * batch_size / (time.time() - began)
        processes.say(f"sampled {number - max(left, 0)}/{number}  {speed:.1f} images/s  ETA {clock(left / speed)}")
    processes.wait()
    return shared.arrays["pictures"]


def draw_grid(kinds, titles, rows):
    """Pictures kinds (k,n,S,S,3) as one PIL image, a column per title: above all a line of titles, then for every
    len(titles) pictures a line per kind, named by `rows` at its left."""
    count, size, columns = kinds.shape[1], kinds.shape[2], len(titles)
    tile = size * max(1, round(96 / size))  # small pictures are enlarged, pixel by pixel
    font = ImageFont.load_default(13)
    left, top, gap = 8 + int(max(font.getlength(row) for row in rows)), 20, 6
    height = top + math.ceil(count / columns) * (len(kinds) * tile + gap)
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
    return sheet


def save_samples(path, pictures, plan):
    """An .npz as ADM's evaluator wants it, arr_0 and nothing else; what it was made from goes into the zip's comment."""
    np.savez(path, arr_0=pictures)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps(plan).encode()


def plan_of(path):
    """What an .npz was made from by `save_samples`, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.comment)
    except Exception:  # absent, damaged, or somebody else's: to be made anew
        return None


def sample(pipeline, chosen, args, processes):
    """Sample pictures of the chosen classes and save them to args.out, as a grid (.png) or an array (.npz)."""
    if args.out.suffix == ".png":
        chosen = chosen[:min(10, args.num or 10)]  # a column each
    number = args.num or 3 * len(chosen)
    labels = [chosen[i % len(chosen)] for i in range(number)]
    processes.say(f"{number} pictures: " + ", ".join(f"{name} {value}" for name, value in pipeline.settings.items()))
    plan = dict(settings=pipeline.settings, seed=args.seed, labels=zlib.crc32(np.array(labels)), weights=pipeline.weights, dtype=args.dtype)
    if args.out.suffix == ".npz" and plan_of(args.out) == plan:
        processes.say(f"{args.out} is there already, made by the same command")
        return
    partial = args.out.with_name(args.out.name + ".partial")
    made = make_pictures(pipeline, labels, plan, args, processes, partial)
    if processes.rank == 0:
        if args.out.suffix == ".png":
            rows = ["coarse"] * bool(pipeline.discrete) + ["fine"] * bool(pipeline.continuous)
            write_atomically(args.out, draw_grid(made, [pipeline.classes[label] for label in chosen], rows).save)
        else:
            write_atomically(args.out, lambda temporary: save_samples(temporary, made[-1], plan))
        shutil.rmtree(partial)
    processes.wait()


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def numbers(text):
    """argparse type: comma-separated numbers of at least 0."""
    return [not_negative(word) for word in text.split(",")]


def annealing(text):
    """argparse type: a number, or [first, last] of first:last."""
    return [positive(word) for word in text.split(":", 1)] if ":" in text else positive(text)


def parse(argv):
    parser = Parser(prog="sample.py", description="Sample class-conditional pictures in two stages.")
    add = parser.add_argument
    add("--run", default="runs/demo", help="run folder of train.py (default runs/demo)")
    add("--vq", metavar="FILE", help="published weights instead of a run: LlamaGen's VQ tokenizer,")
    add("--stage1", metavar="FILE", help="  its generator (or a stage1.pt trained on these tokenizers),")
    add("--kl", metavar="FILE", help="  MAR's KL tokenizer,")
    add("--stage2", metavar="FILE", help="  and its generator (or a stage2.pt trained on these tokenizers)")
    add("--classes", nargs="+", help="class names or ids (default: all; ten at most in a grid)")
    add("--num", type=positive, help="pictures in all, dealt out evenly to the classes (default: three per class)")
    add("--out", metavar="FILE", help=".png: labelled grid; .npz: arr_0 uint8 NHWC (default RUN/samples.png)")
    add("--batch-size", type=positive, help="pictures at a time; part of what determines the pictures")
    add("--seed", type=seed_number, default=0)
    add("--cfg1", type=not_negative, help="guidance of stage 1 (1: none)")
    add("--cfg2", type=not_negative, help="guidance of stage 2 (1: none)")
    add("--sweep1", type=numbers, metavar="1.5,2,3", help="an output for each of these values of --cfg1")
    add("--sweep", "--sweep2", type=numbers, metavar="1.5,2,3", help="and of --cfg2: for fid.py to rank")
    add("--temperature1", type=not_negative, help="of stage 1 (0: likeliest code)")
    add("--temperature2", type=not_negative, help="of stage 2: scales the noise of the diffusion steps")
    add("--top-k", type=positive, help="stage 1: keep the k likeliest codes (default: all)")
    add("--top-p", type=not_negative, help="stage 1: keep the likeliest codes of total probability p (default 1: all)")
    add("--steps", type=positive, help="token steps of stage 2")
    add("--diffusion-steps", type=annealing, metavar="N or FIRST:LAST", help="denoising steps per token: a number, or annealed, as 50:5")
    add("--coarse", action="store_true", help="stage 1 alone: coarse pictures")
    add("--raw", action="store_true", help="the raw weights instead of their average (EMA)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--dtype", choices=("auto", "bf16", "float32"), default="auto", help="of matrix products (auto: bf16 on CUDA)")
    add("--compile", action="store_true", default=None, help="torch.compile what repeats (default on CUDA)")
    add("--no-compile", action="store_false", dest="compile")
    add("--reconstruct", nargs="+", metavar="IMAGE", help="show what the tokenizers keep of these pictures, and stop")
    args = parser.parse_args(argv)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top-p must lie above 0 and at most at 1")
    args.published = bool(args.vq or args.kl or args.stage1 or args.stage2)
    return parser, args


def prepare_output(args, processes):
    """The output path; its folder is made and tried now, before the work. Raises InputError."""
    name = "reconstruct.png" if args.reconstruct else "samples.png"
    out = Path(args.out or (Path(".") if args.published else Path(args.run)) / name)
    if out.suffix not in (".png", ".npz") or (args.reconstruct and out.suffix != ".png"):
        raise InputError(f"--out {out}: must end in .png (a labelled grid)" + (" or .npz" if not args.reconstruct else ""))
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")
    if processes.rank == 0:
        trial = out.with_name(f"{out.name}.trial")
        write_atomically(trial, lambda temporary: temporary.touch())
        trial.unlink()
    return out


def main(argv=None):
    parser, args = parse(argv)
    with parser.plain_errors():
        processes = Processes(args.device)
        args.compile = processes.device.type == "cuda" if args.compile is None else args.compile
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not used
        if args.reconstruct:
            pictures = reconstruct(args, processes.device)
            args.out = prepare_output(args, processes)
            sheet = draw_grid(pictures, [Path(path).stem[:14] for path in args.reconstruct], ["original", "VQ", "KL"])
            if processes.rank == 0:
                write_atomically(args.out, sheet.save)
            processes.say(f"saved {args.out}")
        else:
            pipeline = Pipeline(args, processes.device)
            chosen = choose_classes(args.classes, pipeline.classes)
            out = prepare_output(args, processes)
            for model in (pipeline.discrete, pipeline.continuous):
                if args.compile and model:
                    model.compile()
            for cfg1 in args.sweep1 or [pipeline.settings["cfg1"]]:
                for cfg2 in args.sweep or [pipeline.settings["cfg2"]]:
                    pipeline.settings.update(cfg1=cfg1, cfg2=cfg2)
                    name = out.stem + f"-cfg1-{cfg1:g}" * bool(args.sweep1) + f"-cfg2-{cfg2:g}" * bool(args.sweep)
                    args.out = out.with_name(name + out.suffix)
                    sample(pipeline, chosen, args, processes)
                    processes.say(f"saved {args.out}")
        processes.end()


if __name__ == "__main__":
    main()
