"""An x86-64 PC, as much of it as Linux needs to boot."""
