"""fid.py against the original evaluators (`goldens/`), against independent formulas, and against careless users."""
import json
import math
import pickle
import struct
import time
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import fid
from formula import formula_state

GOLDENS = Path(__file__).parent / "goldens"


def golden(name):
    """(arrays, facts) of one golden file."""
    return np.load(GOLDENS / f"{name}.npz", allow_pickle=False), json.loads((GOLDENS / f"{name}.json").read_text())


def some_images(count, seed, size=24):
    """Random pictures with a little structure, uint8 (count,size,size,3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(size // 4, axis=1).repeat(size // 4, axis=2)


@pytest.fixture(scope="module")
def state():
    shapes = {key: value.shape for key, value in fid.InceptionV3().state_dict().items()}
    return formula_state(shapes, conv_gain=math.sqrt(2))


@pytest.fixture(scope="module")
def model(state):
    return fid.inception_from_state(state)


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return str(path)


# Network

def test_names_and_shapes_are_those_of_the_published_file():
    published = json.loads((GOLDENS / "inception_v3_fid.json").read_text())["tensors"]
    network = fid.InceptionV3()
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert ours == {key: shape for key, (shape, _) in published.items()}
    assert len(ours) == 566 and sum(p.numel() for p in network.parameters()) == 23_850_960


@pytest.mark.parametrize("resize, tool", [("tf1", "torchfidelity"), ("half_pixel", "pytorchfid")])
def test_features_equal_the_original(model, resize, tool):
    arrays, _ = golden("inception_v1g_smooth64")
    pool, spatial, logits = fid.features(model, arrays["image"][None], resize=resize)
    expected_spatial = arrays[f"{tool}_spatial7"].transpose(1, 2, 0).reshape(-1)  # CHW -> HWC, as ADM flattens it
    np.testing.assert_allclose(pool[0], arrays[f"{tool}_pool3"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(spatial[0], expected_spatial, atol=2e-5, rtol=0)
    np.testing.assert_allclose(logits[0], arrays[f"{tool}_logits_unbiased"], atol=2e-5, rtol=0)


def test_resizes_equal_the_original():
    arrays, facts = golden("inception_v1g_smooth64")
    image = torch.from_numpy(arrays["image"])[None]
    resized = fid.tf1_resize(image.permute(0, 3, 1, 2).float())
    for name, x in (("resized", resized), ("normalised", fid.preprocess(image))):
        expected = facts["resize"]["torchfidelity"][name]["crc32_of_float32_chw_bytes"]
        assert zlib.crc32(x[0].numpy().tobytes()) == expected, name
    half_pixel = fid.preprocess(image, "half_pixel")[0, :, ::13, ::13]
    np.testing.assert_allclose((half_pixel + 1) / 2, arrays["pytorchfid_resized_sub"], atol=1e-6, rtol=0)


def test_images_of_299_pixels_are_not_resized():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8))
    assert torch.equal(fid.preprocess(images), (images.permute(0, 3, 1, 2).float() - 128) / 128)


def test_batches_do_not_matter(model):
    images = some_images(3, seed=0)
    for whole, parts in zip(fid.features(model, images), fid.features(model, torch.from_numpy(images), batch_size=2)):
        assert len(whole) == 3
        torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)


def test_state_without_last_layer_or_on_meta(state):
    trunk = {key: value for key, value in state.items() if not key.startswith("fc.")}
    assert fid.inception_from_state(trunk)(torch.zeros(1, 3, 299, 299))[2] is None
    network = fid.inception_from_state({key: value.to("meta") for key, value in state.items()})
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}


# Metrics

def test_frechet_distance_equals_the_original():
    arrays, facts = golden("metrics_features")
    stats = fid.statistics(torch.from_numpy(arrays["a"])) + fid.statistics(torch.from_numpy(arrays["b"]))
    for ours, name in zip(stats, ("mu_a_f64", "sigma_a_f64", "mu_b_f64", "sigma_b_f64")):
        np.testing.assert_allclose(ours, arrays[name], atol=1e-12)
    expected = facts["frechet"]["a_vs_b (500 rows)"]
    assert fid.frechet_distance(*stats) == pytest.approx(expected["eigh_reference"], abs=1e-10)
    assert fid.frechet_distance(*stats) == pytest.approx(expected["adm"], abs=1e-5)


def test_frechet_distance_equals_sqrtm_where_that_works():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((900, 256)), rng.standard_normal((900, 256)) @ rng.standard_normal((256, 256)) + 0.3
    (mu1, s1), (mu2, s2) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * root)
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


def exact_frechet_distance(a, b):
    """From the features themselves: centred and scaled they *are* factors of the covariances, no root to take."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    fa, fb = ((x - x.mean(axis=0)) / math.sqrt(len(x) - 1) for x in (a, b))
    trace_of_root = np.linalg.svd(fa @ fb.T, compute_uv=False).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.square(fa).sum() + np.square(fb).sum() - 2 * trace_of_root


@pytest.mark.parametrize("count", [200, 700])  # of the second set, in 512 dimensions
def test_frechet_distance_keeps_its_digits_with_few_images(count):
    rng = np.random.default_rng(1)
    a, b = torch.from_numpy(rng.standard_normal((200, 512))), torch.from_numpy(rng.standard_normal((count, 512)) + 0.1)
    assert abs(fid.frechet_distance(*fid.statistics(a), *fid.statistics(a))) < 1e-9
    distance = fid.frechet_distance(*fid.statistics(a), *fid.statistics(b))
    assert distance == pytest.approx(exact_frechet_distance(a, b), abs=1e-8)


def test_frechet_distance_of_few_images_equals_the_original():
    arrays, facts = golden("metrics_features")  # 50 rows in 64 dimensions
    distance = fid.frechet_distance(*fid.statistics(torch.from_numpy(arrays["a"][:50])),
                                    *fid.statistics(torch.from_numpy(arrays["b"][:50])))
    assert distance == pytest.approx(facts["frechet"]["small (50 rows, singular covariances)"]["adm"], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1000, 64])
def test_precision_recall_equals_the_original(dtype, block):
    arrays, facts = golden("metrics_features")
    reference, samples = (torch.from_numpy(arrays[name]).to(dtype) for name in "ab")
    expected = facts["precision_recall_adm (k=3)"]["by_distance_arithmetic"]["float64"]
    assert fid.precision_recall(reference, samples, block=block) == (expected["precision"], expected["recall"])


def test_precision_and_recall_tell_quality_from_variety():
    real = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert fid.precision_recall(real, real) == (1, 1)
    assert fid.precision_recall(real, real + 100) == (0, 0)
    precision, recall = fid.precision_recall(real, real[:1] + 0.01 * real)  # perfect pictures, all of one motif
    assert precision == 1 and recall < 0.05


def test_inception_score_equals_the_original():
    arrays, facts = golden("metrics_inception_score")
    rng = np.random.Generator(np.random.PCG64(711))
    logits = rng.standard_normal(500 * 1008, dtype=np.float32).reshape(500, 1008) * 2
    logits[np.arange(500), arrays["boost_class"]] += 6
    assert zlib.crc32(logits.tobytes()) == facts["logits_crc32"]
    probs = torch.from_numpy(logits).double().softmax(dim=1)
    scores = facts["scores"]
    assert fid.inception_score(probs) == pytest.approx(scores["adm_split5000_f64"], rel=1e-9)
    assert fid.inception_score(probs, 100) == pytest.approx(scores["adm_split100_f64"], rel=1e-9)
    short_last = scores["adm_split150_f64 (last split has 50 rows)"]
    assert fid.inception_score(probs, 150) == pytest.approx(short_last, rel=1e-9)
    assert fid.inception_score(np.eye(4)) == pytest.approx(4)  # sure of each, all different; 0 * log 0 counts as 0


# Files

def test_folders_and_archives_are_read_in_slices(tmp_path):
    images = some_images(7, seed=1)
    np.savez(tmp_path / "stored.npz", images=images, labels=np.arange(7))
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, image in enumerate(images):
        name = f"{'deep/' if i == 3 else ''}{i}.{'png' if i % 2 else 'webp'}"
        Image.fromarray(image).save(tmp_path / "folder" / name, lossless=True)
    for name in ("stored.npz", "stored.npz:images", "compressed.npz", "folder"):
        found = fid.read_set(f"{tmp_path}/{name}").images
        expected = images if name != "folder" else images[[int(path.stem) for path in found.paths]]
        assert len(found) == 7
        for rows in (slice(0, 3), slice(3, 5), slice(6, 10), slice(0, 7)):  # forwards, and back again
            assert np.array_equal(found[rows], expected[rows])


class Ten:
    """Stands in for ten images; slices are asked for in a thread, and the one from `broken` on cannot be read."""

    def __init__(self, broken=99):
        self.broken, self.asked = broken, []

    def __len__(self):
        return 10

    def __getitem__(self, rows):
        self.asked.append(rows.start)
        if rows.start == self.broken:
            raise fid.InputError("page torn out")
        return torch.arange(10, dtype=torch.uint8)[rows].view(-1, 1, 1, 1).expand(-1, 4, 4, 3)


def test_reading_ahead_keeps_order_and_errors():
    whole, asked = Ten(), []

    def first_pixel(x):  # in the place of the network
        for _ in range(1000):  # the next slice is asked for before this one is done
            if len(whole.asked) < min(4, len(asked) + 2):
                time.sleep(0.01)
        asked.append(len(whole.asked))
        return x[:, :1, 0, 0] * 128 + 128, x[:, 0, 0, :1], None

    pool, _, logits = fid.features(first_pixel, whole, batch_size=3)
    assert pool.flatten().tolist() == list(range(10)) and logits is None
    assert whole.asked == [0, 3, 6, 9] and asked == [2, 3, 4, 4]
    with pytest.raises(fid.InputError, match="page torn out"):
        fid.features(lambda x: (x, x, None), Ten(broken=6), batch_size=3)


# Command

def test_command_measures_a_folder_against_a_reference_file(model, weights, tmp_path, capsys):
    samples, reference, others = some_images(4, seed=1), some_images(5, seed=2), some_images(6, seed=3)
    (tmp_path / "samples").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "samples" / f"{i}.png")
    np.savez(tmp_path / "others.npz", images=others, labels=np.arange(6))
    stats, virtual = tmp_path / "stats.npz", tmp_path / "virtual.npz"

    fid.main([str(tmp_path / "others.npz"), "--make-stats", str(stats), "--weights", weights, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "FID" not in printed and f"samples    {tmp_path / 'others.npz'}: 6 images" in printed
    with np.load(stats, allow_pickle=False) as archive:
        assert {name: archive[name].shape for name in fid.STATISTICS} == fid.STATISTICS
        assert int(archive["count"]) == 6
        # As ADM's reference files: statistics of many images (here of others), and some images.
        np.savez(virtual, arr_0=reference, **{name: archive[name] for name in fid.STATISTICS})
    fid.main([str(tmp_path / "samples"), "--ref", str(virtual), "--weights", weights, "--device", "cpu",
              "--batch-size", "3", "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)

    (pool, spatial, logits), (pool_r, _, _), (pool_o, spatial_o, _) = (
        fid.features(model, x) for x in (samples, reference, others))
    precision, recall = fid.precision_recall(pool_r, pool)
    distance, distance_s = (fid.frechet_distance(*fid.statistics(ours), *fid.statistics(theirs))
                            for ours, theirs in ((pool, pool_o), (spatial, spatial_o)))
    assert result == {"FID": pytest.approx(distance, rel=1e-4), "sFID": pytest.approx(distance_s, rel=1e-4),
                      "IS": pytest.approx(fid.inception_score(logits.double().softmax(dim=1)), rel=1e-5),
                      "precision": precision, "recall": recall, "resize": "tf1", "weights": result["weights"],
                      "unavailable": {},
                      "samples": str(tmp_path / "samples"), "samples_images": 4, "samples_statistics": False,
                      "reference": str(virtual), "reference_images": 5, "reference_statistics": True}
    assert len(result["weights"]) == 8
    assert printed.err.count("cannot fill Inception's 2048 dimensions") == 1  # the reference brought its statistics
    assert "samples: 4 images, papers have 50000; FID falls and recall rises" in printed.err
    assert f"warning: Inception weights {result['weights']}: compare only equal weights" in printed.err


def test_only_what_is_asked_for_goes_through_the_network(weights, tmp_path, capsys, monkeypatch):
    stats = {name: np.zeros(shape) for name, shape in fid.STATISTICS.items()}
    np.savez(tmp_path / "samples.npz", some_images(4, seed=1))
    np.savez(tmp_path / "virtual.npz", arr_0=some_images(5, seed=2), **stats)
    seen, original = [], fid.features

    def features(model, images, *rest):
        seen.append(len(images))
        return original(model, images, *rest)

    monkeypatch.setattr(fid, "features", features)

    def run(*flags):
        seen.clear()
        fid.main([str(tmp_path / "samples.npz"), "--weights", weights, "--device", "cpu", "--json", *flags])
        return [name for name in json.loads(capsys.readouterr().out) if name in fid.METRICS]

    against = ("--ref", str(tmp_path / "virtual.npz"))
    assert run(*against, "--metrics", "FID", "IS") == ["FID", "IS"] and seen == [4]
    assert run(*against, "--metrics", "recall") == ["recall"] and seen == [4, 5]
    assert run("--metrics", "IS") == ["IS"] and seen == [4]


def test_standard_errors_are_those_of_repeated_draws():
    def draw(seed):
        noise = torch.randn(600, 8, generator=torch.Generator().manual_seed(seed))
        pool = noise * torch.linspace(0.5, 2, 8) + 0.6 * (seed % 2)
        return fid.ImageSet(features={"pool": pool, "logits": 3 * noise})

    metrics = ["FID", "IS", "precision", "recall"]
    repeated = [fid.compare(draw(2 * i), draw(2 * i + 1), metrics, "cpu") for i in range(60)]
    estimates = [fid.standard_errors(draw(2 * i), draw(2 * i + 1), metrics, "cpu", 20) for i in range(6)]
    for metric in metrics:
        truth = np.std([run[metric] for run in repeated], ddof=1)
        assert np.mean([run[metric] for run in estimates]) == pytest.approx(truth, rel=0.35), metric


def test_command_gives_standard_errors(weights, tmp_path, capsys):
    np.savez(tmp_path / "two.npz", a=some_images(8, seed=1), b=some_images(8, seed=2))
    arguments = [f"{tmp_path}/two.npz:a", "--ref", f"{tmp_path}/two.npz:b", "--weights", weights, "--device", "cpu",
                 "--bootstrap", "3"]
    fid.main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result["standard_errors"]) == fid.METRICS and result["standard_errors"]["FID"] > 0
    fid.main(arguments)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"FID        {result['FID']:.4f} +- {result['standard_errors']['FID']:.4f}"  # and the same again


def test_command_reports_in_a_job_of_several_processes(tmp_path, capsys, monkeypatch):
    """Schedulers set these variables for any program; fid.py is always one process, and answers."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    np.savez(tmp_path / "a.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    fid.main([str(tmp_path / "a.npz"), "--ref", str(tmp_path / "a.npz"), "--metrics", "FID"])
    assert "FID        0.0000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fid.main([str(tmp_path / "absent.npz"), "--ref", str(tmp_path / "a.npz")])
    assert "absent.npz" in capsys.readouterr().err


@pytest.mark.parametrize("error, status, line", [
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (torch.OutOfMemoryError("tried to allocate\nfar too much"), 2, "fid.py: error: the device's memory is full"),
    (OSError(28, "No space left on device"), 2, "fid.py: error: [Errno 28] No space left on device")])
def test_what_may_happen_on_the_way_ends_in_one_line(error, status, line, capsys, monkeypatch):
    def evaluate(args, device):
        raise error

    monkeypatch.setattr(fid, "evaluate", evaluate)
    with pytest.raises(SystemExit) as stop:
        fid.main(["a.npz"])
    printed = capsys.readouterr()
    assert stop.value.code == status and printed.out == ""
    assert printed.err.startswith(line) and printed.err.count("\n") == 1


def test_command_with_statistics_alone_needs_no_network(tmp_path, capsys):
    stats = {name: np.zeros(shape) for name, shape in fid.STATISTICS.items()}
    np.savez(tmp_path / "a.npz", **stats)
    np.savez(tmp_path / "b.npz", mu=stats["mu"] + 1, sigma=np.eye(2048))
    fid.main([str(tmp_path / "a.npz"), "--ref", str(tmp_path / "b.npz"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["FID"] == pytest.approx(4096)
    assert result["unavailable"].keys() == {"sFID", "IS", "precision", "recall"}
    assert "b.npz has no images, and no statistics for it" in result["unavailable"]["sFID"]


def test_command_with_a_trunk_reports_no_inception_score(state, tmp_path, capsys):
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "trunk.pth")
    np.savez(tmp_path / "two.npz", first=some_images(4, seed=3), second=some_images(5, seed=4))
    fid.main([f"{tmp_path}/two.npz:first", "--ref", f"{tmp_path}/two.npz:second",
              "--weights", str(tmp_path / "trunk.pth"), "--device", "cpu", "--resize", "half_pixel"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == [*fid.METRICS, "samples", "reference", "Inception"]
    assert lines[2] == "IS         unavailable: the weights have no last layer, fc"
    assert lines[7].endswith(", resize half_pixel")
    assert f"{tmp_path}/two.npz:first: 4 images, the reference has 5; FID falls and recall rises" in printed.err


def error_of(capsys, *argv):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        fid.main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


def test_bad_files_end_in_one_clear_line(tmp_path, capsys):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    images = some_images(4, seed=5)
    np.savez(good, images)

    absent = tmp_path / "absent.npz"
    assert f"{absent}: cannot be used (No such file" in error_of(capsys, absent, "--ref", good)
    assert "No such file" in error_of(capsys, good, "--ref", tmp_path / "absent")
    for arrays, complaint, *flags in [
        ({"arr_0": images / 255}, "float64 array (4, 24, 24, 3) in C order, 55296 bytes); give a folder, or an .npz of uint8"),
        ({"arr_0": (images / 255).astype(np.float32)}, "float32 array"),
        ({"arr_0": images.astype(np.uint16)}, "uint16 array"),
        ({"arr_0": images[..., 0]}, "uint8 array (4, 24, 24) in C order, 2304 bytes); give a folder, or an .npz of uint8"),  # grey
        ({"arr_0": np.concatenate([images, images[..., :1]], axis=3)}, "uint8 array (4, 24, 24, 4)"),  # RGBA
        ({"arr_0": images.transpose(0, 3, 1, 2)}, "uint8 array (4, 3, 24, 24)"),
        ({"arr_0": np.asfortranarray(images[:3])}, "3 images"),  # a valid array
        ({"arr_0": images[:3]}, "3 images; give 4 or more"),
        ({"arr_0": images[:0]}, "0 images; give 4 or more"),
        ({"x": images, "y": images}, "FILE.npz:KEY"),
        ({"arr_0": np.array([{}], dtype=object)}, "object array (1,) in C order"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "mu must be (2048,) finite numbers"),
        ({"mu": np.zeros(2048), "sigma": np.full((2048, 2048), np.nan)}, "sigma must be (2048, 2048) finite numbers"),
        ({"mu": np.zeros(2048), "mu_s": np.zeros(2023)}, "0 images; give 4 or more"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048), "resize": "half_pixel"},
         "bad.npz: its statistics were made with --resize"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "--metrics sFID:", "--metrics", "sFID"),
    ]:
        np.savez(bad, **arrays)
        assert complaint in " ".join(error_of(capsys, good, "--ref", bad, *flags).split())
    assert "nokey" in error_of(capsys, f"{good}:nokey", "--ref", good)
    np.savez(bad, mu=np.zeros(2048), sigma=np.eye(2048))
    assert "--make-stats" in error_of(capsys, bad, "--make-stats", tmp_path / "new.npz")
    assert "--bootstrap 5: takes" in error_of(capsys, bad, "--ref", bad, "--bootstrap", "5")
    assert "--metrics IS" in error_of(capsys, bad, "--ref", bad, "--metrics", "IS")
    bad.write_bytes(pickle.dumps({"arr_0": 1}))
    assert "bad.npz: cannot be used (" in error_of(capsys, bad, "--ref", good)
    bad.write_bytes(good.read_bytes()[:1000])
    assert "bad.npz: cannot be used (" in error_of(capsys, bad, "--ref", good)


def last_error_of(capsys, *argv):
    """The same for damage that shows only once images are being read: progress and warnings may stand before it."""
    with pytest.raises(SystemExit) as stop:
        fid.main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and "Traceback" not in printed.err
    return printed.err.removesuffix("\n").rpartition("\n")[2]


def test_damage_found_while_reading_ends_in_one_clear_line(state, weights, tmp_path, capsys):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, some_images(4, seed=5))
    content = bytearray(good.read_bytes())
    content[3000] ^= 255  # one pixel: the archive's checksum knows
    bad.write_bytes(content)
    end = ("--ref", good, "--weights", weights, "--device", "cpu")
    stats = ("--make-stats", tmp_path / "stats.npz")
    assert f"{bad}: cannot be used (Bad CRC-32" in last_error_of(capsys, bad, *end, *stats, "--batch-size", "2")

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    assert f"{pictures / '1.png'}: cannot be used (" in last_error_of(capsys, pictures, *end, *stats)

    torch.save(state | {"Conv2d_1a_3x3.conv.weight": torch.full((32, 3, 3, 3), torch.nan)}, tmp_path / "nan.pth")
    nan = ("--weights", tmp_path / "nan.pth", "--device", "cpu")
    assert "nan.pth: makes features that are not finite" in last_error_of(capsys, good, "--ref", good, *nan, *stats)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.npz", "good.npz", "nan.pth", "pictures"]


def png_of_16_bits(size):
    """An RGB PNG with two bytes a channel, which Pillow reads but does not write."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = (b"\0" + bytes(6 * size)) * size
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_bad_folders_end_in_one_clear_line(tmp_path, capsys):
    assert f"{tmp_path}: 0 images; give 4 or more, .png" in error_of(capsys, tmp_path, "--ref", tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    assert f"{tmp_path}: 1 images" in error_of(capsys, tmp_path, "--ref", tmp_path)
    for mode in ("L", "RGBA", "I;16", "P"):  # none of these becomes RGB without a decision that is not ours
        Image.new(mode, (8, 6)).save(tmp_path / "b.png")
        message = error_of(capsys, tmp_path, "--ref", tmp_path)
        wrong = "16-bit I;16" if mode == "I;16" else mode
        assert f"{tmp_path / 'b.png'}: cannot be used ({wrong} of (8, 6) pixels, not RGB of (8, 6))" in message
        assert "all must be 8-bit RGB and of one size" in message
    (tmp_path / "b.png").write_bytes(png_of_16_bits(8))
    message = error_of(capsys, tmp_path, "--ref", tmp_path)
    assert f"{tmp_path / 'b.png'}: cannot be used (16-bit RGB of (8, 8) pixels" in message
    Image.new("RGB", (6, 6)).save(tmp_path / "b.png")
    message = error_of(capsys, tmp_path, "--ref", tmp_path)
    assert f"{tmp_path / 'b.png'}: cannot be used (RGB of (6, 6) pixels, not RGB of (8, 6))" in message
    (tmp_path / "b.png").write_bytes(b"not an image")
    assert f"{tmp_path / 'b.png'}: cannot be used (cannot identify" in error_of(capsys, tmp_path, "--ref", tmp_path)


def test_bad_flags_and_weights_end_in_one_clear_line(state, tmp_path, capsys, monkeypatch):
    good, weights = tmp_path / "good.npz", tmp_path / "weights.pth"
    np.savez(good, some_images(4, seed=5))

    assert "--ref is missing" in error_of(capsys, good)
    assert "--resize" in error_of(capsys, good, "--ref", good, "--resize", "bicubic")
    assert "--metrics: invalid choice: 'kid'" in error_of(capsys, good, "--ref", good, "--metrics", "kid")
    assert "--batch-size 0" in error_of(capsys, good, "--ref", good, "--batch-size", "0")
    assert "--bootstrap 1" in error_of(capsys, good, "--ref", good, "--bootstrap", "1")
    assert "at least 8 images" in error_of(capsys, good, "--ref", good, "--bootstrap", "5")
    assert f"--make-stats {good}: must be a new file" in error_of(capsys, good, "--make-stats", good)
    assert "--make-stats" in error_of(capsys, good, "--make-stats", tmp_path / "nowhere" / "stats.npz")
    assert "--weights" in error_of(capsys, good, "--ref", good, "--weights", weights)  # no such file
    if not torch.cuda.is_available():
        assert "--device: invalid choice: 'cuda'" in error_of(capsys, good, "--ref", good, "--device", "cuda")
    damaged = {key: value for key, value in state.items() if key != "Mixed_6d.branch1x1.conv.weight"}
    for content in (damaged, {"model": state}, state | {"fc.weight": torch.zeros(10, 2048)}, [1, 2], {}):
        torch.save(content, weights)
        assert f"{weights}: cannot be used (" in last_error_of(
            capsys, good, "--ref", good, "--weights", weights, "--device", "cpu")
    weights.write_bytes(b"not a torch file")
    assert f"{weights}: cannot be used (" in last_error_of(capsys, good, "--ref", good, "--weights", weights)

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    message = error_of(capsys, good, "--ref", good)
    assert fid.WEIGHTS_URL in message and str(tmp_path / "hub" / "checkpoints") in message and "--weights" in message
