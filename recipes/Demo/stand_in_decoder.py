"""Train the stand-in for a pretrained LLM: a tiny Qwen2 or Llama that can copy stretched, noisy words."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from recipes.Demo.corpus import Corpus
from recipes.Demo.stand_in_text import IGNORED, SlamText, text_source, train_tokenizer
from speechllm_prune.runtime import derive_seed, raise_if_stopped

ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "version": 1,  # raise it when the code below, or stand_in_text.py, changes what is trained
    "architecture": ARCHITECTURE,
    "vocab_size": 2000,
    "embedding_std": 0.2,  # about what a freshly initialised projector puts out
    "batch_size": 32,
    "lr": 2e-3,
    "warmup_steps": 50,
    "betas": [0.9, 0.98],
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_words": 40,
    "held_out": 200,
}
# With sentences of the domain at hand, and without: random strings over the train vocabulary, for an encoder that CTC
# has taught. That marks a word in one or two stacks, with long pauses between, and its projector puts out loud vectors.
SENTENCES = {
    "steps": 280,
    "random_share": 0.0,
    "repeat_share": 0.0,
    "plain_share": 0.1,
    "stretch": [0.4, 0.3, 0.2, 0.1],
    "pause": 0.15,
    "max_pauses": 3,
    "embedding_noise": 0.4,  # times the RMS of the embeddings
    "max_gain": 1.0,
}
STRINGS = {
    "steps": 1000,
    "random_share": 0.7,
    "repeat_share": 0.15,
    "plain_share": 0.0,
    "stretch": [0.7, 0.3],
    "pause": 0.75,
    "max_pauses": 8,
    "embedding_noise": 0.7,
    "max_gain": 8.0,
}


def decoder_settings(corpus: Corpus, family: str, prompt: str, seed: int) -> dict:
    """Everything that decides the weights, apart from the corpus files."""
    mode = SENTENCES if corpus.text_file else STRINGS
    return SETTINGS | mode | {"family": family, "prompt": prompt, "seed": seed}


def build_decoder(settings: dict, tokenizer) -> nn.Module:
    """A decoder of the family with random weights.

    Arguments
    ---------
    settings : dict
        Of :func:`decoder_settings`.
    tokenizer : PreTrainedTokenizer
        Gives vocabulary size and special ids.

    Returns
    -------
    transformers.PreTrainedModel
        ``Qwen2ForCausalLM`` or ``LlamaForCausalLM``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    classes = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_class, model_class = classes[settings["family"]]
    model = model_class(
        config_class(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings["architecture"],
        )
    )
    nn.init.normal_(model.get_input_embeddings().weight, std=settings["embedding_std"])
    return model


class Batches:
    """Endless batches of examples, cut from pools sorted by length so that little is padding.

    Arguments
    ---------
    draw : callable
        ``draw(rng) -> text``.
    layout : SlamText
        Text to ids and labels.
    batch_size : int
        Examples in a batch.
    seed : int
        Seed of texts and stretching.
    """

    def __init__(
        self, draw: Callable[[random.Random], str], layout: SlamText, batch_size: int, seed: int
    ) -> None:
        self.draw, self.layout, self.batch_size = draw, layout, batch_size
        self.rng = random.Random(seed)
        self.pool: list[list[tuple[list[int], list[int], int]]] = []

    def __call__(self) -> list[tuple[list[int], list[int], int]]:
        """The next batch."""
        if not self.pool:
            examples = [
                self.layout(self.draw(self.rng), self.rng) for _ in range(8 * self.batch_size)
            ]
            examples.sort(key=lambda example: len(example[0]))
            starts = range(0, len(examples), self.batch_size)
            self.pool = [examples[start : start + self.batch_size] for start in starts]
            self.rng.shuffle(self.pool)
        return self.pool.pop()


def forward(
    model, examples: list, noise: float, max_gain: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the label rows of a batch.

    Arguments
    ---------
    model : transformers.PreTrainedModel
        The decoder.
    examples : list
        Of :class:`SlamText`.
    noise : float
        Noise on the speech positions, times the RMS of the embeddings.
    max_gain : float
        Speech positions of each example are louder than embeddings by a random factor up to this.

    Returns
    -------
    Tensor, Tensor
        (rows, vocabulary) logits and (rows,) labels.
    """
    longest = max(len(ids) for ids, _, _ in examples)
    # Padded on the right: causal attention keeps it from every real position, so no mask is needed.
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _, _ in examples])
    labels = torch.tensor([lab + [IGNORED] * (longest - len(lab)) for _, lab, _ in examples])
    speech = torch.arange(longest) < torch.tensor([n for _, _, n in examples])[:, None]  # (B, T)
    table = model.get_input_embeddings()
    embeddings = table(ids)
    if noise:
        rms = table.weight.detach().square().mean().sqrt()
        embeddings = embeddings + speech[..., None] * torch.randn_like(embeddings) * (noise * rms)
    if max_gain > 1.0:
        gains = max_gain ** torch.rand(len(ids), 1, 1)
        embeddings = torch.where(speech[..., None], gains * embeddings, embeddings)
    hidden = model.get_decoder()(inputs_embeds=embeddings).last_hidden_state
    rows = labels != IGNORED
    return model.get_output_embeddings()(hidden[rows]), labels[rows]


@torch.no_grad()
def exact_match(model, examples: list, noise: float) -> float:
    """Share of examples whose every label is the most likely token, i.e. that greedy decoding gets right."""
    model.eval()
    right = 0
    for start in range(0, len(examples), 50):
        part = examples[start : start + 50]
        logits, labels = forward(model, part, noise)
        correct = logits.argmax(-1) == labels
        sizes = [sum(label != IGNORED for label in labels) for _, labels, _ in part]
        right += sum(bool(rows.all()) for rows in correct.split(sizes))
    model.train()
    return right / len(examples)


def train_decoder(corpus: Corpus, settings: dict, folder: Path) -> dict:
    """Train a decoder and save it, with its tokenizer, as a checkpoint of the hub would be.

    Arguments
    ---------
    corpus : Corpus
        Gives the text; evaluation transcripts are excluded.
    settings : dict
        Of :func:`decoder_settings`.
    folder : Path
        Where to save: ``trained`` and ``random`` below it.

    Returns
    -------
    dict
        Figures for bootstrap.json.
    """
    torch.manual_seed(derive_seed(settings["seed"], "stand-in decoder"))
    sentences = corpus.decoder_text() or [text for _, text in corpus.train.values()]
    words = sorted({word for text in sentences for word in text.split()} | set(corpus.words))
    tokenizer = train_tokenizer(
        words, settings["prompt"], settings["family"], settings["vocab_size"]
    )
    layout = SlamText(
        tokenizer,
        settings["prompt"],
        settings["stretch"],
        settings["pause"],
        settings["plain_share"],
        settings["max_pauses"],
    )
    lengths = [min(len(text.split()), settings["max_words"]) for _, text in corpus.train.values()]
    shares = (settings["random_share"], settings["repeat_share"])
    draw_any = text_source(sentences, words, lengths, corpus.held_back, *shares)
    held_rng = random.Random(derive_seed(settings["seed"], "held-out text"))
    held_out = [draw_any(held_rng) for _ in range(settings["held_out"])]
    draw = text_source(sentences, words, lengths, corpus.held_back | set(held_out), *shares)
    model = build_decoder(settings, tokenizer)
    model.save_pretrained(folder / "random")
    tokenizer.save_pretrained(folder / "random")
    batches = Batches(
        draw, layout, settings["batch_size"], derive_seed(settings["seed"], "decoder text")
    )
    started = time.monotonic()
    last_loss = optimise(model, batches, settings)
    examples = [layout(text, held_rng, plain=False) for text in held_out]
    figures = {
        "held_out_exact_match": exact_match(model, examples, settings["embedding_noise"]),
        "held_out_texts": len(examples),
        "last_loss": round(last_loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "seconds": round(time.monotonic() - started, 1),
        "text": "lm_text.txt" if corpus.text_file else "random strings and train transcripts",
    }
    model.save_pretrained(folder / "trained")
    tokenizer.save_pretrained(folder / "trained")
    return figures


def optimise(model, batches: Batches, settings: dict) -> float:
    """The training loop. Returns the last loss."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=tuple(settings["betas"]),
    )
    model.train()
    loss = torch.zeros(())
    for step in range(settings["steps"]):
        raise_if_stopped()
        for group in optimiser.param_groups:
            group["lr"] = scheduled_lr(step, settings)
        logits, labels = forward(
            model, batches(), settings["embedding_noise"], settings["max_gain"]
        )
        loss = nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimiser.step()
        if (step + 1) % 50 == 0:
            print(
                f"decoder: step {step + 1} of {settings['steps']}, loss {loss.item():.3f}",
                flush=True,
            )
    return loss.item()


def scheduled_lr(step: int, settings: dict) -> float:
    """Linear warm-up, then linear decay to zero.

    Example
    -------
    >>> s = {"lr": 1.0, "warmup_steps": 2, "steps": 4}
    >>> [scheduled_lr(step, s) for step in range(4)]
    [0.5, 0.75, 0.5, 0.25]
    """
    ramp = min(1.0, (step + 1) / settings["warmup_steps"])
    return settings["lr"] * ramp * (1 - step / settings["steps"])
