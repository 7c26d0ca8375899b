"""The arithmetic of NF4: numbers into codes and scales, block by block, and back.

The rounding follows bitsandbytes' CPU path, so that the bytes are the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels import native
from inlay.kernels.gpu import runs_on
from inlay.kernels.native.calls import BLOCK, NESTED_BLOCK
from inlay.storage.quantized import chunk_size

SMALLEST = 1e-38
"""bitsandbytes divides by no absmax below this."""
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@cache
def quantiles(device: torch.device) -> Tensor:
    return torch.tensor(QUANTILES, device=device)


@cache
def byte_pairs(device: torch.device) -> Tensor:
    """Return the two NF4 values of every byte, (256,), two fp32 seen as one 64-bit integer."""
    table = torch.tensor(QUANTILES)
    byte = torch.arange(256)
    return (
        torch.stack([table[byte >> 4], table[byte & 15]], 1).view(torch.int64).view(-1).to(device)
    )


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """Return the 256 values of the signed dynamic 8-bit type, ascending, fp32.

    Seven decades; each has twice the values of the one below, evenly spread over its upper nine
    tenths, with both signs; and 0 and 1. Paper: arXiv 1511.04561.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        decade = 10.0 ** (exponent - 6)
        upper = (decade * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += upper + [-v for v in upper]
    return torch.tensor(sorted(values), device=device)


def midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def quantized_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a contiguous matrix: packed bytes (⌈n/2⌉, 1), absmax (⌈n/64⌉,)."""
    flat = w.reshape(-1)
    done = native.nf4_quantize(flat)
    if done is not None:
        return done
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-flat.numel() // BLOCK), device=w.device)
    step = chunk_size(w.device)
    for start in range(0, flat.numel(), step):
        indices, largest = chunk_blocks(flat[start : start + step].float())
        packed[start // 2 : (start + step) // 2, 0] = (indices[::2] << 4) | indices[1::2]
        absmax[start // BLOCK : (start + step) // BLOCK] = largest
    return packed, absmax


def chunk_blocks(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices (an even number) and absmax of fp32 weights, the first at a block's start."""
    whole = flat.numel() // BLOCK * BLOCK
    blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).reshape(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, rest / last])
    scaled = F.pad(scaled.clamp(-1, 1), (0, flat.numel() % 2))
    return nearest_quantiles(scaled), absmax


def nearest_quantiles(scaled: Tensor) -> Tensor:
    """Return the index of the nearest NF4 value, uint8; on a tie the lower one.

    Fifteen comparisons of all weights are a tenth of the time of a binary search for each.
    """
    indices = torch.zeros_like(scaled, dtype=torch.uint8)
    above = torch.empty_like(scaled, dtype=torch.bool)
    for threshold in midpoints(torch.tensor(QUANTILES)).tolist():
        indices += torch.gt(scaled, threshold, out=above)
    return indices


def nested(absmax: Tensor) -> dict[str, Tensor]:
    """Quantise the blocks' absmax (n,) to 8 bits around their mean, in blocks of 256."""
    offset = absmax.mean()
    thresholds = midpoints(dynamic_map(absmax.device))
    codes, scale = native.nf4_nest(absmax, offset, thresholds) or nested_codes(absmax - offset)
    return {
        "absmax": codes,
        "nested_absmax": scale,
        "nested_quant_map": dynamic_map(absmax.device).clone(),
        "nested_offset": offset,
    }


def nested_codes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8-bit codes (n,) and each 256's largest magnitude."""
    padded = F.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scale = padded.abs().amax(1)
    scaled = (padded * (1.0 / scale).unsqueeze(1)).clamp(-1, 1)
    codes = nearest_codes(scaled)
    codes[scale == 0] = 0
    return codes.reshape(-1)[: centred.numel()].clone(), scale


def nearest_codes(scaled: Tensor) -> Tensor:
    """Return the index of the dynamic map's nearest value, found as bitsandbytes finds it.

    It rounds to one of 65,536 steps of [-1, 1] first.
    """
    step = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).nan_to_num().to(torch.int32)
    snapped = -1.0 + (2.0 * step.to(torch.float32)) / 65535.0
    return torch.bucketize(snapped, midpoints(dynamic_map(scaled.device))).to(torch.uint8)


def block_scales(parts: Sequence[Tensor], first: int = 0, stop: int | None = None) -> Tensor:
    """Return blocks' absmax in fp32, from `first` to `stop`, from the parts after the weight."""
    codes = parts[0][first:stop]
    if len(parts) == 1:
        return codes
    _, nested_absmax, nested_map, offset = parts
    blocks = torch.arange(first, first + codes.numel(), device=codes.device)
    return nested_map[codes.int()] * nested_absmax[blocks // NESTED_BLOCK] + offset


def dequantized(parts: Sequence[Tensor], out: Tensor, first: int) -> None:
    """Write the dense matrix's rows from `first` on into `out`, each weight rounded once."""
    if runs_on(out.device):
        from inlay.kernels.gpu import nf4

        return nf4.dequantize(parts, quantiles(out.device), out, first)
    if native.nf4_dequantize(parts, out, first):
        return
    flat, packed = out.view(-1), parts[0].reshape(-1)
    begin = first * out.shape[1]
    end = begin + out.numel()
    table = byte_pairs(packed.device)
    step = chunk_size(packed.device)
    for start in range(begin // BLOCK * BLOCK, end, step):
        stop = min(start + step, end)
        pairs = table.index_select(0, packed[start // 2 : (stop + 1) // 2].int())
        values = pairs.view(torch.float32)[: stop - start]
        scale_blocks(values, block_scales(parts[1:], start // BLOCK, -(-stop // BLOCK)))
        before = max(begin - start, 0)
        flat[start + before - begin : stop - begin].copy_(values[before:])


def scale_blocks(values: Tensor, absmax: Tensor) -> None:
    """Multiply values by their block's absmax, in place; the last block may be short."""
    whole = values.numel() // BLOCK
    blocks = values[: whole * BLOCK].view(-1, BLOCK)
    blocks *= absmax[:whole, None]
    values[whole * BLOCK :] *= absmax[whole:]
