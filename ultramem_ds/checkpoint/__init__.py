"""Checkpoints that move between world sizes, schemes and ZeRO stages (docs/checkpoints.md)."""
