"""Sample D2C: class -> codes -> latents -> picture.

    python sample.py                                       demo: a labelled grid, coarse row above fine row
    python sample.py --classes star heart --num 20 --cfg2 3 --steps 16
    python sample.py --from photo.jpg                      a photograph, its codes, and fine pictures drawn from these
    torchrun --nproc_per_node=8 -- sample.py --run runs/B --num 50000 --out samples.npz    for fid.py
    python sample.py --diffusion-steps 50:5                fewer denoising steps as latents fill in: twice as fast
    python sample.py --vq vq_ds16_c2i.pt --stage1 c2i_B_256.pt --out llamagen.png          published weights alone:
    python sample.py --kl kl16.ckpt --stage2 mar_base/checkpoint-last.pth --out mar.png    LlamaGen, and MAR

The coarse picture is the VQ decoder's view of stage 1's codes; the fine one is the KL decoder's view of stage 2's
latents. Processes take batches in turn, and batch k draws from a generator seeded by (seed, k): the pictures depend on
--seed, --batch-size, --num and the kind of device, and not on the number of processes.
"""
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly
import argparse
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.mkldnn

from d2c import (PRESETS, ContinuousConfig, ContinuousGenerator, DiscreteConfig, DiscreteGenerator, compile_parts,
                 diffusion_schedule, generate, token_schedule)
from train import (KL16_SCALE, Processes, SharedArrays, add_device_flags, autocast, entries, identity,
                   load_published, load_tokenizers, locked, number, read_checkpoint, seed_of, user_errors, word,
                   writing)
from tokenizers import InputError, KLTokenizer, VQTokenizer, draw_grid, read_image, reading, to_float, to_map, to_uint8

# The pipeline --------------------------------------------------------------------------------------------------------

class Pipeline:
    """Class ids -> pictures: `coarse, fine = Pipeline.from_run("runs/demo")([3, 6], seed=0)`. `vq` and `discrete` make
    codes and the coarse picture, `kl` and `continuous` the fine one; either pair may be missing (None), and generators
    have `notes` (see load_generator). `settings` are those of d2c.generate, and batch_size."""
    @classmethod
    def from_run(cls, run="runs/demo", coarse=False, raw=False, device="auto", dtype="auto", compile=False):
        """The models of a run folder, without stage 2 if `coarse`, with the raw weights, not their moving average
        (EMA), if `raw`. Raises InputError."""
        names = ["tokenizers", "stage1", "stage2"][:2 if coarse else 3]
        tokenizers, *stages = (Path(run) / f"{name}.pt" for name in names)
        for path in (tokenizers, *stages):
            if not path.is_file():
                more = "(about 5 minutes on two cores)" if str(run) == "runs/demo" else f"--out {run} and its --preset"
                raise InputError(f"{path}: not there; make it with: python train.py {more}")
        vq, kl, file = load_tokenizers(tokenizers)
        generators = [load_generator(path, stage, raw) for stage, path in enumerate(stages, 1)]
        for path, generator in zip(stages, generators):
            if generator.notes.get("tokenizers") != file["id"]:
                raise InputError(f"{path}: was trained on tokens of other tokenizers than {tokenizers}; train it again")
        discrete, continuous = [*generators, None][:2]
        return cls(vq, kl, discrete, continuous, device, dtype, compile)

    @classmethod
    def from_published(cls, vq=None, stage1=None, kl=None, stage2=None, size=256, raw=False, device="auto",
                       dtype="auto", compile=False):
        """The models of published files, for pictures of `size` pixels: vq with stage1, kl with stage2, or all. stage1
        and stage2 may also be those of a run that was trained on these tokenizers (not checked). Raises InputError."""
        if bool(vq) != bool(stage1) or bool(kl) != bool(stage2) or not (vq or kl):
            raise InputError("published weights come in pairs: --vq with --stage1 (coarse), --kl with --stage2 (fine)")
        vq = vq and load_published(VQTokenizer.from_published, vq)
        kl = kl and load_published(KLTokenizer.from_published, kl)
        discrete = vq and load_generator(stage1, 1, raw, (size // vq.config.factor,) * 2)
        continuous = kl and load_generator(stage2, 2, raw)
        if kl:
            kl.scale = continuous.notes.get("scale", KL16_SCALE)
        return cls(vq, kl, discrete, continuous, device, dtype, compile)

    def __init__(self, vq, kl, discrete, continuous, device, dtype, compile):
        self.vq, self.kl, self.discrete, self.continuous, self.dtype = vq, kl, discrete, continuous, dtype
        self.check()
        self.device = device if isinstance(device, torch.device) else Processes(device).device
        for model in filter(None, (vq, kl, discrete, continuous)):
            model.to(self.device).eval()
        onednn = self.device.type == "cpu" and dtype != "bf16" and torch.backends.mkldnn.is_available()
        for model in filter(None, (discrete, continuous)):
            if compile:
                compile_parts(model)
            elif onednn and model.config.width >= 512:  # wide layers with few rows: faster than MKL, torch's choice
                torch.utils.mkldnn.to_mkldnn(model)
        config, notes = (continuous or discrete).config, (continuous or discrete).notes
        self.grid = tuple(config.grid)
        self.size = self.grid[0] * (vq if discrete else kl).config.factor  # side of a picture in pixels
        self.classes = notes.get("classes") or [str(label) for label in range(config.num_classes)]
        counts = notes.get("counts", [1] * config.num_classes)  # of pictures in training
        self.trained = [label for label, count in enumerate(counts) if count]
        self.settings = dict(notes.get("sample") or PRESETS["B"]["sample"])
        self.sources = [model.notes["source"] for model in (discrete, continuous) if model]

    def check(self):
        """Do the parts fit each other? Raises InputError."""
        vq, kl, first, second = (part and part.config for part in (self.vq, self.kl, self.discrete, self.continuous))
        if second and second.fusion != "none" and not first:
            raise InputError("--stage2 is conditioned on codes: give --vq and --stage1 too")
        facts = [("codebook size", vq.codebook_size, first.codebook_size)] if first else []
        facts += [("latent channels", kl.z_channels, second.channels)] if second else []
        if first and second:
            facts += [("token grid", tuple(first.grid), tuple(second.grid)),
                      ("class count", first.num_classes, second.num_classes)]
        for what, one, other in facts:
            if one != other:
                raise InputError(f"{what}: {one} in one file, {other} in another; these files do not belong together")

    def __call__(self, labels, seed=0, **settings):
        """Class ids (n,) -> coarse and fine pictures, uint8 (n,S,S,3) each, or None. `settings` are for this call."""
        size = settings.get("batch_size", self.settings["batch_size"])
        batches = [self.batch(labels[i:i + size], seed, i // size, **settings) for i in range(0, len(labels), size)]
        return [None if kind[0] is None else np.concatenate(kind) for kind in zip(*batches)]

    @torch.no_grad()
    def batch(self, labels, seed, k, codes=None, **settings):
        """Batch k of the pictures of a seed, as __call__. codes (B,N) of pictures take the place of stage 1's."""
        settings = {name: value for name, value in (self.settings | settings).items() if name != "batch_size"}
        generator = torch.Generator(self.device).manual_seed(seed_of(seed, "sample", k))
        labels = torch.as_tensor(labels, device=self.device)
        with autocast(self.device, self.dtype):
            codes, latents = generate(self.discrete, self.continuous, labels, codes, generator=generator, **settings)
        coarse = None if codes is None else self.vq.decode(codes.unflatten(1, self.grid))     # (B,3,S,S)
        fine = None if latents is None else self.kl.decode(to_map(latents, self.grid) / self.kl.scale)
        return [None if images is None else self.finish(images) for images in (coarse, fine)]

    def finish(self, images):
        """Decoded images (B,3,S,S) -> uint8 (B,size,size,3). Raises InputError."""
        if not images.isfinite().all():
            raise InputError("the pictures are not finite: try lower --temperature2, --cfg1, --cfg2, or other weights")
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic")
        return to_uint8(images).cpu().numpy()

def load_generator(path, stage, raw=False, grid=(16, 16)):
    """A generator from a checkpoint of this project, or from a published one: LlamaGen's, with this grid, for stage 1,
    MAR's for stage 2. Its `notes` are what the file says of it, and the file itself. Raises InputError."""
    file = read_checkpoint(path)
    cls, config_cls = {1: (DiscreteGenerator, DiscreteConfig), 2: (ContinuousGenerator, ContinuousConfig)}[stage]
    if "run" not in file or "config" not in file:
        options, notes = dict(grid=grid) if stage == 1 else {}, {}
        model = load_published(lambda state: cls.from_published(state, **options), path, file, raw)
    else:
        with reading(path, "it does not fit this version; train it again"):
            if file["stage"] != stage:
                raise InputError(f"{path}: holds stage {file['stage']}, expected stage {stage}")
            model = cls(config_cls(**entries(file["config"], **config_cls.__annotations__) | dict(dropout=0.0)))
            model.load_state_dict(file["model" if raw else "ema"])
            notes = entries(file, step=int, classes=list, counts=list, scale=float, sample=dict, tokenizers=str)
            settings = entries(notes["sample"], **{name: type(value) for name, value in PRESETS["B"]["sample"].items()})
            diffusion_schedule(settings["diffusion_steps"])  # raises ValueError, as the next, if it is out of range
            token_schedule(math.prod(model.config.grid), settings["steps"], settings["cfg2"])
            if not (len(notes["classes"]) == len(notes["counts"]) == model.config.num_classes and any(notes["counts"])
                    and all(isinstance(name, str) for name in notes["classes"]) and settings["batch_size"]):
                raise ValueError("its classes are not those that it was trained on, or batch_size is 0")
    model.notes = notes | {"source": identity(path).rpartition("[")[2]}
    return model

# What the command makes ----------------------------------------------------------------------------------------------

def choose_classes(wanted, classes, trained):
    """Class ids from ids or names (a list of words, which may hold commas), all trained ones when none are given."""
    known = {str(label): label for label in range(len(classes))} | {name: label for label, name in enumerate(classes)}
    words = [part for word in wanted or [] for part in ([word] if word in known else word.split(",")) if part]
    for word in words or wanted or []:
        if word not in known:
            names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            raise InputError(f"--classes {word}: unknown; give a name ({names}) or an id from 0 to {len(classes) - 1}")
        if known[word] not in trained:
            raise InputError(f"--classes {word}: the training data had no picture of this class; choose another")
    return [known[word] for word in words] or trained

def sample(pipeline, args, processes):
    """Sample pictures of the chosen classes, batch by batch and in turn among processes, and save them to args.out: as
    a labelled grid (.png), or the fine ones alone (coarse ones if there is no stage 2) as an array (.npz with arr_0, as
    ADM's evaluator wants it, and what it was made from as the comment of its zip). An interrupted command goes on."""
    as_grid, chosen = args.out.suffix == ".png", choose_classes(args.classes, pipeline.classes, pipeline.trained)
    if as_grid:
        chosen = chosen[:min(10, args.num or 10)]  # a column each
    else:
        pipeline.size = min(pipeline.size, 256)  # LlamaGen's FID of 384-pixel models is at 256
    count, size = args.num or 3 * len(chosen), pipeline.size
    processes.say(f"{count} pictures: " + ", ".join(f"{name} {value}" for name, value in pipeline.settings.items()))
    sources = pipeline.sources + [str(identity(path)).rpartition("[")[2] for path in (args.vq, args.kl)]
    plan = json.dumps(dict(settings=pipeline.settings, seed=args.seed, classes=chosen, count=count, weights=sources,
                           size=args.size, raw=args.raw, dtype=[args.dtype, pipeline.device.type]))
    folder = args.out.with_name(args.out.name + ".partial")
    with reading(args.out, "move it away, or choose another --out"):
        comment = zipfile.ZipFile(args.out).comment if zipfile.is_zipfile(args.out) else None
    if comment == plan.encode():
        begun = folder / "plan.json"
        if processes.rank == 0 and begun.is_file() and begun.read_text() == plan:  # killed before it could clear up
            shutil.rmtree(folder)
        return processes.say(f"{args.out} is there already, made by the same command")

    kinds = [name for name, model in (("coarse", pipeline.discrete), ("fine", pipeline.continuous)) if model]
    kinds = kinds if as_grid else kinds[-1:]
    layout = {"pictures": (np.uint8, (len(kinds), count, size, size, 3))}
    shared = SharedArrays(folder, plan, layout, count, pipeline.settings["batch_size"], processes)
    for k, rows in shared.work("sampled"):
        made = pipeline.batch([chosen[i % len(chosen)] for i in rows], args.seed, k)
        shared.arrays["pictures"][:, rows] = [pictures for pictures in made if pictures is not None][-len(kinds):]
    processes.wait()
    if processes.rank == 0:
        with writing(args.out) as temporary:
            if as_grid:
                names = [pipeline.classes[label] for label in chosen]
                titles = [name if name.isascii() else f"{label} {name}" for label, name in zip(chosen, names)]
                draw_grid(shared.arrays["pictures"], titles, kinds).save(temporary)
            else:
                np.savez(temporary, arr_0=shared.arrays["pictures"][0])
                with zipfile.ZipFile(temporary, "a") as archive:
                    archive.comment = plan.encode()
        shutil.rmtree(folder, ignore_errors=True)  # a network disk keeps files that are still mapped
    processes.say(f"saved {args.out}")

@torch.no_grad()
def vary(pipeline, args):
    """A grid with a column for each photograph of --from: the original, what the KL and the VQ tokenizer keep of it,
    and three fine pictures drawn anew from its codes, for the class given or for none. Raises InputError."""
    if not (pipeline.vq and pipeline.continuous) or pipeline.continuous.config.fusion == "none":
        raise InputError("--from needs a stage 2 with fusion: a whole run, or --vq, --stage1, --kl and --stage2")
    originals = np.stack([read_image(path, pipeline.size, upright=True) for path in args.photos])  # (n,S,S,3)
    x = to_float(torch.from_numpy(originals)).to(pipeline.device)                             # (n,3,S,S)
    codes, means = pipeline.vq.encode(x).flatten(1), pipeline.kl.encode(x).chunk(2, 1)[0]     # (n,N), (n,C,h,w)
    chosen = choose_classes(args.classes, pipeline.classes, pipeline.trained) if args.classes else [-1]
    labels = [chosen[i % len(chosen)] for i in range(len(codes))]
    coarse, fine = pipeline.batch(3 * labels, args.seed, 0, codes.repeat(3, 1))               # (3n,S,S,3) each
    rows = {"original": originals, "KL": pipeline.finish(pipeline.kl.decode(means)), "codes (VQ)": coarse[:len(codes)]}
    rows |= zip(["fine", "again", "and again"], np.split(fine, 3))                            # (n,S,S,3) each
    with writing(args.out) as temporary:
        draw_grid(np.stack([*rows.values()]), [Path(path).stem for path in args.photos], [*rows]).save(temporary)

# The command ---------------------------------------------------------------------------------------------------------

def denoising_steps(text):
    """argparse type: a number of denoising steps, or [first, last] of first:last."""
    steps = [number(int, 2, 1000)(word) for word in text.split(":", 1)]
    return steps if ":" in text else steps[0]

def parse(argv):
    parser = argparse.ArgumentParser(prog="sample.py", usage=argparse.SUPPRESS,
                                     description="Sample class-conditional pictures in two stages.")
    parser.register("type", None, word)
    add = parser.add_argument
    add("--run", default="runs/demo", help="run folder of train.py (default runs/demo)")
    add("--vq", metavar="FILE", help="published weights instead of a run: LlamaGen's VQ tokenizer,")
    add("--stage1", metavar="FILE", help="  its generator (or a stage1.pt trained on these tokenizers),")
    add("--kl", metavar="FILE", help="  MAR's KL tokenizer,")
    add("--stage2", metavar="FILE", help="  and its generator (or a stage2.pt trained on these tokenizers)")
    add("--size", type=number(int, 1), default=256, help="pixels of the pictures that published files were trained on")
    add("--from", nargs="+", metavar="IMAGE", dest="photos", help="fine pictures from their codes; best with --classes")
    add("--classes", nargs="+", help="class names or ids, names win (default: all; ten at most in a grid)")
    add("--num", type=number(int, 1), help="pictures in all, dealt out to the classes (default: three per class)")
    add("--out", metavar="FILE", help=".png: grid; .npz: fine pictures, arr_0 uint8 NHWC (default RUN/samples.png)")
    add("--batch-size", type=number(int, 1), help="pictures at a time; part of what determines the pictures")
    add("--cfg1", type=number(float, 0), help="guidance of stage 1 (1: none)")
    add("--cfg2", type=number(float, 0), help="guidance of stage 2 (1: none)")
    add("--temperature1", type=number(float, 0), help="of stage 1 (0: likeliest code)")
    add("--temperature2", type=number(float, 0), help="of stage 2: scales the noise of the denoising steps")
    add("--top-k", type=number(int, 1), help="stage 1: keep the k likeliest codes (default: all)")
    add("--top-p", type=number(float, 1e-9, 1), help="stage 1: keep the likeliest codes of total probability p")
    add("--steps", type=number(int, 1), help="token steps of stage 2")
    add("--diffusion-steps", type=denoising_steps, metavar="N or FIRST:LAST", help="denoising steps in each token step")
    add("--coarse", action="store_true", help="stage 1 alone: coarse pictures")
    add("--raw", action="store_true", help="the raw weights instead of their average (EMA)")
    add_device_flags(add)
    return parser, parser.parse_args(argv)

def open_pipeline(args, device):
    """The Pipeline that the flags name, with their settings. Raises InputError."""
    common = args.raw, device, args.dtype, device.type == "cuda" if args.compile is None else args.compile
    if args.vq or args.stage1 or args.kl or args.stage2:
        fine = [None, None] if args.coarse else [args.kl, args.stage2]
        pipeline = Pipeline.from_published(args.vq, args.stage1, *fine, args.size, *common)
    else:
        pipeline = Pipeline.from_run(args.run, args.coarse, *common)
    given = {name: getattr(args, name) for name in (*pipeline.settings, "top_k", "top_p") if hasattr(args, name)}
    pipeline.settings |= {name: value for name, value in given.items() if value is not None}
    places = math.prod(pipeline.grid)
    if pipeline.continuous and pipeline.settings["steps"] > places:
        raise InputError(f"--steps {pipeline.settings['steps']}: must lie between 1 and {places}, the number of tokens")
    return pipeline

def main(argv=None):
    parser, args = parse(argv)
    with user_errors(parser):
        processes = Processes(args.device)
        torch.set_float32_matmul_precision("high")  # TF32 if not bf16; full_float32 in tokenizers.py keeps both off
        folder = Path(".") if args.vq or args.kl else Path(args.run)
        args.out = Path(args.out or folder / ("variations.png" if args.photos else "samples.png"))
        if args.out.suffix not in ({".png"} if args.photos else {".png", ".npz"}) or args.out.is_dir():
            raise InputError(f"--out {args.out}: must be a file that ends in .png or, without --from, in .npz")
        pipeline = open_pipeline(args, processes.device)
        with locked(args.out.with_name(args.out.name + ".lock"), processes):
            if not args.photos:
                sample(pipeline, args, processes)
            elif processes.rank == 0:
                vary(pipeline, args)
                processes.say(f"saved {args.out}")

if __name__ == "__main__":
    main()
