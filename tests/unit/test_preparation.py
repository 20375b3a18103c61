"""What the prepare scripts share: bad audio, text files, splits that overlap, and errors of loading."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recipes.LibriSpeech.librispeech_prepare import prepare_librispeech
from speechllm_prune.data.audio import AudioInfo, BadAudio, probe_audio
from speechllm_prune.data.manifest import Row, read_manifest
from speechllm_prune.data.pipeline import Utterances, _Loader, read_audio, read_utterance
from speechllm_prune.data.preparation import SplitBuilder, text_lines
from speechllm_prune.runtime import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def noise(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """Noise that no coder packs into nothing."""
    return 0.1 * np.random.default_rng(0).standard_normal((int(seconds * rate), channels))


def encoded(samples: np.ndarray, rate: int, **options: str) -> bytes:
    """An audio file in memory."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------- audio
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_nan_samples_are_noticed_at_preparation(value: float, subtype: str) -> None:
    samples = noise(0.5)
    samples[-1] = value  # in the last sample
    with pytest.raises(BadAudio, match="^NaN or infinite samples$"):
        probe_audio(encoded(samples, 16000, format="WAV", subtype=subtype))
    samples[-1] = 0.0
    assert probe_audio(encoded(samples, 16000, format="WAV", subtype=subtype)).frames == 8000


def test_a_git_lfs_pointer_has_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_text(POINTER)
    for source in (tmp_path / "a.flac", POINTER.encode()):
        with pytest.raises(BadAudio, match="git-lfs pointer instead of audio"):
            probe_audio(source)
    with pytest.raises(UserError, match="a.flac is a git-lfs pointer.*git lfs pull"):
        text_lines(tmp_path / "a.flac", POINTER.encode())


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3"])
def test_bytes_and_files_are_probed_alike(tmp_path: Path, form: str) -> None:
    content = encoded(noise(1.0, 44100, 2), 44100, format=form)
    (tmp_path / "a").write_bytes(content)
    assert probe_audio(content) == probe_audio(tmp_path / "a") == AudioInfo(44100, 44100, 2)
    for share in (0.3, 0.9):
        with pytest.raises(BadAudio, match="truncated|unreadable"):
            probe_audio(content[: int(len(content) * share)])
    for nothing in (b"", b"RIFF", b"<html>404</html>"):
        with pytest.raises(BadAudio, match="unreadable audio"):
            probe_audio(nothing)


def test_a_damaged_mp3_is_unreadable() -> None:
    content = bytearray(encoded(noise(10.0), 16000, format="MP3"))
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    with pytest.raises(BadAudio, match="damaged|truncated"):
        probe_audio(bytes(content))


def test_the_length_of_an_mp3_is_that_of_its_samples(shared_data: Path) -> None:
    for path in sorted((shared_data / "covost_mini").rglob("*.mp3")):
        assert probe_audio(path).frames == len(soundfile.read(path)[0])


def test_audio_without_a_frame_is_too_short() -> None:
    with pytest.raises(BadAudio, match="shorter than 25 ms"):
        probe_audio(encoded(noise(0.02), 16000, format="WAV"))
    assert probe_audio(encoded(noise(0.025), 16000, format="WAV")).frames == 400


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2), (48000, 1)])
def test_any_rate_and_channels_become_mono_at_16_khz(
    tmp_path: Path, rate: int, channels: int
) -> None:
    times = np.arange(rate) / rate
    tone = np.stack([0.3 * np.sin(2 * np.pi * 440 * times)] * channels, axis=1)
    soundfile.write(tmp_path / "a.wav", tone, rate, subtype="FLOAT")
    wav = read_audio(tmp_path / "a.wav")
    assert wav.shape == (16000,) and wav.dtype == torch.float32
    expected = 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    assert torch.allclose(wav[200:-200], expected[200:-200], atol=5e-3)


# -------------------------------------------------------------------------------------------- text
def test_only_line_ends_end_a_line() -> None:
    assert text_lines("x", "a\u2028b\x0cc\x85d\r\ne\rf\n".encode()) == [
        "a\u2028b\x0cc\x85d",
        "e",
        "f",
        "",
    ]
    with pytest.raises(UserError, match="x.tsv, line 2: not UTF-8"):
        text_lines("x.tsv", b"ok\ncaf\xe9\n")


# ----------------------------------------------------------------------------------------- overlap
def builder(name: str, *rows: tuple[str, str], root: Path) -> SplitBuilder:
    """A split of (id, wav)."""
    split = SplitBuilder(name, root, "f")
    for utterance, wav in rows:
        split.add(Row(utterance, 0.0, wav, "text"), AudioInfo(16000, 16000, 1))
    return split


@pytest.mark.parametrize("rows", [[("a", "y.wav"), ("c", "z.wav")], [("c", "x.wav")]])
@pytest.mark.parametrize("order", [("train-5", "test"), ("test", "train-5")])
def test_what_is_in_train_and_test_is_refused_and_listed(
    tmp_path: Path, capsys, rows: list[tuple[str, str]], order: tuple[str, str]
) -> None:
    """By the id or by the audio file, whichever split comes first."""
    contents = {order[0]: [("a", "x.wav"), ("b", "w.wav")], order[1]: rows}
    builder(order[0], *contents[order[0]], root=tmp_path).write(tmp_path / "m", 0.01)
    with pytest.raises(UserError, match=f"'{order[1]}': 1 utterances are in .*{order[0]}.csv too"):
        builder(order[1], *rows, root=tmp_path).write(tmp_path / "m", 0.01)
    assert not (tmp_path / "m" / f"{order[1]}.json").exists()
    with open(tmp_path / "m" / f"{order[1]}.skipped.csv", newline="") as stream:
        listed = list(csv.DictReader(stream))
    assert [(row["id"], row["reason"]) for row in listed] == [(rows[0][0], f"also in {order[0]}")]


def test_splits_of_one_kind_may_overlap(tmp_path: Path, capsys) -> None:
    """Mini LibriSpeech lies beside what it was taken from: train-clean-5, train-clean-100."""
    for name in ("train-clean-5", "train-clean-100"):
        builder(name, ("a", "x.wav"), root=tmp_path).write(tmp_path / "m", 0.01)
    assert len(list((tmp_path / "m").glob("*.json"))) == 2


def test_overlap_in_a_corpus(tiny_corpus: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_corpus / "LibriSpeech", tmp_path / "LibriSpeech")
    dev, train = (tmp_path / "LibriSpeech" / name for name in ("dev-clean", "train-clean-100"))
    speaker = next(path for path in sorted(dev.iterdir()) if path.is_dir())
    shutil.copytree(speaker, train / speaker.name, dirs_exist_ok=True)
    with pytest.raises(UserError, match="'train-clean-100': .* utterances are in .*dev-clean.csv"):
        prepare_librispeech(tmp_path, tmp_path / "m")


def test_missing_splits_are_named(tiny_corpus: Path, tmp_path: Path, capsys) -> None:
    prepare_librispeech(tiny_corpus, tmp_path)
    assert (
        "not in" in (said := capsys.readouterr().out)
        and "train-clean-360, train-other-500, dev-other\n" in said
    )
    prepare_librispeech(tiny_corpus, tmp_path, ["dev-clean"])
    assert "not in" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- loading
class Broken(torch.utils.data.Dataset):
    """A data set whose second item is a user's mistake."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_utterance(self.row) if index else torch.zeros(1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_audio_that_broke_since_preparation_is_one_message_with_the_id(
    tmp_path: Path, num_workers: int
) -> None:
    """Also out of a worker process, whose traceback torch puts into the message."""
    samples = noise(0.5)
    samples[7] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    loader = _Loader(Broken(Row("u-1", 0.5, str(tmp_path / "a.wav"), "x")), num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith("utterance u-1: ") and "NaN or infinite samples" in message
    assert "Traceback" not in message and "\n" not in message
    assert isinstance(Utterances([], Broken, []).loader([]), _Loader)  # type: ignore[arg-type]


def test_skipped_nan_is_listed(tiny_corpus: Path, tmp_path: Path, capsys) -> None:
    import shutil

    shutil.copytree(tiny_corpus / "LibriSpeech", tmp_path / "LibriSpeech")
    first, second, *_ = sorted((tmp_path / "LibriSpeech/dev-clean").rglob("*.flac"))
    samples, rate = soundfile.read(first)
    samples[0] = np.nan
    os.unlink(first)
    soundfile.write(first.with_suffix(".wav"), samples, rate, subtype="FLOAT")
    second.write_text(POINTER)
    summary = prepare_librispeech(tmp_path, tmp_path / "m", ["dev-clean"], max_bad_share=0.5)
    assert summary["dev-clean"]["counts"]["skipped"] == {
        "NaN or infinite samples": 1,
        "git-lfs pointer instead of audio": 1,
    }
    assert len(read_manifest(tmp_path / "m/dev-clean.csv")) == 2
    assert "skipped: 1 NaN or infinite samples" in capsys.readouterr().out
