"""Models on several ranks: shards, sums over ranks, wrappers and distributed checkpoints."""
