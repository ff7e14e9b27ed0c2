"""train.py and sample.py as a user meets them: resuming, processes, seeds, and what they say to bad input."""
import functools
import hashlib
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import benchmark_demo
import d2c
import sample
import tokenizers
import train
from formula import published_file
from tokenizers import ImageFolder, KLTokenizer, TokenizerConfig, VQTokenizer, open_images
from train import TokenCache, seed_of

TINY = Path(__file__).parent / "tiny.py"


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Two nested checkpoints, equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def contents(folder):
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def arguments(data, tmp_path):
    return ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "30", "--save-every",
            "5"]


# Training ------------------------------------------------------------------------------------------------------------


def test_a_run_holds_what_it_should(finished):
    assert {path.name for path in finished.iterdir()} == {
        "tokenizers.pt", "tokens", "stage0.pt", "stage0.csv", "stage1.pt", "stage1.csv", "stage2.pt", "stage2.csv"}
    cache = TokenCache(finished / "tokens")
    assert cache.codes.shape == (2, 120, 16) and cache.moments.shape == (2, 120, 16, 8)
    assert cache.meta["classes"] == [str(i) for i in range(10)]
    assert cache.labels.tolist() == [i % 10 for i in range(120)]
    rows = [line.split(",") for line in (finished / "stage1.csv").read_text().split()]
    assert rows[0][:3] == ["step", "loss", "validation"] and [int(row[0]) for row in rows[1:]] == list(range(1, 31))


def test_scale_brings_latents_to_unit_variance(finished):
    cache = TokenCache(finished / "tokens")
    mean, log_variance = np.split(cache.moments[0].astype(np.float64), 2, axis=-1)
    std = np.sqrt(mean.var() + np.exp(log_variance).mean())
    assert abs(std * cache.meta["scale"] - 1) < 0.05


def test_losses_fall(finished):
    for stage in (0, 1):
        rows = np.loadtxt(finished / f"stage{stage}.csv", delimiter=",", skiprows=1)
        assert rows[-1, 2] < rows[0, 2] - 0.005  # validation


def test_a_finished_run_says_so_and_more_steps_continue(run, data, capsys):
    command = ["--preset", "tiny", "--data", str(data), "--out", str(run)]
    before = contents(run)
    train.main([*command, "--steps", "30"])
    said = capsys.readouterr().out
    assert said.count(": finished (") == 3 and contents(run) == before
    train.main([*command, "--stage", "1", "--steps", "33"])
    assert "resuming" in capsys.readouterr().out
    assert load(run / "stage1.pt")["step"] == 33


def test_stage_2_alone_builds_the_cache_it_needs(arguments, capsys):
    train.main([*arguments[:-4], "--stage", "2", "--steps", "3"])
    said = capsys.readouterr().out
    assert "is not there: building it first" in said and "stage 2  step 3/3" in said and "stage 1" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(finished, arguments, number, monkeypatch, capsys):
    """In stage 1, in the middle of step 12; and the resumed run ends as an undisturbed one."""
    read = train.read_codes

    def read_and_interrupt(*arguments):
        if read_and_interrupt.left == 0:
            os.kill(os.getpid(), number)
        read_and_interrupt.left -= 1
        return read(*arguments)

    read_and_interrupt.left = 8 + 11 * 8 + 3  # the held-out batch, eleven batches, three pictures
    monkeypatch.setattr(train, "read_codes", read_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 128 + number and "run the same command again" in capsys.readouterr().out
    stopped = load(Path(arguments[5]) / "stage1.pt")["step"]
    assert stopped == 12
    monkeypatch.undo()
    train.main(arguments)
    assert f"resuming {arguments[5]}/stage1.pt at step {stopped} of 30" in capsys.readouterr().out
    for name in ("stage1.pt", "stage2.pt"):
        assert same(load(Path(arguments[5]) / name)["ema"], load(finished / name)["ema"])


def test_a_signal_during_the_last_save_of_a_stage_stops_too(arguments, monkeypatch, capsys):
    """What was saved is whole, and the next stage does not begin."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with SIGINT ignored
    writer = train.csv.writer
    monkeypatch.setattr(train.csv, "writer", lambda file: os.kill(os.getpid(), signal.SIGINT) or writer(file))
    with pytest.raises(SystemExit) as stop:
        train.main([*arguments[:-4], "--steps", "2"])
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and "stage 0  step 2/2" in capsys.readouterr().out
    assert load(Path(arguments[5]) / "stage0.pt")["step"] == 2 and not (Path(arguments[5]) / "tokenizers.pt").exists()


def test_a_signal_to_the_whole_group_saves_too(run, data):
    """As `timeout` and job schedulers send it: twice at once, and to the processes that read data as well."""
    process = subprocess.Popen([sys.executable, TINY, "train", "--preset", "tiny", "--data", data, "--out", run,
                                "--stage", "1",
                                "--steps", "100000", "--workers", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    said = ""
    while "stage 1  step" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "run the same command again" in said and "Traceback" not in said, said


def test_killed_runs_resume_bit_for_bit(finished, arguments, capsys):
    """SIGKILL in stages 0, 1 and 2; each restart goes on above step zero, and the end is that of an undisturbed run."""
    out = Path(arguments[5])
    for stage in (0, 1, 2):
        process = subprocess.Popen([sys.executable, TINY, "train", *arguments], stdout=subprocess.PIPE, text=True)
        deadline = time.time() + 120
        while not (out / f"stage{stage}.pt").exists():
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.002)
        process.kill()
        said = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL
        if stage > 0:
            assert f"resuming {out}/stage{stage - 1}.pt at step" in said and "at step 0" not in said
        assert 0 < load(out / f"stage{stage}.pt")["step"] < 30
    train.main(arguments)
    assert f"resuming {out}/stage2.pt at step" in capsys.readouterr().out
    for name in ("stage1.pt", "stage2.pt", "stage0.pt"):
        mine, undisturbed = load(out / name), load(finished / name)
        for part in ("model", "ema", "optimizers", "step"):
            assert same(mine[part], undisturbed[part]), (name, part)
    assert same(load(out / "tokenizers.pt"), load(finished / "tokenizers.pt"))
    for name in ("codes.npy", "moments.npy", "labels.npy"):
        assert (out / "tokens" / name).read_bytes() == (finished / "tokens" / name).read_bytes()


def start(script, *arguments, processes=1, double=False):
    """Run a script in processes of its own; `double` computes in float64."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                "--"] if processes > 1 else []
    subprocess.run([sys.executable, *torchrun, TINY, script, *arguments], check=True, capture_output=True, timeout=300,
                   env=dict(os.environ, OMP_NUM_THREADS="1", TINY_DTYPE="float64" if double else "float32"))


def test_two_processes_train_as_one(data, tmp_path):
    """The same draws, dealt out: in float64 20 steps of every stage give the same losses and weights, up to
    rounding."""
    def train_with(name, *more, processes=2):
        out = tmp_path / name
        start("train", "--preset", "tiny", "--data", data, "--out", out, "--steps", "20", *more,
              processes=processes, double=True)
        return out

    one = train_with("one", processes=1)
    for two in (train_with("two"), train_with("accumulating", "--accumulate", "2")):
        for stage in (0, 1, 2):
            expected, found = load(one / f"stage{stage}.pt"), load(two / f"stage{stage}.pt")
            np.testing.assert_allclose(np.array(found["log"])[:, 1:3], np.array(expected["log"])[:, 1:3], rtol=0,
                                       atol=1.1e-5)  # 5 digits
            for part in ("model", "ema"):
                for name, value in expected[part].items():
                    assert value.dtype == torch.float64 or not value.is_floating_point()
                    torch.testing.assert_close(found[part][name], value, rtol=1e-9,
                                               atol=1e-9 * value.abs().max().item())
        for name in ("codes.npy", "labels.npy"):
            assert (one / "tokens" / name).read_bytes() == (two / "tokens" / name).read_bytes()


def test_two_processes_encode_and_sample_as_one(finished, arguments, tmp_path):
    """With the same weights: identical files."""
    out = Path(arguments[5])
    out.mkdir()
    for name in ("tokenizers.pt", "stage0.pt"):
        shutil.copy(finished / name, out)
    start("train", *arguments, "--stage", "0", processes=2)
    assert contents(out / "tokens") == contents(finished / "tokens")
    settings = ["--run", finished, "--num", "20", "--seed", "3"]
    sample.main([str(word) for word in (*settings, "--out", tmp_path / "one.npz")])
    start("sample", *settings, "--out", tmp_path / "two.npz", processes=2)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_a_picture_depends_on_step_and_place_alone(finished):
    """So it is the same for any number of processes and workers; what a batch shares is the same for all its places."""
    cache, config = TokenCache(finished / "tokens"), d2c.ContinuousConfig()

    def pictures():
        return train.Pictures(functools.partial(train.read_latents, cache, config), np.arange(100), 8, 2, seed=0)

    whole, alone = pictures(), pictures()
    hidden = [[len(whole[step, place][2]) for place in range(8)] for step in range(20)]
    assert all(len(set(row)) == 1 for row in hidden) and len(set(map(str, hidden))) > 3
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(whole[7, 5], alone[7, 5]))
    assert not torch.equal(whole[7, 5][0], whole[7, 6][0]) and not torch.equal(whole[7, 5][0], whole[8, 5][0])


def test_a_process_reads_its_own_pictures_only(finished):
    """An eighth of the batch for one of eight processes."""
    read = []
    pictures = train.Pictures(lambda *a: read.append(a) or 0, np.arange(100), 64, 1, seed=0)
    loader = torch.utils.data.DataLoader(pictures, batch_sampler=[[(3, place) for place in range(8, 16)]])
    assert next(iter(loader)).shape == (8,) and len(read) == 8


def test_an_epoch_visits_every_picture_once():
    pictures = train.Pictures(lambda index, generator, shared: index, np.arange(50, 90), 8, 1, 0)
    first, second = ([pictures[epoch * 5 + k, place] for k in range(5) for place in range(8)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50, 90)) and first != second


@pytest.mark.parametrize("fusion", ["none", "cross"])
def test_drops(finished, fusion):
    """Class and codes together in a tenth, codes alone in a twentieth, and with fusion the class alone in another."""
    cache, config = TokenCache(finished / "tokens"), d2c.ContinuousConfig(fusion=fusion)
    rows = [train.read_latents(cache, config, i % 120, torch.Generator().manual_seed(i), 0.5) for i in range(4800)]
    _, visible, hidden, labels, codes, t, noise = torch.utils.data.default_collate(rows)
    no_class, no_codes = labels < 0, (codes < 0).all(1)
    for dropped, share in ((no_class & no_codes, 0.1), (~no_class & no_codes, 0.05),
                           (no_class & ~no_codes, 0.0 if fusion == "none" else 0.05)):
        assert abs(float(dropped.float().mean()) - share) < (0.01 if share else 1e-9)
    assert torch.equal((codes < 0).any(1), no_codes)
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(16).expand(4800, -1))
    assert hidden.shape[1] >= 12 and t.shape == (4800, hidden.shape[1], 4) and noise.shape == (*t.shape, 4)
    mirrored = [torch.equal(codes[i], torch.from_numpy(cache.codes[1, i % 120].astype(np.int64))) for i in range(4800)
                if not no_codes[i] and (cache.codes[0, i % 120] != cache.codes[1, i % 120]).any()]
    assert abs(np.mean(mirrored) - 0.5) < 0.05


def test_the_share_of_hidden_places_is_the_configs():
    """A normal around 1, cut to [smallest, 1]: against draws of torch's own."""
    for deviation, smallest in ((0.25, 0.7), (1.0, 0.1)):  # MAR's, the demo's
        config = d2c.ContinuousConfig(hidden_share=(deviation, smallest))
        ours = [train.count_hidden(16, config, (i + 0.5) / 2000) for i in range(2000)]
        drawn = torch.nn.init.trunc_normal_(torch.empty(20000), 1.0, deviation, smallest, 1.0,
                                            torch.Generator().manual_seed(0))
        assert set(ours) == set(range(math.ceil(16 * smallest), 17))
        expected = (16 * drawn).ceil().int().bincount(minlength=17) / 20000
        torch.testing.assert_close(torch.tensor(ours).bincount(minlength=17) / 2000, expected, atol=0.015, rtol=0)


def test_validation_hides_the_same_shares_for_every_seed(finished):
    """Spread over the batch, so that losses of two seeds compare."""
    cache, config = TokenCache(finished / "tokens"), d2c.ContinuousConfig(hidden_share=(1.0, 0.1))
    read = functools.partial(train.read_latents, cache, config)
    counts = {tuple(len(train.Pictures(read, np.arange(100), 8, 2, seed, held_out=True)[0, row][2]) for row in range(8))
              for seed in range(4)}
    assert len(counts) == 1 and len(set(counts.pop())) == 4
    pictures = train.Pictures(read, np.arange(100), 8, 2, 0, held_out=True)
    pairs = zip(pictures[0, 3], pictures[9, 3])  # at every step
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def test_which_optimizer_gets_what():
    """Weight decay spares vectors and the diffusion head. Muon has the matrices of blocks and nothing else."""
    model = d2c.ContinuousGenerator(d2c.ContinuousConfig(
        channels=4, num_classes=3, grid=(2, 2), width=8, encoder_depth=1, decoder_depth=1, num_heads=1, head_depth=1,
        head_width=8, fusion="cross", codebook_size=5, guess_weight=1.0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def groups(muon):
        optimizers = train.make_optimizers(model, dict(lr=1e-3, weight_decay=0.02, muon=muon))
        return [[({names[id(p)]: p for p in group["params"]}, group["weight_decay"])
                 for group in optimizer.param_groups] for optimizer in optimizers]

    for muon in (False, True):
        found = groups(muon)
        assert sorted(name for optimizer in found for group, _ in optimizer for name in group) == sorted(names.values())
        for name, parameter, decay in [(*item, decay) for optimizer in found for group, decay in optimizer
                                       for item in group.items()]:
            assert decay == (0.02 if parameter.ndim >= 2 and not name.startswith("diffloss") else 0), name
        assert len(found) == 1 + muon
    hidden = {name: parameter for group, _ in found[1] for name, parameter in group.items()}
    assert all(parameter.ndim == 2 for parameter in hidden.values())
    assert {"encoder_blocks.0.attn.qkv.weight", "decoder_blocks.0.mlp.fc2.weight", "fusion.blocks.0.cross.kv.weight",
            "diffloss.net.res_blocks.0.mlp.0.weight"} <= hidden.keys()
    others = {name.rpartition(".")[0] or name for name in names.values() if name not in hidden}
    assert {"class_emb", "z_proj", "code_embedding", "guess", "diffloss.net.input_proj",
            "diffloss.net.final_layer.linear", "mask_token", "encoder_pos_embed_learned"} <= others
    first = train.make_optimizers(d2c.DiscreteGenerator(d2c.DiscreteConfig(
        codebook_size=5, num_classes=3, grid=(2, 2), width=8, depth=1, num_heads=1)),
        dict(lr=1e-3, weight_decay=0.02, muon=True))[1]
    assert sum(len(group["params"]) for group in first.param_groups) == 5  # wqkv, wo, w1, w2, w3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (16, 64)])
def test_muon_is_that_of_torch(shape):
    """Up to bfloat16, in which torch computes."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = (train.Muon([dict(params=[ours], weight_decay=0.1)], lr=0.1),
                  torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", ns_steps=3))
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    moved = (ours - start).norm()
    assert moved > 1e-2 and (ours - theirs).norm() < 0.02 * moved


def test_orthogonal_evens_out_singular_values():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(12, 30), full_matrices=False)
    matrix = u * torch.logspace(0, -1, 12) @ v
    for one, other in ((matrix, u @ v), (1e-3 * matrix.T, (u @ v).T)):
        values = torch.linalg.svdvals(train.orthogonal(one, iterations=5))
        assert values.min() > 0.6 and values.max() < 1.3
        assert (train.orthogonal(one, iterations=5) - other).norm() < 0.3 * other.norm()


def test_the_ruler_that_measured_every_figure(tmp_path):
    """Real pictures, the same ones blurred, and real ones under wrong names."""
    rulers = benchmark_demo.Rulers(tmp_path)
    pictures, labels = benchmark_demo.real_pictures(200, benchmark_demo.TEST_SEED)
    assert labels.tolist()[:12] == [*range(10), 0, 1] and pictures.shape == (200, 32, 32, 3)
    real = rulers.measure(pictures, labels)
    assert real["accuracy"] == 1 and real["Frechet"] == pytest.approx(0.0843, abs=5e-5)
    blurred = np.stack([np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BOX).resize((32, 32)))
                        for x in pictures])
    assert rulers.measure(blurred, labels)["Frechet"] == pytest.approx(1.0302, abs=5e-5)
    assert rulers.measure(pictures, np.roll(labels, 1))["accuracy"] == 0


def test_learning_rate():
    rates = [train.learning_rate(step, 100, 1.0, 10, "cosine") for step in range(100)]
    assert rates[0] == 0.1 and rates[10] == 1.0 and rates[99] < 1e-3 and rates[55] == pytest.approx(0.5)
    assert train.learning_rate(99, 100, 1.0, 10, "constant") == 1.0


def test_with_a_decaying_rate_the_number_of_steps_belongs_to_the_run(arguments, monkeypatch, capsys):
    """More steps would jump from a rate of nearly zero back to a high one."""
    preset = d2c.PRESETS["tiny"]
    training = {stage: dict(settings, decay="cosine") for stage, settings in preset["train"].items()}
    monkeypatch.setitem(d2c.PRESETS, "tiny", dict(preset, train=training))
    train.main([*arguments[:-4], "--stage", "1", "--steps", "3"])
    before = contents(arguments[5])
    refused(train.main, [*arguments[:-4], "--stage", "1", "--steps", "4"], capsys, "stage1.pt", "steps 3", "steps 4",
            "--out")
    assert contents(arguments[5]) == before
    train.main([*arguments[:-4], "--stage", "1", "--steps", "3"])
    assert "finished (3 steps)" in capsys.readouterr().out


def test_the_gradient_of_each_tokenizer_is_clipped_by_itself(monkeypatch):
    clipped = []
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_",
                        lambda parameters, norm: clipped.append({id(p) for p in parameters}))
    preset = d2c.PRESETS["tiny"]
    vq, kl = VQTokenizer(TokenizerConfig(**preset["vq"])), KLTokenizer(TokenizerConfig(**preset["kl"]))
    model = train.Tokenizers(vq, kl)
    optimizers, processes = [torch.optim.AdamW(model.parameters())], train.Processes("cpu")
    args = train.parse(["--device", "cpu"])[1]
    settings = dict(preset["train"][0], stage=0, steps=6)
    batch = torch.zeros(2, 3, 16, 16), torch.zeros(2, 4, 4, 4)
    train.training_step(model, torch.optim.swa_utils.AveragedModel(model), optimizers, batch, 0, settings, args,
                        processes)
    assert clipped == [{id(p) for p in vq.parameters()}, {id(p) for p in kl.parameters()}]


def test_published_weights_start_a_stage(run, data, tmp_path, capsys):
    """--init with MAR's layout into a model with fusion, from a file of MAR's form."""
    file = load(run / "stage2.pt")
    added = ("fusion", "code_embedding", "null_code")
    mar = {key: value for key, value in file["ema"].items() if not key.startswith(added)}
    torch.save({"model": {key: value + 1 for key, value in mar.items()}, "model_ema": mar}, tmp_path / "mar.pth")
    (run / "stage2.pt").unlink()
    command = ["--preset", "tiny", "--out", str(run), "--stage", "2", "--steps", "1", "--lr", "1e-12", "--fusion",
               "qformer"]
    train.main([*command, "--init", str(tmp_path / "mar.pth")])
    assert "starting from" in capsys.readouterr().out
    started = load(run / "stage2.pt")["model"]
    for key, value in mar.items():
        torch.testing.assert_close(started[key], value, atol=1e-6, rtol=0)
    assert not started["fusion.out.weight"].abs().max() > 1e-6


def test_tokens_are_made_in_full_float32(monkeypatch):
    """Neither TF32 nor bf16, whatever surrounds it: both change codes."""
    seen, original = [], tokenizers.Encoder.forward

    def look(self, images):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                     torch.is_autocast_enabled("cpu")))
        return original(self, images)

    monkeypatch.setattr(tokenizers.Encoder, "forward", look)
    einsum = torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *a: seen.append(
        (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
         torch.is_autocast_enabled("cpu"))) or einsum(*a))
    preset, images = d2c.PRESETS["tiny"], torch.rand(2, 3, 16, 16)
    vq, kl = VQTokenizer(TokenizerConfig(**preset["vq"])), KLTokenizer(TokenizerConfig(**preset["kl"]))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            codes, moments = vq.encode(images), kl.encode(images)
            assert torch.get_float32_matmul_precision() == "high" and torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("highest", False, False)] * 3  # two encoders, and the search for the nearest row
    assert torch.equal(codes, vq.encode(images)) and torch.equal(moments, kl.encode(images))


def test_bf16_runs_in_every_stage(arguments, tmp_path):
    train.main([*arguments[:-4], "--steps", "2", "--dtype", "bf16"])
    sample.main(["--run", arguments[5], "--num", "4", "--dtype", "bf16", "--out", str(tmp_path / "a.png")])


def test_seeds_of_different_purposes_differ():
    assert len({seed_of(*numbers) for numbers in ((0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (0, 1, 0),
                                                  (0, 1, 0, 0))}) == 7
    shares = np.array([seed_of(0, 2, step) / 2**63 for step in range(4000)])  # what a batch shares
    assert abs(shares.mean() - 0.5) < 0.02 and (np.histogram(shares, 20, (0, 1))[0] > 140).all()


# Sampling ------------------------------------------------------------------------------------------------------------


def test_grid_and_npz(finished, tmp_path):
    sample.main(["--run", str(finished), "--classes", "3", "1,7", "--num", "6", "--out", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 3 * 96 and image.height > 4 * 96
    sample.main(["--run", str(finished), "--num", "23", "--out", str(tmp_path / "a.npz")])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (23, 16, 16, 3) and file["arr_0"].dtype == np.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "grid.png"]  # nothing temporary stays


def test_seed_and_settings_decide_the_pictures(finished, tmp_path):
    def pictures(*settings):
        sample.main(["--run", str(finished), "--num", "10", "--out", str(tmp_path / "a.npz"), *settings])
        return np.load(tmp_path / "a.npz", allow_pickle=False)["arr_0"]

    base = pictures("--seed", "1")
    assert np.array_equal(base, pictures("--seed", "1"))
    for settings in (["--seed", "2"], ["--cfg2", "4"], ["--steps", "2"], ["--raw"], ["--temperature2", "0.5"]):
        assert not np.array_equal(base, pictures("--seed", "1", *settings)), settings


def test_published_files_alone(tmp_path, data, capsys):
    """The README's commands for LlamaGen alone, MAR alone, and a run on published tokenizers, at the goldens' small
    sizes."""
    vq = published_file("llamagen_vq_tiny_ch32", tmp_path / "vq.pt", "model")
    kl = published_file("mar_kl_tiny_ch32", tmp_path / "kl.ckpt", "model")
    gpt = published_file("llamagen_gpt_tiny", tmp_path / "gpt.pt", "model")
    mar = d2c.ContinuousGenerator(d2c.ContinuousConfig(channels=4, num_classes=10, grid=(4, 4), width=64,
                                                       encoder_depth=1, num_heads=1,
                                                       decoder_depth=1, buffer_size=4, head_depth=1,
                                                       head_width=32)).state_dict()
    torch.save({"model": mar, "model_ema": mar}, tmp_path / "mar.pth")
    few = ["--num", "2", "--steps", "4", "--diffusion-steps", "5:3"]
    sample.main(["--vq", vq, "--stage1", gpt, "--num", "2", "--out", str(tmp_path / "coarse.png")])
    sample.main(["--kl", kl, "--stage2", str(tmp_path / "mar.pth"), *few, "--out", str(tmp_path / "fine.npz")])
    assert np.load(tmp_path / "fine.npz", allow_pickle=False)["arr_0"].shape == (2, 16, 16, 3)
    run = ["--preset", "tiny", "--out", str(tmp_path / "run")]
    train.main([*run, "--stage", "0", "--data", str(data), "--vq", vq, "--kl", kl])
    train.main([*run, "--steps", "2"])
    sample.main(["--run", str(tmp_path / "run"), *few])
    cache = TokenCache(tmp_path / "run" / "tokens")
    assert cache.meta["channels"] == 4 and cache.meta["codebook_size"] == 64
    assert (tmp_path / "run" / "samples.png").exists()
    refused(sample.main, ["--vq", vq, "--stage1", gpt, "--kl", kl, "--stage2", tmp_path / "mar.pth"], capsys,
            "token grid")
    refused(train.main, [*run, "--data", data, "--vq", gpt, "--kl", kl], capsys, "made with vq")


def test_published_pictures_of_384_pixels(tmp_path, monkeypatch):
    """--size gives LlamaGen's larger grid; an .npz for the evaluation is reduced to 256 pixels, as LlamaGen does."""
    vq = published_file("llamagen_vq_tiny_ch32", tmp_path / "vq.pt", "model")
    gpt = published_file("llamagen_gpt_tiny", tmp_path / "gpt.pt", "model")
    pipeline = sample.Pipeline.from_published(vq, gpt, size=96)  # a place is 4 pixels wide here, 16 in the published VQ
    assert pipeline.grid == (24, 24) and pipeline.size == 96 and pipeline.discrete.rotary.shape[0] == 1 + 24 * 24
    images = torch.rand(1, 3, 384, 384) * 2 - 1
    pipeline.size = 256
    expected = torch.nn.functional.interpolate(images, (256, 256), mode="bicubic").mul(127.5).add(128).clamp(0, 255)
    assert np.array_equal(pipeline.finish(images)[0], expected.to(torch.uint8)[0].permute(1, 2, 0))
    monkeypatch.setattr(sample.Pipeline, "batch",
                        lambda self, labels, *rest: [np.zeros((1, self.size, self.size, 3)), None])
    sample.main(["--vq", vq, "--stage1", gpt, "--size", "384", "--num", "1", "--out", str(tmp_path / "a.npz")])
    assert np.load(tmp_path / "a.npz", allow_pickle=False)["arr_0"].shape == (1, 256, 256, 3)


def test_a_preset_that_nobody_knows_any_more(run, tmp_path, monkeypatch):
    """A student's own, in a copy of d2c.py: the run has its sampling settings."""
    monkeypatch.delitem(d2c.PRESETS, "tiny")
    sample.main(["--run", str(run), "--num", "2", "--out", str(tmp_path / "a.npz")])
    assert sample.Pipeline.from_run(run).settings["steps"] == 4


def test_progress_counts_pictures_not_batches(finished, tmp_path, monkeypatch, capsys):
    """Three pictures in batches of eight: three are made, and the time left is not negative."""
    monkeypatch.setattr(train.time, "time", iter(range(100)).__next__)
    sample.main(["--run", str(finished), "--num", "3", "--out", str(tmp_path / "a.npz")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sampled"))
    assert "3/3 pictures" in line and line.endswith("ETA 0:00:00")
    assert float(line.split("images/s")[0].split()[-1]) <= 3  # the clock ticks at least once


def test_in_a_notebook(finished, tmp_path):
    """The same pictures as the command's, for any number of them; coarse alone without stage 2."""
    pipeline = sample.Pipeline.from_run(finished)
    labels = [i % 10 for i in range(20)]
    coarse, fine = pipeline(labels, seed=3)
    sample.main(["--run", str(finished), "--num", "20", "--seed", "3", "--out", str(tmp_path / "fine.npz")])
    assert coarse.shape == fine.shape == (20, 16, 16, 3)
    assert np.array_equal(np.load(tmp_path / "fine.npz", allow_pickle=False)["arr_0"], fine)
    assert not np.array_equal(pipeline(labels, seed=3, cfg2=5.0)[1], fine)
    assert sample.Pipeline.from_run(finished, coarse=True)(labels, seed=3)[1] is None


def test_coarse_needs_no_stage2(run, tmp_path, capsys):
    """And draws the coarse pictures of the whole pipeline."""
    coarse, _ = sample.Pipeline.from_run(run)(range(8))
    (run / "stage2.pt").unlink()
    refused(sample.main, ["--run", run], capsys, "stage2.pt", "python train.py --out", run)
    sample.main(["--run", str(run), "--coarse", "--num", "8", "--out", str(tmp_path / "coarse.npz")])
    assert np.array_equal(np.load(tmp_path / "coarse.npz", allow_pickle=False)["arr_0"], coarse)


def test_fine_pictures_from_the_codes_of_photographs(finished, tmp_path, capsys):
    """Original, both reconstructions, three fine pictures; the class is the user's or none."""
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    photos = [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]
    sheets = []
    for flags in ([], ["--classes", "3"], ["--seed", "1"]):
        sample.main(["--run", str(finished), "--from", *photos, "--out", str(tmp_path / "v.png"), *flags])
        with Image.open(tmp_path / "v.png") as sheet:
            sheets.append(np.asarray(sheet))
    assert sheets[0].shape[0] == 20 + 6 * 96 + 6 and tuple(sheets[0][60, -150]) == (255, 0, 0)
    assert not np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])
    refused(sample.main, ["--run", finished, "--from", photos[0], "--out", tmp_path / "a.npz"], capsys, "--from",
            ".png")
    refused(sample.main, ["--run", finished, "--coarse", "--from", photos[0]], capsys, "--from needs")


def test_photographs_of_all_kinds(finished, tmp_path, capsys):
    """A large JPEG of a phone stands upright, as its EXIF tag says; alpha and grey pictures are converted."""
    red, blue = (220, 30, 30), (30, 30, 220)
    phone = Image.new("RGB", (4000, 3000), red)
    phone.paste(blue, (2000, 0, 4000, 3000))  # as the sensor lies: red left, blue right
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red above, blue below
    phone.save(tmp_path / "phone.jpg", exif=exif)
    Image.new("RGBA", (50, 70), (0, 200, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("L", (70, 50), 99).save(tmp_path / "grey.png")
    photos = [str(tmp_path / name) for name in ("phone.jpg", "alpha.png", "grey.png")]
    sample.main(["--run", str(finished), "--from", *photos, "--out", str(tmp_path / "v.png")])
    with Image.open(tmp_path / "v.png") as sheet:
        first = np.asarray(sheet)[20:116, -3 * 96:].astype(int)                               # (96,288,3): originals
    assert abs(first[10, 48] - red).max() < 20 and abs(first[85, 48] - blue).max() < 20
    assert tuple(first[48, 144]) == (0, 200, 0) and tuple(first[48, 240]) == (99, 99, 99)
    (tmp_path / "no.jpg").write_text("no picture")
    refused(sample.main, ["--run", finished, "--from", tmp_path / "no.jpg"], capsys, "no.jpg", "picture")


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(main, arguments, capsys, *words):
    """main(arguments) must end with status 2 and one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error
    for word in words:
        assert str(word) in error, error


def truncate(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def test_bad_sampling(run, tmp_path, capsys):
    before, base = contents(run), ["--run", run]
    refused(sample.main, [*base, "--classes", "unicorn"], capsys, "unicorn", "0 to 9")
    refused(sample.main, [*base, "--classes", "10"], capsys, "--classes 10")
    refused(sample.main, [*base, "--steps", "17"], capsys, "--steps 17", "16")
    for steps in ("1001", "1:5", "50:1", "5:", ":5", "5:50:3"):
        refused(sample.main, [*base, "--diffusion-steps", steps], capsys, "--diffusion-steps")
    refused(sample.main, [*base, "--num", "0"], capsys, "--num")
    refused(sample.main, [*base, "--top-p", "0"], capsys, "--top-p")
    refused(sample.main, [*base, "--cfg1", "nan"], capsys, "--cfg1")
    refused(sample.main, [*base, "--out", tmp_path / "a.gif"], capsys, "a.gif", ".png")
    (tmp_path / "file").write_text("")
    refused(sample.main, [*base, "--out", tmp_path / "file" / "a.png"], capsys, "--out", "cannot be written")
    refused(sample.main, [*base, "--out", tmp_path], capsys, "ends in .png")
    refused(sample.main, ["--run", tmp_path / "nothing"], capsys, "tokenizers.pt", f"python train.py --out {tmp_path}")
    refused(sample.main, ["--stage2", run / "stage2.pt"], capsys, "--kl")
    refused(sample.main, ["--coarse", "--kl", "kl.ckpt", "--stage2", run / "stage2.pt"], capsys, "in pairs")
    refused(sample.main, [*base, "--from", tmp_path / "file"], capsys, tmp_path / "file", "picture")
    assert contents(run) == before


def test_a_fresh_clone_is_told_the_one_command_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(sample.main, [], capsys, "make it with: python train.py (about 5 minutes")
    assert not list(tmp_path.iterdir())


def test_a_process_whose_peer_has_stopped_says_so(monkeypatch, capsys):
    parser = train.parse([])[0]
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)

    def work():
        with train.user_errors(parser):
            raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")

    refused(lambda _: work(), [], capsys, "another process", "has stopped")


@pytest.mark.parametrize("name, stage", [("tokenizers.pt", 0), ("stage1.pt", 1), ("stage2.pt", 2)])
def test_missing_damaged_and_foreign_checkpoints(run, data, tmp_path, name, stage, capsys):
    command = ["--preset", "tiny", "--out", run, "--stage", stage, "--steps", "40"]
    original = (run / name).read_bytes()
    (run / name).unlink()
    refused(sample.main, ["--run", run], capsys, name, "python train.py")
    for content in (original[:len(original) // 2], b"", b"not a checkpoint"):
        (run / name).write_bytes(content)
        refused(sample.main, ["--run", run], capsys, name)
        if stage:
            refused(train.main, command, capsys, name)
        assert (run / name).read_bytes() == content
    torch.save({"weights": torch.ones(3)}, run / name)
    refused(sample.main, ["--run", run], capsys, name)
    if stage:
        refused(train.main, command, capsys, name)


def test_a_stage_in_the_place_of_another(run, capsys):
    shutil.copy(run / "stage2.pt", run / "stage1.pt")
    refused(sample.main, ["--run", run], capsys, "stage1.pt", "holds stage 2")


def test_stages_of_different_tokens(run, capsys):
    file = load(run / "stage1.pt")
    file["run"]["tokens"] = file["tokenizers"] = "00000000"
    torch.save(file, run / "stage1.pt")
    refused(sample.main, ["--run", run], capsys, "stage1.pt", "other tokenizers")
    refused(train.main, ["--preset", "tiny", "--out", run, "--stage", "1", "--steps", "40"], capsys, "tokens 00000000")


def test_what_changes_the_meaning_of_a_run_must_match(run, data, capsys):
    before, base = contents(run), ["--preset", "tiny", "--data", data, "--out", run, "--steps", "40"]
    refused(train.main, ["--preset", "demo", "--out", run], capsys, "preset tiny", "preset demo", "--out")
    refused(train.main, [*base, "--seed", "1", "--stage", "1"], capsys, "seed 0", "seed 1")
    refused(train.main, [*base, "--batch-size", "4", "--stage", "2"], capsys, "batch_size 8", "batch_size 4")
    refused(train.main, [*base, "--fusion", "none", "--stage", "2"], capsys, "fusion cross", "fusion none")
    refused(train.main, [*base, "--data", "shapes", "--stage", "1"], capsys, "shapes")
    assert contents(run) == before


def test_bad_flags(tmp_path, capsys):
    base = ["--preset", "tiny", "--out", tmp_path / "run"]
    refused(train.main, ["--preset", "giant"], capsys, "giant", "demo")
    refused(train.main, ["--nonsense"], capsys, "--nonsense")
    refused(train.main, [*base], capsys, "preset tiny needs --data")
    refused(train.main, ["--preset", "B", "--data", "shapes", "--out", tmp_path / "run"], capsys,
            "--vq FILE and --kl FILE")
    refused(train.main, [*base, "--data", "shapes", "--vq", "a.pt"], capsys, "--vq and --kl")
    refused(train.main, [*base, "--data", "shapes", "--batch-size", "7", "--accumulate", "2"], capsys, "divisible")
    refused(train.main, [*base, "--init", "a.pt"], capsys, "--init needs --stage")
    refused(train.main, [*base, "--steps", "0"], capsys, "--steps")
    refused(train.main, [*base, "--lr", "-1"], capsys, "--lr")
    refused(train.main, [*base, "--workers", "-1"], capsys, "--workers")
    refused(train.main, [*base, "--seed", "99999999999999999999"], capsys, "--seed")
    if not torch.cuda.is_available():
        for main in (train.main, sample.main):
            refused(main, ["--device", "cuda"], capsys, "--device cuda")
    (tmp_path / "file").write_text("kept")
    refused(train.main, ["--preset", "tiny", "--data", "shapes", "--out", tmp_path / "file"], capsys, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_bad_data(tmp_path, capsys):
    def refuse(path, *words):
        refused(train.main, ["--preset", "tiny", "--data", path, "--out", tmp_path / "run"], capsys, *words)
        assert not (tmp_path / "run" / "tokenizers.pt").exists()

    def npz(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return tmp_path / "a.npz"

    images, labels = np.zeros((4, 16, 16, 3), np.uint8), np.arange(4)
    refuse(tmp_path / "missing", "no such folder or file")
    refuse(npz(pictures=images, labels=labels), "images", "labels=")
    refuse(npz(images=images.astype(np.float32), labels=labels), "uint8", "float32")
    refuse(npz(images=images[..., 0], labels=labels), "(N,H,W,3)")
    refuse(npz(images=images, labels=labels[:3]), "labels")
    refuse(npz(images=images, labels=labels - 1), "from 0 upwards")
    refuse(npz(images=images, labels=np.array([[0, 1, 2, 3]])), "labels")
    refuse(npz(images=images, labels=labels, classes=["ant", "bee"]), "up to 3", "2 classes")
    refuse(npz(images=np.array([{}] * 4), labels=labels), "cannot be used", "numpy.savez")
    refuse(npz(images=images[:0], labels=labels[:0]), "cannot be used")
    truncate(npz(images=images, labels=labels))
    refuse(tmp_path / "a.npz", "cannot be used")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "no images found", "CLASS/IMAGE")
    (tmp_path / "folder" / "cat").mkdir()
    refuse(tmp_path / "folder", "no images found")
    (tmp_path / "folder" / "cat" / "broken.png").write_bytes(b"no picture")
    refuse(tmp_path / "folder", "two pictures")
    Image.fromarray(images[0]).save(tmp_path / "folder" / "cat" / "fine.png")
    refuse(tmp_path / "folder", "broken.png", "repair or remove this picture")


def test_an_npz_may_name_its_classes(tmp_path):
    images, labels = np.zeros((3, 16, 16, 3), np.uint8), np.array([0, 2, 1])
    np.savez(tmp_path / "named.npz", images=images, labels=labels, classes=["ant", "bee", "cat"])
    np.savez(tmp_path / "plain.npz", images=images, labels=labels)
    named, plain = (open_images(str(tmp_path / name), 16) for name in ("named.npz", "plain.npz"))
    assert named.classes == ["ant", "bee", "cat"] and plain.classes == ["0", "1", "2"]


def test_a_broken_image_in_a_worker_process(tmp_path, capsys):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for name in "abc":
        (tmp_path / "data" / "cat" / f"{name}.jpg").write_bytes(b"no picture")
    refused(train.main, ["--preset", "tiny", "--data", tmp_path / "data", "--out", tmp_path / "run", "--workers", "1"],
            capsys,
            ".jpg", "repair or remove this picture")


def test_folders_of_all_kinds_of_images(tmp_path):
    """Grey, palette, RGBA, 16-bit and CMYK pictures of any size; a hidden folder is no class, an empty one keeps its
    id."""
    root = tmp_path / "data"
    for folder in (".cache", "ant", "bee", "cat"):
        (root / folder).mkdir(parents=True)
    for k, mode in enumerate(("L", "P", "RGBA", "I;16", "RGB", "CMYK")):
        image = Image.new(mode, (20 + k, 30)) if mode == "I;16" else Image.new("RGB", (20 + k, 30), "red").convert(mode)
        image.save(root / ("ant" if k % 2 else "cat") / f"{k}.{'jpg' if mode == 'CMYK' else 'png'}")
    images = ImageFolder(root, 16)
    assert images.classes == ["ant", "bee", "cat"] and [label for _, label in images.files] == [0, 0, 0, 2, 2, 2]
    assert all(images[i][0].shape == (16, 16, 3) and images[i][0].dtype == np.uint8 for i in range(6))


def test_unequal_token_grids(tmp_path, data, monkeypatch, capsys):
    preset = dict(d2c.PRESETS["tiny"], vq=dict(d2c.PRESETS["tiny"]["vq"], patch=8))
    monkeypatch.setitem(d2c.PRESETS, "tiny", preset)
    refused(train.main, ["--preset", "tiny", "--data", data, "--out", tmp_path / "run"], capsys, "grids", "differ",
            "8 and 4")
    assert not list((tmp_path / "run").iterdir())


def test_half_a_token_cache(run, data, capsys):
    command = ["--preset", "tiny", "--data", data, "--out", run, "--stage", "1", "--steps", "40"]
    whole = contents(run / "tokens")
    labels = (run / "tokens" / "labels.npy").read_bytes()
    np.save(run / "tokens" / "labels.npy", np.zeros(7, np.int64))  # somebody else's
    refused(train.main, command, capsys, "tokens", "labels.npy does not belong")
    (run / "tokens" / "labels.npy").write_bytes(labels)
    truncate(run / "tokens" / "moments.npy")
    refused(train.main, command, capsys, "tokens", "--stage 0")
    (run / "tokens" / "meta.json").unlink()  # as if encoding had been cut off: it is simply done again
    train.main([str(x) for x in command])
    assert contents(run / "tokens") == whole


def test_published_files_that_do_not_fit(run, tmp_path, capsys):
    """Missing, extra, misshapen keys; other people's pickles; and nothing is run from them."""
    state = load(run / "stage1.pt")["ema"]
    command = ["--preset", "tiny", "--out", run, "--stage", "1", "--init", tmp_path / "init.pt"]
    (run / "stage1.pt").unlink()
    before = contents(run)

    def refuse(content, *words):
        torch.save(content, tmp_path / "init.pt")
        refused(train.main, command, capsys, "init.pt", *words)
        assert contents(run) == before

    refuse({"model": {key: value for key, value in state.items() if key != "norm.weight"}}, "norm.weight")
    refuse({"model": dict(state, surplus=torch.ones(1))}, "surplus")
    refuse({"model": dict(state, **{"norm.weight": torch.ones(5)})}, "norm.weight")
    refuse({"model": {}}, "no state dict")
    refuse([state], "not a readable checkpoint")
    (tmp_path / "init.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "fallen")))
    refused(train.main, command, capsys, "init.pt", "not a readable checkpoint")
    torch.save({"model": state, "args": Bomb(tmp_path / "fallen")}, tmp_path / "init.pt")
    refused(train.main, command, capsys, "init.pt", "not a readable checkpoint")
    assert not (tmp_path / "fallen").exists()


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(run, capsys):
    """And what is saved before the first bad step is finite, even when every step is saved."""
    before, command = (run / "stage1.pt").read_bytes(), ["--preset", "tiny", "--out", run, "--stage", "1", "--steps",
                                                         "40"]
    refused(train.main, [*command, "--lr", "1e30"], capsys, "not finite at step 3", "rate", "--lr",
            "Earlier saves are whole")
    assert (run / "stage1.pt").read_bytes() == before
    refused(train.main, [*command, "--lr", "1e30", "--save-every", "1"], capsys, "not finite at step 3")
    file = load(run / "stage1.pt")
    assert all(value.isfinite().all() for part in ("model", "ema") for value in file[part].values())
