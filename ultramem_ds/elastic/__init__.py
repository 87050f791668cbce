"""Checkpoints that move between world sizes, partition schemes and ZeRO stages (docs/checkpoints.md)."""
