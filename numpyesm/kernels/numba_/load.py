"""What happens once, as weights are loaded: they are packed as tiles read them, and biases take up mean inputs."""

from __future__ import annotations

from ...weights.tensor import GROUP
from .cache import helper, kernel
from .emitter import TILE_COLUMNS
from .vectors import add_row, carray, float32_at, int64_at, pack_steps, uint8_at, uint16_at

# Steps of k that are packed of all panels in turn: rows and what becomes of them stay in the caches.
_STEPS_AT_ONCE = 8


@helper
def _as_it_is(order):
    """Whether a panel has neighbours of the weight in their order."""
    found = order[0] >= 0
    for j in range(1, TILE_COLUMNS):
        found = found and order[j] == order[0] + j
    return found


@helper
def _pack(numbers_at, item, source, inner, columns, order, group, steps, panels, out):
    step_bytes = item * group * TILE_COLUMNS
    for first in range(0, steps, _STEPS_AT_ONCE):
        last = min(first + _STEPS_AT_ONCE, steps)
        whole = min(last, max(first, inner // group))  # steps up to here have all their rows
        for panel in range(panels):
            wanted = carray(int64_at(order + 8 * panel * TILE_COLUMNS), (TILE_COLUMNS,))
            begin = first
            if _as_it_is(wanted):
                here = source + item * (group * columns * first + wanted[0])
                pack_steps(item, group, here, item * columns, whole - first, out + (panel * steps + first) * step_bytes)
                begin = whole
            for row in range(begin * group, last * group):
                step, member = row // group, row % group
                packed = carray(numbers_at(out + (panel * steps + step) * step_bytes), (group * TILE_COLUMNS,))
                numbers = carray(numbers_at(source + item * columns * row), (columns,))
                for j in range(TILE_COLUMNS):
                    packed[group * j + member] = numbers[wanted[j]] if row < inner and wanted[j] >= 0 else 0


@kernel
def pack_weights(item, source, inner, columns, order, group, steps, panels, out):
    """A matrix as products read it: (K, N) -> (panels, steps, tile column, group), zeros where it has nothing.

    Numbers have `item` bytes. `order` (panels · tile columns,) int64 says which column goes where, -1 is none. `group`
    neighbours in K lie together: two for products in bf16, else one.
    """
    if item == 4:
        _pack(float32_at, 4, source, inner, columns, order, group, steps, panels, out)
    elif item == 2:
        _pack(uint16_at, 2, source, inner, columns, order, group, steps, panels, out)
    else:
        _pack(uint8_at, 1, source, inner, columns, order, group, steps, panels, out)


@kernel
def add_mean(item, weight, inner, columns, mean, scales, bias):
    """bias += mean @ weight, in float32: (K,), (K, N) -> (N,). Numbers are bf16 or, of one byte, int8 with `scales`."""
    for k in range(inner):
        at = scales + 4 * columns * (k // GROUP)
        add_row(item, weight + item * columns * k, at, mean + 4 * k, columns, bias)
