"""What moves a FID, and by how much; how fast fid.py is.

    python tests/benchmark_fid.py lesson A.npz:KEY B.npz:KEY --weights FILE   # two sets of real images: what moves FID
    python tests/benchmark_fid.py speed --weights FILE                        # images per second, beside other tools
    python tests/benchmark_fid.py frechet                                     # time and digits, beside scipy's sqrtm

`speed` also measures pytorch-fid and torch-fidelity where they are installed (neither is needed for anything else; both
want torchvision).  `lesson` keeps features in --folder and goes on from there when it is started again.
"""
import argparse
import io
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid  # noqa: E402


# What moves the number -----------------------------------------------------------------------------------------------

def jpeg(images, quality):
    """The images after a round trip through JPEG."""
    def trip(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=quality)
        return np.asarray(Image.open(file))
    return np.stack([trip(image) for image in images])


def torchvision_layers(model):
    """The same weights in torchvision's graph, which averages where TensorFlow's of 2015 does not."""
    for block in model.children():
        if getattr(block, "pool", None) in (fid.average_pool, fid.max_pool):
            block.pool = nn.AvgPool2d(3, stride=1, padding=1)
    return model


def lesson(args):
    made_from = [args.a, args.b, str(args.count), str(zlib.crc32(Path(args.weights).read_bytes()))]
    folder = Path(args.folder) / f"{zlib.crc32(' '.join(made_from).encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    a, b = (fid.read_set(name).images[: args.count] for name in (args.a, args.b))
    part = args.count // 4  # enough to show a difference

    def pool(name, images, resize="tf1", change=lambda model: model):
        path = folder / f"{name}.pt"
        if not path.exists():
            print(name, file=sys.stderr)
            model = change(fid.load_inception(args.weights))
            torch.save(fid.features(model, images, resize=resize)[:2], folder / "unfinished")
            (folder / "unfinished").rename(path)
        return torch.load(path, weights_only=True)

    def distance(x, y):
        return fid.frechet_distance(*fid.statistics(x), *fid.statistics(y))

    a_tf1, a_spatial = pool("a tf1", a)
    b_tf1, b_spatial = pool("b tf1", b)
    a_half, b_half = (pool(f"{name} half_pixel", images, "half_pixel")[0] for name, images in (("a", a), ("b", b)))
    print(f"{'both tf1 (ADM)':40} {distance(a_tf1, b_tf1):8.3f}   sFID {distance(a_spatial, b_spatial):.3f}   "
          "precision, recall", *fid.precision_recall(b_tf1, a_tf1))
    print(f"{'both half_pixel (pytorch-fid)':40} {distance(a_half, b_half):8.3f}")
    print(f"{'tf1 against half_pixel':40} {distance(a_tf1, b_half):8.3f}")
    print(f"{'the same images, tf1 and half_pixel':40} {distance(b_tf1, b_half):8.3f}")
    for count in (part // 4, part // 2, part, 2 * part):
        print(f"{f'{count} images against {args.count}':40} {distance(a_tf1[:count], b_tf1):8.3f}   against {count}: "
              f"{distance(a_tf1[:count], b_tf1[:count]):.3f}")
    for quality in (95, 75):
        damaged = pool(f"a jpeg {quality}", jpeg(a[:part], quality))[0]
        print(f"{f'{part} JPEG of quality {quality} against {args.count}':40} {distance(damaged, b_tf1):8.3f}")
    a_other, b_other = (pool(f"{name} torchvision", images[:part], change=torchvision_layers)[0]
                        for name, images in (("a", a), ("b", b)))
    print(f"{f'{part} against {part}, layers of torchvision':40} {distance(a_other, b_other):8.3f}   "
          f"these against tf1: {distance(a_other, b_tf1[:part]):.3f}")


# Speed ---------------------------------------------------------------------------------------------------------------

def speed(args):
    images = np.random.default_rng(0).integers(0, 256, (args.batch_size, args.size, args.size, 3), dtype=np.uint8)
    model = fid.load_inception(args.weights, args.device)
    state = torch.load(args.weights, map_location="cpu", weights_only=True)
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)} | state
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(args.device)  # (B,3,H,W)
    tools = {"fid.py": lambda: model(fid.preprocess(torch.from_numpy(images).to(args.device))
                                     .contiguous(memory_format=torch.channels_last))[0].cpu()}
    try:
        from pytorch_fid import inception as pytorch_fid
        pytorch_fid.load_state_dict_from_url = lambda *arguments, **settings: state
        theirs = pytorch_fid.InceptionV3([3]).eval().to(args.device)
        tools["pytorch-fid"] = lambda: theirs(nchw.float() / 255)[0].cpu()
    except ImportError as error:
        print("pytorch-fid left out:", error)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        path = Path(args.folder) / "with_fc.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        fidelity = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        fidelity = fidelity.to(args.device)
        tools["torch-fidelity"] = lambda: fidelity(nchw)[0].cpu()
    except ImportError as error:
        print("torch-fidelity left out:", error)

    rates = {name: [] for name in tools}
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(args.rounds + 1):  # in turn, so that a slow minute hits all alike; the first round warms up
            for name, run in tools.items():
                start = time.perf_counter()
                run()
                rates[name].append(args.batch_size / (time.perf_counter() - start))
    for name, values in rates.items():
        print(f"{name:15} {statistics.median(values[1:]):8.2f} images/s, median of {args.rounds} batches of "
              f"{args.batch_size} ({min(values[1:]):.2f} to {max(values[1:]):.2f})")


def frechet(args):
    rng = np.random.default_rng(0)
    scale = np.exp(-3 * np.arange(2048) / 2048)  # eigenvalues fall by a factor of 400
    (mu1, s1), (mu2, s2) = (fid.statistics(torch.from_numpy(rng.standard_normal((6000, 2048)) * scale + shift))
                            for shift in (0, 0.01))
    for _ in range(args.rounds):
        start = time.perf_counter()
        ours = fid.frechet_distance(mu1, s1, mu2, s2)
        middle = time.perf_counter()
        root = scipy.linalg.sqrtm(s1 @ s2)
        theirs = np.square(mu1 - mu2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
        end = time.perf_counter()
        print(f"fid.py {middle - start:.2f} s, sqrtm {end - middle:.2f} s, "
              f"ratio {(middle - start) / (end - middle):.3f}, distance {ours:.9f}, sqrtm {theirs:.9f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (lesson, speed, frechet):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(run=command)
        sub.add_argument("--folder", default="runs/fid", help="where intermediate files go")
        if command is lesson:
            sub.add_argument("a", help="samples, as for fid.py")
            sub.add_argument("b", help="reference")
            sub.add_argument("--count", type=int, default=10000, help="of each, from the front")
        if command is not frechet:
            sub.add_argument("--weights", required=True, help="Inception weights")
        if command is speed:
            sub.add_argument("--device", default="cpu")
            sub.add_argument("--size", type=int, default=256)
            sub.add_argument("--batch-size", type=int, default=50)
        sub.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
