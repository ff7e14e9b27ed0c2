"""fid.py against the original evaluators (`goldens/`), against independent formulas, and against careless users."""
import json
import math
import pickle
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
    a, b = rng.standard_normal((400, 12)), rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12)) + 0.3
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


def test_frechet_distance_keeps_its_digits_with_few_images():
    rng = np.random.default_rng(1)
    a, b = torch.from_numpy(rng.standard_normal((200, 512))), torch.from_numpy(rng.standard_normal((200, 512)) + 0.1)
    assert abs(fid.frechet_distance(*fid.statistics(a), *fid.statistics(a))) < 1e-9
    distance = fid.frechet_distance(*fid.statistics(a), *fid.statistics(b))
    assert distance == pytest.approx(exact_frechet_distance(a, b), abs=1e-8)
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


# Command

def rootless_distance(mu1, sigma1, mu2, sigma2):
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + 2 * np.trace(sigma2))


@pytest.fixture
def quick(monkeypatch):
    """Spares the command the root of the distance, for eigenvectors in 2048 dimensions take many seconds."""
    monkeypatch.setattr(fid, "frechet_distance", rootless_distance)


def test_command_measures_a_folder_against_a_reference_file(model, weights, tmp_path, capsys, quick):
    samples, reference = some_images(4, seed=1), some_images(5, seed=2)
    (tmp_path / "samples" / "deep").mkdir(parents=True)
    for i, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "samples" / ("deep" if i < 2 else "") / f"{i}.png")
    np.savez(tmp_path / "reference.npz", images=reference, labels=np.arange(5))
    stats, virtual = tmp_path / "stats.npz", tmp_path / "virtual.npz"

    fid.main([str(tmp_path / "reference.npz"), "--make-stats", str(stats), "--weights", weights, "--device", "cpu"])
    assert "FID        unavailable (needs --ref)" in capsys.readouterr().out
    with np.load(stats, allow_pickle=False) as archive:
        assert {name: archive[name].shape for name in archive.files} == fid.STATISTICS
        np.savez(virtual, arr_0=reference, **archive)  # as ADM's reference files: statistics and images
    fid.main([str(tmp_path / "samples"), "--ref", str(virtual), "--weights", weights, "--device", "cpu",
              "--batch-size", "3", "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)

    (pool, spatial, logits), (pool_r, spatial_r, _) = (fid.features(model, x) for x in (samples, reference))
    precision, recall = fid.precision_recall(pool_r, pool)
    distance, distance_s = (rootless_distance(*fid.statistics(ours), *fid.statistics(theirs))
                            for ours, theirs in ((pool, pool_r), (spatial, spatial_r)))
    assert result == {"FID": pytest.approx(distance, rel=1e-4), "sFID": pytest.approx(distance_s, rel=1e-4),
                      "IS": pytest.approx(fid.inception_score(logits.double().softmax(dim=1)), rel=1e-5),
                      "precision": precision, "recall": recall,
                      "samples": 4, "reference": 5, "resize": "tf1", "weights": result["weights"]}
    assert len(result["weights"]) == 8
    assert printed.err.count("fewer than 2048 images") == 1  # the samples; the reference brought its statistics


def test_command_with_statistics_alone_needs_no_network(tmp_path, capsys, quick):
    stats = {name: np.zeros(shape) for name, shape in fid.STATISTICS.items()}
    np.savez(tmp_path / "a.npz", **stats)
    np.savez(tmp_path / "b.npz", mu=stats["mu"] + 1, sigma=stats["sigma"])
    fid.main([str(tmp_path / "a.npz"), "--ref", str(tmp_path / "b.npz"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["FID"] == 2048
    assert {name for name, value in result.items() if value is None} == {
        "sFID", "IS", "precision", "recall", "samples", "reference", "weights"}


def test_command_with_a_trunk_reports_no_inception_score(state, tmp_path, capsys, quick):
    torch.save({key: value for key, value in state.items() if not key.startswith("fc.")}, tmp_path / "trunk.pth")
    np.savez(tmp_path / "two.npz", first=some_images(4, seed=3), second=some_images(4, seed=4))
    fid.main([f"{tmp_path}/two.npz:first", "--ref", f"{tmp_path}/two.npz:second",
              "--weights", str(tmp_path / "trunk.pth"), "--device", "cpu", "--resize", "half_pixel"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["FID", "sFID", "IS", "precision", "recall", "samples"]
    assert lines[2].startswith("IS         unavailable (needs images, and weights with the last layer")
    assert "resize half_pixel" in lines[5]


def error_of(capsys, *argv):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        fid.main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err


def test_bad_files_end_in_one_clear_line(tmp_path, capsys):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, some_images(4, seed=5))

    assert f"{tmp_path / 'absent.npz'}: no such file" in error_of(capsys, tmp_path / "absent.npz", "--ref", good)
    assert "no such file" in error_of(capsys, good, "--ref", tmp_path / "absent")
    for arrays, complaint in [
        ({"arr_0": some_images(4, seed=5) / 255}, "float64 array (4, 24, 24, 3); images must be uint8"),
        ({"arr_0": some_images(4, seed=5).transpose(0, 3, 1, 2)}, "images must be uint8 (N,H,W,3)"),
        ({"arr_0": some_images(1, seed=5)}, "at least two"),
        ({"x": some_images(4, seed=5), "y": some_images(4, seed=6)}, "bad.npz:KEY"),
        ({"arr_0": np.array([{}], dtype=object)}, "bad.npz: no readable .npz of plain arrays"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "(2048,) finite numbers"),
        ({"mu": np.zeros(2048), "sigma": np.full((2048, 2048), np.nan)}, "sigma must be (2048, 2048) finite numbers"),
        ({"mu": np.zeros(2048), "mu_s": np.zeros(2023)}, "no mu and sigma"),
    ]:
        np.savez(bad, **arrays)
        assert complaint in " ".join(error_of(capsys, good, "--ref", bad).split())
    assert "nokey" in error_of(capsys, f"{good}:nokey", "--ref", good)
    bad.write_bytes(pickle.dumps({"arr_0": 1}))
    assert "bad.npz: no readable .npz" in error_of(capsys, bad, "--ref", good)
    bad.write_bytes(good.read_bytes()[:1000])
    assert "bad.npz: no readable .npz" in error_of(capsys, bad, "--ref", good)


def test_bad_folders_end_in_one_clear_line(tmp_path, capsys):
    assert "no .png" in error_of(capsys, tmp_path, "--ref", tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    Image.new("L", (6, 6)).save(tmp_path / "b.webp")
    message = error_of(capsys, tmp_path, "--ref", tmp_path)
    assert f"{tmp_path / 'b.webp'}: 6x6 pixels, but {tmp_path / 'a.png'} has 8x6" in message
    (tmp_path / "b.webp").write_bytes(b"not an image")
    assert f"{tmp_path / 'b.webp'}: cannot be read" in error_of(capsys, tmp_path, "--ref", tmp_path)


def test_bad_flags_and_weights_end_in_one_clear_line(state, tmp_path, capsys, monkeypatch):
    good, weights = tmp_path / "good.npz", tmp_path / "weights.pth"
    np.savez(good, some_images(4, seed=5))

    assert "--ref is missing" in error_of(capsys, good)
    assert "--resize" in error_of(capsys, good, "--ref", good, "--resize", "bicubic")
    assert "--batch-size 0" in error_of(capsys, good, "--ref", good, "--batch-size", "0")
    assert f"--make-stats {good}: exists already" in error_of(capsys, good, "--make-stats", good)
    assert "--weights" in error_of(capsys, good, "--ref", good, "--weights", weights)  # no such file
    if not torch.cuda.is_available():
        assert "--device cuda" in error_of(capsys, good, "--ref", good, "--device", "cuda")
    damaged = {key: value for key, value in state.items() if key != "Mixed_6d.branch1x1.conv.weight"}
    for content in (damaged, {"model": state}, state | {"fc.weight": torch.zeros(10, 2048)}, [1, 2], {}):
        torch.save(content, weights)
        assert f"--weights {weights}: not the state dict of" in error_of(
            capsys, good, "--ref", good, "--weights", weights, "--device", "cpu")
    weights.write_bytes(b"not a torch file")
    assert f"--weights {weights}" in error_of(capsys, good, "--ref", good, "--weights", weights)

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    message = error_of(capsys, good, "--ref", good)
    assert fid.WEIGHTS_URL in message and str(tmp_path / "hub" / "checkpoints") in message and "--weights" in message
