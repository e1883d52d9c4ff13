"""Machines: memory maps, the devices on a board, what firmware would leave behind, and the guests that boot on it."""
