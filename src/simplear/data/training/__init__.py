"""From shards to training batches: the order, mixing, and the DataModules."""
