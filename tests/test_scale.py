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

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import tokenizers
import train
from test_scripts import TINY, contents, load, refused
from tokenizers import ImageFolder
from train import TokenCache


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def stage0(data, tmp_path):
    """Arguments that train and encode in a folder of their own."""
    return ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "30", "--save-every",
            "5",
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
        if len(encoded) == 3:  # the first batch and its mirror image, then
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(tokenizers.VQTokenizer, "encode", encode_once)
    monkeypatch.setattr(train.time, "time", iter(range(0, 10**6, 10)).__next__)  # every batch is flushed at once
    with pytest.raises(SystemExit):
        train.main(stage0)
    assert not (tmp_path / "run" / "tokens" / "meta.json").exists()
    assert "unfinished" in refusal(lambda: TokenCache(tmp_path / "run" / "tokens"))
    encoded.append(0)
    train.main(stage0)
    assert encoded[4:] == [56, 56]  # 120 pictures are batches of 64 and 56
    assert "goes on after 64 of 120" in capsys.readouterr().out
    assert contents(tmp_path / "run" / "tokens") == contents(finished / "tokens")


def refusal(do):
    with pytest.raises(tokenizers.InputError) as error:
        do()
    return str(error.value)


def test_sampling_goes_on_where_it_was_cut_off(finished, tmp_path, monkeypatch, capsys):
    command = ["--run", str(finished), "--num", "40", "--out", str(tmp_path / "cut.npz")]
    sample.main([*command[:-1], str(tmp_path / "whole.npz")])
    batch, made = sample.Pipeline.batch, []

    def interrupted(self, labels, *rest, **more):
        made.append(len(labels))
        if len(made) == 3:
            raise KeyboardInterrupt
        return batch(self, labels, *rest, **more)

    monkeypatch.setattr(sample.Pipeline, "batch", interrupted)
    monkeypatch.setattr(train.time, "time", iter(range(0, 10**6, 10)).__next__)
    with pytest.raises(SystemExit):
        sample.main(command)
    assert not (tmp_path / "cut.npz").exists()
    capsys.readouterr()
    sample.main(command)
    assert made == [8] * 6 and "goes on after 16 of 40 pictures" in capsys.readouterr().out
    assert (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.npz", "whole.npz"]
    sample.main(command)
    assert made == [8] * 6 and "cut.npz is there already" in capsys.readouterr().out
    os.utime(finished / "stage2.pt")  # the same weights
    sample.main(command)
    assert made == [8] * 6
    other = torch.load(finished / "stage2.pt", weights_only=True)
    other["ema"]["z_proj.bias"] += 1
    Path(shutil.copytree(finished, tmp_path / "other"))
    torch.save(other, tmp_path / "other" / "stage2.pt")
    sample.main([command[0], str(tmp_path / "other"), *command[2:]])
    assert made == [8] * 11


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
    """SIGKILL at random moments of training and sampling; the end is that of an undisturbed run, to the last bit. (The
    long form of this test is `python tests/benchmark_scale.py kills`.)"""
    out, rng = tmp_path / "run", random.Random(0)
    training = ["train", "--preset", "tiny", "--data", str(data), "--out", str(out), "--steps", "30", "--save-every",
                "5"]
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
    cut, whole = (np.load(tmp_path / f"{name}.npz", allow_pickle=False)["arr_0"] for name in ("samples", "undisturbed"))
    assert np.array_equal(cut, whole)


# Disk space ----------------------------------------------------------------------------------------------------------


def test_room_for_the_arrays_is_taken_before_the_work(run, stage0, monkeypatch, capsys):
    """Under a memory map a full disk would kill the process."""
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = contents(run)
    refused(sample.main, ["--run", run, "--num", "50", "--out", run / "s.npz"], capsys, "s.npz", "No space left",
            "free space")
    assert contents(run) == before
    shutil.rmtree(run / "tokens")
    refused(train.main, stage0, capsys, run / "tokens", "free space")
    assert not contents(run / "tokens")


def test_a_full_disk_keeps_the_last_checkpoint(run, stage0, monkeypatch, capsys):
    write, before = torch.save, (run / "stage1.pt").read_bytes()

    def full(content, path):
        write(content, path)
        os.truncate(path, 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    refused(train.main, [*stage0[:-4], "--stage", "1", "--steps", "33"], capsys, "stage1.pt", "No space left",
            "free space")
    assert (run / "stage1.pt").read_bytes() == before and not list(run.glob("*.tmp*"))
    monkeypatch.undo()
    train.main([*stage0[:-4], "--stage", "1", "--steps", "33"])
    assert load(run / "stage1.pt")["step"] == 33


# Damage --------------------------------------------------------------------------------------------------------------


def test_unreadable_pictures_are_named(pictures, tmp_path, capsys):
    command = ["--preset", "tiny", "--data", pictures, "--out", tmp_path / "run", "--steps", "2", "--batch-size", "2"]
    refused(train.main, command, capsys, pictures / "bee" / "1.png", "repair or remove")


def test_16_bit_pictures_are_scaled_not_clipped(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "a" / "grey.png")
    assert (ImageFolder(tmp_path, 8)[0][0] == 128).all()


def test_tokens_and_weights_of_other_tokenizers_do_not_pass(run, stage0, capsys):
    file = torch.load(run / "tokenizers.pt", weights_only=True)
    file["id"] = "another"
    torch.save(file, run / "tokenizers.pt")
    refused(train.main, [*stage0[:-4], "--stage", "1", "--steps", "40"], capsys, run / "tokens", "was not made with")
    refused(sample.main, ["--run", run], capsys, "stage1.pt", "other tokenizers")


def test_the_id_of_tokenizers_is_that_of_their_weights(run, stage0):
    """Made anew, the same tokenizers have the same id: tokens and generators still belong to them."""
    before = load(run / "tokenizers.pt")
    (run / "tokenizers.pt").unlink()
    shutil.rmtree(run / "tokens")
    train.main(stage0)
    assert load(run / "tokenizers.pt")["id"] == before["id"] == load(run / "stage2.pt")["tokenizers"]
    sample.main(["--run", str(run), "--num", "2"])
