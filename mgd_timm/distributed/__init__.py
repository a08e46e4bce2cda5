"""Several processes: launch, collectives, sharding, BatchNorm statistics."""
