"""What is wrong on this machine for relod, and what mends it. One module per area; `examination` puts them together."""
