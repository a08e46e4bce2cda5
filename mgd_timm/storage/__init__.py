"""Files that survive kills: atomic writes, checkpoints, locks, digests and safetensors headers."""
