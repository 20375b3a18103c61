"""The only place that knows the order: build, load train state, remove layers, add healing adapters, load heal state.

Names of train-state tensors use the original layer numbers, names of heal-state tensors those after the cut; any other
order would load the wrong layer's weights without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from speechllm_prune.checkpoint import load_checkpoint_tensors
from speechllm_prune.experiment import Experiment, Variant, read_json
from speechllm_prune.hparams import load_hparams
from speechllm_prune.models.decoder import decoder_layers, load_decoder
from speechllm_prune.models.encoder import load_encoder
from speechllm_prune.models.speechllm import SpeechLLM
from speechllm_prune.prune.compensate import COMPENSATION_FILE, check_compensable
from speechllm_prune.prune.lora import (
    TRAIN_ADAPTER,
    LoraSettings,
    adapter_names,
    add_decoder_lora,
    add_healing_lora,
    check_adapter,
    remove_healing_lora,
)
from speechllm_prune.prune.surgery import PrunePlan, Removal, num_layers
from speechllm_prune.recoverables import load_tensors
from speechllm_prune.runtime import UserError, derive_seed

EXTRAS: dict[str, dict[str, Any]] = {
    "all": {"heal_lora_layers": "all"},
    "comp": {"compensate": True},
    "kl": {"heal_kl_beta": 1.0},
}
"""Tags of what goes beyond the paper, and the keys that stand behind them (what `joint+kl` in a sweep sets)."""


@dataclass
class HealState:
    """What healing adds to a cut model.

    Arguments
    ---------
    mode : str
        none (with a compensation) | decoder | projector | joint.
    lora : LoraSettings
        Of the receiving layer's adapters (unused in modes `projector` and `none`).
    tensors : dict, optional
        Trained tensors by name; None for a fresh start.
    lora_layers : str
        receiver | all: where the adapters sit.
    compensation : Tensor, optional
        Weight that takes the place of `mlp.down_proj` of the layer before the cut.
    """

    mode: str
    lora: LoraSettings
    tensors: dict[str, Tensor] | None = field(default=None, repr=False)
    lora_layers: str = "receiver"
    compensation: Tensor | None = field(default=None, repr=False)

    @property
    def heals_decoder(self) -> bool:
        """Whether adapters sit on the receiving layer."""
        return self.mode in ("decoder", "joint")

    @property
    def heals_projector(self) -> bool:
        """Whether the projector is trained."""
        return self.mode in ("projector", "joint")

    def facts(self) -> dict[str, Any]:
        """For DONE.json, from which `read_heal_state` reads it back."""
        return {
            "heal_mode": self.mode,
            "lora": asdict(self.lora),
            "lora_layers": self.lora_layers,
            "compensated": self.compensation is not None,
        }


def choose_device(name: str | None) -> str:
    """The device asked for, else a GPU if there is one."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UserError(f"device {name!r} is none; give cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but torch finds no GPU here; give cpu")
    return name


def frozen_dtype(precision: str, device: str) -> torch.dtype:
    """Type of the frozen weights: bf16 on a GPU unless fp32 is asked for."""
    use_bf16 = precision == "bf16" or (precision == "auto" and device.startswith("cuda"))
    return torch.bfloat16 if use_bf16 else torch.float32


def build_model(hparams: dict[str, Any], device: str | None = None) -> SpeechLLM:
    """Build the untrained SpeechLLM of an experiment: pretrained parts loaded, projector and adapters initialised.

    Sizes are read from the models. The initial values depend on the experiment's seed alone, not on the rank.

    Arguments
    ---------
    hparams : dict
        From `load_hparams`.
    device : str, optional
        Default: the key `device`, else a GPU if there is one.

    Returns
    -------
    SpeechLLM
        On the device, nothing trainable.
    """
    device = choose_device(device or hparams["device"])
    dtype = frozen_dtype(hparams["precision"], device)
    encoder = load_encoder(
        hparams["encoder_hub"], hparams["encoder_revision"], dtype, hparams["encoder_output_norm"]
    )
    decoder, tokenizer = load_decoder(
        hparams["decoder_hub"], hparams["decoder_revision"], dtype, hparams["attention"]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(hparams["seed"], "init"))
        projector = _build_projector(hparams, encoder.output_size, decoder)
        if hparams["decoder_lora_rank"]:
            add_decoder_lora(
                decoder,
                LoraSettings(
                    hparams["decoder_lora_rank"],
                    hparams["decoder_lora_alpha"],
                    hparams["decoder_lora_dropout"],
                ),
            )
    model = SpeechLLM(
        encoder,
        projector,
        decoder,
        tokenizer,
        frame_stack=hparams["frame_stack"],
        prompt=hparams["prompt"],
        text_case=hparams["text_case"],
        task=hparams["task"],
        max_tokens_per_second=hparams["max_tokens_per_second"],
        loss_chunk_rows=hparams["loss_chunk_rows"],
        decode_graphs=hparams["decode_graphs"],
    )
    return model.requires_grad_(False).to(device)


def _build_projector(hparams: dict[str, Any], encoder_size: int, decoder: Any) -> nn.Module:
    sizes = {
        "input_size": hparams["frame_stack"] * encoder_size,
        "hidden_size": hparams["projector_dim"],
        "output_size": decoder.get_input_embeddings().embedding_dim,
    }
    try:
        return hparams["projector_class"](**sizes, activation=hparams["activation"])
    except TypeError as error:
        raise UserError(
            f"projector_class: it is called with {', '.join(sizes)} and activation, and refuses them: {error}"
        ) from None


def train_names(model: SpeechLLM) -> list[str]:
    """Names of the parameters that stage 1 trains: the projector and, if there are any, the decoder's adapters."""
    projector = [f"projector.{name}" for name, _ in model.projector.named_parameters()]
    return projector + [f"decoder.{name}" for name in adapter_names(model.decoder, TRAIN_ADAPTER)]


def heal_names(model: SpeechLLM, heal: HealState, adapters: list[str]) -> list[str]:
    """Names of the parameters that healing trains."""
    projector = (
        [f"projector.{name}" for name, _ in model.projector.named_parameters()]
        if heal.heals_projector
        else []
    )
    return projector + [f"decoder.{name}" for name in adapters]


def set_trainable(model: SpeechLLM, names: list[str]) -> None:
    """Make exactly these parameters trainable."""
    wanted = set(names)
    parameters = dict(model.named_parameters())
    assert wanted <= set(parameters), sorted(wanted - set(parameters))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)


def load_train_state(model: SpeechLLM, experiment: Experiment) -> None:
    """Load the best checkpoint of stage 1 into an unpruned model."""
    done = read_json(experiment.stage("train") / "DONE.json")
    load_tensors(
        model,
        load_checkpoint_tensors(
            experiment.stage("train") / done["checkpoint"], done.get("checkpoint_sha256")
        ),
        train_names(model),
    )


def read_plan(experiment: Experiment, variant: Variant) -> PrunePlan:
    """The plan of a variant's block.

    Raises
    ------
    UserError
        If the block was never planned.
    """
    folder = experiment.stage(f"prune/{variant.block}")
    if not (folder / "plan.json").is_file():
        raise UserError(
            f"{folder / 'plan.json'} does not exist; run: python prune.py LEAF --block_size {variant.block_size} "
            f"--start_layer {variant.start_layer}"
        )
    plan = read_json(folder / "plan.json")
    return PrunePlan(
        plan["num_layers"], plan["start_layer"], plan["block_size"], control=variant.control
    )


def _tag_options(tag: str) -> str:
    """Options of heal.py that give a tag.

    Example
    -------
    >>> _tag_options("kl-second"), _tag_options("")
    (' --heal_kl_beta 1.0 --tag second', '')
    """
    parts = tag.split("-") if tag else []
    extras = [part for part in parts if part in EXTRAS]
    own = "-".join(part for part in parts if part not in EXTRAS)
    keys = [f" --{key} {value}" for extra in extras for key, value in EXTRAS[extra].items()]
    return "".join(keys) + (f" --tag {own}" if own else "")


def read_heal_state(experiment: Experiment, variant: Variant) -> HealState | None:
    """What healing trained or computed for a variant; None for plain `none`.

    Raises
    ------
    UserError
        If the healing is not finished.
    """
    if not variant.is_healed:
        return None
    command = (
        f"python heal.py LEAF --block_size {variant.block_size} --start_layer {variant.start_layer} "
        f"--heal_mode {variant.heal_mode}"
        + (" --control" if variant.control else "")
        + _tag_options(variant.tag)
    )
    folder = experiment.require(f"heal/{variant.name}", command)
    done = read_json(folder / "DONE.json")
    experiment.check_inputs(folder / "DONE.json", done)
    tensors = {}
    if "checkpoint" in done:
        tensors = load_checkpoint_tensors(
            folder / done["checkpoint"], done.get("checkpoint_sha256")
        )
    kept = read_plan(experiment, variant).kept_layers
    check_adapter(tensors, done["kept_layers"], kept, f"the healing in {folder}")
    compensation = load_file(folder / COMPENSATION_FILE)["weight"] if done["compensated"] else None
    lora = LoraSettings(**done["lora"])
    return HealState(done["heal_mode"], lora, tensors, done["lora_layers"], compensation)


@contextmanager
def cut(
    model: SpeechLLM, plan: PrunePlan, heal_state: HealState | None = None
) -> Iterator[list[str]]:
    """Remove a block, add healing state, and undo all of it at the end.

    Arguments
    ---------
    model : SpeechLLM
        The full model in its stage-1 state.
    plan : PrunePlan
        What to remove (nothing, for a control).
    heal_state : HealState, optional
        Adapters and tensors to add.

    Yields
    ------
    list of str
        Names of the parameters that the healing owns (empty without healing).
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    projector = {name: tensor.clone() for name, tensor in model.projector.state_dict().items()}
    removal = _removal(model, plan, heal_state)
    compensated = _compensated_weight(model, plan, heal_state)
    before = None if compensated is None else compensated.data
    try:
        yield _apply(model, plan, removal, heal_state)
    finally:
        remove_healing_lora(model.decoder)
        if removal is not None:
            removal.undo()
        if compensated is not None and before is not None:
            compensated.data = before
        model.projector.load_state_dict(projector)
        set_trainable(model, trainable)
        model.zero_grad(set_to_none=True)
        model.eval()


def _removal(model: SpeechLLM, plan: PrunePlan, heal_state: HealState | None) -> Removal | None:
    """What the plan removes, not applied yet (None: control); refused if plan, model and healing do not fit."""
    depth = num_layers(model.decoder)
    if plan.num_layers != depth:
        raise UserError(
            f"the plan is for a decoder of {plan.num_layers} layers, this one has {depth}"
        )
    if heal_state is not None and heal_state.heals_decoder and plan.receiving_layer is None:
        raise UserError(
            f"block {plan.name} reaches the last layer: there is no receiving layer to heal"
        )
    return None if plan.control else Removal(model.decoder, plan.start_layer, plan.block_size)


def _compensated_weight(model: SpeechLLM, plan: PrunePlan, heal_state: HealState | None) -> Any:
    """The parameter that a compensation replaces; None without one."""
    if heal_state is None or heal_state.compensation is None:
        return None
    check_compensable(model.decoder, plan.start_layer)
    return decoder_layers(model.decoder)[plan.start_layer - 1].mlp.down_proj.weight


def _apply(
    model: SpeechLLM, plan: PrunePlan, removal: Removal | None, heal_state: HealState | None
) -> list[str]:
    """Remove layers, merge the compensation, add adapters, load tensors; returns the names healing owns."""
    compensated = _compensated_weight(model, plan, heal_state)
    if removal is not None:
        removal.apply()
    if heal_state is None:
        return []
    if compensated is not None and heal_state.compensation is not None:
        compensated.data = heal_state.compensation.to(compensated)
    adapters: list[str] = []
    if heal_state.heals_decoder:
        layer = plan.receiving_layer if plan.control else plan.start_layer
        assert layer is not None
        layer = layer if heal_state.lora_layers == "receiver" else None
        adapters = add_healing_lora(model.decoder, layer, heal_state.lora)
        model.decoder.to(model.device)
    names = heal_names(model, heal_state, adapters)
    if heal_state.tensors is not None:
        load_tensors(model, heal_state.tensors, names)
    set_trainable(model, [])
    model.eval()
    return names


def restore(
    experiment: Experiment,
    variant: str = "full",
    hparams: dict[str, Any] | None = None,
    device: str | None = None,
) -> SpeechLLM:
    """A variant of an experiment, ready for use: eval mode, nothing trainable.

    Arguments
    ---------
    experiment : Experiment
        With a finished `train` stage.
    variant : str
        `full`, `l18n08-none`, `l18n08-joint`, ...
    hparams : dict, optional
        Default: the training stage's archive.
    device : str, optional
        Default: a GPU if there is one.

    Returns
    -------
    SpeechLLM
    """
    parsed = Variant.parse(variant)
    experiment.require("train", "python train.py LEAF --data_folder FOLDER")
    hparams = hparams or load_hparams(experiment.archive())
    model = build_model(hparams, device)
    load_train_state(model, experiment)
    if parsed.start_layer is not None:
        plan, heal_state = read_plan(experiment, parsed), read_heal_state(experiment, parsed)
        _apply(model, plan, _removal(model, plan, heal_state), heal_state)
    return model
