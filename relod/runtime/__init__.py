"""The data path, in the order data takes; `modes.py` wires it."""
