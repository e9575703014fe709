from checkpoint import newest_epoch_set, own_hash, plain_weights, read_manifest  # noqa: F401
