"""What long runs on large data need: nothing is lost when they are cut off, and no damage passes unnoticed."""
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import d2c
import sample
import tokenizers
import train
from test_scripts import TINY, contents, load, refused
from tokenizers import ImageFolder, TokenCache


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def stage0(data, tmp_path):
    """Arguments that train and encode in a folder of their own."""
    return ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "30", "--save-every", "5",
            "--stage", "0"]


@pytest.fixture
def pictures(tmp_path):
    """Three classes of two pictures each, one of them no picture at all."""
    for label in ("ant", "bee", "cow"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng([len(label), i]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    (tmp_path / "data" / "bee" / "1.png").write_bytes(b"no picture")
    return tmp_path / "data"


# Nothing is lost -----------------------------------------------------------------------------------------------------


def test_encoding_goes_on_where_it_was_cut_off(finished, stage0, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    for name in ("tokenizers.pt", "stage0.pt"):
        shutil.copy(finished / name, tmp_path / "run")
    encode, encoded = tokenizers.VQTokenizer.encode, []

    def encode_once(self, images):
        encoded.append(len(images))
        if len(encoded) == 4:  # the probe, the first batch and its mirror image, then
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(tokenizers.VQTokenizer, "encode", encode_once)
    monkeypatch.setattr(tokenizers.time, "time", iter(range(0, 10**6, 10)).__next__)  # every batch is flushed at once
    with pytest.raises(SystemExit):
        train.main(stage0)
    assert not (tmp_path / "run" / "tokens" / "meta.json").exists()
    assert "unfinished" in refusal(lambda: TokenCache(tmp_path / "run" / "tokens"))
    encoded.append(0)
    train.main(stage0)
    assert encoded[5:] == [1, 56, 56]  # 120 pictures are batches of 64 and 56
    assert "goes on after 64 of 120" in capsys.readouterr().out
    assert contents(tmp_path / "run" / "tokens") == contents(finished / "tokens")


def refusal(do):
    with pytest.raises(tokenizers.InputError) as error:
        do()
    return str(error.value)


def test_sampling_goes_on_where_it_was_cut_off(finished, tmp_path, monkeypatch, capsys):
    command = ["--run", str(finished), "--num", "40", "--out", str(tmp_path / "cut.npz")]
    sample.main([*command[:-1], str(tmp_path / "whole.npz")])
    pictures, made = sample.Pipeline.pictures, []

    def interrupted(self, labels, *rest, **more):
        made.append(len(labels))
        if len(made) == 3:
            raise KeyboardInterrupt
        return pictures(self, labels, *rest, **more)

    monkeypatch.setattr(sample.Pipeline, "pictures", interrupted)
    monkeypatch.setattr(tokenizers.time, "time", iter(range(0, 10**6, 10)).__next__)
    with pytest.raises(SystemExit):
        sample.main(command)
    assert not (tmp_path / "cut.npz").exists()
    capsys.readouterr()
    sample.main(command)
    assert made == [8] * 6 and "going on after 16 of 40 pictures" in capsys.readouterr().out
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.npz", "whole.npz"]
    sample.main(command)
    assert made == [8] * 6 and "cut.npz is there already" in capsys.readouterr().out


def test_retraining_the_tokenizers_survives_a_kill(finished, stage0, tmp_path, monkeypatch, capsys):
    """Cut off after stage0.pt was saved, before tokenizers.pt: the same command ends as if nothing had been."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("stage1*", "stage2*"))
    command = [*stage0, "--steps", "33"]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "measure_scale", stop)
        with pytest.raises(SystemExit):
            train.main(command)
    train.main(command)
    assert load(tmp_path / "run" / "stage0.pt")["step"] == 33
    cache = TokenCache(tmp_path / "run" / "tokens", verify=True)
    assert cache.meta["tokenizers"] != TokenCache(finished / "tokens").meta["tokenizers"]


def test_other_settings_start_sampling_anew(finished, tmp_path, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample.np, "savez", stop)  # all sampled, nothing saved
        with pytest.raises(SystemExit):
            sample.main(["--run", str(finished), "--num", "8", "--out", str(tmp_path / "a.npz")])
    assert (tmp_path / "a.npz.partial").is_dir()
    sample.main(["--run", str(finished), "--num", "8", "--seed", "1", "--out", str(tmp_path / "a.npz")])
    sample.main(["--run", str(finished), "--num", "8", "--seed", "1", "--out", str(tmp_path / "b.npz")])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_kills_anywhere_lose_nothing(finished, data, tmp_path):
    """SIGKILL at random moments of training and sampling; the end is that of an undisturbed run, to the last bit. (The long
    form of this test is `python tests/benchmark_scale.py kills`.)"""
    out, rng = tmp_path / "run", random.Random(0)
    training = ["train", "--preset", "tiny", "--data", str(data), "--out", str(out), "--steps", "30", "--save-every", "5"]
    sampling = ["sample", "--run", str(out), "--num", "40", "--out", str(tmp_path / "samples.npz")]
    for command, kills in ((training, 3), (sampling, 2)):
        for _ in range(kills):
            process = subprocess.Popen([sys.executable, TINY, *command], stdout=subprocess.DEVNULL)
            time.sleep(rng.uniform(2, 6))
            process.kill()
            assert process.wait() in (-signal.SIGKILL, 0)
        assert subprocess.run([sys.executable, TINY, *command], stdout=subprocess.DEVNULL).returncode == 0
    for stage in (1, 2):
        ours, undisturbed = load(out / f"stage{stage}.pt"), load(finished / f"stage{stage}.pt")
        assert all(torch.equal(ours["ema"][name], value) for name, value in undisturbed["ema"].items())
    for name in ("codes.npy", "moments.npy", "labels.npy"):
        assert (out / "tokens" / name).read_bytes() == (finished / "tokens" / name).read_bytes()
    sample.main(["--run", str(finished), "--num", "40", "--out", str(tmp_path / "undisturbed.npz")])
    assert (tmp_path / "samples.npz").read_bytes() == (tmp_path / "undisturbed.npz").read_bytes()


# Disk space ----------------------------------------------------------------------------------------------------------


def test_disk_space_is_checked_before_the_work(run, stage0, monkeypatch, capsys):
    monkeypatch.setattr(tokenizers.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    before = contents(run)
    refused(train.main, [*stage0[:-4], "--stage", "1", "--steps", "40"], capsys, run, "checkpoints need", "GB are free")
    refused(sample.main, ["--run", run, "--num", "50", "--out", run / "s.npz"], capsys, "s.npz", "samples, as they come and as one file, need")
    assert contents(run) == before
    shutil.rmtree(run / "tokens")
    refused(train.main, stage0, capsys, run / "tokens", "free space")
    assert not (run / "tokens").exists()


def test_a_full_disk_keeps_the_last_checkpoint(run, stage0, monkeypatch, capsys):
    write, before = torch.save, (run / "stage1.pt").read_bytes()

    def full(content, path):
        write(content, path)
        os.truncate(path, 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    refused(train.main, [*stage0[:-4], "--stage", "1", "--steps", "33"], capsys, "stage1.pt", "No space left", "free space")
    assert (run / "stage1.pt").read_bytes() == before and not list(run.glob("*.tmp*"))
    monkeypatch.undo()
    train.main([*stage0[:-4], "--stage", "1", "--steps", "33"])
    assert load(run / "stage1.pt")["step"] == 33


# Damage --------------------------------------------------------------------------------------------------------------


def test_unreadable_pictures_are_named_or_passed_over(pictures, tmp_path, capsys):
    command = ["--preset", "tiny", "--data", pictures, "--out", tmp_path / "run", "--steps", "2", "--batch-size", "2"]
    refused(train.main, command, capsys, pictures / "bee" / "1.png", "--skip-bad")
    train.main([str(word) for word in (*command, "--skip-bad")])
    assert "skipped 1 unreadable pictures of 6" in capsys.readouterr().out
    cache = TokenCache(tmp_path / "run" / "tokens", verify=True)
    assert cache.meta["skipped"] == [str(pictures / "bee" / "1.png")]
    assert cache.labels.tolist() == [0, 0, 1, -1, 2, 2] and cache.usable.tolist() == [0, 1, 2, 4, 5]


def test_16_bit_pictures_are_scaled_not_clipped(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "a" / "grey.png")
    assert (ImageFolder(tmp_path, 8)[0][0] == 128).all()


@pytest.mark.parametrize("name", ["tokens/codes.npy", "tokens/moments.npy", "tokens/labels.npy", "tokenizers.pt", "stage1.pt"])
def test_a_flipped_bit_does_not_pass(run, stage0, name, capsys):
    content = bytearray((run / name).read_bytes())
    content[len(content) * 2 // 3] ^= 1
    (run / name).write_bytes(content)
    refused(train.main, [*stage0[:-4], "--stage", "1", "--steps", "40"], capsys, (run / name).parent.name, "checksum")


def test_tokens_and_weights_of_other_tokenizers_do_not_pass(run, stage0, capsys):
    file = torch.load(run / "tokenizers.pt", weights_only=True)
    file["vq"]["quantize.embedding.weight"] += 1
    torch.save(file, run / "tokenizers.pt")
    refused(train.main, [*stage0[:-4], "--stage", "1", "--steps", "40"], capsys, run / "tokens", "was not made with")
    refused(sample.main, ["--run", run], capsys, "stage1.pt", "other tokenizers")


# What one looks at in between ----------------------------------------------------------------------------------------


def test_a_sweep_makes_one_file_per_guidance(finished, tmp_path):
    sample.main(["--run", str(finished), "--num", "8", "--sweep", "1,2.5", "--sweep1", "1.5", "--out", str(tmp_path / "s.npz")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-cfg1-1.5-cfg2-1.npz", "s-cfg1-1.5-cfg2-2.5.npz"]
    sample.main(["--run", str(finished), "--num", "8", "--cfg1", "1.5", "--cfg2", "2.5", "--out", str(tmp_path / "one.npz")])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "s-cfg1-1.5-cfg2-2.5.npz").read_bytes()


def test_sample_grids_while_training(run, stage0):
    before = load(run / "stage2.pt")
    train.main([*stage0[:-2], "--steps", "32", "--sample-every", "2"])
    for stage, rows in ((1, 2), (2, 3)):
        with Image.open(run / f"stage{stage}.png") as sheet:
            assert sheet.height == 20 + rows * 96 + 6
    assert before["step"] == 30 and load(run / "stage2.pt")["step"] == 32


def test_fusion_may_learn_faster(finished, data, tmp_path):
    def fusion_weights(*flags):
        out = tmp_path / "-".join(flags)
        shutil.copytree(finished, out)
        (out / "stage2.pt").unlink()
        train.main(["--preset", "tiny", "--out", str(out), "--stage", "2", "--steps", "1", *flags])
        file = load(out / "stage2.pt")["model"]
        return {kind: {name: value for name, value in file.items() if name.startswith(d2c.ContinuousGenerator.ADDED) == kind}
                for kind in (True, False)}

    plain, faster = fusion_weights("--fusion-lr", "1"), fusion_weights("--fusion-lr", "5")
    assert all(torch.equal(value, faster[False][name]) for name, value in plain[False].items())
    assert any(not torch.equal(value, faster[True][name]) for name, value in plain[True].items())
