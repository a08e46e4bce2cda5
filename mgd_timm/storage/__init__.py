"""Files that survive kills: atomic writes, checkpoints, locks, safetensors headers."""
