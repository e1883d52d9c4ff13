"""Hostile drivers of virtio devices: `mutate_and_feed` of each module is one step, `targets` puts devices to feed behind them."""
