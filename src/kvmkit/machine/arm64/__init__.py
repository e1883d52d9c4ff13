"""The arm64 board, and what it takes to boot Linux on it."""
