"""Training-free compensation of a cut: one least-squares map, merged into a weight that is there already.

After layers l .. l+n-1 are gone the receiving layer reads h[l] where it used to read h[l+n]. The output of the layer
before the cut is h[l] = a + m, with m = W x from its `down_proj` and a the rest of the residual stream. The map T that
makes a + T m nearest to h[l+n] over real positions is found in one pass over the unpruned decoder, and T W takes the
place of W: no new parameter, no new operation (the idea of ReplaceMe, arXiv 2505.02819, solved here with padding left
out, sums in float64, and a ridge that pulls T towards the identity, i.e. towards doing nothing). Errors are relative to
|h[l+n]|: layers normalise what they read, so a direction counts and a length does not, and without it the few positions
of largest norm, which are those of speech, decide the map.

Shapes: B sequences, T positions, H width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from speechllm_prune.models.decoder import decoder_layers
from speechllm_prune.runtime import UserError, raise_if_stopped

COMPENSATION_FILE = "compensation.safetensors"


class _Streams:
    """Context: hooks that keep m, h[l] and h[l+n] of the next forward pass."""

    def __init__(self, decoder: Any, start_layer: int, block_size: int) -> None:
        self.layers = decoder_layers(decoder)
        self.start, self.end = start_layer, start_layer + block_size
        self.seen: dict[str, Tensor] = {}

    def __enter__(self) -> _Streams:
        def keep_input(name: str) -> Any:
            def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.seen[name] = args[0] if args else kwargs["hidden_states"]

            return hook

        def keep_output(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.seen["after"] = output[0] if isinstance(output, tuple) else output

        def keep_mlp(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.seen["mlp"] = output

        before = self.layers[self.start - 1]
        self.handles = [
            before.mlp.down_proj.register_forward_hook(keep_mlp),
            self.layers[self.start].register_forward_pre_hook(
                keep_input("before"), with_kwargs=True
            ),
        ]
        if self.end < len(self.layers):
            self.handles.append(
                self.layers[self.end].register_forward_pre_hook(
                    keep_input("after"), with_kwargs=True
                )
            )
        else:  # the end of the stream, before the final norm
            self.handles.append(self.layers[-1].register_forward_hook(keep_output))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self.handles:
            handle.remove()


def check_compensable(decoder: Any, start_layer: int) -> None:
    """Raise UserError where there is no weight that could take the map.

    Raises
    ------
    UserError
        For a block at layer 0, or a layer whose MLP output is normalised (Gemma) or biased.
    """
    if start_layer < 1:
        raise UserError(
            "compensation merges into the layer before the cut, and a block that starts at layer 0 has none; "
            "give another --start_layer, or no compensation"
        )
    layer = decoder_layers(decoder)[start_layer - 1]
    down_proj = getattr(getattr(layer, "mlp", None), "down_proj", None)
    normed = hasattr(layer, "post_feedforward_layernorm")
    if down_proj is None or normed or getattr(down_proj, "bias", None) is not None:
        raise UserError(
            "compensation needs layers that add mlp.down_proj, without a bias, to the stream, which "
            f"{type(layer).__name__} does not"
        )


@torch.no_grad()
def fit_compensation(
    decoder: Any,
    start_layer: int,
    block_size: int,
    batches: Iterable[Mapping[str, Tensor]],
    ridge: float,
) -> Tensor:
    """The weight of layer l-1's `down_proj` that best makes up for the missing block.

    Arguments
    ---------
    decoder : PreTrainedModel
        The unpruned causal LM.
    start_layer, block_size : int
        l >= 1 and n.
    batches : iterable of mappings
        `inputs_embeds` (B, T, H) or `input_ids` (B, T), `attention_mask` (B, T), padded on either side.
    ridge : float
        Weight of |T - I|^2, times the mean of the diagonal of the Gram matrix.

    Returns
    -------
    Tensor
        (H, intermediate size), in the type of the weight it replaces.

    Raises
    ------
    UserError
        See `check_compensable`; also if there is no data.
    """
    check_compensable(decoder, start_layer)
    down_proj = decoder_layers(decoder)[start_layer - 1].mlp.down_proj
    weight = down_proj.weight
    width = weight.shape[0]
    gram = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    cross = torch.zeros_like(gram)
    decoder.eval()
    with _Streams(decoder, start_layer, block_size) as streams:
        for batch in batches:
            raise_if_stopped()
            mask = batch["attention_mask"]
            sequences = {key: batch[key] for key in ("inputs_embeds", "input_ids") if key in batch}
            decoder.get_decoder()(
                **sequences,
                attention_mask=mask,
                position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            )
            mlp, before, after = (
                streams.seen[name][mask.bool()].double() for name in ("mlp", "before", "after")
            )  # (real positions, H)
            scale = after.norm(dim=-1, keepdim=True)
            inputs, targets = mlp / scale, (after - before + mlp) / scale
            gram += inputs.T @ inputs
            cross += inputs.T @ targets
    gram, cross = _all_reduce(gram), _all_reduce(cross)
    transform = solve(gram, cross, ridge)
    return (transform @ weight.double()).to(weight.dtype)


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """T that minimises sum |y - T x|^2 + lambda |T - I|^2, from sums of x x^T and x y^T.

    Arguments
    ---------
    gram : Tensor
        (H, H) float64 sum of x x^T.
    cross : Tensor
        (H, H) float64 sum of x y^T.
    ridge : float
        lambda in units of the mean of the Gram matrix' diagonal.

    Returns
    -------
    Tensor
        (H, H) float64.

    Example
    -------
    >>> x = torch.eye(2, dtype=torch.float64)
    >>> solve(x.T @ x, x.T @ (3 * x), ridge=0.0)
    tensor([[3., 0.],
            [0., 3.]], dtype=torch.float64)
    """
    scale = gram.diagonal().mean()
    if scale == 0:
        raise UserError("there is nothing to fit the compensation on")
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * scale * identity, cross + ridge * scale * identity).T


def _all_reduce(total: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from speechbrain.utils.distributed import ddp_all_reduce

        return ddp_all_reduce(total, torch.distributed.ReduceOp.SUM)
    return total
