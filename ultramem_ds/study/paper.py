"""Points of the paper's figures that its tables print (arXiv 2411.12364, Tables 1, 4 and 6)."""

from __future__ import annotations

TRAINING_TOKENS = 238_418 * 2048 * 2048  # Table 4: steps, batch size, sequence length
FORWARD_AND_BACKWARD = 3  # of the forward's FLOPs

# Group -> (forward FLOPs per token, C4 validation loss) at 151M, 680M, 1.6B (dense: and 6.5B).
TABLE_1: dict[str, tuple[tuple[float, float], ...]] = {
    "dense": ((0.30e9, 2.96), (1.36e9, 2.64), (3.21e9, 2.49), (12.88e9, 2.30)),
    "pkm": ((0.35e9, 2.76), (1.50e9, 2.46), (3.48e9, 2.34)),
    "moe": ((0.35e9, 2.63), (1.50e9, 2.39), (3.52e9, 2.30)),
    "ultramem": ((0.35e9, 2.67), (1.49e9, 2.37), (3.50e9, 2.24)),
}


def compute_points(group: str) -> list[tuple[float, float]]:
    """(training FLOPs, validation loss) of one kind; empty for a group the paper does not have."""
    scale = FORWARD_AND_BACKWARD * TRAINING_TOKENS
    return [(flops * scale, loss) for flops, loss in TABLE_1.get(group, ())]
