"""The stand-ins: what they may read, the layout they learn, and that they load as checkpoints of the hub do."""

import random
import shutil

import numpy
import pytest
import soundfile
import torch

from recipes.Demo import bootstrap as cli
from recipes.Demo import perturb
from recipes.Demo.corpus import load_corpus
from recipes.Demo.stand_in_decoder import decoder_settings, forward, train_decoder
from recipes.Demo.stand_in_encoder import SAMPLE_RATE, Audio, encoder_settings, mel_filters
from recipes.Demo.stand_in_labels import CtcObjective, FrameObjective
from recipes.Demo.stand_in_text import IGNORED, SlamText, text_source, train_tokenizer
from speechllm_prune.models.decoder import load_decoder, resolve_token_ids
from speechllm_prune.models.encoder import load_encoder
from speechllm_prune.runtime import UserError

PROMPT = "Transcribe speech to text."
DIGITS = "zero one two three four five six seven eight nine".split()


def write_split(root, split, texts, rng):
    chapter = root / split / "7" / f"7{len(split)}"
    chapter.mkdir(parents=True)
    lines = []
    for number, text in enumerate(texts):
        uttid = f"7-7{len(split)}-{number:04d}"
        samples = rng.normal(0, 0.1, SAMPLE_RATE // 2 + 400 * number)
        soundfile.write(chapter / f"{uttid}.flac", samples, SAMPLE_RATE)
        lines.append(f"{uttid} {text.upper()}\n")
    (chapter / f"7-7{len(split)}.trans.txt").write_text("".join(lines))


@pytest.fixture
def corpus_folder(tmp_path):
    """Digit strings as noise: train 12, dev 3, test 3 utterances."""
    rng = numpy.random.default_rng(1)
    texts = [f"{a} {b}" for a in DIGITS[:3] for b in DIGITS[3:9]]
    root = tmp_path / "corpus" / "LibriSpeech"
    write_split(root, "train-clean-100", texts[:12], rng)
    write_split(root, "dev-clean", texts[12:15], rng)
    write_split(root, "test-clean", texts[15:], rng)
    return root.parent


def small_decoder(corpus, family="qwen2", **changes):
    architecture = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    settings = decoder_settings(corpus, family, PROMPT, seed=1)
    architecture = settings["architecture"] | architecture
    return settings | {"architecture": architecture, "steps": 2, "held_out": 10} | changes


# ------------------------------------------------------------ what may be read
def test_evaluation_transcripts_never_reach_the_decoder(corpus_folder, monkeypatch):
    """Every text that a batch is made of, over a vocabulary so small that random strings would hit them."""
    corpus = load_corpus(corpus_folder)
    assert len(corpus.held_back) == 6
    read = []
    original = SlamText.__call__

    def spy(self, text, rng, plain=None):
        read.append(text)
        return original(self, text, rng, plain)

    monkeypatch.setattr(SlamText, "__call__", spy)
    train_decoder(corpus, small_decoder(corpus), corpus_folder / "models")
    assert len(read) > 200
    assert not set(read) & corpus.held_back
    assert {text for _, text in corpus.train.values()} & set(read)


def test_held_out_texts_are_not_trained_on(corpus_folder, monkeypatch):
    corpus = load_corpus(corpus_folder)
    calls = []
    original = SlamText.__call__

    def spy(self, text, rng, plain=None):
        calls.append((text, plain))
        return original(self, text, rng, plain)

    monkeypatch.setattr(SlamText, "__call__", spy)
    train_decoder(corpus, small_decoder(corpus), corpus_folder / "models")
    trained = {text for text, plain in calls if plain is None}
    held_out = {text for text, plain in calls if plain is False}
    assert held_out and trained
    assert not trained & held_out


def test_text_file_loses_the_lines_that_are_spoken_elsewhere(corpus_folder):
    (corpus_folder / "lm_text.txt").write_text("one two three\nTWO TWO\ntwo eight\n\n")
    corpus = load_corpus(corpus_folder)
    assert "two eight" in corpus.held_back
    assert corpus.decoder_text() == ["one two three", "two two"]


def test_random_strings_respect_vocabulary_lengths_and_ban():
    draw = text_source([], ["a", "b"], [1, 2], {"a", "b b"}, 1.0)
    rng = random.Random(1)
    assert {draw(rng) for _ in range(200)} == {"b", "a a", "a b", "b a"}


# ------------------------------------------------------------ the layout
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_layout_is_that_of_the_library(family):
    from speechllm_prune.data.prompt import encode_target

    tokenizer = train_tokenizer(DIGITS, PROMPT, family, 1000)
    layout = SlamText(tokenizer, PROMPT, stretch=[1.0], pause=0.0, plain_share=0.0)
    ids, labels, speech = layout("seven one", random.Random(1))
    prompt = tokenizer(PROMPT, add_special_tokens=False).input_ids
    target = encode_target(tokenizer, "SEVEN ONE", "lower")
    assert len(target) == 2, "every word is one token"
    assert ids[speech:] == prompt + target
    # S + P + N inputs and N + 1 label rows: the last prompt token predicts the first target token, eos comes last.
    first = speech + len(prompt) - 1
    assert labels == [IGNORED] * first + target + [tokenizer.eos_token_id]
    assert len(ids) == len(labels)
    assert tokenizer.eos_token_id not in ids


def test_stretching_keeps_the_words_and_parts_equal_neighbours():
    tokenizer = train_tokenizer(DIGITS, PROMPT, "qwen2", 1000)
    layout = SlamText(tokenizer, PROMPT, [0.4, 0.3, 0.2, 0.1], pause=0.4, plain_share=0.0)
    rng = random.Random(3)
    for _ in range(300):
        words = rng.choices(DIGITS[:3], k=4)
        ids = layout.stretched(words, rng)
        runs = [ids[0]] + [b for a, b in zip(ids, ids[1:], strict=False) if a != b]
        spoken = [token for token in runs if token != layout.pause_id]
        assert [tokenizer.decode(token).strip() for token in spoken] == words


def test_right_padding_does_not_change_logits(corpus_folder):
    corpus = load_corpus(corpus_folder)
    settings = small_decoder(corpus)
    train_decoder(corpus, settings, corpus_folder / "models")
    model, tokenizer = load_decoder(str(corpus_folder / "models" / "trained"))
    layout = SlamText(tokenizer, PROMPT, [1.0], 0.0, 0.0)
    short = layout("one", random.Random(1))
    long = layout("one two three four five", random.Random(1))
    alone, _ = forward(model, [short], noise=0.0)
    together, _ = forward(model, [short, long], noise=0.0)
    torch.testing.assert_close(together[: len(alone)], alone)


# ------------------------------------------------------------ checkpoints as from the hub
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_prompt_ids_are_equal_before_saving_and_after_loading(corpus_folder, family):
    """AutoTokenizer may return another class for a folder with a config.json, and split words anew, silently."""
    corpus = load_corpus(corpus_folder)
    settings = small_decoder(corpus, family)
    before = train_tokenizer(corpus.words, PROMPT, family, settings["vocab_size"])
    assert cli.bootstrap("decoder", corpus, corpus_folder / "models", settings, fresh=False)
    for name in ("decoder", "decoder_random"):
        decoder, after = load_decoder(str(corpus_folder / "models" / name))
        assert decoder.config.model_type == family
        for text in (PROMPT, "two eight", "zero one two three", " six"):
            ids = after(text, add_special_tokens=False).input_ids
            assert ids == before(text, add_special_tokens=False).input_ids
            assert after.decode(ids) == text
        roles = resolve_token_ids(decoder, after)
        assert roles.eos == before.eos_token_id
        assert roles.stop == frozenset({roles.eos})
        assert (roles.bos is None) == (family == "qwen2")
        assert after.bos_token_id not in after(PROMPT, add_special_tokens=False).input_ids


def test_random_decoder_is_the_untrained_start(corpus_folder):
    corpus = load_corpus(corpus_folder)
    cli.bootstrap("decoder", corpus, corpus_folder / "models", small_decoder(corpus), fresh=False)
    trained, _ = load_decoder(str(corpus_folder / "models" / "decoder"))
    untrained, _ = load_decoder(str(corpus_folder / "models" / "decoder_random"))
    configs = [model.config.to_dict() | {"_name_or_path": ""} for model in (trained, untrained)]
    assert configs[0] == configs[1]
    pairs = zip(trained.parameters(), untrained.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("labels", ["frames", "ctc"])
def test_encoder_loads_and_frames_are_50_hz(corpus_folder, labels):
    if labels == "frames":
        add_labels(corpus_folder)
    corpus = load_corpus(corpus_folder)
    settings = encoder_settings(labels, seed=1) | {"steps": 2, "batch_size": 4}
    assert cli.bootstrap("encoder", corpus, corpus_folder / "models", settings, fresh=False)
    encoder = load_encoder(str(corpus_folder / "models" / "encoder"))
    assert encoder.do_normalize
    wav = torch.randn(1, 2 * SAMPLE_RATE)
    features, lengths = encoder(wav, [wav.shape[1]])
    assert abs(lengths[0] - 100) <= 2
    assert features.shape == (1, lengths[0], 128)


def add_labels(folder):
    import json

    corpus = load_corpus(folder)
    with open(folder / "frame_labels.jsonl", "w") as stream:
        for uttid, (_, text) in corpus.train.items():
            first, second = text.split()
            row = {
                "id": uttid,
                "phonemes": [["a", 0.0], ["b", 0.2], ["_", 0.4]],
                "words": [[first, 0.0], [second, 0.2]],
            }
            stream.write(json.dumps(row) + "\n")


# ------------------------------------------------------------ objectives
@pytest.mark.parametrize("speed", [1.0, 1.25])
def test_frame_labels_follow_the_clock(corpus_folder, speed):
    add_labels(corpus_folder)
    corpus = load_corpus(corpus_folder)
    objective = FrameObjective(corpus, width=8)
    uttid = next(iter(corpus.train))
    tracks = objective.labels(uttid, 25, speed)
    names = {kind: list(classes) for kind, classes in objective.classes.items()}
    words = corpus.train[uttid][1].split()
    for frame in range(25):
        seconds = (0.02 * frame + 0.0125) * speed
        phoneme = "a" if seconds < 0.2 else "b" if seconds < 0.4 else "_"
        word = words[0] if seconds < 0.2 else words[1] if seconds < 0.4 else ""
        assert names["phonemes"][tracks["phonemes"][frame]] == phoneme
        assert names["words"][tracks["words"][frame]] == word


def test_ctc_units_are_words_where_there_are_few_else_characters(corpus_folder, monkeypatch):
    corpus = load_corpus(corpus_folder)
    assert set(CtcObjective(corpus, 8).ids) == set(corpus.words)
    monkeypatch.setattr("recipes.Demo.stand_in_labels._MAX_WORD_UNITS", 3)
    characters = CtcObjective(corpus, 8)
    assert characters.unit == "characters"
    assert set(characters.ids) == set("".join(corpus.words)) | {" "}


def test_ctc_loss_is_small_and_match_is_full_for_the_right_path(corpus_folder):
    corpus = load_corpus(corpus_folder)
    uttid, (_, text) = next(iter(corpus.train.items()))
    units = len(corpus.words)
    objective = CtcObjective(corpus, width=units + 1)
    with torch.no_grad():
        objective.head.weight.copy_(4 * torch.eye(units + 1).repeat(1, objective.stack))
        objective.head.bias.zero_()
    path = [0, *(objective.ids[word] for word in text.split()), 0]
    path = [unit for unit in path for _ in range(objective.stack)]  # one stack a unit
    features = torch.eye(units + 1)[torch.tensor(path)][None]
    loss, figures = objective(features, [len(path)], [uttid], 1.0)
    assert loss.item() < 1e-3
    assert figures["words_exact_match"] == 1.0


def test_augmented_rows_sound_different_and_keep_length_and_power(corpus_folder):
    settings = encoder_settings("ctc", 1)
    audio = Audio(load_corpus(corpus_folder), settings)
    uttid = audio.train[0]
    torch.manual_seed(0)
    wavs, lengths, speed = audio.waveforms([uttid, uttid], augment=True)
    assert speed[0] != speed[1]
    assert lengths == [int(len(audio.wavs[uttid]) / factor) for factor in speed]
    torch.testing.assert_close(
        wavs.square().mean(1), torch.tensor(lengths) / wavs.shape[1], rtol=1e-3, atol=1e-3
    )
    spectra = torch.fft.rfft(wavs).abs().log()
    assert (spectra[0] - spectra[1]).abs().mean() > 0.3  # two timbres of one recording
    plain, plain_lengths, _ = audio.waveforms([uttid, uttid], augment=False)
    assert torch.equal(plain[0], plain[1]) and plain_lengths[0] == len(audio.wavs[uttid])


def test_mel_filters_answer_to_their_own_frequency():
    weight = torch.empty(160, 1, 400)
    mel_filters(weight)
    times = torch.arange(4000) / SAMPLE_RATE
    peaks = []
    for hertz in (200.0, 500.0, 1000.0, 2000.0, 4000.0, 7000.0):
        tone = torch.sin(2 * torch.pi * hertz * times)[None, None]
        energy = torch.nn.functional.conv1d(tone, weight).square().mean(-1)[0]  # (160,)
        peaks.append(energy.view(40, 4).sum(1).argmax().item())
    assert peaks == sorted(peaks) and len(set(peaks)) == len(peaks)
    assert peaks[0] < 6 and peaks[-1] > 35


# ------------------------------------------------------------ caching and the command
def test_a_finished_model_is_kept_and_a_changed_corpus_makes_a_new_one(corpus_folder):
    corpus, models = load_corpus(corpus_folder), corpus_folder / "models"
    settings = small_decoder(corpus)
    assert cli.bootstrap("decoder", corpus, models, settings, fresh=False)
    assert not cli.bootstrap("decoder", corpus, models, settings, fresh=False)
    assert cli.bootstrap("decoder", corpus, models, settings, fresh=True)
    assert cli.bootstrap("decoder", corpus, models, settings | {"lr": 1e-4}, fresh=False)
    shutil.rmtree(models / "decoder_random")
    assert cli.bootstrap("decoder", corpus, models, settings | {"lr": 1e-4}, fresh=False)
    (transcripts,) = (corpus_folder / "LibriSpeech" / "test-clean").rglob("*.trans.txt")
    transcripts.write_text(transcripts.read_text() + "7-710-0099 NINE NINE\n")
    corpus = load_corpus(corpus_folder)
    assert cli.bootstrap("decoder", corpus, models, settings | {"lr": 1e-4}, fresh=False)


def test_same_seed_gives_the_same_weights(corpus_folder):
    corpus = load_corpus(corpus_folder)
    for name in ("first", "second"):
        cli.bootstrap("decoder", corpus, corpus_folder / name, small_decoder(corpus), fresh=False)
    first, second = (
        (corpus_folder / name / "decoder" / "model.safetensors").read_bytes()
        for name in ("first", "second")
    )
    assert first == second


def test_interruption_keeps_the_old_model_and_leaves_no_rest(corpus_folder, monkeypatch):
    corpus, models = load_corpus(corpus_folder), corpus_folder / "models"
    cli.bootstrap("decoder", corpus, models, small_decoder(corpus), fresh=False)
    before = (models / "decoder" / "model.safetensors").read_bytes()

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.Demo.stand_in_decoder.exact_match", fail)
    with pytest.raises(KeyboardInterrupt):
        cli.bootstrap("decoder", corpus, models, small_decoder(corpus, lr=1e-4), fresh=False)
    assert sorted(path.name for path in models.iterdir()) == ["decoder", "decoder_random"]
    assert (models / "decoder" / "model.safetensors").read_bytes() == before


def test_mistakes_exit_with_two(corpus_folder, tmp_path, capsys):
    arguments = ["--stand_ins", str(tmp_path / "models")]
    assert cli.main(["encoder", "--corpus", str(tmp_path / "nothing"), *arguments]) == 2
    assert "does not exist" in capsys.readouterr().err
    shutil.rmtree(corpus_folder / "LibriSpeech" / "train-clean-100")
    assert cli.main(["decoder", "--corpus", str(corpus_folder), *arguments]) == 2
    assert "train-clean-100 is needed" in capsys.readouterr().err


def test_frames_without_labels_is_a_user_error(corpus_folder):
    corpus = load_corpus(corpus_folder)
    with pytest.raises(UserError, match="--labels ctc"):
        FrameObjective(corpus, 8)


# ------------------------------------------------------------ copies at other speeds
def test_copies_at_other_speeds(corpus_folder, tmp_path, capsys):
    out = tmp_path / "copies"
    arguments = [str(corpus_folder), str(out), "--speeds", "0.8,1.25"]
    assert perturb.main(arguments) == 0
    corpus, copies = load_corpus(corpus_folder), load_corpus(out)
    assert copies.splits == ["train-speed-080", "train-speed-125"]
    assert len(copies.train) == 2 * len(corpus.train) and not copies.held_back
    for name, (path, text) in corpus.train.items():
        length = soundfile.info(path).duration
        for percent in (80, 125):
            copy, copied_text = copies.train[f"{name}-speed{percent:03d}"]
            assert copied_text == text
            assert soundfile.info(copy).duration == pytest.approx(100 * length / percent, abs=0.01)
    before = (out / "perturb.json").stat().st_mtime_ns
    assert perturb.main(arguments) == 0 and "already there" in capsys.readouterr().out
    assert (out / "perturb.json").stat().st_mtime_ns == before


def test_a_faster_copy_is_higher(tmp_path):
    """Resampled, not cut: a tone of 500 Hz is one of 625 Hz at 1.25 times the speed."""
    root = tmp_path / "corpus" / "LibriSpeech"
    write_split(root, "train-clean-100", ["one"], numpy.random.default_rng(1))
    (file,) = root.rglob("*.flac")
    times = numpy.arange(SAMPLE_RATE) / SAMPLE_RATE
    soundfile.write(file, 0.5 * numpy.sin(2 * numpy.pi * 500 * times), SAMPLE_RATE)
    assert perturb.main([str(root), str(tmp_path / "copies"), "--speeds", "1.25"]) == 0
    (copy,) = (tmp_path / "copies").rglob("*.flac")
    samples, _ = soundfile.read(copy)
    peak = numpy.abs(numpy.fft.rfft(samples)).argmax() * SAMPLE_RATE / len(samples)
    assert peak == pytest.approx(625, abs=3)


@pytest.mark.parametrize("speeds", ["fast", "1.0", "3", "0.9,"])
def test_bad_speeds_are_refused(corpus_folder, tmp_path, speeds, capsys):
    out = tmp_path / "copies"
    assert perturb.main([str(corpus_folder), str(out), "--speeds", speeds]) == 2
    assert "--speeds" in capsys.readouterr().err and not out.exists()
